package iptables

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
)

// Family is an IP version; iptables and ip6tables are two tables that are compiled, read and
// written on their own.
type Family uint8

const (
	IPv4 Family = 4
	IPv6 Family = 6
)

// String is "IPv4" or "IPv6".
func (f Family) String() string {
	switch f {
	case IPv4:
		return "IPv4"
	case IPv6:
		return "IPv6"
	}
	return "Family(" + strconv.Itoa(int(f)) + ")"
}

// Of says whether addr belongs to the family. An IPv4-mapped IPv6 address (::ffff:192.0.2.1)
// belongs to neither: no packet carries one.
func (f Family) Of(addr netip.Addr) bool {
	return f == IPv4 && addr.Is4() || f == IPv6 && addr.Is6() && !addr.Is4In6()
}

// PortRange is a range of ports, both ends included. A reversed one is read the other way round.
type PortRange struct{ First, Last uint16 }

// Serving is one row of the inbound side: a port that the application serves and
// Envoy accepts for it.
type Serving struct {
	Addr netip.Addr // the zero Addr: whichever local address was asked for
	Port uint16
}

// Interception is what one family's nat table shall do, in the words of the domain. Addresses of
// the other family are ignored, so that the same lists can be given to both.
type Interception struct {
	Family             Family
	ProxyUID, ProxyGID uint32 // Envoy's user and group: their traffic is never redirected
	// Jumps says whether the built-in chains jump to ours. Without (Hold, bypass) the chains stand
	// ready and redirect nothing.
	Jumps bool

	// where outbound connections are redirected to; 0: no outbound interception
	OutboundPort    uint16
	Services        []netip.Prefix // in any order, doubles allowed
	ServicePorts    []uint16       // services without an address of their own
	All             bool           // everything but the excludes, root and the proxy
	ExcludePrefixes []netip.Prefix
	ExcludePorts    []PortRange
	// containers' interfaces, as -i takes them ("docker0", "br-+"); their outbound
	// connections count too
	Interfaces []string

	DNSPort      uint16   // Envoy's DNS listener; 0: no DNS interception
	DNSOverTCP   bool     // Envoy takes TCP at that port, too
	ResolverUIDs []uint32 // users of the VM's own resolvers, whose questions must get out

	InboundPort uint16 // where inbound connections are redirected to; 0: no inbound interception
	Serving     []Serving

	// Settling heads the chains with a RETURN for everything that is not a SYN. The first NAT rule of
	// a VM starts conntrack, to which the connections that are already there look new: without this
	// row they would be redirected in the middle, which resets them. It must go after some minutes,
	// since it breaks redirected connections when somebody empties conntrack's table.
	// See docs/design/facts.md#conntrack-starts-with-nat.
	Settling bool
}

// The chains, and how they hang together (each of ours is the first rule of the built-in
// chain it hangs from):
//
//	OUTPUT      -p tcp            -> SERVICE_PROXY_OUTPUT
//	OUTPUT      -p udp --dport 53 -> SERVICE_PROXY_DNS
//	PREROUTING  -p tcp            -> SERVICE_PROXY_INBOUND
//
//	SERVICE_PROXY_OUTPUT  RETURN: proxy, loopback, link-local, metadata server, excludes, (all: root)
//	  |-- (tcp 53 -> SERVICE_PROXY_DNS)          RETURN: proxy, resolvers; else to Envoy's DNS port
//	  |-- SERVICE_PROXY_SERVICE_CIDRS            a row a service -------> SERVICE_PROXY_REDIRECT
//	  |     `-- SERVICE_PROXY_B4_0A200000_12 ... past 256: by 1 to 3 bits SERVICE_PROXY_REDIRECT
//	  `-- SERVICE_PROXY_SERVICE_PORTS            a row a port ----------> SERVICE_PROXY_REDIRECT
//	SERVICE_PROXY_INBOUND  (-i docker0 -> SERVICE_PROXY_SERVICE_CIDRS); RETURN: not for this machine
//	  `-- a row a serving port -----------------------------------------> SERVICE_PROXY_IN_REDIRECT
const (
	chainOutput       = "SERVICE_PROXY_OUTPUT"
	chainServiceCIDRs = "SERVICE_PROXY_SERVICE_CIDRS"
	chainServicePorts = "SERVICE_PROXY_SERVICE_PORTS"
	chainRedirect     = "SERVICE_PROXY_REDIRECT"
	chainDNS          = "SERVICE_PROXY_DNS"
	chainInbound      = "SERVICE_PROXY_INBOUND"
	chainInRedirect   = "SERVICE_PROXY_IN_REDIRECT"

	builtinOutput     = "OUTPUT"
	builtinPrerouting = "PREROUTING"
)

