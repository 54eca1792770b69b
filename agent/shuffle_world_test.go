package agent

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/reconcile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// The world in which shuffle_test.go plays the loop: Envoy and its control plane
// (shuffle_envoy_test.go), who listens where, other programs that write to the nat table, and the
// time. It knows nothing of the code under test but what goes into it and comes out of it.

// nat is the nat table under test, of both families: in memory, or the kernel's.
type nat interface {
	backend() string
	// open is what a start of the agent opens.
	open() (*iptables.Kernel, error)
	// chains are the chains with their rules now, in the form of a save.
	chains(iptables.Family) map[string][]string
	// changes counts what may have changed them.
	changes(iptables.Family) int
	// restore and flush are another program's: iptables-restore --noflush, and iptables -t nat -F.
	restore(f iptables.Family, payload string)
	flush(iptables.Family)
	// writes, reads and looks count the agent's runs of iptables-restore, of iptables-save, and of
	// whatever reads.
	writes(iptables.Family) int
	reads(iptables.Family) int
	looks(iptables.Family) int
	// failed counts the programs of the agent's that failed.
	failed(iptables.Family) int
	// fault makes the agent's programs fail from now on.
	fault(iptables.Family, fault)
	// now and sleep are the clock by which the agent is played.
	now() time.Time
	sleep(time.Duration)
}

// fault is how the programs of a family fail.
type fault uint8

const (
	works   fault = iota
	locked        // somebody holds the lock
	absent        // the kernel has no table nat
	hangs         // a read does not end in its time
	refuses       // the kernel refuses comments
)

func (f fault) String() string {
	return [...]string{"works", "lock held", "no table", "reads do not end", "comments refused"}[f]
}

// The words with which iptables 1.8.9 fails. Reading a table needs no lock, as iptables-save takes
// none.
const (
	saysLocked  = "Another app is currently holding the xtables lock. Stopped waiting after 5s."
	saysAbsent  = "can't initialize table `nat': Table does not exist (do you need to insmod?)"
	saysRefused = "RULE_APPEND failed (No such file or directory): rule in chain X"
)

var bothFamilies = []iptables.Family{iptables.IPv4, iptables.IPv6}

// index of a family in arrays.
func index(f iptables.Family) int {
	if f == iptables.IPv6 {
		return 1
	}
	return 0
}

// The users of the VM.
const (
	proxyUID, proxyGID = 999, 998
	otherUID           = 1000
)

// The ports of interception, in the order in which arrays have them.
const (
	outboundSide = iota
	inboundSide
	dnsSide
	sides
)

var portOf = [sides]uint16{15001, 15006, 15053}

// world is everything around the loop.
type world struct {
	*rand.Rand
	nat    nat
	log    []string       // what was done so far
	played map[string]int // the events among it
	real   bool
	policy reconcile.WhenEnvoyDown

	envoy     envoy
	foreign   [2][sides]bool // somebody else holds the port
	attribute *attr          // nil: there is none that is this VM's
	notified  bool           // the kernel's notifications come in
	noUser    bool           // the proxy's user is not there
	brake     brake          // what the VM's metadata asks for
	local     netip.Addr     // of an interface
	faults    [2]fault

	life     *life
	mark     *mark
	later    []timed
	lookAt   time.Time
	passAt   time.Time
	spins    int       // passes or looks without a pause in a row
	deadline time.Time // when all must be as it should be

	oracle oracle
}

// timed is something that will happen.
type timed struct {
	at time.Time
	do func()
}

func newWorld(seed uint64, n nat, real bool) *world {
	w := &world{
		Rand: rand.New(rand.NewPCG(seed, 0)), nat: n, real: real, policy: reconcile.Keep, notified: true,
		played: map[string]int{},
	}
	w.newBoot()
	if w.IntN(2) == 0 {
		w.policy = reconcile.Bypass
	}
	w.attribute = &attr{serving: w.IntN(4) > 0, dns: w.IntN(2) == 0, excludes: w.IntN(4) == 0}
	w.envoy = envoy{now: n.now, plane: randomSet(w.Rand), planeUp: true, set: nothing}
	w.oracle.w = w
	w.oracle.begin()
	if w.IntN(3) > 0 {
		w.startEnvoy(true)
	}
	w.startAgent()
	return w
}

