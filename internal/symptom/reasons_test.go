package symptom

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// TestFollowsTable: no way through the table leads back to where it began.
func TestFollowsTable(t *testing.T) {
	reasons := map[ID]map[ID]bool{}
	for _, rule := range follows {
		for _, what := range rule.what {
			kindOf(t, what)
			for _, from := range rule.from {
				kindOf(t, from)
				if reasons[what] == nil {
					reasons[what] = map[ID]bool{}
				}
				reasons[what][from] = true
			}
		}
	}
	var walk func(id ID, path []ID)
	walk = func(id ID, path []ID) {
		if slices.Contains(path, id) {
			t.Fatalf("a circle: %v", append(path, id))
		}
		for from := range maps.Keys(reasons[id]) {
			walk(from, append(slices.Clone(path), id))
		}
	}
	for id := range reasons {
		walk(id, nil)
	}
}

// add puts what differs from the healthy VM in b into a: slices are joined.
func add(a, b, healthy reflect.Value) {
	switch a.Kind() {
	case reflect.Struct:
		if a.Type() == reflect.TypeFor[time.Time]() {
			if !b.IsZero() {
				a.Set(b)
			}
			return
		}
		for i := range a.NumField() {
			add(a.Field(i), b.Field(i), healthy.Field(i))
		}
	case reflect.Slice:
		if !reflect.DeepEqual(b.Interface(), healthy.Interface()) {
			a.Set(reflect.AppendSlice(a.Slice3(0, a.Len(), a.Len()), b))
		}
	default:
		if !reflect.DeepEqual(b.Interface(), healthy.Interface()) {
			a.Set(b)
		}
	}
}

func together(all ...Facts) Facts {
	f, healthy := live(nil), live(nil)
	for _, other := range all {
		add(reflect.ValueOf(&f).Elem(), reflect.ValueOf(other), reflect.ValueOf(healthy))
	}
	return f
}

// TestTogether: whatever comes together, a reason is there, is not the finding itself, and is not
// milder; going from reason to reason ends. So as many errors count as there are causes, and at
// least one where there is an error.
func TestTogether(t *testing.T) {
	t.Parallel()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	explained := map[string]int{}
	rounds := 400
	if os.Getenv("SOAK") != "" {
		rounds = 50_000
	}
	for range rounds {
		var some []Facts
		var names []string
		for range 1 + random.IntN(8) {
			e := examples[random.IntN(len(examples))]
			some, names = append(some, e.facts), append(names, e.when)
		}
		f := together(some...)
		findings := Check(f)
		if !reflect.DeepEqual(findings, Check(f)) {
			t.Fatalf("%q: not the same findings twice", names)
		}
		worst, reason := map[ID]Severity{}, map[ID]ID{}
		for _, found := range findings {
			isKind(t, found)
			worst[found.ID] = max(worst[found.ID], found.Severity)
		}
		errors, counted := 0, 0
		for _, found := range findings {
			if by := found.ExplainedBy; by != "" {
				severity, there := worst[by]
				if !there || severity < found.Severity || by == found.ID {
					t.Fatalf("%q: %s by %s", names, found.ID, by)
				}
				reason[found.ID] = by
				explained[string(found.ID)+"<"+string(by)]++
			}
			if found.Severity == Error {
				errors++
				if found.ExplainedBy == "" {
					counted++
				}
			}
		}
		if errors > 0 && counted == 0 {
			t.Fatalf("%q: errors, and none counts: %+v", names, findings)
		}
		for id := range reason {
			for steps := 0; id != ""; id = reason[id] {
				if steps++; steps > len(findings) {
					t.Fatalf("%q: a circle at %s", names, id)
				}
			}
		}
	}
	// What was drawn must have held something: how much differs from seed to seed, 29 pairs and more.
	if len(explained) < 15 {
		t.Errorf("only %d pairs were seen: %v", len(explained), explained)
	}
}

