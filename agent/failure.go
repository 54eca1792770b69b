package agent

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/atomicfile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// Failure is the newest failure and its history, as agent-last-failure tells it.
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

// forgetAfter is how long after its end the same failure counts as the same one come again, not as a new one.
const forgetAfter = time.Hour

// next is the failure to tell after a pass with these findings, worst first. The same failure (ID and key) keeps its
// start; a new one replaces one that is over, and one that lasts only when that is no longer the worst of its kind.
func (f Failure) next(findings []symptom.Finding, now time.Time) Failure {
	var worst *symptom.Finding
	for i := range findings {
		c := &findings[i]
		if c.Severity < symptom.Error || c.ExplainedBy != "" {
			continue
		}
		if worst == nil {
			worst = c
		}
		if c.ID == f.ID && c.Key == f.Key {
			worst = c
			break
		}
	}
	now = now.UTC().Truncate(time.Second)
	switch {
	case worst == nil:
		if f.Text != "" && f.Last.IsZero() {
			f.Last = now
		}
		return f
	case worst.ID == f.ID && worst.Key == f.Key && f.Last.IsZero():
		f.Text = worst.Text()
		return f
	case worst.ID == f.ID && worst.Key == f.Key && now.Sub(f.Last) < forgetAfter:
		f.Text, f.Last = worst.Text(), time.Time{}
		f.Times++
		return f
	}
	return Failure{ID: worst.ID, Key: worst.Key, Text: worst.Text(), First: now, Times: 1}
}

// String is the value of agent-last-failure: TEXT first, so that a cut value still tells what happened.
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
	return fmt.Sprintf("%s (over; %s to %s, %s)", f.Text, f.First.Format(time.RFC3339), f.Last.Format(time.RFC3339), times)
}

const failureFile = "last-failure.json"

// loadFailure reads the failure of an earlier run; a missing or unreadable file loses nothing but history.
func loadFailure(dir string) (f Failure) {
	b, err := os.ReadFile(filepath.Join(dir, failureFile))
	if err != nil || json.Unmarshal(b, &f) != nil {
		return Failure{}
	}
	return f
}

func (f Failure) save(dir string) error {
	b, err := json.Marshal(f)
	if err != nil {
		return err
	}
	return atomicfile.Write(filepath.Join(dir, failureFile), b, 0o600)
}
