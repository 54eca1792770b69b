//go:build lab

package e2e

import (
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/server"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
	"github.com/service-proxy-agent/service-proxy-agent/test/trend"
)

var longLength = flag.Duration("long.length", 0,
	"how long TestLongRun runs; 0: 75 minutes in make soak, else 40 seconds")

// TestLongRun: a thousand services, one of which comes, goes or changes each second, clients that
// connect, and a Prometheus that scrapes. After 75 minutes nothing of the agent has grown: memory,
// file descriptors, goroutines, threads, children, conntrack, files. A run of less than half an
// hour shows that all of it works and prints the same table, but a warm-up that is not over says
// nothing of leaks.
func TestLongRun(t *testing.T) {
	beside(t)
	length := *longLength
	if length == 0 {
		length = soak2(75*time.Minute, 40*time.Second)
	}
	random := seeded(t)
	w := newChurn(soak(1000, 200), random)
	// Files that it would leave in a folder for temporary ones are seen as others are.
	tmp := t.TempDir()
	m, err := mesh.New(within(t, time.Minute), mesh.Options{Backend: lab.NFT, Config: w.config})
	must(t, err)
	t.Cleanup(func() { must(t, m.Close()) })
	a := m.NewAgent()
	a.Setenv("TMPDIR=" + tmp)
	must(t, a.Start())
	must(t, a.WaitReady(within(t, time.Minute)))

	steady := m.Steady(lab.SteadyOptions{From: m.VM, UID: 1000, To: w.stay, PerSecond: 20})
	s := &sampler{t: t, m: m, a: a, tmp: tmp, every: min(15*time.Second, length/40), began: time.Now()}
	end := s.began.Add(length)
	var beside sync.WaitGroup
	beside.Go(func() { s.scrapes(end) })
	beside.Go(func() { s.run(end) })
	var last controlplane.Push
	for next := s.began; time.Now().Before(end); time.Sleep(time.Until(next)) {
		next = next.Add(time.Second)
		w.change()
		last, err = m.CP.Set(w.config)
		must(t, err)
	}
	beside.Wait()
	counts := steady.Stop()

	must(t, m.CP.WaitAccepted(within(t, 30*time.Second), last))
	_, err = a.Wait(within(t, 15*time.Second), "the last change", func(s status.Status) bool {
		return s.Ready && len(s.Services) == len(w.config.Services)
	})
	must(t, err)
	t.Logf("%v with %d changes (%s), %v; %d scrapes, %d failed; not ready in %d of %d looks", length,
		w.changes, w, counts, s.scraped, s.missed, s.unready, s.looks)
	if counts.Bad() != 0 || counts.OK < int(length.Seconds())*5 {
		t.Errorf("connections to services that stayed: %v", counts)
	}
	if s.missed != 0 {
		t.Errorf("%d of %d scrapes failed", s.missed, s.scraped)
	}
	if n := m.CP.Refusals(); n != 0 {
		t.Errorf("Envoy refused %d configurations: %+v", n, m.CP.Rejections()[0])
	}
	s.judge(length)
}

// soak2 is soak for times.
func soak2(d, short time.Duration) time.Duration {
	return time.Duration(soak(int(d), int(short)))
}

// churn is a mesh in which one service comes, goes or changes at a time. It stays within a
// twentieth of its size, and no address comes twice: who remembers each that ever was grows.
type churn struct {
	config                        controlplane.Config
	random                        *rand.Rand
	size, next                    int
	stay                          []netip.AddrPort // services that nobody touches
	changes, came, went, readdres int
}

// The first services of a churn stay as they are.
const staying = 20

func newChurn(size int, random *rand.Rand) *churn {
	w := &churn{config: spread(size, true), random: random, size: size, next: size}
	for i := range staying {
		w.stay = append(w.stay, at4(i), at6(i))
	}
	return w
}

// one is a service that was not there before, some of them with a cluster of its own.
func (w *churn) one() controlplane.Service {
	s := apart(w.next)
	s.Prefixes = append(s.Prefixes, apart6(w.next))
	if w.random.IntN(3) == 0 {
		s.Cluster = ""
	}
	w.next++
	return s
}

