// Package envoywatch looks at one Envoy and tells what it sees as values, Views.
//
//	FollowLog ──> events ┐
//	Admin <─ questions ──┼─> Watch ─> View, the newest in a mailbox of one
//	Probe ──> answers ───┘
//
// A Watch is one goroutine (Run). It asks Envoy when envoyadmin.Detector says so, at once where the
// log says that something changed. A question may hang for 20 s: it runs beside, and what the log
// tells meanwhile is taken and put into a View at once. So nothing waits for the admin interface
// but the answer itself.
//
// What belongs to one Envoy process is one value (process), replaced when another answers. How its
// stream to the control plane stands is a value that asks nothing and knows no clock (stream).
//
// It decides nothing about interception: package agent makes the rules out of View.Snapshot, and
// internal/symptom puts into words what is wrong. It never changes anything in Envoy.
package envoywatch

import (
	"context"
	"errors"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/mailbox"
)

// Admin is what a Watch asks of Envoy's admin interface: an envoyadmin.Client. With Options.Probe
// set, Bootstrap may be asked while another question is under way.
type Admin interface {
	Fingerprint(context.Context, []string) (envoyadmin.Fingerprint, error)
	Listeners(context.Context) (envoyadmin.Snapshot, error)
	Ready(context.Context) (state string, err error)
	ServerInfo(context.Context) (envoyadmin.ServerInfo, error)
	ControlPlane(context.Context) (envoyadmin.ControlPlane, error)
	Bootstrap(context.Context) (*envoyadmin.Bootstrap, error)
	Clusters(context.Context) ([]envoyadmin.ClusterHealth, error)
	Panics(context.Context) (map[string]uint64, error)
	Redial()
}

// Options are what a Watch works with. Admin must be set.
type Options struct {
	Admin   Admin
	Logged  <-chan envoyadmin.LogEvent // of Envoy's log; nil: there is none to follow
	LogPath string                     // where its last error line is read; "": nowhere
	Log     *zap.Logger                // nil: nothing is logged
	// Unit is systemd's word on Envoy, asked while nothing listens on the admin address (Unit of
	// this package). "" is no news; nil: not asked.
	Unit func(context.Context) string
	// Foreign says whether it is an Envoy all the same that answers on the admin address, where
	// another user's socket there gave this error. nil: not asked.
	Foreign func(context.Context, error) bool
	// Probe tries our own way to a control plane, beside everything else (Probe of this package).
	// nil: not tried.
	Probe func(context.Context, envoyadmin.Target) error
	// Share is the most that the questions take of Envoy's main thread (envoyadmin.Detector.Share).
	Share float64
	// Now is the clock, time.Now if nil.
	Now func() time.Time
}

// Watch is the task that looks at Envoy: at once when its log says that something changed, else at
// the detector's pace. Make one with New; one goroutine may use it.
type Watch struct {
	o      Options
	box    *mailbox.Box[View]
	probes chan probed

	detector   envoyadmin.Detector
	change     change
	process    process
	set        listeners
	outage     outage
	failed     [2]error // what the last question of each kind came to, by kind
	unreadable unreadable

	stateAt time.Time // when its state was last asked
	probeAt time.Time // when our own way was last tried
	unitAt  time.Time // when systemd was last asked
	began   time.Time // when the last Step did
	heard   bool      // the log or a probe has told something since
}

// outage is what keeps the admin address from telling.
type outage struct {
	Outage
	// handover is since when the next Envoy starts beside the one that serves (hot restart); zero:
	// none does.
	handover time.Time
}

// listeners are the set that counts and what belongs to it, of whatever process.
type listeners struct {
	snapshot   envoyadmin.Snapshot
	generation uint64
	rejected   []envoyadmin.Rejected
	rejections int
	dumps      int
	restarts   int  // of Envoy
	unread     bool // the last dump came to nothing
}

// The kinds of questions. Envoy must answer both, or its state is not known.
const (
	dumpQuestion  = iota // the dump, whose it is, and the masked dump
	stateQuestion        // whether it is live, and configured
)

const (
	// stateEvery is how often Envoy is asked for its state when nothing happens: /ready costs less
	// than a masked dump.
	stateEvery = time.Second
	// warmLimit is how long the listeners that are warming are waited for before the first set of a
	// process counts.
	warmLimit = time.Minute
	// probeEvery is how often our own way to the control plane is tried while Envoy's is broken.
	probeEvery = 30 * time.Second
	// probeNew is how soon it is tried for a process that was just met, whenever it was tried for the
	// one before; an Envoy that crashes all the time has it tried no more often.
	probeNew = 2 * time.Second
	// handoverLimit is how long the next Envoy may take before what it does not tell counts: its
	// first runtime, clusters and listeners are waited for 15 s each (initial_fetch_timeout).
	// See docs/design/facts.md#envoy-live-without-listeners.
	handoverLimit = time.Minute
	// unitEvery is how often systemd is asked for Envoy's unit while nothing answers on the admin
	// address, and that address itself while another user holds it.
	unitEvery = 5 * time.Second
)

