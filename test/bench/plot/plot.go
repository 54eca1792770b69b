// Package plot draws figures over two logarithmic axes as SVG: one file that is readable in dark
// and light, with the names of the lines at their ends.
//
// It is its own so that nothing has to be installed: gnuplot has no dark, and libraries for plots
// bring renderers for fonts and images along. A figure is a pure value. What cannot be on a
// logarithmic axis (zero, what was not measured) is drawn at its edge and said below, never left
// out.
package plot

import (
	"fmt"
	"html"
	"math"
	"slices"
	"strings"
)

// Figure is one picture: panels beside each other, with the same axes.
type Figure struct {
	Title    string
	Subtitle string // smaller; may be empty
	X, Y     string // what the axes are, with the unit
	// Tick writes a value of the Y axis, with its unit.
	Tick   func(float64) string
	Panels []Panel
	Source string // where it is from: machine, date
}

// Panel is a pair of axes.
type Panel struct {
	Title string
	Lines []Line
}

// Line is the points of one thing, ascending in X.
type Line struct {
	Name   string
	Look   Look
	Points []Point
}

// Look is colour, dash and marker: a line can be told from another without colour.
type Look string

const (
	Ours  Look = "ours"  // filled circles
	Worst Look = "worst" // the same colour, dashed, hollow circles
	Other Look = "other" // squares
	Least Look = "least" // grey, triangles
)

// Point is one figure. With Missing, which says why there is none, Y is what it is larger than, or
// 0.
type Point struct {
	X, Y    float64
	Missing string
}

// unsure is whether a point is not at its place: no line leads there.
func (p Point) unsure() bool { return p.Missing != "" || p.Y == 0 }

// The measures of a figure, in pixels of its own.
const (
	width  = 880.0
	top    = 84.0  // title, subtitle, panel's title
	left   = 78.0  // ticks and title of the Y axis
	names  = 126.0 // right of the axes
	height = 270.0 // of the axes
	foot   = 48.0  // ticks and title of the X axis
	line   = 16.0  // one line below
	name   = 28.0  // name and last value of a line, in two lines
)

// theme has GitHub's own colours. The background is drawn, since whoever reads the dark page with
// a light system would see dark words on dark else. (No variables of CSS: rsvg and editors lack
// them.)
type theme struct{ back, words, soft, grid, faint, ours, other, least string }

var (
	light = theme{
		"#fff", "#1f2328", "#59636e", "#d1d9e0", "#eef1f4", "#0969da", "#bc4c00", "#59636e"}
	dark = theme{
		"#0d1117", "#f0f6fc", "#9198a1", "#3d444d", "#1c2128", "#58a6ff", "#f0883e", "#9198a1"}
)

func (t theme) css() string {
	return "text{fill:" + t.words + "}.soft{fill:" + t.soft + "}.bg{fill:" + t.back + "}" +
		".grid,.lead{stroke:" + t.grid + "}.faint{stroke:" + t.faint + "}.mark{fill:" + t.back + "}\n" +
		look("ours", t.ours) + look("worst", t.ours) + look("other", t.other) + look("least", t.least)
}

func look(l Look, colour string) string {
	return fmt.Sprintf(".%s{stroke:%s}.%[1]s.full{fill:%[2]s}text.%[1]s{fill:%[2]s;stroke:none}\n",
		l, colour)
}

func style() string {
	return `<style>
text{font:12px system-ui,-apple-system,"Segoe UI","Noto Sans",Helvetica,Arial,sans-serif}
.title{font-size:16px;font-weight:600}.panel{font-size:13px;font-weight:600}
.small{font-size:11px}.bold{font-weight:600}
.line{fill:none;stroke-width:2;stroke-linecap:round}.worst.line{stroke-dasharray:6 5}
.least.line{stroke-width:1.5}.unsure.line{stroke-dasharray:1 5}.mark{stroke-width:1.5}
` + light.css() + `@media(prefers-color-scheme:dark){
` + dark.css() + `}
</style>
`
}

