//go:build kernel

package iptables

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// foreignSaves are rulesets in the shapes that others leave, for the family.
func foreignSaves(t testing.TB, f Family) map[string]string {
	t.Helper()
	files, err := filepath.Glob("testdata/foreign/*.save")
	if err != nil || len(files) < 5 {
		t.Fatalf("testdata/foreign: %v %v", files, err)
	}
	saves := map[string]string{}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		save := string(text)
		if f == IPv6 {
			save = strings.NewReplacer(
				"127.0.0.0/8", "::1/128", "127.0.0.1/32", "::1/128", "127.0.0.6/32", "::6/128",
				"172.17.0.0/16", "fd17::/64", "172.17.0.2/32", "fd17::2/128", "172.17.0.2:80", "[fd17::2]:80", "172.17.0.3:5432", "[fd17::3]:5432",
				"10.0.0.5/32", "fd00::5/128", "10.244.1.7/32", "fd44::7/128", "10.244.2.9/32", "fd44::9/128", "10.244.1.7:8443", "[fd44::7]:8443",
				"10.244.2.9:8443", "[fd44::9]:8443", "10.96.0.10/32", "fd96::10/128", "192.168.1.5:22", "[fd92::5]:22", "192.0.2.0/24", "2001:db8::/32",
			).Replace(save)
		}
		saves[strings.TrimSuffix(filepath.Base(file), ".save")] = save
	}
	return saves
}

