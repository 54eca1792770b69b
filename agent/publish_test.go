package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/envoywatch"
	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/internal/reconcile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/report"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

var testStart = time.Date(2026, 11, 28, 18, 0, 0, 0, time.UTC)

// intercepting is a pass that found everything as it should be.
func intercepting() passed {
	return passed{
		seen: Observation{
			Now: testStart, Local: []netip.Addr{},
			Settings: Settings{Version: "1.2.3", EnvoyAdmin: "127.0.0.1:15000",
				WhenEnvoyDown: reconcile.Keep},
			Attribute: attributeInForce{Known: true, Config: attribute.Default()},
			Envoy: envoywatch.View{
				State: "LIVE", Configured: true, Generation: 1, Past: envoywatch.Past{Dumps: 3},
				Info: envoyadmin.ServerInfo{Text: "1.40.0"},
			},
		},
		known: true, serial: 1,
		outcomes: []reconcile.Outcome{
			{Status: status.Family{Family: "IPv4", Usable: true, Equal: true, Jumps: true}, Written: true},
			{Status: status.Family{Family: "IPv6", Usable: true, Equal: true, Jumps: true}, Written: true},
		},
	}
}

// TestNotReady: each reason alone makes the VM not ready, and the first of several is told.
func TestNotReady(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(*passed)
		want   string
	}{
		{"all is well", func(*passed) {}, ""},
		{"paused", func(p *passed) { p.paused = true; p.known = false }, "paused by cleanup until restarted"},
		{"Envoy is away", func(p *passed) { p.seen.Envoy.Err = errors.New("refused") }, "Envoy: refused"},
		{"Envoy is away, and the one before serves", func(p *passed) {
			p.seen.Envoy.Err, p.seen.Envoy.Handover = errors.New("refused"), true
			p.seen.Envoy.State, p.seen.Envoy.Configured = "INITIALIZING", false
		}, ""},
		{"it starts", func(p *passed) { p.seen.Envoy.State = "INITIALIZING" }, "Envoy is INITIALIZING, not LIVE"},
		{"it has nothing", func(p *passed) { p.seen.Envoy.Configured = false }, "Envoy has not received its listeners"},
		{"no attribute", func(p *passed) { p.seen.Attribute.Known = false; p.known = false }, "the gce-service-proxy attribute was not read yet"},
		{"no listeners", func(p *passed) { p.known = false }, "Envoy's listeners were not read yet"},
		{"no addresses", func(p *passed) { p.seen.Local = nil; p.known = false },
			"the VM's addresses were not read yet"},
		{"IPv4", func(p *passed) { p.outcomes[0].NotReady = "four" }, "four"},
		{"IPv6", func(p *passed) { p.outcomes[1].NotReady = "six" }, "six"},
		{"both", func(p *passed) { p.outcomes[0].NotReady, p.outcomes[1].NotReady = "four", "six" }, "four"},
		{"no IPv6 here", func(p *passed) { p.outcomes[1].Status.Usable = false }, ""},
		{"no IPv4 here, and IPv6 is not ready", func(p *passed) {
			p.outcomes[0].Status.Usable = false
			p.outcomes[1].NotReady = "six"
		}, "six"},
		{"neither", func(p *passed) {
			p.outcomes[0].Status.Usable, p.outcomes[1].Status.Usable = false, false
		}, "neither IPv4 nor IPv6 rules can be used"},
	} {
		p := intercepting()
		test.change(&p)
		s := p.status()
		if s.NotReady != test.want || s.Ready != (test.want == "") {
			t.Errorf("%s: ready %v, %q; want %q", test.name, s.Ready, s.NotReady, test.want)
		}
	}
}

// TestMode: what the rules do, in a word.
func TestMode(t *testing.T) {
	out := func(p *passed, family int) { p.outcomes[family].Status.Jumps = false }
	for _, test := range []struct {
		name   string
		change func(*passed)
		want   string
	}{
		{"both", func(*passed) {}, "intercepting"},
		{"IPv6 alone", func(p *passed) { out(p, 0) }, "intercepting"},
		{"IPv4 alone", func(p *passed) { out(p, 1) }, "intercepting"},
		{"paused", func(p *passed) { p.paused = true }, "paused"},
		{"neither", func(p *passed) { out(p, 0); out(p, 1) }, "hold"},
		{"taken out, and that is the policy", func(p *passed) {
			out(p, 0)
			out(p, 1)
			p.outcomes[0].Written = false
			p.seen.Settings.WhenEnvoyDown = reconcile.Bypass
		}, "bypass"},
		{"never in, with that policy", func(p *passed) {
			out(p, 0)
			out(p, 1)
			p.outcomes[0].Written, p.outcomes[1].Written = false, false
			p.seen.Settings.WhenEnvoyDown = reconcile.Bypass
		}, "hold"},
		{"in, in a family that can no longer be used", func(p *passed) {
			out(p, 0)
			p.outcomes[1].Status.Usable = false
		}, "hold"},
	} {
		p := intercepting()
		test.change(&p)
		if got := p.status().Mode; got != test.want {
			t.Errorf("%s: %s, want %s", test.name, got, test.want)
		}
	}
}