// startEnvoy starts a process, whose control plane answers a while later, if it answers at all.
func (w *world) startEnvoy(seen bool) {
	w.envoy.start(seen)
	process, started := w.envoy.process, w.envoy.started
	w.in(w.upTo(1500*time.Millisecond), w.update)
	w.in(15*time.Second, func() {
		if w.envoy.process == process && w.envoy.started == started && w.envoy.up {
			w.envoy.waited = true
		}
	})
}

// update has the control plane speak, which Envoy logs.
func (w *world) update() {
	if !w.envoy.update() {
		return
	}
	w.hint()
	if w.envoy.warming {
		process := w.envoy.process
		w.in(w.upTo(3*time.Second), func() {
			if w.envoy.process == process && w.envoy.warm() {
				w.hint()
			}
		})
	}
}

// hint is a line of Envoy's log.
func (w *world) hint() {
	w.life.watch.Note(envoyadmin.LogEvent{Kind: envoyadmin.ListenerChanged})
	w.lookAt = w.nat.now()
}

// upTo is a random time below d.
func (w *world) upTo(d time.Duration) time.Duration { return time.Duration(w.Int64N(int64(d))) }

func (w *world) in(d time.Duration, do func()) {
	t := timed{w.nat.now().Add(d), do}
	i := slices.IndexFunc(w.later, func(l timed) bool { return t.at.Before(l.at) })
	if i < 0 {
		i = len(w.later)
	}
	w.later = slices.Insert(w.later, i, t)
}

// accepts says whether the proxy accepts on a port, in this family.
func (w *world) accepts(f iptables.Family, side int) bool {
	e := &w.envoy
	listens := e.up && e.bound && e.set.has[side] && e.set.families[index(f)]
	return listens && !w.foreign[index(f)][side]
}

// owner is who listens on a port.
func (w *world) owner(f iptables.Family, side int) (uid uint32, anybody bool) {
	switch {
	case w.foreign[index(f)][side]:
		return otherUID, true
	case w.accepts(f, side):
		return proxyUID, true
	}
	return 0, false
}

// run lets the time go on by d.
func (w *world) run(d time.Duration) { w.runUntil(d, func() bool { return false }) }

// runUntil lets the time go on until a pass ends with done, which it says, or for d.
func (w *world) runUntil(d time.Duration, done func() bool) bool {
	end := w.nat.now().Add(d)
	for {
		next := end
		for _, t := range []time.Time{w.lookAt, w.passAt} {
			if t.Before(next) {
				next = t
			}
		}
		if len(w.later) > 0 && w.later[0].at.Before(next) {
			next = w.later[0].at
		}
		now := w.nat.now()
		if next.After(now) {
			w.nat.sleep(next.Sub(now))
			now = w.nat.now()
			w.spins = 0
		}
		if w.spins++; w.spins > 100 {
			w.fail("the agent does not come to rest: 100 passes and looks at one moment")
		}
		switch {
		case len(w.later) > 0 && !w.later[0].at.After(now):
			do := w.later[0].do
			w.later = w.later[1:]
			do()
		case !w.lookAt.After(now):
			w.look()
		case !w.passAt.After(now):
			w.pass()
			if w.passAt.After(now) && done() {
				return true
			}
		case !now.Before(end):
			return false
		}
	}
}

// skip is time that passes without anything happening, as on a VM that is suspended.
func (w *world) skip(d time.Duration) { w.nat.sleep(d) }

// look is one of the agent's at Envoy.
func (w *world) look() {
	wait := w.life.watch.Step(context.Background())
	w.lookAt = w.nat.now().Add(wait)
	if w.envoy.hungUntil.After(w.lookAt) { // the question took so long
		w.lookAt = w.envoy.hungUntil
	}
	select {
	case v := <-w.life.watch.Views():
		w.tell("  view: %s, generation %d, configured %v, err %v",
			v.State, v.Generation, v.Configured, v.Err)
		w.oracle.view(v)
		w.life.loop.envoy = v
		w.passAt = w.nat.now()
	default:
	}
}

