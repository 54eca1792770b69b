//go:build box

package box

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
)

// rawVIP is a service by TCP at the port where the endpoint listens at every address: so a
// connection that nobody redirected is answered, too, by rawVIP itself.
var rawVIP = netip.AddrPortFrom(netip.MustParseAddr("10.77.0.2"), endpointPort)

// neighbour is another program that writes into the kernel's tables.
type neighbour struct {
	name string
	// setUp has it configured as its documents say, before it first starts.
	setUp string
	start string
	// do is what is done to it while it runs: reload, restart.
	do   []string
	stop string
	// reaches says that what it does takes rules of ours away, so that they are put back.
	reaches bool
	// long: with SOAK=1 alone.
	long bool
	// with is looked at while it runs.
	with func(*company, *testing.T)
}

var firewalld = []string{"firewall-cmd --reload", "systemctl reload firewalld",
	"systemctl restart firewalld"}

var neighbours = []neighbour{
	{
		name: "nftables.service", start: "systemctl start nftables", stop: "systemctl stop nftables",
		do: []string{"systemctl reload nftables", "systemctl restart nftables"}, reaches: true,
	},
	{
		name:  "ufw",
		setUp: "ufw allow 22/tcp && ufw allow 8080/tcp && ufw allow 15006/tcp",
		start: "ufw --force enable", stop: "ufw disable",
		do:   []string{"ufw reload", "systemctl restart ufw"},
		with: (*company).servingPort,
	},
	{
		name:  "firewalld, nftables backend",
		setUp: "sed -i s/^FirewallBackend=.*/FirewallBackend=nftables/ /etc/firewalld/firewalld.conf",
		start: "systemctl start firewalld", stop: "systemctl stop firewalld",
		do:      firewalld,
		reaches: true,
	},
	{
		name:  "firewalld, iptables backend",
		setUp: "sed -i s/^FirewallBackend=.*/FirewallBackend=iptables/ /etc/firewalld/firewalld.conf",
		start: "systemctl start firewalld", stop: "systemctl stop firewalld",
		do:      firewalld,
		reaches: true,
	},
	{
		name: "fail2ban", long: true, setUp: "touch /var/log/auth.log", // Debian's jail for sshd wants it
		start: "systemctl start fail2ban\n" +
			"until fail2ban-client ping >/dev/null 2>&1; do sleep 0.1; done\n" +
			"fail2ban-client set sshd banip 192.0.2.77",
		stop: "systemctl stop fail2ban",
		do:   []string{"systemctl reload fail2ban", "systemctl restart fail2ban"},
	},
	{
		name: "docker",
		setUp: `mkdir -p /etc/docker /tmp/image/tmp
			echo '{"live-restore": true}' >/etc/docker/daemon.json
			for p in /usr/bin/curl /usr/bin/perl /usr/bin/sleep; do
				cp --parents -L $p $(ldd $p | grep -o '/[^ ]*') /tmp/image
			done
			cp --parents -r /usr/lib/*-linux-gnu/perl-base /tmp/image`,
		start: `systemctl start docker
			docker image inspect tiny >/dev/null 2>&1 || tar -C /tmp/image -c . | docker import - tiny
			docker start inner 2>/dev/null || docker run -d --name inner tiny /usr/bin/sleep infinity`,
		stop: "docker kill inner; systemctl stop docker docker.socket",
		do:   []string{"systemctl reload docker", "systemctl restart docker"},
		with: (*company).containers,
	},
}

// company is a box in which interception is on, and what goes through Envoy meanwhile.
type company struct {
	*VM
	ours    map[string]string // our rules, by the program that saves them
	app     *lab.Echo
	streams *streams
	inner   *lab.Namespace // of a container; nil: there is none
	random  *rand.Rand
}

