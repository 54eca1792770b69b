package envoyadmin

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strconv"
	"time"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/internal/redaction"
)

// LogKind tells what a line of Envoy's log is about.
type LogKind uint8

const (
	// a configuration of another kind was rejected: see Message and Details
	Other LogKind = iota
	// a listener came, changed or went; or the workers were started (without Listener)
	ListenerChanged
	ListenerRejected // see Details
	// the configuration stream from the control plane ended: see Code and Message
	StreamClosed
	// the log itself cannot be read, see Details, or can again (no Details); it is tried each second
	LogUnreadable
	// an Envoy starts: see Epoch
	EnvoyStarts
	// the log is not there, see Details: Envoy may never have run; LogUnreadable tells its end
	LogMissing
)

// LogEvent is what a line of the log says, or many equal lines. Its texts hold nothing of a
// configuration that Envoy quotes (redaction.Text).
type LogEvent struct {
	Kind     LogKind
	Listener string // by name
	Details  string // why it was rejected, in Envoy's words
	Method   string // of the stream: StreamAggregatedResources, DeltaAggregatedResources, …
	Target   string // of the stream, where Envoy names it
	Code     int    // gRPC status of the stream
	// of the stream, in the control plane's words, often empty; or the type of what was rejected
	Message string
	Count   int // how many equal lines this stands for, at least 1
	Epoch   int // above 0: it is about to take over from the Envoy before it (hot restart)
	Dropped int // different lines before this one that nobody took and that were too many to keep
}

// Limits of the log reader. In a storm (a control plane that answers each rejection at once: 1,300
// a second were seen, each with two lines) the file is read in pieces instead of line by line, and
// equal events become one. See docs/design/facts.md#envoy-rejection-storm.
const (
	// bytes of a line that are looked at; rejections of large listeners are long
	maxLine = 8 << 10
	// bytes written since the last read: of more, only the last are read
	maxBehind = 16 << 20
	readSize  = 64 << 10 // bytes of one read
	// reads in a row that wait for nothing: a change of a service takes some six lines, of which
	// the one of the listener is the last
	atOnce = 16
	minGap = 10 * time.Millisecond  // after those
	maxGap = 200 * time.Millisecond // between reads in a storm: what a hint may come late then
	// the file is looked at this often even if inotify is silent: a new file, a truncation
	logPoll   = 1 * time.Second
	sameEvent = 5 * time.Second // an event that only repeats is told this often
	maxEvents = 256             // different events that are remembered
)

var (
	// "StreamAggregatedResources gRPC config stream closed: 5, …" and, later, "… stream to TARGET
	// closed: 5, …", both perhaps with "closed since 32s ago: …" and, at the end, "(previously
	// 14, … since 35s ago)".
	streamClosed = regexp.MustCompile(
		`^ gRPC config stream (?:to (\S+) )?closed(?: since \d+s ago)?: (\d+), ?(.*)`)
	// Envoy 1.40 puts where a status came from behind the server's words: "Permission
	// denied.{via_upstream}".
	via        = regexp.MustCompile(`\{[a-z_]+\}$`)
	previously = regexp.MustCompile(` \(previously \d+, .* since \d+s ago\)$`)
	// "[…][info][main] […] initializing epoch 1 (base id=0, hot restart version=11.104)"
	envoyStarts = regexp.MustCompile(`\] initializing epoch (\d+) \(`)
)

// What stands in each line that tells something.
const (
	streamMark   = " gRPC config stream "
	rejectedMark = " rejected: "
	changedMark  = "lds: "
	workersMark  = "starting workers"
	startMark    = "] initializing epoch "
)

var marks = [...]string{streamMark, rejectedMark, changedMark, workersMark, startMark}

// parseLine says what a line of the log is about; ok is false if it is nothing of ours.
// StreamLoadStats is load reporting and StreamHealthCheck health checking: their end says nothing
// about the configuration.
//
// What stands first in a line decides: a listener's name, and the server's words, come behind it,
// and may hold what looks like any of these.
func parseLine(line []byte) (e LogEvent, ok bool) {
	e.Count = 1
	first := len(line)
	at := func(marker string) bool { // closer to the beginning than those before
		i := bytes.Index(line[:first], []byte(marker))
		if i >= 0 {
			first = i
		}
		return i >= 0
	}
	stream := at(streamMark)
	rejected := at(rejectedMark)
	changed := at(changedMark)
	workers := at(workersMark)
	epoch := at(startMark)
	switch {
	case epoch:
		m := envoyStarts.FindSubmatch(line)
		if m == nil {
			return e, false
		}
		epoch, err := strconv.Atoi(string(m[1]))
		e.Kind, e.Epoch = EnvoyStarts, epoch
		return e, err == nil
	case workers:
		e.Kind = ListenerChanged
		return e, true
	case changed:
		if name, ok := changedListener(line[first+len(changedMark):]); ok {
			e.Kind, e.Listener = ListenerChanged, string(name)
			return e, true
		}
		if bytes.Contains(line, []byte(rejectedMark)) {
			return parseRejected(line)
		}
	case rejected:
		return parseRejected(line)
	case stream:
		method := lastWord(line[:first])
		m := streamClosed.FindSubmatch(line[first:])
		if m == nil || method == "" || method == "StreamLoadStats" || method == "StreamHealthCheck" {
			return e, false
		}
		code, err := strconv.Atoi(string(m[2]))
		if err != nil {
			return e, false
		}
		e.Kind, e.Method, e.Target, e.Code = StreamClosed, method, string(m[1]), code
		e.Message = string(via.ReplaceAll(previously.ReplaceAll(m[3], nil), nil))
		return e, true
	}
	return e, false
}

