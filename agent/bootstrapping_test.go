package agent

import (
	"errors"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/envoywatch"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
)

// A first boot at which all goes well must not say "Envoy is not running": neither while bootstrap
// installs it, nor when it has just started it and the last refusal is older than that.
func TestBootstrapping(t *testing.T) {
	start := time.Date(2026, 11, 24, 21, 41, 28, 0, time.UTC)
	refused := func(at time.Time) envoywatch.View {
		return envoywatch.View{Outage: envoywatch.Outage{
			Err: errors.New("connection refused"), Asked: at,
		}}
	}
	for _, tt := range []struct {
		name  string
		boot  progress.State
		await bool
		envoy envoywatch.View
		want  bool
	}{
		{"not begun", progress.State{}, true, refused(start), true},
		{"no bootstrap here", progress.State{}, false, refused(start), false},
		{"in progress", progress.State{Status: progress.InProgress, Time: start}, true, refused(start.Add(time.Hour)), true},
		{"just finished, last refused before", progress.State{Status: progress.Finished, Time: start}, true, refused(start.Add(-time.Millisecond)), true},
		{"finished, refused since", progress.State{Status: progress.Finished, Time: start}, true, refused(start.Add(time.Second)), false},
		{"finished, answers", progress.State{Status: progress.Finished, Time: start}, true, envoywatch.View{Outage: envoywatch.Outage{Asked: start.Add(-time.Minute)}}, false},
		{"failed", progress.State{Status: progress.Failed, Time: start}, true, refused(start.Add(-time.Second)), false},
	} {
		if have := bootstrapping(tt.boot, tt.await, tt.envoy); have != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, have, tt.want)
		}
	}
}
