//go:build kernel

package iptables

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// A golden says what a save prints, so a save must print it: a rule that comes back in other words
// is drift for ever. Each is installed over the one before.
func TestGoldensAreReadBack(t *testing.T) {
	eachBackend(t, func(t *testing.T, k *Kernel, f Family) {
		for _, name := range slices.Sorted(maps.Keys(interceptions())) {
			i := interceptions()[name]
			i.Family = f
			want := i.Ruleset()
			if _, err := k.Apply(t.Context(), NewPlan(want, read(t, k, f))); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			have := read(t, k, f)
			if drift, plan := Diff(want, have), NewPlan(want, have); len(drift) > 0 || !plan.Empty() {
				t.Errorf("%s: drift right after it was installed: %v, to be mended by\n%s", name, drift, plan)
			}
			golden, err := os.ReadFile(
				filepath.Join("testdata", "golden", name+"-"+strings.ToLower(f.String())+".save"))
			if err != nil {
				t.Fatal(err)
			}
			if save := have.Ours().String(); save != string(golden) {
				t.Errorf("%s: a save prints\n%s\nnot the golden", name, save)
			}
		}
	})
}
