package status

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/internal/terminal"
)

func (p *printer) agent(s Status) {
	passed := "no pass has ended yet"
	if !s.Heartbeat.IsZero() {
		passed = "last pass " + age(p.Now.Sub(s.Heartbeat))
	}
	if does := s.Connections(); does != "" {
		p.row("mode", "%s: %s", s.Mode, does)
	}
	p.row("agent", "%s, started %s, %s", short(s.Version), p.at(s.Started), passed)
	if s.Ready {
		p.row("ready", "yes")
	} else {
		p.row("ready", "no: %s", symptom.Printable(s.NotReady, maxText))
	}
	if i := s.Interception; i.WhenEnvoyDownBy == "instance" || i.WhenEnvoyDownBy == "project" {
		p.row("", "when Envoy is down: %s, by the %s's metadata (service-proxy-agent-interception)",
			short(i.WhenEnvoyDown), i.WhenEnvoyDownBy)
	}
	if s.Bootstrap.Status != "" {
		p.row("bootstrap", "%s %s", short(s.Bootstrap.Status),
			symptom.Printable(s.Bootstrap.Failure, maxText))
	}
	if at := s.Attribute; at != nil {
		by := ""
		if at.Kept {
			by = " by an earlier run, and kept since the metadata server gives none that can be used"
		}
		p.row("attribute", "read %s%s", p.at(at.Read), by)
	}
}

// services is a table of the first ones: who wants all of 10,000 takes JSON.
func (p *printer) services(s Status) {
	p.row("services", "%d", len(s.Services))
	some := s.Services[:min(len(s.Services), maxServices)]
	wide := 0
	for _, one := range some {
		wide = max(wide, min(terminal.Columns(short(one.Name)), 40))
	}
	indent := strings.Repeat(" ", labelWidth)
	for _, one := range some {
		name := terminal.Cut(short(one.Name), 40)
		name += strings.Repeat(" ", wide-terminal.Columns(name))
		first := one.Addresses[:min(len(one.Addresses), maxPorts)]
		addresses := symptom.Printable(strings.Join(first, ", "), maxText)
		fmt.Fprintln(p, terminal.Cut(strings.TrimRight(indent+name+"  "+addresses, " "), p.Width))
	}
	if more := len(s.Services) - len(some); more > 0 {
		p.line(0, fmt.Sprintf("%sand %d more (`-o json` has all)", indent, more))
	}
	if n := len(s.ServingPorts); n > 0 {
		var ports []string
		for _, port := range s.ServingPorts[:min(n, maxPorts)] {
			ports = append(ports, fmt.Sprint(port))
		}
		if n > maxPorts {
			ports = append(ports, fmt.Sprintf("and %d more", n-maxPorts))
		}
		p.row("serving ports", "%s", strings.Join(ports, ", "))
	}
}

func (p *printer) rules(s Status) {
	for _, f := range s.Families {
		p.row(short(f.Family)+" rules", "%s", p.family(f, s.Backend))
		if f.Shape != nil && f.Shape.Held != "" {
			p.row("", "held back: %s", symptom.Printable(f.Shape.Held, maxText))
		}
		if f.Shape != nil && f.Shape.Settling {
			p.row("", "settling: connections from before are let through for some minutes")
		}
		for _, left := range f.Left[:min(len(f.Left), maxLeft)] {
			p.row("", "the kernel refuses %s: %s", symptom.Printable(left.Rule, maxText),
				symptom.Printable(left.Why, maxText))
		}
		if more := len(f.Left) - maxLeft; more > 0 {
			p.row("", "and %d more rules", more)
		}
	}
	if s.Undone > 0 {
		by := ""
		if s.LastDriftBy != "" {
			by = " by " + short(s.LastDriftBy)
		}
		p.row("drift", "%d repaired, the last %s%s", s.Undone, p.at(s.LastDriftWhen), by)
	}
}

