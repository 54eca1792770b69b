//go:build lab

package e2e

import (
	"encoding/json"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// jumpRemoved is a drift, as [drift] does it.
var jumpRemoved = []string{"IPT -t nat -D OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT"}

// remembers looks whether the history begins its lines with these, in any order, and names for the
// repairs in the log whom the log names. "": the log of all time.
func remembers(t *testing.T, a *mesh.Agent, log string, lines ...string) {
	t.Helper()
	if log == "" {
		log = a.Log()
	}
	s, err := a.Status(t.Context())
	must(t, err)
	shown, err := json.MarshalIndent(s.History, "", " ")
	must(t, err)
	if strings.Contains(log, "\tenvoy restarted\t") {
		lines = append(lines, "Envoy restarted")
	}
	for _, line := range lines {
		if !slices.ContainsFunc(s.History, func(h status.Transition) bool {
			return strings.HasPrefix(h.Text, line)
		}) {
			t.Errorf("%q is not in the history:\n%s", line, shown)
		}
	}
	for i := 1; i < len(s.History); i++ {
		if s.History[i].Time.Before(s.History[i-1].Time) {
			t.Errorf("the history is out of order:\n%s", shown)
		}
	}
	// By family: how often, and by whom the last.
	type repairs struct {
		times int
		by    string
	}
	logged, remembered := map[string]repairs{}, map[string]repairs{}
	for line := range strings.Lines(log) {
		_, fields, is := strings.Cut(line, "\trules repaired\t")
		if !is {
			continue
		}
		var f struct{ Family, By string }
		must(t, json.Unmarshal([]byte(fields), &f))
		logged[f.Family] = repairs{logged[f.Family].times + 1, f.By}
	}
	for _, h := range s.History {
		if h.Kind == status.OfDrift {
			remembered[h.Key] = repairs{remembered[h.Key].times + max(h.Times, 1), h.By}
		}
	}
	for family, want := range logged {
		got := remembered[family]
		if want.by == "" {
			want.by = got.by // the kernel's word may have come when the repair was logged
		}
		if got != want || !strings.Contains(got.by, "tables (pid ") {
			t.Errorf("%s: the history has %+v, and the log %+v:\n%s", family, got, want, shown)
		}
	}
	if len(logged) == 0 {
		t.Error("nothing was repaired")
	}
}

// killed has the agent killed while it tells and writes: what it kept is whole and comes back, but
// for the last second.
func killed(t *testing.T, m *mesh.Mesh, a *mesh.Agent) {
	seed := rand.Uint64()
	t.Log("seed ", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	before, err := a.Status(t.Context())
	must(t, err)
	for range soak(30, 3) {
		_, err := m.VM.Run(t.Context(), "iptables", "-w", "-t", "nat", "-F", "SERVICE_PROXY_OUTPUT")
		must(t, err)
		time.Sleep(time.Duration(random.IntN(300)) * time.Millisecond)
		a.Kill()
		must(t, a.Start())
		must(t, a.WaitReady(within(t, 10*time.Second)))
	}
	if strings.Contains(a.Log(), "the transitions of earlier runs are lost") {
		t.Error("a kill broke the file")
	}
	after, err := a.Status(t.Context())
	must(t, err)
	for _, h := range before.History {
		if h.Kind == status.OfFinding && !slices.Contains(after.History, h) {
			t.Errorf("forgotten: %+v", h)
		}
	}
}
