package iptables

import "testing"

// TestPorts: where an earlier run's rules lead is read from the rules themselves.
func TestPorts(t *testing.T) {
	for name, i := range interceptions() {
		for _, family := range []Family{IPv4, IPv6} {
			i.Family = family
			have, err := Parse(family, []byte(i.Ruleset().String()))
			if err != nil {
				t.Fatal(err)
			}
			ours := have.Ours()
			outbound, inbound, dns := ours.Ports()
			for _, p := range []struct {
				chain     string
				got, want uint16
			}{{chainRedirect, outbound, i.OutboundPort}, {chainInRedirect, inbound, i.InboundPort},
				{chainDNS, dns, i.DNSPort}} {
				if !have.Has(p.chain) {
					p.want = 0
				}
				if p.got != p.want {
					t.Errorf("%s, %s: %s leads to %d, want %d in\n%s", name, family, p.chain, p.got, p.want, ours)
				}
			}
		}
	}
	damaged := "*nat\n:SERVICE_PROXY_REDIRECT - [0:0]\n-A SERVICE_PROXY_REDIRECT -p tcp -j REDIRECT --to-ports 1-9\nCOMMIT\n"
	have, err := Parse(IPv4, []byte(damaged))
	if outbound, _, _ := have.Ours().Ports(); err != nil || outbound != 0 {
		t.Errorf("a range: %d, %v", outbound, err)
	}
}
