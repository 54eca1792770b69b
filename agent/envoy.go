package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/mailbox"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// View is what is known of Envoy after one look at it. The loop gets the newest and never waits for one: an admin
// interface that hangs holds up only the goroutine that makes Views.
type View struct {
	Err   error     // why the last look told nothing; the rest is then of earlier looks
	Since time.Time // since when Err
	Asked time.Time // when what gave Err was last asked
	State string    // LIVE, PRE_INITIALIZING, …
	Info  envoyadmin.ServerInfo
	// Snapshot is the last one that is news: not that of an Envoy which has just started and got no listeners yet.
	Snapshot   envoyadmin.Snapshot
	Rejected   []envoyadmin.Rejected // of the last look, news or not
	Generation uint64                // counts Snapshots; 0: none yet
	Configured bool                  // Snapshot is of this Envoy process, which had completed a listener update
	Stream     *symptom.Stream       // how its xDS stream last ended; nil: it stands, as far as is known
	Apart      bool                  // Envoy has no stream, whether its log says why or not
	LogErr     string                // why its log cannot be read; "": it can, or is not there yet
	Probe      error                 // our own way to the control plane
	LastError  string                // last error line of its log
	Unit       string                // systemd's word on it while it is down
	Dumps      int                   // full dumps asked for, since the start
}

func (v View) facts(admin string) symptom.Envoy {
	return symptom.Envoy{
		Admin: admin, Err: v.Err, Since: v.Since, Unit: v.Unit, LastError: v.LastError, Apart: v.Apart, LogErr: v.LogErr, State: v.State, Version: v.Info.Version, Configured: v.Configured,
		Rejected: v.Rejected, Skipped: v.Snapshot.Skipped, Stream: v.Stream, Probe: v.Probe, Node: v.Info.Node.ID,
	}
}

// envoyWatch is the task that looks at Envoy: at once when its log says that something changed, else at the detector's pace.
type envoyWatch struct {
	client  *envoyadmin.Client
	logged  <-chan envoyadmin.LogEvent // nil: no log to follow
	logPath string
	probes  chan probed
	views   *mailbox.Box[View]
	log     *zap.Logger

	detector envoyadmin.Detector
	view     View
	process  uint64    // the Envoy that view.Info and view.Configured are of
	asked    time.Time // when its state was last asked
	probed   time.Time
	targets  []envoyadmin.Target // of its bootstrap; nil: not asked yet
	since    time.Time           // when this Envoy was first seen
	// configured: Envoy was seen to have completed a listener update, so that an empty set read from now on counts. That is
	// asked anew once it has had listeners: it may be another process by then.
	configured bool
	// untaken is the last dump of an Envoy that was not seen to be configured. It tells when to dump again and never
	// counts itself: the configuration may have come after it was read.
	untaken  *envoyadmin.Snapshot
	unitAt   time.Time // when systemd was last asked
	closed   int       // ends of its stream since the control plane last spoke
	apart    int       // answers in a row that it has no stream
	streamAt time.Time // when it was last asked for its stream
	stats    envoyadmin.Pace
	dumpErr  error // of the last dump or masked dump
	stateErr error // of the last question for its state
}

const (
	// stateEvery is how often Envoy is asked for its state when nothing happens: /ready costs less than a masked dump.
	stateEvery = time.Second
	// warmLimit is how long the listeners of an Envoy that was just started are waited for.
	warmLimit = time.Minute
	// probeEvery is how often our own way to the control plane is tried while Envoy's is broken.
	probeEvery = 30 * time.Second
	// connectionEvery is how often Envoy is asked whether its stream stands, if the pace of that question allows: a
	// connection that is refused is not in its log.
	connectionEvery = 15 * time.Second
)

func (w *envoyWatch) run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case e, ok := <-w.logged:
			if !ok {
				w.logged = nil
			}
			w.note(e)
		case p := <-w.probes:
			w.view.Probe, w.targets = p.err, p.targets
		case <-timer.C:
		}
		wait := w.look(ctx)
		if ctx.Err() != nil {
			return nil
		}
		w.views.Put(w.view)
		timer.Reset(wait)
	}
}

