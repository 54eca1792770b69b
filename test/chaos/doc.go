// Package chaos plays random sequences of faults on a lab with a real Envoy, a real kernel and the
// built agent, and looks all the time whether what the agent promises still holds.
//
//	seed ─> Generate ─> []Event ─> Play ─> spans and observations ─> Judge ─> []Violation
//	                       ^                                                     │
//	                       └────────────── Shrink (fewer events) <───────────────┘
//
// Three things are kept apart. A Fault is something that happens, and what the design says it may
// cost: its Excuses, each with a bound. A watcher makes connections, or looks at a process, and
// notes an Observation whenever something is not as it is on a calm day; it knows nothing of
// faults. Judge, which is pure, holds the one against the other: what no fault excuses is a
// violation.
//
// A game has calms: all faults are taken back, and within seconds everything has to be as wanted.
// A game that fails is played again with fewer and fewer events, until none can be left out. Its
// events in text are what a named test then plays:
//
//	go test -tags lab ./test/chaos -run TestSequence -chaos.sequence FILE
package chaos
