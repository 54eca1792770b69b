package page

import (
	"cmp"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strings"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

const (
	plainServices = 40     // so many are one table
	groupServices = 200    // else a table of so many each, which opens when the browser's find hits it
	maxServices   = 10_000 // more are counted
	maxAddresses  = 8      // of one service
	maxBusiest    = 10
	maxName       = 120
)

// services are all services with what was counted.
func services(c Content) element {
	all := c.status().Services
	s := section("services", "Services")
	if len(all) == 0 {
		text := "No service is intercepted."
		if c.Status == nil {
			text = "Which services are wanted is not known."
		}
		s.add([]any{el("p", class("nothing"), text)})
		return s
	}
	t := serviceTables{c: c, shared: anyShared(c, all)}
	shown := all[:min(len(all), maxServices)]
	if len(shown) <= plainServices {
		s.add([]any{t.table("All services", shown)})
	} else {
		s.add(t.groups(shown))
	}
	if left := len(all) - len(shown); left > 0 {
		s.add([]any{note(numberOf(left, "service")+" more: ",
			el("code", "service-proxy-agent status -o json"), " has all of them")})
	}
	switch {
	case c.Counts == nil:
		s.add([]any{note("Connections were not counted: " + orUnknown(c.NoCounts))})
	case c.NoCounts != "":
		s.add([]any{note("Not all connections are known: " + c.NoCounts)})
	}
	if c.Counts != nil {
		text := "Connections are those that the kernel has led to Envoy since it was given the rule. "
		if t.shared {
			text += "Shared: it counts by address, or by several adjacent ones, whatever the port."
		}
		s.add([]any{note(text)})
	}
	return s
}

type serviceTables struct {
	c      Content
	shared bool
}

// groups are the busiest services, and then all by name, in parts.
func (t serviceTables) groups(all []status.Service) (out []any) {
	if busiest := t.busiest(all); len(busiest) > 0 {
		out = append(out, el("h3", "Busiest"), t.table("The busiest services", busiest))
	}
	out = append(out, el("h3", "By name"),
		note("Your browser's search looks into the closed groups, too."))
	groups := el("div", class("groups"))
	for part := range slices.Chunk(all, groupServices) {
		first, last := cut(part[0].Name), cut(part[len(part)-1].Name)
		groups.add([]any{el("details",
			el("summary", el("span", first), " … ", el("span", last), " ",
				el("span", class("note"), numberOf(len(part), "service"))),
			t.table("Services from "+first+" to "+last, part))})
	}
	return append(out, groups)
}

func (t serviceTables) busiest(all []status.Service) []status.Service {
	type counted struct {
		status.Service
		n uint64
	}
	var some []counted
	for _, s := range all {
		if n, _, ok := t.count(s); ok && n > 0 {
			some = append(some, counted{s, n})
		}
	}
	slices.SortStableFunc(some, func(a, b counted) int { return cmp.Compare(b.n, a.n) })
	var out []status.Service
	for _, s := range some[:min(len(some), maxBusiest)] {
		out = append(out, s.Service)
	}
	return out
}

// count is the sum of a service's addresses.
func (t serviceTables) count(s status.Service) (n uint64, shared, ok bool) {
	seen := map[string]bool{}
	for _, address := range s.Addresses {
		c, known := t.c.Counts[address]
		if !known || seen[c.Row] {
			continue
		}
		seen[c.Row], ok = true, true
		n, shared = n+c.Connections, shared || c.Shared
	}
	return n, shared, ok
}

func (t serviceTables) table(caption string, all []status.Service) element {
	column := attr{"scope", "col"}
	head := el("tr", el("th", column, "Service"), el("th", column, "Addresses"))
	if t.c.Counts != nil {
		head.add([]any{el("th", column, class("n"), "Connections")})
	}
	body := el("tbody")
	for _, s := range all {
		row := el("tr", el("th", attr{"scope", "row"}, foldable(cut(s.Name))), el("td", t.addresses(s)))
		if t.c.Counts != nil {
			n, shared, ok := t.count(s)
			cell := el("td", class("n"))
			switch {
			case !ok:
				cell.add([]any{el("span", class("note"), "not known")})
			case shared:
				cell.add([]any{number(n), " ", el("span", class("note"), "shared")})
			default:
				cell.add([]any{number(n)})
			}
			row.add([]any{cell})
		}
		body.add([]any{row})
	}
	return wide(caption,
		el("table", class("services"), el("caption", caption), el("thead", head), body))
}

// addresses are those of a service. On a live page each leads to the form.
func (t serviceTables) addresses(s status.Service) (out several) {
	for i, address := range s.Addresses {
		if i == maxAddresses {
			out = append(out, el("span", class("note"), fmt.Sprintf(" and %s more",
				number(len(s.Addresses)-maxAddresses))))
			break
		}
		if i > 0 {
			out = append(out, " ")
		}
		text := el("code", cut(address))
		if _, err := netip.ParseAddrPort(address); t.c.Live && err == nil {
			out = append(out, el("a", href(ExplainPath+"?"+url.Values{"to": {address}}.Encode()), text))
		} else {
			out = append(out, text)
		}
	}
	return out
}

func anyShared(c Content, all []status.Service) bool {
	for _, s := range all {
		for _, address := range s.Addresses {
			if c.Counts[address].Shared {
				return true
			}
		}
	}
	return false
}

// connections are all of them, each row of the kernel's once.
func connections(c Content) (total uint64, ok bool) {
	rows := map[string]bool{}
	for _, count := range c.Counts {
		if !rows[count.Row] {
			rows[count.Row] = true
			total += count.Connections
		}
	}
	return total, len(rows) > 0
}

// foldable is a name that a narrow column may break after its dots.
func foldable(name string) (out several) {
	for i, word := range strings.SplitAfter(name, ".") {
		if i > 0 && word != "" {
			out = append(out, el("wbr"))
		}
		out = append(out, word)
	}
	return out
}

// cut bounds a name: ten thousand of them have to fit.
func cut(s string) string { return symptom.Printable(s, maxName) }

// wide is a table that may be wider than a phone: it scrolls by itself, by keyboard too.
func wide(label string, table element) element {
	return el("div", class("wide"), attr{"role", "group"}, attr{"aria-label", label},
		attr{"tabindex", "0"}, table)
}
