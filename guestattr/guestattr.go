// Package guestattr publishes short values as guest attributes of a Compute Engine VM, where people
// read them without logging in:
//
//	gcloud compute instances get-guest-attributes VM --query-path=gce-service-proxy/
//
// It is the home of the rate budget. Compute Engine allows ten queries a minute for a VM, shared
// with Google's own agents, and above that "might arbitrarily remove" attributes being written. So
// every query here, write or read, takes a token from a bucket that refills three a minute and
// holds three; only changes are written; of values that come faster the newest wins; the heartbeat
// is written once a minute. Three tokens are enough for a first start to say bootstrap-status,
// proxy-version and agent-heartbeat at once. See docs/design/facts.md#gce-guest-attribute-budget.
//
// Where there is more to say than tokens, the value goes first that shall be there soonest: each
// has a time within which it is to be written, from when it became another one. The times are such
// that with the failure, the status and the heartbeat all changing all the time a new failure or
// status is there within a minute, and the heartbeat is never older than two. Where bootstrap or
// Envoy's version changes besides, the status may wait for two tokens more, but no failure.
//
// Values are read back, each about every ten minutes, because they can be lost, and because every
// process on the VM may overwrite them. What was lost or changed is written again at that pace and
// counted: noticed, never trusted, never fought.
//
// Package cloud.google.com/go/compute/metadata reads metadata but cannot write guest
// attributes, hence the plain HTTP here. What to say is decided by package agent; nothing
// here interprets a value.
package guestattr

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
)

// Namespace is the namespace of all keys, the one the closed agent used and
// gcloud's documents name.
const Namespace = "gce-service-proxy"

// The keys. [Writer.Set] takes any other, too, of letters, digits, - and _.
const (
	BootstrapStatus      = "bootstrap-status"
	BootstrapLastFailure = "bootstrap-last-failure"
	AgentLastFailure     = "agent-last-failure"
	ProxyVersion         = "proxy-version"
	AgentHeartbeat       = "agent-heartbeat"
	AgentStatus          = "agent-status"
)

// MaxValue is the longest value written, in bytes. Google documents no limit;
// longer values are cut.
const MaxValue = 1024

const (
	burst          = 3
	refill         = 20 * time.Second // for one token
	unkeptEvery    = 30 * time.Second // a query, while the budget's file cannot be written; see take
	queryLimit     = 5 * time.Second  // a query that takes longer has failed
	heartbeatEvery = time.Minute
	minorEvery     = 5 * time.Minute // for a change of a tail alone; see SetWithTail
	// Within these a change is written, if the server answers, and a heartbeat once its minute is
	// over: at five minutes its readers call the agent stuck.
	promise          = 50 * time.Second
	heartbeatPromise = 25 * time.Second
	statusRest       = 10 * time.Second // the first one, which soon changes, and others need tokens
	failureLate      = 45 * time.Second // from then on the failure goes first: the next token is late
	checkEvery       = 10 * time.Minute // each value is read back this often
	probeEvery       = 2 * time.Minute  // while the VM's guest attributes are disabled
	firstBackOff     = 2 * time.Second  // after a failed query; doubles
	maxBackOff       = 30 * time.Second // so that "within 60 s" holds once the server answers again
)

// order is who goes first among those that shall be there at the same time: the first of these, all
// others, and then the last.
var (
	first = []string{BootstrapStatus, BootstrapLastFailure, AgentLastFailure, ProxyVersion}
	last  = []string{AgentHeartbeat, AgentStatus}
)

// Options say where and how to write. The zero value is right on a VM.
type Options struct {
	// of the metadata server, with an optional port; empty: $GCE_METADATA_HOST, else the
	// real one, by IPv4 or IPv6
	Host string
	Log  *zap.Logger // is told when the channel goes off, fails, recovers; nil: nobody is
	// Budget is a file, best below /run, whose modification time carries the budget over to the next
	// start and to other programs that write: else an agent that crashes every two seconds would spend
	// three tokens at each start. While it cannot be written a query is made each half a minute, and
	// none in the first half. Empty: each New starts with a full bucket.
	Budget string

	// Dial is a network of a test's own; nil: the VM's.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
}