func (p *printer) family(f Family, backend string) string {
	why := symptom.Printable(f.Error, maxText)
	if !f.Usable {
		return "off: " + why
	}
	state := "as wanted"
	switch {
	case f.Equal:
	case f.Shape == nil && why == "":
		state = "what is wanted is not known yet"
	default:
		state = "NOT as wanted"
		if why != "" {
			state += ": " + why
		}
	}
	jumps := "jumps in"
	if !f.Jumps {
		jumps = "jumps out: nothing is redirected"
	}
	said := fmt.Sprintf("%s, %s, %s (%s), %s", state, jumps, number(f.Rules, "rule"),
		cmp.Or(short(backend), "backend not known"), number(f.Services, "service prefix"))
	said = strings.Replace(said, "prefixs", "prefixes", 1)
	if f.ServicePorts > 0 {
		said += ", " + number(f.ServicePorts, "service port")
	}
	var to []string
	for _, port := range []struct {
		number uint16
		of     string
	}{{f.OutboundPort, "out"}, {f.InboundPort, "in"}, {f.DNSPort, "DNS"}} {
		if port.number != 0 {
			to = append(to, fmt.Sprintf("%d %s", port.number, port.of))
		}
	}
	if len(to) > 0 {
		said += ", to Envoy's ports " + strings.Join(to, ", ")
	}
	if !f.Applied.IsZero() {
		said += ", written " + p.at(f.Applied)
	}
	return said
}

func (p *printer) envoy(e Envoy) {
	switch {
	case e.Admin == "": // before the first pass
		return
	case e.State == "" && !e.Down.IsZero():
		p.row("Envoy", "down since %s, nothing answers on %s", p.at(e.Down), short(e.Admin))
	case e.State == "":
		p.row("Envoy", "no usable answer on %s", short(e.Admin))
	default:
		said := fmt.Sprintf("%s, %s", short(e.State), number(e.Listeners, "listener"))
		if e.Rejected > 0 {
			said += fmt.Sprintf(", %d rejected", e.Rejected)
		}
		if !e.Configured {
			said += ", not configured yet"
		}
		p.row("Envoy", "%s, on %s", said, short(e.Admin))
	}
	if e.Version != "" {
		p.row("", "version %s", symptom.Printable(e.Version, maxText))
	}
	if e.Node != "" {
		p.row("", "node %s", symptom.Printable(e.Node, maxText))
	}
}

func (p *printer) controlPlane(c ControlPlane) {
	to := ""
	if c.Target != "" {
		to = " to " + short(c.Target)
	}
	state := "whether Envoy is connected is not known"
	switch {
	case c.Known && c.Connected:
		state = "connected" + to
	case c.Known:
		state = "NOT connected" + to
	}
	if !c.Since.IsZero() {
		state += " since " + p.at(c.Since)
	}
	if !c.Heard.IsZero() {
		state += ", last listeners " + p.at(c.Heard)
	}
	p.row("control plane", "%s", state)
	if end := c.Closed; end != nil {
		p.row("", "last closed %s: %s (gRPC code %d)", p.at(end.Time),
			cmp.Or(symptom.Printable(end.Message, maxText), "no reason given"), end.Code)
	}
	if c.Error != "" {
		p.row("", "the agent's own try: %s", symptom.Printable(c.Error, maxText))
	}
}

// channels is a table, which is cut; why a channel is not up stands below its line.
func (p *printer) channels(all []Channel) {
	if len(all) == 0 {
		return
	}
	const form = "%-16s %-6s %7s %7s %7s %7s  %s"
	const name = "channels"
	head := terminal.Cut(fmt.Sprintf("%-*s"+form, labelWidth, name, "", "", "written", "failed",
		"dropped", "waiting", "budget left"), p.Width)
	fmt.Fprintln(p, p.Style.Bold(name)+strings.TrimPrefix(head, name))
	for _, c := range all {
		state := "down"
		switch {
		case !c.Enabled:
			state = "off"
		case c.Up:
			state = "up"
		case c.Last.IsZero() && c.Error == "":
			state = "unused"
		}
		left := ""
		if b := c.Budget; b.Most > 0 {
			left = fmt.Sprintf("%.3g of %.3g %s", b.Left, b.Most, short(b.Unit))
			if b.PerMinute > 0 {
				left += fmt.Sprintf(", %.3g/min", b.PerMinute)
			}
		}
		indent := strings.Repeat(" ", labelWidth)
		fmt.Fprintln(p, terminal.Cut(strings.TrimRight(indent+fmt.Sprintf(form,
			strings.ReplaceAll(short(c.Name), "_", " "), state, fmt.Sprint(c.Written),
			fmt.Sprint(c.Failures), fmt.Sprint(c.Dropped), fmt.Sprint(c.Waiting), left), " "), p.Width))
		if c.Error != "" && state != "up" {
			p.line(2, indent+"  why: "+symptom.Printable(c.Error, maxText))
		}
	}
}

