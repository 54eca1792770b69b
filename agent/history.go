package agent

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/reconcile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/report"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

const (
	maxTransitions = 50
	// Others have written some of a transition, and all of them are in a file and in each Status:
	// these bound both, at about 40 kB.
	maxTransitionText = 480
	maxTransitionKey  = 120
	maxTransitionBy   = 80
)

// history are the last transitions, in the order in which they came: a clock that is set changes
// none of it. It is pure: it is told the time, and asks nobody.
//
// What flaps must not push out what happened before it began, so not simply the oldest goes. What
// comes again within an hour and says what the last of its kind said joins that line, which counts.
// Where there is no room all the same, it is made in the group that has the most lines (a kind, or
// one ID of findings): the oldest that a later one repeats joins that, and where none is repeated
// the oldest goes.
type history struct {
	lines []status.Transition
	shown []status.Transition // a copy for everybody, which nobody changes
	news  bool                // shown is not lines

	// What passes have told.
	families  []reconcile.Outcome // of the last
	repaired  map[string]*repair  // the last of each family
	restarts  int                 // of Envoy
	attribute struct {
		serial uint64
		known  bool
	}
}

// repair is the last one of a family's rules.
type repair struct {
	at    time.Time // by the family, zero: none yet
	named bool
}

// add puts a transition at the end.
func (h *history) add(t status.Transition, now time.Time) {
	t.Time = now.UTC().Truncate(time.Millisecond)
	t = bounded(t)
	h.join(&t) // the one before may have waited for its name
	h.lines, h.news = append(h.lines, t), true
	// A drift whose program the kernel has not named may be named yet.
	if t.Kind != status.OfDrift || t.By != "" {
		h.join(&t)
	}
	for len(h.lines) > maxTransitions {
		h.makeRoom()
	}
}

// bounded is a transition that is short and printable whoever wrote its words.
func bounded(t status.Transition) status.Transition {
	t.Text = symptom.Printable(t.Text, maxTransitionText)
	t.Key = symptom.Printable(t.Key, maxTransitionKey)
	t.By = symptom.Printable(t.By, maxTransitionBy)
	return t
}

// join makes one line of the newest two that are about what t is, if they say the same.
func (h *history) join(t *status.Transition) {
	last := h.newest(t, len(h.lines))
	before := h.newest(t, last)
	if before < 0 || !alike(&h.lines[before], &h.lines[last]) ||
		h.lines[last].Time.Sub(h.lines[before].Time).Abs() >= forgetAfter {
		return
	}
	h.fold(before, last)
}

// newest is the last line before end that is about what t is; -1: none.
func (h *history) newest(t *status.Transition, end int) int {
	for i := end - 1; i >= 0; i-- {
		if sameThing(&h.lines[i], t) {
			return i
		}
	}
	return -1
}

// sameThing says whether both are about the same thing.
func sameThing(a, b *status.Transition) bool {
	return a.Kind == b.Kind && a.ID == b.ID && a.Key == b.Key
}

// alike says whether both say the same. Who undoes our rules undoes now this one, now that one, and
// a script's programs have another pid each time.
func alike(a, b *status.Transition) bool {
	return sameThing(a, b) && a.Severity == b.Severity &&
		(a.Text == b.Text || a.Kind == status.OfDrift) && program(a.By) == program(b.By)
}

// program is who did it, without the pid.
func program(by string) string {
	if at := strings.LastIndex(by, " (pid "); at >= 0 {
		return by[:at]
	}
	return by
}

// fold makes line i a part of j, which came later.
func (h *history) fold(i, j int) {
	was, is := h.lines[i], &h.lines[j]
	is.Times = max(was.Times, 1) + max(is.Times, 1)
	if is.First = was.First; is.First.IsZero() {
		is.First = was.Time
	}
	h.lines = slices.Delete(h.lines, i, i+1)
}

// makeRoom takes a line out of the largest group.
func (h *history) makeRoom() {
	in := h.largest()
	for n, i := range in {
		for _, j := range in[n+1:] {
			if alike(&h.lines[i], &h.lines[j]) {
				h.fold(i, j)
				return
			}
		}
	}
	h.lines = slices.Delete(h.lines, in[0], in[0]+1)
}

// largest are the lines of the largest group, of several that whose oldest is the oldest.
func (h *history) largest() (largest []int) {
	var names []string
	var groups [][]int // in the order of their oldest lines
	for i, t := range h.lines {
		of := cmp.Or(string(t.ID), t.Kind)
		at := slices.Index(names, of)
		if at < 0 {
			at, names, groups = len(names), append(names, of), append(groups, nil)
		}
		groups[at] = append(groups[at], i)
	}
	for _, g := range groups {
		if len(g) > len(largest) {
			largest = g
		}
	}
	return largest
}

