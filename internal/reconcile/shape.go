package reconcile

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// Shaped is the ruleset that a family shall have: what is wanted of it, in a shape. Jumps and
// Settling of want do not matter.
func Shaped(want iptables.Interception, s status.Shape) iptables.Ruleset {
	return shape{jumps: s.Jumps, inbound: s.Inbound, dns: s.DNS, settling: s.Settling}.ruleset(want)
}

// Whole is the shape in which nothing is held back.
func Whole() status.Shape { return status.Shape{Jumps: true, Inbound: true, DNS: true} }

// Fresh is the shape that a run which starts now would give the rules, where ours are in: what a
// look without a daemon goes by.
func Fresh(now time.Time, o Order, ours iptables.Ruleset) status.Shape {
	g := gates{ports: o.Ports}
	if ours.Intercepting() && o.Marked {
		g.adopt(ours)
	}
	g.move(now, o, false)
	s := shapeOf(o.Want, o.Serial, &g, ours.Settling())
	return s.told(o)
}

// told is the shape as it is told.
func (s shape) told(o Order) status.Shape {
	return status.Shape{
		Jumps: s.jumps, Inbound: s.inbound, DNS: s.dns, Settling: s.settling, Held: s.held(o),
	}
}

// held says what of the wanted rules is not let in, and why; "": nothing.
func (s shape) held(o Order) string {
	ways := slices.DeleteFunc([]way{
		{"outbound interception", o.Looks.Outbound, o.Want.OutboundPort, s.jumps},
		{"inbound interception", o.Looks.Inbound, o.Want.InboundPort, s.inbound},
		{"DNS interception", o.Looks.DNS, o.Want.DNSPort, s.dns},
	}, func(w way) bool { return w.port == 0 })
	if len(ways) == 0 {
		return ""
	}
	if !s.jumps { // they wait for the first one that there is
		return "the jumps are held back: " + ways[0].closed(o)
	}
	var said []string
	for _, w := range ways {
		if !w.open {
			said = append(said, w.name+" is held back: "+w.closed(o))
		}
	}
	return strings.Join(said, "; ")
}

// way is one of the three ways in which connections are redirected.
type way struct {
	name string
	look symptom.Port
	port uint16
	open bool
}

// closed is why a way is not open.
func (w way) closed(o Order) string {
	switch {
	case o.Off:
		return "interception is off by the metadata key service-proxy-agent-interception"
	case o.Draining:
		return "Envoy is being stopped"
	case w.look.Listening && w.look.Owner != o.ProxyUID:
		return fmt.Sprintf("port %d belongs to another user (uid %d) than the proxy's", w.port,
			w.look.Owner)
	}
	return fmt.Sprintf("Envoy does not accept on %d", w.port)
}

// mostLeft is how many rules that the kernel does not take are told: with the match that it lacks
// they may be as many as the services.
const mostLeft = 100

// leftRules are the rules that are left out, as they are told.
func leftRules(left []iptables.RefusedError) (some []status.Left) {
	for _, l := range left[:min(len(left), mostLeft)] {
		some = append(some, status.Left{Rule: l.Rule, Why: l.Stderr})
	}
	return some
}
