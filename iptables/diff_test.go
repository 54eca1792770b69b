package iptables

import (
	"slices"
	"strings"
	"testing"

	"github.com/service-proxy-agent/service-proxy-agent/iptables/iptablestest"
)

// changed is a table of ours after somebody changed it by the lines of a payload.
func changed(t testing.TB, from Ruleset, lines ...string) Table {
	t.Helper()
	nat := iptablestest.New(nil)
	for _, payload := range []string{NewPlan(from, Table{family: from.family}).String(),
		"*nat\n" + strings.Join(lines, "\n") + "\nCOMMIT\n"} {
		if payload == "" {
			continue
		}
		if err := nat.Restore(payload, nil); err != nil {
			t.Fatal(err)
		}
	}
	return Table{family: from.family, chains: nat.Chains()}
}

// Each way in which others undo our rules has a name, and names what it did.
func TestDiffNamesTheDrift(t *testing.T) {
	const (
		cidrs  = "SERVICE_PROXY_SERVICE_CIDRS"
		first  = "-d 10.1.2.3/32 -j SERVICE_PROXY_REDIRECT"
		second = "-d 10.1.2.4/32 -j SERVICE_PROXY_REDIRECT"
		third  = "-d 10.9.0.0/24 -j SERVICE_PROXY_REDIRECT"
	)
	want := sample(IPv4).Ruleset()
	refill := func(specs ...string) []string { // the services' chain with other rows
		lines := []string{":" + cidrs + " - [0:0]"}
		for _, spec := range specs {
			lines = append(lines, "-A "+cidrs+" "+spec)
		}
		return lines
	}
	for _, test := range []struct {
		name  string
		lines []string
		drift []string
	}{
		{"nothing", nil, nil},
		{"a rule removed", []string{"-D " + cidrs + " " + second}, []string{"rule removed: -A " + cidrs + " " + second}},
		{"two rules removed", []string{"-D " + cidrs + " " + second, "-D " + cidrs + " " + first},
			[]string{"rule removed: -A " + cidrs + " " + first, "rule removed: -A " + cidrs + " " + second}},
		{"a chain flushed", refill(), []string{"chain flushed: " + cidrs}},
		{"a chain removed", []string{"-D SERVICE_PROXY_OUTPUT -j SERVICE_PROXY_SERVICE_PORTS", ":SERVICE_PROXY_SERVICE_PORTS - [0:0]", "-X SERVICE_PROXY_SERVICE_PORTS"},
			[]string{"rule removed: -A SERVICE_PROXY_OUTPUT -j SERVICE_PROXY_SERVICE_PORTS",
				"chain removed: SERVICE_PROXY_SERVICE_PORTS"}},
		{"a foreign rule first", []string{"-I " + cidrs + " 1 -p tcp -j ACCEPT"}, []string{"foreign rule: -A " + cidrs + " -p tcp -j ACCEPT"}},
		{"a foreign rule last", []string{"-A " + cidrs + " -j LOG"}, []string{"foreign rule: -A " + cidrs + " -j LOG"}},
		{"a rule of ours doubled", []string{"-A " + cidrs + " " + first}, []string{"foreign rule: -A " + cidrs + " " + first}},
		{"two changed places", refill(second, first, third), []string{"reordered: " + cidrs}},
		{"the first changed", refill("-d 10.1.2.3/32 -j RETURN", second, third), []string{"rule changed: -A " + cidrs + " -d 10.1.2.3/32 -j RETURN"}},
		{"the last changed", refill(first, second, "-j ACCEPT"), []string{"rule changed: -A " + cidrs + " -j ACCEPT"}},
		{"two changed", refill("-j ACCEPT", second, "-j DROP"), []string{"rule changed: -A " + cidrs + " -j ACCEPT", "rule changed: -A " + cidrs + " -j DROP"}},
		{"one changed, two reordered", refill(second, first, "-j DROP"), []string{"rule changed: -A " + cidrs + " -j DROP"}},
		{"one changed for one of ours", refill(first, first, third), []string{"rule changed: -A " + cidrs + " " + first}},
		{"one removed and a foreign one elsewhere", refill("-j LOG", first, third),
			[]string{"rule removed: -A " + cidrs + " " + second, "foreign rule: -A " + cidrs + " -j LOG"}},
		{"one removed and two foreign", refill(first, "-j LOG", "-j DROP", third), []string{"rule removed: -A " + cidrs + " " + second,
			"foreign rule: -A " + cidrs + " -j LOG", "foreign rule: -A " + cidrs + " -j DROP"}},
		{"a port changed", []string{":SERVICE_PROXY_REDIRECT - [0:0]", "-A SERVICE_PROXY_REDIRECT -p tcp -j REDIRECT --to-ports 15009"},
			[]string{"rule changed: -A SERVICE_PROXY_REDIRECT -p tcp -j REDIRECT --to-ports 15009"}},

		{"a jump removed", []string{"-D OUTPUT " + jumpOutput}, []string{"jump removed: -A OUTPUT " + jumpOutput}},
		{"the other jump removed", []string{"-D OUTPUT " + jumpDNS}, []string{"jump removed: -A OUTPUT " + jumpDNS}},
		{"all jumps removed", []string{"-D OUTPUT " + jumpDNS, "-D OUTPUT " + jumpOutput, "-D PREROUTING " + jumpInbound},
			[]string{"jump removed: -A PREROUTING " + jumpInbound, "jump removed: -A OUTPUT " + jumpOutput,
				"jump removed: -A OUTPUT " + jumpDNS}},
		{"a jump doubled", []string{"-A OUTPUT " + jumpDNS}, []string{"jump doubled: -A OUTPUT " + jumpDNS}},
		{"a jump three times", []string{"-A OUTPUT " + jumpOutput, "-A OUTPUT " + jumpOutput}, []string{"jump doubled: -A OUTPUT " + jumpOutput}},
		{"a jump changed", []string{"-D OUTPUT " + jumpOutput, "-I OUTPUT 1 -j SERVICE_PROXY_OUTPUT"},
			[]string{"jump changed: -A OUTPUT -j SERVICE_PROXY_OUTPUT", "jump removed: -A OUTPUT " +
				jumpOutput}},
		{"a jump to a chain of ours that none is wanted to", []string{"-A OUTPUT -j SERVICE_PROXY_IN_REDIRECT"},
			[]string{"jump left over: -A OUTPUT -j SERVICE_PROXY_IN_REDIRECT"}},
		{"our jumps in another order", []string{"-D OUTPUT " + jumpOutput, "-A OUTPUT " + jumpOutput}, []string{"jump not first: -A OUTPUT " + jumpOutput}},
		{"a harmless rule before them", []string{"-I OUTPUT 1 -j LOG"}, []string{"jump not first: -A OUTPUT " + jumpOutput}},
		{"a harmless rule between them", []string{"-I OUTPUT 2 -j LOG"}, []string{"jump not first: -A OUTPUT " + jumpDNS}},
		{"a rule between them that takes DNS", []string{"-I OUTPUT 2 -p udp -j ACCEPT"}, []string{"shadowed: -A OUTPUT -p udp -j ACCEPT"}},
		{"a rule between them that takes what has passed", []string{"-I OUTPUT 2 -p tcp -j ACCEPT"}, []string{"jump not first: -A OUTPUT " + jumpDNS}},
		{"two rules that shadow", []string{"-I OUTPUT 1 -p tcp -j DROP", "-I OUTPUT 2 -j LOG", "-I OUTPUT 3 -j ACCEPT"},
			[]string{"shadowed: -A OUTPUT -p tcp -j DROP", "shadowed: -A OUTPUT -j ACCEPT"}},
		{"rules behind them", []string{"-A OUTPUT -j ACCEPT", "-A PREROUTING -j DROP"}, nil},
		{"inbound shadowed", []string{"-I PREROUTING 1 -j DROP"}, []string{"shadowed: -A PREROUTING -j DROP"}},

		{"a chain of another configuration", []string{":SERVICE_PROXY_B4_0A200000_12 - [0:0]"}, []string{"chain left over: SERVICE_PROXY_B4_0A200000_12"}},
		{"two of them", []string{":SERVICE_PROXY_B4_0A200000_12 - [0:0]", ":SERVICE_PROXY_B4_0A000000_3 - [0:0]"},
			[]string{"chain left over: SERVICE_PROXY_B4_0A000000_3",
				"chain left over: SERVICE_PROXY_B4_0A200000_12"}},
		{"one that others hold, with rules", []string{":SERVICE_PROXY_B4_0A200000_12 - [0:0]", "-A SERVICE_PROXY_B4_0A200000_12 -j LOG", ":THEIRS - [0:0]", "-A THEIRS -j SERVICE_PROXY_B4_0A200000_12"},
			[]string{"chain left over: SERVICE_PROXY_B4_0A200000_12"}},
		{"one that others hold, empty", []string{":SERVICE_PROXY_B4_0A200000_12 - [0:0]", ":THEIRS - [0:0]", "-A THEIRS -j SERVICE_PROXY_B4_0A200000_12"}, nil},
		{"a chain that is not ours", []string{":SERVICE_PROXY_OUTPUT2 - [0:0]", "-A SERVICE_PROXY_OUTPUT2 -j DROP"}, nil},
		{"iptables -F", slices.Concat([]string{"-D OUTPUT " + jumpDNS, "-D OUTPUT " + jumpOutput, "-D PREROUTING " + jumpInbound}, func() (flush []string) {
			for _, name := range want.Chains() {
				flush = append(flush, ":"+name+" - [0:0]")
			}
			return flush
		}()), []string{"table flushed: nat"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			have := changed(t, want, test.lines...)
			var drift []string
			for _, d := range Diff(want, have) {
				drift = append(drift, d.String())
			}
			if !slices.Equal(drift, test.drift) {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(drift, "\n"), strings.Join(test.drift, "\n"))
			}
			if err := checkPlan(want, have); err != nil {
				t.Error(err)
			}
		})
	}
}