// has says whether a finding was told since it stands.
func (h *history) has(f symptom.Finding) bool {
	return slices.ContainsFunc(h.lines, func(t status.Transition) bool {
		return t.ID == f.ID && !t.Time.Before(f.Since)
	})
}

// show returns the transitions for everybody to read, and whether they are others than before.
func (h *history) show() (shown []status.Transition, news bool) {
	news = h.news
	if news {
		h.shown, h.news = slices.Clone(h.lines), false
	}
	return h.shown, news
}

// note takes in what the log was told, which is of this kind.
func (h *history) note(kind string, e report.Event, now time.Time) {
	t := status.Transition{Kind: kind, Severity: strings.ToLower(string(e.Severity)),
		Text: e.Message, ID: e.Finding.ID, Key: e.Finding.Key}
	switch t.ID {
	case symptom.DriftRepaired:
		o := h.family(t.Key)
		if o.Status.Equal {
			return // a pass has told of the repair
		}
		t.Kind, t.By = status.OfDrift, o.Facts.By
	case symptom.Fight:
		if e.Severity == report.Error {
			t.By = h.family(t.Key).Facts.By
		}
	}
	h.add(t, now)
}

// family is what came of the last pass in a family.
func (h *history) family(name string) (o reconcile.Outcome) {
	for _, o := range h.families {
		if o.Status.Family == name {
			return o
		}
	}
	return o
}

// pass takes in a pass, before what it tells in other ways is noted.
func (h *history) pass(p passed, now time.Time) {
	h.families = p.outcomes
	for i := range p.outcomes {
		h.rules(&p.outcomes[i], now)
	}
	if n := p.seen.Envoy.Restarts; n != h.restarts {
		h.restarts = n
		h.add(status.Transition{Kind: status.OfEnvoy, Severity: "info", Text: "Envoy restarted"}, now)
	}
	if a := p.seen.Attribute; a.Serial != h.attribute.serial {
		was := h.attribute.known
		h.attribute.serial, h.attribute.known = a.Serial, a.Good != nil
		if text := newAttribute(a, was); text != "" {
			h.add(status.Transition{Kind: status.OfAttribute, Severity: "info", Text: text}, now)
		}
	}
}

// newAttribute is what the log says of an attribute that was put in force; was is that there was
// one before.
func newAttribute(a attributeInForce, was bool) string {
	switch {
	case a.Good == nil:
	case a.Good.Kept:
		return "the attribute that an earlier run kept is in force"
	case was:
		return "attribute changed"
	}
	return ""
}

// rules takes in what a pass did to the rules of one family.
func (h *history) rules(o *reconcile.Outcome, now time.Time) {
	name := o.Status.Family
	if o.Adopted > 0 {
		h.add(status.Transition{Kind: status.OfRules, Key: name, Severity: "info",
			Text: fmt.Sprintf("%s: %d rules adopted", name, o.Adopted)}, now)
	}
	r := h.repaired[name]
	if r == nil {
		if h.repaired == nil {
			h.repaired = map[string]*repair{}
		}
		r = &repair{}
		h.repaired[name] = r
	}
	drift := status.Transition{Kind: status.OfDrift, ID: symptom.DriftRepaired, Key: name,
		Severity: "warning", By: o.LastDriftBy}
	switch {
	case len(o.Drift) > 0:
		drift.Text = fmt.Sprintf("%s rules repaired: %s", name, inShort(o.Facts.Drift))
		*r = repair{at: o.LastDriftAt, named: o.LastDriftBy != ""}
		h.add(drift, now)
	case !r.named && o.LastDriftBy != "" && !r.at.IsZero() && r.at.Equal(o.LastDriftAt):
		r.named = true // the kernel's word came late
		h.name(&drift)
	}
	if o.Facts.Fighting && o.Facts.By != "" {
		h.name(&status.Transition{Kind: status.OfFinding, ID: symptom.Fight, Key: name, By: o.Facts.By})
	}
}

// name says who did what the newest line about t tells, if that does not.
func (h *history) name(t *status.Transition) {
	at := h.newest(t, len(h.lines))
	if at < 0 || h.lines[at].By != "" || h.lines[at].Severity == "info" { // that it is over
		return
	}
	h.lines[at].By, h.news = symptom.Printable(t.By, maxTransitionBy), true
	h.join(t)
}

// inShort is the first difference, and how many there are.
func inShort(drift []iptables.Drift) string {
	switch n := len(drift); n {
	case 0:
		return "they differed"
	case 1:
		return drift[0].String()
	default:
		return fmt.Sprintf("%v, and %d more differences", drift[0], n-1)
	}
}
