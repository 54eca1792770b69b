//go:build lab

package e2e

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// interception is an attribute with this in traffic-interception.
func interception(what string) string {
	return `{"api-version":"0.2","proxy-spec":{"network":""},"traffic-interception":{` + what + `}}`
}

// relayed says whether somebody stands between us and the server: the server then saw another
// connection than ours. Envoy's passthrough goes to the address that was called, so the
// address says nothing.
func relayed(ctx context.Context, from *lab.Namespace, uid uint32,
	to netip.AddrPort) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	c, err := from.DialAs(ctx, uid, to)
	if err != nil {
		return false, err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(2 * time.Second))
	if _, err := io.WriteString(c, "hello\n"); err != nil {
		return false, err
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	var name, local, peer string
	if n, _ := fmt.Sscanf(line, "name=%s local=%s peer=%s", &name, &local, &peer); n != 3 {
		return false, fmt.Errorf("%q from %s: %w", line, to, err)
	}
	if local != to.String() {
		return false, fmt.Errorf("the connection to %s ended at %s", to, local)
	}
	return peer != c.LocalAddr().String(), nil
}

// wantRelayed has each address reached through Envoy, or untouched.
func wantRelayed(t *testing.T, from *lab.Namespace, uid uint32, want bool, to ...netip.AddrPort) {
	t.Helper()
	for _, addr := range to {
		if got, err := relayed(t.Context(), from, uid, addr); err != nil || got != want {
			t.Errorf("uid %d to %s: through Envoy is %v (%v), want %v", uid, addr, got, err, want)
		}
	}
}

func addrPorts(texts ...string) (all []netip.AddrPort) {
	for _, text := range texts {
		all = append(all, netip.MustParseAddrPort(text))
	}
	return all
}

// stat is a counter of Envoy's.
func stat(t *testing.T, m *mesh.Mesh, name string) (n int) {
	t.Helper()
	out, err := m.Envoy.Admin(t.Context(), "/stats?filter=^"+name+"$")
	must(t, err)
	if _, err := fmt.Sscanf(out, name+": %d", &n); err != nil {
		t.Fatalf("no stat %s: %q", name, out)
	}
	return n
}

// TestInterceptAll: everything goes through Envoy but the excludes, root and the proxy, in both
// families. What becomes of a connection that is no service's is up to Envoy: it passes it through,
// or closes it when it has no chain for it.
func TestInterceptAll(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, backend lab.Backend) {
		config := services()
		config.Passthrough = true
		attribute := interception(`"intercept-all-outbound":true,
			"exclude-outbound-ip-ranges":["203.0.113.0/24","198.51.100.9","2001:db8:9::/48"],
			"exclude-outbound-port-ranges":["9010-9000","82"]`)
		m, a := start(t, mesh.Options{Backend: backend, Config: config, Attribute: attribute})
		for _, port := range []uint16{82, 83, 8999, 9005, 9010, 9011} {
			if _, err := m.Echo(m.Service, port, lab.EchoOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		must(t, a.WaitReady(within(t, 20*time.Second)))
		through(t, m, web4)
		through(t, m, web6)

		passed := stat(t, m, "tcp.passthrough.downstream_cx_total")
		others := addrPorts("198.51.100.7:81", "[2001:db8::7]:81", "198.51.100.7:83", "198.51.100.7:8999",
			"198.51.100.7:9011", "[2001:db8::7]:9011", "203.0.112.255:81")
		wantRelayed(t, m.VM, 1000, true, others...)
		if n := stat(t, m, "tcp.passthrough.downstream_cx_total") - passed; n != len(others) {
			t.Errorf("Envoy passed %d connections through, want %d", n, len(others))
		}
		passed = stat(t, m, "tcp.passthrough.downstream_cx_total")
		excluded := addrPorts("203.0.113.5:81", "203.0.113.5:83", "198.51.100.9:81", "[2001:db8:9::1]:81",
			"198.51.100.7:82", "198.51.100.7:9000", "198.51.100.7:9005", "198.51.100.7:9010", "[2001:db8::7]:9005",
			"10.10.0.2:9000") // a service, on an excluded port
		wantRelayed(t, m.VM, 1000, false, excluded...)
		wantRelayed(t, m.VM, 0, false, others...)
		wantRelayed(t, m.VM, lab.EnvoyUID, false, others...)
		wantRelayed(t, m.VM, 1000, false, netip.MustParseAddrPort("127.0.0.1:8081"))
		metadataAnswers(t, m)
		if n := stat(t, m, "tcp.passthrough.downstream_cx_total") - passed; n != 0 {
			t.Errorf("Envoy got %d connections that were to go past it", n)
		}

		config.Passthrough = false
		push, err := m.CP.Set(config)
		must(t, err)
		must(t, m.CP.WaitAccepted(within(t, 10*time.Second), push))
		closed := stat(t, m, "listener.0.0.0.0_15001.no_filter_chain_match")
		// the old listener drains
		eventually(t, 10*time.Second, "a connection that Envoy closes", func() (bool, string) {
			_, err := relayed(t.Context(), m.VM, 1000, other4)
			n := stat(t, m, "listener.0.0.0.0_15001.no_filter_chain_match") - closed
			return err != nil && n > 0, fmt.Sprintf("%v, %d without a chain", err, n)
		})
		wantRelayed(t, m.VM, 1000, false, excluded...)
		through(t, m, web4)

		m.Platform.SetAttribute("gce-service-proxy", mesh.Attribute)
		for _, other := range []netip.AddrPort{other4, other6} {
			escapes(t, m, other)
		}
		through(t, m, web4)
		through(t, m, db4) // excluded until here
	})
}

