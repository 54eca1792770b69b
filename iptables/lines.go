package iptables

import (
	"maps"
	"slices"
	"strings"
)

// Mark says what a Line is.
type Mark byte

const (
	Absent   Mark = '-' // wanted, and not there
	Unwanted Mark = '+' // there, and not wanted
	Foreign  Mark = '!' // another program's, which matters to ours and is never touched
	Context  Mark = ' ' // where the next ones stand
)

// Line is a line of a comparison: Text in iptables-save's form ("*nat", ":CHAIN", "-A CHAIN …").
type Line struct {
	Mark Mark
	Text string
	Note string // why, where the mark does not say it all
}

// The notes of Lines.
const (
	NoteThere   = "it is there, in another place"
	NoteMoved   = "wanted, in another place"
	NoteDoubled = "it is there more than once"
	NoteBefore  = "stands before our jump, and may take its packets"
	NoteLeads   = "leads to a chain of ours"
	NoteIstio   = "Istio's chains may take the same connections"
	NoteSecond  = "named like a chain of ours, and none: another agent's?"
)

// Lines says how have differs from want as a person reads it: rule by rule in the order in which
// the kernel asks them, so that what was moved is seen, with the rules of others that matter. Each
// group of lines has its chain before it. It is empty where there is nothing to say. Of the marks
// Absent and Unwanted it holds none exactly when Diff is empty.
func Lines(want Ruleset, have Table) []Line {
	var lines []Line
	for _, builtin := range []string{builtinPrerouting, builtinOutput} {
		lines = append(lines, chainLines(builtin, jumpLines(builtin, want.jumpsFrom(builtin), have))...)
	}
	left := leftOver(want, have)
	names := append(want.Chains(), left...)
	slices.Sort(names)
	var held map[string]rule
	if len(left) > 0 {
		held = have.heldByOthers()
	}
	for _, name := range names {
		rules, wanted := want.chain(name)
		is, there := have.chains[name]
		heading := Line{Context, ":" + name, ""}
		switch {
		case !there:
			heading.Mark = Absent
		case !wanted:
			if _, ok := held[name]; !ok { // it would stay, empty
				heading.Mark = Unwanted
			}
		}
		some := ruleLines(name, rules, is)
		if heading.Mark != Context || len(some) > 0 {
			lines = append(append(lines, heading), some...)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(have.chains)) {
		if !isOurs(name) && !isJumpSite(name) {
			lines = append(lines, foreignLines(name, have.chains[name])...)
		}
	}
	if len(lines) > 0 {
		lines = slices.Insert(lines, 0, Line{Context, "*nat", ""})
	}
	return lines
}

// Changes says what another ruleset would change: what would go is Absent from it, what would come
// is Unwanted now.
func Changes(now, other Ruleset) []Line {
	t := Table{family: other.family, chains: map[string][]string{}}
	for _, c := range other.chains {
		t.chains[c.name] = c.rules
	}
	for _, j := range other.jumps {
		t.chains[j.chain] = append(t.chains[j.chain], j.spec)
	}
	return Lines(now, t)
}

func chainLines(name string, lines []Line) []Line {
	if len(lines) == 0 {
		return nil
	}
	return append([]Line{{Context, ":" + name, ""}}, lines...)
}

// jumpLines compares the jumps of a built-in chain. Ours head it, so that one of them is in its
// place only before every rule of others. Those rules are told which stand before one of ours.
func jumpLines(builtin string, want []string, have Table) []Line {
	rules := have.chains[builtin]
	first := slices.IndexFunc(rules, func(spec string) bool { return !isOurs(target(spec)) })
	if first < 0 {
		first = len(rules)
	}
	lines := ruleLines(builtin, want, rules[:first])
	last := lastOurs(rules)
	said := map[string]bool{}
	for i, spec := range rules[first:] {
		line := Line{Context, "-A " + builtin + " " + spec, ""}
		switch to := target(spec); {
		case isOurs(to):
			line.Mark = Unwanted
			switch {
			case slices.Contains(rules[:first], spec) || said[spec]:
				line.Note = NoteDoubled
			case slices.Contains(want, spec):
				line.Note = NoteMoved
			}
			said[spec] = true
		case first+i < last && slices.ContainsFunc(want, func(jump string) bool {
			return have.takes(spec, jump)
		}):
			line.Mark, line.Note = Foreign, NoteBefore
		case note(to) != "":
			line.Mark, line.Note = Foreign, note(to)
		case first+i > last:
			continue
		}
		lines = append(lines, line)
	}
	for i, line := range lines {
		if spec := strings.TrimPrefix(line.Text, "-A "+builtin+" "); line.Mark == Absent && said[spec] {
			lines[i].Note = NoteThere
		}
	}
	return lines
}

// lastOurs is where the last jump to a chain of ours stands; -1: nowhere.
func lastOurs(rules []string) int {
	for i, spec := range slices.Backward(rules) {
		if isOurs(target(spec)) {
			return i
		}
	}
	return -1
}

// foreignLines are what matters to us of a chain that is not ours.
func foreignLines(name string, rules []string) []Line {
	heading := Line{Context, ":" + name, note(name)}
	if heading.Note != "" {
		heading.Mark = Foreign
	}
	lines := []Line{heading}
	for _, spec := range rules {
		if isOurs(target(spec)) {
			lines = append(lines, Line{Foreign, "-A " + name + " " + spec, NoteLeads})
		}
	}
	if len(lines) == 1 && heading.Mark == Context {
		return nil
	}
	return lines
}

// note is why a chain of another program's matters by its name.
func note(chain string) string {
	switch {
	case strings.HasPrefix(chain, "ISTIO_"):
		return NoteIstio
	case strings.HasPrefix(chain, "SERVICE_PROXY_") && !isOurs(chain):
		return NoteSecond
	}
	return ""
}

// ruleLines compares the rules of one chain in their order.
func ruleLines(chain string, want, have []string) []Line {
	if slices.Equal(want, have) {
		return nil
	}
	kept := common(want, have)
	wanted, absent, unwanted := map[string]bool{}, map[string]bool{}, map[string]bool{}
	for i, spec := range want {
		wanted[spec] = true
		if kept.want[i] < 0 {
			absent[spec] = true
		}
	}
	for i, spec := range have {
		if !kept.have[i] {
			unwanted[spec] = true
		}
	}
	var lines []Line
	next := 0 // of have
	until := func(end int) {
		for ; next < end; next++ {
			line := Line{Unwanted, "-A " + chain + " " + have[next], ""}
			switch spec := have[next]; {
			case absent[spec]:
				line.Note = NoteMoved
			case wanted[spec]:
				line.Note = NoteDoubled
			}
			lines = append(lines, line)
		}
	}
	for i, spec := range want {
		if kept.want[i] >= 0 {
			until(kept.want[i])
			next++
			continue
		}
		line := Line{Absent, "-A " + chain + " " + spec, ""}
		if unwanted[spec] {
			line.Note = NoteThere
		}
		lines = append(lines, line)
	}
	until(len(have))
	return lines
}

// pairs are the rules that two lists have in common, in the same order.
type pairs struct {
	want []int  // for each wanted rule where it is in the other list; -1: in none of the pairs
	have []bool // whether each of the other list is in a pair
}

// common pairs as many rules as keep their order. Equal rules are paired first with first; where
// each is there once, as in the chains of ours, no other choice pairs more. A general line diff
// (Myers) takes as long as the lists differ: for 10,000 shuffled rows this takes milliseconds and
// that one minutes.
func common(want, have []string) pairs {
	at := make(map[string][]int, len(want)) // where a wanted rule stands
	for i, spec := range want {
		at[spec] = append(at[spec], i)
	}
	// The longest increasing run of where the rules that are there are wanted, by patience sorting.
	var tails []int // for each length of run the position in have at which the best one ends
	place, before := make([]int, len(have)), make([]int, len(have))
	for i, spec := range have {
		place[i], before[i] = -1, -1
		if len(at[spec]) == 0 {
			continue
		}
		place[i], at[spec] = at[spec][0], at[spec][1:]
		n, _ := slices.BinarySearchFunc(tails, place[i], func(tail, p int) int { return place[tail] - p })
		if n > 0 {
			before[i] = tails[n-1]
		}
		if n == len(tails) {
			tails = append(tails, i)
		} else {
			tails[n] = i
		}
	}
	p := pairs{want: slices.Repeat([]int{-1}, len(want)), have: make([]bool, len(have))}
	if len(tails) > 0 {
		for i := tails[len(tails)-1]; i >= 0; i = before[i] {
			p.want[place[i]], p.have[i] = i, true
		}
	}
	return p
}
