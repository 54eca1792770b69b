//go:build kernel

package agent

import (
	"context"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// TestLookAroundThisMachine: in a network namespace of its own, with real rules of both backends,
// each symptom is seen where it was put, and none where it was not.
func TestLookAroundThisMachine(t *testing.T) {
	for _, backend := range []string{iptables.NFT, iptables.Legacy} {
		t.Run(backend, func(t *testing.T) {
			if os.Getenv("AGENT_TEST_NETNS") == t.Name() {
				lookAroundThisMachine(t, backend)
				return
			}
			if os.Getenv("AGENT_TEST_NETNS") != "" {
				return // this process is for the other one
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			cmd := exec.CommandContext(ctx, "/proc/self/exe", "-test.count=1",
				"-test.run=^TestLookAroundThisMachine$/^"+backend+"$")
			cmd.Env = append(os.Environ(), "AGENT_TEST_NETNS="+t.Name())
			cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("in its namespace (it needs root): %v\n%s", err, out)
			}
		})
	}
}

func lookAroundThisMachine(t *testing.T, backend string) {
	sh := func(command string) {
		t.Helper()
		if out, err := exec.Command("sh", "-ec", command).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", command, err, out)
		}
	}
	sh(`ip link set lo up; ip link add v0 type veth peer name v1; ip link set v0 up; ip link set v1 up
		ip address add 10.0.0.9/24 dev v0; ip address add fd00::9/64 dev v0 nodad
		ip address add 10.1.2.3/32 dev lo`)
	listen := func(at string) net.Listener {
		t.Helper()
		l, err := net.Listen("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		return l
	}
	service := netip.MustParseAddrPort(listen("10.1.2.3:0").Addr().String())
	listen(":8080")
	listen("127.0.0.1:15001")
	connect := func() netip.AddrPort {
		t.Helper()
		c, err := net.Dial("tcp", service.String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return netip.MustParseAddrPort(c.LocalAddr().String())
	}
	old := connect()

	k, err := iptables.Open(t.Context(), iptables.Options{Backend: backend})
	if err != nil {
		t.Fatal(err)
	}
	a := mesh()
	a.families[0].Services = []netip.Prefix{netip.MustParsePrefix("10.1.2.3/32")}
	a.families[1].Services = []netip.Prefix{netip.MustParsePrefix("fd00::3/128"), netip.MustParsePrefix("fd01::3/128")}
	a.local = []netip.Addr{netip.MustParseAddr("10.0.0.9"), netip.MustParseAddr("fd00::9")}
	look := func() symptom.Surroundings {
		t.Helper()
		got, failed := lookAround(t.Context(), askKernel(k, nil), a)
		if len(failed) > 0 {
			t.Fatalf("could not look: %v", failed)
		}
		return got
	}
	before := look()
	if len(before.Dropped) > 0 || !slices.Equal(before.Silent, []uint16{9090}) ||
		len(before.NoRoute) != 1 || before.NoRoute[0].Count != 1 || before.NoRoute[0].Of != 2 ||
		before.NoRoute[0].Addrs[0] != netip.MustParseAddr("fd01::3") {
		t.Errorf("before: %+v", before)
	}

	iptablesOf := "iptables-" + backend
	sh(iptablesOf + " -t nat -A OUTPUT -d 10.1.2.3/32 -p tcp -j REDIRECT --to-ports 15001")
	connect() // which is redirected
	sh(strings.ReplaceAll(`IT -A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT; IT -A INPUT -i lo -j ACCEPT
		IT -A INPUT -p tcp --dport 15006 -m comment --comment "no \"mesh\" here" -j REJECT`, "IT", iptablesOf))
	after := look()
	want := []symptom.OldConnection{{From: old, To: service, UID: uint32(os.Getuid())}}
	if !slices.Equal(after.Old, want) || after.OldCount != 1 {
		t.Errorf("old connections: %+v, want %+v", after.Old, want)
	}
	if len(after.Dropped) != 2 || after.Dropped[0].Port != 8080 || after.Dropped[0].At != 15006 ||
		!strings.Contains(after.Dropped[0].Rule, "mesh") {
		t.Errorf("dropped: %+v", after.Dropped)
	}
	if after.Conntrack.Count < 1 || after.Conntrack.Max < after.Conntrack.Count {
		t.Errorf("conntrack: %+v", after.Conntrack)
	}
	sh(iptablesOf + " -I INPUT -p tcp --dport 15006 -j ACCEPT; ip -6 route add default dev v0")
	listen(":9090")
	if end := look(); len(end.Dropped)+len(end.Silent)+len(end.NoRoute) > 0 {
		t.Errorf("cleared: %+v", end)
	}
}
