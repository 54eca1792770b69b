package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/envoywatch"
	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/internal/reconcile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/sockdiag"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// TestLook: who would get what REDIRECT sends to a port. On OUTPUT it leads to loopback,
// on PREROUTING to an address of the interface: a foreign owner on any of these counts,
// one on another does not.
func TestLook(t *testing.T) {
	const proxy, foreign = 107, 4711
	at := func(addr string, uid uint32) sockdiag.Listener {
		return sockdiag.Listener{Addr: netip.MustParseAddrPort(addr), UID: uid}
	}
	for _, test := range []struct {
		name       string
		family     iptables.Family
		ports      reconcile.Ports
		interfaces []string
		tcp, udp   []sockdiag.Listener
		want       symptom.Port // of the one port that is not 0
	}{
		{
			name: "nobody", ports: reconcile.Ports{Outbound: 15001},
			want: symptom.Port{Purpose: "outbound interception", Addr: netip.MustParseAddrPort("127.0.0.1:15001")},
		},
		{
			name: "Envoy on every address", ports: reconcile.Ports{Outbound: 15001},
			tcp: []sockdiag.Listener{at("0.0.0.0:15001", proxy)},
			want: symptom.Port{
				Purpose: "outbound interception", Addr: netip.MustParseAddrPort("127.0.0.1:15001"), Listening: true,
				Owner: proxy,
			},
		},
		{
			name: "a foreign owner on loopback", ports: reconcile.Ports{Outbound: 15001},
			tcp: []sockdiag.Listener{at("127.0.0.1:15001", foreign)},
			want: symptom.Port{
				Purpose: "outbound interception", Addr: netip.MustParseAddrPort("127.0.0.1:15001"), Listening: true,
				Owner: foreign, OwnerName: "them",
			},
		},
		{
			name: "one on the interface, where OUTPUT does not lead", ports: reconcile.Ports{
				Outbound: 15001},
			tcp:  []sockdiag.Listener{at("10.0.0.2:15001", foreign)},
			want: symptom.Port{Purpose: "outbound interception", Addr: netip.MustParseAddrPort("127.0.0.1:15001")},
		},
		{
			name: "where containers are led", ports: reconcile.Ports{Outbound: 15001},
			interfaces: []string{"docker0"},
			tcp:        []sockdiag.Listener{at("127.0.0.1:15001", proxy), at("10.0.0.2:15001", foreign)},
			want: symptom.Port{
				Purpose: "outbound interception", Addr: netip.MustParseAddrPort("10.0.0.2:15001"), Listening: true,
				Owner: foreign, OwnerName: "them",
			},
		},
		{
			name: "inbound on loopback alone", ports: reconcile.Ports{Inbound: 15006},
			tcp:  []sockdiag.Listener{at("127.0.0.1:15006", foreign)},
			want: symptom.Port{Purpose: "inbound interception", Addr: netip.MustParseAddrPort("127.0.0.1:15006")},
		},
		{
			name: "inbound on the interface", ports: reconcile.Ports{Inbound: 15006},
			tcp: []sockdiag.Listener{at("10.0.0.2:15006", foreign)},
			want: symptom.Port{
				Purpose: "inbound interception", Addr: netip.MustParseAddrPort("10.0.0.2:15006"), Listening: true,
				Owner: foreign, OwnerName: "them",
			},
		},
		{
			name: "IPv6, not link-local", family: iptables.IPv6, ports: reconcile.Ports{Inbound: 15006},
			tcp: []sockdiag.Listener{at("[fe80::1]:15006", foreign), at("[fd00::2]:15006", proxy)},
			want: symptom.Port{
				Family: iptables.IPv6, Purpose: "inbound interception", Listening: true, Owner: proxy,
				Addr: netip.MustParseAddrPort("[::1]:15006"),
			},
		},
		{
			name: "DNS", ports: reconcile.Ports{DNS: 15053},
			tcp: []sockdiag.Listener{at("127.0.0.1:15053", foreign)},
			udp: []sockdiag.Listener{at("127.0.0.1:15053", proxy)},
			want: symptom.Port{
				Purpose: "DNS", Addr: netip.MustParseAddrPort("127.0.0.1:15053"), Listening: true,
				Owner: proxy,
			},
		},
		{
			name: "DNS, over TCP somebody else's", ports: reconcile.Ports{DNS: 15053, DNSOverTCP: true},
			tcp: []sockdiag.Listener{at("127.0.0.1:15053", foreign)},
			udp: []sockdiag.Listener{at("127.0.0.1:15053", proxy)},
			want: symptom.Port{
				Purpose: "DNS", Addr: netip.MustParseAddrPort("127.0.0.1:15053"), Listening: true,
				Owner: foreign, OwnerName: "them",
			},
		},
		{
			name: "DNS, over TCP nobody's", ports: reconcile.Ports{DNS: 15053, DNSOverTCP: true},
			udp: []sockdiag.Listener{at("127.0.0.1:15053", proxy)},
			want: symptom.Port{
				Purpose: "DNS", Addr: netip.MustParseAddrPort("127.0.0.1:15053"), Listening: true,
				Owner: proxy,
			},
		},
	} {
		v := vm{
			userName: func(uid uint32) string { return map[uint32]string{foreign: "them"}[uid] },
			tcp:      func(uint16) ([]sockdiag.Listener, error) { return test.tcp, nil },
			udp:      func(uint16) ([]sockdiag.Listener, error) { return test.udp, nil },
		}
		if test.family == 0 {
			test.family, test.want.Family = iptables.IPv4, iptables.IPv4
		}
		looks := v.look(test.family, test.ports, Observation{
			User: proxyUser{UID: proxy}, Settings: Settings{Interfaces: test.interfaces},
			Local: []netip.Addr{
				netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2"), netip.MustParseAddr("fe80::1"),
			},
		})
		for _, look := range []symptom.Port{looks.Outbound, looks.Inbound, looks.DNS} {
			if look.Addr.Port() != 0 && look != test.want {
				t.Errorf("%s: %+v, want %+v", test.name, look, test.want)
			}
		}
	}
}

