//go:build lab

package lab_test

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/platform/authority"
)

var (
	httpVIP4 = netip.MustParseAddrPort("10.10.0.1:80")
	httpVIP6 = netip.MustParseAddrPort("[fd10::1]:80")
	tcpVIP4  = netip.MustParseAddrPort("10.10.0.2:9000")
	other4   = netip.MustParseAddrPort("198.51.100.7:80")
	other6   = netip.MustParseAddrPort("[2001:db8::7]:80")
)

const (
	endpointPort = 8080
	appPort      = 8081
)

// mesh is two services over both families and one serving port.
func mesh(ipv6 controlplane.IPv6) controlplane.Config {
	endpoints := []netip.AddrPort{netip.AddrPortFrom(lab.EndpointAddr(1), endpointPort)}
	return controlplane.Config{
		IPv6: ipv6,
		Services: []controlplane.Service{
			{Name: "web", Prefixes: controlplane.VIPs("10.10.0.1", "fd10::1"), Port: 80, HTTP: true, Endpoints: endpoints},
			{Name: "db", Prefixes: controlplane.VIPs("10.10.0.2"), Endpoints: endpoints},
		},
		Inbound: []controlplane.Inbound{{Addr: lab.VMAddr, Port: appPort, HTTP: true}},
	}
}

// byHand is what the agent would do, in the fewest rules.
const byHand = `*nat
:TEST - [0:0]
-A OUTPUT -p tcp -j TEST
-A TEST -m owner --uid-owner %d -j RETURN
-A TEST -d %s -p tcp -j REDIRECT --to-ports 15001
-A PREROUTING -p tcp -m addrtype --dst-type LOCAL -m tcp --dport 8081 -j REDIRECT --to-ports 15006
COMMIT
`

func startControlPlane(t *testing.T, l *lab.Lab,
	ca *authority.Authority) (*controlplane.Server, netip.AddrPort) {
	t.Helper()
	addr := netip.AddrPortFrom(lab.ControlPlaneAddr, 443)
	opts := controlplane.Options{Listen: func() (net.Listener, error) {
		return l.Service.Listen("tcp", addr.String())
	}}
	if ca != nil {
		cert, err := ca.Certificate("trafficdirector.googleapis.com")
		if err != nil {
			t.Fatal(err)
		}
		opts.Certificate = &cert
	}
	cp := controlplane.New(opts)
	if err := cp.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cp.Close)
	return cp, addr
}

