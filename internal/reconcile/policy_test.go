package reconcile

import (
	"cmp"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

func TestGate(t *testing.T) {
	const proxy = 107
	ok := symptom.Port{Listening: true, Owner: proxy}
	closed := symptom.Port{}
	foreign := symptom.Port{Listening: true, Owner: 1000}
	unknown := symptom.Port{Err: errors.New("netlink")}
	tests := []struct {
		name     string
		policy   WhenEnvoyDown
		looks    []symptom.Port
		draining bool // at the last look
		want     bool
		every    time.Duration // between looks; 0: a second
	}{
		{"nobody yet", Keep, []symptom.Port{closed}, false, false, 0},
		{"accepts", Keep, []symptom.Port{closed, ok}, false, true, 0},
		{"kept when Envoy dies", Keep, []symptom.Port{ok, closed, closed, closed, closed, closed},
			false, true, 0},
		{"bypassed after three looks", Bypass, []symptom.Port{ok, closed, closed, closed}, false,
			false, 0},
		{"not within moments, however many events there are", Bypass,
			[]symptom.Port{ok, closed, closed, closed, closed, closed,
				closed}, false, true, 300 * time.Millisecond},
		{"but over two seconds of them", Bypass,
			[]symptom.Port{ok, closed, closed, closed, closed, closed, closed, closed,
				closed}, false, false, 300 * time.Millisecond},
		{"not before", Bypass, []symptom.Port{ok, closed, closed}, false, true, 0},
		{"one good look starts the count again", Bypass,
			[]symptom.Port{ok, closed, closed, ok, closed, closed}, false, true, 0},
		{"back after a bypass", Bypass, []symptom.Port{ok, closed, closed, closed, ok}, false,
			true, 0},
		{"a foreign owner closes it at once", Keep, []symptom.Port{ok, foreign}, false, false, 0},
		{"and it stays closed until the proxy is back", Keep, []symptom.Port{ok, foreign, closed},
			false, false, 0},
		{"the proxy is back", Keep, []symptom.Port{ok, foreign, closed, ok}, false, true, 0},
		{"could not look is no news", Keep, []symptom.Port{ok, unknown}, false, true, 0},
		{"could not look is no news at boot", Keep, []symptom.Port{unknown}, false, false, 0},
		{"a planned stop", Keep, []symptom.Port{ok, ok}, true, false, 0},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			var g gate
			now := time.Unix(1e9, 0)
			for i, look := range test.looks {
				now = now.Add(cmp.Or(test.every, time.Second))
				g = g.next(now, look, proxy, test.draining && i == len(test.looks)-1, test.policy)
			}
			if g.open != test.want {
				t.Errorf("open is %v, want %v", g.open, test.want)
			}
		})
	}
}

// TestRepairsAtOnce: four repairs within 8 s are made at once and are no reason to back off; the
// fifth is one.
func TestRepairsAtOnce(t *testing.T) {
	var b backOff
	now := time.Unix(1e9, 0)
	for n := 1; n <= 5; n++ {
		if !b.mayRepair(now) || b.on() {
			t.Fatalf("repair %d is put off until %v", n, b.until.Sub(now))
		}
		b.repaired(now)
		now = now.Add(1900 * time.Millisecond)
		b.pass(now)
	}
	if !b.on() {
		t.Error("five repairs within 8 s are no reason to back off")
	}
	if now = now.Add(-time.Second); b.mayRepair(now) {
		t.Error("a sixth is made at once")
	}
}

// TestBackOff plays a program that undoes every repair at once, for five minutes, and then ends.
func TestBackOff(t *testing.T) {
	var b backOff
	now := time.Unix(1e9, 0)
	writes, late := 0, 0
	for step := 0; step < 3000; step++ {
		now = now.Add(100 * time.Millisecond)
		b.pass(now)
		if b.mayRepair(now) {
			b.repaired(now)
			writes++
			if step > 100 {
				late++
			}
		}
	}
	if !b.on() {
		t.Error("no back-off")
	}
	if late > 290 || late < 30 {
		t.Errorf("%d repairs in 290 s of it, want under one a second and one each few seconds",
			late)
	}
	if !b.until.Before(now.Add(backOffLast + time.Millisecond)) {
		t.Error("the next repair is too far off")
	}
	for range 60 {
		now = now.Add(time.Second)
		b.pass(now)
	}
	if b.on() || b.undone != 0 {
		t.Errorf("the back-off does not end: %+v", b)
	}
}

