package envoywatch

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
)

// TestLook: one look knows how the stream stands by what the log told before, and by two answers.
func TestLook(t *testing.T) {
	bubble := time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC) // when a bubble's time begins
	ended := func(ago time.Duration, code, count int) []envoyadmin.Logged {
		return []envoyadmin.Logged{{
			LogEvent: envoyadmin.LogEvent{Kind: envoyadmin.StreamClosed, Code: code, Message: "denied",
				Count: count},
			Time: bubble.Add(-ago)}}
	}
	spoke := envoyadmin.Logged{
		LogEvent: envoyadmin.LogEvent{Kind: envoyadmin.ListenerChanged, Count: 1},
		Time:     bubble.Add(-time.Second)}
	apart := func(e *envoy) { e.stats.Connected = false }
	blocked := errors.New("blocked")
	type seen struct{ end, apart, stands, probed, configured bool }
	for name, tt := range map[string]struct {
		change func(*envoy)
		past   []envoyadmin.Logged
		probe  error
		want   seen
	}{
		"healthy": {want: seen{stands: true, configured: true}},
		"it ended, and goes on ending": {past: ended(20*time.Second, 7, 9),
			want: seen{end: true, probed: true, configured: true}},
		"it ended, and was heard of since": {past: append(ended(20*time.Second, 7, 9), spoke),
			want: seen{stands: true, configured: true}},
		"it ended long ago, and is there": {past: ended(time.Hour, 7, 9),
			want: seen{stands: true, configured: true}},
		"it ended long ago, and our own way is blocked": {past: ended(time.Hour, 13, 9),
			probe: blocked, want: seen{end: true, probed: true, configured: true}},
		"it ended long ago, and is not there": {past: ended(time.Hour, 14, 1), change: apart,
			want: seen{end: true, apart: true, probed: true, configured: true}},
		"there is none, and the log does not say why": {change: apart,
			want: seen{apart: true, probed: true, configured: true}},
		"there is none for a moment": {change: func(e *envoy) {
			e.stats.Connected = false
			e.while["dump"] = func() {}
			e.while["bootstrap"] = func() { e.stats.Connected = true }
		}, want: seen{stands: true, configured: true}},
		"it has only just started": {change: func(e *envoy) { apart(e); e.uptime = time.Second },
			want: seen{configured: true}},
		"it has only just started, and the way is blocked": {
			change: func(e *envoy) { apart(e); e.uptime = time.Second }, probe: blocked,
			want: seen{apart: true, probed: true, configured: true}},
		"it never got a configuration": {change: func(e *envoy) { e.restart(); e.uptime = time.Hour },
			past: ended(10*time.Second, 5, 9), want: seen{end: true, apart: true, probed: true}},
		"it is about to get its first": {change: func(e *envoy) {
			e.restart()
			e.state = "LIVE" // as it says before its listeners are there
			time.AfterFunc(1500*time.Millisecond, func() { e.set(e.serve) })
		}, want: seen{stands: true, configured: true}},
		"a listener warms": {change: func(e *envoy) { e.warming = true },
			want: seen{stands: true, configured: true}},
		"all listeners warm for long": {change: func(e *envoy) { e.warming, e.dynamic = true, false },
			want: seen{stands: true, configured: true}},
		"all listeners warm": {
			change: func(e *envoy) { e.warming, e.dynamic, e.uptime = true, false, time.Second },
			want:   seen{stands: true, probed: true}},
		"without a control plane": {change: func(e *envoy) {
			e.stats, e.lds, e.dynamic, e.static = envoyadmin.ControlPlane{}, false, false, true
		}, want: seen{configured: true}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := running()
				if tt.change != nil {
					tt.change(e)
				}
				probed := false
				v, err := Look(t.Context(), Options{Admin: e,
					Probe: func(context.Context, envoyadmin.Target) error { probed = true; return tt.probe },
				}, tt.past)
				have := seen{v.Stream != nil, v.Apart, v.Stands, probed, v.Configured}
				if tt.want.probed != probed && !tt.want.probed && v.Probe == nil {
					have.probed = false // to ask is no harm
				}
				if err != nil || have != tt.want || v.Err != nil {
					t.Errorf("have %+v, %v, %v; want %+v", have, v.Err, err, tt.want)
				}
				if v.Probed && !probed || probed && !v.Probed && (v.Stream != nil || v.Apart) {
					t.Errorf("our own way was tried: %v, says %v", probed, v.Probed)
				}
				if tt.probe != nil && !errors.Is(v.Probe, tt.probe) {
					t.Errorf("our own way: %v", v.Probe)
				}
				if v.Configured && v.Generation != 1 {
					t.Errorf("%d sets", v.Generation)
				}
			})
		})
	}
}

// TestLookAtClusters: endpoints count as unhealthy that are after some seconds, too.
func TestLookAtClusters(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*envoy)
		want   string
		known  bool
	}{
		"well": {func(e *envoy) { e.clusters[0].Healthy = 4 }, "", true},
		"sick": {func(*envoy) {}, "a 1/4", true},
		"checked just then": {func(e *envoy) {
			e.while["stats"] = func() { e.set(func() { e.clusters[0].Healthy = 4 }) }
		}, "", true},
		"no answer": {func(e *envoy) { e.fails["clusters"] = envoyadmin.ErrTimeout }, "", false},
	} {
		synctest.Test(t, func(t *testing.T) {
			e := running()
			e.clusters = []envoyadmin.ClusterHealth{{Name: "a", Total: 4, Healthy: 1}}
			tt.change(e)
			v, err := Look(t.Context(), Options{Admin: e}, nil)
			if sick(v.View) != tt.want || v.Clusters != tt.known || err != nil || v.Started == nil {
				t.Errorf("%s: %q, %v, %v, started with %v", name, sick(v.View), v.Clusters, err, v.Started)
			}
		})
	}
}

// TestLookAtNobody: what kept Envoy from answering is told, and when that began is not known.
func TestLookAtNobody(t *testing.T) {
	for _, down := range []error{envoyadmin.ErrRefused, envoyadmin.ErrTimeout,
		envoyadmin.ErrUntrusted} {
		e := running()
		e.down = down
		v, err := Look(t.Context(), Options{Admin: e}, nil)
		if err != nil || !errors.Is(v.Err, down) || !v.Since.IsZero() {
			t.Errorf("%v: %v since %v, %v", down, v.Err, v.Since, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Look(ctx, Options{Admin: running()}, nil); err == nil {
		t.Error("without any time it knows something")
	}
}
