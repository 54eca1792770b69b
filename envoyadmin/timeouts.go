package envoyadmin

import "time"

// timeouts are the questions of any kind that timed out since a look or a dump was answered. The
// zero value has none.
type timeouts struct {
	misses int           // looks and dumps among them
	taken  time.Duration // out of the bucket, for all of them
}

// silent says whether Envoy owes an answer.
func (t *timeouts) silent() bool { return t.misses > 0 }

// lostDumps are the full dumps that timed out since one was answered, and when the next may come.
// One alone may be of an Envoy that was stopped, or of a machine that was: the next look that is
// answered tells. But an Envoy that answers looks and not dumps has so much to tell that it spends
// its time on that in vain: it is tried ever more rarely as long as nothing moves, and at Share of
// the time when something does. The zero value has none.
type lostDumps struct {
	n       int
	not     time.Time   // no dump before
	soonest time.Time   // the same once something moves: when Share has paid for the last
	seen    Fingerprint // of the last look or dump
	of      Fingerprint // seen before the last of them
	free    bool        // the next is due whatever is in the bucket
}

// lost takes in a dump that timed out, and how long Share needs for it.
func (l *lostDumps) lost(ended time.Time, gap time.Duration) {
	l.n++
	l.soonest, l.of = ended.Add(gap), l.seen
	if l.n > 1 {
		l.not = ended.Add(gap << min(l.n-2, 16))
	}
}

// looked takes in a look that was answered, and whether Envoy owed one.
func (l *lostDumps) looked(f Fingerprint, silent bool) {
	switch {
	case l.seen.Process != 0 && f.Process != l.seen.Process: // another may have less to tell
		l.n, l.not = 0, time.Time{}
	case f != l.of:
		l.not = earlier(l.not, l.soonest)
	}
	// It was only stopped, or had much else to do: it answers again.
	l.free = silent && l.n == 1
	l.seen = f
}

// dumped takes in a dump that was answered.
func (l *lostDumps) dumped(f Fingerprint) {
	l.n, l.not, l.seen = 0, time.Time{}, f
}