// Answers to a question for web.test, which say who was asked.
var (
	fromEnvoy    = netip.MustParseAddr("10.10.0.1")
	fromResolver = netip.MustParseAddr("192.0.2.53")
)

// resolver is every DNS server of the world: it gives the same answer to every question, by UDP.
func resolver(t *testing.T, m *mesh.Mesh) (answerLate func()) {
	t.Helper()
	return resolverOf(t, m, func(q *dnsmessage.Message) {
		q.Answers = []dnsmessage.Resource{{
			Header: dnsmessage.ResourceHeader{Name: q.Questions[0].Name, Type: dnsmessage.TypeA,
				Class: dnsmessage.ClassINET},
			Body: &dnsmessage.AResource{A: fromResolver.As4()},
		}}
	})
}

// resolverOf is every DNS server of the world, which answers as reply does.
func resolverOf(t *testing.T, m *mesh.Mesh,
	reply func(*dnsmessage.Message)) (answerLate func()) {
	t.Helper()
	late := make(chan struct{})
	for network, addr := range map[string]string{"udp4": "0.0.0.0:53", "udp6": "[::]:53"} {
		var conn *net.UDPConn
		must(t, m.Service.Do(func() error {
			c, err := net.ListenPacket(network, addr)
			if err == nil {
				conn = c.(*net.UDPConn)
			}
			return err
		}))
		t.Cleanup(func() { conn.Close() })
		answer(t, conn, late, reply)
	}
	return sync.OnceFunc(func() { close(late) })
}

// answer answers on a socket with the address that was asked as the source, which is none
// of the machine's own.
func answer(t *testing.T, conn *net.UDPConn, late <-chan struct{}, say func(*dnsmessage.Message)) {
	raw, err := conn.SyscallConn()
	must(t, err)
	must(t, raw.Control(func(fd uintptr) {
		unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
		unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
	}))
	go func() {
		b, oob := make([]byte, 1500), make([]byte, 256)
		for {
			n, noob, _, from, err := conn.ReadMsgUDPAddrPort(b, oob)
			if err != nil {
				return
			}
			var q dnsmessage.Message
			if q.Unpack(b[:n]) != nil || len(q.Questions) == 0 {
				continue
			}
			q.Response, q.Additionals = true, nil
			say(&q)
			reply, err := q.Pack()
			if err != nil {
				continue
			}
			if q.Questions[0].Name.String() != lateName {
				conn.WriteMsgUDPAddrPort(reply, oob[:noob], from)
				continue
			}
			at := slices.Clone(oob[:noob])
			go func() {
				select {
				case <-late:
					conn.WriteMsgUDPAddrPort(reply, at, from)
				case <-t.Context().Done():
				}
			}()
		}
	}()
}

// lateName is a name that the resolver answers for only when told to.
const lateName = "late.test."

// asker is a UDP socket of a user of the VM: one port for all its questions,
// as some resolvers have.
type asker struct {
	uid  uint32
	conn net.PacketConn
}

func newAsker(t *testing.T, m *mesh.Mesh, uid uint32) asker {
	t.Helper()
	return asker{uid, listenUDPAs(t, m, uid, "[::]:0")}
}

