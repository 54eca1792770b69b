//go:build kernel

package iptables

import (
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// theirs are chains as Google's closed agent makes them (a published dump), in a family's words.
func theirs(f Family, uid int) string {
	loopback, metadata, vip := "127.0.0.1/32", "169.254.169.254/32", "10.77.0.1/32"
	if f == IPv6 {
		loopback, metadata, vip = "::1/128", "fd20:ce::254/128", "fd77::1/128"
	}
	return fmt.Sprintf(`*nat
:SERVICE_PROXY_OUTPUT - [0:0]
:SERVICE_PROXY_REDIRECT - [0:0]
:SERVICE_PROXY_SERVICE_CIDRS - [0:0]
:SERVICE_PROXY_SERVICE_PORTS - [0:0]
-A SERVICE_PROXY_OUTPUT -m owner --uid-owner %d -j RETURN
-A SERVICE_PROXY_OUTPUT -m owner --uid-owner 7 -j RETURN
-A SERVICE_PROXY_OUTPUT -d %s -j RETURN
-A SERVICE_PROXY_OUTPUT -d %s -j RETURN
-A SERVICE_PROXY_OUTPUT -j SERVICE_PROXY_SERVICE_CIDRS
-A SERVICE_PROXY_OUTPUT -j SERVICE_PROXY_SERVICE_PORTS
-A SERVICE_PROXY_REDIRECT -p tcp -j REDIRECT --to-ports 15001
-A SERVICE_PROXY_SERVICE_CIDRS -d %s -j SERVICE_PROXY_REDIRECT
COMMIT
`, uid, loopback, metadata, vip)
}

// TestTheirChainsBecomeOurs: Google's chains are let our Envoy out and made ours while connections
// come one after the other, of which none goes another way; and once it is ours nothing differs.
func TestTheirChainsBecomeOurs(t *testing.T) {
	eachBackend(t, func(t *testing.T, k *Kernel, f Family) {
		to, listen, ip, bits := "10.77.0.1", "127.0.0.1:15001", "-4", "/32"
		if f == IPv6 {
			to, listen, ip, bits = "fd77::1", "[::1]:15001", "-6", "/128"
		}
		sh(t, "ip", "link", "set", "lo", "up")
		sh(t, "ip", ip, "route", "add", to, "dev", "lo")
		ln, err := net.Listen("tcp", listen)
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				c.Close()
			}
		}()
		program := command(k.Backend(), f, "")
		restoreText(t, k.Backend(), f, theirs(f, 997))
		sh(t, program, "-w", "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "-j", "SERVICE_PROXY_OUTPUT")
		ours := Interception{Family: f, ProxyUID: 998, ProxyGID: 998, OutboundPort: 15001, Jumps: true,
			Services: prefixes(to + bits)}.Ruleset()

		connect := func() error {
			c, err := net.DialTimeout("tcp", net.JoinHostPort(to, "80"), time.Second)
			if err == nil {
				c.Close()
			}
			return err
		}
		for n := 0; connect() != nil; n++ { // the interface has only just come up
			if n == 10 {
				t.Fatal("nothing is redirected by their chains")
			}
		}
		var made, failed atomic.Int64
		stop := make(chan struct{})
		var all sync.WaitGroup
		for range 4 {
			all.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					err := connect()
					if made.Add(1); err != nil && failed.Add(1) == 1 {
						t.Error(err)
					}
					time.Sleep(time.Millisecond)
				}
			})
		}
		for range 10 {
			changed, err := k.LetOut(t.Context(), 998)
			if err != nil || len(changed) != 1 {
				t.Errorf("let out: %q, %v", changed, err)
			}
			if changed, err := k.LetOut(t.Context(), 998); err != nil || len(changed) > 0 {
				t.Errorf("once more: %q, %v", changed, err)
			}
			have, err := k.Read(t.Context(), f)
			if err != nil {
				t.Fatal(err)
			}
			if out := have.Rules("SERVICE_PROXY_OUTPUT")[0]; !strings.Contains(out, "998") {
				t.Errorf("first is %q", out)
			}
			result, err := k.Apply(t.Context(), NewPlan(ours, have))
			if err != nil || len(result.Left) > 0 || len(Diff(ours, result.Have)) > 0 {
				t.Fatalf("%+v, %v", result, err)
			}
			if changed, err := k.LetOut(t.Context(), 998); err != nil || len(changed) > 0 {
				t.Errorf("ours lets it out: %q, %v", changed, err)
			}
			restoreText(t, k.Backend(), f, theirs(f, 997)) // and back, as its agent does it
		}
		close(stop)
		all.Wait()
		if failed.Load() > 0 || made.Load() < 20 {
			t.Errorf("of %d connections %d went another way", made.Load(), failed.Load())
		}
		t.Logf("%d connections", made.Load())
	})
}
