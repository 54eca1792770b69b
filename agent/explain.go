package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/user"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/explain"
	"github.com/service-proxy-agent/service-proxy-agent/internal/route"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/internal/try"
	"github.com/service-proxy-agent/service-proxy-agent/internal/users"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// Explain answers a question by what a look has seen. It asks the kernel for the way to the address
// and the counters on it, and Envoy for what is behind the chain that takes the connection. A look
// that is replayed asks its recording, and nobody else.
func (l Looked) Explain(ctx context.Context, q explain.Question) explain.Answer {
	ctx, cancel := context.WithTimeout(ctx, explainLimit)
	defer cancel()
	s := l.seen(q)
	way, err := l.wayTo(ctx, q.To)
	s.Source, s.Local, s.NoRoute, s.WayErr = way.Source, way.Local, way.Err, err
	if s.HaveErr == nil {
		if q.Try && s.NoRoute == nil && l.recorded == nil {
			s.Tried, s.Have = tried(ctx, q, s)
		}
		steps, verdict := q.Path(s)
		s.Counters, s.CountErr = l.countersOf(ctx, q.Family(), steps)
		if verdict.Action == iptables.Redirect && s.EnvoyErr == nil && !q.UDP {
			s.Routes, s.Endpoints, s.BehindErr = l.behind(ctx, q.Choice(s, verdict.Port))
		}
	}
	return explain.Explain(q, s)
}

// explainLimit bounds what is asked for one address, after the look.
const explainLimit = 8 * time.Second

// seen is what the look saw of what a question is answered by.
func (l Looked) seen(q explain.Question) explain.Seen {
	i := slices.Index(families[:], q.Family())
	view := l.Seen.Envoy
	s := explain.Seen{
		Have: l.Have[i], HaveErr: l.HaveErr[i],
		Known: l.Known, Refused: l.Want.Refused,
		Listeners: view.Snapshot.Listeners, Configured: view.Configured, EnvoyErr: view.Err,
		ProxyUser: l.Seen.Settings.ProxyUser,
	}
	if why, unseen := l.Facts.Unseen[symptom.FromKernel]; unseen && s.HaveErr == nil {
		s.HaveErr = errors.New(why)
	}
	if why, unseen := l.Facts.Unseen[symptom.FromEnvoy]; unseen && s.EnvoyErr == nil {
		s.EnvoyErr = errors.New(why)
	}
	if l.Known {
		s.Want, s.Asked = l.Ruleset(i), l.Want.Families[i]
	}
	for _, served := range l.Want.Served[i] {
		s.Services = append(s.Services, explain.Service(served))
	}
	if l.Daemon != nil {
		s.Mode, s.NotReady = l.Daemon.Mode, l.Daemon.NotReady
	} else if l.Seen.Brake.Off {
		s.Mode = modeOff
	}
	return s
}

// wayTo is the way to an address; the error says why it is not known.
func (l Looked) wayTo(ctx context.Context, to netip.AddrPort) (route.Way, error) {
	if l.recorded != nil {
		return l.recorded.wayTo(to)
	}
	return route.To(ctx, to), nil
}

// tried makes the connection. Where rules and kernel differ the rules may have changed since they
// were read: the second reading decides, and have is what it read.
func tried(ctx context.Context, q explain.Question, s explain.Seen) (t *explain.Tried,
	have iptables.Table) {
	for again := true; ; again = false {
		_, verdict := q.Path(s)
		t = tryOnce(ctx, q, verdict)
		if t.Agreement != explain.Differ || !again {
			return t, s.Have
		}
		kernel, err := iptables.Open(ctx, iptables.Options{ReadOnly: true})
		if err != nil {
			return t, s.Have
		}
		now, err := kernel.Read(ctx, q.Family())
		if err != nil {
			return t, s.Have
		}
		s.Have = now
		if _, is := q.Path(s); is == verdict {
			return t, s.Have
		}
	}
}

func tryOnce(ctx context.Context, q explain.Question, v iptables.Verdict) *explain.Tried {
	o, err := try.Connect(ctx, try.Ask{To: q.To, UID: q.UID, GID: q.GID})
	if err != nil {
		return &explain.Tried{Error: err.Error()}
	}
	c := try.Compare(v, o)
	return &explain.Tried{Agreement: explain.Agreement(c.Agreement.String()), Rules: c.Rules,
		Kernel: c.Tried, Answer: o.Answer.String(), Port: o.Port(), TookMS: o.Took.Milliseconds()}
}

