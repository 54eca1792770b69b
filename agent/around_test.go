package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/service-proxy-agent/service-proxy-agent/internal/conntrack"
	"github.com/service-proxy-agent/service-proxy-agent/internal/route"
	"github.com/service-proxy-agent/service-proxy-agent/internal/sockdiag"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// sameAddrs compares values that hold addresses.
var sameAddrs = cmp.Options{
	cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{}, netip.Prefix{}),
	cmpopts.EquateEmpty(), cmpopts.EquateErrors()}

// mesh is what a VM with two services and two serving ports wants, with the jumps in.
func mesh() about {
	return about{
		families: [2]iptables.Interception{
			{Family: iptables.IPv4, OutboundPort: 15001, InboundPort: 15006,
				Services:        []netip.Prefix{netip.MustParsePrefix("10.1.2.3/32"), netip.MustParsePrefix("10.7.0.9/16")},
				ExcludePrefixes: []netip.Prefix{netip.MustParsePrefix("10.7.1.0/24")},
				ExcludePorts:    []iptables.PortRange{{First: 8000, Last: 8010}},
				Serving: []iptables.Serving{{Port: 8080},
					{Addr: netip.MustParseAddr("10.0.0.9"), Port: 9090}}},
			{Family: iptables.IPv6, OutboundPort: 15001,
				Services: []netip.Prefix{netip.MustParsePrefix("fd01::3/128")}},
		},
		jumps: [2]bool{true, true}, serving: []uint16{8080, 9090},
		local:    []netip.Addr{netip.MustParseAddr("10.0.0.9"), netip.MustParseAddr("fe80::1")},
		proxyUID: 990,
	}
}

