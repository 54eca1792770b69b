//go:build lab

// Package curve measures, for `make bench`, how the agent does by number of services, beside what
// the job costs at least and beside a shell loop of twenty lines that does the same job
// (test/bench/naive.sh). What the figures are is told in test/bench/result; test/bench makes
// docs/scale.md of them.
//
// Each number of services has a lab of its own with a real Envoy, in which the three are measured
// one after the other: first nobody but Envoy, which is the floor, then the agent, then the loop.
// So what stands side by side in a table was measured within minutes on one machine.
package curve

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/test/bench/result"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

var (
	sizes = flag.String("curve.sizes", "10,100,1000,10000,32000",
		"measure at these numbers of services")
	changes = flag.Int("curve.changes", 30, "changes, one a second, that the agent is measured by; "+
		"the others are by half as many, and all by fewer where Envoy is slower than that")
	idle = flag.Duration("curve.idle", 12*time.Second, "how long it is looked at with nothing to do")
	out  = flag.String("curve.out", "../../build/bench/curve.json", "the file that is written")
)

// BenchmarkCurve writes build/bench/curve.json, anew after each number of services: what there is
// when somebody ends it is of use. With BENCH_ONCE each thing is done once, at ten services on one
// backend, and nothing is left of it.
func BenchmarkCurve(b *testing.B) {
	backends := lab.Backends
	if os.Getenv("BENCH_ONCE") != "" {
		backends = backends[:1]
		*sizes, *changes, *idle = "10", 2, 300*time.Millisecond
		*out = filepath.Join(b.TempDir(), "curve.json")
	}
	run, err := result.Here(time.Now())
	must(b, err)
	run.Brief = os.Getenv("BENCH_ONCE") != ""
	agent, err := mesh.Binary()
	must(b, err)
	envoy, err := lab.FindEnvoy()
	must(b, err)
	run.Versions = versions(b, agent, envoy)
	done := map[string]bool{}
	for size := range strings.SplitSeq(*sizes, ",") {
		n, err := strconv.Atoi(size)
		must(b, err)
		for _, backend := range backends {
			b.Run(fmt.Sprintf("%s/%d", backend, n), func(b *testing.B) {
				b.ReportMetric(0, "ns/op")
				if done[b.Name()] { // a short one is called again with a larger N
					return
				}
				done[b.Name()] = true
				r := newRig(b, &run, backend, n)
				r.measure()
				r.table()
				must(b, result.Write(*out, run))
			})
		}
	}
}

// rig is one number of services on one backend.
type rig struct {
	*testing.B
	run     *result.Run
	backend lab.Backend
	n       int
	m       *mesh.Mesh
	who     string // is measured now

	fixed []controlplane.Service
	keep  int // so many of the services are the newest ones: each change brings one and takes one
	moved int // changes so far
	more  []controlplane.Service

	// Between two changes: a second, or more where Envoy itself takes longer for one. It would be busy
	// all the time, and the control plane would send it several at once.
	interval time.Duration

	random *rand.Rand // when Envoy is killed, and how far each change is from its second
}

func newRig(b *testing.B, run *result.Run, backend lab.Backend, n int) *rig {
	seed := rand.Uint64()
	b.Logf("seed %d", seed)
	r := &rig{B: b, run: run, backend: backend, n: n, interval: time.Second,
		random: rand.New(rand.NewPCG(seed, 0))}
	// A change that is late must not be gone before it is seen. At 10 services, 4 s are enough; at
	// 10,000 a full dump of Envoy takes a good part of a second.
	r.keep = min(40, 4+n/50)
	r.moved = r.keep
	for i := range n - r.keep {
		r.fixed = append(r.fixed, service("s", 20, i))
	}
	var err error
	r.m, err = mesh.New(r.within(5*time.Minute),
		mesh.Options{Backend: backend, Config: r.config()})
	must(b, err)
	b.Cleanup(func() {
		if err := r.m.Close(); err != nil {
			b.Error(err)
		}
	})
	return r
}

// service is a TCP service with an address next to no other: those would be one rule. All are of
// one cluster, since it is rules that are measured: 32,000 clusters are Envoy's business.
func service(name string, net byte, i int) controlplane.Service {
	addr := netip.AddrFrom4([4]byte{10, net, byte(i >> 7), byte(i << 1)})
	return controlplane.Service{Name: fmt.Sprint(name, i), Cluster: "one", Port: 9000,
		Prefixes: controlplane.VIPs(addr.String()),
		Endpoints: []netip.AddrPort{
			netip.AddrPortFrom(lab.EndpointAddr(1), mesh.EndpointPort)}}
}

func vip(s controlplane.Service) netip.AddrPort {
	return netip.AddrPortFrom(s.Prefixes[0].Addr(), s.Port)
}

