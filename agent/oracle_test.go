package agent

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// scene is one random VM: Envoy's listeners by what they are for, which no name, port or direction
// has to tell the expectation, and the attribute in the words of whoever wrote it.
type scene struct {
	outbound  []envoyadmin.Listener // interception listeners
	behind    []envoyadmin.Listener // Istio's: unbound, reached through the outbound one
	inbound   []envoyadmin.Listener
	dns       []envoyadmin.Listener
	dnsTCP    []envoyadmin.Listener // at the port of the DNS listener, for long answers
	unrelated []envoyadmin.Listener // nothing may follow from them

	attribute  attributeText
	interfaces []string
	resolvers  []uint32
	settling   bool
}

// attributeText is the part of the attribute's JSON that says what to intercept.
type attributeText struct {
	Spec struct {
		ProxyPort uint16 `json:"proxy-port"`
	} `json:"proxy-spec"`
	Service struct {
		ServingPorts []uint16 `json:"serving-ports,omitempty"`
	} `json:"service"`
	Traffic struct {
		All            bool     `json:"intercept-all-outbound"`
		ExcludedRanges []string `json:"exclude-outbound-ip-ranges,omitempty"`
		ExcludedPorts  []string `json:"exclude-outbound-port-ranges,omitempty"`
		DNS            bool     `json:"intercept-dns"`
	} `json:"traffic-interception"`
}

// The scenes' world is small, so that listeners, attribute and packets meet.
const (
	sceneUID, sceneGID = 1999, 1998
	resolverUID        = 101
)

var (
	scenePorts    = []uint16{22, 53, 80, 443, 8080, 9000}
	sceneOwnPorts = []uint16{15000, 15001, 15006, 15020}
	// ownAddresses are the VM's interfaces; balancer is local as well, by a route that an internal
	// load balancer's agent made, and may be a service.
	ownAddresses = addresses("10.50.0.1", "10.50.1.1", "fd50::1")
	balancer     = addresses("10.50.0.9", "fd50::9")
	serviceLike  = addresses("10.1.0.1", "10.1.0.2", "10.1.0.3", "10.1.1.1", "10.2.0.1", "192.0.2.7",
		"8.8.8.8", "9.9.9.9",
		"fd01::1", "fd01::2", "fd01::3", "fd01:0:0:1::1", "fd02::1", "2001:db8::8", "fd20:ce::255")
	forbidden = addresses("127.0.0.53", "::1", "169.254.169.254", "169.254.1.1", "fe80::1",
		"fd20:ce::254", "224.0.0.1", "ff02::1")
	everyone = slices.Concat(serviceLike, serviceLike, serviceLike, ownAddresses, balancer, forbidden)
)

func addresses(texts ...string) (a []netip.Addr) {
	for _, t := range texts {
		a = append(a, netip.MustParseAddr(t))
	}
	return a
}