// New makes a Watch that has seen nothing yet.
func New(o Options) *Watch {
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	if o.Now == nil {
		o.Now = time.Now //nolint:forbidigo // the clock where none is given
	}
	return &Watch{o: o, box: mailbox.New[View](), probes: make(chan probed, 1),
		detector: envoyadmin.Detector{Share: o.Share}}
}

// Views is where the newest View is received from, each at most once.
func (w *Watch) Views() <-chan View { return w.box.Get() }

// Run looks at Envoy until ctx ends, which is no error.
func (w *Watch) Run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case e, ok := <-w.o.Logged:
			w.hear(e, ok)
		case p := <-w.probes:
			w.takeProbe(p)
		case <-timer.C:
		}
		timer.Reset(w.Step(ctx))
	}
}

// Step asks Envoy what the detector says is due, puts a View, and says how long nothing is due if
// the log tells nothing. Unless ctx has ended: then nothing is put.
func (w *Watch) Step(ctx context.Context) (wait time.Duration) {
	select {
	case p := <-w.probes: // for who drives Step without Run
		w.takeProbe(p)
	default:
	}
	w.began, w.heard = w.o.Now(), false
	for ctx.Err() == nil {
		began := w.o.Now()
		action, wait := w.detector.Next(began)
		switch action {
		case envoyadmin.Wait:
			if w.idle(ctx) {
				continue
			}
			if ctx.Err() != nil {
				return 0
			}
			w.put()
			if w.heard { // a hint, say, that came behind Next
				return 0
			}
			return min(wait, stateEvery)
		case envoyadmin.Look:
			w.look(ctx, began, nil)
		case envoyadmin.LookNamed:
			w.look(ctx, began, w.detector.Names())
		case envoyadmin.Dump:
			w.dump(ctx, began)
		}
	}
	return 0
}

// look asks whether anything moved in the listeners of these names, or in all of them.
func (w *Watch) look(ctx context.Context, began time.Time, names []string) {
	var f envoyadmin.Fingerprint
	var err error
	w.change.asks(began)
	w.ask(func() { f, err = w.o.Admin.Fingerprint(ctx, names) })
	again := w.detector.Looked(began, w.o.Now(), f, err)
	if again {
		w.o.Admin.Redial()
	}
	if err != nil {
		w.change.failed()
	} else {
		w.change.looked(f, again)
	}
	if err == nil && w.set.unread {
		return // an Envoy that answers looks alone does not tell its listeners
	}
	w.answered(dumpQuestion, err)
}

// dump asks for the listeners, and of another process who it is: without that the dump has failed.
func (w *Watch) dump(ctx context.Context, began time.Time) {
	var s envoyadmin.Snapshot
	var err error
	w.change.asks(began)
	w.ask(func() { s, err = w.o.Admin.Listeners(ctx) })
	ended := w.o.Now()
	if err == nil {
		w.set.dumps++
		if id := s.Fingerprint.Process; id != w.process.id {
			if err = w.meet(ctx, id); err != nil {
				ended = w.o.Now()
			}
		}
	}
	again := w.detector.Dumped(began, ended, s, err)
	if again {
		w.o.Admin.Redial()
	}
	w.set.unread = err != nil
	w.answered(dumpQuestion, err)
	if err != nil {
		w.change.failed()
		return
	}
	w.change.dumped(s.Fingerprint, again)
	w.take(ctx, s)
}

// idle asks for all but the listeners. It says whether the detector has something to do again.
func (w *Watch) idle(ctx context.Context) (again bool) {
	if w.o.Now().Sub(w.stateAt) >= stateEvery || w.process.state != live {
		away := gone(w.failed[stateQuestion])
		served := w.process.state == live
		w.answered(stateQuestion, w.askState(ctx))
		// One that initializes after it served is another: on a busy machine, where questions take
		// long, the next look might come some ten seconds later.
		restarted := served && initializes(w.process.state)
		if w.failed[stateQuestion] == nil && (away || restarted) {
			w.detector.Back(w.o.Now())
		}
		if s := w.process.untaken; s != nil && w.becomesConfigured(ctx, *s) {
			w.detector.Again()
			return true
		}
	}
	w.askStream(ctx)
	w.probe(ctx)
	w.askUnit(ctx)
	w.askForeign(ctx)
	if !w.heard {
		w.askAside(ctx)
	}
	return false
}

