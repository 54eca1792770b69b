package chaos

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
)

// Counts of what the watchers did.
type Counts struct {
	Connections int // new ones
	Escaped     int // excused or not
	Failed      int
	Streams     int // that were opened; each speaks some times a second
	Words       int // that streams said and were answered
	Looks       int // at the agent, its status, rules
}

// Add sums up.
func (c *Counts) Add(d Counts) {
	c.Connections += d.Connections
	c.Escaped += d.Escaped
	c.Failed += d.Failed
	c.Streams += d.Streams
	c.Words += d.Words
	c.Looks += d.Looks
}

type counter struct {
	mu     sync.Mutex
	counts Counts
}

func (c *counter) add(d Counts) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.counts.Add(d)
}

func (c *counter) get() Counts {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.counts
}

// watchers look all the time, each until its context ends.
func (w *World) watchers(counts *counter) []func(context.Context) {
	all := []func(context.Context){
		func(ctx context.Context) { w.watchConnections(ctx, counts) },
		w.watch.streams.run,
		w.watch.canaries.run,
		w.watch.process.run,
	}
	if w.Setting.DNS {
		all = append(all, func(ctx context.Context) { w.watchDNS(ctx, counts) })
	}
	return all
}

// watch is what watchers keep in a game.
type watch struct {
	streams  streams
	canaries canaries
	process  *process
	truth    *truth
}

// prepare sets up what watchers need, before the agent was ever there.
func (w *World) prepare(ctx context.Context, counts *counter) error {
	for port, in := range map[uint16][]*lab.Namespace{sshPort: {w.VM, w.Service}, rawPort: {w.VM}} {
		for _, n := range in {
			if _, err := w.Echo(n, port, lab.EchoOptions{Name: "raw"}); err != nil {
				return err
			}
		}
	}
	if w.Setting.DNS {
		if err := w.serveDNS(ctx); err != nil {
			return err
		}
	}
	w.watch.process = newProcess(w, counts)
	w.watch.truth = &truth{w: w, jumps: map[Family]jumps{}, since: spells{}}
	// Before the rules: the first with a NAT target starts conntrack.
	w.watch.streams = streams{w: w, counts: counts}
	if err := w.watch.streams.old(ctx); err != nil {
		return err
	}
	w.watch.canaries = canaries{w: w, counts: counts, nat: w.Setting.Seed/2%2 == 1}
	return w.watch.canaries.add(ctx)
}

// checkRules says what is not as wanted in the kernel or for connections, or nil. It is for calms:
// no fault is on.
func (w *World) checkRules(ctx context.Context) error {
	if err := w.checkKernel(ctx); err != nil {
		return err
	}
	return w.checkConnections(ctx)
}

// checkWords is the same for what the agent says.
func (w *World) checkWords(ctx context.Context) error {
	if err := w.watch.canaries.again(ctx); err != nil {
		return err
	}
	s, err := w.watch.process.status(ctx)
	if err != nil {
		return fmt.Errorf("status: %w", err)
	}
	return checkStatus(s, w.Config(), w.notYetOver(s, time.Now()))
}
