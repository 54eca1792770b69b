package agent

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/atomicfile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// Failure is one failure and its history.
type Failure struct {
	ID    symptom.ID `json:"id"`
	Key   string     `json:"key,omitempty"`
	Text  string     `json:"text"`
	First time.Time  `json:"first"`
	// Last is when it was seen to be over; zero while it lasts.
	Last time.Time `json:"last,omitzero"`
	// Times counts how often it came: 1 for one that never went away.
	Times int `json:"times"`
}

func (f Failure) is(found symptom.Finding) bool { return f.ID == found.ID && f.Key == found.Key }

// Failures are those that last, and what remains of the one that ended last.
type Failures struct {
	// oldest first; of those that came in one pass the worst last
	Lasting []Failure `json:"lasting,omitempty"`
	Over    Failure   `json:"over,omitzero"`
}

// forgetAfter is how long after its end the same failure counts as the same one come
// again, not as a new one.
const forgetAfter = time.Hour

// next are the failures after a pass with these findings, worst first. One that
// lasts keeps its start.
func (f Failures) next(findings []symptom.Finding, now time.Time) Failures {
	now = now.UTC().Truncate(time.Second)
	next := Failures{Over: f.Over}
	var errors []symptom.Finding
	for _, found := range findings {
		if found.Severity == symptom.Error && found.ExplainedBy == "" {
			errors = append(errors, found)
		}
	}
	for _, was := range f.Lasting {
		i := slices.IndexFunc(errors, was.is)
		if i < 0 {
			was.Last = now
			next.Over = was
			continue
		}
		was.Text = errors[i].Text()
		next.Lasting = append(next.Lasting, was)
		errors = slices.Delete(errors, i, i+1)
	}
	for _, found := range slices.Backward(errors) {
		is := Failure{ID: found.ID, Key: found.Key, Text: found.Text(), First: now, Times: 1}
		if f.Over.is(found) && now.Sub(f.Over.Last) < forgetAfter {
			is.First, is.Times = f.Over.First, f.Over.Times+1
		}
		next.Lasting = append(next.Lasting, is)
	}
	return next
}

func (f Failures) equal(g Failures) bool {
	return f.Over == g.Over && slices.Equal(f.Lasting, g.Lasting)
}

// String is the value of agent-last-failure: the newest of those that last, since an older one may
// last for days and is known; else the last one.
func (f Failures) String() string {
	n := len(f.Lasting)
	if n == 0 {
		return f.Over.String()
	}
	newest := f.Lasting[n-1]
	if n > 1 {
		newest.Text += fmt.Sprintf("; and %d more, see `service-proxy-agent status`", n-1)
	}
	return newest.String()
}

// String has TEXT first, so that a cut value still tells what happened.
func (f Failure) String() string {
	times := "1 time"
	if f.Times != 1 {
		times = fmt.Sprintf("%d times", f.Times)
	}
	switch {
	case f.Text == "":
		return ""
	case f.Last.IsZero():
		return fmt.Sprintf("%s (since %s, %s)", f.Text, f.First.Format(time.RFC3339), times)
	}
	return fmt.Sprintf("%s (over; %s to %s, %s)", f.Text, f.First.Format(time.RFC3339),
		f.Last.Format(time.RFC3339), times)
}

const failureFile = "last-failure.json"

// loadFailures reads the failures of an earlier run; a missing or unreadable file
// loses nothing but history.
func loadFailures(dir string) (f Failures) {
	b, err := os.ReadFile(filepath.Join(dir, failureFile))
	if err != nil || json.Unmarshal(b, &f) != nil {
		return Failures{}
	}
	return f
}

func (f Failures) save(dir string) error {
	b, err := json.Marshal(f)
	if err != nil {
		return err
	}
	// systemd makes it; without, somebody runs the agent by hand
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return atomicfile.Write(filepath.Join(dir, failureFile), b, 0o600)
}
