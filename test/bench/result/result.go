// Package result is the file in which the curve of `make bench` is kept: what was measured, by
// number of services, of the agent, of the least that the job can cost (its floor) and of a naive
// shell loop that does the same job.
//
// It measures nothing and decides nothing: test/curve writes a Run, test/bench makes docs/scale.md
// of it. Only points of one Run may be held against each other, since they are of one machine.
package result

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Run is all that was measured in one go on one machine.
type Run struct {
	// Machine is its processor, number of them, memory: "2 × Intel Xeon 2.80 GHz, 8 GB".
	Machine string `json:"machine"`
	// Kernel is its release: "6.1.0-30-cloud-amd64".
	Kernel string `json:"kernel"`
	// Versions are those of what took part: agent, envoy, iptables, jq …
	Versions map[string]string `json:"versions"`
	// Date is when it began, in UTC: "2026-11-29".
	Date string `json:"date"`
	// Brief is whether each thing was done once only, to see that it works (BENCH_ONCE). Such figures
	// mean little, and no document is made of them.
	Brief  bool    `json:"brief,omitempty"`
	Points []Point `json:"points"`
}

// Point is one figure.
type Point struct {
	Backend  string `json:"backend"` // NFT or Legacy
	Services int    `json:"services"`
	Who      string `json:"who"`    // Agent, Naive or Floor
	Metric   string `json:"metric"` // the Name of one of Metrics
	Unit     string `json:"unit"`   // the Unit of the same
	// Value is the figure, finite and not negative. Of a point with Missing it is what the figure is
	// larger than, 0 where not even that is known.
	Value float64 `json:"value"`
	// Samples is of how many single values this is the quantile or mean, 0: not told.
	Samples int `json:"samples,omitempty"`
	// Missing says why there is no figure: "gave up after 10 min". Such a point is shown as one.
	Missing string `json:"missing,omitempty"`
}

// The backends of iptables.
const (
	NFT    = "nft"
	Legacy = "legacy"
)

// Who was measured.
const (
	Agent = "agent"
	Naive = "naive" // test/bench/naive.sh
	Floor = "floor" // Metric.Floor
)

// What is measured, by the names in the file.
const (
	PushP50       = "push-p50"
	PushP99       = "push-p99"
	Install       = "install"
	InstallWrite  = "install-write"
	More          = "more"
	Less          = "less"
	Connect       = "connect"
	Resident      = "resident"
	IdleCore      = "idle-core"
	ChangingCore  = "changing-core"
	EnvoyIdle     = "envoy-idle"
	EnvoyChanging = "envoy-changing"
	Dump          = "dump"
	Lost          = "lost"
	Interval      = "interval"
)

// Metric is one thing that is measured.
type Metric struct {
	Name string
	Unit string // ms, s, µs, MB (2^20 bytes), %
	// Title is what it is, for a reader.
	Title string
	// Floor is what its floor is, "" where there is none.
	Floor string
}

// Metrics are all there are, in the order of the document.
var Metrics = []Metric{
	{PushP50, "ms", "push → redirected, median",
		"Envoy's own log line"},
	{PushP99, "ms", "push → redirected, 99th percentile",
		"Envoy's own log line, 99th percentile"},
	{Install, "ms", "first install: from the start until the last service is redirected",
		"one bare `iptables-restore` of as many rules, without a start and a look at Envoy"},
	{InstallWrite, "ms", "first install: the write alone",
		"one bare `iptables-restore` of as many rules"},
	{More, "ms", "one service more: the write",
		"a bare `iptables-restore --noflush` of one rule"},
	{Less, "ms", "one service less: the write",
		"a bare `iptables-restore --noflush` that takes one rule out"},
	{Connect, "µs", "connect to the last service",
		"connect with one rule in the table"},
	{Resident, "MB", "resident memory, of child processes too, on average", ""},
	{IdleCore, "%", "idle: share of one core, child processes too", ""},
	{ChangingCore, "%", "while services change: share of one core, child processes too", ""},
	{EnvoyIdle, "%", "idle: share of Envoy's main thread",
		"Envoy alone"},
	{EnvoyChanging, "%", "while services change: share of Envoy's main thread",
		"Envoy alone, with the same changes"},
	{Dump, "ms", "one full dump",
		"`curl` of the dump to /dev/null"},
	{Lost, "%", "connections to a new service in its first second that did not reach Envoy", ""},
	// The same for all; the agent's point tells it.
	{Interval, "s", "time between two changes", ""},
}

// Of returns the metric of that name.
func Of(name string) (m Metric, known bool) {
	i := slices.IndexFunc(Metrics, func(m Metric) bool { return m.Name == name })
	if i < 0 {
		return Metric{}, false
	}
	return Metrics[i], true
}