// lastWord is the word that a text ends with, "" where it ends with none.
func lastWord(text []byte) string {
	begin := len(text)
	for begin > 0 && wordCharacter(text[begin-1]) {
		begin--
	}
	return string(text[begin:])
}

func wordCharacter(c byte) bool {
	return c == '_' || '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
}

// changedListener is the name in "add/update listener 'NAME'" or "remove listener 'NAME'".
func changedListener(text []byte) (name []byte, ok bool) {
	text, ok = bytes.CutPrefix(text, []byte("add/update listener '"))
	if !ok {
		text, ok = bytes.CutPrefix(text, []byte("remove listener '"))
	}
	end := bytes.LastIndexByte(text, '\'')
	if !ok || end < 0 {
		return nil, false
	}
	return text[:end], true
}

// parseRejected reads the lines of rejections, by cuts: in a storm there are thousands a second,
// and a regular expression takes ten times as long.
//
//	lds: listener 'N' config rejected: WHY
//	gRPC config for TYPE rejected: WHY             up to 1.9 "update rejected"
//	delta config for TYPE rejected: WHY
//	Filesystem config update rejected: WHY
//
// Of listeners, WHY begins with "Error adding/updating listener(s) NAME: " but in the first.
func parseRejected(line []byte) (e LogEvent, ok bool) {
	e.Count = 1
	before, why, _ := bytes.Cut(line, []byte(rejectedMark))
	if _, name, found := bytes.Cut(before, []byte("lds: listener '")); found {
		if name, found = bytes.CutSuffix(name, []byte("' config")); found {
			e.Kind, e.Listener, e.Details = ListenerRejected, string(name), string(why)
			return e, true
		}
	}
	before = bytes.TrimSuffix(before, []byte(" update"))
	var kind []byte
	if i := bytes.LastIndex(before, []byte(" config for ")); i >= 0 {
		kind = before[i+len(" config for "):]
	} else if !bytes.HasSuffix(before, []byte(" config")) {
		return e, false
	}
	if rest, found := bytes.CutPrefix(why, []byte("Error adding/updating listener(s) ")); found {
		if name, details, found := bytes.Cut(rest, []byte(": ")); found {
			e.Kind, e.Listener, e.Details = ListenerRejected, string(name), string(details)
			return e, true
		}
	}
	e.Message, e.Details = string(kind), string(why)
	if bytes.HasSuffix(kind, []byte(".Listener")) {
		e.Kind, e.Message = ListenerRejected, ""
	}
	return e, true
}

// FollowLog follows Envoy's log from its end until ctx is done, and then closes the channel. It
// holds a file that was renamed until the new one appears, begins a truncated one (logrotate's
// copytruncate) at its start, and waits for one that is missing. What nobody takes from the channel
// is kept, equal events as one.
// See docs/design/facts.md#envoy-log-names-listeners and docs/design/facts.md#envoy-keeps-its-log.
//
// The events are hints: a line can be missed while the log is rotated, so the masked dump decides,
// asked for by polling too.
func FollowLog(ctx context.Context, path string) <-chan LogEvent {
	out := make(chan LogEvent)
	f := &follower{path: path, out: out, told: map[LogEvent]*repeats{}}
	// Before returning, so that what is logged from now on is seen. What stood
	// there before is not news.
	f.open(true)
	go func() {
		defer close(out)
		f.run(ctx)
	}()
	return out
}

// follower is the state of FollowLog.
type follower struct {
	path  string
	out   chan<- LogEvent
	watch *fsnotify.Watcher // nil: no inotify to be had, polling alone

	file       *os.File
	offset     int64
	buffer     []byte // the start of a line whose end is not written yet, at most maxLine of it
	unreadable string // the last LogUnreadable or LogMissing

	queue   []LogEvent
	told    map[LogEvent]*repeats // by the event with Count and Dropped zero
	dropped int
}

