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
// what `status -o json` prints and docs/status.schema.json describes; fields are added, never
// renamed.
type Status struct {
	Schema    string    `json:"schema"`
	Version   string    `json:"version"`   // of this agent
	Heartbeat time.Time `json:"heartbeat"` // when the last pass ran to its end, UTC
	Started   time.Time `json:"started"`
	// Mode is what the rules do now: "intercepting", "hold" (no jump yet, or a planned stop),
	// "bypass" (Envoy is down), "off" (the brake is on), "paused" (cleanup was called).
	Mode        string            `json:"mode"`
	Ready       bool              `json:"ready"`
	NotReady    string            `json:"not_ready,omitempty"` // why
	Findings    []symptom.Finding `json:"findings"`
	LastFailure string            `json:"last_failure,omitempty"`
	// Failing is the newest failure that stands, of which LastFailure tells; "": none does.
	Failing symptom.ID `json:"failing,omitempty"`
	Since   time.Time  `json:"since,omitzero"` // when State or Failing last changed, UTC
	// Interception is what the metadata key service-proxy-agent-interception asks for.
	Interception Interception `json:"interception,omitzero"`
	Bootstrap    Bootstrap    `json:"bootstrap"`
	// in force; nil: none yet, or --config
	Attribute *Attribute `json:"attribute,omitempty"`
	Envoy     Envoy      `json:"envoy"`
	// ControlPlane is how Envoy's stream to it stands.
	ControlPlane ControlPlane `json:"control_plane"`
	Backend      string       `json:"backend,omitempty"` // nft or legacy
	Families     []Family     `json:"families"`
	// Services are those whose rules were last seen to be in, by name. All of them: 10,000 are 1 MB
	// of JSON, and the socket's client takes 16. Nobody changes the slice.
	Services []Service `json:"services"`
	// ServiceCount is how many they are, where they are left out until somebody asks.
	ServiceCount int      `json:"-"`
	ServingPorts []uint16 `json:"serving_ports"`
	Passes       uint64   `json:"passes"`
	Undone       uint64   `json:"drift_repaired"`
	Paused       bool     `json:"paused,omitempty"`
	// program and pid, where the kernel tells
	LastDriftBy   string    `json:"last_drift_by,omitempty"`
	LastDriftWhen time.Time `json:"last_drift_when,omitzero"`
	// Channels are the ways on which the agent tells others, each with what it may still write.
	Channels []Channel `json:"channels"`
	Cost     Cost      `json:"cost"`
	// History are the last transitions, oldest first, those of earlier runs on this machine too.
	History []Transition `json:"history"`
	// Samples are the last minutes, oldest first: what the charts are drawn of.
	Samples []Sample `json:"samples"`
}

// Interception is whether traffic shall be led to Envoy at all: what the emergency brake says, the
// metadata key service-proxy-agent-interception. What really is done says Mode.
type Interception struct {
	State string    `json:"state"`          // "on" or "off"
	Since time.Time `json:"since,omitzero"` // when an agent of this VM first saw it off, UTC
	// By is whose metadata has it off: "instance" or "project".
	By string `json:"by,omitempty"`
	// WhenEnvoyDown is the policy in force, "keep" or "bypass", and WhenEnvoyDownBy who says so: a
	// "setting" (--when-envoy-down), or the key of the "instance" or the "project".
	WhenEnvoyDown   string `json:"when_envoy_down"`
	WhenEnvoyDownBy string `json:"when_envoy_down_by"`
}

// Channel is a way on which the agent tells others, and how it goes. Counts are of this run.
type Channel struct {
	Name string `json:"name"` // "guest_attributes", "serial", "cloud_logging"
	// Enabled is false when it is turned off, by a setting or by the platform's refusal.
	Enabled bool `json:"enabled"`
	// Up is whether the newest try was taken: a query, a line, a request. False before the first.
	Up       bool      `json:"up"`
	Error    string    `json:"error,omitempty"` // why it is not up, or off
	Last     time.Time `json:"last,omitzero"`   // the last write that was taken, UTC
	Waiting  int       `json:"waiting"`         // told, and not written yet
	Written  uint64    `json:"written"`         // attributes, lines, entries; one said twice is one
	Failures uint64    `json:"failures"`        // tries that failed, and may be tried again
	// Dropped is what will never be written: it waited for too long, or was refused for good.
	Dropped uint64 `json:"dropped"`
	Budget  Budget `json:"budget,omitzero"`
}

