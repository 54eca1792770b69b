package reconcile

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// TestHold: jumps go in when the proxy accepts, and not before; then nothing is done any more.
func TestHold(t *testing.T) {
	r := newRig(t)
	r.listens(0)
	out := r.pass(0)
	if out.Wake != 0 || r.called() != "read" {
		t.Errorf("the first pass looks and has the next come at once; wake %v", out.Wake)
	}
	if out = r.pass(0); !out.Status.Equal || out.Status.Jumps || out.Written || out.Confirmed ||
		r.called() != "" || !r.ours().Empty() {
		t.Errorf("while the proxy does not accept: %+v\n%s", out, r.ours())
	}
	if want := "Envoy's port 15001 does not accept IPv4 connections"; out.NotReady != want ||
		len(out.Ports) != 1 || out.Ports[0].Listening {
		t.Errorf("not ready: %q, want %q; looks %v", out.NotReady, want, out.Ports)
	}
	if s := out.Status.Shape; s == nil || s.Jumps ||
		s.Held != "the jumps are held back: Envoy does not accept on 15001" {
		t.Errorf("shape %+v", s)
	}
	r.listens(proxyUID)
	out = r.pass(time.Second)
	if s := out.Status.Shape; s == nil || !s.Jumps || s.Held != "" ||
		!r.ours().Equal(Shaped(r.order.Want, *s)) {
		t.Errorf("shape %+v", s)
	}
	if !out.Status.Equal || !out.Status.Jumps || !out.Written || !out.Confirmed ||
		out.NotReady != "" || out.Wake != tick || !r.has("OUTPUT", jump) {
		t.Errorf("once it accepts: %+v\n%s", out, r.ours())
	}
	if called := r.called(); called != "apply" {
		t.Errorf("what the first pass has read is trusted where the kernel notifies: %s", called)
	}
	if s := out.Status; s.Family != "IPv4" || !s.Usable || s.Services != 2 ||
		s.ServicePorts != 1 || s.OutboundPort != 15001 || s.Rules != r.ours().Len() ||
		!s.Applied.Equal(r.now) || s.Error != "" {
		t.Errorf("status %+v", s)
	}
	if out.Applies["applied"] != 1 || len(out.Applies) != 1 ||
		out.Rows != iptables.NewPlan(r.ours(), iptables.Table{}).Len() || len(out.Drift) != 0 {
		t.Errorf("told: %+v", out)
	}
	wantLines := []string{
		fmt.Sprintf("rules changed map[family:IPv4 jumps:true rules:%d services:2 took:0s]",
			r.ours().Len()),
		"half-open connections begin anew through Envoy map[connections:2 family:IPv4]",
	}
	if lines := r.lines(); !slices.Equal(lines, wantLines) {
		t.Errorf("logged %q, want %q", lines, wantLines)
	}
	for range 3 {
		out = r.pass(time.Second)
		if called := r.called(); called != "" || len(out.Applies) != 0 || out.Rows != 0 ||
			out.Confirmed || !out.Status.Jumps || !out.Written {
			t.Errorf("an idle pass: %+v, and %s", out, called)
		}
	}
	if want := resync - 4*time.Second; out.Wake != want {
		t.Errorf("wakes in %v, want %v", out.Wake, want)
	}
	if logged := r.logged(); len(logged) > 0 {
		t.Errorf("an idle pass logs %q", logged)
	}
}

// TestNotReady: the port or the rules that are not as wanted are named.
func TestNotReady(t *testing.T) {
	all := anInterception()
	all.InboundPort, all.Serving, all.DNSPort = 15006, []iptables.Serving{{Port: 80}}, 15053
	for _, test := range []struct {
		name   string
		change func(r *rig)
		want   string
	}{
		{"all is well", func(*rig) {}, ""},
		{"outbound", func(r *rig) { r.order.Looks.Outbound.Listening = false },
			"Envoy's port 15001 does not accept IPv4 connections"},
		{"inbound", func(r *rig) { r.order.Looks.Inbound.Listening = false },
			"Envoy's inbound port 15006 does not accept IPv4 connections"},
		{"DNS", func(r *rig) { r.order.Looks.DNS.Listening = false },
			"Envoy does not listen on its DNS port 15053 over IPv4"},
		{"the rules", func(r *rig) {
			r.fails = iptables.ErrLocked
			r.f.Note(iptables.Event{}, r.now)
			r.now = r.now.Add(time.Second)
		}, "the IPv4 rules are not as wanted"},
		{"not usable at all", func(r *rig) {
			r.f.usability.why,
				r.f.usability.when = iptables.ErrNoTable, r.now
		}, ""},
	} {
		r := newRig(t)
		r.want(all)
		r.settle()
		test.change(r)
		if out := r.pass(0); out.NotReady != test.want || len(out.Ports) != 3 {
			t.Errorf("%s: %q, want %q", test.name, out.NotReady, test.want)
		}
	}
}

// TestPorts: while nothing is wanted yet, it matters where the rules lead that are in.
func TestPorts(t *testing.T) {
	usual := Ports{Outbound: 15001, Inbound: 15006}
	want := iptables.Interception{OutboundPort: 1, InboundPort: 2, DNSPort: 3, DNSOverTCP: true}
	r := newRig(t)
	check := func(name string, known, user bool, want iptables.Interception, ports Ports) {
		t.Helper()
		if got := r.f.Ports(want, known, user, usual); got != ports {
			t.Errorf("%s: %+v, want %+v", name, got, ports)
		}
	}
	check("the wanted ones", true, true, want, Ports{1, 2, 3, true})
	check("no such user", true, false, want, Ports{})
	check("nothing is known", false, true, iptables.Interception{}, usual)
	earlier := anInterception()
	earlier.OutboundPort, earlier.DNSPort, earlier.Jumps = 4, 5, true
	r.install(earlier)
	check("before the first look", false, true, iptables.Interception{}, usual)
	r.order.Known, r.order.Marked = false, false
	r.pass(0)
	check("an earlier run's", false, true, iptables.Interception{}, Ports{Outbound: 4, DNS: 5})
	earlier.Jumps = false
	r.install(earlier)
	r.f.Note(iptables.Event{}, r.now)
	r.pass(time.Second)
	check("an earlier run's without jumps", false, true, iptables.Interception{}, usual)
}

// install is what an earlier run left.
func (r *rig) install(i iptables.Interception) {
	r.t.Helper()
	have, err := iptables.Parse(iptables.IPv4, []byte(r.nat.Save()))
	if err != nil {
		r.t.Fatal(err)
	}
	if err := r.nat.Restore(iptables.NewPlan(i.Ruleset(), have).String(), nil); err != nil {
		r.t.Fatal(err)
	}
}

