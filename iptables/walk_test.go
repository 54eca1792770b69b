package iptables

import (
	"net/netip"
	"testing"
)

func to(dst string) Packet {
	return Packet{Hook: Output, Src: netip.MustParseAddrPort("10.0.0.9:40000"), Dst: netip.MustParseAddrPort(dst), Proto: TCP, UID: 1000, GID: 1000, Syn: true}
}

func TestWalk(t *testing.T) {
	ruleset := func(name string) Ruleset {
		i, ok := interceptions()[name]
		if !ok {
			t.Fatal(name)
		}
		i.Family = IPv4
		return i.Ruleset()
	}
	with := func(p Packet, change func(*Packet)) Packet { change(&p); return p }
	inbound := func(dst string) Packet {
		return with(to(dst), func(p *Packet) { p.Hook, p.InInterface, p.DstLocal = Prerouting, "eth0", true })
	}
	for _, test := range []struct {
		name    string
		ruleset string
		packet  Packet
		action  Action
		port    uint16
		chain   string
	}{
		{"a service", "outbound", to("10.1.2.3:443"), Redirect, 15001, chainRedirect},
		{"a service's network", "outbound", to("10.7.200.1:443"), Redirect, 15001, chainRedirect},
		{"no service", "outbound", to("10.8.0.1:443"), Pass, 0, ""},
		{"a service's port", "outbound", to("192.0.2.1:81"), Pass, 0, ""}, // 81 is excluded as well
		{"a service's excluded port", "outbound", to("10.1.2.3:8085"), Pass, 0, ""},
		{"the proxy's user", "outbound", with(to("10.1.2.3:443"), func(p *Packet) { p.UID = 999 }), Pass, 0, ""},
		{"the proxy's group", "outbound", with(to("10.1.2.3:443"), func(p *Packet) { p.GID = 998 }), Pass, 0, ""},
		{"root", "outbound", with(to("10.1.2.3:443"), func(p *Packet) { p.UID = 0 }), Redirect, 15001, chainRedirect},
		{"UDP", "outbound", with(to("10.1.2.3:443"), func(p *Packet) { p.Proto = UDP }), Pass, 0, ""},
		{"without jumps", "held", to("10.1.2.3:443"), Pass, 0, ""},
		{"an old connection", "settling", with(to("10.1.2.3:443"), func(p *Packet) { p.Syn = false }), Pass, 0, ""},
		{"an old connection, settled", "outbound", with(to("10.1.2.3:443"), func(p *Packet) { p.Syn = false }), Redirect, 15001, chainRedirect},
		{"all", "all", to("93.184.216.34:443"), Pass, 0, ""}, // every port is excluded there
		{"all, metadata server", "all-containers", to("169.254.169.254:80"), Pass, 0, ""},
		{"all, anywhere", "all-containers", to("93.184.216.34:443"), Redirect, 15001, chainRedirect},
		{"all, root", "all-containers", with(to("93.184.216.34:443"), func(p *Packet) { p.UID = 0 }), Pass, 0, ""},
		{"all, loopback", "all-containers", to("127.9.9.9:443"), Pass, 0, ""},
		{"all, excluded", "all-containers", to("8.8.8.8:443"), Pass, 0, ""},
		{"DNS over UDP", "dns", with(to("8.8.8.8:53"), func(p *Packet) { p.Proto = UDP }), Redirect, 15053, chainDNS},
		{"DNS over TCP to the stub resolver", "dns", to("127.0.0.53:53"), Redirect, 15053, chainDNS},
		{"DNS over TCP that Envoy does not take", "dns-only", to("8.8.8.8:53"), Pass, 0, ""},
		{"DNS to the metadata server", "dns", with(to("169.254.169.254:53"), func(p *Packet) { p.Proto = UDP }), Redirect, 15053, chainDNS},
		{"the resolver's own DNS", "dns", with(to("8.8.8.8:53"), func(p *Packet) { p.Proto, p.UID = UDP, 101 }), Pass, 0, ""},
		{"a serving port", "inbound", inbound("192.0.2.9:8443"), Redirect, 15006, chainInRedirect},
		{"a serving port of an address", "inbound", inbound("10.128.0.9:80"), Redirect, 15006, chainInRedirect},
		{"that port of another address", "inbound", inbound("10.128.0.8:80"), Pass, 0, ""},
		{"routed through", "inbound", with(inbound("10.9.9.9:8443"), func(p *Packet) { p.DstLocal = false }), Pass, 0, ""},
		{"from a container", "containers", with(inbound("10.1.2.3:443"), func(p *Packet) { p.InInterface, p.DstLocal = "br-1234", false }), Redirect, 15001, chainRedirect},
		{"from a container, excluded port", "containers", with(inbound("10.1.2.3:81"), func(p *Packet) { p.InInterface, p.DstLocal = "docker0", false }), Pass, 0, ""},
		{"from elsewhere to a service", "containers", with(inbound("10.1.2.3:443"), func(p *Packet) { p.DstLocal = false }), Pass, 0, ""},
		{"all, container to this machine", "all-containers", with(inbound("10.0.0.9:80"), func(p *Packet) { p.InInterface = "cni0" }), Pass, 0, ""},
	} {
		v := ruleset(test.ruleset).Walk(test.packet)
		if v.Action != test.action || v.Port != test.port || v.Chain != test.chain {
			t.Errorf("%s (%s): got %v port %d in %q by %q", test.name, test.ruleset, v.Action, v.Port, v.Chain, v.Rule)
		}
	}
}

