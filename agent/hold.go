package agent

import (
	"io"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/internal/reconcile"
)

// holdRetry is how long after a failure a Hold is tried again: another agent may have had it, and a
// kernel that knows none will not learn it.
const holdRetry = time.Minute

// holding keeps connection tracking on (conntrack.Hold) from when rules of ours redirect until the
// agent ends or is paused. Not before: the first NAT rule of a VM starts it, and the rules know how
// to go easy on connections that are older. Not only while jumps are in: streams that they
// redirected live on without them.
type holding struct {
	make  func() (io.Closer, error) // nil: nothing is held
	log   *zap.Logger
	held  io.Closer
	tried time.Time
}

func (h *holding) pass(now time.Time, paused bool, outcomes []reconcile.Outcome) {
	if paused {
		h.end()
		return
	}
	if h.make == nil || h.held != nil || jumpsOf(outcomes) == [2]bool{} ||
		!h.tried.IsZero() && now.Sub(h.tried) < holdRetry {
		return
	}
	first := h.tried.IsZero()
	h.tried = now
	held, err := h.make()
	if err == nil {
		h.held = held
	} else if first {
		h.log.Info("established streams are cut when somebody flushes table nat", zap.Error(err))
	}
}

func (h *holding) end() {
	if h.held != nil {
		_ = h.held.Close() // the kernel takes it away with the process at the latest
		h.held = nil
	}
}
