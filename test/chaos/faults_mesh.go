package chaos

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"time"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
)

// intercepted is within what a service is intercepted after Envoy has taken it, and given up after
// Envoy has let it go.
const intercepted = 5 * time.Second

// drained is how soon Envoy cuts the streams of a listener or chain after it has the one that
// takes its place: its --drain-time-s, and what a look takes.
const drained = hotDrain/2 + time.Second

// change is what a push costs, in two parts.
type change struct {
	name string
	do   func(*controlplane.Config)
	// coming is excused from the push on until Envoy has it.
	coming []Excuse
	// standing is excused from the push on until Envoy has the one that takes it back.
	standing []Excuse
	// leaving is excused from the push that takes it back on, until Envoy has that.
	leaving []Excuse
}

func (w *World) change(c change) (end func() error, err error) {
	coming := w.openSpan(Span{Event: Event{Name: c.name + "-comes"}, Excuses: c.coming})
	standing := w.openSpan(Span{Event: Event{Name: c.name + "-stands"}, Excuses: c.standing})
	undo, err := w.EditConfig(c.do)
	if err != nil {
		return nil, err
	}
	w.endWhenTaken(coming)
	return func() error {
		leaving := w.openSpan(Span{Event: Event{Name: c.name + "-leaves"}, Excuses: c.leaving})
		err := undo()
		w.endWhenTaken(leaving)
		w.endWhenTaken(standing)
		return err
	}, nil
}

// addOnce adds services that are not there yet: of two faults that add the same one, the last that
// is over takes it away.
func addOnce(some []controlplane.Service) func(*controlplane.Config) {
	return func(c *controlplane.Config) {
		there := make(map[string]bool, len(c.Services))
		for _, s := range c.Services {
			there[s.Name] = true
		}
		c.Services = slices.Clip(c.Services)
		for _, s := range some {
			if !there[s.Name] {
				c.Services = append(c.Services, s)
			}
		}
	}
}

// guest is a service that comes and goes, and an address of it that is called.
type guest struct {
	controlplane.Service
	at []netip.AddrPort
}

func (g guest) whats() (all []string) {
	for _, a := range g.at {
		all = append(all, a.String())
	}
	return all
}

func guestOf(s controlplane.Service) guest {
	g := guest{Service: s}
	for _, p := range s.Prefixes {
		at := p.Addr()
		if !p.IsSingleIP() {
			at = at.Next()
		}
		g.at = append(g.at, netip.AddrPortFrom(at, 9000))
	}
	return g
}

// drawGuest draws a service of any kind: of one family or both, addresses or prefixes, HTTP or TCP,
// or of a port alone.
func drawGuest(random *rand.Rand) guest {
	n := random.IntN(200)
	s := Extra(10 + n)
	switch random.IntN(6) {
	case 0:
		s.Name = fmt.Sprintf("net%d", n)
		s.Prefixes = controlplane.VIPs(fmt.Sprintf("10.30.%d.0/24", n),
			fmt.Sprintf("fd30::%x:0/112", n))
	case 1:
		port := uint16(7100 + n)
		g := guest{Service: controlplane.Service{Name: fmt.Sprintf("port%d", n), Port: port,
			Cluster: "shared", Endpoints: Endpoints()}}
		g.at = []netip.AddrPort{
			netip.AddrPortFrom(netip.MustParseAddr("10.88.0.1"), port),
			netip.AddrPortFrom(netip.MustParseAddr("fd88::1"), port)}
		return g
	case 2:
		s.Name, s.Prefixes = s.Name+"four", s.Prefixes[:1]
	case 3:
		s.Name, s.Prefixes = s.Name+"six", s.Prefixes[1:]
	}
	if s.HTTP = random.IntN(3) == 0; s.HTTP { // of its own name: of its own match, too
		s.Name += "http"
		for i, p := range s.Prefixes {
			b := p.Addr().AsSlice()
			b[1] += 100
			a, _ := netip.AddrFromSlice(b)
			s.Prefixes[i] = netip.PrefixFrom(a, p.Bits())
		}
	}
	return guestOf(s)
}

