//go:build kernel

package reconcile

import (
	"context"
	"net"
	"os/exec"
	"runtime"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/internal/conntrack"
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
	// a NAT rule starts conntrack
	run("ip link set lo up; iptables -t nat -A POSTROUTING -p tcp --dport 1 -j MASQUERADE")
	resolver, envoy := listen("127.0.0.53:53"), listen("0.0.0.0:15053")
	client, err := net.Dial("udp4", "127.0.0.53:53")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { client.Close() }()
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
	want := iptables.Interception{Family: iptables.IPv4, ProxyUID: 107, ProxyGID: 107,
		OutboundPort: 15001, DNSPort: 15053, Jumps: true}
	flows := Flows{HalfOpen: conntrack.DeleteHalfOpen, UDP: conntrack.DeleteUDP,
		LateUDP: conntrack.DeleteLateUDP}
	f := New(iptables.IPv4, noKernel{}, flows, zap.NewNop())
	// so that a pass does nothing with the rules
	f.usability.when, f.retry.at = now, now.Add(time.Hour)
	f.gates.dns = gate{open: true}
	order := Order{Want: want, Serial: 1, Known: true, UserKnown: true}
	late, cancel := context.WithDeadline(t.Context(), now.Add(-time.Second))
	defer cancel()
	f.paths.changed(late, now, redirected{dns: 15053})
	if err := asks(resolver); err != nil {
		t.Fatal("the old path did not last, so the test shows nothing: ", err)
	}
	f.Pass(late, now.Add(time.Second), order)
	if err := asks(resolver); err != nil {
		t.Fatal("the old path did not last, so the test shows nothing: ", err)
	}
	f.Pass(t.Context(), now.Add(answersLate), order)
	if err := asks(envoy); err != nil {
		t.Error("the question still goes the old way: ", err)
	}
	if f.paths.questions || len(f.paths.late) > 0 {
		t.Errorf("done, and to be done again: %v, %v", f.paths.questions, f.paths.late)
	}

	// Somebody takes the jump out, and a question comes meanwhile.
	const dnsJump = " OUTPUT -p udp --dport 53 -j REDIRECT --to-ports 15053"
	run("iptables -t nat -D" + dnsJump)
	client.Close()
	if client, err = net.Dial("udp4", "127.0.0.53:53"); err != nil {
		t.Fatal(err)
	}
	first := asks(resolver)
	run("iptables -t nat -I" + dnsJump)
	if err := asks(resolver); first != nil || err != nil {
		t.Fatal("the old path did not last, so the test shows nothing: ", first, err)
	}
	f.paths.undone([]iptables.Drift{{Kind: iptables.TableFlushed, Chain: "nat"}})
	f.paths.changed(t.Context(), now, redirected{dns: 15053})
	if err := asks(envoy); err != nil {
		t.Error("after a repair the question still goes the old way: ", err)
	}
}

// noKernel has no table and may only be asked whether it is watched.
type noKernel struct{ Kernel }

func (noKernel) Watched(iptables.Family) (bool, error) { return true, nil }
