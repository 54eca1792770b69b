package iptables

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/service-proxy-agent/service-proxy-agent/iptables/iptablestest"
)

// restored is what iptables-restore --noflush makes of a table: all of the payload, or an error and nothing of it.
func restored(have Table, payload string) (Table, error) {
	nat := iptablestest.New(have.chains)
	if payload != "" {
		if err := nat.Restore(payload, nil); err != nil {
			return Table{}, err
		}
	}
	return Table{family: have.family, chains: nat.Chains()}, nil
}

// checkPlan applies the plan for want to have and says what is wrong with it.
func checkPlan(want Ruleset, have Table) error {
	plan, drift := NewPlan(want, have), Diff(want, have)
	if plan.Empty() != (len(drift) == 0) {
		return fmt.Errorf("drift %v, but the plan is %q", drift, plan)
	}
	after, err := restored(have, plan.String())
	if err != nil {
		return fmt.Errorf("%w in\n%s", err, plan)
	}
	if left := Diff(want, after); len(left) > 0 {
		return fmt.Errorf("after\n%s\nthere is still %v", plan, left)
	}
	if again := NewPlan(want, after); !again.Empty() {
		return fmt.Errorf("after\n%s\nthere is still to do\n%s", plan, again)
	}
	for name, rules := range have.chains {
		if isOurs(name) {
			continue
		}
		foreign := func(specs []string) []string {
			if !isJumpSite(name) {
				return specs
			}
			return slices.DeleteFunc(slices.Clone(specs), func(s string) bool { return isOurs(target(s)) })
		}
		if !slices.Equal(foreign(rules), foreign(after.chains[name])) {
			return fmt.Errorf("the plan\n%s\nmade of the foreign chain %s %q:\n%q", plan, name, rules, after.chains[name])
		}
	}
	for _, line := range plan.lines {
		words := strings.Fields(line)
		name := strings.TrimPrefix(words[0], ":")
		if name == words[0] {
			name = words[1]
		}
		if !isOurs(name) && !(isJumpSite(name) && (words[0] == "-I" || words[0] == "-D")) {
			return fmt.Errorf("the plan names a chain that is not ours: %q", line)
		}
	}
	return nil
}

func TestPlanLeadsFromAnyRulesetToAny(t *testing.T) {
	rulesets := map[string]Ruleset{"empty": {family: IPv4}}
	for name, i := range interceptions() {
		i.Family = IPv4
		rulesets[name] = i.Ruleset()
	}
	foreign, err := filepath.Glob("testdata/foreign/*.save")
	if err != nil || len(foreign) == 0 {
		t.Fatal(foreign, err)
	}
	n := 0
	for from, have := range rulesets {
		for to, want := range rulesets {
			n++
			for _, file := range []string{foreign[n%len(foreign)]} {
				text, err := os.ReadFile(file)
				if err != nil {
					t.Fatal(err)
				}
				table, err := Parse(IPv4, text)
				if err != nil {
					t.Fatal(err)
				}
				table, err = restored(table, NewPlan(have, table).String())
				if err != nil {
					t.Fatal(err)
				}
				if err := checkPlan(want, table); err != nil {
					t.Errorf("from %s to %s beside %s: %v", from, to, file, err)
				}
			}
		}
	}
}

