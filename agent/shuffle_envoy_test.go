package agent

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
)

// set is what a control plane asks for.
type set struct {
	name      string
	cidrs     [2][]string // service addresses by family
	families  [2]bool     // where its outbound listener listens
	port      uint16      // of a service without an address; 0: none
	has       [sides]bool // which listeners there are
	listeners []envoyadmin.Listener
}

// The addresses of services, sorted. Some are within others.
var pool = [2][]string{
	{"10.10.0.1/32", "10.10.0.2/32", "10.10.0.3/32", "10.20.0.0/24", "10.20.0.9/32"},
	{"fd10::1/128", "fd10::2/128", "fd10::3/128", "fd20::/64", "fd20::9/128"},
}

// nothing is the set of a control plane that has nothing for this VM.
var nothing = &set{name: "nothing"}

// randomSet makes up a set that is not empty.
func randomSet(r *rand.Rand) *set {
	s := &set{
		families: [2]bool{true, r.IntN(4) > 0}, has: [sides]bool{true, r.IntN(3) > 0, r.IntN(2) > 0},
	}
	if r.IntN(8) == 0 {
		s.has[outboundSide], s.has[inboundSide] = false, true
	}
	for i := range pool {
		mask := r.IntN(1 << len(pool[i]))
		for n, cidr := range pool[i] {
			if mask&(1<<n) != 0 && s.families[i] && s.has[outboundSide] {
				s.cidrs[i] = append(s.cidrs[i], cidr)
			}
		}
	}
	if r.IntN(3) == 0 && s.has[outboundSide] {
		s.port = 81
	}
	s.name = fmt.Sprintf("services %v, port %d, outbound, inbound, DNS %v, IPv4, IPv6 %v",
		s.cidrs, s.port, s.has, s.families)
	s.listeners = s.asEnvoyHasThem()
	return s
}

// asEnvoyHasThem are the listeners in the form of Traffic Director's.
func (s *set) asEnvoyHasThem() (all []envoyadmin.Listener) {
	at := func(port uint16) (a []netip.AddrPort) {
		for i, any := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
			if s.families[i] {
				a = append(a, netip.AddrPortFrom(any, port))
			}
		}
		return a
	}
	if s.has[outboundSide] {
		l := envoyadmin.Listener{
			Name: "TRAFFICDIRECTOR_INTERCEPTION_LISTENER", Addresses: at(portOf[outboundSide]),
			Direction: corev3.TrafficDirection_OUTBOUND, Bound: true, OriginalDst: true,
		}
		for i := range s.cidrs {
			for _, cidr := range s.cidrs[i] {
				l.Chains = append(l.Chains, envoyadmin.FilterChain{
					Prefixes: []netip.Prefix{netip.MustParsePrefix(cidr)}, Port: 80, HTTP: true,
				})
			}
		}
		if s.port != 0 {
			l.Chains = append(l.Chains, envoyadmin.FilterChain{Port: s.port, TCP: true})
		}
		all = append(all, l)
	}
	if s.has[inboundSide] {
		all = append(all, envoyadmin.Listener{
			Name: "inbound", Addresses: at(portOf[inboundSide]),
			Direction: corev3.TrafficDirection_INBOUND, Bound: true, OriginalDst: true,
			Chains: []envoyadmin.FilterChain{{Port: servingPort, HTTP: true}},
		})
	}
	if s.has[dnsSide] {
		all = append(all, envoyadmin.Listener{
			Name: "dns", Addresses: at(portOf[dnsSide]), Bound: true, UDP: true, DNS: true,
		})
	}
	return all
}

// first is the set with its first listener alone.
func (s *set) first() *set {
	one := *s
	one.name += ", the others warming"
	one.listeners = s.listeners[:1]
	side := slices.Index(s.has[:], true)
	one.has = [sides]bool{}
	one.has[side] = true
	return &one
}

// attr is what of the VM's attribute matters here.
type attr struct{ serving, dns, excludes bool }

const servingPort = 8080

// excluded are the addresses that an attribute may exclude, by family.
var excluded = [2]string{"10.20.0.0/28", "fd20::/80"}

func (a attr) config() attribute.Config {
	c := attribute.Default()
	c.InterceptDNS = a.dns
	if a.serving {
		c.ServingPorts = []uint16{servingPort}
	}
	if a.excludes {
		for _, cidr := range excluded {
			out := netip.MustParsePrefix(cidr)
			c.ExcludeOutboundIPRanges = append(c.ExcludeOutboundIPRanges, out)
		}
	}
	return c
}

