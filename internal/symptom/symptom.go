// Package symptom puts what the agent found out into words.
//
// Check is a pure function from Facts to Findings and the only home of causes and next steps: guest
// attributes, serial lines, status, metrics and documents all print what it returns. It asks nobody
// anything and keeps no state; package agent gathers the Facts (observe) and turns the Findings
// into a Status. The numbers of the rows are those of the symptom table in docs/symptoms.md.
package symptom

import (
	"encoding/json"
	"net/netip"
	"sort"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// Severity says what a finding does to the VM's state: an error makes `status` unhealthy and is
// told in agent-last-failure, as is a warning while there is no error; advice is told in status
// alone.
type Severity int

const (
	Advice Severity = iota
	Warning
	Error
)

func (s Severity) String() string { return [...]string{"advice", "warning", "error"}[s] }

// MarshalText makes severities readable in JSON.
func (s Severity) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText is the other way, for `status`.
func (s *Severity) UnmarshalText(b []byte) error {
	for c := Advice; c <= Error; c++ {
		if c.String() == string(b) {
			*s = c
		}
	}
	return nil
}

// DocsURL is where the pages of docs/ are read: what is told on a VM names them by it, since a VM
// has none of them.
const DocsURL = "https://github.com/service-proxy-agent/service-proxy-agent/blob/main/docs/"

// ID names a symptom for machines: the label of the findings metric. The set is fixed; it does
// not grow with services.
type ID string

const (
	EnvoyDown           ID = "envoy-down"                // row 1
	EnvoyNotConfigured  ID = "envoy-not-configured"      // row 2
	ControlPlaneLookUp  ID = "control-plane-look-up"     // row 3
	ControlPlaneConnect ID = "control-plane-unreachable" // row 4
	APINotEnabled       ID = "api-not-enabled"           // row 5
	PermissionDenied    ID = "permission-denied"         // row 6
	ScopeMissing        ID = "scope-missing"             // row 7
	ConfigNotFound      ID = "configuration-not-found"   // rows 8 and 9
	ControlPlaneRefused ID = "control-plane-refused"     // any other status code of the xDS stream
	ListenerRejected    ID = "listener-rejected"         // row 10
	AccessLogUnwritable ID = "access-log-unwritable"     // row 11
	DriftRepaired       ID = "drift"                     // row 13
	ProxyUser           ID = "proxy-user"                // row 15
	FamilyUnusable      ID = "family-unusable"           // row 16
	RuleRefused         ID = "rules-not-applied"         // row 17
	Shadowed            ID = "jump-shadowed"             // row 18
	Fight               ID = "rules-undone"              // row 18: somebody keeps undoing our rules
	ServingPortNoChain  ID = "serving-port-not-inbound"  // row 19
	ServerFirst         ID = "server-first-protocol"     // row 22
	EnvoyTooOld         ID = "envoy-too-old"             // row 25
	Bootstrap           ID = "bootstrap-failed"          // row 26
	AttributeBad        ID = "attribute-malformed"       // row 26: the attribute, read by the daemon
	MetadataServer      ID = "metadata-server"           // the metadata server gives no usable answer
	GuestAttributesOff  ID = "guest-attributes-off"      // row 27
	// an answer of the admin interface that cannot be used
	AdminUnreadable ID = "envoy-admin-unreadable"
	ForeignOwner    ID = "port-foreign-owner"     // row 32
	OtherChain      ID = "other-nat-chain"        // row 34
	ResolverLoop    ID = "resolver-loop"          // row 42
	EntryRefused    ID = "listener-entry-refused" // a guardrail of agent.Desired
	// a listener of a shape that is not intercepted
	ListenerSkipped ID = "listener-not-intercepted"
	LogUnreadable   ID = "envoy-log-unreadable" // the agent cannot read Envoy's log
	// the attribute asks for something that is advised against
	AttributeAdvice      ID = "attribute-advice"
	CouldNotLook         ID = "kernel-not-read"          // a listing of the kernel ran out of time
	InterceptionNotReady ID = "interception-port-closed" // Hold: Envoy does not accept yet
	Starting             ID = "starting"                 // status asked before the first pass
	ListenAddress        ID = "listen-address"           // /healthz or /metrics cannot be served

	EnvoyOtherUser     ID = "envoy-other-user"        // row 15: not the user that is let out
	RulesDiffer        ID = "rules-differ"            // row 13: and nobody repairs them
	InputDropped       ID = "serving-port-dropped"    // row 20
	ApplicationSilent  ID = "application-silent"      // row 21
	EndpointsPanic     ID = "endpoints-panic"         // row 24
	EndpointsUnhealthy ID = "endpoints-unhealthy"     // row 31
	AgentStuck         ID = "agent-stuck"             // row 28
	EnvoyIdentity      ID = "envoy-identity"          // row 29
	ClockWrong         ID = "clock-wrong"             // row 30
	OldConnections     ID = "old-connections"         // row 33
	ConntrackFull      ID = "conntrack-full"          // row 35
	NoRoute            ID = "no-route"                // row 36
	EnvoyNotOurs       ID = "envoy-not-as-configured" // row 37
	ToolsMissing       ID = "iptables-missing"        // row 38
	ClosedAgentHere    ID = "closed-agent"            // row 39
	OtherVMsState      ID = "state-of-another-vm"     // row 40
	InterceptionOff    ID = "interception-off"        // row 41
	// row 41: the metadata key of the brake has a value that nobody knows
	InterceptionKey ID = "interception-key"
)

// Finding is one symptom that is there now.
type Finding struct {
	ID       ID       `json:"id"`
	Row      int      `json:"row,omitempty"` // of docs/symptoms.md; 0: none
	Severity Severity `json:"severity"`
	Cause    string   `json:"cause"`
	Next     string   `json:"next"`
	// ExplainedBy is the finding that is the reason for this one, which is then listed
	// under it and not counted.
	ExplainedBy ID `json:"explained_by,omitempty"`
	// Key tells two findings of one ID apart (a listener's name, a port); together they say
	// when it is the same one.
	Key string `json:"key,omitempty"`
	// Since is when it was first seen, UTC; zero: not known.
	Since time.Time `json:"since,omitzero"`
	// Evidence is what it was found by, as it was seen.
	Evidence []Evidence `json:"evidence"`
	// Commands are the next step to paste, with this VM's own project, zone and names.
	Commands []string `json:"commands"`
}

// MarshalJSON has every list there, empty or not: no reader need ask for null.
func (f Finding) MarshalJSON() ([]byte, error) {
	type plain Finding // without this method
	f.Evidence, f.Commands = append([]Evidence{}, f.Evidence...), append([]string{}, f.Commands...)
	return json.Marshal(plain(f))
}

// Evidence is what a source told: the text as it was seen, which may hold what others have written.
type Evidence struct {
	Source Source    `json:"source"`
	Time   time.Time `json:"time,omitzero"` // UTC; zero: not known
	Text   string    `json:"text"`
}

// Text is the line for people: cause first, then the next step.
func (f Finding) Text() string {
	if f.Next == "" {
		return f.Cause
	}
	return f.Cause + "; " + f.Next
}

// Port is an interception port of Envoy's and who listens there.
type Port struct {
	Family  iptables.Family
	Purpose string // "outbound interception", "inbound interception", "DNS", "admin"
	Addr    netip.AddrPort
	// Owner is the uid of the listening socket; meaningless unless Listening.
	Owner     uint32
	OwnerName string // its user's name, "" when not known
	Listening bool
	Err       error // could not look
}

// Family is how one address family's rules are.
type Family struct {
	Family   iptables.Family
	Unusable error // ip6tables or its modules missing: nothing is tried
	Err      error // the last read or apply; nil: equal to want
	Left     []iptables.RefusedError
	Drift    []iptables.Drift // found since the last pass, and repaired unless Err
	By       string           // program and pid that the kernel named for the drift
	Fighting bool             // repairs are held back: somebody keeps undoing them
	Undone   int              // repairs since they began to undo them
	Shadow   []iptables.Drift // jumps that a terminal rule precedes and that cannot be put right
}

// Stream is how Envoy's xDS stream last ended.
type Stream struct {
	Target  string
	Code    int
	Message string
	When    time.Time
}

// NoUnit is an Envoy.Unit: systemd has none, so that somebody runs Envoy another way.
const NoUnit = "not installed"

// Envoy is what is known of the proxy.
type Envoy struct {
	Admin string    // address of the admin interface
	Err   error     // why the admin interface told nothing; nil: it answered
	Since time.Time // since when Err
	// systemd's word on the unit, "" when unknown: "activating, auto-restart,
	// exit code 1, 12 restarts"; or NoUnit
	Unit      string
	LastError string // last error line of its log
	State     string // LIVE, PRE_INITIALIZING, INITIALIZING, DRAINING; "" unknown
	Version   envoyadmin.Version
	// Configured: a first listener update was completed since Envoy started (or listeners are there).
	Configured bool
	Rejected   []envoyadmin.Rejected
	Skipped    []envoyadmin.Skipped
	Stream     *Stream // nil: not known to be closed
	Apart      bool    // it has no stream, whether its log says why or not
	LogErr     string  // why its log cannot be read; "": it can, or Envoy may not have run
	// Handover: the next Envoy starts beside the one that serves (hot restart), and takes the admin
	// address over: what is not told there is no failure.
	Handover bool
	// our own look-up, connect and TLS handshake to the control plane; nil: fine or not tried
	Probe  error
	Probed bool // it was tried
	// Trying: the stream has just ended, and why is about to be known better: by our own way within
	// seconds, or, where that works, by Envoy's log within a minute.
	Trying bool
	Node   string // node id as Envoy presents it
}

// Facts is what one pass of the agent found. The zero value of a field means
// "nothing known against it".
type Facts struct {
	Envoy Envoy
	// EnvoyLog is where its log is looked for, as set by --envoy-log; "": the default.
	EnvoyLog  string
	ProxyUser string // as set by --proxy-user
	ProxyUID  uint32
	UserErr   error // the proxy's user does not exist

	Attribute error    // the gce-service-proxy attribute could not be used
	Advice    []string // what the attribute asks for and is advised against
	Metadata  error    // the metadata server gave no usable answer
	Account   string   // email of the VM's service account, "" when not known
	Scopes    []string // of it, as URLs; nil when not known
	GuestOff  bool     // guest attributes are disabled on this VM
	ListenErr error    // of --listen
	// MetricsErr is of --metrics-listen: its address cannot be had, or its web config file be used.
	MetricsErr   error
	MetricsApart bool   // there is a --metrics-listen
	Bootstrap    string // its last failure, "" when none
	// NoAttribute: none is in force, so no earlier one stands in for what cannot be read.
	NoAttribute bool
	// Bootstrapping: bootstrap is under way or has yet to begin. Envoy, its user and iptables
	// are then still to come.
	Bootstrapping bool
	Ports         []Port
	// Resolvers are the sockets that take DNS questions on this VM, while intercept-dns is in force,
	// and ResolverUIDs the users whose own questions it lets out.
	Resolvers    []Port
	ResolverUIDs []uint32
	Families     []Family
	Refused      []Refusal
	Uncovered    []uint16 // serving ports without a chain in Envoy's inbound listener
	ServerFirst  []uint16 // ports of server-first protocols behind an HTTP or TLS inspecting chain
	Others       []iptables.OtherChain
	Brake        Brake
	// Discarded is what this start found in the state folder of another VM's; nil: nothing, or the
	// start is long ago.
	Discarded *Discarded

	VM VM
	// Unseen are the sources that could not be observed, and why. Of a source that is not in it the
	// fields are what it told, also when that is nothing.
	Unseen map[Source]string
	// Undecided are kinds of findings that these facts cannot decide, and why: the look was too short
	// for them, or its agent did not know them.
	Undecided map[ID]string
	Surroundings
}

// Refusal is an entry of a listener that agent.Desired would not turn into a rule.
type Refusal struct {
	Listener string `json:"listener"`
	Entry    string `json:"entry"`
	Reason   string `json:"reason"`
}

// Check says what is wrong, worst first; the same facts always give the same
// findings in the same order.
func Check(f Facts) []Finding {
	var all []Finding
	for _, check := range checks {
		for _, found := range check(f) {
			if !f.Bootstrapping || !awaited[found.ID] {
				tidy(&found)
				all = append(all, found)
			}
		}
	}
	all = once(all, f.Agent.Findings)
	explain(f, all)
	sort.SliceStable(all, func(i, j int) bool { return rank(all[i]) > rank(all[j]) })
	return all
}

// Hidden are the findings that Check leaves out because bootstrap is under way: what they tell of
// stands all the same.
func Hidden(f Facts) (out []Finding) {
	if !f.Bootstrapping {
		return nil
	}
	for _, check := range checks {
		for _, found := range check(f) {
			if awaited[found.ID] {
				tidy(&found)
				out = append(out, found)
			}
		}
	}
	return out
}

// awaited are the findings that only say that bootstrap has not come that far.
var awaited = map[ID]bool{EnvoyDown: true, ProxyUser: true, FamilyUnusable: true,
	EnvoyNotConfigured: true, EnvoyIdentity: true, EnvoyNotOurs: true, ToolsMissing: true}

func rank(f Finding) int {
	r := int(f.Severity) * 2
	if f.ExplainedBy == "" {
		r++
	}
	return r
}

var checks = []func(Facts) []Finding{
	foreignOwner, otherUser, resolverLoop, proxyUser, toolsMissing, envoyDown, adminUnreadable,
	notOurs, identity, clock, controlPlane,
	notConfigured, tooOld,
	families, rulesDiffer, conntrack, rejected, attributeBad, bootstrapFailed, metadataServer,
	agentStuck, agentSilent, closedAgent, otherVMsState, brake, told, portClosed,
	servingPorts, dropped, silent, clusters, noRoute, entries, skipped, serverFirst, others,
	oldConnections, guestOff, listenAddress, logUnreadable, attributeAdvice,
}
