package envoyadmin

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

func prefixList(texts ...string) (all []netip.Prefix) {
	for _, text := range texts {
		all = append(all, netip.MustParsePrefix(text))
	}
	return all
}

// said is a choice in a line: the listener, then the chains with their conditions.
func said(c Choice) string {
	if c.Entry == nil {
		return "no listener"
	}
	var all []string
	for _, one := range c.Candidates {
		name := "none"
		if one.Chain != nil {
			name = one.Chain.Name
		}
		if one.Default {
			name += " (default)"
		}
		if len(one.When) > 0 {
			name += " if " + strings.Join(one.When, " and ")
		}
		all = append(all, name)
	}
	return c.Listener.Name + ": " + strings.Join(all, "; ")
}

// What is wanted is after envoy/config/listener/v3/listener_components.proto ("The following order
// applies") and FilterChainManagerImpl::findFilterChain: what the documentation leaves open, that
// there is no way back from the most specific match, is from there.
func TestChoose(t *testing.T) {
	at := netip.MustParseAddrPort("127.0.0.1:15001")
	on := func(chains ...FilterChain) []Listener {
		return []Listener{{Name: "L", Bound: true, OriginalDst: true, Chains: chains,
			Addresses: []netip.AddrPort{netip.MustParseAddrPort("0.0.0.0:15001")}}}
	}
	with := func(all []Listener, change func(*Listener)) []Listener { change(&all[0]); return all }
	chain := func(name string, change func(*FilterChain)) FilterChain {
		c := FilterChain{Name: name}
		change(&c)
		return c
	}
	to := func(port uint16, prefixes ...string) func(*FilterChain) {
		return func(c *FilterChain) { c.Port, c.Prefixes = port, prefixList(prefixes...) }
	}
	names := func(names ...string) func(*FilterChain) {
		return func(c *FilterChain) { c.Rare = &RareMatch{ServerNames: names} }
	}
	transport := func(p string) func(*FilterChain) {
		return func(c *FilterChain) { c.Rare = &RareMatch{TransportProtocol: p} }
	}
	source := func(s SourceMatch) func(*FilterChain) {
		return func(c *FilterChain) { c.Rare, c.OtherConditions = &RareMatch{Source: &s}, true }
	}
	anyChain := func(*FilterChain) {}
	unbound := func(name, addr string) Listener {
		return Listener{Name: name, Addresses: []netip.AddrPort{netip.MustParseAddrPort(addr)},
			Chains: []FilterChain{{Name: name + "'s"}}}
	}
	for _, tt := range []struct {
		name      string
		listeners []Listener
		to, from  string
		want      string
	}{
		{"nothing at the port", nil, "10.0.0.1:80", "", "no listener"},
		{"no chain", on(), "10.0.0.1:80", "", "L: none"},
		{"the longest prefix", on(chain("wide", to(0, "10.0.0.0/8")), chain("long", to(0, "10.0.0.0/24")),
			chain("other", to(0, "10.0.1.0/24"))), "10.0.0.1:80", "", "L: long"},
		{"of two prefixes of one chain", on(chain("a", to(0, "10.0.0.0/24")),
			chain("b", to(0, "10.0.0.0/8", "10.0.0.1/32"))), "10.0.0.1:80", "", "L: b"},
		{"a port before a prefix", on(chain("ip", to(0, "10.0.0.1/32")), chain("port", to(80))),
			"10.0.0.1:80", "", "L: port"},
		{"no way back from a port", on(chain("any", anyChain), chain("elsewhere", to(80, "10.9.0.0/16"))),
			"10.0.0.1:80", "", "L: none"},
		{"a default chain", with(on(chain("elsewhere", to(80, "10.9.0.0/16"))), func(l *Listener) {
			l.DefaultChain = &FilterChain{Name: "D"}
		}), "10.0.0.1:80", "", "L: D (default)"},
		{"no way back from a prefix", on(chain("wide", to(0, "10.0.0.0/8")),
			chain("long", func(c *FilterChain) { to(0, "10.0.0.1/32")(c); names("a.test")(c) })),
			"10.0.0.1:80", "",
			"L: long if TLS to the server name a.test; none if no other server name matches"},
		{"server names", on(chain("a", names("a.test", "b.test")), chain("c", names("*.c.test")),
			chain("rest", anyChain)), "10.0.0.1:443", "",
			"L: a if TLS to the server name a.test, b.test; c if TLS to the server name *.c.test; " +
				"rest if no other server name matches"},
		{"TLS or not", on(chain("tls", transport("tls")), chain("raw", transport("raw_buffer"))),
			"10.0.0.1:443", "",
			"L: tls if the client speaks TLS; raw if the client does not speak TLS"},
		{"TLS or anything", on(chain("tls", transport("tls")), chain("any", anyChain)),
			"10.0.0.1:443", "",
			"L: tls if the client speaks TLS; any if the client does not speak TLS"},
		{"without a TLS inspector all is raw", on(chain("raw", transport("raw_buffer")),
			chain("any", anyChain)), "10.0.0.1:443", "", "L: raw"},
		{"application protocols", on(chain("h2", func(c *FilterChain) {
			c.Rare = &RareMatch{ApplicationProtocols: []string{"h2", "http/1.1"}}
		}), chain("rest", anyChain)), "10.0.0.1:443", "",
			"L: h2 if the application protocol is h2, http/1.1; " +
				"rest if no other application protocol matches"},
		{"a source that is not known", on(chain("near", source(SourceMatch{Prefixes: prefixList("10.0.0.0/8")})),
			chain("rest", anyChain)), "10.0.0.1:80", "",
			"L: near if it comes from 10.0.0.0/8; rest if it comes from elsewhere"},
		{"a source that is", on(chain("near", source(SourceMatch{Prefixes: prefixList("10.0.0.0/8")})),
			chain("rest", anyChain)), "10.0.0.1:80", "10.5.5.5", "L: near"},
		{"another source", on(chain("near", source(SourceMatch{Prefixes: prefixList("10.0.0.0/8")}))),
			"10.0.0.1:80", "192.0.2.1", "L: none"},
		{"the source's own address", on(chain("near", source(SourceMatch{Direct: prefixList("10.0.0.0/8")})),
			chain("nearer", source(SourceMatch{Direct: prefixList("10.5.0.0/16")}))),
			"10.0.0.1:80", "10.5.5.5", "L: nearer"},
		{"from this machine", on(chain("own", source(SourceMatch{Local: true})), chain("any", anyChain)),
			"10.0.0.1:80", "",
			"L: own if it comes from this machine; any if it comes from another machine"},
		{"source ports", on(chain("low", source(SourceMatch{Ports: []uint16{7, 8}})), chain("any", anyChain)),
			"10.0.0.1:80", "", "L: low if its source port is 7, 8; any if it has another source port"},
		{"unbound, without use_original_dst", append(on(), unbound("U", "10.0.0.1:80")),
			"10.0.0.1:80", "", "L: none"},
		{"unbound", append(with(on(), func(l *Listener) { l.HandsOff = true }),
			unbound("W", "0.0.0.0:80"), unbound("U", "10.0.0.1:80")), "10.0.0.1:80", "", "U: U's"},
		{"unbound, of all addresses", append(with(on(), func(l *Listener) { l.HandsOff = true }),
			unbound("W", "0.0.0.0:80"), unbound("U", "10.0.0.1:80")), "10.0.0.2:80", "", "W: W's"},
		{"unbound, another port", append(with(on(chain("passthrough", anyChain)),
			func(l *Listener) { l.HandsOff = true }), unbound("W", "0.0.0.0:80")), "10.0.0.2:81", "",
			"L: passthrough"},
		{"UDP at the port", with(on(), func(l *Listener) { l.UDP = true }), "10.0.0.1:80", "",
			"no listener"},
		{"a listener on the very address", append(on(), Listener{Name: "loopback", Bound: true,
			Addresses: []netip.AddrPort{at}}), "10.0.0.1:80", "", "loopback: none"},
		{"a matcher", with(on(FilterChain{Name: "x", Prefixes: prefixList("10.0.0.0/8"),
			OtherConditions: true}, FilterChain{Name: "y", Prefixes: prefixList("10.0.0.0/8")},
			FilterChain{Name: "z", Prefixes: prefixList("10.1.0.0/16")}),
			func(l *Listener) { l.ByMatcher = true }), "10.0.0.1:80", "",
			"L: x if filter_chain_matcher leads there, by more than the destination; " +
				"y if filter_chain_matcher leads there, by more than the destination"},
	} {
		c := Connection{At: at, To: netip.MustParseAddrPort(tt.to)}
		if tt.from != "" {
			c.From = netip.MustParseAddr(tt.from)
		}
		if got := said(Choose(tt.listeners, c)); got != tt.want {
			t.Errorf("%s: got\n%s\nwant\n%s", tt.name, got, tt.want)
		}
	}
}

