package iptables

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// TestAddAloneOvertaken: another program writes at the same moment, again and again. No rule is
// taken for refused because of that, not even where the probe's chain could not be made.
func TestAddAloneOvertaken(t *testing.T) {
	const (
		overtaken = "iptables: Resource temporarily unavailable."
		missing   = "iptables: No chain/target/match by that name."
	)
	for overtakings := range 3 * attempts {
		chain, left := false, overtakings
		run := func(_ context.Context, _ time.Duration, _ *ownPIDs, _ []byte, _ *bytes.Buffer,
			name string, args ...string) error {
			switch {
			case left > 0:
				left--
				return classify(name, 4, overtaken)
			case args[4] == "-N":
				chain = true
			case !chain:
				return classify(name, 1, missing)
			}
			return nil
		}
		k := &Kernel{machine: machine{run: run}}
		err := k.addAlone(t.Context(), tool{family: IPv4, list: "iptables-legacy"}, "-j RETURN")
		if enough := overtakings < attempts; enough && err != nil ||
			!enough && !errors.Is(err, ErrLocked) {
			t.Errorf("overtaken %d times: %v", overtakings, err)
		}
	}
}

// TestOwnPIDs: a pid is ours while its command runs, however long that is, and for ownFor after.
func TestOwnPIDs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var own ownPIDs
		own.start(7)
		own.start(8)
		own.end(8)
		time.Sleep(ownFor)
		if !own.has(7) || !own.has(8) || own.has(9) || own.has(0) || !own.active(0) {
			t.Errorf("7 runs, 8 ended a moment ago: %v", own.ended)
		}
		time.Sleep(time.Nanosecond)
		if !own.has(7) || own.has(8) {
			t.Errorf("7 runs, the pid 8 may be another's by now: %v", own.ended)
		}
		own.end(7)
		if !own.has(7) || own.active(0) || !own.active(1) {
			t.Errorf("7 ended: %v", own.ended)
		}
		own.start(10)
		if len(own.ended) != 2 {
			t.Errorf("what is over is kept: %v", own.ended)
		}
	})
}
