package reconcile

import (
	"context"
	"net/netip"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// Flows deletes connection-tracking entries that keep new rules from taking effect: package
// internal/conntrack, whose functions have these names with Delete before them.
type Flows struct {
	// HalfOpen deletes the connections to these prefixes that are not answered yet. It is called
	// beside the passes, once at a time for each family.
	HalfOpen func(ctx context.Context, to []netip.Prefix) (int, error)
	// UDP deletes all exchanges with the port.
	UDP func(ctx context.Context, port uint16) (int, error)
	// LateUDP deletes those that an answer began.
	LateUDP func(ctx context.Context, port uint16) (int, error)
}

// conntrackLimit bounds the walk through conntrack's table, which can hold a million entries.
const conntrackLimit = time.Second

// answersLate is how long a question that was asked before its path changed may still be answered,
// and bring the old path back with that (conntrack.DeleteLateUDP): a resolver's customary time-out
// is 5 s (resolv.conf(5)). See docs/design/facts.md#udp-keeps-its-path.
const answersLate = 6 * time.Second

// dnsQuestions is the port that DNS questions go to.
const dnsQuestions = 53

// redirected is what connections are redirected now, as far as conntrack's entries matter.
type redirected struct {
	services []netip.Prefix
	dns      uint16
}

// paths remembers which entries are still to be deleted: those that would keep what the rules have
// just taken over on its old path.
type paths struct {
	family iptables.Family
	flows  Flows
	log    *zap.Logger

	now       redirected
	late      []time.Time // when the entries of late DNS answers are deleted
	questions bool        // those of DNS questions on the old path are still to be deleted
	removed   Removed     // in this pass

	added  []netip.Prefix    // those to whose half-open connections nobody looked yet
	walk   chan walked       // of the walk that goes on; nil: none does
	beside func(walk func()) // runs a walk; go, but for tests
}

func newPaths(f iptables.Family, flows Flows, log *zap.Logger) paths {
	return paths{family: f, flows: flows, log: log, beside: func(walk func()) { go walk() }}
}

// walked is what came of a walk for half-open connections.
type walked struct {
	deleted int
	err     error
}

// Removed counts conntrack entries that were deleted, so that new rules hold for them.
type Removed struct{ HalfOpen, DNS int }

// taken is what was removed since it was last asked.
func (p *paths) taken() Removed {
	p.takeWalk()
	removed := p.removed
	p.removed = Removed{}
	return removed
}

// adopted notes that an earlier run redirects DNS questions: it may have had no time for late
// answers.
func (p *paths) adopted(now time.Time) { p.late = []time.Time{now.Add(answersLate)} }

// pass does what is due.
func (p *paths) pass(ctx context.Context, now time.Time) {
	p.forgetHalfOpen(ctx)
	if len(p.late) > 0 && !now.Before(p.late[0]) {
		p.late = p.late[1:]
		p.forgetQuestions(ctx)
	}
}

// changed deletes what the rules have just taken over: connections to new services that are not
// answered yet, and DNS questions that always come from one port.
func (p *paths) changed(ctx context.Context, now time.Time, is redirected) {
	was := p.now
	p.now = is
	if is.dns != was.dns {
		p.questions = true
		p.forgetQuestions(ctx)
		p.late = []time.Time{now.Add(time.Second), now.Add(answersLate)}
	}
	p.added = append(p.added, missing(is.services, was.services)...)
	p.forgetHalfOpen(ctx)
}

// undone notes what rules that were not as wanted let go its old way: the repair takes that over,
// as if it had just come.
func (p *paths) undone(drift []iptables.Drift) {
	for _, d := range drift {
		if !d.LetsBy() {
			continue
		}
		p.now.services = nil
		if d.OfDNS() {
			p.now.dns = 0
		}
	}
}

// forgetHalfOpen begins a walk for the prefixes that came since the last one did. It goes on beside
// the passes: it takes the kernel 15 ms also where its table is empty, a second where that is full,
// and the other family's rules and the next change would wait for it. The connections can wait:
// their programs send the next SYN after a second.
// See docs/design/facts.md#conntrack-walk-takes-time.
func (p *paths) forgetHalfOpen(ctx context.Context) {
	if p.takeWalk(); p.walk != nil || len(p.added) == 0 {
		return
	}
	added, ended := p.added, make(chan walked, 1)
	p.added, p.walk = nil, ended
	ctx = context.WithoutCancel(ctx) // that of a pass ends with it
	p.beside(func() {
		ctx, cancel := context.WithTimeout(ctx, conntrackLimit)
		defer cancel()
		n, err := p.flows.HalfOpen(ctx, added)
		ended <- walked{n, err}
	})
}

// takeWalk takes what came of a walk, if it has ended.
func (p *paths) takeWalk() {
	select {
	case w := <-p.walk:
		p.walk = nil
		p.removed.HalfOpen += w.deleted
		if w.err != nil {
			p.log.Debug("half-open connections keep their path", zap.Error(w.err))
		} else if w.deleted > 0 {
			p.log.Info("half-open connections begin anew through Envoy",
				zap.Stringer("family", p.family), zap.Int("connections", w.deleted))
		}
	default:
	}
}

// forgetQuestions deletes the entries of all DNS questions, and once that is done only those that
// late answers make: a question that was asked since needs its own.
func (p *paths) forgetQuestions(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, conntrackLimit)
	defer cancel()
	forget := p.flows.LateUDP
	if p.questions {
		forget = p.flows.UDP
	}
	n, err := forget(ctx, dnsQuestions)
	p.removed.DNS += n
	if err != nil {
		p.log.Debug("DNS questions from a fixed port keep their path", zap.Error(err))
		return
	}
	p.questions = false
}

// missing are the prefixes of all, sorted, that are not in known, sorted.
func missing(all, known []netip.Prefix) (some []netip.Prefix) {
	for _, p := range all {
		for len(known) > 0 && known[0].Compare(p) < 0 {
			known = known[1:]
		}
		if len(known) == 0 || known[0] != p {
			some = append(some, p)
		}
	}
	return some
}
