package envoyadmin

import (
	"slices"
	"time"
)

// The pace of questions. What each costs Envoy's main thread was measured on Envoy 1.40 (one core):
// a masked dump 1 ms at 10 services and 30 to 50 ms at 10,000, a full dump 2 ms and 300 ms (TCP
// chains) to 1.1 s (HTTP). The pace goes by how long answers take, which is about as long; but
// after a masked dump of a large configuration Envoy spends as much again, or more, on tidying up.
const (
	lookFloor   = 1 * time.Second  // between looks that nothing asked for
	lookCeiling = 30 * time.Second // the fallback stays a fallback, even where a look takes long
	// such looks take one part in 500 of the time; with the tidying up half a percent, and the rest is
	// for questions about health
	lookShare = 500
	// after a full dump that took 1, at least 11 until the next: with the look before it under 10 %
	dumpShare = 11
	dumpFloor = 200 * time.Millisecond

	// after a look, the first of those that a hint or a warming listener asks for
	soon = 50 * time.Millisecond
	// and these take no more than one part in 10, growing rarer quickly
	soonShare = 10

	// a full dump even if nothing moved, should the fingerprint ever miss a change
	resync = 10 * time.Minute
)

// Action is what a Detector says to do.
type Action uint8

const (
	Wait Action = iota // nothing, for the time given
	Look               // ask for Client.Fingerprint and tell Looked
	Dump               // ask for Client.Listeners and tell Dumped
)

// Detector decides when to ask Envoy what, so that a change is seen at once and an idle Envoy
// spends less than 1 % of its main thread on us. It is a pure value: the time is given to it, and
// it asks nothing itself. The zero value begins with a dump.
//
//	for {
//		action, wait := d.Next(time.Now())
//		switch action {
//		case Wait: // sleep, or until the log has news: d.Hint(time.Now())
//		case Look:
//			f, err := client.Fingerprint(ctx, nil)
//			if d.Looked(began, time.Now(), f, err) { client.Redial() }
//		case Dump:
//			s, err := client.Listeners(ctx)
//			d.Dumped(began, time.Now(), s.Fingerprint, err)
//		}
//	}
type Detector struct {
	// Share is the most that questions take of the time while something changes, above 0 to 1;
	// 0: DefaultShare.
	Share float64

	last    Fingerprint // of the last full dump
	known   bool        // there was one
	moved   bool        // a look differed from it
	warming bool

	costs   []time.Duration // of the last looks
	looked  time.Time       // end of the last question
	due     time.Time       // the next look that nothing asks for
	dumpNot time.Time       // no full dump before
	resync  time.Time

	redialed bool // since something moved, or since a look without a hint

	hinted  bool
	early   bool          // the last look that differed was asked for by a hint
	hint    time.Time     // the last hint
	hintGap time.Duration // after the last question, when hinted
	warmGap time.Duration // the same while a listener is warming
}

// DefaultShare is the Share of --envoy-share.
const DefaultShare = 0.10

// Bucket is how the token bucket stands at this time.
func (d *Detector) Bucket(now time.Time) Bucket { return Bucket{} }

// Hint says that something may have moved. Any number of hints is one look; hints that lead to
// nothing are heeded ever more slowly, down to the pace without hints.
func (d *Detector) Hint(now time.Time) { d.hinted, d.hint = true, now }

// Next says what to do at this time, and for Wait, for how long if no hint comes.
func (d *Detector) Next(now time.Time) (Action, time.Duration) {
	if !d.known || d.moved || !now.Before(d.resync) {
		if wait := d.dumpNot.Sub(now); wait > 0 {
			return Wait, wait
		}
		return Dump, 0
	}
	due := d.due
	if d.hinted {
		gap := time.Duration(0) // after a quiet time at once
		if d.hintGap > 0 {
			gap = max(d.hintGap, soonShare*d.cost())
		}
		// Before a full dump is allowed again a look would be of no use: it would
		// have to be repeated then.
		due = earlier(due, later(d.looked.Add(gap), d.dumpNot))
	}
	if d.warming {
		due = earlier(due, d.looked.Add(max(d.warmGap, soonShare*d.cost())))
	}
	if wait := due.Sub(now); wait > 0 {
		return Wait, wait
	}
	return Look, 0
}

// Looked takes in the answer of a look. It says whether the next shall go over a new connection: a
// hint that moves nothing may be of an Envoy that has taken over from the one that answers (see
// Client.Redial). That look comes soon, and only once as long as hints go on.
func (d *Detector) Looked(began, ended time.Time, f Fingerprint, err error) (redial bool) {
	if err != nil {
		d.failed(began, ended)
		return false
	}
	d.costs = append(d.costs, ended.Sub(began))
	d.costs = d.costs[max(0, len(d.costs)-4):]
	moved := f != d.last
	if moved {
		d.early = d.hinted && began.Before(d.due)
	}
	redial = d.hinted && !moved && !d.redialed
	d.redialed = d.hinted && !moved
	d.asked(began, ended, f, moved)
	d.moved = d.moved || moved
	d.hinted = d.hinted || redial
	return redial
}

// Dumped takes in the answer of a full dump.
func (d *Detector) Dumped(began, ended time.Time, f Fingerprint, err error) {
	if err != nil {
		d.failed(began, ended)
		d.dumpNot = d.due
		return
	}
	moved := !d.known || f != d.last
	d.asked(began, ended, f, moved)
	d.last, d.known, d.moved = f, true, false
	d.dumpNot = ended.Add(max(dumpFloor, dumpShare*ended.Sub(began)))
	d.resync = ended.Add(max(resync, lookShare*ended.Sub(began)))
}

// asked sets the pace after an answer.
func (d *Detector) asked(began, ended time.Time, f Fingerprint, moved bool) {
	d.looked = ended
	d.due = ended.Add(min(max(lookFloor, lookShare*d.cost()), lookCeiling))
	d.warming = f.Warming > 0
	idle := d.due.Sub(ended)
	switch {
	case moved:
		d.hintGap, d.warmGap = 0, soon
	case d.hinted:
		d.hintGap = min(max(soon, 2*d.hintGap), idle)
	default:
		d.hintGap = 0
	}
	if !moved {
		d.warmGap = min(max(soon, d.warmGap*3/2), idle)
	}
	if d.hint.Before(began) {
		// a hint that came while Envoy answered may be of something that the answer does not hold
		d.hinted = false
	}
}

// failed sets the pace after no answer: a refused connection costs nothing and is tried again after
// a second, an Envoy that did not answer in time is left alone for several times as long.
func (d *Detector) failed(began, ended time.Time) {
	d.looked = ended
	d.due = ended.Add(min(max(lookFloor, 5*ended.Sub(began)), lookCeiling))
	d.hintGap = max(soon, 5*ended.Sub(began))
	d.warming = false
	if d.hint.Before(began) {
		d.hinted = false
	}
}

// Early says whether the last look that showed a change was made for a hint, before the pace
// without hints had one due.
func (d *Detector) Early() bool { return d.early }

// Again says that the last dump does not count: another is due as soon as one may be asked for.
func (d *Detector) Again() { d.known = false }

// Back says that Envoy answers other questions again, which it did not either: the
// next look is due now.
func (d *Detector) Back(now time.Time) { d.due = earlier(d.due, now) }

// cost is what a look takes: the least of the last ones, since a busy machine only adds to it. One
// alone says nothing: the first that an Envoy answers takes many times as long as the next.
func (d *Detector) cost() time.Duration {
	if len(d.costs) < 2 {
		return 0
	}
	return slices.Min(d.costs)
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}