// TestAdopt: what an earlier run of this boot left goes on, whether Envoy answers already or not.
// What something else restored waits for its port.
func TestAdopt(t *testing.T) {
	left := anInterception()
	left.Jumps = true
	for _, test := range []struct {
		name   string
		change func(r *rig)
		jumps  bool
	}{
		{"the proxy accepts", func(r *rig) { r.order.Marked = false }, true},
		{"it does not yet, and the rules are of this boot", func(r *rig) { r.listens(0) }, true},
		{"it does not yet, and the rules were restored at boot",
			func(r *rig) { r.order.Marked = false; r.listens(0) }, false},
		{"of this boot, and the port is somebody else's", func(r *rig) { r.listens(foreignUID) },
			false},
		{"of this boot, and Envoy drains", func(r *rig) { r.order.Draining = true }, false},
		{"of this boot, and nobody could look", func(r *rig) {
			r.order.Looks.Outbound = symptom.Port{Addr: r.order.Looks.Outbound.Addr,
				Err: errors.New("netlink")}
		}, true},
	} {
		for _, known := range []bool{true, false} {
			t.Run(fmt.Sprint(test.name, ", known ", known), func(t *testing.T) {
				r := newRig(t)
				r.order.Known = known
				r.install(left)
				r.listens(proxyUID)
				test.change(r)
				out := r.pass(0)
				if out.Wake != 0 || !out.Status.Jumps || out.Confirmed || out.Written {
					t.Errorf("the first pass only looks: %+v", out)
				}
				if n := left.Ruleset().Len(); out.Adopted != n {
					t.Errorf("%d rules adopted, want %d", out.Adopted, n)
				}
				adopted := fmt.Sprintf(
					"rules adopted map[family:IPv4 jumps:true of_this_boot:%v rules:%d]",
					r.order.Marked, left.Ruleset().Len())
				if lines := r.lines(); !slices.Equal(lines, []string{adopted}) {
					t.Errorf("logged %q", lines)
				}
				for range 3 {
					if out = r.pass(time.Second); out.Adopted != 0 {
						t.Errorf("%d rules adopted again", out.Adopted)
					}
				}
				if test.jumps != r.ours().Intercepting() || out.Status.Jumps != test.jumps ||
					r.ours().Empty() {
					t.Errorf("jumps in: %v, want %v; there is\n%s", out.Status.Jumps, test.jumps,
						r.ours())
				}
				if wrote := strings.Contains(r.called(), "apply"); wrote == test.jumps {
					t.Errorf("written: %v", wrote)
				}
				if deleted := r.deleted(); strings.Contains(deleted, "half-open") {
					t.Errorf("an earlier run took care of what was older, and now: %s", deleted)
				}
			})
		}
	}
}

// TestAdoptedIsConfirmed: the wanted rules that were there are confirmed by the pass that finds
// them.
func TestAdoptedIsConfirmed(t *testing.T) {
	r := newRig(t)
	left := anInterception()
	left.Jumps = true
	r.install(left)
	r.pass(0)
	out := r.pass(0)
	if !out.Confirmed || !out.Written || r.called() != "read" || out.Undone != 0 {
		t.Errorf("found: %+v", out)
	}
	// From then on a difference is drift.
	r.others(byIptables, "-D OUTPUT "+jump)
	if out = r.pass(time.Second); !out.Confirmed || out.Undone != 1 || len(out.Drift) != 1 {
		t.Errorf("repaired: %+v", out)
	}
}

// TestAdoptedAreKept: what an earlier run of this boot left is put back when somebody takes it out
// before it is known what is wanted: Envoy may be away then for long, and nothing is to go past it.
func TestAdoptedAreKept(t *testing.T) {
	left := anInterception()
	left.Jumps, left.DNSPort = true, 15053
	const jumpDNS = "-p udp -m udp --dport 53 -j SERVICE_PROXY_DNS"
	flush := func(r *rig) {
		t.Helper()
		lines := []string{"-D OUTPUT " + jump, "-D OUTPUT " + jumpDNS}
		if !r.ours().Intercepting() {
			lines = nil
		}
		for _, chain := range r.ours().Chains() {
			lines = append(lines, ":"+chain+" - [0:0]")
		}
		r.others(iptables.Event{PID: 42, Program: "nft"}, lines...)
	}
	begin := func(t *testing.T) *rig {
		r := newRig(t)
		r.order.Known = false
		r.order.Want = iptables.Interception{}
		r.install(left)
		return r
	}
	t.Run("whether Envoy accepts or not", func(t *testing.T) {
		for _, owner := range []uint32{0, proxyUID} {
			r := begin(t)
			r.settle()
			for n := range uint64(2) {
				r.listens(owner)
				flush(r)
				out := r.pass(time.Second)
				if !r.ours().Equal(left.Ruleset()) || !out.Status.Jumps || out.Undone != n+1 ||
					out.Facts.By == "" {
					t.Fatalf("user %d listens: %+v\n%s", owner, out, r.ours())
				}
			}
			r.called()
			if out := r.pass(time.Second); r.called() != "" || out.Wake < time.Second {
				t.Errorf("nothing has changed: %+v", out)
			}
			r.others(byIptables, "-A OUTPUT -p udp -m udp --dport 9 -j ACCEPT")
			if out := r.pass(time.Second); r.called() != "read OUTPUT" || !out.Status.Equal {
				t.Errorf("nothing of ours has changed: %+v", out)
			}
			// What is wanted takes their place, and they were no first install.
			r.order.Known = true
			r.want(anInterception())
			out := r.settle()
			if !out.Status.Equal || out.Undone != 2 || r.ours().Settling() ||
				r.has("OUTPUT", jumpDNS) {
				t.Errorf("known: %+v\n%s", out, r.ours())
			}
		}
	})
	t.Run("with back-off", func(t *testing.T) {
		r := begin(t)
		r.settle()
		r.listens(0)
		for range backOffBurst + 1 {
			flush(r)
			r.pass(100 * time.Millisecond)
		}
		if out := r.pass(0); r.ours().Intercepting() || out.Undone != backOffBurst ||
			out.Wake <= 0 || out.Wake > backOffFirst {
			t.Fatalf("put off: %+v\n%s", out, r.ours())
		}
		r.listens(0)
		if out := r.pass(backOffFirst); !r.ours().Equal(left.Ruleset()) || !out.Status.Jumps {
			t.Errorf("in the end: %+v\n%s", out, r.ours())
		}
	})
	for _, test := range []struct {
		name   string
		early  bool // before the first look
		change func(r *rig)
	}{
		{"not those of another boot", true, func(r *rig) { r.order.Marked = false }},
		{"not for another user", false, func(r *rig) { r.listens(foreignUID) }},
		{"not while Envoy drains", false, func(r *rig) { r.order.Draining = true }},
		{"not under the brake", false, func(r *rig) { r.order.Off = true }},
		{"not without the proxy's user", false, func(r *rig) { r.order.UserKnown = false }},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := begin(t)
			if test.early {
				test.change(r)
			}
			r.settle()
			r.listens(proxyUID)
			test.change(r)
			flush(r)
			for range 3 {
				r.pass(time.Second)
			}
			if r.ours().Intercepting() {
				t.Errorf("there is\n%s", r.ours())
			}
		})
	}
	t.Run("not what somebody had put out of order", func(t *testing.T) {
		r := begin(t)
		r.others(byIptables, "-A OUTPUT "+jump)
		r.settle()
		r.others(byIptables, "-D OUTPUT "+jump)
		if out := r.pass(time.Second); out.Undone != 0 || !r.has("OUTPUT", jump) {
			t.Errorf("%+v\n%s", out, r.ours())
		}
	})
	t.Run("not what bypass took out", func(t *testing.T) {
		r := begin(t)
		r.order.WhenDown = Bypass
		r.settle()
		r.listens(0)
		for range 2 * bypassAfter {
			r.pass(bypassTime)
		}
		r.listens(proxyUID)
		flush(r)
		if out := r.pass(time.Second); r.ours().Intercepting() || out.Undone != 0 {
			t.Errorf("%+v\n%s", out, r.ours())
		}
	})
}

