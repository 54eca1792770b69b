//go:build kernel

package iptables

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// meant says what shall become of a packet, from the interception alone: the expectation is written in the words of the
// domain and knows of no chain.
func meant(i Interception, p Packet) (Action, uint16) {
	dst, port := p.Dst.Addr(), p.Dst.Port()
	in := func(list []netip.Prefix) bool {
		return slices.ContainsFunc(list, func(x netip.Prefix) bool { return x.Contains(dst) })
	}
	excluded := in(i.ExcludePrefixes) || slices.ContainsFunc(i.ExcludePorts, func(r PortRange) bool {
		return min(r.First, r.Last) <= port && port <= max(r.First, r.Last)
	})
	special := dst.IsLoopback() || dst.IsLinkLocalUnicast() || dst == netip.MustParseAddr("fd20:ce::254")
	if !i.Jumps {
		return Pass, 0
	}
	if p.Hook == Prerouting {
		if p.Proto != TCP {
			return Pass, 0
		}
		if i.OutboundPort != 0 && slices.Contains(i.Interfaces, p.InInterface) && !excluded {
			if in(i.Services) && !i.All || i.All && !special && !p.DstLocal {
				return Redirect, i.OutboundPort
			}
		}
		for _, s := range i.Serving {
			if i.InboundPort != 0 && p.DstLocal && s.Port == port && (!s.Addr.IsValid() || s.Addr == dst) {
				return Redirect, i.InboundPort
			}
		}
		return Pass, 0
	}
	if p.UID == i.ProxyUID || p.GID == i.ProxyGID {
		return Pass, 0
	}
	if i.DNSPort != 0 && port == 53 && !slices.Contains(i.ResolverUIDs, p.UID) {
		return Redirect, i.DNSPort
	}
	if p.Proto != TCP || i.OutboundPort == 0 || special || excluded {
		return Pass, 0
	}
	if i.All && p.UID != 0 || !i.All && (in(i.Services) || slices.Contains(i.ServicePorts, port)) {
		return Redirect, i.OutboundPort
	}
	return Pass, 0
}

// world is where the random configurations and packets are taken from: small, so that they meet.
type world struct {
	family    Family
	addresses []netip.Addr // some local to the machine, see local
	local     netip.Prefix
	ports     []uint16
	uids      []uint32
}

const (
	proxyUID, proxyGID = 1999, 1998
	outboundPort       = 15001
	inboundPort        = 15006
	dnsPort            = 15053
)

func newWorld(f Family) world {
	w := world{family: f, ports: []uint16{22, 53, 80, 443, 8080}, uids: []uint32{0, 101, 1000, proxyUID}}
	addresses := []string{"10.1.0.1", "10.1.0.2", "10.1.0.3", "10.1.1.1", "10.2.0.1", "10.50.0.1", "10.50.0.2", "8.8.8.8", "127.0.0.53", "169.254.169.254", "192.0.2.7"}
	w.local = netip.MustParsePrefix("10.50.0.0/24")
	if f == IPv6 {
		addresses = []string{"fd01::1", "fd01::2", "fd01::3", "fd01:0:0:1::1", "fd02::1", "fd50::1", "fd50::2", "2001:db8::8", "::1", "fd20:ce::254"}
		w.local = netip.MustParsePrefix("fd50::/64")
	}
	for _, a := range addresses {
		w.addresses = append(w.addresses, netip.MustParseAddr(a))
	}
	return w
}

func (w world) prefixes(r *rand.Rand, n int) []netip.Prefix {
	var out []netip.Prefix
	for range n {
		a := w.addresses[r.IntN(len(w.addresses))]
		bits := a.BitLen() - []int{0, 0, 0, 1, 2, 8}[r.IntN(6)]
		out = append(out, netip.PrefixFrom(a, bits).Masked())
	}
	return out
}

