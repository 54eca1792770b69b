package page

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// maxLeft is how many rules that the kernel does not take are shown.
const maxLeft = 20

// standing is a word with its shape.
func standing(l fixed, word string, rest ...any) several {
	return several{el("span", class("standing"), icon(l), " ", word), several(rest)}
}

// card is one of several things that stand side by side.
func card(title any, inside ...any) element {
	return el("div", class("card"), el("h3", title), several(inside))
}

// rules are the rules of each family.
func rules(c Content) element {
	s, st := section("rules", "Rules"), c.status()
	if c.Status == nil {
		s.add([]any{note("As this look read them from the kernel.")})
	}
	cards := el("div", class("cards"))
	for _, f := range st.Families {
		cards.add([]any{family(c, f, st.Backend)})
	}
	if len(st.Families) == 0 {
		s.add([]any{el("p", class("nothing"), "Nothing is known of the rules yet.")})
		return s
	}
	s.add([]any{cards})
	return s
}

func family(c Content, f status.Family, backend string) element {
	state := standing(good, "as wanted")
	switch {
	case !f.Usable && c.Status == nil:
		state = standing(unknown, "not read")
	case !f.Usable:
		state = standing(warn, "cannot be used")
	case !f.Equal && c.Status == nil && len(c.Seen.Services) == 0:
		state = standing(unknown, "what is wanted is not known")
	case !f.Equal:
		state = standing(bad, "not as wanted")
	}
	jumps := "in: packets are looked at"
	if !f.Jumps {
		jumps = "out: connections go their own way"
	}
	var held, written any
	if f.Shape != nil && f.Shape.Held != "" {
		held = f.Shape.Held
	}
	if !f.Applied.IsZero() {
		written = ago(c.Time, f.Applied)
	}
	if !f.Usable && c.Status == nil {
		return card(f.Family, facts(fact{"State", state}, fact{"Why", f.Error}))
	}
	e := card(f.Family, facts(
		fact{"State", state}, fact{"Why", f.Error}, fact{"Held back", held}, fact{"Jumps", jumps},
		fact{"Rules", number(f.Rules) + " in " + orUnknown(backend)},
		fact{"For services", numberOf(f.Services, "prefix") + ", " + numberOf(f.ServicePorts, "port")},
		fact{"Outbound to", port(f.OutboundPort)}, fact{"Inbound to", port(f.InboundPort)},
		fact{"DNS to", port(f.DNSPort)}, fact{"Last written", written}))
	if len(f.Left) > 0 {
		list := el("ul")
		for _, left := range f.Left[:min(len(f.Left), maxLeft)] {
			list.add([]any{el("li", el("code", left.Rule), ": ", left.Why)})
		}
		if more := len(f.Left) - maxLeft; more > 0 {
			list.add([]any{el("li", "and "+number(more)+" more")})
		}
		e.add([]any{el("details", el("summary",
			"The kernel does not take "+numberOf(len(f.Left), "rule")), list)})
	}
	return e
}

func port(n uint16) any {
	if n == 0 {
		return nil
	}
	return el("code", "port "+strconv.Itoa(int(n)))
}

// envoy is what is known of Envoy and of who configures it.
func envoy(c Content) element {
	st := c.status()
	e := st.Envoy
	state := standing(good, e.State)
	switch {
	case e.State == "" && !e.Down.IsZero():
		state = standing(bad, "no answer", " since ", ago(c.Time, e.Down))
	case e.State == "":
		state = standing(unknown, "not known")
	case e.State != "LIVE":
		state = standing(warn, e.State)
	}
	configured := standing(good, "received")
	if !e.Configured {
		configured = standing(warn, "not received")
		if e.State == "" {
			configured = standing(unknown, "not known")
		}
	}
	listeners := any(numberOf(e.Listeners, "listener"))
	if e.Rejected > 0 {
		listeners = standing(bad, numberOf(e.Rejected, "listener")+" rejected",
			" of "+number(e.Listeners+e.Rejected))
	}
	var attribute any
	if a := st.Attribute; a != nil {
		attribute = several{"read ", ago(c.Time, a.Read)}
		if a.Kept {
			attribute = several{attribute, " by an earlier run, and kept"}
		}
	}
	var serving []string
	for _, p := range st.ServingPorts {
		serving = append(serving, strconv.Itoa(int(p)))
	}
	boot := ""
	if st.Bootstrap.Status != "" {
		boot = st.Bootstrap.Status + " " + st.Bootstrap.Failure
	}
	var admin any
	if e.Admin != "" {
		admin = el("code", e.Admin)
	}
	var node any
	if e.Node != "" {
		node = el("code", e.Node)
	}
	return section("envoy", "Envoy and control plane", el("div", class("cards"),
		card("Envoy", facts(fact{"State", state}, fact{"Version", e.Version}, fact{"Admin", admin},
			fact{"Listeners", listeners}, fact{"Bootstrap", strings.TrimSpace(boot)})),
		card("Control plane", facts(fact{"Configuration", configured}, fact{"Stream", stream(c)},
			fact{"Last heard", heard(c)}, fact{"Last closed", closed(c)},
			fact{"Agent's own try", c.status().ControlPlane.Error}, fact{"Node", node},
			fact{"Attribute", attribute},
			fact{"Serving ports", strings.Join(serving, ", ")})),
		questions(st.Cost)))
}

