//go:build lab

package e2e

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/internal/xtables"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// legacyDrifts are ten kinds of drift. asLarge ones leave the table's number of rules, its size and
// the places of its built-in chains as they are: without the lock only a hash of all shows them.
var legacyDrifts = []struct {
	name    string
	asLarge bool
	do      string // lines of a restore
}{
	{"rule removed", false, "-D SERVICE_PROXY_SERVICE_CIDRS 1"},
	{"chain flushed", false, "-F SERVICE_PROXY_OUTPUT"},
	{"jump removed", false, "-D OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT"},
	{"jump doubled", false, "-A OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT"},
	{"jump changed", true, "-R OUTPUT 1 -p udp -j SERVICE_PROXY_OUTPUT"},
	{"foreign rule", false, "-I SERVICE_PROXY_OUTPUT 1 -p tcp -j RETURN"},
	{"reordered", true, "-D SERVICE_PROXY_OUTPUT -j SERVICE_PROXY_SERVICE_CIDRS\n" +
		"-I SERVICE_PROXY_OUTPUT 1 -j SERVICE_PROXY_SERVICE_CIDRS"},
	{"port changed", true, "-R SERVICE_PROXY_REDIRECT 1 -p tcp -j REDIRECT --to-ports 1"},
	{"rule changed", true,
		"-R SERVICE_PROXY_SERVICE_CIDRS 1 -d 10.255.0.1/32 -j SERVICE_PROXY_REDIRECT"},
	{"table flushed", false, "-F"},
}

// TestLegacyDrift: each kind of drift is put right, done with the usual lock and with another one,
// long after a look of the agent's own and at once after its write. A pair of damages and a pause
// keep clear of the back-off, which begins at five repairs in eight seconds.
func TestLegacyDrift(t *testing.T) {
	beside(t)
	m, a := start(t, mesh.Options{Backend: lab.Legacy,
		Config: spread(soak(10_000, 50), false)})
	must(t, a.WaitReady(within(t, time.Minute)))
	eyes := look(t, m)
	damages := legacyDrifts
	locks := []string{"", m.Dir + "/other.lock"}
	if soak(1, 0) == 0 {
		damages, locks = damages[6:8], locks[1:] // TestDrift has the others
	}
	var quick, asLarge, floors []time.Duration
	for _, lock := range locks {
		for n := range damages {
			time.Sleep(time.Duration(soak(4500, 0)) * time.Millisecond)
			for step, d := range []int{n, (n + 1) % len(damages)} {
				d := damages[d]
				took := eyes.repaired(t, lock, d.do)
				t.Logf("%s, lock %q, in step: %v: %v", d.name, lock, step == 1, took)
				if step == 1 {
					floors = append(floors, eyes.floor(t))
				}
				if d.asLarge && lock != "" {
					asLarge = append(asLarge, took)
				} else {
					quick = append(quick, took)
				}
			}
		}
	}
	slices.Sort(quick)
	slices.Sort(asLarge)
	slices.Sort(floors)
	t.Logf("repaired after %v; of what is as large, with another lock: %v", quick, asLarge)
	t.Logf("two saves and a restore took %v", floors)
	// On a machine that others use, too, what a repair cannot do without is the measure.
	slow := floors[len(floors)-1]
	if n := len(quick); n > 0 && quick[n-1] > max(250*time.Millisecond, 3*slow) {
		tooDear(t, "the last repair came after %v", quick[n-1])
	}
	if n := len(asLarge); n > 0 && asLarge[n-1] > 6*time.Second+slow {
		tooDear(t, "of what is as large, the last repair came after %v", asLarge[n-1])
	}
}

// floor is what the programs of a repair take: a read, a write, and a read of what came of it. The
// write changes nothing.
func (e *eyes) floor(t *testing.T) time.Duration {
	t.Helper()
	began := time.Now()
	for range 2 {
		_, err := e.mesh.VM.Run(t.Context(), "iptables-save", "-t", "nat")
		must(t, err)
	}
	must(t, e.edit(t, "", "-N NOBODY\n-X NOBODY"))
	return time.Since(began)
}

