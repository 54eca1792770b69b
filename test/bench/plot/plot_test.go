package plot

import (
	"encoding/xml"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the expected picture")

func example() Figure {
	at := func(y ...float64) (p []Point) {
		for i, x := range []float64{10, 100, 1000, 10_000, 32_000} {
			if i < len(y) {
				p = append(p, Point{X: x, Y: y[i]})
			}
		}
		return p
	}
	gaveUp := func(p []Point, over ...float64) []Point {
		for i, y := range over {
			p = append(p, Point{X: []float64{10_000, 32_000}[i], Y: y, Missing: "gave up <5 min"})
		}
		return p
	}
	return Figure{
		Title: "Push & redirect", Subtitle: "made up for the test", X: "services", Y: "time",
		Tick: func(v float64) string { return fmt.Sprintf("%g ms", v) },
		Panels: []Panel{
			{"nft", []Line{
				{"floor", Least, at(11, 11, 12, 30, 90)},
				{"loop", Other, gaveUp(at(1100, 4000, 70_000), 300_000, 0)},
				{"agent, p99", Worst, at(25, 28, 60, 310, 900)},
				{"agent", Ours, at(20, 22, 30, 200, 800)},
			}},
			{"legacy", []Line{
				{"floor", Least, at(11, 11, 0, 30, 90)},
				{"agent", Ours, at(20, 24, 40, 250, 900)},
			}},
		},
		Source: "nowhere",
	}
}

func TestSVG(t *testing.T) {
	have := example().SVG()
	name := filepath.Join("testdata", "example.svg")
	if *update {
		if err := os.WriteFile(name, []byte(have), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if have != string(want) {
		t.Errorf("not %s: run with -update, then look at it", name)
	}
	// What could not be measured is in the picture: an arrow, a cross, the reason.
	for _, part := range []string{
		"loop, 10k: &gt; 300000 ms, see below", "loop, 32k: no figure, see below",
		"loop, 10k nft, 32k nft: gave up &lt;5 min.", "zero, which",
	} {
		if !strings.Contains(have, part) {
			t.Errorf("no %q", part)
		}
	}
}

// TestWellFormed: browsers show nothing at all of an SVG with one wrong byte.
func TestWellFormed(t *testing.T) {
	f := example()
	f.Panels[0].Lines[0].Name = `<&"'>]]>`
	d := xml.NewDecoder(strings.NewReader(f.SVG()))
	for {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			return
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

func TestSpan(t *testing.T) {
	for _, tt := range []struct{ low, high, from, to float64 }{
		{11, 900, 5, 2000},
		{0.003, 0.004, 0.002, 0.02},
		{1, 1, 0.5, 5},
		{25, 45, 20, 200},
		{1, 600_000, 0.5, 1_000_000},
	} {
		a := span(tt.low, tt.high)
		if a.from != tt.from || a.to != tt.to || len(a.ticks) < 2 {
			t.Errorf("%v to %v: %+v", tt.low, tt.high, a)
		}
	}
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	for range 10_000 {
		low := math.Pow(10, r.Float64()*12-6)
		high := low * math.Pow(10, r.Float64()*6)
		a := span(low, high)
		if !(a.from < low && high < a.to && a.from > 0) || math.IsInf(a.to, 1) || len(a.ticks) < 2 ||
			len(a.ticks) > 10 {
			t.Fatalf("seed %d: %v to %v: %+v", seed, low, high, a)
		}
	}
}

// TestApart: no name covers another, all stand beside the axes, and in the order of the lines.
func TestApart(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	for range 1000 {
		var labels []label
		for range 1 + r.IntN(6) {
			labels = append(labels, label{point: top + height*r.Float64()})
		}
		labels = apart(labels)
		for i, l := range labels {
			if l.y < top || l.y > top+height || i > 0 && l.y-labels[i-1].y < name-0.001 {
				t.Fatalf("seed %d: %+v", seed, labels)
			}
		}
		if !slices.IsSortedFunc(labels, func(a, b label) int { return int(a.point - b.point) }) {
			t.Fatalf("seed %d: out of order: %+v", seed, labels)
		}
	}
	one := apart([]label{{point: top + 100}})
	if one[0].y != top+100 {
		t.Errorf("moved without need: %+v", one)
	}
}
