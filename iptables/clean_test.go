package iptables

import "testing"

func TestLegacyByModules(t *testing.T) {
	for _, test := range []struct {
		name, modules string
		may, ok       bool
	}{
		{"a kernel without modules", "", false, false},
		{"not loaded", "ip_tables 36864 0 - Live 0x0\nx_tables 65536 1 ip_tables, Live 0x0\n", false, true},
		{"loaded", "x_tables 65536 2 ip_tables,iptable_nat, Live 0x0\nip_tables 36864 1 iptable_nat, Live 0x0\niptable_nat 16384 1 - Live 0x0\n", true, true},
		{"loaded upon what is built in", "iptable_nat 16384 1 - Live 0x0\n", true, true},
		{"the other family's, and names in other columns", "ip6table_nat 16384 1 - Live 0x0\nx_tables 65536 2 ip_tables,iptable_nat, Live 0x0\n", false, false},
	} {
		if may, ok := legacyByModules(IPv4, []byte(test.modules)); may != test.may || ok != test.ok {
			t.Errorf("%s: may be there %v, said %v", test.name, may, ok)
		}
	}
	if may, ok := legacyByModules(IPv6, []byte("ip6_tables 36864 0 - Live 0x0\nip6table_nat 16384 1 - Live 0x0\n")); !may || !ok {
		t.Errorf("IPv6: may be there %v, said %v", may, ok)
	}
}