// expect is docs/design/chains.md#what-is-intercepted in a straight line: what shall become of a
// packet, from the listeners and the attribute. It knows of no chain, no rule and none of Desired's
// functions. The third result says why.
func (s scene) expect(family iptables.Family, p iptables.Packet) (iptables.Action, uint16, string) {
	dst, port := p.Dst.Addr(), p.Dst.Port()
	if s.settling && p.Proto == iptables.TCP && !p.Syn {
		return iptables.Pass, 0, "older than the first rule"
	}
	excluded := slices.ContainsFunc(s.attribute.Traffic.ExcludedRanges, func(text string) bool {
		if a, err := netip.ParseAddr(text); err == nil {
			return a == dst
		}
		return netip.MustParsePrefix(text).Contains(dst)
	}) || slices.ContainsFunc(s.attribute.Traffic.ExcludedPorts, func(text string) bool {
		var a, b uint16
		if n, _ := fmt.Sscanf(text, "%d-%d", &a, &b); n == 1 {
			b = a
		}
		return min(a, b) <= port && port <= max(a, b)
	})
	special := dst.IsLoopback() || dst.IsLinkLocalUnicast() ||
		dst == netip.MustParseAddr("fd20:ce::254")

	// Envoy's outbound listener, as REDIRECT on OUTPUT reaches it: at 127.0.0.1 or ::1. The
	// attribute's port wins.
	var outPort uint16
	for _, l := range s.outbound {
		for _, a := range l.Addresses {
			if takes(l, a, family) && (a.Addr().IsUnspecified() || a.Addr().IsLoopback()) &&
				(outPort == 0 || a.Port() == s.attribute.Spec.ProxyPort) {
				outPort = a.Port()
			}
		}
	}
	// What is a service is what that listener, or one behind it, has an address for. fromContainers:
	// it takes connections on other addresses than loopback, where those of containers arrive.
	address, anyAddress, fromContainers := false, false, false
	for _, l := range s.outbound {
		for _, a := range l.Addresses {
			if !takes(l, a, family) || a.Port() != outPort ||
				!a.Addr().IsUnspecified() && !a.Addr().IsLoopback() {
				continue
			}
			fromContainers = fromContainers || !a.Addr().IsLoopback()
			for _, c := range l.Chains {
				for _, prefix := range c.Prefixes {
					address = address || prefix.Contains(dst) && allowed(prefix)
				}
				anyAddress = anyAddress || len(c.Prefixes) == 0 && c.Port == port && allowedPort(port)
			}
		}
	}
	for _, l := range s.behind {
		for _, a := range l.Addresses {
			address = address || a.Addr() == dst && allowed(netip.PrefixFrom(dst, dst.BitLen()))
			anyAddress = anyAddress || a.Addr().IsUnspecified() && takes(l, a, family) && a.Port() == port &&
				allowedPort(port)
		}
	}

	if p.Hook == iptables.Prerouting {
		if p.Proto != iptables.TCP {
			return iptables.Pass, 0, "inbound UDP"
		}
		fromContainers = fromContainers && slices.ContainsFunc(s.interfaces, func(name string) bool {
			return name == p.InInterface || name == "br-+" && p.InInterface == "br-7"
		})
		if outPort != 0 && fromContainers && !excluded {
			if s.attribute.Traffic.All {
				if !special && !p.DstLocal {
					return iptables.Redirect, outPort, "container's, everything"
				}
			} else if address {
				return iptables.Redirect, outPort, "container's, a service"
			}
		}
		if !p.DstLocal || !slices.Contains(s.attribute.Service.ServingPorts, port) {
			return iptables.Pass, 0, "not served"
		}
		// Envoy's inbound listener, as REDIRECT on PREROUTING reaches it: at the address of an interface.
		var inPort uint16
		reached := func(l envoyadmin.Listener, a netip.AddrPort) bool {
			return takes(l, a, family) && !a.Addr().IsLoopback()
		}
		for _, l := range s.inbound {
			for _, a := range l.Addresses {
				if reached(l, a) && (inPort == 0 || a.Port() == attribute.InboundPort) {
					inPort = a.Port()
				}
			}
		}
		for _, l := range s.inbound {
			if !slices.ContainsFunc(l.Addresses, func(a netip.AddrPort) bool {
				return reached(l, a) && a.Port() == inPort
			}) {
				continue
			}
			if l.DefaultChain != nil {
				return iptables.Redirect, inPort, "served by the default chain"
			}
			for _, c := range l.Chains {
				if (c.Port == 0 || c.Port == port) &&
					(len(c.Prefixes) == 0 || slices.ContainsFunc(c.Prefixes, func(x netip.Prefix) bool {
						return x.Contains(dst)
					})) {
					return iptables.Redirect, inPort, "served by a chain"
				}
			}
		}
		return iptables.Pass, 0, "served, but Envoy does not take it"
	}

	if p.UID == sceneUID || p.GID == sceneGID {
		return iptables.Pass, 0, "the proxy's"
	}
	if s.attribute.Traffic.DNS && port == 53 && !slices.Contains(s.resolvers, p.UID) {
		for _, l := range s.dns {
			for _, a := range l.Addresses {
				if !takes(l, a, family) {
					continue
				}
				if p.Proto == iptables.UDP {
					return iptables.Redirect, a.Port(), "DNS"
				}
				for _, l := range s.dnsTCP {
					for _, b := range l.Addresses {
						if takes(l, b, family) && a.Port() == b.Port() {
							return iptables.Redirect, a.Port(), "DNS over TCP"
						}
					}
				}
			}
		}
	}
	switch {
	case p.Proto != iptables.TCP:
		return iptables.Pass, 0, "UDP"
	case outPort == 0:
		return iptables.Pass, 0, "no outbound listener"
	case special:
		return iptables.Pass, 0, "never intercepted"
	case excluded:
		return iptables.Pass, 0, "excluded"
	case s.attribute.Traffic.All && p.UID == 0:
		return iptables.Pass, 0, "root's"
	case s.attribute.Traffic.All:
		return iptables.Redirect, outPort, "everything"
	case address:
		return iptables.Redirect, outPort, "a service's address"
	case anyAddress:
		return iptables.Redirect, outPort, "a service's port"
	}
	return iptables.Pass, 0, "no service"
}

