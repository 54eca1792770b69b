//go:build box

package box

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/bootstrap"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
)

// The Envoys between which a VM is upgraded, as `make tools` brings them.
const (
	envoyBefore  = "1.39.3"
	envoyUsual   = "1.40.0"
	drainTime    = 10 * time.Second // --drain-time-s of Envoy's unit
	manyStreams  = 50
	newPerSecond = 200
)

// streamVIP is a TCP service beside web, for streams that Envoy does not end by HTTP.
var streamVIP = netip.MustParseAddrPort("10.77.0.2:9000")

// pushStreams gives the control plane the mesh with streamVIP in it.
func (v *VM) pushStreams() {
	v.t.Helper()
	endpoints := []netip.AddrPort{netip.AddrPortFrom(lab.EndpointAddr(1), endpointPort)}
	_, err := v.xds.Set(controlplane.Config{
		TLSInspector: true, IPv6: controlplane.IPv6Off,
		Services: []controlplane.Service{
			{Name: "web", Prefixes: controlplane.VIPs(vip.Addr().String()), Port: vip.Port(), HTTP: true,
				Endpoints: endpoints},
			{Name: "stream", Prefixes: controlplane.VIPs(streamVIP.Addr().String()),
				Port: streamVIP.Port(), Endpoints: endpoints},
		},
		Inbound: []controlplane.Inbound{{Addr: lab.VMAddr, Port: servingPort, HTTP: true}},
	})
	if err != nil {
		v.t.Fatal(err)
	}
}

// longStreams are connections on which something goes back and forth all the time.
type longStreams struct {
	conns []net.Conn
	all   sync.WaitGroup

	mu    sync.Mutex
	ended []time.Time
	why   string // the first
}

// openStreams opens so many streams to streamVIP through Envoy.
func (v *VM) openStreams(n int) *longStreams {
	v.t.Helper()
	s := &longStreams{}
	for range n {
		conn, err := v.lab.VM.DialAs(context.Background(), 12345, streamVIP)
		if err != nil {
			v.t.Fatal(err)
		}
		s.conns = append(s.conns, conn)
		in := bufio.NewReader(conn)
		if err := ping(conn, in); err != nil {
			v.t.Fatalf("a stream: %v", err)
		}
		s.all.Go(func() {
			for {
				if err := ping(conn, in); err != nil {
					s.mu.Lock()
					s.ended = append(s.ended, time.Now())
					if s.why == "" {
						s.why = err.Error()
					}
					s.mu.Unlock()
					return
				}
				time.Sleep(200 * time.Millisecond)
			}
		})
	}
	v.t.Cleanup(s.close)
	return s
}

// ping has one line answered by lab.Echo.
func ping(conn net.Conn, in *bufio.Reader) error {
	if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return err
	}
	if _, err := io.WriteString(conn, "ping\n"); err != nil {
		return err
	}
	line, err := in.ReadString('\n')
	if err == nil && !strings.HasPrefix(line, "name=endpoint ") {
		err = fmt.Errorf("answered %q", line)
	}
	return err
}

func (s *longStreams) close() {
	for _, conn := range s.conns {
		conn.Close()
	}
	s.all.Wait()
}

// alive is how many go on, and when the first ended.
func (s *longStreams) alive() (n int, first time.Time, why string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.ended) > 0 {
		first = slices.MinFunc(s.ended, time.Time.Compare)
	}
	return len(s.conns) - len(s.ended), first, s.why
}

// allEnd waits until all have ended, as they do with the Envoy that they go through, and says when
// the first did.
func (s *longStreams) allEnd(v *VM, what string) (first time.Time, why string) {
	v.t.Helper()
	v.eventually(10*time.Second, what+": the streams have ended", func() error {
		n := 0
		if n, first, why = s.alive(); n > 0 {
			return fmt.Errorf("%d of %d go on", n, len(s.conns))
		}
		return nil
	})
	return first, why
}

// epoch is one Envoy of the box.
type epoch struct {
	pid      int // in the box
	n        int // --restart-epoch
	rss, pss int // kB
}

