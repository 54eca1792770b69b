package agent

import (
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/reconcile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
)

// TestRedirects plays what passes came to. A step is at its second: told of a change (at this
// time), and the outcomes of a pass: of a family each, in sync or not, with rows written.
func TestRedirects(t *testing.T) {
	family := func(equal bool, rows int) reconcile.Outcome {
		return reconcile.Outcome{Status: status.Family{Usable: true, Equal: equal},
			Work: reconcile.Work{Rows: rows}}
	}
	both := func(a, b reconcile.Outcome) []reconcile.Outcome { return []reconcile.Outcome{a, b} }
	wrote, quiet, away := family(true, 2), family(true, 0), family(false, 0)
	unusable, repaired, lacks := family(false, 0), family(true, 1), family(true, 2)
	unusable.Status.Usable = false
	repaired.Drift = map[string]int{"rule removed": 1}
	lacks.Lacks = true
	type step struct {
		at              int // in seconds
		told            int // 0: nothing
		unknown, paused bool
		outcomes        []reconcile.Outcome
		want            int
	}
	for _, tt := range []struct {
		name  string
		steps []step
	}{
		{"a change", []step{{at: 3, told: 1, outcomes: both(wrote, wrote), want: 2},
			{at: 4, outcomes: both(quiet, quiet)}}},
		{"of one family", []step{{at: 3, told: 1, outcomes: both(wrote, quiet), want: 2}}},
		{"that needs no rule", []step{{at: 3, told: 1, outcomes: both(quiet, quiet)},
			{at: 4, outcomes: both(wrote, quiet)}}},
		{"rules that another reason changes", []step{{at: 3, outcomes: both(wrote, wrote)}}},
		{"locked", []step{{at: 3, told: 1, outcomes: both(away, away)},
			{at: 4, outcomes: both(away, away)}, {at: 9, outcomes: both(wrote, wrote), want: 8}}},
		{"one family is locked", []step{{at: 3, told: 1, outcomes: both(wrote, away)},
			{at: 9, outcomes: both(quiet, wrote), want: 8}}},
		{"one family is locked, and needs nothing", []step{{at: 3, told: 1, outcomes: both(wrote, away)},
			{at: 9, outcomes: both(quiet, quiet), want: 8}}},
		{"a rule is refused", []step{{at: 3, told: 1, outcomes: both(lacks, wrote)},
			{at: 9, outcomes: both(wrote, quiet), want: 8}}},
		{"one family cannot be used", []step{{at: 3, told: 1, outcomes: both(wrote, unusable), want: 2}}},
		{"the oldest counts", []step{{at: 3, told: 2, outcomes: both(away, away)},
			{at: 5, told: 4, outcomes: both(away, away)}, {at: 6, told: 1, outcomes: both(wrote, wrote),
				want: 5}}},
		{"each counts once", []step{{at: 3, told: 2, outcomes: both(wrote, wrote), want: 1},
			{at: 9, told: 8, outcomes: both(wrote, wrote), want: 1}}},
		{"a repair meanwhile", []step{{at: 3, told: 2, outcomes: both(repaired, quiet)}}},
		{"nothing is known yet", []step{{at: 3, told: 1, unknown: true, outcomes: both(away, away)},
			{at: 5, outcomes: both(wrote, wrote), want: 4}}},
		{"paused", []step{{at: 3, told: 1, paused: true, outcomes: both(away, away)},
			{at: 5, outcomes: both(wrote, wrote)}}},
	} {
		var r redirects
		second := func(n int) time.Time { return testStart.Add(time.Duration(n) * time.Second) }
		for _, s := range tt.steps {
			if s.told != 0 {
				r.told(second(s.told))
			} else {
				r.told(time.Time{})
			}
			got := r.passed(second(s.at), !s.unknown, s.paused, s.outcomes)
			if want := time.Duration(s.want) * time.Second; got != want {
				t.Errorf("%s: at %d s: %v, want %v", tt.name, s.at, got, want)
			}
		}
	}
}
