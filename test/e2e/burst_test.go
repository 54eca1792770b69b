//go:build lab

package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// burst is a number of changes after calm, and then changes without end. Each service that is there
// from the beginning has a cluster of its own, so that a look costs Envoy the most that it can.
// Those that come share one: Envoy is then busy with listeners, and not with 10,000 clusters.
type burst struct {
	services int
	http     bool          // chains with routes by RDS; else TCP chains
	alone    time.Duration // Envoy without the agent: idle for so long, then changing
	calm     time.Duration // before the burst; idle is its second half
	changes  int           // of the burst
	gap      time.Duration // between them
	storm    time.Duration // one change each second
}

// burstOf is one of the full size, or one that only shows that all of it works.
func burstOf(full, http bool) burst {
	if full {
		return burst{services: 10_000, http: http, alone: 40 * time.Second, calm: 80 * time.Second,
			changes: 5, gap: 2 * time.Second, storm: 2 * time.Minute}
	}
	return burst{services: 20, http: http, alone: 100 * time.Millisecond, calm: time.Second / 2,
		changes: 5, gap: 200 * time.Millisecond, storm: time.Second}
}

// change is one change, in time since its push.
type change struct {
	pushed     time.Time
	logged     time.Duration // until Envoy's log told it; 0: it did not
	redirected time.Duration // until a first connection to the new service was led to Envoy
}

// late is the agent's part: from when Envoy had it.
func (c change) late() time.Duration { return c.redirected - c.logged }

// measured is what a burst came to. Shares are of Envoy's main thread, in percent.
type measured struct {
	burst
	curl          []time.Duration // of a full dump to /dev/null while nobody else asks
	dump          time.Duration   // the agent's own, the mean of those of the burst
	few, many     []change        // of the burst, of the storm
	alone         [2]float64      // idle, changing
	idle          float64         // with the agent
	over, settled float64         // of the storm, and of its second half
	took          map[string]float64
	buckets       [3]status.Bucket // before the burst, after it, after the storm
}

// run measures in a mesh of its own.
func (o burst) run(t testing.TB) measured {
	r := measured{burst: o, took: map[string]float64{}}
	config := controlplane.Config{}
	for i := range o.services {
		config.Services = append(config.Services, o.service(i))
	}
	m, err := mesh.New(within(t, 3*time.Minute), mesh.Options{Backend: lab.NFT, Config: config})
	must(t, err)
	defer func() { must(t, m.Close()) }()
	thread := mainThread(m.Envoy.PID())
	during := func(what func()) float64 {
		before, began := cpu(t, thread), time.Now()
		what()
		return share(cpu(t, thread)-before, time.Since(began))
	}
	// An Envoy works on 10,000 services for some time after it took them.
	settle := func() {
		for end := time.Now().Add(o.alone); time.Now().Before(end); {
			if during(func() { time.Sleep(o.alone / 40) }) < 2 {
				return
			}
		}
	}
	c := newChanges(t, m, o, config)
	settle()
	r.alone[0] = during(func() { time.Sleep(o.alone) })
	r.alone[1] = during(func() { c.eachSecond(o.alone, nil) })
	settle()
	r.curl = curls(t, m, 3)

	a := m.NewAgent()
	must(t, a.Start())
	must(t, a.WaitReady(within(t, time.Minute)))
	time.Sleep(o.calm / 2)
	r.idle = during(func() { time.Sleep(o.calm / 2) })
	r.buckets[0] = bucketOf(t, a)
	calm := asks(t, a)

	var w watched
	for i, next := 0, time.Now(); i < o.changes; i, next = i+1, next.Add(o.gap) {
		time.Sleep(time.Until(next))
		c.push(&w)
	}
	r.few = c.redirected(&w)
	r.buckets[1] = bucketOf(t, a)
	after := asks(t, a)
	if n := after["dump"].count - calm["dump"].count; n > 0 {
		r.dump = time.Duration((after["dump"].seconds - calm["dump"].seconds) / n * float64(time.Second))
	}

	w = watched{}
	began := time.Now()
	r.over = during(func() {
		c.eachSecond(o.storm/2, &w)
		r.settled = during(func() { c.eachSecond(o.storm/2, &w) })
	})
	length := time.Since(began)
	for q, n := range asks(t, a) {
		r.took[q] = 100 * (n.seconds - after[q].seconds) / length.Seconds()
	}
	r.many = c.redirected(&w)
	r.buckets[2] = bucketOf(t, a)
	return r
}

