package agent

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"github.com/google/go-cmp/cmp"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/report"
)

// outboundOf is Traffic Director's listener with these chains.
func outboundOf(chains ...envoyadmin.FilterChain) envoyadmin.Listener {
	return envoyadmin.Listener{
		Name: "TRAFFICDIRECTOR_INTERCEPTION_LISTENER", Direction: corev3.TrafficDirection_OUTBOUND,
		Addresses: []netip.AddrPort{netip.MustParseAddrPort("0.0.0.0:15001"),
			netip.MustParseAddrPort("[::]:15001")},
		Bound: true, OriginalDst: true, Chains: chains,
	}
}

func serviceAt(name string, port uint16, prefixes ...string) envoyadmin.FilterChain {
	c := envoyadmin.FilterChain{Name: name, Port: port}
	for _, p := range prefixes {
		c.Prefixes = append(c.Prefixes, netip.MustParsePrefix(p))
	}
	return c
}

// withServices is a pass that has these services' rules in.
func withServices(at time.Time, serial uint64, chains ...envoyadmin.FilterChain) passed {
	p := intercepting()
	p.seen.Now, p.serial = at, serial
	p.want = Desired(Inputs{Config: attribute.Default(),
		Listeners: []envoyadmin.Listener{outboundOf(chains...)}})
	return p
}

// TestServicesOf: what the rules are for, by name.
func TestServicesOf(t *testing.T) {
	istio := envoyadmin.Listener{Name: "10.96.0.10_443", Chains: []envoyadmin.FilterChain{
		{Cluster: "PassthroughCluster"}, {Cluster: "outbound|443||web.shop.svc.cluster.local"}}}
	istio.Addresses = []netip.AddrPort{netip.MustParseAddrPort("10.96.0.10:443"),
		netip.MustParseAddrPort("[2001:db8::10]:443")}
	many := envoyadmin.Listener{Name: "0.0.0.0_8080", Chains: []envoyadmin.FilterChain{{RouteConfig: "8080"}},
		Addresses:    []netip.AddrPort{netip.MustParseAddrPort("0.0.0.0:8080")},
		DefaultChain: &envoyadmin.FilterChain{Cluster: "PassthroughCluster"}}
	behind := envoyadmin.Listener{Name: "10.96.0.11_80",
		Addresses:    []netip.AddrPort{netip.MustParseAddrPort("10.96.0.11:80")},
		DefaultChain: &envoyadmin.FilterChain{Cluster: "outbound|80||db.shop.svc.cluster.local"}}
	both := [2]bool{true, true}
	for _, tt := range []struct {
		name      string
		listeners []envoyadmin.Listener
		usable    [2]bool
		want      []string
	}{
		{"none", []envoyadmin.Listener{outboundOf()}, both, nil},
		{"by name, both families", []envoyadmin.Listener{outboundOf(
			serviceAt("web", 81, "fd10::1/128"), serviceAt("web", 81, "10.10.0.1/32"),
			serviceAt("db", 0, "10.10.0.10/32", "10.10.0.2/32"))}, both,
			[]string{"db [10.10.0.2 10.10.0.10]", "web [10.10.0.1:81 [fd10::1]:81]"}},
		{"IPv6 cannot be used", []envoyadmin.Listener{outboundOf(
			serviceAt("six", 81, "fd10::2/128"), serviceAt("web", 81, "fd10::1/128", "10.10.0.1/32"))},
			[2]bool{true, false}, []string{"web [10.10.0.1:81]"}},
		{"one address, two services", []envoyadmin.Listener{outboundOf(
			serviceAt("web", 80, "10.10.0.1/32"), serviceAt("db", 3306, "10.10.0.1/32"))}, both,
			[]string{"db [10.10.0.1:3306]", "web [10.10.0.1:80]"}},
		{"the same again, for another name of TLS", []envoyadmin.Listener{outboundOf(
			serviceAt("web", 443, "10.10.0.1/32"), serviceAt("web", 443, "10.10.0.1/32"))}, both,
			[]string{"web [10.10.0.1:443]"}},
		{"a range, any port and any address", []envoyadmin.Listener{outboundOf(
			serviceAt("net", 80, "10.20.0.0/24"), serviceAt("net", 0, "10.30.0.9/24"), serviceAt("any", 9000))}, both,
			[]string{"any [*:9000]", "net [10.20.0.0/24:80 10.30.0.0/24]"}},
		{"without a name", []envoyadmin.Listener{outboundOf(
			serviceAt("", 80, "10.10.0.1/32"), serviceAt("", 81, "10.10.0.1/32"), serviceAt("", 9000),
			serviceAt("", 1, "10.20.0.0/24"))}, both,
			[]string{"*:9000 [*:9000]", "10.10.0.1 [10.10.0.1:80 10.10.0.1:81]", "10.20.0.0/24 [10.20.0.0/24:1]"}},
		{"what is refused is no service", []envoyadmin.Listener{outboundOf(
			serviceAt("bad", 80, "127.0.0.1/32"), serviceAt("ssh", 22), serviceAt("half", 80, "0.0.0.0/0", "10.10.0.1/32"))},
			both, []string{"half [10.10.0.1:80]"}},
		{"Istio's", []envoyadmin.Listener{outboundOf(), istio, many, behind}, both,
			[]string{"*:8080 [*:8080]", "db.shop [10.96.0.11:80]", "web.shop [10.96.0.10:443 [2001:db8::10]:443]"}},
	} {
		want := Desired(Inputs{Config: attribute.Default(), Listeners: tt.listeners})
		var got []string
		for _, s := range only(want.Served, tt.usable).services() {
			got = append(got, fmt.Sprint(s.Name, " ", s.Addresses))
		}
		if d := cmp.Diff(tt.want, got); d != "" {
			t.Errorf("%s (-want +got)\n%s", tt.name, d)
		}
	}
}