// TestCoexistence has Debian's firewalls and container engine come, go and come again, after
// interception is on and before. What stands in docs/coexistence.md is what it prints with SOAK=1.
func TestCoexistence(t *testing.T) {
	t.Parallel()
	v := newVM(t, options{
		programs: "docker.io fail2ban firewalld nftables procps ufw",
		prepare: func(root string) {
			if err := os.WriteFile(root+"/etc/default/service-proxy-agent",
				[]byte("SERVICE_PROXY_AGENT_INTERCEPT_INTERFACES=docker0\n"), 0o644); err != nil {
				t.Fatal(err)
			}
		},
	})
	v.boot()
	_, err := v.xds.Set(controlplane.Config{
		TLSInspector: true,
		Services: []controlplane.Service{
			{Name: "web", Prefixes: controlplane.VIPs(vip.Addr().String()), Port: vip.Port(), HTTP: true,
				Endpoints: []netip.AddrPort{netip.AddrPortFrom(lab.EndpointAddr(1), endpointPort)}},
			{Name: "raw", Prefixes: controlplane.VIPs(rawVIP.Addr().String()),
				Endpoints: []netip.AddrPort{netip.AddrPortFrom(lab.EndpointAddr(1), endpointPort)}}},
		Inbound: []controlplane.Inbound{{Addr: lab.VMAddr, Port: servingPort, HTTP: true}},
	})
	if err != nil {
		t.Fatal(err)
	}
	c := &company{VM: v}
	c.application(t)
	v.install()
	v.waitFinished(90 * time.Second)
	v.eventually(30*time.Second, "the service answers through Envoy", v.checkVIP)
	v.eventually(30*time.Second, "the serving port answers through Envoy", v.checkInbound)
	c.streams, c.ours = newStreams(v), c.rules()
	defer c.streams.end()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	c.random = rand.New(rand.NewPCG(seed, 0))
	for _, n := range neighbours {
		if n.long && !soak {
			continue
		}
		t.Run(n.name, func(t *testing.T) {
			v.t = t
			c.meets(t, n)
		})
		v.t = t
	}
}

var soak = os.Getenv("SOAK") != ""

// step is one thing that a neighbour does.
type step struct {
	how     string
	stalled bool // while the agent stands still, so that nothing is repaired for some time
}

// String is its name in the table: its first line's last command.
func (s step) String() string {
	line, _, _ := strings.Cut(s.how, "\n")
	line, _, _ = strings.Cut(line, " && ")
	if _, after, ok := strings.Cut(line, "; "); ok {
		line = after
	}
	if s.stalled {
		line += ", agent stalled"
	}
	return line
}

// steps are what it does in one round; without SOAK=1 the least of it.
func (n neighbour) steps() []step {
	last := n.do[len(n.do)-1]
	all := []step{{how: n.start}}
	if soak {
		for _, how := range n.do {
			all = append(all, step{how: how})
		}
	}
	return append(all, step{last, true}, step{how: n.stop})
}

// meets has the neighbour start, do what it does, and stop, so many times; every second time
// interception begins once more while it runs.
func (c *company) meets(t *testing.T, n neighbour) {
	t.Cleanup(func() {
		_, _ = c.try("sh", "-c", n.stop) // where the test ended in the middle
		c.inner = nil
	})
	if n.setUp != "" {
		c.run("sh", "-euc", n.setUp)
	}
	rounds := 1
	if soak {
		rounds = 20
	}
	since := time.Now()
	sums := map[step]*sum{}
	told := map[string]bool{}
	for round := range rounds {
		for _, one := range n.steps() {
			if one.how == n.stop {
				if n.with != nil && round == 0 {
					n.with(c, t)
				}
				if round%2 == 1 || rounds == 1 {
					c.again(t, n.name)
				}
				for _, f := range c.status().Findings {
					told[string(f.ID)+": "+f.Cause] = true
				}
				c.inner = nil
			}
			if sums[one] == nil {
				sums[one] = &sum{}
			}
			sums[one].add(c.during(t, n, one))
			if one.how == n.start && n.name == "docker" {
				c.inner = c.container(t)
			}
		}
	}
	t.Logf("%s, %d rounds:", n.name, rounds)
	for _, one := range n.steps() {
		t.Logf("  %-44s %v", one, sums[one])
	}
	for _, line := range slices.Sorted(maps.Keys(told)) {
		t.Logf("  finding while it runs: %s", line)
	}
	for _, one := range c.status().History {
		if one.Time.After(since) && (one.Kind == status.OfDrift || one.Kind == status.OfFinding) {
			t.Logf("  history: %s (%d) by %q: %s", one.Kind, max(one.Times, 1), one.By, one.Text)
		}
	}
	t.Logf("  agent-last-failure: %s", c.guest(guestattr.AgentLastFailure))
}