func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// must fails the test on an error.
func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestRedirectByHand is the lab without the agent: rules made by hand lead a VIP through Envoy.
func TestRedirectByHand(t *testing.T) {
	for _, backend := range lab.Backends {
		t.Run(string(backend), func(t *testing.T) {
			l := lab.T(t, lab.Options{Backend: backend})
			ctx := within(t, 60*time.Second)
			cp, addr := startControlPlane(t, l, nil)
			push, err := cp.Set(mesh(controlplane.IPv6Additional))
			must(t, err)
			for _, port := range []uint16{80, endpointPort, tcpVIP4.Port()} {
				if _, err := l.Echo(l.Service, port, lab.EchoOptions{}); err != nil {
					t.Fatal(err)
				}
			}
			_, err = l.Echo(l.VM, appPort, lab.EchoOptions{Name: "app"})
			must(t, err)
			envoy, err := l.StartEnvoy(lab.EnvoyOptions{ControlPlane: addr, Runtime: true})
			must(t, err)
			must(t, envoy.WaitReady(ctx))
			must(t, cp.WaitAccepted(ctx, push))

			version, err := l.VM.Run(ctx, "iptables", "--version")
			must(t, err)
			if want := map[lab.Backend]string{
				lab.NFT: "nf_tables", lab.Legacy: "legacy"}[backend]; !strings.Contains(version, want) {
				t.Fatalf("iptables --version: %s, want %s", version, want)
			}

			// Without rules everything escapes; that it is seen is what later tests rest on.
			for _, vip := range []netip.AddrPort{httpVIP4, httpVIP6, tcpVIP4} {
				if r, err := lab.HTTPProbe(ctx, l.VM, 0, vip); err != nil || !r.Escaped {
					t.Errorf("%s without rules: %+v, %v; want an escape", vip, r, err)
				}
			}
			for family, prefix := range map[string]string{
				"iptables": "10.10.0.0/16", "ip6tables": "fd10::/64"} {
				_, err := l.VM.RunInput(ctx, fmt.Sprintf(byHand, envoy.UID, prefix), family+"-restore",
					"--noflush", "-w", "5")
				must(t, err)
			}
			for _, vip := range []netip.AddrPort{httpVIP4, httpVIP6} {
				resp, err := l.VM.HTTP().Get("http://" + vip.String() + "/")
				must(t, err)
				resp.Body.Close()
				if resp.StatusCode != http.StatusOK || resp.Header.Get("Server") != "envoy" ||
					resp.Header.Get(controlplane.ServedByHeader) != "web" {
					t.Errorf("GET %s: %s %v, want Envoy's", vip, resp.Status, resp.Header)
				}
				out, err := l.VM.CommandAs(ctx, 4711, "curl", "-sS", "-D-", "http://"+vip.String()+
					"/").CombinedOutput()
				if err != nil || !strings.Contains(string(out), "x-served-by: web") {
					t.Errorf("curl of %s as another user: %v\n%s", vip, err, out)
				}
			}
			if r, err := lab.Probe(ctx, l.VM, 0, tcpVIP4); err != nil ||
				r.Local.Addr() != lab.EndpointAddr(1) {
				t.Errorf("TCP service: %+v, %v", r, err)
			}
			// Envoy's own uid and addresses that are no service go out as they are.
			if r, err := lab.HTTPProbe(ctx, l.VM, envoy.UID, httpVIP4); err != nil || !r.Escaped {
				t.Errorf("Envoy's uid: %+v, %v; want no redirection", r, err)
			}
			for _, other := range []netip.AddrPort{other4, other6} {
				if r, err := lab.HTTPProbe(ctx, l.VM, 0, other); err != nil || !r.Escaped {
					t.Errorf("%s: %+v, %v; want no redirection", other, r, err)
				}
			}
			// Inbound, from the other namespace.
			resp, err := l.Client.HTTP().Get(
				"http://" + netip.AddrPortFrom(lab.VMAddr, appPort).String() + "/")
			must(t, err)
			resp.Body.Close()
			if resp.Header.Get(controlplane.ServedByHeader) != "inbound-8081-10.128.0.2" ||
				resp.Header.Get(lab.NameHeader) != "app" {
				t.Errorf("inbound: %s %v", resp.Status, resp.Header)
			}

			// The steady stream tells the three outcomes apart.
			steady := l.Steady(lab.SteadyOptions{From: l.VM, To: []netip.AddrPort{httpVIP4, httpVIP6},
				PerSecond: 100, HTTP: true, Timeout: time.Second})
			time.Sleep(500 * time.Millisecond)
			if c := steady.Stop(); c.OK < 30 || c.Bad() != 0 || c.Tried != c.OK {
				t.Errorf("steady stream: %v", c)
			}
			envoy.Kill()
			steady = l.Steady(lab.SteadyOptions{From: l.VM, To: []netip.AddrPort{httpVIP4}, PerSecond: 100,
				HTTP: true, Timeout: time.Second})
			time.Sleep(300 * time.Millisecond)
			if c := steady.Stop(); c.Failed < 20 || c.Failed != c.Tried {
				t.Errorf("steady stream without Envoy: %v", c)
			}
			must(t, envoy.Start())
			must(t, envoy.WaitReady(ctx))
			if n := cp.Nodes(); len(n) != 2 || n[1].UserAgentVersion == "" {
				t.Errorf("nodes: %+v", n)
			}
			_, err = l.VM.Run(ctx, "iptables", "-t", "nat", "-F", "TEST")
			must(t, err)
			steady = l.Steady(lab.SteadyOptions{From: l.VM, To: []netip.AddrPort{httpVIP4}, PerSecond: 100,
				HTTP: true, Timeout: time.Second})
			time.Sleep(300 * time.Millisecond)
			if c := steady.Stop(); c.Escaped < 20 || c.Escaped != c.Tried {
				t.Errorf("steady stream without rules: %v", c)
			}
		})
	}
}