// TestNoBackOff: drift that comes now and then is repaired at once, always.
func TestNoBackOff(t *testing.T) {
	var b backOff
	now := time.Unix(1e9, 0)
	for range 100 {
		now = now.Add(10 * time.Second)
		b.pass(now)
		if !b.mayRepair(now) {
			t.Fatalf("repair put off by %v", b.until.Sub(now))
		}
		b.repaired(now)
	}
}

// TestTheFirstClosedLookCounts: what is bypassed is a port that was closed for two seconds, from
// the first look that found it so.
func TestTheFirstClosedLookCounts(t *testing.T) {
	start := time.Unix(1e9, 0)
	g := gate{open: true}
	for i, step := range []struct {
		at   time.Duration
		want gate
	}{
		{0, gate{open: true, failed: 1, since: start}},
		{time.Second, gate{open: true, failed: 2, since: start}},
		{2*time.Second - 1, gate{open: true, failed: 3, since: start}},
		{2 * time.Second, gate{denied: true}},
	} {
		if g = g.next(start.Add(step.at), symptom.Port{}, 107, false, Bypass); g != step.want {
			t.Errorf("look %d: %+v, want %+v", i, g, step.want)
		}
		if g.accepts() {
			t.Errorf("look %d: a closed port accepts", i)
		}
	}
	if !(gate{open: true}).accepts() || (gate{}).accepts() {
		t.Error("an open gate accepts, and a closed one does not")
	}
	// A port that is closed after a reason was seen stays denied.
	if g = g.next(start, symptom.Port{}, 107, false, Bypass); !g.denied || g.failed != 0 {
		t.Errorf("closed after a denial: %+v", g)
	}
}

func TestAdoptedGate(t *testing.T) {
	for _, test := range []struct {
		is   gate
		port uint16
		want bool
	}{
		{gate{}, 15001, true}, {gate{}, 0, false}, {gate{denied: true}, 15001, false},
		{gate{open: true}, 0, true}, {gate{open: true}, 15001, true},
	} {
		if g := test.is.adopted(test.port); g.open != test.want || g.denied != test.is.denied {
			t.Errorf("%+v, rules that lead to %d: %+v, want open %v", test.is, test.port, g,
				test.want)
		}
	}
}

// TestSpacing: the delays of a back-off double from 1.5 s to 6 s, and 20 s without drift end it.
func TestSpacing(t *testing.T) {
	var b backOff
	now := time.Unix(1e9, 0)
	for range 4 {
		b.repaired(now)
	}
	if b.on() || !b.mayRepair(now) || b.undone != 4 {
		t.Errorf("after four: %+v", b)
	}
	for _, want := range []time.Duration{1500, 3000, 6000, 6000} {
		want *= time.Millisecond
		if b.repaired(now); !b.until.Equal(now.Add(want)) || !b.on() {
			t.Errorf("put off by %v, want %v", b.until.Sub(now), want)
		}
		now = b.until
		if b.mayRepair(now.Add(-1)) || !b.mayRepair(now) {
			t.Errorf("after %v: a repair before its time, or not at it", want)
		}
	}
	// The drift seen last counts, not the last repair.
	b.mayRepair(now)
	if b.pass(now.Add(20 * time.Second)); !b.on() {
		t.Error("over in less than 20 s")
	}
	if b.pass(now.Add(20*time.Second + 1)); b.on() || b.undone != 0 || len(b.recent) != 0 {
		t.Errorf("not over past 20 s: %+v", b)
	}
	// Repairs that are no reason to back off are forgotten, too.
	b.repaired(now)
	if b.pass(now.Add(20 * time.Second)); b.undone != 1 {
		t.Errorf("forgotten early: %+v", b)
	}
	if b.pass(now.Add(20*time.Second + 1)); b.undone != 0 {
		t.Errorf("not forgotten: %+v", b)
	}
}

// TestWindow: only repairs of the last 8 s are a reason to back off.
func TestWindow(t *testing.T) {
	for _, test := range []struct {
		last time.Duration // of five repairs, the first at 0 and three at 1 s
		on   bool
	}{{8 * time.Second, true}, {8*time.Second + 1, false}} {
		var b backOff
		now := time.Unix(1e9, 0)
		for _, at := range []time.Duration{0, time.Second, time.Second, time.Second, test.last} {
			b.repaired(now.Add(at))
		}
		if b.on() != test.on {
			t.Errorf("the fifth after %v: backing off is %v", test.last, b.on())
		}
	}
}

