package agent

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/envoywatch"
	"github.com/service-proxy-agent/service-proxy-agent/internal/reconcile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/report"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// TestHappened: what a pass did gets into the metrics, each family's under its own name.
func TestHappened(t *testing.T) {
	p := passed{took: 3 * time.Second, redirect: time.Second, outcomes: []reconcile.Outcome{
		{
			Status: status.Family{Family: "IPv4"}, Facts: symptom.Family{Fighting: true},
			InSync: testStart,
			Work: reconcile.Work{
				Applies: map[string]int{"applied": 1}, Rows: 7, Took: []time.Duration{2}, Waited: 1,
				Repairs: []time.Duration{4}, BackOffs: 1, Drift: map[string]int{"jump removed": 1},
				Removed: reconcile.Removed{HalfOpen: 2, DNS: 1},
			},
		},
		{
			Status: status.Family{Family: "IPv6"}, Work: reconcile.Work{
				Drift: map[string]int{"jump removed": 2}, Removed: reconcile.Removed{HalfOpen: 3}},
		},
	}}
	p.want.Refused = make([]symptom.Refusal, 2)
	p.seen.Envoy = envoywatch.View{Past: envoywatch.Past{Dumps: 4, Rejections: 5}, Stands: true,
		Info: envoyadmin.ServerInfo{Version: envoyadmin.Version{Major: 1, Minor: 40}}}
	want := report.Pass{
		Duration: 3 * time.Second, Redirect: time.Second, DumpReads: 4, Rejections: 5,
		Connected: new(true), Refused: 2, EnvoyVersion: "1.40.0", Errors: map[string]int{},
		Drift:     map[string]int{"jump removed": 3},
		Forgotten: map[string]int{"half_open": 5, "dns": 1},
		Writes: map[string]report.Writes{
			"IPv4": {Applies: map[string]int{"applied": 1}, Rules: 7, Took: []time.Duration{2}, Waited: 1,
				Repairs: []time.Duration{4}, BackOffs: 1, BackingOff: true, InSync: testStart},
			"IPv6": {},
		},
	}
	if diff := cmp.Diff(want, p.happened()); diff != "" {
		t.Errorf("not as wanted (-want +got):\n%s", diff)
	}
	p.seen.Envoy.Stands = false
	if c := p.happened().Connected; c != nil {
		t.Errorf("what is not known is told: %v", *c)
	}
	p.seen.Envoy.Apart = true
	if c := p.happened().Connected; c == nil || *c {
		t.Error("no stream, and it is not told")
	}
}
