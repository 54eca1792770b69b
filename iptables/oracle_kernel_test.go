//go:build kernel

package iptables

import (
	"encoding/binary"
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

// TestTheKernelAgrees sends real packets through random configurations. What was meant, what Walk
// says of the ruleset and of the table read back, and what the kernel does must be the same.
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
		spared := 0 // passed for being in the middle of a stream
		for _, hook := range []Hook{Output, Prerouting} {
			r := rand.New(rand.NewPCG(seed, uint64(hook)))
			catch := newCatcher(t, w, hook)
			redirected, passed := 0, 0
			for n := range configurations {
				i := w.interception(r)
				want := i.Ruleset()
				apply(t, k, want)
				table := read(t, k, f)
				for range 40 {
					p := w.packet(r, hook)
					action, port := meant(i, p)
					for name, v := range map[string]Verdict{
						"Ruleset.Walk": want.Walk(p), "Table.Walk": table.Walk(p)} {
						if v.Action != action || v.Port != port {
							t.Fatalf("seed %d, configuration %d %+v, packet %+v: meant %v %d, %s says %v %d by -A %s %s",
								seed, n, i, p, action, port, name, v.Action, v.Port, v.Chain, v.Rule)
						}
					}
					gotAction, gotPort := catch.send(p)
					if gotAction != action || gotPort != port {
						t.Fatalf("seed %d, configuration %d %+v, packet %+v: meant %v %d, the kernel did %v %d\n%s",
							seed, n, i, p, action, port, gotAction, gotPort, want)
					}
					if action == Redirect {
						redirected++
					} else {
						passed++
						p.Syn = true
						if opened, _ := meant(i, p); opened == Redirect {
							spared++
						}
					}
				}
			}
			if redirected < configurations || passed < configurations {
				t.Errorf("seed %d: only %d packets redirected and %d passed: the world is too large", seed,
					redirected, passed)
			}
			t.Logf("seed %d, hook %d: %d configurations, %d packets redirected, %d passed", seed, hook,
				configurations, redirected, passed)
			catch.close()
		}
		if spared == 0 {
			t.Errorf("seed %d: settling spared no packet", seed)
		}
		t.Logf("seed %d: settling spared %d packets", seed, spared)
	})
}

// catcher sends packets and finds out where they went: every port to which anything is redirected
// listens, every other one answers at once that nobody does.
type catcher struct {
	t         *testing.T
	family    int
	hook      Hook
	listeners map[uint16]int // TCP
	dns       int            // UDP
	// every TCP segment that came to a socket of this namespace, as it came there
	arrived int
	sent    uint16         // packets that were given a port of their own
	home    int            // this namespace
	peers   map[string]int // the namespaces behind the interfaces
	undo    func()
}

func newCatcher(t *testing.T, w world, hook Hook) *catcher {
	c := &catcher{t: t, family: unix.AF_INET, hook: hook, listeners: map[uint16]int{},
		peers: map[string]int{}}
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
	c.arrived = c.rawSocket()

	if hook == Output {
		c.undo = everyAddressIsLocal(t, w.family)
		return c
	}
	// Two neighbours that ask, and one behind which everything is that is not local: it refuses at
	// once what reaches it.
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

// everyAddressIsLocal makes every address this machine's own, so that whatever is not
// redirected is answered at once.
func everyAddressIsLocal(t *testing.T, f Family) (undo func()) {
	ip, source, everything, nodad := "-4", "10.77.0.1", "0.0.0.0/0", []string(nil)
	if f == IPv6 {
		ip, source, everything, nodad = "-6", "fd77::1", "::/0", []string{"nodad"}
	}
	sh(t, "ip", append([]string{ip, "address", "add", source, "dev", "lo"}, nodad...)...)
	sh(t, "ip", ip, "route", "add", "local", everything, "dev", "lo", "src", source)
	return func() { sh(t, "ip", ip, "route", "del", "local", everything, "dev", "lo") }
}

// neighbour makes a namespace at the other end of an interface, whose default route leads here.
// What it owns is routed to it.
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
		near, far, bits, nodad = fmt.Sprintf("fd60:%d::1", n), fmt.Sprintf("fd60:%d::2", n), "/64",
			[]string{"nodad"}
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
	if p.Proto == TCP && !p.Syn {
		return c.sendMidStream(p)
	}
	fd := c.socketOf(p, func() int {
		if p.Proto == UDP {
			return c.socket(unix.SOCK_DGRAM)
		}
		return c.socket(unix.SOCK_STREAM)
	})
	defer unix.Close(fd)
	if p.Proto == UDP {
		c.must(unix.Bind(fd, c.address(netip.AddrPortFrom(netip.Addr{}, c.ownPort()))))
	}
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
		ready := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN},
			{Fd: int32(c.dns), Events: unix.POLLIN}}
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

