//go:build kernel

package iptables

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

func TestWatchTellsWhoChangedWhat(t *testing.T) {
	if !inNetns(t) {
		return
	}
	k := open(t, NFT)
	apply(t, k, sample(IPv4).Ruleset())
	events, err := k.Watch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	other := sample(IPv4)
	other.ServicePorts = nil
	apply(t, k, other.Ruleset())
	if e := next(t, events); !e.Own || e.Family != IPv4 ||
		!slices.Equal(e.Chains, []string{chainServicePorts}) ||
		!strings.HasPrefix("iptables-nft-restore", e.Program) {
		t.Fatalf("our own write: %+v", e)
	}

	for _, test := range []struct {
		command []string
		family  Family
		chains  []string
	}{
		{[]string{"iptables-nft", "-t", "nat", "-D", "OUTPUT", "-p", "tcp", "-j", chainOutput}, IPv4, []string{"OUTPUT"}},
		{[]string{"iptables-nft", "-t", "nat", "-F", chainServiceCIDRs}, IPv4, []string{chainServiceCIDRs}},
		{[]string{"nft", "insert", "rule", "ip", "nat", "PREROUTING", "accept"}, IPv4, []string{"PREROUTING"}},
	} {
		cmd := exec.Command(test.command[0], test.command[1:]...)
		start := time.Now()
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v %s", test.command, err, out)
		}
		e := next(t, events)
		if e.Family != test.family || !slices.Equal(e.Chains, test.chains) || e.Own ||
			e.PID != cmd.Process.Pid || !strings.HasPrefix(test.command[0], e.Program) {
			t.Errorf("%v (pid %d): %+v", test.command, cmd.Process.Pid, e)
		}
		t.Logf("%v after %v", e, time.Since(start))
	}

	// What is none of our business makes no event.
	sh(t, "nft", "add", "table", "inet", "other")
	sh(t, "iptables-nft", "-t", "filter", "-A", "INPUT", "-j", "ACCEPT")
	sh(t, "iptables-nft", "-t", "nat", "-N", "DOCKER")
	sh(t, "iptables-nft", "-t", "nat", "-A", "POSTROUTING", "-j", "DOCKER")
	select {
	case e := <-events:
		t.Errorf("an event for others' chains: %+v", e)
	case <-time.After(200 * time.Millisecond):
	}

	sh(t, "nft", "flush", "ruleset")
	if e := next(t, events); e.Own || e.Program != "nft" {
		t.Errorf("flush ruleset: %+v", e)
	}
}

// In a container's pid namespace the kernel's pids are not ours; our own writes must still not
// be taken for another's.
func TestWatchKnowsItsOwnWritesInAPIDNamespace(t *testing.T) {
	if !inNamespaces(t, syscall.CLONE_NEWNET|syscall.CLONE_NEWPID) {
		return
	}
	if inFirstPIDNamespace() {
		t.Fatal("this is the first pid namespace: the test shows nothing")
	}
	k := open(t, NFT)
	apply(t, k, sample(IPv4).Ruleset())
	events, err := k.Watch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	other := sample(IPv4)
	other.ServicePorts = nil
	apply(t, k, other.Ruleset())
	if e := next(t, events); !e.Own {
		t.Errorf("our own write: %+v", e)
	}
	time.Sleep(100 * time.Millisecond)
	sh(t, "iptables-nft", "-t", "nat", "-F", chainOutput)
	if e := next(t, events); e.Own {
		t.Errorf("another's write: %+v", e)
	}
}

// Another's write by the program that we write by, which comes at once after ours or beside it, is
// told though its pid says nothing: firewalld's iptables backend empties table nat by
// iptables-restore several times a second while it starts.
func TestWatchTellsAnothersRestoreInAPIDNamespace(t *testing.T) {
	if !inNamespaces(t, syscall.CLONE_NEWNET|syscall.CLONE_NEWPID) {
		return
	}
	k := open(t, NFT)
	with, without := sample(IPv4).Ruleset(), sample(IPv4)
	without.ServicePorts = nil
	apply(t, k, with)
	events, err := k.Watch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for round := range 10 {
		beside := round%2 == 1
		flush := exec.Command("iptables-nft-restore", "--noflush")
		flush.Stdin = strings.NewReader("*nat\n:" + chainServiceCIDRs + " - [0:0]\nCOMMIT\n")
		if beside {
			if err := flush.Start(); err != nil {
				t.Fatal(err)
			}
		}
		want := without.Ruleset()
		if round%2 == 0 {
			want = with
		}
		// Which of the two came first is not told: that the chain is empty is found by what is told.
		result, err := k.Apply(t.Context(), NewPlan(want, read(t, k, IPv4)))
		if err != nil {
			t.Fatal(err)
		}
		if beside {
			err = flush.Wait()
		} else {
			err = flush.Run()
		}
		if err != nil {
			t.Fatal(err)
		}
		have, told := result.Have, false
		for quiet := false; !quiet; {
			select {
			case e := <-events:
				if !e.Own {
					told = true
					if have, err = k.ReadChains(t.Context(), have, e.Chains); e.Lost {
						have, err = k.Read(t.Context(), IPv4)
					}
					if err != nil {
						t.Fatal(err)
					}
				}
			case <-time.After(200 * time.Millisecond):
				quiet = true
			}
		}
		if now := read(t, k, IPv4); len(Diff(want, now)) != len(Diff(want, have)) {
			t.Errorf("round %d, told: %v: seen %v, and there is %v", round, told, Diff(want, have),
				Diff(want, now))
		}
	}
}