func TestPlanText(t *testing.T) {
	want := serviceSet(IPv4, prefixes("10.0.0.1/32", "10.0.0.3/32"))
	table, err := Parse(IPv4, []byte(want.String()))
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name string
		want Ruleset
		have func(Table) Table
		plan string
	}{
		{"nothing to do", want, func(t Table) Table { return t }, ""},
		{"one service more at the end", serviceSet(IPv4, prefixes("10.0.0.1/32", "10.0.0.3/32", "10.0.0.4/32")), func(t Table) Table { return t },
			"-A SERVICE_PROXY_SERVICE_CIDRS -d 10.0.0.4/32 -j SERVICE_PROXY_REDIRECT\n"},
		{"one service more in between", serviceSet(IPv4, prefixes("10.0.0.1/32", "10.0.0.2/32", "10.0.0.3/32")), func(t Table) Table { return t },
			"-I SERVICE_PROXY_SERVICE_CIDRS 2 -d 10.0.0.2/32 -j SERVICE_PROXY_REDIRECT\n"},
		{"one service less", serviceSet(IPv4, prefixes("10.0.0.3/32")), func(t Table) Table { return t },
			":SERVICE_PROXY_SERVICE_CIDRS - [0:0]\n-A SERVICE_PROXY_SERVICE_CIDRS -d 10.0.0.3/32 -j SERVICE_PROXY_REDIRECT\n"},
		{"jump removed", want, func(t Table) Table { return t.with(map[string][]string{"OUTPUT": {"-j DOCKER"}}, nil) },
			"-I OUTPUT 1 -p tcp -j SERVICE_PROXY_OUTPUT\n"},
		{"jump doubled", want, func(t Table) Table {
			return t.with(map[string][]string{"OUTPUT": {jumpOutput, "-j DOCKER", jumpOutput}}, nil)
		},
			"-D OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT\n-D OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT\n-I OUTPUT 1 -p tcp -j SERVICE_PROXY_OUTPUT\n"},
		{"a chain of ours that another's rule leads to", Ruleset{family: IPv4}, func(Table) Table {
			return Table{family: IPv4, chains: map[string][]string{"FOREIGN": {"-j SERVICE_PROXY_REDIRECT"}, "SERVICE_PROXY_REDIRECT": {"-p tcp -j REDIRECT --to-ports 1"}, "SERVICE_PROXY_DNS": nil}}
		}, ":SERVICE_PROXY_DNS - [0:0]\n:SERVICE_PROXY_REDIRECT - [0:0]\n-X SERVICE_PROXY_DNS\n"},
	}
	for _, test := range tests {
		got := strings.TrimSuffix(strings.TrimPrefix(NewPlan(test.want, test.have(table)).String(), "*nat\n"), "COMMIT\n")
		if got != test.plan {
			t.Errorf("%s: got\n%s\nwant\n%s", test.name, got, test.plan)
		}
	}
}

// seeds are saves as iptables printed them, foreign ones, and pieces of them.
func seeds(f *testing.F) {
	for _, pattern := range []string{"testdata/foreign/*.save", "testdata/golden/*-ipv4.save", "testdata/real/*.save"} {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			f.Fatal(pattern, files, err)
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(text)
			f.Add(text[:len(text)/2])
		}
	}
	f.Add([]byte("*nat\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -m addrtype [unsupported revision] -j SERVICE_PROXY_OUTPUT\n-A\n:\n-A  x\n-A OUTPUT -j\nCOMMIT\n"))
	f.Add([]byte("*nat\n-A FOREIGN -j SERVICE_PROXY_DNS\n:SERVICE_PROXY_DNS -\n-A POSTROUTING -g SERVICE_PROXY_INBOUND\n-A SERVICE_PROXY_INBOUND -j SERVICE_PROXY_DNS\nCOMMIT\n"))
}

func FuzzParse(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, save []byte) {
		table, err := Parse(IPv4, save)
		if err != nil {
			return
		}
		ours := table.Ours()
		again, err := Parse(IPv4, []byte(ours.String()))
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range ours.chains {
			if !slices.Equal(again.chains[c.name], c.rules) {
				t.Errorf("%s: %q was read back as %q", c.name, c.rules, again.chains[c.name])
			}
		}
		for name, rules := range table.chains {
			for _, spec := range rules {
				parseRule(spec)
			}
			_ = name
		}
		for _, hook := range []Hook{Output, Prerouting} {
			table.Walk(Packet{Hook: hook, Proto: TCP, Syn: true})
		}
	})
}

func FuzzPlan(f *testing.F) {
	seeds(f)
	wanted := []Ruleset{sampleRuleset(), {family: IPv4}, serviceSet(IPv4, randomPrefixes(IPv4, 300, 1))}
	f.Fuzz(func(t *testing.T, save []byte) {
		table, err := Parse(IPv4, save)
		if err != nil {
			return
		}
		for _, want := range wanted {
			if err := checkPlan(want, table); err != nil {
				t.Error(err)
			}
		}
	})
}

func sampleRuleset() Ruleset {
	i := interceptions()["dns"]
	i.Family = IPv4
	return i.Ruleset()
}
