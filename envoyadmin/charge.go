package envoyadmin

import (
	"errors"
	"slices"
	"time"
)

// The most that questions cost Envoy's main thread, so that waiting behind its own work is not
// booked on us. Measured on Envoy 1.40 on one core: 5.3 MB of TCP chains in 225 to
// 640 ms, 19.4 MB of HTTP chains in 0.3 to 1.1 s, /ready in 1 ms and /server_info in 2 to 3 ms at
// any size, a masked dump in 30 to 50 ms at 10,000 services, what walks all clusters or statistics
// in 0.5 s there. A core of a small VM is taken for half as fast.
// See docs/design/facts.md#envoy-answers-on-one-thread.
const (
	dumpMost      = 50 * time.Millisecond  // beside its bytes: Envoy puts the clusters together first
	dumpMostPerMB = 250 * time.Millisecond // of 10^6 bytes
	lookMost      = time.Second
	shortMost     = 5 * time.Millisecond
	asideMost     = 2 * time.Second

	// of so many answers of one kind the quickest counts
	leastOf = 10
)

// most is the most that one question can cost Envoy's main thread. bytes are those of the answer;
// they count for dumps alone.
func most(q Question, bytes int64) time.Duration {
	switch q {
	case DumpQuestion:
		return dumpMost + time.Duration(float64(dumpMostPerMB)*float64(bytes)/1e6)
	case LookQuestion, namedLook:
		return lookMost
	case ReadyQuestion, ServerInfoQuestion:
		return shortMost
	}
	return asideMost
}

// namedLook is a LookQuestion by names, which is cheaper than one of all.
const namedLook = order

// charges is what questions cost Envoy's main thread, as far as waiting for them tells. That is
// no more than the quickest of the last ten answers of a kind took, a dump by its bytes: all else
// was waiting, for Envoy behind its own work or for a processor. The zero value knows no answer.
type charges struct {
	parts    [order + 1][leastOf]float64 // of most, for each of the last answers, 0 to 1
	answers  [order + 1]int
	dumpSize int64 // of the last dump, in bytes
}

// answered is what an answer cost that took so long.
func (c *charges) answered(q Question, took time.Duration, bytes int64) time.Duration {
	if q == DumpQuestion {
		c.dumpSize = bytes
	}
	c.parts[q][c.answers[q]%leastOf] = min(1, float64(took)/float64(most(q, bytes)))
	c.answers[q]++
	return c.expected(q)
}

// failed is what a question cost that had no answer after so long. Envoy may have worked on a dump
// for all of that time, and on nothing else.
func (c *charges) failed(q Question, took time.Duration, err error) time.Duration {
	switch {
	case errors.Is(err, ErrRefused):
		return 0 // nobody was there to spend time on it
	case q == DumpQuestion:
		return took
	case c.answers[q] == 0:
		return min(took, most(q, 0))
	}
	return min(took, c.expected(q))
}

// expected is what the next question of a kind will cost; 0: none was answered yet.
func (c *charges) expected(q Question) time.Duration {
	n := min(c.answers[q], leastOf)
	if n == 0 {
		return 0
	}
	return time.Duration(slices.Min(c.parts[q][:n]) * float64(most(q, c.dumpSize)))
}
