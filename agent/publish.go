package agent

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/atomicfile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/internal/report"
	"github.com/service-proxy-agent/service-proxy-agent/internal/server"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// publish turns a pass into a Status and leaves it with every reporter; none of them can hold up the loop.
func (a *Agent) publish(now time.Time, findings []symptom.Finding, known bool) {
	a.passes++
	if next := a.failures.next(findings, now); !next.equal(a.failures) {
		a.sayFailures(a.failures, next)
		a.failures = next
		a.history.Put(next)
	}
	a.sayFindings(findings)

	s := status.Status{
		Version: a.settings.Version, Heartbeat: time.Now().UTC(), Started: a.started.UTC(), Passes: a.passes, Undone: a.undone, Paused: a.paused,
		Findings: findings, LastFailure: a.failures.String(), Backend: a.kernel.Backend(), ServingPorts: a.config.ServingPorts,
		LastDriftBy: a.lastBy, LastDriftWhen: a.lastByAt.UTC(), Bootstrap: status.Bootstrap{Status: a.boot.Status, Failure: a.boot.FailureLine(), Done: a.boot.AttributeSum != ""},
	}
	if good := a.inForce; good != nil {
		s.Attribute = &status.Attribute{Read: good.Read, Kept: good.Kept}
	}
	v := a.view
	s.Envoy = status.Envoy{
		Admin: a.settings.EnvoyAdmin, State: v.State, Version: v.Info.Text, Configured: v.Configured, Listeners: len(v.Snapshot.Listeners), Rejected: len(v.Rejected), Node: v.Info.Node.ID,
	}
	if v.Err != nil {
		s.Envoy.State = ""
		// Not every answer that cannot be used is an Envoy that is down: a new VM would not mend a forbidden path.
		if errors.Is(v.Err, envoyadmin.ErrRefused) || errors.Is(v.Err, envoyadmin.ErrTimeout) {
			s.Envoy.Down = v.Since.UTC()
		}
	}
	for i := range a.families {
		s.Families = append(s.Families, a.families[i].status())
	}
	s.NotReady = a.notReady(known)
	s.Ready = s.NotReady == ""
	s.Mode = a.mode()
	if s.Mode != a.saidMode {
		a.log.Info("mode", zap.String("is", s.Mode), zap.String("was", a.saidMode))
		a.serial.Say(report.Info, "interception: "+s.Mode)
		a.saidMode = s.Mode
	}
	a.sayReady(s)
	a.measure(s, v.Dumps-a.dumps)
	a.dumps = v.Dumps
	a.status.Store(&s)
	a.reports.Put(s)
}

// status is the family as Status shows it.
func (s *familyState) status() status.Family {
	f := status.Family{
		Family: s.family.String(), Usable: s.unusable == nil, Equal: s.equal, Jumps: s.jumpsIn, Services: len(s.services), ServicePorts: s.ports,
		OutboundPort: s.outboundPort, InboundPort: s.inboundPort, DNSPort: s.dnsPort, Rules: s.target.Len(), Applied: s.applied.UTC(),
	}
	if err := errors.Join(s.unusable, s.err); err != nil {
		f.Error = err.Error()
	}
	return f
}

// mode is what the rules do now, in a word (see Status.Mode).
func (a *Agent) mode() string {
	if a.paused {
		return "paused"
	}
	for i := range a.families {
		if s := &a.families[i]; s.unusable == nil && s.jumpsIn {
			return "intercepting"
		}
	}
	for i := range a.families {
		if s := &a.families[i]; s.written && a.settings.WhenEnvoyDown == Bypass {
			return "bypass"
		}
	}
	return "hold"
}

