//go:build kernel

package try

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/internal/conntrack"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// scene is a VM with neighbours, each a network namespace behind an interface of the VM:
//
//	eth0     a client outside
//	docker0  a container
//	eth1     everything that is not this machine's: it answers for any address
type scene struct {
	t       *testing.T
	family  iptables.Family
	local   []netip.Addr // addresses of an interface
	routed  netip.Prefix // local to this machine without an interface that has them
	remote  []netip.Addr
	nobody  netip.Addr // a packet for it leaves and is never answered
	clients map[string]*neighbour
	arrived chan arrival
}

// The ports of redirects, those where programs answer, and one where nobody does.
const (
	outboundPort, inboundPort, dnsPort = 15001, 15006, 15053
	foreignPort                        = 9999
	closedPort                         = 8081
)

var openPorts = []uint16{22, 53, 80, 443, 8080}

// arrival is a connection that a listener for redirected ones has taken.
type arrival struct {
	port     uint16
	from     netip.AddrPort
	original netip.AddrPort // as SO_ORIGINAL_DST has it
}

// neighbour runs functions in a namespace of its own.
type neighbour struct {
	do chan func()
	ns string // its path
}

func newNeighbour(t *testing.T) *neighbour {
	n := &neighbour{do: make(chan func())}
	ready := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with its namespace
		err := unix.Unshare(unix.CLONE_NEWNET)
		n.ns = fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid())
		ready <- err
		for f := range n.do {
			f()
		}
	}()
	if err := <-ready; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { close(n.do) })
	return n
}

// in runs f there; a command that it starts is there, too.
func (n *neighbour) in(f func()) {
	done := make(chan struct{})
	n.do <- func() {
		defer close(done)
		f()
	}
	<-done
}

func newScene(t *testing.T, family iptables.Family) *scene {
	s := &scene{t: t, family: family, clients: map[string]*neighbour{},
		arrived: make(chan arrival, 64)}
	ip, nodad, bits := "ip -4", "", "/24"
	local := []string{"10.50.0.1", "10.50.0.2"}
	remote := []string{"10.1.0.1", "10.1.0.2", "10.1.0.3", "10.1.1.1", "10.2.0.1", "8.8.8.8",
		"192.0.2.7", "169.254.169.254", "169.254.3.3"}
	s.routed, s.nobody = netip.MustParsePrefix("10.50.1.0/24"), netip.MustParseAddr("10.3.0.1")
	network := func(n, host int) string { return fmt.Sprintf("10.60.%d.%d", n, host) }
	if family == iptables.IPv6 {
		ip, nodad, bits = "ip -6", "nodad", "/64"
		local = []string{"fd50::1", "fd50::2"}
		remote = []string{"fd01::1", "fd01::2", "fd01::3", "fd01:0:0:1::1", "fd02::1", "2001:db8::8",
			"fd20:ce::254", "::12.34.56.78"}
		s.routed, s.nobody = netip.MustParsePrefix("fd50:1::/64"), netip.MustParseAddr("fd03::1")
		network = func(n, host int) string { return fmt.Sprintf("fd60:%d::%d", n, host) }
	}
	sh(t, "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")
	for n, name := range []string{"eth0", "docker0", "eth1"} {
		peer := newNeighbour(t)
		near, far, up := network(n, 1), network(n, 2), "up"+strconv.Itoa(n)
		sh(t, fmt.Sprintf("ip link add %s type veth peer name %s; ip link set %s up", name, up, name))
		sh(t, fmt.Sprintf("ip link set %s netns %s", up, namespace(t, peer)))
		sh(t, fmt.Sprintf("%s address add %s%s dev %s %s", ip, near, bits, name, nodad))
		peer.in(func() {
			sh(t, fmt.Sprintf("ip link set lo up; %[1]s address add %[2]s%[3]s dev %[4]s %[5]s; "+
				"ip link set %[4]s up; %[1]s route add default via %[6]s", ip, far, bits, up, nodad, near))
		})
		s.local = append(s.local, netip.MustParseAddr(near))
		s.clients[name] = peer
	}
	for _, a := range local {
		sh(t, fmt.Sprintf("%s address add %s dev lo %s", ip, a, nodad))
		s.local = append(s.local, netip.MustParseAddr(a))
	}
	world := network(2, 2)
	sh(t, fmt.Sprintf("%[1]s route add local %[2]s dev lo; %[1]s route add default via %[3]s", ip, s.routed, world))
	gone := network(2, 99)
	sh(t, fmt.Sprintf("%[1]s neigh add %[2]s lladdr 02:00:00:00:00:99 dev eth1; %[1]s route add %[3]s via %[2]s",
		ip, gone, s.nobody))
	for _, a := range remote {
		addr := netip.MustParseAddr(a)
		s.remote = append(s.remote, addr)
		s.clients["eth1"].in(func() { sh(t, fmt.Sprintf("%s route add local %s dev lo", ip, addr)) })
	}
	s.listeners()
	return s
}