// config is r.n services, the newest of which is the last change's.
func (r *rig) config() controlplane.Config {
	all := slices.Clone(r.fixed)
	for i := r.moved - r.keep; i < r.moved; i++ {
		all = append(all, service("m", 40, i))
	}
	return controlplane.Config{Services: append(all, r.more...)}
}

func (r *rig) push() controlplane.Push {
	push, err := r.m.CP.Set(r.config())
	must(r, err)
	return push
}

// change pushes one service for another.
func (r *rig) change() change {
	r.moved++
	log, err := os.Stat(r.m.Envoy.LogPath)
	must(r, err)
	at := r.push().At
	return change{to: vip(service("m", 40, r.moved-1)), pushed: at, logged: log.Size(),
		until: at.Add(min(time.Minute, time.Duration(r.keep-1)*r.interval))}
}

func (r *rig) within(d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(r.Context(), d)
	r.Cleanup(cancel)
	return ctx
}

func (r *rig) add(metric string, value float64, samples int) {
	r.run.Add(string(r.backend), r.n, r.who, metric, max(value, 0), samples)
}

// measure is all of it, in the order in which each leaves the lab to the next.
func (r *rig) measure() {
	var one unix.Sockaddr
	var a *mesh.Agent
	var loop *exec.Cmd
	r.who = result.Floor
	r.part("bare iptables", func() { one = r.bare() })
	r.part("Envoy alone", r.alone)
	r.who = result.Agent
	r.add(result.Interval, r.interval.Seconds(), 0)
	r.part("agent: install", func() { a = r.agent() })
	r.part("agent: idle, then changes", func() { r.steady(a.PID(), *changes) })
	r.part("agent: writes", func() { r.writes(a) })
	r.part("agent: connects", func() { r.connects(one) })
	r.part("agent: Envoy restarts", r.restart)
	r.gone(a)
	r.who = result.Naive
	r.part("loop: install", func() { loop = r.naive() })
	r.part("loop: idle, then changes", func() { r.steady(loop.Process.Pid, *changes/2) })
	r.part("loop: connects", func() { r.connects(one) })
	r.part("loop: Envoy restarts", r.restart)
	endNaive(r, loop)
	r.complete()
}

// complete checks that nothing is left out: of all that is measured there is the agent's figure,
// and the floor's where there is one.
func (r *rig) complete() {
	for _, m := range result.Metrics {
		for _, who := range []string{result.Agent, result.Floor} {
			_, there := r.run.Find(string(r.backend), r.n, who, m.Name)
			if !there && (who == result.Agent || m.Floor != "") {
				r.Errorf("there is no %s of the %s", m.Name, who)
			}
		}
	}
}

// part does one part and tells how long it took: the whole takes half an hour.
func (r *rig) part(what string, do func()) {
	began := time.Now()
	do()
	fmt.Fprintf(os.Stderr, "%s/%d %s: %.1f s\n", r.backend, r.n, what, time.Since(began).Seconds())
}

// steady is what somebody takes and costs with nothing to do, and then with one change a second.
func (r *rig) steady(pid, count int) {
	// What the first dump took is given back, and Envoy tidies up after it.
	time.Sleep(*idle / 2)
	thread := r.m.Envoy.PID()
	cost, own, began := busy(r, thread), used(r, pid), time.Now()
	held, samples, peak := 0.0, 0, 0.0
	for time.Since(began) < *idle {
		now := resident(pid)
		held, samples, peak = held+now, samples+1, max(peak, now)
		time.Sleep(20 * time.Millisecond)
	}
	r.add(result.EnvoyIdle, share(busy(r, thread)-cost, began), 0)
	r.add(result.IdleCore, share(used(r, pid)-own, began), 0)
	r.add(result.Resident, held/float64(samples), samples)
	r.ReportMetric(peak, r.who+"-resident-peak-MB")
	own = used(r, pid)
	began = time.Now()
	r.changes(count, r.redirected)
	r.add(result.ChangingCore, share(used(r, pid)-own, began), 0)
}

// change is one that was pushed.
type change struct {
	to     netip.AddrPort // the service that came
	pushed time.Time
	until  time.Time // when it goes again
	logged int64     // how long Envoy's log was before
}

// outcome is what became of it.
type outcome struct {
	took        time.Duration // less than it is if not seen
	seen        bool
	lost, tried int // connections of the first second
}

