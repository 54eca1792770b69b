package status

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

func TestHealthy(t *testing.T) {
	for _, tt := range []struct {
		name     string
		findings []symptom.Finding
		want     bool
	}{
		{"no finding", nil, true},
		{"a warning and advice", []symptom.Finding{
			{Severity: symptom.Warning}, {Severity: symptom.Advice}}, true},
		{"an error behind a warning", []symptom.Finding{
			{Severity: symptom.Warning}, {Severity: symptom.Error}}, false},
		{"an error that another explains", []symptom.Finding{
			{Severity: symptom.Error, ExplainedBy: "envoy-down"}}, false},
	} {
		if have := (Status{Findings: tt.findings}).Healthy(); have != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, have, tt.want)
		}
	}
}

// People's scripts read these names: fields are added, never renamed, and what says nothing is left
// out.
func TestJSON(t *testing.T) {
	at := time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)
	full := Status{
		Version: "1.2.3", Heartbeat: at, Started: at, Mode: "hold", Ready: true, NotReady: "why",
		LastFailure: "failed", Failing: "envoy-down", Since: at, Bootstrap: Bootstrap{Status: "FINISHED", Failure: "late", Done: true},
		Attribute: &Attribute{Read: at, Kept: true},
		Envoy: Envoy{Admin: "127.0.0.1:15000", State: "LIVE", Version: "x/1.40.0/y", Number: "1.40.0",
			Configured: true, Down: at, Listeners: 5, Rejected: 1, Node: "n"},
		Backend: "nft",
		Families: []Family{{Family: "IPv4", Usable: true, Equal: true, Jumps: true, Services: 2,
			ServicePorts: 1, OutboundPort: 15001, InboundPort: 15006, DNSPort: 15053, Rules: 9,
			Applied: at, Error: "e", Shape: &Shape{Jumps: true, Inbound: true, DNS: true, Settling: true, Held: "h"},
			Left: []Left{{Rule: "r", Why: "w"}}}},
		Services:     []Service{{Name: "web", Addresses: []string{"10.0.0.1:80"}}},
		ServingPorts: []uint16{80}, Passes: 7, Undone: 3, Paused: true, LastDriftBy: "x (1)",
		LastDriftWhen: at,
	}
	const fullJSON = `{"schema":"","version":"1.2.3","heartbeat":"2026-11-28T12:00:00Z",` +
		`"started":"2026-11-28T12:00:00Z","mode":"hold","ready":true,"not_ready":"why",` +
		`"last_failure":"failed","failing":"envoy-down","since":"2026-11-28T12:00:00Z","bootstrap":{"status":"FINISHED","failure":"late","done":true},` +
		`"attribute":{"read":"2026-11-28T12:00:00Z","kept":true},` +
		`"envoy":{"admin":"127.0.0.1:15000","state":"LIVE","version":"x/1.40.0/y","configured":true,` +
		`"version_number":"1.40.0","down_since":"2026-11-28T12:00:00Z","listeners":5,"rejected":1,"node":"n"},` +
		`"backend":"nft","families":[{"family":"IPv4","usable":true,"equal":true,"jumps":true,` +
		`"services":2,"service_ports":1,"outbound_port":15001,"inbound_port":15006,` +
		`"dns_port":15053,"rules":9,"applied":"2026-11-28T12:00:00Z","error":"e",` +
		`"shape":{"jumps":true,"inbound":true,"dns":true,"settling":true,"held":"h"},"left":[{"rule":"r","why":"w"}]}],` +
		`"services":[{"name":"web","addresses":["10.0.0.1:80"]}],"serving_ports":[80],"passes":7,"drift_repaired":3,"paused":true,` +
		`"last_drift_by":"x (1)","last_drift_when":"2026-11-28T12:00:00Z"}`
	const emptyJSON = `{"schema":"","version":"","heartbeat":"0001-01-01T00:00:00Z",` +
		`"started":"0001-01-01T00:00:00Z","mode":"","ready":false,"bootstrap":{},` +
		`"envoy":{"admin":"","configured":false,"listeners":0,"rejected":0},` +
		`"passes":0,"drift_repaired":0}`
	for _, tt := range []struct {
		status Status
		want   string
	}{{full, fullJSON}, {Status{}, emptyJSON}} {
		have, err := json.Marshal(tt.status)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(tt.want, string(have)); diff != "" {
			t.Errorf("(-want +have):\n%s", diff)
		}
	}
}

// TestLine: what groups ten thousand VMs by.
func TestLine(t *testing.T) {
	at := time.Date(2026, 11, 28, 18, 0, 0, 1, time.FixedZone("east", 3600))
	ready := Status{Version: "1.2.3", Mode: "intercepting", Ready: true, Since: at,
		Envoy: Envoy{Number: "1.40.0"}, Services: make([]Service, 12)}
	for _, tt := range []struct {
		name   string
		change func(*Status)
		want   string
	}{
		{"ready", func(*Status) {}, "v1 state=ready finding=none since=2026-11-28T17:00:00Z agent=1.2.3 envoy=1.40.0 services=12"},
		{"ready, and something failed", func(s *Status) { s.Failing = "metadata-server" },
			"v1 state=ready finding=metadata-server since=2026-11-28T17:00:00Z agent=1.2.3 envoy=1.40.0 services=12"},
		{"ready, and nothing to intercept", func(s *Status) { s.Mode, s.Services = "hold", nil },
			"v1 state=ready finding=none since=2026-11-28T17:00:00Z agent=1.2.3 envoy=1.40.0 services=0"},
		{"not ready", func(s *Status) { s.Ready = false },
			"v1 state=not-ready finding=none since=2026-11-28T17:00:00Z agent=1.2.3 envoy=1.40.0 services=12"},
		{"hold", func(s *Status) { s.Ready, s.Mode = false, "hold" },
			"v1 state=hold finding=none since=2026-11-28T17:00:00Z agent=1.2.3 envoy=1.40.0 services=12"},
		{"bypass", func(s *Status) { s.Ready, s.Mode, s.Failing = false, "bypass", "envoy-down" },
			"v1 state=bypass finding=envoy-down since=2026-11-28T17:00:00Z agent=1.2.3 envoy=1.40.0 services=12"},
		{"paused", func(s *Status) { s.Ready, s.Mode, s.Paused = false, "paused", true },
			"v1 state=paused finding=none since=2026-11-28T17:00:00Z agent=1.2.3 envoy=1.40.0 services=12"},
		{"odd versions", func(s *Status) { s.Version, s.Envoy.Number = "my build\nof today=é", strings.Repeat("9", 99) },
			"v1 state=ready finding=none since=2026-11-28T17:00:00Z agent=my_build_of_today=_ envoy=" +
				strings.Repeat("9", 64) + " services=12"},
		{"no versions", func(s *Status) { s.Version, s.Envoy.Number = "", "" },
			"v1 state=ready finding=none since=2026-11-28T17:00:00Z agent=none envoy=none services=12"},
	} {
		s := ready
		tt.change(&s)
		head, services := s.Line()
		if got := head + services; got != tt.want {
			t.Errorf("%s:\n%s, want\n%s", tt.name, got, tt.want)
		}
	}
}
