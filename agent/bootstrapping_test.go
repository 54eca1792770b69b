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
	answers := func(configured bool) envoywatch.View {
		return envoywatch.View{
			Outage:     envoywatch.Outage{Asked: start.Add(-time.Minute)},
			Configured: configured,
		}
	}
	done := progress.State{Status: progress.Finished, Time: start}
	for _, tt := range []struct {
		name  string
		boot  progress.State
		await bool
		envoy envoywatch.View
		want  bool
		after time.Duration // that bootstrap's word is old
	}{
		{"not begun", progress.State{}, true, refused(start), true, time.Second},
		{"no bootstrap here", progress.State{}, false, refused(start), false, time.Second},
		{"in progress", progress.State{Status: progress.InProgress, Time: start}, true, refused(start.Add(time.Hour)), true, time.Second},
		{"just finished, last refused before", progress.State{Status: progress.Finished, Time: start}, true, refused(start.Add(-time.Millisecond)), true, time.Second},
		{"finished, refused since", progress.State{Status: progress.Finished, Time: start}, true, refused(start.Add(time.Second)), false, time.Second},
		{"finished, answers", done, true, answers(true), false, time.Second},
		{"finished, waits for its configuration", done, true, answers(false), true, envoyWarm - 1},
		{"and gets none", done, true, answers(false), false, envoyWarm},
		{"and the clock went back", done, true, answers(false), false, -envoyWarm},
		{"failed", progress.State{Status: progress.Failed, Time: start}, true, refused(start.Add(-time.Second)), false, time.Second},
	} {
		if have := bootstrapping(tt.boot, tt.await, tt.envoy, start.Add(tt.after)); have != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, have, tt.want)
		}
	}
}
