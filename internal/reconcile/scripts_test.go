package reconcile

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// TestCompile: the ruleset changes with the gates and with time alone, and not otherwise.
func TestCompile(t *testing.T) {
	now := time.Unix(1e9, 0)
	want := iptables.Interception{
		Family: iptables.IPv4, ProxyUID: 107, ProxyGID: 107, OutboundPort: 15001,
		Services: prefixes("10.1.0.1/32"), DNSPort: 15053,
		InboundPort: 15006, Serving: []iptables.Serving{{Port: 80}},
	}
	const (
		outbound = "-A OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT"
		inbound  = "-A PREROUTING -p tcp -j SERVICE_PROXY_INBOUND"
		dns      = "-A OUTPUT -p udp -m udp --dport 53 -j SERVICE_PROXY_DNS"
		settling = "--comment settling"
	)
	g := goal{settling: now.Add(settle)}
	var gates gates
	for _, step := range []struct {
		name   string
		change func()
		same   bool
		in     []string
		out    []string
	}{
		{"hold", func() {}, false, nil, []string{outbound, inbound, dns}},
		{"nothing new", func() {}, true, nil, []string{outbound}},
		{"Envoy accepts outbound", func() { gates.outbound = gate{open: true} }, false,
			[]string{outbound, settling}, []string{inbound, dns}},
		{"and inbound", func() { gates.inbound = gate{open: true} }, false,
			[]string{outbound, inbound, settling}, []string{dns}},
		{"and DNS", func() { gates.dns = gate{open: true} }, false,
			[]string{outbound, inbound, dns, settling}, nil},
		{"just before older connections are taken over",
			func() { now = now.Add(settle - time.Second) }, true, []string{settling}, nil},
		{"older connections are taken over", func() { now = now.Add(time.Second) }, false,
			[]string{outbound, inbound, dns}, []string{settling}},
		{"a foreign owner of the DNS port", func() { gates.dns = gate{denied: true} }, false,
			[]string{outbound, inbound}, []string{dns}},
		{"a planned stop", func() {
			gates.outbound, gates.inbound = gate{denied: true},
				gate{denied: true}
		}, false, nil, []string{outbound, inbound, dns}},
	} {
		step.change()
		changed := g.compile(want, 1, &gates, now)
		if changed == step.same {
			t.Errorf("%s: changed is %v", step.name, changed)
		}
		text := g.want.String()
		for _, line := range step.in {
			if !strings.Contains(text, line) {
				t.Errorf("%s: no %q in\n%s", step.name, line, text)
			}
		}
		for _, line := range step.out {
			if strings.Contains(text, line) {
				t.Errorf("%s: %q in\n%s", step.name, line, text)
			}
		}
	}
}

// noHalfOpen finds no half-open connection.
func noHalfOpen(context.Context, []netip.Prefix) (int, error) { return 0, nil }

func prefixes(texts ...string) (p []netip.Prefix) {
	for _, t := range texts {
		p = append(p, netip.MustParsePrefix(t))
	}
	return p
}

// fakeIPTables is a Kernel whose programs are scripts on the legacy backend, which is read by
// saves alone: a restore makes the table what next was given. So a family goes through its passes
// without root and at any time of day.
func fakeIPTables(t *testing.T) (k *iptables.Kernel, next func(iptables.Ruleset)) {
	t.Helper()
	dir := t.TempDir()
	put := func(name, text string, mode os.FileMode) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), mode); err != nil {
			t.Fatal(err)
		}
	}
	next = func(r iptables.Ruleset) { put("next", r.String(), 0o600) }
	next(iptables.Ruleset{})
	put("table", "", 0o600)
	for _, name := range []string{"iptables-legacy", "ip6tables-legacy"} {
		put(name, "#!/bin/sh\n[ \"$1\" != --version ] || echo \"iptables v1.8.9 (legacy)\"\n",
			0o700)
		put(name+"-save", "#!/bin/sh\ncat "+dir+"/table\n", 0o700)
		put(name+"-restore", "#!/bin/sh\ncat >"+dir+"/payload && cp "+dir+"/next "+dir+"/table\n",
			0o700)
	}
	k, err := iptables.Open(t.Context(), iptables.Options{Backend: iptables.Legacy, Path: dir})
	if err != nil {
		t.Fatal(err)
	}
	return k, next
}

