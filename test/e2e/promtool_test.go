//go:build lab

package e2e

import (
	"cmp"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// TestPromtool: promtool finds nothing to say of what a live agent tells, be it well or without its
// Envoy.
func TestPromtool(t *testing.T) {
	t.Parallel()
	m, err := mesh.New(within(t, 30*time.Second),
		mesh.Options{Backend: lab.NFT, Config: services(), NoRuntime: true})
	must(t, err)
	a := m.NewAgent()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("agent's log:\n%s", a.Log())
		}
		must(t, m.Close())
	})
	must(t, a.Start())
	must(t, a.WaitReady(within(t, 20*time.Second)))
	checkMetrics(t, a)

	m.Envoy.Kill()
	eventually(t, 20*time.Second, "Envoy to be missed", func() (bool, string) {
		return metric(t, a, finding(symptom.EnvoyDown)) == 1, ""
	})
	checkMetrics(t, a)
}

func checkMetrics(t *testing.T, a *mesh.Agent) {
	t.Helper()
	code, body, err := a.Get("/metrics")
	if err != nil || code != http.StatusOK {
		t.Fatalf("/metrics: %d %v", code, err)
	}
	// The alerts of deploy/prometheus ask for it, and the golden scrape has no process's metrics.
	if !strings.Contains(body, "\nprocess_start_time_seconds ") {
		t.Error("there is no process_start_time_seconds")
	}
	cmd := exec.CommandContext(within(t, time.Minute),
		cmp.Or(os.Getenv("PROMTOOL"), "../../build/promtool"), "check", "metrics")
	cmd.Stdin = strings.NewReader(body)
	// It complains on stderr, and ends with 3 then.
	if said, err := cmd.CombinedOutput(); err != nil || len(said) > 0 {
		t.Errorf("promtool check metrics (make tools fetches it): %v\n%s", err, said)
	}
}
