package agent

import (
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

const (
	stuck = status.StuckAfter
	// envoyDead is how long Envoy may be away before a new VM is the better idea: its unit restarts it
	// within seconds, again and again.
	envoyDead = 5 * time.Minute
)

// statusNow is what the socket tells; before the first pass has ended, that there was none. What no
// pass is about is filled in here, when somebody asks: no pass waits for it.
func (a *Agent) statusNow() any {
	s := status.Status{
		Version: a.settings.Version, Started: a.started.UTC(), Mode: "starting", NotReady: "no pass yet",
		Findings: []symptom.Finding{{
			ID: symptom.Starting, Severity: symptom.Error,
			Cause: "The agent is only just starting", Next: "ask again in a second",
		}},
	}
	if last := a.status.Load(); last != nil {
		s = *last
	}
	if in := a.intercepted.Load(); in != nil {
		s.Services = in.services()
	}
	s.Channels = a.sources().Channels()
	if cost := a.cost.Load(); cost != nil {
		// The bucket is Envoy's as the pass saw it.
		bucket := s.Cost.Bucket
		s.Cost = *cost
		s.Cost.Bucket = bucket
	}
	return s
}

// moving is the newest Status, and why the loop does not move if it does not.
func (a *Agent) moving() (s *status.Status, why string) {
	s = a.status.Load()
	switch {
	case s == nil:
		return nil, "no pass yet"
	case s.Stuck(time.Now()):
		return nil, "the loop is stuck since " + s.Heartbeat.Format(time.RFC3339)
	}
	return s, ""
}

// healthz is for autohealing: it fails only for what a new VM would mend, never for the control
// plane, the metadata server or logging, which would have the whole fleet recreated. Before
// bootstrap has finished once it is not healthy either: one healthy answer ends the initial
// delay of a managed instance group. A later run that is under way or fails (an upgrade, a
// changed or malformed attribute, for the whole fleet at once) is nothing that a new VM would
// mend, as long as Envoy answers. With the brake on it need not: an operator who has connections go
// past Envoys that fail does not want the fleet recreated for that.
// See docs/design/facts.md#gce-healthy-ends-the-delay.
func (a *Agent) healthz() (ok bool, why string) {
	s, why := a.moving()
	if s == nil {
		return false, why
	}
	boot, down := s.Bootstrap, s.Envoy.Down
	switch {
	case a.awaitBootstrap && boot.Status == "":
		return false, "bootstrap has not begun"
	case s.Interception.State == modeOff && (boot.Done || boot.Status == ""):
	case boot.Status == progress.InProgress && !boot.Done,
		boot.Status == progress.InProgress && s.Envoy.State == "",
		boot.Status == progress.Failed && s.Envoy.State == "":
		return false, "bootstrap: " + boot.Status + " " + boot.Failure
	case !down.IsZero() && time.Since(down) > envoyDead:
		return false, "Envoy is down since " + down.Format(time.RFC3339)
	}
	return true, ""
}

// readyz is what applications, `wait` and service-proxy-ready.target go by.
func (a *Agent) readyz() (ok bool, why string) {
	s, why := a.moving()
	if s == nil {
		return false, why
	}
	return s.Ready, s.NotReady
}
