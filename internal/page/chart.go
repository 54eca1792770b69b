package page

import (
	"cmp"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
)

// A chart is drawn in these units and stretched to the width that there is. What must not be
// stretched, labels and dots, is text beside it and strokes that do not scale.
const (
	plotWidth, plotHeight = 600.0, 120.0
	maxColumns            = 120
)

// timeline are the samples in columns of equal time, so that minutes in which no agent ran are
// columns without anything.
type timeline struct {
	from    time.Time // of the first column's beginning
	step    time.Duration
	columns [][]status.Sample
}

func timelineOf(samples []status.Sample) timeline {
	if len(samples) == 0 {
		return timeline{}
	}
	from := samples[0].Time.Add(-time.Minute)
	minutes := max(1, int(math.Round(samples[len(samples)-1].Time.Sub(from).Minutes())))
	per := (minutes + maxColumns - 1) / maxColumns
	t := timeline{from: from, step: time.Duration(per) * time.Minute,
		columns: make([][]status.Sample, (minutes+per-1)/per)}
	for _, s := range samples {
		// A minute ends a little late, or early; what is out of order belongs nowhere.
		i := int(math.Round(s.Time.Sub(from).Minutes())-1) / per
		if i >= 0 && i < len(t.columns) {
			t.columns[i] = append(t.columns[i], s)
		}
	}
	return t
}

func (t timeline) to() time.Time { return t.from.Add(time.Duration(len(t.columns)) * t.step) }

// width is that of a column.
func (t timeline) width() float64 { return plotWidth / float64(len(t.columns)) }

func (t timeline) left(column int) float64 { return float64(column) * t.width() }

// measure is what a chart is of. A column's value is the greatest or the sum of its samples'.
type measure struct {
	name  fixed
	title string
	of    func(status.Sample) float64
	sum   bool // a number of things, where 0 is one, too
	say   func(float64) string
}

func count(v float64) string { return number(uint64(v)) }

var measures = []measure{
	{"slowest-change", "Slowest change of the rules",
		func(s status.Sample) float64 { return s.SlowestChange }, false, seconds},
	{"slowest-pass", "Slowest pass",
		func(s status.Sample) float64 { return s.SlowestPass }, false, seconds},
	{"changes", "Changes of the rules",
		func(s status.Sample) float64 { return float64(s.Changes) }, true, count},
	{"repairs", "Repairs of drift",
		func(s status.Sample) float64 { return float64(s.Repairs) }, true, count},
}

// values are those of the columns, NaN where nothing was measured.
func (m measure) values(t timeline) []float64 {
	values := make([]float64, len(t.columns))
	for i, samples := range t.columns {
		values[i] = math.NaN()
		for _, s := range samples {
			v := m.of(s)
			switch {
			case math.IsNaN(v) || math.IsInf(v, 0) || v < 0 || !m.sum && v == 0:
			case math.IsNaN(values[i]):
				values[i] = v
			case m.sum:
				values[i] += v
			default:
				values[i] = max(values[i], v)
			}
		}
	}
	return values
}

// figures are what can be said of values in words.
type figures struct{ least, most, last, total float64 }

func figuresOf(values []float64) (f figures, measured int) {
	for _, v := range values {
		if math.IsNaN(v) {
			continue
		}
		if measured == 0 {
			f.least, f.most = v, v
		}
		f.least, f.most, f.last = min(f.least, v), max(f.most, v), v
		f.total += v
		measured++
	}
	return f, measured
}

// charts are the last minutes.
func charts(c Content) element {
	s := section("charts", "Last minutes")
	if len(c.Status.Samples) == 0 {
		s.add([]any{el("p", class("nothing"), "No minute was measured yet.")})
		return s
	}
	t := timelineOf(c.Status.Samples)
	cards := el("div", class("cards charts"))
	for _, m := range measures {
		cards.add([]any{m.chart(t)})
	}
	s.add([]any{states(t), cards})
	return s
}

// chart draws a measure: latencies as dots, joined where neighbours were measured; numbers as bars.
func (m measure) chart(t timeline) element {
	values := m.values(t)
	f, measured := figuresOf(values)
	every := "per minute"
	if t.step > time.Minute {
		every = "per " + span(t.step)
	}
	words := several{"none measured"}
	switch {
	case measured > 0 && m.sum:
		words = several{el("strong", m.say(f.total)), " in all, most " + m.say(f.most) + " " + every}
	case measured > 0:
		words = several{"min " + m.say(f.least), " · max ", el("strong", m.say(f.most)),
			" · last " + m.say(f.last)}
	}
	top := nice(f.most)
	if m.sum {
		top = max(top, 1)
		if half := top / 2; top > 1 && half != math.Floor(half) {
			top++ // whole numbers beside each line
		}
	}
	svg := el("svg", class("chart"), attr{"role", "img"}, attr{"viewBox", "0 0 600 120"},
		attr{"preserveAspectRatio", "none"}, attr{"aria-labelledby", string(m.name) + "-text"},
		el("title", id(string(m.name)+"-text"), m.description(t, f, measured, every)),
		el("path", class("grid"), attr{"d", "M0 0H600M0 60H600M0 120H600"}))
	if m.sum {
		svg.add([]any{m.bars(t, values, top)})
	} else {
		svg.add([]any{m.line(t, values, top)})
	}
	return el("figure", class("card"), el("figcaption", el("h3", m.title), el("p", words)),
		el("div", class("plot"), m.scale(top), svg, clocks(t)))
}