// TestUnknown: until Envoy has told its listeners, nothing is written but what must leave, and
// the gates of usual ports do not move.
func TestUnknown(t *testing.T) {
	r := newRig(t)
	r.order.Known = false
	r.order.Want = iptables.Interception{}
	r.listens(0)
	if out := r.settle(); r.called() != "read" || len(out.Ports) != 0 || out.Status.Jumps {
		t.Errorf("nothing there, nothing known: %+v", out)
	}
	r.listens(foreignUID)
	if out := r.pass(time.Second); len(out.Ports) != 2 || r.called() != "" {
		t.Errorf("a foreign owner of a usual port counts at once: %+v", out)
	}
	r.listens(proxyUID)
	if out := r.pass(time.Second); len(out.Ports) != 0 || !r.f.gates.outbound.denied {
		t.Errorf("a usual port moves no gate: %+v", out)
	}
	// Somebody restores rules of ours: the gates look where they lead before anything is done.
	restored := anInterception()
	restored.Jumps = true
	r.install(restored)
	r.f.Note(iptables.Event{}, r.now)
	out := r.pass(time.Second)
	if out.Wake != 0 || !out.Status.Jumps || r.called() != "read" {
		t.Errorf("rules come: %+v", out)
	}
	if got := r.f.Ports(r.order.Want, false, true, Ports{}); got.Outbound != 15001 {
		t.Errorf("the ports then: %+v", got)
	}
	r.listens(0)
	out = r.pass(0)
	if out.Wake != tick || r.ours().Intercepting() || r.ours().Empty() || out.Status.Jumps ||
		!out.Status.Equal || out.Confirmed || len(out.Ports) != 0 {
		t.Errorf("nobody listens where they lead: %+v\n%s", out, r.ours())
	}
	if out.Undone != 0 || len(out.Facts.Drift) != 0 {
		t.Errorf("that is nobody's doing: %+v", out)
	}
	// Once Envoy has told, they go in.
	r.order.Known = true
	r.want(anInterception())
	if out = r.pass(time.Second); !out.Status.Jumps || !r.ours().Intercepting() || out.Undone != 0 {
		t.Errorf("known: %+v", out)
	}
}

// TestUnknownAgain: what must leave while nothing is known comes back with the same want.
func TestUnknownAgain(t *testing.T) {
	r := installed(t)
	r.order.Known = false
	r.listens(foreignUID)
	if out := r.pass(time.Second); out.Status.Jumps || r.ours().Intercepting() ||
		len(out.Ports) != 1 {
		t.Fatalf("the port is another user's: %+v\n%s", out, r.ours())
	}
	r.order.Known = true
	r.listens(proxyUID)
	if out := r.pass(time.Second); !out.Status.Jumps || !r.ours().Intercepting() {
		t.Errorf("it is the proxy's again, with the same want: %+v", out)
	}
}

// TestNotKnownWhileBackingOff: a repair that is put off keeps no pass busy once it is not known any
// more what is wanted, and is made up for when it is.
func TestNotKnownWhileBackingOff(t *testing.T) {
	r := installed(t)
	r.f.backOff = backOff{
		delay: backOffLast, until: r.now.Add(time.Hour), undone: backOffBurst, last: r.now,
	}
	r.others(byIptables, "-D OUTPUT "+jump)
	if out := r.pass(time.Second); out.Status.Equal || r.called() != "read OUTPUT" {
		t.Fatalf("put off: %+v", out)
	}
	r.order.Known = false
	if out := r.settle(); out.Wake < time.Second || r.called() != "" || out.Status.Jumps {
		t.Errorf("not known: %+v", out)
	}
	r.order.Known = true
	if out := r.pass(time.Second); !out.Status.Equal || !r.has("OUTPUT", jump) {
		t.Errorf("known, with the same want: %+v", out)
	}
	// The same where nobody keeps undoing: what was seen while nothing was known is made up for.
	r.order.Known = false
	r.others(byIptables, "-D OUTPUT "+jump)
	r.pass(time.Second)
	r.order.Known = true
	if out := r.pass(time.Second); !out.Status.Equal || !r.has("OUTPUT", jump) {
		t.Errorf("known, with the same want: %+v", out)
	}
}

// TestLeavingIsLookedAtFirst: what must leave and has gone by itself is not written.
func TestLeavingIsLookedAtFirst(t *testing.T) {
	r := newRig(t)
	r.order.Known = false
	left := anInterception()
	left.Jumps = true
	r.install(left)
	r.settle()
	r.called()
	r.others(byIptables, "-D OUTPUT "+jump)
	r.listens(foreignUID)
	out := r.pass(time.Second)
	if called := r.called(); called != "read OUTPUT" || out.Status.Jumps || out.Wake != tick {
		t.Errorf("%s: %+v", called, out)
	}
}

// TestUserUnknown: without the proxy's user nothing is known, whatever was said.
func TestUserUnknown(t *testing.T) {
	r := newRig(t)
	r.order.UserKnown = false
	r.listens(0)
	if out := r.settle(); len(out.Ports) != 0 || r.called() != "read" || !r.ours().Empty() ||
		out.Status.OutboundPort != 0 {
		t.Errorf("%+v", out)
	}
	// Rules that an earlier run left stay: who holds their port cannot be told.
	r = newRig(t)
	left := anInterception()
	left.Jumps = true
	r.install(left)
	r.order.UserKnown = false
	r.listens(foreignUID)
	for range 3 {
		r.pass(time.Second)
	}
	if !r.ours().Intercepting() {
		t.Errorf("there is\n%s", r.ours())
	}
}

// TestDrift: what somebody undoes is put right, said once, shown for a minute, and not ours to be
// ashamed of.
func TestDrift(t *testing.T) {
	r := installed(t)
	r.takes = 70 * time.Millisecond
	r.others(byIptables, "-D OUTPUT "+jump)
	out := r.pass(time.Second)
	if called := r.called(); called != "read OUTPUT, apply" || !r.has("OUTPUT", jump) {
		t.Fatalf("%s; there is\n%s", called, r.ours())
	}
	if !maps.Equal(out.Drift, map[string]int{"jump removed": 1}) || out.Undone != 1 ||
		out.LastDriftBy != "iptables (pid 42)" || !out.LastDriftAt.Equal(r.now) || out.Rows != 1 ||
		!out.Confirmed {
		t.Errorf("told: %+v", out)
	}
	if f := out.Facts; len(f.Drift) != 1 || f.By != "iptables (pid 42)" || f.Fighting ||
		f.Undone != 1 || f.Err != nil || len(f.Shadow) != 0 {
		t.Errorf("facts: %+v", f)
	}
	wantLine := "rules repaired map[by:iptables (pid 42) differences:1 " +
		"drift:[jump removed: -A OUTPUT " + jump + "] family:IPv4 took:70ms]"
	if lines := r.lines(); len(lines) != 2 || lines[0] != wantLine || // and what went by meanwhile
		!strings.HasPrefix(lines[1], "half-open connections begin anew through Envoy ") {
		t.Errorf("logged %q, want %q", lines, wantLine)
	}
	at := r.now
	if out = r.pass(showDrift); len(out.Facts.Drift) != 1 || len(out.Drift) != 0 {
		t.Errorf("a minute later: %+v", out)
	}
	out = r.pass(time.Second)
	if len(out.Facts.Drift) != 0 || out.Facts.By != "" || out.Facts.Undone != 0 {
		t.Errorf("past a minute: %+v", out)
	}
	if out.Undone != 1 || out.LastDriftBy != "iptables (pid 42)" || !out.LastDriftAt.Equal(at) {
		t.Errorf("what is kept since the start: %+v", out)
	}
}

// TestDriftByNobody: who wrote nothing of ours is not named for what another does later.
func TestDriftByNobody(t *testing.T) {
	r := installed(t)
	r.others(iptables.Event{Chains: []string{"OUTPUT"}, PID: 1, Program: "docker"},
		"-A OUTPUT -p udp -j RETURN")
	if out := r.pass(time.Second); out.Undone != 0 || !out.Status.Equal {
		t.Fatalf("a rule behind ours is no drift: %+v", out)
	}
	r.others(iptables.Event{Chains: []string{"OUTPUT"}}, "-D OUTPUT "+jump)
	if out := r.pass(time.Second); out.Undone != 1 || out.LastDriftBy != "" {
		t.Errorf("done by nobody that is known: %+v", out)
	}
	// Nor is he, for what a second one does whom the kernel does not name.
	r.others(byIptables, "-D OUTPUT "+jump)
	r.pass(time.Second)
	r.others(iptables.Event{Chains: []string{"OUTPUT"}}, "-D OUTPUT "+jump)
	if out := r.pass(2 * time.Second); out.Undone != 3 || out.LastDriftBy != "" ||
		out.Facts.By != "" {
		t.Errorf("done by nobody that is known: %+v", out)
	}
}

