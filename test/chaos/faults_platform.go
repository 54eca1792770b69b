package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
	"github.com/service-proxy-agent/service-proxy-agent/test/platform"
)

const (
	metadataTree = "/computeMetadata/"
	guestTree    = "/computeMetadata/v1/instance/guest-attributes/"
	// brakeWithin is docs/outside.md's: each jump is out, and in again, within so long.
	brakeWithin = 5 * time.Second
	// metadataAway is the longest pause between two questions to a metadata server that gives no
	// usable answer (package metadata).
	metadataAway = 30 * time.Second
	// brakeAway is the same for the brake's key, with the time that its poll is held.
	brakeAway = 8 * time.Second
	// brakeUnheard is for how long a start waits for the metadata server's word of the brake:
	// docs/outside.md.
	brakeUnheard = 5 * time.Second
	// guestLate is until a guest attribute that somebody else has written or lost is right again: by
	// the next heartbeat, if it is that, and the budget.
	guestLate = 70 * time.Second
	// clockAsked is how often the metadata server is asked for the time.
	clockAsked = 30 * time.Second
)

// platformFaults are the metadata server's, the attribute's and the guest attributes'.
func platformFaults() []Fault {
	deaf := func(name string, weight int,
		begin func(*World, *rand.Rand) (func() error, error)) Fault {
		return Fault{Name: name, Weight: weight, Shortest: 200 * time.Millisecond,
			Longest: 12 * time.Second, Tells: metadataAway,
			Begin: func(w *World, random *rand.Rand) (func() error, error) {
				hears := w.deafen()
				end, err := begin(w, random)
				return func() error { hears(); return end() }, err
			}}
	}
	inject := func(f func(*rand.Rand) platform.Fault) func(*World, *rand.Rand) (func() error, error) {
		return func(w *World, random *rand.Rand) (func() error, error) {
			remove := w.Platform.Inject(f(random))
			return func() error { remove(); return nil }, nil
		}
	}
	return []Fault{
		deaf("platform-hangs", 2, inject(func(*rand.Rand) platform.Fault {
			return platform.Fault{Prefix: metadataTree, Hang: true}
		})),
		deaf("platform-fails", 2, inject(func(random *rand.Rand) platform.Fault {
			codes := []int{403, 404, 429, 500, 503}
			return platform.Fault{Prefix: metadataTree, Status: codes[random.IntN(len(codes))]}
		})),
		deaf("platform-slow", 2, inject(func(random *rand.Rand) platform.Fault {
			return platform.Fault{Prefix: metadataTree,
				Delay: 200*time.Millisecond + time.Duration(random.Int64N(int64(8*time.Second)))}
		})),
		deaf("platform-lies", 2, inject(lie)),
		deaf("platform-refuses", 2, rejects("tcp-reset")),
		deaf("platform-unreachable", 1, rejects("")),
		{Name: "platform-other-id", Weight: 1, Group: "agent", Shortest: 500 * time.Millisecond,
			Longest: 4 * time.Second, Begin: otherID, Hinders: true, Recovery: agentStarts},
		{Name: "platform-clock", Weight: 1, Group: "clock", Shortest: time.Second,
			Longest: 12 * time.Second, Tells: clockAsked + time.Second, Begin: clockOff},

		// What is written there may be a minute late by the budget, and half a minute by the back-off.
		{Name: "guest-fails", Weight: 2, Shortest: 200 * time.Millisecond, Longest: 15 * time.Second,
			Begin: inject(guestFails), Excuses: silent(100 * time.Second)},
		{Name: "guest-lost", Weight: 1, Begin: guestLost,
			Excuses: silent(guestLate)},
		{Name: "guest-overwritten", Weight: 1, Begin: guestOverwritten, Excuses: silent(guestLate)},
		{Name: "cloud-logging-fails", Weight: 1, Shortest: time.Second, Longest: 12 * time.Second,
			Begin: inject(cloudFails)},

		{Name: "attribute-harmless", Weight: 2, Shortest: 100 * time.Millisecond,
			Longest: 6 * time.Second, Begin: harmlessEdit},
		// Live within seconds, both ways: docs/attribute.md.
		heard(Fault{Name: "attribute-excludes", Weight: 1, Shortest: 500 * time.Millisecond,
			Longest: 5 * time.Second, Begin: excludes,
			Excuses: []Excuse{{Kind: Escaped, After: brakeWithin,
				Only: []string{Web4.String(), Web6.String()}}}}, metadataAway),
		// The last good one stays in force.
		{Name: "attribute-malformed", Weight: 2, Shortest: 200 * time.Millisecond,
			Longest: 8 * time.Second, Begin: malformed},
		{Name: "attribute-gone", Weight: 2, Shortest: 200 * time.Millisecond,
			Longest: 8 * time.Second, Begin: attributeGone},
		heard(Fault{Name: "attribute-all", Weight: 1, Group: "all", Shortest: time.Second,
			Longest: 6 * time.Second, Begin: toggleAll, Excuses: otherMode()}, metadataAway),
		// Without intercept-dns questions go to the resolvers. Once it is back they do until Envoy is
		// seen to take them, if an agent was started meanwhile.
		heard(Fault{Name: "attribute-dns", Weight: 1, Group: "dns", Shortest: time.Second,
			Longest: 6 * time.Second, Begin: toggleDNS,
			Excuses: []Excuse{{Kind: Escaped, After: brakeWithin, Envoy: true,
				Only: []string{resolver4.String(), resolver6.String()}}}}, metadataAway),

		// Jumps that are out go in once Envoy takes connections, as after a start.
		heard(Fault{Name: "brake-instance", Weight: 1, Group: "brake-instance",
			Shortest: 500 * time.Millisecond, Longest: 9 * time.Second, Begin: brakeInstance,
			Excuses: []Excuse{{Kind: Escaped, After: brakeWithin, Envoy: true}}}, brakeAway),
		heard(Fault{Name: "brake-project", Weight: 1, Group: "brake-project",
			Shortest: 500 * time.Millisecond, Longest: 9 * time.Second, Begin: brakeProject,
			Excuses: []Excuse{{Kind: Escaped, After: brakeWithin, Envoy: true}}}, brakeAway),
		// Envoy ends while the fleet's metadata asks for bypass. While it runs the key changes nothing.
		heard(Fault{Name: "brake-bypass", Weight: 2, Group: "envoy", Also: "brake-instance",
			Shortest: brakeWithin + time.Second, Longest: brakeWithin + 5*time.Second, Begin: brakeBypass,
			Heals: 3 * time.Second, Unless: func(s Setting) bool { return s.Bypass }}, brakeAway),
		{Name: "brake-nonsense", Weight: 1, Group: "brake-instance", Shortest: 500 * time.Millisecond,
			Longest: 4 * time.Second, Begin: brakeNonsense},
	}
}