// oneMatch leaves out guests of which another has the same addresses: Envoy refuses two chains with
// one match.
func oneMatch(all []guest) (some []guest) {
	seen := map[string]bool{}
	for _, g := range all {
		taken := seen[g.Name]
		for _, what := range g.whats() {
			taken = taken || seen[what]
		}
		if taken {
			continue
		}
		seen[g.Name] = true
		for _, what := range g.whats() {
			seen[what] = true
		}
		some = append(some, g)
	}
	return some
}

// visit makes connections to guests until the context ends, and notes what is not as with a service
// that was always there.
func (w *World) visit(ctx context.Context, random *rand.Rand, guests []guest) {
	for ctx.Err() == nil {
		g := guests[random.IntN(len(guests))]
		to := g.at[random.IntN(len(g.at))]
		o := Observation{Family: IPv6, From: time.Now(), What: to.String()}
		if to.Addr().Is4() {
			o.Family = IPv4
		}
		asking, cancel := context.WithTimeout(w.running, connectionLimit)
		reach, err := lab.HTTPProbe(asking, w.VM, AppUID, to)
		cancel()
		o.To = time.Now()
		switch {
		case ctx.Err() != nil: // it is taken back, and this may be why
		case err != nil:
			o.Kind, o.Text = Refused, err.Error()
			w.Observe(o)
		case reach.Escaped:
			o.Kind, o.Text = Escaped, fmt.Sprintf("%+v", reach)
			w.Observe(o)
		}
		sleep(ctx, 200*time.Millisecond)
	}
}

// addGuests adds services, and calls them while they are there.
func (w *World) addGuests(name string, random *rand.Rand, guests []guest, within time.Duration) (
	func() error, error) {
	services := make([]controlplane.Service, 0, len(guests))
	called := guests[:min(len(guests), 10)]
	var whats []string
	for _, g := range guests {
		services = append(services, g.Service)
		if len(g.Prefixes) == 0 {
			if err := w.answerAt(g.Port); err != nil {
				return nil, err
			}
		}
	}
	for _, g := range called {
		whats = append(whats, g.whats()...)
	}
	end, err := w.change(change{name: name, do: addOnce(services), coming: []Excuse{
		{Kind: Escaped, Only: whats, After: within}, {Kind: Refused, Only: whats, After: within}}})
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(w.running)
	w.Go(func(context.Context) { w.visit(ctx, random, called) })
	return func() error {
		stop() // what is under way is not noted, so that it need not be waited for
		return end()
	}, nil
}

// answerAt has somebody answer at a port of the addresses that guests of a port alone are called
// at: a connection that goes past Envoy is seen as that, and is no refused one.
func (w *World) answerAt(port uint16) error {
	if w.answered[port] {
		return nil
	}
	if w.answered == nil {
		w.answered = map[uint16]bool{}
	}
	w.answered[port] = true
	_, err := w.Echo(w.Service, port, lab.EchoOptions{Name: "escaped"})
	return err
}

func extras(first, n int) (all []guest) {
	for i := range n {
		all = append(all, guestOf(Extra(first+i)))
	}
	return all
}

// warm has the chains of some services ask for a route that no one sends.
func warm(l *listenerv3.Listener) error {
	for _, chain := range l.GetFilterChains() {
		if !strings.HasPrefix(chain.GetName(), "warm") {
			continue
		}
		packed := chain.GetFilters()[0].GetTypedConfig()
		manager := &hcmv3.HttpConnectionManager{}
		if err := packed.UnmarshalTo(manager); err != nil {
			return err
		}
		manager.GetRds().RouteConfigName = "absent-" + chain.GetName()
		again, err := anypb.New(manager)
		if err != nil {
			return err
		}
		packed.Value = again.GetValue()
	}
	return nil
}

// editListeners adds one to the changes of compiled listeners.
func editListeners(c *controlplane.Config, do func(*listenerv3.Listener)) {
	before := c.Edit
	c.Edit = func(l *listenerv3.Listener) {
		if before != nil {
			before(l)
		}
		do(l)
	}
}

// set replaces a service.
func set(c *controlplane.Config, name string, do func(*controlplane.Service)) {
	c.Services = slices.Clone(c.Services)
	for i := range c.Services {
		if c.Services[i].Name == name {
			do(&c.Services[i])
		}
	}
}

