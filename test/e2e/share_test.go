//go:build lab

package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// TestShareOfMainThread is what the agent's questions cost Envoy's main thread, against the same
// Envoy without it: at most 1 % idle, and 10 % under one change a second. On a machine that is so
// busy that Envoy's own work for the changes takes more than 10 %, at most as much as that. The
// figures are held to this in make soak; in make test, to the changes being in the rules.
func TestShareOfMainThread(t *testing.T) {
	counts := []int{10, 1_000}
	if soak(1, 0) == 1 {
		counts = append(counts, 10_000)
	}
	for _, n := range counts {
		t.Run(fmt.Sprint(n, " services"), func(t *testing.T) {
			t.Parallel() // the time is processor time
			length := time.Duration(soak(60, 6)) * time.Second
			config := func(change int) (c controlplane.Config) {
				for i := range n {
					// None next to another, or they would be one rule.
					s := service(2 * i)
					s.HTTP = true
					c.Services = append(c.Services, s)
				}
				c.Services[n-1] = service(2*n + 2*change)
				return c
			}
			m, err := mesh.New(within(t, 2*time.Minute), mesh.Options{Config: config(0)})
			must(t, err)
			defer m.Close()
			thread := mainThread(m.Envoy.PID())
			during := func(what func()) float64 {
				before, began := cpu(t, thread), time.Now()
				what()
				return share(cpu(t, thread)-before, time.Since(began))
			}
			changes := 0
			newest := func() string { return "-d " + service(2*n + 2*changes).Prefixes[0].String() + " " }
			changing := func() {
				for end := time.Now().Add(length); time.Now().Before(end); time.Sleep(time.Second) {
					changes++
					_, err := m.CP.Set(config(changes))
					must(t, err)
				}
			}
			alone := during(func() { time.Sleep(length) })
			aloneChanging := during(changing)

			a := m.NewAgent()
			must(t, a.Start())
			must(t, a.WaitReady(within(t, time.Minute)))
			time.Sleep(2 * time.Second) // Envoy tidies up after the first dump, which is no part of this
			first, err := a.Status(t.Context())
			must(t, err)
			idle := during(func() { time.Sleep(length) })
			withChanging := during(changing)
			last, err := a.Status(t.Context())
			must(t, err)
			eventually(t, time.Minute, "the last change in the rules", func() (bool, string) {
				out := chains(t, m)
				return strings.Contains(out, newest()), newest() + a.Log()
			})
			t.Logf(
				"idle: %.2f %% alone, %.2f %% with the agent; one change a second: %.1f %% alone, %.1f %% with the agent; %d passes",
				alone, idle, aloneChanging, withChanging, last.Passes-first.Passes)
			if cost := idle - alone; cost > 1 {
				tooDear(t, "idle, the agent costs %.2f %%", cost)
			}
			// Envoy's own work is the measure of the machine: other tests that fill its caches and
			// cores make both dearer, by half on the same machine a moment later.
			limit := max(10, aloneChanging)
			if cost := withChanging - aloneChanging; cost > limit {
				tooDear(t, "under one change a second, the agent costs %.1f %%", cost)
			}
		})
	}
}