// texts are events in words, with their fields.
func texts(events []report.Event) (all []string) {
	for _, e := range events {
		text := string(e.Severity) + " " + e.Message
		for _, f := range e.Fields {
			text += fmt.Sprintf(" %s=%q", f.Key, f.Value)
		}
		all = append(all, text)
	}
	return all
}

// TestServiceNews: what is said at which change, and when it is said.
func TestServiceNews(t *testing.T) {
	web, db, moved := serviceAt("web", 81, "10.10.0.1/32", "fd10::1/128"), serviceAt("db", 9000, "10.10.0.2/32"),
		serviceAt("web", 81, "10.10.0.9/32")
	var n serviceNews
	for i, step := range []struct {
		name   string
		pass   passed
		change func(*passed)
		want   []string
		in     int
	}{
		{"not known yet", withServices(testStart, 0), func(p *passed) { p.known = false }, nil, 0},
		{"on hold", withServices(testStart, 1, web), func(p *passed) {
			p.outcomes[0].Status.Jumps, p.outcomes[1].Status.Jumps = false, false
		}, nil, 0},
		{"a start", withServices(testStart, 1, web), nil, []string{
			`INFO 1 service is intercepted services="1"`}, 1},
		{"another", withServices(testStart, 2, web, db), func(p *passed) { p.outcomes[0].Status.Equal = false }, nil, 1},
		{"is in", withServices(testStart, 2, web, db), nil, []string{
			`INFO service found: db (10.10.0.2:9000) service="db" address="10.10.0.2:9000"`}, 2},
		{"another want, the same services", withServices(testStart, 3, web, db), nil, nil, 2},
		{"another address", withServices(testStart, 4, moved, db), nil, []string{
			`INFO service changed: web (10.10.0.9:81; was 10.10.0.1:81, [fd10::1]:81) service="web" ` +
				`address="10.10.0.9:81" was="10.10.0.1:81, [fd10::1]:81"`}, 2},
		{"Envoy is down", withServices(testStart, 4, moved, db), func(p *passed) {
			p.outcomes[0].Status.Jumps, p.outcomes[1].Status.Jumps = false, false
		}, nil, 2},
		{"paused", withServices(testStart, 5, db), func(p *passed) { p.paused = true }, nil, 2},
		{"gone", withServices(testStart, 5, db), nil, []string{
			`INFO service gone: web (10.10.0.9:81) service="web" address="10.10.0.9:81"`}, 1},
		{"back", withServices(testStart, 6, web, db), nil, []string{
			`INFO service found: web (10.10.0.1:81, [fd10::1]:81) service="web" address="10.10.0.1:81, [fd10::1]:81"`}, 2},
		{"without IPv6", withServices(testStart, 6, web, db), func(p *passed) {
			p.outcomes[1].Status.Usable = false
		}, []string{
			`INFO service changed: web (10.10.0.1:81; was 10.10.0.1:81, [fd10::1]:81) service="web" ` +
				`address="10.10.0.1:81" was="10.10.0.1:81, [fd10::1]:81"`}, 2},
		{"all gone, without a rule left", withServices(testStart, 7), func(p *passed) {
			p.outcomes[0].Status.Jumps, p.outcomes[1].Status.Jumps = false, false
		}, []string{
			`INFO service gone: db (10.10.0.2:9000) service="db" address="10.10.0.2:9000"`,
			`INFO service gone: web (10.10.0.1:81) service="web" address="10.10.0.1:81"`}, 0},
	} {
		p := step.pass
		p.seen.Now = testStart.Add(time.Duration(i) * time.Minute)
		if step.change != nil {
			step.change(&p)
		}
		if d := cmp.Diff(step.want, texts(n.pass(p))); d != "" || n.count != step.in {
			t.Errorf("%s: %d are in, want %d (-want +got)\n%s", step.name, n.count, step.in, d)
		}
	}
}

