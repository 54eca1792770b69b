package envoyadmin

import (
	"bytes"
	"errors"
	"fmt"
	"iter"
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
	// recentBytes is how much of the log's end is gone through: in a storm of rejections some
	// seconds.
	recentBytes = 4 << 20
	// recentLines is how many of its last lines are understood, of those that may tell something. Each
	// takes microseconds, and who asks has little time, on a machine that may be busy.
	recentLines = 1000
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

// recent understands the last lines. Only where an Envoy starts is looked for in all.
func recent(tail []byte) (events []Logged) {
	var last [][]byte
	for line := range telling(tail) {
		if bytes.Contains(line, []byte(startMark)) {
			if e, _ := parseLine(line); e.Kind == EnvoyStarts { // what stands above is of another
				if events, last = nil, nil; e.Epoch > 0 {
					events = []Logged{{LogEvent: e, Time: lineTime(line)}}
				}
				continue
			}
		}
		if len(last) == 2*recentLines { // not at each line
			last = append(last[:0], last[recentLines:]...)
		}
		last = append(last, line)
	}
	for _, line := range last[max(len(last)-recentLines, 0):] {
		e, ok := parseLine(line)
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

// telling are the lines with a mark of parseLine's, which are few in a log of everything. All
// others are passed over without a look at each: of these there can be millions.
func telling(text []byte) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		var next [len(marks)]int // where each mark stands next; len(text): nowhere
		for at := 0; at < len(text); {
			first := len(text)
			for i, mark := range marks {
				if next[i] < at || at == 0 {
					next[i] = len(text)
					if n := bytes.Index(text[at:], []byte(mark)); n >= 0 {
						next[i] = at + n
					}
				}
				first = min(first, next[i])
			}
			if first == len(text) {
				return
			}
			begin := at + 1 + bytes.LastIndexByte(text[at:first], '\n')
			end := len(text)
			if n := bytes.IndexByte(text[first:], '\n'); n >= 0 {
				end = first + n
			}
			line := bytes.TrimRight(text[begin:end], "\r")
			if !yield(line[:min(len(line), maxLine)]) {
				return
			}
			at = end + 1
		}
	}
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
