package iptables

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/service-proxy-agent/service-proxy-agent/iptables/iptablestest"
)

// restored is what iptables-restore --noflush makes of a table: all of the payload, or an
// error and nothing of it.
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
			return fmt.Errorf("the plan\n%s\nmade of the foreign chain %s %q:\n%q", plan, name, rules,
				after.chains[name])
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
			return Table{family: IPv4, chains: map[string][]string{"FOREIGN": {"-j SERVICE_PROXY_REDIRECT"},
				"SERVICE_PROXY_REDIRECT": {"-p tcp -j REDIRECT --to-ports 1"}, "SERVICE_PROXY_DNS": nil}}
		}, ":SERVICE_PROXY_DNS - [0:0]\n:SERVICE_PROXY_REDIRECT - [0:0]\n-X SERVICE_PROXY_DNS\n"},
	}
	many := func(n int) Ruleset { // n services, of which the first two are those of want
		services := prefixes("10.0.0.1/32", "10.0.0.3/32")
		for len(services) < n {
			services = append(
				services, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(2*len(services) + 1)}), 32))
		}
		return serviceSet(IPv4, services)
	}
	rows := func(n int) (text string) {
		for _, spec := range many(n).Rules(chainServiceCIDRs) {
			text += "-A SERVICE_PROXY_SERVICE_CIDRS " + spec + "\n"
		}
		return text
	}
	inserted := func(n int) (text string) { // all but the first two
		rules := many(n).Rules(chainServiceCIDRs)
		for i := 2; i < n-1; i++ {
			text += fmt.Sprintf("-I SERVICE_PROXY_SERVICE_CIDRS %d %s\n", i+1, rules[i])
		}
		return text + "-A SERVICE_PROXY_SERVICE_CIDRS " + rules[n-1] + "\n"
	}
	same := func(t Table) Table { return t }
	tests = append(tests, []struct {
		name string
		want Ruleset
		have func(Table) Table
		plan string
	}{
		{"as many services more as are inserted", many(10), same, inserted(10)},
		{"one more than that", many(11), same, ":SERVICE_PROXY_SERVICE_CIDRS - [0:0]\n" + rows(11)},
		{"one service more at the head", serviceSet(IPv4, prefixes("10.0.0.0/32", "10.0.0.1/32", "10.0.0.3/32")), same,
			"-I SERVICE_PROXY_SERVICE_CIDRS 1 -d 10.0.0.0/32 -j SERVICE_PROXY_REDIRECT\n"},
		{"at the head, in between and at the end", serviceSet(IPv4, prefixes("10.0.0.0/32", "10.0.0.1/32", "10.0.0.2/32", "10.0.0.3/32", "10.0.0.4/32")), same,
			"-I SERVICE_PROXY_SERVICE_CIDRS 1 -d 10.0.0.0/32 -j SERVICE_PROXY_REDIRECT\n-I SERVICE_PROXY_SERVICE_CIDRS 3 -d 10.0.0.2/32 -j SERVICE_PROXY_REDIRECT\n" +
				"-A SERVICE_PROXY_SERVICE_CIDRS -d 10.0.0.4/32 -j SERVICE_PROXY_REDIRECT\n"},
		{"a chain that is not there and wants no row", want, func(t Table) Table { return t.with(nil, []string{chainServicePorts}) },
			":SERVICE_PROXY_SERVICE_PORTS - [0:0]\n"},
		{"a jump behind others'", want, func(t Table) Table { return t.with(map[string][]string{"OUTPUT": {"-j DOCKER", jumpOutput}}, nil) },
			"-D OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT\n-I OUTPUT 1 -p tcp -j SERVICE_PROXY_OUTPUT\n"},
		{"a jump too many behind ours", want, func(t Table) Table {
			return t.with(map[string][]string{"OUTPUT": {jumpOutput, "-j DOCKER", jumpDNS}}, nil)
		}, "-D OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT\n-D OUTPUT " + jumpDNS +
			"\n-I OUTPUT 1 -p tcp -j SERVICE_PROXY_OUTPUT\n"},
		{"nothing any more", Ruleset{family: IPv4}, same,
			":SERVICE_PROXY_OUTPUT - [0:0]\n:SERVICE_PROXY_REDIRECT - [0:0]\n:SERVICE_PROXY_SERVICE_CIDRS - [0:0]\n:SERVICE_PROXY_SERVICE_PORTS - [0:0]\n" +
				"-D OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT\n-X SERVICE_PROXY_OUTPUT\n-X SERVICE_PROXY_REDIRECT\n-X SERVICE_PROXY_SERVICE_CIDRS\n-X SERVICE_PROXY_SERVICE_PORTS\n"},
	}...)
	for _, test := range tests {
		got := strings.TrimSuffix(
			strings.TrimPrefix(NewPlan(test.want, test.have(table)).String(), "*nat\n"), "COMMIT\n")
		if got != test.plan {
			t.Errorf("%s: got\n%s\nwant\n%s", test.name, got, test.plan)
		}
	}
}

