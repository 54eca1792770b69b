package page

import (
	"slices"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
)

// maxHistory is how many transitions are shown.
const maxHistory = 50

// history are the last transitions, newest first, by day.
func history(c Content) element {
	s := section("history", "History")
	if c.Status == nil || len(c.Status.History) == 0 {
		text := "Nothing has changed yet."
		if c.Status == nil {
			text = "Only the agent knows what has changed."
		}
		s.add([]any{el("p", class("nothing"), text)})
		return s
	}
	all := c.Status.History
	last := slices.Clone(all[max(0, len(all)-maxHistory):])
	slices.Reverse(last)
	for day := range chunksBy(last, func(t status.Transition) string {
		return t.Time.UTC().Format("Monday, 2 January 2006")
	}) {
		list := el("ol", class("history"))
		for _, t := range day.of {
			list.add([]any{transition(t)})
		}
		s.add([]any{el("h3", day.name), list})
	}
	if left := len(all) - len(last); left > 0 {
		s.add([]any{note(numberOf(left, "earlier one")+": ",
			el("code", "service-proxy-agent status -o json"), " has more")})
	}
	return s
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
	return el("li", at(t.Time, t.Time), icon(l, ""), text)
}

// part is a run of neighbours with one name.
type part[T any] struct {
	name string
	of   []T
}

// chunksBy cuts a list where the name changes.
func chunksBy[T any](all []T, name func(T) string) func(yield func(part[T]) bool) {
	return func(yield func(part[T]) bool) {
		for len(all) > 0 {
			p, n := part[T]{name: name(all[0])}, 1
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
