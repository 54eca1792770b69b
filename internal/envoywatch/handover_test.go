package envoywatch

import (
	"context"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
)

func starts(epoch int) envoyadmin.LogEvent {
	return envoyadmin.LogEvent{Kind: envoyadmin.EnvoyStarts, Epoch: epoch, Count: 1}
}

// TestHandover: while the next epoch starts beside the one that serves, the admin address moves,
// and then has nothing to tell: a View says that this is no failure, until that one has
// its listeners.
func TestHandover(t *testing.T) {
	unit := "reloading, reload"
	w := watch(t, running(), func(o *Options) {
		o.Unit = func(context.Context) string { return unit }
	})
	if v, _ := w.step(); v.Handover {
		t.Error("of one that serves")
	}
	w.w.Note(starts(1))
	w.down = envoyadmin.ErrRefused // between the one and the other
	if v := w.after(time.Second); !v.Handover || v.Err == nil || !v.Configured {
		t.Errorf("the address moves: %+v", v)
	}
	w.down = nil
	w.restart()
	w.epoch = 1
	if v := w.after(time.Second); !v.Handover || v.Err != nil || v.Configured ||
		v.State != "PRE_INITIALIZING" || names(v) != "dynamic1" {
		t.Errorf("the next initializes: %+v", v)
	}
	w.serve()
	w.questions()
	w.w.Note(envoyadmin.LogEvent{Kind: envoyadmin.ListenerChanged, Count: 1}) // workers were started
	w.wantQuestions("redial")
	if v := w.after(time.Second); v.Handover || !v.Configured || names(v) != "dynamic3" {
		t.Errorf("the next serves: %+v", v)
	}
	w.down, unit = envoyadmin.ErrRefused, "failed, exit code 1"
	if v := w.after(time.Second); v.Handover {
		t.Error("it has ended, and none takes over")
	}
}

// TestHandoverUntold: the log may not be readable.
func TestHandoverUntold(t *testing.T) {
	w := watch(t, running())
	w.step()
	w.restart()
	w.epoch = 1
	if v := w.after(time.Second); !v.Handover || v.Configured {
		t.Errorf("a later epoch: %+v", v)
	}
	w.serve()
	if v := w.after(time.Second); v.Handover || !v.Configured {
		t.Errorf("it serves: %+v", v)
	}
	w.restart()
	w.epoch = 0
	if v := w.after(time.Second); v.Handover {
		t.Error("one that was started anew takes over from nobody")
	}
}

// TestNoHandover: what is a failure stays one.
func TestNoHandover(t *testing.T) {
	for _, tt := range []struct {
		name string
		do   func(w *test, unit *string)
	}{
		{"the first epoch starts", func(w *test, _ *string) { w.w.Note(starts(0)) }},
		{"it takes too long", func(w *test, _ *string) {
			w.w.Note(starts(1))
			w.clock = w.clock.Add(handoverLimit)
		}},
		{"it takes too long, and is tried again", func(w *test, _ *string) {
			w.w.Note(starts(1))
			w.after(time.Second)
			w.clock = w.clock.Add(handoverLimit)
			w.w.Note(starts(2))
		}},
		{"it is to stop", func(w *test, _ *string) {
			w.w.Note(starts(1))
			w.down, w.state = nil, "DRAINING"
		}},
		{"the unit has ended", func(w *test, unit *string) {
			w.w.Note(starts(1))
			*unit = "activating, auto-restart"
		}},
	} {
		unit := "active, running"
		w := watch(t, running(), func(o *Options) {
			o.Unit = func(context.Context) string { return unit }
		})
		w.step()
		w.down = envoyadmin.ErrRefused
		tt.do(w, &unit)
		if v := w.after(time.Second); v.Handover {
			t.Error(tt.name)
		}
	}
	w := watch(t, running())
	w.w.Note(starts(1))
	w.restart()
	if v, _ := w.step(); v.Handover {
		t.Error("nobody is known to have served before")
	}
	// One that has failed does not count against the next, once the admin address answers.
	w = watch(t, running())
	w.step()
	w.w.Note(starts(1))
	w.after(2 * handoverLimit)
	w.w.Note(starts(2))
	w.down = envoyadmin.ErrRefused
	if v := w.after(time.Second); !v.Handover {
		t.Error("the next time")
	}
}
