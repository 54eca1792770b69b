//go:build kernel

package conntrack

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// TestEstablishedStreamKeepsItsPath: a stream that was there before the rules of its destination
// still speaks after the half-open connections to it have been deleted, by the very entry that it
// had. Without its entry its next packet would be the first of a redirected connection, to a port
// where nobody listens.
func TestEstablishedStreamKeepsItsPath(t *testing.T) {
	if !inNetns(t) {
		return
	}
	sh(
		t, "ip link set lo up; ip link add v0 type veth peer name v1; ip link set v0 up; ip link set v1 up")
	for _, family := range []struct {
		af                            byte
		ip, iptables, network, prefix string
		server, nobody, own, gateway  string
		nodad                         string
	}{
		{unix.AF_INET, "-4", "iptables", "tcp4", "10.1.2.0/24", "10.1.2.3", "10.1.2.4", "10.0.0.1/24", "10.0.0.2", ""},
		{unix.AF_INET6, "-6", "ip6tables", "tcp6", "fd01::/64", "fd01::3", "fd01::4", "fd00::1/64", "fd00::2", "nodad"},
	} {
		t.Run(family.network, func(t *testing.T) {
			prefix := netip.MustParsePrefix(family.prefix)
			// One server here, and one address to which SYNs go that nobody answers.
			sh(
				t, fmt.Sprintf(
					"ip %[1]s address add %[2]s/%[3]d dev lo %[7]s; ip %[1]s address add %[4]s dev v0 %[7]s; ip %[1]s neigh add %[5]s lladdr 02:00:00:00:00:99 dev v0; ip %[1]s route add %[6]s/%[3]d via %[5]s",
					family.ip, family.server, prefix.Addr().BitLen(), family.own, family.gateway, family.nobody,
					family.nodad))
			// A NAT rule starts conntrack, and the mark shows an entry that was made anew.
			sh(
				t, fmt.Sprintf(
					"%[1]s -t nat -A POSTROUTING -p tcp --dport 1 -j MASQUERADE; %[1]s -t mangle -A OUTPUT -p tcp --syn -j CONNMARK --set-mark 4711", family.iptables))
			l, err := net.Listen(family.network, net.JoinHostPort(family.server, "443"))
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			go func() {
				if c, err := l.Accept(); err == nil {
					io.Copy(c, c)
					c.Close()
				}
			}()
			stream, err := net.Dial(family.network, l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer stream.Close()
			speak := func(word string) error {
				if err := stream.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
					return err
				}
				if _, err := stream.Write([]byte(word)); err != nil {
					return err
				}
				got := make([]byte, len(word))
				if _, err := io.ReadFull(stream, got); err != nil || string(got) != word {
					return fmt.Errorf("read %q, %v; want %q", got, err, word)
				}
				return nil
			}
			if err := speak("before"); err != nil {
				t.Fatal(err)
			}
			before := entryOf(t, family.af, l.Addr())
			if before.state != established || before.mark != 4711 {
				t.Fatalf("before: %+v; want an established connection with its mark", before)
			}

			half, err := unix.Socket(int(family.af), unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(half)
			nobody := netip.MustParseAddr(family.nobody)
			var to unix.Sockaddr = &unix.SockaddrInet6{Port: 443, Addr: nobody.As16()}
			if nobody.Is4() {
				to = &unix.SockaddrInet4{Port: 443, Addr: nobody.As4()}
			}
			if err := unix.Connect(half, to); err != unix.EINPROGRESS {
				t.Fatalf("a connection to nobody: %v", err)
			}
			sh(
				t, fmt.Sprintf(
					"%s -t mangle -F; %[1]s -t nat -I OUTPUT -d %s -p tcp -j REDIRECT --to-ports 15001", family.iptables, prefix))

			if n, err := DeleteHalfOpen(t.Context(), []netip.Prefix{prefix}); n != 1 || err != nil {
				t.Errorf("deleted %d, %v; want the one that is half-open", n, err)
			}
			if err := speak("after"); err != nil {
				t.Errorf("the stream: %v", err)
			}
			if after := entryOf(t, family.af, l.Addr()); after != before {
				t.Errorf("its entry is %+v, was %+v", after, before)
			}
		})
	}
}

// held is what shows that an entry is still the same.
type held struct {
	name  string
	state uint8
	mark  uint32
}

// entryOf is the conntrack entry of the one connection to an address; none is the zero value.
func entryOf(t *testing.T, family byte, to net.Addr) (h held) {
	t.Helper()
	const ctaMark = 8
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	msgs, err := conn.Execute(request(msgGet, family, netlink.Request|netlink.Dump, nil))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range msgs {
		e, name, err := parse(m.Data[nfgenmsgLen:])
		if err != nil {
			t.Fatal(err)
		}
		if e.dst.String() != to.String() {
			continue
		}
		if h.name != "" {
			t.Fatalf("two connections to %v", to)
		}
		h = held{name: fmt.Sprintf("%x", name), state: e.tcpState}
		attributes, err := netlink.UnmarshalAttributes(m.Data[nfgenmsgLen:])
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range attributes {
			if a.Type == ctaMark && len(a.Data) == 4 {
				h.mark = binary.BigEndian.Uint32(a.Data)
			}
		}
	}
	return h
}
