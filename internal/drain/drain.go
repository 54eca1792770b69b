// Package drain is a planned stop or restart of Envoy: what ExecStop= of Envoy's unit runs before
// systemd sends TERM.
//
// It takes no rule out of the kernel: the agent does, by the state that Envoy has then.
package drain

import (
	"context"
	"fmt"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// DefaultLimit is how long Run waits for connections to end: Envoy's unit gives --drain-time-s the
// same.
const DefaultLimit = 10 * time.Second

// connectLimit leaves an Envoy whose queue of connections is full one more try of the kernel's,
// which comes after 1 s (tcp(7), RFC 6298).
const connectLimit = 2 * time.Second

// handover is how long a stop takes at least: the agent asks for Envoy's state each second, and the
// jumps must be out before nobody accepts any more.
const handover = 2500 * time.Millisecond

// Run asks Envoy to send its clients away and waits until they have gone, at most limit. New
// connections are still accepted meanwhile. With a limit of 0 it only asks.
//
// When Envoy is to be stopped, its state becomes DRAINING, by which the agent takes the jumps out:
// without Envoy the VM reaches its services directly. When it is only restarted the state stays
// LIVE and the jumps stay in, so that the gap for new connections is Envoy's own start, however
// long an old connection is waited for. See docs/design/facts.md#envoy-drains-listener.
//
// mainPID is systemd's $MAINPID; empty says that Envoy has ended by itself, and there is nothing to
// do. admin is the address of the admin interface, HOST:PORT or unix://PATH.
// See docs/design/facts.md#systemd-runs-execstop-late.
func Run(ctx context.Context, admin, mainPID string, limit time.Duration) error {
	if mainPID == "" {
		return nil
	}
	asking := limit
	if limit == 0 {
		asking = connectLimit
	}
	ctx, cancel := context.WithTimeout(ctx, asking)
	defer cancel()
	client, err := envoyadmin.New(admin)
	if err != nil {
		return fmt.Errorf("drain Envoy: %w", err)
	}
	defer client.Close()
	// Only limit ends a question: an Envoy that is slow to answer is still to be drained.
	client.ConnectLimit, client.ShortLimit, client.LongLimit = connectLimit, asking, asking

	var jumpsOut time.Time
	ask := func() error {
		if !restarts(ctx, asking/4) {
			agent, err := systemd.UnitState(ctx, systemd.AgentUnit)
			if err != nil || agent.Active == "active" { // at shutdown it has stopped before
				jumpsOut = time.Now().Add(handover)
			}
			if err := client.FailHealthCheck(ctx); err != nil {
				return fmt.Errorf("drain Envoy: %w", err)
			}
		}
		if err := client.DrainListeners(ctx); err != nil {
			return fmt.Errorf("drain Envoy: %w", err)
		}
		return nil
	}
	if err := ask(); err != nil || limit == 0 {
		return err
	}
	asked, _ := client.ServerInfo(ctx) // one that does not tell counts as epoch 0
	for wait := 100 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		// A reload may be under way: the next epoch knows nothing of what was asked of this one, which
		// goes on answering on the connection that we have.
		client.Redial()
		if now, err := client.ServerInfo(ctx); err == nil && now.Epoch != asked.Epoch {
			if err := ask(); err != nil {
				return err
			}
			asked = now
		}
		n, err := client.Connections(ctx)
		if err != nil && ctx.Err() == nil {
			return fmt.Errorf("drain Envoy: %w", err)
		}
		if err == nil && n == 0 && time.Now().After(jumpsOut) || !sleep(ctx, wait) {
			return nil
		}
	}
}

// restarts says whether Envoy is stopped to be started again. A systemd that does not answer, on a
// busy machine, say, is asked up to three times, the last one begun within limit. One that never
// does (there is none, it may be) stands for a stop: connections past Envoy do less harm than to an
// Envoy that has gone.
func restarts(ctx context.Context, limit time.Duration) bool {
	const pause = 200 * time.Millisecond
	began := time.Now()
	for n := 1; ; n++ {
		job, err := systemd.Job(ctx, systemd.EnvoyUnit)
		if err == nil {
			return job == "restart"
		}
		if n == 3 || time.Since(began)+pause > limit || !sleep(ctx, pause) {
			return false
		}
	}
}

// sleep waits for d and says whether ctx is still alive.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