// The jumps, in the form a save prints them.
const (
	jumpOutput  = "-p tcp -j " + chainOutput
	jumpDNS     = "-p udp -m udp --dport 53 -j " + chainDNS
	jumpInbound = "-p tcp -j " + chainInbound
)

// Rules that stand alone or protect others; the degrading apply must know them (degrade.go).
const (
	ruleSettling = "-p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN -m comment --comment settling " +
		"-j RETURN"
	ruleRouted = "-m addrtype ! --dst-type LOCAL -m comment --comment routed-through -j RETURN"
)

// Reserved is a range that is never redirected outbound, with its name, which is
// the comment of its rule.
type Reserved struct {
	Prefix netip.Prefix
	Name   string
}

// Names of the reserved ranges.
const (
	Loopback       = "loopback"
	LinkLocal      = "link-local"
	MetadataServer = "metadata-server"
)

// Reserved lists what is never redirected outbound, whoever asks: loopback by address and not by
// `-o lo` (a redirected packet leaves by lo as well), link-local, and the metadata server.
func (f Family) Reserved() []Reserved {
	if f == IPv6 {
		return reserved6
	}
	return reserved4
}

var (
	reserved4 = []Reserved{
		{netip.MustParsePrefix("127.0.0.0/8"), Loopback},
		{netip.MustParsePrefix("169.254.0.0/16"), LinkLocal},
		{netip.MustParsePrefix("169.254.169.254/32"), MetadataServer},
	}
	reserved6 = []Reserved{
		{netip.MustParsePrefix("::1/128"), Loopback},
		{netip.MustParsePrefix("fe80::/10"), LinkLocal},
		{netip.MustParsePrefix("fd20:ce::254/128"), MetadataServer},
	}
)

// Ruleset compiles the interception into chains and rules, word for word as iptables-save prints
// them back. With nothing to intercept it is empty: nothing of ours in the kernel.
// See docs/design/facts.md#rules-come-back-as-written and
// docs/design/facts.md#owner-is-the-creator.
func (i Interception) Ruleset() Ruleset {
	outbound, dns := i.OutboundPort != 0, i.DNSPort != 0
	serving := i.servingRows()
	inbound := i.InboundPort != 0 && len(serving) > 0
	var interfaces []string
	if outbound {
		interfaces = sorted(i.Interfaces)
	}
	b := builder{family: i.Family, chains: map[string][]string{}}

	if outbound || dns {
		if i.Settling {
			b.add(chainOutput, ruleSettling)
		}
		b.add(chainOutput, i.proxyRows()...)
		if dns && i.DNSOverTCP {
			b.add(chainOutput, "-p tcp -m tcp --dport 53 -j "+chainDNS)
		}
	}
	if outbound {
		i.addOutbound(&b, len(interfaces) > 0)
	}
	if dns {
		i.addDNS(&b)
	}
	if inbound || len(interfaces) > 0 {
		if i.Settling {
			b.add(chainInbound, ruleSettling)
		}
		for _, name := range interfaces {
			match := inInterface(name)
			if i.All { // what containers ask of this machine itself is inbound
				match += "-m addrtype ! --dst-type LOCAL "
			}
			b.add(chainInbound, match+"-j "+chainServiceCIDRs)
		}
	}
	if inbound {
		b.add(chainInbound, ruleRouted)
		b.add(chainInbound, serving...)
		b.add(chainInRedirect, fmt.Sprintf("-p tcp -j REDIRECT --to-ports %d", i.InboundPort))
	}
	if i.Jumps {
		if inbound || len(interfaces) > 0 {
			b.jumps = append(b.jumps, rule{builtinPrerouting, jumpInbound})
		}
		if outbound || dns {
			b.jumps = append(b.jumps, rule{builtinOutput, jumpOutput})
		}
		if dns {
			b.jumps = append(b.jumps, rule{builtinOutput, jumpDNS})
		}
	}
	return b.ruleset()
}

// addOutbound adds what leads connections to services to Envoy.
func (i Interception) addOutbound(b *builder, interfaces bool) {
	for _, r := range i.Family.Reserved() {
		b.add(chainOutput, returnFor(r))
	}
	excludes := i.excludeRows()
	b.add(chainOutput, excludes...)
	if i.All {
		b.add(chainOutput, "-m owner --uid-owner 0 -m comment --comment root -j RETURN")
	}
	b.add(chainOutput, "-j "+chainServiceCIDRs, "-j "+chainServicePorts)

	b.add(chainServiceCIDRs)
	if interfaces {
		// Containers' traffic comes from PREROUTING and has not met the excludes of SERVICE_PROXY_OUTPUT.
		if i.All {
			for _, r := range i.Family.Reserved() {
				b.add(chainServiceCIDRs, returnFor(r))
			}
		}
		b.add(chainServiceCIDRs, excludes...)
	}
	if i.All {
		b.add(chainServiceCIDRs, "-j "+chainRedirect)
	} else {
		b.addServices(i.Services)
	}
	b.add(chainServicePorts)
	for _, p := range sorted(i.ServicePorts) {
		b.add(chainServicePorts, fmt.Sprintf("-p tcp -m tcp --dport %d -j %s", p, chainRedirect))
	}
	b.add(chainRedirect, fmt.Sprintf("-p tcp -j REDIRECT --to-ports %d", i.OutboundPort))
}