// State is how the channel does. Counts are since [New].
type State struct {
	// false: the server refused with 403; tried again every two minutes
	Enabled   bool   `json:"enabled"`
	LastError string `json:"last_error,omitempty"` // of the last query; empty when it succeeded
	// when Enabled last changed, or LastError came or went; zero before the first query
	Since       time.Time `json:"since"`
	LastSuccess time.Time `json:"last_success,omitzero"` // of the last query that succeeded
	// values set and not yet written, aside from what waits: a heartbeat for its minute, the first
	// status, the change of a tail
	Pending  int    `json:"pending"`
	Writes   uint64 `json:"writes"`   // that succeeded
	Reads    uint64 `json:"reads"`    // read back
	Failures uint64 `json:"failures"` // queries of either kind that failed
	// values replaced by a newer one before they were written
	Superseded uint64 `json:"superseded"`
	Lost       uint64 `json:"lost"` // found gone when read back, and written again
	// found changed by somebody else when read back, and written again
	Changed uint64 `json:"changed"`

	// Left are the queries of the budget that may be made at once, of Most, of which PerMinute come
	// back in a minute; Next is when one more may be made, zero: now.
	Left      float64   `json:"left"`
	Most      float64   `json:"most"`
	PerMinute float64   `json:"per_minute"`
	Next      time.Time `json:"next,omitzero"`
}

// Writer keeps guest attributes equal to what was last Set. Make it with [New]. All methods may be
// called from any goroutine.
//
//	w := guestattr.New(guestattr.Options{Log: log})
//	go w.Run(ctx)
//	w.Set(guestattr.ProxyVersion, info.Version)
type Writer struct {
	base   string
	client *http.Client
	log    *zap.Logger
	tokens *rate.Limiter
	wake   chan struct{} // one slot
	budget string        // Options.Budget
	made   time.Time     // when New returned it
	full   time.Time     // when the bucket will be full again; used by Run alone

	mu sync.Mutex
	// unkept: the budget's file could not be written when last tried. It and spent, when the last
	// token was taken or Run began, are changed by Run alone.
	unkept  bool
	spent   time.Time
	values  map[string]*value
	state   State
	settled chan struct{} // closed and replaced when a query ended
	// others is what a key held that somebody else had changed, when that was last found.
	others   string
	othersAt time.Time
	notTill  time.Time     // no query before: back-off or probing
	backOff  time.Duration // the last one; 0: the last query succeeded
}

// value is one key.
type value struct {
	want    string
	written string
	head    int // of want, in bytes: what is urgent. The rest is its tail
	// written is what the server holds, as far as we know; false after a failed write,
	// which may have worked
	sure    bool
	since   time.Time // when it became dirty, or urgently so
	last    time.Time // last successful write; zero: never
	checked time.Time // last write or read back
}

func (v *value) dirty() bool { return !v.sure || v.want != v.written }

// urgent says whether more than the tail is to be written.
func (v *value) urgent() bool {
	return v.dirty() &&
		(!v.sure || v.head == len(v.want) || !strings.HasPrefix(v.written, v.want[:v.head]))
}

// doubt notes that the server may not hold what was written.
func (v *value) doubt(now time.Time) {
	if !v.urgent() {
		v.since = now
	}
	v.sure = false
}

// window is when a dirty value may be written, and when it shall be at the latest.
func (v *value) window(key string) (from, by time.Time) {
	from, by = v.since, v.since.Add(promise)
	switch {
	case key == BootstrapStatus: // it changes a few times in a VM's life, and everybody waits for it
		by = from
	case key == AgentHeartbeat && !v.last.IsZero():
		from = latest(from, v.last.Add(heartbeatEvery))
		by = from.Add(heartbeatPromise)
	case !v.urgent():
		from = latest(from, v.last.Add(minorEvery))
		by = from.Add(promise)
	case key == AgentStatus && v.last.IsZero():
		from = from.Add(statusRest)
	}
	return from, by
}

func latest(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}