// silent are what suspends the heartbeat among the guest attributes, never that of the loop.
func silent(after time.Duration) []Excuse {
	return []Excuse{{Kind: Silent, Only: []string{guestBeat}, After: after}}
}

// otherMode is what another intercept-all-outbound excuses, on or off: what is no service's goes
// another way, by an Envoy that may not know yet what to do with it, and root's connections do.
func otherMode() (all []Excuse) {
	plain := []string{Plain4.String(), Plain6.String(),
		netip.AddrPortFrom(Plain4.Addr(), sshPort).String()}
	for _, kind := range []Kind{Refused, Blocked, Escaped, Trapped, Cut} {
		all = append(all, Excuse{Kind: kind, After: brakeWithin, Only: plain})
	}
	for _, kind := range []Kind{Blocked, Escaped, Trapped} {
		all = append(all, Excuse{Kind: kind, After: brakeWithin, Only: []string{DB4.String()}})
	}
	return all
}

// hearing is whether the agent can hear what the metadata server says.
type hearing struct {
	mu   sync.Mutex
	deaf int     // faults that keep it from that
	key  *string // of the brake, at the instance; nil: none
	// projectOff: the project's is off.
	projectOff bool
	again      time.Time     // when the last of them was over
	waits      []*Span       // what was said meanwhile
	away       time.Duration // within what that is heard, or a start of the agent, once it can
}

// deafen says that what the metadata server says is not heard from now on, until hears.
func (w *World) deafen() (hears func()) {
	h := &w.hearing
	h.mu.Lock()
	h.deaf++
	h.mu.Unlock()
	w.startsUnheard()
	return func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.deaf--; h.deaf > 0 {
			return
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		h.again = time.Now()
		for _, span := range h.waits {
			span.End = h.again
		}
		if h.away > 0 {
			w.backsOff(h.again.Add(h.away), h.again.Add(h.away))
		}
		h.waits, h.away = nil, 0
	}
}