// TestLooksShared: a pass asks once for each port and protocol, and anew where the first family
// took its time.
func TestLooksShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked := 0
		list := func(uint16) ([]sockdiag.Listener, error) {
			asked++
			return []sockdiag.Listener{{Addr: netip.MustParseAddrPort("[::]:15001"), UID: 107}}, nil
		}
		seen := Observation{User: proxyUser{UID: 107}}
		ports := reconcile.Ports{Outbound: 15001, Inbound: 15006, DNS: 15001, DNSOverTCP: true}
		v := vm{tcp: list, udp: list}.sharing()
		for i, want := range []int{3, 3, 6} {
			if i == 2 {
				time.Sleep(lookShared + 1)
			}
			got := v.look(families[i%2], ports, seen)
			if asked != want || !got.Outbound.Listening || !got.DNS.Listening {
				t.Errorf("look %d: asked %d times, want %d: %+v", i, asked, want, got)
			}
		}
	})
}

// TestLookFails: what could not be looked at is no news. For DNS Envoy's word must do where the
// kernel can never tell who has a UDP port, and only there. Of DNS over both protocols, half an
// answer counts where it is that the port is somebody else's, or nobody's.
func TestLookFails(t *testing.T) {
	const proxy, foreign = 107, 4711
	type answer struct {
		uids []uint32
		err  error
	}
	late := answer{err: fmt.Errorf("list: %w", os.ErrDeadlineExceeded)}
	missing := answer{err: fmt.Errorf("list: %w", unix.ENOENT)}
	own, other, nobody := answer{uids: []uint32{proxy}}, answer{uids: []uint32{foreign}}, answer{}
	for _, tt := range []struct {
		name     string
		tcp, udp answer
		both     bool   // DNS over TCP, too
		err      error  // of DNS
		owner    uint32 // 0: nobody listens there
	}{
		{"a kernel without udp_diag", own, missing, false, nil, proxy},
		{"no answer in time", own, late, false, os.ErrDeadlineExceeded, 0},
		{"no answer over UDP, ours over TCP", own, late, true, os.ErrDeadlineExceeded, 0},
		{"no answer over UDP, another's over TCP", other, late, true, nil, foreign},
		{"no answer over TCP", late, own, false, nil, proxy},
		{"ours over UDP, no answer over TCP", late, own, true, os.ErrDeadlineExceeded, 0},
		{"another's over UDP, no answer over TCP", late, other, true, nil, foreign},
		{"nobody's over UDP, no answer over TCP", late, nobody, true, nil, 0},
		{"without udp_diag, another's over TCP", other, missing, true, nil, foreign},
		{"without udp_diag, no answer over TCP", late, missing, true, os.ErrDeadlineExceeded, 0},
		{"nothing is known of sock_diag", missing, missing, true, unix.ENOENT, 0},
	} {
		list := func(a answer) func(port uint16) ([]sockdiag.Listener, error) {
			return func(port uint16) (all []sockdiag.Listener, err error) {
				for _, uid := range a.uids {
					addr := netip.AddrPortFrom(netip.IPv6Unspecified(), port)
					all = append(all, sockdiag.Listener{Addr: addr, UID: uid})
				}
				return all, a.err
			}
		}
		v := vm{tcp: list(tt.tcp), udp: list(tt.udp), userName: func(uint32) string { return "" }}
		ports := reconcile.Ports{Outbound: 15001, Inbound: 15006, DNS: 15053, DNSOverTCP: tt.both}
		looks := v.look(iptables.IPv4, ports, Observation{User: proxyUser{UID: proxy}})
		if looks.Outbound.Err != tt.tcp.err || looks.Inbound.Err != tt.tcp.err {
			t.Errorf("%s: %+v", tt.name, looks)
		}
		if d := looks.DNS; !errors.Is(d.Err, tt.err) || d.Owner != tt.owner ||
			d.Listening != (tt.owner != 0) || d.Addr.Port() != 15053 {
			t.Errorf("%s: DNS: %+v", tt.name, d)
		}
	}
}

