package envoywatch

import (
	"context"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// process is what belongs to one Envoy process. Another one gets a new value. The zero value is
// that of an Envoy which was not met yet.
type process struct {
	id      uint64 // of its Fingerprints; 0: none met yet
	info    envoyadmin.ServerInfo
	state   string    // LIVE, PRE_INITIALIZING, …
	warming time.Time // when a dump first showed listeners that wait
	told    bool      // the set that counts is of this process
	// confirmed: it was seen to have completed a listener update, so that an empty set read from
	// now on counts. That is asked anew once it has had listeners: it may be another process by
	// then, which uptimes of whole seconds do not tell.
	confirmed bool
	// untaken is the last dump of an Envoy that was not seen to be configured. It tells when to
	// dump again and never counts itself: the configuration may have come after it was read.
	untaken *envoyadmin.Snapshot
	stream  stream
	stats   envoyadmin.Pace // of questions that go through all statistics
	probe   error           // what our own way to its control planes came to
	probed  bool            // it was tried
	aside   aside
}

// live is Envoy's word for the state in which it serves.
const live = "LIVE"

// meet asks the process that made a dump who it is, and puts it in the place of the one before.
func (w *Watch) meet(ctx context.Context, id uint64) error {
	var info envoyadmin.ServerInfo
	var err error
	began := w.o.Now()
	w.ask(func() { info, err = w.o.Admin.ServerInfo(ctx) })
	if err != nil {
		return err // the Detector takes it for a part of the dump
	}
	w.detector.Took(envoyadmin.ServerInfoQuestion, began, w.o.Now(), nil)
	if info.Epoch > w.process.info.Epoch && w.outage.handover.IsZero() { // its log did not say so
		w.succeeds(w.began, info.Epoch)
	}
	if w.process.id != 0 && !info.SameProcess(w.process.info) {
		w.set.restarts++
		w.o.Log.Info("envoy restarted",
			zap.String("version", info.Text), zap.Int("epoch", info.Epoch))
	}
	w.process = process{
		id: id, info: info, state: info.State,
		stream: w.process.stream.after(w.began), aside: asideAfter(w.began),
	}
	if soon := w.o.Now().Add(probeNew - probeEvery); w.probeAt.After(soon) {
		w.probeAt = soon
	}
	return nil
}

// succeeds notes that an Envoy of this epoch starts. A later one than the first starts beside one
// that serves until it is ready: meanwhile the admin address moves from the one to the other, who
// has no listeners yet, and that is no failure. One that fails is not waited for for ever, however
// often another is tried.
func (w *Watch) succeeds(now time.Time, epoch int) {
	switch {
	case epoch == 0:
		w.outage.handover = time.Time{}
	case w.process.told && (w.outage.handover.IsZero() || w.outage.Err == nil):
		w.outage.handover = now
	}
}

// takesOver says whether the next Envoy is about to take over, and nobody ends the one before.
func (w *Watch) takesOver(now time.Time) bool {
	return !w.outage.handover.IsZero() && w.process.state != "DRAINING" &&
		now.Sub(w.outage.handover) < handoverLimit &&
		(w.outage.Unit == "" || w.outage.Unit == symptom.NoUnit ||
			strings.HasPrefix(w.outage.Unit, "active") || strings.HasPrefix(w.outage.Unit, "reloading"))
}

// take makes a new listener set the one that counts, if this Envoy had completed a listener update
// when the set was read. Before that an empty set says nothing about what its clients need.
func (w *Watch) take(ctx context.Context, s envoyadmin.Snapshot) {
	known := make(map[envoyadmin.Rejected]bool, len(w.set.rejected)) // there may be thousands
	for _, r := range w.set.rejected {
		known[r] = true
	}
	for _, r := range s.Rejected {
		if !known[r] {
			w.set.rejections++
		}
	}
	w.set.rejected = s.Rejected
	p := &w.process
	if len(s.Warming) > 0 && p.warming.IsZero() {
		p.warming = w.o.Now()
	}
	if w.warms(s) {
		p.untaken = &s
		w.change.waits()
		return
	}
	// An active listener of the control plane's shows that an update came before the dump. Without
	// one the update may have come between the dump and the answers that tell of it.
	empty := !hasDynamic(s)
	if !p.confirmed && (empty || !p.told) {
		if p.untaken == nil && p.told {
			p.stats = envoyadmin.Pace{} // it had listeners until now: one question at once
		}
		if !w.becomesConfigured(ctx, s) {
			p.untaken = &s
			if empty {
				w.change.nothing()
			} else {
				w.change.waits()
			}
			return
		}
		if empty {
			w.detector.Again()
			w.change.waits()
			return
		}
	}
	p.confirmed, p.untaken = p.confirmed && empty, nil
	if !p.told {
		p.told, w.outage.handover = true, time.Time{}
	}
	if s.Fingerprint == w.set.snapshot.Fingerprint && w.set.generation > 0 {
		w.change.nothing()
		return
	}
	s.Listeners = withRefused(s, w.set.snapshot.Listeners)
	w.set.snapshot = s
	w.set.generation++
	w.change.news()
	w.o.Log.Debug("listeners read", zap.Int("listeners", len(s.Listeners)),
		zap.Int64("bytes", s.Bytes), zap.Duration("took", s.Took),
		zap.Uint64("generation", w.set.generation), zap.Bool("hinted", w.detector.Early()))
	w.put() // the next question may hang
}

// warms says whether a dump lacks listeners that the process will have soon, for the first time.
func (w *Watch) warms(s envoyadmin.Snapshot) bool {
	p := &w.process
	return !p.told && len(s.Warming) > 0 && w.o.Now().Sub(p.warming) < warmLimit
}

// becomesConfigured notes whether Envoy has completed a listener update by now; s is its last dump.
func (w *Watch) becomesConfigured(ctx context.Context, s envoyadmin.Snapshot) bool {
	configured, err := w.isConfigured(ctx, s)
	if err != nil {
		w.answered(stateQuestion, err)
	}
	if configured {
		w.process.confirmed, w.process.untaken = true, nil
	}
	return configured
}

// isConfigured says whether this Envoy has completed a listener update: it is live and has a
// listener from the control plane, or has none and tells the version of an update that it took as a
// whole, or takes no listeners from a control plane at all. The counters of updates do not tell:
// after a hot restart they begin with the other process's. Where statistics are filtered out,
// nothing does, and an empty set never counts. The questions go through all statistics and all of
// the configuration, but an Envoy without listeners and routes has few.
// See docs/design/facts.md#envoy-live-without-listeners.
func (w *Watch) isConfigured(ctx context.Context, s envoyadmin.Snapshot) (bool, error) {
	if err := w.askState(ctx); err != nil {
		return false, err
	}
	if initializes(w.process.state) {
		return false, nil
	}
	// The first listeners of an Envoy come together, but one waits for its routes under
	// warming_state while others are active: without it the set is no news either, unless it never
	// gets ready. See docs/design/facts.md#envoy-warms-listeners.
	if w.warms(s) {
		return false, nil
	}
	if hasDynamic(s) {
		return true, nil
	}
	if !w.process.stats.Due(w.o.Now()) {
		return false, nil
	}
	p, err := w.askControlPlane(ctx)
	if err != nil || p.Version != 0 {
		return err == nil, err
	}
	var b *envoyadmin.Bootstrap
	cost, err := w.spend(envoyadmin.BootstrapQuestion, func() (err error) {
		b, err = w.o.Admin.Bootstrap(ctx)
		return err
	})
	w.process.stats.Asked(w.o.Now().Add(-cost), w.o.Now())
	if err == nil {
		w.process.aside.Started = b
	}
	return err == nil && !b.LDS, err
}

// initializes says whether Envoy has yet to begin to serve.
func initializes(state string) bool {
	return state == "PRE_INITIALIZING" || state == "INITIALIZING"
}

// hasDynamic says whether the set holds an active listener of the control plane's. Beside ones that
// were refused, one for UDP does not count: an update that was taken for DNS alone is none of
// services.
func hasDynamic(s envoyadmin.Snapshot) bool {
	return slices.ContainsFunc(s.Listeners, func(l envoyadmin.Listener) bool {
		return !l.Static && (!l.UDP || len(s.Rejected) == 0)
	})
}

// withRefused are the listeners of a set, and those of the one before that Envoy refused and does
// not have: it lost them by a restart. A control plane that sends a listener has not said that the
// services behind it are gone. See docs/design/facts.md#envoy-keeps-what-it-had.
func withRefused(s envoyadmin.Snapshot, before []envoyadmin.Listener) []envoyadmin.Listener {
	all := slices.Clip(s.Listeners)
	if len(s.Rejected) == 0 {
		return all
	}
	refused := make(map[string]bool, len(s.Rejected)) // there may be thousands
	for _, r := range s.Rejected {
		refused[r.Name] = true
	}
	for _, l := range s.Listeners {
		delete(refused, l.Name)
	}
	for _, l := range before {
		if refused[l.Name] && !l.Static {
			all = append(all, l)
		}
	}
	return all
}

// askControlPlane asks for statistics, within their pace.
func (w *Watch) askControlPlane(ctx context.Context) (envoyadmin.ControlPlane, error) {
	var p envoyadmin.ControlPlane
	cost, err := w.spend(envoyadmin.StatsQuestion, func() (err error) {
		p, err = w.o.Admin.ControlPlane(ctx)
		return err
	})
	w.process.stats.Asked(w.o.Now().Add(-cost), w.o.Now())
	return p, err
}

// askStream asks Envoy whether its stream to the control plane stands: now and then, and when its
// log tells no further end.
func (w *Watch) askStream(ctx context.Context) {
	p, now := &w.process, w.o.Now()
	if w.outage.Err != nil || p.id == 0 || !p.stats.Due(now) || !p.stream.due(now) {
		return
	}
	p.stream.asked = now
	answer, err := w.askControlPlane(ctx)
	if err == nil && answer.Streams {
		p.stream.answered(now, answer.Connected, p.probe != nil)
	}
}
