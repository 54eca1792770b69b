//go:build kernel

package iptables

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

// BenchmarkRepair measures from the moment when another program's damage is done to the moment when
// our repair of it is in the kernel and verified: the kernel's notification, the read of the
// touched chains, the plan, the restore.
func BenchmarkRepair(b *testing.B) {
	if !benchInNetns(b) {
		return
	}
	for _, n := range []int{10, scale} {
		for _, damage := range []struct {
			name string
			args []string
		}{
			{"jump", []string{"-t", "nat", "-D", "OUTPUT", "-p", "tcp", "-j", chainOutput}},
			{"chain", []string{"-t", "nat", "-F", chainServiceCIDRs}},
			{"table", []string{"-t", "nat", "-F"}},
		} {
			b.Run(fmt.Sprintf("nft/%d/%s", n, damage.name), func(b *testing.B) {
				k := open(b, NFT)
				want := serviceSet(IPv4, randomPrefixes(IPv4, n, 1))
				apply(b, k, want)
				have := read(b, k, IPv4)
				events, err := k.Watch(b.Context())
				if err != nil {
					b.Fatal(err)
				}
				var took, noticed, written []time.Duration
				for b.Loop() {
					sh(b, "iptables-nft", damage.args...)
					start := time.Now()
					for {
						e := next(b, events)
						if e.Own {
							continue
						}
						if len(e.Chains) > 0 {
							have, err = k.ReadChains(b.Context(), have, e.Chains)
						} else {
							have, err = k.Read(b.Context(), IPv4)
						}
						if err != nil {
							b.Fatal(err)
						}
						if len(Diff(want, have)) > 0 {
							break
						}
					}
					seen := time.Since(start)
					result, err := k.Apply(b.Context(), NewPlan(want, have))
					if err != nil || len(result.Drift) > 0 {
						b.Fatal(err, result.Drift)
					}
					have = result.Have
					took, noticed, written = append(took, time.Since(start)), append(noticed, seen),
						append(written, result.Took)
				}
				b.ReportMetric(0, "ns/op")
				b.ReportMetric(float64(median(took).Microseconds())/1000, "p50-ms")
				b.ReportMetric(float64(median(noticed).Microseconds())/1000, "seen-ms")
				b.ReportMetric(float64(median(written).Microseconds())/1000, "written-ms")
				limit := 50
				if n == scale {
					limit = 300
				}
				b.ReportMetric(float64(slices.Max(took).Microseconds())/1000, "max-ms")
				b.ReportMetric(float64(quantile(took, 0.99).Microseconds())/1000,
					fmt.Sprintf("p99-ms(max%d)", limit))
			})
		}
	}
}
