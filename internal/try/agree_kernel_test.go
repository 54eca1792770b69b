//go:build kernel

package try

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/service-proxy-agent/service-proxy-agent/internal/conntrack"
	"github.com/service-proxy-agent/service-proxy-agent/internal/explain"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

const proxyUID, proxyGID, resolverUID = 1999, 1998, 101

var (
	uids = []uint32{1000, 1000, 1000, 1001, 0, resolverUID, proxyUID}
	gids = []uint32{1000, 1000, 1000, 1001, 0, proxyGID}
)

// TestTheRulesTellWhatHappens makes real connections through random configurations, beside other
// programs' rules, from this machine by Connect and from its neighbours. What Table.Walk says of
// each, as explain does, and what its conntrack entry tells must be the same.
func TestTheRulesTellWhatHappens(t *testing.T) {
	configurations, connections := 4, 10 // of each hook
	if soak() {
		configurations, connections = 150, 20
	}
	for _, backend := range []string{iptables.NFT, iptables.Legacy} {
		t.Run(backend, func(t *testing.T) {
			for _, family := range []iptables.Family{iptables.IPv4, iptables.IPv6} {
				t.Run(family.String(), func(t *testing.T) {
					if elsewhere(t) {
						return
					}
					t.Parallel()
					if !inNetns(t) {
						return
					}
					a := &agreement{scene: newScene(t, family), backend: backend, seed: newSeed(t),
						count: map[string]int{}}
					kernel, err := iptables.Open(t.Context(), iptables.Options{Backend: backend})
					if err != nil {
						t.Fatal(err)
					}
					a.kernel = kernel
					a.unknown = a.taken(unknownMatches)
					for _, hook := range []iptables.Hook{iptables.Output, iptables.Prerouting} {
						r := rand.New(rand.NewPCG(a.seed, uint64(hook)))
						for n := range configurations {
							a.configuration(r, hook, fmt.Sprintf("hook %d, configuration %d", hook, n), connections)
						}
					}
					a.judge(configurations * connections)
				})
			}
		})
	}
}

// agreement compares, in one network namespace.
type agreement struct {
	*scene
	backend string
	kernel  *iptables.Kernel
	seed    uint64
	unknown []string
	count   map[string]int
}

// judge looks whether what was made at random was of the kind that can show something.
func (a *agreement) judge(each int) {
	a.t.Logf("seed %d: %v", a.seed, a.count)
	few, some := 1, 1
	if soak() {
		few, some = each/50, each/6
	}
	for what, n := range map[string]int{"agree": each, "redirect": some, "pass": some, "here": some,
		"itself": some, "connected": some, "refused": few, "taken": few, "only tried": few,
		"elsewhere": few, "no answer": few} {
		if a.count[what] < n && (soak() || n > few || what == "redirect" || what == "pass") {
			a.t.Errorf("seed %d: %q %d times, want %d at least: %v", a.seed, what, a.count[what], n, a.count)
		}
	}
	if n := a.count["only rules"]; n > each/10 {
		a.t.Errorf("seed %d: of %d connections nothing could be told", a.seed, n)
	}
}

