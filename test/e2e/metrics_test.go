//go:build lab

package e2e

import (
	"fmt"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// TestLatencies: each histogram counts what it is of, and nothing else: a service that came, a
// change of Envoy's that needs no other rule, a rule that somebody deleted.
func TestLatencies(t *testing.T) {
	beside(t)
	onBoth(t, func(t *testing.T, backend lab.Backend) {
		m, a := start(t, mesh.Options{Backend: backend, Config: services()})
		must(t, a.WaitReady(within(t, 20*time.Second)))
		redirects := func() float64 { return metric(t, a, "redirect_latency_seconds_count") }
		repairs := func() float64 {
			return metric(t, a, fmt.Sprintf("repair_latency_seconds_count{backend=%q}", backend))
		}
		writes := func() float64 { return metric(t, a, `apply_duration_seconds_count{family="IPv4"}`) }
		dumps := func() float64 { return metric(t, a, "envoy_dump_reads_total") }
		until := func(what string, holds func() bool) {
			t.Helper()
			eventually(t, 20*time.Second, what, func() (bool, string) { return holds(), a.Log() })
		}

		before, written := redirects(), writes()
		c := services(service(7))
		_, err := m.CP.Set(c)
		must(t, err)
		until("the service's redirect counted", func() bool { return redirects() == before+1 })
		if writes() <= written {
			t.Error("nothing counts as written")
		}

		before, read := redirects(), dumps()
		c.Services[len(c.Services)-1].HTTP = true // another listener, for the same rules
		_, err = m.CP.Set(c)
		must(t, err)
		until("another dump", func() bool { return dumps() > read })
		passes := metric(t, a, "passes_total")
		until("passes after it", func() bool { return metric(t, a, "passes_total") > passes+1 })
		if n := redirects(); n != before {
			t.Errorf("%v redirects counted of a change that needs no other rule", n-before)
		}

		if n := repairs(); n != 0 {
			t.Errorf("%v repairs before anybody did anything", n)
		}
		s, err := a.Status(t.Context())
		must(t, err)
		_, err = m.VM.Run(t.Context(), "iptables", "-w", "-t", "nat", "-D", "OUTPUT", "-p", "tcp", "-j",
			"SERVICE_PROXY_OUTPUT")
		must(t, err)
		_, err = a.Wait(within(t, 10*time.Second), "repair", func(n status.Status) bool {
			return n.Undone > s.Undone
		})
		must(t, err)
		if n := repairs(); n != 1 {
			t.Errorf("%v repairs counted, want 1", n)
		}
		if n := redirects(); n != before {
			t.Error("a repair counts as a redirect")
		}
		for _, of := range []string{"envoy_admin", "rules_ipv4", "rules_ipv6"} {
			at := metric(t, a, fmt.Sprintf("last_success_timestamp_seconds{of=%q}", of))
			if at < float64(s.Started.Unix()) {
				t.Errorf("last success of %s: %v", of, at)
			}
		}
		if n := metric(t, a, "control_plane_connected"); n != 1 {
			t.Errorf("control_plane_connected: %v", n)
		}
		for _, q := range []string{"dump", "look", "ready", "server_info", "stats"} {
			if metric(t, a, fmt.Sprintf("envoy_questions_total{question=%q}", q)) == 0 ||
				metric(t, a, fmt.Sprintf("envoy_question_seconds_total{question=%q}", q)) == 0 {
				t.Errorf("no %s was asked, as told", q)
			}
		}
	})
}