// epochs are the Envoys that run under the unit, oldest first.
func (v *VM) epochs() (all []epoch) {
	const look = `for p in $(cat /sys/fs/cgroup/system.slice/service-proxy-envoy.service/cgroup.procs \
		/sys/fs/cgroup/systemd/system.slice/service-proxy-envoy.service/cgroup.procs 2>/dev/null); do
	n=$(tr '\0' ' ' </proc/$p/cmdline | sed -n 's/.*--restart-epoch \([0-9]*\).*/\1/p')
	[ -n "$n" ] || continue
	echo "$p $n," $(sed -n 's/^\(Rss\|Pss\): *\([0-9]*\) kB/\2/p' /proc/$p/smaps_rollup)
done`
	out, _ := v.try("sh", "-c", look)
	for line := range strings.Lines(out) {
		var e epoch
		left, right, ok := strings.Cut(line, ",")
		f := strings.Fields(left)
		if !ok || len(f) == 0 {
			continue
		}
		e.pid, _ = strconv.Atoi(f[0])
		if len(f) > 1 {
			e.n, _ = strconv.Atoi(f[1])
		}
		if _, err := fmt.Sscan(right, &e.rss, &e.pss); err != nil {
			continue // it has just ended
		}
		all = append(all, e)
	}
	slices.SortFunc(all, func(a, b epoch) int { return a.n - b.n })
	return all
}

// serves is the version of the Envoy that answers on the admin address, and its state.
func (v *VM) serves() (version, state string, epoch int) {
	out, err := v.try("curl", "-s", "-m", "2", "http://127.0.0.1:15000/server_info")
	if err != nil {
		return "", err.Error(), -1
	}
	var info struct {
		Version string `json:"version"`
		State   string `json:"state"`
		Options struct {
			Epoch int `json:"restart_epoch"`
		} `json:"command_line_options"`
	}
	if err := json.Unmarshal([]byte(out), &info); err != nil {
		return "", err.Error(), -1
	}
	if f := strings.Split(info.Version, "/"); len(f) > 1 {
		info.Version = f[1]
	}
	return info.Version, info.State, info.Options.Epoch
}

// refusedNone ends the load. None of its connections may have failed.
func (l *load) refusedNone(t *testing.T, what string) {
	t.Helper()
	total, failed, gap := l.stop()
	t.Logf("%s: of %d new connections %d failed, the longest time without one was %v", what, total,
		failed, gap)
	if failed > 0 {
		t.Errorf("%s: %d of %d new connections failed over %v, first: %s", what, failed, total,
			l.ended.Sub(l.began), l.firstError)
	}
	if total < l.perSecond {
		t.Errorf("%s: only %d connections were made", what, total)
	}
}

// quiet checks that the agent has found nothing wrong since: neither in its log nor, as seen from
// outside, in agent-last-failure.
func (v *VM) quiet(t *testing.T, what string, since time.Time, failure string) {
	t.Helper()
	if lines := v.run("journalctl", "-q", "--no-pager", "-t", "service-proxy-agent", "-p", "warning",
		"--since", fmt.Sprintf("@%d", since.Unix())); lines != "" {
		t.Errorf("%s: in the agent's log:\n%s", what, lines)
	}
	if have := v.guest(guestattr.AgentLastFailure); have != failure {
		t.Errorf("%s: agent-last-failure is %q, was %q", what, have, failure)
	}
}

// labelled is an attribute with this label, primary-source and access log.
func labelled(t *testing.T, label, source, accessLog string) string {
	t.Helper()
	text := attributeWith(t, map[string]any{"primary-source": "gs://" + bucket + "/" + source,
		"access-log": accessLog})
	return strings.Replace(text, `"service":`, fmt.Sprintf(`"labels":{"app":%q},"service":`, label), 1)
}

