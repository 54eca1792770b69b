package chaos

import (
	"context"
	"math/rand/v2"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/test/hostile"
)

// strangerFaults are those of a local user without rights.
func strangerFaults() []Fault {
	return []Fault{{
		// It writes guest attributes, as every process can: they are set right with the next heartbeat.
		Name: "stranger-harass", Weight: 1, Group: "stranger", Shortest: 2 * time.Second,
		Longest: 8 * time.Second, Begin: harass, Excuses: silent(guestLate),
	}}
}

// harass has somebody try all that such a user can, but for Envoy's ports: port-stranger is that.
func harass(w *World, random *rand.Rand) (func() error, error) {
	user := hostile.User{Mesh: w.Mesh, Agent: w.Agent, Ports: []uint16{15099}}
	seed := random.Uint64()
	return background(func(ctx context.Context) {
		began := time.Now()
		events, err := user.Harass(ctx, rand.New(rand.NewPCG(seed, 0)))
		if err != nil && ctx.Err() == nil {
			w.broken(err)
		}
		for _, e := range events {
			if !e.Allowed() {
				w.Observe(Observation{Kind: Breached, From: began, To: e.At, What: e.What,
					Text: "a local user " + string(e.Kind)})
			}
		}
	}), nil
}
