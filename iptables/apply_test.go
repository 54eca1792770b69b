package iptables

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/service-proxy-agent/service-proxy-agent/iptables/iptablestest"
)

// write is what another program does to a table.
func write(t testing.TB, m *iptablestest.Machine, f Family, lines ...string) {
	t.Helper()
	if err := m.NAT(programOf(m.Backend, f)).Restore("*nat\n"+strings.Join(lines, "\n")+"\nCOMMIT\n", nil); err != nil {
		t.Fatal(err)
	}
}

// A plan that is overtaken, because somebody wrote between the read and the restore, is made anew
// and taken.
func TestApplyMakesAPlanThatIsOvertakenAnew(t *testing.T) {
	for _, test := range []struct {
		name     string
		before   []string // the table: what another program left
		overtake []string // what it does right before our n-th restore
		attempts int
		fails    bool
	}{
		{"our jump is taken out", []string{":SERVICE_PROXY_OUTPUT - [0:0]", "-A OUTPUT -j SERVICE_PROXY_OUTPUT"}, []string{"-D OUTPUT -j SERVICE_PROXY_OUTPUT"}, 2, false},
		{"a chain left over is held by a rule of another's", []string{":SERVICE_PROXY_B4_0A000000_16 - [0:0]", ":THEIRS - [0:0]"},
			[]string{"-A THEIRS -j SERVICE_PROXY_B4_0A000000_16"}, 2, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			eachInMemory(t, func(t *testing.T, m *iptablestest.Machine, f Family) {
				if test.before != nil {
					write(t, m, f, test.before...)
				}
				k := openInMemory(t, m)
				have, err := k.Read(t.Context(), f)
				if err != nil {
					t.Fatal(err)
				}
				n := restores(m, f, func(n int, _ string) (string, int) {
					if n == 1 && test.overtake != nil {
						write(t, m, f, test.overtake...)
					}
					return "", 0
				})
				want := sample(f).Ruleset()
				result, err := k.Apply(t.Context(), NewPlan(want, have))
				if err != nil || len(result.Drift) > 0 || result.Attempts != test.attempts || *n != test.attempts {
					t.Fatalf("%v, %d attempts, %d restores, drift %v", err, result.Attempts, *n, result.Drift)
				}
				if now, err := k.Read(t.Context(), f); err != nil || len(Diff(want, now)) > 0 {
					t.Errorf("%v, drift %v", err, Diff(want, now))
				}
			})
		})
	}
}

// Who is overtaken each time gives up after the third, and nothing is written.
func TestApplyGivesUp(t *testing.T) {
	eachInMemory(t, func(t *testing.T, m *iptablestest.Machine, f Family) {
		write(t, m, f, ":SERVICE_PROXY_OUTPUT - [0:0]", "-A OUTPUT -j SERVICE_PROXY_OUTPUT")
		k := openInMemory(t, m)
		have, err := k.Read(t.Context(), f)
		if err != nil {
			t.Fatal(err)
		}
		jumps := []string{"-j SERVICE_PROXY_OUTPUT", "-p tcp -g SERVICE_PROXY_OUTPUT"}
		n := restores(m, f, func(n int, _ string) (string, int) { // the jump is another one each time
			write(t, m, f, "-D OUTPUT "+jumps[(n+1)%2], "-A OUTPUT "+jumps[n%2])
			return "", 0
		})
		var refused *RefusedError
		result, err := k.Apply(t.Context(), NewPlan(sample(f).Ruleset(), have))
		if !errors.As(err, &refused) || !strings.HasPrefix(refused.Rule, "-D OUTPUT ") || result.Attempts != 3 || *n != 3 {
			t.Errorf("%v, %d attempts, %d restores", err, result.Attempts, *n)
		}
		if left := holds(m, m.Backend, f); left.Len() != 1 {
			t.Errorf("there is\n%s", left)
		}
	})
}

// A rule that the kernel does not take is asked for once on nft, which names it; legacy names only
// COMMIT.
func TestApplyOfARefusedRule(t *testing.T) {
	eachInMemory(t, func(t *testing.T, m *iptablestest.Machine, f Family) {
		m.Refuse = func(rule string) bool { return strings.Contains(rule, "--uid-owner 101") }
		n := restores(m, f, func(int, string) (string, int) { return "", 0 })
		want, rule := 1, "-A SERVICE_PROXY_DNS "+uidOf101
		if m.Backend == Legacy {
			want, rule = 3, "COMMIT"
		}
		var refused *RefusedError
		if _, err := openInMemory(t, m).Apply(t.Context(), NewPlan(sample(f).Ruleset(), Table{family: f})); !errors.As(err, &refused) || refused.Rule != rule || *n != want {
			t.Errorf("%v, %d restores", err, *n)
		}
		if left := holds(m, m.Backend, f); !left.Empty() {
			t.Errorf("there is\n%s", left)
		}
	})
}

// What somebody undoes at the same moment is told by the read-back.
func TestApplyReadsBack(t *testing.T) {
	eachInMemory(t, func(t *testing.T, m *iptablestest.Machine, f Family) {
		k := openInMemory(t, m)
		written := false
		m.Before = func(program string, args []string, stdin string) (string, int) {
			if written && (strings.HasSuffix(program, "-save") || slices.Contains(args, builtinOutput)) {
				written = false
				write(t, m, f, "-D OUTPUT "+jumpOutput)
			}
			written = written || stdin != ""
			return "", 0
		}
		result, err := k.Apply(t.Context(), NewPlan(sample(f).Ruleset(), Table{family: f}))
		if want := []Drift{{JumpRemoved, builtinOutput, jumpOutput}}; err != nil || !slices.Equal(result.Drift, want) {
			t.Errorf("%v, drift %v, want %v", err, result.Drift, want)
		}
	})
}
