package chaos

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"syscall"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// hotDrain is how long an epoch that has handed over goes on.
const hotDrain = 4 * time.Second

// startEnvoy starts the Envoy of a game, and what its unit does for it.
func (w *World) startEnvoy(ctx context.Context) (err error) {
	opts := lab.EnvoyOptions{ControlPlane: w.CPAddr, Runtime: true}
	if w.Setting.Hot {
		if opts.Supervisor = w.Options.Agent; opts.Supervisor == "" {
			if opts.Supervisor, err = mesh.Binary(); err != nil {
				return err
			}
		}
		opts.SupervisorArgs = []string{"--start-limit", "8s"}
		seconds := int(hotDrain.Seconds())
		opts.Args = []string{"--drain-time-s", fmt.Sprint(seconds / 2),
			"--parent-shutdown-time-s", fmt.Sprint(seconds)}
	}
	w.envoy.started = time.Now()
	if w.Envoy, err = w.Mesh.StartEnvoy(opts); err != nil {
		return err
	}
	w.envoy.wanted = true
	w.Go(w.lookAfterEnvoy)
	return w.Envoy.WaitReady(ctx)
}

// envoyUnit is what the game knows of the processes of Envoy; guarded by World.mu.
type envoyUnit struct {
	wanted  bool // its unit is to start it again when it has ended
	started time.Time
	waits   []*wait
	away    int // faults that have the control plane away
	paused  int
	reloads int // under way
	stops   int // planned ones under way
}

// wait is a span that ends when Envoy has taken a push, and has gone on to answer for a while.
type wait struct {
	span *Span
	push controlplane.Push
}

// settled is how long Envoy has to go on: the agent may not have looked before it went away again.
const settled = 5 * time.Second

// openSpan begins a span that is not that of its fault.
func (w *World) openSpan(s Span) *Span {
	w.mu.Lock()
	defer w.mu.Unlock()
	s.Begin = time.Now()
	w.spans = append(w.spans, &s)
	return &s
}

// endWhenTaken ends a span at the moment from which on Envoy has had what the control plane says
// now. A service is intercepted once Envoy has it: what Envoy or its control plane needs until then
// is not the agent's.
func (w *World) endWhenTaken(s *Span) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.envoy.waits = append(w.envoy.waits, &wait{span: s, push: w.pushed})
}

// lookAfterEnvoy is Envoy's unit (Restart=always), and watches what Envoy has taken.
func (w *World) lookAfterEnvoy(ctx context.Context) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	var ended time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		w.mu.Lock()
		wanted, waits := w.envoy.wanted, len(w.envoy.waits)
		w.mu.Unlock()
		switch {
		case !wanted || w.Envoy.PID() != 0:
			ended = time.Time{}
		case ended.IsZero():
			ended = time.Now()
		case time.Since(ended) > time.Second:
			w.Log("    Envoy has ended by itself: %s", w.Envoy.LogTail(1))
			if err := w.runEnvoy(); err != nil {
				w.Log("    Envoy: %v", err)
			}
		}
		if waits == 0 {
			continue
		}
		ok := w.envoyServes(ctx)
		now := time.Now()
		w.mu.Lock()
		left := w.envoy.waits[:0]
		for _, x := range w.envoy.waits {
			switch {
			case !ok || !w.CP.Answered(w.envoy.started, x.push):
				x.span.End = time.Time{}
			case x.span.End.IsZero():
				x.span.End = now
			case now.Sub(x.span.End) > settled:
				continue
			}
			left = append(left, x)
		}
		w.envoy.waits = left
		w.mu.Unlock()
	}
}

