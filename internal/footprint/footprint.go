// Package footprint keeps small what a daemon holds of a machine's memory while it has nothing to
// do: what Go's collector has freed and keeps for the next time is given back to the system.
//
// It knows nothing of the work: package agent says when there was some (After).
package footprint

import (
	"context"
	"time"
)

const (
	// calm is how long nothing was done before something is given back: what is given back between
	// two changes has to be fetched again.
	calm = 3 * time.Second
	// pause is the least time between two: one costs a collection, 20 ms of a core at 10,000
	// services.
	pause = 30 * time.Second
)

// After waits for work, and then until there was none for three seconds, and has memory given back
// (debug.FreeOSMemory), not more often than each 30 seconds. It returns when ctx ends.
func After(ctx context.Context, work <-chan struct{}, give func()) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-work:
		}
		for timer := time.NewTimer(calm); timer != nil; {
			select {
			case <-ctx.Done():
				timer.Stop()
				return
			case <-work:
				timer.Reset(calm)
			case <-timer.C:
				timer = nil
			}
		}
		give()
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}
