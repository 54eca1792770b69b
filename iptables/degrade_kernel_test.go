//go:build kernel

package iptables

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// wrapped puts programs in front of the real ones in a folder of the test's own. restore is a shell
// script's body that runs before the real restore reads its payload, which is in the file $1.
func wrapped(t *testing.T, backend, restore string) string {
	t.Helper()
	dir := t.TempDir()
	for _, f := range families {
		for _, suffix := range []string{"", "-save", "-restore"} {
			name := command(backend, f, suffix)
			script := "#!/bin/sh\nexec /usr/sbin/" + name + " \"$@\"\n"
			if suffix == "-restore" {
				script = "#!/bin/sh\nin=$(mktemp)\ntrap 'rm -f $in' EXIT\ncat > $in\ncheck() {\n" + restore +
					"\n}\ncheck $in || exit $?\n/usr/sbin/" + name + " \"$@\" < $in\n"
			}
			if err := os.WriteFile(filepath.Join(dir, name), []byte(script), 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	return dir
}

// refuse is a restore without one match or target, in the words of the real one.
func refuse(match string) string {
	return fmt.Sprintf(`n=$(grep -n -m1 -e '%s' $1 | cut -d: -f1)
[ -z "$n" ] && return 0
echo "iptables-restore v1.8.9 (nf_tables): " >&2
echo "line $n: RULE_APPEND failed (No such file or directory): rule in chain X" >&2
return 4`, match)
}

// As in memory, with the real programs behind one that refuses; those that differ in more than in
// which rule it is.
func TestARefusedRuleIsLeftOutByTheRealPrograms(t *testing.T) {
	for _, test := range refusals[:3] {
		t.Run(strings.NewReplacer(" ", "-", ":", "").Replace(test.name), func(t *testing.T) {
			if os.Getenv("IPTABLES_TEST_NETNS") != "" && os.Getenv("IPTABLES_TEST_NETNS") != t.Name() ||
				!inNetns(t) {
				return
			}
			k, err := Open(t.Context(),
				Options{Backend: NFT, Path: wrapped(t, NFT, refuse(strings.Join(test.refuse, "\\|")))})
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range families {
				test.check(t, k, f)
			}
		})
	}
}

// The real thing: a kernel in a user namespace of one uid refuses --uid-owner
// of any other (EINVAL).
func TestLegacyNamesNoLineAndTheRuleIsStillFound(t *testing.T) {
	if !inNetns(t) {
		return
	}
	// libxt_owner is not there: iptables itself refuses, with a line of its own.
	dir := t.TempDir()
	libs, err := filepath.Glob("/usr/lib/*/xtables/*.so")
	if err != nil || len(libs) == 0 {
		t.Fatal("no xtables libraries", err)
	}
	for _, lib := range libs {
		if filepath.Base(lib) != "libxt_comment.so" {
			if err := os.Symlink(lib, filepath.Join(dir, filepath.Base(lib))); err != nil {
				t.Fatal(err)
			}
		}
	}
	os.Setenv("XTABLES_LIBDIR", dir)
	for _, backend := range []string{NFT, Legacy} {
		for _, f := range families {
			k := open(t, backend)
			degraded, err := k.Apply(t.Context(), NewPlan(sample(f).Ruleset(), read(t, k, f)))
			if err != nil {
				t.Fatalf("%s %s: %v", backend, f, err)
			}
			if len(degraded.Left) != 1 || degraded.Left[0].Rule != "-m comment" ||
				!strings.Contains(degraded.Left[0].Stderr, "comment") {
				t.Errorf("%s %s: left out %v", backend, f, degraded.Left)
			}
			if d := Diff(degraded.Ruleset, read(t, k, f)); len(d) > 0 {
				t.Errorf("%s %s: %v", backend, f, d)
			}
			if _, err := k.Cleanup(t.Context()); err != nil {
				t.Error(err)
			}
		}
	}
}

func TestErrorsHaveClasses(t *testing.T) {
	if !inNetns(t) {
		return
	}
	for _, test := range []struct {
		name, restore string
		is            error
	}{
		{"a held lock", "echo 'Another app is currently holding the xtables lock. Stopped waiting after 5s.' >&2; return 4", ErrLocked},
		{"not root", "echo 'Fatal: can'\"'\"'t open lock file /run/xtables.lock: Permission denied' >&2; return 4", ErrNotRoot},
		{"incompatible", "echo 'iptables-restore v1.8.9 (nf_tables): table `nat'\"'\"' is incompatible, use '\"'\"'nft'\"'\"' tool.' >&2; return 1", ErrIncompatible},
		{"no module", "echo 'ip6tables v1.8.7 (legacy): can'\"'\"'t initialize ip6tables table `nat'\"'\"': Table does not exist (do you need to insmod?)' >&2; return 3", ErrNoTable},
	} {
		k, err := Open(t.Context(), Options{Backend: NFT, Path: wrapped(t, NFT, test.restore)})
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			_, err := k.Apply(t.Context(), NewPlan(sample(f).Ruleset(), read(t, k, f)))
			if !errors.Is(err, test.is) {
				t.Errorf("%s: %s: %v", test.name, f, err)
			}
		}
	}

	nowhere := Options{Backend: NFT, Path: t.TempDir()}
	if _, err := Open(t.Context(), nowhere); !errors.Is(err, ErrNoIPTables) {
		t.Errorf("no iptables: %v", err)
	}
	if _, err := Open(t.Context(), Options{Backend: "ipfw"}); err == nil {
		t.Error("an unknown backend was opened")
	}
}

// An iptables that hangs is a script whose child keeps the pipes open, the worst there is: killing
// the script does not end the reading. Each call ends within the caller's deadline and waitDelay,
// and never says that all is well.
func TestASlowIPTablesIsGivenUp(t *testing.T) {
	const limit, slack = 300 * time.Millisecond, 10 * time.Second
	eachBackend(t, func(t *testing.T, k *Kernel, f Family) {
		apply(t, k, sample(f).Ruleset())
		have := read(t, k, f)
		// Larger than a pipe takes, so that writing it hangs as well.
		larger := sample(f)
		larger.Services = append(larger.Services, randomPrefixes(f, 2000, 1)...)
		plan := NewPlan(larger.Ruleset(), have)
		if len(plan.String()) < 128<<10 {
			t.Fatalf("the plan is only %d bytes", len(plan.String()))
		}

		dir := wrapped(t, k.Backend(), "return 0")
		slow, err := Open(t.Context(), Options{Backend: k.Backend(), Path: dir})
		if err != nil {
			t.Fatal(err)
		}
		for _, suffix := range []string{"", "-save", "-restore"} {
			// "&" alone gives its child another stdin
			script := "#!/bin/sh\nexec 3<&0\nsleep 15 <&3 &\nsleep 15\n"
			if err := os.WriteFile(filepath.Join(dir, command(k.Backend(), f, suffix)), []byte(script),
				0o755); err != nil {
				t.Fatal(err)
			}
		}
		var calls sync.WaitGroup
		for name, call := range map[string]func(context.Context) error{
			"Read":       func(ctx context.Context) error { return second(slow.Read(ctx, f)) },
			"ReadChains": func(ctx context.Context) error { return second(slow.ReadChains(ctx, have, []string{builtinOutput})) },
			"Apply":      func(ctx context.Context) error { return second(slow.Apply(ctx, plan)) },
			"Probe":      func(ctx context.Context) error { return slow.Probe(ctx, f) },
		} {
			calls.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), limit)
				defer cancel()
				start := time.Now()
				err := call(ctx)
				if !errors.Is(err, ErrCouldNotLook) || !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("%s: %v, want %v", name, err, ErrCouldNotLook)
				}
				if took := time.Since(start); took > limit+waitDelay+slack {
					t.Errorf("%s: held us for %v", name, took)
				}
			})
		}
		calls.Wait()
	})
}

