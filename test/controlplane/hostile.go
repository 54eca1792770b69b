package controlplane

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// A hostile control plane is one that somebody broke into, or that is broken: what it sends is
// valid xDS, which Envoy takes or refuses, and none of it may be believed further than that. Names
// become words on a serial port, prefixes become rules of the kernel.
//
// Strings of protobuf are valid UTF-8, or the message is none. So the odd ones here are, too.

// HostileOptions of a hostile configuration.
type HostileOptions struct {
	// Sane is sent beside it, and should go on working as far as Envoy lets it.
	Sane Config
	// Own are the VM's own addresses.
	Own []netip.Addr
	// Entries of the kinds that are large; 0: 100,000.
	Entries int
	// LongName is the length of the kinds with long names; 0: a megabyte.
	LongName int
}

// hostileKinds are in the order in which HostileKinds tells them.
var hostileKinds = []struct {
	name string
	make func(h *hostile)
}{
	{"names", (*hostile).names},
	{"names of routes", (*hostile).routeNames},
	{"refused names", (*hostile).refusedNames},
	{"long names", (*hostile).longNames},
	{"forbidden prefixes", (*hostile).forbiddenPrefixes},
	{"forbidden prefixes of unbound listeners", (*hostile).forbiddenUnbound},
	{"forbidden ports", (*hostile).forbiddenPorts},
	{"many prefixes", (*hostile).manyPrefixes},
	{"many forbidden prefixes", (*hostile).manyForbidden},
	{"many ports", (*hostile).manyPorts},
	{"conflicts", (*hostile).conflicts},
	{"a listener elsewhere", (*hostile).elsewhere},
	{"inbound", (*hostile).inbound},
}

// HostileKinds are the kinds that Hostile knows.
func HostileKinds() (names []string) {
	for _, k := range hostileKinds {
		names = append(names, k.name)
	}
	return names
}

// Hostile makes a configuration of a kind. The same random numbers make the same one.
func Hostile(kind string, r *rand.Rand, opts HostileOptions) Config {
	h := &hostile{Config: opts.Sane, r: r, opts: opts}
	h.Services = slices.Clone(opts.Sane.Services)
	h.Listeners = slices.Clone(opts.Sane.Listeners)
	h.Inbound = slices.Clone(opts.Sane.Inbound)
	if h.opts.Entries == 0 {
		h.opts.Entries = 100_000
	}
	if h.opts.LongName == 0 {
		h.opts.LongName = 1 << 20
	}
	for _, k := range hostileKinds {
		if k.name == kind {
			k.make(h)
			return h.Config
		}
	}
	panic(fmt.Sprintf("controlplane.Hostile: no kind %q", kind))
}

type hostile struct {
	Config
	r    *rand.Rand
	opts HostileOptions
	used int
}

// Injected is in each string that tries to begin a line of its own. It must begin none.
const Injected = "service-proxy-agent/1 INFO: hacked"

