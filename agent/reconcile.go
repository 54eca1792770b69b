package agent

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/internal/conntrack"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// compiledKey is what a family's compiled ruleset was made of; when it is the same, so is the ruleset.
type compiledKey struct {
	serial                        uint64 // of the Want
	jumps, inbound, dns, settling bool
}

// familyState is what the loop knows of one family between passes.
type familyState struct {
	family   iptables.Family
	unusable error
	probed   time.Time // when an unusable family was last tried

	outboundPort, inboundPort, dnsPort uint16
	outbound, inbound, dns             gate

	key      compiledKey
	want     iptables.Ruleset // of key
	target   iptables.Ruleset // want, or what the kernel takes of it
	services []netip.Prefix   // of the want
	ports    int

	have       iptables.Table // as last read
	haveKnown  bool
	adopted    bool // the kernel was looked at once
	written    bool // it once had what this run wants: from then on a difference is drift
	dirty      bool // something says that it may differ from have
	touched    []string
	touchedAll bool

	readAt    time.Time
	readTook  time.Duration
	readEnded time.Time
	retryAt   time.Time // after a failure
	retry     time.Duration
	fight     fight
	settling  time.Time // until when older connections are let through

	equal     bool
	jumpsIn   bool // when last equal
	err       error
	drift     []iptables.Drift // last seen; kept for showDrift after its repair
	driftAt   time.Time
	driftBy   string
	by        string // who the kernel says wrote last
	left      []iptables.RefusedError
	leftAt    time.Time
	installed installed
	forgetDNS []time.Time // when the entries of late DNS answers are deleted
	questions bool        // those of DNS questions on the old path are still to be deleted
	applied   time.Time
	applies   map[string]int // of this pass, by outcome
	rows      int            // written in this pass
}

// installed is what connections are redirected now, as far as conntrack's entries matter.
type installed struct {
	services []netip.Prefix
	dns      uint16
}

// showDrift is how long a repaired drift stays among the findings, so that a look by hand finds it.
const showDrift = time.Minute

// reconcile brings one family's rules to want. It does nothing, and costs nothing, unless something tells that the
// kernel may differ: a notification, a new want, a failure to mend, or on legacy the clock.
func (a *Agent) reconcile(ctx context.Context, now time.Time, s *familyState, want iptables.Interception, known bool) (wake time.Duration) {
	s.applies, s.rows = map[string]int{}, 0
	if now.Sub(s.driftAt) > showDrift && !s.fight.on() {
		s.drift, s.driftBy = nil, ""
	}
	s.fight.calm(now)
	if a.paused {
		s.equal, s.jumpsIn = false, false // cleanup took everything out
		return tick
	}
	if !a.usable(ctx, now, s) {
		return tick
	}
	if len(s.forgetDNS) > 0 && !now.Before(s.forgetDNS[0]) {
		s.forgetDNS = s.forgetDNS[1:]
		a.forgetQuestions(ctx, s)
	}
	if !s.adopted {
		if wait := s.retryAt.Sub(now); wait > 0 {
			return wait
		}
		if err := a.adopt(ctx, now, s); err != nil {
			return a.failed(ctx, now, s, err)
		}
		return 0 // the gates look first where these rules lead
	}
	changed := false
	if known {
		changed = s.compile(want, a.wantSerial, now)
	} else {
		changed = s.mustLeave() // else they stay until Envoy has told its listeners
	}
	if known && len(s.left) > 0 && now.Sub(s.leftAt) > retryLeft {
		s.target, s.left, changed = s.want, nil, true
	}
	due := s.readAt.Add(a.pollInterval()).Sub(now)
	if !changed && !s.dirty && due > 0 {
		return due
	}
	if !changed || !known {
		// Under a storm of other programs' changes reads keep to their share of time; a new want does not wait.
		if wait := max(s.readEnded.Add(readShare*s.readTook).Sub(now), s.retryAt.Sub(now)); wait > 0 {
			return wait
		}
	}
	if err := a.look(ctx, now, s, known, changed, due <= 0); err != nil {
		return a.failed(ctx, now, s, err)
	}
	if !known && !changed {
		return 0 // something may have put rules of ours in: the gates look first where they lead
	}
	if s.fight.on() && !s.equal {
		return s.fight.until.Sub(now)
	}
	return tick
}

