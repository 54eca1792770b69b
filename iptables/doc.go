// Package iptables keeps one family's nat table equal to what the agent wants of it, and
// touches nothing else in it.
//
// It is a chain of values with the kernel at both ends:
//
//	Interception --Ruleset()--> Ruleset (want) ┐
//	                                           ├-- Diff --> []Drift
//	Kernel.Read --> Table (have) --------------┘-- NewPlan --> Plan --> Kernel.Apply
//
// Interception says in the domain's words what shall be intercepted, Ruleset is that in iptables'
// words, Table is what a save showed, Plan is the text of the one iptables-restore that leads from
// one to the other. All of these are pure and need neither root nor iptables. Ruleset.Walk and
// Table.Walk say where a packet would go.
//
// Kernel is the only place of the program that runs iptables. It reads by iptables-save (or, on
// nft, by listing only the chains asked for), writes by one `iptables-restore --noflush` on stdin
// for each family, and reads back what it wrote. On the nft backend it also listens to the
// kernel's own notifications.
//
// What it does not do: decide what to intercept (package agent, Desired), decide when to write or
// how often to repair (internal/reconcile), or put errors into words for people (internal/symptom).
// It never names a chain that is not ours but for the jumps in PREROUTING and OUTPUT, and it keeps
// no state that the kernel does not have.
//
// Package iptablestest is a machine's iptables in memory: the unit tests run a Kernel on it.
//
// Commands are run by this package itself and not through coreos/go-iptables: that one takes
// no context, so a start could hang for ever in an iptables that waits (istio/istio#29249),
// and it has no restore. What a person asks once goes by it: OtherBackend looks into the backend
// that is not used, independently of Kernel, beside a caller who leaves when the time is over, and
// Counters lists the chains of a packet's way.
package iptables
