package agent

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// Inputs is all that Desired looks at.
type Inputs struct {
	Config    attribute.Config
	Listeners []envoyadmin.Listener // active and static ones only
	ProxyUID  uint32
	ProxyGID  uint32
	// Local holds the addresses of the VM's own interfaces, every NIC. Not the kernel's `local`
	// routes: an internal load balancer's address is one, and may be a service.
	// See docs/design/facts.md#gce-load-balancer-is-local.
	Local        []netip.Addr
	Interfaces   []string // --intercept-interfaces
	ResolverUIDs []uint32 // users whose DNS questions must leave the VM: the local resolver
	OwnPorts     []uint16 // never intercepted: the agent's and Envoy's own
}

// families are those whose rules are kept, in the order of Want.Families.
var families = [2]iptables.Family{iptables.IPv4, iptables.IPv6}

// Want is what the kernel shall have: one Interception per family, and what was
// left out of it and why.
type Want struct {
	Families [2]iptables.Interception // IPv4, IPv6
	Refused  []symptom.Refusal
	// Uncovered are the serving ports for which Envoy's inbound listener has no chain: not redirected.
	Uncovered   []uint16
	ServerFirst []uint16
	// Served are the services behind the rules, by family as Families, in the listeners' order.
	Served [2][]Served
}

// Served is a service by one of its addresses: an address, or a range of them, and a port.
type Served struct {
	Name   string
	Prefix netip.Prefix // the zero Prefix: any address
	Port   uint16       // 0: any
}

// interceptsDNS says whether DNS questions are led to Envoy.
func (w Want) interceptsDNS() bool {
	return w.Families[0].DNSPort != 0 || w.Families[1].DNSPort != 0
}

// serverFirst are the well-known ports of protocols in which the server speaks first: FTP, SMTP,
// POP3, IMAP, submission, MySQL.
var serverFirst = []uint16{21, 25, 110, 143, 587, 3306}

// Desired decides what to intercept, from Envoy's live listeners and the attribute alone. It is
// pure: whether the jumps go in (Hold, bypass) is policy and is decided elsewhere.
func Desired(in Inputs) Want {
	var w Want
	g := guard{local: in.Local, own: in.OwnPorts}
	out := interceptionListeners(in.Listeners, false)
	inbound := interceptionListeners(in.Listeners, true)

	for i, family := range families {
		want := iptables.Interception{Family: family, ProxyUID: in.ProxyUID, ProxyGID: in.ProxyGID,
			Interfaces: in.Interfaces}
		want.OutboundPort = redirectPort(out, family, in.Config.ProxyPort, false)
		if want.OutboundPort != 0 {
			want.All = in.Config.InterceptAllOutbound
			want.ExcludePrefixes = ofFamily(in.Config.ExcludeOutboundIPRanges, family)
			for _, r := range in.Config.ExcludeOutboundPortRanges {
				want.ExcludePorts = append(want.ExcludePorts, iptables.PortRange(r))
			}
			want.Services, want.ServicePorts, w.Served[i] = outbound(in.Listeners, family,
				want.OutboundPort, &g)
			if len(in.Interfaces) > 0 &&
				redirectPort(out, family, want.OutboundPort, true) != want.OutboundPort {
				// PREROUTING's REDIRECT leads to the interface's own address.
				want.Interfaces = nil
				g.note(out[0].Name, "--intercept-interfaces",
					fmt.Sprintf("port %d is on loopback alone, where no %v connection of a container arrives",
						want.OutboundPort, family))
			}
		}
		want.InboundPort = redirectPort(inbound, family, attribute.InboundPort, true)
		if want.InboundPort != 0 {
			want.Serving = serving(inbound, family, want.InboundPort, in.Local, in.Config.ServingPorts)
		}
		if len(want.Serving) == 0 {
			want.InboundPort = 0
		}
		if in.Config.InterceptDNS {
			want.DNSPort, want.DNSOverTCP = dnsPort(in.Listeners, family)
			want.ResolverUIDs = in.ResolverUIDs
		}
		w.Families[i] = want
	}
	for _, l := range out {
		if !slices.ContainsFunc(w.Families[:], func(f iptables.Interception) bool {
			return leadsTo(l, f.Family, f.OutboundPort, false)
		}) {
			for _, a := range l.Addresses {
				g.note(l.Name, a.String(),
					"REDIRECT does not lead there: it wants a listener on the wildcard or loopback address, and "+
						"one port for all")
			}
		}
		if l.FCDS {
			g.note(l.Name, "fcds_config",
				"its filter chains come by a discovery of their own, which /config_dump does not show")
		}
	}
	w.Refused = g.refused
	w.Uncovered = uncovered(in.Config.ServingPorts, w.Families[:])
	w.ServerFirst = serverFirstPorts(in.Listeners)
	return w
}

