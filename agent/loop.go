package agent

import (
	"context"
	"net/netip"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/envoywatch"
	"github.com/service-proxy-agent/service-proxy-agent/internal/reconcile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/report"
	"github.com/service-proxy-agent/service-proxy-agent/internal/route"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

const (
	// tick is the longest pause between two passes: it bounds how late a closed port, a foreign
	// owner or a new interface address is seen. An idle pass reads no rules and asks Envoy nothing.
	tick = time.Second
	// passLimit bounds what a pass may spend on a slow iptables or a held lock, each family its half
	// and the second that a command's end may take: well under WatchdogSec (30 s), which is for a
	// loop that hangs.
	passLimit = 20 * time.Second
)

// loop is the one goroutine that owns the kernel. What it knows lives here, and nowhere else can it
// be reached: everything it learns comes as values over its inbox, or from the VM at once.
type loop struct {
	settings Settings
	log      *zap.Logger
	vm       vm
	inbox    inbox

	attribute attributeInForce
	bootstrap bootstrapProgress
	envoy     envoywatch.View
	beside    beside
	user      proxyUser
	local     local
	stops

	wanted   wanted
	families []*reconcile.Family
	mark     *mark
	told     told
}

// stops are what keeps the jumps out whatever Envoy does.
type stops struct {
	paused bool // cleanup took everything out
	brake  brake
}

// beside is what tasks have found that look at other things than Envoy, and whom the loop tells
// what to look at and that it has worked.
type beside struct {
	others []iptables.OtherChain
	around symptom.Surroundings
	asked  func(about) // nil: nobody looks
	worked func()      // told of a pass that did more than look; nil: nobody is
	hold   holding
}

func (b beside) tell(a about) {
	if b.asked != nil {
		b.asked(a)
	}
}

// local are the VM's addresses, asked for anew when they may have changed: to list them costs as
// much as the rest of what an idle pass observes.
type local struct {
	addrs []netip.Addr // of every interface but loopback; nil: they never could be read
	read  bool         // they could be read
	moved func() bool  // since it was last called they may have; nil: nobody can tell
}

func (l *local) look(list func() ([]netip.Addr, error)) []netip.Addr {
	// First what is told, then what is there: what comes in between is told the next time.
	if moved := l.moved == nil || l.moved(); moved || !l.read {
		addrs, err := list()
		if l.read = err == nil; l.read {
			l.addrs = readAddrs(addrs)
		}
	}
	return l.addrs
}

// readAddrs are addresses that were read: where there are none, that is known.
func readAddrs(addrs []netip.Addr) []netip.Addr { return append([]netip.Addr{}, addrs...) }

// inbox is where the loop's news come from. Of each kind only the newest counts, but for events.
type inbox struct {
	views      <-chan envoywatch.View
	attributes <-chan attributeNews
	brakes     <-chan brake
	others     <-chan []iptables.OtherChain
	around     <-chan symptom.Surroundings
	pause      <-chan chan struct{}
	events     <-chan iptables.Event // nil: the kernel tells nothing, or no longer
}

// run waits for news and makes a pass for each, and one each tick.
func (l *loop) run(ctx context.Context) error {
	if news, err := route.Listen(); err == nil { // addresses are among what routes depend on
		l.local.moved = news.Any
		defer news.Close()
	}
	defer l.beside.hold.end()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case v := <-l.inbox.views:
			l.envoy = v.After(l.envoy, time.Now())
			l.wanted.redirects.told(l.envoy.Told)
		case news := <-l.inbox.attributes:
			l.attribute.take(news, l.log)
		case l.brake = <-l.inbox.brakes:
		case e, ok := <-l.inbox.events:
			l.takeEvent(e, ok, time.Now())
		case l.beside.others = <-l.inbox.others:
		case l.beside.around = <-l.inbox.around:
		case done := <-l.inbox.pause:
			l.paused = true
			close(done)
		case <-timer.C:
		}
		wake := l.pass(ctx, time.Now())
		timer.Reset(max(0, min(wake, tick)))
	}
}

// pass brings the kernel to what Envoy and the attribute ask for and tells the world: observe,
// decide, apply, check, report. It returns how long the next pass may wait.
func (l *loop) pass(ctx context.Context, now time.Time) (wake time.Duration) {
	began := time.Now()
	seen := l.observe(now)
	before := l.wanted.serial
	want, known := l.wanted.desired(l.settings, seen)
	known = known && !seen.Brake.Awaited
	outcomes := l.reconcile(ctx, now, seen, want, known)
	l.beside.hold.passed(now, outcomes, seen.Brake.Off && !l.paused)
	l.beside.tell(aboutOf(want, l.wanted.serial, seen, jumpsOf(outcomes)))
	redirect := l.wanted.redirects.passed(time.Now(), known, l.paused, outcomes)
	facts := seen.Facts(want, outcomes)
	findings := symptom.Check(facts)
	took := time.Since(began)
	if l.beside.worked != nil && (l.wanted.serial != before || wrote(outcomes)) {
		l.beside.worked()
	}
	l.followBootstrap(now)
	l.told.publish(passed{
		seen: seen, want: want, serial: l.wanted.serial, known: known, outcomes: outcomes,
		findings: findings, hidden: symptom.Hidden(facts), paused: l.paused, took: took,
		redirect: redirect,
	}, l.vm.backend())
	return earliest(outcomes)
}