// look asks Envoy what the detector says is due, and says how long nothing is.
func (w *envoyWatch) look(ctx context.Context) (wait time.Duration) {
	for ctx.Err() == nil {
		began := time.Now()
		action, wait := w.detector.Next(began)
		switch action {
		case envoyadmin.Wait:
			if now := time.Now(); now.Sub(w.asked) >= stateEvery || w.view.State != "LIVE" {
				away := errors.Is(w.stateErr, envoyadmin.ErrTimeout)
				w.answered(&w.stateErr, w.askState(ctx))
				if away && w.stateErr == nil {
					w.detector.Back(time.Now())
				}
				if w.untaken != nil && w.becomesConfigured(ctx, *w.untaken) {
					w.detector.Again()
					continue
				}
			}
			w.probe(ctx)
			w.askUnit(ctx)
			return min(wait, stateEvery)
		case envoyadmin.Look:
			f, err := w.client.Fingerprint(ctx)
			if w.detector.Looked(began, time.Now(), f, err) {
				w.client.Redial()
			}
			w.answered(&w.dumpErr, err)
		case envoyadmin.Dump:
			s, err := w.client.Listeners(ctx)
			w.detector.Dumped(began, time.Now(), s.Fingerprint, err)
			w.answered(&w.dumpErr, err)
			if err == nil {
				w.view.Dumps++
				w.take(ctx, s)
			}
		}
	}
	return 0
}

// answered notes whether Envoy answered one kind of question: each must be answered, or its state is not known.
func (w *envoyWatch) answered(question *error, err error) {
	if errors.Is(err, context.Canceled) {
		return
	}
	*question = err
	now := cmp.Or(w.dumpErr, w.stateErr)
	if now != nil && w.view.Err == nil {
		w.view.Since = time.Now()
		w.view.LastError = w.lastError()
	}
	if err != nil && (question == &w.dumpErr || w.dumpErr == nil) {
		w.view.Asked = time.Now()
	}
	w.view.Err = now
}

// askState asks whether Envoy is live.
func (w *envoyWatch) askState(ctx context.Context) error {
	w.asked = time.Now()
	state, err := w.client.Ready(ctx)
	if err == nil {
		w.view.State = state
	}
	return err
}

// take makes a new listener set the one that counts, if Envoy had completed a listener update when the set was read.
// Before that an empty set says nothing about what its clients need.
func (w *envoyWatch) take(ctx context.Context, s envoyadmin.Snapshot) {
	w.view.Rejected = s.Rejected
	if s.Fingerprint.Process != w.process {
		info, err := w.client.ServerInfo(ctx)
		if err != nil {
			w.answered(&w.stateErr, err)
			w.detector.Again()
			return
		}
		if w.process != 0 && !info.SameProcess(w.view.Info) {
			w.log.Info("envoy restarted", zap.String("version", info.Text), zap.Int("epoch", info.Epoch))
		}
		w.since = time.Now()
		w.process, w.view.Info, w.view.State = s.Fingerprint.Process, info, info.State
		w.configured, w.view.Configured = false, false
		w.view.Stream, w.view.Probe, w.view.Apart, w.closed, w.apart = nil, nil, false, 0, 0
		w.stats, w.targets = envoyadmin.Pace{}, nil
	}
	// An active listener of the control plane's shows that an update came before the dump. Without one the update may have
	// come between the dump and the answers that tell of it.
	empty := !hasDynamic(s)
	if !w.configured && (empty || !w.view.Configured) {
		if w.untaken == nil && w.view.Configured {
			w.stats = envoyadmin.Pace{} // it had listeners until now: one question at once
		}
		if !w.becomesConfigured(ctx, s) {
			w.untaken = &s
			return
		}
		if empty {
			w.detector.Again()
			return
		}
	}
	w.configured, w.untaken = w.configured && empty, nil
	w.view.Configured = true
	if s.Fingerprint == w.view.Snapshot.Fingerprint && w.view.Generation > 0 {
		return
	}
	w.view.Snapshot = s
	w.view.Generation++
	w.log.Debug("listeners read", zap.Int("listeners", len(s.Listeners)), zap.Int64("bytes", s.Bytes), zap.Duration("took", s.Took), zap.Uint64("generation", w.view.Generation))
}