// addDNS adds what leads DNS questions to Envoy.
func (i Interception) addDNS(b *builder) {
	b.add(chainDNS, i.proxyRows()...)
	for _, uid := range sorted(i.ResolverUIDs) {
		b.add(chainDNS,
			fmt.Sprintf("-m owner --uid-owner %d -m comment --comment local-resolver -j RETURN", uid))
	}
	b.add(chainDNS, fmt.Sprintf("-p udp -j REDIRECT --to-ports %d", i.DNSPort))
	if i.DNSOverTCP {
		b.add(chainDNS, fmt.Sprintf("-p tcp -j REDIRECT --to-ports %d", i.DNSPort))
	}
}

// sorted is all of them in order, each once.
func sorted[T cmp.Ordered](all []T) []T {
	all = slices.Clone(all)
	slices.Sort(all)
	return slices.Compact(all)
}

// proxyRows are the RETURNs for Envoy's own traffic.
func (i Interception) proxyRows() []string {
	return []string{
		fmt.Sprintf("-m owner --uid-owner %d -m comment --comment proxy-user -j RETURN", i.ProxyUID),
		fmt.Sprintf("-m owner --gid-owner %d -m comment --comment proxy-group -j RETURN", i.ProxyGID),
	}
}

func returnFor(r Reserved) string {
	return destination(r.Prefix) + "-m comment --comment " + r.Name + " -j RETURN"
}

// destination is the match for a masked prefix as a save prints it, with the blank that follows,
// and nothing for "everywhere". The C library prints an IPv6 address of 96 zero bits as
// ::192.0.2.1, and netip does not.
func destination(p netip.Prefix) string {
	if p.Bits() == 0 {
		return ""
	}
	a := p.Addr().As16()
	if p.Addr().Is6() && [12]byte(a[:12]) == [12]byte{} && (a[12] != 0 || a[13] != 0) {
		return fmt.Sprintf("-d ::%s/%d ", netip.AddrFrom4([4]byte(a[12:])), p.Bits())
	}
	return "-d " + p.String() + " "
}

// inInterface is the match for an interface as a save prints it, with the blank that follows, and
// nothing for "any".
func inInterface(name string) string {
	if name == "+" {
		return ""
	}
	return "-i " + name + " "
}

// excludeRows are the RETURNs for what the attribute excludes. They count in both modes: an
// excluded address stays excluded when a listener asks for it.
func (i Interception) excludeRows() []string {
	var rows []string
	for _, p := range canonical(i.Family, i.ExcludePrefixes) {
		rows = append(rows, destination(p)+"-m comment --comment excluded -j RETURN")
	}
	ports := make([]PortRange, 0, len(i.ExcludePorts))
	for _, r := range i.ExcludePorts {
		if r.First > r.Last {
			r.First, r.Last = r.Last, r.First
		}
		ports = append(ports, r)
	}
	slices.SortFunc(ports, func(a, b PortRange) int {
		return cmp.Or(cmp.Compare(a.First, b.First), cmp.Compare(a.Last, b.Last))
	})
	for _, r := range slices.Compact(ports) {
		var match string
		switch {
		case r.First == 0 && r.Last == 65535: // a save prints the match without its range
			match = "-p tcp -m tcp"
		case r.First == r.Last:
			match = fmt.Sprintf("-p tcp -m tcp --dport %d", r.First)
		default:
			match = fmt.Sprintf("-p tcp -m tcp --dport %d:%d", r.First, r.Last)
		}
		rows = append(rows, match+" -m comment --comment excluded -j RETURN")
	}
	return rows
}

func (i Interception) servingRows() []string {
	serving := slices.Clone(i.Serving)
	slices.SortFunc(serving, func(a, b Serving) int {
		return cmp.Or(cmp.Compare(a.Port, b.Port), a.Addr.Compare(b.Addr))
	})
	var rows []string
	for _, s := range slices.Compact(serving) {
		if s.Port == 0 || s.Addr.IsValid() && !i.Family.Of(s.Addr) {
			continue
		}
		row := fmt.Sprintf("-p tcp -m tcp --dport %d -j %s", s.Port, chainInRedirect)
		if s.Addr.IsValid() {
			addr := s.Addr.WithZone("")
			row = destination(netip.PrefixFrom(addr, addr.BitLen())) + row
		}
		rows = append(rows, row)
	}
	return rows
}