// What a plan touches is read back after it, and nothing else: on nft by listing those chains.
func TestPlanNamesWhatItTouches(t *testing.T) {
	want := serviceSet(IPv4, prefixes("10.0.0.1/32"))
	more := serviceSet(IPv4, prefixes("10.0.0.1/32", "10.0.0.2/32"))
	for _, test := range []struct {
		name       string
		from, want Ruleset
		chains     []string
		lines      int
	}{
		{"nothing", want, want, nil, 0},
		{"a row more", want, more, []string{chainServiceCIDRs}, 1},
		{"a row less", more, want, []string{chainServiceCIDRs}, 2},
		{"the jumps out", want, want.WithoutJumps(), []string{builtinOutput}, 1},
		{"all out", want, Ruleset{family: IPv4}, []string{builtinOutput, chainOutput, chainRedirect, chainServiceCIDRs, chainServicePorts}, 9},
	} {
		plan := NewPlan(test.want, changed(t, test.from))
		if !slices.Equal(plan.Chains(), test.chains) || plan.Len() != test.lines ||
			plan.Empty() != (test.lines == 0) || plan.Family() != IPv4 {
			t.Errorf("%s: chains %q, %d lines, %s:\n%s", test.name, plan.Chains(), plan.Len(),
				plan.Family(), plan)
		}
	}
	// Where nothing is wanted, not even a family, it is that of what is there.
	if plan := NewPlan(Ruleset{}, changed(t, want)); plan.Family() != IPv4 || plan.Empty() {
		t.Errorf("nothing wanted: %s:\n%s", plan.Family(), plan)
	}
}

// On legacy many new chains are made before the plan that fills them. Nothing leads to them until
// it is done.
func TestNewChainsAreMadeFirst(t *testing.T) {
	few, many := serviceSet(IPv4, randomPrefixes(IPv4, 1000, 1)),
		serviceSet(IPv4, randomPrefixes(IPv4, 10000, 1))
	before := changed(t, few)
	chains := NewPlan(many, before).newChains()
	var want []string
	for _, name := range many.Chains() {
		if !before.Has(name) {
			want = append(want, ":"+name+" - [0:0]")
		}
	}
	if len(want) < manyChains || !slices.Equal(chains.lines, want) || chains.Family() != IPv4 {
		t.Errorf("%s:\n%s", chains.Family(), chains)
	}
	if chains := NewPlan(serviceSet(IPv4, nil),
		changed(t, serviceSet(IPv4, prefixes("10.0.0.1/32")))).newChains(); !chains.Empty() {
		t.Errorf("no new chains:\n%s", chains)
	}
	for f, backend := range map[Family]string{IPv4: Legacy, IPv6: NFT} {
		m := &iptablestest.Machine{Backend: backend}
		k := openInMemory(t, m)
		var payloads []string
		restores(m, f, func(_ int, payload string) (string, int) {
			payloads = append(payloads, payload)
			return "", 0
		})
		want := serviceSet(f, randomPrefixes(f, 10000, 1))
		result, err := k.Apply(t.Context(), NewPlan(want, Table{family: f}))
		if err != nil || len(result.Drift) > 0 || !holds(m, backend, f).Equal(want) {
			t.Fatalf("%s: %v %v", backend, err, result.Drift)
		}
		if first := strings.Contains(payloads[0], "\n-"); first != (backend == NFT) ||
			(len(payloads) == 1) != (backend == NFT) {
			t.Errorf("%s: %d restores, the first with rules: %v", backend, len(payloads), first)
		}
	}
}

// seeds are saves as iptables printed them, foreign ones, and pieces of them.
func seeds(f *testing.F) {
	for _, pattern := range []string{"testdata/foreign/*.save", "testdata/golden/*-ipv4.save",
		"testdata/real/*.save"} {
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
	f.Add(
		[]byte(
			"*nat\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -m addrtype [unsupported revision] -j SERVICE_PROXY_OUTPUT\n-A\n:\n-A  x\n-A OUTPUT -j\nCOMMIT\n"))
	f.Add(
		[]byte(
			"*nat\n-A FOREIGN -j SERVICE_PROXY_DNS\n:SERVICE_PROXY_DNS -\n-A POSTROUTING -g SERVICE_PROXY_INBOUND\n-A SERVICE_PROXY_INBOUND -j SERVICE_PROXY_DNS\nCOMMIT\n"))
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
	wanted := []Ruleset{
		sampleRuleset(), {family: IPv4}, serviceSet(IPv4, randomPrefixes(IPv4, 300, 1))}
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
