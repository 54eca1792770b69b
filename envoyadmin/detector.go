package envoyadmin

import (
	"errors"
	"math"
	"time"
)

// The pace of questions. What each costs Envoy's main thread was measured on Envoy 1.40 (one core):
// a masked dump 1 ms at 10 services and 30 to 50 ms at 10,000, a full dump 2 ms and 300 ms (TCP
// chains) to 1.1 s (HTTP). The pace goes by what they can have cost (charge.go); but after a masked
// dump of a large configuration Envoy spends as much again, or more, on tidying up.
// See docs/design/facts.md#envoy-answers-on-one-thread.
const (
	lookFloor   = 1 * time.Second  // between looks that nothing asked for
	lookCeiling = 30 * time.Second // the fallback stays a fallback, even where a look takes long
	// such looks take one part in 1,000 of the time; those that are not cheap half of that, since with
	// the tidying up they cost twice as much. The rest is for questions about health.
	lookShare = 1000
	// so many looks by names are followed by one of all
	namedLooks = 9

	// after a look, the first of those that a hint or a warming listener asks for
	soon = 50 * time.Millisecond
	// a full dump that costs less is hardly dearer than the look that would tell whether it is due,
	// and Envoy has little to tidy up behind it
	cheap = 5 * time.Millisecond

	// a full dump even if nothing moved, should the fingerprint ever miss a change, and so many times
	// what it took at least
	resync      = 10 * time.Minute
	resyncShare = 2000
)

// Action is what a Detector says to do.
type Action uint8

const (
	Wait      Action = iota // nothing, for the time given
	Look                    // ask for Client.Fingerprint of all and tell Looked
	LookNamed               // the same of the listeners Names
	Dump                    // ask for Client.Listeners and tell Dumped
)

// Detector decides when to ask Envoy what, so that a change is seen at once and an idle Envoy
// spends less than 1 % of its main thread on us. It is a pure value: the time is given to it, and
// it asks nothing itself. The zero value begins with a dump.
//
// All questions take from a token bucket what they can have cost Envoy's main thread, answered or
// not: where that is busy, less than was waited for them (charge.go). It is refilled at Share of
// the time, so a storm of changes takes that share; and since it holds some seconds, changes that
// come after calm are each looked at when they come.
//
//	for {
//		action, wait := d.Next(time.Now())
//		switch action {
//		case Wait: // sleep, or until the log has news: d.Hint(time.Now(), listener)
//		case Look, LookNamed:
//			f, err := client.Fingerprint(ctx, nil) // LookNamed: d.Names()
//			if d.Looked(began, time.Now(), f, err) { client.Redial() }
//		case Dump:
//			s, err := client.Listeners(ctx)
//			if d.Dumped(began, time.Now(), s, err) { client.Redial() }
//		}
//	}
//
// What is asked beside that is told to Took.
type Detector struct {
	// Share is the most that questions take of the time while something changes, above 0 to 1;
	// 0: DefaultShare.
	Share float64

	bucket   bucket
	charges  charges
	looks    looks
	hints    hints
	timeouts timeouts
	lost     lostDumps

	last    Fingerprint // of the last full dump
	known   bool        // there was one
	moved   bool        // a look differed from it
	movedBy Action      // which, the first that did

	looked time.Time // end of the last question
	due    time.Time // the next look that nothing asks for
	resync time.Time // the next full dump that nothing asks for

	breaks int // connections that broke under a question since a look or a dump was answered

	warming bool
	warmGap time.Duration // after the last question, while a listener is warming
}

func (d *Detector) share() float64 {
	if d.Share <= 0 {
		return DefaultShare
	}
	return min(max(d.Share, leastShare), 1)
}

func (d *Detector) size() time.Duration { return max(reserve, reserveDumps*d.dumpCost()) }

// dumpCost is what the next full dump will cost; 0: none was answered yet.
func (d *Detector) dumpCost() time.Duration { return d.charges.expected(DumpQuestion) }

// Bucket is how the token bucket stands at this time.
func (d *Detector) Bucket(now time.Time) Bucket {
	size, share := d.size(), d.share()
	return Bucket{Level: d.bucket.level(now, size, share), Size: size, Share: share}
}

