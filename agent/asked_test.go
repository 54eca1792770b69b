package agent

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/envoywatch"
	"github.com/service-proxy-agent/service-proxy-agent/internal/identity"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// TestAsked: since when a run could know that a failure of an earlier one is over.
func TestAsked(t *testing.T) {
	first := func() passed { // nobody has been asked
		p := intercepting()
		p.seen.Envoy, p.seen.Attribute = envoywatch.View{}, attributeInForce{}
		p.known = false
		for i := range p.outcomes {
			p.outcomes[i].Status.Equal = false
		}
		return p
	}
	answers := func(p *passed) { p.seen.Envoy = envoywatch.View{State: "LIVE"} }
	fails := func(p *passed) {
		p.seen.Envoy = envoywatch.View{Outage: envoywatch.Outage{Err: errors.New("x")}}
	}
	dumped := func(p *passed) { p.seen.Envoy = envoywatch.View{State: "LIVE", Past: envoywatch.Past{Dumps: 1}} }
	knows := func(p *passed) { answers(p); p.known = true }
	equal := func(p *passed) { p.outcomes[0].Status.Equal = true }
	for _, tt := range []struct {
		ids    []symptom.ID
		key    string
		no     []func(*passed)
		yes    []func(*passed)
		within time.Duration // that the run has lasted; 0: an hour
	}{
		{ids: []symptom.ID{symptom.Bootstrap, symptom.ProxyUser}, yes: []func(*passed){func(*passed) {}}},
		{ids: []symptom.ID{symptom.EnvoyDown, symptom.AdminUnreadable},
			no: []func(*passed){func(*passed) {}}, yes: []func(*passed){answers, fails}},
		{ids: []symptom.ID{symptom.EnvoyNotConfigured, symptom.EnvoyTooOld, symptom.PermissionDenied},
			no: []func(*passed){func(*passed) {}, fails}, yes: []func(*passed){answers}},
		{ids: []symptom.ID{symptom.PermissionDenied, symptom.ControlPlaneConnect, symptom.ControlPlaneLookUp,
			symptom.APINotEnabled, symptom.ScopeMissing, symptom.ConfigNotFound,
			symptom.ControlPlaneRefused},
			no: []func(*passed){answers}, within: showLate - 1},
		{ids: []symptom.ID{symptom.ListenerRejected, symptom.AccessLogUnwritable},
			no: []func(*passed){func(*passed) {}, fails, answers}, yes: []func(*passed){dumped}},
		{ids: []symptom.ID{symptom.ForeignOwner},
			no: []func(*passed){func(*passed) {}, answers}, yes: []func(*passed){knows, fails}},
		{ids: []symptom.ID{symptom.InterceptionNotReady},
			no: []func(*passed){func(*passed) {}, answers, fails}, yes: []func(*passed){knows}},
		{ids: []symptom.ID{symptom.RuleRefused, symptom.CouldNotLook, symptom.Shadowed, symptom.Fight,
			symptom.FamilyUnusable}, key: "IPv4",
			no: []func(*passed){func(*passed) {}, answers,
				func(p *passed) { p.outcomes[1].Status.Equal = true }},
			yes: []func(*passed){equal, func(p *passed) { p.paused = true },
				func(p *passed) { p.outcomes[0].Status.Usable = false }}},
		{ids: []symptom.ID{symptom.Fight}, key: "IPv4", no: []func(*passed){equal}, within: fightShows - 1},
		{ids: []symptom.ID{symptom.Fight}, key: "IPv4", yes: []func(*passed){equal}, within: fightShows},
		{ids: []symptom.ID{symptom.AttributeBad, symptom.MetadataServer},
			no: []func(*passed){func(*passed) {}, answers, func(p *passed) {
				p.seen.Attribute = attributeInForce{Known: true, Good: &goodAttribute{Kept: true}}
			}},
			yes: []func(*passed){
				func(p *passed) { p.seen.Attribute.Err = errors.New("x") },
				func(p *passed) { p.seen.Attribute.Good = &goodAttribute{} },
				func(p *passed) { p.seen.Attribute.Known = true }, // --config
			}},
		{ids: []symptom.ID{symptom.AttributeBad},
			no: []func(*passed){func(p *passed) { p.seen.Attribute.Source = errors.New("x") }}},
		{ids: []symptom.ID{symptom.ClockWrong}, within: showLate - 1, no: []func(*passed){answers},
			yes: []func(*passed){func(p *passed) { p.seen.ClockTold = true }}},
		{ids: []symptom.ID{symptom.ClockWrong}, within: showLate, yes: []func(*passed){answers}},
		{ids: []symptom.ID{symptom.MetadataServer},
			yes: []func(*passed){func(p *passed) { p.seen.Attribute.Source = errors.New("x") }}},
	} {
		running := tt.within
		if running == 0 {
			running = time.Hour
		}
		for _, id := range tt.ids {
			for want, changes := range map[bool][]func(*passed){false: tt.no, true: tt.yes} {
				for i, change := range changes {
					p := first()
					change(&p)
					if p.asked(Failure{ID: id, Key: tt.key}, running) != want {
						t.Errorf("%s, case %d: asked is not %v", id, i, want)
					}
				}
			}
		}
	}
}