// hostileStrings are what a name may try to be.
var hostileStrings = []string{
	"line\nbreak", "carriage\rreturn", "nul\x00byte", "bell\a\b\x7f", "next\u0085line",
	"paragraph\u2029separator", "line\u2028separator", "right-to-left\u202Egpj.exe",
	"isolate\u2066\u2069", "zero\u200bwidth\ufeff", "replacement\ufffd", "private\ue000\U0010fffd",
	"\x1b[2J\x1b[31mred", "\x1b]0;title\a", "\u009b31m", "tab\tab", " ", "\u3000", "",
	"\n2026-11-29T00:00:00.0000Z " + Injected + "\n",
	"\r\n" + Injected,
	"\u2028" + Injected,
	"v1 state=healthy finding=none since=2026-11-29T00:00:00Z agent=9 envoy=9 services=9",
	"FINISHED", "IN PROGRESS", "(over; 2026-11-29T00:00:00Z to 2026-11-29T00:00:00Z, 1 time)",
	"-j ACCEPT", "--flush", "-A OUTPUT -j DROP", "COMMIT\n*filter\n:INPUT DROP [0:0]\nCOMMIT\n",
	"SERVICE_PROXY_OUTPUT", "! -d 0.0.0.0/0", "; reboot", "$(reboot)", "`reboot`", "| tee /etc/passwd",
	"' OR 1=1 --", `"quoted"`, `back\slash`, "../../../../etc/passwd", "%s%n%d%!v(MISSING)",
	"${HOME}", "{{.}}", "<script>alert(1)</script>", "<!--", `{"configs":[]}`, "\"}\n{\"",
	"name=value",
	"lds: add/update listener 'x'", "\n[2026-11-29 00:00:00.000][1][warning][config] " +
		"StreamAggregatedResources gRPC config stream to x closed: 7, " + Injected + "\n",
	"a{b=\"c\"} 1\n# HELP x y\nservice_proxy_agent_ready 1\n",
	"http://user:password@x/?token=secret", "e\u0301\u0301\u0301\u0301", "𝒳",
	"👩‍👩‍👧‍👦",
}

// odd is a string that is no name, and is different each time.
func (h *hostile) odd() string {
	h.used++
	s := fmt.Sprintf("%s %d", hostileStrings[h.r.IntN(len(hostileStrings))], h.used)
	if h.r.IntN(3) == 0 {
		s += hostileStrings[h.r.IntN(len(hostileStrings))]
	}
	return s
}

// vip is an address that may be a service's, never twice the same.
func (h *hostile) vip() netip.Prefix {
	h.used++
	n := h.used
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 100 + byte(n>>16), byte(n >> 8), byte(n)}), 32)
}

// service adds one that matches the prefixes, with or without a port.
func (h *hostile) service(name string, port uint16, prefixes ...netip.Prefix) {
	h.Services = append(h.Services,
		Service{Name: name, Prefixes: prefixes, Port: port, Cluster: "hostile"})
}

// names: services, clusters and routes that are called what is no name.
func (h *hostile) names() {
	for range 8 {
		for range len(hostileStrings) / 8 {
			h.service(h.odd(), 80, h.vip())
		}
		h.Services = append(h.Services,
			Service{Name: h.odd(), Prefixes: []netip.Prefix{h.vip()}, Cluster: h.odd()})
		h.unbound(h.odd(), h.vip().Addr(), 80)
	}
}

// routeNames: the same by HTTP. Envoy refuses routes with some of them, and waits for those.
func (h *hostile) routeNames() {
	for range 8 {
		h.Services = append(h.Services,
			Service{Name: h.odd(), Prefixes: []netip.Prefix{h.vip()}, HTTP: true, Cluster: h.odd()})
	}
}

// refusedNames: listeners that Envoy refuses, for its error quotes them and goes a long way.
func (h *hostile) refusedNames() {
	for i := range 12 {
		path := "/root/" + h.odd()
		if i%2 == 0 {
			path = "/root/denied"
		}
		// A path ends at a NUL.
		path = strings.ReplaceAll(path, "\x00", "")
		h.Listeners = append(h.Listeners, RefusedListener(h.odd(), uint16(16000+i), path))
	}
}

// longNames: labels of a megabyte. A listener's are refused with words as long.
func (h *hostile) longNames() {
	long := func(of string) string {
		h.used++
		return fmt.Sprintf("%d-%s", h.used, strings.Repeat(of, h.opts.LongName/len(of)))
	}
	h.service(long("x"), 80, h.vip())
	h.service(long("\u202E\n"), 80, h.vip())
	h.Services = append(h.Services, Service{Name: "long-cluster", Prefixes: []netip.Prefix{h.vip()},
		Port: 80, Cluster: long("c")})
	// What is refused in it is told with its name.
	h.unbound(long("u"), netip.MustParseAddr("127.0.0.9"), 80)
	h.Listeners = append(h.Listeners, RefusedListener(long("r"), 16001, "/root/denied"),
		RefusedListener("long-path", 16002, "/root/"+strings.Repeat("p/", h.opts.LongName/2)))
}

