package iptables

import (
	"testing"

	"github.com/service-proxy-agent/service-proxy-agent/iptables/iptablestest"
)

// noEnd is what a program of a Machine says to stand for one that does not end in its time. What
// counts is its exit, -1.
const noEnd = "no end"

// openInMemory opens the backend that the machine says.
func openInMemory(t testing.TB, m *iptablestest.Machine) *Kernel {
	t.Helper()
	k, err := Open(t.Context(), Options{Machine: m})
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
