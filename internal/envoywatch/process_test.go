package envoywatch

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
)

// TestRestart: what was known of the process before is not known of the next, but for the set that
// counts, which stays until there is another.
func TestRestart(t *testing.T) {
	w := watch(t, running())
	w.step()
	w.stats.Connected = false
	w.after(15 * time.Second)
	w.w.Note(envoyadmin.LogEvent{Kind: envoyadmin.StreamClosed, Code: 7, Count: 1})
	if v := w.after(15 * time.Second); !v.Apart || v.Stream == nil {
		t.Fatalf("not apart: %+v", v)
	}
	w.w.process.probe, w.w.process.aside.Started = errors.New("blocked"), &envoyadmin.Bootstrap{}

	w.restart()
	w.rejected = "bad"
	v := w.after(time.Second)
	if v.Apart || v.Stream != nil || v.Probe != nil || v.Configured || v.Started != nil {
		t.Errorf("it is said of the next: %+v", v)
	}
	if v.State != "PRE_INITIALIZING" || v.Generation != 1 || names(v) != "dynamic1" {
		t.Errorf("generation %d of %s, state %s", v.Generation, names(v), v.State)
	}
	if v.Dumps != 2 || v.Restarts != 1 {
		t.Errorf("%d dumps, %d restarts", v.Dumps, v.Restarts)
	}
	if len(v.Rejected) != 1 {
		t.Error("what the last look found rejected is not told")
	}
	if said := w.logs.FilterMessage("envoy restarted").All(); len(said) != 1 {
		t.Errorf("logged %d times", len(said))
	} else if fields := said[0].ContextMap(); fields["version"] != "x/1.40.0/Clean" ||
		fields["epoch"] != int64(0) {
		t.Errorf("logged %v", fields)
	}
	w.questions()
	w.after(13 * time.Second)
	w.wantQuestions("look ready ready") // its stream was asked for 14 s ago
	w.serve()
	if v = w.after(time.Second); !v.Configured || v.Generation != 2 || names(v) != "dynamic3" {
		t.Errorf("configured %v, generation %d of %s", v.Configured, v.Generation, names(v))
	}
}

// TestAnotherConnection: the client counts an Envoy in doubt as another, and says by its answer
// that it is the same. That is no restart to log, but may be one all the same.
func TestAnotherConnection(t *testing.T) {
	w := watch(t, running())
	w.step()
	w.process++
	w.uptime += time.Second
	if v := w.after(time.Second); !v.Configured || v.Generation != 2 {
		t.Errorf("configured %v, generation %d", v.Configured, v.Generation)
	}
	if n := w.logs.FilterMessage("envoy restarted").Len(); n != 0 {
		t.Error("logged as a restart")
	}
}

// TestWordsOfNext: what the log says while the next process is being met is of that one.
func TestWordsOfNext(t *testing.T) {
	w := watch(t, running())
	w.step()
	w.clock = w.clock.Add(time.Second)
	w.restart()
	w.takes["dump"] = 2 * time.Millisecond
	w.while["dump"] = func() {
		w.w.Note(envoyadmin.LogEvent{Kind: envoyadmin.StreamClosed, Code: 14, Count: 1})
	}
	if v, _ := w.step(); v.Stream == nil || v.Stream.Code != 14 || v.Configured {
		t.Errorf("configured %v, stream %+v", v.Configured, v.Stream)
	}
}