// TestChooseManyServerNames: what thousands of names share an address is bounded.
func TestChooseManyServerNames(t *testing.T) {
	l := Listener{Name: "L", Bound: true,
		Addresses: []netip.AddrPort{netip.MustParseAddrPort("0.0.0.0:15001")}}
	for i := range 5000 {
		l.Chains = append(l.Chains, FilterChain{Name: fmt.Sprint(i), Rare: &RareMatch{
			ServerNames: []string{fmt.Sprintf("a%d.test", i), fmt.Sprintf("b%d.test", i)}}})
	}
	c := Choose([]Listener{l}, Connection{At: netip.MustParseAddrPort("127.0.0.1:15001"),
		To: netip.MustParseAddrPort("10.0.0.1:443")})
	if len(c.Candidates) != maxCandidates || c.More != 5001-maxCandidates {
		t.Errorf("%d candidates and %d more", len(c.Candidates), c.More)
	}
}

// TestChooseIsAmongWhatMatches: for a destination alone the chain is one that a plain reading of
// the conditions allows, and it is certain where nothing else is asked for.
func TestChooseIsAmongWhatMatches(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	r := rand.New(rand.NewPCG(seed, 1))
	pick := func(from ...string) string { return from[r.IntN(len(from))] }
	for range 2000 {
		l := Listener{Name: "L", Bound: true,
			Addresses: []netip.AddrPort{netip.MustParseAddrPort("0.0.0.0:15001")}}
		seen := map[string]bool{}
		for i := range 1 + r.IntN(6) {
			c := FilterChain{Name: fmt.Sprint(i), Port: []uint16{0, 80, 81}[r.IntN(3)],
				Prefixes: prefixList(pick("10.0.0.0/8", "10.0.0.0/24", "10.0.0.1/32", "0.0.0.0/0"))}
			if key := fmt.Sprint(c.Port, c.Prefixes); !seen[key] { // Envoy refuses two alike
				seen[key] = true
				l.Chains = append(l.Chains, c)
			}
		}
		to := netip.MustParseAddrPort(pick("10.0.0.1:80", "10.0.0.2:80", "10.9.9.9:81", "192.0.2.1:82"))
		got := Choose([]Listener{l}, Connection{At: netip.MustParseAddrPort("127.0.0.1:15001"), To: to})
		if len(got.Candidates) != 1 || len(got.Candidates[0].When) != 0 {
			t.Fatalf("seed %d: %s: %s", seed, to, said(got))
		}
		ports := slices.ContainsFunc(l.Chains, func(c FilterChain) bool { return c.Port == to.Port() })
		var best *FilterChain
		for i := range l.Chains {
			c := &l.Chains[i]
			if (c.Port == to.Port() || c.Port == 0 && !ports) && c.Prefixes[0].Contains(to.Addr()) &&
				(best == nil || c.Prefixes[0].Bits() > best.Prefixes[0].Bits()) {
				best = c
			}
		}
		if got.Candidates[0].Chain != best {
			t.Fatalf("seed %d: %s among %+v: %s, want %+v", seed, to, l.Chains, said(got), best)
		}
	}
}