func TestWalkAmongOthersRules(t *testing.T) {
	for _, test := range []struct {
		name   string
		output []string
		more   map[string][]string
		action Action
	}{
		{"ours first", []string{jumpOutput, "-j ACCEPT"}, nil, Redirect},
		{"an ACCEPT before", []string{"-p tcp -j ACCEPT", jumpOutput}, nil, Pass},
		{"a DNAT before", []string{"-d 10.0.0.1/32 -p tcp -m tcp --dport 443 -j DNAT --to-destination 10.9.9.9", jumpOutput}, nil, Taken},
		{"a DNAT for another port before", []string{"-d 10.0.0.1/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.9.9.9", jumpOutput}, nil, Redirect},
		{"in a chain", []string{"-j A", jumpOutput}, map[string][]string{"A": {"-j B"}, "B": {"-p tcp -j REDIRECT --to-ports 9"}}, Taken},
		{"in a chain that returns", []string{"-j A", jumpOutput}, map[string][]string{"A": {"-j RETURN", "-j DROP"}}, Redirect},
		{"gone to", []string{"-g A", jumpOutput}, map[string][]string{"A": nil}, Pass},
		{"an unknown match", []string{"-m set --match-set x dst -j ACCEPT", jumpOutput}, nil, CannotTell},
		{"an unknown match that only counts", []string{"-m set --match-set x dst", jumpOutput}, nil, Redirect},
		{"an unknown match to a harmless chain", []string{"-m set --match-set x dst -j A", jumpOutput}, map[string][]string{"A": {"-j LOG"}}, Redirect},
		{"a revision that is not supported", []string{"-m addrtype [unsupported revision] -j DNAT --to-destination 10.9.9.9", jumpOutput}, nil, CannotTell},
		{"an unknown target", []string{"-j WHAT", jumpOutput}, nil, CannotTell},
		{"a chain in a circle", []string{"-j A", jumpOutput}, map[string][]string{"A": {"-j A"}}, CannotTell},
		{"several ports", []string{"-p tcp -m multiport --dports 80,443:444 -j ACCEPT", jumpOutput}, nil, Pass},
		{"not that user", []string{"-m owner ! --uid-owner 1000 -j ACCEPT", jumpOutput}, nil, Redirect},
		{"another interface's", []string{"! -i eth0 -j ACCEPT", jumpOutput}, nil, Pass},
		{"out of an interface", []string{"-o lo -j ACCEPT", jumpOutput}, nil, CannotTell},
	} {
		r := serviceSet(IPv4, prefixes("10.0.0.1/32"))
		table, err := Parse(IPv4, []byte(r.String()))
		if err != nil {
			t.Fatal(err)
		}
		table = table.with(test.more, nil).with(map[string][]string{"OUTPUT": test.output}, nil)
		if v := table.Walk(to("10.0.0.1:443")); v.Action != test.action {
			t.Errorf("%s: got %v by -A %s %s, want %v", test.name, v.Action, v.Chain, v.Rule, test.action)
		}
	}
}

