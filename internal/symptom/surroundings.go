package symptom

import (
	"net/netip"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// Source is where facts come from.
type Source string

const (
	FromKernel    Source = "iptables"        // table nat of both families
	FromFilter    Source = "iptables-filter" // table filter
	FromOthers    Source = "other-chains"    // other nat chains, and the other backend's
	FromSockets   Source = "sockets"         // who listens, by sock_diag
	FromConntrack Source = "conntrack"       // the connection tracking table
	FromRoutes    Source = "routes"          // the routing table
	FromUsers     Source = "users"           // who the proxy's user is
	FromEnvoy     Source = "envoy"           // its admin interface
	FromEnvoyLog  Source = "envoy-log"       // its log
	FromClusters  Source = "envoy-clusters"  // the health of its endpoints
	FromMetadata  Source = "metadata-server" // the attribute, and what else it says of the VM
	FromState     Source = "state-folder"    // what bootstrap reached and configured
	FromUnit      Source = "systemd"         // the state of units
	FromProcesses Source = "processes"       // the programs that run
	// FromControlPlane is our own look-up of and connection to the control plane.
	FromControlPlane Source = "control-plane"
	// FromAgent is the daemon: only it knows what happened over time. Where none runs nothing has
	// happened that it would know, so that is no reason to call it unseen; a socket that one may not
	// read is.
	FromAgent Source = "agent"
)

// VM is what the metadata server says this machine is; "" where it is not known.
type VM struct {
	Name, Zone    string // "web-1", "europe-west1-b"
	Project       string // its ID
	ProjectNumber string
	Network       string // of its first interface: "default"
	// NetworkProject is the number of the project that the network belongs to: the host project's, of
	// a shared VPC.
	NetworkProject string
}

// Surroundings are facts on what Envoy and the rules stand in.
type Surroundings struct {
	Dropped []Dropped
	Silent  []uint16 // serving ports on which nothing listens
	// Clusters are those of Envoy's that have endpoints which are not healthy.
	Clusters []Cluster
	// Clock is how far this VM's clock is ahead of the metadata server's; behind is negative. What is
	// below a second, or not known, is zero.
	Clock time.Duration
	// Node is what Envoy should present itself with, and Presented what it does. Configured and
	// Running are the same of what bootstrap wrote and what the Envoy that runs was started with. Each
	// is nil where it is not known.
	Node, Presented     *Node
	Configured, Running *EnvoyConfig
	Conntrack           Conntrack
	NoRoute             []Unrouted
	Old                 []OldConnection // the first of them
	OldCount            int             // all of them
	Agent               Agent
	// Processes are users other than the proxy's that hold a port of Envoy's, and as whom a program
	// named envoy runs, or that answers on the admin port.
	Processes []uint32
	// Differ is how the kernel's rules differ from what Envoy needs, where nobody repairs them.
	Differ []iptables.Drift
	// NoTools is why there is no iptables to be had; nil: there is.
	NoTools error
	// ClosedAgent is Google's own agent on this VM; nil: nothing of it was seen.
	ClosedAgent *ClosedAgent
}

// ClosedAgent is what was seen of Google's own agent, whose unit, chains and guest attributes have
// the names of ours. Each text may hold what others have written; "" where it was not seen.
type ClosedAgent struct {
	// Unit is its unit's file and state: "/etc/systemd/system/service-proxy-agent.service, active".
	Unit string
	// Starts: the unit is active, or enabled, so that it runs now or after the next boot.
	Starts  bool
	Binary  string // its path
	Process string // pid and program, without its arguments, which may hold a secret
	Writes  string // a guest attribute of ours that has another's value
}

// runs says whether it is, or will be, more than a file.
func (c *ClosedAgent) runs() bool { return c != nil && (c.Process != "" || c.Starts) }

// Discarded is state of another VM, whose disk this one's was made from.
type Discarded struct {
	Instance, This string   // the instance ids: whose it was, and this VM's
	What           []string // "the last good attribute", "the history"
	At             time.Time
}

// Brake is what the metadata key service-proxy-agent-interception asks for.
type Brake struct {
	Off           bool      // no traffic is redirected
	Since         time.Time // when the agent first saw that, restarts aside; zero: not known
	By            string    // ByInstance or ByProject: whose metadata it is
	WhenEnvoyDown bool      // the key says bypass-when-down
	// Bad is a value that is neither, of BadBy's metadata; "": there is none.
	Bad   string
	BadBy string
}

// Whose metadata has the brake's key.
const (
	ByInstance = "instance"
	ByProject  = "project"
)

// Dropped is a serving port that table filter drops whoever asks; or with an Interface what comes
// from containers there, and is redirected to Envoy.
type Dropped struct {
	Family    iptables.Family
	Interface string
	Port      uint16 // the serving port; 0 of containers
	At        uint16 // the port that the rule sees: Envoy's, where the port is redirected
	Chain     string
	Rule      string // in iptables-save's form without "-A CHAIN"; "": the chain's policy
}

// Cluster is a cluster of Envoy's.
type Cluster struct {
	envoyadmin.ClusterHealth
	// Panic: Envoy ignores the health and sends to all (lb_healthy_panic moved).
	Panic bool
}

// Node is how an Envoy presents itself to Traffic Director; "" where it does not.
type Node struct{ ID, ProjectNumber, Network string }

// EnvoyConfig is what tells an Envoy from another: whose it is and whom it asks.
type EnvoyConfig struct {
	NodeID  string
	Targets []string // host:port of its control planes
	From    string   // the file, or the process
}

// Conntrack is the connection tracking table; the zero value where there is none.
type Conntrack struct {
	Count, Max int
	Dropped    uint64 // packets in the last minute, because it was full; 0 where one look was made
}

// Level is how bad that is: Advice where it is as it should be.
func (c Conntrack) Level() Severity {
	switch {
	case c.Max <= 0:
		return 0
	case c.Dropped > 0 || c.Count >= c.Max:
		return Error
	case 10*c.Count >= 9*c.Max:
		return Warning
	}
	return 0
}

// Unrouted is that a family's services have no route.
type Unrouted struct {
	Family iptables.Family
	Addrs  []netip.Addr // a few of them
	Count  int          // all of them
	Of     int          // of so many services' addresses
	Err    string       // the kernel's word: "network is unreachable"
}

// OldConnection is one that was there before the rules, and goes the old way.
type OldConnection struct {
	From, To netip.AddrPort
	UID      uint32
}

// Agent is the daemon, as others see it.
type Agent struct {
	Heartbeat time.Time // when its last pass ended; zero: not known
	Now       time.Time // when that was looked at
	// Silent is why its socket gives no answer though it takes connections; "": it answers, or is not
	// there.
	Silent string
	// Findings are what it tells itself, newest status; nil: it does not answer, or is stuck.
	Findings []Finding
	// Killed is when systemd's watchdog ended an earlier run, which hung; zero: it did not lately.
	Killed time.Time
}