// questions are what Envoy is asked, the dearest first: what is left for more of it, and what was
// spent.
func (p *printer) questions(c Cost) {
	name := "questions"
	row := func(format string, args ...any) {
		p.row(name, format, args...)
		name = ""
	}
	if b := c.Bucket; b.Size > 0 {
		row("%.1f of %.1f s of Envoy's main thread left for them, %.3g %% of the time comes back",
			max(0, b.Level), b.Size, 100*b.Share) // below 0 there is nothing left, too
	}
	if said := spent(c.Questions, func(q Question) float64 { return q.Recent }); said != "" {
		row("last %.0f s: %s", c.Window, said)
	}
	if said := spent(c.Questions, func(q Question) float64 { return q.Seconds }); said != "" {
		row("since the start: %s", said)
	}
}

// spent is "dump 2.1 s, look 140 ms" of what is known of each question; "" for nothing.
func spent(all []Question, of func(Question) float64) string {
	all = slices.DeleteFunc(slices.Clone(all), func(q Question) bool { return of(q) < .0005 })
	slices.SortStableFunc(all, func(a, b Question) int { return cmp.Compare(of(b), of(a)) })
	var said []string
	for _, q := range all {
		said = append(said, strings.ReplaceAll(short(q.Name), "_", " ")+" "+taken(of(q)))
	}
	return strings.Join(said, ", ")
}

// taken is a time that adds up, over weeks too.
func taken(s float64) string {
	if s < 600 {
		return seconds(s)
	}
	return span(time.Duration(s * float64(time.Second)))
}

func (p *printer) cost(s Status) {
	c := s.Cost
	if c.Resident == 0 {
		return
	}
	said := fmt.Sprintf("%d MB of memory", (c.Resident+1<<19)>>20)
	if c.Window > 0 {
		said = fmt.Sprintf("%.2g %% of Envoy's main thread, %.2g %% of a processor (over %.0f s), %s",
			100*c.EnvoyShare, 100*c.CPUShare, c.Window, said)
	}
	p.row("cost", "%s", said)
	p.questions(c)
	if len(s.Samples) == 0 {
		return
	}
	var all Sample
	for _, minute := range s.Samples {
		all.Changes += minute.Changes
		all.Repairs += minute.Repairs
		all.SlowestChange = max(all.SlowestChange, minute.SlowestChange)
		all.SlowestPass = max(all.SlowestPass, minute.SlowestPass)
	}
	said = fmt.Sprintf("%s of the rules", number(all.Changes, "change"))
	if all.SlowestChange > 0 {
		said += fmt.Sprintf(", in %s at most from when Envoy had it", seconds(all.SlowestChange))
	}
	p.row(fmt.Sprintf("last %d min", len(s.Samples)), "%s; %s; slowest pass %s", said,
		number(all.Repairs, "repair"), seconds(all.SlowestPass))
}

// lastFailure is what is read from elsewhere, unless a finding below says the same.
func (p *printer) lastFailure(s Status) {
	said := func(f symptom.Finding) bool {
		return f.Cause != "" && strings.HasPrefix(s.LastFailure, f.Cause)
	}
	if s.LastFailure != "" && !slices.ContainsFunc(s.Findings, said) {
		p.row("last failure", "%s", symptom.Printable(s.LastFailure, 2*maxText))
	}
}