// description is the chart for who does not see it.
func (m measure) description(t timeline, f figures, measured int, every string) string {
	text := fmt.Sprintf("%s, %s, from %s to %s UTC: ", m.title, every, clock(t.from), clock(t.to()))
	if measured == 0 {
		return text + "none measured."
	}
	if m.sum {
		text += fmt.Sprintf("%s in all, least %s, most %s, last %s.", m.say(f.total), m.say(f.least),
			m.say(f.most), m.say(f.last))
	} else {
		text += fmt.Sprintf("least %s, most %s, last %s.", m.say(f.least), m.say(f.most), m.say(f.last))
	}
	if without := len(t.columns) - measured; without > 0 {
		text += fmt.Sprintf(" Nothing was measured in %d of %d.", without, len(t.columns))
	}
	return text
}

func clock(t time.Time) string { return t.UTC().Format("15:04") }

// scale is what stands beside the lines of a chart.
func (m measure) scale(top float64) element {
	middle := m.say(top / 2)
	if m.sum && top < 2 {
		middle = " " // half a change is none
	}
	return el("div", class("scale"), attr{"aria-hidden", "true"}, el("span", m.say(top)),
		el("span", middle), el("span", "0"))
}

// clocks are the times below a chart.
func clocks(t timeline) element {
	return el("div", class("clocks"), attr{"aria-hidden", "true"}, el("span", clock(t.from)),
		el("span", clock(t.from.Add(t.to().Sub(t.from)/2))), el("span", clock(t.to())))
}

// height is how high a share of the axis stands.
func height(share float64) float64 { return plotHeight * (1 - share) }

func (m measure) bars(t timeline, values []float64, top float64) element {
	g := el("g", class("bars"))
	gap := t.width() / 4
	for i, v := range values {
		if math.IsNaN(v) || v == 0 {
			continue
		}
		y := height(v / top)
		g.add([]any{el("rect", attr{"x", coordinate(t.left(i) + gap/2)}, attr{"y", coordinate(y)},
			attr{"width", coordinate(t.width() - gap)}, attr{"height", coordinate(plotHeight - y)},
			m.tip(t, i, v))})
	}
	return g
}

// tip is what a browser shows when the pointer rests on a point.
func (m measure) tip(t timeline, column int, v float64) element {
	from := t.from.Add(time.Duration(column) * t.step)
	return el("title", clock(from)+" to "+clock(from.Add(t.step))+": "+m.say(v))
}

func (m measure) line(t timeline, values []float64, top float64) any {
	var path strings.Builder
	dots := el("g", class("dots"))
	joined := false
	for i, v := range values {
		if math.IsNaN(v) {
			joined = false
			continue
		}
		x, y := coordinate(t.left(i)+t.width()/2), coordinate(height(v/top))
		fmt.Fprintf(&path, "%s%s %s", map[bool]string{true: "L", false: "M"}[joined], x, y)
		joined = true
		// A stroke without a length is as round as its caps.
		dots.add([]any{el("path", attr{"d", "M" + x + " " + y + "h0"}, m.tip(t, i, v))})
	}
	if path.Len() == 0 {
		return nil
	}
	return several{el("path", class("trend"), attr{"d", path.String()}), dots}
}

// coordinate is a number in as few characters as a pixel's tenth needs.
func coordinate(v float64) string {
	return strconv.FormatFloat(math.Round(v*10)/10, 'f', -1, 64)
}

// run are neighbouring columns of one state; "" is no agent.
type run struct {
	state      string
	from, upto int
}

// runs are the states in order. Of the states in a column the worst stands for it.
func (t timeline) runs() (all []run) {
	rank := map[string]int{"": 0, "ready": 1, "paused": 2, "off": 3, "hold": 4, "bypass": 5,
		"not-ready": 6}
	for i, samples := range t.columns {
		state := ""
		for _, s := range samples {
			one := cmp.Or(s.State, "not-ready")
			if rank[one] > rank[state] || rank[one] == 0 {
				state = one
			}
		}
		if n := len(all); n > 0 && all[n-1].state == state {
			all[n-1].upto = i + 1
		} else {
			all = append(all, run{state, i, i + 1})
		}
	}
	return all
}

// states are the states over time, as a band and in words.
func states(t timeline) element {
	const width = 1000.0
	svg := el("svg", class("band"), attr{"viewBox", "0 0 1000 20"},
		attr{"preserveAspectRatio", "none"}, attr{"aria-hidden", "true"})
	list := el("ul", class("states"))
	scale := width / float64(len(t.columns))
	runs := t.runs()
	for _, r := range runs {
		from, upto := t.from.Add(time.Duration(r.from)*t.step), t.from.Add(time.Duration(r.upto)*t.step)
		kind, word, y := bad, r.state, 8.0
		switch r.state {
		case "ready":
			kind, y = good, 0
		case "":
			kind, word, y = unknown, "no agent", 17
		case "hold", "bypass", "off", "paused":
			kind = warn
		}
		text := word + " " + clock(from) + "–" + clock(upto)
		svg.add([]any{el("rect", class("state "+kind), attr{"x", coordinate(float64(r.from) * scale)},
			attr{"y", coordinate(y)}, attr{"width", coordinate(float64(r.upto-r.from) * scale)},
			attr{"height", coordinate(20 - y)}, el("title", text))})
		list.add([]any{el("li", icon(kind), " ", text)})
	}
	figure := el("figure", class("card wide-card"), el("figcaption", el("h3", "State")), svg)
	const most = 12
	if more := len(runs) - most; more > 0 {
		list.inside = list.inside[more:]
		figure.add([]any{note("The last of " + number(len(runs)) + ":")})
	}
	figure.add([]any{list})
	return figure
}
