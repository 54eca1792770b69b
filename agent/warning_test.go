package agent

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/identity"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// warned is a history of warnings, a pass at a time.
type warned struct {
	Failures
	told   *told
	now    time.Time
	values []string // of agent-last-failure, each that was another one
}

func newWarned() *warned {
	told, _ := heard()
	return &warned{told: told, now: testStart}
}

// pass is one this much later, with these findings.
func (w *warned) pass(after time.Duration, findings ...symptom.Finding) string {
	w.now = w.now.Add(after)
	p := intercepting()
	p.seen.Now, p.findings = w.now, findings
	w.told.publish(p, "nft")
	w.Failures = w.told.failures
	value := w.String()
	if n := len(w.values); n == 0 || w.values[n-1] != value {
		w.values = append(w.values, value)
	}
	return value
}

func warning(id symptom.ID, key, cause string) symptom.Finding {
	return symptom.Finding{ID: id, Key: key, Severity: symptom.Warning, Cause: cause}
}

// TestWarnings: what is told outside while nothing worse lasts.
func TestWarnings(t *testing.T) {
	silent := warning(symptom.ApplicationSilent, "80", "nothing on 80")
	dropped := warning(symptom.InputDropped, "IPv4 80", "dropped")
	off := warning(symptom.GuestAttributesOff, "", "off")
	under := warning(symptom.ServingPortNoChain, "80", "no chain")
	under.ExplainedBy = symptom.EnvoyDown
	drift := warning(symptom.DriftRepaired, "IPv4", "rules were changed")
	advice := symptom.Finding{ID: symptom.ServerFirst, Severity: symptom.Advice, Cause: "advice"}
	down := symptom.Finding{ID: symptom.EnvoyDown, Severity: symptom.Error, Cause: "down"}
	const second = time.Second
	w := newWarned()
	for i, step := range []struct {
		after    time.Duration
		findings []symptom.Finding
		want     string
	}{
		{0, []symptom.Finding{off, under, advice}, ""},
		{time.Hour, []symptom.Finding{off, under, advice}, ""},
		{0, []symptom.Finding{silent}, ""}, // it may pass, while Envoy starts, say
		{4 * second, []symptom.Finding{silent}, ""},
		{second, []symptom.Finding{silent},
			"nothing on 80 (warning; since 2026-11-28T19:00:00Z, 1 time)"},
		{second, []symptom.Finding{dropped, silent},
			"nothing on 80 (warning; since 2026-11-28T19:00:00Z, 1 time)"},
		{5 * second, []symptom.Finding{dropped, silent},
			"dropped; and 1 more, see `service-proxy-agent status` " +
				"(warning; since 2026-11-28T19:00:06Z, 1 time)"},
		// A failure goes before all of them, and after it they are there as they were.
		{second, []symptom.Finding{down, dropped, silent}, "down (since 2026-11-28T19:00:12Z, 1 time)"},
		{8 * second, []symptom.Finding{dropped, silent},
			"dropped; and 1 more, see `service-proxy-agent status` " +
				"(warning; since 2026-11-28T19:00:06Z, 1 time); " +
				"before that: down (over; 2026-11-28T19:00:12Z to 2026-11-28T19:00:20Z, 1 time)"},
		{second, []symptom.Finding{silent},
			"nothing on 80 (warning; since 2026-11-28T19:00:00Z, 1 time); " +
				"before that: down (over; 2026-11-28T19:00:12Z to 2026-11-28T19:00:20Z, 1 time)"},
		{second, nil,
			"nothing on 80 (over; 2026-11-28T19:00:00Z to 2026-11-28T19:00:22Z, 1 time); " +
				"before that: down (over; 2026-11-28T19:00:12Z to 2026-11-28T19:00:20Z, 1 time)"},
		// A failure that ends last is all that is told.
		{8 * second, []symptom.Finding{down}, "down (since 2026-11-28T19:00:12Z, 2 times)"},
		{10 * second, nil, "down (over; 2026-11-28T19:00:12Z to 2026-11-28T19:00:40Z, 2 times)"},
		// Drift is over when it is told.
		{20 * second, []symptom.Finding{drift},
			"rules were changed (over; 2026-11-28T19:01:00Z to 2026-11-28T19:01:00Z, 1 time); " +
				"before that: down (over; 2026-11-28T19:00:12Z to 2026-11-28T19:00:40Z, 2 times)"},
		{second, nil,
			"rules were changed (over; 2026-11-28T19:01:00Z to 2026-11-28T19:01:00Z, 1 time); " +
				"before that: down (over; 2026-11-28T19:00:12Z to 2026-11-28T19:00:40Z, 2 times)"},
		// A failure of another day is not told with it.
		{30 * time.Hour, []symptom.Finding{drift},
			"rules were changed (over; 2026-11-30T01:01:01Z to 2026-11-30T01:01:01Z, 1 time)"},
	} {
		if got := w.pass(step.after, step.findings...); got != step.want {
			t.Errorf("step %d: %q, want %q", i, got, step.want)
		}
	}
	dir := t.TempDir()
	if err := w.save(dir); err != nil {
		t.Fatal(err)
	}
	back := loadFailures(dir, identity.VM{})
	if !back.equal(w.Failures) || back.String() != w.String() {
		t.Errorf("read back %+v, want %+v", back, w.Failures)
	}
}

