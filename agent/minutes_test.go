package agent

import (
	"slices"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/reconcile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
)

// TestMinutes: each tells the worst of its passes and how many there were.
func TestMinutes(t *testing.T) {
	var m minutes
	pass := func(at, took, redirect time.Duration, state string,
		outcomes ...reconcile.Outcome) []status.Sample {
		return m.pass(passed{seen: Observation{Now: testStart.Add(at)}, took: took, redirect: redirect,
			outcomes: outcomes}, state)
	}
	wrote := func(rows int, repaired bool) reconcile.Outcome {
		o := reconcile.Outcome{Work: reconcile.Work{Rows: rows}}
		if repaired {
			o.Drift = map[string]int{"jump removed": 2}
		}
		return o
	}
	const ms, second = time.Millisecond, time.Second
	pass(0, 5*ms, 0, "hold")
	pass(20*second, 3*ms, 250*ms, "ready", wrote(9, false), wrote(2, false), wrote(0, false))
	pass(30*second, 4*ms, 100*ms, "bypass", wrote(1, true))
	if got := pass(59*second, 4*ms, 0, "hold"); got != nil {
		t.Errorf("before the minute is over: %+v", got)
	}
	first := pass(60*second, 9*ms, 0, "ready")
	pass(61*second, ms, 0, "hold")
	then := pass(11*time.Minute, 10*time.Minute, 0, "paused") // it hung
	want := []status.Sample{
		{Time: testStart.Add(time.Minute), State: "ready", Passes: 5, SlowestPass: 0.009,
			SlowestChange: 0.25, Changes: 2, Repairs: 1},
		{Time: testStart.Add(11 * time.Minute), State: "paused", Passes: 2, SlowestPass: 600},
	}
	if !slices.Equal(first, want[:1]) || !slices.Equal(then, want) {
		t.Errorf("%+v\n%+v\nwant\n%+v", first, then, want)
	}
	before := slices.Clone(then)
	var last []status.Sample
	for i := range 10 * maxSamples {
		last = pass(time.Duration(12+i)*time.Minute, ms, 0, "ready")
		if len(last) > maxSamples {
			t.Fatalf("%d samples", len(last))
		}
	}
	if len(last) != maxSamples || !last[0].Time.Equal(last[59].Time.Add(-59*time.Minute)) {
		t.Errorf("%d from %v to %v", len(last), last[0].Time, last[len(last)-1].Time)
	}
	if !slices.Equal(before, then) {
		t.Error("what was shown has changed")
	}
}