// TestSettlingAgain: when all services go, the last NAT rule goes, and with it connection
// tracking: when they come back it is a first install again, whose older connections are let
// through for the whole time.
func TestSettlingAgain(t *testing.T) {
	want := iptables.Interception{Family: iptables.IPv4, ProxyUID: 107, ProxyGID: 107,
		OutboundPort: 15001, ServicePorts: []uint16{80}}
	rules := func(settling bool) iptables.Ruleset {
		w := want
		w.Jumps, w.Settling = true, settling
		return w.Ruleset()
	}
	none := iptables.Interception{Family: iptables.IPv4}
	k, next := fakeIPTables(t)
	f := New(iptables.IPv4, k, Flows{HalfOpen: noHalfOpen}, zap.NewNop())
	f.gates.outbound = gate{open: true}
	order := Order{Want: none, Known: true, UserKnown: true, Marked: true}
	now := time.Unix(1e9, 0)
	f.Pass(t.Context(), now, order) // the first pass looks at what is there
	for _, step := range []struct {
		name  string
		after time.Duration
		want  iptables.Interception
		have  iptables.Ruleset
	}{
		{"a first install", 0, want, rules(true)},
		{"older connections are taken over", settle, want, rules(false)},
		{"all services go", time.Second, none, none.Ruleset()},
		{"they come back at once", time.Second, want, rules(true)},
		{"they go before older connections are taken over", settle - 10*time.Second, none,
			none.Ruleset()},
		{"and come back", time.Second, want, rules(true)},
		{"past the first time, and within theirs", settle - time.Second, want, rules(true)},
		{"past theirs", time.Second, want, rules(false)},
	} {
		now = now.Add(step.after)
		if order.Serial == 0 || order.Want.OutboundPort != step.want.OutboundPort {
			order.Want, order.Serial = step.want, order.Serial+1
		}
		next(step.have)
		out := f.Pass(t.Context(), now, order)
		if out.Facts.Err != nil || f.goal.target.String() != step.have.String() ||
			!out.Status.Equal {
			t.Errorf("%s: %v, equal %v; wanted\n%s\nwant\n%s", step.name, out.Facts.Err,
				out.Status.Equal, f.goal.target, step.have)
		}
	}
}

// TestUsable: a family that could not be used is tried each minute, and what is known of it
// stands while a lock is held.
func TestUsable(t *testing.T) {
	dir := t.TempDir()
	put := func(name, script string) {
		t.Helper()
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file+".new", []byte("#!/bin/sh\n"+script+"\n"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file+".new", file); err != nil {
			t.Fatal(err)
		}
	}
	const (
		works   = "[ \"$1\" != --version ] || echo 'iptables v1.8.9 (legacy)'"
		fails   = "[ \"$1\" = --version ] && { echo 'iptables v1.8.9 (legacy)'; exit; }; echo "
		locked  = fails + "'Another app is currently holding the xtables lock.' >&2; exit 4"
		noTable = fails + "'Table does not exist (do you need to insmod?)' >&2; exit 3"
	)
	for _, name := range []string{"iptables-legacy", "ip6tables-legacy"} {
		put(name, works)
		put(name+"-save", "")
		put(name+"-restore", "")
	}
	for _, test := range []struct {
		name  string
		start string
		steps []string // what it is a minute later, and so on
		want  []bool
	}{
		{"a lock held at the start", locked, []string{works}, []bool{true, true}},
		{"no table, then a lock, then all is well", noTable, []string{locked, works, noTable},
			[]bool{false, false, true, true}},
	} {
		put("ip6tables-legacy", test.start)
		k, err := iptables.Open(t.Context(), iptables.Options{Backend: iptables.Legacy, Path: dir})
		if err != nil {
			t.Fatal(err)
		}
		f := New(iptables.IPv6, k, Flows{}, zap.NewNop())
		now := time.Unix(1e9, 0)
		for i, want := range test.want {
			if i > 0 {
				if f.usable(t.Context(), now.Add(retryUnusable)) != test.want[i-1] {
					t.Errorf("%s: tried again within a minute", test.name)
				}
				put("ip6tables-legacy", test.steps[i-1])
				now = now.Add(retryUnusable + time.Second)
			}
			if have := f.usable(t.Context(), now); have != want ||
				(f.usability.why == nil) != want {
				t.Errorf("%s: step %d: usable is %v: %v", test.name, i, have, f.usability.why)
			}
		}
		if len(test.want) == 4 && f.usability.why != nil {
			t.Errorf("%s: a family that works is not probed again: %v", test.name, f.usability.why)
		}
	}
}
