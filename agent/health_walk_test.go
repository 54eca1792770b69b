package agent

import (
	"errors"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/envoywatch"
	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/internal/sockdiag"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// sick is a way for a VM to be, the finding it makes, and what /healthz says of it.
type sick struct {
	id     symptom.ID
	name   string
	change func(*passed)
	red    string // in /healthz's reason; "": it stays green, however long this lasts
}

// healthyVM is one that bootstrap has finished, with everything as it should be.
func healthyVM() passed {
	p := intercepting()
	p.seen.Now = time.Now()
	p.seen.Settings.ProxyUser, p.seen.User = "envoy", proxyUser{UID: 107, GID: 107}
	p.seen.Awaited = true
	p.seen.Bootstrap = progress.State{
		Status: progress.Finished, Time: time.Now().Add(-24 * time.Hour), AttributeSum: "x"}
	p.seen.Envoy.Info.Version = envoyadmin.Version{Major: 1, Minor: 40}
	p.seen.Account = &metadata.Account{
		Email: "a@b", Scopes: []string{"https://www.googleapis.com/auth/cloud-platform"}}
	p.outcomes[0].Facts.Family, p.outcomes[1].Facts.Family = iptables.IPv4, iptables.IPv6
	return p
}

// away is an Envoy whose admin interface gives err since then.
func away(p *passed, err error, since time.Duration) {
	p.seen.Envoy.Outage = envoywatch.Outage{
		Err: err, Since: time.Now().Add(-since), Asked: time.Now()}
}

// unconfigured is an Envoy that waits for its control plane.
func unconfigured(p *passed) {
	p.seen.Envoy.State, p.seen.Envoy.Configured = "PRE_INITIALIZING", false
}

func probed(step error) func(*passed) {
	return func(p *passed) {
		unconfigured(p)
		p.seen.Envoy.Probe = &envoyadmin.ProbeError{Step: step, Target: "td:443", Err: errors.New("no")}
	}
}

func refusedBy(code int, message string) func(*passed) {
	return func(p *passed) {
		unconfigured(p)
		p.seen.Envoy.Stream = &symptom.Stream{Target: "td:443", Code: code, Message: message}
	}
}

func rejecting(details string) func(*passed) {
	return func(p *passed) {
		p.seen.Envoy.Rejected = []envoyadmin.Rejected{{Name: "l", Details: details}}
	}
}

// inFamilies are both families in that state, with none of their rules in.
func inFamilies(change func(*symptom.Family)) func(*passed) {
	return func(p *passed) {
		for i := range p.outcomes {
			o := &p.outcomes[i]
			change(&o.Facts)
			o.Status.Usable = o.Facts.Unusable == nil
			o.Status.Equal, o.Status.Jumps, o.NotReady = false, false, "the rules are not in"
		}
	}
}

func look(purpose string, owner uint32, listening bool) []symptom.Port {
	return []symptom.Port{{Family: iptables.IPv4, Purpose: purpose, Listening: listening, Owner: owner,
		Addr: netip.MustParseAddrPort("127.0.0.1:15001")}}
}

// failedBootstrap is a run after one that finished: of an upgrade, or another attribute.
func failedBootstrap(p *passed) {
	p.seen.Bootstrap.Status, p.seen.Bootstrap.Failure = progress.Failed, "no such archive"
	p.seen.Bootstrap.FailureTime = time.Now()
}

// sicknesses are all kinds of findings, with what they come from in their worst form. Most hit a
// whole fleet at once: red would have it recreated, and the new VMs would be no better.
var sicknesses = []sick{
	{symptom.EnvoyDown, "Envoy is down for five minutes", func(p *passed) {
		away(p, envoyadmin.ErrRefused, envoyDead)
	}, ""},
	{symptom.EnvoyDown, "Envoy is dead", func(p *passed) {
		away(p, envoyadmin.ErrRefused, envoyDead+time.Second)
	}, "Envoy is down since "},
	{symptom.AdminUnreadable, "Envoy hangs for five minutes", func(p *passed) {
		away(p, envoyadmin.ErrTimeout, envoyDead)
	}, ""},
	{symptom.AdminUnreadable, "Envoy hangs", func(p *passed) {
		away(p, envoyadmin.ErrTimeout, envoyDead+time.Second)
	}, "Envoy is down since "},
	{symptom.AdminUnreadable, "garbage", func(p *passed) {
		away(p, envoyadmin.ErrNotJSON, 24*time.Hour)
	}, ""},
	{symptom.AdminUnreadable, "a path is forbidden", func(p *passed) {
		away(p, envoyadmin.ErrForbiddenPath, 24*time.Hour)
	}, ""},
	{symptom.ForeignOwner, "somebody holds the admin port", func(p *passed) {
		away(p, &sockdiag.ForeignError{UID: 4711, Addr: netip.MustParseAddrPort("127.0.0.1:15000")},
			24*time.Hour)
	}, ""},
	{symptom.ForeignOwner, "somebody holds an interception port", func(p *passed) {
		p.outcomes[0].Ports = look(outboundPort, 4711, true)
	}, ""},
	{symptom.EnvoyNotConfigured, "no configuration", unconfigured, ""},
	{symptom.ControlPlaneLookUp, "DNS", probed(envoyadmin.ErrLookUp), ""},
	{symptom.ControlPlaneConnect, "a firewall", probed(envoyadmin.ErrConnect), ""},
	{symptom.APINotEnabled, "API", refusedBy(7,
		"Traffic Director API has not been used in project 1 before or it is disabled."), ""},
	{symptom.PermissionDenied, "role", refusedBy(7, "Permission denied"), ""},
	{symptom.ScopeMissing, "scope", func(p *passed) {
		refusedBy(7, "insufficient scopes")(p)
		p.seen.Account = &metadata.Account{Email: "a@b", Scopes: []string{"read-only"}}
	}, ""},
	{symptom.ConfigNotFound, "mesh", refusedBy(5, "Requested entity was not found."), ""},
	{symptom.ControlPlaneRefused, "quota", refusedBy(8, "quota exceeded"), ""},
	{symptom.ListenerRejected, "rejected", rejecting("duplicate address"), ""},
	{symptom.AccessLogUnwritable, "access log", rejecting("unable to open file '/x': denied"), ""},
	{symptom.DriftRepaired, "drift", func(p *passed) {
		p.outcomes[0].Facts.Drift = []iptables.Drift{{Kind: iptables.JumpRemoved, Chain: "OUTPUT"}}
	}, ""},
	{symptom.ProxyUser, "user", func(p *passed) { p.seen.User.Err = errors.New("unknown user") }, ""},
	{symptom.FamilyUnusable, "no table", inFamilies(func(f *symptom.Family) {
		f.Unusable = iptables.ErrNoTable
	}), ""},
	{symptom.RuleRefused, "lock", inFamilies(func(f *symptom.Family) { f.Err = iptables.ErrLocked }), ""},
	{symptom.CouldNotLook, "unread", inFamilies(func(f *symptom.Family) {
		f.Err = iptables.ErrCouldNotLook
	}), ""},
	{symptom.Shadowed, "shadowed", func(p *passed) {
		p.outcomes[0].Facts.Shadow = []iptables.Drift{{Kind: iptables.Shadowed, Chain: "OUTPUT"}}
	}, ""},
	{symptom.Fight, "undone", inFamilies(func(f *symptom.Family) { f.Fighting, f.Undone = true, 99 }), ""},
	{symptom.ServingPortNoChain, "uncovered", func(p *passed) { p.want.Uncovered = []uint16{80} }, ""},
	{symptom.ServerFirst, "MySQL", func(p *passed) { p.want.ServerFirst = []uint16{3306} }, ""},
	{symptom.EntryRefused, "entry", func(p *passed) { p.want.Refused = []symptom.Refusal{{}} }, ""},
	{symptom.ListenerSkipped, "pipe", func(p *passed) {
		p.seen.Envoy.Snapshot.Skipped = []envoyadmin.Skipped{{Listener: "l", Reason: "a pipe"}}
	}, ""},
	{symptom.EnvoyTooOld, "old", func(p *passed) {
		p.seen.Envoy.Info.Version = envoyadmin.Version{Major: 1, Minor: 8}
	}, ""},
	{symptom.AttributeBad, "malformed", func(p *passed) {
		p.seen.Attribute.Err, p.seen.Attribute.Known = attribute.ErrMissing, false
		p.known = false
	}, ""},
	{symptom.AttributeAdvice, "advice", func(p *passed) {
		p.seen.Attribute.Config.Warnings = []string{"port 22"}
	}, ""},
	{symptom.MetadataServer, "503", func(p *passed) {
		p.seen.Attribute.Source, p.seen.Attribute.Known = errors.New("503"), false
		p.known = false
	}, ""},
	{symptom.GuestAttributesOff, "off", func(p *passed) { p.seen.GuestOff = true }, ""},
	{symptom.OtherChain, "chain", func(p *passed) {
		p.seen.Others = []iptables.OtherChain{{Backend: "nft", Hook: iptables.Output}}
	}, ""},
	{symptom.ResolverLoop, "resolver", func(p *passed) {
		p.want.Families[0].DNSPort = 15053
		p.seen.Resolvers.Sockets = look("", 110, true)
	}, ""},
	{symptom.InterceptionNotReady, "closed", func(p *passed) {
		p.outcomes[0].Ports = append(p.outcomes[0].Ports, look(outboundPort, 0, false)...)
	}, ""},
	{symptom.LogUnreadable, "log", func(p *passed) { p.seen.Envoy.LogErr = "permission denied" }, ""},
	{symptom.ListenAddress, "taken", func(p *passed) {
		p.seen.ListenErr, p.seen.MetricsErr = errors.New("in use"), errors.New("line 3")
	}, ""},
	{symptom.Bootstrap, "a later bootstrap failed", failedBootstrap, ""},
	{symptom.Bootstrap, "bootstrap failed, and there is no Envoy", func(p *passed) {
		failedBootstrap(p)
		p.seen.Bootstrap.AttributeSum = ""
		away(p, envoyadmin.ErrRefused, 0)
	}, "bootstrap: FAILED no such archive"},
	{symptom.Bootstrap, "a later bootstrap took Envoy away", func(p *passed) {
		failedBootstrap(p)
		away(p, envoyadmin.ErrRefused, 0)
	}, "bootstrap: FAILED no such archive"},
}

// strains are what Envoy and the rules stand in, in the worst form. A new VM stands in the same, or
// would hide what a person should see.
var strains = map[symptom.ID]func(*symptom.Facts){
	symptom.EnvoyOtherUser: func(s *symptom.Facts) { s.Processes = []uint32{0} },
	symptom.RulesDiffer: func(s *symptom.Facts) {
		s.Differ = []iptables.Drift{{Kind: iptables.TableFlushed, Chain: "nat"}}
	},
	symptom.InputDropped: func(s *symptom.Facts) {
		s.Dropped = []symptom.Dropped{{Port: 80, At: 15006, Chain: "INPUT"}}
	},
	symptom.ApplicationSilent: func(s *symptom.Facts) { s.Silent = []uint16{80} },
	symptom.EndpointsPanic: func(s *symptom.Facts) {
		s.Clusters = append(s.Clusters, symptom.Cluster{Panic: true,
			ClusterHealth: envoyadmin.ClusterHealth{Name: "web", Total: 5}})
	},
	symptom.EndpointsUnhealthy: func(s *symptom.Facts) {
		s.Clusters = append(s.Clusters, symptom.Cluster{
			ClusterHealth: envoyadmin.ClusterHealth{Name: "db", Total: 5, Healthy: 4}})
	},
	symptom.AgentStuck: func(s *symptom.Facts) { s.Agent.Killed = time.Now() },
	symptom.EnvoyIdentity: func(s *symptom.Facts) {
		s.Node, s.Presented = &symptom.Node{Network: "default"}, &symptom.Node{}
	},
	symptom.ClockWrong: func(s *symptom.Facts) { s.Clock = time.Hour },
	symptom.OldConnections: func(s *symptom.Facts) {
		s.Old = make([]symptom.OldConnection, 2)
	},
	symptom.ConntrackFull: func(s *symptom.Facts) {
		s.Conntrack = symptom.Conntrack{Count: 8, Max: 8, Dropped: 1}
	},
	symptom.NoRoute: func(s *symptom.Facts) {
		s.NoRoute = []symptom.Unrouted{{Family: iptables.IPv6, Count: 1,
			Addrs: []netip.Addr{netip.MustParseAddr("fd10::1")}}}
	},
	symptom.EnvoyNotOurs: func(s *symptom.Facts) {
		s.Configured, s.Running = &symptom.EnvoyConfig{NodeID: "a"}, &symptom.EnvoyConfig{NodeID: "b"}
	},
	symptom.ToolsMissing: func(s *symptom.Facts) { s.NoTools = errors.New("no iptables") },
	symptom.ClosedAgentHere: func(s *symptom.Facts) {
		s.ClosedAgent = &symptom.ClosedAgent{Process: "4711 service-proxy-agent"}
	},
	symptom.OtherVMsState:   func(s *symptom.Facts) { s.Discarded = &symptom.Discarded{} },
	symptom.InterceptionOff: func(s *symptom.Facts) { s.Brake.Off = true },
	symptom.InterceptionKey: func(s *symptom.Facts) { s.Brake.Bad = "of" },
}

// ask is what /healthz says after that pass, and what the pass found.
func ask(p passed, under ...func(*symptom.Facts)) (ok bool, why string,
	found []symptom.Finding) {
	facts := p.seen.Facts(p.want, p.outcomes)
	for _, strain := range under {
		strain(&facts)
	}
	p.findings = symptom.Check(facts)
	s := p.status()
	s.Heartbeat = time.Now()
	a := &Agent{awaitBootstrap: true, started: time.Now()}
	a.status.Store(&s)
	ok, why = a.healthz()
	return ok, why, p.findings
}

// TestHealthzWalk goes through every kind of finding: only what a new VM would mend makes /healthz
// fail. A kind that is not in the table fails the test: whoever adds one says which it is.
func TestHealthzWalk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		if ok, why, found := ask(healthyVM()); !ok || len(found) > 0 {
			t.Fatalf("a healthy VM: %v %q, %+v", ok, why, found)
		}
		walked := map[symptom.ID]bool{symptom.Starting: true} // there is no pass: TestHealthzWithoutPass
		for _, s := range sicknesses {
			p := healthyVM()
			s.change(&p)
			ok, why, found := ask(p)
			if ok != (s.red == "") || !strings.Contains(why, s.red) {
				t.Errorf("%s, %s: %v %q; want %q", s.id, s.name, ok, why, s.red)
			}
			if !slices.ContainsFunc(found, func(f symptom.Finding) bool { return f.ID == s.id }) {
				t.Errorf("%s, %s: it is not among %+v", s.id, s.name, found)
			}
			walked[s.id] = true
		}
		for id, strain := range strains {
			ok, why, found := ask(healthyVM(), strain)
			if !ok {
				t.Errorf("%s: %q", id, why)
			}
			if !slices.ContainsFunc(found, func(f symptom.Finding) bool { return f.ID == id }) {
				t.Errorf("%s: it is not among %+v", id, found)
			}
			walked[id] = true
		}
		if ok, why, found := ask(healthyVM(), slices.Collect(maps.Values(strains))...); !ok ||
			len(found) < len(strains) {
			t.Errorf("all strains together: %v %q, %+v", ok, why, found)
		}
		for _, kind := range symptom.Kinds() {
			if !walked[kind.ID] {
				t.Errorf("no row for %s: would a new VM mend it?", kind.ID)
			}
		}
	})
}

