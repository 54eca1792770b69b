package report

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
)

// Severity is one of Cloud Logging's names.
type Severity string

// The severities of lines on the serial port.
const (
	Info    Severity = "INFO"
	Warning Severity = "WARNING"
	Error   Severity = "ERROR"
)

const (
	maxLine     = 1024 // bytes of a message; at 9600 baud one second
	maxQueue    = 64   // lines
	reopenFirst = time.Second
	reopenLast  = 30 * time.Second
	blockedFrom = 5 * time.Second
)

// Serial writes lines to serial port 1, which `gcloud compute instances get-serial-port-output`
// shows even when the VM's network is broken. Make it with [NewSerial]. The format has a version,
// after the slash, that changes when a line that was understood before would no longer be:
//
//	2006-01-02T15:04:05.0000Z service-proxy-agent/1 SEVERITY: message
//
// in UTC, with a message of one line. A port nobody drains blocks, so writes wait in Run alone; a
// line more than 64 waiting drops the oldest, and the port is told how many were dropped once it
// takes lines again. A missing device is looked for again, at most each 30 s.
// See docs/design/facts.md#gce-serial-port-blocks.
type Serial struct {
	path string
	open func(path string) (device, error)
	wake chan struct{} // one slot

	mu      sync.Mutex
	queue   []string
	missed  uint64 // dropped since the last line that got through
	state   SerialState
	writing time.Time // when the write under way began; zero: none
}

// SerialState is how the port does. Counts are since [NewSerial].
type SerialState struct {
	Path string `json:"path"` // empty: off
	Open bool   `json:"open"`
	// a line has been waiting for the device for five seconds
	Blocked   bool   `json:"blocked,omitempty"`
	LastError string `json:"last_error,omitempty"` // why it is not open
	Lines     uint64 `json:"lines"`                // written
	Dropped   uint64 `json:"dropped"`              // lines that found the queue full for too long
	Failures  uint64 `json:"failures"`             // to open the device, or to write a line
	Waiting   int    `json:"waiting"`              // lines in the queue, which holds 64
	// when the last line was written
	LastSuccess time.Time `json:"last_success,omitzero"`
}

// NewSerial returns a Serial for the device at path; with an empty path nothing is ever written.
// The device is opened by [Serial.Run].
func NewSerial(path string) *Serial {
	return &Serial{path: path, open: openDevice, wake: make(chan struct{}, 1),
		state: SerialState{Path: path}}
}

// Say queues one line and never blocks. Line breaks in message become spaces, and what is longer
// than 1024 bytes is cut.
func (s *Serial) Say(severity Severity, message string) {
	if s.path == "" {
		return
	}
	line := formatLine(time.Now(), severity, message)
	s.mu.Lock()
	if len(s.queue) == maxQueue {
		s.queue = slices.Delete(s.queue, 0, 1)
		s.drop()
	}
	s.queue = append(s.queue, line)
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// State is a copy of how the port does now.
func (s *Serial) State() SerialState {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.state
	st.Waiting = len(s.queue)
	st.Blocked = !s.writing.IsZero() && time.Since(s.writing) >= blockedFrom
	return st
}

// Run writes what is said until ctx ends, which also ends a write that is blocked, and returns nil
// then. What is queued at the end gets through only if the device takes it at once.
func (s *Serial) Run(ctx context.Context) error {
	if s.path == "" {
		<-ctx.Done()
		return nil
	}
	retry := reopenFirst
	for {
		before := s.State().Lines
		err := s.session(ctx)
		if ctx.Err() != nil {
			return nil
		}
		s.mu.Lock()
		s.state.Open, s.state.LastError = false, err.Error()
		s.state.Failures++
		if s.state.Lines != before {
			retry = reopenFirst // it worked for a while
		}
		s.mu.Unlock()
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(retry):
		}
		retry = min(2*retry, reopenLast)
	}
}

// device is what lines are written to: an *os.File, or a test's.
type device interface {
	io.WriteCloser
	SetWriteDeadline(t time.Time) error
}

func openDevice(path string) (device, error) {
	// O_NONBLOCK: opening a port without carrier would wait for one. Writes wait in Go's poller, where
	// a deadline can end them. O_NOCTTY: else the port may become this process's terminal, and its
	// hang-up our SIGHUP. No O_CREATE: a device that is missing must not become a file.
	return os.OpenFile(path,
		os.O_WRONLY|os.O_APPEND|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
}

// session opens the device and writes until that fails or ctx ends.
func (s *Serial) session(ctx context.Context) error {
	f, err := s.open(s.path)
	if err != nil {
		return fmt.Errorf("open serial port: %w", err)
	}
	defer f.Close()
	stop := context.AfterFunc(ctx, func() {
		_ = f.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	})
	defer stop()
	s.mu.Lock()
	s.state.Open, s.state.LastError = true, ""
	s.mu.Unlock()
	for {
		line, tells, ok := s.next()
		if !ok {
			select {
			case <-s.wake:
				continue
			case <-ctx.Done():
				return nil
			}
		}
		_, err := io.WriteString(f, line)
		s.wrote(line, tells, err)
		if err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				return nil
			}
			return fmt.Errorf("write to serial port: %w", err)
		}
	}
}

// next takes the next line off the queue, or one that tells of so many that were dropped.
func (s *Serial) next() (line string, tells uint64, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.missed > 0:
		line = formatLine(time.Now(), Warning,
			fmt.Sprintf("%d lines dropped: the serial port did not take them", s.missed))
		tells, s.missed = s.missed, 0
	case len(s.queue) > 0:
		line = s.queue[0]
		s.queue = slices.Delete(s.queue, 0, 1)
	default:
		return "", 0, false
	}
	s.writing = time.Now()
	return line, tells, true
}

// wrote books the end of a write of line.
func (s *Serial) wrote(line string, tells uint64, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.writing = time.Time{}
	switch {
	case err == nil:
		s.state.Lines++
		s.state.LastSuccess = time.Now()
	// The device is gone, perhaps with the beginning. The next one gets the line whole, if the queue
	// has room.
	case tells > 0:
		s.missed += tells // told anew, with what is dropped until then
	case len(s.queue) < maxQueue:
		s.queue = slices.Insert(s.queue, 0, line)
	default:
		s.drop()
	}
}

func (s *Serial) drop() {
	s.missed++
	s.state.Dropped++
}

func formatLine(now time.Time, severity Severity, message string) string {
	// The fixed four digits are what Google's agents write.
	return now.UTC().Format("2006-01-02T15:04:05.0000Z") + " service-proxy-agent/1 " +
		string(cmp.Or(severity, Info)) + ": " +
		guestattr.OneLine(message, maxLine) + "\n"
}
