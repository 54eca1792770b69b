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
// Envoy without it: at most 1 % idle, and under one change a second 10 % and what was saved up in
// calm. On a machine that is so busy that Envoy's own work for the changes takes more than 10 %, at
// most as much as that. The figures are held to this in make soak. What the agent itself books as
// asked is held to its budget always: that is what it decides by, however busy a machine is.
func TestShareOfMainThread(t *testing.T) {
	beside(t)
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
			var booked *booking // nil: there is no agent yet
			changing := func() {
				for end := time.Now().Add(length); time.Now().Before(end); time.Sleep(time.Second) {
					booked.look(t)
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
			resting := newBooking(t, a)
			idle := during(func() { time.Sleep(length) })
			// On a busy machine answers wait for a processor: what counts here is how many are asked for.
			resting.check(t, map[string]float64{"look": 1, "ready": 1, "clusters": 1. / 20}, .1, 0)
			booked = newBooking(t, a)
			withChanging := during(changing)
			last, err := a.Status(t.Context())
			must(t, err)
			saved := last.Cost.Bucket.Size
			booked.check(t, nil, last.Cost.Bucket.Share, saved)
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
			limit := max(10, aloneChanging) + 100*saved/length.Seconds()
			if cost := withChanging - aloneChanging; cost > limit {
				tooDear(t, "under one change a second, the agent costs %.1f %%", cost)
			}
		})
	}
}

// booking is what an agent books as asked of Envoy over a time.
type booking struct {
	agent       *mesh.Agent
	began       time.Time
	first, last map[string]float64
	most        map[string]float64 // that came between two looks
}

func newBooking(t *testing.T, a *mesh.Agent) *booking {
	b := &booking{agent: a, began: time.Now(), most: map[string]float64{}}
	b.look(t)
	b.first = b.last
	return b
}

// look asks the agent.
func (b *booking) look(t *testing.T) {
	t.Helper()
	if b == nil {
		return
	}
	now := map[string]float64{}
	for _, q := range []string{"dump", "look", "ready", "stats", "clusters"} {
		for _, series := range []string{"envoy_questions_total", "envoy_question_seconds_total"} {
			name := fmt.Sprintf("%s{question=%q}", series, q)
			now[name] = metric(t, b.agent, name)
			b.most[name] = max(b.most[name], now[name]-b.last[name])
			if b.last == nil {
				b.most[name] = 0
			}
		}
	}
	b.last = now
}

// check holds numbers of questions to a rate, in 1/s, and the seconds of all of them to a share of
// the time and what was saved up before, but for what was under way, or asked for by a line of the
// log, at the beginning and at the end.
func (b *booking) check(t *testing.T, rate map[string]float64, share, saved float64) {
	t.Helper()
	b.look(t)
	elapsed := time.Since(b.began).Seconds()
	for q, limit := range rate {
		name := fmt.Sprintf("envoy_questions_total{question=%q}", q)
		if n := b.last[name] - b.first[name]; n > 5+limit*elapsed {
			t.Errorf("%s: %v in %.1f s", name, n, elapsed)
		}
	}
	took, most := 0., 0.
	for name := range b.last {
		if strings.HasPrefix(name, "envoy_question_seconds_total") {
			took, most = took+b.last[name]-b.first[name], max(most, b.most[name])
		}
	}
	if took > 2*most+share*elapsed+saved {
		t.Errorf("%.3f s were asked for in %.1f s, of which %.3f s at most at once; at first %.1f s",
			took, elapsed, most, saved)
	}
}
