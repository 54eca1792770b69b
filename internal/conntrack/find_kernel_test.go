//go:build kernel

package conntrack

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// TestFind: a connection that a rule redirects, one that goes its own way, and one that conntrack
// has never seen.
func TestFind(t *testing.T) {
	if !inNetns(t) {
		return
	}
	sh(t, "ip link set lo up; ip link add v0 type veth peer name v1; ip link set v0 up; "+
		"ip address add 10.0.0.1/24 dev v0; ip address add 10.0.0.2/32 dev lo; "+
		"ip address add fd00::1/64 dev v0 nodad; ip address add fd00::2/128 dev lo nodad")
	for _, f := range []struct{ name, vip, envoy, iptables string }{
		{"IPv4", "10.0.0.2", "127.0.0.1:15001", "iptables"}, {"IPv6", "fd00::2", "[::1]:15001", "ip6tables"},
	} {
		accept := func(at string) netip.AddrPort {
			l, err := net.Listen("tcp", at)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close() })
			return l.Addr().(*net.TCPAddr).AddrPort()
		}
		dial := func(to netip.AddrPort) (src, dst netip.AddrPort) {
			c, err := net.Dial("tcp", to.String())
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			return c.LocalAddr().(*net.TCPAddr).AddrPort(), to
		}
		service := accept(net.JoinHostPort(f.vip, "0"))
		oldSrc, oldDst := dial(service)
		if e, err := Find(t.Context(), unix.IPPROTO_TCP, oldSrc, oldDst); !errors.Is(err, ErrNoEntry) {
			t.Fatalf("%s: without conntrack: %+v, %v", f.name, e, err)
		}

		envoy := accept(f.envoy)
		sh(t, f.iptables+" -t nat -A OUTPUT -d "+f.vip+" -p tcp --dport 80 -j REDIRECT --to-ports 15001")
		src, dst := dial(netip.AddrPortFrom(netip.MustParseAddr(f.vip), 80))
		e, err := Find(t.Context(), unix.IPPROTO_TCP, src, dst)
		if err != nil || !e.Redirected() || e.Status&statusSeenReply == 0 ||
			e.Src != src || e.Dst != dst || e.ReplySrc.Port() != envoy.Port() ||
			!e.ReplySrc.Addr().IsLoopback() || e.TCPState != 3 {
			t.Errorf("%s: redirected: %+v, %v", f.name, e, err)
		}
		src, dst = dial(service)
		if e, err = Find(t.Context(), unix.IPPROTO_TCP, src, dst); err != nil || e.Redirected() ||
			e.Src != src || e.Dst != dst || e.ReplySrc != dst || e.ReplyDst != src {
			t.Errorf("%s: not redirected: %+v, %v", f.name, e, err)
		}
		if e, err = Find(t.Context(), unix.IPPROTO_TCP, dst, src); err != nil || e.Src != src {
			t.Errorf("%s: from its other end: %+v, %v", f.name, e, err)
		}
		if e, err = Find(t.Context(), unix.IPPROTO_UDP, src, dst); !errors.Is(err, ErrNoEntry) {
			t.Errorf("%s: another protocol: %+v, %v", f.name, e, err)
		}
	}
	ended, cancel := context.WithTimeout(t.Context(), 0)
	defer cancel()
	a := netip.MustParseAddrPort("10.0.0.1:1")
	if _, err := Find(ended, unix.IPPROTO_TCP, a, a); err == nil || errors.Is(err, ErrNoEntry) {
		t.Errorf("with its time over: %v", err)
	}
}
