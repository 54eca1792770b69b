package agent

import (
	"context"
	"flag"
	"fmt"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/iptables"
	"github.com/service-proxy-agent/service-proxy-agent/iptables/iptablestest"
)

var (
	shuffledSeed = flag.Int64("shuffled.seed", -1,
		"play this one sequence of TestShuffled, and tell each look and pass")
	shuffledCount = flag.Int("shuffled.count", 0,
		"how many sequences TestShuffled plays; 0: the usual number")
)

// TestShuffled plays the loop on a nat table in memory: sequences of what can happen to an agent
// (shuffle_events_test.go), in random order, with the whole table checked after every pass
// (shuffle_oracle_test.go). TestShuffledOnTheKernel plays the first of them on the kernel's tables.
func TestShuffled(t *testing.T) {
	first, count := 0, shuffledSequences
	switch {
	case *shuffledCount > 0:
		count = *shuffledCount
	case testing.Short():
		count /= 10
	}
	workers := runtime.GOMAXPROCS(0)
	if *shuffledSeed >= 0 {
		first, count, workers = int(*shuffledSeed), 1, 1
	}
	defer debug.SetGCPercent(debug.SetGCPercent(400)) // nearly all of it is garbage soon
	var mu sync.Mutex
	played := map[string]int{}
	t.Run("sequences", func(t *testing.T) {
		for worker := range workers {
			t.Run(strconv.Itoa(worker), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					for seed := first + worker; seed < first+count; seed += workers {
						backend := []string{iptables.NFT, iptables.Legacy}[seed%2]
						w := play(t, uint64(seed), newMemory(backend), false)
						if w == nil {
							return // one is enough to look at
						}
						mu.Lock()
						for name, n := range w.played {
							played[name] += n
						}
						mu.Unlock()
					}
				})
			})
		}
	})
	for _, e := range events {
		if count >= 1000 && played[e.name] < count/500 && !t.Failed() {
			t.Errorf("%q was played %d times in %d sequences", e.name, played[e.name], count)
		}
	}
}

// play plays one sequence. It returns nil if not all was as it should be.
func play(t *testing.T, seed uint64, n nat, real bool) (w *world) {
	t.Helper()
	w = newWorld(seed, n, real)
	defer func() {
		problem := recover()
		said, failed := problem.(failure)
		if !failed && problem != nil {
			panic(problem)
		}
		if failed {
			test, _, _ := strings.Cut(t.Name(), "/")
			t.Errorf("seed %d, %s: %s\nsteps:\n  %s\nagain: go test ./agent -run '%s$' -shuffled.seed=%d",
				seed, n.backend(), said, strings.Join(w.log, "\n  "), test, seed)
			w = nil
		}
	}()
	w.play()
	return w
}

// memory is a nat table in memory.
type memory struct {
	machine iptablestest.Machine
	faults  [2]fault
	counts  [2]struct{ changes, writes, reads, looks, failed int }
	seen    [2]struct { // what chains said last
		at     int
		chains tables
	}
}

func newMemory(backend string) *memory {
	m := &memory{machine: iptablestest.Machine{Backend: backend}}
	m.machine.Before = func(program string, args []string, _ string) (stderr string, exit int) {
		f := &m.faults[0]
		count := &m.counts[0]
		if strings.Contains(program, "ip6tables") {
			f, count = &m.faults[1], &m.counts[1]
		}
		restore := strings.HasSuffix(program, "-restore")
		switch {
		case restore:
			count.writes++
			count.changes++
		case strings.HasSuffix(program, "-save"):
			count.reads++
			count.looks++
		case slices.Contains(args, "-S"):
			count.looks++
		}
		switch {
		case slices.Contains(args, "--version"):
		case *f == locked && restore:
			stderr, exit = saysLocked, 4
		case *f == absent:
			stderr, exit = saysAbsent, 3
		case *f == hangs && !restore:
			exit = -1
		}
		if exit != 0 {
			count.failed++
		}
		return stderr, exit
	}
	m.machine.Refuse = func(rule string) bool {
		// Rules of one family can be told by nothing, so both are refused together.
		refused := m.faults[0] == refuses && strings.Contains(rule, "-m comment")
		if refused {
			m.counts[0].failed++
			m.counts[1].failed++
		}
		return refused
	}
	return m
}

func (m *memory) backend() string { return m.machine.Backend }

func (m *memory) open() (*iptables.Kernel, error) {
	return iptables.Open(context.Background(), iptables.Options{Machine: counted{&m.machine, m}})
}

// counted is the machine, whose chains are counted as looks when they are asked for by netlink.
type counted struct {
	*iptablestest.Machine
	in *memory
}

func (c counted) Chains(program string) (names []string, exists bool) {
	f := iptables.IPv4
	if strings.HasPrefix(program, "ip6tables") {
		f = iptables.IPv6
	}
	c.in.counts[index(f)].looks++
	return c.Machine.Chains(program)
}

func (m *memory) of(f iptables.Family) *iptablestest.NAT {
	return m.machine.NAT([]string{"iptables", "ip6tables"}[index(f)])
}

func (m *memory) chains(f iptables.Family) tables {
	last := &m.seen[index(f)]
	if now := m.changes(f); last.chains == nil || last.at != now {
		last.at, last.chains = now, m.of(f).Chains()
	}
	return last.chains
}

func (m *memory) restore(f iptables.Family, payload string) {
	m.counts[index(f)].changes++
	if err := m.of(f).Restore(payload, nil); err != nil {
		panic(fmt.Sprintf("%v\n%s", err, payload))
	}
}

func (m *memory) flush(f iptables.Family) {
	payload := "*nat\n"
	for name, rules := range m.chains(f) {
		if !builtin(name) {
			payload += ":" + name + " - [0:0]\n"
			continue
		}
		for _, rule := range rules {
			payload += "-D " + name + " " + rule + "\n"
		}
	}
	m.restore(f, payload+"COMMIT\n")
}

func (m *memory) changes(f iptables.Family) int      { return m.counts[index(f)].changes }
func (m *memory) writes(f iptables.Family) int       { return m.counts[index(f)].writes }
func (m *memory) reads(f iptables.Family) int        { return m.counts[index(f)].reads }
func (m *memory) looks(f iptables.Family) int        { return m.counts[index(f)].looks }
func (m *memory) failed(f iptables.Family) int       { return m.counts[index(f)].failed }
func (m *memory) fault(f iptables.Family, how fault) { m.faults[index(f)] = how }
func (m *memory) now() time.Time                     { return time.Now() }
func (m *memory) sleep(d time.Duration)              { time.Sleep(d) }