// TestServiceNewsOfMany: ten by name and the rest as a count, each in a line that fits.
func TestServiceNewsOfMany(t *testing.T) {
	var before, after []envoyadmin.FilterChain
	for i := range 100 {
		name := strings.Repeat("long-", 30) + fmt.Sprintf("%03d", i)
		var prefixes []string
		for j := range 20 {
			prefixes = append(prefixes, fmt.Sprintf("2001:db8:1234:1234:1234:1234:%x:%x/128", i+1, j+1))
		}
		c := serviceAt(name, 60000, prefixes...)
		if i < 60 {
			before = append(before, c)
		}
		if i >= 33 {
			if i < 45 {
				c.Port = 60001
			}
			after = append(after, c)
		}
	}
	var n serviceNews
	n.pass(withServices(testStart, 1, before...))
	events := n.pass(withServices(testStart, 2, after...))
	var rest []string
	kinds := map[string]int{}
	for _, e := range events {
		if len(e.Message) > 1000 {
			t.Errorf("%d bytes: %s", len(e.Message), e.Message)
		}
		if strings.HasPrefix(e.Message, "and ") {
			rest = append(rest, e.Message)
			continue
		}
		kinds[strings.Join(strings.Fields(e.Message)[:2], " ")]++
		if !strings.Contains(e.Message, "]:60000 and 15 more") && !strings.Contains(e.Message, "]:60001 and 15 more") {
			t.Errorf("%s", e.Message)
		}
	}
	if d := cmp.Diff([]string{"and 30 more services found", "and 2 more services changed",
		"and 23 more services gone"}, rest); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
	if d := cmp.Diff(map[string]int{"service found:": 10, "service changed:": 10, "service gone:": 10}, kinds); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
}