func TestRetry(t *testing.T) {
	now := time.Unix(1e9, 0)
	var r retry
	for _, want := range []time.Duration{1, 2, 4, 8, 16, 30, 30} {
		want *= time.Second
		if r = r.failed(now, iptables.ErrLocked); r.delay != want || !r.at.Equal(now.Add(want)) ||
			r.err != iptables.ErrLocked {
			t.Errorf("tried again after %v, want %v", r.delay, want)
		}
	}
	if r.news(errors.New(iptables.ErrLocked.Error())) || !r.news(iptables.ErrNotRoot) ||
		!(retry{}).news(iptables.ErrLocked) {
		t.Error("what is news and what is not")
	}
}

func TestUsabilityIsDue(t *testing.T) {
	now := time.Unix(1e9, 0)
	for _, test := range []struct {
		u    usability
		want bool
	}{
		{usability{}, true},
		{usability{when: now.Add(-time.Hour)}, false},
		{usability{when: now.Add(-time.Minute), why: iptables.ErrNoTable}, false},
		{usability{when: now.Add(-time.Minute - 1), why: iptables.ErrNoTable}, true},
	} {
		if due := test.u.due(now); due != test.want {
			t.Errorf("%+v: due is %v", test.u, due)
		}
	}
}

// TestShape: what the jumps wait for, and what waits for its own port.
func TestShape(t *testing.T) {
	const (
		out = 1 << iota
		in
		dns
	)
	wants := map[int]iptables.Interception{}
	for w := range 8 {
		i := iptables.Interception{Family: iptables.IPv4, ProxyUID: 107, ProxyGID: 107}
		if w&out != 0 {
			i.OutboundPort, i.ServicePorts = 15001, []uint16{80}
		}
		if w&in != 0 {
			i.InboundPort, i.Serving = 15006, []iptables.Serving{{Port: 80}}
		}
		if w&dns != 0 {
			i.DNSPort = 15053
		}
		wants[w] = i
	}
	for _, test := range []struct {
		want, open  int // sets of out, in and dns
		jumps, rows int // to which, and for which there are rows
	}{
		{out, 0, 0, out}, {out, out, out, out}, {out, in | dns, 0, out},
		{in, 0, 0, in}, {in, in, in, in}, {in, out, 0, in},
		{dns, 0, 0, dns}, {dns, dns, dns, dns}, {dns, out | in, 0, dns},
		{out | in, out, out, out}, {out | in, in, 0, out | in}, {out | in, out | in, out | in,
			out | in},
		{out | dns, out, out, out}, {out | dns, dns, 0, out | dns}, {out | dns, out | dns,
			out | dns, out | dns},
		{in | dns, in, in, in}, {in | dns, dns, 0, in | dns}, {in | dns, in | dns, in | dns,
			in | dns},
		{out | in | dns, out | in, out | in, out | in}, {out | in | dns, in | dns, 0,
			out | in | dns},
		{0, out | in | dns, 0, 0},
	} {
		g := gates{outbound: gate{open: test.open&out != 0},
			inbound: gate{open: test.open&in != 0}, dns: gate{open: test.open&dns != 0}}
		text := shapeOf(wants[test.want], 7, &g, false).ruleset(wants[test.want]).String()
		for port, marks := range map[int][2]string{
			out: {"-A OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT\n", "REDIRECT --to-ports 15001"},
			in:  {"-A PREROUTING -p tcp -j SERVICE_PROXY_INBOUND\n", "REDIRECT --to-ports 15006"},
			dns: {"-A OUTPUT -p udp -m udp --dport 53 -j SERVICE_PROXY_DNS\n",
				"REDIRECT --to-ports 15053"},
		} {
			// DNS questions by TCP go through the chain of outbound connections.
			jump := test.jumps&port != 0 || port == out && test.jumps&dns != 0
			if strings.Contains(text, marks[0]) != jump ||
				strings.Contains(text, marks[1]) != (test.rows&port != 0) {
				t.Errorf("want %03b, open %03b: of %03b\n%s", test.want, test.open, port, text)
			}
		}
	}
	// The shape is another one when anything is.
	var g gates
	is := shapeOf(wants[out|in|dns], 1, &g, false)
	for name, other := range map[string]shape{
		"another want": shapeOf(wants[out|in|dns], 2, &g, false),
		"settling":     shapeOf(wants[out|in|dns], 1, &g, true),
		"outbound is open": shapeOf(wants[out|in|dns], 1, &gates{outbound: gate{open: true}},
			false),
		"inbound is open": shapeOf(wants[out|in|dns], 1, &gates{inbound: gate{open: true}},
			false),
		"the DNS port's gate": shapeOf(wants[out|in|dns], 1, &gates{dns: gate{open: true}}, false),
	} {
		if is == other {
			t.Errorf("%s: the same shape", name)
		}
	}
	if other := shapeOf(wants[out|in|dns], 1, &gates{outbound: gate{failed: 1}},
		false); is != other {
		t.Error("a look that changes no gate changes the shape")
	}
}