func (w world) interception(r *rand.Rand) Interception {
	i := Interception{Family: w.family, ProxyUID: proxyUID, ProxyGID: proxyGID, Jumps: r.IntN(10) > 0, Settling: r.IntN(5) == 0}
	port := func() uint16 { return w.ports[r.IntN(len(w.ports))] }
	if r.IntN(8) > 0 {
		i.OutboundPort = outboundPort
		i.All = r.IntN(4) == 0
		i.Services = w.prefixes(r, 1+r.IntN(8))
		if r.IntN(4) == 0 { // buckets, none of them of this world's addresses but by chance
			i.Services = append(i.Services, randomPrefixes(w.family, 257+r.IntN(600), r.Uint64())...)
		}
		for range r.IntN(3) {
			i.ServicePorts = append(i.ServicePorts, port())
		}
		i.ExcludePrefixes = w.prefixes(r, r.IntN(2))
		for range r.IntN(2) {
			i.ExcludePorts = append(i.ExcludePorts, PortRange{port(), port()})
		}
		if r.IntN(2) == 0 {
			i.Interfaces = []string{"docker0"}
		}
	}
	if r.IntN(3) == 0 {
		i.DNSPort = dnsPort
		if r.IntN(2) == 0 {
			i.ResolverUIDs = []uint32{101}
		}
	}
	if r.IntN(3) > 0 {
		i.InboundPort = inboundPort
		for range 1 + r.IntN(5) {
			s := Serving{Port: port()}
			if r.IntN(2) == 0 {
				s.Addr = w.addresses[r.IntN(len(w.addresses))]
			}
			i.Serving = append(i.Serving, s)
		}
	}
	return i
}

// packet makes a packet; in the OUTPUT half of the test every address is local to the namespace.
func (w world) packet(r *rand.Rand, hook Hook) Packet {
	p := Packet{Hook: hook, Proto: TCP, Syn: true, DstLocal: true}
	p.Dst = netip.AddrPortFrom(w.addresses[r.IntN(len(w.addresses))], w.ports[r.IntN(len(w.ports))])
	if hook == Prerouting {
		for p.Dst.Addr().IsLoopback() || p.Dst.Addr().IsLinkLocalUnicast() { // never on a wire
			p.Dst = netip.AddrPortFrom(w.addresses[r.IntN(len(w.addresses))], p.Dst.Port())
		}
		p.InInterface = []string{"eth0", "docker0"}[r.IntN(2)]
		p.DstLocal = w.local.Contains(p.Dst.Addr())
		return p
	}
	p.UID = w.uids[r.IntN(len(w.uids)+2)%len(w.uids)] // the proxy's less often
	p.GID = []uint32{1000, 1000, 1000, proxyGID}[r.IntN(4)]
	if r.IntN(4) == 0 {
		p.Proto = UDP
	}
	return p
}

// TestTheKernelAgrees sends real packets through random configurations. What was meant, what Walk says of the ruleset
// and of the table read back, and what the kernel does must be the same.
func TestTheKernelAgrees(t *testing.T) {
	configurations := 40
	if soak() {
		configurations = 300
	}
	seed := uint64(time.Now().UnixNano())
	if s, err := strconv.ParseUint(os.Getenv("SEED"), 10, 64); err == nil {
		seed = s
	}
	eachBackend(t, func(t *testing.T, k *Kernel, f Family) {
		w := newWorld(f)
		for _, hook := range []Hook{Output, Prerouting} {
			r := rand.New(rand.NewPCG(seed, uint64(hook)))
			catch := newCatcher(t, w, hook)
			redirected, passed := 0, 0
			for n := range configurations {
				i := w.interception(r)
				want := i.Ruleset()
				apply(t, k, want)
				table := read(t, k, f)
				for range 20 {
					p := w.packet(r, hook)
					action, port := meant(i, p)
					for name, v := range map[string]Verdict{"Ruleset.Walk": want.Walk(p), "Table.Walk": table.Walk(p)} {
						if v.Action != action || v.Port != port {
							t.Fatalf("seed %d, configuration %d %+v, packet %+v: meant %v %d, %s says %v %d by -A %s %s", seed, n, i, p, action, port, name, v.Action, v.Port, v.Chain, v.Rule)
						}
					}
					gotAction, gotPort := catch.send(p)
					if gotAction != action || gotPort != port {
						t.Fatalf("seed %d, configuration %d %+v, packet %+v: meant %v %d, the kernel did %v %d\n%s", seed, n, i, p, action, port, gotAction, gotPort, want)
					}
					if action == Redirect {
						redirected++
					} else {
						passed++
					}
				}
			}
			if redirected < configurations || passed < configurations {
				t.Errorf("seed %d: only %d packets redirected and %d passed: the world is too large", seed, redirected, passed)
			}
			t.Logf("seed %d, hook %d: %d configurations, %d packets redirected, %d passed", seed, hook, configurations, redirected, passed)
			catch.close()
		}
	})
}

