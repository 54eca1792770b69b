package status

import (
	"fmt"
	"strings"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

func (p *printer) findings(s Status) {
	if len(s.Findings) == 0 {
		return
	}
	fmt.Fprintf(p, "\n%s\n", p.Style.Bold("findings"))
	some := symptom.Some{Few: maxOfKind}
	for _, one := range some.Of(symptom.Nested(s.Findings)) {
		p.finding(one, "  ", &some)
	}
	for _, f := range s.Findings {
		if more := some.Others[f.ID]; more > 0 {
			p.line(2, fmt.Sprintf("  and %d more of %s (`-o json` has all)", more, short(string(f.ID))))
			delete(some.Others, f.ID)
		}
	}
}

func (p *printer) finding(one *symptom.Tree, indent string, some *symptom.Some) {
	f := one.Finding
	p.line(2, fmt.Sprintf("%s%s %s: %s", indent, p.severity(f.Severity.String()),
		short(string(f.ID)), symptom.Printable(f.Cause, maxText)))
	row := func(name, text string) {
		p.line(len("  ")+8, fmt.Sprintf("%s  %s%s", indent, p.Style.Dim(name),
			strings.Repeat(" ", 8-len(name))+text))
	}
	if f.Next != "" {
		row("next", symptom.Printable(f.Next, maxText))
	}
	for _, command := range f.Commands {
		if symptom.Printable(command, maxText) == command { // else it is another one
			fmt.Fprintf(p, "%s  %s     %s\n", indent, p.Style.Dim("run"), command)
		}
	}
	if !f.Since.IsZero() {
		row("since", p.at(f.Since))
	}
	if len(one.Explains) > 0 {
		fmt.Fprintf(p, "%s  %s\n", indent, p.Style.Dim("explains"))
	}
	for _, below := range some.Of(one.Explains) {
		p.finding(below, indent+"    ", some)
	}
}

func (p *printer) severity(word string) string {
	upper := strings.ToUpper(short(word))
	switch word {
	case "error":
		return p.Style.Bad(upper)
	case "warning":
		return p.Style.Warn(upper)
	}
	return p.Style.Dim(upper)
}
