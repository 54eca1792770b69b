package iptables

import (
	"errors"
	"io/fs"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
)

// filterSave is a save with this table filter among others.
func filterSave(text string) []byte {
	return []byte("*nat\n:PREROUTING ACCEPT [0:0]\n:INPUT DROP [0:0]\n-A PREROUTING -j DROP\nCOMMIT\n" +
		"*filter\n" + strings.TrimSpace(text) + "\nCOMMIT\n*mangle\n:INPUT DROP [0:0]\nCOMMIT\n")
}

// anybody is the first packet of a connection to a port of this machine, from whoever.
func anybody(dst string) Packet {
	return Packet{Hook: Input, Dst: netip.MustParseAddrPort(dst), Proto: TCP, DstLocal: true,
		Syn: true}
}

func TestFilterWalk(t *testing.T) {
	const port = "-p tcp -m tcp --dport 8080 "
	for _, test := range []struct {
		name   string
		policy string
		rules  string // "CHAIN rule", of INPUT where no chain is named
		action Action
		by     string // "CHAIN rule" of the verdict
	}{
		{"nothing", "ACCEPT", "", Pass, ""},
		{"a policy", "DROP", "", Dropped, "INPUT "},
		{"a policy, and accepted", "DROP", port + "-j ACCEPT", Pass, ""},
		{"a policy, and another port accepted", "DROP", "-p tcp -m tcp --dport 80 -j ACCEPT", Dropped, "INPUT "},
		{"dropped", "ACCEPT", port + "-j DROP", Dropped, "INPUT " + port + "-j DROP"},
		{"rejected", "ACCEPT", port + "-j REJECT --reject-with tcp-reset", Dropped, "INPUT " + port + "-j REJECT --reject-with tcp-reset"},
		{"another port dropped", "ACCEPT", "-p tcp -m tcp --dport 8081 -j DROP", Pass, ""},
		{"UDP dropped", "ACCEPT", "-p udp -m udp --dport 8080 -j DROP", Pass, ""},
		{"accepted before", "ACCEPT", port + "-j ACCEPT\n-j DROP", Pass, ""},
		{"dropped before", "ACCEPT", "-j DROP\n" + port + "-j ACCEPT", Dropped, "INPUT -j DROP"},
		{"several ports", "ACCEPT", "-p tcp -m multiport --dports 22,8000:8100 -j DROP", Dropped, "INPUT -p tcp -m multiport --dports 22,8000:8100 -j DROP"},
		{"logged", "ACCEPT", port + `-j LOG --log-prefix "x -j DROP "`, Pass, ""},
		{"with a comment", "ACCEPT", port + `-m comment --comment "no \"outside\" -j ACCEPT" -j DROP`, Dropped, "INPUT " + port + `-m comment --comment "no \"outside\" -j ACCEPT" -j DROP`},

		{"some sources dropped", "ACCEPT", "-s 10.0.0.0/8 " + port + "-j DROP", CannotTell, "INPUT -s 10.0.0.0/8 " + port + "-j DROP"},
		{"all but some sources dropped", "ACCEPT", "! -s 10.0.0.0/8 " + port + "-j DROP", CannotTell, "INPUT ! -s 10.0.0.0/8 " + port + "-j DROP"},
		{"some sources accepted", "DROP", "-s 10.0.0.0/8 " + port + "-j ACCEPT", CannotTell, "INPUT "},
		{"some sources dropped, and then all", "DROP", "-s 10.0.0.0/8 -j DROP", Dropped, "INPUT "},
		{"some sources dropped, all accepted before", "DROP", port + "-j ACCEPT\n-s 10.0.0.0/8 -j DROP", Pass, ""},
		{"an unknown match", "ACCEPT", port + "-m geoip --source-country A1 -j DROP", CannotTell, "INPUT " + port + "-m geoip --source-country A1 -j DROP"},
		{"a limit", "DROP", port + "-m limit --limit 3/min -j ACCEPT", CannotTell, "INPUT "},
		{"a source port", "ACCEPT", "-p tcp -m tcp --sport 1:1023 -j DROP", CannotTell, "INPUT -p tcp -m tcp --sport 1:1023 -j DROP"},
		{"a set of addresses that is let in", "DROP", port + "-m set --match-set ours src -j ACCEPT", CannotTell, "INPUT "},
		{"an unknown target", "ACCEPT", port + "-j NFQUEUE --queue-num 1", CannotTell, "INPUT " + port + "-j NFQUEUE --queue-num 1"},

		{"loopback accepted", "DROP", "-i lo -j ACCEPT", Dropped, "INPUT "},
		{"all but loopback dropped", "ACCEPT", "! -i lo -j DROP", Dropped, "INPUT ! -i lo -j DROP"},
		{"an interface dropped", "ACCEPT", "-i eth1 -j DROP", CannotTell, "INPUT -i eth1 -j DROP"},
		{"all but an interface dropped", "ACCEPT", "! -i eth0 -j DROP", CannotTell, "INPUT ! -i eth0 -j DROP"},
		{"any interface", "ACCEPT", "-i + -j DROP", Dropped, "INPUT -i + -j DROP"},

		{"for this address", "ACCEPT", "-d 10.0.0.9/32 -j DROP", Dropped, "INPUT -d 10.0.0.9/32 -j DROP"},
		{"for another address", "ACCEPT", "-d 10.0.0.8/32 -j DROP", Pass, ""},
		{"for this machine", "ACCEPT", "-m addrtype --dst-type LOCAL -j DROP", Dropped, "INPUT -m addrtype --dst-type LOCAL -j DROP"},
		{"for broadcast, then the policy", "DROP", "-m addrtype --dst-type BROADCAST -j DROP", Dropped, "INPUT "},

		{"the answers accepted", "DROP", "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", Dropped, "INPUT "},
		{"the answers accepted, old form", "DROP", "-m state --state RELATED,ESTABLISHED -j ACCEPT", Dropped, "INPUT "},
		{"new ones accepted", "DROP", port + "-m conntrack --ctstate NEW,UNTRACKED -j ACCEPT", Pass, ""},
		{"new ones dropped", "ACCEPT", "-m state --state NEW -j DROP", Dropped, "INPUT -m state --state NEW -j DROP"},
		{"what is no connection dropped", "ACCEPT", "-m conntrack --ctstate INVALID -j DROP", Pass, ""},
		{"all but answers dropped", "ACCEPT", "-m conntrack ! --ctstate RELATED,ESTABLISHED -j DROP", Dropped, "INPUT -m conntrack ! --ctstate RELATED,ESTABLISHED -j DROP"},
		{"another question of conntrack's", "DROP", "-m conntrack --ctorigdstport 8080 -j ACCEPT", CannotTell, "INPUT "},
		{"not a SYN dropped", "ACCEPT", "-p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN -m conntrack --ctstate NEW -j DROP", Pass, ""},

		{"in a chain", "ACCEPT", "-j A\nA -j B\nB " + port + "-j DROP", Dropped, "B " + port + "-j DROP"},
		{"returned from a chain", "DROP", "-j A\nA " + port + "-j RETURN\nA -j ACCEPT", Dropped, "INPUT "},
		{"back from a chain", "ACCEPT", "-j A\n-j DROP\nA -p udp -j ACCEPT", Dropped, "INPUT -j DROP"},
		{"gone to a chain for good", "DROP", "-g A\n-j ACCEPT\nA -p udp -j ACCEPT", Dropped, "INPUT "},
		{"back from a chain that went on to another", "ACCEPT", "-j A\n-j DROP\nA -g B\nA -j ACCEPT\nB -p udp -j DROP", Dropped, "INPUT -j DROP"},
		{"a chain that it may go to, which accepts", "DROP", "-i eth0 -j A\nA -j ACCEPT", CannotTell, "INPUT "},
		{"a chain that it may go to, which drops as the policy does", "DROP", "-i eth0 -g A\n-g A\nA -p udp -j ACCEPT", Dropped, "INPUT "},
		{"a chain that may return", "DROP", "-j A\nA -s 10.0.0.0/8 -j RETURN\nA -j ACCEPT", CannotTell, "INPUT "},
		{"a chain called twice", "ACCEPT", "-s 10.0.0.0/8 -j A\n-j A\nA " + port + "-j DROP", Dropped, "A " + port + "-j DROP"},
		{"in a circle", "ACCEPT", "-j A\nA -j A\nA -j A", CannotTell, "A"},
		{"a chain that is not there", "ACCEPT", "-j A", CannotTell, "INPUT -j A"},
	} {
		chains := map[string]bool{}
		var text strings.Builder
		for line := range strings.Lines(test.rules) {
			chain, rule := builtinInput, strings.TrimSuffix(line, "\n")
			if first, rest, _ := strings.Cut(rule, " "); len(first) == 1 && first != "!" {
				chain, rule, chains[first] = first, rest, true
			}
			text.WriteString("-A " + chain + " " + rule + "\n")
		}
		head := ":INPUT " + test.policy + " [0:0]\n:FORWARD DROP [0:0]\n:OUTPUT ACCEPT [0:0]\n"
		for name := range chains {
			head += ":" + name + " - [0:0]\n"
		}
		filter, err := ParseFilter(IPv4, filterSave(head+text.String()))
		if err != nil {
			t.Fatal(err)
		}
		v := filter.Walk(anybody("10.0.0.9:8080"))
		if by := strings.TrimRight(v.Chain+" "+v.Rule, " "); v.Action != test.action ||
			by != strings.TrimRight(test.by, " ") || v.Port != 0 {
			t.Errorf("%s: %v by %q, want %v by %q", test.name, v.Action, by, test.action, test.by)
		}
	}
}

