//go:build lab

package curve

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/test/bench/result"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// What the agent says of its iptables-restore.
const (
	applySum   = `apply_duration_seconds_sum{family="IPv4"}`
	applyCount = `apply_duration_seconds_count{family="IPv4"}`
)

// rounds is how often what ends by itself is measured: often where it is soon over.
func (r *rig) rounds() int {
	if r.run.Brief {
		return 1
	}
	return max(3, min(20, 20_000/r.n))
}

// bare is iptables by itself, in a namespace that has no other rules: one restore of as many rules
// as there are services, and of one rule more and less. It leaves one rule there, and a port behind
// it that accepts: the floor of connects, which are made in turn with those to the last service.
func (r *rig) bare() (one unix.Sockaddr) {
	const rule = "FLAT -d 10.40.255.2/32 -p tcp -j REDIRECT --to-ports 15001"
	const flush = "*nat\n:FLAT - [0:0]\n-F OUTPUT\nCOMMIT\n"
	var all strings.Builder
	all.WriteString("*nat\n:FLAT - [0:0]\n-A OUTPUT -p tcp -j FLAT\n")
	for _, s := range r.config().Services {
		fmt.Fprintf(&all, "-A FLAT -d %v -p tcp -j REDIRECT --to-ports 15001\n", s.Prefixes[0])
	}
	all.WriteString("COMMIT\n")
	var install, more, less []time.Duration
	r.restore(flush)
	for range r.rounds() {
		install = append(install, r.restore(all.String()))
		for range 3 {
			more = append(more, r.restore("*nat\n-A "+rule+"\nCOMMIT\n"))
			less = append(less, r.restore("*nat\n-D "+rule+"\nCOMMIT\n"))
		}
		r.restore(flush)
	}
	r.add(result.Install, quantile(install, 0.5), len(install))
	r.add(result.InstallWrite, quantile(install, 0.5), len(install))
	r.add(result.More, quantile(more, 0.5), len(more))
	r.add(result.Less, quantile(less, 0.5), len(less))
	r.restore("*nat\n-A OUTPUT -p tcp -j FLAT\n-A " + rule + "\nCOMMIT\n")
	r.listen(r.m.Client, 15001)
	return &unix.SockaddrInet4{Port: 9000, Addr: [4]byte{10, 40, 255, 2}}
}

// listen takes connections on a port of 127.0.0.1 and leaves them in the queue, which has room for
// all of one rig's. A net.Listener would be watched by Go's poller: each connection would wake a
// thread of this process beside the one that connects, and take longer than one to Envoy.
func (r *rig) listen(in *lab.Namespace, port int) {
	must(r, in.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		r.Cleanup(func() { unix.Close(fd) })
		if err := unix.Bind(fd,
			&unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}}); err != nil {
			return err
		}
		return unix.Listen(fd, 4096)
	}))
}

// restore runs one bare iptables-restore in "client" and says how long it took.
func (r *rig) restore(text string) (took time.Duration) {
	path := filepath.Join(r.m.Dir, "bare")
	must(r, os.WriteFile(path, []byte(text), 0o600))
	must(r, r.m.Client.Do(func() error {
		stdin, err := os.Open(path)
		if err != nil {
			return err
		}
		defer stdin.Close()
		cmd := exec.Command(filepath.Join(r.m.Shims(), "iptables-restore"), "--noflush", "-w", "5")
		cmd.Stdin = stdin // a file: nothing of ours is in between
		began := time.Now()
		err = cmd.Run()
		took = time.Since(began)
		return err
	}))
	return took
}

// alone is what Envoy does with nobody there, and what one dump takes that nobody reads.
func (r *rig) alone() {
	thread := r.m.Envoy.PID()
	time.Sleep(*idle / 4) // Envoy tidies up after its start
	cost, began := busy(r, thread), time.Now()
	time.Sleep(*idle / 2)
	r.add(result.EnvoyIdle, share(busy(r, thread)-cost, began), 0)
	var own []time.Duration
	for range min(3, r.rounds()) {
		c := r.change()
		c.until = time.Now().Add(2 * time.Minute)
		own = append(own, r.logged(c).took)
	}
	// Twice what it takes, in whole seconds.
	r.interval = max(time.Second, (2 * slices.Max(own)).Round(time.Second))
	r.changes(*changes/2, r.logged)
	var took []time.Duration
	cost = busy(r, thread)
	for range r.rounds() {
		// By curl's own clock: starting it is no part of a dump.
		said, err := r.m.VM.Run(r.Context(), "curl", "-sf", "-o", "/dev/null", "-w", "%{time_total}s",
			"http://127.0.0.1:15000/config_dump?resource=dynamic_listeners")
		must(r, err)
		d, err := time.ParseDuration(said)
		must(r, err)
		took = append(took, d)
	}
	r.add(result.Dump, quantile(took, 0.5), len(took))
	r.ReportMetric(ms(busy(r, thread)-cost)/float64(len(took)), "dump-envoy-cpu-ms")
}

// logged waits for Envoy's own line about a change.
func (r *rig) logged(c change) (o outcome) {
	o.took, o.seen = r.poll(c.pushed, c.until, func() bool {
		log, err := os.Open(r.m.Envoy.LogPath)
		if err != nil {
			return false
		}
		defer log.Close()
		since, err := io.ReadAll(io.NewSectionReader(log, c.logged, 1<<20))
		return err == nil && bytes.Contains(since, []byte("lds: add/update listener"))
	})
	return o
}

