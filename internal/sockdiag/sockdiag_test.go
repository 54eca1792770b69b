package sockdiag

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// ownerOf asks the kernel for the owner of a listening socket, as PeerOwner does of one whose
// queue a connection is in.
func ownerOf(addr netip.AddrPort) (uint32, error) {
	c, err := dial()
	if err != nil {
		return 0, err
	}
	defer c.Close()
	return owner(c, addr)
}

func TestOwner(t *testing.T) {
	me := uint32(os.Getuid())
	for _, tt := range []struct {
		name, network, listen, ask string
		none                       bool
	}{
		{"exact IPv4", "tcp4", "127.0.0.1:0", "127.0.0.1", false},
		{"wildcard IPv4", "tcp4", "0.0.0.0:0", "127.0.0.1", false},
		{"unspecified means loopback", "tcp4", "127.0.0.1:0", "0.0.0.0", false},
		{"IPv4-mapped address", "tcp4", "127.0.0.1:0", "::ffff:127.0.0.1", false},
		{"other address of loopback", "tcp4", "127.0.0.2:0", "127.0.0.1", true},
		{"exact IPv6", "tcp6", "[::1]:0", "::1", false},
		{"wildcard v6only, asked for IPv6", "tcp6", "[::]:0", "::1", false},
		{"wildcard v6only, asked for IPv4", "tcp6", "[::]:0", "127.0.0.1", true},
		{"dual stack, asked for IPv4", "tcp", "[::]:0", "127.0.0.1", false},
		{"dual stack, asked for IPv6", "tcp", "[::]:0", "::1", false},
		{"IPv4 wildcard, asked for IPv6", "tcp4", "0.0.0.0:0", "::1", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := listen(t, tt.network, tt.listen)
			addr := netip.AddrPortFrom(netip.MustParseAddr(tt.ask), port(l))
			uid, err := ownerOf(addr)
			if tt.none {
				if !errors.Is(err, ErrNoListener) {
					t.Fatalf("ownerOf(%v) = %d, %v; want ErrNoListener", addr, uid, err)
				}
				return
			}
			if err != nil || uid != me {
				t.Fatalf("ownerOf(%v) = %d, %v; want %d", addr, uid, err, me)
			}
			if err := OwnedBy(addr, me); err != nil {
				t.Errorf("OwnedBy(%v, %d): %v", addr, me, err)
			}
			var foreign *ForeignError
			if err := OwnedBy(addr, me+1); !errors.As(err, &foreign) || foreign.UID != me {
				t.Errorf("OwnedBy(%v, %d) = %v; want a ForeignError with uid %d", addr, me+1, err, me)
			}
		})
	}
}

func TestOwnerClosed(t *testing.T) {
	l := listen(t, "tcp4", "127.0.0.1:0")
	p := port(l)
	if all, err := Listeners(p); len(all) != 1 || err != nil {
		t.Fatalf("Listeners(%d) = %v, %v; want the one", p, all, err)
	}
	l.Close()
	if all, err := Listeners(p); len(all) > 0 || err != nil {
		t.Errorf("Listeners(%d) = %v, %v after Close; want none", p, all, err)
	}
	closed := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), p)
	if err := OwnedBy(closed, 0); !errors.Is(err, ErrNoListener) {
		t.Errorf("OwnedBy after Close: %v; want ErrNoListener", err)
	}
}

func TestListenersReusePort(t *testing.T) {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if e := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
		}); e != nil {
			return e
		}
		return err
	}}
	first, err := lc.Listen(t.Context(), "tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { first.Close() })
	second, err := lc.Listen(t.Context(), "tcp4", first.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { second.Close() })
	all, err := Listeners(port(first))
	if err != nil || len(all) != 2 {
		t.Fatalf("Listeners = %v, %v; want two", all, err)
	}
	for _, l := range all {
		if want := netip.MustParseAddrPort(first.Addr().String()); l.Addr != want ||
			l.UID != uint32(os.Getuid()) {
			t.Errorf("Listeners: %+v; want %v of uid %d", l, want, os.Getuid())
		}
	}
}

