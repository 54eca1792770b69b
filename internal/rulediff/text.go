package rulediff

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/service-proxy-agent/service-proxy-agent/internal/terminal"
)

// maxLine is the most of a rule, or of a word on it, that a line of text has. A comment in a rule
// has 256 bytes, which may each be four of those printed here.
const maxLine = 4000

// JSON is the Difference for programs, which docs/diff.schema.json describes.
func (d Difference) JSON(out io.Writer) error {
	b := bufio.NewWriter(out)
	encoder := json.NewEncoder(b)
	encoder.SetIndent("", "  ")
	if err := encoder.Encode(d); err != nil {
		return err
	}
	return b.Flush()
}

// Text is the Difference for people: the lines of each family that has some, then how many, or that
// nothing differs and what was compared, and what to do. What matters most is at the end, where a
// long difference leaves a terminal. A rule that is wider than width goes on below itself.
func (d Difference) Text(out io.Writer, style terminal.Style, width int) error {
	b := bufio.NewWriter(out)
	say := func(format string, args ...any) {
		fmt.Fprint(b, terminal.Wrap(fmt.Sprintf(format+"\n", args...), width, 4))
	}
	for _, f := range d.Families {
		if len(f.Lines) > 0 {
			say("%s", style.Bold("# "+f.Family))
			printLines(b, f.Lines, style, width)
		}
	}
	if len(d.Others) > 0 {
		say("%s", style.Bold("# elsewhere"))
		printLines(b, d.Others, style, width)
	}
	for _, f := range d.Families {
		switch f.Result {
		case Unknown:
			say("%s: %s: %s", f.Family, style.Warn("could not look"), safe(f.Why))
		case Off:
			say("%s: off: %s", f.Family, safe(f.Why))
		}
	}
	for _, note := range d.Notes {
		say("%s", safe(note))
	}
	fmt.Fprintln(b, style.Bold(terminal.Wrap(safe(d.verdict()), width, 4)))
	switch {
	case d.Result == Unknown && d.needsRoot:
		say("%s run it as root", style.Dim("next:"))
	case d.Result == Unknown:
		say("%s look why with `sudo service-proxy-agent doctor`", style.Dim("next:"))
	case d.Config == "" && len(d.of(IsOther)) > 0:
		say("%s a running agent repairs that by itself; if it does not, see "+
			"`sudo service-proxy-agent doctor`", style.Dim("next:"))
	}
	return b.Flush()
}

func printLines(b *bufio.Writer, lines []Line, style terminal.Style, width int) {
	paint := map[string]func(string) string{"-": style.Bad, "+": style.Good, "!": style.Warn}
	for _, l := range lines {
		line := l.Mark + " " + safe(l.Text)
		if colour := paint[l.Mark]; colour != nil {
			line = colour(l.Mark) + " " + safe(l.Text)
		}
		note := ""
		if l.Note != "" {
			note = "  " + style.Dim("#") + " " + safe(l.Note)
		}
		fmt.Fprintln(b, terminal.Wrap(line+note, width, 4))
	}
}

// verdict is the line that sums it up.
func (d Difference) verdict() string {
	if d.Config != "" {
		return d.configVerdict()
	}
	same, differ := d.of(IsSame), d.of(IsOther)
	var said []string
	switch {
	case d.Result == IsOther && len(differ) == 0:
		said = append(said, "Rules of ours are left in the other backend: "+d.Counts.String())
	case d.Result == IsOther:
		said = append(said, and(differ)+" rules differ: "+d.Counts.String())
	}
	if len(same) > 0 {
		said = append(said, fmt.Sprintf("%s rules are as wanted: %s", and(same),
			d.compared(IsSame)))
		if d.Result == IsSame && d.Foreign > 0 {
			said = append(said, fmt.Sprintf("%s (!), which is no difference", matter(d.Foreign)))
		}
	}
	if len(said) == 0 {
		return "Could not look"
	}
	return strings.Join(said, "; ")
}

func (d Difference) configVerdict() string {
	if differ := d.of(IsOther); len(differ) > 0 {
		return fmt.Sprintf("With %q the %s rules change: %s would go (-), %s would come (+), "+
			"against %s: %s", d.Config, and(differ), lines(d.Absent), lines(d.Unwanted), d.Against,
			d.compared(IsOther))
	}
	if same := d.of(IsSame); len(same) > 0 {
		return fmt.Sprintf("With %q the %s rules stay as they are, against %s: %s", d.Config, and(same),
			d.Against, d.compared(IsSame))
	}
	return "Could not look"
}

// compared is what was compared of the families with this result: "3 services, 21 rules, nft".
func (d Difference) compared(result string) string {
	rules := 0
	for _, f := range d.Families {
		if f.Result == result {
			rules += f.Rules
		}
	}
	said := fmt.Sprintf("%s, %s", number(d.Services, "service"), number(rules, "rule"))
	if d.Backend != "" {
		said += ", " + d.Backend
	}
	return said
}

// of are the names of the families with a result.
func (d Difference) of(result string) (names []string) {
	for _, f := range d.Families {
		if f.Result == result {
			names = append(names, f.Family)
		}
	}
	return names
}

// String is e.g. "1 line absent (-), 2 lines unwanted (+), 1 line of others matters (!)".
func (c Counts) String() string {
	var said []string
	if c.Absent > 0 {
		said = append(said, lines(c.Absent)+" absent (-)")
	}
	if c.Unwanted > 0 {
		said = append(said, lines(c.Unwanted)+" unwanted (+)")
	}
	if c.Foreign > 0 {
		said = append(said, matter(c.Foreign)+" (!)")
	}
	return strings.Join(said, ", ")
}

func matter(n int) string {
	if n == 1 {
		return "1 line of others matters"
	}
	return fmt.Sprintf("%d lines of others matter", n)
}

func lines(n int) string { return number(n, "line") }

func number(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func and(names []string) string { return strings.Join(names, " and ") }

// safe is s on one line: what moves a cursor, turns the direction of a text or is not seen is
// written as Go writes it (\x1b, \u202e), so that it is still told from something else.
func safe(s string) string {
	var b strings.Builder
	for len(s) > 0 {
		if b.Len() > maxLine {
			b.WriteString("…")
			break
		}
		r, size := utf8.DecodeRuneInString(s)
		switch {
		case r == utf8.RuneError && size == 1:
			fmt.Fprintf(&b, `\x%02x`, s[0])
		case strconv.IsPrint(r):
			b.WriteString(s[:size])
		default:
			quoted := strconv.QuoteRune(r)
			b.WriteString(quoted[1 : len(quoted)-1])
		}
		s = s[size:]
	}
	return b.String()
}
