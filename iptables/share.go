package iptables

import (
	"maps"
	"slices"
	"strings"
)

// Share is have, with what it has in common with r held by r's own strings, and with nothing of the
// text that it was read from. Both are kept side by side for as long as nothing changes, and each
// rule of a Table holds the whole save: 80 bytes for each of 10,000 rules. What the Kernel keeps of
// its reads to know the same table again becomes the same, or is dropped where it is of before.
func (k *Kernel) Share(have Table, r Ruleset) Table {
	shared := have.share(r)
	t, ok, _ := k.known(have.family)
	if !ok {
		return shared
	}
	k.mu.Lock()
	if last, kept := k.saves[t.saving]; kept && last.table.same(have) {
		k.saves[t.saving] = lastSave{last.sum, shared}
	} else {
		delete(k.saves, t.saving)
	}
	k.mu.Unlock()
	s := k.stand(have.family)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.table.same(have) {
		s.table = shared
	}
	return shared
}

// share leaves t as it is: others may read it meanwhile.
func (t Table) share(r Ruleset) Table {
	shared := Table{family: t.family, chains: make(map[string][]string, len(t.chains))}
	for name, rules := range t.chains {
		wanted, _ := r.find(name)
		if wanted.name == "" {
			wanted.name = strings.Clone(name) // names are of the text, too
		}
		if !slices.Equal(rules, wanted.rules) {
			wanted.rules = make([]string, len(rules))
			for i, spec := range rules {
				wanted.rules[i] = strings.Clone(spec)
			}
		}
		shared.chains[wanted.name] = wanted.rules
	}
	return shared
}

// same says whether both hold the same rules.
func (t Table) same(u Table) bool {
	return t.family == u.family && maps.EqualFunc(t.chains, u.chains, slices.Equal[[]string])
}
