package page

import (
	"slices"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
)

// How many transitions are shown.
const (
	maxHistory = 50
	atOnce     = 12 // the others open
)

// history are the last transitions, newest first, by day.
func history(c Content) element {
	s := section("history", "History")
	if len(c.Status.History) == 0 {
		s.add([]any{el("p", class("nothing"), "Nothing has changed yet.")})
		return s
	}
	all := c.Status.History
	last := slices.Clone(all[max(0, len(all)-maxHistory):])
	slices.Reverse(last)
	s.add(days(last[:min(len(last), atOnce)]))
	if earlier := last[min(len(last), atOnce):]; len(earlier) > 0 {
		s.add([]any{el("details", class("earlier"),
			el("summary", number(len(earlier))+" before that"), several(days(earlier)))})
	}
	if left := len(all) - len(last); left > 0 {
		s.add([]any{note(numberOf(left, "earlier one")+": ",
			el("code", "service-proxy-agent status -o json"), " has more")})
	}
	return s
}

// days are transitions by the day on which they were.
func days(all []status.Transition) (out []any) {
	for day := range chunksBy(all, func(t status.Transition) string {
		return t.Time.UTC().Format("Monday, 2 January 2006")
	}) {
		list := el("ol", class("history"))
		for _, t := range day.of {
			list.add([]any{transition(t)})
		}
		out = append(out, el("h3", day.name), list)
	}
	return out
}

func transition(t status.Transition) element {
	l := advice
	switch t.Severity {
	case "error":
		l = bad
	case "warning":
		l = warn
	}
	text := el("div", el("p", el("span", class("hidden"), t.Severity+": "), t.Text))
	if t.By != "" {
		text.add([]any{note("by ", el("strong", t.By))})
	}
	if t.Times > 1 {
		text.add([]any{note(number(t.Times)+" times since ", at(t.Time, t.First))})
	}
	return el("li", at(t.Time, t.Time), icon(l), text)
}

// stretch is a run of neighbours with one name.
type stretch[T any] struct {
	name string
	of   []T
}

// chunksBy cuts a list where the name changes.
func chunksBy[T any](all []T, name func(T) string) func(yield func(stretch[T]) bool) {
	return func(yield func(stretch[T]) bool) {
		for len(all) > 0 {
			p, n := stretch[T]{name: name(all[0])}, 1
			for n < len(all) && name(all[n]) == p.name {
				n++
			}
			p.of, all = all[:n], all[n:]
			if !yield(p) {
				return
			}
		}
	}
}