// TestFacts: what a pass saw, and what came of it, is all there.
func TestFacts(t *testing.T) {
	seen := Observation{
		Settings:  Settings{EnvoyAdmin: "127.0.0.1:15000", EnvoyLog: "/e.log", ProxyUser: "envoy"},
		User:      proxyUser{UID: 107, Err: errors.New("user")},
		Attribute: attributeInForce{Err: errors.New("attribute"), Source: errors.New("server")},
		Bootstrap: progress.State{Status: progress.Failed, Failure: "no space", Time: testStart},
		Self: Self{Account: &metadata.Account{Email: "a@b", Scopes: []string{"s"}},
			VM: symptom.VM{Name: "web-1"}, Clock: time.Minute, Killed: testStart},
		Others:    []iptables.OtherChain{{}},
		GuestOff:  true,
		ListenErr: errors.New("listen"), MetricsErr: errors.New("metrics"),
		Now: testStart,
	}
	seen.Attribute.Config.Warnings = []string{"advice"}
	seen.Envoy.Err = &sockdiag.ForeignError{
		UID: 4711, Addr: netip.MustParseAddrPort("127.0.0.1:15000")}
	outcome := reconcile.Outcome{
		Ports: []symptom.Port{{Purpose: "outbound interception"}}, Facts: symptom.Family{Family: iptables.IPv6},
	}
	want := Want{Refused: []symptom.Refusal{{}}, Uncovered: []uint16{80}, ServerFirst: []uint16{25}}
	f := seen.Facts(want, []reconcile.Outcome{outcome})
	if f.Account != "a@b" || len(f.Scopes) != 1 || !f.GuestOff || f.ListenErr != seen.ListenErr ||
		f.MetricsErr != seen.MetricsErr ||
		f.Attribute != seen.Attribute.Err || f.Metadata != seen.Attribute.Source || !f.NoAttribute ||
		len(f.Advice) != 1 || f.UserErr != seen.User.Err || f.ProxyUID != 107 || f.ProxyUser != "envoy" ||
		f.EnvoyLog != "/e.log" {
		t.Errorf("%+v", f)
	}
	if f.VM.Name != "web-1" || f.Clock != time.Minute || f.Agent.Killed != testStart {
		t.Errorf("%+v", f)
	}
	if len(f.Others) != 1 || len(f.Refused) != 1 || len(f.Uncovered) != 1 || len(f.ServerFirst) != 1 ||
		len(f.Families) != 1 || f.Families[0].Family != iptables.IPv6 || f.Bootstrap == "" {
		t.Errorf("%+v", f)
	}
	if len(f.Ports) != 2 || f.Ports[0].Purpose != outboundPort || f.Ports[1].Purpose != "admin" ||
		f.Ports[1].Owner != 4711 || !f.Ports[1].Listening {
		t.Errorf("ports: %+v", f.Ports)
	}
	seen.Bootstrap.Status, seen.Account = progress.Finished, nil
	if f := seen.Facts(Want{}, nil); f.Bootstrap != "" || f.Account != "" || f.Scopes != nil {
		t.Errorf("%+v", f)
	}
}