// startsUnheard excuses an agent that has just started and cannot hear the metadata server: it
// repairs nothing until it was told of the brake, or has waited for brakeUnheard.
func (w *World) startsUnheard() {
	w.mu.Lock()
	now := time.Now()
	young := w.pid != 0 && now.Sub(w.started) < agentStarts
	w.mu.Unlock()
	h := &w.hearing
	h.mu.Lock()
	unheard := h.deaf > 0 && young
	if unheard { // one without what an earlier run has kept needs the attribute
		h.away = metadataAway
	}
	h.mu.Unlock()
	if unheard {
		w.Excuse(Span{Event: Event{Name: "agent-starts-unheard"}, Begin: now,
			End: now.Add(brakeUnheard), Hinders: true, Recovery: agentStarts})
	}
}

// heard is a fault that the metadata server tells of, as it tells of its end. An end that the agent
// cannot hear lasts until it can, and until it has asked again, away later at most.
func heard(f Fault, away time.Duration) Fault {
	begin := f.Begin
	f.Heals = max(f.Heals, brakeWithin)
	f.Begin = func(w *World, random *rand.Rand) (func() error, error) {
		end, err := begin(w, random)
		return func() error {
			w.unheard(f, away)
			return end()
		}, err
	}
	return f
}

// unheard has the excuses of a fault that is over last until the agent has heard of it.
func (w *World) unheard(f Fault, away time.Duration) {
	h := &w.hearing
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.deaf == 0 && time.Since(h.again) > away {
		return
	}
	span := &Span{Event: Event{Name: f.Name + "-unheard"}, Begin: time.Now(), End: h.again}
	for _, e := range f.Excuses {
		e.After += away
		span.Excuses = append(span.Excuses, e)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if h.deaf > 0 {
		span.End = time.Time{}
		h.waits, h.away = append(h.waits, span), max(h.away, away)
	} else {
		w.backsOff(h.again.Add(away), h.again.Add(away))
	}
	w.spans = append(w.spans, span)
}

// lie answers with what is no answer, or not this question's.
func lie(random *rand.Rand) platform.Fault {
	f := platform.Fault{Prefix: metadataTree, Method: http.MethodGet, Status: http.StatusOK}
	bodies := []string{"", "{", "null", "<html>captive portal</html>", `{"api-version":"0.2"`,
		"\x00\xff\xfe", strings.Repeat("[", 100_000), "off\noff", "18446744073709551616"}
	f.Body = bodies[random.IntN(len(bodies))]
	etags := []string{"", "0", "always-the-same", "\"quoted\""}
	f.Header = map[string]string{"ETag": etags[random.IntN(len(etags))]}
	return f
}

// rejects has the metadata server's port reset connections, or answer nothing at all.
func rejects(with string) func(*World, *rand.Rand) (func() error, error) {
	rule := []string{"INPUT", "-d", lab.MetadataAddr.String(), "-p", "tcp", "--dport", "80", "-j"}
	if with == "" {
		rule = append(rule, "DROP")
	} else {
		rule = append(rule, "REJECT", "--reject-with", with)
	}
	return func(w *World, _ *rand.Rand) (func() error, error) {
		run := func(what string) error {
			// Not legacy's, whose lock another fault may hold.
			_, err := w.Service.Run(context.Background(), "iptables-nft",
				slices.Concat([]string{"-w", "10", what}, rule)...)
			return err
		}
		return func() error { return run("-D") }, run("-A")
	}
}

// otherID is a metadata server that takes the VM for another one, at a start, when it is asked. A
// run that learns so has gone by what is not this VM's, and ends; its unit starts the next one.
func otherID(w *World, random *rand.Rand) (func() error, error) {
	w.otherIDs.Store(true)
	other := random.Uint64()
	change := func() error {
		w.Platform.Update(func(v *platform.VM) { v.ID ^= other })
		return errors.Join(w.stopAgent(), w.StartAgent())
	}
	return change, change()
}

// endsAnew says whether the end of which the log tells is that of a run which has learned that.
func (w *World) endsAnew(log string) bool {
	return w.otherIDs.Load() && strings.Contains(log, "starting anew")
}

func clockOff(w *World, random *rand.Rand) (func() error, error) {
	offsets := []time.Duration{time.Minute, -time.Minute, 10 * time.Minute, -10 * time.Minute,
		-24 * time.Hour, 20 * 365 * 24 * time.Hour}
	w.Platform.SetClock(offsets[random.IntN(len(offsets))])
	return func() error { w.Platform.SetClock(0); return nil }, nil
}

func guestFails(random *rand.Rand) platform.Fault {
	f := platform.Fault{Prefix: guestTree}
	switch random.IntN(4) {
	case 0:
		f.Hang = true
	case 1:
		f.Delay = time.Duration(random.Int64N(int64(8 * time.Second)))
	default:
		// Not the 403 of guest attributes that are disabled, after which they are asked for again each
		// two minutes: without its words it is one failure among others.
		codes := []int{403, 429, 500, 503}
		f.Status = codes[random.IntN(len(codes))]
		f.Body = "not now"
	}
	return f
}

// guestNames are the agent's guest attributes.
var guestNames = []string{"agent-heartbeat", "agent-last-failure", "agent-status", "proxy-version"}

func guestLost(w *World, random *rand.Rand) (func() error, error) {
	w.Platform.DeleteGuestAttribute(attribute.Name, guestNames[random.IntN(len(guestNames))])
	return nil, nil
}

func guestOverwritten(w *World, random *rand.Rand) (func() error, error) {
	values := []string{"", "2001-01-01T00:00:00Z", "\x1b[2J", strings.Repeat("x", 10_000)}
	w.Platform.SetGuestAttribute(attribute.Name, guestNames[random.IntN(len(guestNames))],
		values[random.IntN(len(values))])
	return nil, nil
}

func cloudFails(random *rand.Rand) platform.Fault {
	f := platform.Fault{Prefix: "/v2/entries:write"}
	codes := []int{0, 401, 403, 429, 500, 503}
	if f.Status = codes[random.IntN(len(codes))]; f.Status == 0 {
		f.Hang = true
	}
	return f
}

// within is the object at a key of another, made where it is missing.
func within(m map[string]any, key string) map[string]any {
	in, ok := m[key].(map[string]any)
	if !ok {
		in = map[string]any{}
		m[key] = in
	}
	return in
}

const interceptionPart = "traffic-interception"

// harmlessEdit changes what no connection of the game depends on.
func harmlessEdit(w *World, random *rand.Rand) (func() error, error) {
	edits := []func(map[string]any){
		func(m map[string]any) { within(m, "labels")["version"] = "canary" },
		func(m map[string]any) { within(m, "labels")["ü"] = strings.Repeat("long ", 1000) },
		func(m map[string]any) { m["no-key-of-ours"] = []any{1, "two", nil} },
		func(m map[string]any) { within(m, "proxy-spec")["tracing"] = "ON" },
		func(m map[string]any) {
			within(m, interceptionPart)["exclude-outbound-ip-ranges"] = []string{"10.99.0.0/16", "fd99::1"}
		},
		func(m map[string]any) {
			within(m, interceptionPart)["exclude-outbound-port-ranges"] = []string{"3306", "7100-7000"}
		},
		func(m map[string]any) {
			within(m, "service")["serving-ports"] = []int{mesh.AppPort, 8082}
		},
		func(m map[string]any) {
			all := make([]string, 1000)
			for i := range all {
				all[i] = fmt.Sprintf("10.98.%d.%d", i>>8, i&255)
			}
			within(m, interceptionPart)["exclude-outbound-ip-ranges"] = all
		},
	}
	return w.EditAttribute(edits[random.IntN(len(edits))])
}

// excludes takes a service's addresses out of the interception.
func excludes(w *World, _ *rand.Rand) (func() error, error) {
	return w.EditAttribute(func(m map[string]any) {
		within(m, interceptionPart)["exclude-outbound-ip-ranges"] =
			[]string{Web4.Addr().String(), Web6.Addr().String()}
	})
}

func malformed(w *World, random *rand.Rand) (func() error, error) {
	texts := []string{"", "{", "[]", "null", `{"service":{"serving-ports":["80"]}}`,
		`{"traffic-interception":{"exclude-outbound-ip-ranges":["10.0.0.0/99"]}}`,
		`{"proxy-spec":{"proxy-port":15000}}`, `{"mode":"ON","asm-config":{}}`, "\xff\xfe",
		strings.Repeat(`{"a":`, 10_000)}
	w.Platform.SetAttribute(attribute.Name, texts[random.IntN(len(texts))])
	return w.setAttribute, nil
}

func attributeGone(w *World, _ *rand.Rand) (func() error, error) {
	w.Platform.DeleteAttribute(attribute.Name)
	return w.setAttribute, nil
}

// toggleAll turns intercept-all-outbound on or off. Envoy is told first what to do with it.
func toggleAll(w *World, _ *rand.Rand) (func() error, error) {
	if w.Setting.All {
		return w.EditAttribute(func(m map[string]any) {
			delete(within(m, interceptionPart), "intercept-all-outbound")
		})
	}
	forget, err := w.EditConfig(func(c *controlplane.Config) { c.Passthrough = true })
	if err != nil {
		return nil, err
	}
	undo, err := w.EditAttribute(func(m map[string]any) {
		within(m, interceptionPart)["intercept-all-outbound"] = true
	})
	return func() error { return errors.Join(undo(), forget()) }, err
}

func toggleDNS(w *World, _ *rand.Rand) (func() error, error) {
	on := !w.Setting.DNS
	return w.EditAttribute(func(m map[string]any) {
		within(m, interceptionPart)["intercept-dns"] = on
	})
}

// pulls are ways to write it.
var pulls = []string{"off", "OFF", " off\n"}

func brakeInstance(w *World, random *rand.Rand) (func() error, error) {
	return w.pull(pulls[random.IntN(len(pulls))]), nil
}

func brakeProject(w *World, _ *rand.Rand) (func() error, error) {
	var project *platform.Project
	w.Platform.Update(func(v *platform.VM) { project = v.Project })
	project.SetAttribute(metadata.InterceptionKey, "off")
	w.projectBrake(true)
	return func() error {
		w.projectBrake(false)
		project.DeleteAttribute(metadata.InterceptionKey)
		return nil
	}, nil
}

// projectBrake notes whether the project's key is off, for braked.
func (w *World) projectBrake(off bool) {
	w.hearing.mu.Lock()
	defer w.hearing.mu.Unlock()
	w.hearing.projectOff = off
}

// pull writes the key of the instance.
func (w *World) pull(value string) (end func() error) {
	is := func(key *string) { w.hearing.mu.Lock(); w.hearing.key = key; w.hearing.mu.Unlock() }
	w.Platform.SetAttribute(metadata.InterceptionKey, value)
	is(&value)
	return func() error {
		is(nil)
		w.Platform.DeleteAttribute(metadata.InterceptionKey)
		return nil
	}
}

// braked says whether the jumps are to be out, and the agent can know it.
func (w *World) braked() bool {
	h := &w.hearing
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.deaf > 0 || time.Since(h.again) < brakeAway {
		return false
	}
	if h.key == nil {
		return h.projectOff
	}
	return strings.EqualFold(strings.TrimSpace(*h.key), "off")
}

// brakeBypass has Envoy end once the key is heard of.
func brakeBypass(w *World, random *rand.Rand) (func() error, error) {
	undo := w.pull(" Bypass-When-Down ")
	var away *Span
	kill := random.IntN(2) == 0
	killed := background(func(ctx context.Context) {
		sleep(ctx, brakeWithin)
		away = w.openSpan(Span{Event: Event{Name: "brake-bypass-away"}, EnvoyAway: true,
			Excuses: []Excuse{{Kind: Refused, After: time.Second},
				{Kind: Escaped, After: brakeWithin}, {Kind: Cut}}})
		w.endEnvoy(kill)
	})
	return func() error {
		err := errors.Join(killed(), undo())
		w.endWhenTaken(away)
		return errors.Join(err, w.runEnvoy())
	}, nil
}

// brakeNonsense changes nothing: nobody understands it.
func brakeNonsense(w *World, random *rand.Rand) (func() error, error) {
	values := []string{"", "stop", "0", "off off", strings.Repeat("off", 1000)}
	return w.pull(values[random.IntN(len(values))]), nil
}
