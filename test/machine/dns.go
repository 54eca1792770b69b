package machine

import (
	"net"
	"net/netip"
	"strings"

	"golang.org/x/net/dns/dnsmessage"
)

// serveDNS is the VM's resolver, which on Compute Engine is the metadata server: names in hosts
// have their one address, all others do not exist. Without one, gRPC's c-ares waits 2 s for an
// answer before each first connection of Envoy's.
func serveDNS(conn net.PacketConn, hosts map[string]string) {
	buf := make([]byte, 1500)
	for {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			return
		}
		var query dnsmessage.Message
		if query.Unpack(buf[:n]) != nil || len(query.Questions) != 1 {
			continue
		}
		q := query.Questions[0]
		answer := dnsmessage.Message{
			Header: dnsmessage.Header{ID: query.ID, Response: true,
				RecursionDesired: query.RecursionDesired, RecursionAvailable: true},
			Questions: query.Questions,
		}
		host, known := hosts[strings.TrimSuffix(strings.ToLower(q.Name.String()), ".")]
		switch {
		case !known:
			answer.RCode = dnsmessage.RCodeNameError
		case q.Type == dnsmessage.TypeAAAA && netip.MustParseAddr(host).Is6():
			answer.Answers = []dnsmessage.Resource{{
				Header: dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class, TTL: 60},
				Body:   &dnsmessage.AAAAResource{AAAA: netip.MustParseAddr(host).As16()},
			}}
		case q.Type == dnsmessage.TypeA && netip.MustParseAddr(host).Is4():
			answer.Answers = []dnsmessage.Resource{{
				Header: dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class, TTL: 60},
				Body:   &dnsmessage.AResource{A: netip.MustParseAddr(host).As4()},
			}}
		}
		packed, err := answer.Pack()
		if err != nil {
			continue
		}
		_, _ = conn.WriteTo(packed, from) // lost, as UDP may be
	}
}
