//go:build kernel

package iptables

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// TestReadFilter: what Walk says of real tables is what real connections from another network
// namespace meet, redirected ones included; and a table that is not there is not made.
func TestReadFilter(t *testing.T) {
	eachBackend(t, func(t *testing.T, k *Kernel, f Family) {
		filter, err := k.ReadFilter(t.Context(), f)
		if err != nil {
			t.Fatal(err)
		}
		own := map[Family]string{IPv4: "10.77.0.1", IPv6: "fd77::1"}[f]
		dst := func(port uint16) netip.AddrPort {
			return netip.AddrPortFrom(netip.MustParseAddr(own), port)
		}
		p := Packet{Hook: Input, Dst: dst(80), Proto: TCP, DstLocal: true}
		if v := filter.Walk(p); v != (Verdict{Action: Pass}) {
			t.Errorf("without a table: %+v", v)
		}
		if has, err := hasFilter(k.tools[f]); err != nil || has {
			t.Errorf("a table filter after a look: %v, %v", has, err)
		}

		dial := neighbour(t, f, own)
		for _, port := range []string{":8080", ":15006"} {
			l, err := net.Listen("tcp", port)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
		}
		restoreText(t, k.Backend(), f, "*nat\n-A PREROUTING -p tcp -m tcp --dport 9090 -j REDIRECT --to-ports 15006\nCOMMIT\n")
		for _, test := range []struct {
			name, policy string
			rules        []string
			passes       map[uint16]bool
		}{
			{"nothing", "ACCEPT", nil, map[uint16]bool{8080: true, 9090: true}},
			{"a policy", "DROP", nil, map[uint16]bool{8080: false, 9090: false}},
			{"the serving port accepted", "DROP", []string{"-A INPUT -p tcp -m tcp --dport 8080 -j ACCEPT",
				"-A INPUT -p tcp -m tcp --dport 9090 -j ACCEPT"}, map[uint16]bool{8080: true, 9090: false}},
			{"Envoy's port accepted", "DROP", []string{"-A INPUT -p tcp -m tcp --dport 15006 -j ACCEPT"},
				map[uint16]bool{8080: false, 9090: true}},
			{"what is redirected accepted", "DROP",
				[]string{"-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED,DNAT -j ACCEPT"},
				map[uint16]bool{8080: false, 9090: true}},
			{"rejected in a chain", "ACCEPT", []string{":FW - [0:0]", "-A INPUT ! -i lo -j FW",
				"-A FW -p tcp -m multiport --dports 8000:8100 -j REJECT --reject-with tcp-reset"},
				map[uint16]bool{8080: false, 9090: true}},
			{"new ones dropped", "ACCEPT", []string{"-A INPUT -m state --state RELATED,ESTABLISHED -j ACCEPT",
				"-A INPUT -i lo -j ACCEPT", "-A INPUT -m state --state NEW -j DROP"},
				map[uint16]bool{8080: false, 9090: false}},
		} {
			sh(t, command(k.Backend(), f, ""), "-t", "filter", "-F")
			restoreText(t, k.Backend(), f, fmt.Sprintf("*filter\n:INPUT %s [0:0]\n%s\nCOMMIT\n", test.policy,
				strings.Join(test.rules, "\n")))
			filter, err := k.ReadFilter(t.Context(), f)
			if err != nil {
				t.Fatal(err)
			}
			came := dial(test.passes)
			for port, passes := range test.passes {
				p := Packet{Hook: Input, Dst: dst(port), Proto: TCP, DstLocal: true, Syn: true}
				if port == 9090 {
					p.Dst, p.Redirected = dst(15006), true
				}
				want := map[bool]Action{true: Pass, false: Dropped}[passes]
				if v := filter.Walk(p); v.Action != want {
					t.Errorf("%s: port %d: %+v, want %v", test.name, port, v, want)
				}
				if came[port] != passes {
					t.Errorf("%s: port %d: a real connection came through: %v, want %v", test.name, port,
						came[port], passes)
				}
			}
		}
	})
}

// neighbour makes another network namespace beside that of the test, and returns what tries to
// connect from there to ports of this one, and
// says which it reached. One that it is not to reach is waited for shortly.
func neighbour(t *testing.T, f Family, own string) (
	dial func(ports map[uint16]bool) map[uint16]bool,
) {
	t.Helper()
	cmd := exec.Command("sleep", "120")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL,
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	there := fmt.Sprint(cmd.Process.Pid)
	in := slices.Clip([]string{"-t", there, "-n"})
	bits, flags := "/24", []string{}
	if f == IPv6 {
		bits, flags = "/64", []string{"nodad"}
	}
	sh(t, "ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1", "netns", there)
	sh(t, "ip", append([]string{"address", "add", own + bits, "dev", "v0"}, flags...)...)
	sh(t, "ip", "link", "set", "v0", "up")
	sh(t, "nsenter", append(in, append([]string{"ip", "address", "add", strings.TrimSuffix(own, "1") + "2" + bits,
		"dev", "v1"}, flags...)...)...)
	sh(t, "nsenter", append(in, "ip", "link", "set", "v1", "up")...)
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return func(ports map[uint16]bool) map[uint16]bool {
		t.Helper()
		var words []string
		for port, passes := range ports {
			limit := map[bool]time.Duration{true: 10 * time.Second, false: 100 * time.Millisecond}[passes]
			words = append(words, fmt.Sprintf(" %d/%s", port, limit))
		}
		c := exec.Command("nsenter", append(in, program, "-test.run=^TestDialer$", "-test.count=1")...)
		c.Env = append(os.Environ(), "IPTABLES_TEST_DIAL="+own+strings.Join(words, ""))
		out, err := c.CombinedOutput()
		if err != nil {
			t.Fatalf("dial: %v\n%s", err, out)
		}
		came := map[uint16]bool{}
		for port := range ports {
			came[port] = strings.Contains(string(out), fmt.Sprintf("connected to %d.", port))
		}
		return came
	}
}

// TestDialer is a client in another network namespace.
func TestDialer(t *testing.T) {
	to := strings.Fields(os.Getenv("IPTABLES_TEST_DIAL"))
	if len(to) == 0 {
		return
	}
	var all sync.WaitGroup
	for _, word := range to[1:] {
		port, limit, _ := strings.Cut(word, "/")
		d, err := time.ParseDuration(limit)
		if err != nil {
			t.Fatal(err)
		}
		all.Go(func() {
			c, err := net.DialTimeout("tcp", net.JoinHostPort(to[0], port), d)
			var timeout net.Error
			switch {
			case err == nil:
				c.Close()
				fmt.Printf("connected to %s.\n", port)
			case errors.Is(err, syscall.ECONNREFUSED), errors.As(err, &timeout) && timeout.Timeout():
			default:
				t.Error(err)
			}
		})
	}
	all.Wait()
}
