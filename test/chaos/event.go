package chaos

import (
	"bufio"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Event is one fault of a game. The zero Hold is a fault that is over as soon as it is done, such
// as a kill.
type Event struct {
	// At is when it begins, since the start of the game. Calms do not count: while all wait for one,
	// this clock stands.
	At   time.Duration
	Name string        // of the Fault, or Calm
	Hold time.Duration // until it is taken back
	Seed uint32        // of whatever the fault draws for itself
}

// Calm is the event that takes all faults back and waits until everything is as wanted.
const Calm = "calm"

// String is one line: `12.300s envoy-stop 2.100s 4711`.
func (e Event) String() string {
	return fmt.Sprintf("%.3fs %s %.3fs %d", e.At.Seconds(), e.Name, e.Hold.Seconds(), e.Seed)
}

// Format is a sequence as text, a line an event.
func Format(sequence []Event) string {
	var b strings.Builder
	for _, e := range sequence {
		fmt.Fprintln(&b, e)
	}
	return b.String()
}

// Parse reads what Format wrote. Empty lines and lines that begin with # are left out.
func Parse(text string) (sequence []Event, err error) {
	in := bufio.NewScanner(strings.NewReader(text))
	for in.Scan() {
		line := strings.TrimSpace(in.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		e, err := parseEvent(line)
		if err != nil {
			return nil, fmt.Errorf("read event %q: %w", line, err)
		}
		sequence = append(sequence, e)
	}
	return sequence, in.Err()
}

func parseEvent(line string) (e Event, err error) {
	fields := strings.Fields(line)
	if len(fields) != 4 {
		return e, fmt.Errorf("%d fields, want time, name, time and seed", len(fields))
	}
	e.Name = fields[1]
	if e.At, err = time.ParseDuration(fields[0]); err != nil {
		return e, err
	}
	if e.Hold, err = time.ParseDuration(fields[2]); err != nil {
		return e, err
	}
	seed, err := strconv.ParseUint(fields[3], 10, 32)
	e.Seed = uint32(seed)
	return e, err
}
