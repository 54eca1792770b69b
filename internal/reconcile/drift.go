package reconcile

import (
	"cmp"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

const (
	// showDrift is how long a repaired drift stays among the findings, so that a look by hand
	// finds it.
	showDrift = time.Minute
	// lateName is how long after a drift the kernel's word on who wrote may come: events take their
	// way past the loop's timer.
	lateName = time.Second
)

// driftMemory is what is told of drift after its repair.
type driftMemory struct {
	seen []iptables.Drift // the last
	at   time.Time
	by   string // who made it, where the kernel told

	since time.Time // what showed the drift that stands; zero: none does

	undone uint64 // repairs since the start
	lastBy string // who made the last that was repaired
	lastAt time.Time
}

// forget ends the showing of an old drift.
func (d *driftMemory) forget(now time.Time) {
	if now.Sub(d.at) > showDrift {
		d.seen, d.by = nil, ""
	}
}

// found notes a drift. While repairs are held back the name of an earlier look stands when there is
// no newer one.
func (d *driftMemory) found(now time.Time, drift []iptables.Drift, by string, backingOff bool) {
	d.seen, d.at = drift, now
	if by != "" || !backingOff {
		d.by = by
	}
}

// named takes in the kernel's word on a drift that was found by a pass before it.
func (d *driftMemory) named(now time.Time, by string) {
	if d.by == "" && now.Sub(d.at) < lateName {
		d.by, d.lastBy = by, by
	}
}

// repaired notes that the drift was repaired.
func (d *driftMemory) repaired(now time.Time) {
	d.undone++
	d.lastBy, d.lastAt = d.by, now
}

// shown notes when something first told of the drift that stands.
func (d *driftMemory) shown(told time.Time) { d.since = cmp.Or(d.since, told) }

// over ends the drift that stands, and says how long it was there to be seen.
func (d *driftMemory) over(now time.Time) (lasted time.Duration, was bool) {
	if d.since.IsZero() {
		return 0, false
	}
	lasted = now.Sub(d.since)
	d.since = time.Time{}
	return lasted, true
}

// kinds counts the differences by what they are.
func kinds(drift []iptables.Drift) map[string]int {
	n := map[string]int{}
	for _, d := range drift {
		n[d.Kind.String()]++
	}
	return n
}
