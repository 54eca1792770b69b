//go:build kernel

package route

import (
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"syscall"
	"testing"
)

// inNetns runs the calling test in a network namespace of its own, in a copy of the test binary.
func inNetns(t *testing.T) bool {
	t.Helper()
	if os.Getenv("ROUTE_TEST_NETNS") == t.Name() {
		return true
	}
	if os.Geteuid() != 0 {
		t.Fatal("needs root: it makes a network namespace")
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.count=1", "-test.timeout=1m")
	cmd.Env = append(os.Environ(), "ROUTE_TEST_NETNS="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("in its namespace: %v\n%s", err, out)
	}
	return false
}

func sh(t *testing.T, command string) {
	t.Helper()
	if out, err := exec.Command("sh", "-ec", command).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", command, err, out)
	}
}

// TestMissing: each kind of route that lets nothing through, in both families, with the kernel's
// own answer to connect(2) beside it.
func TestMissing(t *testing.T) {
	if !inNetns(t) {
		return
	}
	sh(t, `ip link set lo up; ip link add v0 type veth peer name v1; ip link set v0 up; ip link set v1 up
		ip address add 10.0.0.1/24 dev v0; ip address add fd00::1/64 dev v0 nodad
		ip route add 10.1.0.0/16 via 10.0.0.2; ip -6 route add fd01::/64 via fd00::2
		for type in unreachable prohibit blackhole; do n=$((n+1))
			ip route add $type 10.2.$n.0/24; ip -6 route add $type fd02:0:0:$n::/64
		done`)
	want := map[string]string{
		"10.0.0.7": "", "10.1.2.3": "", "127.0.0.1": "", "10.0.0.1": "", "10.1.0.0": "",
		"10.9.9.9": "network is unreachable", "10.2.1.1": "a route of type unreachable",
		"10.2.2.1": "a route of type prohibit", "10.2.3.1": "a route of type blackhole",
		"fd00::7": "", "fd01::3": "", "::1": "", "fd01::": "",
		"fd09::9": "network is unreachable", "fd02:0:0:1::1": "a route of type unreachable",
		"fd02:0:0:2::1": "a route of type prohibit", "fd02:0:0:3::1": "a route of type blackhole",
	}
	var addrs []netip.Addr
	for a := range want {
		addrs = append(addrs, netip.MustParseAddr(a))
	}
	for range 3 { // more than a batch
		addrs = append(addrs, addrs...)
	}
	got, err := Missing(t.Context(), addrs)
	if err != nil {
		t.Fatal(err)
	}
	var expected []Failure
	for _, a := range addrs {
		if why := want[a.String()]; why != "" {
			expected = append(expected, Failure{a, why})
		}
	}
	if !slices.Equal(got, expected) {
		t.Errorf("%v\nwant %v", got, expected)
	}
	for a, why := range want {
		c, err := net.Dial("udp", net.JoinHostPort(a, "9")) // which sends nothing
		if err == nil {
			c.Close()
		}
		if (err == nil) != (why == "") {
			t.Errorf("%s: connect: %v, and here: %q", a, err, why)
		}
	}
	sh(t, "ip route add default via 10.0.0.2; ip -6 route add default via fd00::2")
	got, err = Missing(t.Context(), []netip.Addr{netip.MustParseAddr("10.9.9.9"), netip.MustParseAddr("fd09::9")})
	if err != nil || len(got) != 0 {
		t.Errorf("with a default route: %v, %v", got, err)
	}
}