// Budget is a bound on what a channel may still write now: Left of Most, of which PerMinute come
// back in a minute.
type Budget struct {
	Unit      string    `json:"unit"` // "queries", "entries", "lines"
	Left      float64   `json:"left"`
	Most      float64   `json:"most"`
	PerMinute float64   `json:"per_minute,omitzero"` // 0: they come back as the other side takes them
	Next      time.Time `json:"next,omitzero"`       // when one more may be written, UTC; zero: now
}

// Cost is what the agent takes of the machine. Shares are of Window seconds until some seconds ago.
type Cost struct {
	// EnvoyShare is the most that the agent's questions can have taken of Envoy's main thread, 0 to 1:
	// the time from asking to the end of the answer, of those that were answered.
	EnvoyShare float64 `json:"envoy_main_thread_share"`
	// CPUShare is of one processor, with the programs that it ran; above 1: of more than one.
	CPUShare float64 `json:"cpu_share"`
	Window   float64 `json:"window_seconds"` // 0: nothing is known yet
	Resident uint64  `json:"resident_bytes"` // memory of the daemon's process
	// Bucket is what questions to Envoy may take now; zero: there was no look at Envoy yet.
	Bucket Bucket `json:"envoy_budget,omitzero"`
	// Questions are what was asked of Envoy's admin interface, each kind once.
	Questions []Question `json:"envoy_questions"`
}

// Bucket is the time of Envoy's main thread that the agent's questions may take: what they took is
// taken out of it, and Share of the time flows in, up to Size.
type Bucket struct {
	Level float64 `json:"level_seconds"` // what is in it; below 0: the last answer took more
	Size  float64 `json:"size_seconds"`  // what it holds at most, which grows with what a dump takes
	Share float64 `json:"share"`         // of the time, above 0 to 1: --envoy-share
}

// Question is what one kind of question to Envoy took of its main thread, at most: the time from
// asking to the end of the answer, or of waiting for one that did not come.
type Question struct {
	Name    string  `json:"question"`       // as in the metrics: "dump", "look", "ready" …
	Count   uint64  `json:"count"`          // since the start, answered or not
	Seconds float64 `json:"seconds"`        // since the start
	Recent  float64 `json:"recent_seconds"` // of these, those of Cost.Window
}

// ControlPlane is Envoy's stream to its control plane.
type ControlPlane struct {
	Known     bool `json:"known"` // it is known whether there is a stream
	Connected bool `json:"connected"`
	// Since is when this run first saw it so, UTC.
	Since  time.Time `json:"since,omitzero"`
	Target string    `json:"target,omitempty"` // host:port, as Envoy has it
	// Heard is when it last sent listeners, as Envoy's log told this run, UTC.
	Heard time.Time `json:"heard,omitzero"`
	// Closed is how a stream last ended, be it that another stands now; nil: none is known of.
	Closed *Close `json:"last_close,omitempty"`
	Error  string `json:"error,omitempty"` // of our own way there, tried while Envoy's is broken
}

// Close is how a stream ended.
type Close struct {
	Time    time.Time `json:"time"`      // UTC
	Code    int       `json:"grpc_code"` // https://grpc.io/docs/guides/status-codes
	Message string    `json:"message,omitempty"`
	Target  string    `json:"target,omitempty"`
}

// Transition is something that changed, in the words of the log. What happens again and again may
// be one Transition, of the last time.
type Transition struct {
	Time time.Time `json:"time"` // of the last time, UTC
	// Kind is what changed: one of Kinds.
	Kind     string     `json:"kind"`
	Severity string     `json:"severity"` // "info", "warning", "error"
	Text     string     `json:"text"`
	ID       symptom.ID `json:"id,omitempty"`  // of the finding that it is about
	Key      string     `json:"key,omitempty"` // of that: of rules their family
	// By is who did it, program and pid, where the kernel told; "" where it did not, or nobody else
	// did.
	By string `json:"by,omitempty"`
	// Times is how often it happened, from First on; both are left out where that is once.
	Times int       `json:"times,omitempty"`
	First time.Time `json:"first,omitzero"`
}

