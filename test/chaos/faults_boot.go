package chaos

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"time"
)

// bootFaults are starts of a VM.
func bootFaults() []Fault {
	return []Fault{{
		// Rules, runtime folder and processes are gone, and the agent is there long before Envoy is.
		// Hold: until Envoy accepts, connections go the way that they would go without us. So none is
		// refused.
		Name: "boot", Weight: 2, Group: "envoy", Also: "agent", Shortest: 2 * time.Second,
		Longest: 7 * time.Second, Begin: boot,
		Excuses: []Excuse{{Kind: Escaped, After: 5 * time.Second, Envoy: true}, {Kind: Cut},
			{Kind: Severed}, {Kind: Foreign}},
		EnvoyAway: true,
		Heals:     3 * time.Second,
	}}
}

// leftWithin is within what an agent that has just started has taken out jumps that something
// restored at the boot and that lead to a closed port.
const leftWithin = agentStarts + time.Second

// boot has the VM start, but for what the lab's other programs keep: their rules are put back by
// them, ours are gone, or something has restored them, too.
func boot(w *World, random *rand.Rand) (func() error, error) {
	// Somebody may hold the lock of iptables-legacy for eight seconds.
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	began := time.Now()
	w.EndAgent()
	w.Agent.Kill()
	var within time.Duration
	if random.IntN(2) == 0 {
		within = leftWithin
		w.Log("    our rules are restored")
	} else {
		out, stderr, code, err := w.Agent.Run(ctx, "cleanup") // of a kernel that starts there is none
		if err != nil || code != 0 {
			return nil, errors.Join(err, errors.New(out+stderr))
		}
	}
	w.endEnvoy(true)
	if err := w.Agent.Reboot(); err != nil {
		return nil, err
	}
	// A VM that starts has no connections. These lose NAT with the last rule, or their Envoy.
	w.Excuse(Span{Event: Event{Name: "boot-ends-all"}, Begin: began, End: time.Now(),
		Excuses: []Excuse{{Kind: Refused, After: within}, {Kind: Blocked}}})
	if err := w.StartAgent(); err != nil {
		return nil, err
	}
	stop := background(func(ctx context.Context) { w.watchHold(ctx, within) })
	return func() error { return errors.Join(stop(), w.runEnvoy()) }, nil
}

// watchHold notes each jump that is in for longer than it may be.
func (w *World) watchHold(ctx context.Context, within time.Duration) {
	since := spells{}
	for ctx.Err() == nil {
		for family, name := range map[Family]string{IPv4: "IPv4", IPv6: "IPv6"} {
			now := time.Now()
			chains, err := w.Chains(ctx, name)
			if err != nil {
				continue
			}
			from, in := since.note(name, strings.Contains(chains, "-A OUTPUT") ||
				strings.Contains(chains, "-A PREROUTING"), now)
			if in {
				w.Observe(Observation{Kind: Early, Family: family, From: from, To: now, Grace: within,
					What: "jump", Text: "a jump is in, and Envoy does not run yet:\n" + chains})
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(200 * time.Millisecond):
		}
	}
}