func whats(addresses ...netip.AddrPort) (all []string) {
	for _, a := range addresses {
		all = append(all, a.String())
	}
	return all
}

// meshFaults are the control plane's.
func meshFaults() []Fault {
	return slices.Concat(pushFaults(), shapeFaults(), reachFaults())
}

// pushFaults are services that come and go.
func pushFaults() []Fault {
	return []Fault{{
		Name: "push-add", Weight: 8, Shortest: 20 * time.Millisecond, Longest: 14 * time.Second,
		Begin: func(w *World, random *rand.Rand) (func() error, error) {
			var guests []guest
			for range 1 + random.IntN(4) {
				guests = append(guests, drawGuest(random))
			}
			return w.addGuests("push-add", random, oneMatch(guests), intercepted)
		},
	}, {
		Name: "push-many", Weight: 2, Shortest: 200 * time.Millisecond, Longest: 12 * time.Second,
		Begin: func(w *World, random *rand.Rand) (func() error, error) {
			return w.addGuests("push-many", random, extras(1000, 300+random.IntN(700)), intercepted)
		},
	}, {
		// What 10,000 chains cost Envoy's main thread has the agent ask more rarely (docs/scale.md).
		Name: "push-huge", Weight: 3, Group: "push-huge", Shortest: 5 * time.Second,
		Longest: 19 * time.Second, Unless: func(s Setting) bool { return !s.Huge },
		Begin: func(w *World, random *rand.Rand) (func() error, error) {
			return w.addGuests("push-huge", random, extras(3000, 10_000), 15*time.Second)
		},
		Heals: 10 * time.Second,
	}, {
		// What is no service any longer is reached directly.
		Name: "push-remove", Weight: 6, Shortest: 20 * time.Millisecond, Longest: 8 * time.Second,
		Begin: func(w *World, random *rand.Rand) (func() error, error) {
			gone := map[string]bool{}
			var whats []string
			for range 1 + random.IntN(6) {
				s := Extra(random.IntN(10))
				gone[s.Name] = true
				whats = append(whats, guestOf(s).whats()...)
			}
			return w.change(change{name: "push-remove",
				do: func(c *controlplane.Config) {
					c.Services = slices.DeleteFunc(slices.Clone(c.Services),
						func(s controlplane.Service) bool { return gone[s.Name] })
				},
				coming: []Excuse{{Kind: Refused, Only: whats, After: intercepted}},
				standing: []Excuse{{Kind: Escaped, Only: whats, After: intercepted},
					{Kind: Cut, Only: whats, After: drained}},
				leaving: []Excuse{{Kind: Refused, Only: whats, After: intercepted}},
			})
		},
	}, {
		// No service: all are reached directly, and intercepted again when they are back. Until the rules
		// have followed, connections are sent to a listener that is closed.
		Name: "push-empty", Weight: 2, Group: "push-empty", Shortest: 20 * time.Millisecond,
		Longest: 8 * time.Second,
		Begin: func(w *World, random *rand.Rand) (func() error, error) {
			all := random.IntN(2) == 0
			return w.change(change{name: "push-empty",
				do: func(c *controlplane.Config) {
					c.Services = nil
					if all {
						c.Inbound, c.DNS, c.Listeners, c.Passthrough = nil, nil, nil, false
					}
				},
				coming:   []Excuse{{Kind: Refused, After: intercepted}},
				standing: []Excuse{{Kind: Escaped, After: intercepted}, {Kind: Cut, After: drained}},
				leaving:  []Excuse{{Kind: Refused}},
			})
		},
	}, {
		// One listener is refused, and the good ones go on.
		Name: "push-reject", Weight: 4, Shortest: 100 * time.Millisecond, Longest: 10 * time.Second,
		Begin: func(w *World, random *rand.Rand) (func() error, error) {
			n := random.IntN(1000)
			name := fmt.Sprintf("refused-%d", n)
			return w.change(change{name: "push-reject", do: func(c *controlplane.Config) {
				if slices.ContainsFunc(c.Listeners, func(l *listenerv3.Listener) bool {
					return l.GetName() == name
				}) {
					return
				}
				c.Listeners = append(slices.Clip(c.Listeners),
					controlplane.RefusedListener(name, uint16(16000+n), "/nonexistent/access.log"))
			}})
		},
	}, {
		// A control plane that takes each refusal for a request.
		Name: "push-storm", Weight: 2, Group: "push-storm", Shortest: 300 * time.Millisecond,
		Longest: 4 * time.Second,
		Begin: func(w *World, _ *rand.Rand) (func() error, error) {
			w.CP.Storm(true)
			end, err := w.change(change{name: "push-storm", do: func(c *controlplane.Config) {
				c.Listeners = append(slices.Clip(c.Listeners), controlplane.RefusedListener(
					"refused-again-and-again", 15999, "/nonexistent/access.log"))
			}})
			if err != nil {
				return nil, err
			}
			return func() error {
				w.CP.Storm(false)
				return end()
			}, nil
		},
	}, {
		// Both listeners are refused: what Envoy has it keeps, and what is new has to wait.
		Name: "push-access-log", Weight: 2, Group: "push-access-log",
		Shortest: 100 * time.Millisecond, Longest: 8 * time.Second,
		Begin: func(w *World, _ *rand.Rand) (func() error, error) {
			// An Envoy that starts just then, by a reload as well, has nothing to keep: it refuses both, is
			// live without a listener, and the epoch before it drains (docs/units.md, "Reload without a
			// gap").
			none := []Excuse{{Kind: Refused, Away: true, After: time.Second}}
			if w.Setting.Bypass {
				none = append(none, Excuse{Kind: Escaped, Away: true, After: 5 * time.Second})
			}
			return w.change(change{name: "push-access-log", standing: none,
				do: func(c *controlplane.Config) { c.AccessLog = "/nonexistent/access.log" }})
		},
	}, {
		// A listener that waits for a route changes nothing until it has it, or 15 s are over.
		Name: "push-warming", Weight: 4, Shortest: 100 * time.Millisecond, Longest: 17 * time.Second,
		Begin: func(w *World, random *rand.Rand) (func() error, error) {
			n := random.IntN(200)
			s := controlplane.Service{Name: fmt.Sprintf("warm%d", n), Port: 81, HTTP: true,
				Endpoints: Endpoints(), Cluster: "shared",
				Prefixes: controlplane.VIPs(fmt.Sprintf("10.40.0.%d", n))}
			return w.change(change{name: "push-warming", do: func(c *controlplane.Config) {
				addOnce([]controlplane.Service{s})(c)
				editListeners(c, func(l *listenerv3.Listener) {
					if err := warm(l); err != nil {
						panic(err) // what it reads was compiled here
					}
				})
			}})
		},
	}, {
		// Two such would have names in common, which cannot be sent. A name with a line break in it is a
		// line of Envoy's log, as of a stream that ended, and is believed until that stands for longer
		// than Envoy would be silent if it did not (envoywatch's silence, up to 75 s).
		Name: "push-hostile", Weight: 4, Group: "push-hostile", Shortest: 200 * time.Millisecond,
		Longest: 10 * time.Second, Begin: pushHostile, Tells: 75 * time.Second,
	}}
}

