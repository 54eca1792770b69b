package doctor

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/internal/terminal"
)

// Limits of what is printed. 10,000 listeners may be rejected at once, each with a name of a
// megabyte.
const (
	maxText     = 2000 // bytes of a cause, a next step or a command in JSON
	maxEvidence = 300  // bytes of evidence in the text
	maxFindings = 200  // of one check in JSON
	maxShown    = 5    // of one check in the text that one finding explains, or that stand
	maxItems    = 20   // evidence and commands of a finding
	maxUnknown  = 15   // checks of one reason in the text
)

// bounded is a result with everything short enough.
func bounded(result symptom.Result) Check {
	c := Check{Result: result}
	c.Why = symptom.Printable(c.Why, maxText)
	if n := len(c.Findings); n > maxFindings {
		c.Findings, c.More = c.Findings[:maxFindings], n-maxFindings
	}
	c.Findings = append([]symptom.Finding{}, c.Findings...) // in JSON a list, not null
	for i := range c.Findings {
		f := &c.Findings[i]
		for _, text := range []*string{&f.Cause, &f.Next, &f.Key} {
			*text = symptom.Printable(*text, maxText)
		}
		f.Evidence = slices.Clone(f.Evidence[:min(len(f.Evidence), maxItems)])
		for i := range f.Evidence {
			f.Evidence[i].Text = symptom.Printable(f.Evidence[i].Text, maxText)
		}
		f.Commands = commands(f.Commands)
	}
	return c
}

// commands are those that can be pasted as they are printed. One that would have to be cut, or in
// which something cannot be seen, is another command then.
func commands(all []string) (fit []string) {
	for _, command := range all[:min(len(all), maxItems)] {
		if symptom.Printable(command, maxText) == command {
			fit = append(fit, command)
		}
	}
	return fit
}

// JSON is the Report for programs, which docs/doctor.schema.json describes.
func (r Report) JSON() ([]byte, error) {
	out, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return nil, err
	}
	return append(out, '\n'), nil
}

// Text is the Report for people, in lines of that width where words allow it. Commands stay on one
// line, so that they can be pasted.
func (r Report) Text(out io.Writer, style terminal.Style, width int) error {
	p := printer{style: style, width: width, some: symptom.Some{Few: maxShown}}
	p.line(2, "%s at %s by service-proxy-agent %s", style.Bold(r.verdict()),
		r.Time.Format(time.RFC3339), r.Version)
	for _, one := range p.some.Of(r.Tree()) {
		p.WriteByte('\n')
		p.finding(one, "")
	}
	r.omitted(&p)
	r.unknown(&p)
	p.WriteByte('\n')
	p.line(2, "%s", r.rest())
	_, err := out.Write(p.Bytes())
	return err
}

// printer is a text in the making.
type printer struct {
	bytes.Buffer
	style terminal.Style
	width int
	some  symptom.Some // of the findings
}

// line writes a line; what does not fit goes on, indented by hang more.
func (p *printer) line(hang int, format string, args ...any) {
	p.WriteString(terminal.Wrap(fmt.Sprintf(format, args...), p.width, hang) + "\n")
}

// word is a severity as it is printed.
func (p *printer) word(s symptom.Severity) string {
	switch s {
	case symptom.Error:
		return p.style.Bad("ERROR")
	case symptom.Warning:
		return p.style.Warn("WARNING")
	case symptom.Advice:
		return p.style.Bold("ADVICE")
	}
	return s.String()
}