// lost is what one step of a neighbour cost.
type lost struct {
	out, in, inner lab.Counts
	cut            int           // streams that ended
	away           time.Duration // from the end of the step, until our rules were as before
	repairs        int           // of ours
	took           time.Duration // the step itself
}

// during does one step of a neighbour while connections are made, and says what was lost.
func (c *company) during(t *testing.T, n neighbour, one step) lost {
	t.Helper()
	const perSecond = 100
	cut, undone := c.streams.count(), c.status().Undone
	out := c.lab.Steady(lab.SteadyOptions{From: c.lab.VM, UID: 12345,
		To: []netip.AddrPort{rawVIP}, PerSecond: perSecond})
	in := c.lab.Steady(lab.SteadyOptions{From: c.lab.Client, PerSecond: perSecond / 4, HTTP: true,
		To: []netip.AddrPort{netip.AddrPortFrom(lab.VMAddr, servingPort)}})
	var inner *lab.Steady
	if c.inner != nil && one.how != n.stop {
		inner = c.lab.Steady(lab.SteadyOptions{From: c.inner, UID: 12345, PerSecond: perSecond / 4,
			To: []netip.AddrPort{rawVIP}})
	}
	// not in step with anything
	time.Sleep(200*time.Millisecond + time.Duration(c.random.Int64N(int64(100*time.Millisecond))))
	if one.stalled {
		c.run("systemctl", "kill", "--kill-who=main", "-s", "STOP", "service-proxy-agent")
	}
	began := time.Now()
	c.run("sh", "-euc", one.how)
	l := lost{took: time.Since(began)}
	if one.stalled {
		time.Sleep(time.Duration(c.random.Int64N(int64(time.Second))))
		c.run("systemctl", "kill", "--kill-who=main", "-s", "CONT", "service-proxy-agent")
	}
	done := time.Now()
	c.eventually(20*time.Second, "our rules are there after "+one.String(), func() error {
		return c.same(c.rules())
	})
	l.away = time.Since(done)
	// Some flush only when systemctl has returned (seen: firewalld).
	c.eventually(20*time.Second, "our rules stay after "+one.String(), func() error {
		if err := c.same(c.rules()); err != nil {
			return err
		}
		time.Sleep(500 * time.Millisecond)
		return c.same(c.rules())
	})
	l.out, l.in = out.Stop(), in.Stop()
	if inner != nil {
		l.inner = inner.Stop()
	}
	l.cut, l.repairs = c.streams.count()-cut, int(c.status().Undone-undone)
	if bad := l.out.Bad() + l.in.Bad() + l.inner.Bad() + l.cut; bad > 0 && !n.reaches {
		t.Errorf("%v has lost: out %v, in %v, of a container %v, %d streams: %v", one, l.out, l.in,
			l.inner, l.cut, c.streams.errors())
	}
	if l.out.OK == 0 || l.in.OK == 0 {
		t.Errorf("%v: nothing came through: out %v, in %v", one, l.out, l.in)
	}
	if soak && l.repairs > 0 {
		// Nobody does all that in a row. Who undoes our rules five times in eight seconds is met with
		// back-off, and what keeps streams alive stays for some seconds.
		time.Sleep(time.Duration(1+l.repairs) * 2 * time.Second)
	}
	return l
}