// New returns a Writer. Nothing is sent before [Writer.Run].
func New(o Options) *Writer {
	host := cmp.Or(o.Host, os.Getenv(metadata.HostEnv), metadata.IPv4)
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	if o.Dial == nil {
		o.Dial = (&net.Dialer{Timeout: queryLimit}).DialContext
	}
	return &Writer{
		base: "http://" + host + "/computeMetadata/v1/instance/guest-attributes/" + Namespace + "/",
		client: &http.Client{
			// No proxy from the environment, no redirect: the metadata server is a neighbour. A query a
			// minute gains nothing from a kept connection, which would only be found dead.
			Transport: metadata.Transport{
				Base: &http.Transport{DialContext: o.Dial, DisableKeepAlives: true,
					MaxResponseHeaderBytes: 64 << 10}},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
			Timeout:       queryLimit,
		},
		log:     o.Log,
		tokens:  rate.NewLimiter(rate.Every(refill), burst),
		wake:    make(chan struct{}, 1),
		budget:  o.Budget,
		made:    time.Now(),
		values:  make(map[string]*value),
		state:   State{Enabled: true},
		settled: make(chan struct{}),
	}
}

// Set says what key shall hold from now on; it never blocks. The value becomes one line of at most
// [MaxValue] bytes (see [OneLine]). A key is absent until it is Set to something; from then on an
// empty value is written as such, since there is no known way to delete one.
func (w *Writer) Set(key, val string) { w.SetWithTail(key, val, "") }

// SetWithTail is Set of head and tail together, of which the tail changes often and may be old: a
// change of it alone is written at most every five minutes. One head must not begin with another.
func (w *Writer) SetWithTail(key, head, tail string) {
	val := OneLine(head+tail, MaxValue)
	urgent := len(val)
	if tail != "" {
		urgent = min(urgent, len(head))
	}
	now := time.Now()
	w.mu.Lock()
	v := w.values[key]
	switch {
	case v == nil && val == "":
		w.mu.Unlock()
		return
	case v == nil:
		w.values[key] = &value{want: val, head: urgent, since: now}
	case v.want == val:
		w.mu.Unlock()
		return
	default:
		dirty, wasUrgent := v.dirty(), v.urgent()
		if dirty {
			w.state.Superseded++
		}
		if v.want, v.head = val, urgent; !dirty || v.urgent() && !wasUrgent {
			v.since = now
		}
	}
	w.mu.Unlock()
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// State is a copy of how the channel does now.
func (w *Writer) State() State {
	w.mu.Lock()
	defer w.mu.Unlock()
	s, now := w.state, time.Now()
	s.Pending = w.pending(now)
	s.Left, s.Most = max(0, w.tokens.TokensAt(now)), burst
	s.PerMinute = float64(time.Minute) / float64(refill)
	if next := latest(w.token(now, 1), w.notTill); next.After(now) {
		s.Next = next
	}
	return s
}

// maxOthers is how much of another's value is told, in bytes, and othersFor for how long.
const (
	maxOthers = 100
	othersFor = 3 * checkEvery
)

// Others is what a key of ours held that somebody else had written, when it was last read back:
// "KEY: VALUE". Anybody on the VM may write there. "": nothing, or it is long ago.
func (w *Writer) Others() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.othersAt.IsZero() || time.Since(w.othersAt) > othersFor {
		return ""
	}
	return w.others
}

// Flush returns nil when all that was Set has been written, with an error when the channel is off
// or ctx ends first. Run must be running. It is for a program that is about to end; the budget may
// make it wait 20 seconds a value.
func (w *Writer) Flush(ctx context.Context) error {
	for {
		w.mu.Lock()
		pending, enabled, last, settled := w.pending(time.Now()), w.state.Enabled,
			w.state.LastError, w.settled
		w.mu.Unlock()
		switch {
		case pending == 0:
			return nil
		case !enabled:
			return fmt.Errorf("write guest attributes: %s", last)
		}
		select {
		case <-settled:
		case <-ctx.Done():
			if last != "" {
				return fmt.Errorf("write %d guest attributes: %s", pending, last)
			}
			return fmt.Errorf("write %d guest attributes: %w", pending, ctx.Err())
		}
	}
}