// failed notes that a family could not be read or written, and says when it is tried again.
func (a *Agent) failed(ctx context.Context, now time.Time, s *familyState, err error) (wake time.Duration) {
	if errors.Is(ctx.Err(), context.Canceled) {
		return tick // the agent is ending
	}
	if s.err == nil || s.err.Error() != err.Error() {
		a.log.Error("rules not as wanted", zap.Stringer("family", s.family), zap.Error(err))
	}
	if errors.Is(err, iptables.ErrUnusable) {
		s.unusable, s.probed = err, now
	}
	s.err, s.equal, s.dirty, s.touchedAll = err, false, true, true
	s.retry = min(max(2*s.retry, retryFirst), retryLast)
	s.retryAt = now.Add(s.retry)
	return s.retry
}

// usable says whether the family can be used, and tries one that could not be again now and then. A lock that is held just
// then says nothing about the family.
func (a *Agent) usable(ctx context.Context, now time.Time, s *familyState) bool {
	first := s.probed.IsZero()
	if !first && (s.unusable == nil || now.Sub(s.probed) <= retryUnusable) {
		return s.unusable == nil
	}
	s.probed = now
	if !first {
		a.kernel.Probe(ctx, s.family) // Families has what came of it
	}
	for _, f := range a.kernel.Families() {
		if f.Family == s.family {
			s.unusable = f.Why
		}
	}
	if !first && s.unusable == nil {
		a.log.Info("family usable again", zap.Stringer("family", s.family))
	}
	return s.unusable == nil
}

// compile makes the ruleset that the want, the gates and the time ask for, if any of them changed.
func (s *familyState) compile(want iptables.Interception, serial uint64, now time.Time) (changed bool) {
	key := compiledKey{serial: serial, jumps: s.outbound.open, inbound: s.inbound.open, dns: s.dns.open, settling: now.Before(s.settling)}
	switch {
	case want.OutboundPort == 0 && want.InboundPort != 0:
		key.jumps = s.inbound.open
	case want.OutboundPort == 0 && want.DNSPort != 0:
		key.jumps = s.dns.open
	}
	if key == s.key {
		return false
	}
	s.key = key
	want.Jumps, want.Settling = key.jumps, key.settling
	// Inbound waits for its own port. With the outbound jump out as well (bypass, a planned stop) the rows stay: only
	// jumps are taken, so that ours do not stop being the NAT rules that keep conntrack on (facts).
	if !key.inbound && key.jumps {
		want.InboundPort = 0
	}
	if !key.dns && key.jumps {
		want.DNSPort = 0
	}
	s.want = want.Ruleset()
	s.target, s.left = s.want, nil
	s.services, s.ports = want.Services, len(want.ServicePorts)
	return true
}

// mustLeave says whether the rules that an earlier run left must not intercept while Envoy has not told its listeners: a
// gate of a port that they lead to is closed.
func (s *familyState) mustLeave() bool {
	ours := s.have.Ours()
	outbound, inbound, dns := ours.Ports()
	return s.haveKnown && ours.Intercepting() &&
		(outbound != 0 && !s.outbound.open || inbound != 0 && !s.inbound.open || dns != 0 && !s.dns.open)
}

