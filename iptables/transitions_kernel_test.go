//go:build kernel

package iptables

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Whatever happens in whatever order, the next pass makes the kernel equal to what is wanted.
func TestShuffledTransitionsConverge(t *testing.T) {
	steps := 60
	if soak() {
		steps = 2000
	}
	seed := uint64(time.Now().UnixNano())
	if s, err := strconv.ParseUint(os.Getenv("SEED"), 10, 64); err == nil {
		seed = s
	}
	eachBackend(t, func(t *testing.T, k *Kernel, f Family) {
		r := rand.New(rand.NewPCG(seed, uint64(f)))
		w := newWorld(f)
		restoreText(t, k.Backend(), f, foreignSaves(t, f)["docker"])
		want := sample(f).Ruleset()
		apply(t, k, want)
		var trace []string
		for range steps {
			step := ""
			switch r.IntN(6) {
			case 0, 1:
				d := drifts[r.IntN(len(drifts))]
				if d.nftDo != "" && k.Backend() != NFT {
					continue
				}
				d.try(k.Backend(), f)
				step = "drift: " + d.name
			case 2:
				want = w.interception(r).Ruleset()
				step = "another configuration"
			case 3:
				want = sample(f).Ruleset()
				step = "the sample again"
			case 4:
				k = open(t, k.Backend())
				step = "restart"
			case 5:
				want = Ruleset{family: f}
				step = "nothing wanted"
			}
			trace = append(trace, step)
			if r.IntN(3) == 0 {
				continue // two things at once
			}
			have := read(t, k, f)
			result, err := k.Apply(t.Context(), NewPlan(want, have))
			if err != nil || len(result.Drift) > 0 {
				t.Fatalf("seed %d: after %q: %v %v", seed, trace, err, result.Drift)
			}
			if left := Diff(want, read(t, k, f)); len(left) > 0 {
				t.Fatalf("seed %d: after %q: %v", seed, trace, left)
			}
		}
	})
}

// While rulesets change, connections to a service that stays are made without a pause: each must
// be redirected, none refused, none get through to the raw address. Streams that stand keep
// going through every write.
func TestNoGap(t *testing.T) {
	reconciles, streams := 40, 20
	if soak() {
		reconciles, streams = 1000, 200
	}
	eachBackend(t, func(t *testing.T, k *Kernel, f Family) {
		w := newWorld(f)
		everyAddressIsLocal(t, f)
		vip, foreign := w.addresses[0], w.addresses[4]
		listen := func(port int, address string) net.Listener {
			l, err := net.Listen("tcp", net.JoinHostPort(address, strconv.Itoa(port)))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close() })
			return l
		}
		echo := func(l net.Listener, name string) {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					c.Write([]byte(name))
					io.Copy(c, c)
				}()
			}
		}
		any := "0.0.0.0"
		if f == IPv6 {
			any = "::"
		}
		// The raw address answers as well, so that what gets through to it is seen
		// and not merely refused.
		go echo(listen(outboundPort, any), "P")
		go echo(listen(443, any), "R")
		go echo(listen(7001, any), "D") // where the foreign DNAT leads

		i := Interception{Family: f, ProxyUID: proxyUID, ProxyGID: proxyGID, Jumps: true,
			OutboundPort: outboundPort, Settling: true}
		with := func(services ...netip.Prefix) Ruleset {
			i.Services = append([]netip.Prefix{netip.PrefixFrom(vip, vip.BitLen())}, services...)
			return i.Ruleset()
		}
		restoreText(t, k.Backend(), f,
			fmt.Sprintf(
				"*nat\n:THEIRS - [0:0]\n-A OUTPUT -p tcp -j THEIRS\n-A THEIRS -d %s -p tcp -m tcp --dport 443 -j REDIRECT --to-ports 7001\nCOMMIT\n", foreign))

		dial := func(a netip.Addr) (net.Conn, string, error) {
			c, err := net.DialTimeout("tcp", net.JoinHostPort(a.String(), "443"), 5*time.Second)
			if err != nil {
				return nil, "", err
			}
			who := make([]byte, 1)
			c.SetDeadline(time.Now().Add(10 * time.Second))
			_, err = io.ReadFull(c, who)
			return c, string(who), err
		}
		var standing []net.Conn
		stand := func(a netip.Addr, who string) {
			for range streams / 2 {
				c, got, err := dial(a)
				if err != nil || got != who {
					t.Fatalf("a stream to %s: %q %v", a, got, err)
				}
				standing = append(standing, c)
			}
		}
		alive := func(when string) {
			t.Helper()
			for n, c := range standing {
				c.SetDeadline(time.Now().Add(5 * time.Second))
				b := make([]byte, 2)
				if _, err := c.Write([]byte("ok")); err != nil {
					t.Fatalf("%s: stream %d of %d: %v", when, n, len(standing), err)
				}
				if _, err := io.ReadFull(c, b); err != nil {
					t.Fatalf("%s: stream %d of %d: %v", when, n, len(standing), err)
				}
			}
		}
		stand(vip, "R") // older than the interception
		apply(t, k, with())
		alive("after the first install")
		stand(vip, "P")
		i.Settling = false
		apply(t, k, with())
		alive("after settling")

		var made, wrong atomic.Int64
		stop := make(chan struct{})
		var wg sync.WaitGroup
		for n, target := range []struct {
			address netip.Addr
			who     string
		}{{vip, "P"}, {vip, "P"}, {foreign, "D"}} {
			wg.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					c, who, err := dial(target.address)
					if err != nil || who != target.who {
						wrong.Add(1)
						t.Errorf("client %d: connection to %s reached %q: %v", n, target.address, who, err)
						return
					}
					c.(*net.TCPConn).SetLinger(0)
					c.Close()
					made.Add(1)
				}
			})
		}
		r := rand.New(rand.NewPCG(1, uint64(f)))
		for n := range reconciles {
			services := randomPrefixes(f, r.IntN(600), r.Uint64())
			// The foreign address and those around it stay as they are.
			services = slices.DeleteFunc(services, func(p netip.Prefix) bool { return p.Contains(foreign) })
			apply(t, k, with(services...))
			if n%10 == 0 {
				alive("while services change")
			}
		}
		alive("after the changes")
		close(stop)
		wg.Wait()
		if _, err := k.Cleanup(t.Context()); err != nil {
			t.Fatal(err)
		}
		alive("after cleanup") // others' NAT rules keep conntrack on
		t.Logf("%d connections during %d reconciles, %d went wrong; %d streams kept going", made.Load(),
			reconciles, wrong.Load(), len(standing))
		if made.Load() < int64(reconciles) {
			t.Errorf("only %d connections were made", made.Load())
		}
	})
}
