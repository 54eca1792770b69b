package reconcile

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// TestGoalLeavesOut: what the kernel refuses is left out once, and stays so until the whole is
// offered again.
func TestGoalLeavesOut(t *testing.T) {
	now := time.Unix(1e9, 0)
	refused := func(rules ...string) iptables.Result {
		r := iptables.Result{Ruleset: iptables.Interception{Family: iptables.IPv4,
			OutboundPort: 1}.Ruleset()}
		for _, rule := range rules {
			r.Left = append(r.Left, iptables.RefusedError{Rule: rule})
		}
		return r
	}
	left := func(g goal) (rules []string) {
		for _, l := range g.left {
			rules = append(rules, l.Rule)
		}
		return rules
	}
	var g goal
	gates := gates{outbound: gate{open: true}}
	want := iptables.Interception{Family: iptables.IPv4, OutboundPort: 15001,
		ServicePorts: []uint16{80}}
	if !g.compile(want, 1, &gates, now) || g.lacks() || g.offerAgain(now.Add(time.Hour)) {
		t.Errorf("compiled: %+v", g)
	}
	g.installed(refused("a", iptables.CommentMatch), now)
	if !slices.Equal(left(g), []string{"a", iptables.CommentMatch}) || !g.leftAt.Equal(now) ||
		!g.lacks() || !g.target.Equal(refused().Ruleset) {
		t.Errorf("refused: %+v", g)
	}
	// What is put right later leaves out the same.
	g.installed(refused(), now.Add(time.Second))
	if len(g.left) != 2 || !g.leftAt.Equal(now) {
		t.Errorf("put right: %+v", g)
	}
	g.installed(refused("a", "b"), now.Add(time.Minute))
	if !slices.Equal(left(g), []string{"a", iptables.CommentMatch, "b"}) ||
		!g.leftAt.Equal(now.Add(time.Minute)) {
		t.Errorf("refused again: %+v", g)
	}
	if g.compile(want, 1, &gates, now) || len(g.left) != 3 {
		t.Errorf("the same want: %+v", g)
	}
	if g.offerAgain(now.Add(time.Minute + retryLeft)) {
		t.Error("offered within five minutes")
	}
	if !g.offerAgain(now.Add(time.Minute+retryLeft+1)) || len(g.left) != 0 ||
		!g.target.Equal(g.want) || g.target.Equal(refused().Ruleset) {
		t.Errorf("not offered past five minutes: %+v", g)
	}
	g.installed(refused(iptables.CommentMatch), now)
	if g.lacks() {
		t.Error("a comment is missed")
	}
	if !g.compile(want, 2, &gates, now) || len(g.left) != 0 || !g.target.Equal(g.want) {
		t.Errorf("another want is offered as a whole: %+v", g)
	}
}

// TestGoalRedirects: what is not jumped to redirects nothing, and DNS is its own gate's.
func TestGoalRedirects(t *testing.T) {
	now := time.Unix(1e9, 0)
	want := iptables.Interception{Family: iptables.IPv4, OutboundPort: 15001,
		Services: prefixes("10.1.0.1/32"), DNSPort: 15053}
	for _, test := range []struct {
		name  string
		gates gates
		want  redirected
	}{
		{"hold", gates{dns: gate{open: true}}, redirected{}},
		{"without DNS", gates{outbound: gate{open: true}}, redirected{services: want.Services}},
		{"with", gates{outbound: gate{open: true}, dns: gate{open: true}},
			redirected{services: want.Services, dns: 15053}},
	} {
		var g goal
		g.compile(want, 1, &test.gates, now)
		if r := g.redirects(15053); !slices.Equal(r.services, test.want.services) ||
			r.dns != test.want.dns {
			t.Errorf("%s: %+v, want %+v", test.name, r, test.want)
		}
	}
}

// TestSightIsDue: everything is read an interval after it was.
func TestSightIsDue(t *testing.T) {
	now := time.Unix(1e9, 0)
	s := sight{at: now}
	if due := s.due(now.Add(time.Second), time.Minute); due != 59*time.Second {
		t.Errorf("due in %v", due)
	}
}

// TestReadBudget: whatever reads take and whenever they are asked for, they have a sixth of any
// span of time, what was saved up, and one read more.
func TestReadBudget(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	var b readBudget
	start := time.Unix(1e9, 0)
	now, taken := start, time.Duration(0)
	for range 10_000 {
		if r.IntN(500) == 0 { // calm: nothing more than readBurst is saved up
			now = now.Add(time.Hour)
			if left := b.left(now); left != readBurst {
				t.Fatalf("saved up after an hour: %v", left)
			}
			start, taken = now, 0
		}
		due := b.due(now)
		if most := (1 + readShare) * longestRead; due > most {
			t.Fatalf("due in %v, more than %v", due, most)
		}
		if b.left(now.Add(due)) < 0 || due > 0 && b.left(now.Add(due-1-readShare)) >= 0 {
			t.Fatalf("not due in %v: %+v", due, b)
		}
		now = now.Add(due)
		read := time.Duration(r.Int64N(int64(longestRead)))
		b.took(now, read)
		now = now.Add(read)
		taken += read
		if most := readBurst + now.Sub(start)/(1+readShare) + longestRead; taken > most {
			t.Fatalf("%v taken in %v", taken, now.Sub(start))
		}
	}
	// One of nine seconds was held up: by SIGSTOP in the middle of it, when this was found.
	b = readBudget{}
	b.took(now, 9*time.Second)
	if left := b.left(now); left != readBurst-longestRead {
		t.Errorf("left after a read that was held up: %v", left)
	}
}