// TestNoTools: iptables is missing where neither family has it.
func TestNoTools(t *testing.T) {
	none := fmt.Errorf("find: %w", iptables.ErrNoIPTables)
	for name, tt := range map[string]struct {
		v4, v6 error
		want   bool
	}{
		"both are there":             {nil, nil, false},
		"neither":                    {none, none, true},
		"ip6tables alone is missing": {nil, none, false},
		"one for another reason":     {none, iptables.ErrNoTable, false},
	} {
		outcomes := []reconcile.Outcome{{Facts: symptom.Family{Unusable: tt.v4}},
			{Facts: symptom.Family{Unusable: tt.v6}}}
		f := Observation{Now: testStart}.Facts(Want{}, outcomes)
		if errors.Is(f.NoTools, iptables.ErrNoIPTables) != tt.want || !tt.want && f.NoTools != nil {
			t.Errorf("%s: %v", name, f.NoTools)
		}
	}
	if f := (Observation{Now: testStart}).Facts(Want{}, nil); f.NoTools != nil {
		t.Errorf("no family: %v", f.NoTools)
	}
}

// TestOtherEnvoys: who holds a port of Envoy's is an Envoy only where one answers on the admin port
// for the same user.
func TestOtherEnvoys(t *testing.T) {
	const proxy, bob, eve = 107, 1000, 1001
	foreign := &sockdiag.ForeignError{UID: bob}
	at := func(owner uint32) []reconcile.Outcome {
		return []reconcile.Outcome{{Ports: []symptom.Port{
			{Purpose: outboundPort, Listening: true, Owner: owner}, {Purpose: inboundPort}}}}
	}
	answers := func(v *envoywatch.View, self *Self) { v.State, self.AdminOfRoot = "LIVE", true }
	for _, tt := range []struct {
		name   string
		owner  uint32
		change func(*envoywatch.View, *Self)
		want   []uint32
	}{
		{"the proxy's", proxy, func(v *envoywatch.View, _ *Self) { v.State = "LIVE" }, nil},
		{"another's, and the proxy's Envoy runs", bob,
			func(v *envoywatch.View, _ *Self) { v.State = "LIVE" }, nil},
		{"another's all of it, and it is no Envoy", bob,
			func(v *envoywatch.View, _ *Self) { v.Err = foreign }, nil},
		{"another's Envoy", bob,
			func(v *envoywatch.View, _ *Self) { v.Err, v.ForeignEnvoy = foreign, true }, []uint32{bob}},
		{"another's Envoy, and a third's port", eve,
			func(v *envoywatch.View, _ *Self) { v.Err, v.ForeignEnvoy = foreign, true }, []uint32{bob}},
		{"root's Envoy", 0, answers, []uint32{0}},
		{"root holds the admin port for the proxy's", proxy, answers, nil},
		{"root's, and it does not answer", 0, func(v *envoywatch.View, self *Self) {
			answers(v, self)
			v.Err = envoyadmin.ErrRefused
		}, nil},
	} {
		seen := Observation{User: proxyUser{UID: proxy}, Now: testStart}
		tt.change(&seen.Envoy, &seen.Self)
		if f := seen.Facts(Want{}, at(tt.owner)); !slices.Equal(f.Processes, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, f.Processes, tt.want)
		}
	}
}

// TestObserve: the proxy's user is looked up until it is there, and addresses that cannot be
// read are those of before.
func TestObserve(t *testing.T) {
	there := false
	v := thisVM(t.TempDir())
	v.userIDs = func(string) (uint32, uint32, error) {
		if !there {
			return 0, 0, errors.New("not there")
		}
		return 107, 108, nil
	}
	local := []netip.Addr{netip.MustParseAddr("10.0.0.2")}
	v.addrs = func() ([]netip.Addr, error) { return local, nil }
	l := &loop{vm: v, settings: Settings{ProxyUser: "envoy"}}
	l.user = proxyIDs("envoy", v.userIDs)
	if seen := l.observe(testStart); seen.User.Err == nil || len(seen.Local) != 1 {
		t.Errorf("%+v", seen)
	}
	there = true
	l.vm.addrs = func() ([]netip.Addr, error) { return nil, errors.New("no netlink") }
	seen := l.observe(testStart.Add(time.Second))
	if seen.User != (proxyUser{UID: 107, GID: 108}) || len(seen.Local) != 1 {
		t.Errorf("%+v", seen)
	}
	there = false // it is not looked up again
	if seen := l.observe(testStart.Add(2 * time.Second)); seen.User.Err != nil {
		t.Errorf("%+v", seen)
	}
	l.attribute.Config = attribute.Config{InterceptDNS: true}
	l.settings.ResolverUsers = []string{"nobody-there"}
	if seen := l.observe(testStart); len(seen.Resolvers.Missing) != 1 {
		t.Errorf("resolvers: %+v", seen.Resolvers)
	}
}

