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
	if err := m.NAT(programOf(m.Backend, f)).Restore("*nat\n"+strings.Join(lines, "\n")+"\nCOMMIT\n",
		nil); err != nil {
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
				if err != nil || len(result.Drift) > 0 || result.Attempts != test.attempts ||
					*n != test.attempts {
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
		if !errors.As(err, &refused) || !strings.HasPrefix(refused.Rule, "-D OUTPUT ") ||
			result.Attempts != 3 || *n != 3 {
			t.Errorf("%v, %d attempts, %d restores", err, result.Attempts, *n)
		}
		if left := holds(m, m.Backend, f); left.Len() != 1 {
			t.Errorf("there is\n%s", left)
		}
	})
}

// A rule that the kernel does not take is asked for once on nft, which names it; legacy names only
// COMMIT, and would if somebody else were faster. Then each kind of rule is asked about, and what
// is left is installed by one restore.
func TestApplyOfARefusedRule(t *testing.T) {
	eachInMemory(t, func(t *testing.T, m *iptablestest.Machine, f Family) {
		m.Refuse = func(rule string) bool { return strings.Contains(rule, "--uid-owner 101") }
		wholes := 0
		restores(m, f, func(_ int, payload string) (string, int) {
			if !strings.Contains(payload, chainProbe) || strings.Contains(payload, chainOutput) {
				wholes++
			}
			return "", 0
		})
		rule := "-A SERVICE_PROXY_DNS " + uidOf101
		k := openInMemory(t, m)
		want, named := 1, rule
		if m.Backend == Legacy {
			want, named = 3, "COMMIT"
		}
		tool, err := k.tool(t.Context(), f)
		if err != nil {
			t.Fatal(err)
		}
		var refused *RefusedError
		plan := NewPlan(sample(f).Ruleset(), Table{family: f})
		if _, isRefused, err := k.apply(t.Context(), tool, plan); !errors.As(err, &refused) ||
			!isRefused || refused.Rule != named || wholes != want {
			t.Errorf("%v, refused is %v, %d restores", err, isRefused, wholes)
		}
		if left := holds(m, m.Backend, f); !left.Empty() {
			t.Errorf("there is\n%s", left)
		}
		wholes = 0
		result, err := k.Apply(t.Context(), plan)
		if err != nil || wholes != want+1 || result.Attempts != want+1 || len(result.Left) != 1 ||
			result.Left[0].Rule != rule {
			t.Errorf("%v, %d restores, %+v", err, wholes, result)
		}
	})
}

// A rule that legacy did not take because another program was faster just then is not left out.
func TestARuleIsAskedAboutAgain(t *testing.T) {
	for _, faster := range []int{0, 1, attempts + 1} {
		m := &iptablestest.Machine{Backend: Legacy}
		m.Refuse = func(rule string) bool { return strings.Contains(rule, "--uid-owner 101") }
		asked := 0
		restores(m, IPv4, func(_ int, payload string) (string, int) {
			if strings.Contains(payload, "-A "+chainProbe+" -m owner --uid-owner 999 ") {
				if asked++; asked <= faster {
					return "iptables-restore: line 4 failed\n", 1
				}
			}
			return "", 0
		})
		plan := NewPlan(sample(IPv4).Ruleset(), Table{family: IPv4})
		result, err := openInMemory(t, m).Apply(t.Context(), plan)
		left := []string{"-A SERVICE_PROXY_DNS " + uidOf101}
		var got []string
		for _, l := range result.Left {
			got = append(got, l.Rule)
		}
		if err != nil || asked == 0 || !slices.Equal(got, left) {
			t.Errorf("faster %d times: %v, asked %d times, left out %q", faster, err, asked, got)
		}
	}
}

// Where another program is always faster, nothing is known of the rule, and nothing is left out.
func TestARuleThatCannotBeAskedAbout(t *testing.T) {
	m := &iptablestest.Machine{Backend: Legacy}
	m.Refuse = func(rule string) bool { return strings.Contains(rule, "--uid-owner 101") }
	alone := 0
	m.Before = func(_ string, args []string, stdin string) (string, int) {
		switch {
		case strings.Contains(stdin, "-A "+chainProbe+" -m owner --uid-owner 999 "):
			return "iptables-restore: line 4 failed\n", 1
		case slices.Contains(args, "-A"):
			alone++
			return "iptables: Resource temporarily unavailable.\n", 4
		}
		return "", 0
	}
	plan := NewPlan(sample(IPv4).Ruleset(), Table{family: IPv4})
	result, err := openInMemory(t, m).Apply(t.Context(), plan)
	if !errors.Is(err, ErrLocked) || len(result.Left) != 0 || alone != attempts {
		t.Errorf("%v, left out %v, asked %d times", err, result.Left, alone)
	}
	if there := holds(m, Legacy, IPv4); there.Intercepting() {
		t.Errorf("there is\n%s", there)
	}
}

// A refused rule and somebody who was faster, at once: what is left is installed all the same.
func TestApplyOfARefusedRuleThatIsOvertaken(t *testing.T) {
	eachInMemory(t, func(t *testing.T, m *iptablestest.Machine, f Family) {
		write(t, m, f, ":SERVICE_PROXY_OUTPUT - [0:0]", "-A OUTPUT -j SERVICE_PROXY_OUTPUT")
		k := openInMemory(t, m)
		have, err := k.Read(t.Context(), f)
		if err != nil {
			t.Fatal(err)
		}
		m.Refuse = func(rule string) bool { return strings.Contains(rule, "--uid-owner 101") }
		restores(m, f, func(n int, _ string) (string, int) {
			if n == 1 {
				write(t, m, f, "-D OUTPUT -j SERVICE_PROXY_OUTPUT")
			}
			return "", 0
		})
		attempts := 2
		if m.Backend == Legacy {
			attempts = 4
		}
		result, err := k.Apply(t.Context(), NewPlan(sample(f).Ruleset(), have))
		if err != nil || result.Attempts != attempts || len(result.Left) != 1 ||
			len(result.Drift) > 0 {
			t.Errorf("%v, %d attempts, left out %v, drift %v", err, result.Attempts, result.Left,
				result.Drift)
		}
		if now, err := k.Read(t.Context(), f); err != nil || len(Diff(result.Ruleset, now)) > 0 {
			t.Errorf("%v, drift %v", err, Diff(result.Ruleset, now))
		}
	})
}

// When it cannot be read again whether somebody was faster, no rule is asked about:
// that is the next try's.
func TestApplyOfARefusedRuleThatCannotReadAgain(t *testing.T) {
	m := &iptablestest.Machine{Backend: Legacy}
	k := openInMemory(t, m)
	m.Refuse = func(rule string) bool { return strings.Contains(rule, "--uid-owner 101") }
	var restored []string
	m.Before = func(program string, _ []string, stdin string) (string, int) {
		if strings.HasSuffix(program, "-save") {
			return "Another app is currently holding the xtables lock. Stopped waiting after 5s.\n", 4
		}
		restored = append(restored, stdin)
		return "", 0
	}
	var refused *RefusedError
	_, err := k.Apply(t.Context(), NewPlan(sample(IPv4).Ruleset(), Table{family: IPv4}))
	if !errors.As(err, &refused) || !errors.Is(err, ErrLocked) || len(restored) != 1 {
		t.Errorf("%v, restored %q", err, restored)
	}
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
		if want := []Drift{{JumpRemoved, builtinOutput, jumpOutput}}; err != nil ||
			!slices.Equal(result.Drift, want) {
			t.Errorf("%v, drift %v, want %v", err, result.Drift, want)
		}
	})
}