// TestGatesMove: which looks move a gate, and which are told.
func TestGatesMove(t *testing.T) {
	look := func(port uint16, uid uint32) symptom.Port {
		return symptom.Port{Addr: netip.AddrPortFrom(netip.IPv6Loopback(), port), Owner: uid,
			Listening: uid != 0}
	}
	for _, test := range []struct {
		name           string
		look           symptom.Port
		known, adopted bool
		is, want       gate
		told           bool
	}{
		{"no port", look(0, proxyUID), true, false, gate{}, gate{}, false},
		{"no port, and somebody else's", look(0, foreignUID), true, false, gate{}, gate{}, false},
		{"known", look(1, proxyUID), true, false, gate{}, gate{open: true}, true},
		{"known and closed", look(1, 0), true, false, gate{}, gate{}, true},
		{"known and somebody else's", look(1, foreignUID), true, false, gate{open: true},
			gate{denied: true}, true},
		{"unknown", look(1, proxyUID), false, false, gate{}, gate{}, false},
		{"unknown and closed", look(1, 0), false, false, gate{open: true}, gate{open: true}, false},
		{"unknown and somebody else's", look(1, foreignUID), false, false, gate{open: true},
			gate{denied: true}, true},
		{"adopted", look(1, proxyUID), false, true, gate{}, gate{open: true}, false},
		{"adopted and somebody else's", look(1, foreignUID), false, true, gate{open: true},
			gate{denied: true}, true},
	} {
		o := Order{Known: test.known, ProxyUID: proxyUID, WhenDown: Keep,
			Ports: Ports{1, 2, 3, true}}
		for i, set := range []func(*gates) (*gate, *symptom.Port){
			func(g *gates) (*gate, *symptom.Port) { return &g.outbound, &o.Looks.Outbound },
			func(g *gates) (*gate, *symptom.Port) { return &g.inbound, &o.Looks.Inbound },
			func(g *gates) (*gate, *symptom.Port) { return &g.dns, &o.Looks.DNS },
		} {
			o.Looks = Looks{}
			var g gates
			moved, at := set(&g)
			*moved, *at = test.is, test.look
			facts := g.move(time.Unix(1e9, 0), o, test.adopted)
			if *moved != test.want || len(facts) > 0 != test.told || g.ports != o.Ports {
				t.Errorf("%s, port %d: %+v, told %v; want %+v", test.name, i, *moved, facts,
					test.want)
			}
		}
	}
}

// TestGatesAdopt: the gates open of the ports that the rules lead to.
func TestGatesAdopt(t *testing.T) {
	all := iptables.Interception{
		Family: iptables.IPv4, OutboundPort: 15001, DNSPort: 15053, InboundPort: 15006,
		Serving: []iptables.Serving{{Port: 80}}, Jumps: true,
	}
	for _, test := range []struct {
		change             func(*iptables.Interception)
		outbound, in, dns_ bool
	}{
		{func(*iptables.Interception) {}, true, true, true},
		{func(i *iptables.Interception) { i.OutboundPort = 0 }, false, true, true},
		{func(i *iptables.Interception) { i.InboundPort = 0 }, true, false, true},
		{func(i *iptables.Interception) { i.DNSPort = 0 }, true, true, false},
	} {
		i := all
		test.change(&i)
		var g gates
		g.adopt(i.Ruleset())
		if g.outbound.open != test.outbound || g.inbound.open != test.in ||
			g.dns.open != test.dns_ {
			t.Errorf("%+v: %+v", i, g)
		}
	}
}

// TestMissing: which prefixes are new.
func TestMissing(t *testing.T) {
	for _, test := range []struct{ all, known, want []netip.Prefix }{
		{nil, nil, nil},
		{prefixes("10.0.0.1/32"), nil, prefixes("10.0.0.1/32")},
		{nil, prefixes("10.0.0.1/32"), nil},
		{prefixes("10.0.0.1/32"), prefixes("10.0.0.1/32"), nil},
		{prefixes("10.0.0.1/32", "10.0.0.3/32"), prefixes("10.0.0.2/32"),
			prefixes("10.0.0.1/32", "10.0.0.3/32")},
		{prefixes("10.0.0.2/32", "10.0.0.4/32"), prefixes("10.0.0.1/32", "10.0.0.2/32",
			"10.0.0.3/32"), prefixes("10.0.0.4/32")},
		{prefixes("10.0.0.0/24", "10.0.0.0/32"), prefixes("10.0.0.0/24"), prefixes("10.0.0.0/32")},
	} {
		if got := missing(test.all, test.known); !slices.Equal(got, test.want) {
			t.Errorf("%v of %v: %v, want %v", test.known, test.all, got, test.want)
		}
	}
}
