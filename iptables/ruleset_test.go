package iptables

import (
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the goldens anew")

func prefixes(s ...string) []netip.Prefix {
	var p []netip.Prefix
	for _, x := range s {
		p = append(p, netip.MustParsePrefix(x))
	}
	return p
}

// interceptions are the configurations whose rulesets stand as goldens in testdata.
// TestGoldensAreReadBack installs them.
func interceptions() map[string]Interception {
	base := Interception{ProxyUID: 999, ProxyGID: 998, Jumps: true}
	outbound := base
	outbound.OutboundPort = 15001
	outbound.Services = prefixes("10.1.2.3/32", "10.1.2.3/32", "10.1.2.0/24", "10.7.7.7/16",
		"fd00::7/128", "fd00:7::/64")
	outbound.ServicePorts = []uint16{8080, 81, 8080}
	outbound.ExcludePrefixes = prefixes("8.8.8.8/32", "129.168.10.0/24", "2001:db8::/32")
	outbound.ExcludePorts = []PortRange{{81, 81}, {8090, 8080}}

	held := outbound
	held.Jumps = false

	settling := outbound
	settling.Settling = true
	settling.InboundPort, settling.Serving = 15006, []Serving{{Port: 80}}

	inbound := base
	inbound.InboundPort = 15006
	inbound.Serving = []Serving{
		{Port: 8443}, {Addr: netip.MustParseAddr("10.128.0.9"), Port: 80}, {Addr: netip.MustParseAddr("fd20::9"), Port: 80}, {Port: 8443},
	}

	dns := outbound
	dns.DNSPort, dns.DNSOverTCP, dns.ResolverUIDs = 15053, true, []uint32{105, 101, 105}

	dnsOnly := base
	dnsOnly.DNSPort = 15053

	all := base
	all.OutboundPort, all.All = 15001, true
	all.Services = prefixes("10.1.2.3/32", "fd00::1/128")
	all.ExcludePrefixes = prefixes("8.8.8.8/32", "2001:db8::1/128")
	all.ExcludePorts = []PortRange{{0, 65535}, {22, 22}}

	containers := outbound
	containers.Interfaces = []string{"docker0", "br-+", "docker0"}
	containers.InboundPort, containers.Serving = 15006, []Serving{{Port: 80}}

	allContainers := all
	allContainers.ExcludePorts = nil
	allContainers.Interfaces = []string{"cni0"}

	buckets := base
	buckets.OutboundPort = 15001
	buckets.Services = slices.Concat(randomPrefixes(IPv4, 400, 1), densePrefixes(IPv4, 300),
		prefixes("10.0.0.0/15"),
		randomPrefixes(IPv6, 400, 1), densePrefixes(IPv6, 300), prefixes("fd70::/20"))

	// What a save prints in another way than it was asked for, or not at all.
	edges := base
	edges.OutboundPort = 15001
	edges.Services = prefixes("0.0.0.0/0", "::/0", "::102:304/128", "::a00:0/104", "::ffff/128",
		"::1:0/112")
	edges.ServicePorts = []uint16{65535, 1}
	edges.ExcludePrefixes = prefixes("0.0.0.0/0", "::/0", "::5:6/128", "::fffe:0:0/96")
	edges.ExcludePorts = []PortRange{{1, 65535}, {0, 65535}, {0, 5}, {0, 0}, {65535, 65535}}
	edges.Interfaces = []string{"br-+", "+"}
	edges.InboundPort = 15006
	edges.Serving = []Serving{{Port: 65535}, {Addr: netip.MustParseAddr("::7:8"), Port: 80}}

	allEdges := edges
	allEdges.All = true

	return map[string]Interception{
		"edges": edges, "all-edges": allEdges,
		"nothing": base, "outbound": outbound, "held": held, "settling": settling, "inbound": inbound, "dns": dns, "dns-only": dnsOnly,
		"all": all, "containers": containers, "all-containers": allContainers, "buckets": buckets,
	}
}

// sample intercepts in every way there is, so that every chain of ours stands.
func sample(f Family) Interception {
	return Interception{
		Family: f, ProxyUID: 999, ProxyGID: 998, Jumps: true,
		OutboundPort: 15001,
		Services: []netip.Prefix{
			netip.MustParsePrefix("10.1.2.3/32"), netip.MustParsePrefix("10.1.2.4/32"),
			netip.MustParsePrefix("10.9.0.0/24"),
			netip.MustParsePrefix("fd00::1/128"), netip.MustParsePrefix("fd00::2/128"),
			netip.MustParsePrefix("fd00:9::/64"),
		},
		ServicePorts: []uint16{8080, 81},
		ExcludePrefixes: []netip.Prefix{netip.MustParsePrefix("8.8.8.8/32"),
			netip.MustParsePrefix("fd00:8::/32")},
		ExcludePorts: []PortRange{{90, 80}, {7, 7}},
		DNSPort:      15053, DNSOverTCP: true, ResolverUIDs: []uint32{101},
		InboundPort: 15006,
		Serving: []Serving{{Port: 80}, {Addr: netip.MustParseAddr("10.0.0.9"), Port: 81},
			{Addr: netip.MustParseAddr("fd00::9"), Port: 81}},
	}
}

func TestRulesetGolden(t *testing.T) {
	for name, i := range interceptions() {
		for _, f := range families {
			i.Family = f
			got := i.Ruleset().String()
			file := filepath.Join("testdata", "golden", name+"-"+strings.ToLower(f.String())+".save")
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("%s: got\n%s\nwant\n%s", file, got, want)
			}
		}
	}
}

