package agent

import (
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/reconcile"
)

// redirects times changes: from when Envoy's log, or a look at Envoy, told of one until the rules
// that it asks for are in. Of several that come in together the oldest counts. One that asks for no
// other rules does not, nor do rules that wait for Envoy's port (Hold): they come when it accepts,
// not when it was told of them. It is pure.
type redirects struct {
	since time.Time // what first told of a change that the rules do not hold yet; zero: they do
	wrote bool      // rules were written for it
}

// told takes View.Told.
func (r *redirects) told(at time.Time) {
	if r.since.IsZero() || !at.IsZero() && at.Before(r.since) {
		r.since = at
	}
}

// passed takes what came of a pass that ended now. It returns how long the oldest change took whose
// rules are in now, 0 for none. known is that Envoy's listeners are known; a pause drops all.
func (r *redirects) passed(
	now time.Time, known, paused bool, outcomes []reconcile.Outcome,
) (took time.Duration) {
	switch {
	case paused:
		*r = redirects{}
		return 0
	case r.since.IsZero() || !known:
		return 0
	}
	in := true
	for _, o := range outcomes {
		if !o.Status.Usable {
			continue
		}
		r.wrote = r.wrote || o.Rows > 0 && len(o.Drift) == 0
		in = in && o.Status.Equal && !o.Lacks
	}
	if !in {
		return 0
	}
	if r.wrote {
		took = max(now.Sub(r.since), time.Nanosecond)
	}
	*r = redirects{}
	return took
}
