package iptables

import (
	"maps"
	"slices"
	"strconv"
	"strings"
)

// Plan is the text that leads one family's table from what it is to what is wanted, in one
// transaction: all of it is applied, or nothing is. It names chains of ours and, by -I and -D of
// our jumps, PREROUTING and OUTPUT; nothing else.
// See docs/design/facts.md#restore-is-one-transaction.
type Plan struct {
	family  Family
	want    Ruleset
	have    Table
	lines   []string
	touched []string // chains whose content the plan changes, for the read-back
}

// Family is the family whose restore the plan is for.
func (p Plan) Family() Family { return p.family }

// Empty says that nothing has to be written.
func (p Plan) Empty() bool { return len(p.lines) == 0 }

// Intercepting says whether the built-in chains jump to ours once the plan was applied.
func (p Plan) Intercepting() bool { return p.want.Intercepting() }

// Chains are the chains that the plan changes, the built-in ones included, sorted.
func (p Plan) Chains() []string { return slices.Clone(p.touched) }

// String is the payload for `iptables-restore --noflush`, "" if there is nothing to write.
func (p Plan) String() string {
	if p.Empty() {
		return ""
	}
	return "*nat\n" + strings.Join(p.lines, "\n") + "\nCOMMIT\n"
}

// newChains is a plan that only makes the chains that are not there yet.
func (p Plan) newChains() Plan {
	chains := Plan{family: p.family}
	for _, line := range p.lines {
		name, ok := strings.CutPrefix(line, ":")
		if !ok {
			break // the declarations come first
		}
		name, _, _ = strings.Cut(name, " ")
		if !p.have.Has(name) {
			chains.lines = append(chains.lines, line)
		}
	}
	return chains
}

// line returns the n-th line of the payload, counted from 1 as iptables-restore does.
func (p Plan) line(n int) string {
	switch {
	case n == 1:
		return "*nat"
	case n >= 2 && n < len(p.lines)+2:
		return p.lines[n-2]
	case n == len(p.lines)+2:
		return "COMMIT"
	}
	return ""
}

// maxInsertions is how many rows are inserted one by one before the chain is declared anew. On nft
// each insertion rereads the rows before it (4 ms in a bucket of 256, like an append), a new
// declaration costs the 16 ms that any deletion costs; on legacy both are the same.
const maxInsertions = 8

// NewPlan makes the plan. A chain in which only rows were added gets them inserted at their
// places; any other chain of ours that differs is declared, which empties it, and filled in
// the same transaction, so that no packet sees it half full. The jumps are put first in
// their built-in chains.
func NewPlan(want Ruleset, have Table) Plan {
	p := planner{touched: map[string]bool{}}
	for _, c := range want.chains {
		rules, ok := have.chains[c.name]
		if ok && slices.Equal(rules, c.rules) {
			continue
		}
		if places, only := insertions(c.rules, rules); ok && only && len(places) <= maxInsertions {
			for _, i := range places {
				p.insert(c.name, i, len(c.rules), c.rules[i])
			}
			continue
		}
		p.declare(c.name)
		for _, spec := range c.rules {
			p.rule("-A", c.name, spec)
		}
	}
	for _, builtin := range []string{builtinPrerouting, builtinOutput} {
		p.jumps(builtin, want.jumpsFrom(builtin), have.chains[builtin])
	}
	// Left-over chains lead to one another, so all are emptied before the first is deleted.
	// See docs/design/facts.md#chain-in-use.
	if left := leftOver(want, have); len(left) > 0 {
		held := have.heldByOthers()
		for _, name := range left {
			p.declare(name)
			if _, ok := held[name]; !ok {
				p.rules = append(p.rules, "-X "+name)
			}
		}
	}
	family := want.family
	if family == 0 {
		family = have.family
	}
	return Plan{
		family:  family,
		want:    want,
		have:    have,
		lines:   slices.Concat(p.declarations, p.rules),
		touched: slices.Sorted(maps.Keys(p.touched)),
	}
}

type planner struct {
	declarations, rules []string
	touched             map[string]bool
}

func (p *planner) declare(chain string) {
	p.touched[chain] = true
	p.declarations = append(p.declarations, ":"+chain+" - [0:0]")
}

func (p *planner) rule(command, chain, spec string) {
	p.touched[chain] = true
	p.rules = append(p.rules, command+" "+chain+" "+spec)
}

// insert puts a row at its place, counted from 0, in a chain that will have n rows.
func (p *planner) insert(chain string, i, n int, spec string) {
	if i == n-1 {
		p.rule("-A", chain, spec)
		return
	}
	p.rule("-I", chain, strconv.Itoa(i+1)+" "+spec)
}

// insertions says where rows must be put into have to make it want, and whether that
// is all that it takes.
func insertions(want, have []string) (places []int, only bool) {
	i := 0
	for w, spec := range want {
		if i < len(have) && have[i] == spec {
			i++
		} else {
			places = append(places, w)
		}
	}
	return places, i == len(have)
}

// jumps brings our jumps to the head of a built-in chain. Those that stand there already at the
// right place stay; when any is wrong, all of ours are taken out by their own words and put in
// anew, in the one transaction.
func (p *planner) jumps(builtin string, want, have []string) {
	var ours []string
	for _, spec := range have {
		if isOurs(target(spec)) {
			ours = append(ours, spec)
		}
	}
	if len(have) >= len(want) && slices.Equal(have[:len(want)], want) && len(ours) == len(want) {
		return
	}
	p.touched[builtin] = true
	for _, spec := range ours {
		p.rule("-D", builtin, spec)
	}
	for i, spec := range want {
		p.rule("-I", builtin, strconv.Itoa(i+1)+" "+spec)
	}
}
