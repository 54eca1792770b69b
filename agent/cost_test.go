package agent

import (
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
)

// TestMeter: shares are of the last minute, whatever was before.
func TestMeter(t *testing.T) {
	var m meter
	now := spent{at: testStart, cpu: time.Hour}
	dump := &now.questions[envoyadmin.DumpQuestion]
	dump.Count, dump.Took = 3, time.Minute // before the first look
	unasked := func(dump status.Question) (all []status.Question) {
		for _, name := range []string{"look", "ready", "server_info", "bootstrap", "stats", "clusters"} {
			all = append(all, status.Question{Name: name})
		}
		return slices.Insert(all, 0, dump)
	}
	first := status.Cost{Questions: unasked(status.Question{Name: "dump", Count: 3, Seconds: 60})}
	if diff := cmp.Diff(first, m.take(now)); diff != "" {
		t.Errorf("of one look, -want +have:\n%s", diff)
	}
	var last status.Cost
	for range 30 { // five minutes, the last one calm
		now.at = now.at.Add(costEvery)
		if now.at.Sub(testStart) <= 4*time.Minute {
			now.cpu += costEvery
			dump.Took += 3 * costEvery // a long answer, booked at its end
			if last = m.take(now); last.EnvoyShare != 1 || last.CPUShare != 1 {
				t.Fatalf("while it is busy: %+v", last)
			}
			continue
		}
		now.cpu += costEvery / 100
		// Of what takes a fiftieth most comes to nothing that can be used.
		dump.Count++
		dump.Took += costEvery / 50
		dump.Lost += costEvery * 19 / 1000
		last = m.take(now)
	}
	want := status.Cost{EnvoyShare: .001, CPUShare: .01, Window: 60, Questions: unasked(
		status.Question{Name: "dump", Count: 9, Seconds: 60 + 24*30 + 1.2, Recent: 1.2})}
	if diff := cmp.Diff(want, last); diff != "" {
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
	if err != nil || s.envoy() != 2*time.Second || s.cpu <= 0 || resident < 1<<20 {
		t.Errorf("%+v, %d bytes, %v", s, resident, err)
	}
}

// TestStatusNow: what no pass is about is told before the first one, too.
func TestStatusNow(t *testing.T) {
	a := anAgent(t)
	a.cost.Store(&status.Cost{Resident: 1 << 20})
	for _, mode := range []string{"starting", "hold"} {
		var bucket status.Bucket
		if mode != "starting" {
			var p passed
			p.seen.Envoy.Bucket = envoyadmin.Bucket{
				Level: -time.Second / 2, Size: 6 * time.Second, Share: .1}
			last := p.status()
			last.Mode, bucket = mode, status.Bucket{Level: -.5, Size: 6, Share: .1}
			a.status.Store(&last)
			a.intercepted.Store(&intercepted{{{Name: "web", Port: 80}}})
		}
		s, ok := a.statusNow().(status.Status)
		if !ok || s.Mode != mode || len(s.Channels) != 3 || s.Cost.Resident != 1<<20 ||
			s.Cost.Bucket != bucket {
			t.Errorf("%+v, want mode %s", s, mode)
		}
		if (len(s.Services) == 1) != (mode == "hold") {
			t.Errorf("mode %s: services %v", mode, s.Services)
		}
	}
	if last := a.status.Load(); len(last.Channels) != 0 {
		t.Error("the pass's own Status was changed")
	}
}
