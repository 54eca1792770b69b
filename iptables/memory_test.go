package iptables

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/iptables/iptablestest"
)

// inMemory is a Kernel's machine of which nothing is real.
func inMemory(m *iptablestest.Machine) machine {
	nat := func(f Family, backend string) *iptablestest.NAT { return m.NAT(programOf(backend, f)) }
	return machine{
		lookPath: func(_, name string) (string, error) { return "/usr/sbin/" + name, nil },
		run: func(ctx context.Context, _ time.Duration, _ *ownPIDs, stdin []byte, stdout *bytes.Buffer, name string, args ...string) error {
			if err := ctx.Err(); err != nil {
				return fmt.Errorf("%s: %w: %w", name, ErrCouldNotLook, err)
			}
			out, stderr, exit := m.Run(name, args, string(stdin))
			stdout.WriteString(out)
			if exit == 0 {
				return nil
			}
			if stderr == noEnd {
				return fmt.Errorf("%s: %w: no end", name, ErrCouldNotLook)
			}
			return classify(strings.Join(append([]string{filepath.Base(name)}, args...), " "), exit, stderr)
		},
		natChains: func(f Family) ([]string, error) { return slices.Collect(maps.Keys(nat(f, NFT).Chains())), nil },
		hasLegacy: func(f Family) (bool, error) { return nat(f, Legacy).Used(), nil },
	}
}

// noEnd is what a program of a Machine says to stand for one that does not end in its time.
const noEnd = "no end"

// programOf is the name of a family's program for a backend, e.g. "ip6tables-legacy".
func programOf(backend string, f Family) string {
	if f == IPv6 {
		return "ip6tables-" + backend
	}
	return "iptables-" + backend
}

// openInMemory opens the backend that the machine says.
func openInMemory(t testing.TB, m *iptablestest.Machine) *Kernel {
	t.Helper()
	k, err := openOn(t.Context(), inMemory(m), Options{})
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// eachInMemory runs a test for both backends and both families.
func eachInMemory(t *testing.T, test func(t *testing.T, m *iptablestest.Machine, f Family)) {
	for _, backend := range []string{NFT, Legacy} {
		for _, f := range families {
			t.Run(backend+"/"+f.String(), func(t *testing.T) {
				test(t, &iptablestest.Machine{Backend: backend}, f)
			})
		}
	}
}

// holds is what of ours a machine's table holds.
func holds(m *iptablestest.Machine, backend string, f Family) Ruleset {
	return Table{family: f, chains: m.NAT(programOf(backend, f)).Chains()}.Ours()
}
