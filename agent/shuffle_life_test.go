package agent

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/envoywatch"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/internal/reconcile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/report"
	"github.com/service-proxy-agent/service-proxy-agent/internal/sockdiag"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// life is one run of the agent, from its start: its loop and its watch of Envoy, without the
// goroutines and channels between them, whose part the world plays.
type life struct {
	loop   *loop
	watch  *envoywatch.Watch
	status status.Status // of the last pass
}

func newLife(w *world, k *iptables.Kernel) *life {
	l := &life{watch: envoywatch.New(envoywatch.Options{Admin: &w.envoy, Now: w.nat.now})}
	log := zap.NewNop()
	l.loop = &loop{
		settings: Settings{
			EnvoyAdmin: "127.0.0.1:15000", ProxyUser: "envoy", WhenEnvoyDown: w.policy,
		},
		log:       log,
		vm:        w.vm(k),
		inbox:     inbox{events: make(chan iptables.Event)}, // not nil: the kernel tells of changes
		attribute: attributeInForce{Config: attribute.Default()},
		mark:      w.mark,
		stops:     stops{brake: w.brake},
		told: told{log: log, reporters: reporters{
			events:      func(report.Event) {},
			metrics:     func(status.Status, report.Pass) {},
			status:      func(s status.Status) { l.status = s },
			intercepted: func(intercepted) {},
			history:     func(Failures) {},
			transitions: func([]status.Transition) {},
			ready:       func() error { return nil },
		}},
	}
	l.loop.user = proxyIDs(l.loop.settings.ProxyUser, l.loop.vm.userIDs)
	if !w.notified {
		l.loop.inbox.events = nil
	}
	none := func(context.Context, uint16) (int, error) { return 0, nil }
	flows := reconcile.Flows{
		HalfOpen: func(context.Context, []netip.Prefix) (int, error) { return 0, nil },
		UDP:      none, LateUDP: none,
	}
	for _, f := range bothFamilies {
		family := reconcile.New(f, markingKernel{k, w.mark}, flows, log)
		l.loop.families = append(l.loop.families, family)
	}
	return l
}

// vm is the world as the loop can ask it.
func (w *world) vm(k *iptables.Kernel) vm {
	listeners := func(port uint16) (all []sockdiag.Listener, err error) {
		for side, p := range portOf {
			if p != port {
				continue
			}
			for i, any := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
				if uid, anybody := w.owner(bothFamilies[i], side); anybody {
					addr := netip.AddrPortFrom(any, port)
					all = append(all, sockdiag.Listener{Addr: addr, V6Only: true, UID: uid})
				}
			}
		}
		return all, nil
	}
	v := quietVM(k, listeners)
	v.addrs = func() ([]netip.Addr, error) {
		if w.local.IsValid() {
			return []netip.Addr{w.local}, nil
		}
		return nil, nil
	}
	v.userIDs = func(string) (uint32, uint32, error) {
		if w.noUser {
			return 0, 0, errors.New("no such user")
		}
		return proxyUID, proxyGID, nil
	}
	return v
}

// quietVM has a kernel, ports and the proxy's user, and nothing else to tell.
func quietVM(k *iptables.Kernel, listeners func(uint16) ([]sockdiag.Listener, error)) vm {
	return vm{
		addrs:      func() ([]netip.Addr, error) { return nil, nil },
		userIDs:    func(string) (uint32, uint32, error) { return proxyUID, proxyGID, nil },
		userName:   func(uint32) string { return "" },
		tcp:        listeners,
		udp:        listeners,
		progress:   func() (progress.State, error) { return progress.State{}, nil },
		self:       func(time.Time) Self { return Self{} },
		guestOff:   func() bool { return false },
		listenErr:  func() error { return nil },
		metricsErr: func() error { return nil },
		backend:    k.Backend,
		request:    func(string) error { return nil },
	}
}

// finding says whether the agent tells of a symptom.
func (w *world) finding(id symptom.ID) bool {
	return slices.ContainsFunc(w.life.status.Findings, func(f symptom.Finding) bool {
		return f.ID == id
	})
}
