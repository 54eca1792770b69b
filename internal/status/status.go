// Package status is what the agent knows after a pass, as one value that every reporter reads. It
// decides nothing: package agent fills it in, and metrics, the socket, the guest attributes and the
// commands are next in the flow.
package status

import (
	"cmp"
	"fmt"
	"strings"
	"time"
	"unicode"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// Schema names the form of a Status in JSON, docs/status.schema.json. Fields may be added to it.
const Schema = "service-proxy-agent/status/v1"

// Status is what the agent knows after a pass: a value, copied out to every reporter. Its JSON is
// what `status -o json` prints; fields are added, never renamed.
type Status struct {
	Schema    string    `json:"schema"`
	Version   string    `json:"version"`   // of this agent
	Heartbeat time.Time `json:"heartbeat"` // when the last pass ran to its end, UTC
	Started   time.Time `json:"started"`
	// Mode is what the rules do now: "intercepting", "hold" (no jump yet, or a planned stop),
	// "bypass" (Envoy is down), "paused" (cleanup was called).
	Mode        string            `json:"mode"`
	Ready       bool              `json:"ready"`
	NotReady    string            `json:"not_ready,omitempty"` // why
	Findings    []symptom.Finding `json:"findings,omitempty"`
	LastFailure string            `json:"last_failure,omitempty"`
	// Failing is the newest failure that stands, of which LastFailure tells; "": none does.
	Failing   symptom.ID `json:"failing,omitempty"`
	Since     time.Time  `json:"since,omitzero"` // when State or Failing last changed, UTC
	Bootstrap Bootstrap  `json:"bootstrap"`
	// in force; nil: none yet, or --config
	Attribute *Attribute `json:"attribute,omitempty"`
	Envoy     Envoy      `json:"envoy"`
	Backend   string     `json:"backend,omitempty"` // nft or legacy
	Families  []Family   `json:"families,omitempty"`
	// Services are those whose rules were last seen to be in, by name. All of them: 10,000 are 1 MB
	// of JSON, and the socket's client takes 16. Nobody changes the slice.
	Services     []Service `json:"services,omitempty"`
	ServingPorts []uint16  `json:"serving_ports,omitempty"`
	Passes       uint64    `json:"passes"`
	Undone       uint64    `json:"drift_repaired"`
	Paused       bool      `json:"paused,omitempty"`
	// program and pid, where the kernel tells
	LastDriftBy   string    `json:"last_drift_by,omitempty"`
	LastDriftWhen time.Time `json:"last_drift_when,omitzero"`
	// Channels are the ways on which the agent tells others, each with what it may still write.
	Channels []Channel `json:"channels,omitempty"`
	Cost     Cost      `json:"cost,omitzero"`
	// History are the last transitions, oldest first, those of earlier runs on this machine too.
	History []Transition `json:"history,omitempty"`
	// Samples are the last minutes, oldest first: what the charts are drawn of.
	Samples []Sample `json:"samples,omitempty"`
}

// Channel is a way on which the agent tells others, and how it goes.
type Channel struct {
	Name    string `json:"name"` // "guest_attributes", "serial", "cloud_logging"
	Enabled bool   `json:"enabled"`
	Up      bool   `json:"up"`
	// Error is why it is not up, or off.
	Error   string    `json:"error,omitempty"`
	Last    time.Time `json:"last,omitzero"` // the last write that was taken, UTC
	Waiting int       `json:"waiting"`       // told, and not written yet
	Written uint64    `json:"written"`       // by this run
	Dropped uint64    `json:"dropped"`       // by this run
	// Budget is how much may be written: Left of Most, and Next is when one more may be, UTC.
	Budget Budget `json:"budget,omitzero"`
}

// Budget is a bound on what a channel writes.
type Budget struct {
	Unit string    `json:"unit"` // "queries a minute", "bytes a second"
	Left float64   `json:"left"`
	Most float64   `json:"most"`
	Next time.Time `json:"next,omitzero"`
}

// Cost is what the agent takes of the machine.
type Cost struct {
	// EnvoyShare is the share of Envoy's main thread that the agent's questions took lately, 0 to 1.
	EnvoyShare float64 `json:"envoy_main_thread_share"`
	CPUShare   float64 `json:"cpu_share"` // of one processor, lately, 0 to 1 or more
	Resident   uint64  `json:"resident_bytes"`
}

// Transition is something that changed, in the words of the log.
type Transition struct {
	Time     time.Time  `json:"time"`     // UTC
	Severity string     `json:"severity"` // "info", "warning", "error"
	Text     string     `json:"text"`
	ID       symptom.ID `json:"id,omitempty"`  // of the finding that it is about
	Key      string     `json:"key,omitempty"` // of that
	// By is who did it, program and pid, where the kernel told; "" where it did not, or nobody else
	// did.
	By string `json:"by,omitempty"`
}

// Sample is a minute.
type Sample struct {
	Time   time.Time `json:"time"`  // when the minute ended, UTC
	State  string    `json:"state"` // Status.State then
	Passes int       `json:"passes"`
	// SlowestPass and SlowestChange are in seconds: a pass, and a change from the moment that Envoy
	// showed it to the rules. 0: there was none.
	SlowestPass   float64 `json:"slowest_pass_seconds"`
	SlowestChange float64 `json:"slowest_change_seconds"`
	Changes       int     `json:"changes"` // of the rules
	Repairs       int     `json:"repairs"` // of drift
}

// Attribute says where the attribute in force is from.
type Attribute struct {
	Read time.Time `json:"read"` // when the metadata server gave it, UTC
	// to an earlier run; this one has read none that can be used
	Kept bool `json:"kept,omitempty"`
}

// Bootstrap is what bootstrap reached, read from the state folder.
type Bootstrap struct {
	Status  string `json:"status,omitempty"`
	Failure string `json:"failure,omitempty"`
	Done    bool   `json:"done,omitempty"` // an earlier run, or this one, has finished
}

// Envoy is Envoy as the admin interface tells.
type Envoy struct {
	Admin      string    `json:"admin"`
	State      string    `json:"state,omitempty"`
	Version    string    `json:"version,omitempty"`
	Configured bool      `json:"configured"`
	Number     string    `json:"version_number,omitempty"` // in Version; "" where it has none
	Down       time.Time `json:"down_since,omitzero"`
	Listeners  int       `json:"listeners"`
	Rejected   int       `json:"rejected"`
	Node       string    `json:"node,omitempty"`
}

// Family is one family's rules.
type Family struct {
	Family       string    `json:"family"`
	Usable       bool      `json:"usable"`
	Equal        bool      `json:"equal"` // the kernel has what it should have
	Jumps        bool      `json:"jumps"`
	Services     int       `json:"services"` // prefixes
	ServicePorts int       `json:"service_ports"`
	OutboundPort uint16    `json:"outbound_port,omitempty"`
	InboundPort  uint16    `json:"inbound_port,omitempty"`
	DNSPort      uint16    `json:"dns_port,omitempty"`
	Rules        int       `json:"rules"`
	Applied      time.Time `json:"applied,omitzero"` // last write
	Error        string    `json:"error,omitempty"`
	// Shape is what of the rules that are wanted is let in; nil: it is not known what is wanted.
	Shape *Shape `json:"shape,omitempty"`
	// Left are rules that the kernel does not take. A hundred at most: they are alike then.
	Left []Left `json:"left,omitempty"`
}

// Shape is what the policies (Hold, bypass, a planned stop, settling) make of the rules that are
// wanted.
type Shape struct {
	Jumps    bool   `json:"jumps"`   // the built-in chains lead to ours
	Inbound  bool   `json:"inbound"` // serving ports are redirected
	DNS      bool   `json:"dns"`     // DNS questions are
	Settling bool   `json:"settling,omitempty"`
	Held     string `json:"held,omitempty"` // what is held back, and why; "": nothing
}

// Left is a rule that the kernel does not take.
type Left struct {
	Rule string `json:"rule"` // "-A CHAIN …", or "-m comment": all rules are without their comments
	Why  string `json:"why"`  // the kernel's, or iptables', words
}

// Service is what a client's connection is intercepted for.
type Service struct {
	Name string `json:"name"` // by the control plane, or where it names none the address
	// Addresses are where clients look for it, sorted: "10.0.0.1:80", "10.0.0.0/24", "[fd10::1]:80",
	// and "*:80" for any address.
	Addresses []string `json:"addresses"`
}

// Healthy is what `status` answers: every pass runs and no finding is an error.
func (s Status) Healthy() bool {
	for _, f := range s.Findings {
		if f.Severity == symptom.Error {
			return false
		}
	}
	return true
}

// State is how the VM stands, in a word: "ready" or "not-ready", or why nothing is intercepted,
// "hold", "bypass", "paused" (see Mode).
func (s Status) State() string {
	switch {
	case s.Paused:
		return "paused"
	case s.Ready:
		return "ready" // on hold, too, when nothing is wanted
	case s.Mode == "hold", s.Mode == "bypass":
		return s.Mode
	}
	return "not-ready"
}

// Line is the Status in a line of words, by which whoever reads many VMs can group them:
//
//	v1 state=ready finding=none since=2026-11-28T18:00:00Z agent=1.2.3 envoy=1.40.0 services=12
//
// Keys are added at the end, and v1 becomes another word when one changes its meaning. head is all
// but the number of services, which may change all the time.
func (s Status) Line() (head, services string) {
	head = fmt.Sprintf("v1 state=%s finding=%s since=%s agent=%s envoy=%s services=", s.State(),
		word(string(s.Failing)), s.Since.UTC().Format(time.RFC3339), word(s.Version),
		word(s.Envoy.Number))
	return head, fmt.Sprint(len(s.Services))
}

// word makes s a value of Line: it has no space, is not empty, and at most 64 bytes.
func word(s string) string {
	s = strings.Map(func(r rune) rune {
		if r > unicode.MaxASCII || !unicode.IsPrint(r) || r == ' ' {
			return '_'
		}
		return r
	}, s)
	return cmp.Or(s[:min(len(s), 64)], "none")
}
