//go:build kernel

package agent

import (
	"context"
	"net"
	"os/exec"
	"runtime"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// TestQuestionsForgottenLater: where there was no time to delete the entries of DNS questions when
// their path changed, a later pass does it. Else a resolver that always asks from one port keeps
// the old path as long as it asks.
func TestQuestionsForgottenLater(t *testing.T) {
	runtime.LockOSThread() // and never unlocked: the thread ends with its namespace
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal("needs root: it makes a network namespace: ", err)
	}
	run := func(command string) {
		t.Helper()
		if out, err := exec.Command("sh", "-ec", command).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", command, err, out)
		}
	}
	listen := func(addr string) net.PacketConn {
		t.Helper()
		c, err := net.ListenPacket("udp4", addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	run("ip link set lo up; iptables -t nat -A POSTROUTING -p tcp --dport 1 -j MASQUERADE") // a NAT rule starts conntrack
	resolver, envoy := listen("127.0.0.53:53"), listen("0.0.0.0:15053")
	client, err := net.Dial("udp4", "127.0.0.53:53")
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	asks := func(c net.PacketConn) error {
		if _, err := client.Write([]byte("q")); err != nil {
			return err
		}
		c.SetReadDeadline(time.Now().Add(time.Second))
		_, _, err := c.ReadFrom(make([]byte, 8))
		return err
	}
	if err := asks(resolver); err != nil {
		t.Fatal(err)
	}
	run("iptables -t nat -I OUTPUT -p udp --dport 53 -j REDIRECT --to-ports 15053")

	now := time.Now()
	want := iptables.Interception{Family: iptables.IPv4, ProxyUID: 107, ProxyGID: 107, OutboundPort: 15001, DNSPort: 15053, Jumps: true}
	s := &familyState{
		family: iptables.IPv4, dns: gate{open: true}, dnsPort: 15053, key: compiledKey{jumps: true, dns: true}, target: want.Ruleset(),
		applied: now, probed: now, retryAt: now.Add(time.Hour), // so that a pass does nothing with the rules
	}
	a := &Agent{log: zap.NewNop()}
	late, cancel := context.WithDeadline(t.Context(), now.Add(-time.Second))
	defer cancel()
	a.forgetOldPaths(late, s)
	if err := asks(resolver); err != nil {
		t.Fatal("the old path did not last, so the test shows nothing: ", err)
	}
	a.reconcile(late, now.Add(time.Second), s, want, true)
	if err := asks(resolver); err != nil {
		t.Fatal("the old path did not last, so the test shows nothing: ", err)
	}
	a.reconcile(t.Context(), now.Add(answersLate), s, want, true)
	if err := asks(envoy); err != nil {
		t.Error("the question still goes the old way: ", err)
	}
	if s.questions || len(s.forgetDNS) > 0 {
		t.Errorf("done, and to be done again: %v, %v", s.questions, s.forgetDNS)
	}
}
