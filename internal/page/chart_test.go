package page

import (
	"math"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
)

func minute(n int, change float64, changes int, state string) status.Sample {
	return status.Sample{Time: noon.Add(time.Duration(n) * time.Minute), SlowestChange: change,
		Changes: changes, State: state}
}

// TestTimeline: where nothing was measured is a gap, and a minute without a change is one, too.
func TestTimeline(t *testing.T) {
	nan := math.NaN()
	for _, tt := range []struct {
		name             string
		samples          []status.Sample
		latency, changes []float64
		runs             []run
	}{
		{"one", []status.Sample{minute(0, 0.5, 1, "ready")}, []float64{0.5}, []float64{1},
			[]run{{"ready", 0, 1}}},
		{"no change, no agent", []status.Sample{minute(0, 0.5, 2, "ready"), minute(1, 0, 0, "ready"),
			minute(4, 0.25, 1, "hold")}, []float64{0.5, nan, nan, nan, 0.25}, []float64{2, 0, nan, nan, 1},
			[]run{{"ready", 0, 2}, {"", 2, 4}, {"hold", 4, 5}}},
		{"a little late", []status.Sample{minute(0, 1, 1, "ready"),
			{Time: noon.Add(63 * time.Second), SlowestChange: 2, State: "ready"}}, []float64{1, 2},
			[]float64{1, 0}, []run{{"ready", 0, 2}}},
		{"a clock that was set back", []status.Sample{minute(5, 1, 1, "ready"), minute(0, 2, 1, "ready")},
			[]float64{1}, []float64{1}, []run{{"ready", 0, 1}}},
		{"no numbers", []status.Sample{minute(0, math.Inf(1), -1, "")}, []float64{nan}, []float64{nan},
			[]run{{"not-ready", 0, 1}}},
	} {
		line := timelineOf(tt.samples)
		same := cmpopts.EquateNaNs()
		if diff := cmp.Diff(tt.latency, measures[0].values(line), same); diff != "" {
			t.Errorf("%s: latency (-want +have):\n%s", tt.name, diff)
		}
		if diff := cmp.Diff(tt.changes, measures[2].values(line), same); diff != "" {
			t.Errorf("%s: changes (-want +have):\n%s", tt.name, diff)
		}
		if diff := cmp.Diff(tt.runs, line.runs(), cmp.AllowUnexported(run{})); diff != "" {
			t.Errorf("%s: states (-want +have):\n%s", tt.name, diff)
		}
	}
	// Of a day, a column is several minutes: the slowest of them, and their sum.
	var day []status.Sample
	for n := range 1440 {
		day = append(day, minute(n, float64(n%12+1), 1, "ready"))
	}
	line := timelineOf(day)
	if len(line.columns) != maxColumns || line.step != 12*time.Minute ||
		measures[0].values(line)[7] != 12 || measures[2].values(line)[7] != 12 {
		t.Errorf("a day: %d columns of %v", len(line.columns), line.step)
	}
	for _, at := range []time.Time{{}, noon.AddDate(-300, 0, 0)} {
		if n := len(timelineOf([]status.Sample{{Time: at}, {Time: noon}}).columns); n > maxColumns {
			t.Errorf("since %v: %d columns", at, n)
		}
	}
}

// TestChartSays: a chart's words, and a gap in its line.
func TestChartSays(t *testing.T) {
	page := rendered(t, healthy())
	for _, want := range []string{
		"Slowest pass, per minute, from 11:00 to 12:00 UTC: least 4 ms, most 12 ms, last 8.8 ms. " +
			"Nothing was measured in 8 of 60.",
		"Repairs of drift, per minute, from 11:00 to 12:00 UTC: 2 in all, least 0, most 1, last 0.",
		"no agent 11:31–11:35", "bypass 11:35–11:39",
	} {
		if !strings.Contains(page, want) {
			t.Errorf("it does not say %q", want)
		}
	}
	if trends := strings.Count(page, `class="trend"`); trends != 2 {
		t.Errorf("%d lines", trends)
	}
	_, pass, _ := strings.Cut(page, `id="slowest-pass-text"`)
	_, path, _ := strings.Cut(pass, `class="trend" d="`)
	path, _, _ = strings.Cut(path, `"`)
	if strings.Count(path, "M") != 2 {
		t.Errorf("a line with a gap is %q", path)
	}
}

func TestWords(t *testing.T) {
	for have, want := range map[string]string{
		seconds(0): "0 s", seconds(0.0000042): "4.2 µs", seconds(0.00042): "0.42 ms",
		seconds(0.0316): "31.6 ms",
		seconds(0.9996): "1 s", seconds(9.999): "10 s", seconds(59.4): "59.4 s", seconds(7200): "120 min",
		bytesOf(999): "999 B", bytesOf(31_400_000): "31.4 MB", bytesOf(1 << 62): "4611686 TB",
		percent(0): "0 %", percent(0.00001): "< 0.01 %", percent(0.0021): "0.21 %", percent(1.5): "150 %",
		short(999_999): "999,999", short(1_223_729): "1.22 M", short(1 << 33): "8.59 G",
		number(0): "0", number(uint64(1234567)): "1,234,567", numberOf(1, "prefix"): "1 prefix",
		numberOf(2, "prefix"): "2 prefixes", numberOf(1000, "service"): "1,000 services",
		span(-time.Second): "0 s", span(59 * time.Second): "59 s", span(61 * time.Minute): "1 h 1 min",
		span(3 * time.Hour): "3 h", span(25 * time.Hour): "1 day", span(100 * time.Hour): "4 days",
	} {
		if have != want {
			t.Errorf("%q, want %q", have, want)
		}
	}
	for v, want := range map[float64]float64{0: 1, 1: 1, 0.012: 0.02, 0.03: 0.05, 7: 10, 10: 10,
		101: 200} {
		if have := nice(v); math.Abs(have-want) > 1e-9 {
			t.Errorf("nice(%v) is %v, want %v", v, have, want)
		}
	}
}