// again takes interception out, and in again while the neighbour runs: so it was there before us.
func (c *company) again(t *testing.T, name string) {
	t.Helper()
	c.run("systemctl", "stop", "service-proxy-interception")
	c.run("systemctl", "start", "service-proxy-agent")
	c.eventually(20*time.Second, "interception is on with "+name+" there before", func() error {
		if err := c.checkVIP(); err != nil {
			return err
		}
		return c.checkInbound()
	})
}

// rules are ours, as each program of iptables saves them, without counters and the rule that heads
// the chains for the first minutes; and whether they come first.
func (c *company) rules() map[string]string {
	all := map[string]string{}
	for _, program := range []string{"iptables-save", "ip6tables-save"} {
		out, _ := c.try(program, "-t", "nat") // locked for the moment: it lacks all
		var ours []string
		first := map[string]bool{}
		for line := range strings.Lines(out) {
			chain, isRule := strings.CutPrefix(line, "-A ")
			chain, _, _ = strings.Cut(chain, " ")
			if isRule && strings.Contains(line, "SERVICE_PROXY_") && !strings.Contains(line, "settling") {
				if jump := !strings.HasPrefix(chain, "SERVICE_PROXY_"); jump && first[chain] {
					line = "(not the first) " + line
				}
				ours = append(ours, line)
			}
			first[chain] = true
		}
		slices.Sort(ours)
		all[program] = strings.Join(ours, "")
	}
	return all
}

func (c *company) same(have map[string]string) error {
	for program, want := range c.ours {
		if have[program] != want {
			return fmt.Errorf("%s has of ours\n%s", program, have[program])
		}
	}
	return nil
}

func (c *company) status() (s status.Status) {
	c.t.Helper()
	if err := json.Unmarshal([]byte(c.run("sh", "-c",
		"service-proxy-agent status -o json || true")), &s); err != nil {
		c.t.Fatal(err)
	}
	return s
}

// container is the network namespace of the one container.
func (c *company) container(t *testing.T) *lab.Namespace {
	t.Helper()
	pid := strings.TrimSpace(c.run("docker", "inspect", "-f", "{{.State.Pid}}", "inner"))
	var here int
	// The kernel tells the pid of our own namespace of whoever is in it.
	out := c.run("sh", "-c", "readlink /proc/"+pid+"/ns/net")
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if link, err := os.Readlink("/proc/" + e.Name() + "/ns/net"); err == nil &&
			link == strings.TrimSpace(out) {
			fmt.Sscan(e.Name(), &here)
		}
	}
	ns, err := c.lab.Of("container", here)
	if err != nil {
		t.Fatal(err)
	}
	return ns
}

// dropping waits until doctor tells that table filter drops something, in these words.
func (c *company) dropping(t *testing.T, cause, next string) {
	t.Helper()
	c.eventually(10*time.Second, "doctor finds what is dropped", func() error {
		out, _ := c.try("service-proxy-agent", "doctor")
		if !strings.Contains(out, cause) || !strings.Contains(out, next) {
			return fmt.Errorf("it says\n%s", out)
		}
		return nil
	})
}

// servingPort: ufw sees a serving port under Envoy's number.
func (c *company) servingPort(t *testing.T) {
	c.run("ufw", "delete", "allow", "15006/tcp")
	short, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if conn, err := c.lab.Client.Dial(short, netip.AddrPortFrom(lab.VMAddr, servingPort)); err == nil {
		conn.Close()
		t.Error("the serving port answers though ufw drops what comes to Envoy's port")
	}
	c.dropping(t, "serving port 8080 is dropped", "let TCP 15006 in")
	c.run("ufw", "allow", "15006/tcp")
	c.eventually(10*time.Second, "the serving port answers through Envoy", c.checkInbound)
}