// look finds out what the kernel has, says what differs, and repairs it.
func (a *Agent) look(ctx context.Context, now time.Time, s *familyState, known, changed, due bool) error {
	start := time.Now()
	if err := a.read(ctx, now, s, due); err != nil {
		return err
	}
	if !known {
		if !changed || !s.mustLeave() { // somebody else put them in, or took them away
			s.jumpsIn = s.have.Ours().Intercepting()
			return nil
		}
		s.target = s.have.Ours().WithoutJumps()
	}
	if s.have.Ours().Empty() && s.target.Intercepting() && !s.written {
		s.settling = now.Add(settle) // a first install, be it that all services had gone
		s.compile(a.want.Families[s.index()], s.key.serial, now)
	}
	if !s.target.Intercepting() && s.have.Ours().Empty() {
		s.settled(s.have) // Hold: chains without a jump are of no use to anybody
		return nil
	}
	drift := iptables.Diff(s.target, s.have)
	if len(drift) == 0 {
		s.by = "" // whoever wrote, wrote nothing of ours
		s.settled(s.have)
		if s.target.Intercepting() {
			a.mark()
		}
		s.installed = s.installs() // adopted: an earlier run took care of what was older
		return nil
	}
	isDrift := s.written && !changed && s.err == nil // after a failure nobody undid anything: it was never done
	by := s.by
	s.by = ""
	if isDrift {
		s.drift, s.driftAt = drift, now
		if by != "" || !s.fight.on() {
			s.driftBy = by
		}
		if !s.fight.mayRepair(now) {
			s.equal, s.dirty = false, true
			return nil
		}
	}
	if err := a.apply(ctx, now, s); err != nil {
		return err
	}
	took := time.Since(start)
	if isDrift {
		s.fight.repaired(now)
		a.undone++
		a.lastBy, a.lastByAt = s.driftBy, now
		for _, d := range drift {
			a.happened.Drift[d.Kind.String()]++
		}
		a.log.Warn("rules repaired", zap.Stringer("family", s.family), zap.Stringers("drift", drift[:min(len(drift), 5)]), zap.Int("differences", len(drift)),
			zap.String("by", s.driftBy), zap.Duration("took", took))
	} else {
		a.log.Info("rules changed", zap.Stringer("family", s.family), zap.Bool("jumps", s.target.Intercepting()), zap.Int("services", len(s.services)),
			zap.Int("rules", s.target.Len()), zap.Duration("took", took))
	}
	return nil
}

// read makes have what the kernel has. Where the kernel notifies of every change, only what was touched is read again.
func (a *Agent) read(ctx context.Context, now time.Time, s *familyState, all bool) (err error) {
	touched := s.touched
	trusted := s.haveKnown && !s.touchedAll && !all && a.pollInterval() == resync
	if trusted && len(touched) == 0 {
		return nil
	}
	s.dirty, s.touched, s.touchedAll = false, nil, false
	start := time.Now()
	if trusted {
		slices.Sort(touched)
		s.have, err = a.kernel.ReadChains(ctx, s.have, slices.Compact(touched))
	} else {
		s.have, err = a.kernel.Read(ctx, s.family)
		s.readAt = now
	}
	s.readTook, s.readEnded = time.Since(start), time.Now()
	s.haveKnown = err == nil
	return err
}

// settled notes that the kernel has what is wanted. Where that is nothing, the next rules are a first install.
func (s *familyState) settled(have iptables.Table) {
	s.have, s.haveKnown = have, true
	s.written = s.target.Intercepting() || !have.Ours().Empty()
	s.equal, s.err, s.retry, s.retryAt = true, nil, 0, time.Time{}
	s.jumpsIn = s.target.Intercepting()
}

// adopt reads what an earlier run, somebody else or nobody left. The ports that rules of this agent's lead to were seen
// ready, if it was in this boot: until one is known to be somebody else's or closed for good, that stands. Rules that
// something else restored at boot wait for their ports (Hold). Rules that let older connections through (a first install)
// go on doing it for the whole time.
func (a *Agent) adopt(ctx context.Context, now time.Time, s *familyState) error {
	if err := a.read(ctx, now, s, true); err != nil {
		return err
	}
	s.adopted = true
	ours := s.have.Ours()
	s.jumpsIn = ours.Intercepting()
	if outbound, inbound, dns := ours.Ports(); s.jumpsIn && a.marked {
		s.outbound.open = s.outbound.open || outbound != 0 && !s.outbound.denied
		s.inbound.open = s.inbound.open || inbound != 0 && !s.inbound.denied
		s.dns.open = s.dns.open || dns != 0 && !s.dns.denied
		if dns != 0 { // the run before may have had no time for it
			s.forgetDNS = []time.Time{now.Add(answersLate)}
		}
	}
	if ours.Settling() {
		s.settling = now.Add(settle)
	}
	if !ours.Empty() {
		a.log.Info("rules adopted", zap.Stringer("family", s.family), zap.Int("rules", ours.Len()), zap.Bool("jumps", s.jumpsIn),
			zap.Bool("of_this_boot", a.marked))
	}
	return nil
}