// takes says whether a listener's address takes connections of the family.
func takes(l envoyadmin.Listener, a netip.AddrPort, family iptables.Family) bool {
	if family == iptables.IPv4 {
		return a.Addr().Is4() || a.Addr() == netip.IPv6Unspecified() && l.Ipv4Compat
	}
	return a.Addr().Is6()
}

// allowed says whether a listener may ask for a prefix (docs/design/chains.md#what-is-intercepted).
func allowed(p netip.Prefix) bool {
	for _, never := range prefixes("127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "0.0.0.0/32",
		"::1/128", "fe80::/10", "ff00::/8", "fd20:ce::254/128", "::/128") {
		if p.Overlaps(never) {
			return false
		}
	}
	shortest := 8
	if p.Addr().Is6() {
		shortest = 16
	}
	return p.Bits() >= shortest && !slices.ContainsFunc(ownAddresses, p.Contains)
}

func allowedPort(port uint16) bool { return port != 22 && !slices.Contains(sceneOwnPorts, port) }

// scenes makes random ones.
type scenes struct{ *rand.Rand }

func (r scenes) oneIn(n int) bool { return r.IntN(n) == 0 }

func pick[T any](r scenes, from []T) T { return from[r.IntN(len(from))] }

func (r scenes) scene() scene {
	s := scene{settling: r.oneIn(4)}
	a := &s.attribute
	a.Spec.ProxyPort = pick(r, []uint16{15001, 15001, 15001, 15201})
	for range r.IntN(4) {
		a.Service.ServingPorts = append(a.Service.ServingPorts, pick(r, scenePorts))
	}
	a.Traffic.All = r.oneIn(4)
	a.Traffic.DNS = r.oneIn(3)
	for range r.IntN(3) {
		p := r.prefix()
		if text := p.String(); p.IsSingleIP() && r.oneIn(2) {
			a.Traffic.ExcludedRanges = append(a.Traffic.ExcludedRanges, p.Addr().String())
		} else {
			a.Traffic.ExcludedRanges = append(a.Traffic.ExcludedRanges, text)
		}
	}
	for range r.IntN(3) {
		text := strconv.Itoa(int(pick(r, scenePorts)))
		if r.oneIn(2) { // reversed as often as not, which gcloud lets through
			text += "-" + strconv.Itoa(int(pick(r, scenePorts)))
		}
		a.Traffic.ExcludedPorts = append(a.Traffic.ExcludedPorts, text)
	}
	if r.oneIn(2) {
		s.interfaces = []string{"docker0", "br-+"}
	}
	if r.oneIn(2) {
		s.resolvers = []uint32{resolverUID}
	}

	if !r.oneIn(6) {
		port := a.Spec.ProxyPort
		if r.oneIn(6) {
			port = 15101
		}
		main := r.listener(false, port)
		main.OriginalDst = true
		main.Chains = r.chains(false)
		if r.oneIn(8) { // buckets
			for range 300 + r.IntN(400) {
				main.Chains = append(main.Chains,
					chain(443, netip.AddrFrom4(
						[4]byte{11, byte(r.IntN(4)), byte(r.IntN(256)), byte(r.IntN(256))}).String()+"/32"))
			}
		}
		s.outbound = append(s.outbound, main)
		// of the two, that at the attribute's port wins where it can be reached
		if port == a.Spec.ProxyPort && r.oneIn(4) {
			second := r.listener(false, 15102)
			second.OriginalDst = true
			second.Chains = r.chains(false)
			s.outbound = append(s.outbound, second)
		}
	}
	if r.oneIn(2) {
		for range 1 + r.IntN(4) {
			l := r.listener(false, pick(r, scenePorts))
			l.Bound, l.OriginalDst = false, r.oneIn(4)
			l.Addresses = []netip.AddrPort{netip.AddrPortFrom(pick(r, everyone), pick(r, scenePorts))}
			if r.oneIn(3) {
				l.Addresses = r.wildcard(l.Addresses[0].Port())
			}
			l.Ipv4Compat = l.Addresses[0].Addr().Is6() && r.oneIn(2)
			l.Chains = r.chains(false)
			s.behind = append(s.behind, l)
		}
	}
	for range r.IntN(3) {
		l := r.listener(true, pick(r, []uint16{15006, 15006, 15206}))
		l.OriginalDst = true
		l.Chains = r.chains(true)
		if r.oneIn(5) {
			l.DefaultChain = &envoyadmin.FilterChain{}
		}
		s.inbound = append(s.inbound, l)
	}
	if r.oneIn(2) {
		l := envoyadmin.Listener{Name: "dns", Bound: true, UDP: true, DNS: true, Ipv4Compat: r.oneIn(2)}
		l.Addresses = pick(r, [][]netip.AddrPort{
			ports(15053, "127.0.0.1"), ports(15053, "127.0.0.1", "::1"), ports(15053, "::")})
		s.dns = append(s.dns, l)
		if r.oneIn(2) {
			l := envoyadmin.Listener{Name: "dns-tcp", Bound: true, Ipv4Compat: r.oneIn(2)}
			l.Addresses = pick(r, [][]netip.AddrPort{ports(15053, "127.0.0.1"), ports(15053, "::1"),
				ports(15053, "::"), ports(15055, "0.0.0.0", "::")})
			s.dnsTCP = append(s.dnsTCP, l)
		}
	}
	for range r.IntN(4) {
		l := r.listener(r.oneIn(2), pick(r, scenePorts))
		l.Chains = r.chains(false)
		switch r.IntN(4) {
		case 0: // bound, but it asks for no original destination
		case 1:
			l.UDP = true
			l.OriginalDst = r.oneIn(2)
			l.Bound = r.oneIn(2)
		case 2: // Istio's of old, behind the inbound one
			l = r.listener(true, pick(r, scenePorts))
			l.Bound, l.OriginalDst, l.Chains = false, r.oneIn(2), r.chains(true)
			if r.oneIn(2) {
				l.Addresses = ports(l.Addresses[0].Port(), pick(r, serviceLike).String())
			}
		case 3: // Envoy answers no questions at one that is not bound
			l = envoyadmin.Listener{Name: "a" + l.Name, UDP: true, DNS: true,
				Addresses: ports(15054, "127.0.0.1", "::1")}
		}
		s.unrelated = append(s.unrelated, l)
	}
	return s
}

