package iptables

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Table is what was seen of one family's nat table: our chains, the built-in ones, and others' as
// far as they were read.
type Table struct {
	family Family
	chains map[string][]string // rules in order, without "-A CHAIN "
}

// ErrTruncated says that a save ended in the middle of the table that was read. What it held is not
// to be trusted: the missing half would look like drift.
var ErrTruncated = errors.New("the save ends within table nat")

// Parse reads the output of iptables-save, with or without counters and with or without other
// tables. A save without a nat table is an empty Table: nobody has used it yet. It never panics;
// lines that it does not know are passed over.
func Parse(family Family, save []byte) (Table, error) {
	t := Table{family: family, chains: map[string][]string{}}
	if err := eachLine(save, "nat", t.line); err != nil {
		return Table{}, fmt.Errorf("parse %s save: %w", family, err)
	}
	return t, nil
}

// eachLine hands over the lines that a save has of one table.
func eachLine(save []byte, table string, take func(line string)) error {
	within := false
	// One copy of the text holds all rules: 10,000 rules are one allocation and not as many.
	for line := range strings.SplitSeq(string(save), "\n") {
		line = strings.TrimRight(line, "\r")
		if name, ok := strings.CutPrefix(line, "*"); ok {
			if within {
				return ErrTruncated
			}
			within = name == table
			continue
		}
		if !within {
			continue
		}
		if line == "COMMIT" {
			within = false
			continue
		}
		take(line)
	}
	if within {
		return ErrTruncated
	}
	return nil
}

// line takes one line of a save's nat table or of `iptables -S`.
func (t *Table) line(line string) {
	if strings.HasPrefix(line, "[") { // [packets:bytes] before a rule, in a save with counters
		if _, rest, ok := strings.Cut(line, "] "); ok {
			line = rest
		}
	}
	switch {
	case line == "", strings.HasPrefix(line, "#"):
	case strings.HasPrefix(line, ":"), strings.HasPrefix(line, "-N "), strings.HasPrefix(line, "-P "):
		name := strings.TrimPrefix(line, ":")
		if name == line {
			name = line[len("-N "):]
		}
		name, _, _ = strings.Cut(name, " ")
		if _, ok := t.chains[name]; !ok && name != "" {
			t.chains[name] = nil
		}
	case strings.HasPrefix(line, "-A "):
		name, spec, _ := strings.Cut(line[len("-A "):], " ")
		if name != "" {
			t.chains[name] = append(t.chains[name], spec)
		}
	}
}

// parseListing reads `iptables -S CHAIN`: one chain.
func parseListing(listing []byte) map[string][]string {
	t := Table{chains: map[string][]string{}}
	for line := range bytes.Lines(listing) {
		t.line(strings.TrimRight(string(line), "\r\n"))
	}
	return t.chains
}

// Family is the family whose table this is.
func (t Table) Family() Family { return t.family }

// Has says whether the table holds the chain.
func (t Table) Has(chain string) bool {
	_, ok := t.chains[chain]
	return ok
}

// Rules returns the rules of any chain that was read, in iptables-save's form without "-A CHAIN".
func (t Table) Rules(chain string) []string { return slices.Clone(t.chains[chain]) }

// Ours is everything of ours in the table, whoever made it and in whatever state it is: what a
// start adopts. The jumps are those that lead to chains of ours, in their order, wherever they
// stand in the built-in chains.
func (t Table) Ours() Ruleset {
	r := Ruleset{family: t.family}
	for _, name := range slices.Sorted(maps.Keys(t.chains)) {
		if isOurs(name) {
			r.chains = append(r.chains, chain{name, t.chains[name]})
		}
	}
	for _, builtin := range []string{builtinPrerouting, builtinOutput} {
		for _, spec := range t.chains[builtin] {
			if isOurs(target(spec)) {
				r.jumps = append(r.jumps, rule{builtin, spec})
			}
		}
	}
	return r
}

// with returns the table with the given chains replaced by what was read of them. gone names chains
// that are no longer there.
func (t Table) with(read map[string][]string, gone []string) Table {
	chains := maps.Clone(t.chains)
	if chains == nil {
		chains = map[string][]string{}
	}
	for _, name := range gone {
		delete(chains, name)
	}
	maps.Copy(chains, read)
	return Table{family: t.family, chains: chains}
}

// heldByOthers finds the chains of ours that a rule of somebody else's leads to, each with one such
// rule: iptables refuses to delete them.
func (t Table) heldByOthers() map[string]rule {
	held := map[string]rule{}
	for name, specs := range t.chains {
		if isOurs(name) || isJumpSite(name) {
			continue
		}
		for _, spec := range specs {
			if to := target(spec); isOurs(to) {
				held[to] = rule{name, spec}
			}
		}
	}
	return held
}

// isJumpSite says whether jumps to our chains in this built-in chain are ours to add and to remove.
func isJumpSite(name string) bool { return name == builtinOutput || name == builtinPrerouting }