func (s *familyState) index() int {
	if s.family == iptables.IPv6 {
		return 1
	}
	return 0
}

// apply writes the plan. When the kernel refuses a rule, all but that rule are installed and it is offered again later.
func (a *Agent) apply(ctx context.Context, now time.Time, s *familyState) error {
	plan := iptables.NewPlan(s.target, s.have)
	if ce := a.log.Check(zap.DebugLevel, "plan"); ce != nil {
		ce.Write(zap.Stringer("family", s.family), zap.Stringer("plan", plan))
	}
	if s.target.Intercepting() {
		a.mark()
	}
	result, err := a.kernel.Apply(ctx, plan)
	s.applies[outcome(result, err)]++
	if err != nil {
		return err
	}
	if len(result.Left) > 0 {
		s.target, s.left, s.leftAt = result.Ruleset, result.Left, now
	}
	for _, l := range result.Left {
		a.log.Error("rule left out that the kernel refuses", zap.Stringer("family", s.family), zap.String("rule", l.Rule), zap.String("stderr", l.Stderr))
	}
	s.applied, s.rows = now, s.rows+plan.Len()
	s.settled(result.Have)
	a.forgetOldPaths(ctx, s)
	if len(result.Drift) > 0 { // somebody wrote in between
		s.equal, s.dirty, s.touchedAll = false, true, true
	}
	return nil
}

// conntrackLimit bounds the walk through conntrack's table, which can hold a million entries.
const conntrackLimit = time.Second

// forgetOldPaths deletes the conntrack entries that would keep what the rules have just taken over on its old path:
// connections to new services that are not answered yet, and DNS questions that always come from one port (facts).
func (a *Agent) forgetOldPaths(ctx context.Context, s *familyState) {
	was, now := s.installed, s.installs()
	s.installed = now
	if now.dns != was.dns {
		s.questions = true
		a.forgetQuestions(ctx, s)
		s.forgetDNS = []time.Time{s.applied.Add(time.Second), s.applied.Add(answersLate)}
	}
	ctx, cancel := context.WithTimeout(ctx, conntrackLimit)
	defer cancel()
	if added := missing(now.services, was.services); len(added) > 0 {
		if n, err := conntrack.DeleteHalfOpen(ctx, added); err != nil {
			a.log.Debug("half-open connections keep their path", zap.Error(err))
		} else if n > 0 {
			a.log.Info("half-open connections begin anew through Envoy", zap.Stringer("family", s.family), zap.Int("connections", n))
		}
	}
}

// answersLate is how long a question that was asked before its path changed may still be answered, and bring the old path
// back with that (conntrack.DeleteLateUDP): a resolver's customary time-out is 5 s (resolv.conf(5)).
const answersLate = 6 * time.Second

// forgetQuestions deletes the entries of all DNS questions, and once that is done only those that
// late answers make: a question that was asked since needs its own.
func (a *Agent) forgetQuestions(ctx context.Context, s *familyState) {
	ctx, cancel := context.WithTimeout(ctx, conntrackLimit)
	defer cancel()
	forget := conntrack.DeleteLateUDP
	if s.questions {
		forget = conntrack.DeleteUDP
	}
	if _, err := forget(ctx, 53); err != nil {
		a.log.Debug("DNS questions from a fixed port keep their path", zap.Error(err))
		return
	}
	s.questions = false
}

// installs is what the target redirects.
func (s *familyState) installs() installed {
	if !s.target.Intercepting() {
		return installed{}
	}
	i := installed{services: s.services}
	if s.key.dns {
		i.dns = s.dnsPort
	}
	return i
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
