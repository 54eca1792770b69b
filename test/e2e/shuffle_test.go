//go:build lab

package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// TestShuffle does what can happen to a node in any order and then looks whether it is as it should
// be: every service through Envoy, those that are gone not, the agent ready, no chain of an earlier
// configuration left. SEED repeats a run.
func TestShuffle(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, backend lab.Backend) {
		random := seeded(t)
		m, a := start(t, mesh.Options{Backend: backend, Config: services(), NoRuntime: true})
		must(t, a.WaitReady(within(t, 20*time.Second)))
		var now []controlplane.Service
		// iptables, by hand; what it says does not matter, since what it names may be gone.
		ipt := func(args ...string) {
			program := []string{"iptables", "ip6tables"}[random.IntN(2)]
			_, _ = m.VM.Run(t.Context(), program, append([]string{"-w", "-t", "nat"}, args...)...)
		}
		steps := []struct {
			name string
			do   func()
		}{
			{"change services", func() {
				now = now[:0]
				for range random.IntN(5) {
					now = append(now, both(random.IntN(20)))
				}
				now = distinct(now)
				_, err := m.CP.Set(services(now...))
				must(t, err)
			}},
			{"many services", func() { // enough for bucket chains
				now = now[:0]
				for i := range 300 + random.IntN(100) {
					s := both(i * 7)
					s.Cluster = "many"
					now = append(now, s)
				}
				_, err := m.CP.Set(services(now...))
				must(t, err)
			}},
			{"kill -9 the agent", func() { a.Kill(); must(t, a.Start()) }},
			{"restart Envoy", func() { must(t, m.Envoy.Restart()) }},
			{"flush the table", func() { ipt("-F") }},
			{"flush a chain", func() { ipt("-F", "SERVICE_PROXY_SERVICE_CIDRS") }},
			{"remove the jump", func() { ipt("-D", "OUTPUT", "-p", "tcp", "-j", "SERVICE_PROXY_OUTPUT") }},
			{"double the jump", func() { ipt("-A", "OUTPUT", "-p", "tcp", "-j", "SERVICE_PROXY_OUTPUT") }},
			{"a foreign rule in our chain", func() { ipt("-I", "SERVICE_PROXY_OUTPUT", "-p", "tcp", "-j", "RETURN") }},
			{"a foreign rule beside", func() { ipt("-I", "OUTPUT", "-d", "192.0.2.7", "-p", "tcp", "-j", "RETURN") }},
			{"a chain of an earlier version", func() { ipt("-N", "SERVICE_PROXY_DNS") }},
			{"hold the lock", func() {
				ctx, cancel := context.WithTimeout(t.Context(), 700*time.Millisecond)
				defer cancel()
				_ = m.VM.Command(ctx, "flock", "/run/xtables.lock", "sleep", "0.6").Run()
			}},
			{"cleanup and restart", func() {
				_, _, _, err := a.Run(t.Context(), "cleanup")
				must(t, err)
				a.Kill()
				must(t, a.Start())
			}},
		}
		for i := range soak(200, 14) {
			step := steps[random.IntN(len(steps))]
			t.Logf("%d: %s", i, step.name)
			step.do()
			if random.IntN(3) > 0 {
				time.Sleep(time.Duration(random.IntN(400)) * time.Millisecond)
				continue
			}
			converged(t, m, a, now)
		}
		converged(t, m, a, now)
	})
}

// converged waits until the node is as the services ask.
func converged(t *testing.T, m *mesh.Mesh, a *mesh.Agent, now []controlplane.Service) {
	t.Helper()
	for i, family := range []string{"IPv4", "IPv6"} {
		want := []map[string]bool{{"10.10.0.1/32": true, "10.10.0.2/32": true}, {"fd10::1/128": true}}[i]
		for _, s := range now {
			want[s.Prefixes[i].String()] = true
		}
		eventually(t, 30*time.Second, "convergence in "+family, func() (bool, string) {
			out, err := m.Chains(t.Context(), family)
			must(t, err)
			have := map[string]bool{}
			for line := range strings.Lines(out) {
				if f := strings.Fields(line); len(f) == 6 && f[2] == "-d" && f[5] == "SERVICE_PROXY_REDIRECT" {
					have[f[3]] = true
				}
			}
			for p := range want {
				if !have[p] {
					return false, fmt.Sprintf("%s is missing of %d in\n%.2000s", p, len(want), out)
				}
			}
			return len(have) == len(want) && !strings.Contains(out, "SERVICE_PROXY_DNS") &&
					strings.Count(out, "-A OUTPUT") == 1,
				fmt.Sprintf("want %d services, have %d in\n%.2000s", len(want), len(have), out)
		})
	}
	must(t, a.WaitReady(within(t, 30*time.Second)))
	through(t, m, web4)
	through(t, m, web6)
	if len(now) > 0 {
		for _, p := range now[len(now)-1].Prefixes {
			through(t, m, netip.AddrPortFrom(p.Addr(), 9000))
		}
	}
}
