package iptables

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/iptables/iptablestest"
)

// text is lines as the command prints them, but for what makes them safe to print.
func text(lines []Line) string {
	var b strings.Builder
	for _, l := range lines {
		fmt.Fprintf(&b, "%c %s", l.Mark, l.Text)
		if l.Note != "" {
			fmt.Fprintf(&b, "  # %s", l.Note)
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// Each way in which a table differs, as a person reads it.
func TestLines(t *testing.T) {
	const (
		cidrs  = "SERVICE_PROXY_SERVICE_CIDRS"
		first  = "-d 10.1.2.3/32 -j SERVICE_PROXY_REDIRECT"
		second = "-d 10.1.2.4/32 -j SERVICE_PROXY_REDIRECT"
		third  = "-d 10.9.0.0/24 -j SERVICE_PROXY_REDIRECT"
		dnat   = "-d 192.0.2.9/32 -p tcp -j DNAT --to-destination 192.0.2.8:80"
	)
	want := sample(IPv4).Ruleset()
	refill := func(specs ...string) []string {
		lines := []string{":" + cidrs + " - [0:0]"}
		for _, spec := range specs {
			lines = append(lines, "-A "+cidrs+" "+spec)
		}
		return lines
	}
	inCIDRs := func(lines ...string) []string {
		return slices.Concat([]string{"  *nat", "  :" + cidrs}, lines)
	}
	inOutput := func(lines ...string) []string {
		return slices.Concat([]string{"  *nat", "  :OUTPUT"}, lines)
	}
	there, moved, doubled := "  # "+NoteThere, "  # "+NoteMoved, "  # "+NoteDoubled
	for _, test := range []struct {
		name  string
		lines []string
		want  []string
	}{
		{"nothing", nil, nil},
		{"a rule removed", []string{"-D " + cidrs + " " + second}, inCIDRs("- -A " + cidrs + " " + second)},
		{"a chain flushed", refill(), inCIDRs(
			"- -A "+cidrs+" "+first, "- -A "+cidrs+" "+second, "- -A "+cidrs+" "+third)},
		{"a foreign rule first", []string{"-I " + cidrs + " 1 -p tcp -j ACCEPT"},
			inCIDRs("+ -A " + cidrs + " -p tcp -j ACCEPT")},
		{"a rule changed", refill(first, "-d 10.1.2.4/32 -j RETURN", third),
			inCIDRs("- -A "+cidrs+" "+second, "+ -A "+cidrs+" -d 10.1.2.4/32 -j RETURN")},
		{"a rule of ours doubled", []string{"-A " + cidrs + " " + first},
			inCIDRs("+ -A " + cidrs + " " + first + doubled)},
		{"the first moved to the end", refill(second, third, first),
			inCIDRs("- -A "+cidrs+" "+first+there, "+ -A "+cidrs+" "+first+moved)},
		{"the last moved to the start", refill(third, first, second),
			inCIDRs("+ -A "+cidrs+" "+third+moved, "- -A "+cidrs+" "+third+there)},
		{"a chain removed", []string{"-D SERVICE_PROXY_OUTPUT -j SERVICE_PROXY_SERVICE_PORTS",
			":SERVICE_PROXY_SERVICE_PORTS - [0:0]", "-X SERVICE_PROXY_SERVICE_PORTS"}, []string{
			"  *nat", "  :SERVICE_PROXY_OUTPUT",
			"- -A SERVICE_PROXY_OUTPUT -j SERVICE_PROXY_SERVICE_PORTS",
			"- :SERVICE_PROXY_SERVICE_PORTS",
			"- -A SERVICE_PROXY_SERVICE_PORTS -p tcp -m tcp --dport 81 -j SERVICE_PROXY_REDIRECT",
			"- -A SERVICE_PROXY_SERVICE_PORTS -p tcp -m tcp --dport 8080 -j SERVICE_PROXY_REDIRECT"}},
		{"a jump removed", []string{"-D OUTPUT " + jumpDNS}, inOutput("- -A OUTPUT " + jumpDNS)},
		{"a jump doubled", []string{"-A OUTPUT " + jumpDNS}, inOutput("+ -A OUTPUT " + jumpDNS + doubled)},
		{"a jump doubled behind another's", []string{"-A OUTPUT -j LOG", "-A OUTPUT " + jumpDNS},
			inOutput("  -A OUTPUT -j LOG", "+ -A OUTPUT "+jumpDNS+doubled)},
		{"a jump changed", []string{"-D OUTPUT " + jumpOutput, "-I OUTPUT 1 -j SERVICE_PROXY_OUTPUT"},
			inOutput("- -A OUTPUT "+jumpOutput, "+ -A OUTPUT -j SERVICE_PROXY_OUTPUT")},
		{"a rule before them that takes", []string{"-I OUTPUT 1 " + dnat}, inOutput(
			"- -A OUTPUT "+jumpOutput+there, "- -A OUTPUT "+jumpDNS+there,
			"! -A OUTPUT "+dnat+"  # "+NoteBefore,
			"+ -A OUTPUT "+jumpOutput+moved, "+ -A OUTPUT "+jumpDNS+moved)},
		{"a harmless rule between them", []string{"-I OUTPUT 2 -j LOG"}, inOutput(
			"- -A OUTPUT "+jumpDNS+there, "  -A OUTPUT -j LOG", "+ -A OUTPUT "+jumpDNS+moved)},
		{"a rule behind them", []string{"-A OUTPUT " + dnat}, nil},
		{"Istio's behind them", []string{":ISTIO_OUTPUT - [0:0]", "-A ISTIO_OUTPUT -j RETURN",
			"-A OUTPUT -p tcp -j ISTIO_OUTPUT"}, []string{
			"  *nat", "  :OUTPUT", "! -A OUTPUT -p tcp -j ISTIO_OUTPUT  # " + NoteIstio,
			"! :ISTIO_OUTPUT  # " + NoteIstio}},
		{"another agent's", []string{":SERVICE_PROXY_OUTPUT2 - [0:0]"},
			[]string{"  *nat", "! :SERVICE_PROXY_OUTPUT2  # " + NoteSecond}},
		{"a rule that leads to ours", []string{":THEIRS - [0:0]", "-A THEIRS -j LOG",
			"-A THEIRS -j SERVICE_PROXY_REDIRECT"}, []string{
			"  *nat", "  :THEIRS", "! -A THEIRS -j SERVICE_PROXY_REDIRECT  # " + NoteLeads}},
		{"a chain left over", []string{":SERVICE_PROXY_B4_0A200000_12 - [0:0]",
			"-A SERVICE_PROXY_B4_0A200000_12 -j LOG"}, []string{"  *nat",
			"+ :SERVICE_PROXY_B4_0A200000_12", "+ -A SERVICE_PROXY_B4_0A200000_12 -j LOG"}},
		{"one that others hold", []string{":SERVICE_PROXY_B4_0A200000_12 - [0:0]",
			"-A SERVICE_PROXY_B4_0A200000_12 -j LOG", ":THEIRS - [0:0]",
			"-A THEIRS -j SERVICE_PROXY_B4_0A200000_12"}, []string{"  *nat",
			"  :SERVICE_PROXY_B4_0A200000_12", "+ -A SERVICE_PROXY_B4_0A200000_12 -j LOG",
			"  :THEIRS", "! -A THEIRS -j SERVICE_PROXY_B4_0A200000_12  # " + NoteLeads}},
	} {
		t.Run(test.name, func(t *testing.T) {
			have := changed(t, want, test.lines...)
			is, should := text(Lines(want, have)), ""
			if len(test.want) > 0 {
				should = strings.Join(test.want, "\n") + "\n"
			}
			if is != should {
				t.Errorf("got\n%s\nwant\n%s", is, should)
			}
			agreesWithDiff(t, want, have)
		})
	}
}

// agreesWithDiff: nothing is absent or unwanted exactly when there is nothing to write.
func agreesWithDiff(t *testing.T, want Ruleset, have Table) {
	t.Helper()
	lines := Lines(want, have)
	differ := slices.ContainsFunc(lines, func(l Line) bool {
		return l.Mark == Absent || l.Mark == Unwanted
	})
	if drift := Diff(want, have); differ != (len(drift) > 0) {
		t.Errorf("drift %v, but\n%s", drift, text(lines))
	}
	if differ {
		return
	}
	if plan := NewPlan(want, have); !plan.Empty() {
		t.Errorf("no difference, but a plan\n%s", plan)
	}
}

// TestLinesOfRandomTables holds Lines against Diff, and plays the lines: have without what is
// unwanted and with what is absent must be what is wanted, in each chain.
func TestLinesOfRandomTables(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	all := interceptions()
	var names []string
	for name := range all {
		names = append(names, name)
	}
	slices.Sort(names)
	for range 2000 {
		i := all[names[random.IntN(len(names))]]
		i.Family = families[random.IntN(2)]
		if len(i.Services) > 20 { // the buckets take long
			i.Services = i.Services[:20]
		}
		want := i.Ruleset()
		nat := iptablestest.New(nil)
		if text := NewPlan(want, Table{family: i.Family}).String(); text != "" {
			if err := nat.Restore(text, nil); err != nil {
				t.Fatal(err)
			}
		}
		have := Table{family: i.Family, chains: nat.Chains()}
		for range random.IntN(5) {
			damage(random, have)
		}
		agreesWithDiff(t, want, have)
		for _, c := range want.chains {
			var kept []string
			rules := slices.Clone(have.chains[c.name])
			for _, l := range ruleLines(c.name, c.rules, rules) {
				spec := strings.TrimPrefix(l.Text, "-A "+c.name+" ")
				if l.Mark == Unwanted {
					at := slices.Index(rules, spec)
					rules = slices.Delete(rules, at, at+1)
				} else {
					kept = append(kept, spec)
				}
			}
			kept = append(kept, rules...)
			wanted := slices.Sorted(slices.Values(c.rules))
			if slices.Sort(kept); !slices.Equal(kept, wanted) {
				t.Fatalf("%s: the lines lead to\n%q\nwant\n%q", c.name, kept, wanted)
			}
		}
	}
}

// damage does one thing to a random chain.
func damage(random *rand.Rand, have Table) {
	var names []string
	for name := range have.chains {
		names = append(names, name)
	}
	slices.Sort(names)
	if len(names) == 0 {
		return
	}
	name := names[random.IntN(len(names))]
	rules := slices.Clone(have.chains[name])
	at := random.IntN(len(rules) + 1)
	switch random.IntN(6) {
	case 0:
		random.Shuffle(len(rules), func(i, j int) { rules[i], rules[j] = rules[j], rules[i] })
	case 1:
		rules = slices.Insert(rules, at, []string{"-j LOG", "-p tcp -j ACCEPT", jumpOutput, jumpDNS,
			"-j SERVICE_PROXY_REDIRECT", "-j THEIRS"}[random.IntN(6)])
	case 2:
		if at < len(rules) {
			rules = slices.Delete(rules, at, at+1)
		}
	case 3:
		if at < len(rules) {
			rules = append(rules, rules[at])
		}
	case 4:
		delete(have.chains, name)
		return
	case 5:
		name, rules = []string{"THEIRS", "SERVICE_PROXY_B4_0A200000_12", "SERVICE_PROXY_DNS"}[random.IntN(3)],
			[]string{"-j SERVICE_PROXY_REDIRECT"}[:random.IntN(2)]
	}
	have.chains[name] = rules
}

// TestChanges: what another attribute would change, in the marks of the difference.
func TestChanges(t *testing.T) {
	now, other := sample(IPv4), sample(IPv4)
	other.ExcludePrefixes = append(prefixes("10.99.0.0/16"), other.ExcludePrefixes...)
	other.DNSPort = 0
	is := text(Changes(now.Ruleset(), other.Ruleset()))
	for _, line := range []string{
		"+ -A SERVICE_PROXY_OUTPUT -d 10.99.0.0/16 -m comment --comment excluded -j RETURN\n",
		"- -A OUTPUT " + jumpDNS + "\n", "- :SERVICE_PROXY_DNS\n",
	} {
		if !strings.Contains(is, line) {
			t.Errorf("no %q in\n%s", line, is)
		}
	}
	if lines := Changes(now.Ruleset(), now.Ruleset()); len(lines) > 0 {
		t.Errorf("the same changes\n%s", text(lines))
	}
}

// TestLinesOfManyServices: 10,000 rows in any order are compared in a moment.
func TestLinesOfManyServices(t *testing.T) {
	want := make([]string, 10000)
	for i := range want {
		want[i] = fmt.Sprintf("-d 10.%d.%d.1/32 -j SERVICE_PROXY_REDIRECT", i/256, i%256)
	}
	have := slices.Clone(want)
	random := rand.New(rand.NewPCG(1, 2))
	random.Shuffle(len(have), func(i, j int) { have[i], have[j] = have[j], have[i] })
	began := time.Now()
	lines := ruleLines("SERVICE_PROXY_SERVICE_CIDRS", want, have)
	if took := time.Since(began); took > 2*time.Second { // some 10 ms
		t.Errorf("took %v", took)
	}
	// A random order of n keeps some 2*sqrt(n).
	if len(lines) > 2*(len(want)-150) || len(lines) < 2*(len(want)-250) {
		t.Errorf("%d lines", len(lines))
	}
}
