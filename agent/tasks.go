package agent

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/atomicfile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// task is a goroutine of the daemon. One that returns an error ends them all.
type task struct {
	name string
	run  func(context.Context) error
}

// runTasks runs them until the first error, which names its task, or the end of ctx.
func runTasks(ctx context.Context, tasks []task) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, t := range tasks {
		g.Go(func() error {
			if err := t.run(ctx); err != nil {
				return fmt.Errorf("%s: %w", t.name, err)
			}
			return nil
		})
	}
	return g.Wait()
}

// How often other nat chains at our hooks, and a switch of iptables' backend, are looked for. The
// first time comes once the loop has installed its rules: those that an earlier run left in the
// other backend redirect until then. A look costs some milliseconds of this program's, and of
// nobody else's.
const (
	othersFirst = 20 * time.Second
	othersEvery = 45 * time.Second
)

// errSwitched ends the agent, which systemd starts again with the new backend. The rules in the old
// one stay until the new ones are in.
var errSwitched = errors.New("the iptables backend was switched")

// watchOthers looks for chains of others that may shadow ours, and removes what an earlier run left
// in the other backend.
func (a *Agent) watchOthers(ctx context.Context) error {
	for wait := othersFirst; sleep(ctx, wait); wait = othersEvery {
		// Another Kernel: this one is the loop's.
		backend := a.kernel.Backend() // "" until the programs have told their version
		now, err := iptables.Open(ctx, iptables.Options{})
		if err == nil && backend != "" && now.Backend() != "" && now.Backend() != backend {
			return fmt.Errorf("%w from %s to %s: starting anew", errSwitched, backend, now.Backend())
		}
		if s := a.status.Load(); s == nil || !s.Ready {
			continue // the rules in the other backend may be the only ones that redirect
		}
		if a.self.closed.Load() != nil {
			continue // the other backend may be the one of Google's agent, which nobody fights
		}
		removed, err := a.kernel.CleanOtherBackend(ctx)
		if len(removed) > 0 {
			a.log.Info("rules of ours removed from the other iptables backend",
				zap.Strings("removed", removed))
		}
		if err != nil {
			a.log.Debug("could not look into the other iptables backend", zap.Error(err))
		}
		others, err := a.kernel.Others(ctx) // what could be seen, in any case
		if err != nil {
			a.log.Debug("could not look for other nat chains", zap.Error(err))
		}
		a.others.Put(others)
	}
	return nil
}

// errToolsCame ends an agent that was started before iptables was installed;
// systemd starts it again.
var errToolsCame = errors.New("iptables is installed now: starting anew")

func (a *Agent) awaitTools(ctx context.Context) error {
	for sleep(ctx, time.Second) {
		for _, family := range families {
			if a.kernel.Probe(ctx, family) == nil {
				return errToolsCame
			}
		}
	}
	return nil
}