// TestNamedLate: the kernel's word on a drift may come after the pass that found it.
func TestNamedLate(t *testing.T) {
	for _, test := range []struct {
		late time.Duration
		want string
	}{{lateName - 1, "iptables (pid 42)"}, {lateName, ""}} {
		r := installed(t)
		r.others(iptables.Event{Chains: []string{"OUTPUT"}}, "-D OUTPUT "+jump)
		if out := r.pass(time.Second); out.Undone != 1 || out.LastDriftBy != "" {
			t.Fatalf("repaired: %+v", out)
		}
		r.f.Note(byIptables, r.now.Add(test.late))
		if out := r.pass(test.late); out.LastDriftBy != test.want || out.Facts.By != test.want {
			t.Errorf("named %v later: %q and %q, want %q", test.late, out.LastDriftBy,
				out.Facts.By, test.want)
		}
	}
	// One that was named is not given to the next who writes.
	r := installed(t)
	r.others(byIptables, "-D OUTPUT "+jump)
	r.pass(time.Second)
	r.f.Note(iptables.Event{Chains: []string{"OUTPUT"}, PID: 1, Program: "docker"}, r.now)
	if out := r.pass(time.Millisecond); out.LastDriftBy != "iptables (pid 42)" {
		t.Errorf("named anew: %+v", out)
	}
}

// TestNote: what is told of the table is read, and no more.
func TestNote(t *testing.T) {
	many := make([]string, manyTouched)
	for i := range many {
		many[i] = "OUTPUT"
	}
	for _, test := range []struct {
		name   string
		events []iptables.Event
		want   string
	}{
		{"nothing", nil, ""},
		{"our own", []iptables.Event{{Own: true, Chains: []string{"OUTPUT"}}}, ""},
		{"the other family's", []iptables.Event{{Family: iptables.IPv6,
			Chains: []string{"OUTPUT"}}}, ""},
		{"a chain of either family", []iptables.Event{{Chains: []string{"OUTPUT"}}}, "read OUTPUT"},
		{"some chains, one twice", []iptables.Event{{Family: iptables.IPv4,
			Chains: []string{"PREROUTING",
				"OUTPUT"}}, {Chains: []string{"OUTPUT"}}}, "read OUTPUT PREROUTING"},
		{"any chain", []iptables.Event{{Family: iptables.IPv4}}, "read"},
		{"a chain, then any", []iptables.Event{{Chains: []string{"OUTPUT"}}, {}}, "read"},
		{"any, then a chain", []iptables.Event{{}, {Chains: []string{"OUTPUT"}}}, "read"},
		{"more than the kernel could tell", []iptables.Event{{Chains: []string{"OUTPUT"},
			Lost: true}}, "read"},
		{"as many as are listed", []iptables.Event{{Chains: many}}, "read OUTPUT"},
		{"more than that", []iptables.Event{{Chains: many}, {Chains: []string{"OUTPUT"}}}, "read"},
	} {
		r := installed(t)
		for _, e := range test.events {
			r.f.Note(e, r.now)
		}
		out := r.pass(time.Second)
		if called := r.called(); called != test.want || !out.Status.Equal || out.Wake == 0 {
			t.Errorf("%s: %q, want %q", test.name, called, test.want)
		}
		r.pass(time.Second)
		if called := r.called(); called != "" {
			t.Errorf("%s: again %q", test.name, called)
		}
	}
}

// TestSomebodyKeepsUndoing: who undoes every repair at once meets one each few seconds, and is
// told of.
func TestSomebodyKeepsUndoing(t *testing.T) {
	r := installed(t)
	repairs := 0
	var out Outcome
	for range 300 { // half a minute
		if r.has("OUTPUT", jump) {
			r.others(byIptables, "-D OUTPUT "+jump)
		}
		out = r.pass(100 * time.Millisecond)
		repairs += out.Applies["applied"]
		if out.Facts.Fighting && !out.Status.Equal && out.Wake <= 0 || out.Wake > backOffLast {
			t.Fatalf("wakes in %v", out.Wake)
		}
	}
	if !out.Facts.Fighting || repairs < backOffBurst+3 || repairs > backOffBurst+8 ||
		out.Undone != uint64(repairs) || out.Facts.Undone != repairs {
		t.Errorf("%d repairs in half a minute: %+v", repairs, out)
	}
	if out.Status.Equal || out.NotReady == "" || out.Facts.By == "" || len(out.Facts.Drift) != 1 {
		t.Errorf("while it is held back: %+v", out)
	}
	// It ends, and so does the back-off. The pass asks to be woken for the repair.
	out = r.pass(out.Wake)
	if !out.Status.Equal || out.NotReady != "" || !r.has("OUTPUT", jump) {
		t.Fatalf("the last repair: %+v", out)
	}
	if out = r.pass(backOffOver); !out.Facts.Fighting || len(out.Facts.Drift) != 1 {
		t.Errorf("not yet over: %+v", out)
	}
	r.pass(time.Second)
	if out = r.pass(showDrift); out.Facts.Fighting || out.Facts.Undone != 0 ||
		len(out.Facts.Drift) != 0 {
		t.Errorf("over: %+v", out)
	}
}

// TestShadowed: a jump that something else stands before, and that cannot be put right now, is
// said.
func TestShadowed(t *testing.T) {
	r := installed(t)
	r.others(byIptables, "-I OUTPUT 1 -p tcp -j ACCEPT", "-A OUTPUT -p udp -j ACCEPT")
	r.fails = iptables.ErrLocked
	r.pass(time.Second) // could not be read
	r.fails = nil
	r.f.backOff = backOff{delay: time.Second, until: r.now.Add(time.Hour), undone: 9, last: r.now}
	r.f.retry = retry{}
	out := r.pass(time.Second)
	if len(out.Facts.Shadow) != 1 || out.Facts.Shadow[0].Kind != iptables.Shadowed ||
		out.Status.Equal || out.Wake != time.Hour-time.Second {
		t.Errorf("held back: %+v", out)
	}
	r.f.backOff = backOff{}
	if out = r.pass(time.Second); len(out.Facts.Shadow) != 0 || len(out.Facts.Drift) != 1 ||
		!out.Status.Equal {
		t.Errorf("repaired: %+v", out)
	}
	// Any other drift shadows nothing.
	r.others(byIptables, "-D OUTPUT "+jump)
	r.f.backOff = backOff{delay: time.Second, until: r.now.Add(time.Hour), undone: 9, last: r.now}
	if out = r.pass(time.Second); len(out.Facts.Shadow) != 0 || out.Status.Equal {
		t.Errorf("another drift: %+v", out)
	}
}

// TestOvertaken: what somebody undid between our write and its reading back is put right by the
// next pass, and is drift then.
func TestOvertaken(t *testing.T) {
	r := newRig(t)
	r.pass(0)
	r.called()
	r.between = func() {
		r.between = nil
		r.others(iptables.Event{Chains: []string{"PREROUTING"}}, "-D OUTPUT "+jump)
	}
	out := r.pass(0)
	if out.Status.Equal || out.Facts.Err != nil || !out.Written || out.Wake != tick ||
		r.called() != "apply" {
		t.Errorf("overtaken: %+v", out)
	}
	out = r.pass(time.Millisecond)
	if called := r.called(); called != "read, apply" || !out.Status.Equal || out.Undone != 1 {
		t.Errorf("the next pass reads all and repairs: %s, %+v", called, out)
	}
}

