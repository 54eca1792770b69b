package status

import (
	"encoding/json"
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
		LastFailure: "failed", Bootstrap: Bootstrap{Status: "FINISHED", Failure: "late", Done: true},
		Attribute: &Attribute{Read: at, Kept: true},
		Envoy: Envoy{Admin: "127.0.0.1:15000", State: "LIVE", Version: "1.40.0", Configured: true,
			Down: at, Listeners: 5, Rejected: 1, Node: "n"},
		Backend: "nft",
		Families: []Family{{Family: "IPv4", Usable: true, Equal: true, Jumps: true, Services: 2,
			ServicePorts: 1, OutboundPort: 15001, InboundPort: 15006, DNSPort: 15053, Rules: 9,
			Applied: at, Error: "e"}},
		ServingPorts: []uint16{80}, Passes: 7, Undone: 3, Paused: true, LastDriftBy: "x (1)",
		LastDriftWhen: at,
	}
	const fullJSON = `{"version":"1.2.3","heartbeat":"2026-11-28T12:00:00Z",` +
		`"started":"2026-11-28T12:00:00Z","mode":"hold","ready":true,"not_ready":"why",` +
		`"last_failure":"failed","bootstrap":{"status":"FINISHED","failure":"late","done":true},` +
		`"attribute":{"read":"2026-11-28T12:00:00Z","kept":true},` +
		`"envoy":{"admin":"127.0.0.1:15000","state":"LIVE","version":"1.40.0","configured":true,` +
		`"down_since":"2026-11-28T12:00:00Z","listeners":5,"rejected":1,"node":"n"},` +
		`"backend":"nft","families":[{"family":"IPv4","usable":true,"equal":true,"jumps":true,` +
		`"services":2,"service_ports":1,"outbound_port":15001,"inbound_port":15006,` +
		`"dns_port":15053,"rules":9,"applied":"2026-11-28T12:00:00Z","error":"e"}],` +
		`"serving_ports":[80],"passes":7,"drift_repaired":3,"paused":true,` +
		`"last_drift_by":"x (1)","last_drift_when":"2026-11-28T12:00:00Z"}`
	const emptyJSON = `{"version":"","heartbeat":"0001-01-01T00:00:00Z",` +
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
