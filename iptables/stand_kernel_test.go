//go:build kernel

package iptables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/xtables"
)

// follower is a reader that does what package reconcile does: it reads when it is told, and only
// then.
type follower struct {
	t      *testing.T
	k      *Kernel
	events <-chan Event
	have   map[Family]Table
}

func follow(t *testing.T, k *Kernel) *follower {
	t.Helper()
	events, err := k.Watch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	f := &follower{t: t, k: k, events: events, have: map[Family]Table{}}
	for _, family := range families {
		if told, why := k.Watched(family); !told {
			t.Fatalf("%s is not watched: %v", family, why)
		}
		f.have[family] = read(t, k, family)
	}
	return f
}

// until reads what events tell of until the reader knows what there is.
func (f *follower) until(family Family, limit time.Duration) {
	f.t.Helper()
	truth := savedTable(f.t, family)
	for timeout := time.After(limit); ; {
		if sameTable(truth, f.have[family]) {
			return
		}
		select {
		case e := <-f.events:
			if e.Family == 0 || e.Own || len(e.Chains) > 0 {
				f.t.Fatalf("an event of legacy: %+v", e)
			}
			f.have[e.Family] = read(f.t, f.k, e.Family)
		case <-timeout:
			f.t.Fatalf("%v later the reader has\n%v\nand there is\n%v", limit, f.have[family].chains,
				truth.chains)
		}
	}
}

func sameTable(a, b Table) bool {
	return maps.EqualFunc(a.chains, b.chains, slices.Equal)
}

// otherLock is a command of a program that does not use the usual lock.
func otherLock(t testing.TB, dir, stdin, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "XTABLES_LOCKFILE="+filepath.Join(dir, "lock"))
	cmd.Stdin = strings.NewReader(stdin)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s\n%s", cmd, err, out, stdin)
	}
}

