//go:build lab

// Package e2e tests the built binary with a real Envoy and the kernel's netfilter in a lab of
// network namespaces, on nft and on legacy. Run it with `go test -tags lab ./test/e2e` as
// root, or by make test.
package e2e

import (
	"context"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/reconcile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

var (
	web4   = netip.MustParseAddrPort("10.10.0.1:81")
	web6   = netip.MustParseAddrPort("[fd10::1]:81")
	db4    = netip.MustParseAddrPort("10.10.0.2:9000")
	extra  = netip.MustParseAddrPort("10.10.0.3:81")
	other4 = netip.MustParseAddrPort("198.51.100.7:81")
	other6 = netip.MustParseAddrPort("[2001:db8::7]:81")
)

// services is the mesh of most tests: an HTTP service in both families and a TCP service.
func services(more ...controlplane.Service) controlplane.Config {
	return controlplane.Config{
		IPv6: controlplane.IPv6Additional,
		Services: append([]controlplane.Service{
			{Name: "web", Prefixes: controlplane.VIPs("10.10.0.1", "fd10::1"), Port: 81, HTTP: true, Endpoints: endpoints()},
			{Name: "db", Prefixes: controlplane.VIPs("10.10.0.2"), Port: 9000, Endpoints: endpoints()},
		}, more...),
		Inbound: []controlplane.Inbound{{Addr: lab.VMAddr, Port: mesh.AppPort, HTTP: true}},
	}
}

func endpoints() []netip.AddrPort {
	return []netip.AddrPort{netip.AddrPortFrom(lab.EndpointAddr(1), mesh.EndpointPort)}
}

// service is one more TCP service.
func service(i int) controlplane.Service {
	addr := netip.AddrFrom4([4]byte{10, 20, byte(i >> 8), byte(i)})
	return controlplane.Service{Name: fmt.Sprintf("s%d", i),
		Prefixes: controlplane.VIPs(addr.String()), Port: 9000, Endpoints: endpoints()}
}

// both is one more TCP service, with an address in each family.
func both(i int) controlplane.Service {
	s := service(i)
	s.Prefixes = append(s.Prefixes,
		controlplane.VIPs(
			netip.AddrFrom16([16]byte{0xfd, 0x20, 14: byte(i >> 8), 15: byte(i)}).String())...)
	return s
}

// metadataAnswers checks that the metadata server is reached from the VM.
func metadataAnswers(t *testing.T, m *mesh.Mesh) {
	t.Helper()
	req, err := http.NewRequest(
		http.MethodGet, "http://169.254.169.254/computeMetadata/v1/instance/name", nil)
	must(t, err)
	req.Header.Set("Metadata-Flavor", "Google")
	resp, err := m.VM.HTTPAs(1000).Do(req)
	must(t, err)
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK || resp.Header.Get("Metadata-Flavor") != "Google" {
		t.Errorf("metadata server from vm: %s", resp.Status)
	}
}

// start makes a mesh with a running agent.
func start(t testing.TB, opts mesh.Options, args ...string) (*mesh.Mesh, *mesh.Agent) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	m, err := mesh.New(ctx, opts)
	if err != nil {
		t.Fatal(err)
	}
	a := m.NewAgent(args...)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("agent's log:\n%s", a.Log())
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	must(t, a.Start())
	return m, a
}

func onBoth(t *testing.T, f func(t *testing.T, backend lab.Backend)) {
	for _, backend := range lab.Backends {
		t.Run(string(backend), func(t *testing.T) {
			t.Parallel() // labs share nothing but the processors
			f(t, backend)
		})
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// within gives what a quiet machine does in d, and in make test, where other tests have the
// machine, too, four times as long: a limit of what would never end.
func within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), time.Duration(soak(1, 4))*d)
	t.Cleanup(cancel)
	return ctx
}

// soak is n in `make soak`, else short.
func soak(n, short int) int {
	if os.Getenv("SOAK") != "" {
		return n
	}
	return short
}

// beside is t.Parallel but in make soak, where what the test measures must not be who else has the
// machine.
func beside(t *testing.T) {
	t.Helper()
	if os.Getenv("SOAK") == "" {
		t.Parallel()
	}
}

