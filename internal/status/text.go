package status

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"regexp"
	"slices"
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