// Run writes until ctx ends, which cuts a query short, and returns nil then.
func (w *Writer) Run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	w.mu.Lock()
	w.spent = time.Now() // what the program before this one spent last may not be in the file
	w.mu.Unlock()
	for ctx.Err() == nil {
		now := time.Now()
		w.loadBudget(now)
		w.mu.Lock()
		key, read, at := w.next(now)
		w.mu.Unlock()
		tokens := 1
		if read {
			tokens = 2 // one stays for news
		}
		if wait := w.token(now, tokens); at.Before(wait) {
			at = wait
		}
		if key != "" && !at.After(now) && w.take(now) {
			w.query(ctx, key, read)
			continue
		}
		var due <-chan time.Time
		if key != "" {
			// A token is there a hair later than computed in floating point, or another
			// program holds the file.
			timer.Reset(max(at.Sub(now), time.Millisecond))
			due = timer.C
		}
		select {
		case <-ctx.Done():
		case <-w.wake:
		case <-due:
		}
	}
	return nil
}

// token is when so many tokens may be taken.
func (w *Writer) token(now time.Time, tokens int) time.Time {
	missing := float64(tokens) - w.tokens.TokensAt(now)
	at := now.Add(time.Duration(max(missing, 0) * float64(refill)))
	if w.unkept {
		at = latest(at, w.spent.Add(unkeptEvery))
	}
	return at
}

// loadBudget takes out of the bucket what others have taken, by the file. One from the future,
// after a clock step, counts as an empty bucket.
func (w *Writer) loadBudget(now time.Time) {
	if w.budget == "" {
		return
	}
	fi, err := os.Lstat(w.budget) // as setTime: what a link leads to may look like the future for ever
	if err != nil {
		return // the first start, or take will say what is wrong
	}
	full := fi.ModTime()
	if empty := now.Add(burst * refill); full.After(empty) {
		full = empty
		if setTime(w.budget, full) != nil {
			return // it would look as empty at each look; take finds it unkept
		}
	}
	known := now
	if w.full.After(now) {
		known = w.full
	}
	if full.After(known) {
		w.full = full
		w.tokens.ReserveN(now, int((full.Sub(known)+refill-1)/refill))
	}
}

// take takes a token, of which no other program with this file takes the same. The file says so
// before it is spent, so that a kill in between loses a token and gains none.
//
// What cannot be in the file is lost to the next start, which takes up to five in a minute by what
// the file says. Hence the pause then, from this start and from each query: with it there is one
// more in any minute, of whatever programs in a row.
func (w *Writer) take(now time.Time) bool {
	if w.budget == "" {
		return w.tokens.AllowN(now, 1)
	}
	f, made, err := openBudget(w.budget)
	if err == nil {
		defer f.Close() // and with it the lock
		// Not to wait for: the other user of the file, who may be anyone, must not hold us up.
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
			return false
		}
		if !made {
			w.loadBudget(now)
		}
	}
	if w.tokens.TokensAt(now) < 1 {
		return false
	}
	full := latest(w.full, now).Add(refill)
	if err == nil {
		err = setTime(w.budget, full)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.keptBudget(err)
	if w.unkept && now.Before(w.spent.Add(unkeptEvery)) || !w.tokens.AllowN(now, 1) {
		return false
	}
	w.full, w.spent = full, now
	return true
}

// keptBudget books whether the file could be written; w.mu is held.
func (w *Writer) keptBudget(err error) {
	switch {
	case err != nil && !w.unkept:
		w.log.Warn("guest attribute budget is not kept for the next start, writing less",
			zap.Duration("every", unkeptEvery), zap.Error(err))
	case err == nil && w.unkept:
		w.log.Info("guest attribute budget is kept again")
	}
	w.unkept = err != nil
}

// openBudget opens the file, and makes it where it is missing: for the folder's owner, who
// must be able to set its time too when this is root's process (bootstrap, beside the daemon).
// Links are not followed.
func openBudget(name string) (f *os.File, made bool, err error) {
	for range 2 { // another may make it at the same time
		f, err = os.OpenFile(name, os.O_WRONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		if !errors.Is(err, fs.ErrNotExist) {
			return f, false, err
		}
		f, err = os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if !errors.Is(err, fs.ErrExist) {
			break
		}
	}
	if err != nil {
		return nil, false, err
	}
	var folder unix.Stat_t
	if err = unix.Stat(filepath.Dir(name), &folder); err == nil && os.Geteuid() == 0 {
		err = f.Chown(int(folder.Uid), int(folder.Gid))
	}
	if err != nil {
		f.Close()
		return nil, false, fmt.Errorf("give %q to its folder's owner: %w", name, err)
	}
	return f, true, nil
}

// setTime sets when a file was modified, to the nanosecond.
func setTime(name string, at time.Time) error {
	times := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, unix.NsecToTimespec(at.UnixNano())}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, name, times, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &fs.PathError{Op: "set time of", Path: name, Err: err}
	}
	return nil
}