// TestListenerShapes has the real Envoy take every shape that Config can make, and refuse the one
// that is meant to be refused.
func TestListenerShapes(t *testing.T) {
	l := lab.T(t, lab.Options{})
	ctx := within(t, 60*time.Second)
	ca, err := authority.New()
	must(t, err)
	cp, addr := startControlPlane(t, l, ca)
	envoy, err := l.StartEnvoy(lab.EnvoyOptions{ControlPlane: addr, CA: ca.PEM(), Runtime: true})
	must(t, err)

	// Silent control plane: Envoy waits.
	must(t, cp.WaitNodes(ctx, 1))
	if body, err := envoy.Admin(ctx, "/ready"); err == nil ||
		!strings.Contains(body, "PRE_INITIALIZING") {
		t.Errorf("/ready before the first answer: %q, %v", body, err)
	}
	shapes := []controlplane.Config{{}}
	for _, v6 := range []controlplane.IPv6{controlplane.IPv6Off, controlplane.IPv6Additional,
		controlplane.IPv6DualStack, controlplane.IPv6Separate} {
		if v6 == controlplane.IPv6Separate {
			// The control plane sends listeners in no order, and Envoy refuses one whose
			// address another still has.
			shapes = append(shapes, controlplane.Config{})
		}
		shapes = append(shapes, mesh(v6))
	}
	full := mesh(controlplane.IPv6Additional)
	full.TLSInspector, full.Passthrough = true, true
	full.AccessLog = "/dev/null"
	full.Runtime = map[string]any{"envoy.reloadable_features.x": false}
	full.Services = append(full.Services, controlplane.Service{Name: "address-less", Port: 7000,
		Endpoints: []netip.AddrPort{netip.AddrPortFrom(lab.EndpointAddr(2), 1)}})
	full.Services = append(full.Services,
		controlplane.Service{Name: "sick", Prefixes: controlplane.VIPs("10.10.0.9"), Port: 80,
			Endpoints: []netip.AddrPort{netip.AddrPortFrom(lab.EndpointAddr(3), 1)},
			Unhealthy: []netip.AddrPort{netip.AddrPortFrom(lab.EndpointAddr(4), 1),
				netip.AddrPortFrom(lab.EndpointAddr(5), 1)}})
	full.DNS = &controlplane.DNS{Names: map[string][]netip.Addr{"web.test": {httpVIP4.Addr()}},
		TCPUpstream: netip.MustParseAddrPort("10.131.0.1:53")}
	shapes = append(shapes, full)
	for i, c := range shapes {
		push, err := cp.Set(c)
		must(t, err)
		if err := cp.WaitAccepted(ctx, push); err != nil {
			t.Fatalf("shape %d: %v; rejected: %+v\n%s", i, err, cp.Rejections(), envoy.LogTail(5))
		}
	}
	must(t, envoy.WaitReady(ctx))
	if r := cp.Rejections(); len(r) != 0 {
		t.Fatalf("Envoy refused: %+v", r)
	}

	clusters, err := envoy.Admin(ctx, "/clusters")
	must(t, err)
	if n := strings.Count(clusters, "::health_flags::/failed_eds_health"); n != 2 {
		t.Errorf("%d unhealthy endpoints, want 2:\n%s", n, clusters)
	}

	// The DNS listener answers.
	if got := askDNS(t, l.VM, "web.test"); got != httpVIP4.Addr() {
		t.Errorf("web.test is %v, want %v", got, httpVIP4.Addr())
	}

	// A refused listener, once, and in a storm.
	refused := full
	refused.Listeners = append(
		refused.Listeners, controlplane.RefusedListener("bad", 16001, "/root/access.log"))
	_, err = cp.Set(refused)
	must(t, err)
	must(t, cp.WaitRejected(ctx, 1))
	if d := cp.Rejections()[0].Details; !strings.Contains(
		d, "unable to open file '/root/access.log'") {
		t.Errorf("rejected for %q", d)
	}
	time.Sleep(300 * time.Millisecond)
	if n := len(cp.Rejections()); n != 1 {
		t.Errorf("%d rejections without a storm", n)
	}
	cp.Storm(true)
	refused.Services = refused.Services[:1]
	_, err = cp.Set(refused)
	must(t, err)
	must(t, cp.WaitRejected(ctx, 100))
	cp.Storm(false)

	// Envoy's log has Traffic Director's words, and the way back works.
	cp.RefuseNotFound("default", "my-project")
	waitLog(t, ctx, envoy,
		`closed: 5, Traffic Director configuration was not found for network "default" in project "my-project".`)
	cp.Serve()
	nodes := len(cp.Nodes())
	must(t, cp.WaitNodes(ctx, nodes+1))
	cp.GoAway()
	if _, err := l.VM.Dial(ctx, addr); err == nil {
		t.Error("the control plane is away but accepts")
	}
	nodes = len(cp.Nodes())
	must(t, cp.ComeBack())
	must(t, cp.WaitNodes(ctx, nodes+1))
	push, err := cp.Set(mesh(controlplane.IPv6Off))
	must(t, err)
	must(t, cp.WaitAccepted(ctx, push))

	// Stopped where it stands, the port accepts but nothing answers.
	envoy.Pause()
	short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	_, err = envoy.Admin(short, "/ready")
	cancel()
	if err == nil {
		t.Error("a stopped Envoy answers")
	}
	envoy.Continue()
	must(t, envoy.WaitReady(ctx))
}