// TestFailures: what cannot be read or written is tried again, ever later, and said once.
func TestFailures(t *testing.T) {
	r := newRig(t)
	r.fails = fmt.Errorf("read: %w", iptables.ErrLocked)
	wait, waits := time.Duration(0), []time.Duration{}
	for range 8 {
		out := r.pass(wait)
		waits = append(waits, out.Wake)
		if out.Facts.Err != r.fails || out.Status.Error != r.fails.Error() || out.Status.Equal ||
			!out.Status.Usable || out.Written {
			t.Fatalf("failed: %+v", out)
		}
		wait = out.Wake
		if called := r.called(); called != "read" {
			t.Errorf("tried %q", called)
		}
		if out := r.pass(wait / 4); out.Wake != wait-wait/4 || r.called() != "" {
			t.Errorf("tried before its time; wake %v of %v", out.Wake, wait)
		}
		wait -= wait / 4
	}
	s := time.Second
	if want := []time.Duration{s, 2 * s, 4 * s, 8 * s, 16 * s, 30 * s, 30 * s,
		30 * s}; !slices.Equal(waits, want) {
		t.Errorf("tried after %v, want %v", waits, want)
	}
	if logged := r.logged(); !slices.Equal(logged, []string{"rules not as wanted"}) {
		t.Errorf("logged %q", logged)
	}
	r.fails = errors.New("another")
	r.pass(wait)
	if logged := r.logged(); !slices.Equal(logged, []string{"rules not as wanted"}) {
		t.Errorf("another error: logged %q", logged)
	}
	r.fails = nil
	r.now = r.now.Add(time.Minute)
	if out := r.settle(); out.Facts.Err != nil || out.Status.Error != "" || !out.Status.Equal {
		t.Errorf("works again: %+v", out)
	}
	r.called()
	// It begins anew with the shortest.
	r.fails = iptables.ErrLocked
	r.f.Note(iptables.Event{}, r.now)
	if out := r.pass(time.Second); out.Wake != retryFirst {
		t.Errorf("tried after %v", out.Wake)
	}
}

// TestFailedWhileUnknown: an error of a read is over with the next read, also while Envoy has told
// nothing and there is nothing to be equal to.
func TestFailedWhileUnknown(t *testing.T) {
	r := newRig(t)
	r.order.Known = false
	r.fails = iptables.ErrLocked
	if out := r.pass(0); out.Facts.Err == nil {
		t.Fatalf("no error: %+v", out)
	}
	r.fails = nil
	for range 3 { // adopts
		r.pass(time.Second)
	}
	if out := r.pass(time.Second); out.Facts.Err != nil || out.Status.Error != "" {
		t.Errorf("adopted, and it says %v", out.Facts.Err)
	}
	r.fails = iptables.ErrLocked
	r.f.Note(iptables.Event{}, r.now)
	if out := r.pass(time.Second); out.Facts.Err == nil {
		t.Fatalf("no error: %+v", out)
	}
	r.fails = nil
	r.pass(time.Second)
	if out := r.pass(time.Second); out.Facts.Err != nil || out.Status.Error != "" {
		t.Errorf("read again, and it says %v", out.Facts.Err)
	}
}

// TestFailedWrite: a new want does not wait for another try, and what was never done nobody undid.
func TestFailedWrite(t *testing.T) {
	r := installed(t)
	r.refuses = func(iptables.Plan) (iptables.Ruleset, []iptables.RefusedError) {
		r.fails = nil
		return iptables.Ruleset{}, nil
	}
	more := anInterception()
	more.Services = prefixes("10.1.0.1/32", "10.1.0.2/32", "10.1.0.3/32")
	r.want(more)
	r.fails = fmt.Errorf("apply: %w", iptables.ErrLocked)
	out := r.pass(time.Second)
	if !maps.Equal(out.Applies, map[string]int{"locked": 1}) || out.Rows != 0 ||
		out.Wake != retryFirst || out.Status.Equal || out.Confirmed || !out.Status.Jumps {
		t.Fatalf("locked: %+v", out)
	}
	if called := r.called(); called != "apply" {
		t.Errorf("called %q", called)
	}
	more.Services = more.Services[:1]
	r.want(more)
	if out = r.pass(time.Millisecond); out.Applies["locked"] != 0 || r.called() != "read" ||
		out.Wake != 2*retryFirst {
		t.Errorf("a new want reads all, and at once: %+v", out)
	}
	r.fails = nil
	out = r.pass(out.Wake)
	if called := r.called(); called != "read, apply" || out.Undone != 0 ||
		len(out.Facts.Drift) != 0 || !out.Status.Equal {
		t.Errorf("%s, and nobody undid that: %+v", called, out)
	}
}