// TestWantedWithoutAddresses: what is never intercepted is not known before the VM's addresses were
// read once, be it that there are none.
func TestWantedWithoutAddresses(t *testing.T) {
	var addrs []netip.Addr
	broken := errors.New("too many open files")
	v := thisVM(t.TempDir())
	v.userIDs = func(string) (uint32, uint32, error) { return 107, 108, nil }
	v.addrs = func() ([]netip.Addr, error) { return addrs, broken }
	l := &loop{vm: v, attribute: attributeInForce{Known: true, Config: attribute.Default()}}
	l.envoy = envoywatch.View{Generation: 1, Snapshot: envoyadmin.Snapshot{Listeners: oneService()}}
	at := func(addr string) func() {
		return func() { addrs, broken = []netip.Addr{netip.MustParseAddr(addr)}, nil }
	}
	for _, step := range []struct {
		name     string
		do       func()
		known    bool
		services int
	}{
		{"they cannot be read", func() {}, false, 0},
		{"there are none", func() { broken = nil }, true, 1},
		{"the service's is the VM's", at("10.0.0.1"), true, 0},
		{"they cannot be read again", func() { broken = errors.New("too many open files") }, true, 0},
		{"they can", at("10.0.0.2"), true, 1},
	} {
		step.do()
		want, known := l.wanted.desired(l.settings, l.observe(testStart))
		if known != step.known || len(want.Families[0].Services) != step.services {
			t.Errorf("%s: known %v, %d services, want %v, %d", step.name, known,
				len(want.Families[0].Services), step.known, step.services)
		}
	}
}

// TestLocal: the VM's addresses are asked for when they may have moved, and until they were told.
func TestLocal(t *testing.T) {
	none, moved, asked := errors.New("none"), false, 0
	at, err := []netip.Addr{netip.MustParseAddr("10.0.0.2")}, none
	l := local{moved: func() bool { was := moved; moved = false; return was }}
	look := func() []netip.Addr {
		return l.look(func() ([]netip.Addr, error) { asked++; return at, err })
	}
	for i, step := range []struct {
		moved bool
		addr  string
		err   error
		asked int
		is    string
	}{
		{false, "10.0.0.2", none, 1, ""},
		{false, "10.0.0.2", nil, 2, "10.0.0.2"},
		{false, "10.0.0.3", nil, 2, "10.0.0.2"},
		{true, "10.0.0.3", none, 3, "10.0.0.2"},
		{false, "10.0.0.3", nil, 4, "10.0.0.3"},
		{false, "10.0.0.3", nil, 4, "10.0.0.3"},
	} {
		moved, at, err = step.moved, []netip.Addr{netip.MustParseAddr(step.addr)}, step.err
		is := ""
		if got := look(); len(got) > 0 {
			is = got[0].String()
		}
		if is != step.is || asked != step.asked {
			t.Errorf("step %d: %q, asked %d times", i, is, asked)
		}
	}
	if l.moved = nil; len(look()) != 1 || asked != 5 {
		t.Error("where nobody tells of changes it is asked each time")
	}
}

// TestWhyComes: what tells no cause waits for what is about to, and no longer.
func TestWhyComes(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	ended := func(ago time.Duration) *symptom.Stream { return &symptom.Stream{When: now.Add(-ago)} }
	apart := func(since time.Time) (v envoywatch.View) {
		v.Apart, v.Seen = true, since
		return v
	}
	tried := func(v envoywatch.View, err error) envoywatch.View {
		v.Probed, v.Probe = true, err
		return v
	}
	for _, tt := range []struct {
		name string
		v    envoywatch.View
		want bool
	}{
		{"all is well", envoywatch.View{}, false},
		{"just ended, our own way is not tried yet", envoywatch.View{Stream: ended(time.Second)}, true},
		{"ended, and our own way takes too long", envoywatch.View{Stream: ended(6 * time.Second)}, false},
		{"ended, our own way works", tried(envoywatch.View{Stream: ended(time.Second)}, nil), false},
		{"no stream, the log may still tell", tried(apart(now.Add(-44*time.Second)), nil), true},
		{"no stream, and the log had its time", tried(apart(now.Add(-46*time.Second)), nil), false},
		{"no stream, and our own way says why",
			tried(apart(now.Add(-time.Second)), errors.New("refused")), false},
		{"no stream in a look of a moment", apart(time.Time{}), false},
		{"the clock was set back by an hour", apart(now.Add(time.Hour)), false},
	} {
		if have := whyComes(tt.v, now); have != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, have, tt.want)
		}
	}
}
