package chaos

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
)

// strangerGets is how long a stranger on Envoy's port may get connections: the agent looks at its
// owner each second, and takes the jump out at once.
const strangerGets = 1100 * time.Millisecond

// portFaults are a stranger's, who waits for Envoy's end.
func portFaults() []Fault {
	return []Fault{{
		Name: "port-stranger", Weight: 3, Group: "envoy", Shortest: 100 * time.Millisecond,
		Longest: 6 * time.Second,
		Begin: func(w *World, random *rand.Rand) (func() error, error) {
			return w.strangerComes(random), nil
		},
		Excuses:   []Excuse{{Kind: Cut}}, // a stream through Envoy ends with it
		EnvoyAway: true, Heals: 3 * time.Second,
	}}
}

// stranger is a user's program on some of Envoy's ports.
type stranger struct {
	w         *World
	mu        sync.Mutex
	listeners []net.Listener
	open      []*Span // what goes past Envoy because of it
}

// places are where it may sit: where redirects lead to, and where the admin interface is.
func places() []netip.AddrPort {
	all4, all6 := netip.IPv4Unspecified(), netip.IPv6Unspecified()
	four, six := netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()
	return []netip.AddrPort{
		netip.AddrPortFrom(four, 15001), netip.AddrPortFrom(six, 15001),
		netip.AddrPortFrom(all4, 15001), netip.AddrPortFrom(all6, 15001),
		netip.AddrPortFrom(lab.VMAddr, 15006), netip.AddrPortFrom(lab.VMAddr6, 15006),
		netip.AddrPortFrom(all4, 15006), netip.AddrPortFrom(all6, 15006),
		netip.AddrPortFrom(four, 15000),
	}
}

// strangerComes ends Envoy, and a stranger takes some of its ports, at once or a little later.
func (w *World) strangerComes(random *rand.Rand) (end func() error) {
	s := &stranger{w: w}
	var some []netip.AddrPort
	for _, at := range places() {
		if random.IntN(3) == 0 {
			some = append(some, at)
		}
	}
	if len(some) == 0 {
		some = places()[:1]
	}
	late := time.Duration(random.IntN(2)*random.IntN(1500)) * time.Millisecond
	// The unit starts Envoy while the port is another's: it does not get its listeners then, and is
	// started once more when the port is free.
	starts := random.IntN(3) == 0
	away := w.withoutEnvoy("port-stranger-away")
	w.endEnvoy(true)
	stop := background(func(ctx context.Context) {
		if !sleep(ctx, late) {
			return
		}
		for _, at := range some {
			s.listen(at)
		}
		if starts && sleep(ctx, time.Second) {
			if err := w.runEnvoy(); err != nil {
				w.Log("    port-stranger: %v", err)
			}
		}
	})
	return func() error {
		stop()
		if starts {
			w.endEnvoy(true)
		}
		s.goes()
		w.endWhenTaken(away)
		for _, open := range s.open {
			w.endWhenTaken(open)
		}
		return w.runEnvoy()
	}
}

// listen takes a place, if it is free.
func (s *stranger) listen(at netip.AddrPort) {
	network := "tcp4"
	family := IPv4
	if at.Addr().Is6() {
		network, family = "tcp6", IPv6
	}
	ln, err := s.w.VM.ListenAs(StrangerUID, network, at.String())
	if err != nil {
		if !errors.Is(err, syscall.EADDRINUSE) {
			s.w.Log("    port-stranger: %v", err)
		}
		return
	}
	now := time.Now()
	s.w.Log("    uid %d listens on %s", StrangerUID, at)
	s.w.Excuse(Span{Event: Event{Name: "port-stranger " + at.String()}, Begin: now, End: now,
		Excuses: []Excuse{{Kind: Captured, Family: family, Only: []string{at.String()},
			After: strangerGets}}})
	s.mu.Lock()
	s.listeners = append(s.listeners, ln)
	// The jump to a foreign owner goes, and comes when Envoy has told its listeners on a port of its
	// own. Nothing is redirected to the admin interface.
	if past := (Excuse{Kind: Escaped, Family: family, After: 5 * time.Second}); at.Port() != 15000 {
		if at.Port() == 15006 {
			past.Only = whats(Served4, Served6)
		}
		s.open = append(s.open, s.w.openSpan(Span{Event: Event{Name: "port-stranger-open"},
			Excuses: []Excuse{past}}))
	}
	s.mu.Unlock()
	go s.accept(ln, at, family)
}

// accept counts whom it gets. It says nothing, and hangs up.
func (s *stranger) accept(ln net.Listener, at netip.AddrPort, family Family) {
	for {
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		now := time.Now()
		from, _ := netip.ParseAddrPort(conn.RemoteAddr().String())
		conn.Close()
		// Whoever comes from loopback looks whether somebody accepts there, as the agent does, or asks
		// Envoy's admin interface: nobody redirected that.
		if from.Addr().Unmap().IsLoopback() || at.Port() == 15000 {
			continue
		}
		s.w.Observe(Observation{Kind: Captured, Family: family, From: now, To: now, What: at.String(),
			Text: "a connection of " + from.String()})
	}
}

func (s *stranger) goes() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, ln := range s.listeners {
		ln.Close()
	}
	s.listeners = nil
}