// TestNotMet: who made a dump cannot be asked. The dump has failed, and is made again at the pace
// of one that failed.
func TestNotMet(t *testing.T) {
	w := watch(t, running())
	w.fails["info"] = envoyadmin.ErrTimeout
	w.takes["info"] = 5 * time.Second
	v, _ := w.step()
	w.wantQuestions("dump info ready")
	if !errors.Is(v.Err, envoyadmin.ErrTimeout) || v.Configured || v.Generation != 0 {
		t.Errorf("%v, configured %v, generation %d", v.Err, v.Configured, v.Generation)
	}
	since := v.Since
	if v = w.after(time.Second); !errors.Is(v.Err, envoyadmin.ErrTimeout) || !v.Since.Equal(since) {
		t.Errorf("%v since %v, not %v", v.Err, v.Since, since)
	}
	w.wantQuestions("look dump info ready") // it answers: one more time at once
	dumps := 0
	for range 600 {
		if v = w.after(time.Second); !errors.Is(v.Err, envoyadmin.ErrTimeout) {
			t.Errorf("it says %v", v.Err)
		}
		dumps += strings.Count(w.questions(), "dump")
	}
	if dumps < 1 || dumps > 3 {
		t.Errorf("made again %d times in ten minutes", dumps)
	}
	clear(w.fails)
	clear(w.takes)
	if v = w.after(10 * time.Minute); !v.Configured || v.Generation != 1 || v.Err != nil {
		t.Errorf("%v, configured %v, generation %d", v.Err, v.Configured, v.Generation)
	}
}

// TestConfigured: the set of an Envoy that has not completed a listener update never counts, and an
// empty one that was read before that moment neither.
func TestConfigured(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*envoy)
		want   bool
		asked  string // in the first look, and in the next 200 ms later
	}{
		{"serves", func(e *envoy) {}, true, "dump info ready stats; "},
		{"initializes", func(e *envoy) { e.state = "INITIALIZING" }, false,
			"dump info ready ready ready stats; ready ready"},
		{"initializes before", func(e *envoy) { e.state = "PRE_INITIALIZING" }, false,
			"dump info ready ready ready stats; ready ready"},
		{"drains", func(e *envoy) { e.state = "DRAINING" }, true,
			"dump info ready ready stats; ready"},
		{"was told that there is nothing", func(e *envoy) { e.dynamic = false }, true,
			"dump info ready stats dump stats; "},
		{"was told nothing", func(e *envoy) { e.dynamic, e.stats.Version = false, 0 }, false,
			"dump info ready stats bootstrap stats; "},
		{"was told nothing and has static listeners",
			func(e *envoy) { e.dynamic, e.static, e.stats.Version = false, true, 0 }, false,
			"dump info ready stats bootstrap stats; "},
		{"takes no listeners from a control plane",
			func(e *envoy) { e.dynamic, e.static, e.stats.Version, e.lds = false, true, 0, false },
			true, "dump info ready stats bootstrap dump stats; "},
		{"gives no statistics",
			func(e *envoy) { e.dynamic, e.fails["stats"] = false, envoyadmin.ErrForbiddenPath },
			false, "dump info ready stats; "},
		{"gives no bootstrap",
			func(e *envoy) {
				e.dynamic, e.static, e.stats.Version, e.lds = false, true, 0, false
				e.fails["bootstrap"] = envoyadmin.ErrForbiddenPath
			}, false, "dump info ready stats bootstrap; "},
		{"does not say whether it is ready",
			func(e *envoy) { e.fails["ready"] = envoyadmin.ErrForbiddenPath }, false,
			"dump info ready; "},
		{"warms one listener", func(e *envoy) { e.warming = true }, false,
			"dump info ready ready stats; look"},
	} {
		w := watch(t, running())
		tt.change(w.envoy)
		w.step()
		asked := w.questions() + "; "
		v := w.after(200 * time.Millisecond)
		if asked += w.questions(); asked != tt.asked {
			t.Errorf("%s: asked %q, want %q", tt.name, asked, tt.asked)
		}
		if v.Configured != tt.want || (v.Generation == 1) != tt.want {
			t.Errorf("%s: configured %v, generation %d", tt.name, v.Configured, v.Generation)
		}
	}
}