func TestNothingToInterceptIsEmpty(t *testing.T) {
	for name, i := range map[string]Interception{
		"no port of Envoy's": {ProxyUID: 1, Jumps: true, Services: prefixes("10.0.0.1/32"), Serving: []Serving{{Port: 1}}, Interfaces: []string{"x"}},
		"no serving port":    {Jumps: true, InboundPort: 15006, Serving: []Serving{{}}},
		"of no family":       {Jumps: true, InboundPort: 15006, Serving: []Serving{{Addr: netip.MustParseAddr("::ffff:10.0.0.1"), Port: 80}}},
	} {
		for _, f := range families {
			i.Family = f
			if r := i.Ruleset(); !r.Empty() || r.String() != "" {
				t.Errorf("%s: %s: %s", name, f, r)
			}
		}
	}
}

// What String prints, Parse and Ours read back: a start that adopts finds what
// the one before it wrote.
func TestStringIsReadBack(t *testing.T) {
	for name, i := range interceptions() {
		for _, f := range families {
			i.Family = f
			r := i.Ruleset()
			table, err := Parse(f, []byte(r.String()))
			if err != nil {
				t.Fatal(err)
			}
			if !table.Ours().Equal(r) {
				t.Errorf("%s %s: read back as\n%s", name, f, table.Ours())
			}
		}
	}
}

// Inputs in another order must not make another ruleset: it would be taken for drift.
func TestOrderOfInputsDoesNotMatter(t *testing.T) {
	for name, i := range interceptions() {
		for _, f := range families {
			i.Family = f
			r := i.Ruleset()
			for _, s := range []func(){
				func() { i.Services = slices.Clone(i.Services); slices.Reverse(i.Services) },
				func() { i.ServicePorts = slices.Clone(i.ServicePorts); slices.Reverse(i.ServicePorts) },
				func() {
					i.ExcludePrefixes = slices.Clone(i.ExcludePrefixes)
					slices.Reverse(i.ExcludePrefixes)
				},
				func() { i.ExcludePorts = slices.Clone(i.ExcludePorts); slices.Reverse(i.ExcludePorts) },
				func() { i.Serving = slices.Clone(i.Serving); slices.Reverse(i.Serving) },
				func() { i.ResolverUIDs = slices.Clone(i.ResolverUIDs); slices.Reverse(i.ResolverUIDs) },
			} {
				s()
				if !i.Ruleset().Equal(r) {
					t.Errorf("%s %s: another order, another ruleset", name, f)
				}
			}
		}
	}
}

func TestChainNamesFitAndAreOurs(t *testing.T) {
	for name, i := range interceptions() {
		for _, f := range families {
			i.Family = f
			for _, c := range i.Ruleset().Chains() {
				if len(c) > 28 || !isOurs(c) {
					t.Errorf("%s %s: chain %q: %d characters, ours: %v", name, f, c, len(c), isOurs(c))
				}
			}
		}
	}
	for _, name := range []string{"", "DOCKER", "SERVICE_PROXY_", "SERVICE_PROXY_OUTPUT2",
		"SERVICE_PROXY_B4_0A00000_16", "SERVICE_PROXY_B4_0A000000_33", "SERVICE_PROXY_B4_0A000000_016",
		"SERVICE_PROXY_B4_0a000000_16", "SERVICE_PROXY_B6_ABC", "service_proxy_output"} {
		if isOurs(name) {
			t.Errorf("%q is taken for ours", name)
		}
	}
}
