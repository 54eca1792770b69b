package status

import (
	"cmp"
	"fmt"
	"strings"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// verdict is the first line: how the VM stands, since when, and if not well the next step.
func (p *printer) verdict(s Status) {
	word, said := s.verdict(p)
	style := p.Style.Warn
	switch word {
	case healthy:
		style = p.Style.Good
	case notHealthy, stuck:
		style = p.Style.Bad
	}
	for i, part := range strings.Fields(word) { // a colour ends with its word: a line may break there
		if i > 0 {
			p.WriteByte(' ')
		}
		p.WriteString(style(part))
	}
	head := p.String()
	p.Reset()
	p.line(2, head+": "+symptom.Printable(said, 3*maxText))
}

// The words of the verdict.
const (
	healthy    = "Healthy"
	notHealthy = "Not healthy"
	notReady   = "Not ready"
	paused     = "Paused"
	off        = "Off"
	starting   = "Starting"
	stuck      = "Stuck"
)

func (s Status) verdict(p *printer) (word, said string) {
	errors, warnings := s.count()
	switch {
	case s.Mode == "starting":
		return starting, "no pass has ended yet; ask again in a second"
	case s.Stuck(p.Now):
		return stuck, fmt.Sprintf("no pass has ended since %s, and all below is of then; "+
			"`journalctl -u service-proxy-agent` has why, `systemctl restart service-proxy-agent` "+
			"starts it anew", p.at(s.Heartbeat))
	case s.Paused:
		return paused, "`cleanup` was called, and nothing is intercepted; `systemctl restart " +
			"service-proxy-agent` puts the rules in again"
	case s.Mode == "off":
		return off, s.braked(p, errors)
	case errors > 0:
		worst := symptom.Nested(s.Findings)[0]
		said = worst.Text()
		if errors > 1 {
			said += fmt.Sprintf(" (%s in all, see below)", number(errors, "error"))
		}
		return notHealthy, said
	case !s.Ready:
		return notReady, s.waits()
	}
	said = s.intercepts()
	if !s.Since.IsZero() {
		said += " since " + p.at(s.Since)
	}
	if warnings > 0 {
		said += ", with " + number(warnings, "warning")
	}
	return healthy, said
}

// braked is what a VM does whose brake is on. Errors that stand all the same are not the first
// thing to know: nothing depends on them now.
func (s Status) braked(p *printer, errors int) string {
	said := "interception is off, as intended, by " + s.Interception.whose() +
		" (service-proxy-agent-interception=off)"
	if !s.Interception.Since.IsZero() {
		said += " since " + p.at(s.Interception.Since)
	}
	said += ": connections go past Envoy; take the key away to end it"
	if errors > 0 {
		said += ", with " + number(errors, "error") + ", see below"
	}
	return said
}

// waits is why a VM is not ready where nothing is wrong.
func (s Status) waits() string {
	said := cmp.Or(s.NotReady, "the agent does not say why")
	if s.Bootstrap.Status == "IN_PROGRESS" {
		return said + "; bootstrap is under way, `journalctl -u service-proxy-bootstrap` follows it"
	}
	return said + "; this passes by itself, or `service-proxy-agent doctor` has more"
}

// intercepts is what a VM that is ready does.
func (s Status) intercepts() string {
	var what []string
	if n := len(s.Services); n > 0 {
		what = append(what, number(n, "service"))
	}
	if n := len(s.ServingPorts); n > 0 {
		what = append(what, number(n, "serving port"))
	}
	switch {
	case s.Mode != "intercepting":
		return "there is nothing to intercept"
	case len(what) == 0:
		return "intercepting"
	}
	return "intercepting " + strings.Join(what, " and ")
}

// count is how many findings there are, those that another explains aside.
func (s Status) count() (errors, warnings int) {
	for _, one := range symptom.Nested(s.Findings) {
		switch one.Worst() {
		case symptom.Error:
			errors++
		case symptom.Warning:
			warnings++
		case symptom.Advice:
		}
	}
	return errors, warnings
}
