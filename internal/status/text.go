package status

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"regexp"
	"strings"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/internal/terminal"
)

// TextOptions are how a Status is told to a person.
type TextOptions struct {
	Now   time.Time // for ages
	Width int       // of a line, in columns
	Style terminal.Style
	// History is how many of the last transitions are told; 0: Recent.
	History int
}

const (
	// Recent is how many transitions are told where nobody asks for all.
	Recent = 10

	labelWidth  = 15
	maxServices = 10
	maxPorts    = 20
	maxLeft     = 3
	maxOfKind   = 5   // findings in one place
	maxText     = 800 // bytes of a text that others may have written
	maxShort    = 120 // of a name
)

// Text tells a person how the VM stands: the verdict first, then the parts it rests on, then what
// is wrong with what to do about it, and last what happened: a terminal shows the end of it.
func (s Status) Text(out io.Writer, o TextOptions) error {
	o.History = cmp.Or(o.History, Recent)
	p := &printer{TextOptions: o}
	p.verdict(s)
	p.WriteByte('\n')
	p.agent(s)
	p.services(s)
	p.rules(s)
	p.envoy(s.Envoy)
	p.controlPlane(s.ControlPlane)
	p.channels(s.Channels)
	p.cost(s)
	p.lastFailure(s)
	if s.Mode != "starting" { // then the verdict has said it
		p.findings(s)
	}
	p.history(s.History)
	_, err := out.Write(p.Bytes())
	return err
}

// printer is a text in the making.
type printer struct {
	bytes.Buffer
	TextOptions
}

// line writes a line; what does not fit goes on, indented by hang more.
func (p *printer) line(hang int, text string) {
	p.WriteString(terminal.Wrap(ages.ReplaceAllStringFunc(text, unbroken), p.Width, hang) + "\n")
}

// ages are times with their unit, which stay in one line.
var ages = regexp.MustCompile(`(?:in )?\d+ (?:s|ms|min|h|days)\b(?: ago)?`)

func unbroken(text string) string { return strings.ReplaceAll(text, " ", terminal.NoBreak) }

// row writes a name and what is said of it. Whatever that quotes, it is one line that moves no
// cursor.
func (p *printer) row(name, format string, args ...any) {
	text := symptom.Printable(fmt.Sprintf(format, args...), 3*maxText)
	hang := labelWidth
	if name == "" {
		hang = 0 // it goes on as deep as it begins
	}
	p.line(hang, p.label(name)+text)
}

func (p *printer) label(name string) string {
	if terminal.Columns(name) >= labelWidth {
		return name + " " // it may be broken, where a colour would go on
	}
	return p.Style.Bold(name) + strings.Repeat(" ", labelWidth-terminal.Columns(name))
}

// at is a moment with its age; "" for none.
func (p *printer) at(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return fmt.Sprintf("%s (%s)", t.UTC().Format(time.RFC3339), age(p.Now.Sub(t)))
}

// age is how long ago something was, in one unit.
func age(d time.Duration) string {
	if d < 0 {
		return "in " + span(-d)
	}
	return span(d) + " ago"
}

func span(d time.Duration) string {
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%d s", d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%d min", d/time.Minute)
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h", d/time.Hour)
	}
	return fmt.Sprintf("%d days", d/(24*time.Hour))
}

// seconds is a short time.
func seconds(s float64) string {
	if s < 1 {
		return fmt.Sprintf("%.0f ms", 1000*s)
	}
	return fmt.Sprintf("%.1f s", s)
}

func short(text string) string { return symptom.Printable(text, maxShort) }

func number(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