// next chooses what to do next and says when: a key to write or to read back; no key when there
// is nothing to do ever.
func (w *Writer) next(now time.Time) (key string, read bool, at time.Time) {
	var may []string // be written now
	for k, v := range w.values {
		if !v.dirty() {
			continue
		}
		from, _ := v.window(k)
		switch {
		case !from.After(now):
			may = append(may, k)
		case key == "" || from.Before(at):
			key, at = k, from
		}
	}
	if len(may) > 0 {
		before := func(a, b string) int { return w.compare(now, a, b) }
		return slices.MinFunc(may, before), false, latest(now, w.notTill)
	}
	// Nothing to write now: read back the value looked at longest ago. The heartbeat heals by
	// itself within a minute.
	var oldest string
	for k, v := range w.values {
		if k != AgentHeartbeat && !v.dirty() &&
			(oldest == "" || v.checked.Before(w.values[oldest].checked)) {
			oldest = k
		}
	}
	if oldest != "" {
		if due := w.values[oldest].checked.Add(checkEvery); key == "" || due.Before(at) {
			return oldest, true, latest(due, w.notTill)
		}
	}
	return key, false, latest(at, w.notTill)
}

// compare is less than 0 when key a is to be written before b.
func (w *Writer) compare(now time.Time, a, b string) int {
	at := func(k string) (in time.Duration, rank int) {
		v := w.values[k]
		if k == AgentLastFailure && now.Sub(v.since) >= failureLate {
			return math.MinInt64, 0
		}
		_, by := v.window(k)
		if rank = slices.Index(first, k); rank < 0 {
			rank = len(first) + 1 + slices.Index(last, k)
		}
		// What is set together shall be there together, hence whole seconds. Not of the time itself:
		// Truncate takes the monotonic clock from it, and a wall clock that has been set back by six
		// hours would leave the heartbeat behind all others for so long.
		return by.Sub(w.made).Truncate(time.Second), rank
	}
	inA, rankA := at(a)
	inB, rankB := at(b)
	return cmp.Or(cmp.Compare(inA, inB), cmp.Compare(rankA, rankB), cmp.Compare(a, b))
}

func (w *Writer) pending(now time.Time) int {
	n := 0
	for k, v := range w.values {
		if from, _ := v.window(k); v.dirty() && !from.After(now) {
			n++
		}
	}
	return n
}

// query makes one write or read and books its outcome.
func (w *Writer) query(ctx context.Context, key string, read bool) {
	w.mu.Lock()
	sent := w.values[key].want
	w.mu.Unlock()
	var found string
	var err error
	if read {
		found, err = w.get(ctx, key)
	} else {
		err = w.put(ctx, key, sent)
	}
	if ctx.Err() != nil {
		return // cut short by us: no verdict
	}

	now := time.Now()
	w.mu.Lock()
	defer w.mu.Unlock()
	defer func() {
		close(w.settled)
		w.settled = make(chan struct{})
	}()
	v := w.values[key]
	var status *statusError
	errors.As(err, &status)
	switch {
	case read && status != nil && status.code == http.StatusNotFound:
		w.state.Reads++
		w.state.Lost++
		v.doubt(now)
		w.log.Warn("guest attribute was lost, writing it again", zap.String("key", key))
	case err != nil:
		if !read {
			v.doubt(now)
		}
		w.failed(now, err, status != nil && status.code == http.StatusForbidden)
		return
	case read:
		w.state.Reads++
		v.checked = now
		if found != v.written {
			w.state.Changed++
			v.doubt(now)
			w.log.Warn("guest attribute was changed by others, writing it again", zap.String("key", key))
			w.others, w.othersAt = fmt.Sprintf("%s: %q", key, OneLine(found, maxOthers)), now
		}
	default:
		w.state.Writes++
		v.written, v.sure, v.last, v.checked, v.since = sent, true, now, now, now
	}
	w.succeeded(now)
}

