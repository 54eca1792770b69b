//go:build kernel

package iptables

import (
	"strings"
	"testing"
)

// TestGoIPTablesReadsOurChains: what is built on coreos/go-iptables reads each rule of ours, with
// its counters, and its own way of telling rules finds each of them.
func TestGoIPTablesReadsOurChains(t *testing.T) {
	eachBackend(t, func(t *testing.T, k *Kernel, f Family) {
		for _, name := range []string{"dns", "all", "inbound", "settling", "containers"} {
			i := interceptions()[name]
			i.Family = f
			want := i.Ruleset()
			have, err := k.Read(t.Context(), f)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := k.Apply(t.Context(), NewPlan(want, have)); err != nil {
				t.Fatal(err)
			}
			path, err := lookPath("", programOf(k.Backend(), f))
			if err != nil {
				t.Fatal(err)
			}
			tables, err := goTables(path, f)
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range want.chains {
				stats, err := tables.StructuredStats("nat", c.name)
				if err != nil || len(stats) != len(c.rules) {
					t.Errorf("%s, %s: %d of %d rules, %v", name, c.name, len(stats), len(c.rules), err)
					continue
				}
				for n, spec := range c.rules {
					p := parseRule(spec)
					if stats[n].Target != p.target || p.dst.prefix.IsValid() && !p.dst.not &&
						stats[n].Destination.String() != p.dst.prefix.String() {
						t.Errorf("%s, %s: rule %d is %+v, want %s", name, c.name, n+1, stats[n], spec)
					}
				}
				lines, err := tables.List("nat", c.name)
				if err != nil || len(lines) != len(c.rules)+1 {
					t.Errorf("%s, %s: lists %q, %v", name, c.name, lines, err)
					continue
				}
				for n, spec := range c.rules {
					if lines[n+1] != "-A "+c.name+" "+spec {
						t.Errorf("%s, %s: lists %q, want %q", name, c.name, lines[n+1], spec)
					}
				}
			}
			for _, j := range want.jumps {
				there, err := tables.Exists("nat", j.chain, strings.Fields(j.spec)...)
				if err != nil || !there {
					t.Errorf("%s: jump %v: %v, %v", name, j, there, err)
				}
			}
		}
	})
}