// tooDear fails the test in make soak, for which a machine is quiet. In make test it only tells:
// what a second, or one of processor, is worth depends on who else has the machine, and a limit of
// it that a busy one passes says nothing about the program. (envoyadmin's detector tests hold the
// budget itself in time that is counted.)
func tooDear(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("SOAK") == "" {
		t.Logf("on a quiet machine, a failure: "+format, args...)
		return
	}
	t.Errorf(format, args...)
}

// eventually waits until holds, as long as within, and fails with what it said last.
func eventually(t testing.TB, d time.Duration, what string, holds func() (bool, string)) {
	t.Helper()
	d *= time.Duration(soak(1, 4))
	deadline := time.Now().Add(d)
	for {
		ok, last := holds()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s not within %v: %s", what, d, last)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// through waits until a connection as an ordinary user goes through Envoy to the endpoint.
func through(t testing.TB, m *mesh.Mesh, to netip.AddrPort) {
	t.Helper()
	eventually(t, 5*time.Second, to.String()+" through Envoy", func() (bool, string) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		r, err := lab.HTTPProbe(ctx, m.VM, 1000, to)
		return err == nil && !r.Escaped && r.Name == "endpoint", fmt.Sprintf("%+v %v", r, err)
	})
}

// escapes waits until a connection reaches the address itself.
func escapes(t testing.TB, m *mesh.Mesh, to netip.AddrPort) {
	t.Helper()
	eventually(t, 5*time.Second, to.String()+" past Envoy", func() (bool, string) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		r, err := lab.HTTPProbe(ctx, m.VM, 1000, to)
		return err == nil && r.Escaped, fmt.Sprintf("%+v %v", r, err)
	})
}

// TestVIPs: services of both families through Envoy; everything else untouched.
func TestVIPs(t *testing.T) {
	beside(t)
	onBoth(t, func(t *testing.T, backend lab.Backend) {
		m, a := start(t, mesh.Options{Backend: backend, Config: services()})
		must(t, a.WaitReady(within(t, 20*time.Second)))
		for _, vip := range []netip.AddrPort{web4, web6} {
			resp, err := m.VM.HTTPAs(1000).Get("http://" + vip.String() + "/")
			must(t, err)
			resp.Body.Close()
			if resp.StatusCode != http.StatusOK || resp.Header.Get(controlplane.ServedByHeader) != "web" {
				t.Errorf("GET %s: %s %v, want Envoy's answer", vip, resp.Status, resp.Header)
			}
		}
		through(t, m, db4)
		for _, other := range []netip.AddrPort{other4, other6, extra} {
			escapes(t, m, other)
		}
		// Envoy's own connections go where it sends them: with its uid a VIP is the raw
		// address, so it cannot loop.
		if r, err := lab.HTTPProbe(t.Context(), m.VM, lab.EnvoyUID, web4); err != nil || !r.Escaped {
			t.Errorf("as Envoy's user: %+v %v, want no redirection", r, err)
		}
		metadataAnswers(t, m)
		s, err := a.Status(t.Context())
		must(t, err)
		if want := map[lab.Backend]string{
			lab.NFT: "nft", lab.Legacy: "legacy"}[backend]; s.Backend != want || !s.Healthy() ||
			s.Mode != "intercepting" {
			t.Errorf("status: backend %s, mode %s, findings %v", s.Backend, s.Mode, s.Findings)
		}
		// A second one leaves the first alone.
		_, stderr, code, err := a.Run(t.Context(), "run", "--config", "none", "--proxy-user",
			fmt.Sprint(lab.EnvoyUID))
		must(t, err)
		if code == 0 || !strings.Contains(stderr, fmt.Sprint(a.PID())) {
			t.Errorf("a second agent: exit code %d, %q; want it to name pid %d", code, stderr, a.PID())
		}
		before := chains(t, m)
		if took, err := a.Stop(); err != nil {
			t.Error("SIGTERM: ", err)
		} else if took > 2*time.Second {
			tooDear(t, "SIGTERM: ended after %v", took)
		}
		if after := chains(t, m); after != before {
			t.Errorf("the rules did not stay in place:\n%s\nbefore:\n%s", after, before)
		}
	})
}

