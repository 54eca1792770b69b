//go:build lab

package e2e

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// TestManyServices: 32,000 services with an address in each family work from end to end on both
// backends: the first install, one more, one less, a flushed table, a restart, and what commands
// say of them, while Envoy is stopped at random for up to a second. Here with a few hundred; with
// all in `make soak`.
func TestManyServices(t *testing.T) {
	for _, backend := range lab.Backends {
		t.Run(string(backend), func(t *testing.T) {
			beside(t)
			n := soak(32_000, 300)
			seed := uint64(time.Now().UnixNano())
			random := rand.New(rand.NewPCG(seed, 0))
			t.Logf("seed %d", seed)
			m, err := mesh.New(within(t, 5*time.Minute),
				mesh.Options{Backend: backend, Config: spread(n, true)})
			must(t, err)
			t.Cleanup(func() { _ = m.Close() })
			bytes, first, all := dumped(t, m)
			t.Logf("a dump of %.0f MB: first byte after %.0f ms, all after %.0f",
				bytes/(1<<20), first, all)
			a := m.NewAgent()
			t.Cleanup(func() {
				if t.Failed() {
					t.Logf("agent's log:\n%s", a.Log())
				}
			})
			began := time.Now()
			must(t, a.Start())
			s, err := a.Wait(within(t, 2*time.Minute), "ready",
				func(s status.Status) bool { return s.Ready })
			must(t, err)
			t.Logf("ready after %v, at a peak of %.1f MB", time.Since(began), memory(t, a.PID(), "VmHWM"))
			holds(t, s, n)
			reached(t, m, true, 0, random.IntN(n), n-1)

			// One more and one less in one push, while Envoy is held up now and then.
			config := spread(n+1, true)
			// Neither the first nor the last, which are reached all along.
			gone := 1 + random.IntN(n-2)
			config.Services = append(config.Services[:gone:gone], config.Services[gone+1:]...)
			pushed, err := m.CP.Set(config)
			must(t, err)
			for range 3 {
				must(t, syscall.Kill(m.Envoy.PID(), syscall.SIGSTOP))
				time.Sleep(time.Duration(random.IntN(soak(1000, 200))) * time.Millisecond)
				must(t, syscall.Kill(m.Envoy.PID(), syscall.SIGCONT))
				time.Sleep(time.Duration(random.IntN(soak(1000, 200))) * time.Millisecond)
			}
			eventually(t, 30*time.Second, "the change in the rules", func() (bool, string) {
				s, err = a.Status(t.Context())
				must(t, err)
				last, err := lab.Probe(t.Context(), m.VM, 1000, at6(n))
				return err == nil && !last.Escaped && s.Ready, fmt.Sprint(last, err)
			})
			t.Logf("one more and one less after %v", time.Since(pushed.At))
			reached(t, m, true, 0, n-1, n)
			reached(t, m, false, gone)

			// Another program takes all away.
			undone := s.Undone
			began = time.Now()
			for _, program := range []string{"iptables", "ip6tables"} {
				_, err = m.VM.Run(t.Context(), program, "-w", "-t", "nat", "-F")
				must(t, err)
			}
			_, err = a.Wait(within(t, 30*time.Second), "repair", func(s status.Status) bool {
				return s.Undone >= undone+2 && s.Ready
			})
			must(t, err)
			t.Logf("both flushed families repaired after %v", time.Since(began))
			reached(t, m, true, 0, n)

			// What people ask, each answered within its time.
			for _, c := range [][]string{{"status"}, {"diff"}, {"doctor"},
				{"explain", at4(n).String()},
				{"explain", at6(n).String()}, {"status", "-o", "json"}} {
				began := time.Now()
				out, stderr, code, err := a.RunAs(t.Context(), 0, a.Settings(), c...)
				// doctor warns of what this VM is not, which is no error.
				if err != nil || code != 0 {
					t.Errorf("%v: %d %v %.2000s %.2000s", c, code, err, out, stderr)
				}
				t.Logf("%v: %v", c, time.Since(began))
				if c[len(c)-1] == "json" {
					must(t, json.Unmarshal([]byte(out), &s))
					holds(t, s, n)
				}
			}

			// Killed and started again it takes over what it finds.
			a.Kill()
			reached(t, m, true, 0, n)
			must(t, a.Start())
			s, err = a.Wait(within(t, 2*time.Minute), "ready", func(s status.Status) bool { return s.Ready })
			must(t, err)
			holds(t, s, n)
			a.Kill()
			_, stderr, code, err := a.Run(t.Context(), "cleanup")
			if err != nil || code != 0 {
				t.Errorf("cleanup: %d %v %s", code, err, stderr)
			}
			for _, family := range []string{"IPv4", "IPv6"} {
				if left, err := m.Chains(t.Context(), family); err != nil || left != "" {
					t.Errorf("%s: left %.1000s %v", family, left, err)
				}
			}
		})
	}
}

// holds checks that both families have n services' rules in.
func holds(t *testing.T, s status.Status, n int) {
	t.Helper()
	if len(s.Services) != n {
		t.Errorf("%d services of %d", len(s.Services), n)
	}
	for _, f := range s.Families {
		if f.Services != n || f.Rules < n || !f.Equal || !f.Jumps {
			t.Errorf("%s: %d services, %d rules, equal %v, jumps %v", f.Family, f.Services, f.Rules, f.Equal,
				f.Jumps)
		}
	}
}

// reached checks that connections to the services are redirected, or are not.
func reached(t *testing.T, m *mesh.Mesh, redirected bool, services ...int) {
	t.Helper()
	for _, i := range services {
		for _, to := range []netip.AddrPort{at4(i), at6(i)} {
			r, err := lab.Probe(t.Context(), m.VM, 1000, to)
			if err != nil || r.Escaped == redirected {
				t.Errorf("service %d at %v: %+v %v", i, to, r, err)
			}
		}
	}
}

func at4(i int) netip.AddrPort { return netip.AddrPortFrom(apart(i).Prefixes[0].Addr(), 9000) }
func at6(i int) netip.AddrPort { return netip.AddrPortFrom(apart6(i).Addr(), 9000) }