// interceptionListeners are those that a REDIRECT may point to: bound, TCP, and looking up the
// original destination.
func interceptionListeners(all []envoyadmin.Listener,
	wantInbound bool) (found []envoyadmin.Listener) {
	for _, l := range all {
		if l.Bound && !l.UDP && l.OriginalDst && isInbound(l) == wantInbound {
			found = append(found, l)
		}
	}
	slices.SortFunc(found, func(a, b envoyadmin.Listener) int { return cmp.Compare(a.Name, b.Name) })
	return found
}

// isInbound goes by traffic_direction, then the name, then the port: Traffic Director sets all
// three, hand-written configurations often only the last.
func isInbound(l envoyadmin.Listener) bool {
	switch l.Direction {
	case corev3.TrafficDirection_INBOUND:
		return true
	case corev3.TrafficDirection_OUTBOUND:
		return false
	}
	name := strings.ToLower(l.Name)
	if strings.Contains(name, "inbound") {
		return true
	}
	if strings.Contains(name, "outbound") {
		return false
	}
	for _, a := range l.Addresses {
		if a.Port() == attribute.InboundPort {
			return true
		}
	}
	return false
}

// redirectPort is the port that REDIRECT points to, 0 when no listener can be reached that way in
// this family. On OUTPUT REDIRECT rewrites the destination to 127.0.0.1 or ::1, on PREROUTING to
// the address of the interface the packet came in by (iptables-extensions(8)), so a listener on one
// other address never sees the connection. The expected port wins when there are several.
// See docs/design/facts.md#redirect-leads-to.
func redirectPort(listeners []envoyadmin.Listener, family iptables.Family, expected uint16,
	inbound bool) uint16 {
	var first uint16
	for _, l := range listeners {
		for _, a := range l.Addresses {
			if !reachable(l, a.Addr(), family, inbound) {
				continue
			}
			if a.Port() == expected {
				return expected
			}
			if first == 0 {
				first = a.Port()
			}
		}
	}
	return first
}

// leadsTo says whether REDIRECT to port, on OUTPUT or for inbound connections on PREROUTING,
// ends at the listener.
func leadsTo(l envoyadmin.Listener, family iptables.Family, port uint16, inbound bool) bool {
	return port != 0 && slices.ContainsFunc(l.Addresses, func(a netip.AddrPort) bool {
		return a.Port() == port && reachable(l, a.Addr(), family, inbound)
	})
}

func reachable(l envoyadmin.Listener, a netip.Addr, family iptables.Family, inbound bool) bool {
	v4 := a.Is4() || a.Is6() && a.IsUnspecified() && l.Ipv4Compat
	v6 := a.Is6()
	if family == iptables.IPv4 && !v4 || family == iptables.IPv6 && !v6 {
		return false
	}
	if inbound {
		return !a.IsLoopback()
	}
	return a.IsUnspecified() || a == netip.AddrFrom4([4]byte{127, 0, 0, 1}) ||
		a == netip.IPv6Loopback()
}

