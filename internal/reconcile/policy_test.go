package reconcile

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
		{"a foreign owner closes it at once", Keep, []symptom.Port{ok, foreign}, false, false, 0},
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

// TestRepairsAtOnce: four repairs within 8 s are made at once and are no reason to back off; the fifth is one.
func TestRepairsAtOnce(t *testing.T) {
	var b backOff
	now := time.Unix(1e9, 0)
	for n := 1; n <= 5; n++ {
		if !b.mayRepair(now) || b.on() {
			t.Fatalf("repair %d is put off until %v", n, b.until.Sub(now))
		}
		b.repaired(now)
		now = now.Add(1900 * time.Millisecond)
		b.pass(now)
	}
	if !b.on() {
		t.Error("five repairs within 8 s are no reason to back off")
	}
	if now = now.Add(-time.Second); b.mayRepair(now) {
		t.Error("a sixth is made at once")
	}
}

// TestBackOff plays a program that undoes every repair at once, for five minutes, and then ends.
func TestBackOff(t *testing.T) {
	var b backOff
	now := time.Unix(1e9, 0)
	writes, late := 0, 0
	for step := 0; step < 3000; step++ {
		now = now.Add(100 * time.Millisecond)
		b.pass(now)
		if b.mayRepair(now) {
			b.repaired(now)
			writes++
			if step > 100 {
				late++
			}
		}
	}
	if !b.on() {
		t.Error("no back-off")
	}
	if late > 290 || late < 30 {
		t.Errorf("%d repairs in 290 s of it, want under one a second and one each few seconds", late)
	}
	if !b.until.Before(now.Add(backOffLast + time.Millisecond)) {
		t.Error("the next repair is too far off")
	}
	for range 60 {
		now = now.Add(time.Second)
		b.pass(now)
	}
	if b.on() || b.undone != 0 {
		t.Errorf("the back-off does not end: %+v", b)
	}
}

// TestNoBackOff: drift that comes now and then is repaired at once, always.
func TestNoBackOff(t *testing.T) {
	var b backOff
	now := time.Unix(1e9, 0)
	for range 100 {
		now = now.Add(10 * time.Second)
		b.pass(now)
		if !b.mayRepair(now) {
			t.Fatalf("repair put off by %v", b.until.Sub(now))
		}
		b.repaired(now)
	}
}