func second[T any](_ T, err error) error { return err }

// An ip6tables that is missing must not stop IPv4.
func TestOneFamilyGoesOnWithoutTheOther(t *testing.T) {
	if !inNetns(t) {
		return
	}
	dir := wrapped(t, NFT, "return 0")
	if err := os.Remove(filepath.Join(dir, "ip6tables-nft")); err != nil {
		t.Fatal(err)
	}
	k, err := Open(t.Context(), Options{Backend: NFT, Path: dir})
	if err != nil {
		t.Fatal(err)
	}
	states := k.Families()
	if states[0].Why != nil || !errors.Is(states[1].Why, ErrNoIPTables) {
		t.Errorf("families: %+v", states)
	}
	apply(t, k, sample(IPv4).Ruleset())
	if _, err := k.Read(t.Context(), IPv6); !errors.Is(err, ErrUnusable) ||
		!errors.Is(err, ErrNoIPTables) {
		t.Errorf("reading the family that is not usable: %v", err)
	}
	if _, err := k.Cleanup(t.Context()); err != nil {
		t.Errorf("cleanup: %v", err)
	}
}

// A chain in table nat that only nft can read makes every whole save fail; ours can
// still be read and written.
func TestAnIncompatibleChainBesideOurs(t *testing.T) {
	if !inNetns(t) {
		return
	}
	k := open(t, NFT)
	for f, table := range map[Family]string{IPv4: "ip", IPv6: "ip6"} {
		want := sample(f).Ruleset()
		apply(t, k, want)
		sh(t, "nft", "add", "chain", table, "nat", "theirs")
		sh(t, "nft", "add", "rule", table, "nat", "theirs", "jhash", table, "saddr", "mod", "2", "0")
		if save := sh(t, command(NFT, f, "-save"), "-t", "nat"); !strings.Contains(save, "incompatible") {
			t.Fatalf("%s: the save is compatible:\n%s", f, save)
		}
		if d := Diff(want, read(t, k, f)); len(d) > 0 {
			t.Errorf("%s: equal rules differ: %v", f, d)
		}
		sh(t, command(NFT, f, ""), "-t", "nat", "-F", chainServiceCIDRs)
		apply(t, k, want)
	}
	if _, err := k.Cleanup(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, table := range []string{"ip", "ip6"} {
		if left := sh(t, "nft", "list", "table", table, "nat"); strings.Contains(left, "SERVICE_PROXY") ||
			!strings.Contains(left, "jhash") {
			t.Errorf("after cleanup:\n%s", left)
		}
	}
}

// Rules of ours in the backend that is not used are removed, others' there never, and it is
// not made to be there.
func TestTheOtherBackend(t *testing.T) {
	for _, backends := range [][2]string{{NFT, Legacy}, {Legacy, NFT}} {
		t.Run(backends[0], func(t *testing.T) {
			if os.Getenv("IPTABLES_TEST_NETNS") != "" && os.Getenv("IPTABLES_TEST_NETNS") != t.Name() ||
				!inNetns(t) {
				return
			}
			used, other := open(t, backends[0]), backends[1]
			if said, err := used.CleanOtherBackend(t.Context()); err != nil || len(said) > 0 {
				t.Fatalf("nothing there: %q %v", said, err)
			}
			if has, err := hasLegacyTable(IPv4, "nat", os.ReadFile); err != nil || backends[0] == NFT && has {
				t.Fatalf("looking made the legacy table: %v", err)
			}
			old := open(t, other)
			for _, f := range families {
				restoreText(t, other, f, foreignSaves(t, f)["istio"])
				apply(t, old, sample(f).Ruleset())
				apply(t, used, sample(f).Ruleset())
			}
			before := others(t, other, IPv4) + others(t, other, IPv6)
			found, err := used.Others(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if len(found) != 4 || !slices.ContainsFunc(found, func(o OtherChain) bool {
				return o.Backend == other && o.Family == "ip6" && o.Chain == "OUTPUT" && o.Rules == 1
			}) {
				t.Errorf("others: %v", found)
			}
			said, err := used.CleanOtherBackend(t.Context())
			if err != nil || len(said) == 0 {
				t.Fatalf("%q %v", said, err)
			}
			if now := others(t, other, IPv4) + others(t, other, IPv6); now != before {
				t.Errorf("foreign rules were\n%s\nand are\n%s", before, now)
			}
			for _, f := range families {
				if left := read(t, old, f).Ours(); !left.Empty() {
					t.Errorf("left in %s: %s", other, left)
				}
				if d := Diff(sample(f).Ruleset(), read(t, used, f)); len(d) > 0 {
					t.Errorf("in the backend used: %v", d)
				}
			}
		})
	}
}

// The agent's user may not read which legacy tables there are. What is ours there is found all the
// same, or it is said that nobody looked; and no look makes a table, unless its module is loaded.
func TestTheOtherBackendAsAnOrdinaryUser(t *testing.T) {
	for _, test := range []struct {
		name   string
		ours   bool
		groups []uint32
	}{
		{"no-table", false, nil},
		{"no-table-group-root", false, []uint32{0}},
		{"ours", true, nil},
		{"ours-group-root", true, []uint32{0}}, // as service-proxy-interception.service
	} {
		t.Run(test.name, func(t *testing.T) {
			if os.Getenv("IPTABLES_TEST_NETNS") != "" && os.Getenv("IPTABLES_TEST_NETNS") != t.Name() ||
				!inNetns(t) {
				return
			}
			if root := os.Geteuid() == 0; root && test.ours {
				for _, f := range families {
					restoreText(t, Legacy, f, foreignSaves(t, f)["istio"])
					apply(t, open(t, Legacy), sample(f).Ruleset())
				}
			}
			loaded, byModules := legacyByModules(IPv4, "nat", modules(t))
			if !asOrdinaryUser(t, test.groups...) { // root, after the copy has ended
				for _, f := range families {
					if has, err := hasLegacyTable(f, "nat", os.ReadFile); err != nil || has != test.ours && !loaded {
						t.Errorf("%s: a legacy table: %v %v, want %v", f, has, err, test.ours)
					}
				}
				return
			}
			// the host's is root's; tmpfiles.d mends that on a VM
			os.Setenv("XTABLES_LOCKFILE", t.TempDir()+"/lock")
			k := open(t, NFT)
			mayRead := byModules || len(test.groups) > 0
			others, err := k.Others(t.Context())
			if looked := err == nil; looked != mayRead || !looked && !errors.Is(err, ErrCouldNotLook) ||
				looked && (len(others) > 0) != test.ours {
				t.Errorf("others: %v %v", others, err)
			}
			removed, err := k.Cleanup(t.Context())
			if looked := err == nil; looked != mayRead || !looked && !errors.Is(err, ErrCouldNotLook) ||
				looked && (len(removed) > 0) != test.ours {
				t.Errorf("cleanup: %q %v", removed, err)
			}
			if !mayRead {
				t.Log(err)
				return
			}
			for _, f := range families {
				if test.ours && !read(t, open(t, Legacy), f).Ours().Empty() {
					t.Errorf("%s: left after cleanup", f)
				}
			}
		})
	}
}

// modules is /proc/modules; a kernel without modules has none.
func modules(t *testing.T) []byte {
	t.Helper()
	text, err := os.ReadFile("/proc/modules")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return text
}

func TestOthersAtOurHooks(t *testing.T) {
	if !inNetns(t) {
		return
	}
	k := open(t, NFT)
	apply(t, k, sample(IPv4).Ruleset())
	for _, c := range []string{
		"add table inet fw", "add chain inet fw early { type nat hook output priority -110 ; }", "add chain inet fw late { type nat hook output priority -90 ; }",
		"add chain inet fw equal { type nat hook prerouting priority -100 ; }", "add chain inet fw filter { type filter hook output priority -110 ; }",
	} {
		sh(t, "nft", c)
	}
	found, err := k.Others(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := []OtherChain{
		{Backend: NFT, Family: "inet", Table: "fw", Chain: "early", Hook: Output, Priority: -110},
		{Backend: NFT, Family: "inet", Table: "fw", Chain: "equal", Hook: Prerouting, Priority: -100},
	}
	slices.SortFunc(found, func(a, b OtherChain) int { return strings.Compare(a.Chain, b.Chain) })
	if !slices.Equal(found, want) {
		t.Errorf("got %v", found)
	}
}
