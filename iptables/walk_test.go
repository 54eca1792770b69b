package iptables

import (
	"net/netip"
	"runtime/debug"
	"strings"
	"testing"
)

func to(dst string) Packet {
	return Packet{Hook: Output, Src: netip.MustParseAddrPort("10.0.0.9:40000"),
		Dst: netip.MustParseAddrPort(dst), Proto: TCP, UID: 1000, GID: 1000, Syn: true}
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
		return with(to(dst), func(p *Packet) {
			p.Hook, p.InInterface, p.DstLocal = Prerouting, "eth0", true
		})
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
			t.Errorf("%s (%s): got %v port %d in %q by %q", test.name, test.ruleset, v.Action, v.Port,
				v.Chain, v.Rule)
		}
	}
}

func TestWalkAmongOthersRules(t *testing.T) {
	debug.SetMaxStack(32 << 20) // a walk in a circle without an end is to fail soon
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
		{"an end of a chain that is gone to from another", []string{"-j A", jumpOutput}, map[string][]string{"A": {"-g B", "-j DROP"}, "B": {"-p udp -j DROP"}}, Redirect},
		{"a chain gone to that takes", []string{"-g A", jumpOutput}, map[string][]string{"A": {"-j DROP"}}, Taken},
		{"a chain gone to that returns", []string{"-g A", jumpOutput}, map[string][]string{"A": {"-j RETURN", "-j DROP"}}, Pass},
		{"an ACCEPT in a chain", []string{"-j A", jumpOutput}, map[string][]string{"A": {"-j ACCEPT"}}, Pass},
		{"an ACCEPT two chains deep", []string{"-j A", jumpOutput}, map[string][]string{"A": {"-j B"}, "B": {"-j ACCEPT"}}, Pass},
		{"a chain into which it may or may not go", []string{"-m set --match-set x dst -j A", jumpOutput}, map[string][]string{"A": {"-j DROP"}}, CannotTell},
		{"a chain of others' that leads to ours", []string{"-j A"}, map[string][]string{"A": {"-j SERVICE_PROXY_OUTPUT"}}, Redirect},
		{"a chain that was not read", []string{"-j A", jumpOutput}, map[string][]string{"A": {"-j B"}}, CannotTell},
		{"others' own redirect", []string{"-p tcp -j REDIRECT --to-ports 15001", jumpOutput}, nil, Taken},
		{"nothing", nil, nil, Pass},
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
		{"a chain that goes to another for good and comes back", "-j A", map[string][]string{"A": {"-g B"}, "B": {"-p udp -j DROP"}}, false},
		{"a chain in a circle", "-j A", map[string][]string{"A": {"-j A"}}, true},
		{"a chain that was not read", "-j A", map[string][]string{"A": {"-j B"}}, true},
		{"all but some ports", "-p tcp -m tcp ! --dport 80 -j ACCEPT", nil, true},
		{"any protocol", "-p all -j ACCEPT", nil, true},
	} {
		want := serviceSet(IPv4, prefixes("10.0.0.1/32"))
		table, err := Parse(IPv4, []byte(want.String()))
		if err != nil {
			t.Fatal(err)
		}
		table = table.with(test.more, nil).with(map[string][]string{"OUTPUT": {test.before, jumpOutput}},
			nil)
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

// The verdict names the rule that decides, which is what explain shows, and not the one
// that led to its chain.
func TestWalkNamesTheRule(t *testing.T) {
	have := changed(t, serviceSet(IPv4, prefixes("10.0.0.1/32")), ":A - [0:0]", ":B - [0:0]",
		"-A A -j B", "-A B -p tcp -m tcp --dport 443 -j DROP",
		"-A B -p tcp -m tcp --dport 444 -j ACCEPT", "-A B -m set --match-set x dst -p tcp -m tcp --dport 445 -j DROP", "-I OUTPUT 1 -j A")
	for port, want := range map[string]Verdict{
		"443": {Action: Taken, Chain: "B", Rule: "-p tcp -m tcp --dport 443 -j DROP"},
		"444": {Action: Pass, Chain: "B", Rule: "-p tcp -m tcp --dport 444 -j ACCEPT"},
		"445": {Action: CannotTell, Chain: "B", Rule: "-m set --match-set x dst -p tcp -m tcp --dport 445 -j DROP"},
		"446": {Action: Redirect, Port: 15001, Chain: chainRedirect, Rule: "-p tcp -j REDIRECT --to-ports 15001"},
	} {
		if got := have.Walk(to("10.0.0.1:" + port)); got != want {
			t.Errorf("port %s: got %+v, want %+v", port, got, want)
		}
	}
	if got := have.Walk(to("10.0.0.2:446")); got != (Verdict{Action: Pass}) {
		t.Errorf("no service: %+v", got)
	}
}

// The jump for DNS takes UDP to port 53 alone: what stands before it and takes other packets does
// not shadow it.
func TestDNSIsShadowedByWhatTakesDNS(t *testing.T) {
	for before, shadows := range map[string]bool{
		"-p udp -m udp --dport 53 -j ACCEPT":                true,
		"-p udp -j ACCEPT":                                  true,
		"-p tcp -m tcp --dport 53 -j ACCEPT":                false,
		"-p udp -m udp --dport 54 -j ACCEPT":                false,
		"-p udp -m udp --dport 52 -j ACCEPT":                false,
		"-p udp -m udp --dport 1:52 -j ACCEPT":              false,
		"-p udp -m udp --dport 1:53 -j ACCEPT":              true,
		"-p udp -m udp --dport 53:99 -j ACCEPT":             true,
		"-p udp -m udp --dport 54:99 -j ACCEPT":             false,
		"-p udp -m multiport --dports 1,53 -j ACCEPT":       true,
		"-p udp -m multiport --dports 1,54 -j ACCEPT":       false,
		"-p udp -m udp ! --dport 54 -j ACCEPT":              true,
		"-p udp -m udp ! --dport 53 -j ACCEPT":              true, // errs on the safe side
		"-p tcp -j ACCEPT":                                  false,
		"-p udp -m udp --dport 53 -j LOG":                   false,
		"-d 10.0.0.1/32 -p udp -m udp --dport 53 -j RETURN": true,
	} {
		i := Interception{Family: IPv4, ProxyUID: 999, ProxyGID: 999, Jumps: true, DNSPort: 15053}
		table := changed(t, i.Ruleset(), "-I OUTPUT 2 "+before)
		want := Drift{JumpMoved, builtinOutput, jumpDNS}
		if shadows {
			want = Drift{Shadowed, builtinOutput, before}
		}
		if drift := Diff(i.Ruleset(), table); len(drift) != 1 || drift[0] != want {
			t.Errorf("%s: got %v, want %v", before, drift, want)
		}
	}
}

// What others match a packet by, on the way to our jump. The answers are the man page's
// (iptables-extensions(8)).
func TestMatches(t *testing.T) {
	from := Packet{Hook: Output, Src: netip.MustParseAddrPort("10.0.0.9:40000"),
		Dst: netip.MustParseAddrPort("10.0.0.1:443"), Proto: TCP, UID: 1000, GID: 100, Syn: true}
	mid := from
	mid.Syn = false
	udp := from
	udp.Proto, udp.Syn = UDP, false
	in := from
	in.Hook, in.InInterface, in.DstLocal, in.UID, in.GID = Prerouting, "eth0", true, 0, 0
	through := in
	through.DstLocal = false
	led, anyone := from, from
	led.Redirected, anyone.Src = true, netip.AddrPort{}
	for _, test := range []struct {
		match  string
		packet Packet
		answer match
	}{
		{"", from, yes},
		{"-p tcp", from, yes}, {"-p tcp", udp, no}, {"-p udp", udp, yes}, {"! -p tcp", from, no}, {"! -p tcp", udp, yes},
		{"-p 6", from, yes}, {"-p 17", udp, yes}, {"-p 17", from, no}, {"-p icmp", from, no}, {"! -p icmp", from, yes},
		{"-p all", from, yes}, {"-p 0", from, yes}, {"! -p all", from, maybe},
		{"-s 10.0.0.9/32", from, yes}, {"-s 10.0.0.8/32", from, no}, {"! -s 10.0.0.9/32", from, no}, {"! -s 10.0.0.8/32", from, yes}, {"-s 10.0.0.9", from, yes},
		{"-d 10.0.0.0/8", from, yes}, {"-d 11.0.0.0/8", from, no}, {"! -d 10.0.0.0/8", from, no}, {"! -d 11.0.0.0/8", from, yes}, {"-d fd00::/8", from, no},
		{"-d 10.0.0.0/255.0.0.0", from, maybe}, {"-d example.com", from, maybe},
		{"-i eth0", in, yes}, {"-i eth1", in, no}, {"! -i eth0", in, no}, {"! -i eth1", in, yes}, {"-i eth+", in, yes}, {"-i +", in, yes}, {"-i wlan+", in, no},
		{"-i eth0", from, no}, {"! -i eth0", from, yes}, {"-i +", from, yes}, {"-o eth0", from, maybe},
		{"-p tcp -m tcp --dport 443", from, yes}, {"-p tcp -m tcp --dport 444", from, no}, {"-p tcp -m tcp --dport 442", from, no},
		{"-p tcp -m tcp ! --dport 443", from, no}, {"-p tcp -m tcp ! --dport 444", from, yes},
		{"-p tcp -m tcp --dport 443:500", from, yes}, {"-p tcp -m tcp --dport 400:443", from, yes}, {"-p tcp -m tcp --dport 444:500", from, no}, {"-p tcp -m tcp --dport 1:442", from, no},
		{"-p tcp -m tcp --dport :443", from, yes}, {"-p tcp -m tcp --dport 443:", from, yes}, {"-p tcp -m tcp --dport :442", from, no}, {"-p tcp -m tcp --dport 444:", from, no},
		{"-p tcp -m tcp --dport https", from, maybe},
		{"-p tcp -m multiport --dports 80,443", from, yes}, {"-p tcp -m multiport --dports 80,440:442", from, no}, {"-p tcp -m multiport ! --dports 80,443", from, no},
		{"-p tcp -m tcp --syn", from, yes}, {"-p tcp -m tcp --syn", mid, no}, {"-p tcp -m tcp ! --syn", from, no}, {"-p tcp -m tcp ! --syn", mid, yes},
		{"-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN", from, yes}, {"-p tcp -m tcp --tcp-flags SYN,RST SYN", from, maybe},
		{"-p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN", udp, no},
		{"-m owner --uid-owner 1000", from, yes}, {"-m owner --uid-owner 1001", from, no}, {"-m owner ! --uid-owner 1000", from, no}, {"-m owner ! --uid-owner 1001", from, yes},
		{"-m owner --uid-owner 1000-2000", from, yes}, {"-m owner --uid-owner 1-1000", from, yes}, {"-m owner --uid-owner 1-999", from, no}, {"-m owner --uid-owner 1001-2000", from, no},
		{"-m owner --gid-owner 100", from, yes}, {"-m owner --gid-owner 1000", from, no}, {"-m owner ! --gid-owner 100", from, no},
		{"-m owner --uid-owner 0", in, no}, {"-m owner ! --uid-owner 1000", in, no}, {"-m owner --uid-owner root", from, maybe},
		{"-m addrtype --dst-type LOCAL", in, yes}, {"-m addrtype --dst-type LOCAL", through, no}, {"-m addrtype ! --dst-type LOCAL", in, no}, {"-m addrtype ! --dst-type LOCAL", through, yes},
		{"-m addrtype --dst-type BROADCAST", in, maybe}, {"-m set --match-set x dst", from, maybe},
		{"-m conntrack --ctstate NEW", from, yes}, {"-m state --state NEW", from, yes}, {"-m conntrack --ctstate RELATED,ESTABLISHED", from, no}, {"-m conntrack ! --ctstate RELATED,ESTABLISHED", from, yes},
		{"-m conntrack --ctstate INVALID,NEW", from, yes}, {"-m conntrack --ctstate DNAT", from, no}, {"-m conntrack --ctstate DNAT", led, yes}, {"-m conntrack ! --ctstate DNAT", led, no},
		{"-m conntrack --ctorigdst 10.0.0.1/32", from, maybe},
		{"-s 10.0.0.0/8", anyone, maybe}, {"! -s 10.0.0.0/8", anyone, maybe}, {"-s 10.0.0.0/8 -p udp", anyone, no}, {"-p tcp", anyone, yes},
		{"-m set --match-set x dst -p udp", from, no}, // no, whatever the set says
		{`-m comment --comment "a -p udp"`, from, yes},
	} {
		hook := map[Hook]string{Output: builtinOutput, Prerouting: builtinPrerouting}[test.packet.Hook]
		table := Table{
			family: IPv4, chains: map[string][]string{hook: {strings.TrimSpace(test.match + " -j DROP")}}}
		want := map[match]Action{no: Pass, maybe: CannotTell, yes: Taken}[test.answer]
		if v := table.Walk(test.packet); v.Action != want {
			t.Errorf("%q: %+v: got %v, want %v", test.match, test.packet, v.Action, want)
		}
	}
}

// Which targets end a packet's way through table nat, and which do not. Every target of
// iptables-extensions(8) that a nat table takes, and those of netfilter itself.
func TestTargets(t *testing.T) {
	for action, targets := range map[Action][]string{
		Redirect: {"", "-j LOG", "-j NFLOG --nflog-group 1", "-j ULOG", "-j MARK --set-mark 1",
			"-j CONNMARK --save-mark", "-j TRACE", "-j SET --add-set x src",
			"-j CONNSECMARK --save", "-j SECMARK --selctx x", "-j AUDIT --type accept"},
		Taken: {"-j DROP", "-j DNAT --to-destination 10.9.9.9", "-j SNAT --to-source 10.9.9.9",
			"-j MASQUERADE", "-j NETMAP --to 10.9.0.0/16", "-j QUEUE", "-j NFQUEUE --queue-num 1",
			"-j REDIRECT --to-ports 15001", "-j REDIRECT"},
		Pass:       {"-j ACCEPT", "-j RETURN"},
		CannotTell: {"-j WHAT", "-g WHAT"},
	} {
		for _, target := range targets {
			table := changed(t, serviceSet(IPv4, prefixes("10.0.0.1/32")))
			rule := strings.TrimSpace("-p tcp " + target)
			table = table.with(map[string][]string{"OUTPUT": {rule, jumpOutput}}, nil)
			v := table.Walk(to("10.0.0.1:443"))
			if v.Action != action || action != Redirect && target != "-j RETURN" && v.Rule != rule {
				t.Errorf("%q: got %v by %q, want %v", target, v.Action, v.Rule, action)
			}
			drift := Diff(serviceSet(IPv4, prefixes("10.0.0.1/32")), table)
			if shadowed := len(drift) == 1 && drift[0].Kind == Shadowed; shadowed != (action != Redirect) {
				t.Errorf("%q: %v", target, drift)
			}
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
			if !table.Has(name) || len(table.Rules(name)) != len(rules) ||
				len(rules) > 0 && table.Rules(name)[0] != rules[0] {
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

// A person who asks about an inbound connection may not know where it comes from: a rule that asks
// for that may or may not match.
func TestWalkWithoutSource(t *testing.T) {
	known := Packet{Hook: Prerouting, Src: netip.MustParseAddrPort("192.0.2.1:4000"),
		Dst: netip.MustParseAddrPort("10.0.0.1:443"), Proto: TCP, InInterface: "eth0", DstLocal: true, Syn: true}
	noSource := known
	noSource.Src = netip.AddrPort{}
	for _, test := range []struct {
		rule   string
		packet Packet
		action Action
	}{
		{"-s 192.0.2.0/24 -j DNAT --to-destination 10.9.9.9", known, Taken},
		{"-s 192.0.2.0/24 -j DNAT --to-destination 10.9.9.9", noSource, CannotTell},
		{"! -s 192.0.2.0/24 -j DNAT --to-destination 10.9.9.9", known, Pass},
		{"! -s 192.0.2.0/24 -j DNAT --to-destination 10.9.9.9", noSource, CannotTell},
		{"-s 192.0.2.0/24 -p udp -j DNAT --to-destination 10.9.9.9", noSource, Pass},
		{"-d 10.0.0.1/32 -j DNAT --to-destination 10.9.9.9", noSource, Taken},
		{"-s 192.0.2.0/24 -j LOG", noSource, Pass},
		{"-s 192.0.2.0/24 -j A", noSource, Pass}, // it comes back from there
	} {
		table, err := Parse(IPv4, []byte("*nat\n:PREROUTING ACCEPT [0:0]\n:A - [0:0]\n"+
			"-A PREROUTING "+test.rule+"\nCOMMIT\n"))
		if err != nil {
			t.Fatal(err)
		}
		if v := table.Walk(test.packet); v.Action != test.action {
			t.Errorf("%s, %+v: got %v, want %v", test.rule, test.packet, v.Action, test.action)
		}
	}
}
