package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/envoywatch"
	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/internal/reconcile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/rulediff"
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
		Local:     []netip.Addr{},
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
	unnamed := func(l *looking) {
		l.Daemon, l.Seen.User = nil, newLooking(l.Seen.Settings).Seen.User
		l.unseen[symptom.FromUsers] = errNoAnswer.Error()
	}
	byHand := func(l *looking) { // --config none with no user of that name
		l.Seen.Settings.Config, l.Seen.Attribute.Err = noConfig, nil
		l.Seen.Attribute.Known, l.Seen.Attribute.Serial = true, 1
		l.Seen.User = proxyUser{Err: errors.New("no user")}
	}
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
		{"and --config none without the user", []func(*looking){nobody, byHand}, nil},
		{"and nobody tells who the user is", []func(*looking){nobody, byHand, unnamed}, nil},
		{"nor who holds the admin port", []func(*looking){nobody, unnamed, func(l *looking) {
			l.Seen.Envoy = envoywatch.View{Outage: envoywatch.Outage{Err: &sockdiag.ForeignError{
				Addr: netip.MustParseAddrPort("127.0.0.1:15000"), UID: 107}}}
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
		{"nobody tells who the proxy's user is", []func(*looking){flushed, unnamed}, nil},
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
		{"a table that the daemon could not make", []func(*looking){func(l *looking) {
			l.Daemon.Findings = []symptom.Finding{
				{ID: symptom.FamilyUnusable, Severity: symptom.Error, Cause: "c"}}
		}}, []symptom.ID{symptom.FamilyUnusable}},
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

// TestDiffer: a difference is an error where nobody is about to put it right. Where that cannot be
// told yet it is not known whether there is one.
func TestDiffer(t *testing.T) {
	starting := func(ago time.Duration) func(*looking, func()) {
		return func(l *looking, _ func()) {
			l.Daemon = &status.Status{Mode: "starting", Started: testStart.Add(-ago)}
		}
	}
	for _, tt := range []struct {
		name    string
		flushed bool
		change  func(l *looking, end func())
		want    symptom.State
		why     string
	}{
		{"a daemon before its first pass", true, starting(time.Minute), symptom.Unknown, "starting"},
		{"and nothing is missing", false, starting(time.Minute), symptom.OK, ""},
		{"a daemon that never made one", true, starting(time.Hour), symptom.Found, ""},
		{"no time for another look", true, func(l *looking, end func()) {
			l.Daemon, l.again = nil, func(context.Context) { end() }
		}, symptom.Unknown, "no time"},
		{"another look that was not answered", true, func(l *looking, _ func()) {
			l.Daemon, l.again = nil, func(context.Context) {
				l.unseen[symptom.FromKernel] = errNoAnswer.Error()
			}
		}, symptom.Unknown, errNoAnswer.Error()},
		{"a daemon that comes at the last look", true, func(l *looking, _ func()) {
			n, daemon := 0, l.Daemon
			l.Daemon, l.again = nil, func(context.Context) {
				if n++; n == 2 {
					l.Daemon = daemon
				}
			}
		}, symptom.OK, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			l := aLooking(t)
			if tt.flushed {
				l.Have[0] = tableOf(t, iptables.Ruleset{})
			}
			ctx, end := context.WithCancel(t.Context())
			defer end()
			tt.change(l, end)
			l.conclude(ctx)
			if r := result(l.Facts, symptom.RulesDiffer); r.State != tt.want ||
				!strings.Contains(r.Why, tt.why) || (r.Why == "") != (tt.why == "") {
				t.Errorf("%s %q, want %s, %q", r.State, r.Why, tt.want, tt.why)
			}
		})
	}
}

// result is what came of one check.
func result(f symptom.Facts, id symptom.ID) symptom.Result {
	results := symptom.Examine(f)
	return results[slices.IndexFunc(results, func(r symptom.Result) bool { return r.ID == id })]
}

// TestLookWithoutAddresses: what the rules should be depends on the VM's own addresses, which are
// never intercepted.
func TestLookWithoutAddresses(t *testing.T) {
	for _, tt := range []struct {
		name  string
		addrs []netip.Addr
		err   error
		want  symptom.State
		exit  int
	}{
		{"there are some", []netip.Addr{netip.MustParseAddr("10.0.0.9")}, nil, symptom.OK, rulediff.Same},
		{"there are none", nil, nil, symptom.OK, rulediff.Same},
		{"nobody tells them", nil, errors.New("too many open files"), symptom.Unknown, rulediff.NotKnown},
	} {
		l := aLooking(t)
		l.Daemon, l.Seen.Local = nil, nil
		l.vm.userIDs = func(string) (uint32, uint32, error) { return 107, 107, nil }
		l.vm.addrs = func() ([]netip.Addr, error) { return tt.addrs, tt.err }
		l.askAll(t.Context(), l.askUsers())
		l.conclude(t.Context())
		d := l.differs(nil, nil)
		if r := result(l.Facts, symptom.RulesDiffer); r.State != tt.want || d.Exit != tt.exit {
			t.Errorf("%s: %s, diff %d, want %s, %d", tt.name, r.State, d.Exit, tt.want, tt.exit)
		}
		if why := l.whyUnknown(); tt.err != nil && (why == nil ||
			why.Error() != "the VM's addresses: too many open files") {
			t.Errorf("%s: %v", tt.name, why)
		}
	}
}

// TestProxyUserOfNoAgent: where nothing of the agent's is, the proxy's user is no trouble, and yet
// not known where it is asked what its rules should be.
func TestProxyUserOfNoAgent(t *testing.T) {
	for _, config := range []string{"", noConfig} {
		l := aLooking(t)
		l.installed, l.Daemon, l.Have, l.Seen.Settings.Config = false, nil, [2]iptables.Table{}, config
		l.Seen.Attribute = attributeInForce{Known: config != "", Config: attribute.Default(), Serial: 1}
		l.Seen.User = proxyUser{Err: errors.New("no user")}
		l.conclude(t.Context())
		want := symptom.OK
		if config == noConfig {
			want = symptom.Unknown
		}
		for _, id := range []symptom.ID{symptom.ProxyUser, symptom.ForeignOwner} {
			if r := result(l.Facts, id); r.State != want || l.Known {
				t.Errorf("--config %q: %s %v, want %v", config, id, r.State, want)
			}
		}
		if d := l.differs(nil, nil); d.Exit != rulediff.NotKnown {
			t.Errorf("--config %q: diff %d", config, d.Exit)
		}
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