// TestStatus: Envoy and the repairs as the status shows them.
func TestStatus(t *testing.T) {
	p := intercepting()
	p.seen.Envoy.Rejected = make([]envoyadmin.Rejected, 2)
	p.seen.Envoy.Snapshot.Listeners = make([]envoyadmin.Listener, 5)
	p.seen.Attribute.Good = &goodAttribute{Read: testStart, Kept: true}
	p.seen.Attribute.Config.ServingPorts = []uint16{80}
	p.seen.Bootstrap = progress.State{Status: progress.Finished, AttributeSum: "x"}
	p.outcomes[0].Undone, p.outcomes[0].LastDriftBy, p.outcomes[0].LastDriftAt = 2, "nft", testStart
	p.outcomes[1].Undone, p.outcomes[1].LastDriftBy, p.outcomes[1].LastDriftAt = 3, "docker",
		testStart.Add(-time.Second)
	s := p.status()
	if s.Envoy.Rejected != 2 || s.Envoy.Listeners != 5 || s.Envoy.State != "LIVE" ||
		s.Envoy.Version != "1.40.0" ||
		s.Envoy.Admin != "127.0.0.1:15000" || !s.Envoy.Down.IsZero() || s.Version != "1.2.3" {
		t.Errorf("%+v", s)
	}
	if s.Attribute == nil || !s.Attribute.Kept || !s.Attribute.Read.Equal(testStart) ||
		!slices.Equal(s.ServingPorts, []uint16{80}) {
		t.Errorf("attribute %+v, serving ports %v", s.Attribute, s.ServingPorts)
	}
	if s.Undone != 5 || s.LastDriftBy != "nft" || !s.LastDriftWhen.Equal(testStart) {
		t.Errorf("%d undone, last by %q at %v", s.Undone, s.LastDriftBy, s.LastDriftWhen)
	}
	if b := s.Bootstrap; b.Status != progress.Finished || !b.Done {
		t.Errorf("bootstrap %+v", b)
	}
	for _, test := range []struct {
		err  error
		down bool
	}{
		{envoyadmin.ErrRefused, true}, {envoyadmin.ErrTimeout, true}, {errors.New("403 Forbidden"), false},
	} {
		p.seen.Envoy.Outage = envoywatch.Outage{Err: test.err, Since: testStart}
		e := p.status().Envoy
		if e.State != "" || e.Down.Equal(testStart) != test.down || e.Down.IsZero() == test.down {
			t.Errorf("%v: %+v", test.err, e)
		}
	}
	p.seen.Attribute.Good = nil
	if s := p.status(); s.Attribute != nil {
		t.Errorf("of --config: %+v", s.Attribute)
	}
}

// heard is a told whose words can be read.
func heard() (t *told, take func() string) {
	var lines []string
	dumps, tries := 0, 0
	add := func(line string) { lines = append(lines, line) }
	t = &told{log: zap.NewNop(), started: testStart}
	t.reporters = reporters{
		events: func(e report.Event) { add(string(e.Severity) + " " + e.Message) },
		metrics: func(_ status.Status, m report.Pass) {
			add(fmt.Sprint("dumps ", m.DumpReads-dumps))
			dumps = m.DumpReads
		},
		status:      func(s status.Status) { add(fmt.Sprint("pass ", s.Passes, " ", s.LastFailure)) },
		intercepted: func(intercepted) {},
		history:     func(f Failures) { add(fmt.Sprint("history ", len(f.Lasting))) },
		transitions: func([]status.Transition) {},
		ready: func() error { // the second time it works
			add("systemd")
			tries++
			if tries == 1 {
				return errors.New("no folder")
			}
			return nil
		},
	}
	return t, func() string {
		all := strings.Join(lines, "\n")
		lines = nil
		return all
	}
}

