package symptom

import "slices"

// Tree is a finding with what it explains.
type Tree struct {
	Finding
	Explains []*Tree
}

// Nested are the findings that stand by themselves, worst first, each with what it explains. What
// is explained by something that was not found stands by itself.
func Nested(findings []Finding) (roots []*Tree) {
	var all []*Tree
	first := map[ID]*Tree{}
	for _, f := range findings {
		n := &Tree{Finding: f}
		if first[f.ID] == nil {
			first[f.ID] = n
		}
		all = append(all, n)
	}
	for _, n := range all {
		by := first[n.ExplainedBy]
		if by == nil || n.within(by, first) {
			roots = append(roots, n)
			continue
		}
		by.Explains = append(by.Explains, n)
	}
	slices.SortStableFunc(roots, func(a, b *Tree) int { return int(b.Worst()) - int(a.Worst()) })
	return roots
}

// Walk visits a finding, and then what it explains.
func (n *Tree) Walk(visit func(*Tree)) {
	visit(n)
	for _, below := range n.Explains {
		below.Walk(visit)
	}
}

// Worst is the worst severity of a finding and what it explains: an error is told among the errors,
// whatever explains it.
func (n *Tree) Worst() Severity {
	worst := n.Severity
	n.Walk(func(below *Tree) { worst = max(worst, below.Severity) })
	return worst
}

// within says whether one is explained by itself in the end: a circle has no cause.
func (n *Tree) within(by *Tree, first map[ID]*Tree) bool {
	for range len(first) + 1 {
		if by == nil {
			return false
		}
		if by.ID == n.ID {
			return true
		}
		by = first[by.ExplainedBy]
	}
	return true
}

// Some picks what is worth showing where there may be thousands: in each place the first few of a
// kind stand for all, and those that explain something.
type Some struct {
	Few    int
	Others map[ID]int // how many of a kind were not picked
}

// Of picks some of the trees that stand in one place.
func (s *Some) Of(trees []*Tree) (some []*Tree) {
	if s.Others == nil {
		s.Others = map[ID]int{}
	}
	count := map[ID]int{}
	for _, n := range trees {
		if count[n.ID]++; count[n.ID] <= s.Few || len(n.Explains) > 0 {
			some = append(some, n)
		} else {
			s.Others[n.ID]++
		}
	}
	return some
}
