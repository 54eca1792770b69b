//go:build kernel

package iptables

import (
	"os"
	"strings"
	"testing"
)

// TestReadOnlyLeavesNoTrace: whoever only looks makes no table, and sees what is there.
func TestReadOnlyLeavesNoTrace(t *testing.T) {
	if !inNetns(t) {
		return
	}
	names := func() string {
		text, err := os.ReadFile("/proc/thread-self/net/ip_tables_names")
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(text))
	}
	look := func(backend string) Table {
		t.Helper()
		k, err := Open(t.Context(), Options{Backend: backend, ReadOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		have, err := k.Read(t.Context(), IPv4)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := k.Others(t.Context()); err != nil {
			t.Error(err)
		}
		return have
	}
	for _, backend := range []string{NFT, Legacy} {
		if have := look(backend); have.Family() != IPv4 || !have.Ours().Empty() {
			t.Errorf("%s: %v", backend, have.Ours())
		}
		if have := names(); have != "" {
			t.Errorf("%s: somebody made the legacy tables %q", backend, have)
		}
		if have := sh(t, "nft", "list", "ruleset"); strings.TrimSpace(have) != "" {
			t.Errorf("%s: somebody made %s", backend, have)
		}
	}
	sh(t, "iptables-legacy", "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "--dport", "81", "-j", "ACCEPT")
	if have := look(Legacy).Rules("OUTPUT"); len(have) != 1 {
		t.Errorf("rules that are there: %q", have)
	}
}