// listenUDPAs makes a UDP socket of a user of the VM.
func listenUDPAs(t *testing.T, m *mesh.Mesh, uid uint32, addr string) (conn net.PacketConn) {
	t.Helper()
	must(t, m.VM.Do(func() (err error) {
		// A socket belongs to the fsuid that made it (lab.Namespace.DialAs does the same for TCP).
		unix.SetfsgidRetGid(int(uid))
		unix.SetfsuidRetUid(int(uid))
		defer unix.SetfsgidRetGid(0)
		defer unix.SetfsuidRetUid(0)
		conn, err = net.ListenPacket("udp", addr)
		return err
	}))
	t.Cleanup(func() { conn.Close() })
	return conn
}

// question sends one and returns its ID.
func (a asker) question(server netip.AddrPort, name string) (id uint16, err error) {
	q := dnsmessage.Message{
		Header: dnsmessage.Header{ID: uint16(time.Now().UnixNano()), RecursionDesired: true},
		Questions: []dnsmessage.Question{
			{Name: dnsmessage.MustNewName(name), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}},
	}
	b, err := q.Pack()
	if err == nil {
		_, err = a.conn.WriteTo(b, net.UDPAddrFromAddrPort(server))
	}
	return q.ID, err
}

// ask asks a server for web.test.
func (a asker) ask(server netip.AddrPort) (netip.Addr, error) {
	id, err := a.question(server, "web.test.")
	if err != nil {
		return netip.Addr{}, err
	}
	a.conn.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
	for b := make([]byte, 1500); ; {
		n, from, err := a.conn.ReadFrom(b)
		if err != nil {
			return netip.Addr{}, err
		}
		var r dnsmessage.Message
		if err := r.Unpack(b[:n]); err != nil || r.ID != id {
			continue // an answer that came too late
		}
		if at := from.(*net.UDPAddr).AddrPort(); at.Addr().Unmap() != server.Addr() ||
			at.Port() != server.Port() {
			return netip.Addr{}, fmt.Errorf("%v was asked, %v answered", server, at)
		}
		for _, rr := range r.Answers {
			if body, ok := rr.Body.(*dnsmessage.AResource); ok {
				return netip.AddrFrom4(body.A), nil
			}
		}
		return netip.Addr{}, fmt.Errorf("%v: no address", r.RCode)
	}
}

// answered waits until the server's answer is want.
func (a asker) answered(t *testing.T, server netip.AddrPort, want netip.Addr) {
	t.Helper()
	eventually(t, 10*time.Second, fmt.Sprintf("uid %d: answer %v of %v", a.uid, want, server),
		func() (bool, string) {
			got, err := a.ask(server)
			return err == nil && got == want, fmt.Sprint(got, err)
		})
}