// Took takes in that another question was asked, and what came of it. It says what that cost
// Envoy's main thread, at most: no more than it took.
//
// An answer while looks time out is of an Envoy that is not stopped but busy, or starved. If looks
// were answered before it is known how little they cost it, and the next is due soon.
func (d *Detector) Took(q Question, began, ended time.Time, err error) (cost time.Duration) {
	if err == nil && d.timeouts.silent() && d.charges.answers[LookQuestion] > 0 {
		pays := d.refill(d.charges.expected(LookQuestion))
		d.due = earlier(d.due, d.looked.Add(max(lookFloor, pays)))
	}
	return d.book(q, began, ended, 0, err)
}

// book takes out of the bucket what a question cost.
func (d *Detector) book(
	q Question, began, ended time.Time, bytes int64, err error) (cost time.Duration) {
	took := ended.Sub(began)
	if err == nil {
		cost = d.charges.answered(q, took, bytes)
	} else {
		cost = d.charges.failed(q, took, err)
	}
	taken := d.bucket.take(ended, cost, d.size(), d.share())
	if errors.Is(err, ErrTimeout) {
		d.timeouts.taken += taken
	}
	return cost
}

// affords is when the bucket holds what a question is expected to take.
func (d *Detector) affords(now time.Time, expected time.Duration) time.Time {
	b := d.Bucket(now)
	short := min(expected, b.Size) - b.Level
	if short <= 0 {
		return time.Time{}
	}
	return now.Add(d.refill(short))
}

// refill is how long it takes to refill so much.
func (d *Detector) refill(much time.Duration) time.Duration {
	return time.Duration(math.Ceil(float64(much) / d.share()))
}

// Hint says that something may have moved, of this listener if the name is known. Any number of
// hints is one look; hints that lead to nothing are heeded ever more slowly, down to the pace
// without hints. One that names a listener has a full dump asked for, without a look before it.
func (d *Detector) Hint(now time.Time, listener string) {
	d.hints.hint(now, listener, d.looks.names)
}

// Names are those of the last full dump, for LookNamed. They are not to be changed.
func (d *Detector) Names() []string { return d.looks.names }

// Next says what to do at this time, and for Wait, for how long if no hint comes.
func (d *Detector) Next(now time.Time) (Action, time.Duration) {
	action, at := d.next(now)
	if wait := at.Sub(now); wait > 0 {
		return Wait, wait
	}
	d.looks.asking, d.hints.during = action, false
	return action, 0
}

// next is what comes next, and when; the zero time: at once.
func (d *Detector) next(now time.Time) (Action, time.Time) {
	look := d.look()
	// While an Envoy does not answer, a look finds out whether it does again. It is given up sooner
	// than a dump, and asks for less.
	if (!d.known || d.moved || !now.Before(d.resync)) && !d.timeouts.silent() {
		dump := later(d.lost.not, d.affords(now, d.dumpCost()))
		if d.lost.free {
			dump = time.Time{}
		}
		if d.lost.n < 2 || dump.Before(d.due) {
			return Dump, dump
		}
		return look, d.due // it may be hours until then, and another Envoy may come
	}
	due := d.due
	if d.hints.pending {
		// Before a full dump can be paid a look would be of no use: it would have to be repeated then.
		at := d.affords(now, d.cost(look)+d.dumpCost())
		if d.hints.gap > 0 { // else, after a quiet time, at once
			at = later(at, d.looked.Add(d.hints.gap))
		} else if at.Before(due) && d.known && !d.timeouts.silent() &&
			(d.hints.straight() || d.hints.named && d.dumpCost() < cheap) {
			return Dump, at
		}
		due = earlier(due, at)
	}
	if d.warming {
		at := later(d.looked.Add(d.warmGap), d.affords(now, d.cost(look)+d.dumpCost()))
		due = earlier(due, at)
	}
	return look, due
}

// look says which look the next is.
func (d *Detector) look() Action {
	if d.timeouts.silent() {
		return Look
	}
	return d.looks.next(d.last.Process, d.hints.pending && d.hints.stranger)
}

// Looked takes in the answer of a look. It says whether the next shall go over a new connection: a
// hint that moves nothing may be of an Envoy that has taken over from the one that answers (see
// Client.Redial). That look comes soon, and only once as long as hints go on.
func (d *Detector) Looked(began, ended time.Time, f Fingerprint, err error) (redial bool) {
	if err != nil {
		d.failed(kind(d.looks.asking), began, ended, err)
		return false
	}
	d.looks.answered()
	d.book(kind(d.looks.asking), began, ended, 0, nil)
	d.lost.looked(f, d.timeouts.silent())
	if d.lost.n == 0 {
		d.refund(d.timeouts.taken)
	}
	moved := f != d.last
	if moved && !d.moved {
		d.movedBy = d.looks.asking
	}
	redial = d.asked(began, ended, ended, f, moved)
	d.moved = d.moved || moved
	return redial
}