// questions are what the agent has asked Envoy, the dearest first, and what it may ask at once.
func questions(c status.Cost) any {
	if len(c.Questions) == 0 {
		return nil
	}
	all := slices.Clone(c.Questions)
	slices.SortStableFunc(all, func(a, b status.Question) int {
		return cmp.Compare(b.Seconds, a.Seconds)
	})
	column := attr{"scope", "col"}
	recent := "Lately"
	if c.Window > 0 {
		recent = fmt.Sprintf("Last %.0f s", c.Window)
	}
	body := el("tbody")
	for _, q := range all {
		body.add([]any{el("tr", el("th", attr{"scope", "row"}, strings.ReplaceAll(q.Name, "_", " ")),
			el("td", class("n"), number(q.Count)), el("td", class("n"), seconds(q.Recent)),
			el("td", class("n"), seconds(q.Seconds)))})
	}
	const caption = "What questions took of Envoy's main thread"
	return card("Questions to Envoy", wide(caption,
		el("table", class("questions"), el("caption", caption),
			el("thead", el("tr", el("th", column, "Question"), el("th", column, class("n"), "Times"),
				el("th", column, class("n"), recent), el("th", column, class("n"), "In all"))), body)),
		bucket(c.Bucket),
		note("Time of Envoy's main thread, at most, since the agent's start."))
}

// bucket is what questions to Envoy may take at once.
func bucket(b status.Bucket) any {
	if b.Size <= 0 {
		return nil
	}
	left := min(max(b.Level, 0), b.Size)
	return bar(fmt.Sprintf("%s of %s left, refilled at %s of the time", seconds(left), seconds(b.Size),
		percent(b.Share)), left/b.Size)
}

// ofStream are the checks that tell whether the control plane answers Envoy.
var ofStream = []symptom.ID{symptom.ControlPlaneLookUp, symptom.ControlPlaneConnect,
	symptom.APINotEnabled, symptom.PermissionDenied, symptom.ScopeMissing, symptom.ConfigNotFound,
	symptom.ControlPlaneRefused}

// stream is how Envoy's stream to the control plane stands: by what the checks found, then by what
// the daemon saw.
func stream(c Content) any {
	state := standing(unknown, "no end of it was seen") // that it stands, only the daemon knows
	switch cp := c.status().ControlPlane; {
	case cp.Known && cp.Connected:
		state = standing(good, "connected", to(cp.Target), since(c, cp.Since))
	case cp.Known:
		state = standing(bad, "not connected", to(cp.Target), since(c, cp.Since))
	}
	known := c.status().ControlPlane.Known
	for _, check := range c.Report.Checks {
		if !slices.Contains(ofStream, check.ID) {
			continue
		}
		switch check.State {
		case symptom.Found:
			return standing(bad, check.Title)
		case symptom.Unknown:
			if !known {
				state = standing(unknown, "not known", ": ", check.Why)
			}
		}
	}
	return state
}

func to(target string) any {
	if target == "" {
		return nil
	}
	return several{" to ", el("code", target)}
}

func since(c Content, t time.Time) any {
	if t.IsZero() {
		return nil
	}
	return several{" since ", ago(c.Time, t)}
}

// heard is when the control plane last sent listeners.
func heard(c Content) any {
	if t := c.status().ControlPlane.Heard; !t.IsZero() {
		return ago(c.Time, t)
	}
	return nil
}