// TestTold: transitions are told once, the metrics and the status each pass.
func TestTold(t *testing.T) {
	told, take := heard()
	failure := symptom.Finding{ID: symptom.EnvoyDown, Severity: symptom.Error,
		Cause: "Envoy is not running"}
	warning := symptom.Finding{ID: symptom.DriftRepaired, Severity: symptom.Warning, Cause: "drift"}
	explained := symptom.Finding{
		ID: symptom.InterceptionNotReady, Severity: symptom.Error, Cause: "closed",
		ExplainedBy: symptom.EnvoyDown,
	}
	advice := symptom.Finding{ID: symptom.AttributeAdvice, Severity: symptom.Advice, Cause: "advice"}
	for _, step := range []struct {
		name     string
		change   func(*passed)
		findings []symptom.Finding
		want     string
	}{
		{"the first pass", func(p *passed) {}, nil,
			"history 0\ninfo envoy version: 1.40.0\ninfo interception: intercepting\ninfo 0 services are intercepted\n" +
				"info ready: Envoy 1.40.0 is live and the rules are in place\nsystemd\ndumps 3\npass 1 "},
		{"the same again", func(p *passed) {}, nil, "systemd\ndumps 0\npass 2 "},
		{"a failure, with what it explains", func(p *passed) {
			p.seen.Envoy.Err = errors.New("refused")
			p.seen.Envoy.Dumps = 4
		}, []symptom.Finding{failure, explained, warning, advice},
			"error Envoy is not running\nhistory 1\nwarning drift\nwarning not ready: Envoy: refused\ndumps 1\n" +
				"pass 3 Envoy is not running (since 2026-11-28T18:00:00Z, 1 time)"},
		{"it lasts", func(p *passed) {
			p.seen.Envoy.Err = errors.New("refused")
			p.seen.Envoy.Dumps = 4
		}, []symptom.Finding{failure, explained, warning, advice},
			"dumps 0\npass 4 Envoy is not running (since 2026-11-28T18:00:00Z, 1 time)"},
		{"it is over", func(p *passed) { p.seen.Envoy.Dumps = 4 }, nil,
			"info over: Envoy is not running\nhistory 0\ninfo ready: Envoy 1.40.0 is live and the rules are in place\ndumps 0\n" +
				"pass 5 Envoy is not running (over; 2026-11-28T18:00:00Z to 2026-11-28T18:00:00Z, 1 time)"},
		{"jumps out", func(p *passed) {
			p.seen.Envoy.Dumps = 4
			p.outcomes[0].Status.Jumps, p.outcomes[1].Status.Jumps = false, false
		}, nil, "info interception: hold\ndumps 0\n" +
			"pass 6 Envoy is not running (over; 2026-11-28T18:00:00Z to 2026-11-28T18:00:00Z, 1 time)"},
	} {
		p := intercepting()
		p.findings = step.findings
		step.change(&p)
		told.publish(p, "nft")
		if got := strings.ToLower(take()); got != strings.ToLower(step.want) {
			t.Errorf("%s: told\n%s\nwant\n%s", step.name, got, step.want)
		}
	}
}

// TestBrakeIsToldAlone: what only says that nothing is intercepted is no failure while the brake is
// on, so agent-last-failure tells of the brake; and it is one again when the key goes.
func TestBrakeIsToldAlone(t *testing.T) {
	if symptom.InterceptionMetadata != metadata.InterceptionKey {
		t.Errorf("the findings speak of another key, %s", symptom.InterceptionMetadata)
	}
	told, take := heard()
	found := func(brake symptom.Brake) []symptom.Finding {
		return symptom.Check(symptom.Facts{Brake: brake, Uncovered: []uint16{8081},
			Ports: []symptom.Port{{Family: iptables.IPv4, Purpose: outboundPort,
				Addr: netip.MustParseAddrPort("127.0.0.1:15001")}}})
	}
	for _, step := range []struct {
		after time.Duration
		brake symptom.Brake
		want  string
	}{
		{0, symptom.Brake{}, "Envoy's outbound interception port 15001 does not accept "},
		{time.Minute, symptom.Brake{Off: true, By: symptom.ByProject,
			Since: testStart.Add(time.Minute)}, "Envoy's outbound interception port 15001 does not accept "},
		{time.Minute + warningAfter, symptom.Brake{Off: true, By: symptom.ByProject,
			Since: testStart.Add(time.Minute)}, "Interception is off since 2026-11-28T18:01:00Z, as intended: "},
		{2 * time.Minute, symptom.Brake{}, "Envoy's outbound interception port 15001 does not accept "},
	} {
		p := intercepting()
		p.seen.Now = testStart.Add(step.after)
		p.findings = found(step.brake)
		told.publish(p, "nft")
		text := take()
		_, text, _ = strings.Cut(text[strings.LastIndex(text, "\npass ")+1:], " ")
		if _, last, _ := strings.Cut(text, " "); !strings.HasPrefix(last, step.want) {
			t.Errorf("after %v: %q, want %q", step.after, last, step.want)
		}
	}
}