// A transaction larger than the socket's buffer, while nobody receives, must end in a Lost event.
func TestWatchSaysWhatItLost(t *testing.T) {
	if !inNetns(t) {
		return
	}
	k := open(t, NFT)
	conn, err := k.dialWatch()
	if err != nil {
		t.Fatal(err)
	}
	if err := conn.SetReadBuffer(4096); err != nil {
		t.Fatal(err)
	}
	i := sample(IPv4)
	i.Services = randomPrefixes(IPv4, 2000, 1)
	apply(t, k, i.Ruleset())
	events := make(chan Event)
	go k.watchNFT(t.Context(), conn, newSender(t.Context(), events))
	for {
		if e := next(t, events); e.Lost {
			return
		}
	}
}

// With 10,000 rules a save takes 40 ms and starts over at each foreign change: under a
// hundred changes a second it never ends. What is wrong must still be found and repaired, by
// reading only what matters.
func TestReadAndRepairUnderAStormOfForeignChanges(t *testing.T) {
	if !inNetns(t) {
		return
	}
	k := open(t, NFT)
	i := sample(IPv4)
	i.Services = randomPrefixes(IPv4, 10000, 1)
	want := i.Ruleset()
	apply(t, k, want)
	have := read(t, k, IPv4)
	storm(t, 100)

	start := time.Now()
	whole, err := k.Read(t.Context(), IPv4)
	if err != nil {
		t.Fatalf("a whole read under a storm: %v", err)
	}
	if d := Diff(want, whole); len(d) > 0 {
		t.Fatalf("a whole read under a storm: %v", d)
	}
	t.Logf("a whole read under a storm took %v", time.Since(start))

	sh(t, "iptables-nft", "-t", "nat", "-F", chainServiceCIDRs)
	start = time.Now()
	have, err = k.ReadChains(t.Context(), have, []string{chainServiceCIDRs})
	if err != nil {
		t.Fatal(err)
	}
	result, err := k.Apply(t.Context(), NewPlan(want, have))
	if err != nil || len(result.Drift) > 0 {
		t.Fatalf("repair: %v %v", err, result.Drift)
	}
	took := time.Since(start)
	t.Logf("repair under a storm took %v", took)
	if took > time.Second {
		t.Errorf("repair under a storm took %v, want less than 1s", took)
	}
}

// storm changes another nft table perSecond times a second until the test ends.
func storm(t testing.TB, perSecond int) {
	t.Helper()
	sh(t, "nft", "add", "table", "inet", "storm")
	sh(t, "nft", "add", "chain", "inet", "storm", "c")
	cmd := exec.Command("nft", "-i")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(time.Second / time.Duration(perSecond))
		defer tick.Stop()
		for n := 0; ; n++ {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			if n%2 == 0 {
				fmt.Fprintln(in, "add rule inet storm c counter")
			} else {
				fmt.Fprintln(in, "flush chain inet storm c")
			}
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-done
		in.Close()
		cmd.Wait()
	})
	// The test begins when the storm does: a transaction ends by NEWGEN.
	conn, err := dialNetfilter()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.JoinGroup(nfnlGroupNFTables); err != nil {
		t.Fatal(err)
	}
	if err := conn.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	for changes := 0; changes < perSecond/5; {
		messages, err := conn.Receive()
		if err != nil {
			t.Fatalf("the storm makes only %d changes in 5s: %v", changes, err)
		}
		for _, m := range messages {
			if byte(m.Header.Type) == nftMsgNewGen {
				changes++
			}
		}
	}
}

func next(t testing.TB, events <-chan Event) Event {
	t.Helper()
	select {
	case e, ok := <-events:
		if !ok {
			t.Fatal("the watch ended")
		}
		return e
	case <-time.After(5 * time.Second):
		t.Fatal("no event within 5s")
	}
	return Event{}
}

func drain(events <-chan Event) {
	for {
		select {
		case <-events:
		case <-time.After(100 * time.Millisecond):
			return
		}
	}
}

// TestWatchBeginsWhenTheBackendIsKnown: programs that do not tell their version at first. Until it
// is watched nobody is told that it is, and then nothing is missed.
func TestWatchBeginsWhenTheBackendIsKnown(t *testing.T) {
	for _, backend := range []string{NFT, Legacy} {
		t.Run(backend, func(t *testing.T) {
			if of := os.Getenv("IPTABLES_TEST_NETNS"); of != "" && of != t.Name() || !inNetns(t) {
				return
			}
			apply(t, open(t, backend), sample(IPv4).Ruleset())
			var silent atomic.Bool
			m := thisMachine
			run := m.run
			m.run = func(ctx context.Context, limit time.Duration, own *ownPIDs, stdin []byte,
				stdout *bytes.Buffer, name string, args ...string) error {
				if silent.Load() {
					return ErrCouldNotLook
				}
				return run(ctx, limit, own, stdin, stdout, name, args...)
			}
			silent.Store(true)
			k, err := openOn(t.Context(), m, Options{Backend: backend})
			if err != nil {
				t.Fatal(err)
			}
			events, err := k.Watch(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if told, _ := k.Watched(IPv4); told {
				t.Error("it is said to be watched though its backend is not known")
			}
			silent.Store(false)
			read(t, k, IPv4) // asks for the version
			if e := next(t, events); !e.Lost {
				t.Errorf("the first event: %+v", e)
			}
			if told, why := k.Watched(IPv4); !told {
				t.Errorf("not watched: %v", why)
			}
			read(t, k, IPv4)
			sh(t, command(backend, IPv4, ""), "-t", "nat", "-F", chainServiceCIDRs)
			if e := next(t, events); e.Own || e.Family != IPv4 {
				t.Errorf("after a change: %+v", e)
			}
		})
	}
}