// The kinds of Transitions.
const (
	OfAgent     = "agent"     // it was started
	OfAttribute = "attribute" // another one is in force
	OfBootstrap = "bootstrap" // its story
	OfDrift     = "drift"     // somebody changed rules of ours, which were repaired
	OfEnvoy     = "envoy"     // it was restarted, or is another version
	OfFinding   = "finding"   // a failure or a warning came, or is over ("over: …")
	OfMode      = "mode"      // Status.Mode
	OfReady     = "ready"     // ready, or not and why
	OfRules     = "rules"     // rules of an earlier run were adopted
	OfServices  = "services"  // found, changed, gone
)

// Kinds are those of Transitions.
var Kinds = []string{OfAgent, OfAttribute, OfBootstrap, OfDrift, OfEnvoy, OfFinding, OfMode,
	OfReady, OfRules, OfServices}

// Sample is a minute, of this run.
type Sample struct {
	Time   time.Time `json:"time"`  // when the minute ended, UTC; a pass that hung makes it longer
	State  string    `json:"state"` // Status.State then
	Passes int       `json:"passes"`
	// SlowestPass and SlowestChange are in seconds: a pass, and a change from the moment that Envoy
	// showed it to the rules. 0: there was none.
	SlowestPass   float64 `json:"slowest_pass_seconds"`
	SlowestChange float64 `json:"slowest_change_seconds"`
	Changes       int     `json:"changes"` // writes of rules, but for repairs
	Repairs       int     `json:"repairs"` // writes that repaired drift
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
	Left []Left `json:"left"`
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

// StuckAfter is how old the newest pass may be: past every time limit of a pass.
const StuckAfter = 5 * time.Minute

// Stuck says whether the loop hangs: its last pass ended too long ago.
func (s Status) Stuck(now time.Time) bool {
	return !s.Heartbeat.IsZero() && now.Sub(s.Heartbeat) > StuckAfter
}

// Healthy says that no finding is an error.
func (s Status) Healthy() bool {
	for _, f := range s.Findings {
		if f.Severity == symptom.Error {
			return false
		}
	}
	return true
}

// State is how the VM stands, in a word: "ready" or "not-ready", or why nothing is intercepted,
// "hold", "bypass", "off", "paused" (see Mode).
func (s Status) State() string {
	switch {
	case s.Paused:
		return "paused"
	case s.Mode == "off":
		return "off" // ready, too: that is what is wanted
	case s.Ready:
		return "ready" // on hold, too, when nothing is wanted
	case s.Mode == "hold", s.Mode == "bypass":
		return s.Mode
	}
	return "not-ready"
}

// Connections is what becomes of connections that are for Envoy, in words for people; "": not
// known.
func (s Status) Connections() string {
	switch s.Mode {
	case "intercepting":
		if !s.Envoy.Down.IsZero() {
			return "connections are led to Envoy, which is down: they fail until it is back " +
				"(--when-envoy-down=keep)"
		}
		return "connections are led to Envoy"
	case "hold":
		return s.holds()
	case "bypass":
		return "Envoy is down, and connections go past it"
	case "paused":
		return "connections go past Envoy"
	case "off":
		return "interception is off by " + s.Interception.whose() + ": connections go past Envoy"
	}
	return ""
}

// whose is whose metadata has it off, in words.
func (i Interception) whose() string {
	switch i.By {
	case "instance":
		return "this VM's metadata"
	case "project":
		return "the project's metadata"
	}
	return "metadata"
}

// holds is why nothing is led to Envoy on hold, as far as it is known.
func (s Status) holds() string {
	for _, f := range s.Families {
		if f.Shape != nil && f.Shape.Held != "" && s.Envoy.State != "DRAINING" {
			return "connections go past Envoy: " + f.Shape.Held
		}
	}
	switch {
	case s.Envoy.State == "DRAINING":
		return "Envoy drains, since its stop is planned: connections go past it"
	case s.Ready:
		return "nothing is to be led to Envoy"
	case !s.Envoy.Down.IsZero():
		return "Envoy is down, and connections go past it"
	case s.NotReady != "":
		return "nothing is led to Envoy yet: connections go past it"
	}
	return "nothing is led to Envoy yet, or its stop is planned: connections go past it"
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
	return head, fmt.Sprint(cmp.Or(s.ServiceCount, len(s.Services)))
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
