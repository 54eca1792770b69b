package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/service-proxy-agent/service-proxy-agent/test/bench/result"
)

// ratios are by name: "iptables.Scale/nft/install/random ratio",
// "curve/nft/10000/push-p50 agent÷floor".
type ratios map[string]float64

const module = "github.com/service-proxy-agent/service-proxy-agent/"

var (
	// cores is what go test puts behind the name of a benchmark: GOMAXPROCS.
	cores = regexp.MustCompile(`-\d+$`)
	// limit is what a benchmark says of the ratio it must not pass. Another limit is no other ratio.
	limit = regexp.MustCompile(`\(max[^)]*\)`)
)

// benchRatios are those that go test -bench printed: in units with "ratio" in their names, or that
// begin with × or x-. Everything else depends on the machine.
func benchRatios(r io.Reader) ratios {
	all, pkg := ratios{}, ""
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) == 2 && f[0] == "pkg:" {
			pkg = strings.TrimPrefix(f[1], module)
		}
		if len(f) < 4 || !strings.HasPrefix(f[0], "Benchmark") {
			continue
		}
		name := pkg + "." + cores.ReplaceAllString(strings.TrimPrefix(f[0], "Benchmark"), "")
		for i := 2; i+1 < len(f); i += 2 {
			unit := limit.ReplaceAllString(f[i+1], "")
			value, err := strconv.ParseFloat(f[i], 64)
			if err == nil && isRatio(unit) {
				all[name+" "+unit] = value
			}
		}
	}
	return all
}

func isRatio(unit string) bool {
	return strings.Contains(unit, "ratio") || strings.HasPrefix(unit, "×") ||
		strings.HasPrefix(unit, "x-")
}

// least is the smallest share, in percent, of which a ratio is made: the kernel counts processor
// time in ticks of 10 ms, and below this a share is a handful of them.
const least = 0.1

func few(p result.Point) bool {
	return p.Unit == "%" && p.Metric != result.Lost && p.Value < least
}

// curveRatios are those of a curve: the agent against its floor; where there is none against the
// naive loop; and of memory against that with the fewest services.
func curveRatios(run result.Run) ratios {
	all := ratios{}
	for _, p := range run.Points {
		if p.Who != result.Agent || p.Missing != "" {
			continue
		}
		peer, of := result.Floor, p.Services
		switch m, _ := result.Of(p.Metric); {
		case p.Metric == result.Resident:
			peer, of = result.Agent, run.Sizes()[0]
			if p.Services == of {
				continue
			}
		case m.Floor == "":
			peer = result.Naive
		}
		q, there := run.Find(p.Backend, of, peer, p.Metric)
		if !there || q.Missing != "" || q.Value == 0 || few(p) || few(q) {
			continue
		}
		name := fmt.Sprintf("curve/%s/%d/%s agent÷%s", p.Backend, p.Services, p.Metric, peer)
		if peer == result.Agent {
			name = fmt.Sprintf("curve/%s/%d/%s ÷%d", p.Backend, p.Services, p.Metric, of)
		}
		all[name] = p.Value / q.Value
	}
	return all
}

// baseline is what the repository keeps of an earlier run: ratios, and where they are from.
type baseline struct {
	Date    string `json:"date"`
	Machine string `json:"machine"`
	Kernel  string `json:"kernel"`
	Ratios  ratios `json:"ratios"`
}

func readBaseline(name string) (b baseline, err error) {
	text, err := os.ReadFile(name)
	if err != nil {
		return b, err
	}
	if err := json.Unmarshal(text, &b); err != nil {
		return b, fmt.Errorf("read %s: %w", name, err)
	}
	return b, nil
}

// writeBaseline writes three digits of each ratio: the others are noise.
func writeBaseline(w io.Writer, name string, b baseline) error {
	rounded := ratios{}
	for k, v := range b.Ratios {
		if v, err := strconv.ParseFloat(fmt.Sprintf("%.3g", v), 64); err == nil {
			rounded[k] = v
		}
	}
	b.Ratios = rounded
	text, err := json.MarshalIndent(b, "", "  ")
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	if err := os.WriteFile(name, append(text, '\n'), 0o644); err != nil {
		return err
	}
	fmt.Fprintf(w, "wrote %s: %d ratios\n", name, len(rounded))
	return nil
}

// much is how far a ratio moves before it is said.
const much = 0.15

// comparison is what became of the ratios of a baseline.
type comparison struct {
	with         baseline
	here         string // the machine of now, "" where not known
	same         int
	moved        []move // the largest first
	gone, latest []string
}

type move struct {
	name     string
	old, now float64
}

// by is +0.2 for a fifth more.
func (m move) by() float64 { return m.now/m.old - 1 }

func (b baseline) compare(now ratios, machine string) comparison {
	c := comparison{with: b, here: machine}
	for _, name := range slices.Sorted(maps.Keys(b.Ratios)) {
		old := b.Ratios[name]
		value, there := now[name]
		switch {
		case !there:
			c.gone = append(c.gone, name)
		case old == value || old != 0 && math.Abs(value/old-1) <= much:
			c.same++
		default:
			c.moved = append(c.moved, move{name, old, value})
		}
	}
	slices.SortStableFunc(c.moved, func(a, b move) int {
		return cmp.Compare(math.Abs(math.Log(b.now/b.old)), math.Abs(math.Log(a.now/a.old)))
	})
	for _, name := range slices.Sorted(maps.Keys(now)) {
		if _, known := b.Ratios[name]; !known {
			c.latest = append(c.latest, name)
		}
	}
	return c
}

// print says it for a person.
func (c comparison) print(w io.Writer) {
	fmt.Fprintf(w, "\nratios beside those of %s: %d moved by more than %.0f %%, %d did not\n",
		c.with.Date, len(c.moved), 100*much, c.same)
	if c.here != "" && c.here != c.with.Machine {
		fmt.Fprintf(w, "  (then it was another machine: %s)\n", c.with.Machine)
	}
	for _, m := range c.moved {
		fmt.Fprintf(w, "  %-60s %7.3g -> %-7.3g %+5.0f %%\n", m.name, m.old, m.now, 100*m.by())
	}
	list := func(what string, names []string) {
		if len(names) > 0 {
			fmt.Fprintf(w, "%s: %d\n", what, len(names))
		}
		for _, name := range names {
			fmt.Fprintf(w, "  %s\n", name)
		}
	}
	list("in the baseline, and not measured now", c.gone)
	list("measured now, and not in the baseline", c.latest)
	fmt.Fprintln(w)
}
