package page

import (
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// TestMeaning: that connections fail is said, whoever tells that Envoy is down.
func TestMeaning(t *testing.T) {
	down := status.Envoy{Down: time.Date(2026, 11, 28, 11, 57, 0, 0, time.UTC)}
	for _, tt := range []struct {
		name string
		c    Content
		want string
	}{
		{"well", Content{Status: &status.Status{Mode: "intercepting", Ready: true,
			Services: make([]status.Service, 2)}},
			"Connections to 2 services go through Envoy."},
		{"Envoy down, rules kept", Content{Status: &status.Status{Mode: "intercepting", Envoy: down,
			NotReady: "Envoy does not answer"}},
			"Connections are led to Envoy, which is down: they fail until it is back " +
				"(--when-envoy-down=keep). Not ready: Envoy does not answer."},
		{"both down", Content{Seen: status.Status{Mode: "intercepting", Envoy: down},
			NoStatus: "it does not run"},
			"Connections are led to Envoy, which is down: they fail until it is back " +
				"(--when-envoy-down=keep). The agent does not answer: it does not run. This was seen without " +
				"it, and history, latencies and channels are not known."},
		{"before the first pass", Content{Status: &status.Status{Mode: "starting",
			NotReady: "no pass yet"}}, "Not ready: no pass yet."},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if have := meaning(tt.c); have != tt.want {
				t.Errorf("%q, want %q", have, tt.want)
			}
		})
	}
}

// TestHeadline: what the headline says is Healthy, and so the exit code; an error counts whoever
// tells of it, and once.
func TestHeadline(t *testing.T) {
	wrong := func(id symptom.ID, severity symptom.Severity) []symptom.Finding {
		return []symptom.Finding{{ID: id, Severity: severity, Cause: "it is so", Next: "mend it"}}
	}
	for _, tt := range []struct {
		name  string
		looks []symptom.Finding
		tells func(*status.Status)
		want  string
	}{
		{"well", nil, func(*status.Status) {}, "Healthy"},
		{"the look finds an error", wrong(symptom.EnvoyDown, symptom.Error), func(*status.Status) {},
			"Not healthy: Envoy is not running"},
		{"the agent tells of one", nil, func(s *status.Status) {
			s.Findings = wrong(symptom.EnvoyDown, symptom.Error)
		}, "Not healthy: Envoy is not running"},
		{"both do, of the same", wrong(symptom.EnvoyDown, symptom.Error), func(s *status.Status) {
			s.Findings = wrong(symptom.EnvoyDown, symptom.Error)
		}, "Not healthy: Envoy is not running"},
		{"each does, of its own", wrong(symptom.ClockWrong, symptom.Warning), func(s *status.Status) {
			s.Findings = append(wrong(symptom.EnvoyDown, symptom.Error),
				wrong(symptom.GuestAttributesOff, symptom.Error)...)
		}, "Not healthy: Envoy is not running, and 1 other error"},
		{"the agent is stuck", nil, func(s *status.Status) { s.Heartbeat = noon.Add(-time.Hour) },
			"Not healthy: The agent is stuck, or was"},
		{"paused", nil, func(s *status.Status) { s.Paused, s.Ready, s.NotReady = true, false, "paused" },
			"Paused: nothing is intercepted"},
		{"the brake is on", nil, func(s *status.Status) { s.Mode = "off" },
			"Off, as intended: nothing is intercepted"},
		{"not ready", nil, func(s *status.Status) { s.Ready, s.NotReady = false, "Envoy is INITIALIZING" },
			"Not ready: Envoy is INITIALIZING"},
		{"a warning", wrong(symptom.ClockWrong, symptom.Warning), func(*status.Status) {},
			"Working, with 1 warning"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := healthy()
			s := *c.Status
			tt.tells(&s)
			c.Status, c.Report = &s, report(tt.looks, nil)
			if have := headline(c).text; have != tt.want {
				t.Errorf("%q, want %q", have, tt.want)
			}
			bad := strings.HasPrefix(tt.want, "Not healthy")
			html := rendered(t, c)
			if c.Healthy() == bad || strings.Contains(html, "Nothing was found.") == (bad || tt.looks != nil) {
				t.Errorf("healthy: %v, and the findings are not shown by that", c.Healthy())
			}
		})
	}
}
