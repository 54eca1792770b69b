package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/bundle"
	"github.com/service-proxy-agent/service-proxy-agent/internal/explain"
	"github.com/service-proxy-agent/service-proxy-agent/internal/recording"
	"github.com/service-proxy-agent/service-proxy-agent/internal/route"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/internal/users"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// Bounds of a recording.
const (
	recordLimit  = 20 * time.Second // for what is asked beside the look
	recordWrites = 2 * time.Second  // of the caller's time is left for writing
	mostRoutes   = 2_000            // route configurations
	mostClusters = 20_000
	mostRecorded = 90 << 20 // bytes: the bundle cuts off what is much more
)

// Record writes down what was looked at, so that Replay of it answers elsewhere what this look
// answers here. It asks the kernel and Envoy for what a later question may need: counters, routes,
// endpoints, the ways to addresses. What it lacks is a gap.
func (l Looked) Record(ctx context.Context) (data []byte, gaps []bundle.Gap, err error) {
	limit := recordLimit
	if end, ok := ctx.Deadline(); ok {
		limit = min(limit, time.Until(end)-recordWrites)
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	r := l.record()
	lacks := func(what string, err error) {
		if err != nil {
			gaps = append(gaps, bundle.Gap{Name: bundle.LookFile + ": " + what,
				Why: symptom.Printable(err.Error(), 300)})
		}
	}
	for i, f := range families {
		family := &r.Families[i]
		var counters iptables.Counters
		if family.RulesErr == nil {
			counters, family.CountErr = l.counters(ctx, i)
			lacks(fmt.Sprintf("counters of the %v rules", f), family.CountErr)
			family.Rules = strings.Split(l.Have[i].Save(counters), "\n")
		}
		lacks(fmt.Sprintf("%v rules", f), family.RulesErr)
	}
	r.Ways, r.WaysErr = route.Ways(ctx)
	lacks("ways to addresses", r.WaysErr)
	if lacks("what Envoy does", r.Envoy.Err); r.Envoy.Err == nil {
		l.recordBehind(ctx, &r.Envoy)
		lacks("routes", r.Envoy.RoutesErr)
		lacks("endpoints", r.Envoy.ClustersErr)
	}
	if data, err = recording.Marshal(r); err == nil && len(data) > mostRecorded {
		r.Envoy.Routes, r.Envoy.RoutesErr = nil, errTooMuch
		r.Envoy.Clusters, r.Envoy.ClustersErr = nil, errTooMuch
		lacks("routes and endpoints", errTooMuch)
		if data, err = recording.Marshal(r); err == nil && len(data) > mostRecorded {
			err = errTooMuch
		}
	}
	if err != nil {
		return nil, gaps, fmt.Errorf("record the look: %w", err)
	}
	return data, gaps, nil
}

var errTooMuch = errors.New("it is too much for a recording")

// record is what the look has by itself.
func (l Looked) record() recorded {
	r := recorded{
		Schema: lookSchema, Version: l.Seen.Settings.Version, Commit: l.Seen.Settings.Commit,
		Time: l.Seen.Now.UTC(), Fields: factsFields(), Facts: l.Facts, Backend: l.Backend,
		Known: l.Known, Refused: l.Want.Refused,
		User:  userID{l.Seen.User.UID, l.Seen.User.GID},
		Users: map[string]userID{}, Groups: map[string]uint32{},
	}
	for _, kind := range symptom.Kinds() {
		r.Kinds = append(r.Kinds, kind.ID)
	}
	for i := range families {
		r.Families[i] = recordedFamily{RulesErr: l.HaveErr[i], Asked: l.Want.Families[i],
			Want: strings.Split(l.Ruleset(i).String(), "\n"), Served: l.Want.Served[i]}
	}
	if l.Daemon != nil {
		r.Daemon = &recordedDaemon{l.Daemon.Mode, l.Daemon.NotReady}
	}
	view := l.Seen.Envoy
	r.Envoy = recordedEnvoy{Err: view.Err, Configured: view.Configured,
		Listeners: view.Snapshot.Listeners}
	for _, name := range slices.Concat([]string{"root", l.Seen.Settings.ProxyUser},
		l.Seen.Settings.ResolverUsers) {
		if uid, gid, err := users.IDs(name); err == nil {
			r.Users[name] = userID{uid, gid}
		}
		if gid, err := groupID(name); err == nil {
			r.Groups[name] = gid
		}
	}
	return r
}

func factsFields() []string { return recording.Fields(reflect.TypeFor[symptom.Facts]()) }

func named[V any](m map[string]V) string {
	return symptom.Printable(strings.Join(slices.Sorted(maps.Keys(m)), ", "), 200)
}

func (l Looked) counters(ctx context.Context, i int) (iptables.Counters, error) {
	kernel, err := iptables.Open(ctx, iptables.Options{ReadOnly: true})
	if err != nil {
		return nil, err
	}
	return kernel.ReadCounters(ctx, l.Have[i])
}

// recordBehind asks Envoy for the routes and clusters of all listeners.
func (l Looked) recordBehind(ctx context.Context, e *recordedEnvoy) {
	client, err := l.client()
	if err != nil {
		e.RoutesErr, e.ClustersErr = err, err
		return
	}
	defer client.Close()
	routes, clusters := asks(e.Listeners)
	names, cut := first(routes, mostRoutes)
	if e.Routes, err = client.RoutesOf(ctx, names...); err != nil {
		e.RoutesErr, e.ClustersErr = err, err
		return
	}
	e.RoutesErr = cut
	for _, r := range e.Routes {
		clusters = append(clusters, explain.ClustersOf(r)...)
	}
	names, cut = first(clusters, mostClusters)
	if e.Clusters, e.ClustersErr = client.Endpoints(ctx, names...); e.ClustersErr == nil {
		e.ClustersErr = cut
	}
}

// asks are the route configurations and clusters that the chains of listeners name.
func asks(listeners []envoyadmin.Listener) (routes, clusters []string) {
	for _, l := range listeners {
		chains := l.Chains
		if l.DefaultChain != nil {
			chains = append(slices.Clip(chains), *l.DefaultChain)
		}
		for _, c := range chains {
			clusters = append(clusters, c.Clusters()...)
			if c.HTTP && c.RouteConfig != "" {
				routes = append(routes, c.RouteConfig)
			}
		}
	}
	return routes, clusters
}

// first are the names once each, up to a number; the error says that there are more.
func first(names []string, most int) ([]string, error) {
	names = slices.Compact(slices.Sorted(slices.Values(names)))
	if len(names) > most {
		return names[:most], fmt.Errorf("%w: that has %d of %d", errNotRecorded, most, len(names))
	}
	return names, nil
}