// pauseLoop makes the loop write no more until the agent is restarted (cleanup).
func (a *Agent) pauseLoop(ctx context.Context) error {
	done := make(chan struct{})
	select {
	case a.pause <- done:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case <-done:
		a.log.Warn("paused by cleanup until restarted")
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// keepHistory keeps the failures, the transitions, the attribute and the brake for the next start,
// beside the loop: a disk may hang.
func (a *Agent) keepHistory(ctx context.Context) error {
	dir := a.settings.StateDir
	if a.kept.whose.hold {
		<-ctx.Done()
		return nil
	}
	for _, name := range []string{failureFile, historyFile, keptFile, brakeFile} {
		atomicfile.Sweep(filepath.Join(dir, name))
	}
	note := func(lost string) func(error) {
		reported := false
		return func(err error) {
			if err != nil && !reported {
				a.log.Warn(lost, zap.Error(err))
			}
			reported = err != nil
		}
	}
	return runTasks(ctx, []task{
		{"failures", func(ctx context.Context) error {
			keep(ctx, a.kept.failures.Get(), 0,
				func(f Failures) error { return f.save(dir) }, note("history is not kept"))
			return nil
		}},
		{"transitions", func(ctx context.Context) error {
			keep(ctx, a.kept.transitions.Get(), keepEvery,
				func(k keptTransitions) error { return k.save(dir) }, note("transitions are not kept"))
			return nil
		}},
		{"attribute", func(ctx context.Context) error {
			keep(ctx, a.kept.attribute.Get(), 0,
				func(k *keptAttribute) error { return saveKept(dir, k) }, note("the attribute is not kept"))
			return nil
		}},
		{"brake", func(ctx context.Context) error {
			keep(ctx, a.kept.brake.Get(), 0,
				func(k keptBrake) error { return k.save(dir) }, note("the brake is not kept"))
			return nil
		}},
	})
}

const (
	// keepEvery is how long after a write of the transitions the next one waits: as many may come as
	// there are passes.
	keepEvery = time.Second
	// keepAgain is how long after a write that failed it is tried again, where nothing newer comes.
	keepAgain = 10 * time.Second
	// keepLast is how long a write may hold up the end of the agent.
	keepLast = time.Second
)

// keep saves each newest value, at most one within a time. What could not be saved is tried again,
// be it that a disk is full for a day. done gets what came of each write.
func keep[T any](ctx context.Context, values <-chan T, every time.Duration,
	save func(T) error, done func(error)) {
	var newest T
	waits := false                    // newest, to be saved
	var pause, again <-chan time.Time // nil: none
	for {
		select {
		case <-ctx.Done():
			keepAtLast(values, newest, waits || again != nil, save)
			return
		case newest = <-values:
			waits = true
		case <-again:
			waits = true
		case <-pause:
			pause = nil
		}
		if !waits || pause != nil {
			continue
		}
		err := save(newest)
		done(err)
		waits, again = false, nil
		if err != nil {
			again = time.After(keepAgain)
		}
		if every > 0 {
			pause = time.After(every)
		}
	}
}

// keepAtLast saves what is not saved when the agent ends.
func keepAtLast[T any](values <-chan T, newest T, waits bool, save func(T) error) {
	select {
	case newest = <-values:
		waits = true
	default:
	}
	if !waits {
		return
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = save(newest) // nobody is left who would try again
	}()
	select {
	case <-ended:
	case <-time.After(keepLast):
	}
}

// report passes each newest Status on to the guest attributes and systemd.
func (a *Agent) report(ctx context.Context) error {
	reported := false
	for {
		select {
		case <-ctx.Done():
			return nil
		case s := <-a.reports.Get():
			setAttributes(a.guest, s)
			if err := notify(s); err != nil && !reported {
				reported = true
				a.log.Warn("systemd is not told", zap.Error(err))
			}
		}
	}
}

// setAttributes hands the guest attributes to their writer, which writes what changed within its
// budget.
func setAttributes(w *guestattr.Writer, s status.Status) {
	w.Set(guestattr.AgentHeartbeat, s.Heartbeat.Format(time.RFC3339))
	w.Set(guestattr.AgentLastFailure, s.LastFailure)
	if s.Envoy.Version != "" {
		w.Set(guestattr.ProxyVersion, s.Envoy.Version)
	}
	if s.Bootstrap.Status != "" {
		w.Set(guestattr.BootstrapStatus, s.Bootstrap.Status)
	}
	if s.Bootstrap.Failure != "" {
		w.Set(guestattr.BootstrapLastFailure, s.Bootstrap.Failure)
	}
	head, services := s.Line()
	w.SetWithTail(guestattr.AgentStatus, head, services)
}

// notify tells systemd that the loop runs: READY at its first pass (the mesh's readiness is
// /healthz/ready), the watchdog at each one, so that a loop that hangs is ended with its
// stack in the journal.
func notify(s status.Status) error {
	text := s.Mode
	if !s.Ready {
		text += "; not ready: " + s.NotReady
	}
	// READY=1 each time, which systemd allows: the mailbox may have dropped the first pass's Status.
	return systemd.Notify("READY=1", "WATCHDOG=1", "STATUS="+text)
}