func filterOf(t *testing.T, lines ...string) iptables.Filter {
	t.Helper()
	f, err := iptables.ParseFilter(iptables.IPv4,
		[]byte("*filter\n"+strings.Join(append(lines, "COMMIT"), "\n")+"\n"))
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestDroppedBy(t *testing.T) {
	drop := func(port, at uint16, rule string) symptom.Dropped {
		return symptom.Dropped{Family: iptables.IPv4, Port: port, At: at, Chain: "INPUT", Rule: rule}
	}
	const envoys = "-p tcp -m tcp --dport 15006 -j DROP"
	for _, test := range []struct {
		name   string
		filter []string
		change func(*about)
		want   []symptom.Dropped
	}{
		{"nothing", nil, nil, nil},
		{"all", []string{":INPUT DROP [0:0]"}, nil, []symptom.Dropped{drop(8080, 15006, ""), drop(9090, 15006, "")}},
		{"Envoy's port", []string{"-A INPUT " + envoys}, nil, []symptom.Dropped{drop(8080, 15006, envoys), drop(9090, 15006, envoys)}},
		{"a port that is redirected, by its own number", []string{"-A INPUT -p tcp -m tcp --dport 8080 -j DROP"}, nil, nil},
		{"Envoy's port, with the jumps out", []string{"-A INPUT " + envoys}, func(a *about) { a.jumps[0] = false }, nil},
		{"a port, with the jumps out", []string{":INPUT DROP [0:0]", "-A INPUT -p tcp -m tcp --dport 9090 -j ACCEPT"},
			func(a *about) { a.jumps[0] = false }, []symptom.Dropped{drop(8080, 8080, "")}},
		{"a port that Envoy has no chain for", []string{":INPUT DROP [0:0]", "-A INPUT -p tcp -m tcp --dport 15006 -j ACCEPT"},
			func(a *about) { a.serving = []uint16{22, 8080} }, []symptom.Dropped{drop(22, 22, "")}},
		{"redirected at one address alone, dropped there", []string{"-A INPUT " + envoys},
			func(a *about) { a.local = append(a.local, netip.MustParseAddr("10.0.1.9")) }, []symptom.Dropped{drop(8080, 15006, envoys)}},
		{"dropped at one of two addresses", []string{"-A INPUT -d 10.0.0.9/32 -j DROP"},
			func(a *about) { a.local = append(a.local, netip.MustParseAddr("10.0.1.9")) }, nil},
		{"some sources", []string{"-A INPUT -s 192.0.2.0/24 -j DROP"}, nil, nil},
		{"no address", []string{":INPUT DROP [0:0]"}, func(a *about) { a.local = nil }, nil},
	} {
		a := mesh()
		if test.change != nil {
			test.change(&a)
		}
		got := droppedBy(filterOf(t, test.filter...), 0, a)
		if diff := cmp.Diff(test.want, got, sameAddrs); diff != "" {
			t.Errorf("%s: %s", test.name, diff)
		}
	}
}

// TestDroppedFrom: what containers send to services comes to INPUT at Envoy's port.
func TestDroppedFrom(t *testing.T) {
	const envoys = "-p tcp -m tcp --dport 15001 -j DROP"
	want := func(rule string) []symptom.Dropped {
		return []symptom.Dropped{{Family: iptables.IPv4, Interface: "docker0", At: 15001, Chain: "INPUT", Rule: rule}}
	}
	for _, test := range []struct {
		name, from string
		filter     []string
		change     func(*about)
		want       []symptom.Dropped
	}{
		{"nothing", "docker0", nil, nil, nil},
		{"all", "docker0", []string{":INPUT DROP [0:0]"}, nil, want("")},
		{"Envoy's port", "docker0", []string{"-A INPUT " + envoys}, nil, want(envoys)},
		{"all but that interface", "docker0", []string{":INPUT DROP [0:0]", "-A INPUT -i docker0 -j ACCEPT"}, nil, nil},
		{"all but what was redirected, as firewalld does", "docker0",
			[]string{":INPUT DROP [0:0]", "-A INPUT -m conntrack --ctstate DNAT -j ACCEPT"}, nil, nil},
		{"a pattern", "br-+", []string{":INPUT DROP [0:0]"}, nil, nil},
		{"the jumps are out", "docker0", []string{":INPUT DROP [0:0]"}, func(a *about) { a.jumps[0] = false }, nil},
	} {
		a := mesh()
		a.families[0].OutboundPort = 15001
		if test.change != nil {
			test.change(&a)
		}
		got := droppedFrom(test.from, filterOf(t, test.filter...), 0, a)
		if diff := cmp.Diff(test.want, got, sameAddrs); diff != "" {
			t.Errorf("%s: %s", test.name, diff)
		}
	}
}

func TestCandidate(t *testing.T) {
	is := candidate(mesh())
	for _, test := range []struct {
		to   string
		uid  uint32
		want bool
	}{
		{"10.1.2.3:443", 1000, true}, {"10.1.2.3:443", 0, true}, {"10.1.2.3:443", 990, false},
		{"10.1.2.4:443", 1000, false}, {"10.7.200.1:443", 1000, true}, {"10.7.1.7:443", 1000, false},
		{"10.1.2.3:8000", 1000, false}, {"10.1.2.3:8010", 1000, false}, {"10.1.2.3:8011", 1000, true},
		{"[fd01::3]:8000", 1000, true}, {"[fd01::4]:80", 1000, false},
	} {
		c := sockdiag.Connection{Remote: netip.MustParseAddrPort(test.to), UID: test.uid}
		if got := is(c); got != test.want {
			t.Errorf("%s of uid %d: %v", test.to, test.uid, got)
		}
	}
	out := mesh()
	out.jumps = [2]bool{false, true}
	c := sockdiag.Connection{Remote: netip.MustParseAddrPort("10.1.2.3:443"), UID: 1000}
	if candidate(out)(c) {
		t.Error("without jumps a new connection is not redirected either")
	}
}

// calm is a kernel without anything to tell, in which fields can be replaced.
func calm() questions {
	return questions{
		filter: func(context.Context, iptables.Family) (iptables.Filter, error) {
			return iptables.Filter{}, nil
		},
		listeners: func(uint16) ([]sockdiag.Listener, error) { return []sockdiag.Listener{{}}, nil },
		connections: func(context.Context, func(sockdiag.Connection) bool) (
			[]sockdiag.Connection, error,
		) {
			return nil, nil
		},
		load: func(context.Context) (conntrack.Load, error) {
			return conntrack.Load{Count: 1, Max: 100}, nil
		},
		find: func(context.Context, uint8, netip.AddrPort, netip.AddrPort) (conntrack.Entry, error) {
			return conntrack.Entry{}, conntrack.ErrNoEntry
		},
		routes: func(context.Context, []netip.Addr) ([]route.Failure, error) { return nil, nil },
	}
}

// TestOldConnections: those that were made here and that no rule has redirected.
func TestOldConnections(t *testing.T) {
	addr := netip.MustParseAddrPort
	vip := addr("10.1.2.3:443")
	connection := func(port uint16) sockdiag.Connection {
		return sockdiag.Connection{Local: netip.AddrPortFrom(netip.MustParseAddr("10.0.0.9"), port), Remote: vip, UID: 1000}
	}
	refused := errors.New("refused")
	const untracked, direct, redirected, fromThere, accepted = 1, 2, 3, 4, 5
	q := calm()
	q.find = func(_ context.Context, _ uint8, src, dst netip.AddrPort) (conntrack.Entry, error) {
		e := conntrack.Entry{Src: src, Dst: dst, ReplySrc: dst, ReplyDst: src}
		switch src.Port() {
		case direct:
		case redirected:
			e.Status, e.ReplySrc = 1<<5, addr("127.0.0.1:15001")
		case fromThere:
			e.Src, e.Dst = dst, src
		case 66:
			return conntrack.Entry{}, refused
		default:
			return conntrack.Entry{}, conntrack.ErrNoEntry
		}
		return e, nil
	}
	q.listeners = func(port uint16) ([]sockdiag.Listener, error) {
		return make([]sockdiag.Listener, map[uint16]int{accepted: 1}[port]), nil
	}
	for _, test := range []struct {
		name    string
		ports   []uint16
		noTable bool
		want    []uint16
		count   int
		err     error
	}{
		{"each kind", []uint16{untracked, direct, redirected, fromThere, accepted}, false, []uint16{untracked, direct}, 2, nil},
		{"without conntrack", []uint16{redirected, accepted}, true, []uint16{redirected}, 1, nil},
		{"not allowed to ask", []uint16{direct, 66, 67}, false, []uint16{direct}, 1, refused},
	} {
		q.connections = func(_ context.Context, pick func(sockdiag.Connection) bool) (
			found []sockdiag.Connection, err error,
		) {
			for _, port := range test.ports {
				if c := connection(port); pick(c) {
					found = append(found, c)
				}
			}
			return found, nil
		}
		q.load = func(context.Context) (conntrack.Load, error) {
			if test.noTable {
				return conntrack.Load{}, conntrack.ErrNoTable
			}
			return conntrack.Load{Count: 7, Max: 100}, nil
		}
		got, failed := lookAround(t.Context(), q, mesh())
		var want []symptom.OldConnection
		for _, port := range test.want {
			want = append(want, symptom.OldConnection{From: connection(port).Local, To: vip, UID: 1000})
		}
		if diff := cmp.Diff(want, got.Old, sameAddrs); diff != "" || got.OldCount != test.count ||
			!errors.Is(failed[symptom.FromConntrack], test.err) || len(failed) > 1 {
			t.Errorf("%s: %d, %v: %s", test.name, got.OldCount, failed, diff)
		}
	}
	q.connections = func(context.Context, func(sockdiag.Connection) bool) (
		all []sockdiag.Connection, err error,
	) {
		for port := range uint16(1000) {
			all = append(all, connection(2000-port))
		}
		return all, nil
	}
	got, _ := lookAround(t.Context(), q, mesh())
	if len(got.Old) != fewOld || got.OldCount != 1000 || got.Old[0].From.Port() != 1001 {
		t.Errorf("of a thousand: %d named, %d counted, the first %v", len(got.Old), got.OldCount, got.Old[0])
	}
}

func TestUnrouted(t *testing.T) {
	a := netip.MustParseAddr
	asked := []netip.Addr{a("10.1.2.3"), a("10.7.0.0"), a("fd01::3")}
	got := unrouted(asked, []route.Failure{{Addr: a("fd01::3"), Why: "network is unreachable"}})
	want := []symptom.Unrouted{{Family: iptables.IPv6, Addrs: asked[2:], Count: 1, Of: 1,
		Err: "network is unreachable"}}
	if diff := cmp.Diff(want, got, sameAddrs); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(asked, serviceAddrs(mesh()), sameAddrs); diff != "" {
		t.Error(diff)
	}
	var many []route.Failure
	asked = nil
	for i := range 100 {
		asked = append(asked, netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}))
		many = append(many, route.Failure{Addr: asked[i], Why: []string{"a route of type blackhole", "network is unreachable"}[min(i, 1)]})
	}
	got = unrouted(asked, many[:90])
	if len(got) != 1 || got[0].Count != 90 || got[0].Of != 100 ||
		got[0].Err != "a route of type blackhole" || !slices.Equal(got[0].Addrs, asked[:fewAddrs]) {
		t.Errorf("of many: %+v", got)
	}
}