// pass is one of the loop's.
func (w *world) pass() {
	w.oracle.before()
	wake := w.life.loop.pass(context.Background(), w.nat.now())
	w.passAt = w.nat.now().Add(max(0, min(wake, tick)))
	w.tell("  pass: wake %v, known %v, mode %s, not ready: %s",
		wake, w.oracle.known(), w.life.status.Mode, w.life.status.NotReady)
	// On the kernel a read takes time, and others wait for their share of it.
	w.oracle.after(wake <= 0 || w.real && wake < tick/2)
	w.remembers()
}

// past is what a run of the agent begins with: what the one before kept.
func (w *world) past() (h history) {
	if w.life != nil {
		h.lines = slices.Clone(w.life.status.History)
	}
	// By the clock of the loop, which on the kernel is not the world's.
	h.add(status.Transition{Kind: status.OfAgent, Text: "started"}, time.Now())
	return h
}

// remembers looks at the history after a pass: it is short, in order, and says of the last repair
// of each family who made the drift.
func (w *world) remembers() {
	past := w.life.status.History
	if len(past) > maxTransitions {
		w.fail("the history has %d lines", len(past))
	}
	for i := 1; i < len(past); i++ {
		if past[i].Time.Before(past[i-1].Time) {
			w.fail("the history is out of order: %+v, and then %+v", past[i-1], past[i])
		}
	}
	began := 0 // this run
	for i, t := range past {
		if t.Kind == status.OfAgent {
			began = i
		}
	}
	for _, o := range w.life.loop.told.past.families {
		var last status.Transition
		for _, t := range past[began:] {
			if t.Kind == status.OfDrift && t.Key == o.Status.Family &&
				strings.Contains(t.Text, " rules repaired: ") {
				last = t
			}
		}
		if o.Undone > 0 != !last.Time.IsZero() || last.By != o.LastDriftBy {
			w.fail("%d repairs of %s, of what %q did, and the last in the history is %+v",
				o.Undone, o.Status.Family, o.LastDriftBy, last)
		}
	}
}

// startAgent begins a run of the agent.
func (w *world) startAgent() {
	kernel, err := w.nat.open()
	if err != nil {
		w.fail("open iptables: %v", err)
	}
	past := w.past()
	w.life = newLife(w, kernel)
	w.life.loop.told.past = past
	w.lookAt, w.passAt = w.nat.now(), w.nat.now()
	w.oracle.started()
	w.takeAttribute(w.attribute)
}

// setBrake is the agent's news of the brake.
func (w *world) setBrake(b brake) {
	w.brake = b
	w.life.loop.brake = b
	w.passAt = w.nat.now()
}

// newBoot takes away the mark, as the tmpfs is that it lies in.
func (w *world) newBoot() { w.mark = &mark{dir: "/nonexistent", log: zap.NewNop()} }

// takeAttribute is the agent's news of the attribute.
func (w *world) takeAttribute(a *attr) {
	w.attribute = a
	news := attributeNews{Err: errors.New("none yet")}
	if a != nil {
		good := &goodAttribute{Config: a.config(), Text: fmt.Append(nil, *a), Read: w.nat.now()}
		news = attributeNews{Good: good}
	}
	w.life.loop.attribute.take(news, zap.NewNop())
	w.passAt = w.nat.now()
}

// eventMode is when the kernel tells of a write.
type eventMode uint8

const (
	prompt eventMode = iota
	late             // after whatever passes come before
	lost             // that there was more than could be taken
	missed           // never
)

func (m eventMode) String() string { return [...]string{"prompt", "late", "lost", "missed"}[m] }