// listener makes one of which direction, name or port says whether it is inbound; the direction may
// contradict the name, and the name the port.
func (r scenes) listener(inbound bool, port uint16) envoyadmin.Listener {
	name, other, direction := "outbound", "inbound", corev3.TrafficDirection_OUTBOUND
	if inbound {
		name, other, direction = other, name, corev3.TrafficDirection_INBOUND
	}
	l := envoyadmin.Listener{Bound: true, Name: fmt.Sprintf("l%03d", r.IntN(1000))}
	switch n := r.IntN(3); {
	case n == 0:
		l.Direction = direction
		l.Name += pick(r, []string{"", "-" + name, "-" + other})
	case n == 1 || inbound != (port == attribute.InboundPort):
		l.Name += "-" + name
	}
	l.Addresses = r.wildcard(port)
	l.Ipv4Compat = r.oneIn(2)
	switch r.IntN(6) {
	case 0:
		l.Addresses = ports(port, "127.0.0.1", "::1")
	case 1:
		l.Addresses = ports(port, "127.0.0.1")
	case 2:
		l.Addresses = ports(port, pick(r, ownAddresses).String())
	}
	return l
}

func (r scenes) wildcard(port uint16) []netip.AddrPort {
	return pick(
		r, [][]netip.AddrPort{ports(port, "0.0.0.0"), ports(port, "::"), ports(port, "0.0.0.0", "::")})
}

func ports(port uint16, texts ...string) (a []netip.AddrPort) {
	for _, addr := range addresses(texts...) {
		a = append(a, netip.AddrPortFrom(addr, port))
	}
	return a
}

func (r scenes) chains(inbound bool) (chains []envoyadmin.FilterChain) {
	for range r.IntN(6) {
		var c envoyadmin.FilterChain
		if !r.oneIn(3) {
			c.Port = pick(r, append(scenePorts, 15020))
		}
		for range r.IntN(3) {
			p := r.prefix()
			if inbound { // the VM's own
				a := pick(r, slices.Concat(ownAddresses, balancer))
				p = netip.PrefixFrom(a, a.BitLen())
			}
			c.Prefixes = append(c.Prefixes, p)
		}
		chains = append(chains, c)
	}
	return chains
}

func (r scenes) prefix() netip.Prefix {
	if r.oneIn(8) { // as wide as a listener may ask for, and wider
		return netip.PrefixFrom(pick(r, serviceLike), pick(r, []int{0, 7, 8, 15, 16})).Masked()
	}
	a := pick(r, everyone)
	return netip.PrefixFrom(a, a.BitLen()-pick(r, []int{0, 0, 0, 1, 2, 8, 16})).Masked()
}