// repeats is what is remembered of an event that was told.
type repeats struct {
	at    time.Time // told
	count int       // since then
}

func (f *follower) run(ctx context.Context) {
	var events chan fsnotify.Event
	var errs chan error
	if f.watch != nil {
		events, errs = f.watch.Events, f.watch.Errors
		defer f.watch.Close()
	}
	defer f.close()
	poll := time.NewTicker(logPoll)
	defer poll.Stop()
	var pace readPace
	var quiet <-chan time.Time // set while inotify is not listened to
	for {
		var out chan<- LogEvent
		var next LogEvent
		if len(f.queue) > 0 {
			out, next = f.out, redacted(f.queue[0])
			next.Dropped = f.dropped
		}
		listen, listenErrs := events, errs
		if quiet != nil {
			// fsnotify is stuck in handing over an event, and the kernel makes one of all equal events
			// that follow: no wake-ups.
			listen, listenErrs = nil, nil
		}
		select {
		case <-ctx.Done():
			return
		case out <- next:
			f.queue = f.queue[1:]
			f.dropped = 0
			continue
		case <-listen:
		case <-listenErrs: //nolint:errcheck // it is an overflow: there is news
		case <-quiet:
			quiet = nil
		case <-poll.C:
			f.repeat(time.Now())
			f.reopen()
		}
		switch {
		case f.read():
			if gap := pace.found(); gap > 0 {
				quiet = time.After(gap)
			}
		case quiet == nil:
			pace = readPace{}
		}
	}
}

// readPace is how long the follower rests after reads that found something. The zero value is that
// after one that found nothing.
type readPace struct {
	reads int
	gap   time.Duration
}

// found is the rest after another read that found something.
func (p *readPace) found() time.Duration {
	if p.reads++; p.reads > atOnce {
		p.gap = min(max(minGap, 2*p.gap), maxGap)
	}
	return p.gap
}

// open opens the file. Only a regular file is read, and a symbolic link is not followed: the folder
// may be another user's.
func (f *follower) open(atEnd bool) {
	if f.watch == nil {
		// fails past fs.inotify.max_user_instances: then polling must do
		f.watch, _ = fsnotify.NewWatcher()
	}
	file, err := os.OpenFile(f.path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		f.complain(err)
		return
	}
	info, err := file.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = errors.New("it is no regular file")
	}
	if err != nil {
		file.Close()
		f.complain(fmt.Errorf("open %q: %w", f.path, err))
		return
	}
	f.file, f.offset, f.buffer = file, 0, nil
	f.complain(nil)
	if atEnd {
		f.offset = info.Size()
	}
	if f.watch != nil {
		_ = f.watch.Remove(f.path) // fails where the file is another by now
		_ = f.watch.Add(f.path)    // fails past fs.inotify.max_user_watches
	}
}

func (f *follower) close() {
	if f.file != nil {
		f.file.Close()
		f.file = nil
	}
}

// complain tells once why the log cannot be read, and with nil that it can.
func (f *follower) complain(err error) {
	e := LogEvent{Kind: LogUnreadable, Count: 1}
	if err != nil {
		e.Details = err.Error()
	}
	if errors.Is(err, os.ErrNotExist) {
		e.Kind = LogMissing
	}
	if e.Details == f.unreadable {
		return
	}
	f.unreadable = e.Details
	f.queue = append(slices.DeleteFunc(f.queue, func(e LogEvent) bool {
		return e.Kind == LogUnreadable || e.Kind == LogMissing // the newest counts
	}), e)
}

// reopen takes the file that now has the name, once the old one is read to its end.
func (f *follower) reopen() {
	if f.file == nil {
		f.open(false) // all of it is new: it was not there a second ago
		return
	}
	named, err := os.Lstat(f.path)
	if err != nil {
		return // renamed, and no new one yet: Envoy may still write to the old one
	}
	if ours, err := f.file.Stat(); err == nil && os.SameFile(named, ours) {
		return
	}
	for f.read() {
	}
	f.close()
	f.open(false)
}

// read takes in what was written since the last time, up to a limit, and says
// whether there was anything.
func (f *follower) read() bool {
	if f.file == nil {
		return false
	}
	info, err := f.file.Stat()
	if err != nil {
		return false
	}
	if info.Size() < f.offset {
		f.offset, f.buffer = 0, nil // truncated; what was written before and not read is lost
	}
	if info.Size() == f.offset {
		return false
	}
	if info.Size()-f.offset > maxBehind {
		f.offset, f.buffer = info.Size()-maxBehind, nil
	}
	now := time.Now()
	piece := make([]byte, readSize)
	// Not past the size seen: a writer that is faster than this reader must not keep it here.
	for f.offset < info.Size() {
		n, err := f.file.ReadAt(piece[:min(int64(len(piece)), info.Size()-f.offset)], f.offset)
		f.offset += int64(n)
		f.feed(piece[:n], now)
		if err != nil {
			if !errors.Is(err, io.EOF) {
				f.complain(err)
			}
			break
		}
	}
	return true
}