// envoyServes says whether Envoy is live, and has the interception listeners as they are wanted:
// active, with none refused and none that waits for more.
func (w *World) envoyServes(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	state, err := w.Envoy.Admin(ctx, "/ready")
	if err != nil || strings.TrimSpace(state) != "LIVE" {
		return false
	}
	text, err := w.Envoy.Admin(ctx, "/config_dump?resource=dynamic_listeners&mask=name,"+
		"active_state.last_updated,warming_state.last_updated,error_state.last_update_attempt")
	if err != nil {
		return false
	}
	var dump struct {
		Configs []struct {
			Name    string          `json:"name"`
			Active  json.RawMessage `json:"active_state"`
			Warming json.RawMessage `json:"warming_state"`
			Error   json.RawMessage `json:"error_state"`
		} `json:"configs"`
	}
	if err := json.Unmarshal([]byte(text), &dump); err != nil {
		return false
	}
	w.mu.Lock()
	config := w.config.apply(w.Setting.Base())
	w.mu.Unlock()
	missing := map[string]bool{}
	if len(config.Services) > 0 || config.Passthrough {
		missing[controlplane.OutboundListener] = true
	}
	if len(config.Inbound) > 0 {
		missing[controlplane.InboundListener] = true
	}
	for _, l := range dump.Configs {
		name := strings.TrimSuffix(l.Name, "_V6")
		if name != controlplane.OutboundListener && name != controlplane.InboundListener {
			continue
		}
		if l.Warming != nil || l.Error != nil {
			return false
		}
		if l.Active != nil {
			delete(missing, l.Name)
		}
	}
	return len(missing) == 0
}