// TestEnding: an error of a pass that is ended with the agent is not the kernel's.
func TestEnding(t *testing.T) {
	r := installed(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r.fails = context.Canceled
	r.f.Note(iptables.Event{}, r.now)
	r.now = r.now.Add(time.Second)
	if out := r.f.Pass(ctx, r.now, r.order); out.Facts.Err != nil || out.Wake != tick ||
		len(r.logged()) > 0 {
		t.Errorf("%+v", out)
	}
	// One that ran out of its time is.
	r = installed(t)
	ctx, cancel = context.WithDeadline(t.Context(), time.Unix(0, 0))
	defer cancel()
	r.fails = iptables.ErrCouldNotLook
	r.f.Note(iptables.Event{}, r.now)
	r.now = r.now.Add(time.Second)
	if out := r.f.Pass(ctx, r.now, r.order); out.Facts.Err == nil || out.Wake != retryFirst {
		t.Errorf("%+v", out)
	}
}

// TestUnusable: a family that cannot be used is left alone and tried each minute.
func TestUnusable(t *testing.T) {
	r := newRig(t)
	r.why = iptables.ErrNoTable
	r.probes = iptables.ErrNoTable
	for range 3 {
		out := r.pass(0)
		if out.Wake != tick || out.Facts.Unusable == nil || out.Status.Usable ||
			out.Status.Error != iptables.ErrNoTable.Error() || out.NotReady != "" ||
			r.called() != "" {
			t.Fatalf("unusable: %+v", out)
		}
	}
	if r.pass(retryUnusable); r.called() != "" {
		t.Error("tried within a minute")
	}
	if out := r.pass(time.Second); out.Status.Usable || r.called() != "probe IPv4" {
		t.Error("not tried past a minute")
	}
	if len(r.logged()) > 0 {
		t.Error("an unusable family is logged")
	}
	r.probes = nil
	if out := r.pass(retryUnusable + 1); !out.Status.Usable || r.called() != "probe IPv4, read" ||
		!slices.Equal(r.logged(), []string{"family usable again"}) {
		t.Errorf("usable again: %+v", out)
	}
	r.settle()
	r.called()
	// It gets lost again.
	r.fails = fmt.Errorf("IPv4: %w: %w", iptables.ErrUnusable, iptables.ErrNoTable)
	r.f.Note(iptables.Event{}, r.now)
	if out := r.pass(time.Second); out.Status.Usable || r.called() != "read" ||
		out.Facts.Unusable == nil {
		t.Errorf("lost: %+v", out)
	}
	r.fails = nil
	if r.pass(retryUnusable); r.called() != "" {
		t.Error("tried within a minute")
	}
	if out := r.pass(time.Second); !out.Status.Usable || r.called() != "probe IPv4, read" ||
		!out.Status.Equal {
		t.Errorf("back: %+v", out)
	}
}

// refusedRule is a rule that the kernel of these tests does not take.
var refusedRule = iptables.RefusedError{
	Rule:   "-A SERVICE_PROXY_SERVICE_PORTS -p tcp -m tcp --dport 80 -j SERVICE_PROXY_REDIRECT",
	Stderr: "no",
}

// withoutPorts is what a kernel takes that refuses the service ports.
func (r *rig) withoutPorts(p iptables.Plan) (iptables.Ruleset, []iptables.RefusedError) {
	if !strings.Contains(p.String(), "-A SERVICE_PROXY_SERVICE_PORTS -p") {
		return iptables.Ruleset{}, nil
	}
	less := r.order.Want
	less.ServicePorts, less.Jumps, less.Settling = nil, true, r.f.goal.shape.settling
	return less.Ruleset(), []iptables.RefusedError{refusedRule}
}

// TestRefused: a rule that the kernel refuses is left out, said, and offered again after five
// minutes.
func TestRefused(t *testing.T) {
	r := newRig(t)
	// so that it is no first install, whose end would offer the whole again
	left := anInterception()
	left.ServicePorts = nil
	r.install(left)
	r.refuses = r.withoutPorts
	r.pass(0)
	out := r.pass(0)
	if !maps.Equal(out.Applies, map[string]int{"refused": 1}) || !out.Status.Equal ||
		!out.Status.Jumps || !out.Confirmed || out.Facts.Err != nil {
		t.Errorf("refused: %+v", out)
	}
	if told := out.Status.Left; len(told) != 1 || told[0].Rule != out.Facts.Left[0].Rule {
		t.Errorf("told: %+v", told)
	}
	if len(out.Facts.Left) != 1 || out.NotReady != "the IPv4 rules are not as wanted" ||
		!slices.Contains(r.logged(), "rule left out that the kernel refuses") {
		t.Errorf("said: %+v", out)
	}
	// Drift is repaired to what the kernel takes.
	r.others(byIptables, "-D OUTPUT "+jump)
	if out = r.pass(time.Second); !maps.Equal(out.Applies, map[string]int{"applied": 1}) ||
		out.Undone != 1 || len(out.Facts.Left) != 1 || out.NotReady == "" {
		t.Errorf("drift: %+v", out)
	}
	r.called()
	if out = r.pass(retryLeft - time.Second); strings.Contains(r.called(), "apply") ||
		len(out.Facts.Left) != 1 {
		t.Errorf("offered within five minutes: %+v", out)
	}
	if out = r.pass(time.Second); !maps.Equal(out.Applies, map[string]int{"refused": 1}) ||
		len(out.Facts.Left) != 1 || out.Undone != 1 {
		t.Errorf("not offered past five minutes: %+v", out)
	}
	r.refuses = nil
	r.called()
	if out = r.pass(retryLeft); strings.Contains(r.called(), "apply") || len(out.Facts.Left) != 1 {
		t.Errorf("offered within five minutes: %+v", out)
	}
	if out = r.pass(1); !maps.Equal(out.Applies, map[string]int{"applied": 1}) ||
		len(out.Facts.Left) != 0 || out.NotReady != "" || out.Undone != 1 {
		t.Errorf("taken: %+v", out)
	}
}

// TestRefusedComments: a kernel without comments has every packet go the way it should.
func TestRefusedComments(t *testing.T) {
	r := newRig(t)
	r.refuses = func(iptables.Plan) (iptables.Ruleset, []iptables.RefusedError) {
		return r.f.goal.want, []iptables.RefusedError{{Rule: iptables.CommentMatch}}
	}
	if out := r.settle(); out.NotReady != "" || len(out.Facts.Left) != 1 {
		t.Errorf("%+v", out)
	}
}

// TestPaused: after cleanup nothing is read or written, and nothing is said to be in.
func TestPaused(t *testing.T) {
	r := installed(t)
	r.order.Paused = true
	r.others(byIptables, "-D OUTPUT "+jump)
	out := r.pass(time.Second)
	if r.called() != "" || out.Status.Equal || out.Status.Jumps || out.Wake != tick ||
		r.has("OUTPUT", jump) || !out.Written || out.Status.Shape != nil {
		t.Errorf("%+v", out)
	}
}

// TestPoll: where nobody is told of changes, everything is read each 1.5 s; else each five minutes.
func TestPoll(t *testing.T) {
	for _, test := range []struct {
		name                string
		notified, unwatched bool
		untold              error
		every               time.Duration
	}{
		{"watched", true, false, nil, resync},
		{"notifications have ended", false, false, nil, unwatchedPoll},
		{"not asked yet", true, true, nil, unwatchedPoll},
		{"no answer", true, false, iptables.ErrCouldNotLook, unwatchedPoll},
	} {
		r := newRig(t)
		r.order.Notified, r.unwatched, r.untold = test.notified, test.unwatched, test.untold
		left := anInterception() // so that it is no first install, whose end is a change
		left.Jumps = true
		r.install(left)
		r.settle()
		r.called()
		if out := r.pass(test.every - 1); r.called() != "" || out.Wake != 1 {
			t.Errorf("%s: read before its time, wake %v", test.name, out.Wake)
		}
		if out := r.pass(1); r.called() != "read" || out.Wake != tick {
			t.Errorf("%s: not read at its time: %+v", test.name, out)
		}
		if out := r.pass(1); r.called() != "" || out.Wake != test.every-1 {
			t.Errorf("%s: read again, wake %v", test.name, out.Wake)
		}
		r.f.Note(iptables.Event{Chains: []string{"OUTPUT"}}, r.now)
		r.pass(1)
		if called, part := r.called(), test.every == resync; part && called != "read OUTPUT" ||
			!part && called != "read" {
			t.Errorf("%s: after a hint: %q", test.name, called)
		}
		// What is touched when everything is due anyway.
		r.f.Note(iptables.Event{Chains: []string{"OUTPUT"}}, r.now)
		if r.pass(test.every); r.called() != "read" {
			t.Errorf("%s: not everything is read when it is due", test.name)
		}
		said := strings.Count(strings.Join(r.logged(), "\n"), "the kernel does not tell")
		if said > 1 || said == 1 != (test.untold != nil) {
			t.Errorf("%s: that the kernel does not tell is said %d times", test.name, said)
		}
	}
}

// TestReadShare: under a storm of others' changes reads take a sixth of the time, after the first
// ones. A new want does not wait.
func TestReadShare(t *testing.T) {
	r := installed(t)
	r.takes = 100 * time.Millisecond
	storm := func() { r.f.Note(iptables.Event{Chains: []string{"OUTPUT"}}, r.now) }
	for n := range readBurst/r.takes + 1 {
		storm()
		if r.pass(0); r.called() != "read OUTPUT" {
			t.Fatalf("change %d is not read at once", n)
		}
	}
	storm()
	// the read itself and five times that
	if out := r.pass(0); out.Wake != 600*time.Millisecond || r.called() != "" {
		t.Errorf("wakes in %v", out.Wake)
	}
	if r.pass(599 * time.Millisecond); r.called() != "" {
		t.Error("read before its share")
	}
	if r.pass(time.Millisecond); r.called() != "read OUTPUT" {
		t.Error("not read at its share")
	}
	storm()
	more := anInterception()
	more.Services = more.Services[:1]
	r.want(more)
	if r.pass(0); r.called() != "read OUTPUT, apply" {
		t.Error("a new want waits")
	}
	// What must leave while nothing is known keeps to the share, too.
	r.pass(time.Second)
	r.called()
	storm()
	r.pass(0)
	r.called()
	r.order.Known = false
	storm()
	r.listens(foreignUID)
	if out := r.pass(0); out.Wake <= 0 || r.called() != "" {
		t.Errorf("leaving: wakes in %v", out.Wake)
	}
}

// TestSettling: a first install lets older connections through for five minutes.
func TestSettling(t *testing.T) {
	const row = "-p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN " +
		"-m comment --comment settling -j RETURN"
	r := newRig(t)
	r.settle()
	if !r.has("SERVICE_PROXY_OUTPUT", row) {
		t.Fatalf("there is\n%s", r.ours())
	}
	if r.pass(settle - 1); !r.has("SERVICE_PROXY_OUTPUT", row) {
		t.Error("taken out before its time")
	}
	if out := r.pass(1); r.has("SERVICE_PROXY_OUTPUT", row) || !out.Status.Equal ||
		out.Undone != 0 {
		t.Errorf("not taken out: %+v\n%s", out, r.ours())
	}
	// What is put right later is no first install.
	r.others(iptables.Event{}, "-D OUTPUT "+jump, ":SERVICE_PROXY_OUTPUT - [0:0]")
	if r.pass(time.Second); r.has("SERVICE_PROXY_OUTPUT", row) || !r.has("OUTPUT", jump) {
		t.Errorf("there is\n%s", r.ours())
	}
	// A run that adopts such rules lets them go on for the whole time.
	left := anInterception()
	left.Jumps, left.Settling = true, true
	r = newRig(t)
	r.install(left)
	r.settle()
	if r.pass(settle - 1); !r.has("SERVICE_PROXY_OUTPUT", row) {
		t.Error("adopted, and taken out before its time")
	}
	if r.pass(1); r.has("SERVICE_PROXY_OUTPUT", row) {
		t.Error("adopted, and not taken out")
	}
	// Chains that somebody flushed before this run are none that kept conntrack on.
	r = newRig(t)
	r.install(left)
	r.others(iptables.Event{}, "-D OUTPUT "+jump, ":SERVICE_PROXY_OUTPUT - [0:0]",
		":SERVICE_PROXY_REDIRECT - [0:0]", ":SERVICE_PROXY_SERVICE_CIDRS - [0:0]")
	if r.settle(); !r.has("SERVICE_PROXY_OUTPUT", row) {
		t.Errorf("flushed before, and older connections are not let through:\n%s", r.ours())
	}
	// Rules without it are not given it.
	left.Settling = false
	r = newRig(t)
	r.install(left)
	if r.settle(); r.has("SERVICE_PROXY_OUTPUT", row) {
		t.Error("adopted without, and given it")
	}
}

// TestFlows: what the new rules take over is deleted from conntrack's table, and nothing else.
func TestFlows(t *testing.T) {
	r := newRig(t)
	step := func(name string, after time.Duration, want string) {
		t.Helper()
		r.pass(after)
		if deleted := r.deleted(); deleted != want {
			t.Errorf("%s: %q, want %q", name, deleted, want)
		}
	}
	step("the first look", 0, "")
	step("the first install", 0, "half-open [10.1.0.1/32 10.1.0.2/32]")
	step("an idle pass", time.Second, "")
	i := anInterception()
	i.Services = prefixes("10.0.0.9/32", "10.1.0.2/32", "10.1.0.3/32")
	i.DNSPort = 15053
	r.want(i)
	step("two services and DNS come, one goes", 0, "UDP 53, half-open [10.0.0.9/32 10.1.0.3/32]")
	step("before a second is over", time.Second-1, "")
	step("answers of that second", 1, "late UDP 53")
	step("before a resolver gives up", 5*time.Second-1, "")
	step("answers that were late", 1, "late UDP 53")
	step("an idle pass", time.Minute, "")
	r.flowsFail = errors.New("no")
	i.DNSPort = 0
	r.want(i)
	step("DNS goes, and the table cannot be walked", 0, "UDP 53")
	r.flowsFail = nil
	step("so it is done later", time.Second, "UDP 53")
	step("and then only late answers", 5*time.Second, "late UDP 53")
	step("an idle pass", time.Minute, "")
	r.listens(0)
	r.order.WhenDown = Bypass
	for range 3 {
		r.pass(time.Second)
	}
	if r.ours().Intercepting() || r.deleted() != "" {
		t.Errorf("bypassed:\n%s", r.ours())
	}
	r.listens(proxyUID)
	step("all services come back", time.Second, "half-open [10.0.0.9/32 10.1.0.2/32 10.1.0.3/32]")

	r = newRig(t)
	i.DNSPort = 15053
	r.want(i)
	r.order.Looks.DNS.Listening = false
	r.pass(0)
	step("DNS is wanted, and nobody listens", 0, "half-open [10.0.0.9/32 10.1.0.2/32 10.1.0.3/32]")
	r.listens(proxyUID)
	step("somebody does", 0, "UDP 53")

	// While rules of ours were gone, what they take over went its old way. What is undone elsewhere
	// costs no question its answer.
	r.pass(answersLate)
	r.pass(answersLate)
	r.deleted()
	r.others(iptables.Event{}, "-D OUTPUT -p udp -m udp --dport 53 -j SERVICE_PROXY_DNS")
	step("the jump for DNS is repaired", 0,
		"UDP 53, half-open [10.0.0.9/32 10.1.0.2/32 10.1.0.3/32]")
	r.pass(answersLate)
	r.pass(answersLate)
	r.deleted()
	r.others(iptables.Event{}, ":SERVICE_PROXY_SERVICE_CIDRS - [0:0]")
	step("services are repaired", 0, "half-open [10.0.0.9/32 10.1.0.2/32 10.1.0.3/32]")
	r.others(iptables.Event{}, "-A OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT")
	step("a second jump is taken out", 0, "")

	// Who adopts rules for DNS looks after late answers, and no more.
	i.Jumps = true
	r = newRig(t)
	r.install(i)
	i.Jumps = false
	r.want(i)
	step("adopted", 0, "")
	step("the wanted rules are there", 0, "")
	step("before a resolver gives up", answersLate-1, "")
	step("answers that were late", 1, "late UDP 53")
	r = newRig(t)
	r.install(i) // without jumps nothing took another path
	r.want(i)
	r.settle()
	if deleted := r.deleted(); !strings.HasPrefix(deleted, "UDP 53, half-open") {
		t.Errorf("jumps come: %q", deleted)
	}
}

// TestPlannedStop: with Envoy draining the jumps leave, and the rows stay, which keep conntrack on.
func TestPlannedStop(t *testing.T) {
	r := installed(t)
	was := r.ours()
	r.order.Draining = true
	out := r.pass(time.Second)
	if r.ours().Intercepting() || !r.ours().Equal(was.WithoutJumps()) || out.Undone != 0 ||
		!out.Status.Equal || !out.Written || out.Confirmed {
		t.Errorf("%+v\n%s", out, r.ours())
	}
	r.order.Draining = false
	if out = r.pass(time.Second); !r.ours().Equal(was) || out.Undone != 0 {
		t.Errorf("%+v\n%s", out, r.ours())
	}
}

// TestAllServicesGo: where nothing is wanted any more, nothing of ours stays.
func TestAllServicesGo(t *testing.T) {
	r := installed(t)
	r.want(iptables.Interception{Family: iptables.IPv4})
	out := r.pass(time.Second)
	if !r.ours().Empty() || !out.Status.Equal || out.Status.Jumps || out.Written ||
		out.NotReady != "" || out.Confirmed || out.Status.Services != 0 {
		t.Errorf("%+v\n%s", out, r.ours())
	}
}

// TestManyDifferences: five differences are logged, and how many there are.
func TestManyDifferences(t *testing.T) {
	r := newRig(t)
	many := anInterception()
	many.ServicePorts = []uint16{80, 81, 82, 83, 84, 85, 86, 87}
	r.want(many)
	r.settle()
	r.logs.TakeAll()
	var lines []string
	for _, port := range many.ServicePorts[1:] {
		lines = append(lines, fmt.Sprintf("-D SERVICE_PROXY_SERVICE_PORTS -p tcp -m tcp "+
			"--dport %d -j SERVICE_PROXY_REDIRECT", port))
	}
	r.others(iptables.Event{}, lines...)
	out := r.pass(time.Second)
	logged := strings.Join(r.lines(), "; ")
	if strings.Count(logged, "rule removed") != 5 || !strings.Contains(logged, "differences:7") ||
		!maps.Equal(out.Drift, map[string]int{"rule removed": 7}) {
		t.Errorf("logged %q; %+v", logged, out)
	}
}

// TestFailedRepair: what could not be put right is no repair, and is tried again as no drift.
func TestFailedRepair(t *testing.T) {
	r := installed(t)
	r.others(byIptables, "-D OUTPUT "+jump)
	r.applyFails = iptables.ErrLocked
	out := r.pass(time.Second)
	if out.Undone != 0 || len(out.Drift) != 0 || out.LastDriftBy != "" || out.Facts.Undone != 0 ||
		out.Facts.Err == nil || out.Wake != retryFirst || len(out.Facts.Drift) != 1 {
		t.Errorf("failed: %+v", out)
	}
	if lines := r.lines(); !slices.Equal(lines,
		[]string{
			"rules not as wanted map[error:" + iptables.ErrLocked.Error() + " family:IPv4]",
		}) {
		t.Errorf("logged %q", lines)
	}
	r.applyFails = nil
	if out = r.pass(time.Second); out.Undone != 0 || !out.Status.Equal ||
		r.called() != "read OUTPUT, apply, read, apply" {
		t.Errorf("done: %+v", out)
	}
}

// TestPlanIsLogged: at debug, what is about to be written.
func TestPlanIsLogged(t *testing.T) {
	r := newRig(t)
	core, logs := observer.New(zap.DebugLevel)
	r.f.log = zap.New(core)
	r.settle()
	plans := logs.FilterMessage("plan").All()
	if len(plans) != 1 || !strings.Contains(fmt.Sprint(plans[0].ContextMap()),
		"-I OUTPUT 1 "+jump) {
		t.Errorf("logged %v", plans)
	}
}

// TestOff: the brake takes the jumps out of all three ways and leaves the chains, whoever accepts
// and whatever is known. They go in again once the proxy accepts, and not before.
func TestOff(t *testing.T) {
	all := anInterception()
	all.InboundPort, all.Serving, all.DNSPort = 15006, []iptables.Serving{{Port: 80}}, 15053
	whole := all
	whole.Jumps = true
	const held = "the jumps are held back: interception is off by the metadata key " +
		"service-proxy-agent-interception"
	for _, test := range []struct {
		name   string
		change func(r *rig) // with the brake
		known  bool
	}{
		{"Envoy accepts", func(*rig) {}, true},
		{"Envoy is down", func(r *rig) { r.listens(0) }, true},
		{"somebody else's port", func(r *rig) { r.listens(foreignUID) }, true},
		{"nobody could look", func(r *rig) {
			for _, look := range []*symptom.Port{&r.order.Looks.Outbound, &r.order.Looks.Inbound,
				&r.order.Looks.DNS} {
				look.Listening, look.Err = false, errors.New("netlink")
			}
		}, true},
		{"what is wanted is not known", func(r *rig) { r.order.Known = false }, false},
		{"the proxy's user is not there", func(r *rig) { r.order.UserKnown = false; r.listens(0) },
			false},
		{"Envoy drains", func(r *rig) { r.order.Draining = true }, true},
		{"bypass", func(r *rig) { r.order.WhenDown = Bypass; r.listens(0) }, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newRig(t)
			r.want(all)
			r.settle()
			if !r.ours().WithoutComments().Equal(settled(whole).WithoutComments()) {
				t.Fatalf("not in:\n%s", r.ours())
			}
			r.order.Off = true
			test.change(r)
			out := r.pass(time.Second)
			for out.Wake == 0 {
				out = r.pass(0)
			}
			want := r.ours().WithoutJumps()
			if r.ours().Intercepting() || out.Status.Jumps || out.NotReady != "" ||
				!r.ours().Equal(want) || r.ours().Len() == 0 || len(r.nat.Chains()["SERVICE_PROXY_DNS"]) == 0 {
				t.Errorf("not out, or not the chains alone: %+v\n%s", out, r.ours())
			}
			if test.known && (out.Status.Shape == nil || out.Status.Shape.Held != held) {
				t.Errorf("shape %+v", out.Status.Shape)
			}
			if len(out.Drift) != 0 || out.Undone != 0 {
				t.Errorf("taken for drift: %+v", out)
			}
			r.called()
			if r.pass(time.Second); strings.Contains(r.called(), "apply") {
				t.Error("written again")
			}
			// Without the brake it is Hold that decides.
			r.order.Off, r.order.Known, r.order.UserKnown, r.order.Draining = false, true, true, false
			r.listens(0)
			if out = r.settle(); out.Status.Jumps || r.ours().Intercepting() {
				t.Errorf("in while the proxy does not accept\n%s", r.ours())
			}
			r.listens(proxyUID)
			if out = r.pass(time.Second); !out.Status.Jumps || out.NotReady != "" ||
				!r.ours().Equal(settled(whole)) {
				t.Errorf("not in again: %+v\n%s", out, r.ours())
			}
		})
	}
}

