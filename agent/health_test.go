package agent

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/bootstrap"
)

// TestHealthz: autohealing recreates a VM for what a new one would mend, and for nothing that hits the whole fleet at once.
func TestHealthz(t *testing.T) {
	live := EnvoyStatus{State: "LIVE"}
	for _, test := range []struct {
		name  string
		boot  BootstrapStatus
		envoy EnvoyStatus
		want  bool
	}{
		{"bootstrap has not begun", BootstrapStatus{}, EnvoyStatus{}, false},
		{"a first bootstrap is under way", BootstrapStatus{Status: bootstrap.InProgress}, live, false},
		{"it failed", BootstrapStatus{Status: bootstrap.Failed}, EnvoyStatus{}, false},
		{"it is finished", BootstrapStatus{Status: bootstrap.Finished, Done: true}, live, true},
		{"the attribute changed, and bootstrap runs again", BootstrapStatus{Status: bootstrap.InProgress, Done: true}, live, true},
		{"and fails", BootstrapStatus{Status: bootstrap.Failed, Done: true}, live, true},
		{"a later bootstrap, and Envoy is gone", BootstrapStatus{Status: bootstrap.InProgress, Done: true}, EnvoyStatus{}, false},
		{"Envoy restarts", BootstrapStatus{Status: bootstrap.Finished, Done: true}, EnvoyStatus{Down: time.Now()}, true},
		{"Envoy is down for long", BootstrapStatus{Status: bootstrap.Finished, Done: true}, EnvoyStatus{Down: time.Now().Add(-time.Hour)}, false},
	} {
		a := &Agent{awaitBootstrap: true, started: time.Now()}
		a.status.Store(&Status{Heartbeat: time.Now(), Bootstrap: test.boot, Envoy: test.envoy})
		if ok, why := a.healthz(); ok != test.want {
			t.Errorf("%s: %v, %q", test.name, ok, why)
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
			for name, ask := range map[string]func() (bool, string){"/healthz": a.healthz, "/healthz/ready": a.readyz} {
				if ok, why := ask(); ok != want || !strings.Contains(why, says) {
					t.Errorf("%s, %s: %v, %q; want %v, %q", when, name, ok, why, want, says)
				}
			}
		}
		pass := func() {
			a.status.Store(&Status{Heartbeat: time.Now(), Ready: true, Envoy: EnvoyStatus{State: "LIVE"}})
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
