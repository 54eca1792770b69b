//go:build kernel

package conntrack

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// inNetns runs the calling test in a network namespace of its own, in a copy of the test
// binary. It needs root.
func inNetns(t *testing.T) bool {
	t.Helper()
	if os.Getenv("CONNTRACK_TEST_NETNS") == t.Name() {
		return true
	}
	if os.Geteuid() != 0 {
		t.Fatal("needs root: it makes a network namespace")
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.count=1",
		"-test.timeout=1m")
	cmd.Env = append(os.Environ(), "CONNTRACK_TEST_NETNS="+t.Name())
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

// A SYN that is on its way when the redirect comes stays on the old path, for minutes, until its
// entry is deleted: then its retransmit connects.
func TestHalfOpenConnectionTakesTheNewPath(t *testing.T) {
	if !inNetns(t) {
		return
	}
	for _, family := range []struct{ ip, vip, iptables, listen string }{
		{"-4", "10.1.2.3", "iptables", "0.0.0.0:15001"},
		{"-6", "fd01::3", "ip6tables", "[::]:15001"},
	} {
		address := "10.0.0.1/24"
		nodad := ""
		if family.ip == "-6" {
			address, nodad = "fd00::1/64", "nodad"
		}
		sh(
			t, "ip link set lo up; ip link show v0 >/dev/null 2>&1 || ip link add v0 type veth peer name v1; ip link set v0 up; ip link set v1 up")
		sh(t, fmt.Sprintf("ip %s address add %s dev v0 %s", family.ip, address, nodad))
		gateway := strings.Replace(strings.SplitN(address, "/", 2)[0], "1", "2", 1)
		if family.ip == "-4" {
			gateway = "10.0.0.2"
		}
		// A gateway that is never there but needs no look-up: the SYN goes nowhere.
		sh(
			t, fmt.Sprintf(
				"ip %s neigh add %s lladdr 02:00:00:00:00:99 dev v0; ip %s route add default via %s", family.ip, gateway, family.ip, gateway))
		// The first NAT rule starts conntrack.
		sh(t, family.iptables+" -t nat -A POSTROUTING -p tcp --dport 1 -j MASQUERADE")

		listener, err := net.Listen("tcp", family.listen)
		if err != nil {
			t.Fatal(err)
		}
		result := make(chan error, 1)
		go func() {
			conn, err := net.DialTimeout("tcp", net.JoinHostPort(family.vip, "443"), 10*time.Second)
			if err == nil {
				conn.Close()
			}
			result <- err
		}()
		time.Sleep(200 * time.Millisecond)
		sh(t, fmt.Sprintf("%s -t nat -I OUTPUT -d %s -p tcp -j REDIRECT --to-ports 15001",
			family.iptables, family.vip))
		select {
		case err := <-result:
			t.Fatalf("%s: connected before its entry was deleted: %v", family.vip, err)
		case <-time.After(1500 * time.Millisecond): // a retransmit has come by
		}

		other := netip.MustParsePrefix("192.0.2.0/24")
		if n, err := DeleteHalfOpen(t.Context(), []netip.Prefix{other}); n != 0 || err != nil {
			t.Fatalf("other prefixes: deleted %d, %v", n, err)
		}
		vip := netip.MustParseAddr(family.vip)
		n, err := DeleteHalfOpen(t.Context(), []netip.Prefix{other, netip.PrefixFrom(vip, vip.BitLen())})
		if n != 1 || err != nil {
			t.Fatalf("deleted %d, %v; want the one entry", n, err)
		}
		if err := <-result; err != nil {
			t.Errorf("%s: %v", family.vip, err)
		}
		listener.Close()
	}
}

func TestUDPFromAFixedPortTakesTheNewPath(t *testing.T) {
	if !inNetns(t) {
		return
	}
	sh(t, "ip link set lo up; iptables -t nat -A POSTROUTING -p tcp --dport 1 -j MASQUERADE")
	envoy, err := net.ListenPacket("udp4", "0.0.0.0:15053")
	if err != nil {
		t.Fatal(err)
	}
	resolver, err := net.ListenPacket("udp4", "127.0.0.53:53")
	if err != nil {
		t.Fatal(err)
	}
	client, err := net.DialUDP(
		"udp4", nil, net.UDPAddrFromAddrPort(netip.MustParseAddrPort("127.0.0.53:53")))
	if err != nil {
		t.Fatal(err)
	}
	got := func(c net.PacketConn) bool {
		client.Write([]byte("q"))
		c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		_, _, err := c.ReadFrom(make([]byte, 8))
		return err == nil
	}
	if !got(resolver) {
		t.Fatal("the resolver was not asked")
	}
	sh(t, "iptables -t nat -I OUTPUT -p udp --dport 53 -j REDIRECT --to-ports 15053")
	if !got(resolver) {
		t.Fatal("the old path did not last: the test shows nothing")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if n, err := DeleteUDP(ctx, 53); n != 1 || err != nil {
		t.Fatalf("deleted %d, %v", n, err)
	}
	// An answer that was on its way makes an entry of its own, in which the next
	// question is the reply.
	if _, err := resolver.WriteTo([]byte("a"), client.LocalAddr()); err != nil {
		t.Fatal(err)
	}
	if !got(resolver) {
		t.Fatal("the late answer did not bring the old path back: the test shows nothing")
	}
	if n, err := DeleteLateUDP(ctx, 53); n != 1 || err != nil {
		t.Fatalf("after a late answer: deleted %d, %v", n, err)
	}
	if !got(envoy) {
		t.Error("after its entry was deleted, the question still went the old way")
	}
	if n, err := DeleteLateUDP(ctx, 53); n != 0 || err != nil {
		t.Fatalf("of questions that go the new way: deleted %d, %v", n, err)
	}
}