func (w *churn) change() {
	w.changes++
	all := w.config.Services
	at := staying + w.random.IntN(len(all)-staying)
	most, least := w.size+w.size/20, w.size-w.size/20
	switch what := w.random.IntN(3); {
	case what == 0 && len(all) < most || len(all) <= least:
		w.config.Services = append(all, w.one())
		w.came++
	case what == 1 || len(all) >= most:
		w.config.Services = append(all[:at:at], all[at+1:]...)
		w.went++
	default: // the same name, elsewhere
		s := w.one()
		s.Name = all[at].Name
		w.config.Services = append(append(all[:at:at], s), all[at+1:]...)
		w.readdres++
	}
}

func (w *churn) String() string {
	return fmt.Sprintf("%d came, %d went, %d moved, %d are there", w.came, w.went, w.readdres,
		len(w.config.Services))
}

// figures are what is sampled, with what each may grow by in the time that is judged.
var figures = []struct {
	name, unit string
	limit      trend.Limit
}{
	{"memory, resident", "MB", trend.Limit{Share: .05, Least: 1}},
	{"memory, anonymous", "MB", trend.Limit{Share: .05, Least: 1}},
	{"heap after GC", "MB", trend.Limit{Share: .05, Least: .5}},
	{"file descriptors", "", trend.Limit{Least: 2}},
	{"goroutines", "", trend.Limit{Least: 3}},
	{"threads", "", trend.Limit{Least: 3}},
	{"children", "", trend.Limit{Least: 1}},
	{"conntrack entries", "", trend.Limit{Share: .05, Least: 20}},
	{"run folder", "kB", trend.Limit{Share: .1, Least: 16}},
	{"run folder, files", "", trend.Limit{Least: 1}},
	{"state folder", "kB", trend.Limit{Share: .1, Least: 16}},
	{"state folder, files", "", trend.Limit{Least: 1}},
	{"temporary files", "", trend.Limit{Least: 1}},
	{"series of a scrape", "", trend.Limit{Share: .01, Least: 1}},
}

// sampler looks at the agent from outside.
type sampler struct {
	t               *testing.T
	m               *mesh.Mesh
	a               *mesh.Agent
	tmp             string
	every           time.Duration
	began           time.Time
	looks, unready  int
	scraped, missed int
	samples         map[string][]trend.Sample
}

// scrapes is a Prometheus with an interval of 5 s.
func (s *sampler) scrapes(end time.Time) {
	for next := s.began; time.Now().Before(end); time.Sleep(min(time.Until(next), time.Until(end))) {
		next = next.Add(5 * time.Second)
		s.scraped++
		if code, body, err := s.a.Get("/metrics"); err != nil || code != 200 || len(body) < 1000 {
			s.missed++
			s.t.Logf("scrape %d: %d %v", s.scraped, code, err)
		}
	}
}

func (s *sampler) run(end time.Time) {
	s.samples = make(map[string][]trend.Sample)
	for next := s.began; time.Now().Before(end); time.Sleep(min(time.Until(next), time.Until(end))) {
		next = next.Add(s.every)
		s.looks++
		if code, _, err := s.a.Get("/healthz/ready"); err != nil || code != 200 {
			s.unready++
		}
		if err := s.look(); err != nil {
			s.t.Errorf("sample %d: %v", s.looks, err)
		}
	}
}