// TestHealthzTogether: what is green alone is green together, and hides nothing that is red.
func TestHealthzTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		together := func(with func(sick, passed) bool) (passed, int) {
			p, n := healthyVM(), 0
			for _, s := range sicknesses {
				alone := healthyVM()
				if s.change(&alone); s.red == "" && with(s, alone) {
					s.change(&p)
					n++
				}
			}
			return p, n
		}
		for name, with := range map[string]func(sick, passed) bool{
			"all with an Envoy that answers": func(_ sick, p passed) bool { return p.seen.Envoy.Err == nil },
			// Without one a failed bootstrap is red.
			"all but a failed bootstrap": func(s sick, _ passed) bool { return s.id != symptom.Bootstrap },
		} {
			p, n := together(with)
			if ok, why, found := ask(p); !ok || n < 30 || len(found) < 20 {
				t.Errorf("%s: %v %q, of %d with %d findings", name, ok, why, n, len(found))
			}
			for _, s := range sicknesses {
				if s.red == "" {
					continue
				}
				worse, _ := together(with)
				s.change(&worse)
				if ok, _, _ := ask(worse); ok {
					t.Errorf("%s, and %s: green", name, s.name)
				}
			}
		}
	})
}

// TestHealthzWithoutPass: an agent that has not made its first pass, or makes no more, is red,
// whatever it found last.
func TestHealthzWithoutPass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &Agent{awaitBootstrap: true, started: time.Now()}
		if ok, why := a.healthz(); ok || why != "no pass yet" {
			t.Errorf("%v %q", ok, why)
		}
		for _, s := range append(sicknesses, sick{name: "healthy", change: func(*passed) {}}) {
			p := healthyVM()
			s.change(&p)
			last := p.status()
			last.Heartbeat = time.Now()
			a.status.Store(&last)
			time.Sleep(stuck + time.Second)
			if ok, why := a.healthz(); ok || !strings.HasPrefix(why, "the loop is stuck since ") {
				t.Errorf("%s: %v %q", s.name, ok, why)
			}
		}
	})
}