// The firewalls that VMs come with, in the form that iptables-save prints of them, shortened to
// what a packet to a port may meet.
const (
	ufw = `
:INPUT DROP [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:ufw-after-input - [0:0]
:ufw-after-logging-input - [0:0]
:ufw-before-input - [0:0]
:ufw-before-logging-input - [0:0]
:ufw-logging-deny - [0:0]
:ufw-not-local - [0:0]
:ufw-reject-input - [0:0]
:ufw-skip-to-policy-input - [0:0]
:ufw-track-input - [0:0]
:ufw-user-input - [0:0]
:ufw-user-limit - [0:0]
:ufw-user-limit-accept - [0:0]
-A INPUT -j ufw-before-logging-input
-A INPUT -j ufw-before-input
-A INPUT -j ufw-after-input
-A INPUT -j ufw-after-logging-input
-A INPUT -j ufw-reject-input
-A INPUT -j ufw-track-input
-A ufw-after-input -p udp -m udp --dport 137 -j ufw-skip-to-policy-input
-A ufw-after-input -p tcp -m tcp --dport 445 -j ufw-skip-to-policy-input
-A ufw-after-input -m addrtype --dst-type BROADCAST -j ufw-skip-to-policy-input
-A ufw-after-logging-input -m limit --limit 3/min --limit-burst 10 -j LOG --log-prefix UFW
-A ufw-before-input -i lo -j ACCEPT
-A ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-input -m conntrack --ctstate INVALID -j ufw-logging-deny
-A ufw-before-input -m conntrack --ctstate INVALID -j DROP
-A ufw-before-input -p icmp -m icmp --icmp-type 3 -j ACCEPT
-A ufw-before-input -p udp -m udp --sport 67 --dport 68 -j ACCEPT
-A ufw-before-input -j ufw-not-local
-A ufw-before-input -d 224.0.0.251/32 -p udp -m udp --dport 5353 -j ACCEPT
-A ufw-before-input -j ufw-user-input
-A ufw-logging-deny -m conntrack --ctstate INVALID -m limit --limit 3/min --limit-burst 10 -j RETURN
-A ufw-not-local -m addrtype --dst-type LOCAL -j RETURN
-A ufw-not-local -m addrtype --dst-type MULTICAST -j RETURN
-A ufw-not-local -m addrtype --dst-type BROADCAST -j RETURN
-A ufw-not-local -m limit --limit 3/min --limit-burst 10 -j ufw-logging-deny
-A ufw-not-local -j DROP
-A ufw-skip-to-policy-input -j DROP
-A ufw-user-input -p tcp -m tcp --dport 22 -j ACCEPT
-A ufw-user-input -p tcp -m multiport --dports 80,443 -m comment --comment "\'dapp_Nginx%20Full\'" -j ACCEPT
-A ufw-user-input -p tcp -m tcp --dport 9000 -m recent --update --seconds 30 -j ufw-user-limit
-A ufw-user-input -p tcp -m tcp --dport 9000 -j ufw-user-limit-accept
-A ufw-user-limit -m limit --limit 3/min -j LOG --log-prefix "[UFW LIMIT BLOCK] "
-A ufw-user-limit -j REJECT --reject-with icmp-port-unreachable
-A ufw-user-limit-accept -j ACCEPT`

	firewalld = `
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:INPUT_ZONES - [0:0]
:INPUT_direct - [0:0]
:IN_public - [0:0]
:IN_public_allow - [0:0]
:IN_public_deny - [0:0]
:IN_public_log - [0:0]
-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED,DNAT -j ACCEPT
-A INPUT -i lo -j ACCEPT
-A INPUT -j INPUT_direct
-A INPUT -j INPUT_ZONES
-A INPUT -m conntrack --ctstate INVALID -j DROP
-A INPUT -j REJECT --reject-with icmp-host-prohibited
-A INPUT_ZONES -i eth0 -g IN_public
-A INPUT_ZONES -g IN_public
-A IN_public -j IN_public_log
-A IN_public -j IN_public_deny
-A IN_public -j IN_public_allow
-A IN_public -p icmp -j ACCEPT
-A IN_public_allow -p tcp -m tcp --dport 22 -m conntrack --ctstate NEW,UNTRACKED -j ACCEPT
-A IN_public_allow -p tcp -m tcp --dport 8443 -m conntrack --ctstate NEW,UNTRACKED -j ACCEPT`

	containerOS = `
:INPUT DROP [0:0]
:FORWARD DROP [0:0]
:OUTPUT DROP [0:0]
-A INPUT -m state --state RELATED,ESTABLISHED -j ACCEPT
-A INPUT -i lo -j ACCEPT
-A INPUT -p icmp -j ACCEPT
-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT`
)

