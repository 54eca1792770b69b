package agent

import (
	"errors"
	"net/netip"
	"slices"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// What can happen to an agent, in a table of events. What must hold then is the oracle's to say
// (shuffle_oracle_test.go).

// event is one thing that can happen to an agent.
type event struct {
	name   string
	weight int
	can    func(*world) bool // nil: at any time
	do     func(*world)
	within time.Duration // until all is as it should be again; 0: soon
	// memory: not on the kernel, where it would take real seconds.
	memory bool
}

const (
	// soon is within how long an agent has done what it can do at once. Envoy is asked each second, a
	// table that nobody tells of is read each 1.5 s, and after a few repairs the next waits up to 6 s.
	soon = 9 * time.Second
	// resyncs is how often the table is read although nothing told of a change, and how often a
	// rule is offered again that the kernel refused.
	resyncs = 5*time.Minute + time.Second
	// probes is how often a family is tried again that could not be used.
	probes = time.Minute + 2*time.Second
)

var events = slices.Concat(envoyEvents, vmEvents, tableEvents, agentEvents)

// When an event can happen.
func envoyIsUp(w *world) bool    { return w.envoy.up && !w.envoy.draining }
func envoyIsDown(w *world) bool  { return !w.envoy.up }
func planeIsUp(w *world) bool    { return w.envoy.planeUp }
func planeIsDown(w *world) bool  { return !w.envoy.planeUp }
func isWriting(w *world) bool    { return !w.life.loop.paused }
func allWorks(w *world) bool     { return w.faults == [2]fault{} }
func hasAttribute(w *world) bool { return w.attribute != nil }

// canStart says whether an agent can: it ends where no family can be used, and systemd starts it
// again.
func canStart(w *world) bool { return w.faults != [2]fault{absent, absent} }

// canHide says whether a restart may pass for none, since uptimes are of whole seconds. The client
// takes a process that is too young for another, so only one that has told its listeners can be
// replaced like that.
func canHide(w *world) bool {
	e, o := &w.envoy, &w.oracle
	return envoyIsUp(w) && o.believed > 0 && e.told && e.reads[o.believed-1].of == e.fingerprint()
}

var envoyEvents = []event{
	{
		name: "the control plane has another configuration", weight: 10, can: planeIsUp,
		do: func(w *world) { w.push(randomSet(w.Rand), true) },
	},
	{
		name: "the control plane has another configuration, and the log does not tell", weight: 2,
		can: planeIsUp,
		do:  func(w *world) { w.push(randomSet(w.Rand), false) },
	},
	{
		name: "all services go", weight: 4, can: planeIsUp,
		do: func(w *world) { w.push(nothing, true) },
	},
	{
		name: "the control plane goes away", weight: 3, can: planeIsUp,
		do: func(w *world) { w.envoy.planeUp = false },
	},
	{
		name: "the control plane comes back", weight: 6, can: planeIsDown,
		do: func(w *world) {
			w.envoy.planeUp = true
			w.in(w.upTo(2*time.Second), w.update)
		},
	},
	{
		name: "Envoy crashes", weight: 3,
		can: func(w *world) bool { return w.envoy.up },
		do:  func(w *world) { w.envoy.stop() },
	},
	{
		name: "Envoy starts", weight: 8, can: envoyIsDown,
		do: func(w *world) { w.startEnvoy(true) },
	},
	{
		name: "Envoy restarts", weight: 5, can: envoyIsUp,
		do: func(w *world) { w.startEnvoy(true) },
	},
	{
		name: "Envoy restarts, which nobody can see", weight: 3, can: canHide,
		do: func(w *world) { w.startEnvoy(false) },
	},
	{
		name: "Envoy restarts, and its control plane answers just behind a dump", weight: 4,
		can: envoyIsUp,
		do: func(w *world) {
			w.startEnvoy(w.IntN(3) > 0 || !canHide(w))
			w.envoy.behind = w.update
		},
	},
	{
		name: "Envoy restarts before its control plane is there", weight: 4, can: envoyIsUp,
		do: func(w *world) {
			w.envoy.planeUp = false
			w.startEnvoy(true)
		},
	},
	{
		name: "Envoy restarts and listens late", weight: 3, can: envoyIsUp,
		do: func(w *world) {
			w.startEnvoy(true)
			w.envoy.bound = false
			w.in(w.upTo(4*time.Second), func() { w.envoy.bound = true })
		},
	},
	{
		name: "Envoy restarts, and its listeners warm up", weight: 3, can: envoyIsUp,
		do: func(w *world) {
			w.startEnvoy(true)
			w.envoy.slow = true
		},
	},
	{
		name: "Envoy listens no more", weight: 2,
		can: func(w *world) bool { return envoyIsUp(w) && w.envoy.bound },
		do:  func(w *world) { w.envoy.bound = false },
	},
	{
		name: "Envoy listens again", weight: 6,
		can: func(w *world) bool { return w.envoy.up && !w.envoy.bound },
		do:  func(w *world) { w.envoy.bound = true },
	},
	{
		name: "Envoy hangs", weight: 3,
		can: func(w *world) bool { return w.envoy.up && !w.envoy.hung },
		do:  func(w *world) { w.envoy.hung = true },
	},
	{
		name: "Envoy answers again", weight: 8,
		can:    func(w *world) bool { return w.envoy.hung },
		within: 5*time.Second + soon,
		do:     func(w *world) { w.envoy.hung = false },
	},
	{
		name: "Envoy is stopped as planned", weight: 3,
		can: func(w *world) bool { return envoyIsUp(w) && !w.envoy.hung },
		do:  func(w *world) { w.envoy.draining = true },
	},
}

var vmEvents = []event{
	{
		name: "somebody else takes a port", weight: 6,
		do: func(w *world) {
			f, side := w.IntN(2), w.IntN(sides)
			w.step("  %v, port %d", bothFamilies[f], portOf[side])
			w.foreign[f][side] = true
		},
	},
	{
		name: "everybody else leaves the ports", weight: 8,
		can: func(w *world) bool { return w.foreign != [2][sides]bool{} },
		do:  func(w *world) { w.foreign = [2][sides]bool{} },
	},
	{
		name: "the attribute changes", weight: 4,
		do: func(w *world) {
			a := &attr{serving: w.IntN(3) > 0, dns: w.IntN(2) == 0, excludes: w.IntN(2) == 0}
			w.step("  %+v", *a)
			w.takeAttribute(a)
		},
	},
	{
		name: "the attribute turns out to be another VM's: the agent starts anew", weight: 2,
		can: func(w *world) bool { return hasAttribute(w) && canStart(w) },
		do: func(w *world) {
			w.notified, w.attribute = true, nil
			w.startAgent()
		},
	},
	{
		name: "the metadata server goes away", weight: 1, can: hasAttribute,
		do: func(w *world) {
			good := w.life.loop.attribute.Good
			w.life.loop.attribute.take(attributeNews{Good: good, Source: errSource}, w.life.loop.log)
		},
	},
	{
		name: "the brake comes", weight: 4, can: func(w *world) bool { return !w.brake.Off },
		do: func(w *world) {
			w.setBrake(brake{Off: true, Since: w.nat.now(), By: metadata.OfProject})
		},
	},
	{
		name: "the brake goes", weight: 8, can: func(w *world) bool { return w.brake.Off },
		do: func(w *world) { w.setBrake(brake{}) },
	},
	{
		name: "an interface gets or loses an address of a service", weight: 3,
		do: func(w *world) {
			if w.local = (netip.Addr{}); w.IntN(3) > 0 {
				w.local = netip.MustParseAddr([]string{"10.10.0.2", "fd20::7"}[w.IntN(2)])
			}
			w.step("  %v", w.local)
		},
	},
	{
		name: "nothing happens", weight: 2,
		do: func(w *world) { w.run(w.upTo(10 * time.Second)) },
	},
	{
		name: "the VM is suspended", weight: 2,
		do: func(w *world) { w.skip(w.upTo(10 * time.Minute)) },
	},
	{
		name: "older connections have settled", weight: 6,
		can: func(w *world) bool { return w.settling() > 0 },
		do: func(w *world) {
			w.rest()
			if d := w.settling() - time.Second; d > 0 {
				w.skip(d)
				w.allow(soon)
				w.rest()
			}
			w.skip(2 * time.Second)
		},
	},
}

var errSource = errors.New("metadata server: no route to host")

var agentEvents = []event{
	{
		name: "the agent restarts", weight: 5, can: canStart,
		do: func(w *world) {
			w.notified = true
			w.startAgent()
		},
	},
	{
		name: "the agent restarts before it is told of the brake", weight: 2, can: canStart,
		do: func(w *world) {
			w.notified, w.brake.Awaited = true, true
			w.startAgent()
			w.in(w.upTo(3*time.Second), func() {
				told := w.brake
				told.Awaited = false
				w.setBrake(told)
			})
		},
	},
	{
		name: "the agent restarts in another boot", weight: 3, can: canStart,
		do: func(w *world) {
			w.notified = true
			w.newBoot()
			w.startAgent()
		},
	},
	{
		name: "the agent restarts before the proxy's user is there", weight: 1, can: canStart,
		do: func(w *world) {
			w.notified, w.noUser = true, true
			w.startAgent()
		},
	},
	{
		name: "the proxy's user is made", weight: 10, can: func(w *world) bool { return w.noUser },
		do: func(w *world) { w.noUser = false },
	},
	{
		name: "cleanup pauses the agent", weight: 1, can: isWriting,
		do: func(w *world) {
			w.life.loop.paused = true
			w.passAt = w.nat.now()
		},
	},
	{
		name: "a paused agent restarts", weight: 20,
		can: func(w *world) bool { return w.life.loop.paused && canStart(w) },
		do: func(w *world) {
			w.notified = true
			w.startAgent()
		},
	},
	{
		name: "the kernel's notifications end", weight: 1,
		can: func(w *world) bool { return w.notified },
		do: func(w *world) {
			w.notified = false
			w.life.loop.takeEvent(iptables.Event{}, false, w.nat.now())
			w.passAt = w.nat.now()
		},
	},
}

var tableEvents = []event{
	{
		name: "somebody undoes rules", weight: 30, can: isWriting,
		do: func(w *world) {
			f, ok := w.undoes()
			d := damages[w.IntN(len(damages))]
			mode := []eventMode{prompt, prompt, prompt, prompt, late, late, lost, missed}[w.IntN(8)]
			if !ok || !d.do(w, f, mode, w.nat.chains(f)) {
				return
			}
			w.step("  %v: %s; the kernel's word: %s", f, d.name, mode)
			if mode == missed {
				w.run(w.upTo(2 * time.Second))
				w.skip(resyncs)
			}
		},
	},
	{
		name: "somebody undoes rules while the configuration changes", weight: 6, can: envoyIsUp,
		do: func(w *world) {
			f, ok := w.undoes()
			d := damages[w.IntN(len(damages))]
			if !ok || !planeIsUp(w) || !isWriting(w) {
				return
			}
			w.push(randomSet(w.Rand), true)
			w.in(w.upTo(time.Second), func() {
				if w.faults[index(f)] == works && d.do(w, f, late, w.nat.chains(f)) {
					w.step("  %v: %s; the kernel's word comes late", f, d.name)
				}
			})
		},
	},
	{
		name: "somebody keeps undoing rules", weight: 2, can: isWriting,
		do: (*world).fight,
	},
	{
		name: "others tidy up", weight: 3,
		do: func(w *world) {
			for i, f := range bothFamilies {
				if w.faults[i] != works {
					continue
				}
				for _, name := range []string{"OUTPUT", "PREROUTING"} {
					for n, rule := range w.oracle.families[i].foreign[name] {
						if n > 2 {
							w.write(f, prompt, "-D "+name+" "+rule)
						}
					}
				}
			}
		},
	},
	{
		name: "the lock is held", weight: 2, can: isWriting,
		within: 31*time.Second + soon,
		do:     func(w *world) { w.breaks(locked) },
	},
	{
		name: "a family's table goes", weight: 2, can: isWriting,
		within: probes + soon,
		do:     func(w *world) { w.breaks(absent) },
	},
	{
		name: "the agent restarts without a family's table", weight: 2, can: allWorks,
		within: probes + soon,
		do: func(w *world) {
			w.breaks(absent)
			w.startAgent()
		},
	},
	{
		name: "reads do not end", weight: 2, can: isWriting,
		within: 31*time.Second + soon, memory: true,
		do: func(w *world) { w.breaks(hangs) },
	},
	{
		name: "the kernel refuses comments", weight: 2,
		can:    func(w *world) bool { return isWriting(w) && allWorks(w) },
		within: 31*time.Second + soon,
		do: func(w *world) {
			for _, f := range bothFamilies {
				w.setFault(f, refuses)
			}
			w.push(randomSet(w.Rand), true)
			w.run(w.upTo(8 * time.Second))
			for _, f := range bothFamilies {
				w.setFault(f, works)
			}
			w.run(w.upTo(2 * time.Second))
			w.skip(resyncs)
		},
	},
}

// undoes is a family whose rules can be seen and are there.
func (w *world) undoes() (f iptables.Family, ok bool) {
	f = bothFamilies[w.IntN(2)]
	seen := w.faults[index(f)] == works && w.oracle.families[index(f)].adopted
	return f, seen && len(oursOf(w.nat.chains(f))) > 0
}

// breaks has the programs of a family fail for a while.
func (w *world) breaks(how fault) {
	i := w.IntN(2)
	if w.faults[i] != works {
		return
	}
	d := time.Second + w.upTo(12*time.Second)
	w.step("  %v, for %v", bothFamilies[i], d)
	w.setFault(bothFamilies[i], how)
	w.in(d, func() {
		if w.faults[i] == how {
			w.setFault(bothFamilies[i], works)
			w.step("  (%v works again)", bothFamilies[i])
			w.allow(probes + soon)
		}
	})
	w.allow(d)
}

func (w *world) setFault(f iptables.Family, how fault) {
	w.faults[index(f)] = how
	w.nat.fault(f, how)
}

// fight is somebody who undoes our rules as soon as they are there.
func (w *world) fight() {
	f, ok := w.undoes()
	if !ok || !jumps(w.nat.chains(f)) {
		return
	}
	long, every := 15*time.Second+w.upTo(15*time.Second), 100*time.Millisecond+w.upTo(time.Second)
	if w.real {
		every += time.Second
	}
	w.step("  %v, for %v each %v", f, long, every)
	before := w.nat.writes(f)
	for end := w.nat.now().Add(long); w.nat.now().Before(end); w.run(every) {
		if j := w.someJump(w.nat.chains(f)); j != "" && w.faults[index(f)] == works {
			w.write(f, prompt, "-D "+j)
		}
	}
	made := w.nat.writes(f) - before
	if most := 8 + int(long/(1500*time.Millisecond)); made > most {
		w.fail("%v: %d writes in a fight of %v, at most %d are well", f, made, long, most)
	}
	w.allow(soon)
	w.rest()
	w.skip(30 * time.Second)
	w.run(1500 * time.Millisecond)
	w.allow(soon)
	w.rest()
	if w.finding(symptom.Fight) {
		w.fail("the fight is not over half a minute after its end")
	}
}

// settling is for how long older connections are still let through.
func (w *world) settling() (d time.Duration) {
	for _, e := range w.oracle.families {
		d = max(d, e.settling.Sub(w.nat.now()))
	}
	return d
}

// push is a new configuration of the control plane's.
func (w *world) push(s *set, logged bool) {
	w.step("  %s", s.name)
	w.envoy.plane = s
	w.in(w.upTo(time.Second), func() {
		if w.envoy.update() && logged {
			w.hint()
		}
	})
}