// configuration puts one random configuration in, by the program's own code, and connects through
// it.
func (a *agreement) configuration(r *rand.Rand, hook iptables.Hook, name string, connections int) {
	t := a.t
	t.Helper()
	i := a.interception(r)
	want := i.Ruleset()
	a.restore(a.backend, []string{":FOREIGN_A - [0:0]", ":FOREIGN_B - [0:0]", "-F OUTPUT",
		"-F PREROUTING"})
	if _, err := a.kernel.Apply(t.Context(), iptables.NewPlan(want, a.read())); err != nil {
		t.Fatalf("seed %d, %s: %v\n%s", a.seed, name, err, want)
	}
	others := a.others(r, hook)
	a.restore(a.backend, others.lines)
	table := a.read()
	for range connections {
		p := a.packet(r, hook, i)
		verdict := table.Walk(p)
		outcome := a.send(p)
		if err := a.witness(outcome); err != nil {
			t.Fatalf("seed %d, %s: %+v: %v: %v", a.seed, name, p, outcome, err)
		}
		c := Compare(verdict, outcome)
		fail := func(what string) {
			t.Fatalf("seed %d, %s: packet %+v: %s\n%s (%s)\n%s (%v)\n%s", a.seed, name, p, what, c.Rules,
				verdict.Action, c.Tried, outcome.Err, a.text(table, nil))
		}
		a.count[c.Agreement.String()]++
		a.count[verdict.Action.String()]++
		a.count[outcome.Answer.String()]++
		a.count[[]string{"unseen", "itself", "here", "elsewhere"}[outcome.Led]]++
		switch c.Agreement {
		case Differ:
			fail("they differ")
		case OnlyRules: // a DNAT from 127.0.0.1 to elsewhere goes nowhere, and conntrack never has it
			if outcome.Answer != Silent && tracked(a.text(table, nil)) {
				fail("it was answered, and nothing could be told")
			}
		case OnlyTried:
			if !strings.Contains(verdict.Rule, unknownComment) {
				fail("the rule that is not known is one that is")
			}
			if !a.oneWay(table, others, p, outcome) {
				fail("neither with nor without the rules that are not known")
			}
		}
		if what := explained(p, verdict, outcome, c, explain.Seen{Source: p.Src.Addr(), Local: p.DstLocal,
			Have: table, Want: want, Asked: i, Known: true, Configured: true}); what != "" {
			fail(what)
		}
	}
	// A connection that nobody answers keeps its way for two minutes.
	all := []netip.Prefix{netip.PrefixFrom(a.nobody, 0).Masked()}
	if _, err := conntrack.DeleteHalfOpen(t.Context(), all); err != nil {
		t.Fatal(err)
	}
}

// tracked says whether a table has the kernel track connections: only a target that needs it does.
// Without one a connection that is refused has no entry, though earlier ones still have theirs.
func tracked(rules string) bool {
	for _, target := range []string{"-j REDIRECT", "-j DNAT", "-j CONNMARK"} {
		if strings.Contains(rules, target) {
			return true
		}
	}
	return false
}

// explained says what is wrong with the answers of explain to a connection whose outcome is known;
// "": nothing. Of an inbound one explain is not told the source.
func explained(p iptables.Packet, v iptables.Verdict, o Outcome, c Comparison,
	s explain.Seen) string {
	if o.Led == Unseen {
		return ""
	}
	is := explain.NotIntercepted
	if port := o.Port(); port == outboundPort || port == inboundPort || port == dnsPort {
		is = explain.Intercepted
	}
	q := explain.Question{To: p.Dst, UID: p.UID, GID: p.GID, Inbound: p.Hook == iptables.Prerouting,
		In: p.InInterface}
	answer := explain.Explain(q, s)
	unsure := v.Action == iptables.CannotTell ||
		q.Inbound && s.Have.Walk(q.Packet(s)).Action == iptables.CannotTell
	if answer.Verdict != is && (answer.Verdict != explain.Unknown || !unsure) {
		return fmt.Sprintf("explain says it is %s: %s", answer.Verdict, answer.Why)
	}
	if q.Inbound {
		return "" // which --try refuses
	}
	s.Tried = &explain.Tried{Agreement: explain.Agreement(c.Agreement.String()), Rules: c.Rules,
		Kernel: c.Tried, Port: o.Port()}
	if answer = explain.Explain(q, s); answer.Verdict != is {
		return fmt.Sprintf("explain --try says it is %s: %s", answer.Verdict, answer.Why)
	}
	return ""
}

func (a *agreement) read() iptables.Table {
	a.t.Helper()
	table, err := a.kernel.Read(a.t.Context(), a.family)
	if err != nil {
		a.t.Fatal(err)
	}
	return table
}

