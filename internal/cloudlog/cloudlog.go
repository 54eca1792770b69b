// Package cloudlog tells Cloud Logging what happens on a Compute Engine VM, where people read it
// without logging in:
//
//	gcloud logging read 'resource.type="gce_instance" jsonPayload.message:"Envoy version"'
//
// It asks one method of the REST API, entries:write, with the token of the metadata server, and
// nothing else. The client library, cloud.google.com/go/logging, is 17 MB and 228 packages for that
// one call, holds up to 1 GiB in memory and writes entries of its own.
//
// Nothing waits for it. [Writer.Say] queues and returns; [Writer.Run] does all that can hang. What
// it may cost is bounded, whatever the other side does:
//
//   - memory: 256 KiB of entries wait. Beyond, the oldest are dropped, counted, and spoken of in an
//     entry once entries are taken again. An entry has at most some KiB, an answer 64 KiB;
//   - rate: a request a second, a hundred entries or 64 KiB a request, and never more than 300
//     entries in any minute;
//   - time: ten seconds a request. What fails is tried again after one second, then two, up to a
//     minute, with jitter, and not before the time of a Retry-After (ten minutes at the most).
//
// A retry writes nothing twice: an entry keeps its insertId and timestamp, by which Cloud Logging
// shows it once
// (https://cloud.google.com/logging/docs/reference/v2/rest/v2/LogEntry#FIELDS.insert_id).
// See docs/design/facts.md#gce-log-entries-once.
//
// A refusal (403) turns the channel off with a line in the log; every ten minutes one request finds
// out whether it still stands. What cannot ever be taken (400) is dropped.
//
// What an event is, is decided by package agent. That nothing secret is in it is seen to where it
// comes in (internal/redaction); tokens and URLs are looked for once more here.
package cloudlog

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/time/rate"

	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/internal/report"
)

const (
	maxQueue     = 256 << 10 // bytes of entries that wait or are under way
	maxBatch     = 64 << 10  // bytes of entries in a request
	maxEntries   = 100       // in a request
	refill       = 300 * time.Millisecond
	collect      = time.Second // an entry waits so long for others
	every        = time.Second // between the beginnings of two requests
	requestLimit = 10 * time.Second
	lastLimit    = 1500 * time.Millisecond // for what is queued when the program ends
	firstBackOff = time.Second
	maxBackOff   = time.Minute
	maxTold      = 10 * time.Minute // the longest Retry-After that is believed
	probeEvery   = 10 * time.Minute // while the channel is off
	sayAfter     = 30 * time.Second // of failures: one lost answer is no news
)

// Mode says when entries are written.
type Mode string

const (
	Auto Mode = "auto" // on a Compute Engine VM whose scopes allow it
	On   Mode = "on"   // whatever the scopes say; where there is no metadata server it is waited for
	Off  Mode = "off"
)

// ParseMode reads a setting: auto, on, off, true (on), false or nothing (off). An error is the end
// of a sentence that begins with the setting's name.
func ParseMode(text string) (Mode, error) {
	switch text {
	case "auto", "on", "off":
		return Mode(text), nil
	case "true":
		return On, nil
	case "false", "":
		return Off, nil
	}
	return Off, fmt.Errorf("is %q; use auto, on or off", text)
}

// EndpointEnv names another server than Google's, as SCHEME://HOST: a Private Service Connect
// endpoint, or a test's. By http the token goes in plain text.
const EndpointEnv = "SERVICE_PROXY_AGENT_LOGGING_ENDPOINT"

// Options of a [Writer]. The zero value writes nothing.
type Options struct {
	Mode Mode
	Log  *zap.Logger // is told when the channel goes off, fails, recovers; nil: nobody is

	// A test's own world; nil: this one.
	Transport http.RoundTripper
	Read      func(ctx context.Context, path string) ([]byte, error) // of the metadata server
	onCompute func() bool
}

// Writer writes events to Cloud Logging. Make it with [New]. All methods may be called from any
// goroutine.
//
//	w := cloudlog.New(cloudlog.Options{Mode: cloudlog.Auto, Log: log})
//	go w.Run(ctx)
//	w.Say(report.Event{Severity: report.Info, Message: "started"})
type Writer struct {
	mode      Mode
	url       string
	log       *zap.Logger
	read      func(ctx context.Context, path string) ([]byte, error)
	onCompute func() bool
	dial      func() http.RoundTripper
	process   string        // begins each insertId: no other process has it
	wake      chan struct{} // one slot
	run       course        // Run's alone

	mu     sync.Mutex
	deaf   bool // nothing is queued: it was found out that this is no place for it
	queue  []entry
	bytes  int       // of queue and of what is under way
	since  time.Time // when the first of queue came
	next   uint64    // the number of the next entry
	missed uint64    // dropped, and not yet spoken of
	later  time.Time // course.notTill, for State
	state  report.ChannelState
}