// settled is the ruleset of an interception that lets older connections through.
func settled(i iptables.Interception) iptables.Ruleset {
	i.Settling = true
	return i.Ruleset()
}

// TestOffAtBoot: with the brake on no jump ever goes in, and chains that nobody needs neither. One
// that an earlier run or somebody else put in goes, and what is left is repaired.
func TestOffAtBoot(t *testing.T) {
	r := newRig(t)
	r.order.Off = true
	for range 5 {
		if out := r.pass(time.Second); out.Status.Jumps || out.Written || !r.ours().Empty() {
			t.Fatalf("at boot: %+v\n%s", out, r.ours())
		}
	}
	if called := r.called(); strings.Contains(called, "apply") {
		t.Errorf("written: %s", called)
	}
	r.order.Off = false
	if out := r.pass(time.Second); !out.Status.Jumps || !r.ours().Settling() {
		t.Errorf("a first install: %+v\n%s", out, r.ours())
	}

	left := anInterception()
	left.Jumps = true
	for _, marked := range []bool{false, true} {
		r = newRig(t)
		r.order.Off, r.order.Marked = true, marked
		r.install(left)
		if out := r.pass(0); out.NotReady == "" || !out.Status.Jumps {
			t.Errorf("before it has written: %+v", out)
		}
		out := r.settle()
		if out.Status.Jumps || r.ours().Intercepting() || r.ours().Empty() || out.NotReady != "" {
			t.Errorf("an earlier run's, marked %v: %+v\n%s", marked, out, r.ours())
		}
		chains := r.ours()
		// Somebody puts the jump in again, takes a row out, and flushes the table.
		r.others(byIptables, "-I OUTPUT "+jump)
		if out = r.pass(time.Second); out.Undone != 1 || !r.ours().Equal(chains) {
			t.Errorf("a jump of somebody else's: %+v\n%s", out, r.ours())
		}
		r.others(iptables.Event{}, ":SERVICE_PROXY_REDIRECT - [0:0]")
		if out = r.pass(time.Second); out.Undone != 2 || !r.ours().Equal(chains) {
			t.Errorf("a row: %+v\n%s", out, r.ours())
		}
		var flush, gone []string
		for name := range r.nat.Chains() {
			if strings.HasPrefix(name, "SERVICE_PROXY_") {
				flush, gone = append(flush, ":"+name+" - [0:0]"), append(gone, "-X "+name)
			}
		}
		flush = append(flush, gone...)
		r.others(iptables.Event{}, flush...)
		if !r.ours().Empty() {
			t.Fatalf("not flushed:\n%s", r.ours())
		}
		if out = r.pass(time.Second); out.Undone != 3 || !r.ours().Equal(chains) ||
			r.ours().Intercepting() {
			t.Errorf("all of it: %+v\n%s", out, r.ours())
		}
	}
}

// TestOffFails: a brake that could not be written is not ready, and is tried again.
func TestOffFails(t *testing.T) {
	r := installed(t)
	r.order.Off, r.applyFails = true, iptables.ErrLocked
	out := r.pass(time.Second)
	if out.NotReady == "" || !out.Status.Jumps || out.Wake > 2*time.Second {
		t.Errorf("%+v", out)
	}
	r.applyFails = nil
	if out = r.pass(out.Wake); out.NotReady != "" || out.Status.Jumps || r.ours().Intercepting() {
		t.Errorf("%+v\n%s", out, r.ours())
	}
}