// TestToldByKey: of two failures of one kind each is told by itself.
func TestToldByKey(t *testing.T) {
	told, take := heard()
	one := Failure{ID: symptom.ForeignOwner, Key: "1", Text: "one"}
	two := Failure{ID: symptom.ForeignOwner, Key: "2", Text: "two"}
	core, logs := observer.New(zap.InfoLevel)
	told.log = zap.New(core)
	told.tellFailures(Failures{}, Failures{Lasting: []Failure{one}}, nil)
	told.tellFailures(Failures{Lasting: []Failure{one}}, Failures{Lasting: []Failure{one, two}},
		nil)
	told.tellFailures(Failures{Lasting: []Failure{one, two}}, Failures{Lasting: []Failure{two}},
		nil)
	if got := strings.ToLower(take()); got != "error one\nerror two\ninfo over: one" {
		t.Errorf("told\n%s", got)
	}
	var logged []string
	for _, entry := range logs.All() {
		id := entry.ContextMap()["id"]
		logged = append(logged, fmt.Sprint(entry.Level, " ", entry.Message, " ", id))
	}
	want := []string{
		"error one port-foreign-owner", "error two port-foreign-owner",
		"info over: one port-foreign-owner",
	}
	if !slices.Equal(logged, want) {
		t.Errorf("logged %q", logged)
	}
}

// TestToldInTheLog: transitions are there in the words of every other channel.
func TestToldInTheLog(t *testing.T) {
	told, _ := heard()
	core, logs := observer.New(zap.InfoLevel)
	told.log = zap.New(core)
	p := intercepting()
	told.publish(p, "nft")
	p.paused = true
	drift := symptom.Finding{ID: symptom.DriftRepaired, Severity: symptom.Warning, Cause: "drift"}
	p.findings = []symptom.Finding{drift}
	told.publish(p, "nft")
	var logged []string
	for _, entry := range logs.All() {
		logged = append(logged, fmt.Sprint(entry.Level, " ", entry.Message, " ", entry.ContextMap()))
	}
	want := []string{
		"info Envoy Version: 1.40.0 map[]", "info interception: intercepting map[]",
		"info 0 services are intercepted map[services:0]",
		"info ready: Envoy 1.40.0 is live and the rules are in place map[]",
		"warn cannot tell systemd of the readiness map[error:no folder]",
		"warn drift map[cause:drift id:drift]", "info interception: paused map[was:intercepting]",
		"warn not ready: paused by cleanup until restarted map[]",
	}
	if !slices.Equal(logged, want) {
		t.Errorf("logged\n%s", strings.Join(logged, "\n"))
	}
}

// TestBootstrapProgress: the state file is read each second, its story is told once, and bootstrap
// is asked for again while it has finished for another attribute.
func TestBootstrapProgress(t *testing.T) {
	now, reads := testStart, 0
	state := progress.State{Status: progress.Finished, Time: now, AttributeSum: progress.Sum("old")}
	ask := func() (progress.State, error) { reads++; return state, nil }
	var b bootstrapProgress
	b.read(now, ask)
	b.read(now.Add(bootstrapEvery-1), ask)
	if reads != 1 || b.state.Status != progress.Finished {
		t.Errorf("read %d times: %+v", reads, b.state)
	}
	b.read(now.Add(bootstrapEvery), func() (progress.State, error) {
		reads++
		return progress.State{}, errors.New("half")
	})
	if reads != 2 || b.state.Status != progress.Finished {
		t.Errorf("half of a file: read %d times, %+v", reads, b.state)
	}
	for _, step := range []struct {
		name  string
		after time.Duration
		text  []byte
		want  bool
	}{
		{"none was read", 0, nil, false},
		{"the same", 0, []byte("old"), false},
		{"a new one", 0, []byte("new"), true},
		{"it does not come", requestEvery - 1, []byte("new"), false},
		{"still not", 1, []byte("new"), true},
		{"another one at once", 1, []byte("newer"), true},
		{"back", 0, []byte("old"), false},
	} {
		now = now.Add(step.after)
		if got := b.due(now, step.text); got != step.want {
			t.Errorf("%s: asked for %v", step.name, got)
		}
	}
	b.state.Status = progress.InProgress
	if b.due(now.Add(time.Hour), []byte("x")) {
		t.Error("asked for while it runs")
	}

	b.state.Story = []progress.Line{
		{Seq: 1, Time: testStart.Add(-storyAge), Text: "old"}, {Seq: 2, Time: testStart, Text: "a"}, {Seq: 3, Time: testStart, Text: "b"},
	}
	texts := func() (all string) {
		for _, line := range b.story(testStart) {
			all += line.Text
		}
		return all
	}
	if got := texts(); got != "ab" {
		t.Errorf("told %q", got)
	}
	b.state.Story = append(b.state.Story, progress.Line{Seq: 4, Time: testStart, Text: "c"})
	if got := texts(); got != "c" {
		t.Errorf("told %q after that", got)
	}
}