// TestEnvoyRestarts changes what Envoy is started with, its binary included, under load: each time
// the next Envoy takes over from the one that runs, no new connection is refused, long streams
// live until the drain's end, and nobody finds anything wrong. Where none can take over, it is
// restarted, and that is said. proxy-version tells each time, and the next look of bootstrap
// leaves it so.
func TestEnvoyRestarts(t *testing.T) {
	t.Parallel()
	v := newVM(t, options{archive: packageRelease(t, "1.0.0", "none"),
		attribute: labelled(t, "first", "before.tgz", "")})
	for name, version := range map[string]string{"before.tgz": envoyBefore, "usual.tgz": envoyUsual} {
		binary, err := os.ReadFile(filepath.Join(moduleRoot(t), "build", "envoy-"+version))
		if err != nil {
			t.Fatal(err)
		}
		v.platform.PutObject(bucket, name, envoyTgz(t, binary))
	}
	v.pushStreams()
	v.boot()
	v.serve()
	v.install()
	v.waitFinished(90 * time.Second)
	v.eventually(30*time.Second, "the service answers through Envoy", v.checkVIP)
	main := v.envoyPID()
	set := func(label, source string) func() {
		return func() { v.platform.SetAttribute("gce-service-proxy", labelled(t, label, source, "")) }
	}
	steps := []struct {
		name, label, version string
		do                   func()
	}{
		{"a changed label", "second", envoyBefore, set("second", "before.tgz")},
		{"an upgrade", "second", envoyUsual, set("second", "usual.tgz")},
		{"a rollback", "second", envoyBefore, func() {
			t.Log(v.run("service-proxy-agent", "bootstrap", "--rollback"))
		}},
	}
	for _, step := range steps {
		v.eventually(60*time.Second, step.name+": ready before", func() error {
			_, err := v.try("service-proxy-agent", "wait", "--timeout", "1s")
			return err
		})
		failure := v.guest(guestattr.AgentLastFailure)
		held := v.openStreams(manyStreams)
		before := v.epochs()
		load, unready := v.startLoad(newPerSecond), v.watchReady()
		time.Sleep(time.Second)
		start := time.Now()
		step.do()
		v.eventually(90*time.Second, step.name+": the next Envoy serves", func() error {
			version, state, n := v.serves()
			now := v.epochs()
			if version != step.version || state != "LIVE" || len(now) == 0 ||
				now[len(now)-1].pid == before[len(before)-1].pid || now[len(now)-1].n != n {
				return fmt.Errorf("Envoy %s, epoch %d, is %s; there are %+v; bootstrap: %q", version, n, state,
					now, v.state().FailureLine())
			}
			return nil
		})
		took := time.Now()
		t.Logf("%s: the next Envoy served after %.1f s", step.name, took.Sub(start).Seconds())
		sum := 0
		for _, e := range v.epochs() {
			sum += e.pss
			t.Logf("%s: epoch %d, pid %d: Rss %d MB, Pss %d MB", step.name, e.n, e.pid, e.rss>>10, e.pss>>10)
		}
		t.Logf("%s: both epochs %d MB", step.name, sum>>10)
		v.eventually(60*time.Second, step.name+": the one before has ended", func() error {
			if now := v.epochs(); len(now) != 1 || now[0].pid == before[len(before)-1].pid {
				return fmt.Errorf("there are %+v, before %+v", now, before)
			}
			return nil
		})
		ended := time.Since(took)
		first, why := held.allEnd(v, step.name)
		t.Logf("%s: the one before ended %.1f s after the next served, the first of %d streams through "+
			"it after %.1f s: %s", step.name, ended.Seconds(), manyStreams, first.Sub(took).Seconds(), why)
		if first.Sub(took) < drainTime {
			t.Errorf("%s: a stream ended %v after the next one served: %s", step.name, first.Sub(took), why)
		}
		load.refusedNone(t, step.name)
		if why := unready(); why != "" {
			t.Errorf("%s: not ready meanwhile: %s", step.name, why)
		}
		v.waitFinished(60 * time.Second)
		v.waitNode(30*time.Second, func(n controlplane.Node) string {
			if have := n.Metadata["app"]; have != step.label {
				return fmt.Sprintf("label %v, want %q", have, step.label)
			}
			return ""
		})
		if have := v.state().EnvoyVersion; have != step.version {
			t.Errorf("%s: bootstrap's state has Envoy %s, want %s", step.name, have, step.version)
		}
		v.quiet(t, step.name, start, failure)
		if have := v.envoyPID(); have != main {
			t.Errorf("%s: the unit's main process was %s, is %s", step.name, main, have)
		}
	}
	v.nextIsStopped(t)

	v.platform.SetAttribute("gce-service-proxy", labelled(t, "third", "none.tgz", ""))
	v.waitFailure(60*time.Second, bootstrap.StepEnvoy, "status 404", "Envoy "+envoyBefore+
		" from gs://"+bucket+"/before.tgz goes on meanwhile")
	v.run("mkdir", "/srv/log")
	load := v.startLoad(newPerSecond)
	v.platform.SetAttribute("gce-service-proxy",
		labelled(t, "fourth", "usual.tgz", "/srv/log/access.log"))
	v.eventually(60*time.Second, "another Envoy serves", func() error {
		if version, state, _ := v.serves(); version != envoyUsual || state != "LIVE" {
			return fmt.Errorf("Envoy %s is %s; bootstrap: %q", version, state, v.state().FailureLine())
		}
		return nil
	})
	v.waitFinished(60 * time.Second)
	load.outage(t, "a sandbox that must be another")
	v.eventually(30*time.Second, "the service answers through Envoy", v.checkVIP)
	if os.Getenv("SOAK") != "" { // it has to wait for a minute that other attributes have not used up
		v.tellsVersion("another Envoy and another access log", envoyUsual)
	}
	for _, line := range []string{"restarting Envoy without a gap (hot restart)",
		"restarting Envoy, draining its connections: where it may write is another now",
	} {
		v.eventually(10*time.Second, "the serial port tells "+line, func() error {
			if !strings.Contains(v.Serial(), line) {
				return errors.New("it has not yet")
			}
			return nil
		})
	}
}

