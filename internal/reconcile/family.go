package reconcile

import (
	"cmp"
	"context"
	"errors"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// Kernel is what a family asks of the nat table; *iptables.Kernel has it. Who must know before
// jumps go in puts something of its own in front (Plan.Intercepting).
type Kernel interface {
	Read(context.Context, iptables.Family) (iptables.Table, error)
	ReadChains(context.Context, iptables.Table, []string) (iptables.Table, error)
	Apply(context.Context, iptables.Plan) (iptables.Result, error)
	Probe(context.Context, iptables.Family) error
	Families() []iptables.FamilyState
	Watched(iptables.Family) (told bool, why error)
	Share(have iptables.Table, with iptables.Ruleset) iptables.Table
}

// Order is what a pass shall bring about, and what is known just then.
type Order struct {
	Want   iptables.Interception
	Serial uint64 // of the want: another one, another serial
	Known  bool   // Envoy has told its listeners: Want is what is wanted

	Ports     Ports // of Family.Ports
	Looks     Looks // who listens there
	ProxyUID  uint32
	UserKnown bool // the proxy's user exists: ProxyUID is its uid
	Draining  bool // Envoy stops as planned, also when it no longer answers
	WhenDown  WhenEnvoyDown
	// Off is the emergency brake: no jump is in, whoever accepts and whether Envoy has told its
	// listeners or not. The chains stay, and are kept as they are wanted.
	Off bool

	Paused   bool // cleanup took everything out
	Marked   bool // an agent of this boot put jumps in
	Notified bool // what the Kernel tells of changes comes in (Note)
}

// Outcome is what came of a pass.
type Outcome struct {
	Wake time.Duration // until the next pass, if nothing comes before

	Ports  []symptom.Port // the looks that are facts
	Facts  symptom.Family
	Status status.Family
	// NotReady is why the family is not as wanted, "" when it is. One that cannot be used has no
	// say.
	NotReady string

	Written bool // what is wanted was there once
	// Confirmed: this pass found or put the wanted rules in, and they intercept.
	Confirmed bool

	Lacks  bool      // a rule is left out without which a packet goes another way
	InSync time.Time // when the rules last were seen, or put, as wanted

	Work // of this pass

	Undone      uint64 // repairs since the start
	LastDriftBy string
	LastDriftAt time.Time
}

// Work is what a pass did to the kernel, and how long that took.
type Work struct {
	Drift   map[string]int  // differences repaired, by kind
	Applies map[string]int  // writes, by what came of them
	Rows    int             // lines written
	Adopted int             // rules that were found there at the start
	Took    []time.Duration // by iptables-restore, for each write
	Waited  time.Duration   // of these, for the xtables lock
	// Repairs are how long each drift that is over was there to be seen.
	Repairs  []time.Duration
	BackOffs int // that began
	Removed
}

// Family keeps one family's rules as they are wanted. Make one with New.
type Family struct {
	family iptables.Family
	kernel Kernel
	log    *zap.Logger
	clock  func() time.Time // by which commands are timed

	usability usability
	gates     gates
	goal      goal
	sight     sight
	standing  standing
	retry     retry
	backOff   backOff
	drift     driftMemory
	paths     paths
	untold    error // why the kernel does not tell of changes; nil: it does, or was not asked yet
}

// standing is how the kernel stood to the goal at the end of the last pass that looked.
type standing struct {
	equal   bool
	jumps   bool      // rules of ours intercept
	written bool      // it once had what this run wants: from then on a difference is drift
	applied time.Time // the last write
	seen    time.Time // when the kernel last was seen, or put, as wanted
}

// New is a family of which nothing is known yet.
func New(f iptables.Family, k Kernel, flows Flows, log *zap.Logger) *Family {
	return &Family{
		family: f, kernel: k, log: log, paths: newPaths(f, flows, log),
		clock: time.Now, //nolint:forbidigo // it times commands, and decides nothing
	}
}

// Ports are the ports whose listeners matter now: where the wanted rules lead, or while nothing
// is wanted yet where the rules lead that are kept or in, or else the usual ones. Without the
// proxy's user there is nobody whom they could belong to.
func (f *Family) Ports(want iptables.Interception, known, userKnown bool, usual Ports) Ports {
	switch {
	case !userKnown:
		return Ports{}
	case known:
		return Ports{
			Outbound: want.OutboundPort, Inbound: want.InboundPort, DNS: want.DNSPort,
			DNSOverTCP: want.DNSOverTCP,
		}
	}
	if led := f.led(); led.Intercepting() {
		outbound, inbound, dns := led.Ports()
		return Ports{Outbound: outbound, Inbound: inbound, DNS: dns}
	}
	return usual
}

// led are the rules whose ports matter while it is not known what is wanted.
func (f *Family) led() iptables.Ruleset {
	switch {
	case f.goal.kept.Intercepting():
		return f.goal.kept
	case f.sight.known:
		return f.sight.have.Ours()
	}
	return iptables.Ruleset{}
}

// Note takes in what the kernel told of the table: somebody else may have changed it.
func (f *Family) Note(e iptables.Event, now time.Time) {
	if e.Own || e.Family != 0 && e.Family != f.family {
		return
	}
	f.sight.note(e, now)
	if e.Program != "" {
		f.drift.named(now, f.sight.by)
	}
}

// tick is the longest pause between two passes.
const tick = time.Second

// pass is one pass under way.
type pass struct {
	now   time.Time // when it began, to which its decisions belong
	began time.Time // the same by clock
	clock func() time.Time
	poll  time.Duration
	order Order
	out   Outcome
}

// time is now and what the pass has taken since.
func (p *pass) time() time.Time { return p.now.Add(p.clock().Sub(p.began)) }

// Pass moves the gates and brings the family's rules to what is wanted. It does nothing, and costs
// nothing, unless something tells that the kernel may differ: a notification, a new want, a failure
// to mend, or the clock where nothing tells of changes.
func (f *Family) Pass(ctx context.Context, now time.Time, o Order) Outcome {
	o.Known = o.Known && o.UserKnown
	p := &pass{
		now: now, began: f.clock(), clock: f.clock, order: o,
		poll: pollInterval(f.watched(o.Notified)),
		out:  Outcome{Work: Work{Applies: map[string]int{}, Drift: map[string]int{}}},
	}
	p.out.Ports = f.gates.move(now, o, !o.Known && o.UserKnown && f.led().Intercepting())
	f.goal.giveUp(o, &f.gates)
	held := f.backOff.on()
	p.out.Wake = f.reconcile(ctx, p)
	if f.backOff.on() && !held {
		p.out.BackOffs++
	}
	f.report(p)
	return p.out
}

// watched says whether every change is told of. Why the kernel does not tell is logged once.
func (f *Family) watched(notified bool) bool {
	told, why := f.kernel.Watched(f.family)
	if why != nil && (f.untold == nil || f.untold.Error() != why.Error()) {
		f.log.Warn("the kernel does not tell whether the rules change: reading them now and then",
			zap.Stringer("family", f.family), zap.Duration("each", unwatchedPoll), zap.Error(why))
	}
	f.untold = why
	return notified && told
}

// reconcile is the pass without the gates and the report.
func (f *Family) reconcile(ctx context.Context, p *pass) (wake time.Duration) {
	if !f.backOff.on() {
		f.drift.forget(p.now)
	}
	f.backOff.pass(p.now)
	if p.order.Paused {
		f.standing.equal, f.standing.jumps = false, false
		f.drift.over(p.now)
		return tick
	}
	if !f.usable(ctx, p.now) {
		return tick
	}
	f.paths.pass(ctx, p.now)
	if !f.sight.adopted {
		if wait := f.retry.at.Sub(p.now); wait > 0 {
			return wait
		}
		if err := f.adopt(ctx, p); err != nil {
			return f.failed(ctx, p.now, err)
		}
		return 0 // the gates look first where these rules lead
	}
	why := f.reason(p)
	if wait := f.wait(p, why); wait > 0 {
		return wait
	}
	if err := f.pursue(ctx, p, why); err != nil {
		return f.failed(ctx, p.now, err)
	}
	switch {
	case why == watch:
		return 0 // something may have put rules of ours in: the gates look first where they lead
	case f.backOff.on() && !f.standing.equal:
		return f.backOff.until.Sub(p.now)
	}
	return tick
}

// reason is why a pass looks at the kernel.
type reason uint8

const (
	// check: something tells that the kernel may differ from what is wanted.
	check reason = iota
	// watch: something tells that it has changed, and it is not known yet what is wanted.
	watch
	// wanted: another ruleset is wanted than before.
	wanted
	// keep: something tells that it has changed, and as long as it is not known what is wanted that
	// is what an earlier run left.
	keep
	// leave: it is not known yet what is wanted, and what is there leads to a closed port.
	leave
)

// reason says why this pass would look.
func (f *Family) reason(p *pass) reason {
	o := p.order
	if !o.Known {
		f.goal.unknown()
		switch {
		case f.goal.kept.Intercepting():
			return keep
		case f.mustLeave():
			return leave
		}
		return watch
	}
	changed := f.goal.compile(o.Want, o.Serial, &f.gates, p.now)
	if f.goal.offerAgain(p.now) || changed {
		return wanted
	}
	return check
}

func (f *Family) mustLeave() bool {
	return f.sight.known && mustLeave(f.sight.have.Ours(), &f.gates)
}

// wait is how long the look may wait; 0 or less: it is due. A new want does not wait.
func (f *Family) wait(p *pass, why reason) time.Duration {
	if why == wanted {
		return 0
	}
	if due := f.sight.due(p.now, p.poll); why != leave && !f.sight.dirty && due > 0 {
		return due
	}
	return max(f.sight.budget.due(p.now), f.retry.at.Sub(p.now))
}

// failed notes that the family could not be read or written, and says when it is tried again.
func (f *Family) failed(ctx context.Context, now time.Time, err error) (wake time.Duration) {
	if errors.Is(ctx.Err(), context.Canceled) {
		return tick // the agent is ending
	}
	if f.retry.news(err) {
		f.log.Error("rules not as wanted", zap.Stringer("family", f.family), zap.Error(err))
	}
	if errors.Is(err, iptables.ErrUnusable) {
		f.usability = usability{why: err, when: now}
	}
	f.retry = f.retry.failed(now, err)
	f.standing.equal = false
	f.sight.doubt()
	return f.retry.delay
}

// usable says whether the family can be used, and tries one that could not be again now and then. A
// lock that is held just then says nothing about the family.
func (f *Family) usable(ctx context.Context, now time.Time) bool {
	if !f.usability.due(now) {
		return f.usability.why == nil
	}
	first := f.usability.when.IsZero()
	f.usability.when = now
	if !first {
		_ = f.kernel.Probe(ctx, f.family) // Families has what came of it
	}
	for _, s := range f.kernel.Families() {
		if s.Family == f.family {
			f.usability.why = s.Why
		}
	}
	if !first && f.usability.why == nil {
		f.log.Info("family usable again", zap.Stringer("family", f.family))
	}
	return f.usability.why == nil
}

// adopt reads what an earlier run, somebody else or nobody left. The ports that rules of this
// agent's lead to were seen ready, if it was in this boot, and they are kept, if nobody has put
// them out of order. Rules that something else restored at
// boot wait for their ports (Hold). Rules that let older connections through (a first install) go
// on doing it for the whole time.
func (f *Family) adopt(ctx context.Context, p *pass) error {
	if err := f.sight.read(ctx, f.kernel, f.family, p); err != nil {
		return err
	}
	f.sight.adopted, f.retry = true, retry{}
	ours := f.sight.have.Ours()
	f.standing.jumps = ours.Intercepting()
	if f.standing.jumps && p.order.Marked {
		f.gates.adopt(ours)
		if len(iptables.Diff(ours, f.sight.have)) == 0 {
			f.goal.kept = ours
		}
		if _, _, dns := ours.Ports(); dns != 0 {
			f.paths.adopted(p.now)
		}
	}
	if ours.Settling() {
		f.goal.settle(p.now)
	}
	if !ours.Empty() {
		p.out.Adopted = ours.Len()
		f.log.Info("rules adopted", zap.Stringer("family", f.family), zap.Int("rules", ours.Len()),
			zap.Bool("jumps", f.standing.jumps), zap.Bool("of_this_boot", p.order.Marked))
	}
	return nil
}

// pursue finds out what the kernel has, says what differs, and repairs it.
func (f *Family) pursue(ctx context.Context, p *pass, why reason) error {
	start := p.time()
	told := cmp.Or(f.sight.told, start)
	if err := f.sight.read(ctx, f.kernel, f.family, p); err != nil {
		return err
	}
	ours := f.sight.have.Ours()
	switch {
	case why == watch || why == leave && !f.mustLeave():
		f.standing.jumps = ours.Intercepting() // somebody else put them in, or took them away
		f.drift.over(p.now)
		f.retry = retry{}
		return nil
	case why == keep:
		return f.keep(ctx, p, told, start)
	case why == leave:
		f.goal.leave(ours)
	}
	if !ours.Redirects() && f.goal.target.Intercepting() && !f.standing.written {
		f.goal.settle(p.now) // a first install, be it that all services had gone
		f.goal.compile(p.order.Want, p.order.Serial, &f.gates, p.now)
	}
	if !f.goal.target.Intercepting() && ours.Empty() && !(p.order.Off && f.standing.written) {
		// Hold: chains without a jump are of no use to anybody. Those of a brake that came later are:
		// redirected streams live by them.
		f.settled(p)
		return nil
	}
	drift := iptables.Diff(f.goal.target, f.sight.have)
	by := f.sight.by
	f.sight.by = "" // whoever wrote, that is dealt with here, or was nothing of ours
	if len(drift) == 0 {
		f.drift.over(p.now) // be it that somebody else put it right
		f.settled(p)
		p.out.Confirmed = f.standing.jumps
		// Adopted: an earlier run took care of what was older.
		f.paths.now = f.goal.redirects(f.gates.ports.DNS)
		return nil
	}
	// After a failure nobody undid anything: it was never done.
	if f.standing.written && why == check && f.retry.err == nil {
		f.drift.shown(told)
		return f.repair(ctx, p, drift, by, start)
	}
	if err := f.apply(ctx, p); err != nil {
		return err
	}
	f.log.Info("rules changed", zap.Stringer("family", f.family),
		zap.Bool("jumps", f.goal.target.Intercepting()), zap.Int("services", len(f.goal.services)),
		zap.Int("rules", f.goal.target.Len()), zap.Duration("took", p.time().Sub(start)))
	return nil
}

// keep puts back what somebody undid of an earlier run's rules. They go on for as long as it is not
// known what is wanted: Envoy may be away, and nothing is to go past it.
func (f *Family) keep(ctx context.Context, p *pass, told, start time.Time) error {
	f.goal.target = f.goal.kept
	drift := iptables.Diff(f.goal.target, f.sight.have)
	by := f.sight.by
	f.sight.by = ""
	if len(drift) == 0 {
		f.drift.over(p.now)
		f.standing.equal, f.standing.jumps, f.retry = true, true, retry{}
		return nil
	}
	f.standing.jumps = f.sight.have.Ours().Intercepting()
	f.drift.shown(told)
	return f.repair(ctx, p, drift, by, start)
}

// repair puts right what somebody undid, unless that is put off.
func (f *Family) repair(
	ctx context.Context, p *pass, drift []iptables.Drift, by string, start time.Time,
) error {
	f.drift.found(p.now, drift, by, f.backOff.on())
	if !f.backOff.mayRepair(p.now) {
		f.standing.equal, f.sight.dirty = false, true
		return nil
	}
	f.paths.undone(drift)
	if err := f.apply(ctx, p); err != nil {
		return err
	}
	f.backOff.repaired(p.now)
	f.drift.repaired(p.now)
	p.out.Drift = kinds(drift)
	f.log.Warn("rules repaired", zap.Stringer("family", f.family),
		zap.Stringers("drift", drift[:min(len(drift), 5)]), zap.Int("differences", len(drift)),
		zap.String("by", f.drift.by), zap.Duration("took", p.time().Sub(start)))
	return nil
}

// apply writes what leads from what is there to the target. The kernel may take less than that.
func (f *Family) apply(ctx context.Context, p *pass) error {
	plan := iptables.NewPlan(f.goal.target, f.sight.have)
	if ce := f.log.Check(zap.DebugLevel, "plan"); ce != nil {
		ce.Write(zap.Stringer("family", f.family), zap.Stringer("plan", plan))
	}
	result, err := f.kernel.Apply(ctx, plan)
	p.out.Applies[outcome(result, err)]++
	p.out.Took, p.out.Waited = append(p.out.Took, result.Took), p.out.Waited+result.Waited
	if err != nil {
		return err
	}
	for _, l := range result.Left {
		f.log.Error("rule left out that the kernel refuses", zap.Stringer("family", f.family),
			zap.String("rule", l.Rule), zap.String("stderr", l.Stderr))
	}
	f.goal.installed(result, p.now)
	f.standing.applied = p.now
	p.out.Rows += plan.Len()
	f.sight.have = result.Have
	written := p.time()
	f.settled(p)
	p.out.Confirmed = f.standing.jumps
	f.paths.changed(ctx, p.now, f.goal.redirects(f.gates.ports.DNS))
	if len(result.Drift) > 0 { // somebody wrote in between
		f.standing.equal = false
		f.sight.doubt()
	} else if lasted, was := f.drift.over(written); was {
		p.out.Repairs = append(p.out.Repairs, lasted)
	}
	return nil
}

// settled notes that the kernel has what is wanted. Where that is nothing, the next rules are a
// first install.
func (f *Family) settled(p *pass) {
	f.standing.equal, f.standing.jumps = true, f.goal.target.Intercepting()
	f.standing.seen = p.time()
	f.standing.written = f.standing.jumps || !f.sight.have.Ours().Empty()
	f.retry = retry{}
	f.sight.have = f.kernel.Share(f.sight.have, f.goal.target)
}

// report puts what is told of the family into the pass's outcome.
func (f *Family) report(p *pass) {
	o := &p.out
	o.Facts, o.Status, o.NotReady = f.facts(), f.status(), f.notReady(p.order)
	o.Written, o.Lacks, o.InSync = f.standing.written, f.goal.lacks(), f.standing.seen
	o.Removed = f.paths.taken()
	o.Undone, o.LastDriftBy, o.LastDriftAt = f.drift.undone, f.drift.lastBy, f.drift.lastAt
	if p.order.Known && f.goal.compiled && !p.order.Paused {
		s := f.goal.shape.told(p.order)
		o.Status.Shape, o.Status.Left = &s, leftRules(f.goal.left)
	}
}

func (f *Family) facts() symptom.Family {
	s := symptom.Family{
		Family: f.family, Unusable: f.usability.why, Err: f.retry.err, Left: f.goal.left,
		Drift: f.drift.seen, By: f.drift.by, Fighting: f.backOff.on(), Undone: f.backOff.undone,
	}
	for _, d := range f.drift.seen {
		if d.Kind == iptables.Shadowed && !f.standing.equal {
			s.Shadow = append(s.Shadow, d)
		}
	}
	return s
}

func (f *Family) status() status.Family {
	s := status.Family{
		Family: f.family.String(), Usable: f.usability.why == nil, Equal: f.standing.equal,
		Jumps: f.standing.jumps, Services: len(f.goal.services), ServicePorts: f.goal.ports,
		OutboundPort: f.gates.ports.Outbound, InboundPort: f.gates.ports.Inbound,
		DNSPort: f.gates.ports.DNS, Rules: f.goal.target.Len(), Applied: f.standing.applied.UTC(),
	}
	if err := errors.Join(f.usability.why, f.retry.err); err != nil {
		s.Error = err.Error()
	}
	return s
}

func (f *Family) notReady(o Order) string {
	if f.usability.why != nil {
		return ""
	}
	if o.Off { // what is wanted then is that nothing leads to Envoy
		if !f.sight.adopted || f.standing.jumps || o.Known && !f.standing.equal {
			return "the " + f.family.String() + " jumps are not known to be out yet"
		}
		return ""
	}
	if why := f.gates.notAccepting(f.family); why != "" {
		return why
	}
	if !f.standing.equal || f.goal.lacks() {
		return "the " + f.family.String() + " rules are not as wanted"
	}
	return ""
}