// TestServingPort: redirected to Envoy's inbound listener once that is active, and not before.
func TestServingPort(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, backend lab.Backend) {
		config := services()
		inbound := append(
			config.Inbound, controlplane.Inbound{Addr: lab.VMAddr6, Port: mesh.AppPort, HTTP: true})
		config.Inbound = nil
		m, a := start(t, mesh.Options{Backend: backend, Config: config})
		must(t, a.WaitReady(within(t, 20*time.Second)))
		own := []netip.Addr{lab.VMAddr, lab.VMAddr6}
		app := func(own netip.Addr) string {
			return "http://" + netip.AddrPortFrom(own, mesh.AppPort).String() + "/"
		}
		served := func(own netip.Addr) string {
			resp, err := m.Client.HTTP().Get(app(own))
			must(t, err)
			resp.Body.Close()
			if resp.Header.Get(lab.NameHeader) != "app" {
				t.Fatalf("not the application's answer: %s %v", resp.Status, resp.Header)
			}
			return resp.Header.Get(controlplane.ServedByHeader)
		}
		for _, own := range own {
			if by := served(own); by != "" {
				t.Errorf("%v: without an inbound listener served by %q, want the application directly", own, by)
			}
		}
		s, err := a.Status(t.Context())
		must(t, err)
		if !hasFinding(s, symptom.ServingPortNoChain) {
			t.Errorf("findings %v do not name the serving port", s.Findings)
		}
		config.Inbound = inbound
		_, err = m.CP.Set(config)
		must(t, err)
		for _, own := range own {
			eventually(t, 5*time.Second, "inbound through Envoy", func() (bool, string) {
				by := served(own)
				return by == "inbound-8081-"+own.String(), by
			})
			if row := "-A SERVICE_PROXY_INBOUND -d " + netip.PrefixFrom(own, own.BitLen()).String() +
				" -p tcp"; strings.Count(chains(t, m), row) != 1 {
				t.Errorf("want one %q in\n%s", row, chains(t, m))
			}
		}
		config.Inbound = nil
		_, err = m.CP.Set(config)
		must(t, err)
		for _, own := range own {
			eventually(t, 5*time.Second, "inbound past Envoy again", func() (bool, string) {
				resp, err := m.Client.HTTP().Get(app(own))
				if err != nil {
					return false, err.Error() // while Envoy has closed its listener and the rule is still there
				}
				resp.Body.Close()
				return resp.Header.Get(controlplane.ServedByHeader) == "", resp.Status
			})
		}
		if out := chains(t, m); strings.Contains(out, "SERVICE_PROXY_INBOUND") {
			t.Errorf("without an inbound listener:\n%s", out)
		}
	})
}

func hasFinding(s status.Status, id symptom.ID) bool {
	for _, f := range s.Findings {
		if f.ID == id {
			return true
		}
	}
	return false
}

// TestKill: kill -9 of the agent in the middle of changes. After each restart the chains converge;
// new connections to an unchanged VIP neither fail nor escape in between.
func TestKill(t *testing.T) {
	beside(t)
	onBoth(t, func(t *testing.T, backend lab.Backend) {
		m, a := start(t, mesh.Options{Backend: backend, Config: services()})
		must(t, a.WaitReady(within(t, 20*time.Second)))
		through(t, m, web4)
		steady := m.Steady(lab.SteadyOptions{From: m.VM, UID: 1000, To: []netip.AddrPort{web4, web6},
			PerSecond: 100, HTTP: true})
		changes := soak(50, 8)
		for i := range changes {
			_, err := m.CP.Set(services(both(i), both(1000+i/2)))
			must(t, err)
			time.Sleep(time.Duration(5+13*i%60) * time.Millisecond) // anywhere in the change
			a.Kill()
			must(t, a.Start())
			eventually(t, 10*time.Second, "convergence after kill -9", func() (bool, string) {
				out := chains(t, m)
				for family, vip := range both(i).Prefixes {
					if !strings.Contains(out, "-d "+vip.String()+" ") ||
						i > 0 && strings.Contains(out, "-d "+both(i - 1).Prefixes[family].String()+" ") {
						return false, out
					}
				}
				return true, out
			})
		}
		if c := steady.Stop(); c.Bad() != 0 || c.OK < 5*changes {
			t.Errorf("connections to unchanged VIPs over %d kills: %v", changes, c)
		} else {
			t.Logf("%d kills in %d changes: %v", changes, changes, c)
		}
	})
}