// TestBecomesConfigured: the dump that found nothing is made again once Envoy was told something.
func TestBecomesConfigured(t *testing.T) {
	e := running()
	e.dynamic, e.stats.Version, e.static = false, 0, true
	w := watch(t, e)
	w.step()
	w.after(time.Second)
	w.questions()
	w.stats.Version = 7
	v := w.after(time.Second)
	w.wantQuestions("look ready ready stats dump")
	if !v.Configured || v.Generation != 1 || names(v) != "static" {
		t.Errorf("configured %v, generation %d of %s", v.Configured, v.Generation, names(v))
	}
	v = w.after(time.Second) // that is not asked for again
	w.wantQuestions("look ready")
	if !v.Configured || v.Generation != 1 {
		t.Errorf("configured %v, generation %d", v.Configured, v.Generation)
	}
	w.sets++ // another empty set counts at once
	v = w.after(time.Second)
	w.wantQuestions("look dump ready")
	if v.Generation != 2 {
		t.Errorf("generation %d", v.Generation)
	}
	w.dynamic = true
	w.sets++
	v = w.after(time.Second)
	if w.wantQuestions("look dump ready"); v.Generation != 3 {
		t.Errorf("generation %d", v.Generation)
	}
	w.dynamic = false
	w.sets++ // and once it had listeners an empty one is in doubt
	v = w.after(time.Second)
	if w.wantQuestions("look dump ready stats dump"); v.Generation != 4 || !v.Configured {
		t.Errorf("configured %v, generation %d", v.Configured, v.Generation)
	}
}

// TestListenersGone: whether an Envoy that had listeners was told that there are none any more is
// asked once at once, and then at the pace of statistics.
func TestListenersGone(t *testing.T) {
	e := running()
	e.takes["stats"] = 100 * time.Millisecond
	w := watch(t, e)
	w.step()
	w.dynamic, w.stats.Version = false, 0
	w.sets++
	w.questions()
	v := w.after(time.Second)
	w.wantQuestions("look dump ready stats bootstrap")
	if v.Generation != 1 || !v.Configured {
		t.Errorf("configured %v, generation %d", v.Configured, v.Generation)
	}
	w.stats.Version = 7
	w.takes["bootstrap"] = 10 * time.Millisecond
	w.w.process.stats = envoyadmin.Pace{}
	w.w.process.stats.Asked(w.clock.Add(-100*time.Millisecond), w.clock)
	w.sets++ // still nothing, and no second question
	v = w.after(2 * time.Second)
	w.wantQuestions("look dump ready")
	if v.Generation != 1 {
		t.Errorf("generation %d", v.Generation)
	}
	for range 97 {
		w.after(time.Second)
	}
	w.questions()
	v = w.after(time.Second)
	w.wantQuestions("look ready ready stats dump")
	if v.Generation != 2 || !v.Configured {
		t.Errorf("configured %v, generation %d", v.Configured, v.Generation)
	}
}

// TestWarming: the first set waits for listeners that are warming, for a minute. A later one does
// not.
func TestWarming(t *testing.T) {
	w := watch(t, running())
	w.step()
	w.warming = true
	w.sets++
	if v := w.after(time.Second); v.Generation != 2 {
		t.Errorf("generation %d of an Envoy that is not young", v.Generation)
	}
	w.restart()
	w.after(time.Second)
	w.serve()
	w.warming = true
	w.after(time.Second)
	met := w.clock
	for w.clock.Sub(met) < time.Minute-time.Second {
		if v := w.after(time.Second); v.Configured || v.Generation != 2 {
			t.Fatalf("after %v: configured %v, generation %d",
				w.clock.Sub(met), v.Configured, v.Generation)
		}
	}
	v := w.after(time.Second)
	if !v.Configured || v.Generation != 3 {
		t.Errorf("after a minute: configured %v, generation %d", v.Configured, v.Generation)
	}

	w.restart()
	w.after(time.Second)
	w.serve()
	w.warming = true
	w.after(time.Second)
	w.warming = false
	if v = w.after(time.Second); !v.Configured || v.Generation != 4 {
		t.Errorf("all are ready: configured %v, generation %d", v.Configured, v.Generation)
	}
}