// SVG draws it. A figure without any point is an error of the caller's: its axes have no range.
func (f Figure) SVG() string {
	below := f.below()
	whole := top + height + foot + line*float64(len(below)) + 8
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" role="img" width="%g" height="%g" `+
		`viewBox="0 0 %[1]g %[2]g"><title>%s</title>`+"\n", width, whole, esc(f.Title))
	b.WriteString(style())
	fmt.Fprintf(&b, `<rect class="bg" width="%g" height="%g" rx="6"/>`+"\n", width, whole)
	text(&b, 16, 26, "title", f.Title)
	text(&b, 16, 46, "soft", f.Subtitle)
	x, y := f.axes()
	each := width / float64(len(f.Panels))
	for i, p := range f.Panels {
		a := area{left: each*float64(i) + left, right: each*float64(i+1) - names, x: x, y: y}
		f.grid(&b, a, p.Title)
		p.draw(&b, a, f.Tick)
	}
	for i, words := range below {
		text(&b, 16, top+height+foot+line*float64(i)+10, "soft small", words)
	}
	b.WriteString("</svg>\n")
	return b.String()
}

// axis is a logarithmic range.
type axis struct {
	from, to float64
	ticks    []float64 // with a number
	minor    []float64 // without
}

// at is where a value is between the ends, 0 to 1.
func (a axis) at(v float64) float64 { return math.Log(v/a.from) / math.Log(a.to/a.from) }

// axes are those of all panels. The ticks of X are the values that there are.
func (f Figure) axes() (x, y axis) {
	var ys []float64
	for _, p := range f.Panels {
		for _, l := range p.Lines {
			for _, point := range l.Points {
				x.ticks = append(x.ticks, point.X)
				if point.Y > 0 {
					ys = append(ys, point.Y)
				}
			}
		}
	}
	slices.Sort(x.ticks)
	x.ticks = slices.Compact(x.ticks)
	x.from, x.to = x.ticks[0]/1.4, x.ticks[len(x.ticks)-1]*1.4
	if len(ys) == 0 {
		ys = []float64{1}
	}
	return x, span(slices.Min(ys), slices.Max(ys))
}

// span is an axis from a round value below min to one above max, at least one decade of it.
func span(low, high float64) (a axis) {
	steps := []float64{1, 2, 5}
	a.from, a.to = math.Inf(-1), math.Inf(1)
	for e := math.Floor(math.Log10(low)) - 1; e <= math.Ceil(math.Log10(high))+1; e++ {
		for _, s := range steps {
			v := round(s, e)
			if v <= low/1.2 {
				a.from = v
			}
			if v >= high*1.2 && v >= a.from*9.9 && math.IsInf(a.to, 1) {
				a.to = v
			}
		}
	}
	few := a.to/a.from < 200
	for e := math.Floor(math.Log10(a.from)); e <= math.Ceil(math.Log10(a.to)); e++ {
		for s := 1.0; s < 10; s++ {
			v := round(s, e)
			switch {
			case v < a.from || v > a.to:
			case s == 1 || few && slices.Contains(steps, s):
				a.ticks = append(a.ticks, v)
			default:
				a.minor = append(a.minor, v)
			}
		}
	}
	return a
}

// round is s × 10^e to the last digit, of a negative e, too.
func round(s, e float64) float64 {
	if e < 0 {
		return s / math.Pow10(-int(e))
	}
	return s * math.Pow10(int(e))
}

// area is where the axes of one panel are.
type area struct {
	left, right float64
	x, y        axis
}

// pixel is where a point is. What no logarithmic axis has is at its edge: zero below, and what is
// not even known to be larger than something above.
func (a area) pixel(p Point) (x, y float64) {
	x = a.left + (a.right-a.left)*a.x.at(p.X)
	switch {
	case p.Y > 0:
		return x, top + height*(1-a.y.at(p.Y))
	case p.Missing != "":
		return x, top + 10
	}
	return x, top + height - 14
}

