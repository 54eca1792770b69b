// Package reconcile keeps one family's nat table as it is wanted: a machine of values that is
// told the time and what is wanted, and says what came of it.
//
//	Order ─> gates (Hold, bypass) ─> goal (a ruleset) ─┐
//	                                                   ├─> Diff ─> Plan ─> Kernel.Apply ─> Outcome
//	iptables.Event ─> sight (what the kernel has) ─────┘
//
// The policies are in policy.go and pure. What is asked of the kernel stands in Kernel and Flows.
// Which ports are looked at, and what is to be intercepted, is package agent's; it calls Pass
// from its loop, for one family after the other, and puts the Outcomes together.
package reconcile