// reconcile has each family look at its ports and bring its rules to the want. One family's failure
// does not stop the other.
func (l *loop) reconcile(
	ctx context.Context, now time.Time, seen Observation, want Want, known bool,
) (outcomes []reconcile.Outcome) {
	usual := reconcile.Ports{Outbound: seen.Attribute.Config.ProxyPort, Inbound: attribute.InboundPort}
	asked := l.vm.sharing()
	for i, family := range l.families {
		limited, cancel := context.WithTimeout(ctx, passLimit/time.Duration(len(l.families)))
		ports := family.Ports(want.Families[i], known, seen.User.Err == nil, usual)
		outcome := family.Pass(limited, now, reconcile.Order{
			Want: want.Families[i], Serial: l.wanted.serial, Known: known,
			Ports: ports, Looks: asked.look(families[i], ports, seen),
			ProxyUID: seen.User.UID, UserKnown: seen.User.Err == nil,
			Draining: seen.Envoy.State == "DRAINING", WhenDown: seen.Brake.whenDown(l.settings),
			Off:    seen.Brake.Off,
			Paused: l.paused, Marked: l.mark.set, Notified: l.inbox.events != nil,
		})
		cancel()
		if outcome.Confirmed {
			l.mark.put()
		}
		outcomes = append(outcomes, outcome)
	}
	return outcomes
}

// followBootstrap tells bootstrap's story, and has it run where the attribute asks for it.
func (l *loop) followBootstrap(now time.Time) {
	for _, line := range l.bootstrap.story(l.told.started) {
		l.told.tell(status.OfBootstrap, report.Event{
			Severity: report.Severity(line.Severity), Message: "bootstrap: " + line.Text})
	}
	if l.bootstrap.due(now, l.attribute.text) {
		if err := l.vm.request("the attribute has changed"); err != nil {
			l.log.Warn("cannot ask for bootstrap", zap.Error(err))
		}
	}
}

// wrote says whether rules were written.
func wrote(outcomes []reconcile.Outcome) bool {
	return slices.ContainsFunc(outcomes, func(o reconcile.Outcome) bool { return o.Rows > 0 })
}

func earliest(outcomes []reconcile.Outcome) time.Duration {
	wake := tick
	for _, o := range outcomes {
		wake = min(wake, o.Wake)
	}
	return wake
}

// takeEvent passes on that somebody may have changed the rules.
func (l *loop) takeEvent(e iptables.Event, ok bool, now time.Time) {
	if !ok {
		l.inbox.events = nil // polling goes on
		l.log.Warn("the kernel's notifications ended, polling")
	} else {
		l.beside.hold.told(e, now) // first: each millisecond counts
	}
	for _, family := range l.families {
		family.Note(e, now)
	}
}

// wanted is Desired of the newest inputs, made anew only when one of them changed: at 10,000
// services it is no matter for every tick.
type wanted struct {
	want   Want
	serial uint64 // counts Wants; 0: none yet
	redirects
	of struct {
		generation   uint64
		attribute    uint64
		uid, gid     uint32
		local        []netip.Addr
		resolverUIDs []uint32
	}
}

// desired is what the kernel shall have. known is false until Envoy has told its listeners once and
// the VM its addresses, which no rule may redirect: what stands in the kernel is then left alone.
func (w *wanted) desired(s Settings, seen Observation) (want Want, known bool) {
	if seen.Envoy.Generation == 0 || seen.User.Err != nil || !seen.Attribute.Known ||
		seen.Local == nil {
		return Want{}, false
	}
	of := &w.of
	if w.serial > 0 && of.generation == seen.Envoy.Generation &&
		of.attribute == seen.Attribute.Serial &&
		of.uid == seen.User.UID && of.gid == seen.User.GID && slices.Equal(of.local, seen.Local) &&
		slices.Equal(of.resolverUIDs, seen.Resolvers.UIDs) {
		return w.want, true
	}
	of.generation, of.attribute = seen.Envoy.Generation, seen.Attribute.Serial
	of.uid, of.gid, of.local, of.resolverUIDs = seen.User.UID, seen.User.GID, seen.Local,
		seen.Resolvers.UIDs
	w.want = Desired(Inputs{
		Config: seen.Attribute.Config, Listeners: seen.Envoy.Snapshot.Listeners,
		ProxyUID: seen.User.UID, ProxyGID: seen.User.GID, Local: seen.Local,
		Interfaces: s.Interfaces, ResolverUIDs: seen.Resolvers.UIDs, OwnPorts: ownPorts(s),
	})
	w.serial++
	return w.want, true
}
