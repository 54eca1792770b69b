package iptables

import (
	"maps"
	"slices"
	"strconv"
	"strings"
)

// rule is one rule of a chain. spec is what follows "-A CHAIN " in a save.
type rule struct{ chain, spec string }

// chain is one chain of ours with its rules in order.
type chain struct {
	name  string
	rules []string
}

// Ruleset is everything of ours in one family's nat table: the chains with their rules, and the
// jumps to them. It is a value: it is never changed once made. Compare two by Equal.
type Ruleset struct {
	family Family
	chains []chain // sorted by name
	jumps  []rule  // in the order in which they head their built-in chain
}

// Family is the family the ruleset was compiled for.
func (r Ruleset) Family() Family { return r.family }

// Empty says that nothing of ours is in the ruleset.
func (r Ruleset) Empty() bool { return len(r.chains) == 0 && len(r.jumps) == 0 }

// Intercepting says whether a built-in chain jumps to a chain of ours: whether any
// packet is looked at at all.
func (r Ruleset) Intercepting() bool { return len(r.jumps) > 0 }

// Len is the number of rules, the jumps included.
func (r Ruleset) Len() int {
	n := len(r.jumps)
	for _, c := range r.chains {
		n += len(c.rules)
	}
	return n
}

// Chains returns the names of the chains, sorted.
func (r Ruleset) Chains() []string {
	names := make([]string, len(r.chains))
	for i, c := range r.chains {
		names[i] = c.name
	}
	return names
}

// Rules returns the rules of one chain of ours in iptables-save's form without "-A CHAIN"; nil if
// there is no such chain.
func (r Ruleset) Rules(name string) []string {
	rules, _ := r.chain(name)
	return slices.Clone(rules)
}

func (r Ruleset) chain(name string) ([]string, bool) {
	c, ok := r.find(name)
	return c.rules, ok
}

func (r Ruleset) find(name string) (chain, bool) {
	i, ok := slices.BinarySearchFunc(r.chains, name, func(c chain, name string) int {
		return strings.Compare(c.name, name)
	})
	if !ok {
		return chain{}, false
	}
	return r.chains[i], true
}

// jumpsFrom are the jumps that head the built-in chain, in order.
func (r Ruleset) jumpsFrom(builtin string) []string {
	var specs []string
	for _, j := range r.jumps {
		if j.chain == builtin {
			specs = append(specs, j.spec)
		}
	}
	return specs
}

// Equal says whether the two hold the same chains, rules and jumps in the same order.
func (r Ruleset) Equal(other Ruleset) bool {
	return r.family == other.family && slices.Equal(r.jumps, other.jumps) &&
		slices.EqualFunc(r.chains, other.chains, func(a, b chain) bool {
			return a.name == b.name && slices.Equal(a.rules, b.rules)
		})
}

// String is the ruleset as iptables-save prints it: the chains sorted by name, the jumps, then the
// rules of each chain. It is "" for an empty ruleset.
func (r Ruleset) String() string {
	if r.Empty() {
		return ""
	}
	var b strings.Builder
	b.WriteString("*nat\n")
	for _, c := range r.chains {
		b.WriteString(":" + c.name + " - [0:0]\n")
	}
	for _, j := range r.jumps {
		b.WriteString("-A " + j.chain + " " + j.spec + "\n")
	}
	for _, c := range r.chains {
		for _, spec := range c.rules {
			b.WriteString("-A " + c.name + " " + spec + "\n")
		}
	}
	b.WriteString("COMMIT\n")
	return b.String()
}

// builder collects chains in any order.
type builder struct {
	family Family
	chains map[string][]string
	jumps  []rule
}

// add appends rules to a chain, which it makes if need be.
func (b *builder) add(chain string, specs ...string) {
	b.chains[chain] = append(b.chains[chain], specs...)
}

func (b *builder) ruleset() Ruleset {
	r := Ruleset{family: b.family, jumps: b.jumps}
	for _, name := range slices.Sorted(maps.Keys(b.chains)) {
		r.chains = append(r.chains, chain{name, b.chains[name]})
	}
	return r
}

// isOurs says whether a chain is one of ours by its name. Only names that this package can have
// given count, so that a chain of somebody else's that merely begins alike is left alone.
func isOurs(name string) bool {
	switch name {
	case chainOutput, chainServiceCIDRs, chainServicePorts, chainRedirect, chainDNS, chainInbound,
		chainInRedirect, chainProbe:
		return true
	}
	if rest, ok := strings.CutPrefix(name, bucketPrefix4); ok {
		address, bits, ok := strings.Cut(rest, "_")
		n, err := strconv.Atoi(bits)
		return ok && len(address) == 8 && strings.Trim(address, "0123456789ABCDEF") == "" &&
			// of any version: another may cut at other bits
			err == nil && strconv.Itoa(n) == bits && n >= 1 && n <= 32
	}
	if rest, ok := strings.CutPrefix(name, bucketPrefix6); ok {
		return len(rest) == 11 && strings.Trim(rest, "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567") == ""
	}
	return false
}

// chainProbe holds a single rule for a moment while Apply asks the kernel
// whether it takes that rule.
const chainProbe = "SERVICE_PROXY_PROBE"