// outbound collects the service prefixes and address-less ports of one family, and whose they are:
// from the filter chains of the interception listener that REDIRECT leads to (Traffic Director;
// Envoy closes what has no chain there) and from the addresses of the unbound listeners behind one
// (Istio). See docs/design/facts.md#gce-what-traffic-director-sends.
func outbound(all []envoyadmin.Listener, family iptables.Family, port uint16,
	g *guard) (prefixes []netip.Prefix, ports []uint16, services []Served) {
	add := func(l envoyadmin.Listener, s Served) {
		switch {
		case !s.Prefix.IsValid() && g.port(l.Name, s.Port):
			ports = append(ports, s.Port)
		case s.Prefix.IsValid() && g.prefix(l.Name, s.Prefix):
			prefixes = append(prefixes, s.Prefix)
		default:
			return
		}
		services = append(services, s)
	}
	for _, l := range all {
		if l.UDP || isInbound(l) {
			continue
		}
		switch {
		case l.Bound && l.OriginalDst && leadsTo(l, family, port, false):
			n := prefixesOf(l, family)
			prefixes, services = slices.Grow(prefixes, n), slices.Grow(services, n)
			for _, c := range l.Chains {
				ours := func(p netip.Prefix) bool { return family.Of(p.Addr()) }
				switch {
				case len(c.Prefixes) == 0 && c.Port != 0:
					add(l, Served{l.ServiceName(c), netip.Prefix{}, c.Port})
				case slices.ContainsFunc(c.Prefixes, ours):
					name := l.ServiceName(c)
					for _, p := range c.Prefixes {
						if ours(p) {
							add(l, Served{name, p.Masked(), c.Port})
						}
					}
				}
			}
		case !l.Bound:
			s := Served{Name: nameBehind(l)}
			for _, a := range l.Addresses {
				s.Prefix, s.Port = netip.Prefix{}, a.Port()
				switch {
				case a.Addr().IsUnspecified():
					if family.Of(a.Addr()) || l.Ipv4Compat {
						add(l, s)
					}
				case family.Of(a.Addr()):
					s.Prefix = netip.PrefixFrom(a.Addr(), a.Addr().BitLen())
					add(l, s)
				}
			}
		}
	}
	return sortedPrefixes(prefixes), sortedPorts(ports), services
}

// prefixesOf counts a family's prefixes of a listener's chains, so that lists of them are made at
// once as long as they need to be.
func prefixesOf(l envoyadmin.Listener, family iptables.Family) (n int) {
	for i := range l.Chains {
		for _, p := range l.Chains[i].Prefixes {
			if family.Of(p.Addr()) {
				n++
			}
		}
	}
	return n
}

// nameBehind is the name of the service that an unbound listener is for: the first of its chains
// that has one tells.
func nameBehind(l envoyadmin.Listener) string {
	for _, c := range l.Chains {
		if name := l.ServiceName(c); name != "" {
			return name
		}
	}
	if l.DefaultChain != nil {
		return l.ServiceName(*l.DefaultChain)
	}
	return l.ServiceName(envoyadmin.FilterChain{})
}

// serving are the rows of SERVICE_PROXY_INBOUND: the serving ports of the attribute that the
// inbound listener at REDIRECT's port has a chain for, with the address where the chain has one; of
// a wider prefix the VM's own addresses in it.
func serving(listeners []envoyadmin.Listener, family iptables.Family, to uint16, local []netip.Addr,
	ports []uint16) (rows []iptables.Serving) {
	for _, l := range listeners {
		if !leadsTo(l, family, to, true) {
			continue
		}
		for _, c := range chainsAndDefault(l) {
			for _, port := range ports {
				if c.Port != 0 && c.Port != port {
					continue
				}
				if len(c.Prefixes) == 0 {
					rows = append(rows, iptables.Serving{Port: port})
				}
				for _, p := range c.Prefixes {
					switch {
					case !family.Of(p.Addr()):
					case p.IsSingleIP():
						rows = append(rows, iptables.Serving{Addr: p.Addr(), Port: port})
					case p.Bits() == 0:
						rows = append(rows, iptables.Serving{Port: port})
					default:
						for _, own := range local {
							if p.Contains(own) {
								rows = append(rows, iptables.Serving{Addr: own, Port: port})
							}
						}
					}
				}
			}
		}
	}
	slices.SortFunc(rows, func(a, b iptables.Serving) int {
		return cmp.Or(cmp.Compare(a.Port, b.Port), a.Addr.Compare(b.Addr))
	})
	return slices.Compact(rows)
}

func chainsAndDefault(l envoyadmin.Listener) []envoyadmin.FilterChain {
	if l.DefaultChain == nil {
		return l.Chains
	}
	return append(slices.Clip(l.Chains), envoyadmin.FilterChain{Name: l.DefaultChain.Name})
}

func uncovered(ports []uint16, families []iptables.Interception) (missing []uint16) {
	for _, port := range ports {
		if !slices.ContainsFunc(families, func(f iptables.Interception) bool {
			return slices.ContainsFunc(f.Serving, func(s iptables.Serving) bool { return s.Port == port })
		}) {
			missing = append(missing, port)
		}
	}
	return sortedPorts(missing)
}

