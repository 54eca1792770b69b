package agent

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
)

// TestHealthz: autohealing recreates a VM for what a new one would mend, and for nothing that hits
// the whole fleet at once.
func TestHealthz(t *testing.T) {
	live := status.Envoy{State: "LIVE"}
	for _, test := range []struct {
		name  string
		boot  status.Bootstrap
		envoy status.Envoy
		want  bool
		// of the same with the brake on
		braked bool
	}{
		{"bootstrap has not begun", status.Bootstrap{}, status.Envoy{}, false, false},
		{"a first bootstrap is under way", status.Bootstrap{Status: progress.InProgress}, live, false, false},
		{"it failed", status.Bootstrap{Status: progress.Failed}, status.Envoy{}, false, false},
		{"it is finished", status.Bootstrap{Status: progress.Finished, Done: true}, live, true, true},
		{"the attribute changed, and bootstrap runs again", status.Bootstrap{Status: progress.InProgress, Done: true}, live, true, true},
		{"and fails", status.Bootstrap{Status: progress.Failed, Done: true}, live, true, true},
		{"a later bootstrap, and Envoy is gone", status.Bootstrap{Status: progress.InProgress, Done: true}, status.Envoy{}, false, true},
		{"Envoy restarts", status.Bootstrap{Status: progress.Finished, Done: true}, status.Envoy{Down: time.Now()}, true, true},
		{"Envoy is down for long", status.Bootstrap{Status: progress.Finished, Done: true}, status.Envoy{Down: time.Now().Add(-time.Hour)}, false, true},
	} {
		a := &Agent{awaitBootstrap: true, started: time.Now()}
		a.status.Store(&status.Status{Heartbeat: time.Now(), Bootstrap: test.boot, Envoy: test.envoy})
		if ok, why := a.healthz(); ok != test.want {
			t.Errorf("%s: %v, %q", test.name, ok, why)
		}
		a.status.Store(&status.Status{Heartbeat: time.Now(), Bootstrap: test.boot, Envoy: test.envoy,
			Interception: status.Interception{State: "off"}})
		if ok, why := a.healthz(); ok != test.braked {
			t.Errorf("%s, with the brake on: %v, %q", test.name, ok, why)
		}
	}
}

// TestStuck: a loop that no longer ends its passes makes both answers fail once its newest pass is
// older than five minutes, and not before: a pass may take its time limits.
func TestStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &Agent{started: time.Now()}
		check := func(when string, want bool, says string) {
			t.Helper()
			for name, ask := range map[string]func() (bool, string){
				"/healthz": a.healthz, "/healthz/ready": a.readyz} {
				if ok, why := ask(); ok != want || !strings.Contains(why, says) {
					t.Errorf("%s, %s: %v, %q; want %v, %q", when, name, ok, why, want, says)
				}
			}
		}
		pass := func() {
			a.status.Store(
				&status.Status{Heartbeat: time.Now(), Ready: true, Envoy: status.Envoy{State: "LIVE"}})
		}
		check("no pass yet", false, "no pass yet")
		pass()
		check("a pass has ended", true, "")
		last := time.Now()
		time.Sleep(5 * time.Minute)
		check("five minutes later", true, "")
		time.Sleep(time.Second)
		check("and a second", false, "stuck since "+last.Format(time.RFC3339))
		pass()
		check("the loop moves again", true, "")
	})
}