func (w *Writer) failed(now time.Time, err error, forbidden bool) {
	w.state.Failures++
	wasEnabled, wasFine := w.state.Enabled, w.state.LastError == ""
	// Once refused, off until a query succeeds: a time-out in between is no news.
	// See docs/design/facts.md#gce-guest-attributes-off.
	w.state.Enabled = wasEnabled && !forbidden
	w.state.LastError = err.Error()
	if wasEnabled != w.state.Enabled || wasFine {
		w.state.Since = now
	}
	if !w.state.Enabled {
		w.backOff, w.notTill = firstBackOff, now.Add(probeEvery)
		if wasEnabled {
			w.log.Warn("guest attributes are refused, set enable-guest-attributes=TRUE in the VM's metadata",
				zap.Error(err))
		}
		return
	}
	w.backOff = min(max(2*w.backOff, firstBackOff), maxBackOff)
	w.notTill = now.Add(w.backOff)
	if wasFine {
		w.log.Warn("guest attributes cannot be written", zap.Error(err))
	}
}

func (w *Writer) succeeded(now time.Time) {
	if w.state.LastError != "" {
		w.log.Info("guest attributes are written again", zap.Duration("after", now.Sub(w.state.Since)))
	}
	if !w.state.Enabled {
		// What the VM held before it was disabled may be gone. The value just written is not.
		for _, v := range w.values {
			if !v.last.Equal(now) {
				v.doubt(now)
			}
		}
	}
	if w.state.LastError != "" || w.state.Since.IsZero() {
		w.state.Since = now
	}
	w.state.Enabled, w.state.LastError, w.state.LastSuccess = true, "", now
	w.backOff, w.notTill = 0, time.Time{}
}

// statusError is an answer other than 200.
type statusError struct {
	code int
	body string
}

func (e *statusError) Error() string {
	if e.body == "" {
		return fmt.Sprintf("%d %s", e.code, http.StatusText(e.code))
	}
	return fmt.Sprintf("%d %s", e.code, e.body)
}

func (w *Writer) put(ctx context.Context, key, val string) error {
	if _, err := w.do(ctx, http.MethodPut, key, val); err != nil {
		return fmt.Errorf("write guest attribute %s: %w", key, err)
	}
	return nil
}

func (w *Writer) get(ctx context.Context, key string) (string, error) {
	body, err := w.do(ctx, http.MethodGet, key, "")
	if err != nil {
		return "", fmt.Errorf("read guest attribute %s: %w", key, err)
	}
	return body, nil
}

func (w *Writer) do(ctx context.Context, method, key, body string) (string, error) {
	var send io.Reader
	if method == http.MethodPut {
		send = strings.NewReader(body)
	}
	req, err := http.NewRequestWithContext(ctx, method, w.base+url.PathEscape(key), send)
	if err != nil {
		return "", err
	}
	req.Header.Set("Metadata-Flavor", "Google")
	res, err := w.client.Do(req)
	if err != nil {
		var u *url.Error
		if errors.As(err, &u) {
			if u.Timeout() {
				return "", fmt.Errorf("no answer from the metadata server within %v", queryLimit)
			}
			err = u.Err // the URL says nothing new
		}
		return "", err
	}
	defer res.Body.Close()
	// One byte more than any value of ours: a longer one differs anyway.
	var answer bytes.Buffer
	_, err = io.Copy(&answer, io.LimitReader(res.Body, MaxValue+1))
	if res.StatusCode != http.StatusOK {
		return "", &statusError{res.StatusCode, OneLine(answer.String(), 200)}
	}
	if err != nil && method == http.MethodGet {
		return "", err
	}
	return answer.String(), nil
}

// OneLine makes s fit for one line of at most limit bytes (at least 3): line breaks, what else a
// terminal obeys or does not show (control characters, marks that turn the direction of writing)
// and runs of space become one space, invalid UTF-8 the replacement character; what is too long is
// cut between characters and ends in "…".
func OneLine(s string, limit int) string {
	s = strings.ToValidUTF8(s, "\uFFFD")
	s = strings.Join(strings.FieldsFunc(s, func(r rune) bool {
		return unicode.IsSpace(r) || !unicode.IsPrint(r)
	}), " ")
	if len(s) <= limit {
		return s
	}
	const mark = "…"
	end := limit - len(mark)
	for !utf8.RuneStart(s[end]) { // the first byte is one
		end--
	}
	return s[:end] + mark
}