// gone says whether an error is of an Envoy that was not there to answer, or did not: the one that
// answers next may be another, however long that question had waited.
func gone(err error) bool {
	for _, kind := range []error{envoyadmin.ErrTimeout, envoyadmin.ErrConnection,
		envoyadmin.ErrTruncated, envoyadmin.ErrRefused, envoyadmin.ErrUntrusted} {
		if errors.Is(err, kind) {
			return true
		}
	}
	return false
}

// ask runs a question to its end. What the log and a probe tell meanwhile is taken at once: Envoy
// may take 20 s to answer, or not answer. The question must not touch the Watch. Without a log it
// runs in the caller's goroutine: there is nothing that may not wait.
func (w *Watch) ask(question func()) {
	if w.o.Logged == nil {
		question()
		return
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		question()
	}()
	for {
		select {
		case <-done:
			return
		case e, ok := <-w.o.Logged:
			w.hear(e, ok)
		case p := <-w.probes:
			w.takeProbe(p)
		}
	}
}

// spend asks Envoy a question that is not the Detector's, and tells it what that took. It says what
// an answer cost Envoy, or how long none was waited for.
func (w *Watch) spend(
	q envoyadmin.Question, question func() error) (cost time.Duration, err error) {
	began := w.o.Now()
	w.ask(func() { err = question() })
	ended := w.o.Now()
	cost = w.detector.Took(q, began, ended, err)
	if err != nil {
		cost = ended.Sub(began)
	}
	return cost, err
}

// hear takes an event of the log, or its end.
func (w *Watch) hear(e envoyadmin.LogEvent, ok bool) {
	if !ok {
		w.o.Logged = nil
		return
	}
	w.Note(e)
}

// Note takes a line of Envoy's log: the hint that a listener changed, or how the stream to the
// control plane ended. What it says is in a View at once.
func (w *Watch) Note(e envoyadmin.LogEvent) {
	w.heard = true
	now := w.o.Now()
	switch e.Kind {
	case envoyadmin.LogUnreadable, envoyadmin.LogMissing:
		w.unreadable = unreadable{e.Details, e.Kind == envoyadmin.LogMissing}
	case envoyadmin.StreamClosed:
		w.process.stream.closed(now, e)
	case envoyadmin.EnvoyStarts:
		w.succeeds(now, e.Epoch)
		return // nothing that a View tells yet
	case envoyadmin.ListenerChanged, envoyadmin.ListenerRejected:
		if e.Kind == envoyadmin.ListenerChanged && e.Listener == "" {
			// One serves from now on. The one before it may go on answering on a connection of before,
			// for as long as it drains, and would not be told that the one that serves is to stop.
			w.o.Admin.Redial()
		}
		w.detector.Hint(now, e.Listener)
		w.change.hinted(now)
		if !w.process.stream.spoke(now) {
			return // nothing that a View tells
		}
	default:
		return
	}
	w.put()
}

// answered notes whether Envoy answered one kind of question.
func (w *Watch) answered(kind int, err error) {
	if errors.Is(err, context.Canceled) {
		return
	}
	w.failed[kind] = err
	now := w.failed[dumpQuestion]
	if now == nil {
		now = w.failed[stateQuestion]
	}
	if now != nil && w.outage.Err == nil {
		w.outage.Since = w.o.Now()
		w.outage.LastError = w.lastError()
	}
	if err != nil && (kind == dumpQuestion || w.failed[dumpQuestion] == nil) {
		w.outage.Asked = w.o.Now()
	}
	w.outage.Err = now
	w.outage.ForeignEnvoy = w.outage.ForeignEnvoy && errors.Is(now, envoyadmin.ErrUntrusted)
	if errors.Is(now, envoyadmin.ErrRefused) {
		return // so will the next question be, at once, and systemd is to be asked first
	}
	w.outage.Unit = ""
	if err != nil && kind == dumpQuestion {
		w.put() // the next question may hang as well
	}
}

// askState asks whether Envoy is live.
func (w *Watch) askState(ctx context.Context) error {
	w.stateAt = w.o.Now()
	var state string
	_, err := w.spend(envoyadmin.ReadyQuestion, func() (err error) {
		state, err = w.o.Admin.Ready(ctx)
		return err
	})
	if err == nil {
		w.process.state = state
	}
	return err
}

// put leaves what is known now in the mailbox.
func (w *Watch) put() {
	v, taken := w.view(), true
	select {
	case <-w.box.Get(): // nobody has taken what it told
		taken = false
	default:
	}
	v.Told = w.change.put(taken)
	w.box.Put(v)
}