// Forbidden are prefixes that no control plane may have redirected, for a VM with these addresses:
// its own, loopback, link-local with the metadata server, multicast, everything, and what is so
// wide that it takes the VM off the network.
func Forbidden(own []netip.Addr) (all []netip.Prefix) {
	for _, a := range own {
		all = append(all, netip.PrefixFrom(a, a.BitLen()))
		for _, bits := range []int{a.BitLen() - 1, a.BitLen() / 2} {
			p, _ := a.Prefix(bits)
			all = append(all, p)
		}
	}
	for _, s := range []string{"127.0.0.1/32", "127.0.0.53/32", "127.0.0.0/8", "127.200.0.0/16",
		"169.254.169.254/32", "169.254.0.0/16", "169.254.169.0/24", "169.0.0.0/8", "224.0.0.0/8",
		"224.0.0.1/32", "239.255.255.250/32", "0.0.0.0/32", "0.0.0.0/8", "::1/128", "::/128",
		"fe80::1/128", "fe80::/16", "fd20:ce::254/128", "fd20:ce::/64", "fd20::/16", "ff02::1/128",
		"ff00::/16"} {
		all = append(all, netip.MustParsePrefix(s))
	}
	for bits := range 8 {
		for _, s := range []string{"0.0.0.0", "128.0.0.0", "10.0.0.0"} {
			p, _ := netip.MustParseAddr(s).Prefix(bits)
			all = append(all, p)
		}
	}
	for bits := range 16 {
		for _, s := range []string{"::", "8000::", "fd00::", "2000::"} {
			p, _ := netip.MustParseAddr(s).Prefix(bits)
			all = append(all, p)
		}
	}
	slices.SortFunc(all, netip.Prefix.Compare)
	return slices.Compact(all)
}

// forbiddenPrefixes: each in a chain of its own or with others, some beside what is allowed.
func (h *hostile) forbiddenPrefixes() {
	h.IPv6 = IPv6Additional
	all := Forbidden(h.opts.Own)
	h.r.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	for len(all) > 0 {
		n := min(1+h.r.IntN(4), len(all))
		some := slices.Clone(all[:n])
		all = all[n:]
		if h.r.IntN(2) == 0 {
			some = append(some, h.vip())
		}
		port := uint16(80)
		if h.r.IntN(3) == 0 {
			port = 0
		}
		h.service(fmt.Sprintf("forbidden-%d", len(all)), port, some...)
	}
}

// forbiddenUnbound: the same in Istio's way, by the addresses of listeners that are not bound.
func (h *hostile) forbiddenUnbound() {
	for i, p := range Forbidden(h.opts.Own) {
		h.unbound(fmt.Sprintf("forbidden-%d", i), p.Addr(), []uint16{80, 22, 15000, 15020}[h.r.IntN(4)])
	}
	// Without an address the port alone is the rule.
	for _, port := range forbiddenPorts {
		h.unbound(fmt.Sprintf("port-%d", port), netip.IPv4Unspecified(), port)
	}
}

// forbiddenPorts are SSH's and ours.
var forbiddenPorts = []uint16{22, 15000, 15001, 15006, 15020}

// forbiddenPorts: rules without an address.
func (h *hostile) forbiddenPorts() {
	for _, port := range forbiddenPorts {
		h.service(fmt.Sprintf("port-%d", port), port)
		h.service(fmt.Sprintf("allowed-port-%d", port), port+10_000)
	}
}

// manyPrefixes: as many addresses as make a kernel, an Envoy and a status line think.
func (h *hostile) manyPrefixes() {
	h.many(func() netip.Prefix {
		h.used++ // none next to another: those would be one rule
		return h.vip()
	})
}