// becomesConfigured notes whether Envoy has completed a listener update by now; s is its last dump.
func (w *envoyWatch) becomesConfigured(ctx context.Context, s envoyadmin.Snapshot) bool {
	configured, err := w.isConfigured(ctx, s)
	if err != nil {
		w.answered(&w.stateErr, err)
	}
	if configured {
		w.configured, w.untaken = true, nil
	}
	return configured
}

// hasDynamic says whether the set holds an active listener of the control plane's.
func hasDynamic(s envoyadmin.Snapshot) bool {
	return slices.ContainsFunc(s.Listeners, func(l envoyadmin.Listener) bool { return !l.Static })
}

// isConfigured says whether this Envoy has completed a listener update: it is live and has a listener from the control
// plane, or has none and tells the version of an update that it took as a whole, or takes no listeners from a control plane
// at all. The counters of updates do not tell: after a hot restart they begin with the other process's. Where statistics are
// filtered out, nothing does, and an empty set never counts. The questions go through all statistics and all of the
// configuration, but an Envoy without listeners and routes has few.
func (w *envoyWatch) isConfigured(ctx context.Context, s envoyadmin.Snapshot) (bool, error) {
	if err := w.askState(ctx); err != nil || w.view.State == "PRE_INITIALIZING" || w.view.State == "INITIALIZING" {
		return false, err
	}
	// The first listeners of an Envoy come together, but one waits for its routes under warming_state while others are
	// active: without it the set is no news either, unless it never gets ready.
	if len(s.Warming) > 0 && time.Since(w.since) < warmLimit {
		return false, nil
	}
	if hasDynamic(s) {
		return true, nil
	}
	if !w.stats.Due(time.Now()) {
		return false, nil
	}
	p, err := w.askControlPlane(ctx)
	if err != nil || p.Version != 0 {
		return err == nil, err
	}
	began := time.Now()
	bootstrap, err := w.client.Bootstrap(ctx)
	w.stats.Asked(began, time.Now())
	return err == nil && !bootstrap.LDS, err
}

// askControlPlane asks for statistics, within their pace.
func (w *envoyWatch) askControlPlane(ctx context.Context) (envoyadmin.ControlPlane, error) {
	began := time.Now()
	p, err := w.client.ControlPlane(ctx)
	w.stats.Asked(began, time.Now())
	return p, err
}

// note takes a line of Envoy's log: the hint that a listener changed, or how the stream to the control plane ended.
func (w *envoyWatch) note(e envoyadmin.LogEvent) {
	switch e.Kind {
	case envoyadmin.LogUnreadable:
		w.view.LogErr = e.Details
	case envoyadmin.StreamClosed:
		w.closed += e.Count
		w.view.Stream = &symptom.Stream{Target: e.Target, Code: e.Code, Message: e.Message, When: time.Now()}
	case envoyadmin.ListenerChanged, envoyadmin.ListenerRejected:
		w.detector.Hint(time.Now())
		w.view.Stream, w.view.Apart, w.closed, w.apart = nil, false, 0, 0 // the control plane has spoken
	}
}

// silence is how long the log says nothing after the n-th end of a stream in a row if the next one stands. Envoy doubles
// its pause from 0.5 to 30 s, takes a random part of it, and logs each end at once; but those of codes that it hopes
// will pass only once they have lasted for 30 s (grpc_stream.h). Log events that repeat are told each 5 s.
func silence(code, n int) time.Duration {
	const longest = 75 * time.Second
	switch codes.Code(code) {
	case codes.DeadlineExceeded, codes.ResourceExhausted, codes.Unavailable:
		return longest
	}
	return min(longest, 6*time.Second+500*time.Millisecond<<min(n, 10))
}