func waitLog(t *testing.T, ctx context.Context, envoy *lab.Envoy, text string) {
	t.Helper()
	for !strings.Contains(envoy.LogTail(10_000), text) {
		select {
		case <-ctx.Done():
			t.Fatalf("Envoy's log never had %q; it ends:\n%s", text, envoy.LogTail(10))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// askDNS asks Envoy's DNS listener for an A record.
func askDNS(t *testing.T, n *lab.Namespace, name string) netip.Addr {
	t.Helper()
	conn, err := n.ListenPacket("udp", "127.0.0.1:0")
	must(t, err)
	defer conn.Close()
	resolver := &net.Resolver{
		PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
			return packetTo{conn, net.UDPAddrFromAddrPort(netip.MustParseAddrPort("127.0.0.1:15053"))}, nil
		}}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	addrs, err := resolver.LookupNetIP(ctx, "ip4", name+".")
	must(t, err)
	return addrs[0].Unmap()
}

// packetTo is an unconnected UDP socket seen as a connection to one peer.
type packetTo struct {
	net.PacketConn
	peer net.Addr
}

func (p packetTo) Read(b []byte) (int, error)  { n, _, err := p.ReadFrom(b); return n, err }
func (p packetTo) Write(b []byte) (int, error) { return p.WriteTo(b, p.peer) }
func (p packetTo) RemoteAddr() net.Addr        { return p.peer }

// TestNothingIsLeft kills a process that has a lab with -9 and looks for what it left.
func TestNothingIsLeft(t *testing.T) {
	if os.Getenv("LAB_TEST_CHILD") != "" {
		l, err := lab.New(lab.Options{})
		if err != nil {
			t.Fatal(err)
		}
		sleeper := l.VM.CommandAs(context.Background(), lab.EnvoyUID, "sleep", "1000")
		if err := lab.Start(sleeper); err != nil {
			t.Fatal(err)
		}
		fmt.Printf("\nLAB %s %s %d\n", l.VM.Name, l.Dir, sleeper.Process.Pid)
		select {}
	}
	child := exec.Command(os.Args[0], "-test.run=^TestNothingIsLeft$")
	child.Env = append(os.Environ(), "LAB_TEST_CHILD=1")
	stdout, err := child.StdoutPipe()
	must(t, err)
	must(t, child.Start())
	var name, dir string
	var pid int
	if _, err := fmt.Fscanf(stdout, "\nLAB %s %s %d\n", &name, &dir, &pid); err != nil {
		child.Process.Kill()
		t.Fatalf("read child's lab: %v", err)
	}
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		// nsenter becomes setpriv, and that sleep
		exe, _ := os.Readlink("/proc/" + strconv.Itoa(pid) + "/exe")
		if strings.HasSuffix(exe, "sleep") {
			break
		}
		if time.Now().After(end) {
			t.Errorf("the child's process is %q, want sleep", exe)
			break
		}
	}
	must(t, child.Process.Kill())
	child.Wait() // killed, as was asked
	left := func() []string {
		var what []string
		for _, path := range []string{"/run/netns/" + name, dir} {
			if _, err := os.Stat(path); err == nil {
				what = append(what, path)
			}
		}
		if syscall.Kill(pid, 0) == nil {
			what = append(what, fmt.Sprintf("process %d", pid))
		}
		return what
	}
	for range 300 {
		if len(left()) == 0 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("3 s after its process was killed, a lab left %q", left())
}