// TestWarningFlaps: one that comes and goes each minute is written a few times an hour, and one
// whose words change all the time once a minute at most.
func TestWarningFlaps(t *testing.T) {
	for name, tt := range map[string]struct {
		on, off time.Duration
		most    int // values in an hour
	}{
		"each minute":           {30 * time.Second, 30 * time.Second, 5},
		"each ten minutes":      {5 * time.Minute, 5 * time.Minute, 14},
		"a moment each minute":  {10 * time.Second, 50 * time.Second, 5},
		"away for two minutes":  {time.Minute, 2 * time.Minute, 8},
		"too short to be heard": {4 * time.Second, 4 * time.Second, 1},
	} {
		w := newWarned()
		one := warning(symptom.ApplicationSilent, "80", "80")
		other := warning(symptom.NoRoute, "IPv6", "r")
		for at := time.Duration(0); at < time.Hour; at += time.Second {
			if at%(tt.on+tt.off) < tt.on {
				w.pass(time.Second, one, other)
			} else {
				w.pass(time.Second)
			}
		}
		if n := len(w.values); n > tt.most || tt.most > 1 && n < 3 {
			t.Errorf("%s: %d values in an hour, at most %d:\n%s", name, n, tt.most,
				strings.Join(w.values, "\n"))
		}
		for range 20 * 60 {
			w.pass(time.Second)
		}
		if value := w.values[len(w.values)-1]; tt.most > 1 && !strings.Contains(value, "(over; ") {
			t.Errorf("%s: 20 minutes later it is %q", name, value)
		}
	}
	w := newWarned()
	for n := range 600 {
		w.pass(time.Second, warning(symptom.EndpointsPanic, "", fmt.Sprintf("%d of 600", n)))
	}
	if n := len(w.values); n < 9 || n > 12 {
		t.Errorf("%d values in ten minutes", n)
	}
}

// TestWarningOver: the end of one is told where its beginning was, on the other channels, too; that
// of drift goes without saying.
func TestWarningOver(t *testing.T) {
	w := newWarned()
	told, take := heard()
	w.told = told
	silent := warning(symptom.ApplicationSilent, "80", "nothing on 80")
	w.pass(0, silent, warning(symptom.DriftRepaired, "IPv4", "rules were changed"))
	for range 10 {
		w.pass(time.Second, silent)
	}
	take()
	w.pass(time.Second)
	if got := take(); strings.Count(got, "over: ") != 1 || !strings.Contains(got,
		"INFO over: nothing on 80") {
		t.Errorf("told\n%s", got)
	}
	if got := w.told.failures.Lasting; len(got) != 0 {
		t.Errorf("a warning counts as a failure: %+v", got)
	}
}

