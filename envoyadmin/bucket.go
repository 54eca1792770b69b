package envoyadmin

import (
	"time"
)

// What the bucket holds: six seconds, or six full dumps where these take more than one. So five
// changes after calm, with the look before each, are seen one by one at any size.
const (
	reserve      = 6 * time.Second
	reserveDumps = 6
)

// DefaultShare is the Share of --envoy-share.
const DefaultShare = 0.10

// leastShare is the least that a Share counts as: below it a bucket that is empty stays so for
// hours.
const leastShare = 0.001

// Bucket is how a Detector's token bucket stands: the time of Envoy's main thread that questions
// may take.
type Bucket struct {
	Level time.Duration // what may be taken now; below 0: it was overdrawn by the last answer
	Size  time.Duration // what it holds at most
	Share float64       // of the time, 0 to 1, by which it is refilled
}

// bucket is what is left, as of a time. The zero value is full.
type bucket struct {
	left time.Duration
	asOf time.Time // zero: nothing was taken yet
}

// level is what is left at this time.
func (b *bucket) level(now time.Time, size time.Duration, share float64) time.Duration {
	if b.asOf.IsZero() {
		return size
	}
	refill := time.Duration(share * float64(max(0, now.Sub(b.asOf))))
	return min(b.left+refill, size)
}

// take takes out what a question took that ended now, and says how much that was. One that is asked
// although nothing is left, as whether Envoy is ready, leaves no more debt than it took itself:
// an Envoy that was stopped for an hour, with a question each few seconds that waited in vain, does
// not owe us that hour.
func (b *bucket) take(now time.Time, took, size time.Duration, share float64) time.Duration {
	had := b.level(now, size, share)
	b.left, b.asOf = max(had-took, min(had, -took)), now
	return had - b.left
}
