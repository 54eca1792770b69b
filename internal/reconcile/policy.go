package reconcile

import (
	"errors"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// The policies of one family. Each is a value that is told the time and asks nobody.

// WhenEnvoyDown is what happens to the jumps when an Envoy that was ready stops accepting
// (--when-envoy-down).
type WhenEnvoyDown string

const (
	// Keep leaves the rules: connections to services are refused until Envoy is back, none goes
	// around it.
	Keep WhenEnvoyDown = "keep"
	// Bypass takes the jumps out after failed looks (bypassAfter, bypassTime): connections go to
	// the raw addresses until Envoy is back.
	Bypass WhenEnvoyDown = "bypass"
)

// bypassAfter and bypassTime are how many looks in a row must find the port closed, and over how
// long: a look can fall into the 0.3 s of Envoy's start, and events of others can cause many looks
// within milliseconds.
const (
	bypassAfter = 3
	bypassTime  = 2 * time.Second
)

// gate is the Hold policy of one interception port: its jump goes in only once the proxy accepts
// there.
type gate struct {
	open bool
	// denied: closed for a reason: somebody else's socket, or a planned stop. A jump that an
	// earlier run left does not open it.
	denied bool
	failed int       // looks in a row that found nobody listening
	since  time.Time // the first of these
}

// accepts says whether the last look found the proxy accepting.
func (g gate) accepts() bool { return g.open && g.failed == 0 }

// next is the gate after one more look at the port, at this time. A port held by another user than
// the proxy's closes it at once: with the jump in, that user would be handed every connection. A
// planned stop (Envoy drains) closes it too.
func (g gate) next(
	now time.Time, p symptom.Port, proxyUID uint32, draining bool, policy WhenEnvoyDown,
) gate {
	switch {
	case p.Err != nil:
		return g // could not look: no news
	case p.Listening && p.Owner != proxyUID, draining:
		return gate{denied: true}
	case p.Listening:
		return gate{open: true}
	case !g.open:
		return g
	}
	if g.failed++; g.failed == 1 {
		g.since = now
	}
	if policy == Bypass && g.failed >= bypassAfter && now.Sub(g.since) >= bypassTime {
		return gate{denied: true}
	}
	return g
}

// adopted is the gate of a port that rules of an earlier run of this boot lead to: it was seen
// ready then. Until the port is known to be somebody else's or closed for good, that stands.
func (g gate) adopted(port uint16) gate {
	g.open = g.open || port != 0 && !g.denied
	return g
}

// Back-off of repairs: fewer than backOffBurst within backOffWindow are made at once, then one
// per a delay that doubles from backOffFirst to backOffLast. Where drift is found by
// polling, the window must hold backOffBurst polls. backOffOver without drift ends it. So a
// program that deletes our jump every 100 ms meets less than one write a second, and the VM is
// put right within seconds of its end.
const (
	backOffBurst  = 5
	backOffWindow = 8 * time.Second
	backOffFirst  = 1500 * time.Millisecond
	backOffLast   = 6 * time.Second
	backOffOver   = 20 * time.Second
)

// backOff counts repairs of drift in one family, and spaces them while somebody keeps undoing them.
type backOff struct {
	recent []time.Time // repairs within backOffWindow, newest last; at most backOffBurst
	delay  time.Duration
	last   time.Time // of the last repair or the last drift seen
	undone int
	until  time.Time // no repair before
}

// mayRepair says whether drift found now is repaired now.
func (b *backOff) mayRepair(now time.Time) bool {
	b.last = now
	return !now.Before(b.until)
}

// repaired notes a repair.
func (b *backOff) repaired(now time.Time) {
	b.undone++
	b.last = now
	if b.delay == 0 {
		for len(b.recent) > 0 && now.Sub(b.recent[0]) > backOffWindow {
			b.recent = b.recent[1:]
		}
		b.recent = append(b.recent, now)
		if len(b.recent) < backOffBurst {
			return
		}
		b.delay = backOffFirst
	} else {
		b.delay = min(b.delay*2, backOffLast)
	}
	b.until = now.Add(b.delay)
}

// pass ends the back-off once nothing was undone for backOffOver.
func (b *backOff) pass(now time.Time) {
	if b.undone > 0 && now.Sub(b.last) > max(backOffOver, 2*b.delay) {
		*b = backOff{}
	}
}

// on says whether repairs are spaced now.
func (b *backOff) on() bool { return b.delay > 0 }

// retryFirst and retryLast are the first and the longest pause after a failed read or write.
const (
	retryFirst = time.Second
	retryLast  = 30 * time.Second
)

// retry is how the last read or write failed, and when the next is tried.
type retry struct {
	err   error // nil: it did not
	delay time.Duration
	at    time.Time
}

// failed is the retry after one more failure.
func (r retry) failed(now time.Time, err error) retry {
	delay := min(max(2*r.delay, retryFirst), retryLast)
	return retry{err: err, delay: delay, at: now.Add(delay)}
}

// news says whether the error is another one than the last.
func (r retry) news(err error) bool { return r.err == nil || r.err.Error() != err.Error() }

// retryUnusable is how often a family that cannot be used is tried again.
const retryUnusable = time.Minute

// usability says whether the family can be used at all.
type usability struct {
	why  error     // why not
	when time.Time // when that was found out; zero: not yet
}

// due says whether it must be found out: at the start, and of a family that was unusable now and
// then.
func (u usability) due(now time.Time) bool {
	return u.when.IsZero() || u.why != nil && now.Sub(u.when) > retryUnusable
}

const (
	// settle is how long connections that are older than the first NAT rule are let through
	// unchanged: conntrack starts with the first NAT rule and takes them for new. Idle ones past it
	// are reset when they speak again. See docs/design/facts.md#conntrack-starts-with-nat.
	settle = 5 * time.Minute
	// retryLeft is how often a rule that the kernel refused is offered again.
	retryLeft = 5 * time.Minute
)

// shape is what a family's compiled ruleset is made of; when it is the same, so is the ruleset.
type shape struct {
	serial                        uint64 // of the want
	jumps, inbound, dns, settling bool
}

// shapeOf is the shape that a want, the gates and the time ask for. The jumps wait for the port
// that most goes through: outbound, or else inbound, or else DNS.
func shapeOf(want iptables.Interception, serial uint64, g *gates, settling bool) shape {
	s := shape{
		serial: serial, jumps: g.outbound.open, inbound: g.inbound.open, dns: g.dns.open,
		settling: settling,
	}
	switch {
	case want.OutboundPort != 0:
	case want.InboundPort != 0:
		s.jumps = g.inbound.open
	case want.DNSPort != 0:
		s.jumps = g.dns.open
	}
	return s
}

// ruleset compiles the want in this shape.
func (s shape) ruleset(want iptables.Interception) iptables.Ruleset {
	want.Jumps, want.Settling = s.jumps, s.settling
	// Inbound waits for its own port. With the outbound jump out as well (bypass, a planned stop)
	// the rows stay: only jumps are taken, so that ours do not stop being the NAT rules that keep
	// conntrack on. Without any NAT rule it would see no reply of a redirected stream.
	// See docs/design/facts.md#last-rule-turns-nat-off.
	if !s.inbound && s.jumps {
		want.InboundPort = 0
	}
	if !s.dns && s.jumps {
		want.DNSPort = 0
	}
	return want.Ruleset()
}

// mustLeave says whether rules that an earlier run left must not intercept while Envoy has not told
// its listeners: a gate of a port that they lead to is closed.
func mustLeave(ours iptables.Ruleset, g *gates) bool {
	outbound, inbound, dns := ours.Ports()
	return ours.Intercepting() && (outbound != 0 && !g.outbound.open ||
		inbound != 0 && !g.inbound.open || dns != 0 && !g.dns.open)
}

const (
	// resync is how often the rules are read although nothing told of a change: a lost notification
	// costs this long.
	resync = 5 * time.Minute
	// unwatchedPoll is the same where nobody is told of changes: no notifications of nft's, or no
	// answer of the kernel's on legacy.
	unwatchedPoll = 1500 * time.Millisecond
	// readShare bounds what reads take under a storm of other programs' changes: one part of the time
	// to readShare parts of rest. readBurst of it is saved up in calm, so that a few changes in a row
	// (one repair, and at once another drift) each are read at once. A read counts longestRead at
	// most. One that takes longer was held up, by a machine that stood still or a lock, and has not
	// cost that: 10,000 rules are read in a tenth of a second.
	readShare   = 5
	readBurst   = time.Second
	longestRead = 400 * time.Millisecond
)

// readBudget is what reads may take. It may be overdrawn: by one read.
type readBudget struct {
	spent time.Duration // more than was saved up, at that time
	at    time.Time
}

// left is what is saved up; negative: owed.
func (b readBudget) left(now time.Time) time.Duration {
	if b.at.IsZero() {
		return readBurst
	}
	return min(readBurst, max(0, now.Sub(b.at))/(1+readShare)-b.spent)
}

// took notes a read that began at a time.
func (b *readBudget) took(began time.Time, took time.Duration) {
	*b = readBudget{min(took, longestRead) - b.left(began), began}
}

// due is in how long there is something left; 0: now.
func (b readBudget) due(now time.Time) time.Duration {
	return max(0, -b.left(now)*(1+readShare))
}

// pollInterval is how often the rules are read though nothing told of a change.
func pollInterval(watched bool) time.Duration {
	if !watched {
		return unwatchedPoll
	}
	return resync
}

// outcome is the word of the applies metric.
func outcome(result iptables.Result, err error) string {
	var refused *iptables.RefusedError
	switch {
	case errors.As(err, &refused), len(result.Left) > 0:
		return "refused"
	case err == nil:
		return "applied"
	case errors.Is(err, iptables.ErrLocked):
		return "locked"
	}
	return "failed"
}