// TestLegacyRandomEdits: another program edits at random, with whichever lock, and the agent is
// stopped and goes on at random. Whatever it missed, it ends with the rules as they were.
func TestLegacyRandomEdits(t *testing.T) {
	beside(t)
	m, a := start(t, mesh.Options{Backend: lab.Legacy,
		Config: spread(20, false)})
	must(t, a.WaitReady(within(t, time.Minute)))
	eyes := look(t, m)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	cont := func() { must(t, unix.Kill(a.PID(), unix.SIGCONT)) }
	defer cont()
	other, done := m.Dir+"/other.lock", 0
	for range soak(1000, 40) {
		switch r.IntN(8) {
		case 0:
			must(t, unix.Kill(a.PID(), unix.SIGSTOP))
		case 1, 2:
			cont()
		}
		// Of a table that is damaged already there may be nothing to damage.
		if eyes.edit(t, []string{"", other}[r.IntN(2)], legacyDrifts[r.IntN(10)].do) == nil {
			done++
		}
		time.Sleep(time.Duration(r.IntN(50)) * time.Millisecond)
	}
	cont()
	began := time.Now()
	eyes.wait(t, 20*time.Second) // the longest back-off, and a hash
	t.Logf("%d edits, as before %v after the last", done, time.Since(began))
	if done < soak(300, 10) {
		t.Errorf("only %d edits were done", done)
	}
	through(t, m, at4(0))
}

// TestLegacyIdle: what the agent uses of a core when nothing happens, of which what it asks of the
// kernel is a part. The same with nft, where it asks nothing, is beside it.
func TestLegacyIdle(t *testing.T) {
	beside(t)
	used := map[lab.Backend]float64{}
	for _, backend := range lab.Backends {
		t.Run(string(backend), func(t *testing.T) {
			m, err := mesh.New(within(t, time.Minute), mesh.Options{Backend: backend,
				Config: spread(soak(10_000, 50), false)})
			must(t, err)
			a := m.NewAgent()
			a.Setenv("XTABLES_LOCKFILE=" + m.Dir + "/xtables.lock") // others' use of it is no idleness
			must(t, a.Start())
			must(t, a.WaitReady(within(t, time.Minute)))
			time.Sleep(time.Duration(soak(20, 1)) * time.Second)
			busy, children, began := cpu(t, procStat(a)), cpuAll(t, a.PID()), time.Now()
			time.Sleep(time.Duration(soak(60, 2)) * time.Second)
			took := time.Since(began)
			own := share(cpu(t, procStat(a))-busy, took)
			used[backend] = share(cpuAll(t, a.PID())-children, took)
			t.Logf("idle: %.2f %% of a core, %.2f %% itself", used[backend], own)
			must(t, m.Close())
		})
	}
	if used[lab.Legacy] > 0.3 {
		tooDear(t, "idle on legacy: %.2f %% of a core, on nft %.2f %%", used[lab.Legacy], used[lab.NFT])
	}
}

func procStat(a *mesh.Agent) string { return fmt.Sprintf("/proc/%d/stat", a.PID()) }

// eyes see whether a lab's table is as it was when they opened.
type eyes struct {
	mesh   *mesh.Mesh
	socket *xtables.Socket
	before xtables.Print
}

func look(t *testing.T, m *mesh.Mesh) *eyes {
	t.Helper()
	e := &eyes{mesh: m}
	var err error
	must(t, m.VM.Do(func() error {
		e.socket, err = xtables.Open(unix.AF_INET)
		return err
	}))
	t.Cleanup(func() { e.socket.Close() })
	e.before, err = e.socket.Print("nat")
	must(t, err)
	return e
}

// edit is what another program does, with a lock of its own or the usual one.
func (e *eyes) edit(t *testing.T, lock, lines string) error {
	name, args := "iptables-restore", []string{"--noflush", "-w", "5"}
	if lock != "" {
		name, args = "env", append([]string{"XTABLES_LOCKFILE=" + lock, name}, args...)
	}
	_, err := e.mesh.VM.RunInput(t.Context(), "*nat\n"+lines+"\nCOMMIT\n", name, args...)
	return err
}

// repaired does the damage, and says how long after it the table was as before.
func (e *eyes) repaired(t *testing.T, lock, lines string) time.Duration {
	t.Helper()
	must(t, e.edit(t, lock, lines))
	return e.wait(t, 10*time.Second)
}

func (e *eyes) wait(t *testing.T, limit time.Duration) time.Duration {
	t.Helper()
	began := time.Now()
	eventually(t, limit, "the table as before", func() (bool, string) {
		now, err := e.socket.Print("nat")
		return err == nil && now == e.before, fmt.Sprint(now, " ", err)
	})
	return time.Since(began)
}
