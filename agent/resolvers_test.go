package agent

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/user"
	"slices"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/reconcile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/sockdiag"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// TestResolverUsers: by name or uid, root too; who is not there is told once, if somebody named it.
func TestResolverUsers(t *testing.T) {
	core, logs := observer.New(zap.InfoLevel)
	told := told{log: zap.New(core)}
	users := []string{"systemd-resolve", "4711", "root", "no-such-resolver", "dnsmasq", "unbound"}
	for range 2 {
		r := thisVM("").resolvers(users)
		if !slices.Contains(r.UIDs, 4711) || !slices.Contains(r.UIDs, 0) {
			t.Errorf("%v, want 4711 and 0 among them", r.UIDs)
		}
		told.tellResolvers(r.Missing)
	}
	if logs.Len() != 1 {
		t.Errorf("logged %v, want the one name that is not there, once", logs.All())
	}
}

// TestResolvers: who takes DNS questions is a fact only while they are led to Envoy, lowest
// address first, so that a finding does not change with the kernel's order; users that come
// later change the rules.
func TestResolvers(t *testing.T) {
	at := func(addr string, uid uint32) sockdiag.Listener {
		return sockdiag.Listener{Addr: netip.MustParseAddrPort(addr), UID: uid}
	}
	uids := map[string]uint32{"a": 4711}
	l := &loop{vm: thisVM(t.TempDir()), settings: Settings{ResolverUsers: []string{"a", "b"}}}
	var broken error
	l.vm.userIDs = remembering(func(name string) (uint32, uint32, error) {
		uid, ok := uids[name]
		switch {
		case broken != nil:
			return 0, 0, broken
		case !ok:
			return 0, 0, fmt.Errorf("look up: %w", user.UnknownUserError(name))
		}
		return uid, uid, nil
	})
	l.vm.udp = func(uint16) ([]sockdiag.Listener, error) {
		return []sockdiag.Listener{at("127.0.0.53:53", 4711), at("127.0.0.1:53", 0),
			at("127.0.0.53:53", 4710)}, nil
	}
	now := time.Unix(1e9, 0)
	if seen := l.observe(now); seen.Resolvers.UIDs != nil || seen.Resolvers.Sockets != nil {
		t.Errorf("without intercept-dns: %+v", seen.Resolvers)
	}
	l.attribute = attributeInForce{Known: true, Config: attribute.Config{InterceptDNS: true}}
	l.envoy.Generation = 1
	seen := l.observe(now)
	if f := seen.Facts(Want{}, nil); f.Resolvers != nil || f.ResolverUIDs != nil {
		t.Errorf("without a DNS listener: %+v", f)
	}
	for i := range 2 {
		var want Want
		want.Families[i] = iptables.Interception{DNSPort: 15053}
		f := seen.Facts(want, nil)
		if have := f.Resolvers; len(have) != 3 || have[0].OwnerName != "root" ||
			have[0].Addr.String() != "127.0.0.1:53" || have[1].Owner != 4710 || have[2].Owner != 4711 {
			t.Errorf("family %d: %+v", i, have)
		}
		if !slices.Equal(f.ResolverUIDs, []uint32{4711}) {
			t.Errorf("family %d: %v", i, f.ResolverUIDs)
		}
	}
	for _, step := range []struct {
		name   string
		do     func()
		serial uint64
	}{
		{"first", func() {}, 1}, {"nothing new", func() {}, 1},
		{"a user came", func() { uids["b"] = 4712 }, 2}, {"nothing new", func() {}, 2},
		{"users cannot be looked up", func() { broken = syscall.EMFILE }, 2},
		{"they can", func() { broken = nil }, 2},
		{"a user went", func() { delete(uids, "b") }, 3},
		{"they cannot be looked up then", func() { broken = syscall.EIO }, 3},
	} {
		step.do()
		if l.wanted.desired(l.settings, l.observe(now)); l.wanted.serial != step.serial {
			t.Errorf("%s: want %d is made, want %d", step.name, l.wanted.serial, step.serial)
		}
	}
	l.vm.udp = func(uint16) ([]sockdiag.Listener, error) { return nil, errors.New("no udp_diag") }
	if r := l.vm.resolvers([]string{"a"}); r.Sockets != nil || !slices.Equal(r.UIDs, []uint32{4711}) {
		t.Errorf("a kernel that cannot be asked: %+v", r)
	}
}

// TestForeignOwnerOnDNSOverTCP: while Envoy is down somebody else may take the TCP side
// of its DNS port alone.
func TestForeignOwnerOnDNSOverTCP(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port, proxy := uint16(l.Addr().(*net.TCPAddr).Port), uint32(os.Getuid())+1
	for _, overTCP := range []bool{false, true} {
		ports := reconcile.Ports{DNS: port, DNSOverTCP: overTCP}
		dns := thisVM("").look(iptables.IPv4, ports, Observation{User: proxyUser{UID: proxy}}).DNS
		if foreign := dns.Listening && dns.Owner != proxy; foreign != overTCP {
			t.Errorf("over TCP %v: %+v", overTCP, dns)
		}
	}
}
