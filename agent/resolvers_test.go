package agent

import (
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/service-proxy-agent/service-proxy-agent/internal/sockdiag"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// TestResolverUsers: by name or uid, root too; who is not there is said once, if somebody named it.
func TestResolverUsers(t *testing.T) {
	core, logs := observer.New(zap.InfoLevel)
	a := &Agent{log: zap.New(core)}
	a.settings.ResolverUsers = []string{"systemd-resolve", "4711", "root", "no-such-resolver", "dnsmasq", "unbound"}
	for range 2 {
		if uids := a.resolverUIDs(); !slices.Contains(uids, 4711) || !slices.Contains(uids, 0) {
			t.Errorf("%v, want 4711 and 0 among them", uids)
		}
	}
	if logs.Len() != 1 {
		t.Errorf("logged %v, want the one name that is not there, once", logs.All())
	}
}

// TestLookAtResolvers: only while DNS is intercepted, and users that come later change the rules.
func TestLookAtResolvers(t *testing.T) {
	a := &Agent{log: zap.NewNop()}
	a.settings.ResolverUsers = []string{"4711"}
	var f symptom.Facts
	a.lookAtResolvers(&f, Want{})
	if f.ResolverUIDs != nil || a.wantStale {
		t.Errorf("without intercept-dns: %+v, stale %v", f, a.wantStale)
	}
	for i := range 2 {
		var want Want
		want.Families[i] = iptables.Interception{DNSPort: 15053, ResolverUIDs: []uint32{4711}}
		if a.lookAtResolvers(&f, want); !slices.Equal(f.ResolverUIDs, []uint32{4711}) || a.wantStale {
			t.Errorf("family %d: %v, stale %v", i, f.ResolverUIDs, a.wantStale)
		}
	}
	want := Want{Families: [2]iptables.Interception{{DNSPort: 15053}}}
	if a.lookAtResolvers(&f, want); !a.wantStale {
		t.Error("a user that came after the rules does not change them")
	}
}

// TestResolvers: lowest address first, so that a finding does not change with the kernel's order.
func TestResolvers(t *testing.T) {
	at := func(addr string, uid uint32) sockdiag.Listener {
		return sockdiag.Listener{Addr: netip.MustParseAddrPort(addr), UID: uid}
	}
	have := resolvers([]sockdiag.Listener{at("127.0.0.53:53", 4711), at("127.0.0.1:53", 0), at("127.0.0.53:53", 4710)}, nil)
	if len(have) != 3 || have[0].OwnerName != "root" || have[0].Addr.String() != "127.0.0.1:53" || have[1].Owner != 4710 || have[2].Owner != 4711 {
		t.Errorf("%+v", have)
	}
}

// TestStrangerOnDNSOverTCP: while Envoy is down somebody else may take the TCP side of its DNS port alone.
func TestStrangerOnDNSOverTCP(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := uint16(l.Addr().(*net.TCPAddr).Port)
	for _, overTCP := range []bool{false, true} {
		a := &Agent{uid: uint32(os.Getuid()) + 1, families: []familyState{{family: iptables.IPv4, dns: gate{open: true}}}}
		a.settings.WhenEnvoyDown = Keep
		var f symptom.Facts
		a.passGates(time.Unix(1e9, 0), &f, Want{Families: [2]iptables.Interception{{DNSPort: port, DNSOverTCP: overTCP}}}, true)
		if a.families[0].dns.denied != overTCP {
			t.Errorf("over TCP %v: the gate is %+v", overTCP, a.families[0].dns)
		}
	}
}