func (s *sampler) look() error {
	note := func(name string, value float64) {
		s.samples[name] = append(s.samples[name], trend.Sample{At: time.Since(s.began), Value: value})
	}
	lines, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.a.PID()))
	if err != nil {
		return err
	}
	for field, name := range map[string]string{"VmRSS": "memory, resident",
		"RssAnon": "memory, anonymous", "Threads": "threads"} {
		value, err := statusField(string(lines), field)
		if err != nil {
			return err
		}
		if name != "threads" {
			value /= 1024
		}
		note(name, value)
	}
	open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.a.PID()))
	if err != nil {
		return err
	}
	note("file descriptors", float64(len(open)))
	note("children", float64(children(s.a.PID())))
	var entries float64
	err = s.m.VM.Do(func() error {
		text, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_count")
		if err == nil {
			entries, err = strconv.ParseFloat(strings.TrimSpace(string(text)), 64)
		}
		return err
	})
	if err != nil {
		return err
	}
	note("conntrack entries", entries)
	for name, dir := range map[string]string{"run folder": s.a.RunDir(),
		"state folder": s.a.StateDir(), "temporary files": s.tmp} {
		bytes, files := below(dir)
		if dir == s.tmp {
			note(name, files)
			continue
		}
		note(name, bytes/1024)
		note(name+", files", files)
	}
	_, text, err := s.a.Get("/metrics")
	if err != nil {
		return err
	}
	note("series of a scrape", float64(strings.Count("\n"+text, "\nservice_proxy_agent_")))
	note("goroutines", scraped(text, "go_goroutines"))
	// It asks for a collection, which nobody's memory should depend on: one a minute.
	if s.every < 15*time.Second || s.looks%4 == 0 {
		text, err := server.Dial(s.a.RunDir()).Get(s.t.Context(), "/debug/pprof/heap?gc=1&debug=1")
		if err != nil {
			return err
		}
		note("heap after GC", scraped(string(text), "# HeapAlloc =")/(1<<20))
	}
	return nil
}

// statusField is a number of /proc/PID/status.
func statusField(lines, field string) (float64, error) {
	_, rest, ok := strings.Cut(lines, "\n"+field+":")
	if f := strings.Fields(rest); ok && len(f) > 0 {
		return strconv.ParseFloat(f[0], 64)
	}
	return 0, fmt.Errorf("no %s in the status", field)
}

// scraped is the number behind a name at the beginning of a line; -1: there is none.
func scraped(text, name string) float64 {
	_, rest, _ := strings.Cut("\n"+text, "\n"+name+" ")
	value, _, _ := strings.Cut(rest, "\n")
	n, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
	if err != nil {
		return -1
	}
	return n
}

// children is how many processes have this one as their parent, those that nobody waited for
// included.
func children(pid int) (n int) {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range stats {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		// The name, in brackets, may have anything in it.
		fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
		if len(fields) > 1 && fields[1] == strconv.Itoa(pid) {
			n++
		}
	}
	return n
}

// below is how many bytes and how many files are below a folder.
func below(dir string) (bytes, files float64) {
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return nil // it was moved into its place just now
		}
		files++
		if info, err := d.Info(); err == nil && info.Mode().IsRegular() {
			bytes += float64(info.Size())
		}
		return nil
	})
	return bytes, files
}

// judge prints the table, and fails the test for what grows, where a run is long enough to say so.
func (s *sampler) judge(length time.Duration) {
	s.t.Helper()
	warmUp := length / 5
	long := length >= 30*time.Minute
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "figure\tsamples\tfirst\tmedian\tlast\tslope/h\tgrowth\t99 % interval\tnoise"+
		"\tallowed\tverdict\t")
	for _, figure := range figures {
		all := s.samples[figure.name]
		late := all
		for len(late) > 0 && late[0].At < warmUp {
			late = late[1:]
		}
		f := trend.Of(late, figure.limit)
		if len(late) == 0 {
			s.t.Errorf("%s: no samples", figure.name)
			continue
		}
		name := figure.name
		if figure.unit != "" {
			name += ", " + figure.unit
		}
		fmt.Fprintf(w, "%s\t%d\t%.4g\t%.4g\t%.4g\t%+.3g\t%+.3g\t%+.3g to %+.3g\t%.2g\t%.3g\t%v\t\n", name,
			f.N, all[0].Value, f.Median, all[len(all)-1].Value, f.PerHour(), f.Growth, f.Low, f.High,
			f.Noise, f.Allowed, f.Verdict)
		if late[len(late)-1].Value < 0 {
			s.t.Errorf("%s: could not be read", figure.name)
		}
		if f.Verdict != trend.Flat && long {
			s.t.Errorf("%s: %v", figure.name, f)
		}
	}
	w.Flush()
	says := "no run so short says anything of leaks"
	if long {
		says = "what grows fails"
	}
	s.t.Logf("after a warm-up of %v; %s:\n%s", warmUp, says, b.String())
}
