package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/envoywatch"
	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/internal/reconcile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/sockdiag"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// TestAskAll: each question has its own time, and one that hangs holds none of the others.
func TestAskAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &looking{unseen: map[symptom.Source]string{}}
		hangs, took := make(chan bool), map[string]bool{}
		ask := func(of symptom.Source, limit time.Duration,
			answer func(context.Context) error) question {
			return question{[]symptom.Source{of}, limit, func(ctx context.Context) (func(*looking), error) {
				err := answer(ctx)
				return func(*looking) { took[string(of)] = true }, err
			}}
		}
		began := time.Now()
		l.askAll(t.Context(),
			ask("quick", time.Second, func(context.Context) error { return nil }),
			ask("fails", time.Second, func(context.Context) error { return errors.New("why\nnot") }),
			ask("heeds", 2*time.Second, func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }),
			ask("hangs", 3*time.Second, func(context.Context) error { <-hangs; return nil }),
			ask("slow", 4*time.Second, func(context.Context) error { time.Sleep(4 * time.Second); return nil }))
		if since := time.Since(began); since != 4*time.Second {
			t.Errorf("it took %v", since)
		}
		want := map[symptom.Source]string{"fails": "why not", "heeds": "no answer in time",
			"hangs": "no answer in time"}
		if diff := cmp.Diff(want, l.unseen); diff != "" {
			t.Errorf("unseen (-want +have):\n%s", diff)
		}
		close(hangs)
		synctest.Wait()
		if took["hangs"] || !took["quick"] || !took["heeds"] || !took["slow"] {
			t.Errorf("took %v", took)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began = time.Now()
		l.askAll(ctx, ask("late", time.Hour, func(context.Context) error {
			time.Sleep(time.Minute)
			return nil
		}))
		if since := time.Since(began); since != time.Second || l.unseen["late"] == "" {
			t.Errorf("beyond the time of all: %v, %v", since, l.unseen)
		}
		time.Sleep(time.Minute) // it may end
	})
}

func TestWhyNot(t *testing.T) {
	root := os.Geteuid() == 0
	for _, err := range []error{fmt.Errorf("x: %w", fs.ErrPermission),
		fmt.Errorf("x: %w", iptables.ErrNotRoot)} {
		if why := whyNot(err); (why == "needs root") == root {
			t.Errorf("%v: %q", err, why)
		}
	}
	if why := whyNot(fmt.Errorf("x: %w", context.DeadlineExceeded)); why != "no answer in time" {
		t.Error(why)
	}
	if why := whyNot(errors.New("a\x1b[1m\nb")); why != "a [1m b" {
		t.Errorf("%q", why)
	}
}

// aLooking is a look at a VM on which all is well, as its sources have told it.
func aLooking(t *testing.T) *looking {
	proxy := func(uint16) ([]sockdiag.Listener, error) {
		return []sockdiag.Listener{{Addr: netip.MustParseAddrPort("127.0.0.1:15001"), UID: 107}}, nil
	}
	config := attribute.Default()
	l := &looking{unseen: map[symptom.Source]string{}, moved: true, installed: true,
		vm: vm{tcp: proxy, udp: proxy, userName: func(uint32) string { return "" }}}
	l.Seen = Observation{
		Now: testStart, Settings: Settings{ProxyUser: "envoy"}, User: proxyUser{UID: 107, GID: 107},
		Attribute: attributeInForce{Known: true, Config: config, Serial: 1, Good: &goodAttribute{}},
		Envoy: envoywatch.View{State: "LIVE", Configured: true, Generation: 1,
			Snapshot: envoyadmin.Snapshot{Listeners: oneService()}},
	}
	w := wanted{}
	want, known := w.desired(l.Seen.Settings, l.Seen)
	if !known || want.Families[0].OutboundPort != 15001 {
		t.Fatalf("wanted: %+v", want)
	}
	l.Have[0] = tableOf(t, reconcile.Shaped(want.Families[0], reconcile.Whole()))
	l.kernel = kernelSeen{read: true}
	l.Daemon = &status.Status{Heartbeat: testStart, Mode: "intercepting"}
	l.again = func(context.Context) {}
	return l
}

// oneService is an outbound listener for one address of IPv4.
func oneService() []envoyadmin.Listener {
	l := outboundOf(serviceAt("web", 80, "10.0.0.1/32"))
	l.Addresses = l.Addresses[:1]
	return []envoyadmin.Listener{l}
}

// tableOf is a table that holds a ruleset.
func tableOf(t *testing.T, r iptables.Ruleset) iptables.Table {
	t.Helper()
	table, err := iptables.Parse(iptables.IPv4, []byte(r.String()))
	if err != nil {
		t.Fatal(err)
	}
	return table
}

func ids(found []symptom.Finding) (all []symptom.ID) {
	for _, f := range found {
		if f.Severity > symptom.Advice {
			all = append(all, f.ID)
		}
	}
	return all
}

