package reconcile

import (
	"fmt"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// Ports are the interception ports whose listeners matter now; 0: none.
type Ports struct {
	Outbound, Inbound, DNS uint16
	DNSOverTCP             bool // Envoy takes TCP at the DNS port, too
}

// Looks are who listens at the Ports, asked just before the pass. Of a port that is 0 the look has
// an Addr with port 0.
type Looks struct{ Outbound, Inbound, DNS symptom.Port }

// gates are the Hold policy of a family's three ports.
type gates struct {
	ports                  Ports
	outbound, inbound, dns gate
}

// move moves each gate by its look, and returns those looks that are facts. Until Envoy has told
// its listeners only a foreign owner of a port is one: a closed port is what Envoy's state tells
// better. The gates move then only where the rules that are in lead to their ports (adopted).
// The brake closes all of them, for which nothing need be known.
func (g *gates) move(now time.Time, o Order, adopted bool) (facts []symptom.Port) {
	g.ports = o.Ports
	for _, each := range []struct {
		gate *gate
		look symptom.Port
	}{{&g.outbound, o.Looks.Outbound}, {&g.inbound, o.Looks.Inbound}, {&g.dns, o.Looks.DNS}} {
		foreign := each.look.Listening && each.look.Owner != o.ProxyUID
		if o.Off {
			*each.gate = gate{denied: true}
		}
		if each.look.Addr.Port() == 0 || !o.Known && !adopted && !foreign {
			continue
		}
		if o.Known || foreign {
			facts = append(facts, each.look)
		}
		if !o.Off {
			*each.gate = each.gate.next(now, each.look, o.ProxyUID, o.Draining, o.WhenDown)
		}
	}
	return facts
}

// adopt opens the gates of the ports that rules of an earlier run of this boot lead to.
func (g *gates) adopt(ours iptables.Ruleset) {
	outbound, inbound, dns := ours.Ports()
	g.outbound = g.outbound.adopted(outbound)
	g.inbound = g.inbound.adopted(inbound)
	g.dns = g.dns.adopted(dns)
}

// notAccepting is the port that does not accept, in words; "" when all that matter do.
func (g *gates) notAccepting(f iptables.Family) string {
	is := g.ports
	switch {
	case is.Outbound != 0 && !g.outbound.accepts():
		return fmt.Sprintf("Envoy's port %d does not accept %v connections", is.Outbound, f)
	case is.Inbound != 0 && !g.inbound.accepts():
		return fmt.Sprintf("Envoy's inbound port %d does not accept %v connections", is.Inbound, f)
	case is.DNS != 0 && !g.dns.accepts():
		return fmt.Sprintf("Envoy does not listen on its DNS port %d over %v", is.DNS, f)
	}
	return ""
}
