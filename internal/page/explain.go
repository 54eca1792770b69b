package page

import "io"

// RenderQuestion writes the page with the form.
func RenderQuestion(w io.Writer, q Question) error {
	title := "Explain a connection"
	field := func(name fixed, label, hint, value string, more ...any) element {
		return el("p", class("field"), el("label", attr{"for", "field-" + string(name)}, label),
			el("input", id("field-"+string(name)), attr{"name", string(name)}, attr{"type", "text"},
				attr{"value", value}, attr{"placeholder", hint}, attr{"autocomplete", "off"},
				attr{"spellcheck", "false"}, several(more)))
	}
	direction := func(value, label string) element {
		in := el("input", attr{"type", "radio"}, id("direction-"+value), attr{"name", "direction"},
			attr{"value", value})
		if (q.Direction == Inbound) == (value == Inbound) {
			in.add([]any{attr{"checked", ""}})
		}
		return el("span", class("choice"), in, el("label", attr{"for", "direction-" + value}, label))
	}
	main := el("main", id("main"), el("section", class("ask"), attr{"aria-labelledby", "ask"},
		el("h1", id("ask"), title),
		el("p", class("lede"), "Would a connection be intercepted, by which rule, and what does Envoy "+
			"do with it? No connection is made."),
		el("form", attr{"method", "get"}, attr{"action", ExplainPath},
			field("to", "Address and port", "10.0.0.1:80", q.To, attr{"required", ""}),
			field("uid", "Made by user", "name or number; an ordinary user", q.UID),
			el("fieldset", el("legend", "Direction"), direction(Outbound, "from this VM"),
				direction(Inbound, "into this VM")),
			el("p", class("field"), el("button", attr{"type", "submit"}, "Explain")))))
	if q.Answer != "" {
		main.add([]any{el("section", attr{"aria-labelledby", "answer"}, el("h2", id("answer"), "Answer"),
			el("pre", class("answer"), attr{"tabindex", "0"}, attr{"role", "group"},
				attr{"aria-labelledby", "answer"}, lines(q.Answer)))})
	}
	return write(w, true, title+" · "+q.Host+" · service-proxy-agent", nil,
		top(q.Host, q.Time, el("a", class("button"), href(OverviewPath), "Overview")), main)
}