// TestInterceptDNS: while Envoy has a DNS listener it answers what the VM asks any resolver,
// in each family and by TCP where it listens there, but for what Envoy and the VM's resolvers
// ask. Sockets that asked before the rules came or went are taken along. A resolver that is
// not let out is named.
func TestInterceptDNS(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, backend lab.Backend) {
		without := services()
		const ownResolver, otherResolver = 4711, 4712
		m, a := start(t,
			mesh.Options{Backend: backend, Config: without, Attribute: interception(`"intercept-dns":true`)},
			"--resolver-users", fmt.Sprintf("%d, no-such-user", ownResolver))
		answerLate := resolver(t, m)
		if _, err := m.Echo(m.Service, 53, lab.EchoOptions{Name: "resolver"}); err != nil {
			t.Fatal(err)
		}
		must(t, a.WaitReady(within(t, 20*time.Second)))
		through(t, m, web4)

		user, root, envoy, own := newAsker(t, m, 1000), newAsker(t, m, 0), newAsker(t, m, lab.EnvoyUID),
			newAsker(t, m, ownResolver)
		servers := addrPorts("169.254.169.254:53", "198.51.100.53:53")
		resolver6 := netip.MustParseAddrPort("[fd20:ce::254]:53")
		tcp := func(uid uint32, server netip.AddrPort) string {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			r, err := lab.Probe(ctx, m.VM, uid, server)
			if err != nil {
				return err.Error()
			}
			return r.Name
		}
		past := func() {
			t.Helper()
			for _, server := range append(servers[:2:2], resolver6) {
				for _, who := range []asker{user, root, envoy} {
					who.answered(t, server, fromResolver)
				}
				if by := tcp(1000, server); by != "resolver" {
					t.Errorf("TCP to %v: answered by %s, want the resolver", server, by)
				}
			}
		}
		past() // no DNS listener yet

		with := services()
		// as Envoy's DNS filter is: UDP only
		with.DNS = &controlplane.DNS{Names: map[string][]netip.Addr{"web.test": {fromEnvoy}}}
		// An answer that comes after the rules brings a new conntrack entry of the old
		// path, which does not last.
		patient := newAsker(t, m, 1000)
		_, err := patient.question(servers[1], lateName)
		must(t, err)
		_, err = m.CP.Set(with)
		must(t, err)
		user.answered(t, servers[1], fromEnvoy)
		answerLate()
		patient.conn.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, _, err := patient.conn.ReadFrom(make([]byte, 1500)); err != nil {
			t.Errorf("the late answer: %v", err)
		}
		if got, err := patient.ask(servers[1]); got != fromResolver {
			t.Errorf("right after a late answer: %v, %v; then this shows nothing", got, err)
		}
		patient.answered(t, servers[1], fromEnvoy)
		user.answered(t, resolver6, fromResolver) // Envoy's listener is IPv4's only
		for _, server := range append(servers[:2:2], resolver6) {
			if by := tcp(1000, server); by != "resolver" {
				t.Errorf("TCP to %v, which Envoy does not take: answered by %s, want the resolver", server, by)
			}
		}

		full := services()
		full.DNS = &controlplane.DNS{Names: with.DNS.Names, IPv6: true,
			TCPUpstream: netip.AddrPortFrom(lab.EndpointAddr(1), mesh.EndpointPort)}
		_, err = m.CP.Set(full)
		must(t, err)
		servers = append(servers, resolver6)
		for _, server := range servers {
			eventually(t, 10*time.Second, fmt.Sprintf("TCP to %v by Envoy", server), func() (bool, string) {
				by := tcp(1000, server)
				return by == "endpoint", by
			})
		}
		// 127.0.0.53 is where systemd-resolved listens, which is what /etc/resolv.conf names.
		for _, server := range append(servers[:3:3], netip.MustParseAddrPort("127.0.0.53:53")) {
			user.answered(t, server, fromEnvoy)
			root.answered(t, server, fromEnvoy)
			for _, uid := range []uint32{0, 1000} {
				if by := tcp(uid, server); by != "endpoint" {
					t.Errorf("uid %d, TCP to %v: answered by %s, want Envoy's upstream", uid, server, by)
				}
			}
		}
		for _, server := range servers {
			envoy.answered(t, server, fromResolver)
			own.answered(t, server, fromResolver)
			if by := tcp(lab.EnvoyUID, server); by != "resolver" {
				t.Errorf("as Envoy's user, TCP to %v: answered by %s, want the resolver", server, by)
			}
		}
		must(t, a.WaitReady(within(t, 5*time.Second)))
		listenUDPAs(t, m, ownResolver, "127.0.0.2:53")
		looping := listenUDPAs(t, m, otherResolver, "127.0.0.1:53")
		s, err := a.Wait(within(t, 5*time.Second), "the resolver that would loop",
			func(s status.Status) bool { return hasFinding(s, symptom.ResolverLoop) })
		must(t, err)
		named := slices.ContainsFunc(s.Findings, func(f symptom.Finding) bool {
			return f.ID == symptom.ResolverLoop && f.Severity == symptom.Warning &&
				strings.Contains(f.Cause, "resolver on 127.0.0.1:53 of uid 4712 ")
		})
		// It may ask nobody, so it is no failure.
		if !named || strings.Contains(s.LastFailure, "127.0.0.1:53") {
			t.Errorf("findings %+v, last failure %q: want a warning that names uid %d", s.Findings,
				s.LastFailure, otherResolver)
		}
		looping.Close()
		_, err = a.Wait(within(t, 5*time.Second), "no resolver that would loop",
			func(s status.Status) bool { return !hasFinding(s, symptom.ResolverLoop) })
		must(t, err)

		_, err = m.CP.Set(without)
		must(t, err)
		eventually(t, 10*time.Second, "the DNS rules gone", func() (bool, string) {
			out := chains(t, m)
			return !strings.Contains(out, "SERVICE_PROXY_DNS") &&
				strings.Contains(out, "SERVICE_PROXY_OUTPUT"), out
		})
		past()
		through(t, m, web4)

		_, err = m.CP.Set(full)
		must(t, err)
		user.answered(t, servers[0], fromEnvoy)
		user.answered(t, resolver6, fromEnvoy)
		_, stderr, code, err := a.Run(within(t, 20*time.Second), "cleanup")
		must(t, err)
		if code != 0 {
			t.Fatalf("cleanup: exit code %d: %s", code, stderr)
		}
		past()
	})
}

