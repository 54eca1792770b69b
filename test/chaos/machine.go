package chaos

import (
	"context"
	"time"
)

// A machine that is too busy to run this program in time runs the agent no better. What its tests
// are about is not how fast the machine is, so that is a hindrance like any other.
const (
	machineTick = 20 * time.Millisecond
	machineLate = 300 * time.Millisecond
)

// watchMachine notes when this program was not run for a while: a span that hinders.
func (w *World) watchMachine(ctx context.Context) {
	last := time.Now()
	tick := time.NewTicker(machineTick)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := time.Now()
		if late := now.Sub(last); late > machineLate {
			w.Excuse(Span{Event: Event{Name: "busy-machine"}, Begin: last, End: now, Hinders: true,
				EnvoyAway: true})
			w.Log("the machine was busy for %v", late.Round(time.Millisecond))
		}
		last = now
	}
}