// envoyKnows waits until Envoy has taken what the control plane says: it asks one that came back by
// its own back-off, which is no time of the agent's.
func (w *World) envoyKnows(ctx context.Context) {
	began := time.Now()
	for ctx.Err() == nil && time.Since(began) < 45*time.Second {
		w.mu.Lock()
		started, push, reloads := w.envoy.started, w.pushed, w.envoy.reloads
		w.mu.Unlock()
		if reloads == 0 && w.CP.Answered(started, push) && w.envoyServes(ctx) {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if took := time.Since(began); took > time.Second {
		w.Log("Envoy and its control plane needed %.1f s", took.Seconds())
	}
}

// runEnvoy is `systemctl start` of Envoy's unit.
func (w *World) runEnvoy() error {
	w.mu.Lock()
	w.envoy.wanted, w.envoy.started = true, time.Now()
	w.mu.Unlock()
	if w.Envoy.PID() != 0 {
		return nil
	}
	return w.Envoy.Start()
}

// endEnvoy ends it, by kill -9 or SIGTERM.
func (w *World) endEnvoy(kill bool) {
	w.mu.Lock()
	w.envoy.wanted = false
	w.mu.Unlock()
	var epochs []lab.Epoch
	if w.Setting.Hot {
		epochs = w.Envoy.Epochs()
	}
	if kill {
		w.Envoy.Kill()
	} else {
		w.Envoy.Stop()
	}
	for _, e := range epochs { // as systemd does to what is left of a unit
		e.Signal(syscall.SIGKILL)
	}
}

// signalEnvoy sends to what serves.
func (w *World) signalEnvoy(sig syscall.Signal) {
	if !w.Setting.Hot {
		if pid := w.Envoy.PID(); pid != 0 {
			_ = syscall.Kill(pid, sig) // it may have just ended
		}
		return
	}
	for _, e := range w.Envoy.Epochs() {
		e.Signal(sig)
	}
}

// withoutEnvoy opens the span of an Envoy that does not serve: what it refuses is its own, and
// under `bypass` connections may go past it, until it has been ready for 5 s. Under `keep` none
// does.
func (w *World) withoutEnvoy(name string) *Span {
	s := Span{Event: Event{Name: name}, EnvoyAway: true,
		Excuses: []Excuse{{Kind: Refused, After: time.Second}}}
	if w.Setting.Bypass {
		s.Excuses = append(s.Excuses, Excuse{Kind: Escaped, After: 5 * time.Second})
	}
	return w.openSpan(s)
}

// endsEnvoy is a fault that ends Envoy, and starts it when it is taken back.
func endsEnvoy(name string, kill bool, meanwhile func(w *World) (end func() error)) func(*World,
	*rand.Rand) (func() error, error) {
	return func(w *World, _ *rand.Rand) (func() error, error) {
		away := w.withoutEnvoy(name + "-away")
		end := func() error { return nil }
		if meanwhile != nil {
			end = meanwhile(w)
		}
		w.endEnvoy(kill)
		restart := func() error {
			w.endWhenTaken(away)
			return w.runEnvoy()
		}
		if meanwhile == nil {
			return restart, nil
		}
		return end, restart() // it is without a control plane from its start on
	}
}

// controlPlaneAway has it go away; the last one who takes that back has it come back.
func (w *World) controlPlaneAway() (end func() error) {
	if w.envoy.away++; w.envoy.away == 1 { // faults begin and end on one goroutine
		w.CP.GoAway()
	}
	return func() error {
		if w.envoy.away--; w.envoy.away == 0 {
			return w.CP.ComeBack()
		}
		return nil
	}
}

// controlPlanePaused is the same with Pause.
func (w *World) controlPlanePaused() (end func() error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.envoy.paused++; w.envoy.paused == 1 {
		w.CP.Pause()
	}
	return func() error {
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.envoy.paused--; w.envoy.paused == 0 {
			w.CP.Continue()
		}
		return nil
	}
}

// cold are settings without a supervisor.
func cold(s Setting) bool { return !s.Hot }

// envoyFaults are Envoy's.
func envoyFaults() []Fault {
	cut := []Excuse{{Kind: Cut}} // a stream through Envoy ends with it
	return []Fault{{
		Name: "envoy-kill", Weight: 4, Group: "envoy", Shortest: 10 * time.Millisecond,
		Longest: 6 * time.Second, Begin: endsEnvoy("envoy-kill", true, nil), Excuses: cut,
		EnvoyAway: true, Heals: 3 * time.Second,
	}, {
		Name: "envoy-term", Weight: 3, Group: "envoy", Shortest: 10 * time.Millisecond,
		Longest: 4 * time.Second, Begin: endsEnvoy("envoy-term", false, nil), Excuses: cut,
		EnvoyAway: true, Heals: 3 * time.Second,
	}, {
		Name: "envoy-restart", Weight: 3, Group: "envoy", Begin: endsEnvoy("envoy-restart", true, nil),
		Excuses: cut, EnvoyAway: true, Heals: 3 * time.Second,
	}, {
		// A new Envoy without a control plane has no listener, and after 15 s says that it is live. The
		// rules stay: what it does not serve it does not let go by either.
		Name: "envoy-restart-away", Weight: 2, Group: "envoy", Shortest: 500 * time.Millisecond,
		Longest: 18 * time.Second,
		Begin:   endsEnvoy("envoy-restart-away", true, (*World).controlPlaneAway), Excuses: cut,
		EnvoyAway: true, Heals: 3 * time.Second,
	}, {
		Name: "envoy-restart-paused", Weight: 2, Group: "envoy", Shortest: 500 * time.Millisecond,
		Longest: 18 * time.Second,
		Begin:   endsEnvoy("envoy-restart-paused", true, (*World).controlPlanePaused), Excuses: cut,
		EnvoyAway: true, Heals: 3 * time.Second,
	}, {
		Name: "envoy-restarts", Weight: 2, Group: "envoy", Shortest: time.Second,
		Longest: 5 * time.Second, Begin: restartAgainAndAgain, Excuses: cut, EnvoyAway: true,
		Heals: 3 * time.Second,
	}, {
		Name: "envoy-stop", Weight: 4, Group: "envoy", Shortest: 10 * time.Millisecond,
		Longest: 8 * time.Second,
		Begin: func(w *World, _ *rand.Rand) (func() error, error) {
			away := w.withoutEnvoy("envoy-stop-away")
			w.signalEnvoy(syscall.SIGSTOP)
			return func() error {
				w.signalEnvoy(syscall.SIGCONT)
				w.endWhenTaken(away)
				return nil
			}, nil
		},
	}, {
		// Nothing is excused: an Envoy that is slow serves, and is no Envoy that is down.
		Name: "envoy-slow", Weight: 3, Group: "envoy", Shortest: time.Second,
		Longest: 8 * time.Second,
		Begin: func(w *World, random *rand.Rand) (func() error, error) {
			period := time.Duration(20+random.IntN(100)) * time.Millisecond
			end := background(func(ctx context.Context) {
				for ctx.Err() == nil {
					w.signalEnvoy(syscall.SIGSTOP)
					sleep(ctx, period*4/5)
					w.signalEnvoy(syscall.SIGCONT)
					sleep(ctx, period/5)
				}
			})
			return end, nil
		},
	}, {
		Name: "envoy-admin", Weight: 3, Shortest: time.Second, Longest: 5 * time.Second,
		Begin: overloadAdmin,
	}, {
		// An Envoy that closes its listeners refuses, and under `keep` nothing goes past it.
		Name: "envoy-drain-listeners", Weight: 1, Group: "envoy", Shortest: 500 * time.Millisecond,
		Longest: 4 * time.Second,
		Begin: func(w *World, _ *rand.Rand) (func() error, error) {
			away := w.withoutEnvoy("envoy-drain-listeners-away")
			w.tellEnvoy("/drain_listeners")
			return func() error {
				w.endEnvoy(true)
				w.endWhenTaken(away)
				return w.runEnvoy()
			}, nil
		},
		Excuses: cut, EnvoyAway: true, Heals: 3 * time.Second,
	}, {
		// DRAINING is how a planned stop of Envoy begins: the jumps go out, and come back when it is
		// LIVE.
		Name: "envoy-fail-health", Weight: 1, Group: "envoy", Shortest: 500 * time.Millisecond,
		Longest: 4 * time.Second,
		Begin: func(w *World, _ *rand.Rand) (func() error, error) {
			draining := w.openSpan(Span{Event: Event{Name: "envoy-fail-health-draining"},
				Excuses: []Excuse{{Kind: Escaped, After: 5 * time.Second}}})
			w.tellEnvoy("/healthcheck/fail")
			return func() error {
				w.tellEnvoy("/healthcheck/ok")
				w.endWhenTaken(draining)
				return nil
			}, nil
		},
	}, {
		// No connection is refused by a reload, whatever else is the matter.
		Name: "envoy-reload", Weight: 6, Begin: reloadEnvoy(1, nil), Unless: cold,
	}, {
		Name: "envoy-reload-again", Weight: 3, Begin: reloadEnvoy(3, nil), Unless: cold,
	}, {
		// The one that drains serves nobody new: no connection is refused.
		Name: "envoy-reload-kill-old", Weight: 2, Begin: reloadEnvoy(1, signalOld(syscall.SIGKILL)),
		Unless: cold,
	}, {
		Name: "envoy-reload-stop-old", Weight: 2, Begin: reloadEnvoy(1, signalOld(syscall.SIGSTOP)),
		Unless: cold,
	}, {
		Name: "envoy-reload-kill-new", Weight: 2, Begin: reloadEnvoy(1, killNew), Unless: cold,
		Heals: 3 * time.Second,
	}}
}

// restartAgainAndAgain has Envoy die some times soon after its start.
func restartAgainAndAgain(w *World, random *rand.Rand) (func() error, error) {
	away := w.withoutEnvoy("envoy-restarts-away")
	w.endEnvoy(true)
	times := 2 + random.IntN(4)
	pauses := make([]time.Duration, times)
	for i := range pauses {
		pauses[i] = time.Duration(random.IntN(900)) * time.Millisecond
	}
	end := background(func(ctx context.Context) {
		for _, pause := range pauses {
			if ctx.Err() != nil || w.runEnvoy() != nil {
				return
			}
			sleep(ctx, pause)
			w.endEnvoy(true)
		}
	})
	return func() error {
		if err := end(); err != nil {
			return err
		}
		w.endWhenTaken(away)
		return w.runEnvoy()
	}, nil
}

// tellEnvoy asks Envoy for a change. One that is dead does not hear it.
func (w *World) tellEnvoy(path string) {
	ctx, cancel := context.WithTimeout(w.running, time.Second)
	defer cancel()
	url := "http://" + lab.AdminAddr.String() + path
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, nil)
	if err != nil {
		return
	}
	if resp, err := w.VM.HTTP().Do(req); err == nil {
		resp.Body.Close()
	}
}

// overloadAdmin asks for what costs Envoy's main thread most, some at a time.
func overloadAdmin(w *World, random *rand.Rand) (func() error, error) {
	paths := []string{"/config_dump", "/stats", "/clusters", "/config_dump?include_eds", "/listeners",
		"/stats/prometheus", "/server_info"}
	clients := 2 + random.IntN(8)
	first := random.IntN(len(paths))
	return background(func(ctx context.Context) {
		done := make(chan struct{})
		for i := range clients {
			go func() {
				defer func() { done <- struct{}{} }()
				client := w.VM.HTTP()
				defer client.CloseIdleConnections()
				for n := first + i; ctx.Err() == nil; n++ {
					req, err := http.NewRequestWithContext(ctx, http.MethodGet,
						"http://"+lab.AdminAddr.String()+paths[n%len(paths)], nil)
					if err != nil {
						return
					}
					resp, err := client.Do(req)
					if err != nil {
						sleep(ctx, 50*time.Millisecond)
						continue
					}
					_, _ = io.Copy(io.Discard, resp.Body) // that it was asked is what counts
					resp.Body.Close()
				}
			}()
		}
		for range clients {
			<-done
		}
	}), nil
}

// reloadEnvoy reloads some times, beside the game, which does not wait for it: what comes then
// meets a reload that is under way. One may fail: the epoch that serves goes on.
func reloadEnvoy(times int, then func(w *World, all []lab.Epoch)) func(*World, *rand.Rand) (
	func() error, error) {
	return func(w *World, random *rand.Rand) (func() error, error) {
		pause := time.Duration(random.IntN(2000)) * time.Millisecond
		// Streams end with the epoch that they were opened in. To an agent that starts just then an epoch
		// that waits for its control plane tells nothing.
		reload := w.openSpan(Span{Event: Event{Name: "envoy-reload-drains"}, EnvoyAway: true,
			Excuses: []Excuse{{Kind: Cut, After: hotDrain + 3*time.Second}}})
		w.mu.Lock()
		w.envoy.reloads++
		w.mu.Unlock()
		w.Go(func(ctx context.Context) {
			defer func() {
				w.endWhenTaken(reload)
				w.mu.Lock()
				defer w.mu.Unlock()
				w.envoy.reloads--
			}()
			for i := range times {
				if i > 0 {
					sleep(ctx, pause)
				}
				if ctx.Err() != nil || !w.reload() {
					return
				}
			}
			if then != nil {
				sleep(ctx, pause)
				then(w, w.Envoy.Epochs())
			}
		})
		return nil, nil
	}
}

// reload is one. Its end is soon, whatever is the matter. systemctl does not reload a unit that is
// being stopped.
func (w *World) reload() bool {
	w.mu.Lock()
	stops := w.envoy.stops
	w.mu.Unlock()
	if stops > 0 {
		w.Log("    no reload: the unit is being stopped")
		return false
	}
	ctx, cancel := context.WithTimeout(w.running, 30*time.Second)
	defer cancel()
	began := time.Now()
	code, said, err := w.Envoy.Reload(ctx)
	w.Log("    reload after %.1f s: exit code %d, %v: %s",
		time.Since(began).Seconds(), code, err, said)
	return err == nil && code == 0
}

// signalOld sends to the epoch that drains.
func signalOld(sig syscall.Signal) func(*World, []lab.Epoch) {
	return func(w *World, all []lab.Epoch) {
		if len(all) == 2 {
			w.Log("    %v gets %v", all[0], sig)
			all[0].Signal(sig)
		}
	}
}

// killNew kills the epoch that serves, while the one before it drains: Envoy is down, and its
// supervisor starts it again.
func killNew(w *World, all []lab.Epoch) {
	if len(all) != 2 {
		return
	}
	away := w.withoutEnvoy("envoy-reload-new-dead")
	w.Log("    %v gets %v", all[1], syscall.SIGKILL)
	all[1].Signal(syscall.SIGKILL)
	w.mu.Lock()
	w.envoy.started = time.Now()
	w.mu.Unlock()
	w.endWhenTaken(away)
}