// containers looks at what goes out of a container and into one.
func (c *company) containers(t *testing.T) {
	const service, metadata = "http://10.77.0.1/",
		"http://169.254.169.254/computeMetadata/v1/instance/name"
	endpoint := "local=" + netip.AddrPortFrom(lab.EndpointAddr(1), endpointPort).String()
	answers := func(what, url, want string) {
		t.Helper()
		c.eventually(10*time.Second, what+" answers a container", func() error {
			out, err := c.curl(url)
			if err != nil || !strings.Contains(out, want) {
				return fmt.Errorf("%w: %q", err, out)
			}
			return nil
		})
	}
	answers("a service", service, endpoint)
	answers("the metadata server", metadata, "vm-1")
	answers("the metadata server by name",
		"http://metadata.google.internal/computeMetadata/v1/instance/name", "vm-1")

	// Docker's own rules are nobody's but Docker's to put back.
	c.run("systemctl", "restart", "nftables")
	answers("a service, with Docker's rules flushed,", service, endpoint)
	if out, err := c.curl(metadata); err == nil {
		t.Errorf("the metadata server answers without Docker's rules: %q", out)
	}
	c.run("systemctl", "stop", "nftables")
	c.run("systemctl", "restart", "docker")
	answers("the metadata server", metadata, "vm-1")

	c.run("ufw", "--force", "enable")
	if out, err := c.curl(service); err == nil {
		t.Errorf("a service answers a container though ufw drops what comes to Envoy's port: %s", out)
	}
	c.dropping(t, "connections to services from docker0", "let TCP 15001 in from docker0")
	c.run("ufw", "allow", "in", "on", "docker0", "to", "any", "port", "15001", "proto", "tcp")
	answers("a service, let in by ufw,", service, endpoint)
	c.run("ufw", "disable")

	// A published port that is a serving port: Envoy first, then the container.
	c.app.Close()
	c.run("docker", "run", "-d", "--name", "web", "-p", fmt.Sprintf("%d:80", servingPort), "tiny",
		"/usr/bin/perl", "-e", answerer)
	c.eventually(10*time.Second, "the container answers through Envoy", func() error {
		resp, err := c.lab.Client.HTTP().Get(
			"http://" + netip.AddrPortFrom(lab.VMAddr, servingPort).String() + "/")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		if string(text) != "of a container" || resp.Header.Get(controlplane.ServedByHeader) == "" {
			return fmt.Errorf("%v, %q: %w", resp.Header, text, err)
		}
		return nil
	})
	c.run("docker", "rm", "-f", "web")
	c.application(t)
}

// curl is what a program in the container is answered.
func (c *company) curl(url string) (string, error) {
	return c.try("docker", "exec", "inner", "/usr/bin/curl", "-sS", "-m", "2", "-H",
		"Metadata-Flavor: Google", url)
}

// answerer is an application in a container, of what Debian's smallest system has.
const answerer = `use IO::Socket::INET;
my $s = IO::Socket::INET->new(Listen => 9, LocalPort => 80, ReuseAddr => 1) or die $!;
while (my $c = $s->accept) {
	while (<$c>) { last if /^\r?$/ }
	print $c "HTTP/1.1 200 OK\r\nContent-Length: 14\r\nConnection: close\r\n\r\nof a container";
	close $c;
}`

// application has the VM's own listen on the serving port.
func (c *company) application(t *testing.T) {
	t.Helper()
	var err error
	c.app, err = c.lab.Echo(c.lab.VM, servingPort, lab.EchoOptions{Name: "application"})
	if err != nil {
		t.Fatal(err)
	}
}

// sum is what several times the same step cost.
type sum struct {
	n, cut         int
	repairs        []int
	took, away     []time.Duration
	out, in, inner lab.Counts
}

