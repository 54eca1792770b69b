package agent

import (
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// WhenEnvoyDown is what happens to the jumps when an Envoy that was ready stops accepting (--when-envoy-down).
type WhenEnvoyDown string

const (
	// Keep leaves the rules: connections to services are refused until Envoy is back, none goes around it.
	Keep WhenEnvoyDown = "keep"
	// Bypass takes the jumps out after failed looks (bypassAfter, bypassTime): connections go to the raw addresses until
	// Envoy is back.
	Bypass WhenEnvoyDown = "bypass"
)

// bypassAfter and bypassTime are how many looks in a row must find the port closed, and over how long: a look can fall
// into the 0.3 s of Envoy's start, and events of others can cause many looks within milliseconds.
const (
	bypassAfter = 3
	bypassTime  = 2 * time.Second
)

// gate is the Hold policy of one interception port: its jump goes in only once the proxy accepts there.
type gate struct {
	open   bool
	denied bool      // closed for a reason: somebody else's socket, or a planned stop. An adopted jump does not open it.
	failed int       // looks in a row that found nobody listening
	since  time.Time // the first of these
}

// accepts says whether the last look found the proxy accepting.
func (g gate) accepts() bool { return g.open && g.failed == 0 }

// next is the gate after one more look at the port, at this time. A port held by another user than the proxy's closes it at once: with
// the jump in, that user would be handed every connection. A planned stop (Envoy drains) closes it too.
func (g gate) next(now time.Time, p symptom.Port, proxyUID uint32, draining bool, policy WhenEnvoyDown) gate {
	switch {
	case p.Err != nil:
		return g // could not look: no news
	case p.Listening && p.Owner != proxyUID, draining:
		return gate{denied: true}
	case p.Listening:
		return gate{open: true}
	case !g.open:
		return g
	}
	if g.failed++; g.failed == 1 {
		g.since = now
	}
	if policy == Bypass && g.failed >= bypassAfter && now.Sub(g.since) >= bypassTime {
		return gate{denied: true}
	}
	return g
}

// Back-off of repairs: fewer than fightBurst within fightWindow are made at once, then one per a delay that doubles from
// fightFirst to fightLast. On legacy, where drift is found by polling, the window must hold fightBurst polls. fightCalm without drift ends it. So a program that deletes our jump every 100 ms meets less
// than one write a second, and the VM is put right within seconds of its end.
const (
	fightBurst  = 5
	fightWindow = 8 * time.Second
	fightFirst  = 1500 * time.Millisecond
	fightLast   = 6 * time.Second
	fightCalm   = 20 * time.Second
)

// fight counts repairs of drift in one family. The zero value is peace.
type fight struct {
	recent []time.Time // repairs within fightWindow, newest last; at most fightBurst
	delay  time.Duration
	last   time.Time // of the last repair or the last drift seen
	undone int
	until  time.Time // no repair before
}

// mayRepair says whether drift found now is repaired now.
func (f *fight) mayRepair(now time.Time) bool {
	f.last = now
	return !now.Before(f.until)
}

// repaired notes a repair.
func (f *fight) repaired(now time.Time) {
	f.undone++
	f.last = now
	if f.delay == 0 {
		for len(f.recent) > 0 && now.Sub(f.recent[0]) > fightWindow {
			f.recent = f.recent[1:]
		}
		f.recent = append(f.recent, now)
		if len(f.recent) < fightBurst {
			return
		}
		f.delay = fightFirst
	} else {
		f.delay = min(f.delay*2, fightLast)
	}
	f.until = now.Add(f.delay)
}

// calm ends the fight once nothing was undone for fightCalm.
func (f *fight) calm(now time.Time) {
	if f.undone > 0 && now.Sub(f.last) > max(fightCalm, 2*f.delay) {
		*f = fight{}
	}
}

func (f *fight) on() bool { return f.delay > 0 }