// write is another program's. It says which chains were touched.
func (w *world) write(f iptables.Family, m eventMode, lines ...string) {
	w.nat.restore(f, "*nat\n"+strings.Join(lines, "\n")+"\nCOMMIT\n")
	var touched []string
	for _, line := range lines {
		name := strings.TrimPrefix(strings.Fields(line)[0], ":")
		if strings.HasPrefix(name, "-") {
			name = strings.Fields(line)[1]
		}
		touched = append(touched, name)
	}
	w.told(f, m, touched)
}

// flush is iptables -t nat -F.
func (w *world) flush(f iptables.Family, m eventMode) {
	touched := []string{}
	for name := range w.nat.chains(f) {
		touched = append(touched, name)
	}
	w.nat.flush(f)
	w.told(f, m, touched)
}

// told is the kernel's word on a write, which on legacy nobody hears.
func (w *world) told(f iptables.Family, m eventMode, touched []string) {
	w.oracle.written(f)
	if w.nat.backend() == iptables.Legacy || !w.notified || m == missed {
		return
	}
	slices.Sort(touched)
	touched = slices.DeleteFunc(slices.Compact(touched), func(name string) bool {
		return !ours(name) && name != "PREROUTING" && name != "OUTPUT"
	})
	expected := &w.oracle.families[index(f)]
	if len(touched) == 0 {
		expected.untold-- // and need not know
		expected.unseen = false
		return
	}
	e := iptables.Event{Family: f, Chains: touched, PID: 4242, Program: "iptables"}
	life := w.life
	deliver := func() {
		if w.life == life && w.notified {
			life.loop.takeEvent(e, true, w.nat.now())
			expected.untold = max(0, expected.untold-1)
			w.passAt = w.nat.now()
		}
	}
	switch m {
	case prompt:
		deliver()
		return
	case lost:
		e = iptables.Event{Lost: true}
	}
	w.in(w.upTo(2*time.Second), deliver)
}

// allow gives the agent time until all must be as it should be.
func (w *world) allow(d time.Duration) {
	if at := w.nat.now().Add(d); at.After(w.deadline) {
		w.deadline = at
	}
}

// rest waits until all is as it should be, which must happen in the time that was allowed.
func (w *world) rest() {
	w.allow(1500 * time.Millisecond)
	for {
		left := w.deadline.Sub(w.nat.now())
		if left <= 0 {
			w.fail("not as it should be after all this time: %s", w.oracle.calm())
		}
		if w.runUntil(left, func() bool { return w.oracle.calm() == "" }) {
			break
		}
	}
	w.oracle.told()
}

// play is one sequence.
func (w *world) play() {
	w.run(w.upTo(3 * time.Second))
	for range 3 + w.IntN(7) {
		var can []event
		total := 0
		for _, e := range events {
			if (e.can == nil || e.can(w)) && !(w.real && e.memory) {
				can = append(can, e)
				total += e.weight
			}
		}
		n := w.IntN(total)
		i := 0
		for ; n >= can[i].weight; i++ {
			n -= can[i].weight
		}
		w.step("%s", can[i].name)
		w.played[can[i].name]++
		can[i].do(w)
		w.allow(max(can[i].within, soon))
		if w.IntN(4) == 0 { // the next thing happens before this one is dealt with
			w.run(w.upTo(1500 * time.Millisecond))
			continue
		}
		w.rest()
		w.run(w.upTo(2 * time.Second))
	}
	w.step("the end")
	w.allow(soon)
	w.rest()
}

// step notes what is done.
func (w *world) step(format string, args ...any) {
	w.log = append(w.log, w.moment()+fmt.Sprintf(format, args...))
	w.tell(format, args...)
}

func (w *world) moment() string { return w.nat.now().Format("15:04:05.000 ") }

// tell tells what happens, where one sequence is played to be looked at.
func (w *world) tell(format string, args ...any) {
	if *shuffledSeed >= 0 {
		fmt.Printf("%s%s\n", w.moment(), fmt.Sprintf(format, args...))
	}
}

// failure is how a sequence ends that shows a fault.
type failure string

func (w *world) fail(format string, args ...any) {
	panic(failure(w.moment() + fmt.Sprintf(format, args...)))
}
