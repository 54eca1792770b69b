package iptables

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/iptables/iptablestest"
)

// install puts rulesets into a machine's tables, of both families, as another run of the agent
// would have.
func install(t testing.TB, m *iptablestest.Machine, backend, name string) {
	t.Helper()
	for _, f := range families {
		i := interceptions()[name]
		i.Family = f
		if err := m.NAT(programOf(backend, f)).Restore(NewPlan(i.Ruleset(), Table{family: f}).String(),
			nil); err != nil {
			t.Fatal(err)
		}
	}
}

func otherBackendOf(backend string) string {
	if backend == NFT {
		return Legacy
	}
	return NFT
}

// Everything of ours goes, in both families and both backends, and is named; nothing of others'
// does.
func TestCleanup(t *testing.T) {
	for _, backend := range []string{NFT, Legacy} {
		m := &iptablestest.Machine{Backend: backend}
		for _, b := range []string{NFT, Legacy} {
			for _, f := range families {
				theirs := "*nat\n:FOREIGN - [0:0]\n:SERVICE_PROXY_OUTPUT2 - [0:0]\n-A FOREIGN -j RETURN\n-A OUTPUT -j FOREIGN\nCOMMIT\n"
				if err := m.NAT(programOf(b, f)).Restore(theirs, nil); err != nil {
					t.Fatal(err)
				}
			}
		}
		before := saves(m)
		install(t, m, NFT, "dns-only")
		install(t, m, Legacy, "dns-only")
		removed, err := openInMemory(t, m).Cleanup(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var want []string
		for _, b := range []string{backend, otherBackendOf(backend)} {
			for _, f := range families {
				for _, what := range []string{"jump -A OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT",
					"jump -A OUTPUT -p udp -m udp --dport 53 -j SERVICE_PROXY_DNS",
					"chain SERVICE_PROXY_DNS with 3 rules", "chain SERVICE_PROXY_OUTPUT with 2 rules"} {
					want = append(want, fmt.Sprintf("%s (%s) %s", f, b, what))
				}
			}
		}
		if !slices.Equal(removed, want) {
			t.Errorf("%s: removed\n%s\nwant\n%s", backend, strings.Join(removed, "\n"),
				strings.Join(want, "\n"))
		}
		if after := saves(m); after != before {
			t.Errorf("%s: left\n%s\nof\n%s", backend, after, before)
		}
		if removed, err := openInMemory(t, m).Cleanup(t.Context()); err != nil || len(removed) > 0 {
			t.Errorf("%s: once more: %q %v", backend, removed, err)
		}
	}
}

func saves(m *iptablestest.Machine) (all string) {
	for _, b := range []string{NFT, Legacy} {
		for _, f := range families {
			all += programOf(b, f) + "\n" + m.NAT(programOf(b, f)).Save()
		}
	}
	return all
}

// A backend that nobody uses is not made to be there by looking for what is ours in it.
func TestCleanupMakesNoTable(t *testing.T) {
	m := &iptablestest.Machine{Backend: NFT}
	install(t, m, NFT, "outbound")
	if _, err := openInMemory(t, m).Cleanup(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if m.NAT(programOf(Legacy, f)).Used() {
			t.Errorf("%s: there is a legacy table now", f)
		}
	}
}

// Whatever keeps the rules in, cleanup says so, and says of nothing that it was removed that is
// still there: whoever stops Envoy after it would cut the machine off.
func TestCleanupThatFailsSaysSo(t *testing.T) {
	for _, test := range []struct {
		name   string
		before func(m *iptablestest.Machine) func(program string, args []string, stdin string) (
			string, int)
		is   error  // nil: any
		says string // in the error
	}{
		// The words are those of iptables-nft-restore 1.8.9 when a chain is still led to, and of
		// legacy for anything.
		{"a restore that refuses, nft", fails("-restore", "iptables-restore v1.8.9 (nf_tables): \nline 2: CHAIN_DEL failed (Device or resource busy): chain SERVICE_PROXY_DNS\n", 4), nil, "CHAIN_DEL failed"},
		{"a restore that refuses, legacy", fails("-restore", "iptables-restore: line 9 failed\n", 1), nil, "line 9 failed"},
		// iptables-legacy-restore 1.8.9 under a held lock.
		{"a held lock", fails("-restore", "Another app is currently holding the xtables lock; still 1s 0us time ahead to have a chance to grab the lock...\nAnother app is currently holding the xtables lock. Stopped waiting after 5s.\n", 4), ErrLocked, ""},
		{"no right to write", fails("-restore", "iptables-restore v1.8.9 (nf_tables): Could not fetch rule set generation id: Permission denied (you must be root)\n", 4), ErrNotRoot, ""},
		{"no way to look", fails("-save", "iptables-save v1.8.9 (nf_tables): Could not fetch rule set generation id: Permission denied (you must be root)\n", 4), ErrNotRoot, ""},
		// Not of iptables: what a restore that is killed after its time leaves Kernel with (see
		// lostWrites).
		{"a restore without an end", lostWrites, ErrCouldNotLook, "no end"},
		{"somebody who puts the jump back each time", func(m *iptablestest.Machine) func(string, []string, string) (string, int) {
			return func(program string, _ []string, _ string) (string, int) {
				if n := m.NAT(program); strings.HasSuffix(program, "-save") &&
					!slices.Contains(n.Chains()["OUTPUT"], jumpOutput) {
					if err := n.Restore("*nat\n:SERVICE_PROXY_OUTPUT - [0:0]\n-A OUTPUT "+jumpOutput+"\nCOMMIT\n",
						nil); err != nil {
						t.Error(err)
					}
				}
				return "", 0
			}
		}, nil, `removed 3 times, and there is again "jump left over: -A OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT": stop what puts it there`},
	} {
		for _, backend := range []string{NFT, Legacy} {
			t.Run(test.name+"/"+backend, func(t *testing.T) {
				m := &iptablestest.Machine{Backend: backend}
				k := openInMemory(t, m)
				install(t, m, backend, "outbound")
				before, programs := test.before(m), 0
				m.Before = func(program string, args []string, stdin string) (string, int) {
					if programs++; programs > 100 {
						t.Fatal("it goes round without an end")
					}
					return before(program, args, stdin)
				}
				removed, err := k.Cleanup(t.Context())
				if err == nil || test.is != nil && !errors.Is(err, test.is) ||
					!strings.Contains(err.Error(), test.says) {
					t.Errorf("error %v, want one that is %v and says %q", err, test.is, test.says)
				}
				for _, f := range families {
					left := holds(m, backend, f)
					if left.Empty() {
						t.Fatalf("%s: nothing is left, so this tests nothing", f)
					}
					if err != nil && !strings.Contains(err.Error(), f.String()) {
						t.Errorf("%s is not named in %v", f, err)
					}
					for _, c := range left.Chains() {
						if strings.Contains(strings.Join(removed, "\n"), f.String()+" ("+backend+") chain "+c+" ") {
							t.Errorf("%s: %s is said to be removed and is there", f, c)
						}
					}
				}
			})
		}
	}
}

// fails is a program that ends with an error, for both families.
func fails(suffix, stderr string, exit int) func(*iptablestest.Machine) func(
	string, []string, string) (string, int) {
	return func(*iptablestest.Machine) func(string, []string, string) (string, int) {
		return func(program string, _ []string, _ string) (string, int) {
			if strings.HasSuffix(program, suffix) {
				return stderr, exit
			}
			return "", 0
		}
	}
}

// lostWrites is a restore that does nothing and does not end in its time.
func lostWrites(*iptablestest.Machine) func(string, []string, string) (string, int) {
	return func(program string, _ []string, _ string) (string, int) {
		if strings.HasSuffix(program, "-restore") {
			return noEnd, -1
		}
		return "", 0
	}
}

// What fails in one place does not stop the others: the other family, and the other backend.
func TestCleanupGoesOnAfterAnError(t *testing.T) {
	for _, bad := range []string{"iptables-nft", "ip6tables-nft", "iptables-legacy",
		"ip6tables-legacy"} {
		for _, backend := range []string{NFT, Legacy} {
			m := &iptablestest.Machine{Backend: backend}
			k := openInMemory(t, m)
			install(t, m, NFT, "outbound")
			install(t, m, Legacy, "outbound")
			m.Before = func(program string, _ []string, stdin string) (string, int) {
				if stdin != "" && m.NAT(program) == m.NAT(bad) {
					return "iptables-restore: line 9 failed\n", 1
				}
				return "", 0
			}
			removed, err := k.Cleanup(t.Context())
			if err == nil {
				t.Errorf("%s: no error though %s does nothing", backend, bad)
			}
			for _, b := range []string{NFT, Legacy} {
				for _, f := range families {
					failed := programOf(b, f) == bad
					if left := !holds(m, b, f).Empty(); left != failed {
						t.Errorf("%s, with a bad %s: left in %s %v", backend, bad, programOf(b, f), left)
					}
					if said := strings.Contains(strings.Join(removed, "\n"),
						fmt.Sprintf("%s (%s) chain", f, b)); said == failed {
						t.Errorf("%s, with a bad %s: %s said to be removed: %v", backend, bad, programOf(b, f), said)
					}
				}
			}
		}
	}
}

// A write that was done and whose end was not seen counts as done, once it was looked at.
func TestCleanupLooksAgainAfterALostWrite(t *testing.T) {
	eachInMemory(t, func(t *testing.T, m *iptablestest.Machine, f Family) {
		k := openInMemory(t, m)
		install(t, m, m.Backend, "outbound")
		m.Before = func(program string, _ []string, stdin string) (string, int) {
			if n := m.NAT(program); stdin != "" && n == m.NAT(programOf(m.Backend, f)) {
				if err := n.Restore(stdin, nil); err != nil {
					t.Error(err)
				}
				return noEnd, -1
			}
			return "", 0
		}
		removed, err := k.Cleanup(t.Context())
		if err != nil || !holds(m, m.Backend, f).Empty() ||
			!slices.ContainsFunc(removed, func(r string) bool { return strings.HasPrefix(r, f.String()) }) {
			t.Errorf("%v, left %s, removed %q", err, holds(m, m.Backend, f), removed)
		}
	})
}

// A chain that another program's rule leads to cannot be deleted. It is emptied, that is said once,
// and no error.
func TestCleanupOfAChainThatOthersHold(t *testing.T) {
	eachInMemory(t, func(t *testing.T, m *iptablestest.Machine, f Family) {
		install(t, m, m.Backend, "outbound")
		n := m.NAT(programOf(m.Backend, f))
		// of an earlier cleanup
		empty := ":SERVICE_PROXY_B4_0A000000_3 - [0:0]\n-A FOREIGN -j SERVICE_PROXY_B4_0A000000_3\n"
		if err := n.Restore("*nat\n:FOREIGN - [0:0]\n-A FOREIGN -j SERVICE_PROXY_REDIRECT\n"+empty+
			"COMMIT\n", nil); err != nil {
			t.Fatal(err)
		}
		k := openInMemory(t, m)
		removed, err := k.Cleanup(t.Context())
		want := fmt.Sprintf(
			"%s (%s) chain SERVICE_PROXY_REDIRECT with 1 rules, which stays empty because of another program's rule -A FOREIGN -j SERVICE_PROXY_REDIRECT", f, m.Backend)
		if err != nil || !slices.Contains(removed, want) ||
			strings.Contains(strings.Join(removed, "\n"), "SERVICE_PROXY_B4_") {
			t.Errorf("%v, removed %q, want %q and nothing of what was empty", err, removed, want)
		}
		if left := holds(m, m.Backend, f); !slices.Equal(
			left.Chains(), []string{"SERVICE_PROXY_B4_0A000000_3", chainRedirect}) || left.Len() != 0 {
			t.Errorf("left %s", left)
		}
		if removed, err := k.Cleanup(t.Context()); err != nil || len(removed) > 0 {
			t.Errorf("once more: %q %v", removed, err)
		}
	})
}

// A family without programs or without a table has nothing of ours; one that could not be opened
// for another reason may.
func TestCleanupOfAFamilyThatIsNotUsable(t *testing.T) {
	for _, test := range []struct {
		name, stderr string
		exit         int
		err          error // of Cleanup
	}{
		// ip6tables 1.8.7, as package errors has it.
		{"no table", "ip6tables v1.8.7 (legacy): can't initialize ip6tables table `nat': Table does not exist (do you need to insmod?)\n", 3, nil},
		// That tells of the moment in which the family was tried, and not of the family.
		{"a held lock", "Another app is currently holding the xtables lock. Stopped waiting after 5s.\n", 4, nil},
	} {
		m := &iptablestest.Machine{
			Backend: Legacy, Before: func(program string, args []string, _ string) (string, int) {
				if strings.HasPrefix(program, "/usr/sbin/ip6tables") && slices.Contains(args, "-S") {
					return test.stderr, test.exit
				}
				return "", 0
			}}
		install(t, m, Legacy, "outbound")
		removed, err := openInMemory(t, m).Cleanup(t.Context())
		if !errors.Is(err, test.err) || !holds(m, Legacy, IPv4).Empty() || len(removed) == 0 {
			t.Errorf("%s: %v, removed %q, want error %v", test.name, err, removed, test.err)
		}
	}
}

// The programs of a family may be gone and what they made on nft may not: that is no clean machine.
func TestCleanupWithoutPrograms(t *testing.T) {
	for _, installed := range []bool{false, true} {
		m := &iptablestest.Machine{Backend: NFT}
		if installed {
			install(t, m, NFT, "outbound")
		}
		machine := onMachine(m)
		machine.lookPath = func(_, name string) (string, error) {
			if strings.HasPrefix(name, "ip6tables") {
				return "", fs.ErrNotExist
			}
			return name, nil
		}
		k, err := openOn(t.Context(), machine, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := k.Cleanup(t.Context()); (err != nil) != installed ||
			installed && !errors.Is(err, ErrNoIPTables) {
			t.Errorf("rules of IPv6 there %v: %v", installed, err)
		}
		if !holds(m, NFT, IPv4).Empty() {
			t.Error("IPv4's rules are left")
		}
	}
}

// What is ours in the other backend stays without its programs, and that is said.
func TestCleanupWithoutTheOtherBackendsPrograms(t *testing.T) {
	for _, backend := range []string{NFT, Legacy} {
		m := &iptablestest.Machine{Backend: backend}
		install(t, m, otherBackendOf(backend), "outbound")
		machine := onMachine(m)
		machine.lookPath = func(_, name string) (string, error) {
			if strings.Contains(name, otherBackendOf(backend)) {
				return "", fs.ErrNotExist
			}
			return name, nil
		}
		k, err := openOn(t.Context(), machine, Options{})
		if err != nil {
			t.Fatal(err)
		}
		for name, clean := range map[string]func(context.Context) ([]string, error){
			"Cleanup": k.Cleanup, "CleanOtherBackend": k.CleanOtherBackend} {
			if removed, err := clean(t.Context()); !errors.Is(err, ErrNoIPTables) || len(removed) > 0 {
				t.Errorf("%s: %s: removed %q, %v", backend, name, removed, err)
			}
		}
	}
}

// What is ours in a backend that cannot be looked into may still be there.
func TestCleanupThatCannotLookIntoTheOtherBackend(t *testing.T) {
	for _, backend := range []string{NFT, Legacy} {
		m := &iptablestest.Machine{Backend: backend}
		install(t, m, backend, "outbound")
		machine := onMachine(m)
		if backend == NFT {
			machine.hasLegacy = func(Family) (bool, error) { return false, ErrCouldNotLook }
		} else {
			machine.natChains = func(Family) ([]string, error) { return nil, ErrCouldNotLook }
		}
		k, err := openOn(t.Context(), machine, Options{})
		if err != nil {
			t.Fatal(err)
		}
		removed, err := k.Cleanup(t.Context())
		if !errors.Is(err, ErrCouldNotLook) || len(removed) == 0 || !holds(m, backend, IPv4).Empty() ||
			!holds(m, backend, IPv6).Empty() {
			t.Errorf("%s: removed %q, %v", backend, removed, err)
		}
	}
}

// Only what is in the other backend goes where only that is asked for.
func TestCleanOtherBackend(t *testing.T) {
	for _, backend := range []string{NFT, Legacy} {
		m := &iptablestest.Machine{Backend: backend}
		install(t, m, NFT, "outbound")
		install(t, m, Legacy, "outbound")
		removed, err := openInMemory(t, m).CleanOtherBackend(t.Context())
		if err != nil || len(removed) == 0 {
			t.Errorf("%s: removed %q, %v", backend, removed, err)
		}
		for _, f := range families {
			if holds(m, backend, f).Empty() || !holds(m, otherBackendOf(backend), f).Empty() {
				t.Errorf("%s %s: left %v in it and %v in the other", backend, f, holds(m, backend, f),
					holds(m, otherBackendOf(backend), f))
			}
		}
	}
}

// Whether there is a legacy table is asked of /proc, and never of the kernel, which would make one.
func TestHasLegacyTable(t *testing.T) {
	const names4, names6, modules = "/proc/thread-self/net/ip_tables_names",
		"/proc/thread-self/net/ip6_tables_names", "/proc/modules"
	for _, test := range []struct {
		name   string
		files  map[string]string // "-": may not be read
		has4   bool
		has6   bool
		looked bool // at both
	}{
		{"ip_tables is not loaded", nil, false, false, true},
		{"no nat table", map[string]string{names4: "filter\nmangle\n", names6: "raw\n"}, false, false, true},
		{"IPv4's", map[string]string{names4: "filter\nnat\n", names6: "filter\n"}, true, false, true},
		{"IPv6's", map[string]string{names4: "natural\n", names6: "nat\n"}, false, true, true},
		{"may not read, a kernel without modules", map[string]string{names4: "-", names6: "-"}, false, false, false},
		{"may not read, built in", map[string]string{names4: "-", names6: "-", modules: "veth 1 0 - Live 0x0\n"}, false, false, false},
		{"may not read, IPv4's loaded", map[string]string{names4: "-", names6: "-", modules: "ip_tables 1 0 - Live 0x0\niptable_nat 1 0 - Live 0x0\nip6_tables 1 0 - Live 0x0\n"}, true, false, true},
	} {
		read := func(name string) ([]byte, error) {
			switch text, ok := test.files[name]; {
			case !ok:
				return nil, fs.ErrNotExist
			case text == "-":
				return nil, fs.ErrPermission
			default:
				return []byte(text), nil
			}
		}
		for f, want := range map[Family]bool{IPv4: test.has4, IPv6: test.has6} {
			has, err := hasLegacyTable(f, "nat", read)
			if has != want || (err == nil) != test.looked ||
				err != nil && (!errors.Is(err, ErrCouldNotLook) || !errors.Is(err, fs.ErrPermission)) {
				t.Errorf("%s: %s: %v %v, want %v", test.name, f, has, err, want)
			}
		}
	}
}

// A kernel without nf_tables has no table of it; another error is not an answer.
func TestHasNFTTable(t *testing.T) {
	for _, test := range []struct {
		chains []string
		err    error
		has    bool
		looked bool
	}{
		{[]string{"OUTPUT"}, nil, true, true},
		{nil, nil, false, true},
		{nil, fmt.Errorf("list: %w", unix.EOPNOTSUPP), false, true},
		{nil, fmt.Errorf("list: %w", unix.EPROTONOSUPPORT), false, true},
		{nil, fmt.Errorf("list: %w", unix.EINVAL), false, true},
		{nil, fmt.Errorf("list: %w", unix.EPERM), false, false},
		{nil, ErrCouldNotLook, false, false},
	} {
		k := &Kernel{machine: machine{natChains: func(Family) ([]string, error) {
			return test.chains, test.err
		}}}
		if has, err := k.hasNFTTable(IPv4); has != test.has || (err == nil) != test.looked {
			t.Errorf("%q %v: %v %v", test.chains, test.err, has, err)
		}
	}
}

func TestLegacyByModules(t *testing.T) {
	for _, test := range []struct {
		name, modules string
		may, ok       bool
	}{
		{"a kernel without modules", "", false, false},
		{"not loaded", "ip_tables 36864 0 - Live 0x0\nx_tables 65536 1 ip_tables, Live 0x0\n", false, true},
		{"loaded", "x_tables 65536 2 ip_tables,iptable_nat, Live 0x0\nip_tables 36864 1 iptable_nat, Live 0x0\niptable_nat 16384 1 - Live 0x0\n", true, true},
		{"loaded upon what is built in", "iptable_nat 16384 1 - Live 0x0\n", true, true},
		{"the other family's, and names in other columns", "ip6table_nat 16384 1 - Live 0x0\nx_tables 65536 2 ip_tables,iptable_nat, Live 0x0\n", false, false},
	} {
		if may, ok := legacyByModules(IPv4, "nat", []byte(test.modules)); may != test.may || ok != test.ok {
			t.Errorf("%s: may be there %v, said %v", test.name, may, ok)
		}
	}
	if may, ok := legacyByModules(
		IPv6, "nat", []byte("ip6_tables 36864 0 - Live 0x0\nip6table_nat 16384 1 - Live 0x0\n")); !may || !ok {
		t.Errorf("IPv6: may be there %v, said %v", may, ok)
	}
}