func TestFilterOfFirewalls(t *testing.T) {
	for _, test := range []struct {
		name, save string
		port       string
		redirected bool
		action     Action
		by         string
	}{
		{"ufw, allowed", ufw, "22", false, Pass, ""},
		{"ufw, allowed by an application's profile", ufw, "443", false, Pass, ""},
		{"ufw, not allowed", ufw, "8080", false, Dropped, "INPUT "},
		{"ufw, Envoy's port", ufw, "15006", true, Dropped, "INPUT "},
		{"ufw, dropped without a word", ufw, "445", false, Dropped, "ufw-skip-to-policy-input -j DROP"},
		{"ufw, limited", ufw, "9000", false, CannotTell, "ufw-user-limit -j REJECT --reject-with icmp-port-unreachable"},
		{"firewalld, allowed", firewalld, "8443", false, Pass, ""},
		{"firewalld, not allowed", firewalld, "8080", false, Dropped, "INPUT -j REJECT --reject-with icmp-host-prohibited"},
		{"firewalld, redirected", firewalld, "15006", true, Pass, ""},
		{"Container-Optimized OS, allowed", containerOS, "22", false, Pass, ""},
		{"Container-Optimized OS, not allowed", containerOS, "15006", true, Dropped, "INPUT "},
	} {
		filter, err := ParseFilter(IPv4, filterSave(test.save))
		if err != nil {
			t.Fatal(err)
		}
		p := anybody("10.0.0.9:" + test.port)
		p.Redirected = test.redirected
		v := filter.Walk(p)
		if by := v.Chain + " " + v.Rule; v.Action != test.action || strings.TrimSpace(by) != strings.TrimSpace(test.by) {
			t.Errorf("%s: %v by %q, want %v by %q", test.name, v.Action, by, test.action, test.by)
		}
	}
}