// agent starts the agent into an empty table, some times, and leaves it running.
func (r *rig) agent() *mesh.Agent {
	a := r.m.NewAgent()
	last := vip(r.fixed[len(r.fixed)-1])
	var took, write []time.Duration
	for i := range min(5, r.rounds()) {
		if i > 0 {
			r.gone(a)
		}
		began := time.Now()
		must(r, a.Start())
		took = append(took, r.await("the agent's rules", began, func() bool { return r.reaches(last) }))
		// Not killed while it starts programs: they hold its socket and lock until their exec.
		must(r, a.WaitReady(r.within(time.Minute)))
		write = append(write, seconds(r.metric(a, applySum)))
	}
	r.add(result.Install, quantile(took, 0.5), len(took))
	r.add(result.InstallWrite, quantile(write, 0.5), len(write))
	return a
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// gone kills the agent and takes its rules away.
func (r *rig) gone(a *mesh.Agent) {
	a.Kill()
	_, stderr, code, err := a.Run(r.Context(), "cleanup")
	if err != nil || code != 0 {
		r.Fatalf("cleanup: %d %v %s", code, err, stderr)
	}
}

// writes is what the agent's iptables-restore takes for one service more and one less, as it says
// itself, and its full dumps.
func (r *rig) writes(a *mesh.Agent) {
	one := service("more", 42, 0)
	write := func(more []controlplane.Service) time.Duration {
		sum := r.metric(a, applySum)
		count := r.metric(a, applyCount)
		r.more = more
		push := r.push()
		r.await("one more or less", push.At, func() bool { return r.reaches(vip(one)) == (more != nil) })
		r.await("a write", push.At, func() bool {
			return r.metric(a, applyCount) > count
		})
		return seconds(r.metric(a, applySum) - sum)
	}
	var more, less []time.Duration
	for range min(5, r.rounds()) {
		more = append(more, write([]controlplane.Service{one}))
		less = append(less, write(nil))
	}
	r.add(result.More, quantile(more, 0.5), len(more))
	r.add(result.Less, quantile(less, 0.5), len(less))
	dumps := r.metric(a, `envoy_questions_total{question="dump"}`)
	r.add(result.Dump, 1000*r.metric(a, `envoy_question_seconds_total{question="dump"}`)/dumps,
		int(dumps))
}

// metric is what the agent says of one series.
func (r *rig) metric(a *mesh.Agent, series string) float64 {
	r.Helper()
	code, body, err := a.Get("/metrics")
	if err != nil || code != http.StatusOK {
		r.Fatalf("/metrics: %d %v", code, err)
	}
	for line := range strings.Lines(body) {
		if value, ok := strings.CutPrefix(line, "service_proxy_agent_"+series+" "); ok {
			n, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			must(r, err)
			return n
		}
	}
	r.Fatalf("no %s in /metrics", series)
	return 0
}

// connects to the last service, and in turn to the only one in "client".
func (r *rig) connects(one unix.Sockaddr) {
	last := &unix.SockaddrInet4{Port: 9000, Addr: vip(r.fixed[len(r.fixed)-1]).Addr().As4()}
	each := func(in *lab.Namespace, to unix.Sockaddr) (took []time.Duration) {
		must(r, in.Do(func() error {
			for range 25 {
				d, err := connect(to)
				if err != nil {
					return fmt.Errorf("connect in %s: %w", in.Name, err)
				}
				took = append(took, d)
			}
			return nil
		}))
		return took
	}
	var many, few []time.Duration
	for range r.rounds() * 2 {
		many, few = append(many, each(r.m.VM, last)...), append(few, each(r.m.Client, one)...)
	}
	r.add(result.Connect, 1000*quantile(many, 0.5), len(many))
	if r.who == result.Agent {
		r.run.Add(string(r.backend), r.n, result.Floor, result.Connect, 1000*quantile(few, 0.5), len(few))
	}
}

// restart is what becomes of connections to a service that stays while Envoy is killed at a random
// moment and started again: refused while it is away, which nobody can help, or led past it.
func (r *rig) restart() {
	to := vip(r.fixed[0])
	calls := r.m.Steady(lab.SteadyOptions{From: r.m.VM, UID: 1000, PerSecond: 50,
		Timeout: 5 * time.Second, To: []netip.AddrPort{to}})
	looked := 1500 * time.Millisecond // a loop that sleeps a second has looked again after it
	if r.run.Brief {
		looked = 100 * time.Millisecond
	}
	time.Sleep(time.Duration(r.random.Int64N(int64(looked))))
	began := time.Now()
	must(r, r.m.Envoy.Restart())
	must(r, r.m.Envoy.WaitReady(r.within(2*time.Minute)))
	took := r.await("through Envoy again", began, func() bool { return r.reaches(to) })
	time.Sleep(looked)
	r.await("through Envoy still", began, func() bool { return r.reaches(to) })
	c := calls.Stop()
	r.ReportMetric(ms(took), r.who+"-restart-ms")
	r.ReportMetric(float64(c.Escaped), r.who+"-restart-escaped-of-50/s")
	r.ReportMetric(float64(c.Failed), r.who+"-restart-failed-of-50/s")
}

// naive starts the loop and waits for all of its rules.
func (r *rig) naive() *exec.Cmd {
	began := time.Now()
	loop := startNaive(r, r.m)
	last := vip(r.fixed[len(r.fixed)-1])
	r.add(result.Install, ms(r.await("the loop's rules", began, func() bool {
		return r.reaches(last)
	})), 1)
	return loop
}
