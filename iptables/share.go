package iptables

import (
	"maps"
	"slices"
	"strings"
)

// Share has the table hold what it has in common with r by r's own strings. Both are kept side by
// side for as long as nothing changes, and a table is made of a save's text, of which each rule of
// anybody's holds the whole: 80 bytes for each of 10,000 rules. No rule changes by it,
// so that every
// copy of the Table stays what it was; none may be read by another goroutine meanwhile.
func (t Table) Share(r Ruleset) {
	chains := slices.Collect(maps.Keys(t.chains)) // names are of the text, too
	for _, name := range chains {
		rules := t.chains[name]
		delete(t.chains, name)
		wanted, _ := r.find(name)
		if wanted.name == "" {
			wanted.name = strings.Clone(name)
		}
		if !slices.Equal(rules, wanted.rules) {
			wanted.rules = make([]string, len(rules))
			for i, spec := range rules {
				wanted.rules[i] = strings.Clone(spec)
			}
		}
		t.chains[wanted.name] = wanted.rules
	}
}
