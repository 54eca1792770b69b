package agent

import (
	"slices"
	"testing"

	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// damage is what somebody else does to the rules of a family.
type damage struct {
	name string
	kind iptables.DriftKind
	do   damaging
}

// damaging does the damage to a table, of which the kernel tells in this mode. It says whether
// there was anything to damage.
type damaging func(w *world, f iptables.Family, m eventMode, t tables) (done bool)

// lines is damage by one transaction.
func lines(make func(w *world, t tables) []string) damaging {
	return func(w *world, f iptables.Family, m eventMode, t tables) bool {
		all := make(w, t)
		if len(all) > 0 {
			w.write(f, m, all...)
		}
		return len(all) > 0
	}
}

// someJump is one of our jumps, "BUILTIN RULE"; "" if there is none.
func (w *world) someJump(t tables) string {
	var all []string
	for _, name := range []string{"OUTPUT", "PREROUTING"} {
		for _, rule := range t[name] {
			if jump(rule) {
				all = append(all, name+" "+rule)
			}
		}
	}
	if len(all) == 0 {
		return ""
	}
	return all[w.IntN(len(all))]
}

// someChain is one of our chains with at least so many rules; "" if there is none.
func (w *world) someChain(t tables, rules int) string {
	var all []string
	for name := range t {
		if ours(name) && len(t[name]) >= rules {
			all = append(all, name)
		}
	}
	if len(all) == 0 {
		return ""
	}
	slices.Sort(all)
	return all[w.IntN(len(all))]
}

var damages = []damage{
	{"a rule removed", iptables.RuleRemoved, lines(func(w *world, t tables) []string {
		name := w.someChain(t, 1)
		if name == "" {
			return nil
		}
		return []string{"-D " + name + " " + t[name][w.IntN(len(t[name]))]}
	})},
	{"a chain flushed", iptables.ChainFlushed, lines(func(w *world, t tables) []string {
		if name := w.someChain(t, 1); name != "" {
			return []string{":" + name + " - [0:0]"}
		}
		return nil
	})},
	{"a chain deleted", iptables.ChainRemoved, lines(func(w *world, t tables) []string {
		const chain = "SERVICE_PROXY_SERVICE_PORTS"
		if _, ok := t[chain]; !ok || !slices.Contains(t["SERVICE_PROXY_OUTPUT"], "-j "+chain) {
			return nil
		}
		return []string{
			":" + chain + " - [0:0]", "-D SERVICE_PROXY_OUTPUT -j " + chain, "-X " + chain,
		}
	})},
	{"all of ours deleted", iptables.TableFlushed, lines(func(w *world, t tables) (all []string) {
		var last []string
		for _, name := range []string{"OUTPUT", "PREROUTING"} {
			for _, rule := range t[name] {
				if jump(rule) {
					last = append(last, "-D "+name+" "+rule)
				}
			}
		}
		for name := range t {
			if ours(name) {
				all = append(all, ":"+name+" - [0:0]")
				last = append(last, "-X "+name)
			}
		}
		return append(all, last...)
	})},
	{"a jump removed", iptables.JumpRemoved, lines(func(w *world, t tables) []string {
		if j := w.someJump(t); j != "" {
			return []string{"-D " + j}
		}
		return nil
	})},
	{"a jump doubled", iptables.JumpDoubled, lines(func(w *world, t tables) []string {
		if j := w.someJump(t); j != "" {
			return []string{"-A " + j}
		}
		return nil
	})},
	{"something harmless before the jumps", iptables.JumpMoved, lines(func(*world, tables) []string {
		return []string{"-I OUTPUT 1 -p udp -m udp --dport 9 -j ACCEPT"}
	})},
	{"outbound connections taken", iptables.Shadowed, lines(func(*world, tables) []string {
		return []string{"-I OUTPUT 1 -p tcp -j ACCEPT"}
	})},
	{"inbound connections taken", iptables.Shadowed, lines(func(*world, tables) []string {
		return []string{"-I PREROUTING 1 -j ACCEPT"}
	})},
	{"another jump to our chain", iptables.JumpChanged, lines(func(w *world, t tables) []string {
		if _, ok := t["SERVICE_PROXY_OUTPUT"]; ok {
			return []string{"-A OUTPUT -j SERVICE_PROXY_OUTPUT"}
		}
		return nil
	})},
	{"a jump from elsewhere", iptables.JumpLeft, lines(func(w *world, t tables) []string {
		if _, ok := t["SERVICE_PROXY_REDIRECT"]; ok {
			return []string{"-I PREROUTING 1 -p tcp -j SERVICE_PROXY_REDIRECT"}
		}
		return nil
	})},
	{"a foreign rule in our chain", iptables.ForeignRule, lines(func(w *world, t tables) []string {
		if name := w.someChain(t, 0); name != "" {
			return []string{"-I " + name + " 1 -p tcp -j ACCEPT"}
		}
		return nil
	})},
	{"our rules in another order", iptables.Reordered, lines(func(w *world, t tables) []string {
		if name := w.someChain(t, 2); name != "" {
			return []string{"-D " + name + " " + t[name][0], "-A " + name + " " + t[name][0]}
		}
		return nil
	})},
	{"a port changed", iptables.RuleChanged, lines(func(w *world, t tables) []string {
		for _, name := range []string{"SERVICE_PROXY_REDIRECT", "SERVICE_PROXY_IN_REDIRECT"} {
			if len(t[name]) == 1 {
				return []string{
					"-D " + name + " " + t[name][0], "-A " + name + " -p tcp -j REDIRECT --to-ports 15009",
				}
			}
		}
		return nil
	})},
	{"a chain of another version", iptables.ChainLeft, lines(func(*world, tables) []string {
		const chain = "SERVICE_PROXY_B4_0A200000_12"
		return []string{":" + chain + " - [0:0]", "-A " + chain + " -p tcp -j ACCEPT"}
	})},
	{"iptables -t nat -F", iptables.TableFlushed, (*world).flushAll},
}

// flushAll is iptables -t nat -F. Whose rules were flushed puts them in again.
func (w *world) flushAll(f iptables.Family, m eventMode, _ tables) bool {
	w.flush(f, m)
	w.write(f, m, canaries[index(f)]...)
	return true
}

// TestShuffledKnowsEveryDrift: a new kind of drift gets its damage.
func TestShuffledKnowsEveryDrift(t *testing.T) {
	for kind := iptables.RuleRemoved; kind <= iptables.JumpLeft; kind++ {
		if !slices.ContainsFunc(damages, func(d damage) bool { return d.kind == kind }) {
			t.Errorf("nobody does %q", kind)
		}
	}
}
