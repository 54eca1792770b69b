package explain

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/service-proxy-agent/service-proxy-agent/internal/terminal"
)

// WriteText writes the answer for people: the verdict first, then the way through the rules, then
// Envoy's side. Its lines have that width at most.
func (a Answer) WriteText(out io.Writer, style terminal.Style, width int) error {
	var b strings.Builder
	line := func(format string, args ...any) {
		b.WriteString(terminal.Wrap(fmt.Sprintf(format+"\n", args...), width, 4))
	}
	row := func(name, value string) { line("%s %s", style.Dim(name+":"), value) }
	line("%s: %s", a.headline(style), a.Why)
	if a.Next != "" {
		row("next", a.Next)
	}
	if a.Setting != "" {
		row("would change it", a.Setting)
	}
	if a.Tried != nil {
		row("tried", a.Tried.String())
	}
	if a.Nearest != nil {
		row("nearest", strings.TrimPrefix(a.Nearest.Text, "nearest is "))
	}
	if len(a.Path) > 0 {
		line("\n%s (connections counted)", style.Bold("the way through table nat"))
		for _, step := range a.Path {
			line("  %s", step)
		}
	}
	if a.Listener != "" {
		line("\n%s", style.Bold(fmt.Sprintf("Envoy's listener %q", a.Listener)))
		for _, chain := range a.Chains {
			chain.write(line, style)
		}
	}
	notes := slices.Clone(a.Notes)
	for _, source := range slices.Sorted(maps.Keys(a.Unseen)) {
		notes = append(notes, fmt.Sprintf("could not look: %s: %s", source, a.Unseen[source]))
	}
	if len(notes) > 0 {
		line("")
	}
	for _, note := range notes {
		row("note", note)
	}
	_, err := io.WriteString(out, b.String())
	return err
}

// headline is the verdict: "10.0.0.1:80 by uid 65534 is intercepted".
func (a Answer) headline(style terminal.Style) string {
	who := ""
	switch {
	case a.Direction == "inbound" && a.Interface != "":
		who = " coming in by " + a.Interface
	case a.Direction == "inbound":
		who = " coming in"
	case a.UID != nil:
		who = fmt.Sprintf(" by uid %d", *a.UID)
	}
	what := "is " + string(a.Verdict)
	switch a.Verdict {
	case Unknown:
		what = style.Warn("could not be told")
	case Intercepted:
		what = "is " + style.Good(string(a.Verdict))
	default: // as often what is wanted as not
		what = style.Bold(what)
	}
	return fmt.Sprintf("%s/%s%s %s", a.To, a.Protocol, who, what)
}

// String is the step in a line: "OUTPUT 1  -p tcp -j SERVICE_PROXY_OUTPUT  [7]".
func (s Step) String() string {
	passed := ""
	if s.Passed > 0 {
		passed = fmt.Sprintf(", %d passed over", s.Passed)
	}
	if s.Index == 0 {
		return fmt.Sprintf("%s  %s%s", s.Chain, s.Did, passed)
	}
	counted := "?"
	if s.Packets != nil {
		counted = fmt.Sprint(*s.Packets)
	}
	perhaps := ""
	if s.Perhaps {
		perhaps = ", if it matches"
	}
	return fmt.Sprintf("%s %d  %s  [%s] %s%s%s", s.Chain, s.Index, s.Rule, counted, s.Did, perhaps,
		passed)
}

func (c Chain) write(line func(format string, args ...any), style terminal.Style) {
	when := ""
	if len(c.When) > 0 {
		when = "  when " + strings.Join(c.When, ", ")
	}
	if c.None {
		line("  %s: Envoy closes the connection%s", style.Bad("no filter chain"), when)
		return
	}
	name := c.Name
	if name == "" {
		name = "without a name"
	} else {
		name = fmt.Sprintf("%q", name)
	}
	what := "filter chain " + name
	if c.Default {
		what = "default filter chain " + name
	}
	if c.Kind != "" {
		what += ", " + c.Kind
	}
	if c.TLS {
		what += ", ends TLS"
	}
	if c.Service != "" {
		what += ", service " + c.Service
	}
	line("  %s%s", what, when)
	if c.Route != "" {
		hosts := ""
		switch {
		case c.HostCount == 1:
			hosts = ", 1 virtual host"
		case c.HostCount > 1:
			hosts = fmt.Sprintf(", %d virtual hosts", c.HostCount)
		}
		line("    route %q%s", c.Route, hosts)
	}
	for _, h := range c.Hosts {
		domains := strings.Join(h.Domains, ", ")
		if more := h.Domain - len(h.Domains); more > 0 {
			domains += fmt.Sprintf(" and %d more", more)
		}
		clusters := strings.Join(h.Clusters, ", ")
		if more := h.Cluster - len(h.Clusters); more > 0 {
			clusters += fmt.Sprintf(" and %d more", more)
		}
		if h.ByHeader {
			clusters = strings.TrimPrefix(clusters+", what a header names", ", ")
		}
		line("    for %s -> %s", domains, clusters)
	}
	if more := c.HostCount - len(c.Hosts); more > 0 && len(c.Hosts) > 0 {
		line("    and %d more virtual hosts", more)
	}
	for _, cluster := range c.Clusters {
		cluster.write(line, style)
	}
}

func (c Cluster) write(line func(format string, args ...any), style terminal.Style) {
	if !c.Known {
		line("    cluster %q: its endpoints are not known", c.Name)
		return
	}
	degraded := ""
	if c.Degraded > 0 {
		degraded = fmt.Sprintf(", %d degraded", c.Degraded)
	}
	healthy := fmt.Sprintf("%d of %d endpoints healthy", c.Healthy, c.Total)
	if c.Healthy == 0 {
		healthy = style.Bad(healthy)
	}
	line("    cluster %q: %s%s", c.Name, healthy, degraded)
	for _, e := range c.Endpoints {
		line("      %s %s", e.Address, e.Health)
	}
	if more := c.Total - len(c.Endpoints); more > 0 {
		line("      and %d more", more)
	}
}
