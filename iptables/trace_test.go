package iptables

import (
	"math/rand/v2"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestTrace(t *testing.T) {
	i := Interception{Family: IPv4, ProxyUID: 999, ProxyGID: 998, Jumps: true, OutboundPort: 15001,
		Services:        prefixes("10.0.0.1/32", "10.0.0.2/32"),
		ExcludePrefixes: prefixes("10.9.0.0/16")}
	table, err := Parse(IPv4, []byte(i.Ruleset().String()))
	if err != nil {
		t.Fatal(err)
	}
	table = table.with(map[string][]string{"OUTPUT": {"-d 192.0.2.1/32 -j DROP", "-j LOG",
		jumpOutput, "-m set --match-set x dst -j DOCKER"}, "DOCKER": {"-j DNAT --to-destination 1.2.3.4"}},
		nil)
	proxy := to("10.0.0.2:80")
	proxy.UID = 999
	for _, tt := range []struct {
		name   string
		packet Packet
		want   []Step
	}{
		{"a service", to("10.0.0.2:80"), []Step{
			{Chain: "OUTPUT", Index: 2, Rule: "-j LOG", Target: "LOG", Did: WentOn, Passed: 1},
			{Chain: "OUTPUT", Index: 3, Rule: jumpOutput, Target: chainOutput, Did: Jumped},
			{Chain: chainOutput, Index: 7, Rule: "-j " + chainServiceCIDRs, Target: chainServiceCIDRs,
				Did: Jumped, Passed: 6},
			{Chain: chainServiceCIDRs, Index: 2, Rule: "-d 10.0.0.2/32 -j " + chainRedirect,
				Target: chainRedirect, Did: Jumped, Passed: 1},
			{Chain: chainRedirect, Index: 1, Rule: "-p tcp -j REDIRECT --to-ports 15001",
				Target: "REDIRECT", Did: Redirected},
		}},
		{"the proxy's user", proxy, []Step{
			{Chain: "OUTPUT", Index: 2, Rule: "-j LOG", Target: "LOG", Did: WentOn, Passed: 1},
			{Chain: "OUTPUT", Index: 3, Rule: jumpOutput, Target: chainOutput, Did: Jumped},
			{Chain: chainOutput, Index: 1, Comment: "proxy-user", Target: "RETURN", Did: Returned,
				Rule: "-m owner --uid-owner 999 -m comment --comment proxy-user -j RETURN"},
			{Chain: "OUTPUT", Index: 4, Rule: "-m set --match-set x dst -j DOCKER", Target: "DOCKER",
				Did: Jumped, Perhaps: true},
			{Chain: "DOCKER", Index: 1, Rule: "-j DNAT --to-destination 1.2.3.4", Target: "DNAT",
				Did: Took},
		}},
		{"no service", to("10.0.0.3:80"), []Step{
			{Chain: "OUTPUT", Index: 2, Rule: "-j LOG", Target: "LOG", Did: WentOn, Passed: 1},
			{Chain: "OUTPUT", Index: 3, Rule: jumpOutput, Target: chainOutput, Did: Jumped},
			{Chain: chainOutput, Index: 7, Rule: "-j " + chainServiceCIDRs, Target: chainServiceCIDRs,
				Did: Jumped, Passed: 6},
			{Chain: chainServiceCIDRs, Did: Ended, Passed: 2},
			{Chain: chainOutput, Index: 8, Rule: "-j " + chainServicePorts, Target: chainServicePorts,
				Did: Jumped},
			{Chain: chainServicePorts, Did: Ended},
			{Chain: chainOutput, Did: Ended},
			{Chain: "OUTPUT", Index: 4, Rule: "-m set --match-set x dst -j DOCKER", Target: "DOCKER",
				Did: Jumped, Perhaps: true},
			{Chain: "DOCKER", Index: 1, Rule: "-j DNAT --to-destination 1.2.3.4", Target: "DNAT",
				Did: Took},
		}},
	} {
		steps, verdict := table.Trace(tt.packet)
		if !reflect.DeepEqual(steps, tt.want) {
			t.Errorf("%s: got\n%+v\nwant\n%+v", tt.name, steps, tt.want)
		}
		if walked := table.Walk(tt.packet); verdict != walked {
			t.Errorf("%s: Trace says %+v, Walk %+v", tt.name, verdict, walked)
		}
	}
}

// wayTo plays the kernel along a trace: it is what an adversary of the walker would say of its
// steps. It returns what the last of them comes to.
func wayTo(t *testing.T, table Table, p Packet, steps []Step) (last Step) {
	t.Helper()
	at := map[string]int{} // rules seen of each chain, since it was entered
	for n, s := range steps {
		rules := table.chains[s.Chain]
		from := at[s.Chain]
		if n > 0 && steps[n-1].Did == Jumped && steps[n-1].Target == s.Chain {
			from = 0 // entered anew
		}
		to := s.Index - 1
		switch s.Did {
		case NotRead:
			continue
		case Ended:
			to = len(rules)
		default:
			if rules[to] != s.Rule || parseRule(s.Rule).matches(p) == no {
				t.Fatalf("step %d %+v: rule %d of %q does not match", n, s, s.Index, rules)
			}
		}
		if to-from != s.Passed {
			t.Fatalf("step %d %+v: %d rules passed over since %d", n, s, to-from, from)
		}
		for _, spec := range rules[from:to] {
			if parseRule(spec).matches(p) != no {
				t.Fatalf("step %d %+v: passed over %q", n, s, spec)
			}
		}
		at[s.Chain] = s.Index
		last = s
	}
	return last
}

func TestTraceIsTheWalk(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	for _, f := range families {
		w := newWorld(f)
		r := rand.New(rand.NewPCG(seed, uint64(f)))
		redirected := 0
		for range 500 {
			table, err := Parse(f, []byte(w.interception(r).Ruleset().String()))
			if err != nil {
				t.Fatal(err)
			}
			table = table.with(othersRules(r, table), nil)
			for range 20 {
				p := w.packet(r, []Hook{Output, Prerouting}[r.IntN(2)])
				steps, verdict := table.Trace(p)
				if walked := table.Walk(p); verdict != walked {
					t.Fatalf("seed %d: Trace says %+v, Walk %+v", seed, verdict, walked)
				}
				last := wayTo(t, table, p, steps)
				if verdict.Action == Redirect {
					redirected++
					if last.Did != Redirected || last.Rule != verdict.Rule || last.Chain != verdict.Chain {
						t.Fatalf("seed %d: %+v, the trace ends with %+v", seed, verdict, last)
					}
				}
			}
		}
		if redirected < 100 {
			t.Errorf("seed %d: only %d packets redirected", seed, redirected)
		}
	}
}

// othersRules puts rules of others before and behind ours.
func othersRules(r *rand.Rand, table Table) map[string][]string {
	some := []string{"-p tcp -j A", "-p tcp -m tcp --dport 80 -g A", "-j LOG", "-p udp -j ACCEPT",
		"-m set --match-set x dst -j RETURN", "-p tcp -m tcp --dport 443 -j DNAT --to-destination 1.2.3.4"}
	chains := map[string][]string{"A": {"-p tcp -m tcp --dport 22 -j RETURN", "-p udp -j DROP"}}
	for _, builtin := range []string{builtinOutput, builtinPrerouting} {
		rules := table.Rules(builtin)
		for range r.IntN(3) {
			at := r.IntN(len(rules) + 1)
			rules = append(rules[:at:at], append([]string{some[r.IntN(len(some))]}, rules[at:]...)...)
		}
		chains[builtin] = rules
	}
	return chains
}

func FuzzTrace(f *testing.F) {
	f.Add(interceptions()["outbound"].Ruleset().String(), "10.1.2.3:443", true)
	f.Add("*nat\n:OUTPUT -\n-A OUTPUT -j A\n-A A -j A\n-A A -g B\nCOMMIT\n", "10.1.2.3:443", true)
	f.Add("*nat\n-A PREROUTING -m x ! -s 1.2.3.4 -j SERVICE_PROXY_REDIRECT\n"+
		"-A SERVICE_PROXY_REDIRECT -j REDIRECT --to-ports 9\nCOMMIT\n", "10.1.2.3:53", false)
	f.Fuzz(func(t *testing.T, save, dst string, out bool) {
		table, err := Parse(IPv4, []byte(save))
		at, err2 := netip.ParseAddrPort(dst)
		if err != nil || err2 != nil || strings.Count(save, "\n") > 200 {
			return
		}
		p := Packet{Hook: Prerouting, Dst: at, Proto: TCP, UID: 1000, Syn: true}
		if out {
			p.Hook = Output
		}
		steps, verdict := table.Trace(p)
		if walked := table.Walk(p); verdict != walked {
			t.Errorf("Trace says %+v, Walk %+v", verdict, walked)
		}
		if len(steps) < maxSteps {
			wayTo(t, table, p, steps)
		}
	})
}