// catcher sends packets and finds out where they went: every port to which anything is redirected listens, every other
// one answers at once that nobody does.
type catcher struct {
	t         *testing.T
	family    int
	hook      Hook
	listeners map[uint16]int // TCP
	dns       int            // UDP
	home      int            // this namespace
	peers     map[string]int // the namespaces behind the interfaces
	undo      func()
}

func newCatcher(t *testing.T, w world, hook Hook) *catcher {
	c := &catcher{t: t, family: unix.AF_INET, hook: hook, listeners: map[uint16]int{}, peers: map[string]int{}}
	ip := "-4"
	if w.family == IPv6 {
		c.family, ip = unix.AF_INET6, "-6"
	}
	for _, port := range []uint16{outboundPort, inboundPort, dnsPort} {
		fd := c.socket(unix.SOCK_STREAM)
		c.must(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
		c.must(unix.Bind(fd, c.address(netip.AddrPortFrom(netip.Addr{}, port))))
		c.must(unix.Listen(fd, 16))
		c.listeners[port] = fd
	}
	c.dns = c.socket(unix.SOCK_DGRAM)
	c.must(unix.Bind(c.dns, c.address(netip.AddrPortFrom(netip.Addr{}, dnsPort))))

	if hook == Output {
		c.undo = everyAddressIsLocal(t, w.family)
		return c
	}
	// Two neighbours that ask, and one behind which everything is that is not local: it refuses at once what reaches it.
	sh(t, "sysctl", "-q", "-w", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
	sh(t, "ip", ip, "route", "add", "local", w.local.String(), "dev", "lo")
	home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	c.must(err)
	c.home = home
	var elsewhere []string
	for _, a := range w.addresses {
		if !w.local.Contains(a) && !a.IsLoopback() && !a.IsLinkLocalUnicast() {
			elsewhere = append(elsewhere, netip.PrefixFrom(a, a.BitLen()).String())
		}
	}
	c.peers["eth0"] = c.neighbour(ip, "eth0", 0, nil)
	c.peers["docker0"] = c.neighbour(ip, "docker0", 1, nil)
	c.neighbour(ip, "eth1", 2, elsewhere)
	return c
}

// everyAddressIsLocal makes every address this machine's own, so that whatever is not redirected is answered at once.
func everyAddressIsLocal(t *testing.T, f Family) (undo func()) {
	ip, source, everything, nodad := "-4", "10.77.0.1", "0.0.0.0/0", []string(nil)
	if f == IPv6 {
		ip, source, everything, nodad = "-6", "fd77::1", "::/0", []string{"nodad"}
	}
	sh(t, "ip", append([]string{ip, "address", "add", source, "dev", "lo"}, nodad...)...)
	sh(t, "ip", ip, "route", "add", "local", everything, "dev", "lo", "src", source)
	return func() { sh(t, "ip", ip, "route", "del", "local", everything, "dev", "lo") }
}

// neighbour makes a namespace at the other end of an interface, whose default route leads here. What it owns is routed to it.
func (c *catcher) neighbour(ip, name string, n int, owns []string) int {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	c.must(unix.Unshare(unix.CLONE_NEWNET))
	peer, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	c.must(err)
	// Commands run in the namespace of the thread that starts them.
	path := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), peer)
	up := "up" + strconv.Itoa(n)
	near, far, bits := fmt.Sprintf("10.60.%d.1", n), fmt.Sprintf("10.60.%d.2", n), "/24"
	nodad := []string(nil)
	if ip == "-6" {
		near, far, bits, nodad = fmt.Sprintf("fd60:%d::1", n), fmt.Sprintf("fd60:%d::2", n), "/64", []string{"nodad"}
	}
	c.must(unix.Setns(c.home, unix.CLONE_NEWNET))
	sh(c.t, "ip", "link", "add", name, "type", "veth", "peer", "name", up)
	sh(c.t, "ip", "link", "set", up, "netns", path)
	sh(c.t, "ip", append([]string{ip, "address", "add", near + bits, "dev", name}, nodad...)...)
	sh(c.t, "ip", "link", "set", name, "up")
	c.must(unix.Setns(peer, unix.CLONE_NEWNET))
	sh(c.t, "ip", "link", "set", "lo", "up")
	sh(c.t, "ip", append([]string{ip, "address", "add", far + bits, "dev", up}, nodad...)...)
	sh(c.t, "ip", "link", "set", up, "up")
	sh(c.t, "ip", ip, "route", "add", "default", "via", near)
	for _, prefix := range owns {
		sh(c.t, "ip", ip, "route", "add", "local", prefix, "dev", "lo")
	}
	c.must(unix.Setns(c.home, unix.CLONE_NEWNET))
	for _, prefix := range owns {
		sh(c.t, "ip", ip, "route", "add", prefix, "via", far)
	}
	return peer
}

