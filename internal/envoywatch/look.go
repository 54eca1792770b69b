package envoywatch

import (
	"context"
	"errors"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
)

const (
	// askedAgain is how long after an answer that Envoy has no stream it is asked once more: a control
	// plane ends streams now and then, and Envoy is back within half a second.
	askedAgain = time.Second
	// probeTime is how long our own way is tried. A control plane answers within a second.
	probeTime = 4 * time.Second
	// countsWithin is how long a set of listeners that does not count yet is waited for.
	countsWithin = 3 * time.Second
	// clustersChecked is how long after a first answer endpoints count as unhealthy that still are:
	// those that have just come were not checked yet.
	clustersChecked = 3 * time.Second
	// connects is how old an Envoy is that must have had the time to connect.
	connects = 5 * time.Second
)

// errNoTime is the error of a Look that ended before Envoy could have answered.
var errNoTime = errors.New("no answer from Envoy in time")

// Looked is what one look tells.
type Looked struct {
	View
	Clusters bool // the health of the endpoints is known: the View has those that are not
}

// Look is one look by who cannot wait for what Run would learn over time. past is what the log
// tells of this Envoy (envoyadmin.Recent), which stands for what Run would have heard. It returns
// when ctx ends at the latest if the Admin does, with as much as was learned by then. The error is
// that there was no time to learn anything; that Envoy does not answer is in the View.
func Look(ctx context.Context, o Options, past []envoyadmin.Logged) (Looked, error) {
	clusters := false
	v, err := look(ctx, o, func(w *Watch) {
		w.process.stream = stream{}
		w.process.stream.recall(past)
		w.recallStart(past)
		w.askClusters(ctx)
		asked := w.o.Now()
		w.judge(ctx, o.Probe)
		if w.process.aside.Started == nil {
			w.askStarted(ctx)
		}
		h := &w.process.aside.health
		if len(h.unhealthy) > 0 && pause(ctx, clustersChecked-w.o.Now().Sub(asked)) {
			w.askClusters(ctx)
		}
		clusters = h.unhealthy != nil
	})
	return Looked{v, clusters}, err
}

// LookAtListeners is a Look by who only asks for those. All else that a Look asks costs Envoy's
// main thread seconds at 10,000 services.
func LookAtListeners(ctx context.Context, o Options) (View, error) {
	return look(ctx, o, func(*Watch) {})
}

// look looks at the listeners, and asks on where Envoy has answered.
func look(ctx context.Context, o Options, on func(*Watch)) (View, error) {
	o.Probe, o.Logged = nil, nil
	w := New(o)
	w.untilCounted(ctx)
	if w.outage.Err == nil && w.process.id != 0 {
		on(w)
	}
	w.outage.Since = time.Time{} // when it was first asked tells nothing
	v := w.view()
	if v.Err == nil && w.process.id == 0 {
		return v, errNoTime
	}
	return v, nil
}

// untilCounted looks until a set of listeners counts, or nothing tells that one soon will.
func (w *Watch) untilCounted(ctx context.Context) {
	end, forced := w.o.Now().Add(countsWithin), false
	for {
		wait := w.Step(ctx)
		p := &w.process
		// Run waits for listeners that warm, so as not to make rules of half of a process's first set.
		// Here nobody waits.
		if s := p.untaken; !forced && s != nil && len(s.Warming) > 0 &&
			(hasDynamic(*s) || p.info.Uptime >= warmLimit) {
			forced, p.warming = true, w.o.Now().Add(-warmLimit)
			w.detector.Again()
		}
		// One that has just started, by a hot restart, say, may complete its first update any moment.
		soon := forced || p.confirmed || p.id != 0 && p.info.Uptime < connects
		if w.outage.Err != nil || p.told || !soon || w.o.Now().After(end) || !pause(ctx, wait) {
			return
		}
	}
}

// recall takes what the log told before.
func (s *stream) recall(past []envoyadmin.Logged) {
	for _, e := range past {
		switch e.Kind {
		case envoyadmin.StreamClosed:
			s.closed(e.Time, e.LogEvent)
		case envoyadmin.ListenerChanged, envoyadmin.ListenerRejected:
			s.spoke(e.Time)
		}
	}
}

// recallStart takes of what the log told before that the next Envoy has started, which did not
// tell its listeners yet.
func (w *Watch) recallStart(past []envoyadmin.Logged) {
	for _, e := range past {
		if e.Kind != envoyadmin.EnvoyStarts || w.process.told {
			continue
		}
		if w.outage.handover = e.Time; e.Epoch == 0 {
			w.outage.handover = time.Time{}
		}
	}
}

// judge asks Envoy whether its stream stands, and where it seems not to, our own way to the control
// plane, and Envoy once more.
func (w *Watch) judge(ctx context.Context, probe func(context.Context, envoyadmin.Target) error) {
	p := &w.process
	asked := w.o.Now()
	first, err := w.askControlPlane(ctx)
	if err != nil {
		return
	}
	if first.Streams && first.Connected && p.stream.end == nil && p.told {
		p.stream.stands = true
		return
	}
	w.o.Probe = probe
	if probe != nil {
		limited, cancel := context.WithTimeout(ctx, probeTime)
		came := w.probeControlPlane(limited, probed{process: p.id, started: p.aside.Started})
		cancel()
		p.probe, p.probed, p.aside.Started = came.err, came.tried, came.started
	}
	if !first.Streams {
		return
	}
	p.stream.answered(asked, first.Connected, p.probe != nil)
	if !pause(ctx, askedAgain-w.o.Now().Sub(asked)) {
		return
	}
	asked = w.o.Now()
	if second, err := w.askControlPlane(ctx); err == nil && second.Streams {
		p.stream.answered(asked, second.Connected, p.probe != nil)
	}
	if p.probe == nil && p.info.Uptime < connects {
		p.stream.without = 0
	}
}

// pause waits, and says whether ctx let it.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