// tellsVersion waits until proxy-version is this one's. Three queries a minute have bootstrap's
// status, the heartbeat and a failure to tell before it.
func (v *VM) tellsVersion(what, version string) {
	v.t.Helper()
	v.eventually(150*time.Second, what+": proxy-version", func() error {
		if have := v.guest(guestattr.ProxyVersion); !strings.Contains(have, "/"+version+"/") {
			return fmt.Errorf("it is %q, want %s; bootstrap: %q", have, version, v.state().FailureLine())
		}
		return nil
	})
}

// watchReady asks all the time whether the VM is ready, until end is called, which returns why it
// was not; "": it always was.
func (v *VM) watchReady() (end func() string) {
	ctx, cancel := context.WithCancel(context.Background())
	said := make(chan string, 1)
	client := v.lab.VM.HTTP()
	client.Timeout = 5 * time.Second
	go func() {
		asked, why := 0, ""
		for ; ctx.Err() == nil && why == ""; time.Sleep(50 * time.Millisecond) {
			resp, err := client.Get("http://127.0.0.1:15020/healthz/ready")
			if err != nil {
				why = err.Error()
				break
			}
			text, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			if asked++; resp.StatusCode != http.StatusOK {
				why = string(text)
			}
		}
		if asked == 0 {
			why = "nobody asked: " + why
		}
		said <- why
	}()
	return func() string { cancel(); return <-said }
}

// hit waits in the box for the process of a unit whose command has these words, sends it a
// signal so long after it was seen, and prints its pid and how many Envoys had started their
// workers by then.
const hit = `exec 2>/dev/null # of processes that have just ended
log=/var/log/envoy/envoy.err.log
for i in $(seq 3000); do
	for p in $(cat "/sys/fs/cgroup/system.slice/$4/cgroup.procs" \
		"/sys/fs/cgroup/systemd/system.slice/$4/cgroup.procs" 2>/dev/null); do
		tr '\0' ' ' </proc/$p/cmdline 2>/dev/null | grep -q -e "$1 " || continue
		sleep "$2"
		kill "-$3" "$p" 2>/dev/null
		echo "$p $(grep -c 'starting workers' $log)"
		exit
	done
	sleep 0.02
done
exit 1`