// namespace is a path by which `ip link set netns` finds the neighbour's namespace: it takes no
// path of a thread.
func namespace(t *testing.T, n *neighbour) string {
	t.Helper()
	fd, err := unix.Open(n.ns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd)
}

// listeners answer here and in the world.
func (s *scene) listeners() {
	ports := append(slices.Clone(openPorts), outboundPort, inboundPort, dnsPort)
	for _, port := range ports {
		redirected := port == outboundPort || port == inboundPort || port == dnsPort
		go s.accept(listen(s.t, ":"+strconv.Itoa(int(port))), redirected)
	}
	s.clients["eth1"].in(func() {
		for _, port := range openPorts {
			go s.accept(listen(s.t, ":"+strconv.Itoa(int(port))), false)
		}
	})
}

func (s *scene) accept(l *net.TCPListener, tell bool) {
	for {
		c, err := l.AcceptTCP()
		if err != nil {
			return
		}
		if a, ok := arrivalOf(c); ok && tell {
			s.arrived <- a
		}
		c.Close()
	}
}

// arrivalOf is a connection that was redirected.
func arrivalOf(c *net.TCPConn) (a arrival, ok bool) {
	local := c.LocalAddr().(*net.TCPAddr).AddrPort()
	remote := c.RemoteAddr().(*net.TCPAddr).AddrPort()
	a = arrival{port: local.Port(), from: netip.AddrPortFrom(remote.Addr().Unmap(), remote.Port())}
	raw, err := c.SyscallConn()
	if err != nil {
		return a, false
	}
	const originalDst = 80 // SO_ORIGINAL_DST, IP6T_SO_ORIGINAL_DST
	raw.Control(func(fd uintptr) {
		// Of the calls that return as many bytes as an address has.
		if remote.Addr().Unmap().Is4() {
			if m, err := unix.GetsockoptIPv6Mreq(int(fd), unix.IPPROTO_IP, originalDst); err == nil {
				b := m.Multiaddr
				a.original = netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), uint16(b[2])<<8|uint16(b[3]))
			}
			return
		}
		if m, err := unix.GetsockoptIPv6MTUInfo(int(fd), unix.IPPROTO_IPV6, originalDst); err == nil {
			port := m.Addr.Port // in network order, which is little here
			a.original = netip.AddrPortFrom(netip.AddrFrom16(m.Addr.Addr), port<<8|port>>8)
		}
	})
	at := netip.AddrPortFrom(local.Addr().Unmap(), local.Port())
	return a, a.original.IsValid() && a.original != at
}

