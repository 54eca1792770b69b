package envoyadmin

import (
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	corev3 "github.com/cncf/xds/go/xds/core/v3"
	matcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// A filter_chain_matcher is a tree whose leaves name filter chains; where it is set, Envoy
// ignores filter_chain_match. Interception asks only which destinations lead to a chain, so the
// walk keeps the destinations on the way down (way) and lists the chain for each leaf. A branch
// that destinations do not part (a server name, a source) is followed with both ends open. A
// branch whose destinations cannot be told as prefixes and a port (a regular expression on an
// address, "not") is reported, and its chains are not listed there: better not intercepted than
// intercepted without need. See docs/design/facts.md#envoy-chooses-a-chain.

// maxWays limits how often the chains of one listener are listed.
const maxWays = 100_000

// The inputs that a filter_chain_matcher can look at, by the last part of their type.
const (
	destinationIP   = "DestinationIPInput"
	destinationPort = "DestinationPortInput"
)

// way is what is known of a connection's destination at some place in the tree.
type way struct {
	prefixes []netip.Prefix // nil: any
	port     uint16         // 0: any
	other    bool           // something else was looked at too
}

// to narrows the way to some destinations. ok is false if none is left.
func (w way) to(prefixes []netip.Prefix) (way, bool) {
	if w.prefixes == nil {
		w.prefixes = prefixes
		return w, len(prefixes) > 0
	}
	var both []netip.Prefix
	for _, a := range w.prefixes {
		for _, b := range prefixes {
			if a.Overlaps(b) {
				if a.Bits() < b.Bits() {
					a = b
				}
				both = append(both, a)
			}
		}
	}
	w.prefixes = both
	return w, len(both) > 0
}

type matchWalk struct {
	chains map[string]FilterChain
	note   func(string, ...any)
	found  []FilterChain
	full   bool
}

// match lists the chains of l as its filter_chain_matcher leads to them.
func (l *Listener) match(raw []byte, note func(string, ...any)) error {
	walk := matchWalk{chains: map[string]FilterChain{}, note: note}
	for _, chain := range l.Chains {
		chain.Prefixes, chain.Port, chain.OtherConditions, chain.Rare = nil, 0, false, nil
		walk.chains[chain.Name] = chain
	}
	l.Chains = nil
	var tree matcherv3.Matcher
	if err := decode.Unmarshal(raw, &tree); err != nil {
		return err
	}
	walk.matcher(&tree, way{})
	if walk.full {
		note("filter_chain_matcher: it has more than %d ways", maxWays)
	}
	l.Chains = walk.found
	return nil
}

func (m *matchWalk) matcher(tree *matcherv3.Matcher, w way) {
	for _, one := range tree.GetMatcherList().GetMatchers() {
		for _, narrowed := range m.predicate(one.GetPredicate(), w) {
			m.then(one.GetOnMatch(), narrowed)
		}
	}
	if branch := tree.GetMatcherTree(); branch != nil {
		m.branch(branch, w)
	}
	if tree.GetOnNoMatch() != nil {
		w.other = true // all that matched above is not among these
		m.then(tree.GetOnNoMatch(), w)
	}
}

func (m *matchWalk) then(next *matcherv3.Matcher_OnMatch, w way) {
	if tree := next.GetMatcher(); tree != nil {
		m.matcher(tree, w)
		return
	}
	var name wrapperspb.StringValue
	if err := next.GetAction().GetTypedConfig().UnmarshalTo(&name); err != nil {
		m.note("filter_chain_matcher: an action is no name of a filter chain")
		return
	}
	chain, ok := m.chains[name.GetValue()]
	if !ok {
		m.note("filter_chain_matcher: there is no filter chain %q", name.GetValue())
		return
	}
	if len(m.found) == maxWays {
		m.full = true
		return
	}
	chain.Prefixes, chain.Port, chain.OtherConditions = w.prefixes, w.port, w.other
	m.found = append(m.found, chain)
}

// branch follows a map from values of an input to what comes next.
func (m *matchWalk) branch(tree *matcherv3.Matcher_MatcherTree, w way) {
	in := input(tree.GetInput())
	switch by := tree.GetTreeType().(type) {
	case *matcherv3.Matcher_MatcherTree_ExactMatchMap:
		for _, value := range keys(by.ExactMatchMap.GetMap()) {
			if narrowed, ok := m.exact(in, value, w); ok {
				m.then(by.ExactMatchMap.GetMap()[value], narrowed)
			}
		}
	case *matcherv3.Matcher_MatcherTree_PrefixMatchMap:
		for _, value := range keys(by.PrefixMatchMap.GetMap()) {
			if in == destinationIP || in == destinationPort {
				m.note("filter_chain_matcher: %s by the text prefix %q", in, value)
				continue
			}
			w.other = true
			m.then(by.PrefixMatchMap.GetMap()[value], w)
		}
	case *matcherv3.Matcher_MatcherTree_CustomMatch:
		m.ranges(in, by.CustomMatch, w)
	}
}

// ranges follows a custom match: of addresses by range, the only one that Envoy has for them.
func (m *matchWalk) ranges(in string, custom *corev3.TypedExtensionConfig, w way) {
	var ip matcherv3.IPMatcher
	if err := custom.GetTypedConfig().UnmarshalTo(&ip); err != nil {
		if in == destinationIP || in == destinationPort {
			m.note("filter_chain_matcher: %s by a match of type %q", in,
				custom.GetTypedConfig().GetTypeUrl())
			return
		}
		// Which chains it leads to cannot be read, so they are not listed.
		m.note("filter_chain_matcher: a match of type %q is not understood",
			custom.GetTypedConfig().GetTypeUrl())
		return
	}
	for _, one := range ip.GetRangeMatchers() {
		narrowed, ok := w, true
		if in == destinationIP {
			var prefixes []netip.Prefix
			for _, r := range one.GetRanges() {
				p, err := prefix(r.GetAddressPrefix(), r.GetPrefixLen().GetValue())
				if err != nil {
					m.note("filter_chain_matcher: %v", err)
					continue
				}
				prefixes = append(prefixes, p)
			}
			narrowed, ok = w.to(prefixes)
		} else {
			narrowed.other = true
		}
		if ok {
			m.then(one.GetOnMatch(), narrowed)
		}
	}
}

// input is the last part of the type of an input.
func input(in *corev3.TypedExtensionConfig) string {
	url := in.GetTypedConfig().GetTypeUrl()
	return url[strings.LastIndexByte(url, '.')+1:]
}

// keys returns the keys in order, so that the same dump always gives the same list.
func keys(m map[string]*matcherv3.Matcher_OnMatch) []string {
	return slices.Sorted(maps.Keys(m))
}

// exact narrows a way by an input that equals a value.
func (m *matchWalk) exact(in, value string, w way) (way, bool) {
	switch in {
	case destinationIP:
		ip, err := netip.ParseAddr(value)
		if err != nil {
			m.note("filter_chain_matcher: %q is no address", value)
			return w, false
		}
		return w.to([]netip.Prefix{netip.PrefixFrom(ip, ip.BitLen())})
	case destinationPort:
		port, err := strconv.ParseUint(value, 10, 16)
		if err != nil || port == 0 {
			m.note("filter_chain_matcher: %q is no port", value)
			return w, false
		}
		if w.port != 0 && w.port != uint16(port) {
			return w, false
		}
		w.port = uint16(port)
		return w, true
	}
	w.other = true
	return w, true
}

// predicate returns the ways that a predicate lets through.
func (m *matchWalk) predicate(p *matcherv3.Matcher_MatcherList_Predicate, w way) []way {
	switch by := p.GetMatchType().(type) {
	case *matcherv3.Matcher_MatcherList_Predicate_SinglePredicate_:
		in := input(by.SinglePredicate.GetInput())
		pattern := by.SinglePredicate.GetValueMatch().GetMatchPattern()
		exact, isExact := pattern.(*matcherv3.StringMatcher_Exact)
		switch {
		case isExact:
			if narrowed, ok := m.exact(in, exact.Exact, w); ok {
				return []way{narrowed}
			}
			return nil
		case in == destinationIP || in == destinationPort:
			m.note("filter_chain_matcher: %s by other than an exact value", in)
			return nil
		}
		w.other = true
		return []way{w}
	case *matcherv3.Matcher_MatcherList_Predicate_OrMatcher:
		var ways []way
		for _, one := range by.OrMatcher.GetPredicate() {
			ways = append(ways, m.predicate(one, w)...)
		}
		return ways
	case *matcherv3.Matcher_MatcherList_Predicate_AndMatcher:
		ways := []way{w}
		for _, one := range by.AndMatcher.GetPredicate() {
			var narrowed []way
			for _, w := range ways {
				narrowed = append(narrowed, m.predicate(one, w)...)
			}
			if ways = narrowed; len(ways) > maxWays {
				m.full = true
				return nil
			}
		}
		return ways
	}
	m.note("filter_chain_matcher: a predicate is not understood")
	return nil
}
