package iptables

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// DriftKind says in which way the kernel differs from what is wanted.
type DriftKind uint8

const (
	RuleRemoved  DriftKind = iota + 1 // a rule of ours is not there
	ChainFlushed                      // a chain of ours is empty
	ChainRemoved                      // a chain of ours is not there
	JumpRemoved                       // a built-in chain does not jump to ours
	JumpDoubled                       // a built-in chain jumps to ours more than once
	// our jump is not first, but nothing before it keeps packets from it
	JumpMoved
	// a built-in chain jumps to a chain of ours by a rule that is not ours
	JumpChanged
	ForeignRule // a rule in our chain that is not ours
	Reordered   // the rules of a chain are all there but in another order
	RuleChanged // a rule of ours with another match, target or port
	// no rule of ours is left: `iptables -t nat -F`, `nft flush ruleset`
	TableFlushed
	Shadowed  // a rule before our jump keeps packets from it
	ChainLeft // a chain of ours that is not wanted, from another configuration
	JumpLeft  // a jump to our chains that is not wanted
)

// String is the kind in words, e.g. "jump removed".
func (k DriftKind) String() string {
	words := [...]string{"", "rule removed", "chain flushed", "chain removed", "jump removed",
		"jump doubled", "jump not first", "jump changed",
		"foreign rule", "reordered", "rule changed", "table flushed", "shadowed", "chain left over",
		"jump left over"}
	if int(k) < len(words) && k > 0 {
		return words[k]
	}
	return "DriftKind(" + strconv.Itoa(int(k)) + ")"
}

// Drift is one difference. Rule is the rule in question in iptables-save's form without "-A
// CHAIN": the one that is missing, or the one that is there and should not be; "" where no
// single rule is to be named.
type Drift struct {
	Kind  DriftKind
	Chain string
	Rule  string
}

// String is one line, e.g. "jump removed: -A OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT".
func (d Drift) String() string {
	if d.Rule == "" {
		return fmt.Sprintf("%s: %s", d.Kind, d.Chain)
	}
	return fmt.Sprintf("%s: -A %s %s", d.Kind, d.Chain, d.Rule)
}

// LetsBy says whether packets may have gone another way by it than by the wanted rules.
func (d Drift) LetsBy() bool {
	switch d.Kind {
	case JumpDoubled, JumpMoved, ChainLeft, JumpLeft:
		return false
	}
	return true
}

// OfDNS says whether those of DNS questions over UDP may be among them.
func (d Drift) OfDNS() bool {
	switch d.Kind {
	case TableFlushed:
		return true
	case Shadowed:
		return !strings.Contains(d.Rule, "-p tcp")
	}
	return d.Chain == chainDNS || d.Rule == jumpDNS
}

// Diff says how have differs from want, jumps first and then chain by chain in the order of their
// names. It is empty exactly when there is nothing to write: NewPlan(want, have) is then empty too.
func Diff(want Ruleset, have Table) []Drift {
	if tableFlushed(want, have) {
		return []Drift{{Kind: TableFlushed, Chain: "nat"}}
	}
	var drift []Drift
	for _, builtin := range []string{builtinPrerouting, builtinOutput} {
		drift = append(drift, diffJumps(builtin, want.jumpsFrom(builtin), have)...)
	}
	for _, c := range want.chains {
		rules, ok := have.chains[c.name]
		switch {
		case slices.Equal(c.rules, rules) && ok:
		case !ok:
			drift = append(drift, Drift{Kind: ChainRemoved, Chain: c.name})
		case len(rules) == 0:
			drift = append(drift, Drift{Kind: ChainFlushed, Chain: c.name})
		default:
			drift = append(drift, diffRules(c.name, c.rules, rules)...)
		}
	}
	for _, name := range leftOver(want, have) {
		drift = append(drift, Drift{Kind: ChainLeft, Chain: name})
	}
	return drift
}

// leftOver are the chains of ours that are there and not wanted. One that somebody else's rule
// leads to cannot be deleted; it counts until it is empty.
func leftOver(want Ruleset, have Table) []string {
	var names []string
	for name := range have.chains {
		if _, ok := want.chain(name); !ok && isOurs(name) {
			names = append(names, name)
		}
	}
	if len(names) == 0 { // as always but after a change: what others hold need not be looked for
		return nil
	}
	slices.Sort(names)
	held := have.heldByOthers()
	return slices.DeleteFunc(names, func(name string) bool {
		_, ok := held[name]
		return ok && len(have.chains[name]) == 0
	})
}

func tableFlushed(want Ruleset, have Table) bool { return want.Len() > 0 && have.Ours().Len() == 0 }

func diffJumps(builtin string, want []string, have Table) []Drift {
	rules := have.chains[builtin]
	seen := map[string]int{}
	var drift []Drift
	for _, spec := range rules {
		if !isOurs(target(spec)) {
			continue
		}
		seen[spec]++
		switch {
		case !slices.Contains(want, spec) && slices.ContainsFunc(want, func(w string) bool {
			return target(w) == target(spec)
		}):
			drift = append(drift, Drift{JumpChanged, builtin, spec})
		case !slices.Contains(want, spec):
			drift = append(drift, Drift{JumpLeft, builtin, spec})
		case seen[spec] == 2:
			drift = append(drift, Drift{JumpDoubled, builtin, spec})
		}
	}
	for _, spec := range want {
		if seen[spec] == 0 {
			drift = append(drift, Drift{JumpRemoved, builtin, spec})
		}
	}
	if len(drift) > 0 {
		return drift
	}
	// Every jump is there once. Something may stand before one of them.
	for _, jump := range want {
		for _, spec := range rules[:slices.Index(rules, jump)] {
			if !slices.Contains(want, spec) && have.takes(spec, jump) {
				drift = append(drift, Drift{Shadowed, builtin, spec})
			}
		}
		if len(drift) > 0 {
			return drift
		}
	}
	for i, jump := range want {
		if rules[i] != jump {
			return []Drift{{JumpMoved, builtin, jump}}
		}
	}
	return nil
}

// diffRules compares two lists that differ.
func diffRules(name string, want, have []string) []Drift {
	count := make(map[string]int, len(want))
	for _, spec := range want {
		count[spec]++
	}
	var extra, missing []string
	for _, spec := range have {
		if count[spec] > 0 {
			count[spec]--
		} else {
			extra = append(extra, spec)
		}
	}
	for _, spec := range want {
		if count[spec] > 0 {
			count[spec]--
			missing = append(missing, spec)
		}
	}
	if len(extra) == 0 && len(missing) == 0 {
		return []Drift{{Reordered, name, ""}}
	}
	var drift []Drift
	// A rule that is missing where another stands in its place was changed.
	if len(want) == len(have) {
		for i, spec := range want {
			m, e := slices.Index(missing, spec), slices.Index(extra, have[i])
			if m >= 0 && e >= 0 {
				drift = append(drift, Drift{RuleChanged, name, have[i]})
				missing, extra = slices.Delete(missing, m, m+1), slices.Delete(extra, e, e+1)
			}
		}
	}
	for _, spec := range missing {
		drift = append(drift, Drift{RuleRemoved, name, spec})
	}
	for _, spec := range extra {
		drift = append(drift, Drift{ForeignRule, name, spec})
	}
	return drift
}
