package agent

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
)

// TestUnknownKeysLoggedOnce: keys that this version does not know are logged once, however often
// the rest of the attribute changes; others are news.
func TestUnknownKeysLoggedOnce(t *testing.T) {
	core, logs := observer.New(zap.WarnLevel)
	var a attributeInForce
	log := zap.New(core)
	for _, step := range []struct{ text, says string }{
		{`{}`, ""},
		{`{"new-key": 1, "labels": {"a": "1"}}`, "[new-key]"},
		{`{"new-key": 2, "labels": {"a": "2"}}`, ""},
		{`{"labels": {"a": "3"}, "new-key": 2}`, ""},
		{`{"new-key": 2, "service": {"another": 1}}`, "[new-key service.another]"},
		{`{"service": {"another": 1}, "new-key": 2, "labels": {}}`, ""},
		{`{}`, ""},
		{`{"new-key": 2}`, ""}, // known from before
		{`{"new-key": 2, "service": {"another": 3}}`, ""},
		{`{"service": {"another": 3}}`, "[service.another]"},
	} {
		config, err := attribute.Parse([]byte(step.text))
		if err != nil {
			t.Fatal(err)
		}
		a.take(attributeNews{Good: &goodAttribute{Config: config, Text: []byte(step.text)}}, log)
		var logged []string
		for _, entry := range logs.TakeAll() {
			logged = append(logged, fmt.Sprint(entry.ContextMap()["keys"]))
		}
		if got := strings.Join(logged, "; "); got != step.says {
			t.Errorf("%s: logged %q, want %q", step.text, got, step.says)
		}
	}
}

// TestAttributeChangesRules: what docs/attribute.md calls live is in the rules; what is for Envoy
// or bootstrap alone is not.
func TestAttributeChangesRules(t *testing.T) {
	listeners := []envoyadmin.Listener{
		listener(td, both, chain(80, "10.1.0.1/32")),
		listener("other", []string{"0.0.0.0:16001"}, chain(80, "10.1.0.1/32")),
		{Name: "dns", Bound: true, UDP: true, DNS: true, Addresses: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:15053")}},
		func() envoyadmin.Listener {
			l := listener(tdIn, []string{"0.0.0.0:15006"}, chain(80), chain(8080))
			l.Direction = corev3.TrafficDirection_INBOUND
			return l
		}(),
	}
	rules := func(text string) Want {
		config, err := attribute.Parse([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		want := Desired(Inputs{Config: config, Listeners: listeners, ProxyUID: 107, ProxyGID: 108,
			OwnPorts: []uint16{15000, 15001, 15006, 15020}})
		want.Refused = nil // of the listener at the other port
		return want
	}
	for _, tt := range []struct {
		from, to string
		changes  bool
	}{
		{`{}`, `{"traffic-interception": {"intercept-all-outbound": true}}`, true},
		{`{}`, `{"traffic-interception": {"exclude-outbound-ip-ranges": ["8.8.8.8"]}}`, true},
		{`{}`, `{"traffic-interception": {"exclude-outbound-port-ranges": ["81"]}}`, true},
		{`{}`, `{"traffic-interception": {"intercept-dns": true}}`, true},
		{`{"service": {"serving-ports": [80]}}`, `{"service": {"serving-ports": [80, 8080]}}`, true},
		{`{}`, `{"proxy-spec": {"proxy-port": 16001}}`, true},
		{`{}`, `{"labels": {"app": "b"}}`, false},
		{`{}`, `{"proxy-spec": {"tracing": "ON"}}`, false},
		{`{}`, `{"proxy-spec": {"access-log": "/var/log/envoy/access.log"}}`, false},
		{`{}`, `{"proxy-spec": {"network": "n"}}`, false},
		{`{}`, `{"proxy-spec": {"scope": "s"}}`, false},
		{`{}`, `{"proxy-spec": {"mesh": "m"}}`, false},
		{`{}`, `{"proxy-spec": {"project-number": "1"}}`, false},
		{`{}`, `{"proxy-spec": {"primary-source": "gs://b/o.tgz"}}`, false},
		{`{}`, `{"proxy-spec": {"secondary-source": "gs://b/o.tgz"}}`, false},
		{`{}`, `{"proxy-spec": {"xds-version": 3}}`, false},
		{`{}`, `{"api-version": "0.3", "new-key": 1}`, false},
	} {
		same := cmp.Equal(rules(tt.from), rules(tt.to),
			cmpopts.EquateComparable(netip.Prefix{}, netip.Addr{}), cmpopts.EquateEmpty())
		if same == tt.changes {
			t.Errorf("from %s to %s: the rules change: %v, want %v", tt.from, tt.to, !same, tt.changes)
		}
	}
	if w := rules(`{}`); !slices.ContainsFunc(w.Families[0].Services, func(p netip.Prefix) bool {
		return p.String() == "10.1.0.1/32"
	}) {
		t.Errorf("there are no rules to change: %+v", w)
	}
}
