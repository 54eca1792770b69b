// Package page makes one self-contained HTML page of what a look and the daemon know: no external
// asset, no script, and by its Content-Security-Policy no request either. It is pure. Whatever is
// in a text or an attribute is bounded, made printable and escaped where it is written (html.go).
//
// It writes the HTML itself and escapes by html.EscapeString. html/template would make the program
// 27.0 MB instead of 18.8 (linux/amd64, Go 1.26), since it calls methods by their names, which
// switches the linker's elimination of dead code off. This package takes 0.3 MB.
package page

import (
	"bytes"
	"cmp"
	"io"
	"slices"
	"strconv"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/doctor"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
)

// Content is what the page shows.
type Content struct {
	Time   time.Time // of the look
	Host   string
	Commit string         // of the program; its version is the Report's
	Status *status.Status // nil: the daemon does not answer
	// NoStatus is why it does not.
	NoStatus string
	// Seen is what the look itself saw of Envoy, rules and services: what is shown without a daemon.
	Seen   status.Status
	Report doctor.Report
	// Counts are how many connections each service has got since its rule is there, by the address in
	// status.Service; nil: not known, and NoCounts is why.
	Counts   map[string]Count
	NoCounts string
	// Age is how old what is shown is, where the page is served: a new look may take its time.
	Age time.Duration
	// Live is set where the page is served and not a file: it refreshes itself unless it is Paused,
	// and leads to the explain form.
	Live, Paused bool
}

// Refresh is how often a live page is loaded anew.
const Refresh = 10 * time.Second

// Where a live page leads, from itself: who serves it says in which folder. The form has a URL of
// its own: so what is being typed is not lost when the overview refreshes itself.
const (
	OverviewPath = "./"
	PausedQuery  = "paused" // the overview with this in its query has Content.Paused
	ExplainPath  = "explain"
)

// Question is the page with the form, on which one asks what becomes of a connection. The form's
// fields are named To, UID and Direction in lower case.
type Question struct {
	Time      time.Time
	Host      string
	To, UID   string // as they were typed
	Direction string // "outbound" or "inbound"
	// Answer is what `explain` says, in lines; "": nothing was asked yet.
	Answer string
}

// Directions of a Question.
const (
	Outbound = "outbound"
	Inbound  = "inbound"
)

// Render writes the page.
func Render(w io.Writer, c Content) error {
	parts := partsOf(c)
	main := el("main", id("main"), verdict(c), contents(parts))
	for _, p := range parts {
		main.add([]any{p.of(c)})
	}
	title := headline(c).word + " · " + c.Host + " · service-proxy-agent"
	head := []any{}
	if c.Live && !c.Paused {
		head = append(head, el("meta", attr{"http-equiv", "refresh"},
			attr{"content", strconv.Itoa(int(Refresh.Seconds()))}))
	}
	return write(w, c.Live, title, head,
		top(c.Host, c.Time, c.controls()),
		main, bottom(c))
}

// part is a part of the page, with the id and the name that it has in the contents.
type part struct {
	id, name string
	of       func(Content) element
	daemon   bool // of what only the daemon knows
}

var parts = []part{
	{"findings", "Findings", findings, false},
	{"charts", "Last minutes", charts, true},
	{"history", "History", history, true},
	{"services", "Services", services, false},
	{"rules", "Rules", rules, false},
	{"envoy", "Envoy and control plane", envoy, false},
	{"channels", "Channels", channels, true},
	{"checks", "Checks", checks, false},
}

// partsOf are those that something is known of.
func partsOf(c Content) []part {
	return slices.DeleteFunc(slices.Clone(parts), func(p part) bool {
		return p.daemon && c.Status == nil
	})
}

// write writes a document.
func write(w io.Writer, live bool, title string, head []any, body ...any) error {
	var b bytes.Buffer
	b.WriteString("<!DOCTYPE html>\n")
	el("html", attr{"lang", "en"},
		el("head",
			el("meta", attr{"charset", "utf-8"}),
			el("meta", attr{"http-equiv", "Content-Security-Policy"}, attr{"content", Policy(live)}),
			el("meta", attr{"name", "viewport"}, attr{"content", "width=device-width, initial-scale=1"}),
			el("meta", attr{"name", "color-scheme"}, attr{"content", "light dark"}),
			el("meta", attr{"name", "referrer"}, attr{"content", "no-referrer"}),
			el("meta", attr{"name", "robots"}, attr{"content", "noindex"}),
			several(head),
			el("title", title),
			el("style")),
		el("body", el("a", class("skip"), href("#main"), "Skip to the content"), symbols(),
			several(body))).write(&b)
	b.WriteByte('\n')
	_, err := w.Write(b.Bytes())
	return err
}

// top is the line above everything.
func top(host string, now time.Time, controls any) element {
	return el("header", class("top"),
		el("p", class("brand"), icon("mark"), el("strong", "service-proxy-agent"),
			el("span", class("host"), host)),
		el("p", class("when"), controls, el("time", attr{"datetime", now.UTC().Format(time.RFC3339)},
			now.UTC().Format("2 Jan 2006, 15:04:05 UTC"))))
}

// controls are the links of a live page.
func (c Content) controls() any {
	if !c.Live {
		return nil
	}
	explain := several{el("a", class("button"), href(ExplainPath), "Explain a connection")}
	old := ""
	if c.Age > 2*Refresh {
		old = span(c.Age) + " old, "
	}
	if c.Paused {
		return several{explain, el("a", class("button"), href(OverviewPath), "Refresh again"),
			el("span", class("note"), "not refreshed, "+old+"as of ")}
	}
	return several{explain, el("a", class("button"), href(OverviewPath+"?"+PausedQuery+"=1"), "Pause"),
		el("span", class("note"), "every "+span(Refresh)+", "+old+"as of ")}
}

// bottom says what made the page.
func bottom(c Content) element {
	agent := "not known: it does not answer"
	if c.Status != nil {
		agent = c.Status.Version + ", started " + c.Status.Started.UTC().Format(time.RFC3339) +
			", last pass " + span(c.Time.Sub(c.Status.Heartbeat)) + " before this page"
	}
	program := c.Report.Version
	if c.Commit != "" {
		program += " (" + c.Commit + ")"
	}
	return el("footer", facts(
		fact{"This page", several{"made at ", at(time.Time{}, c.Time),
			" UTC by service-proxy-agent " + program}},
		fact{"Agent", agent}, fact{"Envoy", orUnknown(c.status().Envoy.Version)},
		fact{"Times", "are UTC"}),
		el("p", class("note"), "It changes nothing and asks for nothing: it has no script, and its own "+
			"security policy forbids every request."))
}

// status is what the daemon tells, or what of that was seen without it.
func (c Content) status() status.Status {
	if c.Status != nil {
		return *c.Status
	}
	return c.Seen
}

// section is a part of the page with its heading. Its id is the target of the contents.
func section(name, title fixed, inside ...any) element {
	return el("section", id(string(name)), attr{"aria-labelledby", string(name) + "-title"},
		el("h2", id(string(name)+"-title"), string(title)), several(inside))
}

// fact is a name and what is known.
type fact struct {
	name  string
	value any
}

// facts are a list of them; those without a value are left out.
func facts(all ...fact) element {
	list := el("dl", class("facts"))
	for _, f := range all {
		if f.value != nil && f.value != "" {
			list.add([]any{el("div", el("dt", f.name), el("dd", f.value))})
		}
	}
	return list
}

func orUnknown(s string) string { return cmp.Or(s, "not known") }

func note(inside ...any) element { return el("p", class("note"), several(inside)) }