// container is a network that is routed through the VM: the lab's client by a second
// cable, "cont0" in the VM.
func container(t *testing.T, m *mesh.Mesh) {
	t.Helper()
	for _, b := range []struct {
		in    *lab.Namespace
		lines string
	}{
		{m.VM, "link add cont0 type veth peer name eth1 netns " + m.Client.Name + `
link set cont0 up
addr add 172.18.0.1/24 dev cont0
addr add fd18::1/64 dev cont0 nodad
`},
		{m.Client, `link set eth1 up
addr add 172.18.0.2/24 dev eth1
addr add fd18::2/64 dev eth1 nodad
route replace default via 172.18.0.1
route replace default via fd18::1
`},
		{m.Service, "route add 172.18.0.0/24 via 10.128.0.2\nroute add fd18::/64 via fd28::2\n"},
	} {
		_, err := b.in.RunInput(t.Context(), b.lines, "ip", "-batch", "-")
		must(t, err)
	}
	must(t, m.VM.Do(func() error {
		for _, path := range []string{
			"/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"} {
			if err := os.WriteFile(path, []byte("1"), 0); err != nil {
				return err
			}
		}
		return nil
	}))
	// IPv6 has to look for its neighbours
	eventually(t, 10*time.Second, "the container's way out", func() (bool, string) {
		_, err := relayed(t.Context(), m.Client, 1000, other6)
		return err == nil, fmt.Sprint(err)
	})
}

// TestInterceptInterfaces: what comes in by a named interface to be routed is treated as the VM's
// own traffic is; without the setting it is only routed.
func TestInterceptInterfaces(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, backend lab.Backend) {
		config := services(controlplane.Service{
			Name: "excluded", Prefixes: controlplane.VIPs("10.10.0.9"), Port: 81, Endpoints: endpoints()})
		config.Passthrough = true
		const excludes = `"exclude-outbound-ip-ranges":["10.10.0.9"]`
		m, a := start(
			t, mesh.Options{Backend: backend, Config: config, Attribute: interception(excludes)})
		container(t, m)
		must(t, a.WaitReady(within(t, 20*time.Second)))
		through(t, m, web4)
		through(t, m, web6)
		vips := []netip.AddrPort{web4, web6, db4}
		excluded := netip.MustParseAddrPort("10.10.0.9:81")
		wantRelayed(t, m.Client, 1000, false, append(vips, excluded, other4, other6)...)

		a.Kill()
		a = m.NewAgent("--intercept-interfaces", "cont0")
		must(t, a.Start())
		viaEnvoy := func(to netip.AddrPort) {
			t.Helper()
			eventually(t, 5*time.Second, fmt.Sprintf("the container to %s through Envoy", to),
				func() (bool, string) {
					ctx, cancel := context.WithTimeout(t.Context(), time.Second)
					defer cancel()
					r, err := lab.HTTPProbe(ctx, m.Client, 1000, to)
					return err == nil && !r.Escaped && r.Name == "endpoint", fmt.Sprintf("%+v %v", r, err)
				})
		}
		for _, vip := range vips {
			viaEnvoy(vip)
		}
		wantRelayed(t, m.Client, 1000, false, excluded, other4, other6)
		through(t, m, web4)

		m.Platform.SetAttribute(
			"gce-service-proxy", interception(`"intercept-all-outbound":true,`+excludes))
		for _, other := range []netip.AddrPort{other4, other6} {
			eventually(t, 5*time.Second, fmt.Sprintf("the container to %s through Envoy", other),
				func() (bool, string) {
					got, err := relayed(t.Context(), m.Client, 1000, other)
					return got, fmt.Sprint(err)
				})
		}
		viaEnvoy(web4)
		// Root of a container is not root of the VM, and what is asked of the VM itself is not outbound.
		wantRelayed(t, m.Client, 0, true, other4)
		wantRelayed(t, m.Client, 1000, false, excluded, netip.MustParseAddrPort("172.18.0.1:8081"))
		must(t, a.WaitReady(within(t, 5*time.Second)))
	})
}
