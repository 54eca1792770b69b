package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/service-proxy-agent/service-proxy-agent/test/bench/result"
)

var update = flag.Bool("update", false, "write the expected document")

// The curve is made up: it has all that can be missing. What benchmarks printed was
// recorded.
func recorded(t *testing.T) files {
	t.Helper()
	dir := t.TempDir()
	return files{curve: "testdata/made-up.json", bench: "testdata/bench.txt",
		baseline: filepath.Join(dir, "baseline.json"), out: filepath.Join(dir, "out"),
		docs: filepath.Join(dir, "docs")}
}

func report(t *testing.T, f files) string {
	t.Helper()
	var b strings.Builder
	if err := f.report(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestReport(t *testing.T) {
	f := recorded(t)
	if said := report(t, f); !strings.Contains(said, "no baseline") ||
		!strings.Contains(said, "wrote "+f.baseline) {
		t.Error(said)
	}
	// Not .md: the links of what has that name must lead somewhere (internal/links_test.go).
	for name, golden := range map[string]string{
		"scale.md": "scale.golden", "img/scale-push.svg": "scale-push.svg"} {
		have, err := os.ReadFile(filepath.Join(f.docs, name))
		if err != nil {
			t.Fatal(err)
		}
		expected := filepath.Join("testdata", golden)
		if *update {
			if err := os.WriteFile(expected, have, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(expected)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want), string(have)); diff != "" {
			t.Errorf("%s (run with -update, then look at it):\n%s", name, diff)
		}
	}
	// The baseline is of this very run.
	if said := report(t, f); !strings.Contains(said, "0 moved by more than 15 %") ||
		strings.Contains(said, "not measured now") || strings.Contains(said, "measured now, and") {
		t.Error(said)
	}
}

// TestReportAgain: without -docs nothing that is kept is touched, and pictures that are not drawn
// any more go.
func TestReportAgain(t *testing.T) {
	f := recorded(t)
	report(t, f)
	kept, err := os.ReadFile(f.baseline)
	if err != nil {
		t.Fatal(err)
	}
	stale := filepath.Join(f.out, "img", "scale-stale.svg")
	if err := os.WriteFile(stale, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	docs := f.docs
	f.docs = ""
	if err := os.RemoveAll(docs); err != nil {
		t.Fatal(err)
	}
	if said := report(t, f); !strings.Contains(said, "stay as they are") {
		t.Error(said)
	}
	if _, err := os.Stat(stale); err == nil {
		t.Error("the stale picture is there")
	}
	if _, err := os.Stat(docs); err == nil {
		t.Error("wrote the kept document")
	}
	if now, err := os.ReadFile(f.baseline); err != nil || !bytes.Equal(now, kept) {
		t.Errorf("touched the baseline: %v", err)
	}
}

// TestDocument: what is said of figures that are missing, and that each picture of the text is
// there.
func TestDocument(t *testing.T) {
	run, err := result.Read("testdata/made-up.json")
	if err != nil {
		t.Fatal(err)
	}
	d := newDocument(run, nil)
	var there []string
	for _, p := range d.pictures {
		there = append(there, "img/"+p.file)
	}
	var named []string
	for _, m := range regexp.MustCompile(`!\[[^]]+\]\(([^)]+)\)`).FindAllStringSubmatch(d.text, -1) {
		named = append(named, m[1])
	}
	if diff := cmp.Diff(there, named); diff != "" {
		t.Error(diff)
	}
	for _, want := range []string{
		"| > 39 s (1) |", "(1) naive loop, 10,000 services, nft: 13 of 20 changes were undone",
		"| no figure (1) |", "(1) naive loop, 32,000 services, legacy: iptables-restore: out of memory.",
		"agent 40, floor 40, naive loop 20. The 99th percentile of fewer than 100",
	} {
		if !strings.Contains(d.text, want) {
			t.Errorf("no %q", want)
		}
	}
	if strings.Contains(d.text, "Ratios of the benchmarks") {
		t.Error("a table of no ratios")
	}
	columns(t, d.text)

	// One size is no curve, and who was not measured has no table beside the agent.
	run.Points = slices.DeleteFunc(run.Points, func(p result.Point) bool {
		return p.Services != 10 || p.Who == result.Naive
	})
	d = newDocument(run, ratios{"a|b ratio": 1})
	if len(d.pictures) > 0 || strings.Contains(d.text, "Beside a naive") ||
		!strings.Contains(d.text, `a\|b ratio`) {
		t.Errorf("%d pictures\n%s", len(d.pictures), d.text)
	}
	columns(t, d.text)
}

// columns looks whether all rows of a table have as many cells: GitHub leaves out what is too much.
func columns(t *testing.T, text string) {
	t.Helper()
	count := 0
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(line, "|") {
			count = 0
			continue
		}
		n := strings.Count(strings.ReplaceAll(line, `\|`, ""), "|")
		if count != 0 && n != count {
			t.Errorf("%d cells, not %d: %s", n-1, count-1, line)
		}
		count = n
	}
}

// TestShares: a handful of ticks makes no ratio, and nothing no division by zero.
func TestShares(t *testing.T) {
	var run result.Run
	run.Add(result.NFT, 10, result.Agent, result.EnvoyIdle, 0.2, 0)
	run.Add(result.NFT, 10, result.Floor, result.EnvoyIdle, 0, 0)
	run.Add(result.NFT, 100, result.Agent, result.EnvoyIdle, 0.2, 0)
	run.Add(result.NFT, 100, result.Floor, result.EnvoyIdle, 0.09, 0)
	run.Add(result.NFT, 1000, result.Agent, result.EnvoyIdle, 0.2, 0)
	run.Add(result.NFT, 1000, result.Floor, result.EnvoyIdle, 0.1, 0)
	run.Add(result.NFT, 10, result.Agent, result.Resident, 20, 0)
	run.Add(result.NFT, 1000, result.Agent, result.Resident, 30, 0)
	run.Add(result.NFT, 10, result.Agent, result.IdleCore, 0.05, 0)
	run.Add(result.NFT, 10, result.Naive, result.IdleCore, 5, 0)
	run.Add(result.NFT, 10, result.Agent, result.Lost, 0.02, 0)
	run.Add(result.NFT, 10, result.Naive, result.Lost, 0.08, 0)
	run.Miss(result.NFT, 100, result.Agent, result.PushP50, 5, "gave up")
	run.Add(result.NFT, 100, result.Floor, result.PushP50, 1, 0)
	want := ratios{"curve/nft/1000/envoy-idle agent÷floor": 2, "curve/nft/1000/resident ÷10": 1.5,
		"curve/nft/10/lost agent÷naive": 0.25}
	if diff := cmp.Diff(want, curveRatios(run)); diff != "" {
		t.Error(diff)
	}
}

func TestBenchRatios(t *testing.T) {
	text := `goos: linux
pkg: ` + module + `iptables
BenchmarkScale/nft/install/random-2 	 1	 60.5 bare-ms	 75 ours-ms	 1.24 ratio(max1.25)
BenchmarkScale/nft/add/random-16    	 1	 3 ours-ms	 1.1 ratio(max1.2)	 1.15 pass-ratio(max1.2)
    some_test.go:10: Benchmark 12 1 ratio
BenchmarkTorn-2
PASS
pkg: ` + module + `envoyadmin
BenchmarkDumpOf10000-2  1  5 ns/op  8.5 ×protojson
BenchmarkMissing-2      1  7 ns/op  0.92 x-floor  NaN%% y
ok
`
	want := ratios{"iptables.Scale/nft/install/random ratio": 1.24,
		"iptables.Scale/nft/add/random ratio":      1.1,
		"iptables.Scale/nft/add/random pass-ratio": 1.15,
		"envoyadmin.DumpOf10000 ×protojson":        8.5,
		"envoyadmin.Missing x-floor":               0.92}
	if diff := cmp.Diff(want, benchRatios(strings.NewReader(text))); diff != "" {
		t.Error(diff)
	}
}

func TestCompare(t *testing.T) {
	old := baseline{Date: "2026-11-01", Machine: "old", Ratios: ratios{
		"as it was": 1, "just": 1, "down": 2, "up": 1, "gone": 3, "was zero": 0, "is zero": 0}}
	now := ratios{"as it was": 1, "just": 1.15, "down": 1.6, "up": 1.5, "new": 9, "was zero": 0.5,
		"is zero": 0}
	var b strings.Builder
	old.compare(now, "new").print(&b)
	want := `
ratios beside those of 2026-11-01: 3 moved by more than 15 %, 3 did not
  (then it was another machine: old)
  was zero                                                           0 -> 0.5      +Inf %
  up                                                                 1 -> 1.5       +50 %
  down                                                               2 -> 1.6       -20 %
in the baseline, and not measured now: 1
  gone
measured now, and not in the baseline: 1
  new

`
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Error(diff)
	}
}

func TestFigure(t *testing.T) {
	for _, tt := range []struct {
		value float64
		unit  string
		want  string
	}{
		{0, "ms", "0 ms"}, {19.53, "ms", "19.5 ms"}, {0.03341, "%", "0.0334 %"}, {100, "%", "100 %"},
		{999.4, "ms", "999 ms"}, {999.6, "ms", "1 s"}, {2847, "ms", "2.85 s"}, {300_000, "ms", "300 s"},
		{1_800_000, "ms", "1,800 s"}, {26.04, "µs", "26 µs"}, {2100, "µs", "2.1 ms"},
		{1024, "MB", "1,024 MB"}, {0.00001, "MB", "0.00001 MB"},
	} {
		if have := figure(tt.value, tt.unit); have != tt.want {
			t.Errorf("%v %s: %q, want %q", tt.value, tt.unit, have, tt.want)
		}
	}
}

// TestNoCurve: ratios of benchmarks are compared without a curve, too, but no document is made; nor
// of a run that did all once.
func TestNoCurve(t *testing.T) {
	for name, curve := range map[string]string{"absent": "", "brief": `{"brief": true}`} {
		f := recorded(t)
		report(t, f)
		if err := os.RemoveAll(f.docs); err != nil {
			t.Fatal(err)
		}
		f.curve = filepath.Join(t.TempDir(), "curve.json")
		if curve != "" {
			if err := os.WriteFile(f.curve, []byte(curve), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		var b strings.Builder
		if err := f.report(&b); err == nil || !strings.Contains(b.String(), "no curve") ||
			!strings.Contains(b.String(), "0 moved by more") {
			t.Errorf("%s: %v\n%s", name, err, b.String())
		}
		if _, err := os.Stat(f.docs); err == nil {
			t.Errorf("%s: wrote a document", name)
		}
		f.docs = ""
		report(t, f)
	}
}

// TestFailed: nothing that is kept is made of a run in which something failed.
func TestFailed(t *testing.T) {
	f := recorded(t)
	printed, err := os.ReadFile(f.bench)
	if err != nil {
		t.Fatal(err)
	}
	f.bench = filepath.Join(t.TempDir(), "bench.txt")
	printed = append(printed, "FAIL\t"+module+"iptables\t1.2s\n"...)
	if err := os.WriteFile(f.bench, printed, 0o644); err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	if err := f.report(&b); err == nil || !strings.Contains(err.Error(), "something failed") {
		t.Errorf("%v\n%s", err, b.String())
	}
	for _, name := range []string{f.docs, f.baseline} {
		if _, err := os.Stat(name); err == nil {
			t.Errorf("wrote %s", name)
		}
	}
}

// TestKept: the baseline of the repository is of ratios alone, and docs/scale.md is what this
// program makes: its pictures are there, and no other.
func TestKept(t *testing.T) {
	text, err := os.ReadFile("baseline.json")
	if err != nil {
		t.Fatal(err)
	}
	var b baseline
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&b); err != nil || len(b.Ratios) == 0 || b.Date == "" {
		t.Errorf("%v %+v", err, b)
	}
	readme, err := os.ReadFile("../../README.md")
	if err != nil || !strings.Contains(string(readme), "](docs/img/scale-push.svg)") {
		t.Error("the README does not show the curve", err)
	}
	root := os.DirFS("../../docs")
	document, err := fs.ReadFile(root, "scale.md")
	if err != nil {
		t.Fatal(err)
	}
	columns(t, string(document))
	pictures, err := fs.Glob(root, "img/scale-*.svg")
	if err != nil || len(pictures) == 0 {
		t.Fatal(err, "no picture")
	}
	for _, name := range pictures {
		if !strings.Contains(string(document), "("+name+")") {
			t.Errorf("docs/scale.md does not show %s", name)
		}
	}
	if n := strings.Count(string(document), "](img/"); n != len(pictures) {
		t.Errorf("%d pictures are shown, %d are there", n, len(pictures))
	}
}

// TestFloors: each floor has a name in pictures, and no word of a picture is too long for it.
func TestFloors(t *testing.T) {
	for _, m := range result.Metrics {
		if m.Floor != "" && m.Name != result.PushP99 && floors[m.Name] == "" {
			t.Errorf("the floor of %s has no name", m.Name)
		}
		if len(floors[m.Name]) > 17 {
			t.Errorf("%q is wider than what is right of the axes", floors[m.Name])
		}
	}
}