// TestEnvoyDown: Envoy killed and back, with keep and with bypass.
func TestEnvoyDown(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, backend lab.Backend) {
		for _, policy := range []reconcile.WhenEnvoyDown{reconcile.Keep, reconcile.Bypass} {
			t.Run(string(policy), func(t *testing.T) {
				m, a := start(t, mesh.Options{Backend: backend, Config: services()}, "--when-envoy-down",
					string(policy))
				must(t, a.WaitReady(within(t, 20*time.Second)))
				through(t, m, web4)
				m.Envoy.Kill()
				_, err := a.Wait(within(t, 10*time.Second), "the failure", func(s status.Status) bool {
					return !s.Ready && strings.HasPrefix(s.LastFailure, "Envoy is not running")
				})
				must(t, err)
				if policy == reconcile.Keep {
					time.Sleep(4 * time.Second) // longer than bypass would take
					if r, err := lab.HTTPProbe(t.Context(), m.VM, 1000, web4); err == nil {
						t.Errorf("with Envoy down and keep: %+v, want a refused connection", r)
					}
				} else {
					escapes(t, m, web4)
					_, err := a.Wait(within(t, 5*time.Second), "mode bypass", func(s status.Status) bool {
						return s.Mode == "bypass"
					})
					must(t, err)
				}
				must(t, m.Envoy.Start())
				through(t, m, web4)
				must(t, a.WaitReady(within(t, 10*time.Second)))
				s, err := a.Status(t.Context())
				must(t, err)
				if !strings.Contains(s.LastFailure, "(over; ") {
					t.Errorf("last failure %q, want it over", s.LastFailure)
				}
			})
		}
	})
}

// TestControlPlaneAway: Envoy restarted while the control plane is away has no listeners; that is
// no news, and unchanged VIPs stay in the chains.
func TestControlPlaneAway(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, backend lab.Backend) {
		m, a := start(t, mesh.Options{Backend: backend, Config: services(), NoRuntime: true})
		must(t, a.WaitReady(within(t, 20*time.Second)))
		through(t, m, web4)
		before := chains(t, m)
		m.CP.GoAway()
		must(t, m.Envoy.Restart())
		_, err := a.Wait(within(t, 20*time.Second), "an Envoy without listeners",
			func(s status.Status) bool {
				return s.Envoy.State != "LIVE" && !s.Envoy.Configured &&
					hasFinding(s, symptom.EnvoyNotConfigured)
			})
		must(t, err)
		// Envoy waits 15 s for its clusters and 15 s for its listeners, and is LIVE then, with none
		if backend == lab.NFT {
			_, err = a.Wait(within(t, 60*time.Second), "Envoy live without listeners",
				func(s status.Status) bool {
					return s.Envoy.State == "LIVE" && !s.Envoy.Configured &&
						hasFinding(s, symptom.EnvoyNotConfigured)
				})
			must(t, err)
		}
		time.Sleep(2 * time.Second)
		if after := chains(t, m); after != before {
			t.Errorf("the rules changed:\n%s\nbefore:\n%s", after, before)
		}
		must(t, m.CP.ComeBack())
		must(t, a.WaitReady(within(t, 60*time.Second)))
		through(t, m, web4)
		// An empty set that the control plane did send is news.
		_, err = m.CP.Set(controlplane.Config{})
		must(t, err)
		eventually(t, 10*time.Second, "rules gone with the services", func() (bool, string) {
			out := chains(t, m)
			return strings.TrimSpace(out) == "", out
		})
		must(t, a.WaitReady(within(t, 10*time.Second))) // an empty want counts
	})
}