func TestShadowIsNamed(t *testing.T) {
	for _, test := range []struct {
		name    string
		before  string
		more    map[string][]string
		shadows bool
	}{
		{"ACCEPT", "-j ACCEPT", nil, true},
		{"UDP only", "-p udp -j ACCEPT", nil, false},
		{"all but TCP", "! -p tcp -j ACCEPT", nil, false},
		{"all but UDP", "! -p udp -j DROP", nil, true},
		{"RETURN in the built-in chain", "-d 10.0.0.1/32 -p tcp -j RETURN", nil, true},
		{"LOG", "-p tcp -j LOG", nil, false},
		{"no target", "-p tcp", nil, false},
		{"a harmless chain", "-j A", map[string][]string{"A": {"-j RETURN", "-p udp -j DNAT --to-destination 1.1.1.1"}}, false},
		{"a chain that takes", "-j A", map[string][]string{"A": {"-j B"}, "B": {"-p tcp -j DNAT --to-destination 1.1.1.1"}}, true},
		{"gone for good", "-g A", map[string][]string{"A": nil}, true},
		{"an unknown target", "-j WHAT", nil, true},
	} {
		want := serviceSet(IPv4, prefixes("10.0.0.1/32"))
		table, err := Parse(IPv4, []byte(want.String()))
		if err != nil {
			t.Fatal(err)
		}
		table = table.with(test.more, nil).with(map[string][]string{"OUTPUT": {test.before, jumpOutput}}, nil)
		drift := Diff(want, table)
		kind, rule := JumpMoved, jumpOutput
		if test.shadows {
			kind, rule = Shadowed, test.before
		}
		if len(drift) != 1 || drift[0] != (Drift{kind, "OUTPUT", rule}) {
			t.Errorf("%s: got %v", test.name, drift)
		}
	}
}

func TestParseWhateverASaveContains(t *testing.T) {
	for _, test := range []struct {
		name, save string
		truncated  bool
		has        map[string][]string
	}{
		{"nothing", "", false, nil},
		{"other tables only", "*filter\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -j SERVICE_PROXY_OUTPUT\nCOMMIT\n", false, nil},
		{"counters", "*nat\n:OUTPUT ACCEPT [1:2]\n[3:4] -A OUTPUT -j X\nCOMMIT\n", false, map[string][]string{"OUTPUT": {"-j X"}}},
		{"half a save", "*nat\n:OUTPUT ACCEPT [1:2]\n-A OUTPUT -j", true, nil},
		{"a table in a table", "*nat\n*filter\nCOMMIT\n", true, nil},
		{"quotes", "*nat\n:X - [0:0]\n-A X -m comment --comment \"a \\\" -j DROP\" -j ACCEPT\nCOMMIT\n", false, map[string][]string{"X": {`-m comment --comment "a \" -j DROP" -j ACCEPT`}}},
		{"words before", "# Warning: legacy tables present\n*nat\n:X - [0:0]\nwhat is this\nCOMMIT\n", false, map[string][]string{"X": nil}},
		{"two nat tables", "*nat\n:X - [0:0]\n-A X -j A\nCOMMIT\n*nat\n:Y - [0:0]\nCOMMIT\n", false, map[string][]string{"X": {"-j A"}, "Y": nil}},
	} {
		table, err := Parse(IPv4, []byte(test.save))
		if (err != nil) != test.truncated {
			t.Errorf("%s: %v", test.name, err)
		}
		for name, rules := range test.has {
			if !table.Has(name) || len(table.Rules(name)) != len(rules) || len(rules) > 0 && table.Rules(name)[0] != rules[0] {
				t.Errorf("%s: %s is %q", test.name, name, table.Rules(name))
			}
		}
		if len(table.chains) != len(test.has) {
			t.Errorf("%s: chains %v", test.name, table.chains)
		}
	}
	if got := target(`-m comment --comment "a \" -j DROP" -j ACCEPT`); got != "ACCEPT" {
		t.Errorf("a comment's words are taken for the target: %q", got)
	}
}
