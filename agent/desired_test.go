package agent

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

func prefixes(texts ...string) (p []netip.Prefix) {
	for _, t := range texts {
		p = append(p, netip.MustParsePrefix(t))
	}
	return p
}

func listener(name string, addrs []string, chains ...envoyadmin.FilterChain) envoyadmin.Listener {
	l := envoyadmin.Listener{Name: name, Bound: true, OriginalDst: true, Chains: chains}
	for _, a := range addrs {
		l.Addresses = append(l.Addresses, netip.MustParseAddrPort(a))
	}
	return l
}

func chain(port uint16, texts ...string) envoyadmin.FilterChain {
	return envoyadmin.FilterChain{Port: port, Prefixes: prefixes(texts...)}
}

var (
	both = []string{"0.0.0.0:15001", "[::]:15001"}
	v4   = []string{"0.0.0.0:15001"}
	td   = "TRAFFICDIRECTOR_INTERCEPTION_LISTENER"
	tdIn = "TRAFFICDIRECTOR_INBOUND_INTERCEPTION_LISTENER"
)

func TestDesired(t *testing.T) {
	none := attribute.Default()
	with := func(change func(*attribute.Config)) attribute.Config {
		c := attribute.Default()
		change(&c)
		return c
	}
	inbound := func(l envoyadmin.Listener) envoyadmin.Listener {
		l.Direction = corev3.TrafficDirection_INBOUND
		return l
	}
	istio := func(name, addr string) envoyadmin.Listener {
		l := listener(name, []string{addr})
		l.Bound, l.OriginalDst = false, false
		return l
	}
	dns := envoyadmin.Listener{Name: "dns", Bound: true, UDP: true, DNS: true,
		Addresses: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:15053")}}

	tests := []struct {
		name      string
		config    attribute.Config
		listeners []envoyadmin.Listener
		v4, v6    iptables.Interception // Family and the proxy's ids are added
		refused   []symptom.Refusal
		uncovered []uint16
	}{
		{name: "nothing", config: none},
		{
			name: "Traffic Director, both families", config: none,
			listeners: []envoyadmin.Listener{
				listener(td, both, chain(80, "10.1.0.2/32"), chain(443, "10.1.0.1/32", "fd00:1::1/128"),
					chain(81, "10.1.0.2/32"))},
			v4: iptables.Interception{
				OutboundPort: 15001, Services: prefixes("10.1.0.1/32", "10.1.0.2/32")},
			v6: iptables.Interception{OutboundPort: 15001, Services: prefixes("fd00:1::1/128")},
		},
		{
			name: "IPv6 VIPs wait for a listener with an IPv6 address", config: none,
			listeners: []envoyadmin.Listener{listener(td, v4, chain(80, "10.1.0.2/32", "fd00:1::1/128"))},
			v4:        iptables.Interception{OutboundPort: 15001, Services: prefixes("10.1.0.2/32")},
		},
		{
			name: "[::] with ipv4_compat serves both", config: none,
			listeners: []envoyadmin.Listener{func() envoyadmin.Listener {
				l := listener(td, []string{"[::]:15001"}, chain(80, "10.1.0.2/32"))
				l.Ipv4Compat = true
				return l
			}()},
			v4: iptables.Interception{OutboundPort: 15001, Services: prefixes("10.1.0.2/32")},
			v6: iptables.Interception{OutboundPort: 15001},
		},
		{
			name: "a port without prefix is a port rule, a chain with neither is nothing", config: none,
			listeners: []envoyadmin.Listener{listener(td, v4, chain(8080), chain(0), chain(9000))},
			v4:        iptables.Interception{OutboundPort: 15001, ServicePorts: []uint16{8080, 9000}},
		},
		{
			name:   "the expected port wins, a listener on another address is out of REDIRECT's reach",
			config: none,
			listeners: []envoyadmin.Listener{listener("a", []string{"127.0.0.1:15101"}), listener("b", v4),
				listener("c", []string{"10.0.0.9:15001"}, chain(1, "10.9.9.9/32"))},
			v4: iptables.Interception{OutboundPort: 15001},
			refused: []symptom.Refusal{{Listener: "a", Entry: "127.0.0.1:15101"},
				{Listener: "c", Entry: "10.0.0.9:15001"}},
		},
		{
			name:   "never: own address, loopback, link-local, multicast, too wide, SSH, own ports",
			config: none,
			listeners: []envoyadmin.Listener{
				listener(td, both, chain(80, "10.0.0.5/32"), chain(80, "10.0.0.0/24"), chain(1, "127.0.0.1/32"),
					chain(1, "169.254.169.254/32"),
					chain(1, "224.0.0.1/32"), chain(1, "0.0.0.0/0"), chain(1, "8.0.0.0/7"), chain(1, "::/0"),
					chain(1, "fd20:ce::/32"), chain(1, "0.0.0.0/32"), chain(22), chain(15020),
					chain(80, "10.1.0.1/32"))},
			v4: iptables.Interception{OutboundPort: 15001, Services: prefixes("10.1.0.1/32")},
			v6: iptables.Interception{OutboundPort: 15001},
			refused: []symptom.Refusal{
				{Listener: td, Entry: "10.0.0.5/32"}, {Listener: td, Entry: "10.0.0.0/24"}, {Listener: td, Entry: "127.0.0.1/32"}, {Listener: td, Entry: "169.254.169.254/32"},
				{Listener: td, Entry: "224.0.0.1/32"}, {Listener: td, Entry: "0.0.0.0/0"}, {Listener: td, Entry: "8.0.0.0/7"}, {Listener: td, Entry: "0.0.0.0/32"},
				{Listener: td, Entry: "port 22"}, {Listener: td, Entry: "port 15020"}, {Listener: td, Entry: "::/0"}, {Listener: td, Entry: "fd20:ce::/32"},
			},
		},
		{
			name: "Istio: unbound listeners behind the interception listener", config: none,
			listeners: []envoyadmin.Listener{listener("virtualOutbound", v4, chain(0)),
				istio("10.2.0.1_443", "10.2.0.1:443"), istio("0.0.0.0_80", "0.0.0.0:80")},
			v4: iptables.Interception{OutboundPort: 15001, Services: prefixes("10.2.0.1/32"),
				ServicePorts: []uint16{80}},
		},
		{
			name: "intercept-all with excludes",
			config: with(func(c *attribute.Config) {
				c.InterceptAllOutbound = true
				c.ExcludeOutboundIPRanges = prefixes("8.8.8.8/32", "2001:db8::/32")
				c.ExcludeOutboundPortRanges = []attribute.PortRange{{First: 8000, Last: 9000}}
			}),
			listeners: []envoyadmin.Listener{listener(td, both)},
			v4: iptables.Interception{OutboundPort: 15001, All: true, ExcludePrefixes: prefixes(
				"8.8.8.8/32"), ExcludePorts: []iptables.PortRange{{First: 8000, Last: 9000}}},
			v6: iptables.Interception{OutboundPort: 15001, All: true, ExcludePrefixes: prefixes(
				"2001:db8::/32"), ExcludePorts: []iptables.PortRange{{First: 8000, Last: 9000}}},
		},
		{
			name:   "inbound: only ports that are served and that Envoy has a chain for",
			config: with(func(c *attribute.Config) { c.ServingPorts = []uint16{80, 8080} }),
			listeners: []envoyadmin.Listener{
				inbound(listener(tdIn, []string{"0.0.0.0:15006"}, chain(80, "10.0.0.5/32"), chain(9090)))},
			v4: iptables.Interception{InboundPort: 15006, Serving: []iptables.Serving{
				{Addr: netip.MustParseAddr("10.0.0.5"), Port: 80}}},
			uncovered: []uint16{8080},
		},
		{
			name:   "inbound by name and by port; a default chain takes every serving port",
			config: with(func(c *attribute.Config) { c.ServingPorts = []uint16{80} }),
			listeners: []envoyadmin.Listener{func() envoyadmin.Listener {
				l := listener("x", []string{"0.0.0.0:15006"})
				l.DefaultChain = &envoyadmin.FilterChain{}
				return l
			}()},
			v4: iptables.Interception{InboundPort: 15006, Serving: []iptables.Serving{{Port: 80}}},
		},
		{
			name:   "inbound on loopback is out of PREROUTING's reach",
			config: with(func(c *attribute.Config) { c.ServingPorts = []uint16{80} }),
			listeners: []envoyadmin.Listener{
				inbound(listener(tdIn, []string{"127.0.0.1:15006"}, chain(80)))},
			uncovered: []uint16{80},
		},
		{
			name: "intercept-dns needs a DNS listener", config: with(func(c *attribute.Config) {
				c.InterceptDNS = true
			}),
			listeners: []envoyadmin.Listener{dns},
			v4:        iptables.Interception{DNSPort: 15053},
		},
		{
			name: "DNS by TCP only where Envoy takes it", config: with(func(c *attribute.Config) {
				c.InterceptDNS = true
			}),
			listeners: []envoyadmin.Listener{
				dns, {Name: "dns-tcp", Bound: true, Addresses: []netip.AddrPort{
					netip.MustParseAddrPort("0.0.0.0:15053")}}},
			v4: iptables.Interception{DNSPort: 15053, DNSOverTCP: true},
		},
		{name: "no DNS interception unless asked for", config: none, listeners: []envoyadmin.Listener{dns}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got := Desired(Inputs{
				Config: test.config, Listeners: test.listeners, ProxyUID: 107, ProxyGID: 108,
				Local:    []netip.Addr{netip.MustParseAddr("10.0.0.5")},
				OwnPorts: []uint16{15000, 15001, 15006, 15020},
			})
			test.v4.Family, test.v6.Family = iptables.IPv4, iptables.IPv6
			for _, f := range []*iptables.Interception{&test.v4, &test.v6} {
				f.ProxyUID, f.ProxyGID = 107, 108
			}
			if diff := cmp.Diff([2]iptables.Interception{test.v4, test.v6}, got.Families,
				cmpopts.EquateEmpty(), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
				cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
				t.Errorf("interception (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(test.refused, got.Refused, cmpopts.IgnoreFields(symptom.Refusal{}, "Reason"),
				cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("refused (-want +got):\n%s", diff)
			}
			for _, r := range got.Refused {
				if r.Reason == "" {
					t.Errorf("%v has no reason", r)
				}
			}
			if diff := cmp.Diff(test.uncovered, got.Uncovered, cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("uncovered (-want +got):\n%s", diff)
			}
		})
	}
}

// TestManyRefused: a control plane that asks for 100,000 addresses which are never intercepted does
// not hold up the loop: in a list they took a minute, in a map it is a tenth of a second.
func TestManyRefused(t *testing.T) {
	const n = 100_000
	var chain envoyadmin.FilterChain
	for i := range n {
		chain.Prefixes = append(chain.Prefixes,
			netip.PrefixFrom(netip.AddrFrom4([4]byte{127, byte(i >> 16), byte(i >> 8), byte(i)}), 32))
	}
	began := time.Now()
	want := Desired(Inputs{Listeners: []envoyadmin.Listener{{Name: "outbound", Bound: true,
		OriginalDst: true, Chains: []envoyadmin.FilterChain{chain, chain},
		Addresses: []netip.AddrPort{netip.MustParseAddrPort("0.0.0.0:15001")}}}})
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("%v for %d entries", took, n)
	}
	if len(want.Refused) != n || len(want.Families[0].Services) != 0 {
		t.Errorf("%d refused, %d services", len(want.Refused), len(want.Families[0].Services))
	}
}

// TestServerFirst: the well-known ports at which the server speaks first, behind a chain that waits
// for the client.
func TestServerFirst(t *testing.T) {
	for port, want := range map[uint16]bool{
		21: true, 25: true, 110: true, 143: true, 587: true, 3306: true,
		80: false, 443: false, 22: false,
	} {
		l := listener(td, both, chain(port, "10.1.0.1/32"))
		l.Chains[0].HTTP = true
		w := Desired(Inputs{Config: attribute.Default(), Listeners: []envoyadmin.Listener{l}})
		if got := slices.Contains(w.ServerFirst, port); got != want {
			t.Errorf("port %d: %v", port, got)
		}
	}
}