// verdict is the first line's word. What another finding explains goes with it, as in `status`.
func (r Report) verdict() string {
	n := map[symptom.Severity]int{}
	unknown := 0
	for _, one := range r.Tree() {
		n[one.Worst()]++
	}
	for _, check := range r.Checks {
		switch check.State {
		case symptom.Unknown:
			unknown++
		case symptom.Found:
			n[check.Severity] += check.More
		}
	}
	var words []string
	for _, s := range []symptom.Severity{symptom.Error, symptom.Warning, symptom.Advice} {
		if n[s] > 0 {
			words = append(words, fmt.Sprintf("%d %s", n[s], plural(s, n[s])))
		}
	}
	switch {
	case len(words) > 0:
	case !slices.ContainsFunc(r.Checks, func(c Check) bool { return c.State == symptom.OK }):
		words = append(words, "could not look")
	default:
		words = append(words, "nothing found")
	}
	if unknown > 0 {
		words = append(words, fmt.Sprintf("%d unknown", unknown))
	}
	return strings.Join(words, ", ")
}

func plural(s symptom.Severity, n int) string {
	if n == 1 || s == symptom.Advice {
		return s.String()
	}
	return s.String() + "s"
}

// omitted says what of many findings of a kind is not printed.
func (r Report) omitted(p *printer) {
	all := map[symptom.ID]int{}
	for _, f := range r.Findings {
		all[f.ID]++
	}
	began := false
	for _, check := range r.Checks {
		if check.State != symptom.Found {
			continue
		}
		if left := p.some.Others[check.ID] + check.More; left > 0 {
			if !began {
				p.WriteByte('\n')
			}
			began = true
			p.line(2, "and %d more of %s (`doctor -o json` has %d of all)", left, check.ID,
				all[check.ID])
		}
	}
}

// finding writes a finding, and what it explains below it.
func (p *printer) finding(n *symptom.Tree, indent string) {
	f := n.Finding
	p.line(2, "%s%s %s: %s", indent, p.word(f.Severity), p.style.Bold(string(f.ID)), f.Cause)
	row := func(name, value string) {
		p.line(len("  ")+nameWidth+1, "%s  %s %s", indent, p.name(name), value)
	}
	if f.Next != "" {
		row("next", f.Next)
	}
	for _, command := range f.Commands {
		fmt.Fprintf(p, "%s  %s %s\n", indent, p.name("run"), command)
	}
	if !f.Since.IsZero() {
		row("since", f.Since.UTC().Format(time.RFC3339))
	}
	for _, e := range f.Evidence {
		at := ""
		if !e.Time.IsZero() {
			at = " at " + e.Time.UTC().Format(time.RFC3339)
		}
		row("seen", fmt.Sprintf("%s%s: %s", e.Source, at, symptom.Printable(e.Text, maxEvidence)))
	}
	if len(n.Explains) > 0 {
		fmt.Fprintf(p, "%s  %s\n", indent, p.style.Dim("explains"))
	}
	for _, below := range p.some.Of(n.Explains) {
		p.finding(below, indent+"    ")
	}
}

// nameWidth is the width of what stands before a row's value.
const nameWidth = 7

func (p *printer) name(name string) string {
	return p.style.Dim(name) + strings.Repeat(" ", nameWidth-len(name))
}

// unknown writes what is not known, a line for each reason.
func (r Report) unknown(p *printer) {
	for i, one := range r.Unknowns() {
		if i == 0 {
			p.WriteByte('\n')
		}
		from := ""
		if len(one.Sources) > 0 {
			from = " (" + joined(one.Sources) + ")"
		}
		ids, more := one.Checks, ""
		if n := len(ids) - maxUnknown; n > 1 {
			ids, more = ids[:maxUnknown], fmt.Sprintf(" and %d more (-o json names all)", n)
		}
		p.line(2, "%s %s%s: %s%s", p.style.Warn("UNKNOWN"), symptom.Printable(one.Why, maxEvidence), from,
			joined(ids), more)
	}
}

// rest is the line for what needs no words.
func (r Report) rest() string {
	fine := 0
	for _, check := range r.Checks {
		if check.State == symptom.OK {
			fine++
		}
	}
	line := fmt.Sprintf("%d checks ok", fine)
	if len(r.Ignored) > 0 {
		line += fmt.Sprintf(", %d ignored: %s", len(r.Ignored), joined(r.Ignored))
	}
	return line
}