// TestWarningsOfARun: what an earlier run warned of stands until this one could have found it, and
// what an error explains by now stands, too.
func TestWarningsOfARun(t *testing.T) {
	silent := warning(symptom.ApplicationSilent, "80", "nothing on 80")
	w := newWarned()
	w.pass(0, silent)
	stands := w.pass(10*time.Second, silent)
	next := newWarned()
	next.told.failures, next.told.unseen = w.Failures, w.Warnings.whichOf()
	next.now, next.told.started = w.now, w.now
	if got := next.pass(warningsLate - 1); got != stands {
		t.Errorf("within five minutes: %q, want %q", got, stands)
	}
	if got := next.pass(time.Second); !strings.Contains(got, "nothing on 80 (over; ") {
		t.Errorf("after five minutes: %q", got)
	}
	next = newWarned()
	next.told.failures, next.told.unseen = w.Failures, w.Warnings.whichOf()
	next.now, next.told.started = w.now, w.now
	next.pass(time.Second, silent) // found again: from now on it is this run's
	if got := next.pass(time.Second); !strings.Contains(got, "(over; ") {
		t.Errorf("found again and gone: %q", got)
	}

	under := silent
	under.ExplainedBy = symptom.EnvoyDown
	if got := w.pass(time.Second, under); got != stands {
		t.Errorf("explained: %q, want %q", got, stands)
	}
}

// TestWarningLong: a warning in many words leaves room for the failure before it.
func TestWarningLong(t *testing.T) {
	w := newWarned()
	w.pass(0, symptom.Finding{ID: symptom.EnvoyDown, Severity: symptom.Error, Cause: "down"})
	w.pass(time.Second)
	long := warning(symptom.ApplicationSilent, "80", strings.Repeat("x", 3000))
	w.pass(time.Second, long)
	value := guestattr.OneLine(w.pass(10*time.Second, long), guestattr.MaxValue)
	if !strings.Contains(value, "before that: down (over; ") {
		t.Errorf("it is %q", value)
	}
}

// TestSince: each finding tells since when it stands: by its check, else by this run, or by the
// history of what it is.
func TestSince(t *testing.T) {
	w := newWarned()
	var since []string
	down := symptom.Finding{ID: symptom.EnvoyDown, Severity: symptom.Error, Cause: "down"}
	dated := warning(symptom.AgentStuck, "killed", "killed")
	dated.Since = testStart.Add(-time.Hour)
	silent := warning(symptom.ApplicationSilent, "80", "nothing on 80")
	for i, step := range []struct {
		after    time.Duration
		findings []symptom.Finding
		want     string // seconds since the start
	}{
		{0, []symptom.Finding{down, dated, silent}, "0 -3600 0"},
		{time.Second, []symptom.Finding{down, dated, silent}, "0 -3600 0"},
		{time.Second, []symptom.Finding{silent}, "0"},
		{time.Second, []symptom.Finding{down}, "0"}, // the same failure, which has come again
		{time.Second, []symptom.Finding{silent}, "4"},
	} {
		since = nil
		p := step.findings
		w.now = w.now.Add(step.after)
		pass := intercepting()
		pass.seen.Now, pass.findings = w.now, p
		w.told.reporters.status = func(s status.Status) {
			for _, f := range s.Findings {
				since = append(since, fmt.Sprint(f.Since.Sub(testStart).Seconds()))
			}
		}
		w.told.publish(pass, "nft")
		if got := strings.Join(since, " "); got != step.want {
			t.Errorf("step %d: %s, want %s", i, got, step.want)
		}
		for _, f := range p {
			if f.ID != symptom.AgentStuck && !f.Since.IsZero() {
				t.Error("what Check returned was changed")
			}
		}
	}
}
