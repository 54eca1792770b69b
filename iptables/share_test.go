package iptables

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/service-proxy-agent/service-proxy-agent/iptables/iptablestest"
)

// TestShare: whatever became of a table, it holds the same rules after as before, and what it has
// in common with the ruleset only once.
func TestShare(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	random := rand.New(rand.NewPCG(seed, 0))
	t.Logf("seed %d", seed)
	want := thousands(2_000).Ruleset()
	lines := strings.Split(strings.TrimSuffix(want.String(), "\n"), "\n")
	for range 50 {
		edited := slices.Clone(lines)
		for range random.IntN(4) { // within the rules: before COMMIT
			i := 1 + random.IntN(len(edited)-2)
			switch random.IntN(3) {
			case 0:
				edited = slices.Delete(edited, i, i+1)
			case 1:
				edited = slices.Insert(edited, i, "-A OUTPUT -p tcp -j DOCKER")
			case 2:
				edited[i] += "0"
			}
		}
		save := []byte(strings.Join(edited, "\n"))
		before, err := Parse(IPv4, save)
		if err != nil {
			t.Fatal(err)
		}
		after, _ := Parse(IPv4, save)
		after = after.share(want)
		if len(before.chains) != len(after.chains) {
			t.Fatalf("%d chains of %d", len(after.chains), len(before.chains))
		}
		for name, rules := range before.chains {
			if !slices.Equal(rules, after.chains[name]) {
				t.Fatalf("%s is another", name)
			}
			shared := len(rules) > 0 && slices.Equal(rules, want.Rules(name))
			ours, _ := want.chain(name)
			if shared && unsafe.SliceData(ours) != unsafe.SliceData(after.chains[name]) {
				t.Fatalf("%s is held twice", name)
			}
		}
		if !slices.Equal(Diff(want, before), Diff(want, after)) {
			t.Error("another difference")
		}
	}
}

// TestShareFreesTheSave: nothing of the text that a table was made of is held any longer, be it by
// a rule of another program.
func TestShareFreesTheSave(t *testing.T) {
	want := thousands(20_000).Ruleset()
	save := []byte(strings.Replace(want.String(), "*nat\n",
		"*nat\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -j DOCKER\n", 1))
	before := heapInUse()
	table, err := Parse(IPv4, save)
	if err != nil {
		t.Fatal(err)
	}
	parsed := heapInUse() - before
	table = table.share(want)
	left := heapInUse() - before
	t.Logf("a save of %d bytes: %d in use, then %d", len(save), parsed, left)
	if left > parsed/8 {
		t.Errorf("%d of %d bytes are still in use", left, parsed)
	}
	runtime.KeepAlive(table)
	runtime.KeepAlive(want)
	runtime.KeepAlive(save)
}

// TestShareOfAKernel: another goroutine may read the table that was shared, and what the Kernel
// keeps of its reads is the shared one from then on, on both backends.
func TestShareOfAKernel(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	random := rand.New(rand.NewPCG(seed, 0))
	t.Logf("seed %d", seed)
	eachInMemory(t, func(t *testing.T, m *iptablestest.Machine, f Family) {
		k := openInMemory(t, m)
		i := thousands(300)
		i.Family = f
		if f == IPv6 {
			i.Services = []netip.Prefix{netip.MustParsePrefix("fd20::1/128")}
		}
		want := i.Ruleset()
		empty, err := k.Read(t.Context(), f)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := k.Apply(t.Context(), NewPlan(want, empty)); err != nil {
			t.Fatal(err)
		}
		have, err := k.Read(t.Context(), f)
		if err != nil {
			t.Fatal(err)
		}
		var others sync.WaitGroup
		for range 4 {
			pause := time.Duration(random.IntN(200)) * time.Microsecond
			others.Go(func() {
				time.Sleep(pause)
				for range 20 {
					if d := Diff(want, have); len(d) > 0 {
						t.Errorf("%v", d)
					}
				}
			})
		}
		shared := k.Share(have, want)
		others.Wait()
		again, err := k.Read(t.Context(), f)
		if err != nil {
			t.Fatal(err)
		}
		for _, is := range []Table{shared, again} {
			ours, _ := want.chain(chainServiceCIDRs)
			if unsafe.SliceData(is.chains[chainServiceCIDRs]) != unsafe.SliceData(ours) {
				t.Error("the rules are held twice")
			}
		}
	})
}

func heapInUse() int {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc)
}

// thousands is an interception of n services none of which is next to another.
func thousands(n int) Interception {
	i := Interception{Family: IPv4, ProxyUID: 1, ProxyGID: 1, OutboundPort: 15001, Jumps: true}
	for k := range n {
		at := netip.MustParseAddr(fmt.Sprintf("10.%d.%d.%d", 32+2*k>>16, byte(2*k>>8), byte(2*k)))
		i.Services = append(i.Services, netip.PrefixFrom(at, 32))
	}
	return i
}
