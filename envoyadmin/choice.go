package envoyadmin

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
)

// Connection is what is known of a connection that comes to Envoy.
type Connection struct {
	At   netip.AddrPort // the socket it comes to, where a REDIRECT has led it
	To   netip.AddrPort // where it wanted to go
	From netip.Addr     // the zero Addr: not known
}

// Choice is what Envoy does with a connection.
type Choice struct {
	Entry    *Listener // has the socket; nil: none does
	Listener *Listener // takes it: Entry, or the one that Entry hands it to
	// Candidates are the chains that may take it, in the listener's order. Which of them depends on
	// what is not known of it: what its client says first, where it comes from.
	Candidates []Candidate
	More       int // candidates past maxCandidates
}

// Candidate is a filter chain that may take a connection.
type Candidate struct {
	Chain   *FilterChain // nil: none does, and Envoy closes the connection
	Default bool         // it is the listener's default_filter_chain
	When    []string     // what must hold for it; none: it takes the connection in any case
}

// maxCandidates bounds what Choose lists: thousands of server names may share an address.
const maxCandidates = 50

// maxValues is how many values of a condition are named.
const maxValues = 3

// Choose says which listener and which filter chain take a connection, as Envoy does it: the
// listener that has the socket looks up where the connection wanted to go, and hands it to the
// listener of that address by use_original_dst (ConnectionHandlerImpl::getBalancedHandlerByAddress:
// the exact address, else the wildcard at that port). That one's filter chains are looked through
// one condition after the other (FilterChainManagerImpl::findFilterChain): at each only the most
// specific match goes on, and there is no way back from it.
// See docs/design/facts.md#envoy-chooses-a-chain.
func Choose(listeners []Listener, c Connection) Choice {
	entry := atSocket(listeners, c.At)
	if entry == nil {
		return Choice{}
	}
	choice := Choice{Entry: entry, Listener: entry}
	if entry.HandsOff {
		if behind := ofAddress(listeners, c.To); behind != nil {
			choice.Listener = behind
		}
	}
	l := choice.Listener
	w := chooser{listener: l, from: c.From}
	if l.ByMatcher {
		w.byMatcher(c.To)
	} else {
		w.serverNames(toDestination(l.Chains, c.To))
	}
	choice.Candidates = w.found
	if len(w.found) > maxCandidates {
		choice.Candidates, choice.More = w.found[:maxCandidates], len(w.found)-maxCandidates
	}
	return choice
}

// atSocket is the listener whose socket takes what comes to an address: the kernel prefers one
// that is bound to the very address.
func atSocket(listeners []Listener, at netip.AddrPort) (found *Listener) {
	best := 0
	for i := range listeners {
		l := &listeners[i]
		if !l.Bound || l.UDP {
			continue
		}
		for _, a := range l.Addresses {
			how := 0
			switch {
			case a.Port() != at.Port():
			case a.Addr() == at.Addr():
				how = 3
			case a.Addr().IsUnspecified() && a.Addr().Is4() == at.Addr().Is4():
				how = 2
			case a.Addr().IsUnspecified() && a.Addr().Is6() && l.Ipv4Compat:
				how = 1
			}
			if how > best {
				found, best = l, how
			}
		}
	}
	return found
}

// ofAddress is the listener, bound or not, that has an address, else the one of all addresses of
// the family at that port.
func ofAddress(listeners []Listener, to netip.AddrPort) *Listener {
	var wildcard *Listener
	for i := range listeners {
		l := &listeners[i]
		if l.UDP {
			continue
		}
		for _, a := range l.Addresses {
			switch {
			case a == to:
				return l
			case wildcard == nil && a.Port() == to.Port() && a.Addr().IsUnspecified() &&
				(a.Addr().Is4() == to.Addr().Is4() || a.Addr().Is6() && l.Ipv4Compat):
				wildcard = l
			}
		}
	}
	return wildcard
}

// toDestination are the chains that are left by destination: where any chain names the port, only
// those that do, and of these the ones with the longest prefix.
func toDestination(chains []FilterChain, to netip.AddrPort) []*FilterChain {
	port := uint16(0)
	if slices.ContainsFunc(chains, func(c FilterChain) bool { return c.Port == to.Port() }) {
		port = to.Port()
	}
	longest := -1
	var left []*FilterChain
	for i := range chains {
		c := &chains[i]
		if c.Port != port {
			continue
		}
		switch bits := longestPrefix(c.Prefixes, to.Addr()); {
		case bits < 0, bits < longest:
		case bits > longest:
			longest, left = bits, []*FilterChain{c}
		default:
			left = append(left, c)
		}
	}
	return left
}

