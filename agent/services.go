package agent

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/report"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
)

const (
	maxNamed     = 10 // services that one telling names of each kind: found, changed, gone
	maxAddresses = 5  // of one service in a line
	// A change is told at once, until so many lines were told, of which one counts no longer every
	// six seconds. From then on the changes of a minute are told together, until a minute had none.
	lineBurst    = 30
	lineEvery    = 6 * time.Second
	togetherEach = time.Minute
)

// serviceNews follows which services' rules are in, and says in words what came and went. It is
// pure: each pass is given to it. It compares lists only when the want is another one, so that a
// pass costs nothing with 10,000 services.
//
// A control plane that changes its mind each second would fill the serial port, of which one can
// read the last megabyte. So what is told is the difference to what was told last, and when.
type serviceNews struct {
	of struct { // what in was made of
		serial uint64 // of the want; 0: nothing yet
		usable [2]bool
	}
	in    intercepted
	count int // of the services in it

	said     intercepted // as it was when it was told
	saidAt   time.Time
	changes  int       // since
	together bool      // the changes of a minute
	paid     time.Time // when no line counts any longer
}

// pass takes a pass and returns what is to be told of it.
func (n *serviceNews) pass(p passed) []report.Event {
	now := p.seen.Now
	if usable, in := p.servicesIn(); in && (n.of.serial != p.serial || n.of.usable != usable) {
		first := n.of.serial == 0
		n.of.serial, n.of.usable = p.serial, usable
		was := n.in
		n.in = only(p.want.Served, usable)
		switch {
		case first:
			n.said, n.saidAt, n.count = n.in, now, len(n.in.services())
			return []report.Event{number(n.count)}
		case len(changed(was, n.in)) > 0:
			n.changes++
			n.count = len(n.in.services())
		case n.changes == 0:
			n.said = n.in // the same, and held once
		}
	}
	return n.due(now)
}

// servicesIn says whether the rules of all wanted services are in, as far as the family can be used
// at all, and redirect.
func (p passed) servicesIn() (usable [2]bool, in bool) {
	if !p.known || p.paused {
		return usable, false
	}
	for i, o := range p.outcomes {
		want := p.want.Families[i]
		none := len(want.Services)+len(want.ServicePorts) == 0
		switch s := o.Status; {
		case !s.Usable:
		case !s.Equal || !s.Jumps && !none:
			return usable, false
		default:
			usable[i], in = true, true
		}
	}
	return usable, in
}

// due is what is to be told now.
func (n *serviceNews) due(now time.Time) []report.Event {
	if n.changes == 0 && !n.together {
		return nil
	}
	if !n.together && n.paid.Sub(now) > (lineBurst-1)*lineEvery {
		n.together = true
		return []report.Event{{Severity: report.Warning,
			Message: "services change all the time: from now on it is told once a minute what has changed"}}
	}
	if n.together && now.Sub(n.saidAt) < togetherEach {
		return nil
	}
	var events []report.Event
	news := changed(n.said, n.in)
	if n.together && n.changes > 1 {
		text := fmt.Sprintf("services have changed %d times in the last minute", n.changes)
		if len(news) == 0 {
			text += ", and are as before"
		}
		events = append(events, report.Event{Severity: report.Warning, Message: text,
			Fields: []report.Field{{Key: "changes", Value: strconv.Itoa(n.changes)}}})
	}
	events = append(events, inWords(news)...)
	n.together = n.together && n.changes > 0
	n.said, n.saidAt, n.changes = n.in, now, 0
	if n.paid.Before(now) {
		n.paid = now
	}
	n.paid = n.paid.Add(time.Duration(min(len(events), lineBurst)) * lineEvery)
	return events
}

// number is the line of a start.
func number(n int) report.Event {
	text := fmt.Sprintf("%d services are intercepted", n)
	if n == 1 {
		text = "1 service is intercepted"
	}
	return report.Event{Severity: report.Info, Message: text,
		Fields: []report.Field{{Key: "services", Value: strconv.Itoa(n)}}}
}

// difference is what became of a service: was is nil when it was found, is when it is gone.
type difference struct {
	name    string
	was, is []string // addresses
}

func (d difference) what() string {
	switch {
	case d.was == nil:
		return "found"
	case d.is == nil:
		return "gone"
	}
	return "changed"
}

// changed are the services that differ. Lists of 10,000 that differ in a few have the rest in
// common at their ends, and that is not looked at.
func changed(were, are intercepted) []difference {
	names := map[string]bool{}
	for i := range families {
		was, is := were[i], are[i]
		for len(was) > 0 && len(is) > 0 && was[0] == is[0] {
			was, is = was[1:], is[1:]
		}
		for len(was) > 0 && len(is) > 0 && was[len(was)-1] == is[len(is)-1] {
			was, is = was[:len(was)-1], is[:len(is)-1]
		}
		for _, s := range slices.Concat(was, is) {
			names[s.name()] = true
		}
	}
	return differences(were.named(names).services(), are.named(names).services())
}

