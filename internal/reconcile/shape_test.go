package reconcile

import (
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// TestFresh: what a run that starts now would let in, and in which words it holds the rest back.
func TestFresh(t *testing.T) {
	const proxy = 107
	want := iptables.Interception{Family: iptables.IPv4, ProxyUID: proxy, ProxyGID: proxy,
		OutboundPort: 15001, Services: []netip.Prefix{netip.MustParsePrefix("10.0.0.1/32")},
		InboundPort: 15006, Serving: []iptables.Serving{{Port: 80}}, DNSPort: 15053}
	at := func(port uint16) netip.AddrPort {
		return netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port)
	}
	accepts := func(port uint16) symptom.Port {
		return symptom.Port{Addr: at(port), Listening: true, Owner: proxy}
	}
	closed := func(port uint16) symptom.Port { return symptom.Port{Addr: at(port)} }
	foreign := func(port uint16) symptom.Port {
		return symptom.Port{Addr: at(port), Listening: true, Owner: 1000}
	}
	in := Shaped(want, Whole())
	for _, test := range []struct {
		name   string
		change func(*Order)
		ours   iptables.Ruleset
		want   status.Shape
	}{
		{"all accept", func(*Order) {}, in, Whole()},
		{"nobody listens, and nothing is in", func(o *Order) { o.Looks.Outbound = closed(15001) },
			iptables.Ruleset{}, status.Shape{Inbound: true, DNS: true,
				Held: "the jumps are held back: Envoy does not accept on 15001"}},
		{"nobody listens, and the rules of this boot are in", func(o *Order) {
			o.Looks.Outbound, o.Marked = closed(15001), true
		}, in, Whole()},
		{"nobody listens, and rules of another boot are in", func(o *Order) {
			o.Looks.Outbound = closed(15001)
		}, in, status.Shape{Inbound: true, DNS: true,
			Held: "the jumps are held back: Envoy does not accept on 15001"}},
		{"a foreign owner", func(o *Order) { o.Looks.Outbound, o.Marked = foreign(15001), true }, in,
			status.Shape{Inbound: true, DNS: true, Held: "the jumps are held back: " +
				"port 15001 belongs to another user (uid 1000) than the proxy's"}},
		{"a planned stop", func(o *Order) { o.Draining = true }, in,
			status.Shape{Held: "the jumps are held back: Envoy is being stopped"}},
		{"inbound and DNS do not accept", func(o *Order) {
			o.Looks.Inbound, o.Looks.DNS = closed(15006), closed(15053)
		}, iptables.Ruleset{}, status.Shape{Jumps: true,
			Held: "inbound interception is held back: Envoy does not accept on 15006; " +
				"DNS interception is held back: Envoy does not accept on 15053"}},
		{"only inbound is wanted", func(o *Order) {
			o.Want.OutboundPort, o.Want.DNSPort = 0, 0
			o.Looks = Looks{Inbound: closed(15006)}
		}, iptables.Ruleset{}, status.Shape{
			Held: "the jumps are held back: Envoy does not accept on 15006"}},
		{"nothing is wanted", func(o *Order) { o.Want, o.Looks = iptables.Interception{}, Looks{} },
			iptables.Ruleset{}, status.Shape{}},
		{"settling", func(o *Order) {}, Shaped(want, status.Shape{
			Jumps: true, Inbound: true, DNS: true, Settling: true}),
			status.Shape{Jumps: true, Inbound: true, DNS: true, Settling: true}},
	} {
		t.Run(test.name, func(t *testing.T) {
			o := Order{Want: want, Known: true, UserKnown: true, ProxyUID: proxy,
				Ports: Ports{Outbound: 15001, Inbound: 15006, DNS: 15053},
				Looks: Looks{accepts(15001), accepts(15006), accepts(15053)}}
			test.change(&o)
			if diff := cmp.Diff(test.want, Fresh(time.Unix(1e9, 0), o, test.ours)); diff != "" {
				t.Errorf("(-want +have):\n%s", diff)
			}
		})
	}
}

// TestLeftRules: of many rules that the kernel does not take a hundred are told.
func TestLeftRules(t *testing.T) {
	left := make([]iptables.RefusedError, 10000)
	left[0] = iptables.RefusedError{Rule: "-A X -j Y", Stderr: "no Y"}
	told := leftRules(left)
	if len(told) != mostLeft || told[0] != (status.Left{Rule: "-A X -j Y", Why: "no Y"}) {
		t.Errorf("%d, first %+v", len(told), told[0])
	}
}