func (f Figure) grid(b *strings.Builder, a area, title string) {
	text(b, a.left, top-12, "panel", title)
	for _, v := range a.y.minor {
		_, y := a.pixel(Point{X: a.x.from, Y: v})
		stroke(b, "faint", a.left, y, a.right, y)
	}
	for _, v := range a.y.ticks {
		_, y := a.pixel(Point{X: a.x.from, Y: v})
		stroke(b, "grid", a.left, y, a.right, y)
		text(b, a.left-7, y+4, "soft small end", f.Tick(v))
	}
	for _, v := range a.x.ticks {
		x, _ := a.pixel(Point{X: v})
		stroke(b, "faint", x, top, x, top+height)
		stroke(b, "grid", x, top+height, x, top+height+5)
		text(b, x, top+height+18, "soft small middle", count(v))
	}
	stroke(b, "grid", a.left, top, a.left, top+height)
	stroke(b, "grid", a.left, top+height, a.right, top+height)
	text(b, (a.left+a.right)/2, top+height+36, "soft small middle", f.X)
	x, y := a.left-64, top+height/2
	fmt.Fprintf(b, `<text class="soft small" text-anchor="middle" transform="translate(%s %s) `+
		`rotate(-90)">%s</text>`+"\n", px(x), px(y), esc(f.Y))
}

// draw draws the lines, the last one uppermost, and their names where they end.
func (p Panel) draw(b *strings.Builder, a area, tick func(float64) string) {
	var labels []label
	for _, l := range p.Lines {
		if len(l.Points) == 0 {
			continue
		}
		for i := 1; i < len(l.Points); i++ {
			class := string(l.Look) + " line"
			if l.Points[i-1].unsure() || l.Points[i].unsure() {
				class += " unsure"
			}
			x1, y1 := a.pixel(l.Points[i-1])
			x2, y2 := a.pixel(l.Points[i])
			stroke(b, class, x1, y1, x2, y2)
		}
		for _, point := range l.Points {
			x, y := a.pixel(point)
			fmt.Fprintf(b, "<g><title>%s, %s: %s</title>", esc(l.Name), count(point.X),
				esc(said(point, tick)))
			mark(b, l.Look, x, y, point)
			b.WriteString("</g>\n")
		}
		last := l.Points[len(l.Points)-1]
		x, y := a.pixel(last)
		labels = append(labels, label{x: x, point: y, y: y, look: l.Look, name: l.Name,
			value: said(last, tick)})
	}
	for _, l := range apart(labels) {
		x := a.right + 12
		if math.Abs(l.y-l.point) > 3 {
			stroke(b, "lead", l.x+7, l.point, x-3, l.y)
		}
		text(b, x, l.y-2, string(l.look)+" bold", l.name)
		text(b, x, l.y+12, "small", l.value)
	}
}

// said is a point in words, but for the reason why it is missing.
func said(p Point, tick func(float64) string) string {
	switch {
	case p.Missing == "":
		return tick(p.Y)
	case p.Y > 0:
		return "> " + tick(p.Y) + ", see below"
	}
	return "no figure, see below"
}

// mark draws a point: an arrow up for what is larger, a cross for what has no figure, an arrow
// down for zero.
func mark(b *strings.Builder, look Look, x, y float64, p Point) {
	fill := " full"
	if look == Worst || p.Missing != "" {
		fill = ""
	}
	class := string(look) + " mark" + fill
	path := func(format string, at ...any) {
		fmt.Fprintf(b, `<path class="%s" d="%s"/>`, class, fmt.Sprintf(format, at...))
	}
	switch {
	case p.Missing != "" && p.Y == 0:
		path("M%s %sl9 9m0 -9l-9 9", px(x-4.5), px(y-4.5))
		return
	case p.Missing != "":
		path("M%s %sv-17m-4 5l4 -5l4 5", px(x), px(y))
	case p.Y == 0:
		path("M%s %sv13m-4 -4l4 4l4 -4", px(x), px(y))
	}
	switch look {
	case Other:
		path("M%s %sh8v8h-8z", px(x-4), px(y-4))
	case Least:
		path("M%s %sl4.5 8h-9z", px(x), px(y-5))
	default:
		fmt.Fprintf(b, `<circle class="%s" cx="%s" cy="%s" r="4"/>`, class, px(x), px(y))
	}
}

