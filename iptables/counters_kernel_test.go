//go:build kernel

package iptables

import (
	"errors"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
)

// TestCountersOfTheKernel sends connections through the rules and finds them counted, rule by rule.
func TestCountersOfTheKernel(t *testing.T) {
	eachBackend(t, func(t *testing.T, k *Kernel, f Family) {
		w := newWorld(f)
		service := w.addresses[0]
		bits := service.BitLen()
		i := Interception{Family: f, ProxyUID: proxyUID, ProxyGID: proxyGID, Jumps: true,
			OutboundPort: outboundPort}
		prefix, err := service.Prefix(bits)
		if err != nil {
			t.Fatal(err)
		}
		i.Services = append(i.Services, prefix)
		apply(t, k, i.Ruleset())
		// Somebody else's rule, of the kind whose text iptables lists in two forms.
		sh(t, k.tools[f].list, "-w", "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "-m", "comment",
			"--comment", `a "quoted" -c 1 2 text`)

		catch := newCatcher(t, w, Output)
		defer catch.close()
		p := Packet{Hook: Output, Proto: TCP, UID: 1000, GID: 1000, Syn: true,
			Dst: netip.AddrPortFrom(service, 80)}
		for range 3 {
			if action, port := catch.send(p); action != Redirect || port != outboundPort {
				t.Fatalf("the kernel did %v %d", action, port)
			}
		}
		steps, verdict := read(t, k, f).Trace(p)
		if verdict.Action != Redirect {
			t.Fatalf("%+v", verdict)
		}
		counters, err := k.Counters(t.Context(), f, steps)
		if err != nil {
			t.Fatal(err)
		}
		for n, s := range steps {
			if c := counters[n]; !c.Known || c.Packets != 3 || c.Bytes == 0 {
				t.Errorf("step %+v: %+v, want 3 packets", s, c)
			}
		}
		have := read(t, k, f)
		all, err := k.ReadCounters(t.Context(), have)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := all.Of(steps); err != nil || !slices.Equal(again, counters) {
			t.Errorf("by a save %+v, %v; by the chains %+v", again, err, counters)
		}
		if _, n, ok := serviceCounts(t, k, f).Of(prefix); !ok || n != 3 {
			t.Errorf("the service has %d connections, %v", n, ok)
		}
		p.UID = proxyUID
		steps, _ = have.Trace(p)
		if counters, err = k.Counters(t.Context(), f, steps); err != nil {
			t.Fatal(err)
		}
		for n, s := range steps {
			known := counters[n].Known
			if known != (s.Index > 0) || s.Did == Returned && counters[n].Packets != 0 {
				t.Errorf("step %+v: %+v", s, counters[n])
			}
		}
		if !slices.ContainsFunc(steps, func(s Step) bool { return strings.Contains(s.Rule, "quoted") }) {
			t.Errorf("the rule with a comment is not on the way: %+v", steps)
		}

		// Past 256 services the row is in a bucket, where it counts anew.
		few := i.Services
		for n := range 300 {
			next := w.addresses[0].AsSlice()
			next[len(next)-2], next[len(next)-1] = byte(100+n>>7), byte(2*n)
			other, _ := netip.AddrFromSlice(next)
			i.Services = append(i.Services, netip.PrefixFrom(other, bits))
		}
		apply(t, k, i.Ruleset())
		p.UID = 1000
		if action, _ := catch.send(p); action != Redirect {
			t.Fatalf("past 256 services the kernel did %v", action)
		}
		if _, n, ok := serviceCounts(t, k, f).Of(prefix); !ok || n != 1 {
			t.Errorf("past 256 services it has %d connections, %v", n, ok)
		}
		i.Services = few
		apply(t, k, i.Ruleset())

		// Somebody changes a chain in between.
		sh(t, k.tools[f].list, "-w", "-t", "nat", "-I", chainServiceCIDRs, "-p", "tcp", "-j", "RETURN")
		p.UID = 1000
		if counters, err = k.Counters(t.Context(), f, steps[:2]); err != nil || !counters[1].Known {
			t.Errorf("a chain that was not changed: %+v, %v", counters, err)
		}
		way := []Step{{Chain: chainServiceCIDRs, Index: 1, Rule: destination(prefix) + "-j " +
			chainRedirect}, {Chain: chainRedirect, Index: 1,
			Rule: "-p tcp -j REDIRECT --to-ports 15001"}}
		if all, err = k.ReadCounters(t.Context(), have); err != nil || !all[chainRedirect][0].Known ||
			all[chainServiceCIDRs][0].Known {
			t.Errorf("by a save after a change: %+v, %v", all, err)
		}
		counters, err = k.Counters(t.Context(), f, way)
		if !errors.Is(err, errChanged) || counters[0].Known || !counters[1].Known {
			t.Errorf("a chain that was changed: %+v, %v", counters, err)
		}
	})
}

func serviceCounts(t *testing.T, k *Kernel, f Family) Counts {
	t.Helper()
	counts, err := k.ServiceCounts(t.Context(), f)
	if err != nil {
		t.Fatal(err)
	}
	return counts
}

// TestCountersMakeNoTable: whoever only asks leaves no legacy table behind.
func TestCountersMakeNoTable(t *testing.T) {
	if !inNetns(t) {
		return
	}
	k, err := Open(t.Context(), Options{Backend: NFT})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		legacy, err := k.find(t.Context(), Legacy, f)
		if err != nil {
			t.Fatal(err)
		}
		k.tools[f] = legacy
		steps := []Step{{Chain: "OUTPUT", Index: 1, Rule: jumpOutput}}
		if all, err := k.ReadCounters(t.Context(), Table{family: f}); err != nil || len(all) > 0 {
			t.Errorf("%v: %+v, %v", f, all, err)
		}
		if counters, _ := k.Counters(t.Context(), f, steps); counters[0].Known {
			t.Errorf("%v: %+v", f, counters)
		}
		if counts := serviceCounts(t, k, f); len(counts.Prefixes) > 0 {
			t.Errorf("%v: %+v", f, counts)
		}
		if exists, err := hasLegacyTable(f, "nat", os.ReadFile); exists || err != nil {
			t.Errorf("%v: there is a legacy table now (%v)", f, err)
		}
	}
}