// TestLookAround: each source tells its part, and one that fails is named with its reason.
func TestLookAround(t *testing.T) {
	q := calm()
	q.filter = func(_ context.Context, f iptables.Family) (iptables.Filter, error) {
		if f == iptables.IPv6 {
			t.Error("asked for a family without an address of this VM")
		}
		return filterOf(t, ":INPUT DROP [0:0]"), nil
	}
	q.listeners = func(port uint16) ([]sockdiag.Listener, error) {
		return make([]sockdiag.Listener, map[uint16]int{8080: 2}[port]), nil
	}
	q.load = func(context.Context) (conntrack.Load, error) {
		return conntrack.Load{Count: 99, Max: 100, Full: 1 << 40}, nil
	}
	q.routes = func(_ context.Context, addrs []netip.Addr) ([]route.Failure, error) {
		return []route.Failure{{Addr: addrs[2], Why: "network is unreachable"}}, nil
	}
	whole, failed := lookAround(t.Context(), q, mesh())
	if len(failed) > 0 || len(whole.Dropped) != 2 || !slices.Equal(whole.Silent, []uint16{9090}) ||
		whole.Conntrack != (symptom.Conntrack{Count: 99, Max: 100}) || len(whole.NoRoute) != 1 {
		t.Errorf("%+v, %v", whole, failed)
	}

	broken := errors.New("broken")
	for source, spoil := range map[symptom.Source]func(*questions){
		symptom.FromFilter: func(q *questions) {
			q.filter = func(context.Context, iptables.Family) (iptables.Filter, error) {
				return iptables.Filter{}, broken
			}
		},
		symptom.FromSockets: func(q *questions) {
			q.listeners = func(uint16) ([]sockdiag.Listener, error) { return nil, broken }
		},
		symptom.FromConntrack: func(q *questions) {
			q.load = func(context.Context) (conntrack.Load, error) { return conntrack.Load{}, broken }
		},
		symptom.FromRoutes: func(q *questions) {
			q.routes = func(context.Context, []netip.Addr) ([]route.Failure, error) { return nil, broken }
		},
	} {
		q := q
		spoil(&q)
		part, failed := lookAround(t.Context(), q, mesh())
		if len(failed) != 1 || !errors.Is(failed[source], broken) {
			t.Errorf("%s fails: %v", source, failed)
		}
		want := whole
		take(&want, answer{source: source})
		if diff := cmp.Diff(want, part, sameAddrs); diff != "" {
			t.Errorf("%s fails: %s", source, diff)
		}
	}
}