// sourceOf is the address from which a connection of this machine to another would come.
func (s *scene) sourceOf(to netip.AddrPort) netip.AddrPort {
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
	if err != nil {
		s.t.Fatal(err)
	}
	defer c.Close()
	a := c.LocalAddr().(*net.UDPAddr).AddrPort()
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

// isLocal says whether an address is this machine's.
func (s *scene) isLocal(a netip.Addr) bool {
	return a.IsLoopback() || slices.Contains(s.local, a) || s.routed.Contains(a)
}

// packet is the first packet of a random connection. Every other one is for what the interception
// is about.
func (s *scene) packet(r *rand.Rand, hook iptables.Hook, i iptables.Interception) iptables.Packet {
	p := iptables.Packet{Hook: hook, Proto: iptables.TCP, Syn: true}
	addresses := slices.Concat(s.local, s.remote, []netip.Addr{s.routed.Addr().Next()})
	if hook == iptables.Output {
		addresses = append(addresses, netip.MustParseAddr(map[iptables.Family]string{
			iptables.IPv4: "127.0.0.53", iptables.IPv6: "::1"}[s.family]))
		if r.IntN(20) == 0 {
			addresses = []netip.Addr{s.nobody}
		}
	} else {
		addresses = slices.DeleteFunc(addresses, netip.Addr.IsLinkLocalUnicast)
	}
	ports := append(slices.Clone(openPorts), closedPort)
	if r.IntN(2) == 0 {
		meant := slices.Clone(addresses)
		if hook == iptables.Output {
			meant = slices.DeleteFunc(meant, func(a netip.Addr) bool {
				return !slices.ContainsFunc(i.Services, func(p netip.Prefix) bool { return p.Contains(a) })
			})
		} else if len(i.Serving) > 0 {
			meant, ports = slices.DeleteFunc(meant, func(a netip.Addr) bool { return !s.isLocal(a) }), nil
			for _, serving := range i.Serving {
				ports = append(ports, serving.Port)
			}
		}
		if len(meant) > 0 {
			addresses = meant
		}
	}
	p.Dst = netip.AddrPortFrom(pick(r, addresses), pick(r, ports))
	p.DstLocal = s.isLocal(p.Dst.Addr())
	if hook == iptables.Output {
		p.UID, p.GID = pick(r, uids), pick(r, gids)
		p.Src = s.sourceOf(p.Dst)
		return p
	}
	p.InInterface = pick(r, []string{"eth0", "docker0"})
	n := slices.Index([]string{"eth0", "docker0"}, p.InInterface)
	far := s.local[n].As16() // the near end, which ends in 1
	far[15]++
	p.Src = netip.AddrPortFrom(netip.AddrFrom16(far).Unmap(), 0)
	return p
}

// send makes the connection of which p is the first packet, and says what became of it. One from
// outside is looked at here by what Connect looks by.
func (s *scene) send(p iptables.Packet) Outcome {
	s.t.Helper()
	limit := 2 * time.Second // of what is answered
	if p.Dst.Addr() == s.nobody {
		limit = 30 * time.Millisecond
	}
	ctx, cancel := context.WithTimeout(s.t.Context(), limit)
	defer cancel()
	if p.Hook == iptables.Output {
		o, err := Connect(ctx, Ask{p.Dst, p.UID, p.GID})
		if err != nil {
			s.t.Fatalf("%+v: %v", p, err)
		}
		return o
	}
	opened, err := conntrack.ListenOpened()
	if err != nil {
		s.t.Fatal(err)
	}
	defer opened.Close()
	o := Outcome{Ask: Ask{To: p.Dst}}
	s.clients[p.InInterface].in(func() {
		fd, err := socketAs(o.Ask)
		if err != nil {
			s.t.Error(err)
			return
		}
		err = unix.Connect(fd, sockaddr(p.Dst))
		name, _ := unix.Getsockname(fd)
		o.From = addrPort(name)
		socket := os.NewFile(uintptr(fd), "connection from outside")
		defer socket.Close()
		if errors.Is(err, unix.EINPROGRESS) {
			err = answer(ctx, socket)
		}
		o.Answer, o.Err = answerOf(err), err
	})
	if err := o.look(ctx, opened); err != nil {
		s.t.Fatal(err)
	}
	return o
}

// witness checks an outcome against what the listener of a redirect has seen. It is another source:
// the entry from its other end, at the program that Envoy is.
func (s *scene) witness(o Outcome) error {
	port := o.Port()
	if o.Answer != Connected || port != outboundPort && port != inboundPort && port != dnsPort {
		select {
		case a := <-s.arrived:
			return fmt.Errorf("port %d took %v for %v", a.port, a.from, a.original)
		default:
			return nil
		}
	}
	select {
	case a := <-s.arrived:
		if a != (arrival{port, o.Client, o.Ask.To}) {
			return fmt.Errorf("port %d took %v for %v", a.port, a.from, a.original)
		}
		return nil
	case <-time.After(5 * time.Second):
		return errors.New("no listener took it")
	}
}

func pick[T any](r *rand.Rand, from []T) T { return from[r.IntN(len(from))] }

// restore gives lines to iptables-restore, which adds them to what is there.
func (s *scene) restore(backend string, lines []string) {
	s.t.Helper()
	text := "*nat\n" + strings.Join(lines, "\n") + "\nCOMMIT\n"
	command := "cat <<'EOT' | " + program(backend, s.family, "-restore") + " --noflush -w 5\n" + text + "EOT\n"
	sh(s.t, command)
}
