package page

import (
	"strings"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/doctor"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// heading is how the VM stands, in a line.
type heading struct {
	level fixed
	word  string // the same in a word or two
	text  string
}

// Healthy says that neither what was looked at nor the agent knows of an error. It is what the
// headline says, and what `status --html` exits by.
func (c Content) Healthy() bool { return headline(c).level != bad }

// headline is the verdict.
func headline(c Content) heading {
	count := map[symptom.Severity]int{}
	looked, blind := false, 0
	for _, check := range c.Report.Checks {
		switch check.State {
		case symptom.OK:
			looked = true
		case symptom.Unknown:
			blind++
		case symptom.Found:
			count[check.Severity] += check.More
		}
	}
	// What another one explains goes with it.
	roots := c.Report.Tree()
	for _, n := range roots {
		count[n.Worst()]++
	}
	told := c.toldErrors()
	worst := append(roots, told...)
	if count[symptom.Error] == 0 {
		worst = told
	}
	switch errors, warnings := count[symptom.Error]+len(told), count[symptom.Warning]; {
	case errors > 0:
		said := "Not healthy: " + titleOf(c.Report, worst[0].ID)
		if errors > 1 {
			said += ", and " + numberOf(errors-1, "other error")
		}
		return heading{bad, "Not healthy", said}
	case !looked:
		return heading{unknown, "Not known", "Not known: nothing could be looked at"}
	case c.Status != nil && c.Status.Paused:
		return heading{warn, "Paused", "Paused: nothing is intercepted"}
	case c.Status != nil && c.Status.Mode == "off":
		return heading{warn, "Off", "Off, as intended: nothing is intercepted"}
	case c.Status != nil && !c.Status.Ready:
		return heading{warn, "Not ready", "Not ready: " + orUnknown(c.Status.NotReady)}
	case warnings > 0:
		return heading{warn, "Warnings", "Working, with " + numberOf(warnings, "warning")}
	case blind > 0:
		return heading{unknown, "Not known",
			"Nothing found, but " + numberOf(blind, "check") + " could not look"}
	}
	return heading{good, "Healthy", "Healthy"}
}

// toldErrors are the errors that the agent alone tells of: they may be over since its last pass, or
// of what only the agent sees. That its passes do not end is one.
func (c Content) toldErrors() (some []*symptom.Tree) {
	if c.Status == nil {
		return nil
	}
	found := map[symptom.ID]bool{}
	for _, f := range c.Report.Findings {
		found[f.ID] = true
	}
	told := c.Status.Findings
	if c.Status.Stuck(c.Time) {
		told = append([]symptom.Finding{{ID: symptom.AgentStuck, Severity: symptom.Error,
			Cause:    "No pass of the agent has ended since " + c.Status.Heartbeat.Format(time.RFC3339),
			Next:     "`journalctl -u service-proxy-agent` has why; restart it",
			Commands: []string{"sudo systemctl restart service-proxy-agent"}}}, told...)
	}
	for _, n := range symptom.Nested(told) {
		if n.Worst() == symptom.Error && !found[n.ID] {
			some = append(some, n)
		}
	}
	return some
}

// titleOf is what a kind of finding is called.
func titleOf(r doctor.Report, id symptom.ID) string {
	for _, check := range r.Checks {
		if check.ID == id {
			return check.Title
		}
	}
	return string(id)
}

// verdict is the first thing to see: how it stands, what that means for connections, and the
// figures that say the most.
func verdict(c Content) element {
	h := headline(c)
	return el("section", class("verdict "+h.level), attr{"aria-labelledby", "verdict"},
		el("div", class("headline"), icon(h.level),
			el("div", el("h1", id("verdict"), h.text), el("p", class("lede"), meaning(c)))),
		tiles(c))
}

// meaning is what becomes of connections now.
func meaning(c Content) string {
	s := c.status()
	said := sentence(s.Connections())
	switch {
	case c.Status == nil:
		said = "The agent does not answer: " + orUnknown(c.NoStatus) + ". This was seen without it, " +
			"and history, latencies and channels are not known."
		if !s.Envoy.Down.IsZero() {
			said = sentence(s.Connections()) + " " + said
		}
		return strings.TrimSpace(said)
	case s.Paused:
		return "Paused by cleanup: the rules are gone, and the agent writes none until it is " +
			"restarted. " + said
	case s.Mode == "off": // Connections has said it
	case s.Ready && len(s.Services) == 0:
		said = "There is nothing to intercept."
	case s.Ready:
		said = "Connections to " + numberOf(len(s.Services), "service") + " go through Envoy."
	}
	if s.NotReady != "" {
		said += " Not ready: " + s.NotReady + "."
	}
	return strings.TrimSpace(said)
}

// sentence makes one of words.
func sentence(words string) string {
	if words == "" {
		return ""
	}
	return strings.ToUpper(words[:1]) + words[1:] + "."
}

// tiles are the figures.
func tiles(c Content) element {
	s, now := c.status(), c.Time
	tile := func(name string, value, below any) element {
		return el("div", class("tile"), el("dt", name),
			el("dd", el("span", class("value"), value), el("span", class("below"), below)))
	}
	list := el("dl", class("tiles"))
	add := func(e element) { list.add([]any{e}) }
	if c.Status != nil {
		since := ""
		if !s.Since.IsZero() {
			since = "for " + span(now.Sub(s.Since))
		}
		add(tile("State", s.State(), since))
	}
	if c.Status != nil || len(s.Services) > 0 {
		below := "intercepted"
		switch {
		case c.Status == nil:
			below = "wanted"
		case s.Mode != "intercepting":
			below = "not intercepted now"
		}
		add(tile("Services", number(len(s.Services)), below))
	}
	if total, ok := connections(c); ok {
		add(tile("Connections", short(total), "led to Envoy"))
	}
	state := orUnknown(s.Envoy.State)
	if s.Envoy.State == "" && !s.Envoy.Down.IsZero() {
		state = "no answer"
	}
	add(tile("Envoy", state, s.Envoy.Number))
	rules, how := ruleCount(c)
	add(tile("Rules", rules, how))
	if slowest, measured := slowestChange(s.Samples); measured {
		add(tile("Slowest change", seconds(slowest), "in "+window(s.Samples)))
	}
	if s.Cost.Window > 0 {
		add(tile("Costs Envoy", percent(s.Cost.EnvoyShare), "of its main thread"))
		add(tile("Memory", bytesOf(s.Cost.Resident), "of the agent"))
	}
	return list
}

// ruleCount is how many rules there are, and how they are.
func ruleCount(c Content) (rules, how string) {
	n, read, asWanted := 0, false, true
	for _, f := range c.status().Families {
		n, read, asWanted = n+f.Rules, read || f.Usable, asWanted && (f.Equal || !f.Usable)
	}
	switch {
	case !read:
		return "not known", ""
	case asWanted:
		return number(n), "as wanted"
	}
	return number(n), "not all as wanted"
}

func slowestChange(samples []status.Sample) (slowest float64, measured bool) {
	for _, s := range samples {
		slowest = max(slowest, s.SlowestChange)
	}
	return slowest, slowest > 0
}

// window is how much time the samples are of.
func window(samples []status.Sample) string {
	if len(samples) == 0 {
		return "no time"
	}
	return span(samples[len(samples)-1].Time.Sub(samples[0].Time) + time.Minute)
}

// contents lead to the parts of the page.
func contents(parts []part) element {
	list := el("ul")
	for _, p := range parts {
		list.add([]any{el("li", el("a", href("#"+p.id), p.name))})
	}
	return el("nav", class("contents"), attr{"aria-label", "Parts of this page"}, list)
}
