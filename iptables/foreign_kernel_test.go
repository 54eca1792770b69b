//go:build kernel

package iptables

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
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

// saveWithCounters is a save as it must come back after cleanup. On legacy, every write of
// anybody's, a bare `iptables-legacy -A` included, sets the counters of the built-in chains'
// policies to zero (libiptc 1.8.9; those of the rules it keeps), so those cannot be compared there.
// It also replaces the table first and then adds the counters to it, under the lock that a save
// does not take: so it is taken here, or a save amid somebody's write would show zeros.
func saveWithCounters(t testing.TB, backend string, f Family) string {
	t.Helper()
	if backend == Legacy {
		lock, err := os.OpenFile("/run/xtables.lock", os.O_RDONLY|os.O_CREATE, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer lock.Close()
		if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
			t.Fatal(err)
		}
	}
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

// others is such a save without what is ours: what must stay as it is, byte for
// byte, at every moment.
func others(t testing.TB, backend string, f Family) string {
	t.Helper()
	var lines []string
	for line := range strings.SplitSeq(saveWithCounters(t, backend, f), "\n") {
		words := strings.Fields(line)
		switch {
		case len(words) > 0 && strings.HasPrefix(words[0], ":") && isOurs(words[0][1:]):
		case len(words) > 2 && words[1] == "-A" &&
			(isOurs(words[2]) || isJumpSite(words[2]) && isOurs(target(strings.Join(words[3:], " ")))):
		default:
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "\n")
}

// Foreign rules, their order and their counters must be the same after every step of install,
// drift, repair, change and cleanup, while a second program edits the same chains all the while;
// and all of its edits must be there at the end.
func TestForeignRulesAreSacred(t *testing.T) {
	cycles := 10
	if soak() {
		cycles = 1000
	}
	var repaired []drift // the others are the foreign rules' own changes
	for _, d := range drifts {
		if d.kind != TableFlushed && d.kind != Shadowed && d.kind != JumpMoved {
			repaired = append(repaired, d)
		}
	}
	eachBackend(t, func(t *testing.T, k *Kernel, f Family) {
		saves := foreignSaves(t, f)
		r := rand.New(rand.NewPCG(uint64(f), 7))
		edits := 0
		for _, name := range slices.Sorted(maps.Keys(saves)) {
			clear(t, k.Backend(), f)
			cmd := exec.Command(command(k.Backend(), f, "-restore"), "-c", "-w", "5")
			cmd.Stdin = strings.NewReader(saves[name])
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%s: %v\n%s", name, err, out)
			}
			whole := saveWithCounters(t, k.Backend(), f)
			before := others(t, k.Backend(), f)
			e := newEditor(t, k.Backend(), f)
			for cycle := range cycles / len(saves) {
				check := func(step string) {
					t.Helper()
					if now := e.without(others(t, k.Backend(), f)); now != before {
						t.Fatalf("%s, cycle %d, after %s: foreign rules were\n%s\nand are\n%s", name, cycle, step,
							before, now)
					}
				}
				want := sample(f).Ruleset()
				apply(t, k, want)
				check("install")
				d := repaired[r.IntN(len(repaired))]
				d.run(t, k.Backend(), f)
				check(d.name)
				apply(t, k, want)
				check("repair of " + d.name)
				i := sample(f)
				i.Services = append(i.Services, randomPrefixes(f, 300, uint64(cycle))...)
				apply(t, k, i.Ruleset())
				check("change")
				if _, err := k.Cleanup(t.Context()); err != nil {
					t.Fatal(err)
				}
				check("cleanup")
			}
			edits += e.end()
			if now := e.without(saveWithCounters(t, k.Backend(), f)); now != whole {
				t.Fatalf("%s: before\n%s\nafter cleanup\n%s", name, whole, now)
			}
		}
		t.Logf("%d cycles beside %d edits", cycles, edits)
	})
}

// editor is a second program, a process for each of its edits: it adds rules in a chain of its
// own and in the built-in ones that ours hang from, and takes some out again. Its rules are
// told by their comment.
type editor struct {
	t     *testing.T
	save  func() string
	rules map[string][]string // what must be there: comments by chain, in order
	edits int
	stop  chan struct{}
	done  chan struct{}
}

func newEditor(t *testing.T, backend string, f Family) *editor {
	e := &editor{t: t, rules: map[string][]string{}, stop: make(chan struct{}),
		done: make(chan struct{})}
	e.save = func() string { return saveWithCounters(t, backend, f) }
	iptables := command(backend, f, "")
	sh(t, iptables, "-w", "5", "-t", "nat", "-N", "EDITOR")
	go func() {
		defer close(e.done)
		for r := rand.New(rand.NewPCG(uint64(f), 8)); ; e.edits++ {
			select {
			case <-e.stop:
				return
			default:
			}
			chain := []string{"EDITOR", builtinOutput, builtinPrerouting, "POSTROUTING"}[r.IntN(4)]
			rules, at, comment := e.rules[chain], 0, fmt.Sprintf("editor-%d", e.edits)
			args := []string{"-A", chain}
			switch n := r.IntN(20); {
			case n < len(rules): // the more there are, the likelier one goes
				at = r.IntN(len(rules))
				comment, args[0] = rules[at], "-D"
				rules = slices.Delete(rules, at, at+1)
			case chain == "EDITOR" && r.IntN(2) == 0:
				at = r.IntN(len(rules) + 1)
				args = []string{"-I", chain, strconv.Itoa(at + 1)}
				rules = slices.Insert(rules, at, comment)
			default:
				rules = append(rules, comment)
			}
			args = append([]string{"-w", "5", "-t", "nat"},
				append(args, "-p", "tcp", "-m", "comment", "--comment", comment, "-j", "RETURN")...)
			if out, err := exec.Command(iptables, args...).CombinedOutput(); err != nil {
				t.Errorf("the editor's %q: %v %s", args, err, out)
				return
			}
			e.rules[chain] = rules
		}
	}()
	t.Cleanup(func() { e.end() })
	return e
}

// without is a save without what the editor made.
func (e *editor) without(save string) string {
	return strings.Join(slices.DeleteFunc(strings.Split(save, "\n"), func(line string) bool {
		return strings.Contains(line, "--comment editor-") || strings.HasPrefix(line, ":EDITOR ") ||
			line == ":EDITOR"
	}), "\n")
}

// end stops the editor, looks whether all it did is there, and says how many edits that were.
func (e *editor) end() int {
	e.t.Helper()
	select {
	case <-e.done:
		return e.edits
	default:
	}
	close(e.stop)
	<-e.done
	have := map[string][]string{}
	for line := range strings.SplitSeq(e.save(), "\n") {
		if words := strings.Fields(line); strings.Contains(line, "--comment editor-") {
			have[words[2]] = append(have[words[2]], words[slices.Index(words, "--comment")+1])
		}
	}
	maps.DeleteFunc(e.rules, func(_ string, rules []string) bool { return len(rules) == 0 })
	if !maps.EqualFunc(e.rules, have, slices.Equal) {
		e.t.Errorf("after %d edits the editor's rules should be %v and are %v", e.edits, e.rules, have)
	}
	return e.edits
}

// A process with another lock file is kept apart by the kernel alone, which compares how many rules
// there were: it refuses a restore as a whole, or lets one undo what the other did meanwhile. Apply
// makes its plan anew, takes no rule for refused because of that, and the rules are right once the
// other one is gone.
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
			cmd := exec.Command("iptables-legacy", "-t", "nat", command, "POSTROUTING", "-s", "192.0.2.1/32",
				"-j", "MASQUERADE")
			cmd.Env = append(os.Environ(), "XTABLES_LOCKFILE="+t.TempDir()+"/lock")
			cmd.Run() // it is refused now and then as well
		}
	})
	anew, failed := 0, 0
	for pass := range 100 {
		i := sample(IPv4)
		i.Services = randomPrefixes(IPv4, 500+pass, 3)
		result, err := k.Apply(t.Context(), NewPlan(i.Ruleset(), read(t, k, IPv4)))
		if result.Attempts > 1 {
			anew++
		}
		if err != nil {
			failed++
		}
		if len(result.Left) > 0 {
			t.Errorf("pass %d (%v): left out: %v", pass, err, result.Left)
		}
	}
	t.Logf("%d of 100 plans were made anew, %d were given up", anew, failed)
	if anew <= failed {
		t.Error("no plan that was made anew was taken")
	}
	close(stop)
	wg.Wait()
	want := sample(IPv4).Ruleset()
	_, err := k.Apply(t.Context(), NewPlan(want, read(t, k, IPv4)))
	if drift := Diff(want, read(t, k, IPv4)); err != nil || len(drift) > 0 {
		t.Errorf("after it: %v, %v", err, drift)
	}
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