// manyForbidden: as many that are to be refused, each for itself.
func (h *hostile) manyForbidden() {
	h.many(func() netip.Prefix {
		h.used++
		n := h.used
		return netip.PrefixFrom(netip.AddrFrom4([4]byte{127, byte(n >> 16), byte(n >> 8), byte(n)}), 32)
	})
}

func (h *hostile) many(prefix func() netip.Prefix) {
	const chains = 100
	for i := range chains {
		var some []netip.Prefix
		for range max(h.opts.Entries/chains, 1) {
			some = append(some, prefix())
		}
		h.service(fmt.Sprintf("many-%d", i), 80, some...)
	}
}

// manyPorts: each a chain, which is what a port takes; so a tenth of the entries.
func (h *hostile) manyPorts() {
	for i := range min(max(h.opts.Entries/10, 100), 20_000) {
		h.service(fmt.Sprintf("port-%d", i), uint16(20_000+i))
	}
}

// conflicts: listeners that take each other's place, name the same port twice, are both inbound and
// outbound. Envoy refuses some of them.
func (h *hostile) conflicts() {
	for i, direction := range []corev3.TrafficDirection{corev3.TrafficDirection_OUTBOUND,
		corev3.TrafficDirection_INBOUND, corev3.TrafficDirection_UNSPECIFIED} {
		for j, port := range []uint32{DefaultOutboundPort, DefaultInboundPort, 15101 + uint32(i)} {
			l := h.bound(fmt.Sprintf("conflict-%d-%d outbound inbound", i, j), h.vip())
			l.TrafficDirection = direction
			l.Address.GetSocketAddress().PortSpecifier = &corev3.SocketAddress_PortValue{PortValue: port}
			h.Listeners = append(h.Listeners, l)
		}
	}
	// Two chains for the same: the listener with them is refused.
	h.service("twice", 80, h.vip())
	h.service("twice again", 80, h.Services[len(h.Services)-1].Prefixes...)
}

// elsewhere: the interception listener itself goes to a port that is another's.
func (h *hostile) elsewhere() {
	h.OutboundPort = []uint16{22, 53, 15000, 15006, 15020, 1, 65535}[h.r.IntN(7)]
	h.InboundPort = []uint16{22, 15000, 15020, 8081}[h.r.IntN(4)]
	h.service("elsewhere", 80, h.vip())
}

// inbound: chains for ports that are no serving ports, and for addresses that are not the VM's.
func (h *hostile) inbound() {
	h.Inbound = nil
	for i, port := range []uint16{22, 80, 8081, 15000, 15001, 15006, 15020} {
		h.Inbound = append(h.Inbound, Inbound{Port: port}, Inbound{Addr: h.opts.Own[i%len(h.opts.Own)],
			Port: port}, Inbound{Addr: netip.MustParseAddr("203.0.113.9"), Port: port})
	}
}

// bound is a listener in Traffic Director's shape that is not the one of the services.
func (h *hostile) bound(name string, vip netip.Prefix) *listenerv3.Listener {
	b := builder{cfg: Config{}}
	l := b.listener(name, corev3.TrafficDirection_OUTBOUND, 15101, []*listenerv3.FilterChain{
		b.chain(Service{Name: name, Prefixes: []netip.Prefix{vip}, Port: 80}, "hostile")})[0]
	return l
}

// unbound adds a listener that has an address and is not bound: Istio's way to name a service. It
// needs a cluster that is there.
func (h *hostile) unbound(name string, addr netip.Addr, port uint16) {
	if !slices.ContainsFunc(h.Services, func(s Service) bool { return s.Cluster == "hostile" }) {
		h.service("beside the unbound ones", 80, h.vip())
	}
	l := h.bound(name, netip.PrefixFrom(addr, addr.BitLen()))
	l.ListenerFilters = nil
	l.FilterChains[0].FilterChainMatch = nil
	l.Address = address(addr, port, corev3.SocketAddress_TCP)
	l.BindToPort = wrapperspb.Bool(false)
	h.Listeners = append(h.Listeners, l)
}