// TestAccepting covers the sockets one user cannot make: several owners and rival
// addresses on one port.
func TestAccepting(t *testing.T) {
	const envoy, foreign = 107, 1000
	at := func(addr string, uid uint32) Listener {
		return Listener{Addr: netip.AddrPortFrom(netip.MustParseAddr(addr), 15001), UID: uid}
	}
	v6only := at("::", foreign)
	v6only.V6Only = true
	device := at("0.0.0.0", foreign)
	device.Device = 2
	for _, tt := range []struct {
		name string
		have []Listener
		ask  string
		want []uint32
	}{
		{"nobody", nil, "127.0.0.1", nil},
		{"exact beats wildcard", []Listener{at("0.0.0.0", envoy), at("127.0.0.1", foreign)}, "127.0.0.1", []uint32{foreign}},
		{"exact elsewhere", []Listener{at("0.0.0.0", envoy), at("127.0.0.2", foreign)}, "127.0.0.1", []uint32{envoy}},
		{"exact IPv6 beats dual stack", []Listener{at("::", envoy), at("::1", foreign)}, "::1", []uint32{foreign}},
		{"v6only is no rival for IPv4", []Listener{at("0.0.0.0", envoy), v6only}, "127.0.0.1", []uint32{envoy}},
		{"v6only takes IPv6", []Listener{at("0.0.0.0", envoy), v6only}, "::1", []uint32{foreign}},
		{"two owners", []Listener{at("0.0.0.0", foreign), at("0.0.0.0", envoy), at("0.0.0.0", envoy)}, "127.0.0.1", []uint32{envoy, foreign}},
		{"bound to a device", []Listener{at("0.0.0.0", envoy), device}, "127.0.0.1", []uint32{envoy, foreign}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := Accepting(tt.have, netip.MustParseAddr(tt.ask)); !slices.Equal(got, tt.want) {
				t.Errorf("Accepting(%v) = %v; want %v", tt.ask, got, tt.want)
			}
		})
	}
}

func TestPeerOwner(t *testing.T) {
	me := uint32(os.Getuid())
	for _, tt := range []struct{ name, network, listen, dial string }{
		{"IPv4", "tcp4", "127.0.0.1:0", "127.0.0.1"},
		{"IPv6", "tcp6", "[::1]:0", "::1"},
		{"IPv4 to dual stack", "tcp", "[::]:0", "127.0.0.1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := listen(t, tt.network, tt.listen)
			c := dialPort(t, tt.dial, port(l))
			// Nobody has accepted: the kernel itself would say uid 0 for this socket.
			if uid, err := PeerOwner(c); err != nil || uid != me {
				t.Fatalf("PeerOwner before accept = %d, %v; want %d", uid, err, me)
			}
			s, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if uid, err := PeerOwner(c); err != nil || uid != me {
				t.Fatalf("PeerOwner after accept = %d, %v; want %d", uid, err, me)
			}
			l.Close()
			if uid, err := PeerOwner(c); err != nil || uid != me {
				t.Fatalf("PeerOwner after the listener closed = %d, %v; want %d", uid, err, me)
			}
			// A closed end reads as uid 0 (root, who would be trusted) on kernels before 6.17.
			s.Close()
			if uid, err := PeerOwner(c); !errors.Is(err, ErrNoPeer) {
				t.Fatalf("PeerOwner after close = %d, %v; want ErrNoPeer", uid, err)
			}
		})
	}
}

func TestPeerOwnerNotTCP(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if uid, err := PeerOwner(a); err == nil {
		t.Errorf("PeerOwner of a pipe = %d; want an error", uid)
	}
	// A connection that knows its own end alone.
	l := listen(t, "tcp4", "127.0.0.1:0")
	if uid, err := PeerOwner(
		half{Conn: dialPort(t, "127.0.0.1", port(l)), remote: a.RemoteAddr()}); err == nil || uid != 0 {
		t.Errorf("PeerOwner without a peer's address = %d, %v; want an error", uid, err)
	}
}