func (s *sum) add(l lost) {
	s.n++
	s.repairs = append(s.repairs, l.repairs)
	s.took, s.away = append(s.took, l.took), append(s.away, l.away)
	for _, one := range []struct {
		all *lab.Counts
		l   lab.Counts
	}{{&s.out, l.out}, {&s.in, l.in}, {&s.inner, l.inner}} {
		one.all.Tried += one.l.Tried
		one.all.OK += one.l.OK
		one.all.Escaped += one.l.Escaped
		one.all.Failed += one.l.Failed
		one.all.Slowest = max(one.all.Slowest, one.l.Slowest)
		for text := range one.l.Errors {
			one.all.Errors = map[string]int{text: 1} // one to see
		}
	}
	s.cut += l.cut
}

func (s *sum) String() string {
	most := func(all []time.Duration) time.Duration { return slices.Max(all).Round(time.Millisecond) }
	one := func(name string, c lab.Counts) string {
		if c.Tried == 0 {
			return ""
		}
		text := fmt.Sprintf("; %s: of %d new %d escaped, %d failed, slowest %v", name, c.Tried, c.Escaped,
			c.Failed, c.Slowest.Round(time.Millisecond))
		for why := range c.Errors {
			text += " (" + why + ")"
		}
		return text
	}
	return fmt.Sprintf("%d times, took ≤ %v, ours repaired %d to %d times, back ≤ %v after; "+
		"%d streams cut%s%s%s", s.n, most(s.took), slices.Min(s.repairs), slices.Max(s.repairs),
		most(s.away), s.cut, one("out", s.out), one("in", s.in), one("container", s.inner))
}

// streams are long connections through Envoy, out of the VM and into it, on which something is
// said all the time. One that ends is made anew.
type streams struct {
	cancel context.CancelFunc
	all    sync.WaitGroup
	mu     sync.Mutex
	ends   []string
}

const (
	streamsEachWay = 10
	streamSpeaks   = 20 * time.Millisecond
)

func newStreams(v *VM) *streams {
	ctx, cancel := context.WithCancel(context.Background())
	s := &streams{cancel: cancel}
	for range streamsEachWay {
		s.all.Go(func() { s.keep(ctx, "out", v.lab.VM, rawVIP, "hello\n") })
		s.all.Go(func() {
			s.keep(ctx, "in", v.lab.Client, netip.AddrPortFrom(lab.VMAddr, servingPort),
				"HEAD / HTTP/1.1\r\nHost: stream\r\n\r\n")
		})
	}
	return s
}

// keep has one stream.
func (s *streams) keep(ctx context.Context, name string, from *lab.Namespace, to netip.AddrPort,
	say string) {
	for ctx.Err() == nil {
		err := func() error {
			dial, cancel := context.WithTimeout(ctx, 10*time.Second)
			defer cancel()
			conn, err := from.DialAs(dial, 12345, to)
			if err != nil {
				return fmt.Errorf("dial: %w", err)
			}
			defer conn.Close()
			return speak(ctx, conn, say)
		}()
		if ctx.Err() != nil {
			return
		}
		s.mu.Lock()
		s.ends = append(s.ends, fmt.Sprintf("%s: %v", name, err))
		s.mu.Unlock()
		time.Sleep(streamSpeaks)
	}
}

// speak says the same again and again, and waits for a whole answer each time.
func speak(ctx context.Context, conn net.Conn, say string) error {
	in := bufio.NewReader(conn)
	for ctx.Err() == nil {
		if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
			return err
		}
		if _, err := io.WriteString(conn, say); err != nil {
			return err
		}
		for {
			line, err := in.ReadString('\n')
			if err != nil {
				return err
			}
			if !strings.HasPrefix(say, "HEAD") || line == "\r\n" {
				break
			}
		}
		time.Sleep(streamSpeaks)
	}
	return ctx.Err()
}

func (s *streams) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.ends)
}

func (s *streams) errors() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return errors.New(strings.Join(s.ends[max(0, len(s.ends)-5):], "; "))
}

func (s *streams) end() {
	s.cancel()
	s.all.Wait()
}
