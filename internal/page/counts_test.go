package page

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

func TestCountsOf(t *testing.T) {
	prefixes := func(all map[string]uint64) map[netip.Prefix]uint64 {
		out := map[netip.Prefix]uint64{}
		for p, n := range all {
			out[netip.MustParsePrefix(p)] = n
		}
		return out
	}
	services := []status.Service{
		{Name: "web", Addresses: []string{"10.0.0.1:80", "10.0.0.1:443", "[fd10::1]:80"}},
		{Name: "any port", Addresses: []string{"10.0.0.3"}},
		{Name: "pair", Addresses: []string{"10.0.2.0:80", "10.0.2.1:80"}},
		{Name: "range", Addresses: []string{"10.8.0.0/24:5432", "fd20::/64:5432", "10.9.0.0/24"}},
		{Name: "port", Addresses: []string{"*:9091", "*:9092"}},
		{Name: "odd", Addresses: []string{"", "x", "*:x", "10.0.0.1/x:80", "10.77.0.1:80"}},
	}
	by := []iptables.Counts{
		{Family: iptables.IPv4, Ports: map[uint16]uint64{9091: 5}, Prefixes: prefixes(map[string]uint64{
			"10.0.0.1/32": 7, "10.0.0.3/32": 2, "10.0.2.0/31": 3, "10.8.0.0/24": 11, "10.9.0.0/24": 0})},
		{Family: iptables.IPv6, Ports: map[uint16]uint64{9091: 6}, Prefixes: prefixes(map[string]uint64{
			"fd10::1/128": 1, "fd20::/64": 4})},
	}
	want := map[string]Count{
		"10.0.0.1:80":      {7, true, "IPv4 10.0.0.1/32"},
		"10.0.0.1:443":     {7, true, "IPv4 10.0.0.1/32"},
		"[fd10::1]:80":     {1, false, "IPv6 fd10::1/128"},
		"10.0.0.3":         {2, false, "IPv4 10.0.0.3/32"},
		"10.0.2.0:80":      {3, true, "IPv4 10.0.2.0/31"},
		"10.0.2.1:80":      {3, true, "IPv4 10.0.2.0/31"},
		"10.8.0.0/24:5432": {11, false, "IPv4 10.8.0.0/24"},
		"10.9.0.0/24":      {0, false, "IPv4 10.9.0.0/24"},
		"fd20::/64:5432":   {4, false, "IPv6 fd20::/64"},
		"*:9091":           {11, false, "*:9091"},
	}
	if diff := cmp.Diff(want, CountsOf(services, by)); diff != "" {
		t.Errorf("(-want +have):\n%s", diff)
	}

	// Everything outbound is one row: then nothing is known of one service alone.
	everywhere := []iptables.Counts{{Family: iptables.IPv4, Prefixes: map[netip.Prefix]uint64{{}: 9}}}
	have := CountsOf(services[:1], everywhere)
	if c := have["10.0.0.1:80"]; len(have) != 2 || c.Connections != 9 || !c.Shared {
		t.Errorf("all outbound: %+v", have)
	}
	if have := CountsOf(services, make([]iptables.Counts, 2)); len(have) != 0 {
		t.Errorf("nothing is known: %+v", have)
	}
}
