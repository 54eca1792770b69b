package main

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/service-proxy-agent/service-proxy-agent/test/bench/plot"
	"github.com/service-proxy-agent/service-proxy-agent/test/bench/result"
)

// document is scale.md and the pictures beside it, in img.
type document struct {
	text     string
	pictures []picture
}

type picture struct{ file, svg string }

const head = `# What it costs, by number of services

<!-- Made by make bench DOCS=1 (test/bench) of one run on one machine. Do not edit it. -->

How the agent does from %s services to %s, on both backends of iptables. Beside it stands the
least that the job can cost, measured in the same run (the **floor**), and a
[shell loop](../test/bench/naive.sh) of some twenty lines that does the same job with curl, jq and
iptables-restore (the **naive loop**): a look at Envoy, then a second of sleep, and so on.

%s
To repeat it, as root on Debian or Ubuntu with Go 1.26, in two hours with nothing else running:

    make bench            prints all and writes build/bench/scale.md
    make bench DOCS=1     writes this document and test/bench/baseline.json, too

Seconds are of this machine. Here the control plane, Envoy, the agent and whoever calls the services
share its processors. Hold a figure against what stands beside it, not against another machine's.

What could not be measured is told: "> 5 s" is longer than that, and why nobody knows how long is
below the table. In the pictures such a point is hollow, with an arrow up, and no solid line leads
to it.
`

// newDocument makes it of a run, and of the ratios that the benchmarks printed.
func newDocument(run result.Run, printed ratios) (d document) {
	var b strings.Builder
	sizes := run.Sizes()
	fmt.Fprintf(&b, head, thousands(sizes[0]), thousands(sizes[len(sizes)-1]), facts(run))
	b.WriteString(beside(run))
	for _, m := range result.Metrics {
		figures := []result.Metric{m}
		switch m.Name {
		case result.PushP99:
			continue // is in the picture and table of the median
		case result.Interval:
			continue // pace tells it
		case result.PushP50:
			rare, _ := result.Of(result.PushP99)
			figures = append(figures, rare)
		}
		table := newTable(run, figures)
		if table == "" {
			continue
		}
		fmt.Fprintf(&b, "\n## %s\n\n", upper(m.Title))
		if m.Floor != "" {
			fmt.Fprintf(&b, "The floor is %s.\n\n", m.Floor)
		}
		if p, drawn := draw(run, m); drawn {
			d.pictures = append(d.pictures, p)
			fmt.Fprintf(&b, "![%s, by number of services](img/%s)\n\n", upper(m.Title), p.file)
		}
		b.WriteString(table)
	}
	b.WriteString(list(printed))
	d.text = b.String()
	return d
}

// facts are where and when.
func facts(run result.Run) string {
	var b strings.Builder
	b.WriteString("| | |\n|---|---|\n")
	fmt.Fprintf(&b, "| date | %s |\n| machine | %s |\n| kernel | %s |\n", run.Date, cell(run.Machine),
		cell(run.Kernel))
	for _, name := range slices.Sorted(maps.Keys(run.Versions)) {
		fmt.Fprintf(&b, "| %s | %s |\n", cell(name), cell(run.Versions[name]))
	}
	return b.String()
}

// beside is the naive loop beside the agent: latency, processor, what Envoy pays, what is lost.
func beside(run result.Run) string {
	var b strings.Builder
	var why notes
	b.WriteString("\n## Beside a naive loop\n\n" + pace(run) + "Shares are of one core. Lost are " +
		"connections to\nthe new service, 25 in the second from its push on, that did not reach " +
		"Envoy.\n\n")
	b.WriteString("| backend | services | redirected after (median) | | processor | | " +
		"Envoy's main thread | | | lost | |\n")
	b.WriteString("|---|--:" + strings.Repeat("|--:", 9) + "|\n")
	b.WriteString("| | | agent | loop | agent | loop | agent | loop | Envoy alone | agent | loop |\n")
	any := false
	for _, backend := range []string{result.NFT, result.Legacy} {
		for _, n := range run.Sizes() {
			var cells []string
			add := func(metric string, who ...string) {
				for _, w := range who {
					p, there := run.Find(backend, n, w, metric)
					any = any || there && w == result.Naive
					cells = append(cells, why.said(p, there))
				}
			}
			add(result.PushP50, result.Agent, result.Naive)
			add(result.ChangingCore, result.Agent, result.Naive)
			add(result.EnvoyChanging, result.Agent, result.Naive, result.Floor)
			add(result.Lost, result.Agent, result.Naive)
			if strings.Join(cells, "") != strings.Repeat(none, len(cells)) {
				fmt.Fprintf(&b, "| %s | %s | %s |\n", backend, thousands(n), strings.Join(cells, " | "))
			}
		}
	}
	if !any {
		return ""
	}
	return b.String() + why.String()
}