// wrong are the words of findings that a next Envoy which does not come to serve must not cause.
var wrong = []string{"Envoy is not running", "has not received its configuration",
	"does not accept", "gives no usable answer"}

// nextIsStopped has the next Envoy be stopped for a while, or killed, at a random moment after its
// start, or bootstrap killed that has it started. As long as that Envoy has not taken over nobody
// notices, and in the end it is done.
func (v *VM) nextIsStopped(t *testing.T) {
	seed, rounds, within := uint64(time.Now().UnixNano()), 3, 300*time.Millisecond
	if os.Getenv("SOAK") != "" {
		rounds, within = 30, 800*time.Millisecond
	}
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	for round := range rounds {
		before := v.epochs()
		whom, unit := fmt.Sprintf("--restart-epoch %d", before[len(before)-1].n+1), "service-proxy-envoy"
		signal := []string{"STOP", "KILL", "KILL"}[round%3]
		after := time.Duration(random.Int64N(int64(within)))
		if round%3 == 2 {
			// It runs for some seconds: from its start to the hot restart's end.
			whom, unit, after = "service-proxy-agent bootstrap", "service-proxy-bootstrap", 5*after
		}
		// A connection is waited for 5 s: one that has taken over may be stopped for less.
		stopped := time.Duration(random.Int64N(int64(3 * time.Second)))
		if os.Getenv("SOAK") != "" && round%6 == 0 {
			stopped = 75 * time.Second // longer than the next one is waited for
		}
		label := fmt.Sprintf("round-%d", round)
		what := fmt.Sprintf("round %d, %s of %s after %v", round, signal, whom, after)
		workers := strings.TrimSpace(v.run("grep", "-c", "starting workers",
			"/var/log/envoy/envoy.err.log"))
		load, start := v.startLoad(newPerSecond), time.Now()
		v.platform.SetAttribute("gce-service-proxy", labelled(t, label, "before.tgz", ""))
		f := strings.Fields(v.run("sh", "-c", hit, "sh", whom, fmt.Sprintf("%.3f", after.Seconds()), signal,
			unit+".service"))
		if len(f) != 2 {
			t.Fatalf("%s: %q", what, f)
		}
		served := f[1] != workers
		if signal == "STOP" {
			time.Sleep(stopped)
			v.run("sh", "-c", "kill -CONT "+f[0]+" || true")
		}
		v.waitNode(180*time.Second, func(n controlplane.Node) string {
			if have := n.Metadata["app"]; have != label {
				return fmt.Sprintf("label %v, want %q", have, label)
			}
			return ""
		})
		v.waitFinished(120 * time.Second)
		v.eventually(60*time.Second, what+": one Envoy is left", func() error {
			now := v.epochs()
			if len(now) != 1 {
				return fmt.Errorf("there are %+v", now)
			}
			// Where the one that had taken over was killed, the one before drains alone for a moment.
			if slices.ContainsFunc(before, func(e epoch) bool { return e.pid == now[0].pid }) {
				return fmt.Errorf("it is the one before, %+v", now)
			}
			return nil
		})
		v.eventually(30*time.Second, what+": the service answers", v.checkVIP)
		t.Logf("%s: %v; its workers had been started: %v; done after %.1f s", what, stopped, served,
			time.Since(start).Seconds())
		if served && unit == "service-proxy-envoy" {
			load.outage(t, what) // it was all that served
			continue
		}
		load.refusedNone(t, what)
		lines := v.run("journalctl", "-q", "--no-pager", "-t", "service-proxy-agent", "--since",
			fmt.Sprintf("@%d", start.Unix()))
		for _, words := range wrong {
			if strings.Contains(lines, words) {
				t.Errorf("%s: the agent says %q:\n%s", what, words, lines)
			}
		}
	}
}
