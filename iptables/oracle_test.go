package iptables

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
)

// meant says what shall become of a packet, from the interception alone: the expectation is written
// in the words of the domain and knows of no chain.
func meant(i Interception, p Packet) (Action, uint16) {
	dst, port := p.Dst.Addr(), p.Dst.Port()
	in := func(list []netip.Prefix) bool {
		return slices.ContainsFunc(list, func(x netip.Prefix) bool { return x.Contains(dst) })
	}
	excluded := in(i.ExcludePrefixes) || slices.ContainsFunc(i.ExcludePorts, func(r PortRange) bool {
		return min(r.First, r.Last) <= port && port <= max(r.First, r.Last)
	})
	special := dst.IsLoopback() || dst.IsLinkLocalUnicast() ||
		dst == netip.MustParseAddr("fd20:ce::254")
	if !i.Jumps || i.Settling && p.Proto == TCP && !p.Syn {
		return Pass, 0
	}
	if p.Hook == Prerouting {
		if p.Proto != TCP {
			return Pass, 0
		}
		if i.OutboundPort != 0 && slices.Contains(i.Interfaces, p.InInterface) && !excluded {
			if in(i.Services) && !i.All || i.All && !special && !p.DstLocal {
				return Redirect, i.OutboundPort
			}
		}
		for _, s := range i.Serving {
			if i.InboundPort != 0 && p.DstLocal && s.Port == port && (!s.Addr.IsValid() || s.Addr == dst) {
				return Redirect, i.InboundPort
			}
		}
		return Pass, 0
	}
	if p.UID == i.ProxyUID || p.GID == i.ProxyGID {
		return Pass, 0
	}
	if i.DNSPort != 0 && (p.Proto == UDP || i.DNSOverTCP) && port == 53 &&
		!slices.Contains(i.ResolverUIDs, p.UID) {
		return Redirect, i.DNSPort
	}
	if p.Proto != TCP || i.OutboundPort == 0 || special || excluded {
		return Pass, 0
	}
	if i.All && p.UID != 0 || !i.All && (in(i.Services) || slices.Contains(i.ServicePorts, port)) {
		return Redirect, i.OutboundPort
	}
	return Pass, 0
}

// world is where the random configurations and packets are taken from: small, so that they meet.
type world struct {
	family    Family
	addresses []netip.Addr // some local to the machine, see local
	local     netip.Prefix
	ports     []uint16
	uids      []uint32
}

const (
	proxyUID, proxyGID = 1999, 1998
	outboundPort       = 15001
	inboundPort        = 15006
	dnsPort            = 15053
)

func newWorld(f Family) world {
	w := world{family: f, ports: []uint16{22, 53, 80, 443, 8080},
		uids: []uint32{0, 101, 1000, proxyUID}}
	addresses := []string{"10.1.0.1", "10.1.0.2", "10.1.0.3", "10.1.1.1", "10.2.0.1", "10.50.0.1",
		"10.50.0.2", "8.8.8.8", "127.0.0.53", "169.254.169.254", "192.0.2.7"}
	w.local = netip.MustParsePrefix("10.50.0.0/24")
	if f == IPv6 {
		addresses = []string{"fd01::1", "fd01::2", "fd01::3", "fd01:0:0:1::1", "fd02::1", "fd50::1",
			"fd50::2", "2001:db8::8", "::1", "fd20:ce::254"}
		w.local = netip.MustParsePrefix("fd50::/64")
	}
	for _, a := range addresses {
		w.addresses = append(w.addresses, netip.MustParseAddr(a))
	}
	return w
}

func (w world) prefixes(r *rand.Rand, n int) []netip.Prefix {
	var out []netip.Prefix
	for range n {
		a := w.addresses[r.IntN(len(w.addresses))]
		bits := a.BitLen() - []int{0, 0, 0, 1, 2, 8}[r.IntN(6)]
		out = append(out, netip.PrefixFrom(a, bits).Masked())
	}
	return out
}