// course is where Run stands.
type course struct {
	client  *http.Client // nil: none yet, or the last one failed
	vm      *vm          // nil: not known yet
	token   token
	entries *rate.Limiter
	last    time.Time // when the last request began
	notTill time.Time // no request before
	told    bool      // notTill is the server's word
	backOff time.Duration
	failing time.Time // since when; zero: the last request was taken, or there was none
	refused bool      // by 403
	said    bool      // that it fails, or refuses
	noticed time.Time // when drops were told of
	renewed bool      // the token is a new one, because the one before was not taken
}

// New returns a Writer. Nothing is sent before [Writer.Run].
func New(o Options) *Writer {
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	w := &Writer{
		mode: cmp.Or(o.Mode, Off), log: o.Log, read: o.Read, onCompute: o.onCompute, dial: dial,
		url:     cmp.Or(os.Getenv(EndpointEnv), "https://logging.googleapis.com") + "/v2/entries:write",
		process: strings.ToLower(rand.Text()[:16]),
		wake:    make(chan struct{}, 1),
	}
	w.run.entries = rate.NewLimiter(rate.Every(refill), maxEntries)
	if w.read == nil {
		w.read = metadata.Read
	}
	if w.onCompute == nil {
		w.onCompute = onCompute
	}
	if o.Transport != nil {
		w.dial = func() http.RoundTripper { return o.Transport }
	}
	w.deaf = w.mode == Off
	w.state.Enabled = w.mode == On
	switch w.mode {
	case Off:
		w.state.LastError = "--cloud-logging=off"
	case Auto:
		w.state.LastError = "it is not known yet whether this VM may write there"
	case On:
	}
	return w
}

// Say queues an event, as of now, and never blocks.
func (w *Writer) Say(e report.Event) {
	if w.mode == Off {
		return
	}
	p := payload(e)
	now := time.Now()
	w.mu.Lock()
	if !w.deaf {
		w.push(w.entry(now, e.Severity, p), now)
	}
	w.mu.Unlock()
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// State is how the channel does now. It is not enabled before it is known that this VM allows it.
func (w *Writer) State() report.ChannelState {
	w.mu.Lock()
	defer w.mu.Unlock()
	s, now := w.state, time.Now()
	s.Waiting = len(w.queue)
	s.Left, s.Most = max(0, w.run.entries.TokensAt(now)), maxEntries // its pointer never changes
	s.PerMinute = float64(time.Minute) / float64(refill)
	if s.Left < 1 {
		s.Next = now.Add(time.Duration((1 - s.Left) * float64(refill)))
	}
	if w.later.After(now) {
		s.Next = later(w.later, s.Next)
	}
	return s
}

// Run writes what is said until ctx ends, and returns nil then. What is queued at the end is tried
// once, for one and a half seconds at the most.
func (w *Writer) Run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for ctx.Err() == nil {
		now := time.Now()
		at, something := w.due(now)
		if something && !at.After(now) {
			w.step(ctx)
			continue
		}
		var due <-chan time.Time
		if something {
			// A token of the limiter is there a hair later than computed in floating point.
			timer.Reset(max(at.Sub(now), time.Millisecond))
			due = timer.C
		}
		select {
		case <-ctx.Done():
		case <-w.wake:
		case <-due:
		}
	}
	w.finish(ctx)
	return nil
}

// due is when the next step may be made, if there is one to make.
func (w *Writer) due(now time.Time) (at time.Time, something bool) {
	r := &w.run
	if w.mode == Off {
		return time.Time{}, false
	}
	if r.vm == nil {
		return r.notTill, true
	}
	w.mu.Lock()
	waiting, bytes, since, missed := len(w.queue), w.bytes, w.since, w.missed
	w.mu.Unlock()
	if waiting == 0 && missed == 0 {
		return time.Time{}, false
	}
	at = now
	if waiting > 0 && waiting < maxEntries && bytes < maxBatch {
		at = since.Add(collect)
	}
	if missing := 1 - r.entries.TokensAt(now); missing > 0 {
		at = later(at, now.Add(time.Duration(missing*float64(refill))))
	}
	return later(at, r.notTill, r.last.Add(every)), true
}

func later(t time.Time, others ...time.Time) time.Time {
	for _, o := range others {
		if o.After(t) {
			t = o
		}
	}
	return t
}

// step finds out where it is, or makes a request.
func (w *Writer) step(ctx context.Context) {
	if w.run.vm == nil {
		w.find(ctx)
		return
	}
	now := time.Now()
	w.run.last = now
	w.mu.Lock()
	if len(w.queue) == 0 && w.missed > 0 { // nothing else would find out that entries are taken again
		w.notice(now)
	}
	w.mu.Unlock()
	batch := w.take(now)
	if len(batch) == 0 {
		return // a token was there a hair later, after all
	}
	err := w.write(ctx, batch)
	if err != nil && ctx.Err() != nil {
		w.giveBack(batch) // the end of the program is nobody's failure
		return
	}
	w.settle(time.Now(), batch, err)
}