// Here is an empty Run of this machine, begun at now. Versions are the caller's to fill in.
func Here(now time.Time) (Run, error) {
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return Run{}, fmt.Errorf("read the kernel's release: %w", err)
	}
	cpu, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return Run{}, fmt.Errorf("read the processor: %w", err)
	}
	memory, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return Run{}, fmt.Errorf("read the memory: %w", err)
	}
	return Run{
		Machine:  machine(string(cpu), string(memory)),
		Kernel:   strings.TrimSpace(string(release)),
		Versions: map[string]string{},
		Date:     now.UTC().Format(time.DateOnly),
	}, nil
}

// machine says by /proc/cpuinfo and /proc/meminfo what it is. The processor of arm64 has no name
// there.
func machine(cpu, memory string) string {
	cores, name := 0, "processor without a name"
	for line := range strings.Lines(cpu) {
		key, value, _ := strings.Cut(line, ":")
		switch strings.TrimSpace(key) {
		case "processor":
			cores++
		case "model name":
			name = strings.Join(strings.Fields(value), " ")
		}
	}
	kb := 0
	for line := range strings.Lines(memory) {
		if _, err := fmt.Sscanf(line, "MemTotal: %d kB", &kb); err == nil {
			break
		}
	}
	return fmt.Sprintf("%d × %s, %.0f GB", cores, name, float64(kb)/(1<<20))
}

// Add adds a figure; its unit is that of the metric.
func (r *Run) Add(backend string, services int, who, metric string, value float64, samples int) {
	r.Points = append(r.Points, Point{Backend: backend, Services: services, Who: who, Metric: metric,
		Unit: unit(metric), Value: value, Samples: samples})
}

// Miss adds that there is no figure and why, and what it would be larger than (0: not known).
func (r *Run) Miss(backend string, services int, who, metric string, over float64, why string) {
	r.Points = append(r.Points, Point{Backend: backend, Services: services, Who: who, Metric: metric,
		Unit: unit(metric), Value: over, Missing: why})
}

func unit(metric string) string {
	m, _ := Of(metric)
	return m.Unit
}

// Find returns one point.
func (r Run) Find(backend string, services int, who, metric string) (Point, bool) {
	for _, p := range r.Points {
		if p.Backend == backend && p.Services == services && p.Who == who && p.Metric == metric {
			return p, true
		}
	}
	return Point{}, false
}

// Sizes are the numbers of services there are points of, ascending.
func (r Run) Sizes() (sizes []int) {
	for _, p := range r.Points {
		sizes = append(sizes, p.Services)
	}
	slices.Sort(sizes)
	return slices.Compact(sizes)
}

// Check says what is wrong with a Run: an unknown word, another unit, a value that is none, one
// figure twice.
func (r Run) Check() error {
	type key struct {
		backend, who, metric string
		services             int
	}
	seen := map[key]bool{}
	for _, p := range r.Points {
		m, known := Of(p.Metric)
		k := key{p.Backend, p.Who, p.Metric, p.Services}
		switch {
		case !known:
			return fmt.Errorf("unknown metric %q", p.Metric)
		case p.Unit != m.Unit:
			return fmt.Errorf("%s is in %q and not in %q", p.Metric, m.Unit, p.Unit)
		case p.Backend != NFT && p.Backend != Legacy:
			return fmt.Errorf("%s: unknown backend %q", p.Metric, p.Backend)
		case p.Who != Agent && p.Who != Naive && p.Who != Floor:
			return fmt.Errorf("%s: unknown who %q", p.Metric, p.Who)
		case p.Who == Floor && m.Floor == "":
			return fmt.Errorf("%s has no floor", p.Metric)
		case p.Services < 1:
			return fmt.Errorf("%s of %d services", p.Metric, p.Services)
		case math.IsNaN(p.Value) || math.IsInf(p.Value, 0) || p.Value < 0:
			return fmt.Errorf("%s of %s at %d services is %v", p.Metric, p.Who, p.Services, p.Value)
		case seen[k]:
			return fmt.Errorf("%s of %s at %d services on %s is there twice",
				p.Metric, p.Who, p.Services, p.Backend)
		}
		seen[k] = true
	}
	return nil
}

// Write puts a Run into a file, whose folder it makes. One that Check refuses is not written.
func Write(name string, r Run) error {
	if err := r.Check(); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	if err := os.WriteFile(name, append(text, '\n'), 0o644); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}

// Read is the Run in a file. A field that this program does not know is an error: a figure would be
// lost without a word.
func Read(name string) (Run, error) {
	text, err := os.ReadFile(name)
	if err != nil {
		return Run{}, fmt.Errorf("read %s: %w", name, err)
	}
	var r Run
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil {
		return Run{}, fmt.Errorf("read %s: %w", name, err)
	}
	if err := r.Check(); err != nil {
		return Run{}, fmt.Errorf("read %s: %w", name, err)
	}
	return r, nil
}
