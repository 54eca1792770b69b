package agent

import (
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

func TestFailure(t *testing.T) {
	start := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	down := symptom.Finding{ID: symptom.EnvoyDown, Severity: symptom.Error, Cause: "Envoy is not running", Next: "see the log"}
	rejected := symptom.Finding{ID: symptom.ListenerRejected, Key: "l", Severity: symptom.Error, Cause: "rejected"}
	under := symptom.Finding{ID: symptom.EnvoyNotConfigured, Severity: symptom.Error, Cause: "not configured", ExplainedBy: symptom.ListenerRejected}
	warning := symptom.Finding{ID: symptom.DriftRepaired, Severity: symptom.Warning, Cause: "drift"}
	steps := []struct {
		after    time.Duration
		findings []symptom.Finding
		want     string
	}{
		{0, nil, ""},
		{0, []symptom.Finding{warning}, ""},
		{time.Second, []symptom.Finding{down, warning}, "Envoy is not running; see the log (since 2026-01-02T03:04:06Z, 1 time)"},
		// The newest is told: the older one is known, and may last for days.
		{2 * time.Second, []symptom.Finding{down, rejected}, "rejected; and 1 more, see `service-proxy-agent status` (since 2026-01-02T03:04:07Z, 1 time)"},
		{2 * time.Second, []symptom.Finding{down}, "Envoy is not running; see the log (since 2026-01-02T03:04:06Z, 1 time)"},
		{3 * time.Second, nil, "Envoy is not running; see the log (over; 2026-01-02T03:04:06Z to 2026-01-02T03:04:08Z, 1 time)"},
		{4 * time.Second, []symptom.Finding{under}, "Envoy is not running; see the log (over; 2026-01-02T03:04:06Z to 2026-01-02T03:04:08Z, 1 time)"},
		{5 * time.Second, []symptom.Finding{down}, "Envoy is not running; see the log (since 2026-01-02T03:04:06Z, 2 times)"},
		{6 * time.Second, []symptom.Finding{rejected}, "rejected (since 2026-01-02T03:04:11Z, 1 time)"},
		{7 * time.Second, nil, "rejected (over; 2026-01-02T03:04:11Z to 2026-01-02T03:04:12Z, 1 time)"},
		{8 * time.Second, []symptom.Finding{down, rejected}, "Envoy is not running; see the log; and 1 more, see `service-proxy-agent status` (since 2026-01-02T03:04:13Z, 1 time)"}, // of two at once the worst
		{9 * time.Second, []symptom.Finding{rejected}, "rejected (since 2026-01-02T03:04:11Z, 2 times)"},
		{10 * time.Second, nil, "rejected (over; 2026-01-02T03:04:11Z to 2026-01-02T03:04:15Z, 2 times)"},
		{3 * time.Hour, []symptom.Finding{rejected}, "rejected (since 2026-01-02T06:04:05Z, 1 time)"},
	}
	dir := t.TempDir()
	var f Failures
	for _, s := range steps {
		f = f.next(s.findings, start.Add(s.after))
		if f.String() != s.want {
			t.Errorf("after %v: %q, want %q", s.after, f, s.want)
		}
		if err := f.save(dir); err != nil {
			t.Fatal(err)
		}
		if back := loadFailures(dir); back.String() != f.String() {
			t.Errorf("after %v: read back %q", s.after, back)
		}
	}
}