// find finds out which VM this is, and whether entries may be written from it.
func (w *Writer) find(ctx context.Context) {
	r := &w.run
	vm, err := readVM(ctx, w.read, w.mode == Auto)
	if ctx.Err() != nil {
		return
	}
	now := time.Now()
	switch {
	case err == nil:
		w.mu.Lock()
		wasDeaf := w.deaf
		w.deaf, w.state.Enabled, w.state.LastError = false, true, ""
		w.later = time.Time{}
		w.mu.Unlock()
		if wasDeaf || r.said {
			w.log.Info("events go to Cloud Logging")
		}
		r.vm, r.backOff, r.notTill = vm, 0, time.Time{}
		r.failing, r.said = time.Time{}, false
	case w.mode == Auto && (errors.Is(err, errScope) || !w.onCompute()):
		r.notTill = now.Add(probeEvery)
		w.mu.Lock()
		wasDeaf := w.deaf
		w.deaf, w.queue, w.bytes = true, nil, 0
		w.state.LastError = err.Error()
		w.mu.Unlock()
		if !wasDeaf {
			w.log.Info("Cloud Logging is off", zap.Error(err))
		}
	default:
		w.failed(now, err, 0)
	}
}

// failed books a try that failed, and waits before the next.
func (w *Writer) failed(now time.Time, err error, told time.Duration) {
	r := &w.run
	w.hangUp() // what it trusts may have changed, and its connections may be dead
	w.fail(err)
	r.backOff = min(max(2*r.backOff, firstBackOff), maxBackOff)
	// A fleet that failed at once does not come back at once.
	r.notTill = now.Add(r.backOff/2 + jitter(r.backOff/2))
	if r.told = told > 0; r.told {
		r.notTill = later(r.notTill, now.Add(told+jitter(told/10)))
	}
	if r.failing.IsZero() {
		r.failing = now
	}
	defer func() {
		w.mu.Lock()
		w.later = r.notTill
		w.mu.Unlock()
	}()
	switch {
	case r.refused: // said by refuse; an error in between is no news
		r.notTill = later(r.notTill, now.Add(probeEvery))
	case !r.said && now.Sub(r.failing) >= sayAfter:
		r.said = true
		w.log.Warn("Cloud Logging takes no entries", zap.Error(err))
	}
}

func jitter(most time.Duration) time.Duration { return mathrand.N(most + 1) }

func (w *Writer) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.state.Failures++
	w.state.Up, w.state.LastError = false, err.Error()
}

// settle books how a request ended.
func (w *Writer) settle(now time.Time, batch []entry, err error) {
	r := &w.run
	var answer *answerError
	errors.As(err, &answer)
	switch {
	case err == nil:
		w.written(batch)
		w.succeeded(now)
	case answer == nil:
		w.giveBack(batch)
		w.failed(now, err, 0)
	case answer.code == http.StatusUnauthorized && !r.renewed:
		r.token, r.renewed = token{}, true
		w.giveBack(batch)
		w.fail(err)
	case answer.code == http.StatusForbidden:
		w.giveBack(batch)
		w.refuse(now, err)
	case answer.code == http.StatusBadRequest || answer.code == http.StatusRequestEntityTooLarge:
		// The same again would be refused again, for ever.
		good, bad := answer.split(batch)
		w.written(good)
		w.dropped(bad)
		w.failed(now, err, answer.after)
	default:
		if answer.code == http.StatusUnauthorized {
			r.token = token{}
		}
		w.giveBack(batch)
		w.failed(now, err, answer.after)
	}
}

func (w *Writer) refuse(now time.Time, err error) {
	r := &w.run
	w.mu.Lock()
	w.state.Enabled = false
	w.mu.Unlock()
	if !r.refused {
		w.log.Warn("Cloud Logging refuses entries and is off; give the VM the scope logging.write or "+
			"cloud-platform, and its service account roles/logging.logWriter", zap.Error(err))
	}
	r.refused, r.said = true, true
	w.failed(now, err, 0)
}

func (w *Writer) succeeded(now time.Time) {
	r := &w.run
	w.mu.Lock()
	missed := w.missed
	w.state.Enabled, w.state.Up, w.state.LastError = true, true, ""
	w.state.LastSuccess, w.later = now, time.Time{}
	// While more is said than may be written, drops are told of once a minute.
	if missed > 0 && (len(w.queue) == 0 || now.Sub(r.noticed) >= time.Minute) {
		w.notice(now)
		r.noticed = now
	}
	w.mu.Unlock()
	if r.said {
		w.log.Info("Cloud Logging takes entries again",
			zap.Duration("after", now.Sub(r.failing)), zap.Uint64("dropped", missed))
	}
	r.backOff, r.notTill, r.told, r.failing = 0, time.Time{}, false, time.Time{}
	r.refused, r.renewed, r.said = false, false, false
}

// finish tries what is queued once more, since the program ends.
func (w *Writer) finish(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastLimit)
	defer cancel()
	defer w.hangUp()
	r := &w.run
	now := time.Now()
	if r.vm != nil && !r.refused && !(r.told && now.Before(r.notTill)) {
		if batch := w.take(now); len(batch) > 0 {
			w.settle(now, batch, w.write(ctx, batch))
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	before := w.state.Dropped
	for w.dropOldest() {
	}
	if lost := w.state.Dropped - before; lost > 0 && w.state.Enabled {
		w.log.Warn("entries for Cloud Logging are lost", zap.Uint64("entries", lost))
	}
}
