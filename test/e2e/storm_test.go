//go:build lab

package e2e

import (
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// TestRejectionStorm: the control plane sends a refused listener again as fast as it can. It is one
// failure, told once with Envoy's words. The rules stay. It is over when the storm is. In make soak
// the agent uses 2 % of a core at most, on a slow machine a twentieth of what Envoy does.
func TestRejectionStorm(t *testing.T) { // not parallel: a storm takes a core
	m, a := start(t, mesh.Options{Backend: lab.NFT, Config: services()})
	must(t, a.WaitReady(within(t, 20*time.Second)))
	through(t, m, web4)
	before := chains(t, m)

	// Every value that an outsider could have read.
	values := map[string]bool{}
	note := func() {
		if v := m.Platform.GuestAttributes("gce-service-proxy")["agent-last-failure"]; v != "" {
			values[v] = true
		}
	}
	bad := services()
	bad.Listeners = append(
		bad.Listeners, controlplane.RefusedListener("bad", 16001, "/root/access.log"))
	m.CP.Storm(true)
	_, err := m.CP.Set(bad)
	must(t, err)
	s, err := a.Wait(within(t, 10*time.Second), "the failure", func(s status.Status) bool {
		return s.LastFailure != ""
	})
	must(t, err)
	first := s.LastFailure
	t.Log(first)
	for _, want := range []string{"Envoy rejected listener bad", "/root/access.log",
		"Permission denied", "(since ", ", 1 time)"} {
		if !strings.Contains(first, want) {
			t.Errorf("%q does not say %q", first, want)
		}
	}

	refused, busy, began := m.CP.Refusals(), cpuAll(t, a.PID()), time.Now()
	stormy := cpuAll(t, m.Envoy.PID())
	for length := time.Duration(soak(60, 10)) * time.Second; time.Since(began) < length; time.Sleep(
		100 * time.Millisecond) {
		note()
	}
	took := time.Since(began)
	rate := float64(m.CP.Refusals()-refused) / took.Seconds()
	used := share(cpuAll(t, a.PID())-busy, took)
	refusing := share(cpuAll(t, m.Envoy.PID())-stormy, took)
	t.Logf("%.0f rejections a second for %.0f s: the agent used %.2f %% of a core, Envoy %.0f %%", rate,
		took.Seconds(), used, refusing)
	if rate < float64(soak(50, 10)) { // a tenth of what a quiet machine makes, or a busy one
		t.Errorf("only %.0f rejections a second: no storm", rate)
	}
	if used > max(2, refusing/20) {
		tooDear(t, "the agent used %.2f %% of a core, Envoy %.0f %%", used, refusing)
	}
	s, err = a.Status(t.Context())
	must(t, err)
	if s.LastFailure != first {
		t.Errorf("last failure %q, want it still %q", s.LastFailure, first)
	}
	if len(s.Findings) != 1 || !hasFinding(s, symptom.AccessLogUnwritable) || !s.Ready {
		t.Errorf("ready: %v, findings %v", s.Ready, s.Findings)
	}
	// within its budget of writes
	eventually(t, 30*time.Second, "the guest attribute", func() (bool, string) {
		note()
		return values[first], ""
	})
	if len(values) != 1 {
		t.Errorf("agent-last-failure had %d values in the storm, want one: %v", len(values), values)
	}
	if after := chains(t, m); after != before {
		t.Errorf("the rules changed:\n%s\nbefore:\n%s", after, before)
	}
	through(t, m, web4)

	m.CP.Storm(false)
	_, err = m.CP.Set(services(service(1)))
	must(t, err)
	_, err = a.Wait(within(t, 20*time.Second), "the end", func(s status.Status) bool {
		return len(s.Findings) == 0 && strings.Contains(s.LastFailure, "(over; ") &&
			strings.Contains(s.LastFailure, ", 1 time)")
	})
	must(t, err)
	eventually(t, 5*time.Second, "the service that came with the end", func() (bool, string) {
		out := chains(t, m)
		return strings.Contains(out, "-d "+service(1).Prefixes[0].String()), out
	})
}
