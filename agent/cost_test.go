package agent

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
)

// TestMeter: shares are of the last minute, whatever was before.
func TestMeter(t *testing.T) {
	var m meter
	if first := m.take(spent{at: testStart, cpu: time.Hour}); first != (status.Cost{}) {
		t.Errorf("of one look: %+v", first)
	}
	now := spent{at: testStart, cpu: time.Hour}
	var last status.Cost
	for range 30 { // five minutes, the last one calm
		now.at = now.at.Add(costEvery)
		if now.at.Sub(testStart) <= 4*time.Minute {
			now.cpu += costEvery
			now.envoy += 3 * costEvery // a long answer, booked at its end
			if last = m.take(now); last.EnvoyShare != 1 || last.CPUShare != 1 {
				t.Fatalf("while it is busy: %+v", last)
			}
			continue
		}
		now.cpu += costEvery / 100
		now.envoy += costEvery / 1000
		last = m.take(now)
	}
	if diff := cmp.Diff(status.Cost{EnvoyShare: .001, CPUShare: .01, Window: 60}, last); diff != "" {
		t.Errorf("-want +have:\n%s", diff)
	}
}

// TestReadSpent: what did not come is none of Envoy's time.
func TestReadSpent(t *testing.T) {
	var asked envoyadmin.Asked
	asked.Questions[envoyadmin.LookQuestion] = envoyadmin.Cost{
		Took: 21 * time.Second, Lost: 20 * time.Second}
	asked.Questions[envoyadmin.ReadyQuestion] = envoyadmin.Cost{Took: time.Second}
	s, resident, err := readSpent(asked)
	if err != nil || s.envoy != 2*time.Second || s.cpu <= 0 || resident < 1<<20 {
		t.Errorf("%+v, %d bytes, %v", s, resident, err)
	}
}

// TestStatusNow: what no pass is about is told before the first one, too.
func TestStatusNow(t *testing.T) {
	a := anAgent(t)
	a.cost.Store(&status.Cost{Resident: 1 << 20})
	for _, mode := range []string{"starting", "hold"} {
		if mode != "starting" {
			a.status.Store(&status.Status{Mode: mode})
		}
		s, ok := a.statusNow().(status.Status)
		if !ok || s.Mode != mode || len(s.Channels) != 3 || s.Cost.Resident != 1<<20 {
			t.Errorf("%+v, want mode %s", s, mode)
		}
	}
	if last := a.status.Load(); len(last.Channels) != 0 {
		t.Error("the pass's own Status was changed")
	}
}