// label is the name of a line: its line ends at point, it stands at y.
type label struct {
	x, point, y float64
	look        Look
	name, value string
}

// apart moves labels so that none covers another, each as near to its line as may be, all beside
// the axes.
func apart(labels []label) []label {
	slices.SortStableFunc(labels, func(a, b label) int {
		switch {
		case a.point < b.point:
			return -1
		case a.point > b.point:
			return 1
		}
		return 0
	})
	// Those that touch are a block, which stands where its middle is nearest to their points.
	type block struct{ from, to int }
	var blocks []block
	place := func(k block) (y float64) { // of the first
		n := float64(k.to - k.from)
		for i, l := range labels[k.from:k.to] {
			y += (l.point - name*float64(i)) / n
		}
		return max(top+10, min(y, top+height-12-name*(n-1)))
	}
	for i := range labels {
		blocks = append(blocks, block{i, i + 1})
		for len(blocks) > 1 {
			a, b := blocks[len(blocks)-2], blocks[len(blocks)-1]
			if place(a)+name*float64(a.to-a.from) <= place(b) {
				break
			}
			blocks = append(blocks[:len(blocks)-2], block{a.from, b.to})
		}
	}
	for _, k := range blocks {
		y := place(k)
		for i := k.from; i < k.to; i++ {
			labels[i].y = y + name*float64(i-k.from)
		}
	}
	return labels
}

// below is what stands under a figure: what has no figure and why, what is zero, the source.
func (f Figure) below() (lines []string) {
	type reason struct{ name, why string }
	var reasons []reason
	where := map[reason][]string{}
	zero := false
	for _, p := range f.Panels {
		for _, l := range p.Lines {
			for _, point := range l.Points {
				if point.Missing == "" {
					zero = zero || point.Y == 0
					continue
				}
				r := reason{l.Name, point.Missing}
				if where[r] == nil {
					reasons = append(reasons, r)
				}
				where[r] = append(where[r], strings.TrimSpace(count(point.X)+" "+p.Title))
			}
		}
	}
	if reasons != nil {
		lines = append(lines, "Hollow and dotted: could not be measured, an arrow: is more than that.")
	}
	for _, r := range reasons {
		lines = append(lines, fmt.Sprintf("%s, %s: %s.", r.name, strings.Join(where[r], ", "), r.why))
	}
	if zero {
		lines = append(lines, "↓ at the lower edge: zero, which a logarithmic axis does not have.")
	}
	if f.Source != "" {
		lines = append(lines, f.Source)
	}
	return lines
}

// count is a number on the X axis: 10, 320, 1k, 32k.
func count(v float64) string {
	if v >= 1000 {
		return fmt.Sprintf("%gk", v/1000)
	}
	return fmt.Sprintf("%g", v)
}

// text writes words, whose class may end in middle or end: where x is of them.
func text(b *strings.Builder, x, y float64, class, words string) {
	if words == "" {
		return
	}
	anchor := ""
	for _, a := range []string{"middle", "end"} {
		if rest, ok := strings.CutSuffix(class, " "+a); ok {
			class, anchor = rest, fmt.Sprintf(` text-anchor="%s"`, a)
		}
	}
	fmt.Fprintf(b, `<text class="%s" x="%s" y="%s"%s>%s</text>`+"\n", class, px(x), px(y), anchor,
		esc(words))
}

func stroke(b *strings.Builder, class string, x1, y1, x2, y2 float64) {
	fmt.Fprintf(b, `<line class="%s" x1="%s" y1="%s" x2="%s" y2="%s"/>`+"\n", class,
		px(x1), px(y1), px(x2), px(y2))
}

// px is a tenth of a pixel: more digits would make diffs of nothing.
func px(v float64) string { return fmt.Sprintf("%g", math.Round(v*10)/10) }

func esc(s string) string { return html.EscapeString(s) }
