package agent

import (
	"cmp"
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/internal/conntrack"
	"github.com/service-proxy-agent/service-proxy-agent/internal/reconcile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/route"
	"github.com/service-proxy-agent/service-proxy-agent/internal/sockdiag"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// about is what the VM's surroundings are looked at for: what the loop last wanted.
type about struct {
	serial   uint64 // of the Want
	families [2]iptables.Interception
	jumps    [2]bool      // they are in, so that what is wanted is redirected
	serving  []uint16     // the application's ports
	local    []netip.Addr // of every interface but loopback
	proxyUID uint32
}

// aboutOf makes one of a pass, or of a look without the daemon. jumps says by family whether they
// are in.
func aboutOf(want Want, serial uint64, seen Observation, jumps [2]bool) about {
	return about{serial: serial, families: want.Families, jumps: jumps,
		serving: seen.Attribute.Config.ServingPorts, local: seen.Local, proxyUID: seen.User.UID}
}

func jumpsOf(outcomes []reconcile.Outcome) (jumps [2]bool) {
	for i := range min(len(outcomes), len(jumps)) {
		jumps[i] = outcomes[i].Status.Jumps
	}
	return jumps
}

// differs says whether another answer may come for this one.
func (a about) differs(b about) bool {
	return a.serial != b.serial || a.jumps != b.jumps || a.proxyUID != b.proxyUID ||
		!slices.Equal(a.serving, b.serving) || !slices.Equal(a.local, b.local)
}

// questions are what is asked of the kernel. Each ends by itself, but a hung kernel may hold it.
type questions struct {
	filter      func(context.Context, iptables.Family) (iptables.Filter, error)
	listeners   func(port uint16) ([]sockdiag.Listener, error)
	connections func(ctx context.Context, pick func(sockdiag.Connection) bool) (
		[]sockdiag.Connection, error)
	load   func(context.Context) (conntrack.Load, error)
	find   func(ctx context.Context, proto uint8, src, dst netip.AddrPort) (conntrack.Entry, error)
	routes func(context.Context, []netip.Addr) ([]route.Failure, error)
	news   func() (*route.News, error) // of routes; nil: nobody tells
	exists func(name string) bool      // of interfaces; nil: all do
}

// askKernel asks this machine's. k may be nil, and none says why: there is no iptables, or what
// there is was not found in time.
func askKernel(k *iptables.Kernel, none error) questions {
	q := questions{
		listeners: sockdiag.Listeners, connections: sockdiag.Connections,
		load: conntrack.ReadLoad, find: conntrack.Find, routes: route.Missing,
		news: route.Listen, exists: func(name string) bool {
			_, err := net.InterfaceByName(name)
			return err == nil
		},
		filter: func(context.Context, iptables.Family) (iptables.Filter, error) {
			return iptables.Filter{}, none
		},
	}
	if k != nil {
		q.filter = k.ReadFilter
	}
	return q
}

// answer is what came of one source: the fields of facts that it is for, as far as they are known.
type answer struct {
	source symptom.Source
	facts  symptom.Surroundings
	full   uint64 // conntrack.Load's, which counts from the boot
	err    error
}

// aroundSources are those of the surroundings that the kernel tells of.
var aroundSources = []symptom.Source{symptom.FromSockets, symptom.FromConntrack,
	symptom.FromFilter, symptom.FromRoutes}

// errNoAnswer is for a source that has not answered in its time.
var errNoAnswer = errors.New("no answer in time")

// lookAround looks once at all of the surroundings that the kernel tells of, with the connections
// that are older than the rules, and says of each source that failed why. It returns when ctx ends,
// whatever still hangs.
func lookAround(ctx context.Context, ask questions, a about) (
	symptom.Surroundings, map[symptom.Source]error,
) {
	answers := make(chan answer, len(aroundSources))
	for _, source := range aroundSources {
		go func() {
			one := ask.look(ctx, source, a)
			if source == symptom.FromConntrack {
				one = ask.withOld(ctx, one, a)
			}
			answers <- one
		}()
	}
	var all symptom.Surroundings
	failed := map[symptom.Source]error{}
	for _, source := range aroundSources {
		failed[source] = errNoAnswer
	}
	for range aroundSources {
		select {
		case one := <-answers:
			delete(failed, one.source)
			if one.err != nil {
				failed[one.source] = one.err
			}
			take(&all, one)
		case <-ctx.Done():
			return all, failed
		}
	}
	return all, failed
}

// take puts an answer's facts among the others.
func take(all *symptom.Surroundings, one answer) {
	switch one.source {
	case symptom.FromFilter:
		all.Dropped = one.facts.Dropped
	case symptom.FromSockets:
		all.Silent = one.facts.Silent
	case symptom.FromConntrack:
		all.Conntrack = one.facts.Conntrack
		all.Old, all.OldCount = one.facts.Old, one.facts.OldCount
	case symptom.FromRoutes:
		all.NoRoute = one.facts.NoRoute
	}
}

// look asks one source.
func (q questions) look(ctx context.Context, source symptom.Source, a about) answer {
	one := answer{source: source}
	switch source {
	case symptom.FromFilter:
		one.facts.Dropped, one.err = q.dropped(ctx, a)
	case symptom.FromSockets:
		one.facts.Silent, one.err = q.silent(a)
	case symptom.FromConntrack:
		load, err := q.load(ctx)
		if errors.Is(err, conntrack.ErrNoTable) {
			err = nil
		}
		one.facts.Conntrack = symptom.Conntrack{Count: load.Count, Max: load.Max}
		one.full, one.err = load.Full, err
	case symptom.FromRoutes:
		addrs := serviceAddrs(a)
		failures, err := q.routes(ctx, addrs)
		one.facts.NoRoute, one.err = unrouted(addrs, failures), err
	}
	return one
}

// dropped are the serving ports that table filter drops. One family's failure does not hide the
// other.
func (q questions) dropped(ctx context.Context, a about) (all []symptom.Dropped, err error) {
	var errs []error
	for i, family := range families {
		if len(a.serving)+len(a.families[i].Interfaces) == 0 || len(localOf(family, a.local)) == 0 {
			continue
		}
		filter, err := q.filter(ctx, family)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		all = append(all, droppedBy(filter, i, a)...)
		for _, name := range a.families[i].Interfaces {
			if q.exists == nil || q.exists(name) {
				all = append(all, droppedFrom(name, filter, i, a)...)
			}
		}
	}
	return all, errors.Join(errs...)
}

// droppedFrom says whether what comes from containers at an interface, and is redirected to Envoy,
// is dropped. A pattern ("br-+") stands for interfaces of which a rule may name one: that is not
// looked at.
func droppedFrom(name string, filter iptables.Filter, family int, a about) []symptom.Dropped {
	want := a.families[family]
	if strings.HasSuffix(name, "+") || !a.jumps[family] || want.OutboundPort == 0 {
		return nil
	}
	var found symptom.Dropped
	for _, addr := range localOf(families[family], a.local) {
		v := filter.Walk(iptables.Packet{Hook: iptables.Input, InInterface: name,
			Dst: netip.AddrPortFrom(addr, want.OutboundPort), Proto: iptables.TCP, DstLocal: true, Syn: true,
			Redirected: true})
		if v.Action != iptables.Dropped {
			return nil
		}
		found = symptom.Dropped{Family: families[family], Interface: name, At: want.OutboundPort,
			Chain: v.Chain, Rule: v.Rule}
	}
	return []symptom.Dropped{found}
}

// droppedBy are the serving ports of one family that are dropped at each of the VM's addresses,
// whoever asks.
func droppedBy(filter iptables.Filter, family int, a about) (all []symptom.Dropped) {
	addrs := localOf(families[family], a.local)
	for _, port := range a.serving {
		var first symptom.Dropped
		dropped := len(addrs) > 0
		for i, addr := range addrs {
			p := iptables.Packet{Hook: iptables.Input, Dst: netip.AddrPortFrom(addr, port),
				Proto: iptables.TCP, DstLocal: true, Syn: true, Redirected: a.redirects(family, addr, port)}
			if p.Redirected { // REDIRECT has given it this port when it comes to INPUT
				p.Dst = netip.AddrPortFrom(addr, a.families[family].InboundPort)
			}
			v := filter.Walk(p)
			dropped = dropped && v.Action == iptables.Dropped
			if i == 0 {
				first = symptom.Dropped{Family: families[family], Port: port, At: p.Dst.Port(),
					Chain: v.Chain, Rule: v.Rule}
			}
		}
		if dropped {
			all = append(all, first)
		}
	}
	return all
}

// redirects says whether connections to a serving port go to Envoy first.
func (a about) redirects(family int, addr netip.Addr, port uint16) bool {
	want := a.families[family]
	return a.jumps[family] && want.InboundPort != 0 &&
		slices.ContainsFunc(want.Serving, func(s iptables.Serving) bool {
			return s.Port == port && (!s.Addr.IsValid() || s.Addr == addr)
		})
}

// silent are the serving ports on which nothing listens.
func (q questions) silent(a about) (quiet []uint16, err error) {
	for _, port := range a.serving {
		listeners, err := q.listeners(port)
		if err != nil {
			return nil, err
		}
		if len(listeners) == 0 {
			quiet = append(quiet, port)
		}
	}
	return quiet, nil
}

// serviceAddrs are the addresses of the services, of a range its first.
func serviceAddrs(a about) []netip.Addr {
	addrs := make([]netip.Addr, 0, len(a.families[0].Services)+len(a.families[1].Services))
	for _, want := range a.families {
		for _, p := range want.Services {
			addrs = append(addrs, p.Masked().Addr())
		}
	}
	return addrs
}

// fewAddrs is how many of a family's addresses without a route are named.
const fewAddrs = 5

// unrouted sums the failures up by family, with the kernel's word on the first.
func unrouted(asked []netip.Addr, failures []route.Failure) (all []symptom.Unrouted) {
	for _, family := range families {
		u := symptom.Unrouted{Family: family}
		for _, addr := range asked {
			if family.Of(addr) {
				u.Of++
			}
		}
		for _, f := range failures {
			if !family.Of(f.Addr) {
				continue
			}
			if u.Count == 0 {
				u.Err = f.Why
			}
			if u.Count++; u.Count <= fewAddrs {
				u.Addrs = append(u.Addrs, f.Addr)
			}
		}
		if u.Count > 0 {
			all = append(all, u)
		}
	}
	return all
}

// fewOld is how many old connections are named.
const fewOld = 20

// withOld adds the connections to services that no rule has redirected though it would now.
func (q questions) withOld(ctx context.Context, one answer, a about) answer {
	candidates, err := q.connections(ctx, candidate(a))
	if err != nil {
		one.err = errors.Join(one.err, err)
		return one
	}
	slices.SortFunc(candidates, func(a, b sockdiag.Connection) int {
		return cmp.Or(a.Remote.Compare(b.Remote), a.Local.Compare(b.Local))
	})
	for _, c := range candidates {
		old, err := q.isOld(ctx, c, one.facts.Conntrack.Max > 0)
		if err != nil {
			one.err = errors.Join(one.err, err)
			return one
		}
		if !old {
			continue
		}
		if one.facts.OldCount++; one.facts.OldCount <= fewOld {
			one.facts.Old = append(one.facts.Old, symptom.OldConnection{From: c.Local, To: c.Remote,
				UID: c.UID})
		}
	}
	return one
}

// candidate says whether a new connection like this one would be redirected.
func candidate(a about) func(sockdiag.Connection) bool {
	var services, excluded [2]prefixSet
	for i, want := range a.families {
		services[i], excluded[i] = newPrefixSet(want.Services), newPrefixSet(want.ExcludePrefixes)
	}
	return func(c sockdiag.Connection) bool {
		to := c.Remote.Addr()
		i := 0
		if to.Is6() {
			i = 1
		}
		return a.jumps[i] && c.UID != a.proxyUID && services[i].hold(to) && !excluded[i].hold(to) &&
			!slices.ContainsFunc(a.families[i].ExcludePorts, func(r iptables.PortRange) bool {
				return r.First <= c.Remote.Port() && c.Remote.Port() <= r.Last
			})
	}
}

// isOld says whether a connection was made from here, and is not redirected.
func (q questions) isOld(ctx context.Context, c sockdiag.Connection, tracked bool) (bool, error) {
	if tracked {
		entry, err := q.find(ctx, unix.IPPROTO_TCP, c.Local, c.Remote)
		if err == nil {
			return entry.Src == c.Local && !entry.Redirected(), nil
		}
		if !errors.Is(err, conntrack.ErrNoEntry) {
			return false, err
		}
	}
	// Conntrack knows nothing of it. One that has come to a listener of ours was not made here.
	listeners, err := q.listeners(c.Local.Port())
	return len(listeners) == 0, err
}

// prefixSet is a set to look an address up in, at a cost that grows with their lengths alone.
type prefixSet struct {
	all  map[netip.Prefix]bool
	bits []int
}

func newPrefixSet(list []netip.Prefix) prefixSet {
	p := prefixSet{all: map[netip.Prefix]bool{}}
	for _, one := range list {
		p.all[one.Masked()] = true
		if !slices.Contains(p.bits, one.Bits()) {
			p.bits = append(p.bits, one.Bits())
		}
	}
	return p
}

func (p prefixSet) hold(addr netip.Addr) bool {
	return slices.ContainsFunc(p.bits, func(bits int) bool {
		around, err := addr.Prefix(bits)
		return err == nil && p.all[around]
	})
}