// pace is how often services changed.
func pace(run result.Run) string {
	text := "One service comes and one goes each second, or less often where Envoy itself is slower"
	var slow []string
	for _, n := range run.Sizes() {
		for _, backend := range []string{result.NFT, result.Legacy} {
			p, there := run.Find(backend, n, result.Agent, result.Interval)
			if there && p.Value > 1 {
				slow = append(slow, fmt.Sprintf("each %s at %s on %s", figure(p.Value, p.Unit),
					thousands(n), backend))
			}
		}
	}
	if slow == nil {
		return text + ".\n"
	}
	return text + ":\n" + strings.Join(slow, ", ") + ".\n"
}

// none is where nothing was measured.
const none = "–"

// newTable has a row for each backend and number of services, "" where nothing was measured.
func newTable(run result.Run, figures []result.Metric) string {
	var b strings.Builder
	var why notes
	floor := figures[0].Floor != ""
	title, line := "| backend | services |", "|---|--:|"
	column := func(words string) { title, line = title+" "+words+" |", line+"--:|" }
	each := func(who string) {
		column(names[who])
		if len(figures) > 1 {
			column("p99")
		}
	}
	each(result.Agent)
	if floor {
		each(result.Floor)
		column("agent ÷ floor")
	}
	each(result.Naive)
	fmt.Fprintf(&b, "%s\n%s\n", title, line)
	found := false
	for _, backend := range []string{result.NFT, result.Legacy} {
		for _, n := range run.Sizes() {
			row, any := "", false
			add := func(who string) {
				for _, m := range figures {
					p, there := run.Find(backend, n, who, m.Name)
					any = any || there
					row += " " + why.said(p, there) + " |"
				}
			}
			add(result.Agent)
			if floor {
				add(result.Floor)
				row += " " + ratio(run, backend, n, figures[0]) + " |"
			}
			add(result.Naive)
			if any {
				found = true
				fmt.Fprintf(&b, "| %s | %s |%s\n", backend, thousands(n), row)
			}
		}
	}
	if !found {
		return ""
	}
	return b.String() + samples(run, figures) + why.String()
}

// ratio is how many floors the agent takes.
func ratio(run result.Run, backend string, n int, m result.Metric) string {
	p, there := run.Find(backend, n, result.Agent, m.Name)
	q, floor := run.Find(backend, n, result.Floor, m.Name)
	if !there || !floor || p.Missing != "" || q.Missing != "" || q.Value == 0 ||
		few(p) || few(q) {
		return none
	}
	return digits(p.Value/q.Value) + " ×"
}

// notes are why figures are missing, by number.
type notes []string

// said is a figure in a cell.
func (n *notes) said(p result.Point, there bool) string {
	if !there {
		return none
	}
	if p.Missing == "" {
		return figure(p.Value, p.Unit)
	}
	why := fmt.Sprintf("%s, %s services, %s: %s.", names[p.Who], thousands(p.Services), p.Backend,
		p.Missing)
	i := slices.Index(*n, why)
	if i < 0 {
		*n, i = append(*n, why), len(*n)
	}
	if p.Value == 0 {
		return fmt.Sprintf("no figure (%d)", i+1)
	}
	return fmt.Sprintf("> %s (%d)", figure(p.Value, p.Unit), i+1)
}

func (n notes) String() (text string) {
	for i, why := range n {
		text += fmt.Sprintf("\n(%d) %s\n", i+1, why)
	}
	return text
}

var names = map[string]string{result.Agent: "agent", result.Naive: "naive loop",
	result.Floor: "floor"}

// samples says of how many values a quantile is.
func samples(run result.Run, figures []result.Metric) string {
	if len(figures) < 2 {
		return ""
	}
	var all []string
	few := false
	for _, who := range []string{result.Agent, result.Floor, result.Naive} {
		low, high := math.MaxInt, 0
		for _, p := range run.Points {
			if p.Who == who && p.Metric == figures[0].Name && p.Samples > 0 {
				low, high = min(low, p.Samples), max(high, p.Samples)
			}
		}
		switch {
		case high == 0:
			continue
		case low == high:
			all = append(all, fmt.Sprintf("%s %d", names[who], low))
		default:
			all = append(all, fmt.Sprintf("%s %d to %d", names[who], low, high))
		}
		few = few || low < 100
	}
	if all == nil {
		return ""
	}
	text := "\nChanges that were measured: " + strings.Join(all, ", ") + "."
	if few {
		text += " The 99th percentile of fewer than 100\nis the slowest."
	}
	return text + "\n"
}