// changes makes one change each interval, whatever becomes of the earlier ones, and tells how long
// it was from each push until await saw it. In between the services that stay are called, too.
func (r *rig) changes(count int, await func(c change) outcome) {
	count = max(min(count, 5), int(float64(count)*float64(time.Second)/float64(r.interval)))
	stay := r.m.Steady(lab.SteadyOptions{From: r.m.VM, UID: 1000, PerSecond: 20,
		Timeout: 5 * time.Second, To: []netip.AddrPort{vip(r.fixed[0]), vip(r.fixed[len(r.fixed)-1])}})
	thread := r.m.Envoy.PID()
	cost, began := busy(r, thread), time.Now()
	ends := make(chan outcome, count)
	for i := range count {
		c := r.change()
		go func() { ends <- await(c) }()
		// Not in step with anything that somebody does each second.
		step := time.Duration(i+1)*r.interval - time.Duration(r.random.Int64N(int64(r.interval/5)))
		time.Sleep(time.Until(began.Add(step)))
	}
	r.add(result.EnvoyChanging, share(busy(r, thread)-cost, began), 0)
	var took []time.Duration
	lost, tried, unseen := 0, 0, 0
	for range count {
		o := <-ends
		took = append(took, o.took)
		lost, tried = lost+o.lost, tried+o.tried
		if !o.seen {
			unseen++
		}
	}
	for metric, q := range map[string]float64{result.PushP50: 0.5, result.PushP99: 0.99} {
		if value := quantile(took, q); float64(unseen) > (1-q)*float64(count) {
			r.run.Miss(string(r.backend), r.n, r.who, metric, value,
				fmt.Sprintf("%d of %d changes were undone before they were seen", unseen, count))
		} else {
			r.add(metric, value, count)
		}
	}
	if tried > 0 {
		r.add(result.Lost, 100*float64(lost)/float64(tried), tried)
	}
	if c := stay.Stop(); r.who != result.Floor {
		r.ReportMetric(float64(c.Bad()), r.who+"-unchanged-lost")
		if c.Bad() > 0 {
			r.Logf("%s, services that stay: %v", r.who, c)
		}
	}
}

// redirected waits for the first connection that Envoy gets. In the first second it calls 25 times
// at a steady rate, too: as many of those as do not reach Envoy are lost.
func (r *rig) redirected(c change) (o outcome) {
	calls := make(chan bool)
	o.tried = 25
	for i := range o.tried {
		at := c.pushed.Add(time.Duration(i) * time.Second / time.Duration(o.tried))
		go func() {
			time.Sleep(time.Until(at))
			calls <- r.reaches(c.to)
		}()
	}
	o.took, o.seen = r.poll(c.pushed, c.until, func() bool { return r.reaches(c.to) })
	for range o.tried {
		if !<-calls {
			o.lost++
		}
	}
	return o
}

// reaches is whether a connection of an ordinary user comes to the service through Envoy.
func (r *rig) reaches(to netip.AddrPort) bool {
	ctx, cancel := context.WithTimeout(r.Context(), 5*time.Second)
	defer cancel()
	reach, err := lab.Probe(ctx, r.m.VM, 1000, to)
	return err == nil && !reach.Escaped
}

// poll asks until holds, each millisecond at first and then each fiftieth of what it took so far:
// nothing else is to be had on this machine while a poll has it busy.
func (r *rig) poll(from, until time.Time, holds func() bool) (took time.Duration, seen bool) {
	for {
		if seen = holds(); seen || time.Now().After(until) {
			return time.Since(from), seen
		}
		time.Sleep(max(time.Millisecond, time.Since(from)/50))
	}
}

// await is poll with an end that fails the benchmark.
func (r *rig) await(what string, from time.Time, holds func() bool) time.Duration {
	r.Helper()
	took, seen := r.poll(from, from.Add(5*time.Minute), holds)
	if !seen {
		r.Fatalf("%s: not within %v", what, took)
	}
	return took
}

// table prints what was measured at this number of services.
func (r *rig) table() {
	var b strings.Builder
	title := fmt.Sprintf("%s, %d services", r.backend, r.n)
	fmt.Fprintf(&b, "\n%-78s %12s %12s %12s\n", title, "agent", "floor", "naive loop")
	for _, m := range result.Metrics {
		fmt.Fprintf(&b, "  %-76s", m.Title)
		for _, who := range []string{result.Agent, result.Floor, result.Naive} {
			p, there := r.run.Find(string(r.backend), r.n, who, m.Name)
			switch {
			case !there:
				fmt.Fprintf(&b, " %12s", "")
			case p.Missing != "":
				fmt.Fprintf(&b, " %9s %-2s", fmt.Sprintf(">%.0f", p.Value), m.Unit)
			default:
				fmt.Fprintf(&b, " %9.4g %-2s", p.Value, m.Unit)
			}
		}
		b.WriteByte('\n')
	}
	fmt.Fprint(os.Stderr, b.String())
}

// quantile in ms; of few values the 99th percentile is the largest.
func quantile(took []time.Duration, q float64) float64 {
	took = slices.Sorted(slices.Values(took))
	return ms(took[min(len(took)-1, int(q*float64(len(took))))])
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func share(busy time.Duration, since time.Time) float64 {
	return 100 * busy.Seconds() / time.Since(since).Seconds()
}
