package agent

import (
	"cmp"
	"errors"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

func TestGate(t *testing.T) {
	const proxy = 107
	ok := symptom.Port{Listening: true, Owner: proxy}
	closed := symptom.Port{}
	foreign := symptom.Port{Listening: true, Owner: 1000}
	unknown := symptom.Port{Err: errors.New("netlink")}
	tests := []struct {
		name     string
		policy   WhenEnvoyDown
		looks    []symptom.Port
		draining bool // at the last look
		want     bool
		every    time.Duration // between looks; 0: a second
	}{
		{"nobody yet", Keep, []symptom.Port{closed}, false, false, 0},
		{"accepts", Keep, []symptom.Port{closed, ok}, false, true, 0},
		{"kept when Envoy dies", Keep, []symptom.Port{ok, closed, closed, closed, closed, closed}, false, true, 0},
		{"bypassed after three looks", Bypass, []symptom.Port{ok, closed, closed, closed}, false, false, 0},
		{"not within moments, however many events there are", Bypass,
			[]symptom.Port{ok, closed, closed, closed, closed, closed, closed}, false, true, 300 * time.Millisecond},
		{"but over two seconds of them", Bypass,
			[]symptom.Port{ok, closed, closed, closed, closed, closed, closed, closed, closed}, false, false, 300 * time.Millisecond},
		{"not before", Bypass, []symptom.Port{ok, closed, closed}, false, true, 0},
		{"one good look starts the count again", Bypass, []symptom.Port{ok, closed, closed, ok, closed, closed}, false, true, 0},
		{"back after a bypass", Bypass, []symptom.Port{ok, closed, closed, closed, ok}, false, true, 0},
		{"a stranger closes it at once", Keep, []symptom.Port{ok, foreign}, false, false, 0},
		{"and it stays closed until the proxy is back", Keep, []symptom.Port{ok, foreign, closed}, false, false, 0},
		{"the proxy is back", Keep, []symptom.Port{ok, foreign, closed, ok}, false, true, 0},
		{"could not look is no news", Keep, []symptom.Port{ok, unknown}, false, true, 0},
		{"could not look is no news at boot", Keep, []symptom.Port{unknown}, false, false, 0},
		{"a planned stop", Keep, []symptom.Port{ok, ok}, true, false, 0},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			var g gate
			now := time.Unix(1e9, 0)
			for i, look := range test.looks {
				now = now.Add(cmp.Or(test.every, time.Second))
				g = g.next(now, look, proxy, test.draining && i == len(test.looks)-1, test.policy)
			}
			if g.open != test.want {
				t.Errorf("open is %v, want %v", g.open, test.want)
			}
		})
	}
}

// TestRepairsAtOnce: four repairs within 8 s are made at once and are no fight; the fifth begins one.
func TestRepairsAtOnce(t *testing.T) {
	var f fight
	now := time.Unix(1e9, 0)
	for n := 1; n <= 5; n++ {
		if !f.mayRepair(now) || f.on() {
			t.Fatalf("repair %d is put off until %v", n, f.until.Sub(now))
		}
		f.repaired(now)
		now = now.Add(1900 * time.Millisecond)
		f.calm(now)
	}
	if !f.on() {
		t.Error("five repairs within 8 s are no fight")
	}
	if now = now.Add(-time.Second); f.mayRepair(now) {
		t.Error("a sixth is made at once")
	}
}

// TestFight plays a program that undoes every repair at once, for five minutes, and then ends.
func TestFight(t *testing.T) {
	var f fight
	now := time.Unix(1e9, 0)
	writes, late := 0, 0
	for step := 0; step < 3000; step++ {
		now = now.Add(100 * time.Millisecond)
		f.calm(now)
		if f.mayRepair(now) {
			f.repaired(now)
			writes++
			if step > 100 {
				late++
			}
		}
	}
	if !f.on() {
		t.Error("no fight seen")
	}
	if late > 290 || late < 30 {
		t.Errorf("%d repairs in 290 s of a fight, want under one a second and one each few seconds", late)
	}
	if !f.until.Before(now.Add(fightLast + time.Millisecond)) {
		t.Error("the next repair is too far off")
	}
	for range 60 {
		now = now.Add(time.Second)
		f.calm(now)
	}
	if f.on() || f.undone != 0 {
		t.Errorf("the fight does not end: %+v", f)
	}
}