// TestLookAroundEndsInTime: one source hangs and heeds nothing. The others are told, and of it that
// it gave no answer.
func TestLookAroundEndsInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		defer close(release)
		q := calm()
		q.routes = func(context.Context, []netip.Addr) ([]route.Failure, error) {
			<-release
			return nil, nil
		}
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		began := time.Now()
		got, failed := lookAround(ctx, q, mesh())
		if took := time.Since(began); took != 3*time.Second || len(failed) != 1 ||
			!errors.Is(failed[symptom.FromRoutes], errNoAnswer) || got.Conntrack.Count != 1 {
			t.Errorf("after %v: %+v, %v", took, got, failed)
		}
	})
}

// An iptables that was not found in time is not one that is missing.
func TestNotFoundInTimeIsNotMissing(t *testing.T) {
	if err := (kernelSeen{}).none(); errors.Is(err, iptables.ErrNoIPTables) ||
		!errors.Is(err, iptables.ErrCouldNotLook) {
		t.Errorf("not found in time: %v", err)
	}
	missing := fmt.Errorf("find %q: %w", "iptables", iptables.ErrNoIPTables)
	if err := (kernelSeen{noTools: missing}).none(); !errors.Is(err, iptables.ErrNoIPTables) {
		t.Errorf("missing: %v", err)
	}
}