// TestLegacyFollowsAnotherProgram: whatever another program writes, at whatever moment of our own
// reads and writes, and whichever lock it takes, a reader who reads when told knows it.
func TestLegacyFollowsAnotherProgram(t *testing.T) {
	if !inNetns(t) {
		return
	}
	edits, slow := 40, 1 // those with a lock of their own that are as large: up to 5 s each
	if soak() {
		edits, slow = 1000, 25
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	k := open(t, Legacy)
	dir := t.TempDir()
	for _, f := range families {
		apply(t, k, sample(f).Ruleset())
	}
	f := follow(t, k)
	var took, late []time.Duration
	for range edits {
		family := families[r.IntN(2)]
		time.Sleep(time.Duration(r.IntN(20)) * time.Millisecond)
		text := anEdit(r, f.have[family])
		asLarge := strings.HasPrefix(text, "-R")
		payload := "*nat\n" + text + "COMMIT\n"
		way := r.IntN(4)
		if way == 2 && asLarge {
			if slow--; slow < 0 {
				way = 3
			}
		}
		start := time.Now()
		switch way {
		case 0: // while we read
			ended := make(chan Table, 1)
			go func() { ended <- read(t, k, family) }()
			restoreText(t, Legacy, family, payload)
			f.have[family] = <-ended
		case 1: // while we write, and either may fail
			i := sample(family)
			i.ServicePorts = []uint16{uint16(1 + r.IntN(1000))}
			ended := make(chan Table, 1)
			go func() {
				result, err := k.Apply(t.Context(), NewPlan(i.Ruleset(), f.have[family]))
				if err != nil {
					result.Have = read(t, k, family)
				}
				ended <- result.Have
			}()
			cmd := exec.Command(command(Legacy, family, "-restore"), "--noflush", "-w", "5")
			cmd.Stdin = strings.NewReader(payload)
			_ = cmd.Run() // ours may have taken what it was to change
			f.have[family] = <-ended
		case 2:
			otherLock(t, dir, payload, command(Legacy, family, "-restore"), "--noflush")
		default:
			restoreText(t, Legacy, family, payload)
		}
		limit := time.Second
		if way == 2 && asLarge {
			limit = 6 * time.Second
		}
		if soak() { // others use the machine, too
			limit += 2 * time.Second
		}
		f.until(family, limit)
		if way == 2 && asLarge {
			late = append(late, time.Since(start))
		} else {
			took = append(took, time.Since(start))
		}
	}
	slices.Sort(took)
	slices.Sort(late)
	t.Logf("known after %v p50, %v p99; as large and with another lock: %v", took[len(took)/2],
		took[len(took)*99/100], late)
}

// anEdit is something that somebody may do to a table: half of it leaves the table as large as it
// was, and begins with -R.
func anEdit(r *rand.Rand, have Table) string {
	var chains []string
	for _, name := range slices.Sorted(maps.Keys(have.chains)) {
		if len(have.chains[name]) > 0 {
			chains = append(chains, name)
		}
	}
	to := fmt.Sprintf("10.0.0.%d/32", r.IntN(256))
	if have.family == IPv6 {
		to = fmt.Sprintf("fd00::%x/128", r.IntN(0x10000))
	}
	foreign := "-p tcp -d " + to + " -j RETURN"
	if len(chains) == 0 {
		return "-A OUTPUT " + foreign + "\n"
	}
	chain := chains[r.IntN(len(chains))]
	rules := have.chains[chain]
	at := r.IntN(len(rules))
	switch r.IntN(8) {
	case 0:
		return fmt.Sprintf("-I %s %d %s\n", chain, at+1, foreign)
	case 1:
		return fmt.Sprintf("-D %s %d\n", chain, at+1)
	case 2:
		return "-F " + chain + "\n"
	case 3:
		return fmt.Sprintf("-A OUTPUT %s\n", foreign)
	}
	for n, rule := range rules { // a rule without a match or a target of its own is as large
		if strings.HasSuffix(rule, " -j RETURN") && !strings.Contains(rule, " -m ") {
			return fmt.Sprintf("-R %s %d %s\n", chain, n+1, foreign)
		}
	}
	if at > 0 { // another order
		return fmt.Sprintf("-R %s %d %s\n-R %s %d %s\n", chain, at, rules[at], chain, at+1, rules[at-1])
	}
	return "-A OUTPUT " + foreign + "\n"
}

// TestLegacyIsQuietAboutItself: what this Kernel wrote and read back is no news, and neither is a
// program that only looks, or packets.
func TestLegacyIsQuietAboutItself(t *testing.T) {
	if !inNetns(t) {
		return
	}
	k := open(t, Legacy)
	apply(t, k, sample(IPv4).Ruleset())
	f := follow(t, k)
	drain(f.events)
	for n := range 5 {
		i := sample(IPv4)
		i.ServicePorts = []uint16{uint16(80 + n)}
		apply(t, k, i.Ruleset())
		sh(t, "iptables-legacy", "-w", "5", "-t", "nat", "-S")
		c, err := net.Dial("udp", "127.0.0.1:9")
		if err != nil {
			t.Fatal(err)
		}
		c.Write([]byte("x"))
		c.Close()
	}
	select {
	case e := <-f.events:
		t.Errorf("an event though nobody else wrote: %+v", e)
	case <-time.After(3 * infoEvery):
	}
}

// TestLegacyReadsOnlyWhatMoved: a save is made only when the table is another one.
func TestLegacyReadsOnlyWhatMoved(t *testing.T) {
	if !inNetns(t) {
		return
	}
	k := open(t, Legacy)
	saves := 0
	countSaves(k, &saves)
	follow(t, k)
	before := read(t, k, IPv4)
	saves = 0
	read(t, k, IPv4)
	if saves != 0 {
		t.Errorf("%d saves of a table that is as it was", saves)
	}
	sh(t, "iptables-legacy", "-t", "nat", "-A", "OUTPUT", "-j", "ACCEPT")
	after := read(t, k, IPv4)
	if saves != 1 || sameTable(before, after) {
		t.Errorf("%d saves of a table that is another one: %v", saves, after.chains)
	}
	k.stand4.at = time.Now().Add(-trustPrint)
	if read(t, k, IPv4); saves != 2 {
		t.Errorf("%d saves: a table is read in any case now and then", saves)
	}
}

func countSaves(k *Kernel, saves *int) {
	run := k.machine.run
	k.machine.run = func(ctx context.Context, limit time.Duration, own *ownPIDs, stdin []byte,
		stdout *bytes.Buffer, name string, args ...string) error {
		if strings.HasSuffix(name, "-save") {
			*saves++
		}
		return run(ctx, limit, own, stdin, stdout, name, args...)
	}
}

// TestLegacyRepairIsKnown: a repair that puts back what was read before needs no save to know that,
// and one that does not, or into which somebody writes, never passes for it.
func TestLegacyRepairIsKnown(t *testing.T) {
	if !inNetns(t) {
		return
	}
	seed, saves, spared := uint64(time.Now().UnixNano()), 0, 0
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	k := open(t, Legacy)
	countSaves(k, &saves)
	want := sample(IPv4).Ruleset()
	apply(t, k, want)
	follow(t, k)
	rounds := 30
	if soak() {
		rounds = 500
	}
	for range rounds {
		edit := []byte("*nat\n" + anEdit(r, read(t, k, IPv4)) + "COMMIT\n")
		restoreText(t, Legacy, IPv4, string(edit))
		have := read(t, k, IPv4)
		ended := make(chan struct{})
		alone, after := r.IntN(3) > 0, time.Duration(r.IntN(15))*time.Millisecond
		if !alone { // somebody does it again while we repair it
			go func() {
				defer close(ended)
				time.Sleep(after)
				cmd := exec.Command("iptables-legacy-restore", "--noflush", "-w", "5")
				cmd.Stdin = bytes.NewReader(edit)
				_ = cmd.Run() // ours may have taken what it was to change
			}()
		} else {
			close(ended)
		}
		saves = 0
		result, err := k.Apply(t.Context(), NewPlan(want, have))
		if plan := NewPlan(want, have); err == nil && saves == 0 && !plan.Empty() {
			spared++
		}
		<-ended
		truth, is := savedTable(t, IPv4), read(t, k, IPv4)
		if alone && (err != nil || !sameTable(truth, result.Have)) {
			t.Fatalf("%v: taken for\n%v\nand there is\n%v", err, result.Have.chains, truth.chains)
		}
		if !sameTable(truth, is) {
			t.Fatalf("read as\n%v\nand there is\n%v", is.chains, truth.chains)
		}
		if drift := Diff(want, result.Have); err == nil && len(drift) != len(result.Drift) {
			t.Fatalf("%v, and the result says %v", drift, result.Drift)
		}
	}
	if t.Logf("%d of %d saves spared", spared, rounds); spared < rounds/10 {
		t.Errorf("%d of %d saves spared", spared, rounds)
	}
}

// savedTable is what iptables-save says there is.
func savedTable(t *testing.T, family Family) Table {
	t.Helper()
	truth, err := Parse(family, []byte(sh(t, command(Legacy, family, "-save"), "-t", "nat")))
	if err != nil {
		t.Fatal(err)
	}
	return truth
}

// TestLegacyWhereItMayNotBeAsked: the lock is a hint as it ever was, and the caller is told to
// poll.
func TestLegacyWhereItMayNotBeAsked(t *testing.T) {
	if !inNetns(t) {
		return
	}
	lock := t.TempDir() + "/xtables.lock"
	if err := os.WriteFile(lock, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	os.Setenv("XTABLES_LOCKFILE", lock)
	k := open(t, Legacy)
	k.machine.asked = func(Family) (asked, error) { return refusing{}, nil }
	time.Sleep(60 * time.Millisecond) // Open's own look is over
	events, err := k.Watch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if told, why := k.Watched(IPv4); told || !errors.Is(why, xtables.ErrRefused) {
		t.Errorf("watched %v, %v", told, why)
	}
	sh(t, "iptables-legacy", "-w", "5", "-t", "nat", "-N", "DOCKER")
	if e := next(t, events); e.Own {
		t.Errorf("another's write: %+v", e)
	}
	drain(events)
	apply(t, k, sample(IPv4).Ruleset())
	if e := next(t, events); !e.Own {
		t.Errorf("our own write: %+v", e)
	}
	if have := read(t, k, IPv4); len(have.chains) < 5 {
		t.Errorf("what is there is read all the same: %v", have.chains)
	}
}

type refusing struct{}

func (refusing) Info(string) (xtables.Info, error)   { return xtables.Info{}, xtables.ErrRefused }
func (refusing) Print(string) (xtables.Print, error) { return xtables.Print{}, xtables.ErrRefused }
func (refusing) Close() error                        { return nil }