// notReady is why /healthz/ready answers 503, "" when ready: Envoy is LIVE with its first listener update done, every
// interception port accepts, and the kernel equals want in every usable family. An empty want counts.
func (a *Agent) notReady(known bool) string {
	v := a.view
	switch {
	case a.paused:
		return "paused by cleanup until restarted"
	case v.Err != nil:
		return "Envoy: " + v.Err.Error()
	case v.State != "LIVE":
		return "Envoy is " + v.State + ", not LIVE"
	case !v.Configured:
		return "Envoy has not received its listeners"
	case !a.haveConfig:
		return "the gce-service-proxy attribute was not read yet"
	case !known:
		return "Envoy's listeners were not read yet"
	}
	usable := false
	for i := range a.families {
		s := &a.families[i]
		if s.unusable != nil {
			continue
		}
		usable = true
		switch {
		case s.outboundPort != 0 && !s.outbound.accepts():
			return fmt.Sprintf("Envoy's port %d does not accept %v connections", s.outboundPort, s.family)
		case s.inboundPort != 0 && !s.inbound.accepts():
			return fmt.Sprintf("Envoy's inbound port %d does not accept %v connections", s.inboundPort, s.family)
		case s.dnsPort != 0 && !s.dns.accepts():
			return fmt.Sprintf("Envoy does not listen on its DNS port %d over %v", s.dnsPort, s.family)
		case !s.equal, slices.ContainsFunc(s.left, func(l iptables.RefusedError) bool { return l.Rule != iptables.CommentMatch }):
			return fmt.Sprintf("the %v rules are not as wanted", s.family)
		}
	}
	if !usable {
		return "neither IPv4 nor IPv6 rules can be used"
	}
	return ""
}

// sayFailures tells each failure that came, and each that is over, once.
func (a *Agent) sayFailures(was, is Failures) {
	in := func(all []Failure, f Failure) bool {
		return slices.ContainsFunc(all, func(g Failure) bool { return f.ID == g.ID && f.Key == g.Key })
	}
	for _, f := range was.Lasting {
		if !in(is.Lasting, f) {
			a.log.Info("failure over", zap.String("id", string(f.ID)))
			a.serial.Say(report.Info, "over: "+f.Text)
		}
	}
	for _, f := range is.Lasting {
		if !in(was.Lasting, f) {
			a.log.Error("failure", zap.String("id", string(f.ID)), zap.String("text", f.Text))
			a.serial.Say(report.Error, f.Text)
		}
	}
}

// runHistory keeps the failures and the attribute for the next start, beside the loop: a disk may hang.
func (a *Agent) runHistory(ctx context.Context) error {
	said := map[string]bool{}
	note := func(lost string, err error) {
		if err != nil && !said[lost] {
			a.log.Warn(lost, zap.Error(err))
		}
		said[lost] = err != nil
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case f := <-a.history.Get():
			note("history is not kept", f.save(a.settings.StateDir))
		case k := <-a.keep.Get():
			note("the attribute is not kept", saveKept(a.settings.StateDir, k))
		}
	}
}

// sayFindings logs warnings when they come, and errors that another explains; the others are sayFailures', and advice is for
// those who look at the status. What came before is known by
// ID and key, so a changing text (a count) is not news.
func (a *Agent) sayFindings(findings []symptom.Finding) {
	now := map[string]bool{}
	for _, f := range findings {
		key := string(f.ID) + " " + f.Key
		now[key] = true
		if a.saidFindings[key] || f.Severity == symptom.Advice || f.Severity == symptom.Error && f.ExplainedBy == "" {
			continue
		}
		a.log.Warn("finding", zap.String("id", string(f.ID)), zap.String("text", f.Text()))
		if f.Severity == symptom.Warning {
			a.serial.Say(report.Warning, f.Text())
		}
	}
	a.saidFindings = now
}

func (a *Agent) sayReady(s status.Status) {
	if s.Ready == a.saidReady {
		return
	}
	a.saidReady = s.Ready
	if s.Ready {
		a.log.Info("ready", zap.String("envoy", s.Envoy.Version))
		a.serial.Say(report.Info, "ready: Envoy "+s.Envoy.Version+" is live and the rules are in place")
		// service-proxy-ready.path starts the target then, which stays: the file is not taken away again.
		if err := atomicfile.Write(filepath.Join(server.Dir(), systemd.ReadyFile), nil, 0o644); err != nil {
			a.log.Warn("cannot tell systemd of the readiness", zap.Error(err))
		}
	} else {
		a.log.Warn("not ready", zap.String("why", s.NotReady))
		a.serial.Say(report.Warning, "not ready: "+s.NotReady)
	}
}

// setAttributes hands the values of contract 1 to the guest-attribute writer, which writes what changed within its budget.
func setAttributes(w *guestattr.Writer, s status.Status) {
	w.Set(guestattr.AgentHeartbeat, s.Heartbeat.Format(time.RFC3339))
	w.Set(guestattr.AgentLastFailure, s.LastFailure)
	if s.Envoy.Version != "" {
		w.Set(guestattr.ProxyVersion, s.Envoy.Version)
	}
	if s.Bootstrap.Status != "" {
		w.Set(guestattr.BootstrapStatus, s.Bootstrap.Status)
	}
	if s.Bootstrap.Failure != "" {
		w.Set(guestattr.BootstrapLastFailure, s.Bootstrap.Failure)
	}
}

