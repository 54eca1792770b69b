package chaos

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"time"
)

// Fault is something that can happen to a VM, and what that may cost by design.
type Fault struct {
	Name   string
	Weight int // how often it is drawn, beside others'
	// Group: of faults of one group no two are on at once, since each would undo the other's work; "":
	// it may meet everything, itself included.
	Group string
	// Also is a second group, of a fault that takes hold of two actors.
	Also string
	// Shortest and Longest are how long it lasts; both zero: it is over at once.
	Shortest, Longest time.Duration
	// Begin does it. What it returns takes it back, and may be nil. An error is a game that cannot go
	// on: a machine that lacks something, not a finding.
	Begin func(w *World, random *rand.Rand) (end func() error, err error)
	// Excuses are the promises that it suspends.
	Excuses []Excuse
	// Hinders: the agent cannot repair while it lasts, nor for Recovery after.
	Hinders  bool
	Recovery time.Duration
	// EnvoyAway: Envoy serves nothing while it lasts.
	EnvoyAway bool
	// Heals is how long after its end the agent may take until all is as wanted, where the design
	// backs off; 0: no longer than after any other.
	Heals time.Duration
	// Tells is the same for what the agent says, where that alone takes its time.
	Tells time.Duration
	// Unless says why it cannot happen in a world: it is left out there then.
	Unless func(s Setting) bool
}

// meets says whether two faults are of one group.
func (f Fault) meets(other Fault) bool {
	for _, a := range []string{f.Group, f.Also} {
		if a != "" && (a == other.Group || a == other.Also) {
			return true
		}
	}
	return false
}

// Setting is what stays the same in a game.
type Setting struct {
	Backend string `json:"backend"` // nft or legacy
	// Bypass is the policy for an Envoy that is down; false: keep.
	Bypass bool `json:"bypass"`
	// All is intercept-all-outbound.
	All bool `json:"all"`
	// DNS is intercept-dns.
	DNS bool `json:"dns"`
	// Hot has Envoy run under the supervisor of its unit, which reloads it without a gap.
	Hot bool `json:"hot"`
	// Huge lets 10,000 services come and go.
	Huge bool   `json:"huge"`
	Seed uint64 `json:"seed"`
}

// Faults are all there are, those that cannot happen in a setting left out.
func Faults(s Setting) (all []Fault) {
	for _, f := range slices.Concat(meshFaults(), envoyFaults(), agentFaults(), platformFaults(),
		kernelFaults(s), hostFaults(), bootFaults(), strangerFaults()) {
		if f.Unless == nil || !f.Unless(s) {
			all = append(all, f)
		}
	}
	return all
}

// Find is the fault of a name.
func Find(all []Fault, name string) (Fault, bool) {
	i := slices.IndexFunc(all, func(f Fault) bool { return f.Name == name })
	if i < 0 {
		return Fault{}, false
	}
	return all[i], true
}

// background runs what goes on until the fault ends. The result ends it, and waits for it; it has
// the form of a fault's end, and no error.
func background(do func(ctx context.Context)) (end func() error) {
	ctx, stop := context.WithCancel(context.Background())
	var tasks sync.WaitGroup
	tasks.Go(func() { do(ctx) })
	return func() error {
		stop()
		tasks.Wait()
		return nil
	}
}

// sleep waits, unless the context ends before; then it says false.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}
