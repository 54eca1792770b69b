//go:build lab

package e2e

import (
	"context"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/test/hostile"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// TestHostileUser: a local user without rights tries every socket, file, port, process and
// attribute. It manages what any process on a VM can, and nothing comes of it: connections go
// through Envoy, rules and process stay, and health checks from outside are answered.
func TestHostileUser(t *testing.T) {
	beside(t)
	for _, backend := range lab.Backends[:soak(len(lab.Backends), 1)] {
		t.Run(string(backend), func(t *testing.T) {
			random := seeded(t)
			m, a := start(t, mesh.Options{Backend: backend, Config: services()})
			must(t, a.WaitReady(within(t, 20*time.Second)))
			through(t, m, web4)
			before, fds, pid := chains(t, m), openFDs(t, a), a.PID()
			steady := m.Steady(lab.SteadyOptions{From: m.VM, UID: 1000, PerSecond: 50, HTTP: true,
				To: []netip.AddrPort{web4, web6}})
			ctx, cancel := context.WithTimeout(t.Context(), time.Duration(soak(120, 30))*time.Second)
			defer cancel()
			var beside sync.WaitGroup
			beside.Go(func() { healthChecks(ctx, t, m) })
			events, err := hostile.User{Mesh: m, Agent: a}.Harass(ctx, random)
			must(t, err)
			cancel()
			beside.Wait()

			count := map[hostile.Kind]int{}
			for _, e := range events {
				count[e.Kind]++
				if !e.Allowed() || e.Kind == hostile.Caught {
					t.Errorf("%v", e)
				}
				// Envoy's and the agent's listeners are there: at most a family without one is free.
				if e.Kind == hostile.Bound && !strings.Contains(e.What, ":15000") &&
					!strings.Contains(e.What, ":15053") {
					t.Errorf("%v, where one of ours listens", e)
				}
			}
			t.Logf("%v", count)
			if count[hostile.WroteAttribute] == 0 || count[hostile.AskedEnvoy] == 0 {
				t.Error("it did not do its work")
			}
			if c := steady.Stop(); c.Bad() != 0 {
				t.Errorf("connections beside it: %v", c)
			}
			if after := chains(t, m); after != before || a.PID() != pid {
				t.Errorf("the rules changed:\n%s\nbefore:\n%s", after, before)
			}
			_, err = a.Wait(within(t, 5*time.Second), "ready", func(s status.Status) bool {
				return s.Ready && s.Mode == "intercepting" && s.Healthy()
			})
			must(t, err)
			eventually(t, 20*time.Second, "no descriptors left of it", func() (bool, string) {
				now := openFDs(t, a)
				return now <= fds+10, fmt.Sprintf("%d, before %d", now, fds)
			})
		})
	}
}

// healthChecks asks as a health checker does, from outside of the VM.
func healthChecks(ctx context.Context, t *testing.T, m *mesh.Mesh) {
	client := m.Client.HTTP()
	for ctx.Err() == nil {
		resp, err := client.Get(fmt.Sprintf("http://%v:15020/healthz", lab.VMAddr))
		if err != nil {
			t.Errorf("a health check from outside: %v", err)
			return
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			t.Errorf("a health check from outside: %s", resp.Status)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func openFDs(t *testing.T, a *mesh.Agent) int {
	t.Helper()
	open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", a.PID()))
	must(t, err)
	return len(open)
}

// TestHostileUserOnPorts: with Envoy down its ports are free, and a local user takes and leaves
// them. Connections come to it for the second that the agent takes to see it, and for no longer.
func TestHostileUserOnPorts(t *testing.T) {
	beside(t)
	random := seeded(t)
	m, a := start(t, mesh.Options{Backend: lab.NFT, Config: services()})
	must(t, a.WaitReady(within(t, 20*time.Second)))
	through(t, m, web4)
	m.Envoy.Kill()
	steady := m.Steady(lab.SteadyOptions{From: m.VM, UID: 1000, PerSecond: 50, Timeout: time.Second,
		To: []netip.AddrPort{web4, db4}})
	ctx, cancel := context.WithTimeout(t.Context(), time.Duration(soak(120, 30))*time.Second)
	defer cancel()
	events, err := hostile.User{Mesh: m, Agent: a, Ports: []uint16{15001}}.Harass(ctx, random)
	must(t, err)
	t.Logf("%v", steady.Stop())
	var since time.Time
	var bound, caught int
	var longest time.Duration
	for _, e := range events {
		switch e.Kind {
		case hostile.Bound:
			since = e.At
			bound++
		case hostile.Caught:
			caught++
			longest = max(longest, e.At.Sub(since))
		default:
			if !e.Allowed() {
				t.Errorf("%v", e)
			}
		}
	}
	t.Logf("bound %d times, caught %d connections, the last %v after it had the port", bound, caught,
		longest)
	if bound == 0 {
		t.Error("the port was never taken")
	}
	if longest > 1100*time.Millisecond {
		tooDear(t, "connections were caught for %v", longest)
	}
	must(t, m.Envoy.Start())
	must(t, a.WaitReady(within(t, 20*time.Second)))
	through(t, m, web4)
}

// TestHostileUserFindsHoles: where our folders are everybody's and files everybody's to read, the
// same user says so. Else the tests above would prove that it tries nothing.
func TestHostileUserFindsHoles(t *testing.T) {
	beside(t)
	m, a := start(t, mesh.Options{Config: services()})
	must(t, a.WaitReady(within(t, 20*time.Second)))
	secret := filepath.Join(a.StateDir(), "secret")
	must(t, os.WriteFile(secret, []byte("x"), 0o600))
	must(t, os.Chmod(a.StateDir(), 0o777))
	// One round, which takes some seconds, or more on a busy machine.
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	events, err := hostile.User{Mesh: m, Agent: a}.Harass(ctx, seeded(t))
	must(t, err)
	count := map[hostile.Kind]int{}
	for _, e := range events {
		count[e.Kind]++
	}
	t.Logf("%v", count)
	if count[hostile.Changed] == 0 {
		t.Error("a folder of everybody's was left as it is")
	}
	if _, err := os.Lstat(secret); err == nil {
		t.Error("a file in it was not removed")
	}
}
