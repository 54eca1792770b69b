package page

import (
	"fmt"
	"strings"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// maxAlike is how many findings of one kind are shown in one place.
const maxAlike = 20

// findings are what was found, worst first, each with what it explains inside.
func findings(c Content) element {
	s := section("findings", "Findings")
	t := telling{c: c}
	all := t.all(c.Report.Tree(), 3)
	if told := c.toldErrors(); len(told) > 0 {
		all = append(all, note("The agent told of this in its last pass; this look did not find it:"))
		all = append(all, t.all(told, 3)...)
	}
	if len(all) > 0 {
		s.add(all)
		return s
	}
	text := "Nothing was found."
	if h := headline(c); h.level == unknown {
		text = "Nothing was found by the checks that could look."
	}
	s.add([]any{el("p", class("nothing"), text)})
	return s
}

// telling numbers the findings, so that each can be led to.
type telling struct {
	c Content
	n int
}

func (t *telling) all(nodes []*symptom.Tree, depth int) (out []any) {
	few := symptom.Some{Few: maxAlike}
	some := few.Of(nodes)
	for _, n := range some {
		out = append(out, t.one(n, depth))
	}
	for _, n := range some {
		if left := few.Others[n.ID]; left > 0 {
			out = append(out, note(fmt.Sprintf("and %s more of %s: ", number(left), n.ID),
				el("code", "service-proxy-agent doctor -o json"), " has more of them"))
			delete(few.Others, n.ID)
		}
	}
	return out
}

// prose is a text in which commands stand between backticks.
func prose(text string) (out several) {
	pieces := strings.Split(text, "`")
	if len(pieces)%2 == 0 {
		return several{text} // one is alone
	}
	for i, piece := range pieces {
		if i%2 == 1 {
			out = append(out, el("code", piece))
		} else {
			out = append(out, piece)
		}
	}
	return out
}

var headings = []fixed{"h3", "h4", "h5", "h6"}

func (t *telling) one(n *symptom.Tree, depth int) element {
	t.n++
	l := levelOf(n.Severity)
	heading := headings[min(depth-3, len(headings)-1)]
	key := []any{}
	if n.Key != "" {
		key = append(key, el("span", class("key"), n.Key))
	}
	a := el("article", class("finding "+l), id(fmt.Sprintf("finding-%d", t.n)),
		el("header", el(heading, icon(l), el("span", titleOf(t.c.Report, n.ID))),
			el("p", class("labels"), el("span", class("label "+l), n.Severity.String()),
				el("code", string(n.ID)), several(key))),
		el("p", prose(n.Cause)))
	if n.Next != "" {
		a.add([]any{el("p", class("next"), el("strong", "Next"), " ", prose(n.Next))})
	}
	if len(n.Commands) > 0 {
		a.add([]any{el("pre", class("commands"), attr{"tabindex", "0"}, attr{"role", "group"},
			attr{"aria-label", "Commands to run"}, el("code", lines(strings.Join(n.Commands, "\n"))))})
	}
	if !n.Since.IsZero() {
		a.add([]any{note("since ", ago(t.c.Time, n.Since))})
	}
	if len(n.Evidence) > 0 {
		list := el("ul")
		for _, e := range n.Evidence {
			when := any(nil)
			if !e.Time.IsZero() {
				when = several{" at ", at(t.c.Time, e.Time)}
			}
			list.add([]any{el("li", el("span", class("source"), string(e.Source)), when, ": ",
				el("q", e.Text))})
		}
		a.add([]any{el("details", el("summary", "Seen by "+numberOf(len(n.Evidence), "source")), list)})
	}
	if len(n.Explains) > 0 {
		a.add([]any{el("div", class("explains"), note("explains"), several(t.all(n.Explains, depth+1)))})
	}
	return a
}