// TestNoFight: drift that comes now and then is repaired at once, always.
func TestNoFight(t *testing.T) {
	var f fight
	now := time.Unix(1e9, 0)
	for range 100 {
		now = now.Add(10 * time.Second)
		f.calm(now)
		if !f.mayRepair(now) {
			t.Fatalf("repair put off by %v", f.until.Sub(now))
		}
		f.repaired(now)
	}
}

func TestFailure(t *testing.T) {
	start := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	down := symptom.Finding{ID: symptom.EnvoyDown, Severity: symptom.Error, Cause: "Envoy is not running", Next: "see the log"}
	rejected := symptom.Finding{ID: symptom.ListenerRejected, Key: "l", Severity: symptom.Error, Cause: "rejected"}
	under := symptom.Finding{ID: symptom.EnvoyNotConfigured, Severity: symptom.Error, Cause: "not configured", ExplainedBy: symptom.ListenerRejected}
	warning := symptom.Finding{ID: symptom.DriftRepaired, Severity: symptom.Warning, Cause: "drift"}
	steps := []struct {
		after    time.Duration
		findings []symptom.Finding
		want     string
	}{
		{0, nil, ""},
		{0, []symptom.Finding{warning}, ""},
		{time.Second, []symptom.Finding{down, warning}, "Envoy is not running; see the log (since 2026-01-02T03:04:06Z, 1 time)"},
		// The newest is told: the older one is known, and may last for days.
		{2 * time.Second, []symptom.Finding{down, rejected}, "rejected; and 1 more, see `service-proxy-agent status` (since 2026-01-02T03:04:07Z, 1 time)"},
		{2 * time.Second, []symptom.Finding{down}, "Envoy is not running; see the log (since 2026-01-02T03:04:06Z, 1 time)"},
		{3 * time.Second, nil, "Envoy is not running; see the log (over; 2026-01-02T03:04:06Z to 2026-01-02T03:04:08Z, 1 time)"},
		{4 * time.Second, []symptom.Finding{under}, "Envoy is not running; see the log (over; 2026-01-02T03:04:06Z to 2026-01-02T03:04:08Z, 1 time)"},
		{5 * time.Second, []symptom.Finding{down}, "Envoy is not running; see the log (since 2026-01-02T03:04:06Z, 2 times)"},
		{6 * time.Second, []symptom.Finding{rejected}, "rejected (since 2026-01-02T03:04:11Z, 1 time)"},
		{7 * time.Second, nil, "rejected (over; 2026-01-02T03:04:11Z to 2026-01-02T03:04:12Z, 1 time)"},
		{8 * time.Second, []symptom.Finding{down, rejected}, "Envoy is not running; see the log; and 1 more, see `service-proxy-agent status` (since 2026-01-02T03:04:13Z, 1 time)"}, // of two at once the worst
		{9 * time.Second, []symptom.Finding{rejected}, "rejected (since 2026-01-02T03:04:11Z, 2 times)"},
		{10 * time.Second, nil, "rejected (over; 2026-01-02T03:04:11Z to 2026-01-02T03:04:15Z, 2 times)"},
		{3 * time.Hour, []symptom.Finding{rejected}, "rejected (since 2026-01-02T06:04:05Z, 1 time)"},
	}
	dir := t.TempDir()
	var f Failures
	for _, s := range steps {
		f = f.next(s.findings, start.Add(s.after))
		if f.String() != s.want {
			t.Errorf("after %v: %q, want %q", s.after, f, s.want)
		}
		if err := f.save(dir); err != nil {
			t.Fatal(err)
		}
		if back := loadFailures(dir); back.String() != f.String() {
			t.Errorf("after %v: read back %q", s.after, back)
		}
	}
}