// feed takes in the next bytes of the file.
func (f *follower) feed(piece []byte, now time.Time) {
	for len(piece) > 0 {
		end := bytes.IndexByte(piece, '\n')
		line := piece
		if end >= 0 {
			line = piece[:end]
		}
		switch {
		case end >= 0 && len(f.buffer) == 0: // the usual case, without a copy
			f.line(line[:min(len(line), maxLine)], now)
		default:
			f.buffer = append(f.buffer, line[:min(len(line), maxLine-len(f.buffer))]...)
			if end >= 0 {
				f.line(f.buffer, now)
				f.buffer = f.buffer[:0]
			}
		}
		if end < 0 {
			return
		}
		piece = piece[end+1:]
	}
}

func (f *follower) line(line []byte, now time.Time) {
	if e, ok := parseLine(line); ok {
		f.push(e, now)
	}
}

// push queues an event, or counts it where an equal one waits or was told just now.
func (f *follower) push(e LogEvent, now time.Time) {
	for i := range f.queue {
		if q := &f.queue[i]; same(*q) == same(e) {
			q.Count += e.Count
			return
		}
	}
	if known := f.told[same(e)]; known != nil && e.Kind != ListenerChanged &&
		now.Sub(known.at) < sameEvent {
		known.count += e.Count
		return
	}
	if len(f.queue) == maxEvents {
		f.dropped += e.Count
		return
	}
	f.queue = append(f.queue, e)
	if e.Kind == ListenerChanged {
		return // each is a hint of its own
	}
	if len(f.told) >= maxEvents {
		for key, r := range f.told {
			if now.Sub(r.at) >= sameEvent {
				delete(f.told, key)
			}
		}
	}
	if len(f.told) < maxEvents {
		f.told[same(e)] = &repeats{at: now}
	}
}

// repeat tells of events that went on after they were told.
func (f *follower) repeat(now time.Time) {
	for key, r := range f.told {
		if now.Sub(r.at) < sameEvent {
			continue
		}
		delete(f.told, key)
		if r.count > 0 {
			key.Count = r.count
			f.push(key, now)
		}
	}
}

// redacted is an event as it may be told. It is not made of each line: in a storm there are
// thousands a second, and few different ones.
func redacted(e LogEvent) LogEvent {
	e.Details, e.Message, e.Target = redaction.Text(e.Details), redaction.Text(e.Message),
		redaction.Text(e.Target)
	return e
}

// same is an event without its counts.
func same(e LogEvent) LogEvent {
	e.Count, e.Dropped = 0, 0
	return e
}

// Tail returns the last bytes of a log, at most limit, but for a line whose beginning is not among
// them: it may be a quoted value's second half, which package redaction could not tell from other
// text.
func Tail(log *os.File, limit int64) ([]byte, error) {
	info, err := log.Stat()
	if err != nil {
		return nil, err
	}
	size := min(info.Size(), limit+1) // one more: it may end the line before
	text := make([]byte, size)
	n, err := log.ReadAt(text, info.Size()-size)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	text = text[:n]
	if size > limit {
		_, text, _ = bytes.Cut(text, []byte("\n"))
	}
	return text, nil
}

// LastError returns the last entry of level error or critical in the log's last 64 KiB, without its
// time and source: what Envoy said before it ended. It is empty if there is none. An entry may have
// many lines; what is told of it is redaction.Text.
func LastError(path string) (string, error) {
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() {
		return "", fmt.Errorf("read %q: it is no regular file", path)
	}
	tail, err := Tail(file, readSize)
	if err != nil {
		return "", fmt.Errorf("read %q: %w", path, err)
	}
	lines := bytes.Split(tail, []byte("\n"))
	for i := len(lines) - 1; i >= 0; i-- {
		m := errorLine.FindSubmatch(lines[i])
		if m == nil {
			continue
		}
		entry := [][]byte{m[1]}
		for _, line := range lines[i+1:] {
			if entryStart.Match(line) {
				break
			}
			entry = append(entry, line)
		}
		text := redaction.Text(string(bytes.Join(entry, []byte("\n"))))
		return text[:min(len(text), 1<<10)], nil
	}
	return "", nil
}

// "[2026-01-02 03:04:05.678][123][critical][main] [source/server/server.cc:127] error
// initializing configuration …"
var entryStart = regexp.MustCompile(`^\[[^]]*\]\[\d+\]\[\w+\]`)
var errorLine = regexp.MustCompile(
	`^\[[^]]*\]\[\d+\]\[(?:error|critical)\]\[[^]]*\] (?:\[[^]]*\] )?(.*)$`)
