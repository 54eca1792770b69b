package page

import "github.com/service-proxy-agent/service-proxy-agent/internal/symptom"

// Levels are how something stands. Each has a word, a shape and a colour, so that none of them is
// needed to tell it.
const (
	good    fixed = "good"
	warn    fixed = "warn"
	bad     fixed = "bad"
	advice  fixed = "advice"
	unknown fixed = "unknown"
)

func levelOf(s symptom.Severity) fixed {
	switch s {
	case symptom.Error:
		return bad
	case symptom.Warning:
		return warn
	}
	return advice
}

// icon is a level's shape. What it says stands beside it.
func icon(shape fixed) element {
	return el("svg", class("icon "+shape), attr{"viewBox", "0 0 24 24"}, attr{"width", "20"},
		attr{"height", "20"}, attr{"aria-hidden", "true"}, el("use", href("#i-"+string(shape))))
}

// symbols are the shapes, once on a page.
func symbols() element {
	symbol := func(name fixed, shapes ...any) element {
		return el("symbol", id("i-"+string(name)), attr{"viewBox", "0 0 24 24"}, several(shapes))
	}
	path := func(kind fixed, d string) element { return el("path", class(kind), attr{"d", d}) }
	const circle = "M12 2a10 10 0 1 0 0 20 10 10 0 0 0 0-20z"
	return el("svg", class("symbols"), attr{"aria-hidden", "true"}, attr{"width", "0"},
		attr{"height", "0"},
		symbol(good, path("solid", circle), path("cut", "M7 12.5l3.4 3.4L17 9")),
		symbol(bad, path("solid", "M8 2h8l6 6v8l-6 6H8l-6-6V8z"), path("cut", "M8.5 8.5l7 7m0-7l-7 7")),
		symbol(warn, path("solid", "M12 2.5L23 21.5H1z"), path("cut", "M12 9v6m0 2.6v.4")),
		symbol(advice, path("solid", circle), path("cut", "M12 11v6m0-10v.4")),
		symbol(unknown, path("ring", "M12 3a9 9 0 1 0 0 18 9 9 0 0 0 0-18z"),
			path("line", "M9.2 9.2a2.9 2.9 0 1 1 4.2 2.6c-1 .5-1.4 1-1.4 2.2m0 3v.4")),
		symbol("mark", path("line", "M2 12h6m6-6h8m-8 12h8M8 12c4 0 2-6 6-6M8 12c4 0 2 6 6 6")))
}