func (w world) interception(r *rand.Rand) Interception {
	i := Interception{Family: w.family, ProxyUID: proxyUID, ProxyGID: proxyGID, Jumps: r.IntN(10) > 0,
		Settling: r.IntN(3) == 0}
	port := func() uint16 { return w.ports[r.IntN(len(w.ports))] }
	if r.IntN(8) > 0 {
		i.OutboundPort = outboundPort
		i.All = r.IntN(4) == 0
		i.Services = w.prefixes(r, 1+r.IntN(8))
		if r.IntN(4) == 0 { // buckets, none of them of this world's addresses but by chance
			i.Services = append(i.Services, randomPrefixes(w.family, 257+r.IntN(600), r.Uint64())...)
		}
		for range r.IntN(3) {
			i.ServicePorts = append(i.ServicePorts, port())
		}
		i.ExcludePrefixes = w.prefixes(r, r.IntN(2))
		for range r.IntN(2) {
			i.ExcludePorts = append(i.ExcludePorts, PortRange{port(), port()})
		}
		if r.IntN(2) == 0 {
			i.Interfaces = []string{"docker0"}
		}
	}
	if r.IntN(3) == 0 {
		i.DNSPort, i.DNSOverTCP = dnsPort, r.IntN(2) == 0
		if r.IntN(2) == 0 {
			i.ResolverUIDs = []uint32{101}
		}
	}
	if r.IntN(3) > 0 {
		i.InboundPort = inboundPort
		for range 1 + r.IntN(5) {
			s := Serving{Port: port()}
			if r.IntN(2) == 0 {
				s.Addr = w.addresses[r.IntN(len(w.addresses))]
			}
			i.Serving = append(i.Serving, s)
		}
	}
	return i
}

// packet makes a packet; in the OUTPUT half of the test every address is local to the namespace.
func (w world) packet(r *rand.Rand, hook Hook) Packet {
	p := Packet{Hook: hook, Proto: TCP, Syn: r.IntN(4) > 0, DstLocal: true}
	p.Dst = netip.AddrPortFrom(w.addresses[r.IntN(len(w.addresses))], w.ports[r.IntN(len(w.ports))])
	if hook == Prerouting {
		for p.Dst.Addr().IsLoopback() || p.Dst.Addr().IsLinkLocalUnicast() { // never on a wire
			p.Dst = netip.AddrPortFrom(w.addresses[r.IntN(len(w.addresses))], p.Dst.Port())
		}
		p.InInterface = []string{"eth0", "docker0"}[r.IntN(2)]
		p.DstLocal = w.local.Contains(p.Dst.Addr())
		return p
	}
	p.UID = w.uids[r.IntN(len(w.uids)+2)%len(w.uids)] // the proxy's less often
	p.GID = []uint32{1000, 1000, 1000, proxyGID}[r.IntN(4)]
	if r.IntN(4) == 0 {
		p.Proto = UDP
	}
	return p
}

// Random packets through random configurations go where they are meant to, by the ruleset and by
// the table that it makes. TestTheKernelAgrees plays the same on the kernel.
func TestPacketsGoWhereTheyAreMeantTo(t *testing.T) {
	for _, f := range families {
		w := newWorld(f)
		for _, hook := range []Hook{Output, Prerouting} {
			r := rand.New(rand.NewPCG(uint64(f), uint64(hook)))
			redirected := map[uint16]int{}
			for n := range 150 {
				i := w.interception(r)
				want := i.Ruleset()
				table, err := restored(Table{family: f}, NewPlan(want, Table{family: f}).String())
				if err != nil {
					t.Fatal(err)
				}
				for range 20 {
					p := w.packet(r, hook)
					action, port := meant(i, p)
					redirected[port]++
					for name, v := range map[string]Verdict{
						"Ruleset.Walk": want.Walk(p), "Table.Walk": table.Walk(p)} {
						if v.Action != action || v.Port != port {
							t.Fatalf("configuration %d %+v, packet %+v: meant %v %d, %s says %v %d by -A %s %s", n, i, p,
								action, port, name, v.Action, v.Port, v.Chain, v.Rule)
						}
					}
				}
			}
			for _, port := range []uint16{0, outboundPort, inboundPort, dnsPort} {
				never := hook == Output && port == inboundPort || hook == Prerouting && port == dnsPort
				if never != (redirected[port] == 0) {
					t.Errorf("%s: %d packets went to port %d", f, redirected[port], port)
				}
			}
		}
	}
}