// socketOf makes a socket as the packet's user where the packet comes from.
func (c *catcher) socketOf(p Packet, socket func() int) int {
	if p.Hook == Prerouting {
		c.must(unix.Setns(c.peers[p.InInterface], unix.CLONE_NEWNET))
		defer func() { c.must(unix.Setns(c.home, unix.CLONE_NEWNET)) }()
		return socket()
	}
	// The owner match looks at the fsuid that the socket was made with.
	unix.SetfsgidRetGid(int(p.GID))
	unix.SetfsuidRetUid(int(p.UID))
	defer unix.SetfsgidRetGid(0)
	defer unix.SetfsuidRetUid(0)
	return socket()
}

// ownPort is a source port that was not used before: conntrack decides by the first packet of a
// pair of ports for half a minute, and the kernel's choice for UDP may repeat itself.
func (c *catcher) ownPort() uint16 {
	c.sent++
	return 1024 + c.sent
}

// sendMidStream sends an ACK of a stream that nobody knows. Whoever it comes to answers with a
// reset, be it a listener or a closed port; where it came to is seen by a raw socket behind NAT,
// which gets a copy before that.
func (c *catcher) sendMidStream(p Packet) (Action, uint16) {
	c.t.Helper()
	fd := c.socketOf(p, c.rawSocket)
	defer unix.Close(fd)
	c.must(unix.Connect(fd, c.address(netip.AddrPortFrom(p.Dst.Addr(), 0))))
	from, err := unix.Getsockname(fd)
	c.must(err)
	dst := p.Dst.Addr().AsSlice()
	var src []byte
	switch a := from.(type) {
	case *unix.SockaddrInet4:
		src = a.Addr[:]
	case *unix.SockaddrInet6:
		src = a.Addr[:]
	}
	port := c.ownPort()
	segment := make([]byte, 20)
	binary.BigEndian.PutUint16(segment, port)
	binary.BigEndian.PutUint16(segment[2:], p.Dst.Port())
	binary.BigEndian.PutUint32(segment[4:], 1000)
	binary.BigEndian.PutUint32(segment[8:], 2000)
	segment[12], segment[13] = 5<<4, ack
	binary.BigEndian.PutUint16(segment[14:], 1024)
	sum := uint32(unix.IPPROTO_TCP + len(segment)) // of a header in front that is never sent
	for _, part := range [][]byte{src, dst, segment} {
		for n := 0; n < len(part); n += 2 {
			sum += uint32(binary.BigEndian.Uint16(part[n:]))
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(segment[16:], ^uint16(sum))
	c.segments(c.arrived) // what is left of earlier connections
	_, err = unix.Write(fd, segment)
	c.must(err)
	for answered := false; !answered; {
		c.poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, p)
		answered = slices.ContainsFunc(c.segments(fd), func(s segmentSeen) bool {
			return s.to == port && s.from == p.Dst.Port() && s.flags&reset != 0
		})
	}
	for _, s := range c.segments(c.arrived) {
		if s.from == port && s.flags == ack && s.to != p.Dst.Port() {
			return Redirect, s.to
		}
	}
	return Pass, 0
}

// Flags of TCP.
const (
	reset = 0x04
	ack   = 0x10
)

type segmentSeen struct {
	from, to uint16
	flags    byte
}

// segments are those that wait in a raw socket; in IPv4 each has its IP header in front.
func (c *catcher) segments(fd int) (seen []segmentSeen) {
	b := make([]byte, 2048)
	for {
		n, err := unix.Read(fd, b)
		if err == unix.EAGAIN {
			return seen
		}
		c.must(err)
		tcp := b[:n]
		if c.family == unix.AF_INET {
			tcp = tcp[int(tcp[0]&0x0f)*4:]
		}
		seen = append(
			seen, segmentSeen{binary.BigEndian.Uint16(tcp), binary.BigEndian.Uint16(tcp[2:]), tcp[13]})
	}
}

func (c *catcher) rawSocket() int {
	fd, err := unix.Socket(c.family, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC,
		unix.IPPROTO_TCP)
	c.must(err)
	return fd
}

func refusedOrNowhere(err error) bool {
	return errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.EHOSTUNREACH) ||
		errors.Is(err, unix.ENETUNREACH)
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
	unix.Close(c.arrived)
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