// TestForeignOwner: another local user on Envoy's ports while Envoy is down. The jumps go, it is
// said, nothing is believed.
func TestForeignOwner(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, backend lab.Backend) {
		m, a := start(t, mesh.Options{Backend: backend, Config: services()})
		must(t, a.WaitReady(within(t, 20*time.Second)))
		through(t, m, web4)
		m.Envoy.Kill()
		const foreign = 4711
		ln6, err := m.VM.ListenAs(foreign, "tcp", "[::1]:15001")
		must(t, err)
		admin, err := m.VM.ListenAs(foreign, "tcp", "127.0.0.1:15000")
		must(t, err)
		lies := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.String() != "/server_info" { // for the words alone: whether it is an Envoy
				t.Errorf("the foreign owner on the admin port was asked %s", r.URL)
			}
			fmt.Fprint(w, `{"configs":[]}`)
		})}
		go lies.Serve(admin)
		named := func(s status.Status, addr string) bool {
			return slices.ContainsFunc(s.Findings, func(f symptom.Finding) bool {
				return f.ID == symptom.ForeignOwner && f.Key == addr &&
					strings.Contains(f.Cause, "is held by uid 4711, ")
			})
		}
		s, err := a.Wait(within(t, 10*time.Second), "the foreign owner is named in IPv6",
			func(s status.Status) bool {
				return named(s, "[::1]:15001") && strings.Contains(s.LastFailure, "uid 4711")
			})
		must(t, err)
		escapes(t, m, web6)
		if s.Ready {
			t.Error("ready with a foreign owner on the interception port of IPv6")
		}
		// IPv4 waits for Envoy, whose port is closed there.
		if out, err := m.Chains(t.Context(), "IPv4"); err != nil || strings.Count(out, "-A OUTPUT") != 1 {
			t.Errorf("IPv4, where there is no foreign owner: %v\n%s", err, out)
		}
		ln4, err := m.VM.ListenAs(foreign, "tcp", "127.0.0.1:15001")
		must(t, err)
		both := func(s status.Status) bool {
			return named(s, "127.0.0.1:15001") && named(s, "[::1]:15001")
		}
		s, err = a.Wait(within(t, 10*time.Second), "the foreign owner is named", both)
		must(t, err)
		escapes(t, m, web4)
		escapes(t, m, web6)
		if out := chains(t, m); strings.Contains(out, "-A OUTPUT") {
			t.Errorf("with a foreign owner on both ports:\n%s", out)
		}
		if s.Ready {
			t.Error("ready with a foreign owner on the interception port")
		}
		// An agent started now adopts nothing that leads to the foreign owner.
		a.Kill()
		must(t, a.Start())
		_, err = a.Wait(within(t, 10*time.Second), "the foreign owner is named after a restart", both)
		must(t, err)
		escapes(t, m, web4)
		escapes(t, m, web6)
		lies.Close()
		ln4.Close()
		ln6.Close()
		must(t, m.Envoy.Start())
		must(t, a.WaitReady(within(t, 20*time.Second)))
		through(t, m, web4)
		through(t, m, web6)
	})
}

// TestForeignOwnerInbound: inbound connections are redirected to an address of the interface, and
// not to loopback, so that is where a foreign owner would get them.
func TestForeignOwnerInbound(t *testing.T) {
	t.Parallel()
	m, a := start(t, mesh.Options{Backend: lab.NFT, Config: services()})
	must(t, a.WaitReady(within(t, 20*time.Second)))
	m.Envoy.Kill()
	ln, err := m.VM.ListenAs(
		4711, "tcp", netip.AddrPortFrom(lab.VMAddr, attribute.InboundPort).String())
	must(t, err)
	defer ln.Close()
	_, err = a.Wait(within(t, 10*time.Second), "the foreign owner is named",
		func(s status.Status) bool { return hasFinding(s, symptom.ForeignOwner) })
	must(t, err)
	eventually(t, 5*time.Second, "the inbound jump is out", func() (bool, string) {
		out, err := m.Chains(t.Context(), "IPv4")
		return err == nil && !strings.Contains(out, "-j SERVICE_PROXY_INBOUND"), out
	})
	// The outbound jump stays: Envoy's port is closed, and who is kept waits for it.
	if out, err := m.Chains(t.Context(), "IPv4"); err != nil ||
		!strings.Contains(out, "-A OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT") {
		t.Errorf("%v\n%s", err, out)
	}
	ln.Close()
	must(t, m.Envoy.Start())
	must(t, a.WaitReady(within(t, 20*time.Second)))
}

