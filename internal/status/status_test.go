package status

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/test/schema"
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

// People's scripts read these names: fields are added, never renamed. What schema.Properties holds
// against the type is held here against what is written.
func TestJSON(t *testing.T) {
	schema.Properties(t, "status", Status{})
	for name, s := range map[string]Status{"nothing": {Mode: "starting"}, "everything": everything()} {
		body, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		schema.Valid(t, "status", body)
		if bytes.Contains(body, []byte("null")) {
			t.Errorf("%s: null in %s", name, body)
		}
		var back Status
		if err := json.Unmarshal(body, &back); err != nil {
			t.Fatal(err)
		}
		again, err := json.Marshal(back)
		if err != nil || !bytes.Equal(body, again) {
			t.Errorf("%s: %v, read back and written it is\n%s, was\n%s", name, err, again, body)
		}
	}
}

// TestSchemaRefuses: it is a schema that something can fail.
func TestSchemaRefuses(t *testing.T) {
	body, err := json.Marshal(everything())
	if err != nil {
		t.Fatal(err)
	}
	for old, changed := range map[string]string{
		`"schema":"service-proxy-agent/status/v1",`: ``, `status/v1`: `status/v2`,
		`"left":[{`: `"left":null,"other":[{`, `12:00:00Z`: `12:00:00+01:00`, `"mode":"hold"`: `"mode":""`,
		`"up":true`: `"up":1`, `"share":0.1`: `"share":0`, `"size_seconds":6`: `"size_seconds":0`,
		`"count":7`: `"count":-7`, `"most":3`: `"more":3`, `"severity":"info"`: `"severity":"INFO"`,
	} {
		other := bytes.Replace(body, []byte(old), []byte(changed), 1)
		if bytes.Equal(other, body) {
			t.Fatalf("no %s in %s", old, body)
		}
		if schema.Check(t, "status", other) == nil {
			t.Errorf("%q for %q is taken", changed, old)
		}
	}
}

// TestOlder: the status of an agent from before there was a schema is still read.
func TestOlder(t *testing.T) {
	const older = `{"version":"1.0.0","heartbeat":"2026-11-28T12:00:00Z","started":"2026-11-28T12:00:00Z",` +
		`"mode":"intercepting","ready":true,"bootstrap":{},"envoy":{"admin":"127.0.0.1:15000",` +
		`"configured":true,"listeners":2,"rejected":0},"families":[{"family":"IPv4","usable":true,` +
		`"equal":true,"jumps":true,"services":1,"service_ports":0,"rules":9}],"passes":1,"drift_repaired":0}`
	var s Status
	if err := json.Unmarshal([]byte(older), &s); err != nil || !s.Ready || len(s.Families) != 1 {
		t.Fatalf("%+v, %v", s, err)
	}
	body, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	schema.Valid(t, "status", body)
}