// differences leads from the services that were to those that are, both by name.
func differences(were, are []status.Service) (all []difference) {
	for len(were)+len(are) > 0 {
		switch {
		case len(are) == 0 || len(were) > 0 && were[0].Name < are[0].Name:
			all = append(all, difference{name: were[0].Name, was: were[0].Addresses})
			were = were[1:]
		case len(were) == 0 || are[0].Name < were[0].Name:
			all = append(all, difference{name: are[0].Name, is: are[0].Addresses})
			are = are[1:]
		default:
			if !sameService(were[0], are[0]) {
				all = append(all, difference{were[0].Name, were[0].Addresses, are[0].Addresses})
			}
			were, are = were[1:], are[1:]
		}
	}
	return all
}

func sameService(a, b status.Service) bool {
	return a.Name == b.Name && slices.Equal(a.Addresses, b.Addresses)
}

// inWords is an event for each difference, so that one can be looked for by its name, and of each
// kind one for all beyond maxNamed.
func inWords(all []difference) (events []report.Event) {
	for _, what := range []string{"found", "changed", "gone"} {
		n := 0
		for _, d := range all {
			if d.what() != what {
				continue
			}
			if n++; n <= maxNamed {
				events = append(events, d.event())
			}
		}
		if more := n - maxNamed; more > 0 {
			events = append(events, report.Event{Severity: report.Info,
				Message: fmt.Sprintf("and %d more services %s", more, what),
				Fields:  []report.Field{{Key: "services", Value: strconv.Itoa(more)}}})
		}
	}
	return events
}

func (d difference) event() report.Event {
	is, was := some(d.is), some(d.was)
	e := report.Event{Severity: report.Info, Fields: []report.Field{{Key: "service", Value: d.name}}}
	switch d.what() {
	case "found":
		e.Message = fmt.Sprintf("service found: %s (%s)", d.name, is)
	case "changed":
		e.Message = fmt.Sprintf("service changed: %s (%s; was %s)", d.name, is, was)
	case "gone":
		e.Message = fmt.Sprintf("service gone: %s (%s)", d.name, was)
		is, was = was, ""
	}
	e.Fields = append(e.Fields, report.Field{Key: "address", Value: is})
	if was != "" {
		e.Fields = append(e.Fields, report.Field{Key: "was", Value: was})
	}
	return e
}

// some are the first addresses, for a line.
func some(addresses []string) string {
	if more := len(addresses) - maxAddresses; more > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(addresses[:maxAddresses], ", "), more)
	}
	return strings.Join(addresses, ", ")
}

// intercepted are services whose rules are in, by family and in the order of Want.Served, of which
// it is a part: with 10,000 services a list by name for whoever asks would be 0.7 MB more.
type intercepted [2][]Served

// only are the services of the families that can be used.
func only(served [2][]Served, usable [2]bool) (in intercepted) {
	for i := range served {
		if usable[i] {
			in[i] = served[i]
		}
	}
	return in
}

// named are those that have one of the names.
func (in intercepted) named(names map[string]bool) (some intercepted) {
	for i := range in {
		for _, s := range in[i] {
			if names[s.name()] {
				some[i] = append(some[i], s)
			}
		}
	}
	return some
}

// services are the services by name, each with its addresses.
func (in intercepted) services() (services []status.Service) {
	all := slices.Concat(in[:]...)
	for i := range all {
		all[i].Name = all[i].name()
	}
	slices.SortFunc(all, func(a, b Served) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), a.Prefix.Compare(b.Prefix),
			cmp.Compare(a.Port, b.Port))
	})
	for i, s := range slices.Compact(all) {
		if i == 0 || s.Name != services[len(services)-1].Name {
			services = append(services, status.Service{Name: s.Name})
		}
		last := &services[len(services)-1]
		last.Addresses = append(last.Addresses, s.address(s.Port))
	}
	return services
}

// name is the service's, or where it has none its address.
func (s Served) name() string {
	if s.Name == "" {
		return s.address(0)
	}
	return s.Name
}

// address is where clients look for the service: at this port, 0 being any.
func (s Served) address(port uint16) string {
	at := "*"
	switch {
	case s.Prefix.IsSingleIP() && port != 0:
		return netip.AddrPortFrom(s.Prefix.Addr(), port).String()
	case s.Prefix.IsSingleIP():
		return s.Prefix.Addr().String()
	case s.Prefix.IsValid():
		at = s.Prefix.String()
	default:
		port = s.Port // it has nothing else
	}
	if port == 0 {
		return at
	}
	return fmt.Sprintf("%s:%d", at, port)
}
