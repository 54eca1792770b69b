package envoywatch

import (
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
)

// change remembers what first told of a change that nobody has been given yet: a line of Envoy's
// log, or the look that showed it. It decides nothing; View.Told is what it is for.
//
//	c.hinted(now)                 the log says that something moved
//	c.asks(began)                 a look or a dump begins; then one of
//	c.failed()                    no answer
//	c.looked(fingerprint, again)  the answer of a look; again: it is made anew for the same hint
//	c.dumped(fingerprint, again)  the answer of a dump, and then what became of it:
//	  c.news()                      it is the set that counts now
//	  c.waits()                     it is news, and does not count yet
//	  c.nothing()                   it is no news
//	c.put(taken)                  a View is made; taken: all that were made before have been
type change struct {
	last   envoyadmin.Fingerprint // of the last dump
	asked  time.Time              // when the question under way began; zero: none is
	hint   time.Time              // the first hint that no question has answered; zero: none
	during time.Time              // the first that came during the question under way
	again  bool                   // the dump is followed by a look for the same hint
	since  time.Time              // what first told of what the last dump does not hold
	fresh  time.Time              // the same, of the set that counts, which is in no View yet
	untold time.Time              // the same, of sets in Views that nobody has taken
}

func (c *change) hinted(now time.Time) {
	if c.asked.IsZero() {
		c.hint = first(c.hint, now)
		return
	}
	// The answer under way may not hold what this one is of.
	c.during = first(c.during, now)
}

func (c *change) asks(began time.Time) { c.asked = began }

func (c *change) failed() {
	c.hint = first(c.hint, c.during)
	c.asked, c.during = time.Time{}, time.Time{}
}

func (c *change) looked(f envoyadmin.Fingerprint, again bool) {
	switch {
	case f != c.last:
		c.moved()
	case again:
		c.failed()
	default:
		c.answered()
	}
}

func (c *change) dumped(f envoyadmin.Fingerprint, again bool) { c.last, c.again = f, again }

func (c *change) news() {
	c.moved()
	c.fresh, c.since = first(c.fresh, c.since), time.Time{}
}

func (c *change) waits() { c.moved() }

func (c *change) nothing() {
	if c.since = (time.Time{}); c.again {
		c.failed()
		return
	}
	c.answered()
}

// moved: the question under way has shown a change, of which a hint may have told before.
func (c *change) moved() {
	c.since = first(first(c.since, c.hint), c.asked)
	c.answered()
}

// answered: what hints before the question told of is dealt with.
func (c *change) answered() {
	c.hint = c.during
	c.asked, c.during = time.Time{}, time.Time{}
}

// put is View.Told.
func (c *change) put(taken bool) time.Time {
	if taken {
		c.untold = time.Time{}
	}
	c.untold, c.fresh = first(c.untold, c.fresh), time.Time{}
	return c.untold
}

// first is the earlier of two times, of which the zero one is none.
func first(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}
