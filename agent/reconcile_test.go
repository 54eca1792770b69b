package agent

import (
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// TestCompile: the ruleset changes with the gates and with time alone, and not otherwise.
func TestCompile(t *testing.T) {
	now := time.Unix(1e9, 0)
	want := iptables.Interception{
		Family: iptables.IPv4, ProxyUID: 107, ProxyGID: 107, OutboundPort: 15001, Services: prefixes("10.1.0.1/32"), DNSPort: 15053,
		InboundPort: 15006, Serving: []iptables.Serving{{Port: 80}},
	}
	const (
		outbound = "-A OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT"
		inbound  = "-A PREROUTING -p tcp -j SERVICE_PROXY_INBOUND"
		dns      = "-A OUTPUT -p udp -m udp --dport 53 -j SERVICE_PROXY_DNS"
		settling = "--comment settling"
	)
	s := familyState{family: iptables.IPv4, settling: now.Add(settle)}
	for _, step := range []struct {
		name   string
		change func()
		same   bool
		in     []string
		out    []string
	}{
		{"hold", func() {}, false, nil, []string{outbound, inbound, dns}},
		{"nothing new", func() {}, true, nil, []string{outbound}},
		{"Envoy accepts outbound", func() { s.outbound = gate{open: true} }, false, []string{outbound, settling}, []string{inbound, dns}},
		{"and inbound", func() { s.inbound = gate{open: true} }, false, []string{outbound, inbound, settling}, []string{dns}},
		{"and DNS", func() { s.dns = gate{open: true} }, false, []string{outbound, inbound, dns, settling}, nil},
		{"just before older connections are taken over", func() { now = now.Add(settle - time.Second) }, true, []string{settling}, nil},
		{"older connections are taken over", func() { now = now.Add(time.Second) }, false, []string{outbound, inbound, dns}, []string{settling}},
		{"a stranger on the DNS port", func() { s.dns = gate{denied: true} }, false, []string{outbound, inbound}, []string{dns}},
		{"a planned stop", func() { s.outbound, s.inbound = gate{denied: true}, gate{denied: true} }, false, nil, []string{outbound, inbound, dns}},
	} {
		step.change()
		changed := s.compile(want, 1, now)
		if changed == step.same {
			t.Errorf("%s: changed is %v", step.name, changed)
		}
		text := s.want.String()
		for _, line := range step.in {
			if !strings.Contains(text, line) {
				t.Errorf("%s: no %q in\n%s", step.name, line, text)
			}
		}
		for _, line := range step.out {
			if strings.Contains(text, line) {
				t.Errorf("%s: %q in\n%s", step.name, line, text)
			}
		}
	}
}
