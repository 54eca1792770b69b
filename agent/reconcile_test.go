package agent

import (
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
		Family: iptables.IPv4, ProxyUID: 107, ProxyGID: 107, OutboundPort: 15001, Services: prefixes("10.1.0.1/32"), DNSPort: 15053,
		InboundPort: 15006, Serving: []iptables.Serving{{Port: 80}},
	}
	const (
		outbound = "-A OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT"
		inbound  = "-A PREROUTING -p tcp -j SERVICE_PROXY_INBOUND"
		dns      = "-A OUTPUT -p udp -m udp --dport 53 -j SERVICE_PROXY_DNS"
		settling = "--comment settling"
	)
	s := familyState{family: iptables.IPv4, settling: now.Add(settle)}
	for _, step := range []struct {
		name   string
		change func()
		same   bool
		in     []string
		out    []string
	}{
		{"hold", func() {}, false, nil, []string{outbound, inbound, dns}},
		{"nothing new", func() {}, true, nil, []string{outbound}},
		{"Envoy accepts outbound", func() { s.outbound = gate{open: true} }, false, []string{outbound, settling}, []string{inbound, dns}},
		{"and inbound", func() { s.inbound = gate{open: true} }, false, []string{outbound, inbound, settling}, []string{dns}},
		{"and DNS", func() { s.dns = gate{open: true} }, false, []string{outbound, inbound, dns, settling}, nil},
		{"just before older connections are taken over", func() { now = now.Add(settle - time.Second) }, true, []string{settling}, nil},
		{"older connections are taken over", func() { now = now.Add(time.Second) }, false, []string{outbound, inbound, dns}, []string{settling}},
		{"a stranger on the DNS port", func() { s.dns = gate{denied: true} }, false, []string{outbound, inbound}, []string{dns}},
		{"a planned stop", func() { s.outbound, s.inbound = gate{denied: true}, gate{denied: true} }, false, nil, []string{outbound, inbound, dns}},
	} {
		step.change()
		changed := s.compile(want, 1, now)
		if changed == step.same {
			t.Errorf("%s: changed is %v", step.name, changed)
		}
		text := s.want.String()
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

// fakeIPTables is a Kernel whose programs are scripts on the legacy backend, which is read by saves alone: a restore makes
// the table what next was given. So a family goes through its passes without root and at any time of day.
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
		put(name, "#!/bin/sh\n[ \"$1\" != --version ] || echo \"iptables v1.8.9 (legacy)\"\n", 0o700)
		put(name+"-save", "#!/bin/sh\ncat "+dir+"/table\n", 0o700)
		put(name+"-restore", "#!/bin/sh\ncat >"+dir+"/payload && cp "+dir+"/next "+dir+"/table\n", 0o700)
	}
	k, err := iptables.Open(t.Context(), iptables.Options{Backend: iptables.Legacy, Path: dir})
	if err != nil {
		t.Fatal(err)
	}
	return k, next
}

// TestSettlingAgain: when all services go, the last NAT rule goes, and with it connection tracking: when they come back it is
// a first install again, whose older connections are let through for the whole time.
func TestSettlingAgain(t *testing.T) {
	want := iptables.Interception{Family: iptables.IPv4, ProxyUID: 107, ProxyGID: 107, OutboundPort: 15001, ServicePorts: []uint16{80}}
	rules := func(settling bool) iptables.Ruleset {
		w := want
		w.Jumps, w.Settling = true, settling
		return w.Ruleset()
	}
	none := iptables.Interception{Family: iptables.IPv4}
	k, next := fakeIPTables(t)
	a := &Agent{kernel: k, log: zap.NewNop(), marked: true}
	s := &familyState{family: iptables.IPv4, outbound: gate{open: true}}
	now := time.Unix(1e9, 0)
	a.reconcile(t.Context(), now, s, none, true) // the first pass looks at what is there
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
		{"they go before older connections are taken over", settle - 10*time.Second, none, none.Ruleset()},
		{"and come back", time.Second, want, rules(true)},
		{"past the first time, and within theirs", settle - time.Second, want, rules(true)},
		{"past theirs", time.Second, want, rules(false)},
	} {
		now = now.Add(step.after)
		if a.wantSerial == 0 || a.want.Families[0].OutboundPort != step.want.OutboundPort {
			a.want.Families[0], a.wantSerial = step.want, a.wantSerial+1
		}
		next(step.have)
		a.reconcile(t.Context(), now, s, step.want, true)
		if s.err != nil || s.target.String() != step.have.String() || !s.equal {
			t.Errorf("%s: %v, equal %v; wanted\n%s\nwant\n%s", step.name, s.err, s.equal, s.target, step.have)
		}
	}
}

// TestUsable: a family that could not be used is tried each minute, and what is known of it stands while a lock is held.
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
		{"no table, then a lock, then all is well", noTable, []string{locked, works, noTable}, []bool{false, false, true, true}},
	} {
		put("ip6tables-legacy", test.start)
		k, err := iptables.Open(t.Context(), iptables.Options{Backend: iptables.Legacy, Path: dir})
		if err != nil {
			t.Fatal(err)
		}
		a := &Agent{kernel: k, log: zap.NewNop()}
		s := &familyState{family: iptables.IPv6}
		now := time.Unix(1e9, 0)
		for i, want := range test.want {
			if i > 0 {
				if a.usable(t.Context(), now.Add(retryUnusable), s) != test.want[i-1] {
					t.Errorf("%s: tried again within a minute", test.name)
				}
				put("ip6tables-legacy", test.steps[i-1])
				now = now.Add(retryUnusable + time.Second)
			}
			if have := a.usable(t.Context(), now, s); have != want || (s.unusable == nil) != want {
				t.Errorf("%s: step %d: usable is %v: %v", test.name, i, have, s.unusable)
			}
		}
		if len(test.want) == 4 && s.unusable != nil {
			t.Errorf("%s: a family that works is not probed again: %v", test.name, s.unusable)
		}
	}
}