// longestPrefix is the length of the longest prefix that holds the address, 0 without any, -1 where
// none does.
func longestPrefix(prefixes []netip.Prefix, a netip.Addr) int {
	if len(prefixes) == 0 {
		return 0
	}
	longest := -1
	for _, p := range prefixes {
		if p.Contains(a) {
			longest = max(longest, p.Bits())
		}
	}
	return longest
}

// chooser follows the conditions past the destination. Where the value is not known each way is
// followed, with what must hold for it.
type chooser struct {
	listener *Listener
	from     netip.Addr
	found    []Candidate
}

// take adds a leaf: the chains that are left when all conditions are through.
func (w *chooser) take(chains []*FilterChain, when []string) {
	one := Candidate{When: slices.Clone(when)}
	switch {
	case len(chains) > 0:
		one.Chain = chains[0] // Envoy refuses a listener with two alike
	case w.listener.DefaultChain != nil:
		one.Chain, one.Default = w.listener.DefaultChain, true
	}
	for _, known := range w.found {
		if known.Chain == one.Chain && (len(known.When) == 0 || one.Chain == nil) {
			return // it is told already
		}
	}
	w.found = append(w.found, one)
}

// group are chains that a condition's values lead to.
type group struct {
	values []string
	chains []*FilterChain
}

// when says in words which values lead to the group.
func (g group) when(what string) string {
	named := strings.Join(g.values[:min(len(g.values), maxValues)], ", ")
	if more := len(g.values) - maxValues; more > 0 {
		named += fmt.Sprintf(" and %d more", more)
	}
	return what + " " + named
}

// groups parts chains by their values, and those without any. Values that lead to the same chains
// are one group.
func groups[T comparable](chains []*FilterChain, values func(*FilterChain) []T,
	text func(T) string) (parted []group, rest []*FilterChain) {
	by := map[T][]*FilterChain{}
	var order []T
	for _, c := range chains {
		of := values(c)
		if len(of) == 0 {
			rest = append(rest, c)
		}
		for _, v := range of {
			if by[v] == nil {
				order = append(order, v)
			}
			by[v] = append(by[v], c)
		}
	}
	at := map[string]int{}
	for _, v := range order {
		key := fmt.Sprintf("%p", by[v])
		if len(by[v]) == 1 {
			key = fmt.Sprintf("%p", by[v][0])
		}
		i, known := at[key]
		if !known {
			i = len(parted)
			at[key] = i
			parted = append(parted, group{chains: by[v]})
		}
		parted[i].values = append(parted[i].values, text(v))
	}
	return parted, rest
}

func itself(s string) string { return s }

func (w *chooser) serverNames(chains []*FilterChain) {
	names, rest := groups(chains,
		func(c *FilterChain) []string { return c.rare().ServerNames }, itself)
	if w.inspects() {
		for _, g := range names {
			w.transport(g.chains, []string{g.when("TLS to the server name")}, true)
		}
		var when []string
		if len(names) > 0 {
			when = []string{"no other server name matches"}
		}
		w.transport(rest, when, false)
		return
	}
	w.transport(rest, nil, false)
}

// inspects says whether Envoy looks whether a connection is TLS, and which server it asks for: it
// adds the inspector itself where a chain needs it (ListenerImpl::buildListenerFilters…).
func (w *chooser) inspects() bool {
	for _, c := range w.listener.Chains {
		rare := c.rare()
		if c.TLSInspected || rare.TransportProtocol == "tls" || rare.TransportProtocol == "" &&
			len(rare.ServerNames)+len(rare.ApplicationProtocols) > 0 {
			return true
		}
	}
	return false
}

// transport looks at the transport protocol: "tls" where the inspector has seen it, "raw_buffer"
// where nobody has said anything else.
func (w *chooser) transport(chains []*FilterChain, when []string, isTLS bool) {
	by := map[string][]*FilterChain{}
	for _, c := range chains {
		of := c.rare().TransportProtocol
		by[of] = append(by[of], c)
	}
	known := func(of string) []*FilterChain {
		if by[of] != nil {
			return by[of]
		}
		return by[""]
	}
	switch {
	case isTLS:
		w.protocols(known("tls"), when)
	case !w.inspects():
		w.protocols(known("raw_buffer"), when)
	case by["tls"] == nil && by["raw_buffer"] == nil:
		w.protocols(by[""], when)
	default:
		w.protocols(known("tls"), append(slices.Clone(when), "the client speaks TLS"))
		w.protocols(known("raw_buffer"), append(slices.Clone(when), "the client does not speak TLS"))
	}
}