// envoy is an Envoy and its control plane, as Envoy's admin interface tells of them. What it
// answers was seen of Envoy 1.40.0: /ready says PRE_INITIALIZING until the first update or until it
// was waited for in vain for 15 s (initial_fetch_timeout); the dump of an Envoy without listeners
// is {}, so its fingerprint is that of any such dump; lds.version is 0 until an update was taken as
// a whole; listeners that wait for their routes are under warming_state, others active meanwhile.
type envoy struct {
	up       bool
	hung     bool
	draining bool
	bound    bool   // its listeners' sockets are open
	told     bool   // this process has taken an update as a whole
	waited   bool   // the first update was waited for in vain
	slow     bool   // its first listeners but one will wait for their routes
	warming  bool   // they do
	process  uint64 // as the client tells processes apart
	started  time.Time
	set      *set
	version  int // of set; that of an empty one is 0

	plane     *set // what the control plane has for it
	planeUp   bool
	versions  int
	reads     []read
	behind    func() // called once, behind the next dump of the listeners
	hungUntil time.Time
	now       func() time.Time
}

// read is what one dump of the listeners was of.
type read struct {
	set  *set
	of   envoyadmin.Fingerprint
	told bool // it holds all that Envoy was told
}

func (e *envoy) state() string {
	switch {
	case e.draining:
		return "DRAINING"
	case e.told, e.waited:
		return "LIVE"
	}
	return "PRE_INITIALIZING"
}

// start is a new process. seen: the client can tell it from the one before.
func (e *envoy) start(seen bool) {
	if seen {
		e.process++
	}
	e.up, e.hung, e.draining, e.told, e.waited, e.bound = true, false, false, false, false, true
	e.slow, e.warming = false, false
	e.set, e.version, e.started = nothing, 0, e.now()
}

func (e *envoy) stop() { e.up, e.hung = false, false }

// update is the control plane's word, and says whether Envoy has anything to log.
func (e *envoy) update() bool {
	if !e.up || e.draining || !e.planeUp || e.told && e.set == e.plane {
		return false
	}
	e.told, e.warming = true, e.slow && len(e.plane.listeners) > 1
	e.slow = false
	e.set = e.plane
	if e.warming {
		e.set = e.plane.first()
	}
	e.moved()
	return true
}

// moved gives the set another fingerprint, as the times of updates in a dump do.
func (e *envoy) moved() {
	e.version = 0
	if e.set != nothing {
		e.versions++
		e.version = e.versions
	}
}

// warm is the end of the wait for routes.
func (e *envoy) warm() bool {
	if !e.up || !e.warming {
		return false
	}
	e.set, e.warming = e.plane, false
	e.moved()
	return true
}

func (e *envoy) answers(question string) error {
	switch {
	case !e.up:
		return fmt.Errorf("get %q: %w", question, envoyadmin.ErrRefused)
	case e.hung:
		e.hungUntil = e.now().Add(5 * time.Second)
		return fmt.Errorf("get %q: %w", question, envoyadmin.ErrTimeout)
	}
	return nil
}

func (e *envoy) fingerprint() envoyadmin.Fingerprint {
	f := envoyadmin.Fingerprint{Process: e.process, Listeners: e.version}
	if e.warming {
		f.Warming = 1
	}
	return f
}

func (e *envoy) Fingerprint(context.Context, []string) (envoyadmin.Fingerprint, error) {
	return e.fingerprint(), e.answers("/config_dump")
}

// Listeners numbers its answers in Bytes, so that a set can be told from one that was read before.
func (e *envoy) Listeners(context.Context) (envoyadmin.Snapshot, error) {
	if err := e.answers("/config_dump"); err != nil {
		return envoyadmin.Snapshot{}, err
	}
	e.reads = append(e.reads, read{e.set, e.fingerprint(), e.told && !e.warming})
	s := envoyadmin.Snapshot{
		Listeners: e.set.listeners, Fingerprint: e.fingerprint(), Bytes: int64(len(e.reads)),
	}
	if e.warming {
		s.Warming = []envoyadmin.Warming{{Name: "warming"}}
	}
	if behind := e.behind; behind != nil {
		e.behind = nil
		behind()
	}
	return s, nil
}

func (e *envoy) Ready(context.Context) (string, error) { return e.state(), e.answers("/ready") }

func (e *envoy) ServerInfo(context.Context) (envoyadmin.ServerInfo, error) {
	return envoyadmin.ServerInfo{
		Version: envoyadmin.Version{Major: 1, Minor: 40},
		Text:    "x/1.40.0/Clean/RELEASE/BoringSSL", State: e.state(),
		Uptime: e.now().Sub(e.started).Truncate(time.Second), Asked: e.now(),
	}, e.answers("/server_info")
}

func (e *envoy) ControlPlane(context.Context) (envoyadmin.ControlPlane, error) {
	c := envoyadmin.ControlPlane{Streams: true, Connected: e.planeUp}
	if e.told {
		c.Version = 1
	}
	return c, e.answers("/stats")
}

func (e *envoy) Bootstrap(context.Context) (*envoyadmin.Bootstrap, error) {
	return &envoyadmin.Bootstrap{LDS: true}, e.answers("/config_dump")
}

func (e *envoy) Clusters(context.Context) ([]envoyadmin.ClusterHealth, error) {
	return nil, e.answers("/clusters")
}

func (e *envoy) Panics(context.Context) (map[string]uint64, error) {
	return nil, e.answers("/stats")
}

func (e *envoy) Redial() {}