// pushHostile is a control plane that somebody broke into. What it sends beside the services, which
// go on, is taken by Envoy or refused; listeners may move to other ports.
func pushHostile(w *World, random *rand.Rand) (func() error, error) {
	kinds := controlplane.HostileKinds()
	kind := kinds[random.IntN(len(kinds))]
	seed := random.Uint64()
	opts := controlplane.HostileOptions{Own: []netip.Addr{lab.VMAddr, lab.VMAddr6},
		Entries: 200 + random.IntN(2000), LongName: 1 << (8 + random.IntN(10))}
	w.Log("    %s, %d entries, %d bytes", kind, opts.Entries, opts.LongName)
	moves := []Excuse{{Kind: Refused, After: intercepted}}
	return w.change(change{name: "push-hostile", coming: moves, leaving: moves,
		do: func(c *controlplane.Config) {
			opts := opts
			opts.Sane = *c
			*c = controlplane.Hostile(kind, rand.New(rand.NewPCG(seed, 0)), opts)
		}})
}

// shapeFaults are the same services in other shapes.
func shapeFaults() []Fault {
	return []Fault{{
		// The rules take an address with all of its ports, and Envoy's chain takes another one now.
		Name: "push-port", Weight: 2, Group: "push-web", Shortest: 50 * time.Millisecond,
		Longest: 6 * time.Second,
		Begin: func(w *World, _ *rand.Rand) (func() error, error) {
			web := whats(Web4, Web6)
			return w.change(change{name: "push-port",
				do: func(c *controlplane.Config) {
					set(c, "web", func(s *controlplane.Service) { s.Port = 82 })
				},
				// Under intercept-all-outbound the default chain sends it where it was going.
				standing: []Excuse{{Kind: Refused, Only: web, After: time.Second},
					{Kind: Escaped, Only: web, After: time.Second}, {Kind: Cut, Only: web, After: drained}},
			})
		},
	}, {
		// A GET is answered by both.
		Name: "push-web-tcp", Weight: 2, Group: "push-web", Shortest: 50 * time.Millisecond,
		Longest: 6 * time.Second,
		Begin: func(w *World, _ *rand.Rand) (func() error, error) {
			return w.change(change{name: "push-web-tcp",
				do: func(c *controlplane.Config) {
					set(c, "web", func(s *controlplane.Service) { s.HTTP = false })
				},
				standing: []Excuse{{Kind: Cut, Only: whats(Web4, Web6), After: drained}},
			})
		},
	}, {
		// HTTP answers a line that is none with 400.
		Name: "push-db-http", Weight: 2, Group: "push-db", Shortest: 50 * time.Millisecond,
		Longest: 6 * time.Second,
		Begin: func(w *World, _ *rand.Rand) (func() error, error) {
			db := whats(DB4, DB6)
			return w.change(change{name: "push-db-http",
				do: func(c *controlplane.Config) {
					set(c, "db", func(s *controlplane.Service) { s.HTTP = true })
				},
				standing: []Excuse{{Kind: Refused, Only: db, After: time.Second},
					{Kind: Cut, Only: db, After: drained}},
			})
		},
	}, {
		// IPv6 services are only where Envoy listens by IPv6. While it changes its sockets it refuses.
		Name: "push-no-ipv6", Weight: 2, Group: "push-ipv6", Shortest: 50 * time.Millisecond,
		Longest: 8 * time.Second,
		Begin: func(w *World, _ *rand.Rand) (func() error, error) {
			return w.change(change{name: "push-no-ipv6",
				do: func(c *controlplane.Config) { c.IPv6 = controlplane.IPv6Off },
				// What waits in the backlog of a socket that Envoy closes is reset, by IPv4 as well: the
				// listener of both is made anew.
				coming: []Excuse{{Kind: Refused, Family: IPv6, After: intercepted},
					{Kind: Refused, After: time.Second}},
				standing: []Excuse{{Kind: Escaped, Family: IPv6, After: intercepted},
					{Kind: Cut, After: drained}},
				leaving: []Excuse{{Kind: Refused, After: time.Second}},
			})
		},
	}, {
		Name: "push-ipv6-shape", Weight: 2, Group: "push-ipv6", Shortest: 50 * time.Millisecond,
		Longest: 8 * time.Second,
		Begin: func(w *World, random *rand.Rand) (func() error, error) {
			shape := controlplane.IPv6DualStack
			if random.IntN(2) == 0 {
				shape = controlplane.IPv6Separate
			}
			// IPv6 services are intercepted where a listener that serves has an IPv6 address. Envoy takes
			// one away, and makes the other.
			refused := []Excuse{{Kind: Refused, After: time.Second},
				{Kind: Escaped, Family: IPv6, After: intercepted}}
			return w.change(change{name: "push-ipv6-shape",
				do:       func(c *controlplane.Config) { c.IPv6 = shape },
				standing: []Excuse{{Kind: Cut, After: drained}}, coming: refused, leaving: refused,
			})
		},
	}, {
		// A serving port goes directly to the application then. Until the rules have followed,
		// connections are sent to a listener that is closed.
		Name: "push-no-inbound", Weight: 3, Group: "push-inbound", Shortest: 50 * time.Millisecond,
		Longest: 6 * time.Second,
		Begin: func(w *World, random *rand.Rand) (func() error, error) {
			which := random.IntN(3) // 0: both families
			var served []string
			for i, a := range []netip.AddrPort{Served4, Served6} {
				if which == 0 || which == i+1 {
					served = append(served, a.String())
				}
			}
			return w.change(change{name: "push-no-inbound",
				do: func(c *controlplane.Config) {
					c.Inbound = slices.DeleteFunc(slices.Clone(c.Inbound),
						func(in controlplane.Inbound) bool {
							return slices.Contains(served, netip.AddrPortFrom(in.Addr, in.Port).String())
						})
				},
				coming: []Excuse{{Kind: Refused, Only: served, After: intercepted}},
				standing: []Excuse{{Kind: Escaped, Only: served, After: intercepted},
					{Kind: Cut, Only: served, After: drained}},
			})
		},
	}}
}