// TestServiceNewsOfAFlap: a control plane that changes its mind each second does not fill the
// channels, what is said adds up to what is there, and calm brings back that each change is said
// at once.
func TestServiceNewsOfAFlap(t *testing.T) {
	var n serviceNews
	serial, now := uint64(1), testStart
	n.pass(withServices(now, serial))
	known := map[string]bool{}
	listen := func(events []report.Event) {
		for _, e := range events {
			for _, f := range e.Fields {
				if f.Key == "service" {
					known[f.Value] = strings.HasPrefix(e.Message, "service found")
				}
			}
		}
	}
	var said []time.Time
	pass := func(chains ...envoyadmin.FilterChain) (events []report.Event) {
		events = n.pass(withServices(now, serial, chains...))
		listen(events)
		for range events {
			said = append(said, now)
		}
		return events
	}
	var last []envoyadmin.FilterChain
	for i := range 3600 {
		now, serial = now.Add(time.Second), serial+1
		last = []envoyadmin.FilterChain{serviceAt(fmt.Sprintf("s%d", i%7), 80, "10.10.0.1/32")}
		if i%3 == 0 {
			last = append(last, serviceAt("web", 80, "10.10.0.2/32"))
		}
		pass(last...)
	}
	minutes := map[time.Duration]int{}
	for _, at := range said {
		minutes[at.Sub(testStart).Truncate(time.Minute)]++
	}
	worst := minutes[0]
	delete(minutes, 0)
	if worst > lineBurst+15 {
		t.Errorf("%d lines in the first minute", worst)
	}
	for at, lines := range minutes {
		if lines > 5 { // how often, a new and an old name, and web
			t.Errorf("%d lines in minute %v", lines, at)
		}
	}
	if len(said) < 60 {
		t.Errorf("%d lines in an hour: nothing is said any more", len(said))
	}
	// Calm.
	for range 2 * 60 {
		now = now.Add(time.Second)
		pass(last...)
	}
	var names []string
	for name, there := range known {
		if there {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	var are []string
	for _, s := range n.in.services() {
		are = append(are, s.Name)
	}
	if !slices.Equal(names, are) {
		t.Errorf("whoever listened knows %v, and there are %v", names, are)
	}
	serial++
	if got := texts(pass(append(last, serviceAt("db", 80, "10.10.0.3/32"))...)); len(got) != 1 ||
		!strings.HasPrefix(got[0], "INFO service found: db") {
		t.Errorf("after a minute of calm: %q", got)
	}
	// One that flaps within the minute is said to be as before.
	n.together, n.saidAt, n.changes = true, now.Add(-time.Hour), 2
	if got := texts(pass(append(last, serviceAt("db", 80, "10.10.0.3/32"))...)); len(got) != 1 ||
		got[0] != `WARNING services have changed 2 times in the last minute, and are as before changes="2"` {
		t.Errorf("%q", got)
	}
}

// TestServicesCostNothing: a pass without news allocates nothing for 10,000 services.
func TestServicesCostNothing(t *testing.T) {
	var chains []envoyadmin.FilterChain
	for i := range 10000 {
		chains = append(chains, serviceAt(fmt.Sprintf("service-%d", i), 80,
			netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 10, byte(i >> 8), byte(i)}), 32).String()))
	}
	p := withServices(testStart, 1, chains...)
	var n serviceNews
	if got := texts(n.pass(p)); len(got) != 1 || !strings.HasPrefix(got[0], "INFO 10000 services") {
		t.Errorf("%q", got)
	}
	if n := testing.AllocsPerRun(100, func() { n.pass(p) }); n != 0 {
		t.Errorf("%v allocations a pass", n)
	}
}

func BenchmarkServices(b *testing.B) {
	var chains []envoyadmin.FilterChain
	for i := range 10000 {
		chains = append(chains, serviceAt(fmt.Sprintf("GLOBAL:global/PROJECT:123456789012/FORWARDING_RULE:service-%d/80/7063672130607539552", i), 80,
			netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 10, byte(i >> 8), byte(i)}), 32).String()))
	}
	listeners := []envoyadmin.Listener{outboundOf(chains...)}
	b.Run("Desired", func(b *testing.B) {
		for b.Loop() {
			Desired(Inputs{Config: attribute.Default(), Listeners: listeners})
		}
	})
	p := withServices(testStart, 1, chains...)
	less := withServices(testStart, 2, chains[1:]...)
	b.Run("a change", func(b *testing.B) {
		var n serviceNews
		n.pass(p)
		for i := 0; b.Loop(); i++ {
			q := []passed{less, p}[i%2]
			q.serial = uint64(i + 10)
			q.seen.Now = testStart.Add(time.Duration(i) * time.Hour)
			n.pass(q)
		}
	})
	b.Run("a pass", func(b *testing.B) {
		var n serviceNews
		n.pass(p)
		for b.Loop() {
			n.pass(p)
		}
	})
}

// TestChangedIsTheDifference: what is left out at both ends changes nothing of what is told.
func TestChangedIsTheDifference(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	r := rand.New(rand.NewPCG(seed, 0))
	list := func() (in intercepted) {
		for i, net := range []string{"10.0.0.%d/32", "fd00::%d/128"} {
			for range r.IntN(5) {
				s := Served{Prefix: netip.MustParsePrefix(fmt.Sprintf(net, r.IntN(3))),
					Port: uint16(r.IntN(2)), Name: []string{"", "a", "b"}[r.IntN(3)]}
				in[i] = append(in[i], s)
			}
		}
		return in
	}
	for range 5_000 {
		were, are := list(), list()
		got, want := changed(were, are), differences(were.services(), are.services())
		if !reflect.DeepEqual(got, want) {
			t.Fatalf("seed %d: %v to %v: %v, want %v", seed, were, are, got, want)
		}
	}
}