// text is the table as a save has it; of others' rules with an unknown match, those in twins are
// what stands there instead: a rule without it, or none.
func (a *agreement) text(table iptables.Table, twins map[string]string) string {
	var b strings.Builder
	b.WriteString("*nat\n")
	chains := slices.Concat([]string{"PREROUTING", "OUTPUT", "FOREIGN_A", "FOREIGN_B"},
		table.Ours().Chains())
	for _, chain := range chains {
		fmt.Fprintf(&b, ":%s - [0:0]\n", chain)
	}
	for _, chain := range chains {
		for _, rule := range table.Rules(chain) {
			for comment, twin := range twins {
				if strings.Contains(rule, comment) {
					rule = twin
				}
			}
			if rule != "" {
				fmt.Fprintf(&b, "-A %s %s\n", chain, rule)
			}
		}
	}
	b.WriteString("COMMIT\n")
	return b.String()
}

// oneWay says whether the outcome is what the table says if each rule with an unknown match either
// matches or does not.
func (a *agreement) oneWay(table iptables.Table, o others, p iptables.Packet,
	outcome Outcome) bool {
	comments := make([]string, 0, len(o.twins))
	for comment := range o.twins {
		comments = append(comments, comment)
	}
	for which := range 1 << len(comments) {
		twins := map[string]string{}
		for i, comment := range comments {
			twins[comment] = ""
			if which>>i&1 == 1 {
				twins[comment] = o.twins[comment]
			}
		}
		variant, err := iptables.Parse(a.family, []byte(a.text(table, twins)))
		if err != nil {
			a.t.Fatal(err)
		}
		if Compare(variant.Walk(p), outcome).Agreement != Differ {
			return true
		}
	}
	return false
}

// interception is a random one.
func (a *agreement) interception(r *rand.Rand) iptables.Interception {
	i := iptables.Interception{Family: a.family, ProxyUID: proxyUID, ProxyGID: proxyGID,
		Jumps: r.IntN(12) > 0, Settling: r.IntN(4) == 0}
	port := func() uint16 { return pick(r, openPorts) }
	if r.IntN(8) > 0 {
		i.OutboundPort = outboundPort
		i.All = r.IntN(4) == 0
		i.Services = a.prefixes(r, 1+r.IntN(10))
		if r.IntN(3) == 0 { // so many that they get buckets
			for range 257 + r.IntN(400) {
				b := pick(r, a.remote).As16()
				b[13], b[14], b[15] = byte(r.Uint32()), byte(r.Uint32()), byte(r.Uint32())
				addr := netip.AddrFrom16(b).Unmap()
				i.Services = append(i.Services, netip.PrefixFrom(addr, addr.BitLen()))
			}
		}
		for range r.IntN(3) {
			i.ServicePorts = append(i.ServicePorts, port())
		}
		i.ExcludePrefixes = a.prefixes(r, r.IntN(3))
		for range r.IntN(2) {
			i.ExcludePorts = append(i.ExcludePorts, iptables.PortRange{First: port(), Last: port()})
		}
		i.Interfaces = [][]string{nil, {"docker0"}, {"docker+"}, {"eth+"}, {"br-+", "docker0"}}[r.IntN(5)]
	}
	if r.IntN(3) == 0 {
		i.DNSPort, i.DNSOverTCP = dnsPort, r.IntN(3) > 0
		if r.IntN(2) == 0 {
			i.ResolverUIDs = []uint32{resolverUID}
		}
	}
	if r.IntN(4) > 0 {
		i.InboundPort = inboundPort
		for range 1 + r.IntN(5) {
			s := iptables.Serving{Port: pick(r, append(slices.Clone(openPorts), closedPort))}
			if r.IntN(2) == 0 {
				s.Addr = pick(r, append(slices.Clone(a.local), a.routed.Addr().Next()))
			}
			i.Serving = append(i.Serving, s)
		}
	}
	return i
}

// prefixes are around addresses of the scene, of any length but more often of long ones.
func (a *agreement) prefixes(r *rand.Rand, n int) (all []netip.Prefix) {
	addresses := slices.Concat(a.remote, a.local, []netip.Addr{a.nobody, a.routed.Addr().Next()})
	for range n {
		addr := pick(r, addresses)
		bits := addr.BitLen() - []int{0, 0, 0, 1, 2, 8, 16, r.IntN(addr.BitLen() + 1)}[r.IntN(8)]
		all = append(all, netip.PrefixFrom(addr, bits).Masked())
	}
	return all
}