// TestMustLeave: rules that intercept leave when any port that they lead to is closed.
func TestMustLeave(t *testing.T) {
	open := gates{outbound: gate{open: true}, inbound: gate{open: true}, dns: gate{open: true}}
	all := iptables.Interception{
		Family: iptables.IPv4, OutboundPort: 15001, ServicePorts: []uint16{80}, DNSPort: 15053,
		InboundPort: 15006, Serving: []iptables.Serving{{Port: 80}}, Jumps: true,
	}
	none := all
	none.Jumps = false
	outbound := iptables.Interception{Family: iptables.IPv4, OutboundPort: 15001, Jumps: true}
	inbound := iptables.Interception{Family: iptables.IPv4, InboundPort: 15006,
		Serving: all.Serving, Jumps: true}
	for _, test := range []struct {
		name  string
		rules iptables.Interception
		close func(*gates)
		want  bool
	}{
		{"all are open", all, func(*gates) {}, false},
		{"outbound is closed", all, func(g *gates) { g.outbound.open = false }, true},
		{"inbound is closed", all, func(g *gates) { g.inbound.open = false }, true},
		{"DNS is closed", all, func(g *gates) { g.dns.open = false }, true},
		{"all are closed, and nothing jumps", none, func(g *gates) { *g = gates{} }, false},
		{"those are closed that outbound rules do not lead to", outbound,
			func(g *gates) { g.inbound.open, g.dns.open = false, false }, false},
		{"those are closed that inbound rules do not lead to", inbound,
			func(g *gates) { g.outbound.open, g.dns.open = false, false }, false},
		{"no rules", iptables.Interception{Family: iptables.IPv4}, func(g *gates) { *g = gates{} },
			false},
	} {
		g := open
		test.close(&g)
		if must := mustLeave(test.rules.Ruleset(), &g); must != test.want {
			t.Errorf("%s: must leave is %v", test.name, must)
		}
	}
}

// TestNumbers: how long things take is told in the documents.
func TestNumbers(t *testing.T) {
	for name, have := range map[string][2]time.Duration{
		"older connections are let through": {settle, 5 * time.Minute},
		"a refused rule is offered again":   {retryLeft, 5 * time.Minute},
		"everything is read":                {pollInterval(true), 5 * time.Minute},
		"and where nobody is told":          {pollInterval(false), 1500 * time.Millisecond},
		"a repaired drift is shown":         {showDrift, time.Minute},
		"an unusable family is tried":       {retryUnusable, time.Minute},
		"a late answer":                     {answersLate, 6 * time.Second},
		"a walk through conntrack":          {conntrackLimit, time.Second},
		"who wrote is told late":            {lateName, time.Second},
		"the longest pause between passes":  {tick, time.Second},
	} {
		if have[0] != have[1] {
			t.Errorf("%s: %v, want %v", name, have[0], have[1])
		}
	}
}

// TestWords: what --when-envoy-down is told.
func TestWords(t *testing.T) {
	if Keep != "keep" || Bypass != "bypass" {
		t.Errorf("the words are %q and %q", Keep, Bypass)
	}
}

func TestOutcomeOfAWrite(t *testing.T) {
	refused := &iptables.RefusedError{Rule: "-A"}
	for want, is := range map[string]struct {
		result iptables.Result
		err    error
	}{
		"applied": {},
		"refused": {result: iptables.Result{Left: []iptables.RefusedError{*refused}}},
		"locked":  {err: fmt.Errorf("apply: %w", iptables.ErrLocked)},
		"failed":  {err: iptables.ErrNotRoot},
	} {
		if got := outcome(is.result, is.err); got != want {
			t.Errorf("%v, left out %v: %q, want %q", is.err, is.result.Left, got, want)
		}
	}
	err := fmt.Errorf("apply: %w (and could not find out which: %w)", refused, iptables.ErrLocked)
	if got := outcome(iptables.Result{}, err); got != "refused" {
		t.Errorf("%v: %q", err, got)
	}
}