func (w *chooser) protocols(chains []*FilterChain, when []string) {
	parted, rest := groups(chains,
		func(c *FilterChain) []string { return c.rare().ApplicationProtocols }, itself)
	for _, g := range parted {
		w.direct(g.chains, append(slices.Clone(when), g.when("the application protocol is")))
	}
	if len(parted) > 0 {
		when = append(slices.Clone(when), "no other application protocol matches")
	}
	w.direct(rest, when)
}

func (w *chooser) direct(chains []*FilterChain, when []string) {
	w.bySource(chains, when, func(s *SourceMatch) []netip.Prefix { return s.Direct }, w.sourceType)
}

// bySource goes by source prefixes, the longest first.
func (w *chooser) bySource(chains []*FilterChain, when []string,
	prefixes func(*SourceMatch) []netip.Prefix, next func([]*FilterChain, []string)) {
	of := func(c *FilterChain) []netip.Prefix {
		if source := c.rare().Source; source != nil {
			return prefixes(source)
		}
		return nil
	}
	if w.from.IsValid() {
		longest := -1
		var left []*FilterChain
		for _, c := range chains {
			if bits := longestPrefix(of(c), w.from); bits > longest {
				longest, left = bits, []*FilterChain{c}
			} else if bits == longest && bits >= 0 {
				left = append(left, c)
			}
		}
		next(left, when)
		return
	}
	parted, rest := groups(chains, of, netip.Prefix.String)
	for _, g := range parted {
		next(g.chains, append(slices.Clone(when), g.when("it comes from")))
	}
	if len(parted) > 0 {
		when = append(slices.Clone(when), "it comes from elsewhere")
	}
	next(rest, when)
}

func (w *chooser) sourceType(chains []*FilterChain, when []string) {
	var local, external, any []*FilterChain
	for _, c := range chains {
		switch source := c.rare().Source; {
		case source != nil && source.Local:
			local = append(local, c)
		case source != nil && source.External:
			external = append(external, c)
		default:
			any = append(any, c)
		}
	}
	if local == nil && external == nil {
		w.sourcePrefixes(any, when)
		return
	}
	for _, way := range []struct {
		chains []*FilterChain
		when   string
	}{{local, "it comes from this machine"}, {external, "it comes from another machine"}} {
		if way.chains == nil {
			way.chains = any
		}
		w.sourcePrefixes(way.chains, append(slices.Clone(when), way.when))
	}
}

func (w *chooser) sourcePrefixes(chains []*FilterChain, when []string) {
	w.bySource(chains, when, func(s *SourceMatch) []netip.Prefix { return s.Prefixes }, w.sourcePort)
}

func (w *chooser) sourcePort(chains []*FilterChain, when []string) {
	parted, rest := groups(chains, func(c *FilterChain) []uint16 {
		if source := c.rare().Source; source != nil {
			return source.Ports
		}
		return nil
	}, func(p uint16) string { return fmt.Sprint(p) })
	for _, g := range parted {
		w.take(g.chains, append(slices.Clone(when), g.when("its source port is")))
	}
	if len(parted) > 0 {
		when = append(slices.Clone(when), "it has another source port")
	}
	w.take(rest, when)
}

// byMatcher goes by the ways that a filter_chain_matcher has to chains: of those to the destination
// each may be taken that looks at something else too, up to the first that does not.
func (w *chooser) byMatcher(to netip.AddrPort) {
	var ways []*FilterChain
	for i := range w.listener.Chains {
		c := &w.listener.Chains[i]
		if (c.Port == 0 || c.Port == to.Port()) && longestPrefix(c.Prefixes, to.Addr()) >= 0 {
			ways = append(ways, c)
		}
	}
	slices.SortStableFunc(ways, func(a, b *FilterChain) int {
		return longestPrefix(b.Prefixes, to.Addr()) - longestPrefix(a.Prefixes, to.Addr())
	})
	seen := map[string]bool{}
	var when []string
	for _, c := range ways {
		if seen[c.Name] {
			continue
		}
		seen[c.Name] = true
		if !c.OtherConditions {
			w.take([]*FilterChain{c}, when)
			return
		}
		when = []string{"filter_chain_matcher leads there, by more than the destination"}
		w.take([]*FilterChain{c}, when)
	}
	w.take(nil, when)
}

// Clusters are the clusters that a chain names itself, sorted: those of a TCP proxy.
func (c FilterChain) Clusters() []string {
	if c.Cluster == "" {
		return nil
	}
	names := map[string]bool{}
	for name := range strings.SplitSeq(c.Cluster, ",") {
		names[name] = true
	}
	return slices.Sorted(maps.Keys(names))
}