// Dumped takes in the answer of a full dump. What it returns is that of Looked.
func (d *Detector) Dumped(began, ended time.Time, s Snapshot, err error) (redial bool) {
	d.lost.free = false
	if err != nil {
		d.failed(DumpQuestion, began, ended, err)
		d.lost.not = d.due
		if errors.Is(err, ErrTimeout) {
			d.lost.lost(ended, d.refill(ended.Sub(began)))
		}
		return false
	}
	f := s.Fingerprint
	moved := !d.known || f != d.last
	if d.moved && !moved && d.movedBy == LookNamed {
		d.looks.unlike = f.Process
	}
	cost := d.book(DumpQuestion, began, ended, s.Bytes, nil)
	// Those that timed out would have cost as much, if Envoy had had the time.
	d.refund(d.timeouts.taken - time.Duration(d.lost.n)*cost)
	d.lost.dumped(f)
	d.looks.dumped(s.Names)
	made := s.Made
	if made.IsZero() {
		made = ended
	}
	redial = d.asked(began, made, ended, f, moved)
	d.last, d.known, d.moved = f, true, false
	d.resync = ended.Add(max(resync, resyncShare*cost))
	return redial
}

// refund puts back what was taken for questions that timed out, since one was answered that shows
// that they did not take Envoy's time but waited for it.
func (d *Detector) refund(much time.Duration) {
	d.timeouts.taken = 0
	d.bucket.left += max(0, much)
}

// asked sets the pace after an answer. It says whether that answer came to nothing for a hint.
func (d *Detector) asked(began, made, ended time.Time, f Fingerprint, moved bool) (redial bool) {
	if moved {
		d.hints.early = d.hints.pending && began.Before(d.due) || d.hints.early && d.moved
	}
	d.looked, d.timeouts.misses, d.breaks, d.warming = ended, 0, 0, f.Warming > 0
	cost := d.cost(d.look())
	if cost >= cheap {
		cost *= 2
	}
	idle := min(max(lookFloor, lookShare*cost), lookCeiling)
	d.due = ended.Add(idle)
	if moved {
		d.warmGap = soon
	} else {
		d.warmGap = min(max(soon, d.warmGap*3/2), idle)
	}
	return d.hints.answered(moved, made, idle)
}

// failed sets the pace after no answer: a refused connection costs nothing and is tried again after
// a second, and so is the first question that an Envoy did not answer in time. After that each is
// followed by as much time as its share needs. So is one under which the connection broke, but the
// first: who was asked has ended, most likely, and owes nothing to the Envoy that comes next.
func (d *Detector) failed(q Question, began, ended time.Time, err error) {
	gap := max(lookFloor, d.refill(ended.Sub(began)))
	ends := false
	if errors.Is(err, ErrConnection) || errors.Is(err, ErrTruncated) {
		d.breaks++
		ends = d.breaks == 1
	}
	if !ends {
		d.book(q, began, ended, 0, err)
	}
	if ends || errors.Is(err, ErrRefused) {
		gap = lookFloor
	}
	if errors.Is(err, ErrTimeout) {
		if d.timeouts.misses++; d.timeouts.misses == 1 {
			gap = lookFloor
		}
	}
	d.looked, d.due, d.warming = ended, ended.Add(gap), false
	d.hints.failed(gap)
}

// Early says whether the last question that showed a change was asked for by a hint, before the
// pace without hints had a look due.
func (d *Detector) Early() bool { return d.hints.early }

// Again says that the last dump does not count: another is due as soon as the bucket has it.
func (d *Detector) Again() { d.known = false }

// Back says that Envoy answers other questions again, which it did not either: the
// next look is due now.
func (d *Detector) Back(now time.Time) { d.due = earlier(d.due, now) }

// kind is the question that a look asks.
func kind(look Action) Question {
	if look == LookNamed {
		return namedLook
	}
	return LookQuestion
}

// cost is what a look costs. One alone says nothing: the first that an Envoy answers takes many
// times as long as the next.
func (d *Detector) cost(look Action) time.Duration {
	if d.charges.answers[kind(look)] < 2 {
		return 0
	}
	return d.charges.expected(kind(look))
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