// saveWithCounters is a save as it must come back after cleanup. On legacy, every write of anybody's, a bare
// `iptables-legacy -A` included, sets the counters of the built-in chains' policies to zero (libiptc 1.8.9; those of the
// rules it keeps), so those cannot be compared there.
func saveWithCounters(t testing.TB, backend string, f Family) string {
	t.Helper()
	var lines []string
	for line := range strings.SplitSeq(sh(t, command(backend, f, "-save"), "-c", "-t", "nat"), "\n") {
		if strings.HasPrefix(line, "#") {
			continue
		}
		if backend == Legacy && strings.HasPrefix(line, ":") {
			line, _, _ = strings.Cut(line, " [")
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, "\n")
}

// others is such a save without what is ours: what must stay as it is, byte for byte, at every moment.
func others(t testing.TB, backend string, f Family) string {
	t.Helper()
	var lines []string
	for line := range strings.SplitSeq(saveWithCounters(t, backend, f), "\n") {
		words := strings.Fields(line)
		switch {
		case len(words) > 0 && strings.HasPrefix(words[0], ":") && isOurs(words[0][1:]):
		case len(words) > 2 && words[1] == "-A" && (isOurs(words[2]) || isJumpSite(words[2]) && isOurs(target(strings.Join(words[3:], " ")))):
		default:
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "\n")
}

// Foreign rules, their order and their counters must be the same after every step of install, drift, repair and cleanup,
// while a second program edits its own; and each of its edits must be there at the end.
func TestForeignRulesAreSacred(t *testing.T) {
	cycles := 3
	if soak() {
		cycles = 1000
	}
	eachBackend(t, func(t *testing.T, k *Kernel, f Family) {
		for name, save := range foreignSaves(t, f) {
			clear(t, k.Backend(), f)
			cmd := exec.Command(command(k.Backend(), f, "-restore"), "-c", "-w", "5")
			cmd.Stdin = strings.NewReader(save)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%s: %v\n%s", name, err, out)
			}
			whole := saveWithCounters(t, k.Backend(), f)
			before := others(t, k.Backend(), f)
			r := rand.New(rand.NewPCG(uint64(f), 7))
			for cycle := range cycles {
				check := func(step string) {
					if now := others(t, k.Backend(), f); now != before {
						t.Fatalf("%s, cycle %d, after %s: foreign rules were\n%s\nand are\n%s", name, cycle, step, before, now)
					}
				}
				want := sample(f).Ruleset()
				apply(t, k, want)
				check("install")
				d := drifts[r.IntN(len(drifts))]
				if d.kind != TableFlushed && d.kind != Shadowed && d.kind != JumpMoved { // those are the others' own changes
					d.run(t, k.Backend(), f)
					apply(t, k, want)
					check("repair of " + d.name)
				}
				i := sample(f)
				i.Services = append(i.Services, randomPrefixes(f, 300, uint64(cycle))...)
				apply(t, k, i.Ruleset())
				check("change")
				if _, err := k.Cleanup(t.Context()); err != nil {
					t.Fatal(err)
				}
				check("cleanup")
			}
			if now := saveWithCounters(t, k.Backend(), f); now != whole {
				t.Fatalf("%s: before\n%s\nafter cleanup\n%s", name, whole, now)
			}
		}
	})
}

func TestASecondEditorLosesNothing(t *testing.T) {
	edits := 20
	if soak() {
		edits = 1000
	}
	eachBackend(t, func(t *testing.T, k *Kernel, f Family) {
		restoreText(t, k.Backend(), f, foreignSaves(t, f)["docker"])
		iptables := command(k.Backend(), f, "")
		sh(t, iptables, "-w", "5", "-t", "nat", "-N", "EDITOR")
		var wg sync.WaitGroup
		wg.Go(func() {
			for n := range edits {
				out, err := exec.Command(iptables, "-w", "5", "-t", "nat", "-A", "EDITOR", "-p", "tcp", "--dport", fmt.Sprint(n+1), "-j", "RETURN").CombinedOutput()
				if err != nil {
					t.Errorf("the editor's edit %d: %v %s", n, err, out)
				}
			}
		})
		done := make(chan struct{})
		go func() { wg.Wait(); close(done) }()
		passes := 0
		for running := true; running; passes++ {
			select {
			case <-done:
				running = false
			default:
			}
			i := sample(f)
			i.Services = append(i.Services, randomPrefixes(f, passes%400, 3)...)
			want := i.Ruleset()
			result, err := k.Apply(t.Context(), NewPlan(want, read(t, k, f)))
			if err != nil || len(result.Drift) > 0 {
				t.Fatalf("pass %d beside an editor: %v %v", passes, err, result.Drift)
			}
		}
		rules := read(t, k, f).Rules("EDITOR")
		if len(rules) != edits {
			t.Errorf("%d of the editor's %d rules are there after %d passes", len(rules), edits, passes)
		}
	})
}

// A process with another lock file is kept apart by the kernel alone: legacy then refuses a restore as a whole.
func TestLegacyWithAnotherLockFile(t *testing.T) {
	if !inNetns(t) {
		return
	}
	k := open(t, Legacy)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for n := 0; ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			command := "-A"
			if n%2 == 1 {
				command = "-D"
			}
			cmd := exec.Command("iptables-legacy", "-t", "nat", command, "POSTROUTING", "-s", "192.0.2.1/32", "-j", "MASQUERADE")
			cmd.Env = append(os.Environ(), "XTABLES_LOCKFILE="+t.TempDir()+"/lock")
			cmd.Run() // it is refused now and then as well
		}
	})
	for pass := range 100 {
		i := sample(IPv4)
		i.Services = randomPrefixes(IPv4, 500+pass, 3)
		var err error
		for try := range 20 {
			var result Result
			result, err = k.Apply(t.Context(), NewPlan(i.Ruleset(), read(t, k, IPv4)))
			if err == nil {
				if len(result.Drift) > 0 {
					t.Errorf("pass %d: %v", pass, result.Drift)
				}
				break
			}
			time.Sleep(time.Duration(try) * time.Millisecond)
		}
		if err != nil {
			t.Errorf("pass %d: %v", pass, err)
		}
	}
	close(stop)
	wg.Wait()
}

// clear empties a family's nat table, everybody's.
func clear(t testing.TB, backend string, f Family) {
	t.Helper()
	if backend == NFT {
		sh(t, "nft", "flush", "ruleset")
		return
	}
	sh(t, command(backend, f, ""), "-t", "nat", "-F")
	sh(t, command(backend, f, ""), "-t", "nat", "-X")
}