// ofControlPlane are the findings of a control plane that is not reached.
var ofControlPlane = []symptom.ID{symptom.ControlPlaneLookUp, symptom.ControlPlaneConnect,
	symptom.APINotEnabled, symptom.PermissionDenied, symptom.ConfigNotFound,
	symptom.ControlPlaneRefused}

// notYetOver says what the agent may still tell of a control plane that is there again. A stream
// that stands is in no log: only when the log has told of no other end for longer than Envoy's
// back-off after so many of them, the agent asks, each 15 s at most (envoywatch: silence,
// connectionEvery). And what an earlier run left is over once this one has lasted for 90 s, in
// which it would have been told again (agent: showLate).
func (w *World) notYetOver(s status.Status, now time.Time) func(id symptom.ID, finding bool) bool {
	const silence, showLate = 40 * time.Second, 100 * time.Second
	connected := w.CP.Connected()
	return func(id symptom.ID, finding bool) bool {
		return slices.Contains(ofControlPlane, id) && (now.Sub(connected) < silence ||
			!finding && now.Sub(s.Started) < showLate)
	}
}

// reachFaults are a control plane that is not there, or slow. Envoy goes on with what it has.
func reachFaults() []Fault {
	return []Fault{{
		Name: "mesh-away", Weight: 3, Shortest: 50 * time.Millisecond, Longest: 8 * time.Second,
		Begin: func(w *World, _ *rand.Rand) (func() error, error) {
			return w.controlPlaneAway(), nil
		},
	}, {
		Name: "mesh-pause", Weight: 3, Shortest: 50 * time.Millisecond, Longest: 8 * time.Second,
		Begin: func(w *World, _ *rand.Rand) (func() error, error) {
			return w.controlPlanePaused(), nil
		},
	}, {
		Name: "mesh-hang", Weight: 2, Group: "mesh-mode", Shortest: 50 * time.Millisecond,
		Longest: 8 * time.Second,
		Begin: func(w *World, _ *rand.Rand) (func() error, error) {
			w.CP.Hang()
			return func() error { w.CP.Serve(); return nil }, nil
		},
	}, {
		Name: "mesh-refuse", Weight: 3, Group: "mesh-mode", Shortest: 50 * time.Millisecond,
		Longest: 5 * time.Second,
		Begin: func(w *World, random *rand.Rand) (func() error, error) {
			switch random.IntN(5) {
			case 0:
				w.CP.RefuseNotFound("default", "123456789012")
			case 1:
				w.CP.RefuseUnknownEntity()
			case 2:
				w.CP.RefusePermission()
			case 3:
				w.CP.RefuseDisabled("123456789012")
			default:
				w.CP.Refuse(codes.Unavailable, "try again")
			}
			return func() error { w.CP.Serve(); return nil }, nil
		},
	}, {
		// What it sends takes its time, and comes in bursts.
		Name: "mesh-slow", Weight: 3, Shortest: time.Second, Longest: 10 * time.Second,
		Begin: func(w *World, random *rand.Rand) (func() error, error) {
			still := time.Duration(100+random.IntN(900)) * time.Millisecond
			awake := time.Duration(2+random.IntN(30)) * time.Millisecond
			return background(func(ctx context.Context) {
				for ctx.Err() == nil {
					end := w.controlPlanePaused()
					sleep(ctx, still)
					_ = end() // it returns none
					sleep(ctx, awake)
				}
			}), nil
		},
	}}
}
