package iptables

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strings"
)

const (
	tableFilter  = "filter"
	builtinInput = "INPUT"
)

// Filter is what was seen of one family's table filter: what its INPUT does with a packet for this
// machine. It is never written.
type Filter struct {
	family   Family
	chains   map[string][]filterRule
	policies map[string]string // of the built-in chains: ACCEPT, DROP
}

type filterRule struct {
	spec string // in iptables-save's form without "-A CHAIN"
	parsed
}

// ParseFilter reads the output of iptables-save. A save without a table filter lets everything
// pass: nobody has used it yet.
func ParseFilter(family Family, save []byte) (Filter, error) {
	t := Table{family: family, chains: map[string][]string{}}
	f := Filter{family: family, chains: map[string][]filterRule{}, policies: map[string]string{}}
	if err := eachLine(save, tableFilter, func(line string) {
		t.line(line)
		if words := strings.Fields(line); len(words) > 1 && line[0] == ':' && words[1] != "-" {
			f.policies[words[0][1:]] = words[1]
		}
	}); err != nil {
		return Filter{}, fmt.Errorf("parse %s save of table filter: %w", family, err)
	}
	for name, specs := range t.chains {
		rules := make([]filterRule, 0, len(specs))
		for _, spec := range specs {
			rules = append(rules, filterRule{spec, parseRule(spec)})
		}
		f.chains[name] = rules
	}
	return f, nil
}

// ReadFilter reads a family's table filter by the programs that this Kernel uses, and does not make
// one where there is none. What else may drop a packet is not looked at: the tables raw, mangle and
// security, the other backend, and native nft tables such as firewalld's.
func (k *Kernel) ReadFilter(ctx context.Context, f Family) (Filter, error) {
	t, err := k.tool(ctx, f)
	if err != nil {
		return Filter{}, err
	}
	has, err := k.machine.hasFilter(t)
	if err != nil {
		return Filter{}, fmt.Errorf("read %s table filter: %w", f, err)
	}
	if !has {
		return Filter{family: f}, nil
	}
	limit := readLimit
	if t.backend == NFT {
		limit = saveLimit
	}
	// Not one of our own commands: while one of those runs, notifications are taken for its.
	var save bytes.Buffer
	if err := k.machine.run(ctx, limit, new(ownPIDs), nil, &save, t.saving, "-t",
		tableFilter); err != nil {
		return Filter{}, fmt.Errorf("read %s table filter: %w", f, err)
	}
	if bytes.Contains(save.Bytes(), []byte("is incompatible")) {
		return Filter{}, fmt.Errorf("read %s table filter: %w", f, ErrIncompatible)
	}
	return ParseFilter(f, save.Bytes())
}

// hasFilter says whether there is a table filter for a program to read, without making it.
func hasFilter(t tool) (bool, error) {
	if t.backend == Legacy {
		return hasLegacyTable(t.family, tableFilter, os.ReadFile)
	}
	chains, err := nftChains(t.family.nfproto())
	if err != nil {
		return false, err
	}
	for _, c := range chains {
		if c.family == t.family.nfproto() && c.table == tableFilter && c.name == builtinInput {
			return true, nil
		}
	}
	return false, nil
}

// Walk says what INPUT does with the first packet of a connection: Pass, Dropped with the rule that
// does it (no Rule: the chain's policy), or CannotTell.
//
// It follows every way that a packet may go. A rule of which it cannot tell whether it matches may
// be left both ways, which is no matter where both end in a DROP: so an "address type BROADCAST"
// before a policy of DROP does not hide that.
func (f Filter) Walk(p Packet) Verdict {
	w := filterWalk{filter: f, packet: p, known: map[string]fate{}}
	end := w.chain(builtinInput, 0)
	if end.may&goesOn != 0 {
		end.may &^= goesOn
		if policy := f.policies[builtinInput]; policy == "" || policy == "ACCEPT" {
			end.may |= passes
		} else {
			end.may, end.chain, end.rule = end.may|drops, builtinInput, ""
		}
	}
	switch {
	case end.may == passes:
		return Verdict{Action: Pass}
	case end.may == drops:
		return Verdict{Action: Dropped, Chain: end.chain, Rule: end.rule}
	}
	return Verdict{Action: CannotTell, Chain: end.chain, Rule: end.rule}
}

// What may become of a packet, as a set.
const (
	passes  = 1 << iota
	drops   // or is rejected
	unclear // a target that is not known
	goesOn  // behind the chain
)

// fate is the ways that a packet may go from a chain on. chain and rule are the last that may keep
// it from passing: on whatever way it goes there, none later does.
type fate struct {
	may         uint8
	chain, rule string
}

type filterWalk struct {
	filter Filter
	packet Packet
	known  map[string]fate // of chains: it is the same wherever one is called from
}

func (w filterWalk) chain(name string, depth int) (all fate) {
	if f, ok := w.known[name]; ok {
		return f
	}
	rules, ok := w.filter.chains[name]
	if !ok && name != builtinInput || depth > maxDepth {
		return fate{may: unclear, chain: name}
	}
	defer func() { w.known[name] = all }()
	for _, r := range rules {
		m := r.matches(w.packet)
		if m == no || letsPass(r.target) {
			continue
		}
		one := w.target(name, r, depth)
		stops := m == yes
		if _, isChain := w.filter.chains[r.target]; isChain && !r.goTo && one.may&goesOn != 0 {
			one.may &^= goesOn // back here, at the next rule
			stops = false
		}
		all.may |= one.may
		if one.chain != "" {
			all.chain, all.rule = one.chain, one.rule
		}
		if stops {
			return all
		}
	}
	all.may |= goesOn
	return all
}

func (w filterWalk) target(chain string, r filterRule, depth int) fate {
	switch r.target {
	case "ACCEPT":
		return fate{may: passes}
	case "RETURN":
		return fate{may: goesOn}
	case "DROP", "REJECT":
		return fate{drops, chain, r.spec}
	}
	if _, ok := w.filter.chains[r.target]; ok {
		return w.chain(r.target, depth+1)
	}
	return fate{unclear, chain, r.spec}
}
