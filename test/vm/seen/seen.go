// Package seen is the form in which test/vm keeps what it saw of a kernel, and docs/kernels.md
// shows it.
package seen

// Kernel is one release on one architecture with one backend.
type Kernel struct {
	Release  string   `json:"release"` // Debian's
	Arch     string   `json:"arch"`
	Kernel   string   `json:"kernel"` // 6.1
	IPTables string   `json:"iptables"`
	Systemd  string   `json:"systemd"`
	Backend  string   `json:"backend"`
	Absent   []Absent `json:"absent"`
	// What was said while the clock was hours ahead, and behind, and while the table of connections
	// was full.
	Ahead     []Finding `json:"ahead"`
	Behind    []Finding `json:"behind"`
	Conntrack []Finding `json:"conntrack"`
}

// Absent is what was said while a module could not be loaded.
type Absent struct {
	Module      string    `json:"module"` // or what else was taken away
	Findings    []Finding `json:"findings"`
	LastFailure string    `json:"last_failure"` // the guest attribute agent-last-failure
	Doctor      int       `json:"doctor"`       // its exit code
	IPv4        bool      `json:"ipv4"`         // both ways go through Envoy
	IPv6        bool      `json:"ipv6"`
	// Mended is what brought everything back: the command that was advised, or a reboot.
	Mended string `json:"mended"`
}

// Finding is one of symptom's, but for its times.
type Finding struct {
	ID       string   `json:"id"`
	Severity string   `json:"severity"`
	Under    string   `json:"under,omitempty"` // the finding that explains it
	Cause    string   `json:"cause"`
	Next     string   `json:"next"`
	Commands []string `json:"commands,omitempty"`
}
