package agent

import (
	"io"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/internal/reconcile"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

const (
	// holdFor is how long after the last change by others a Hold stays: a restart of nftables.service
	// flushes twice.
	holdFor = 3 * time.Second
	// holdRetry is how long after a failure it is tried again: a kernel that knows none will not
	// learn it.
	holdRetry = time.Minute
)

// holding keeps connection tracking on (conntrack.Hold) while rules of ours that redirected are put
// back. It is taken as soon as the kernel tells that somebody has changed them, which is some
// milliseconds before iptables can have them back, and only then: a ruleset that somebody saves and
// loads again must not hold a table that nobody else may write.
type holding struct {
	make    func() (io.Closer, error) // nil: nothing is held
	log     *zap.Logger
	needed  bool // streams may live by our rules, as of the last pass
	held    io.Closer
	changed time.Time // by others, the last time
	failed  time.Time
}

// told takes in what the kernel told.
func (h *holding) told(e iptables.Event, now time.Time) {
	if e.Own || !h.needed || h.make == nil {
		return
	}
	h.changed = now
	if h.held != nil || !h.failed.IsZero() && now.Sub(h.failed) < holdRetry {
		return
	}
	held, err := h.make()
	if err != nil {
		if h.failed.IsZero() {
			h.log.Info("established streams may be cut when somebody flushes table nat", zap.Error(err))
		}
		h.failed = now
		return
	}
	h.held = held
}

// passed ends what is held once the rules are back, or nobody wants them. braked says that the
// jumps are out by the emergency brake: chains without jumps are back, too, and redirected streams
// live by them.
func (h *holding) passed(now time.Time, outcomes []reconcile.Outcome, braked bool) {
	back := true
	h.needed = false
	for _, o := range outcomes {
		if o.Status.Jumps || braked && o.Written {
			h.needed, back = true, back && (o.Status.Equal || !o.Status.Usable)
		}
	}
	if back && now.Sub(h.changed) > holdFor {
		h.end()
	}
}

func (h *holding) end() {
	if h.held != nil {
		_ = h.held.Close() // the kernel takes it away with the process at the latest
		h.held = nil
	}
}