type half struct {
	net.Conn
	remote net.Addr
}

func (h half) RemoteAddr() net.Addr { return h.remote }

// TestNoSocketToAskBy: without a netlink socket nobody is the owner, least of all root, whose uid
// is 0.
func TestNoSocketToAskBy(t *testing.T) {
	l := listen(t, "tcp4", "127.0.0.1:0")
	c := dialPort(t, "127.0.0.1", port(l))
	addr := netip.MustParseAddrPort(l.Addr().String())
	var before unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
		t.Fatal(err)
	}
	// No file descriptor is left.
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 0, Max: before.Max}); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
			t.Fatal(err)
		}
	}()
	for name, ask := range map[string]func() error{
		"ownerOf":      func() error { _, err := ownerOf(addr); return err },
		"OwnedBy":      func() error { return OwnedBy(addr, 0, uint32(os.Getuid())) },
		"Listeners":    func() error { _, err := Listeners(addr.Port()); return err },
		"UDPListeners": func() error { _, err := UDPListeners(addr.Port()); return err },
		"PeerOwner":    func() error { _, err := PeerOwner(c); return err },
	} {
		if err := ask(); !errors.Is(err, unix.EMFILE) {
			t.Errorf("%s: %v; want %v", name, err, unix.EMFILE)
		}
	}
}

func FuzzUnmarshal(f *testing.F) {
	f.Add([]byte{})
	f.Add(make([]byte, messageLen))
	f.Add(append(make([]byte, messageLen), 5, 0, attrV6Only, 0, 1, 0, 0, 0))
	f.Fuzz(func(t *testing.T, b []byte) { unmarshal(b) })
}

func listen(t *testing.T, network, addr string) net.Listener {
	t.Helper()
	l, err := net.Listen(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func port(l net.Listener) uint16 { return l.Addr().(*net.TCPAddr).AddrPort().Port() }

func dialPort(t *testing.T, host string, p uint16) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", netip.AddrPortFrom(netip.MustParseAddr(host), p).String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func BenchmarkOwner(b *testing.B) {
	l, err := net.Listen("tcp", "[::]:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	addr := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port(l))
	for b.Loop() {
		if _, err := ownerOf(addr); err != nil {
			b.Fatal(err)
		}
	}
}

// TestUDPListeners: who gets a datagram from anybody, as Envoy's DNS listener does; a
// connected socket does not.
func TestUDPListeners(t *testing.T) {
	me := uint32(os.Getuid())
	for _, tt := range []struct {
		listen, ask string
		want        bool
	}{
		{"127.0.0.1:0", "127.0.0.1", true}, {"0.0.0.0:0", "127.0.0.1", true}, {"127.0.0.2:0", "127.0.0.1", false},
		{"[::1]:0", "::1", true}, {"[::]:0", "::1", true},
	} {
		c, err := net.ListenPacket("udp", tt.listen)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		p := c.LocalAddr().(*net.UDPAddr).AddrPort().Port()
		all, err := UDPListeners(p)
		if err != nil {
			t.Fatal(err)
		}
		uids := Accepting(all, netip.MustParseAddr(tt.ask))
		if got := slices.Equal(uids, []uint32{me}); got != tt.want {
			t.Errorf("%s, asked for %s: %v of %+v", tt.listen, tt.ask, uids, all)
		}
		if tcp, err := Listeners(p); err != nil || slices.ContainsFunc(tcp, func(l Listener) bool {
			return l.Addr == c.LocalAddr().(*net.UDPAddr).AddrPort()
		}) {
			t.Errorf("%s is among the TCP listeners: %+v, %v", tt.listen, tcp, err)
		}
		client, err := net.Dial("udp", c.LocalAddr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		if all, err := UDPListeners(client.LocalAddr().(*net.UDPAddr).AddrPort().Port()); err != nil ||
			len(all) > 0 {
			t.Errorf("a connected socket is a listener: %+v, %v", all, err)
		}
	}
}
