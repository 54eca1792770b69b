//go:build kernel

package route

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
)

// TestWays: what a Map says is what the kernel said, for addresses at the edges of all its cells
// and at random ones, with policy routing too.
func TestWays(t *testing.T) {
	if !inNetns(t) {
		return
	}
	sh(t, `ip link set lo up; ip link add v0 type veth peer name v1; ip link set v0 up; ip link set v1 up
		ip address add 10.0.0.1/24 dev v0; ip address add 10.0.7.1/24 dev v0
		ip address add fd00::1/64 dev v0 nodad
		ip route add 10.1.0.0/16 via 10.0.0.2; ip route add 10.1.2.0/23 via 10.0.7.2 src 10.0.0.1
		ip route add 10.1.2.0/25 via 10.0.7.2 src 10.0.7.1
		ip -6 route add fd01::/64 via fd00::2; ip -6 route add unreachable fd02::/64
		ip route add local 10.9.0.0/16 dev lo; ip route add unreachable 10.2.0.0/16
		ip route add prohibit 10.3.0.0/16; ip route add blackhole 10.4.0.0/16
		ip route add 10.5.0.0/16 via 10.0.0.2 table 77; ip rule add to 10.5.128.0/17 lookup 77
		ip rule add uidrange 4711-4711 lookup 77; ip rule add to 10.1.2.64/26 prohibit`)
	m, err := Ways(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var addrs []netip.Addr
	for _, cell := range m {
		first, end := cell.Prefix.Addr(), last(cell.Prefix)
		addrs = append(addrs, first, first.Prev(), end, end.Next())
	}
	random := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		addrs = append(addrs, netip.AddrFrom4([4]byte{10, byte(random.IntN(11)), byte(random.IntN(9)),
			byte(random.Int())}), netip.MustParseAddr(fmt.Sprintf("fd%02x::%x", random.IntN(4), random.IntN(9))))
	}
	local, without := 0, 0
	for _, addr := range addrs {
		if !addr.IsValid() || addr.IsUnspecified() || addr.IsMulticast() {
			continue
		}
		want := To(t.Context(), netip.AddrPortFrom(addr, 80))
		got, known := m.To(addr)
		if !known || got.Source != want.Source || got.Local != want.Local ||
			fmt.Sprint(got.Err) != fmt.Sprint(want.Err) {
			t.Errorf("%v: %+v (known: %t), the kernel says %+v", addr, got, known, want)
		}
		if want.Local {
			local++
		}
		if want.Err != nil {
			without++
		}
	}
	if local == 0 || without == 0 {
		t.Errorf("%d local addresses, %d without a way: the test asks for too little", local, without)
	}
	sh(t, "ip rule add ipproto tcp dport 80 lookup 77")
	if _, err := Ways(t.Context()); !errors.Is(err, errPorts) {
		t.Errorf("with a rule for a port: %v, want %v", err, errPorts)
	}
}

// TestWaysWithoutRoutes: a machine that has nothing but loopback.
func TestWaysWithoutRoutes(t *testing.T) {
	if !inNetns(t) {
		return
	}
	m, err := Ways(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	w, known := m.To(netip.MustParseAddr("10.0.0.1"))
	if !known || w.Err == nil {
		t.Errorf("%+v, %t; want no way there", w, known)
	}
}