func TestParseFilter(t *testing.T) {
	if f, err := ParseFilter(IPv4, []byte("*nat\n:INPUT DROP [0:0]\nCOMMIT\n")); err != nil ||
		f.Walk(anybody("10.0.0.9:80")).Action != Pass {
		t.Errorf("without a table filter: %+v, %v", f, err)
	}
	for _, cut := range []string{"*filter\n:INPUT DROP [0:0]\n", "*filter\n:INPUT DROP [0:0]\n*nat\n"} {
		if _, err := ParseFilter(IPv4, []byte(cut)); !errors.Is(err, ErrTruncated) {
			t.Errorf("%q: %v", cut, err)
		}
	}
	if a := (Filter{}).Walk(anybody("10.0.0.9:80")).Action; a != Pass {
		t.Errorf("none read: %v", a)
	}
}

// TestFilterWalkAtRandom: with every match known, the walk along all ways is the one walk there is:
// that of Table.Walk, where ACCEPT passes and DROP takes.
func TestFilterWalkAtRandom(t *testing.T) {
	seed := rand.Uint64()
	random := rand.New(rand.NewPCG(seed, 0))
	matches := []string{"", "-p tcp ", "-p udp ", "-d 10.0.0.9/32 ", "-d 10.0.0.8/32 ",
		"-p tcp -m tcp --dport 80 ", "-p tcp -m tcp --dport 81 ", "-p tcp -m tcp ! --dport 80 "}
	targets := []string{"ACCEPT", "DROP", "RETURN", "LOG", "A", "B", "C"}
	for range 3000 {
		save := ":PREROUTING ACCEPT [0:0]\n:INPUT ACCEPT [0:0]\n:A - [0:0]\n:B - [0:0]\n:C - [0:0]\n"
		for _, chain := range []string{"X", "A", "B", "C"} {
			for range random.IntN(4) {
				// A chain leads to later ones: the kernel takes no circle.
				to := targets[random.IntN(len(targets))]
				if len(to) == 1 && to <= chain && chain != "X" {
					continue
				}
				flag := []string{"-j ", "-g "}[random.IntN(2)]
				if len(to) > 1 {
					flag = "-j "
				}
				save += "-A " + chain + " " + matches[random.IntN(len(matches))] + flag + to + "\n"
			}
		}
		nat, err := Parse(IPv4, []byte("*nat\n"+strings.ReplaceAll(save, "-A X", "-A PREROUTING")+"COMMIT\n"))
		if err != nil {
			t.Fatal(err)
		}
		filter, err := ParseFilter(IPv4, []byte("*filter\n"+strings.ReplaceAll(save, "-A X", "-A INPUT")+"COMMIT\n"))
		if err != nil {
			t.Fatal(err)
		}
		p := anybody("10.0.0.9:80")
		p.Src, p.InInterface = netip.MustParseAddrPort("192.0.2.1:1"), "eth0"
		got := filter.Walk(p)
		p.Hook = Prerouting
		want := nat.Walk(p)
		if (want.Action == Taken) != (got.Action == Dropped) ||
			(want.Action == Pass) != (got.Action == Pass) ||
			want.Action == Taken && (want.Rule != got.Rule) {
			t.Fatalf("seed %d: %+v, want %+v\n%s", seed, got, want, save)
		}
	}
}

func TestHasLegacyFilter(t *testing.T) {
	read := func(name string) ([]byte, error) {
		switch name {
		case "/proc/thread-self/net/ip_tables_names":
			return []byte("nat\nfilter\n"), nil
		case "/proc/thread-self/net/ip6_tables_names":
			return nil, fs.ErrPermission
		case "/proc/modules":
			return []byte("ip6_tables 1 0 - Live 0x0\nip6table_nat 1 0 - Live 0x0\n"), nil
		}
		return nil, fs.ErrNotExist
	}
	for f, want := range map[Family]bool{IPv4: true, IPv6: false} {
		if has, err := hasLegacyTable(f, tableFilter, read); err != nil || has != want {
			t.Errorf("%s: %v, %v", f, has, err)
		}
	}
}

func FuzzFilter(f *testing.F) {
	for _, save := range []string{ufw, firewalld, containerOS} {
		f.Add(filterSave(save))
	}
	f.Fuzz(func(t *testing.T, save []byte) {
		if filter, err := ParseFilter(IPv4, save); err == nil {
			filter.Walk(anybody("10.0.0.9:8080"))
		}
	})
}
