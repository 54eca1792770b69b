package envoyadmin

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Logged is an event of the log as it stands there.
type Logged struct {
	LogEvent
	Time time.Time // by its line; zero where that has none
}

const (
	// recentBytes is how much of the log's end is gone through: in a storm of rejections some minutes.
	recentBytes = 4 << 20
	// stampLayout is the time as Envoy writes it without --log-format, in its local time.
	stampLayout = "2006-01-02 15:04:05.000"
)

// Recent reads the end of Envoy's log, for who cannot follow it: what FollowLog would have told
// since the Envoy that writes it was started. It reads a regular file alone, and follows no link.
func Recent(path string) ([]Logged, error) {
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = errors.New("it is no regular file")
	}
	if err != nil {
		return nil, fmt.Errorf("read %q: %w", path, err)
	}
	tail, err := Tail(file, recentBytes)
	if err != nil {
		return nil, fmt.Errorf("read %q: %w", path, err)
	}
	return recent(tail), nil
}

func recent(tail []byte) (events []Logged) {
	for line := range bytes.Lines(tail) {
		line = bytes.TrimRight(line, "\r\n")
		line = line[:min(len(line), maxLine)]
		e, ok := parseLine(line)
		if e.Kind == EnvoyStarts { // what stands above is of another
			events, ok = nil, e.Epoch > 0
		}
		if !ok {
			continue
		}
		logged := Logged{LogEvent: e, Time: lineTime(line)}
		if n := len(events); n > 0 && same(events[n-1].LogEvent) == same(e) {
			logged.Count += events[n-1].Count // a storm is one event
			events = events[:n-1]
		}
		events = append(events, logged)
	}
	for i := range events {
		events[i].LogEvent = redacted(events[i].LogEvent)
	}
	return events
}

// lineTime is when a line was written: "[2026-01-02 03:04:05.678][123][warning]…".
func lineTime(line []byte) time.Time {
	if len(line) < len(stampLayout)+2 || line[0] != '[' {
		return time.Time{}
	}
	at, err := time.ParseInLocation(stampLayout, string(line[1:1+len(stampLayout)]), time.Local)
	if err != nil {
		return time.Time{}
	}
	return at
}