// closed is how a stream last ended.
func closed(c Content) any {
	last := c.status().ControlPlane.Closed
	if last == nil {
		return nil
	}
	return several{ago(c.Time, last.Time), ", ", el("code", "code "+strconv.Itoa(last.Code)), " ",
		last.Message}
}

// channels are the ways on which the agent tells others.
func channels(c Content) element {
	s := section("channels", "Channels")
	if len(c.Status.Channels) == 0 {
		s.add([]any{el("p", class("nothing"), "The agent tells nothing of its channels.")})
		return s
	}
	cards := el("div", class("cards three"))
	for _, ch := range c.Status.Channels {
		state := standing(good, "up")
		switch {
		case !ch.Enabled:
			state = standing(advice, "off")
		case !ch.Up && ch.Last.IsZero() && ch.Error == "":
			state = standing(advice, "not used yet")
		case !ch.Up:
			state = standing(bad, "not up")
		}
		var dropped any = number(ch.Dropped)
		if ch.Dropped > 0 {
			dropped = standing(warn, number(ch.Dropped))
		}
		e := card(strings.ReplaceAll(ch.Name, "_", " "), facts(fact{"State", state},
			fact{"Why", ch.Error}))
		if ch.Enabled {
			e.add([]any{facts(fact{"Last write", ago(c.Time, ch.Last)},
				fact{"Written", number(ch.Written)}, fact{"Waiting", number(ch.Waiting)},
				fact{"Failures", number(ch.Failures)}, fact{"Dropped", dropped}), budget(ch.Budget, c.Time)})
		}
		cards.add([]any{e})
	}
	s.add([]any{cards, note("Counted since the agent's start.")})
	return s
}

// budget is what a channel may still write.
func budget(b status.Budget, now time.Time) any {
	if b.Most <= 0 {
		return nil
	}
	left := min(max(b.Left, 0), b.Most)
	text := fmt.Sprintf("%s of %s %s left", threeDigits(left), threeDigits(b.Most), b.Unit)
	if b.PerMinute > 0 {
		text += ", " + threeDigits(b.PerMinute) + " more a minute"
	}
	if b.Next.After(now) {
		text += ", the next in " + span(b.Next.Sub(now))
	}
	return bar(text, left/b.Most)
}

// bar is a text, and below it how much of something is left.
func bar(text string, share float64) element {
	const width = 200
	return el("div", class("budget"), el("p", text),
		el("svg", class("bar"), attr{"viewBox", "0 0 200 8"}, attr{"preserveAspectRatio", "none"},
			attr{"aria-hidden", "true"},
			el("rect", class("rest"), attr{"width", "200"}, attr{"height", "8"}),
			el("rect", class("left"), attr{"width", coordinate(share * width)},
				attr{"height", "8"})))
}

// checks are those that found nothing: why some could not look, and which they are.
func checks(c Content) element {
	s := section("checks", "Checks")
	if blind := c.Report.Unknowns(); len(blind) > 0 {
		list := el("ul", class("unknowns"))
		for _, u := range blind {
			var from []string
			for _, source := range u.Sources {
				from = append(from, string(source))
			}
			source := ""
			if len(from) > 0 {
				source = " (" + strings.Join(from, ", ") + ")"
			}
			list.add([]any{el("li", icon(unknown), el("div", el("strong", cmp.Or(u.Why, "not observed")),
				source, el("p", codes(u.Checks))))})
		}
		s.add([]any{el("h3", "Could not look"), list})
	}
	var fine, ignored []symptom.ID
	for _, check := range c.Report.Checks {
		switch check.State {
		case symptom.OK:
			fine = append(fine, check.ID)
		case symptom.Ignored:
			ignored = append(ignored, check.ID)
		}
	}
	for _, group := range []struct {
		title string
		ids   []symptom.ID
	}{{"found nothing", fine}, {"ignored", ignored}} {
		if len(group.ids) > 0 {
			s.add([]any{el("details", el("summary", numberOf(len(group.ids), "check")+" "+group.title),
				el("p", codes(group.ids)))})
		}
	}
	return s
}

func codes(ids []symptom.ID) (out several) {
	for i, one := range ids {
		if i > 0 {
			out = append(out, " ")
		}
		out = append(out, el("code", string(one)))
	}
	return out
}