// everything is a Status in which nothing is left out.
func everything() Status {
	at := time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)
	return Status{
		Version: "1.2.3", Heartbeat: at, Started: at, Mode: "hold", Ready: true, NotReady: "why",
		Findings: []symptom.Finding{
			{ID: "envoy-down", Row: 1, Severity: symptom.Error, Cause: "c", Next: "n", Since: at,
				Evidence: []symptom.Evidence{{Source: symptom.FromEnvoy, Time: at, Text: "t"}},
				Commands: []string{"true"}},
			{ID: "drift", Cause: "c", ExplainedBy: "envoy-down", Key: "k"}},
		Interception: Interception{State: "off", Since: at, By: "project", WhenEnvoyDown: "bypass",
			WhenEnvoyDownBy: "instance"},
		LastFailure: "failed", Failing: "envoy-down", Since: at,
		Bootstrap: Bootstrap{Status: "FINISHED", Failure: "late", Done: true},
		Attribute: &Attribute{Read: at, Kept: true},
		Envoy: Envoy{Admin: "127.0.0.1:15000", State: "LIVE", Version: "x/1.40.0/y", Number: "1.40.0",
			Configured: true, Down: at, Listeners: 5, Rejected: 1, Node: "n"},
		ControlPlane: ControlPlane{Known: true, Connected: true, Since: at, Target: "td:443", Heard: at,
			Closed: &Close{Time: at, Code: 14, Message: "m", Target: "td:443"}, Error: "e"},
		Backend: "nft",
		Families: []Family{{Family: "IPv4", Usable: true, Equal: true, Jumps: true, Services: 2,
			ServicePorts: 1, OutboundPort: 15001, InboundPort: 15006, DNSPort: 15053, Rules: 9,
			Applied: at, Error: "e",
			Shape: &Shape{Jumps: true, Inbound: true, DNS: true, Settling: true, Held: "h"},
			Left:  []Left{{Rule: "r", Why: "w"}}}, {Family: "IPv6"}},
		Services:     []Service{{Name: "web", Addresses: []string{"10.0.0.1:80"}}, {Name: "none"}},
		ServingPorts: []uint16{80}, Passes: 7, Undone: 3, Paused: true, LastDriftBy: "x (1)",
		LastDriftWhen: at,
		Channels: []Channel{{Name: "guest_attributes", Enabled: true, Up: true, Error: "e", Last: at,
			Waiting: 1, Written: 2, Failures: 3, Dropped: 4,
			Budget: Budget{Unit: "queries", Left: 1.5, Most: 3, PerMinute: 3, Next: at}}, {Name: "serial"}},
		Cost: Cost{EnvoyShare: .01, CPUShare: .02, Window: 60, Resident: 1 << 25,
			Bucket:    Bucket{Level: -.5, Size: 6, Share: .1},
			Questions: []Question{{Name: "dump", Count: 7, Seconds: 4.2, Recent: .6}, {Name: "look"}}},
		History: []Transition{{Time: at, Kind: OfDrift, Severity: "info", Text: "t", ID: "drift", Key: "k", By: "x (1)", Times: 2, First: at},
			{Time: at, Kind: OfReady, Severity: "error", Text: "t"}},
		Samples: []Sample{{Time: at, State: "ready", Passes: 60, SlowestPass: .1, SlowestChange: .2,
			Changes: 1, Repairs: 2}},
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
		{"the brake is on", func(s *Status) { s.Mode = "off" },
			"v1 state=off finding=none since=2026-11-28T17:00:00Z agent=1.2.3 envoy=1.40.0 services=12"},
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

// TestHold: on hold it is said why nothing is led to Envoy, where that is known.
func TestHold(t *testing.T) {
	held := []Family{{Family: "IPv4"}, {Family: "IPv6",
		Shape: &Shape{Held: "the jumps are held back: Envoy does not accept on 15001"}}}
	for _, tt := range []struct {
		name string
		s    Status
		want string
	}{
		{"first boot", Status{NotReady: "Envoy has not received its listeners"},
			"nothing is led to Envoy yet: connections go past it"},
		{"held back", Status{NotReady: "x", Families: held},
			"connections go past Envoy: the jumps are held back: Envoy does not accept on 15001"},
		{"a planned stop", Status{NotReady: "Envoy is DRAINING, not LIVE", Families: held,
			Envoy: Envoy{State: "DRAINING"}},
			"Envoy drains, since its stop is planned: connections go past it"},
		{"down", Status{NotReady: "x", Envoy: Envoy{Down: time.Unix(1, 0)}},
			"Envoy is down, and connections go past it"},
		{"nothing is wanted", Status{Ready: true}, "nothing is to be led to Envoy"},
		{"an older agent", Status{},
			"nothing is led to Envoy yet, or its stop is planned: connections go past it"},
	} {
		tt.s.Mode = "hold"
		if have := tt.s.Connections(); have != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, have, tt.want)
		}
	}
}