// TestConclude: what is made of what the sources told, or did not.
func TestConclude(t *testing.T) {
	nobody := func(l *looking) { // nothing of the agent's is here
		l.installed, l.Daemon, l.Have, l.Seen.Attribute = false, nil, [2]iptables.Table{},
			attributeInForce{Config: attribute.Default(), Err: metadata.ErrNoAttribute}
	}
	dark := func(l *looking) { // nothing answers
		l.moved, l.hung, l.silent, l.Daemon = false, errors.New("hangs"), "hangs", nil
		l.Seen.Attribute = attributeInForce{Config: attribute.Default()}
		l.Seen.Envoy = envoywatch.View{Outage: envoywatch.Outage{Err: envoyadmin.ErrTimeout}}
		l.HaveErr = [2]error{errNoAnswer, errNoAnswer}
		l.kernel = kernelSeen{}
	}
	flushed := func(l *looking) { l.Have[0] = tableOf(t, iptables.Ruleset{}) }
	old := func(l *looking) { l.Daemon.Heartbeat = testStart.Add(-time.Hour) }
	for _, tt := range []struct {
		name    string
		changes []func(*looking)
		want    []symptom.ID
	}{
		{"all is well", nil, nil},
		{"nothing of the agent's", []func(*looking){nobody}, nil},
		{"and no user envoy, no iptables, no metadata server", []func(*looking){nobody, func(l *looking) {
			l.Seen.User.Err, l.kernel.noTools = errors.New("no user"), iptables.ErrNoIPTables
			l.Seen.Attribute.Err, l.Seen.Attribute.Source = nil, &metadata.Error{Err: errors.New("away")}
		}}, nil},
		{"and another's Envoy", []func(*looking){nobody, func(l *looking) { l.Seen.User.UID = 5 }}, nil},
		{"the agent's, and no attribute", []func(*looking){func(l *looking) {
			l.Seen.Attribute = attributeInForce{Config: attribute.Default(), Err: metadata.ErrNoAttribute}
		}}, []symptom.ID{symptom.AttributeBad}},
		{"the agent's, and no user", []func(*looking){func(l *looking) {
			l.Seen.User.Err = errors.New("no user")
		}}, []symptom.ID{symptom.ProxyUser}},
		{"the agent's, and no iptables", []func(*looking){func(l *looking) {
			l.kernel, l.HaveErr = kernelSeen{noTools: iptables.ErrNoIPTables},
				[2]error{iptables.ErrNoIPTables, iptables.ErrNoIPTables}
		}}, []symptom.ID{symptom.ToolsMissing}},
		{"nothing answers", []func(*looking){dark}, nil},
		{"nothing but the kernel answers", []func(*looking){dark, func(l *looking) { l.moved = true }},
			[]symptom.ID{symptom.AdminUnreadable, symptom.MetadataServer, symptom.AgentStuck}},
		{"another user's port", []func(*looking){func(l *looking) { l.Seen.User.UID = 5 }},
			[]symptom.ID{symptom.ForeignOwner}},
		{"flushed, and the daemon is about it", []func(*looking){flushed}, nil},
		{"flushed, and the daemon is stuck", []func(*looking){flushed, old},
			[]symptom.ID{symptom.AgentStuck, symptom.RulesDiffer}},
		{"flushed without a daemon", []func(*looking){flushed, func(l *looking) { l.Daemon = nil }},
			[]symptom.ID{symptom.RulesDiffer}},
		{"flushed, and a daemon comes", []func(*looking){flushed, func(l *looking) {
			daemon := l.Daemon
			l.Daemon = nil
			l.again = func(context.Context) { l.Daemon = daemon }
		}}, nil},
		{"no comments", []func(*looking){func(l *looking) {
			l.Daemon, l.Have[0] = nil, tableOf(t, l.Have[0].Ours().WithoutComments())
		}}, nil},
		{"on hold without a chain", []func(*looking){flushed, func(l *looking) {
			l.Daemon = nil
			l.vm.tcp = func(uint16) ([]sockdiag.Listener, error) { return nil, nil }
		}}, []symptom.ID{symptom.InterceptionNotReady}},
		{"what only the daemon knows", []func(*looking){func(l *looking) {
			l.Daemon.Findings = []symptom.Finding{
				{ID: symptom.Fight, Severity: symptom.Error, Cause: "c"},
				{ID: symptom.EnvoyDown, Severity: symptom.Error, Cause: "c"}} // it has come back since
		}}, []symptom.ID{symptom.Fight}},
		{"what the daemon saw when it was not stuck", []func(*looking){old, func(l *looking) {
			l.Daemon.Findings = []symptom.Finding{{ID: symptom.Fight, Severity: symptom.Error, Cause: "c"}}
		}}, []symptom.ID{symptom.AgentStuck}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := aLooking(t)
			for _, change := range tt.changes {
				change(l)
			}
			// What this machine says of itself, whoever runs the test, is another test's.
			l.conclude(t.Context())
			l.Facts.Surroundings.Conntrack, l.Facts.NoRoute = symptom.Conntrack{}, nil
			if diff := cmp.Diff(tt.want, ids(symptom.Check(l.Facts))); diff != "" {
				t.Errorf("(-want +have):\n%s", diff)
			}
		})
	}
}

// TestPausedWantsNothing: after cleanup nothing of ours shall be there.
func TestPausedWantsNothing(t *testing.T) {
	l := aLooking(t)
	l.Daemon.Paused, l.Have[0] = true, tableOf(t, iptables.Ruleset{})
	l.conclude(t.Context())
	if r := l.Ruleset(0); !r.Empty() || len(iptables.Diff(r, l.Have[0])) > 0 {
		t.Errorf("wanted: %v", r)
	}
}
