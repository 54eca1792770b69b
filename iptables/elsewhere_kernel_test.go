//go:build kernel

package iptables

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// tablesOf is what /proc names for legacy.
func legacyTables(t *testing.T) string {
	t.Helper()
	var all []string
	for _, file := range []string{"ip_tables_names", "ip6_tables_names"} {
		text, err := os.ReadFile("/proc/thread-self/net/" + file)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, string(text))
	}
	return strings.Join(all, "|")
}

// TestOtherBackend: what an agent and others left in the other backend is told by family, and to
// look makes no table.
func TestOtherBackend(t *testing.T) {
	for _, other := range []string{NFT, Legacy} {
		t.Run(other, func(t *testing.T) {
			if !inNetns(t) {
				return
			}
			used := NFT
			if other == NFT {
				used = Legacy
			}
			look := func() []Elsewhere {
				t.Helper()
				found, err := OtherBackend(t.Context(), used)
				if err != nil {
					t.Fatal(err)
				}
				return found
			}
			if other == Legacy {
				if had := legacyTables(t); strings.Contains(had, "nat") {
					t.Fatalf("tables %q before anybody made one", had)
				}
			}
			if found := look(); len(found) > 0 {
				t.Fatalf("where nothing is: %+v", found)
			}
			if other == Legacy {
				if made := legacyTables(t); strings.Contains(made, "nat") {
					t.Errorf("to look made %q", made)
				}
			} else if out := sh(t, "nft", "list", "tables"); out != "" {
				t.Errorf("to look made %q", out)
			}
			for _, f := range families {
				dst := map[Family]string{IPv4: "192.0.2.9", IPv6: "2001:db8::9"}[f]
				sh(t, command(other, f, ""), "-w", "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "-d", dst,
					"-m", "comment", "--comment", "not -j SERVICE_PROXY_OUTPUT", "-j", "REDIRECT",
					"--to-ports", "81")
			}
			restoreText(t, other, IPv4, NewPlan(sample(IPv4).Ruleset(), Table{family: IPv4}).String())
			found := look()
			if len(found) != 2 {
				t.Fatalf("found %+v", found)
			}
			for i, f := range families {
				e := found[i]
				if e.Family != f || e.Backend != other || len(e.Others) != 1 ||
					e.Others[0].Chain != builtinOutput || e.Others[0].Rules != 1 ||
					e.Others[0].Backend != other {
					t.Errorf("%s: %+v", f, e)
				}
			}
			four, six := found[0], found[1]
			wantJumps := []string{"-A OUTPUT " + jumpOutput, "-A OUTPUT " + jumpDNS,
				"-A PREROUTING " + jumpInbound}
			if slices.Sort(wantJumps); !slices.Equal(four.Jumps, wantJumps) {
				t.Errorf("jumps %q", four.Jumps)
			}
			chains := sample(IPv4).Ruleset().Chains()
			if slices.Sort(four.Chains); !slices.Equal(four.Chains, chains) {
				t.Errorf("chains %q, want %q", four.Chains, chains)
			}
			if len(six.Jumps)+len(six.Chains) > 0 {
				t.Errorf("of IPv6: %+v", six)
			}
		})
	}
}

// TestOtherBackendHangs: a program that does not end costs the time that the caller gives.
func TestOtherBackendHangs(t *testing.T) {
	if !inNetns(t) {
		return
	}
	sh(t, "iptables-legacy", "-w", "-t", "nat", "-A", "OUTPUT", "-j", "RETURN")
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/iptables-legacy", []byte("#!/bin/sh\nexec sleep 4\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	began := time.Now()
	found, err := OtherBackend(ctx, NFT)
	if !errors.Is(err, ErrCouldNotLook) || len(found) > 0 {
		t.Errorf("%v %v", found, err)
	}
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("took %v", took)
	}
}

// TestOtherBackendUnprivileged: who may not look is told so, and nothing is made.
func TestOtherBackendUnprivileged(t *testing.T) {
	if !inNetns(t) {
		return
	}
	if os.Geteuid() == 0 {
		sh(t, "iptables-legacy", "-w", "-t", "nat", "-A", "OUTPUT", "-j", "RETURN")
	}
	if !asOrdinaryUser(t) {
		return
	}
	if found, err := OtherBackend(t.Context(), NFT); len(found) > 0 ||
		!errors.Is(err, ErrCouldNotLook) {
		t.Errorf("%v %v", found, err)
	}
}