// dnsPort is the port of Envoy's DNS listener: UDP, bound, with the dns_filter. 0: there is none,
// nothing is redirected. The filter answers UDP alone: questions by TCP go there only where another
// listener takes them at the same port.
func dnsPort(all []envoyadmin.Listener, family iptables.Family) (port uint16, overTCP bool) {
	for _, l := range all {
		if !l.UDP || !l.Bound || !l.DNS {
			continue
		}
		for _, a := range l.Addresses {
			if reachable(l, a.Addr(), family, false) {
				return a.Port(), slices.ContainsFunc(all, func(l envoyadmin.Listener) bool {
					return l.Bound && !l.UDP && leadsTo(l, family, a.Port(), false)
				})
			}
		}
	}
	return 0, false
}

func serverFirstPorts(all []envoyadmin.Listener) (ports []uint16) {
	for _, l := range all {
		for _, c := range l.Chains {
			if slices.Contains(serverFirst, c.Port) && !isInbound(l) && (c.HTTP || c.TLSInspected) {
				ports = append(ports, c.Port)
			}
		}
	}
	return sortedPorts(ports)
}

// guard keeps out of the rules what no control plane may ask for: a wide or reserved range,
// the VM's own addresses, SSH and our own ports. What it refuses is noted once, and the rest
// of the listener goes on.
type guard struct {
	local   []netip.Addr
	own     []uint16
	refused []symptom.Refusal
	noted   map[symptom.Refusal]bool // a listener may have 100,000 of them
}

// Shortest prefixes a listener may ask for: anything wider is a mistake that takes
// the VM off the network.
const (
	shortest4 = 8
	shortest6 = 16
)

func (g *guard) prefix(listener string, p netip.Prefix) bool {
	reason := ""
	shortest := shortest4
	if p.Addr().Is6() {
		shortest = shortest6
	}
	switch {
	case p.Bits() < shortest:
		reason = "it is too wide; intercept-all-outbound is the way to ask for everything"
	case p.Masked().Addr().IsUnspecified():
		reason = "it is no address of a service"
	case p.Addr().IsMulticast():
		reason = "it is multicast"
	default:
		reason = reservedReason(p)
	}
	for _, own := range g.local {
		if reason == "" && p.Contains(own) {
			reason = "it holds the VM's own address " + own.String()
		}
	}
	return g.note(listener, p.String(), reason)
}

// reservedReason says what an entry holds that the rules never redirect,
// whatever they are asked for.
func reservedReason(p netip.Prefix) string {
	for _, family := range []iptables.Family{iptables.IPv4, iptables.IPv6} {
		for _, r := range family.Reserved() {
			if !r.Prefix.Overlaps(p) {
				continue
			}
			switch r.Name {
			case iptables.Loopback:
				return "it is loopback"
			case iptables.LinkLocal:
				return "it is link-local, where the metadata server is"
			default:
				return "it holds the metadata server's address"
			}
		}
	}
	return ""
}

func (g *guard) port(listener string, port uint16) bool {
	reason := ""
	switch {
	case port == 22:
		reason = "SSH to any address would go through the proxy"
	case slices.Contains(g.own, port):
		reason = "it is the proxy's or the agent's own port"
	}
	return g.note(listener, "port "+portString(port), reason)
}

func (g *guard) note(listener, entry, reason string) bool {
	if reason == "" {
		return true
	}
	r := symptom.Refusal{Listener: listener, Entry: entry, Reason: reason}
	if !g.noted[r] {
		if g.noted == nil {
			g.noted = make(map[symptom.Refusal]bool)
		}
		g.noted[r] = true
		g.refused = append(g.refused, r)
	}
	return false
}

func ofFamily(all []netip.Prefix, family iptables.Family) (some []netip.Prefix) {
	for _, p := range all {
		if family.Of(p.Addr()) {
			some = append(some, p.Masked())
		}
	}
	return sortedPrefixes(some)
}

func sortedPrefixes(p []netip.Prefix) []netip.Prefix {
	for i := range p {
		p[i] = p[i].Masked()
	}
	slices.SortFunc(p, netip.Prefix.Compare)
	return slices.Compact(p)
}

func sortedPorts(p []uint16) []uint16 {
	slices.Sort(p)
	return slices.Compact(p)
}