// TestRestartedAgent: the failure that stood when the agent ended still stands when it starts
// again, until what would find it has been asked.
func TestRestartedAgent(t *testing.T) {
	told, take := heard()
	since := testStart.Add(-time.Hour)
	told.failures = Failures{Lasting: []Failure{{ID: symptom.EnvoyDown, Text: "Envoy is not running",
		First: since, Times: 1}}}
	told.unasked = told.failures.Lasting
	var last status.Status
	told.reporters.status = func(s status.Status) { last = s }
	down := symptom.Finding{ID: symptom.EnvoyDown, Severity: symptom.Error,
		Cause: "Envoy is not running"}
	first := intercepting()
	first.seen.Envoy, first.known = envoywatch.View{}, false
	refused := first
	refused.seen.Envoy.Err, refused.findings = envoyadmin.ErrRefused, []symptom.Finding{down}
	const stands = "Envoy is not running (since 2026-11-28T17:00:00Z, 1 time)"
	for _, step := range []struct {
		name  string
		pass  passed
		want  string
		tells string
	}{
		{"nobody was asked", first, stands, ""},
		{"it is found again", refused, stands, ""},
		{"it is found no more", intercepting(),
			"Envoy is not running (over; 2026-11-28T17:00:00Z to 2026-11-28T18:00:00Z, 1 time)",
			"INFO over: Envoy is not running"},
	} {
		told.publish(step.pass, "nft")
		if got := take(); last.LastFailure != step.want ||
			(step.tells == "") == strings.Contains(got, "over: ") {
			t.Errorf("%s: %q, told\n%s", step.name, last.LastFailure, got)
		}
	}
	if last.Failing != "" {
		t.Errorf("failing: %q", last.Failing)
	}
	// In the other order: it is over as soon as Envoy has answered.
	told, take = heard()
	told.failures = Failures{Lasting: []Failure{{ID: symptom.EnvoyDown, Text: "x", First: since,
		Times: 1}}}
	told.unasked = told.failures.Lasting
	told.publish(first, "nft")
	if got := take(); strings.Contains(got, "over: ") {
		t.Errorf("told\n%s", got)
	}
	told.publish(intercepting(), "nft")
	if got := take(); !strings.Contains(got, "over: ") {
		t.Errorf("told\n%s", got)
	}
}

// TestNotOver: what another failure explains, or bootstrap is about to put right, is not over.
func TestNotOver(t *testing.T) {
	closed := symptom.Facts{Ports: []symptom.Port{{Purpose: "outbound interception"}}}
	dead := closed
	dead.Envoy.Err = envoyadmin.ErrRefused
	mended := dead
	mended.Bootstrapping = true
	told, take := heard()
	for _, step := range []struct {
		name  string
		facts symptom.Facts
		tells []string
	}{
		{"the port is seen first", closed, []string{"ERROR Envoy's outbound interception port"}},
		{"then that Envoy is down", dead, []string{"ERROR Envoy is not running"}},
		{"bootstrap begins", mended, nil},
		{"and fails", dead, nil},
		{"Envoy is back", symptom.Facts{}, []string{"INFO over: Envoy's outbound interception port",
			"INFO over: Envoy is not running"}},
	} {
		p := intercepting()
		p.findings, p.hidden = symptom.Check(step.facts), symptom.Hidden(step.facts)
		take()
		told.publish(p, "nft")
		var tells []string
		for line := range strings.Lines(take()) {
			if strings.HasPrefix(line, "ERROR ") || strings.HasPrefix(line, "INFO over: ") {
				tells = append(tells, line)
			}
		}
		if !slices.EqualFunc(tells, step.tells, strings.HasPrefix) {
			t.Errorf("%s: told\n%s", step.name, strings.Join(tells, ""))
		}
	}
}

// TestStandingKept: a restart is no news of how the VM stands, however it stood while nothing was
// asked; a change is.
func TestStandingKept(t *testing.T) {
	dir, since := t.TempDir(), testStart.Add(-time.Hour)
	if err := (Failures{Standing: Standing{State: "ready", Since: since}}).save(dir); err != nil {
		t.Fatal(err)
	}
	var last status.Status
	restarted := func() *told {
		told, _ := heard()
		told.failures = loadFailures(dir, identity.VM{})
		told.before = told.failures.Standing
		told.reporters.status = func(s status.Status) { last = s }
		return told
	}
	first := intercepting()
	first.seen.Envoy, first.known = envoywatch.View{}, false
	later := intercepting()
	later.seen.Now = testStart.Add(showLate)
	for _, step := range []struct {
		name   string
		passes []passed
		state  string
		want   time.Time
	}{
		{"not asked yet", []passed{first}, "not-ready", testStart},
		{"as before", []passed{first, intercepting()}, "ready", since},
		{"ready late", []passed{first, later}, "ready", later.seen.Now},
	} {
		told := restarted()
		for _, p := range step.passes {
			told.publish(p, "nft")
		}
		if last.State() != step.state || !last.Since.Equal(step.want) {
			t.Errorf("%s: %s since %v, want %v", step.name, last.State(), last.Since, step.want)
		}
	}
}