func (l Looked) countersOf(ctx context.Context, f iptables.Family,
	steps []iptables.Step) ([]iptables.Counter, error) {
	if l.recorded != nil {
		return l.recorded.countersOf(f, steps)
	}
	kernel, err := iptables.Open(ctx, iptables.Options{ReadOnly: true})
	if err != nil {
		return nil, err
	}
	return kernel.Counters(ctx, f, steps)
}

// behind asks Envoy for the routes and endpoints of the chains that may take a connection.
func (l Looked) behind(ctx context.Context, choice envoyadmin.Choice) (routes []envoyadmin.Routes,
	endpoints []envoyadmin.ClusterEndpoints, err error) {
	if l.recorded != nil {
		return behind(ctx, l.recorded, choice)
	}
	client, err := l.client()
	if err != nil {
		return nil, nil, err
	}
	defer client.Close()
	return behind(ctx, client, choice)
}

// client asks the Envoy that was looked at.
func (l Looked) client() (*envoyadmin.Client, error) {
	client, err := envoyadmin.New(l.Seen.Settings.EnvoyAdmin)
	if err == nil {
		client.Trust = trust(l.Seen.Settings.ProxyUser, new(atomic.Bool))
	}
	return client, err
}

// routesAndEndpoints are those of an Envoy: asked of its admin interface, or of a recording.
type routesAndEndpoints interface {
	Routes(ctx context.Context, name string) (routes envoyadmin.Routes, ok bool, err error)
	Endpoints(ctx context.Context, clusters ...string) ([]envoyadmin.ClusterEndpoints, error)
}

func behind(ctx context.Context, e routesAndEndpoints, choice envoyadmin.Choice) (
	routes []envoyadmin.Routes, endpoints []envoyadmin.ClusterEndpoints, err error) {
	var names, asked []string
	for _, one := range choice.Candidates {
		if one.Chain == nil {
			continue
		}
		clusters := one.Chain.Clusters()
		name := one.Chain.RouteConfig
		if one.Chain.HTTP && name != "" && !slices.Contains(asked, name) && len(asked) < maxRoutes {
			asked = append(asked, name)
			r, ok, err := e.Routes(ctx, name)
			if err != nil {
				return routes, nil, err
			}
			if ok {
				routes = append(routes, r)
				clusters = append(clusters, explain.ClustersOf(r)...)
			}
		}
		names = append(names, clusters[:min(len(clusters), explain.MaxClusters)]...)
	}
	slices.Sort(names)
	endpoints, err = e.Endpoints(ctx, slices.Compact(names)...)
	return routes, endpoints, err
}

// maxRoutes is for how many chains Envoy is asked for routes, each by a dump.
const maxRoutes = 3

// Caller is who makes a connection, by a name or number each; "" is an ordinary user, whom no rule
// knows, and the user's own group.
func (l Looked) Caller(name, group string) (uid, gid uint32, err error) {
	ids, groups := users.IDs, groupID
	if l.recorded != nil {
		ids, groups = l.recorded.userIDs, l.recorded.groupID
	}
	if name == "" {
		uid = l.ordinary()
		gid = uid
	} else if uid, gid, err = ids(name); err != nil {
		return 0, 0, fmt.Errorf("%w: --uid: %w", ErrSettings, err)
	}
	if group == "" {
		return uid, gid, nil
	}
	if gid, err = groups(group); err != nil {
		return 0, 0, fmt.Errorf("%w: --gid: %w", ErrSettings, err)
	}
	return uid, gid, nil
}

// groupID resolves a group to its number.
func groupID(group string) (uint32, error) {
	number := group
	if g, err := user.LookupGroup(group); err == nil {
		number = g.Gid
	}
	n, err := strconv.ParseUint(number, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("there is no group %q", group)
	}
	return uint32(n), nil
}

// ordinary is an id that no rule is about: nobody's, or one from 1000 on.
func (l Looked) ordinary() uint32 {
	known := []uint32{0, l.Seen.User.UID, l.Seen.User.GID}
	for _, f := range l.Want.Families {
		known = append(known, f.ResolverUIDs...)
	}
	id := uint32(65534)
	for next := uint32(1000); slices.Contains(known, id); next++ {
		id = next
	}
	return id
}
