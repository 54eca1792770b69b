package agent

import (
	"bytes"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
)

const (
	// bootstrapEvery is how often bootstrap's state file is looked at.
	bootstrapEvery = time.Second
	// requestEvery is how often bootstrap is asked for while it does not come.
	requestEvery = 30 * time.Second
	// storyAge is how old a line of bootstrap's story may be at this run's start to be told: an
	// earlier run told what is older.
	storyAge = time.Hour
)

// bootstrapProgress is what bootstrap reached, as its state file says.
type bootstrapProgress struct {
	awaited   bool // its unit is enabled, so a VM without its result is not finished yet
	state     progress.State
	looked    time.Time
	requested time.Time // when it was last asked to run
	text      []byte    // of the attribute that it was then asked for
	told      int       // the last line of its story that was told
}

// read looks at the state file now and then. What cannot be read is half of nothing: bootstrap
// writes it anew at its next step.
func (b *bootstrapProgress) read(now time.Time, ask func() (progress.State, error)) {
	if now.Sub(b.looked) < bootstrapEvery {
		return
	}
	b.looked = now
	state, err := ask()
	if err == nil {
		b.state = state
	}
}

// due says whether bootstrap, which only root may run, is to be asked for: it has finished for
// another attribute than this text. It looks first, and restarts Envoy only where Envoy must know.
func (b *bootstrapProgress) due(now time.Time, text []byte) bool {
	if text == nil || !b.state.Stale(text) {
		return false
	}
	if bytes.Equal(b.text, text) && now.Sub(b.requested) < requestEvery {
		return false
	}
	b.requested, b.text = now, text
	return true
}

// story is what of bootstrap's story was not told yet. The daemon tells it on the serial port while
// it runs; bootstrap itself does where there is no daemon.
func (b *bootstrapProgress) story(started time.Time) (lines []progress.Line) {
	for _, line := range b.state.Story {
		if line.Seq <= b.told {
			continue
		}
		b.told = line.Seq
		if line.Time.After(started.Add(-storyAge)) {
			lines = append(lines, line)
		}
	}
	return lines
}