// TestHalfWarm: the first set of an Envoy whose other listeners are warming does not count, though
// Envoy had told meanwhile that it is configured, and however late its control plane came: the
// rules of the services behind the others would go.
func TestHalfWarm(t *testing.T) {
	w := watch(t, running())
	w.step()
	w.restart()
	w.after(time.Second) // an empty dump
	w.state, w.stats.Version = "LIVE", 7
	w.while["stats"] = func() { w.dynamic, w.warming, w.sets = true, true, w.sets+1 }
	w.after(time.Second)
	if v := w.after(time.Second); v.Configured || v.Generation != 1 {
		t.Errorf("configured %v, generation %d", v.Configured, v.Generation)
	}
	w.warming = false
	w.sets++
	if v := w.after(time.Second); !v.Configured || v.Generation != 2 {
		t.Errorf("all are ready: configured %v, generation %d", v.Configured, v.Generation)
	}

	w.restart()
	w.after(time.Second)
	w.state = "LIVE" // by initial_fetch_timeout, and the control plane comes much later
	for range 300 {
		w.after(time.Second)
	}
	w.serve()
	w.warming = true
	if v := w.after(time.Second); v.Configured || v.Generation != 2 {
		t.Errorf("a late control plane: configured %v, generation %d", v.Configured, v.Generation)
	}
	w.warming = false
	w.sets++
	if v := w.after(time.Second); !v.Configured || v.Generation != 3 {
		t.Errorf("all are ready: configured %v, generation %d", v.Configured, v.Generation)
	}
}

// TestRestartRefuses: the next Envoy refuses a listener that the one before had. Its control plane
// did not say that the services behind it are gone, so that their rules stay, until it says so or
// Envoy has the listener. What else Envoy has is taken.
func TestRestartRefuses(t *testing.T) {
	w := watch(t, running())
	w.step()
	w.restart()
	w.rejected = "dynamic1"
	w.after(time.Second)
	w.serve() // of another one
	if v := w.after(time.Second); !v.Configured || names(v) != "dynamic3 dynamic1" {
		t.Errorf("refused: configured %v, %s", v.Configured, names(v))
	}
	w.sets++
	if v := w.after(time.Second); names(v) != "dynamic4 dynamic1" {
		t.Errorf("refused again: %s", names(v))
	}
	w.rejected = ""
	if v := w.after(time.Second); names(v) != "dynamic4" {
		t.Errorf("gone: %s", names(v))
	}
	w.rejected = "dynamic1"
	if v := w.after(time.Second); names(v) != "dynamic4" {
		t.Errorf("refused when it comes back: %s", names(v))
	}
}

// TestRestartRefusesAll: an Envoy that has just started refused listeners, and has none for TCP.
// That it took one for DNS says nothing about services, for an agent that has just started
// neither.
func TestRestartRefusesAll(t *testing.T) {
	for _, met := range []bool{true, false} {
		w := watch(t, running())
		if met {
			w.step()
		}
		w.restart()
		w.state, w.dynamic, w.udp, w.rejected = "LIVE", true, true, "bad"
		for range 20 {
			if v := w.after(time.Second); v.Configured || met && names(v) != "dynamic1" {
				t.Fatalf("met before %v: configured %v, %s", met, v.Configured, names(v))
			}
		}
		w.udp, w.rejected = false, ""
		w.serve()
		if v := w.after(time.Second); !v.Configured || names(v) != "dynamic3" {
			t.Errorf("met before %v: configured %v, %s", met, v.Configured, names(v))
		}
	}
}

// TestRestartOfBusyEnvoy: where looks take so long that the next is due in 20 s, an Envoy that
// initializes again is looked at within a second.
func TestRestartOfBusyEnvoy(t *testing.T) {
	w := watch(t, running())
	w.takes["look"] = 200 * time.Millisecond
	for looks := 0; looks < 2; looks += strings.Count(w.questions(), "look") {
		w.after(time.Second)
	}
	w.after(time.Second)
	w.after(time.Second)
	if asked := w.questions(); strings.Contains(asked, "look") {
		t.Fatalf("it looks all the time: %s", asked)
	}
	w.restart()
	w.after(time.Second)
	if v := w.after(time.Second); v.Configured || v.State != "PRE_INITIALIZING" || v.Dumps != 2 {
		t.Errorf("configured %v, state %s, %d dumps", v.Configured, v.State, v.Dumps)
	}
}
