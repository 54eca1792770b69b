package page

import (
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
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