// TestReasons is what explains what among the things that Envoy and the rules stand in.
func TestReasons(t *testing.T) {
	closed := func(f *Facts) {
		f.Ports = append(f.Ports, Port{Family: iptables.IPv4, Purpose: "outbound interception",
			Addr: netip.MustParseAddrPort("127.0.0.1:15001")})
	}
	uncovered := func(f *Facts) { f.Uncovered = []uint16{8080} }
	unconfigured := func(f *Facts) { f.Envoy.State, f.Envoy.Configured = "PRE_INITIALIZING", false }
	notFound := func(f *Facts) { f.Envoy.Stream = &Stream{Code: 5, Message: "no"} }
	root := func(f *Facts) {
		f.Processes = []uint32{0}
		f.Ports = append(f.Ports, Port{Family: iptables.IPv4, Purpose: "inbound interception",
			Addr: netip.MustParseAddrPort("0.0.0.0:15006"), Listening: true, OwnerName: "root"})
	}
	another := func(f *Facts) {
		f.Configured, f.Running = &EnvoyConfig{NodeID: "a"}, &EnvoyConfig{NodeID: "b"}
	}
	probe := func(step error) func(*Facts) {
		return func(f *Facts) {
			f.Envoy.Probe = &envoyadmin.ProbeError{Step: step, Err: errors.New("no")}
		}
	}
	clock := func(off time.Duration) func(*Facts) { return func(f *Facts) { f.Clock = off } }
	differ := func(f *Facts) {
		f.Differ = []iptables.Drift{{Kind: iptables.TableFlushed, Chain: "nat"}}
	}
	noTools := func(f *Facts) { f.NoTools = errors.New("not found") }
	noTable := func(f *Facts) {
		f.Families = []Family{{Family: iptables.IPv4, Unusable: iptables.ErrNoTable}}
	}
	fight := func(f *Facts) {
		f.Families = []Family{{Family: iptables.IPv4, Fighting: true, Undone: 9}}
	}
	other := func(process string) func(*Facts) {
		return func(f *Facts) { f.ClosedAgent = &ClosedAgent{Starts: true, Process: process} }
	}
	brake := func(f *Facts) { f.Brake = Brake{Off: true, Since: now, By: ByProject} }
	noEnvoy := func(f *Facts) { f.Envoy.Err, f.Envoy.Since = envoyadmin.ErrRefused, now }
	closedBefore := func(age time.Duration) func(*Facts) {
		return func(f *Facts) {
			f.Envoy.Stream = &Stream{Code: 13, Message: "upstream_reset_after_response_started",
				When: now.Add(-age)}
		}
	}
	for _, tt := range []struct {
		name  string
		facts []func(*Facts)
		want  string // as in TestFollows
	}{
		{"Envoy ended, and its stream with it", []func(*Facts){noEnvoy, closedBefore(time.Second)},
			"envoy-down control-plane-refused<envoy-down"},
		{"the same, of whose stream the daemon alone knows", []func(*Facts){noEnvoy, func(f *Facts) {
			f.Unseen = map[Source]string{FromEnvoy: "it is not running", FromEnvoyLog: "not looked at"}
			f.Agent.Findings = []Finding{finding(ControlPlaneRefused, 0, Error, "", "refused").
				seen(FromEnvoyLog, now.Add(-time.Second), "gRPC config stream closed")}
		}}, "envoy-down control-plane-refused<envoy-down"},
		{"Envoy ended after its stream was refused", []func(*Facts){noEnvoy, closedBefore(time.Minute)},
			"envoy-down control-plane-refused"},
		{"Envoy runs as root", []func(*Facts){root, closed, uncovered},
			"envoy-other-user interception-port-closed<envoy-other-user serving-port-not-inbound<envoy-other-user"},
		{"and got nothing", []func(*Facts){root, unconfigured}, "envoy-other-user envoy-not-configured<envoy-other-user"},
		{"the wrong network", []func(*Facts){presents("123456789012", "x"), unconfigured, notFound},
			"envoy-identity configuration-not-found<envoy-identity envoy-not-configured<configuration-not-found"},
		{"the wrong network, of another Envoy", []func(*Facts){another, presents("123456789012", "x"), unconfigured, notFound},
			"envoy-not-as-configured envoy-identity<envoy-not-as-configured configuration-not-found<envoy-not-as-configured " +
				"envoy-not-configured<configuration-not-found"},
		{"another network, which works", []func(*Facts){presents("123456789012", "x"), closed}, "interception-port-closed envoy-identity"},
		{"the clock", []func(*Facts){clock(time.Hour), probe(envoyadmin.ErrTLS)}, "clock-wrong control-plane-unreachable<clock-wrong"},
		{"the clock, and a firewall", []func(*Facts){clock(time.Hour), probe(envoyadmin.ErrConnect)}, "clock-wrong control-plane-unreachable"},
		// Half a minute is no reason for that, and a warning would hide an error.
		{"a clock that is a little off", []func(*Facts){clock(time.Minute), probe(envoyadmin.ErrTLS)}, "control-plane-unreachable clock-wrong"},
		{"no iptables", []func(*Facts){noTools, noTable, differ}, "iptables-missing family-unusable<iptables-missing rules-differ<iptables-missing"},
		{"another agent runs", []func(*Facts){differ, fight, another, other("4711 agent")},
			"closed-agent rules-differ<closed-agent rules-undone<closed-agent envoy-not-as-configured<closed-agent"},
		{"another agent's unit is meant to start, and its processes are hidden", []func(*Facts){differ,
			fight, other("")}, "closed-agent rules-differ rules-undone<closed-agent"},
		{"the brake is on", []func(*Facts){brake, closed, uncovered},
			"interception-off interception-port-closed<interception-off serving-port-not-inbound<interception-off"},
		{"the brake is on, and Envoy is down", []func(*Facts){brake, closed, noEnvoy},
			"envoy-down interception-off interception-port-closed<envoy-down"},
		{"the brake is on, and the jumps are out", []func(*Facts){brake, func(f *Facts) {
			f.Differ = []iptables.Drift{{Kind: iptables.JumpRemoved, Chain: "OUTPUT"}}
		}}, "interception-off"},
		{"the brake is on, and the jumps are in", []func(*Facts){brake, func(f *Facts) {
			f.Differ = []iptables.Drift{{Kind: iptables.JumpRemoved},
				{Kind: iptables.JumpLeft, Chain: "OUTPUT"}}
		}}, "interception-off rules-differ"},
		{"a stuck agent", []func(*Facts){differ, func(f *Facts) { f.Agent = Agent{Heartbeat: now, Now: now.Add(time.Hour)} }},
			"agent-stuck rules-differ<agent-stuck"},
		{"an agent that was stuck", []func(*Facts){differ, func(f *Facts) { f.Agent = Agent{Killed: now} }}, "rules-differ agent-stuck"},
	} {
		f := live(nil)
		for _, change := range tt.facts {
			change(&f)
		}
		var have []string
		for _, found := range Check(f) {
			have = append(have, strings.TrimSuffix(string(found.ID)+"<"+string(found.ExplainedBy), "<"))
		}
		slices.Sort(have)
		want := strings.Fields(tt.want)
		slices.Sort(want)
		if fmt.Sprint(have) != fmt.Sprint(want) {
			t.Errorf("%s:\nhave %s\nwant %s", tt.name, have, want)
		}
	}
}