// askStream asks Envoy whether its stream to the control plane stands: now and then, and when its log tells no further end.
// connected_state flaps to 1 at each attempt, so one answer that it stands means nothing while our own way is blocked,
// and two that it does not are needed.
func (w *envoyWatch) askStream(ctx context.Context, now time.Time) {
	if w.view.Err != nil || w.process == 0 || !w.stats.Due(now) {
		return
	}
	silent := w.view.Stream != nil && now.Sub(w.view.Stream.When) > silence(w.view.Stream.Code, w.closed)
	if !silent && now.Sub(w.streamAt) < connectionEvery {
		return
	}
	w.streamAt = now
	p, err := w.askControlPlane(ctx)
	switch {
	case err != nil || !p.Streams:
	case !p.Connected:
		w.apart++
		w.view.Apart = w.apart > 1
	case w.view.Probe == nil:
		w.apart, w.view.Apart = 0, false
		if silent {
			w.view.Stream = nil
		}
	}
}

// probe tries our own way to the control plane while Envoy's stream is broken or it never got a configuration: Envoy
// gives the same empty reason, or none, for a failed look-up, a closed and a filtered port. It runs beside, and its answer is a value.
func (w *envoyWatch) probe(ctx context.Context) {
	now := time.Now()
	w.askStream(ctx, now)
	broken := w.view.Err == nil && w.process != 0 && (w.view.Stream != nil || w.view.Apart || !w.view.Configured)
	if !broken {
		w.view.Probe = nil
		return
	}
	if now.Sub(w.probed) < probeEvery {
		return
	}
	w.probed = now
	targets := w.targets
	go func() {
		p := w.probeControlPlane(ctx, targets)
		select {
		case w.probes <- p:
		case <-ctx.Done():
		}
	}()
}

// probed is what came of a probe, and the control planes that it knows by now.
type probed struct {
	targets []envoyadmin.Target
	err     error
}

// probeControlPlane tries the control planes that Envoy's bootstrap names, which is asked for once: it costs Envoy a third
// of a second at 10,000 services.
func (w *envoyWatch) probeControlPlane(ctx context.Context, targets []envoyadmin.Target) probed {
	if targets == nil {
		b, err := w.client.Bootstrap(ctx)
		if err != nil {
			return probed{} // the watch itself tells what is wrong with the admin interface
		}
		targets = b.Targets
	}
	p := probed{targets: targets}
	for _, t := range targets {
		if p.err = envoyadmin.Probe(ctx, t.Address, envoyadmin.ProbeOptions{TLS: t.TLS, ServerName: t.ServerName, RootCAFile: t.RootCAFile}); p.err != nil {
			break
		}
	}
	return p
}

// unitEvery is how often systemd is asked for Envoy's unit while nothing answers on the admin address.
const unitEvery = 5 * time.Second

// askUnit asks systemd what became of Envoy. Without systemd, or its unit, there is nothing to say.
func (w *envoyWatch) askUnit(ctx context.Context) {
	if !errors.Is(w.view.Err, envoyadmin.ErrRefused) {
		w.view.Unit = ""
		return
	}
	if time.Since(w.unitAt) < unitEvery {
		return
	}
	w.unitAt = time.Now()
	w.view.LastError = w.lastError()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	unit, err := systemd.UnitState(ctx, systemd.EnvoyUnit)
	if err != nil {
		return
	}
	words := []string{unit.Active}
	if unit.Sub != "" && unit.Sub != unit.Active {
		words = append(words, unit.Sub)
	}
	if unit.ExitCode > 0 {
		words = append(words, fmt.Sprintf("exit code %d", unit.ExitCode))
	}
	if unit.ExitSignal > 0 {
		words = append(words, "ended by "+unix.SignalName(syscall.Signal(unit.ExitSignal)))
	}
	if unit.Restarts > 0 {
		words = append(words, fmt.Sprintf("%d restarts", unit.Restarts))
	}
	w.view.Unit = strings.Join(words, ", ")
}

// lastError is the last error line of Envoy's log, as short as a guest attribute needs it.
func (w *envoyWatch) lastError() string {
	if w.logPath == "" {
		return ""
	}
	line, err := envoyadmin.LastError(w.logPath)
	if err != nil {
		return "" // an unreadable log is no reason of its own
	}
	return guestattr.OneLine(line, 300)
}
