package agent

import (
	"errors"
	"io"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/internal/reconcile"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

type closes struct{ n *int }

func (c closes) Close() error { *c.n--; return nil }

// TestHolding: it is held from when somebody changed rules that redirect until they are back, and
// a little longer.
func TestHolding(t *testing.T) {
	open, tries := 0, 0
	var refuse error
	h := holding{log: zap.NewNop(), make: func() (io.Closer, error) {
		if tries++; refuse != nil {
			return nil, refuse
		}
		open++
		return closes{&open}, nil
	}}
	outcomes := func(jumps, equal bool) []reconcile.Outcome {
		all := make([]reconcile.Outcome, 2) // the other family cannot be used
		all[1].Status.Usable, all[1].Status.Jumps, all[1].Status.Equal = true, jumps, equal
		return all
	}
	now := time.Now()
	told := func(e iptables.Event) func() { return func() { h.told(e, now) } }
	passed := func(jumps, equal bool) func() {
		return func() { h.passed(now, outcomes(jumps, equal), false) }
	}
	braked := func(written, equal bool) func() {
		all := outcomes(false, equal)
		all[1].Written = written
		return func() { h.passed(now, all, true) }
	}
	for i, step := range []struct {
		after       time.Duration
		refused     bool
		do          func()
		open, tries int
	}{
		{0, false, told(iptables.Event{}), 0, 0}, // nothing redirects yet
		{0, false, passed(true, true), 0, 0},
		{0, false, told(iptables.Event{Own: true}), 0, 0},
		{0, true, told(iptables.Event{}), 0, 1},
		{holdRetry - 1, false, told(iptables.Event{}), 0, 1},
		{1, false, told(iptables.Event{}), 1, 2},
		{0, false, passed(true, true), 1, 2},
		{holdFor, false, told(iptables.Event{}), 1, 2}, // again
		{holdFor, false, passed(true, true), 1, 2},
		{time.Hour, false, passed(true, false), 1, 2}, // not back: somebody keeps undoing them
		{1, false, passed(true, true), 0, 2},
		{0, false, told(iptables.Event{}), 1, 3},
		{holdFor + 1, false, passed(false, false), 0, 3}, // paused, or nobody wants them
		{0, false, told(iptables.Event{}), 0, 3},
		// With the brake on the chains stay: streams that were redirected live by them.
		{0, false, braked(true, true), 0, 3},
		{0, false, told(iptables.Event{}), 1, 4},
		{holdFor + 1, false, braked(true, false), 1, 4},
		{1, false, braked(true, true), 0, 4},
		{0, false, braked(false, true), 0, 4}, // nothing was ever there
		{0, false, told(iptables.Event{}), 0, 4},
	} {
		refuse = nil
		if step.refused {
			refuse = errors.New("no such flag")
		}
		now = now.Add(step.after)
		step.do()
		if open != step.open || tries != step.tries {
			t.Errorf("step %d: %d are held after %d tries, want %d after %d", i, open, tries, step.open,
				step.tries)
		}
	}
	h = holding{needed: true}
	h.told(iptables.Event{}, now)
	h.end()
}
