//go:build lab

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// doctorLimit is how long doctor may take, whatever hangs.
const doctorLimit = 10 * time.Second

// diagnosis is what `doctor -o json` prints, as far as it is looked at here, and its exit code.
type diagnosis struct {
	Exit     int                       `json:"exit"`
	Findings []symptom.Finding         `json:"findings"`
	Checks   []symptom.Result          `json:"checks"`
	Unseen   map[symptom.Source]string `json:"unseen"`
	code     int
	text     string        // of the other form
	took     time.Duration // of both, at the same time
}

// state is what came of one check.
func (d diagnosis) state(id symptom.ID) symptom.State {
	for _, c := range d.Checks {
		if c.ID == id {
			return c.State
		}
	}
	return ""
}

// troubles are the checks of that severity at least that are in a state.
func (d diagnosis) troubles(state symptom.State, least symptom.Severity) (out []string) {
	for _, c := range d.Checks {
		if c.State == state && c.Severity >= least {
			out = append(out, fmt.Sprintf("%s (%v): %s%+v", c.ID, c.Severity, c.Why, c.Findings))
		}
	}
	return out
}

// run is what one run of doctor came to.
type run struct {
	stdout, stderr string
	code           int
	err            error
}

// diagnose runs doctor beside an agent, with its settings.
func diagnose(t *testing.T, a *mesh.Agent, uid uint32) diagnosis {
	t.Helper()
	return diagnosed(t, func(ctx context.Context, form ...string) (r run) {
		r.stdout, r.stderr, r.code, r.err = a.RunAs(ctx, uid, a.Settings(),
			slices.Concat([]string{"doctor"}, form)...)
		return r
	})
}

// diagnosed runs doctor in both forms at the same time, and checks what holds whatever they find:
// the exit code is the same, and both end in time.
func diagnosed(
	t *testing.T, ask func(ctx context.Context, form ...string) run,
) (d diagnosis) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*doctorLimit)
	defer cancel()
	began := time.Now()
	text := make(chan run, 1)
	go func() { text <- ask(ctx) }()
	inJSON := ask(ctx, "-o", "json")
	inText := <-text
	d.took = time.Since(began)
	must(t, inJSON.err)
	must(t, inText.err)
	if err := json.Unmarshal([]byte(inJSON.stdout), &d); err != nil {
		t.Fatalf("doctor -o json: %v: exit code %d\n%s%s", err, inJSON.code, inJSON.stdout, inJSON.stderr)
	}
	d.code, d.text = inJSON.code, inText.stdout
	if inText.code != d.code || d.Exit != d.code {
		t.Errorf("doctor: exit code %d with JSON, which says %d, and %d with text:\n%s\n%s", d.code,
			d.Exit, inText.code, inJSON.stdout, d.text)
	}
	if d.took > doctorLimit+time.Second { // a process takes time to start, too
		tooDear(t, "doctor took %v", d.took)
	}
	if len(d.Checks) != len(symptom.Kinds()) {
		t.Errorf("doctor has %d checks of %d", len(d.Checks), len(symptom.Kinds()))
	}
	return d
}

// examine has doctor find the symptom, and nothing else but what it explains. It returns the words.
func (p *patient) examine(t *testing.T, i injection) (words string) {
	t.Helper()
	if i.told == answers {
		return ""
	}
	var d diagnosis
	// What only passes by, as a repair, may be gone from one of the two looks.
	for range 3 {
		if d = diagnose(t, p.a, 0); d.state(i.id) == symptom.Found {
			break
		}
	}
	if d.state(i.id) != symptom.Found {
		t.Errorf("doctor says that %s is %q:\n%s", i.id, d.state(i.id), d.text)
		return ""
	}
	worst := symptom.Advice
	for _, f := range d.Findings {
		worst = max(worst, f.Severity)
		switch {
		case f.ID == i.id && f.ExplainedBy == "":
			words = f.Text()
			if i.told == doctorAlone && !regexp.MustCompile(i.says).MatchString(words) {
				t.Errorf("doctor says %q, want %q", words, i.says)
			}
			if !regexp.MustCompile(string(i.id) + ": " +
				regexp.QuoteMeta(f.Cause[:min(len(f.Cause), 20)])).MatchString(d.text) {
				t.Errorf("the text does not say %q:\n%s", f.Cause, d.text)
			}
		case f.ID == i.id || f.ExplainedBy == i.id || slices.Contains(i.beside, f.ID),
			f.Severity == symptom.Advice:
		default:
			t.Errorf("doctor also finds %+v", f)
		}
	}
	switch unknown := d.troubles(symptom.Unknown, symptom.Error); {
	case worst == symptom.Error && d.code != 1:
		t.Errorf("exit code %d with an error:\n%s", d.code, d.text)
	case worst != symptom.Error && len(unknown) == 0 && d.code != 0:
		t.Errorf("exit code %d without an error, and all errors known:\n%s", d.code, d.text)
	case worst != symptom.Error && len(unknown) > 0 && d.code != 2:
		t.Errorf("exit code %d, and unknown are %s:\n%s", d.code, unknown, d.text)
	}
	return words
}
