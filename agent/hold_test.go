package agent

import (
	"errors"
	"io"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/internal/reconcile"
)

type closes struct{ n *int }

func (c closes) Close() error { *c.n--; return nil }

// TestHolding: it is held from when jumps are in, over times without them, until a pause.
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
	in, out := make([]reconcile.Outcome, 2), make([]reconcile.Outcome, 2)
	in[1].Status.Jumps = true // one family is enough
	now := time.Now()
	for i, step := range []struct {
		after       time.Duration
		refused     bool
		paused      bool
		outcomes    []reconcile.Outcome
		open, tries int
	}{
		{0, false, false, out, 0, 0},
		{0, true, false, in, 0, 1},
		{holdRetry - 1, false, false, in, 0, 1},
		{1, false, false, in, 1, 2},
		{holdRetry, false, false, in, 1, 2},
		{0, false, false, out, 1, 2},
		{0, false, true, out, 0, 2},
		{holdRetry, false, true, in, 0, 2},
	} {
		refuse = nil
		if step.refused {
			refuse = errors.New("no such flag")
		}
		now = now.Add(step.after)
		h.pass(now, step.paused, step.outcomes)
		if open != step.open || tries != step.tries {
			t.Errorf("step %d: %d are held after %d tries, want %d after %d", i, open, tries, step.open,
				step.tries)
		}
	}
	h = holding{}
	h.pass(now, false, in)
	h.end()
}