// send sends the packet as its user from where it comes and says what became of it.
func (c *catcher) send(p Packet) (Action, uint16) {
	c.t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	kind := unix.SOCK_STREAM
	if p.Proto == UDP {
		kind = unix.SOCK_DGRAM
	}
	if p.Hook == Prerouting {
		c.must(unix.Setns(c.peers[p.InInterface], unix.CLONE_NEWNET))
	} else {
		// The owner match looks at the fsuid that the socket was made with.
		unix.SetfsgidRetGid(int(p.GID))
		unix.SetfsuidRetUid(int(p.UID))
	}
	fd := c.socket(kind)
	if p.Hook == Prerouting {
		c.must(unix.Setns(c.home, unix.CLONE_NEWNET))
	} else {
		unix.SetfsuidRetUid(0)
		unix.SetfsgidRetGid(0)
	}
	defer unix.Close(fd)
	err := unix.Connect(fd, c.address(p.Dst))
	if err != nil && err != unix.EINPROGRESS {
		if refusedOrNowhere(err) {
			return Pass, 0
		}
		c.t.Fatalf("connect %+v: %v", p, err)
	}
	if p.Proto == UDP {
		_, err := unix.Write(fd, []byte("q"))
		if err != nil && !refusedOrNowhere(err) {
			c.t.Fatalf("send %+v: %v", p, err)
		}
		ready := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(c.dns), Events: unix.POLLIN}}
		c.poll(ready, p)
		if ready[1].Revents != 0 {
			var b [16]byte
			_, _, err := unix.Recvfrom(c.dns, b[:], 0)
			c.must(err)
			return Redirect, dnsPort
		}
		return Pass, 0
	}
	c.poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, p)
	code, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	c.must(err)
	if code != 0 {
		if refusedOrNowhere(unix.Errno(code)) {
			return Pass, 0
		}
		c.t.Fatalf("connect %+v: %v", p, unix.Errno(code))
	}
	for port, listener := range c.listeners {
		accepted, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
		if err == unix.EAGAIN {
			continue
		}
		c.must(err)
		unix.Close(accepted)
		return Redirect, port
	}
	c.t.Fatalf("connect %+v: connected to nobody", p)
	return 0, 0
}

func refusedOrNowhere(err error) bool {
	return errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.EHOSTUNREACH) || errors.Is(err, unix.ENETUNREACH)
}

func (c *catcher) poll(fds []unix.PollFd, p Packet) {
	for start := time.Now(); ; {
		n, err := unix.Poll(fds, 5000)
		if err == unix.EINTR && time.Since(start) < 5*time.Second {
			continue
		}
		c.must(err)
		if n == 0 {
			c.t.Fatalf("%+v: no answer", p)
		}
		return
	}
}

func (c *catcher) socket(kind int) int {
	fd, err := unix.Socket(c.family, kind|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	c.must(err)
	return fd
}

func (c *catcher) address(a netip.AddrPort) unix.Sockaddr {
	if c.family == unix.AF_INET6 {
		s := &unix.SockaddrInet6{Port: int(a.Port())}
		if a.Addr().IsValid() {
			s.Addr = a.Addr().As16()
		}
		return s
	}
	s := &unix.SockaddrInet4{Port: int(a.Port())}
	if a.Addr().IsValid() {
		s.Addr = a.Addr().As4()
	}
	return s
}

func (c *catcher) close() {
	for _, fd := range c.listeners {
		unix.Close(fd)
	}
	unix.Close(c.dns)
	if c.undo != nil {
		c.undo()
	}
}

func (c *catcher) must(err error) {
	c.t.Helper()
	if err != nil {
		c.t.Fatal(err)
	}
}