// Nothing wanted and nothing there is no drift; nothing wanted and something there is not a flush
// but what is left over.
func TestDiffOfNothing(t *testing.T) {
	nothing := Ruleset{family: IPv4}
	if drift := Diff(nothing, Table{family: IPv4}); len(drift) > 0 {
		t.Errorf("of nothing: %v", drift)
	}
	if drift := Diff(sample(IPv4).Ruleset(), Table{family: IPv4}); len(drift) != 1 ||
		drift[0].Kind != TableFlushed {
		t.Errorf("of a table that nobody has used: %v", drift)
	}
	held := Interception{Family: IPv4, ProxyUID: 999, ProxyGID: 999, OutboundPort: 15001}.Ruleset()
	drift := Diff(nothing, changed(t, held, "-A OUTPUT -j SERVICE_PROXY_REDIRECT"))
	var kinds []DriftKind
	for _, d := range drift {
		kinds = append(kinds, d.Kind)
	}
	if want := []DriftKind{JumpLeft, ChainLeft, ChainLeft, ChainLeft, ChainLeft}; !slices.Equal(
		kinds, want) {
		t.Errorf("got %v", drift)
	}
}

func TestDriftKindsHaveWords(t *testing.T) {
	seen := map[string]bool{}
	for k := RuleRemoved; k <= JumpLeft; k++ {
		word := k.String()
		if word == "" || strings.Contains(word, "DriftKind") || seen[word] {
			t.Errorf("kind %d is %q", k, word)
		}
		seen[word] = true
	}
	if DriftKind(0).String() != "DriftKind(0)" || (JumpLeft+1).String() != "DriftKind(15)" {
		t.Error("a kind that there is not has a word")
	}
}