func (o burst) service(i int) controlplane.Service {
	s := service(2 * i) // none next to another: those would be one rule
	s.HTTP = o.http
	return s
}

// changes has the control plane send one more service after the other.
type changes struct {
	t      testing.TB
	m      *mesh.Mesh
	o      burst
	config controlplane.Config

	mu   sync.Mutex
	told []time.Time // when Envoy's log told of a listener
}

func newChanges(t testing.TB, m *mesh.Mesh, o burst, config controlplane.Config) *changes {
	c := &changes{t: t, m: m, o: o, config: config}
	events := envoyadmin.FollowLog(t.Context(), m.Envoy.LogPath)
	go func() {
		for e := range events {
			if e.Kind == envoyadmin.ListenerChanged {
				c.mu.Lock()
				c.told = append(c.told, time.Now())
				c.mu.Unlock()
			}
		}
	}()
	return c
}

// watched are the changes that are looked for by connections, one after the other: a dump that has
// one has those before it.
type watched struct {
	sync.WaitGroup
	mu   sync.Mutex
	all  []change
	last chan struct{} // closed when the one before is redirected
}

// push sends one more service; nil: nobody looks what becomes of it.
func (c *changes) push(w *watched) {
	s := c.o.service(len(c.config.Services))
	s.Cluster = "cluster-" + c.config.Services[0].Name
	c.config.Services = append(c.config.Services, s)
	push, err := c.m.CP.Set(c.config)
	must(c.t, err)
	if w == nil {
		return
	}
	before, mine := w.last, make(chan struct{})
	w.last = mine
	w.Go(func() {
		defer close(mine)
		if before != nil {
			<-before
		}
		vip := netip.AddrPortFrom(s.Prefixes[0].Addr(), s.Port)
		for ctx := c.t.Context(); ctx.Err() == nil && time.Since(push.At) < 2*time.Minute; {
			limited, cancel := context.WithTimeout(ctx, 5*time.Second)
			r, err := lab.HTTPProbe(limited, c.m.VM, 1000, vip)
			cancel()
			if err == nil && !r.Escaped {
				w.mu.Lock()
				w.all = append(w.all, change{pushed: push.At, redirected: time.Since(push.At)})
				w.mu.Unlock()
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		c.t.Errorf("%v is not redirected %v after its push", vip, time.Since(push.At))
	})
}

// eachSecond pushes a change a second, in step with nothing.
func (c *changes) eachSecond(length time.Duration, w *watched) {
	for end := time.Now().Add(length); time.Now().Before(end); {
		next := time.Now().Add(900*time.Millisecond + rand.N(200*time.Millisecond))
		c.push(w)
		time.Sleep(min(time.Until(next), time.Until(end)))
	}
}

// redirected waits for all, and says since when Envoy had each: by the first line of its log behind
// the push. Where Envoy took two pushes as one that is too early, and the agent looks later.
func (c *changes) redirected(w *watched) []change {
	w.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, one := range w.all {
		for _, told := range c.told {
			if d := told.Sub(one.pushed); d > 0 && d < one.redirected {
				w.all[i].logged = d
				break
			}
		}
	}
	return w.all
}

// curls is how long a full dump takes that nobody reads.
func curls(t testing.TB, m *mesh.Mesh, n int) (took []time.Duration) {
	for range n {
		began := time.Now()
		_, err := m.VM.Run(t.Context(), "curl", "-sSf", "-o", "/dev/null",
			"http://"+lab.AdminAddr.String()+"/config_dump?resource=dynamic_listeners")
		must(t, err)
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	return took
}

func bucketOf(t testing.TB, a *mesh.Agent) status.Bucket {
	s, err := a.Status(t.Context())
	must(t, err)
	return s.Cost.Bucket
}

// asked is what one kind of question came to since the agent's start.
type asked struct{ count, seconds float64 }

func asks(t testing.TB, a *mesh.Agent) map[string]asked {
	all := map[string]asked{}
	for q := range envoyadmin.Question(len(envoyadmin.Asked{}.Questions)) {
		all[q.String()] = asked{
			metric(t, a, fmt.Sprintf("envoy_questions_total{question=%q}", q)),
			metric(t, a, fmt.Sprintf("envoy_question_seconds_total{question=%q}", q))}
	}
	return all
}

// timesOf is one time of each change.
func timesOf(all []change, of func(change) time.Duration) (d []time.Duration) {
	for _, c := range all {
		d = append(d, of(c))
	}
	return d
}

func logged(c change) time.Duration     { return c.logged }
func redirected(c change) time.Duration { return c.redirected }

// table is all of it for people, each figure with its floor beside it.
func (r measured) table() string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	chains := "TCP"
	if r.http {
		chains = "HTTP"
	}
	line := func(format string, args ...any) { fmt.Fprintf(w, format+"\n", args...) }
	line("%d services, %s chains\tfloor\twith the agent\tthe agent's part", r.services, chains)
	line("a full dump\tcurl %.0f ms\t%.0f ms", ms(r.curl, 50), ms([]time.Duration{r.dump}, 0))
	for i, c := range r.few {
		line("change %d after calm\tEnvoy's log %.0f ms\tredirected %.0f ms\t%.0f ms, %.2f dumps", i+1,
			ms([]time.Duration{c.logged}, 0), ms([]time.Duration{c.redirected}, 0),
			ms([]time.Duration{c.late()}, 0), c.late().Seconds()/max(.001, r.longDump().Seconds()))
	}
	for _, percent := range []int{50, 100} {
		line("%d changes, one a second, p%d\tEnvoy's log %.0f ms\tredirected %.0f ms\t%.0f ms",
			len(r.many), percent, ms(timesOf(r.many, logged), percent),
			ms(timesOf(r.many, redirected), percent), ms(timesOf(r.many, change.late), percent))
	}
	line("main thread, changing, all\talone %.2f %%\t%.2f %%\t%.2f %%", r.alone[1], r.over,
		r.over-r.alone[1])
	line("main thread, changing, 2nd half\talone %.2f %%\t%.2f %%\t%.2f %%", r.alone[1], r.settled,
		r.settled-r.alone[1])
	line("main thread, idle\talone %.2f %%\t%.2f %%\t%.2f %%", r.alone[0], r.idle, r.idle-r.alone[0])
	for i, when := range []string{"after calm", "after the burst", "after the storm"} {
		line("bucket %s\t%.1f s at most\t%.2f s", when, r.buckets[i].Size, r.buckets[i].Level)
	}
	w.Flush()
	fmt.Fprintf(&b, "questions booked while changing, in %% of the time: %.3v\n", r.took)
	return b.String()
}

// longDump is what one full dump takes: as the agent met it, or curl on an idle Envoy if that was
// slower.
func (r measured) longDump() time.Duration { return max(r.dump, r.curl[len(r.curl)/2]) }

// check holds it to what the agent promises.
func (r measured) check(t *testing.T) {
	t.Helper()
	limit := 2*r.longDump() + 300*time.Millisecond
	for i, c := range r.few {
		if c.late() > limit {
			tooDear(t, "change %d is redirected %v after Envoy had it, more than %v", i+1, c.late(), limit)
		}
	}
	late := timesOf(r.many, change.late)
	if latest := slices.Max(late); latest > 15*time.Second {
		tooDear(t, "under one change a second one is redirected only after %v", latest)
	}
	if median := ms(late, 50); median > 8000 {
		tooDear(t, "under one change a second half are redirected only after %.0f ms", median)
	}
	if cost := r.settled - r.alone[1]; cost > 10 {
		tooDear(t, "under one change a second the agent costs %.1f %% of Envoy's main thread", cost)
	}
	if cost := r.idle - r.alone[0]; cost > .3 {
		tooDear(t, "idle, the agent costs %.2f %% of Envoy's main thread", cost)
	}
	for i, b := range r.buckets {
		if b.Size < 6 || b.Level > b.Size || b.Share != .1 {
			t.Errorf("bucket %d: %+v", i, b)
		}
	}
}

// TestBurst: after calm each change of a burst is redirected by a dump of its own; changes without
// end are redirected as often as --envoy-share pays for a dump. In make soak with 10,000 services,
// and held to figures.
func TestBurst(t *testing.T) {
	beside(t)
	for _, http := range []bool{true, false} {
		t.Run(fmt.Sprintf("http=%v", http), func(t *testing.T) {
			beside(t)
			r := burstOf(soak(1, 0) == 1, http).run(t)
			t.Log("\n" + r.table())
			r.check(t)
		})
	}
}

// BenchmarkBurst prints what TestBurst measures.
func BenchmarkBurst(b *testing.B) {
	for _, http := range []bool{true, false} {
		b.Run(fmt.Sprintf("http=%v", http), func(b *testing.B) {
			r := burstOf(times(1, 0) == 1, http).run(b)
			b.Log("\n" + r.table())
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(ms(r.curl, 50), "curl-dump-ms")
			b.ReportMetric(ms(timesOf(r.few, logged), 100), "burst-envoy-logged-max-ms")
			b.ReportMetric(ms(timesOf(r.few, redirected), 100), "burst-max-ms")
			b.ReportMetric(ms(timesOf(r.few, change.late), 100)/ms([]time.Duration{r.longDump()}, 0),
				"burst-max-dumps")
			b.ReportMetric(ms(timesOf(r.many, redirected), 50), "storm-p50-ms")
			b.ReportMetric(ms(timesOf(r.many, redirected), 100), "storm-max-ms")
			b.ReportMetric(r.settled-r.alone[1], "envoy-main-changing-%")
			b.ReportMetric(r.idle-r.alone[0], "envoy-main-idle-%")
		})
	}
}

// TestBurstStopped: while changes come at random, Envoy, its control plane and the agent are held
// up for a moment at random. Each change is redirected all the same, the bucket is what
// --envoy-share says, and no more was taken than it had: by /metrics and by status alike.
func TestBurstStopped(t *testing.T) {
	t.Parallel()
	const percent = 25
	o := burstOf(false, false)
	config := controlplane.Config{}
	for i := range o.services {
		config.Services = append(config.Services, o.service(i))
	}
	m, a := start(t, mesh.Options{Backend: lab.NFT, Config: config}, "--envoy-share",
		fmt.Sprint(percent))
	began := time.Now()
	must(t, a.WaitReady(within(t, 20*time.Second)))
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	signal := func(s syscall.Signal) func() {
		return func() { must(t, syscall.Kill(a.PID(), s)) }
	}
	stops := []struct{ stop, goOn func() }{
		{m.Envoy.Pause, m.Envoy.Continue}, {m.CP.Pause, m.CP.Continue},
		{signal(syscall.SIGSTOP), signal(syscall.SIGCONT)},
	}
	c := newChanges(t, m, o, config)
	var w watched
	held := 0. // questions wait so long for nothing that Envoy does
	for range soak(100, 8) {
		c.push(&w)
		s, length := stops[r.IntN(len(stops))], time.Duration(r.Int64N(int64(600*time.Millisecond)))
		time.Sleep(time.Duration(r.Int64N(int64(50 * time.Millisecond))))
		s.stop()
		time.Sleep(length)
		s.goOn()
		held += length.Seconds()
	}
	if all := c.redirected(&w); len(all) == 0 {
		t.Error("no change is redirected")
	}
	s, err := a.Wait(within(t, 15*time.Second), "what was asked", func(s status.Status) bool {
		return len(s.Cost.Questions) > 0 && s.Cost.Questions[0].Count > 0
	})
	must(t, err)
	b := s.Cost.Bucket
	if b.Size < 6 || b.Level > b.Size || b.Share != percent/100. {
		t.Errorf("bucket %+v", b)
	}
	scraped := status.Bucket{Level: metric(t, a, "envoy_budget_seconds"),
		Size: metric(t, a, "envoy_budget_size_seconds"), Share: metric(t, a, "envoy_share_ratio")}
	if scraped.Size != b.Size || scraped.Share != b.Share || scraped.Level > b.Size {
		t.Errorf("scraped %+v, status %+v", scraped, b)
	}
	taken, longest, first := 0., 0.6, s.Cost.Questions
	for q, n := range asks(t, a) {
		taken += n.seconds
		i := slices.IndexFunc(first, func(is status.Question) bool { return is.Name == q })
		if i < 0 || float64(first[i].Count) > n.count || first[i].Seconds > n.seconds {
			t.Errorf("%s: %+v, and before %+v", q, n, first)
		}
	}
	if most := b.Size + b.Share*time.Since(began).Seconds() + longest + held; taken > most {
		t.Errorf("%.2f s were waited for answers, at most %.2f s were there", taken, most)
	}
}