func (r scenes) packet(s scene, family iptables.Family) iptables.Packet {
	p := iptables.Packet{Hook: iptables.Output, Proto: iptables.TCP, Syn: !r.oneIn(8)}
	to, port := everyone, pick(r, append(scenePorts, 15020))
	if r.oneIn(3) {
		p.Hook = iptables.Prerouting
		p.InInterface = pick(r, []string{"eth0", "docker0", "br-7"})
		if serving := s.attribute.Service.ServingPorts; len(serving) > 0 && r.oneIn(2) {
			to, port = slices.Concat(ownAddresses, balancer), pick(r, serving)
		}
	} else {
		p.UID = pick(r, []uint32{0, resolverUID, 1000, 1000, 1000, 1000, 1000, sceneUID})
		p.GID = pick(r, []uint32{1000, 1000, 1000, 1000, 1000, 1000, 1000, sceneGID})
	}
	dst := pick(r, to)
	for dst.Is4() != (family == iptables.IPv4) {
		dst = pick(r, to)
	}
	p.Dst = netip.AddrPortFrom(dst, port)
	p.DstLocal = dst.IsLoopback() || slices.Contains(ownAddresses, dst) ||
		slices.Contains(balancer, dst)
	if r.oneIn(12) {
		p.Proto, p.Syn = iptables.UDP, false
	}
	return p
}

// TestDesiredMeansWhatTheListenersSay: for random listeners and attributes, the rules that follow
// from Desired do to random packets what was to be expected of the listeners. That the kernel does
// what Ruleset.Walk says is shown with real packets in package iptables (TestTheKernelAgrees),
// whose test code cannot be had from here.
func TestDesiredMeansWhatTheListenersSay(t *testing.T) {
	const configurations, packets = 300, 200
	seed := uint64(time.Now().UnixNano())
	if s, err := strconv.ParseUint(os.Getenv("SEED"), 10, 64); err == nil {
		seed = s
	}
	r := scenes{rand.New(rand.NewPCG(seed, 5))}
	reasons := map[string]int{}
	for n := range configurations {
		s := r.scene()
		text, err := json.Marshal(s.attribute)
		if err != nil {
			t.Fatal(err)
		}
		config, err := attribute.Parse(text)
		if err != nil {
			t.Fatalf("seed %d, configuration %d: %v\n%s", seed, n, err, text)
		}
		in := Inputs{
			Config: config, ProxyUID: sceneUID, ProxyGID: sceneGID, Local: ownAddresses,
			Interfaces:   s.interfaces,
			ResolverUIDs: s.resolvers, OwnPorts: sceneOwnPorts,
			Listeners: slices.Concat(s.outbound, s.behind, s.inbound, s.dns, s.dnsTCP, s.unrelated),
		}
		r.Shuffle(len(in.Listeners), func(i, j int) {
			in.Listeners[i], in.Listeners[j] = in.Listeners[j], in.Listeners[i]
		})
		want := Desired(in)
		for _, i := range want.Families {
			i.Jumps, i.Settling = true, s.settling // the loop's to decide
			rules := i.Ruleset()
			for range packets / 2 {
				p := r.packet(s, i.Family)
				action, port, why := s.expect(i.Family, p)
				if v := rules.Walk(p); v.Action != action || v.Port != port {
					t.Fatalf(
						"seed %d, configuration %d, packet %+v:\nexpected %v %d (%s), the rules say %v %d by -A %s %s\nattribute %s\nlisteners %+v\n%s",
						seed, n, p, action, port, why, v.Action, v.Port, v.Chain, v.Rule, text, in.Listeners, rules)
				}
				reasons[why]++
			}
		}
	}
	t.Logf("seed %d: %d configurations, packets by reason: %v", seed, configurations, reasons)
	for _, why := range []string{
		"older than the first rule", "container's, everything", "container's, a service", "not served", "served by the default chain", "served by a chain",
		"served, but Envoy does not take it", "the proxy's", "DNS", "DNS over TCP", "no outbound listener", "never intercepted", "excluded", "root's",
		"everything", "a service's address", "a service's port", "no service",
	} {
		if reasons[why] == 0 {
			t.Errorf("seed %d: no packet of %q among %v", seed, why, slices.Sorted(maps.Keys(reasons)))
		}
	}
}