// list has the ratios of the benchmarks.
func list(printed ratios) string {
	if len(printed) == 0 {
		return ""
	}
	var b strings.Builder
	b.WriteString("\n## Ratios of the benchmarks\n\nEach against a floor or a peer of the same run: " +
		"a bare `iptables-restore`, the same with ten\nservices, another way to do it. " +
		"`make bench` holds these and those of the tables above against\n" +
		"`test/bench/baseline.json`, and says what moved by more than 15 %.\n\n" +
		"| ratio | |\n|---|--:|\n")
	for _, name := range slices.Sorted(maps.Keys(printed)) {
		fmt.Fprintf(&b, "| %s | %s |\n", cell(name), digits(printed[name]))
	}
	return b.String()
}

// floors are the names of floors in pictures, where there is little room.
var floors = map[string]string{
	result.PushP50: "Envoy's log line", result.Install: "bare restore",
	result.InstallWrite: "bare restore", result.More: "bare restore", result.Less: "bare restore",
	result.Connect: "one rule", result.EnvoyIdle: "Envoy alone",
	result.EnvoyChanging: "Envoy alone", result.Dump: "curl",
}

// draw is the picture of a metric, of one that there are at least two sizes of.
func draw(run result.Run, m result.Metric) (picture, bool) {
	if len(run.Sizes()) < 2 {
		return picture{}, false
	}
	f := plot.Figure{
		Title: upper(m.Title), Subtitle: "By number of services, both axes logarithmic",
		X: "services", Y: map[string]string{"ms": "time", "µs": "time", "MB": "memory"}[m.Unit],
		Tick:   func(v float64) string { return figure(v, m.Unit) },
		Source: fmt.Sprintf("%s · Linux %s · %s", run.Machine, run.Kernel, run.Date),
	}
	file := "scale-" + m.Name + ".svg"
	if f.Y == "" {
		f.Y = "share"
	}
	agent := "agent"
	if m.Name == result.PushP50 {
		f.Title = "From the control plane's push to the first redirected connection"
		f.Subtitle = "A change a second, or as often as Envoy takes them. " + f.Subtitle
		agent, file = "agent, median", "scale-push.svg"
	}
	any := false
	for _, backend := range []string{result.NFT, result.Legacy} {
		p := plot.Panel{Title: "iptables-" + backend}
		add := func(name string, look plot.Look, who, metric string) {
			l := plot.Line{Name: name, Look: look}
			for _, n := range run.Sizes() {
				if q, there := run.Find(backend, n, who, metric); there {
					l.Points = append(l.Points, plot.Point{X: float64(n), Y: q.Value,
						Missing: q.Missing})
				}
			}
			if l.Points != nil {
				any = true
				p.Lines = append(p.Lines, l)
			}
		}
		add(floors[m.Name], plot.Least, result.Floor, m.Name)
		add("naive loop", plot.Other, result.Naive, m.Name)
		if m.Name == result.PushP50 {
			add("agent, p99", plot.Worst, result.Agent, result.PushP99)
		}
		add(agent, plot.Ours, result.Agent, m.Name)
		f.Panels = append(f.Panels, p)
	}
	if !any {
		return picture{}, false
	}
	return picture{file, f.SVG()}, true
}

// figure is a value as one says it: 19.5 ms, 2.85 s, 300 s, 0.033 %.
func figure(v float64, unit string) string {
	larger := map[string]string{"µs": "ms", "ms": "s"}
	// A thousand comes of rounding, too.
	for larger[unit] != "" && v >= 999.5 {
		v, unit = v/1000, larger[unit]
	}
	return digits(v) + " " + unit
}

// digits are three that count, and no zeros at the end of a fraction.
func digits(v float64) string {
	if v >= 999.5 {
		return thousands(int(math.Round(v)))
	}
	rounded, err := strconv.ParseFloat(fmt.Sprintf("%.3g", v), 64)
	if err != nil {
		return fmt.Sprint(v)
	}
	return strconv.FormatFloat(rounded, 'f', -1, 64)
}

// thousands is 32,000.
func thousands(n int) string {
	s := strconv.Itoa(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

func upper(s string) string {
	for i, r := range s {
		if i == 0 {
			return strings.ToUpper(string(r)) + s[len(string(r)):]
		}
	}
	return s
}

// cell is text that may stand in a table: a version is what another program printed.
func cell(s string) string {
	return strings.NewReplacer("|", `\|`, "\n", " ", "<", "&lt;").Replace(s)
}
