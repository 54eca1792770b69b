package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/user"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/explain"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/internal/try"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// Explain answers a question by what a look has seen. It asks the kernel for the counters on the
// way, and Envoy for what is behind the chain that takes the connection.
func (l Looked) Explain(ctx context.Context, q explain.Question) explain.Answer {
	ctx, cancel := context.WithTimeout(ctx, explainLimit)
	defer cancel()
	s := l.seen(q)
	s.Source, s.Local, s.NoRoute = routeTo(ctx, q.To)
	if s.HaveErr == nil {
		if q.Try && s.NoRoute == nil {
			s.Tried, s.Have = tried(ctx, q, s)
		}
		steps, verdict := q.Path(s)
		s.Counters, s.CountErr = countersOf(ctx, q.Family(), steps)
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
	}
	return s
}

// routeTo asks the kernel for the way to an address, by a UDP socket that sends nothing.
func routeTo(ctx context.Context, to netip.AddrPort) (source netip.Addr, local bool, err error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "udp", to.String())
	switch {
	case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EHOSTUNREACH):
		var failed *net.OpError
		if errors.As(err, &failed) {
			err = failed.Err
		}
		return source, false, err
	case err != nil:
		return source, false, nil // as for a broadcast address: it says nothing of the way
	}
	defer conn.Close()
	if from, ok := conn.LocalAddr().(*net.UDPAddr); ok {
		source = from.AddrPort().Addr().Unmap()
	}
	// The source of what goes to an address of this machine is that address; but for 127.0.0.0/8,
	// whose route names one.
	return source, source == to.Addr().WithZone("") || to.Addr().IsLoopback(), nil
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

func countersOf(ctx context.Context, f iptables.Family,
	steps []iptables.Step) ([]iptables.Counter, error) {
	kernel, err := iptables.Open(ctx, iptables.Options{ReadOnly: true})
	if err != nil {
		return nil, err
	}
	return kernel.Counters(ctx, f, steps)
}

// behind asks Envoy for the routes and endpoints of the chains that may take a connection.
func (l Looked) behind(ctx context.Context, choice envoyadmin.Choice) (routes []envoyadmin.Routes,
	endpoints []envoyadmin.ClusterEndpoints, err error) {
	client, err := envoyadmin.New(l.Seen.Settings.EnvoyAdmin)
	if err != nil {
		return nil, nil, err
	}
	defer client.Close()
	client.Trust = trust(l.Seen.Settings.ProxyUser, new(atomic.Bool))
	var names, asked []string
	for _, one := range choice.Candidates {
		if one.Chain == nil {
			continue
		}
		clusters := one.Chain.Clusters()
		name := one.Chain.RouteConfig
		if one.Chain.HTTP && name != "" && !slices.Contains(asked, name) && len(asked) < maxRoutes {
			asked = append(asked, name)
			r, ok, err := client.Routes(ctx, name)
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
	endpoints, err = client.Endpoints(ctx, slices.Compact(names)...)
	return routes, endpoints, err
}

// maxRoutes is for how many chains Envoy is asked for routes, each by a dump.
const maxRoutes = 3

// Caller is who makes a connection, by a name or number each; "" is an ordinary user, whom no rule
// knows, and the user's own group.
func (l Looked) Caller(name, group string) (uid, gid uint32, err error) {
	if name == "" {
		uid = l.ordinary()
		gid = uid
	} else if uid, gid, err = userIDs(name); err != nil {
		return 0, 0, fmt.Errorf("%w: --uid: %w", ErrSettings, err)
	}
	if group == "" {
		return uid, gid, nil
	}
	if g, err := user.LookupGroup(group); err == nil {
		group = g.Gid
	}
	n, err := strconv.ParseUint(group, 10, 32)
	if err != nil {
		return 0, 0, fmt.Errorf("%w: --gid: there is no group %q", ErrSettings, group)
	}
	return uid, uint32(n), nil
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
