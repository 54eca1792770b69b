package status

import (
	"fmt"
	"slices"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// history is a line for each of the last transitions, the newest last.
func (p *printer) history(all []Transition) {
	if len(all) == 0 {
		return
	}
	some := all[max(0, len(all)-p.History):]
	more := ""
	if n := len(all); n > len(some) {
		more = fmt.Sprintf(" (%d of %d; --history shows all)", len(some), n)
	}
	fmt.Fprintf(p, "\n%s%s\n", p.Style.Bold("transitions"), more)
	wide := 0
	for _, one := range some {
		wide = max(wide, len(p.at(one.Time)))
	}
	for _, one := range some {
		by, times := "", ""
		if one.By != "" {
			by = ", by " + short(one.By)
		}
		if one.Times > 1 {
			times = fmt.Sprintf(", %d times since %s", one.Times, one.First.UTC().Format(time.RFC3339))
		}
		word := ""
		if slices.Contains([]string{"error", "warning"}, one.Severity) {
			word = p.severity(one.Severity) + " "
		}
		p.line(4, fmt.Sprintf("  %-*s  %s%s%s%s", wide, p.at(one.Time), word,
			symptom.Printable(one.Text, maxText), by, times))
	}
}