// runReports passes each newest Status on.
func (a *Agent) runReports(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case s := <-a.reports.Get():
			setAttributes(a.guest, s)
			a.notify(s)
		}
	}
}

// notify tells systemd that the loop runs: READY at its first pass (the mesh's readiness is /healthz/ready), the watchdog
// at each one, so that a loop that hangs is ended with its stack in the journal.
func (a *Agent) notify(s status.Status) {
	text := s.Mode
	if !s.Ready {
		text += "; not ready: " + s.NotReady
	}
	// READY=1 each time, which systemd allows: the mailbox may have dropped the first pass's Status.
	states := []string{"READY=1", "WATCHDOG=1", "STATUS=" + text}
	if err := systemd.Notify(states...); err != nil && !a.saidNotify {
		a.saidNotify = true
		a.log.Warn("systemd is not told", zap.Error(err))
	}
}

// measure tells /metrics of a pass.
func (a *Agent) measure(s status.Status, dumps int) {
	p := a.happened
	p.DumpReads, p.Refused = dumps, len(a.want.Refused)
	if v := a.view.Info.Version; v != (envoyadmin.Version{}) {
		p.EnvoyVersion = v.String()
	}
	for i := range a.families {
		f := &a.families[i]
		p.Writes[f.family.String()] = report.Writes{Applies: f.applies, Rules: f.rows}
	}
	if a.view.Err != nil {
		p.Errors["envoy_admin"]++
		if errors.Is(a.view.Err, envoyadmin.ErrUntrusted) {
			p.Untrusted++
		}
	}
	if a.sourceErr != nil {
		p.Errors["metadata_server"]++
	}
	a.metrics.Pass(s, p)
}

// statusNow is what the socket tells; before the first pass has ended, that there was none.
func (a *Agent) statusNow() any {
	if s := a.status.Load(); s != nil {
		return s
	}
	return &status.Status{Version: a.settings.Version, Started: a.started.UTC(), Mode: "starting", NotReady: "no pass yet", Findings: []symptom.Finding{{
		ID: symptom.Starting, Severity: symptom.Error, Cause: "The agent is only just starting", Next: "ask again in a second"}}}
}

// stuck is how old the newest pass may be: past every time limit of a pass.
const stuck = 5 * time.Minute

// envoyDead is how long Envoy may be away before a new VM is the better idea: its unit restarts it within seconds, again and again.
const envoyDead = 5 * time.Minute

// moving is the newest Status, and why the loop does not move if it does not.
func (a *Agent) moving() (s *status.Status, why string) {
	s = a.status.Load()
	switch {
	case s == nil:
		return nil, "no pass yet"
	case time.Since(s.Heartbeat) > stuck:
		return nil, "the loop is stuck since " + s.Heartbeat.Format(time.RFC3339)
	}
	return s, ""
}

// healthz is for autohealing: it fails only for what a new VM would mend, never for the control plane, the metadata
// server or logging, which would have the whole fleet recreated. Before bootstrap has finished once it is not healthy either:
// one healthy answer ends the group's initial delay (facts). A later run that is under way or fails (an upgrade, a changed or
// malformed attribute, for the whole fleet at once) is nothing that a new VM would mend, as long as Envoy answers.
func (a *Agent) healthz() (ok bool, why string) {
	s, why := a.moving()
	switch {
	case s == nil:
		return false, why
	case a.awaitBootstrap && s.Bootstrap.Status == "":
		return false, "bootstrap has not begun"
	case s.Bootstrap.Status == progress.InProgress && !s.Bootstrap.Done,
		s.Bootstrap.Status == progress.InProgress && s.Envoy.State == "", s.Bootstrap.Status == progress.Failed && s.Envoy.State == "":
		return false, "bootstrap: " + s.Bootstrap.Status + " " + s.Bootstrap.Failure
	case !s.Envoy.Down.IsZero() && time.Since(s.Envoy.Down) > envoyDead:
		return false, "Envoy is down since " + s.Envoy.Down.Format(time.RFC3339)
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