// TestForeignOwnerAfterRestart: the jumps that an earlier run left lead to a foreign owner
// when the agent starts.
func TestForeignOwnerAfterRestart(t *testing.T) {
	t.Parallel()
	m, a := start(t, mesh.Options{Backend: lab.NFT, Config: services()})
	must(t, a.WaitReady(within(t, 20*time.Second)))
	a.Kill()
	m.Envoy.Kill()
	for _, addr := range []string{"127.0.0.1:15001", "[::1]:15001"} {
		ln, err := m.VM.ListenAs(4711, "tcp", addr)
		must(t, err)
		defer ln.Close() // held until then
	}
	must(t, a.Start())
	escapes(t, m, web4)
	escapes(t, m, web6)
}

// TestCleanup: everything of ours goes, the running agent pauses, and foreign rules stay to the
// byte. Where the rules cannot be taken out, the exit code says so: whoever stops Envoy after a 0
// would cut the machine off.
func TestCleanup(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, backend lab.Backend) {
		ctx := within(t, 60*time.Second)
		m, err := mesh.New(ctx, mesh.Options{Backend: backend, Config: services()})
		must(t, err)
		defer func() { must(t, m.Close()) }()
		_, err = m.VM.Run(ctx, "iptables", "-w", "-t", "nat", "-A", "OUTPUT", "-d", "192.0.2.1/32", "-p",
			"tcp", "-j", "DNAT", "--to-destination", "192.0.2.2")
		must(t, err)
		_, err = m.VM.Run(ctx, "ip6tables", "-w", "-t", "nat", "-A", "OUTPUT", "-d", "2001:db8::1/128",
			"-p", "tcp", "-j", "DNAT", "--to-destination", "2001:db8::2")
		must(t, err)
		save := func() (both string) {
			for _, program := range []string{"iptables-save", "ip6tables-save"} {
				out, err := m.VM.Run(ctx, program, "-t", "nat")
				must(t, err)
				both += out
			}
			return both
		}
		before := save()
		a := m.NewAgent()
		must(t, a.Start())
		must(t, a.WaitReady(ctx))
		in := chains(t, m)
		// A restore that refuses whatever it is given, in the words of iptables-legacy-restore
		// 1.8.9.
		refusing := t.TempDir()
		for _, name := range []string{"iptables-restore", "ip6tables-restore"} {
			must(t, os.WriteFile(filepath.Join(refusing, name),
				[]byte("#!/bin/sh\necho \"$0: line 2 failed\" >&2\nexit 1\n"), 0o755))
		}
		out, stderr, code, err := a.RunAs(
			ctx, 0, []string{"PATH=" + refusing + ":" + m.Lab.Shims() + ":" + os.Getenv("PATH")}, "cleanup")
		if err != nil || code != 1 || strings.Contains(out, "removed") ||
			!strings.Contains(stderr, "IPv4") || !strings.Contains(stderr, "IPv6") {
			t.Errorf("cleanup by a restore that refuses: %d %v\n%s%s", code, err, out, stderr)
		}
		if now := chains(t, m); now != in {
			t.Errorf("after a cleanup that was refused:\n%s\nbefore:\n%s", now, in)
		}
		out, stderr, code, err = a.Run(ctx, "cleanup")
		if err != nil || code != 0 || !strings.Contains(out, "paused") ||
			!strings.Contains(out, "removed") {
			t.Errorf("cleanup: %d %v\n%s%s", code, err, out, stderr)
		}
		time.Sleep(3 * time.Second) // the agent must not put anything back
		after := save()
		if withoutComments(after) != withoutComments(before) {
			t.Errorf("after cleanup:\n%s\nbefore the install:\n%s", after, before)
		}
		if left := strings.TrimSpace(chains(t, m)); left != "" {
			t.Errorf("after cleanup ours are\n%s", left)
		}
		if code, body, err := a.Get("/healthz/ready"); err != nil ||
			code != http.StatusServiceUnavailable || !strings.Contains(body, "paused") {
			t.Errorf("/healthz/ready: %d %q %v", code, body, err)
		}
		a.Kill()
		must(t, a.Start())
		must(t, a.WaitReady(ctx))
		through(t, m, web4)
		a.Kill()
	})
}

// withoutComments drops the lines with the time, and the packet counters of built-in chains.
func withoutComments(save string) string {
	var b strings.Builder
	for line := range strings.Lines(save) {
		if !strings.HasPrefix(line, "#") {
			if i := strings.Index(line, " ["); i > 0 {
				line = line[:i] + "\n"
			}
			b.WriteString(line)
		}
	}
	return b.String()
}
