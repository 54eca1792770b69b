package envoywatch

import (
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
)

// TestTold: a View says what first told of the change to its listeners.
func TestTold(t *testing.T) {
	hint := envoyadmin.LogEvent{Kind: envoyadmin.ListenerChanged, Count: 1}
	const ms = time.Millisecond
	for _, tt := range []struct {
		name string
		// play is after a first View was taken. It returns the View, and what it should say.
		play func(w *test) (v View, want time.Time)
	}{
		{"nothing changed", func(w *test) (View, time.Time) {
			return w.after(time.Second), time.Time{}
		}},
		{"a look", func(w *test) (View, time.Time) {
			w.sets++
			began := w.clock.Add(time.Second)
			w.takes["look"], w.takes["dump"] = 3*ms, 30*ms
			return w.after(time.Second), began
		}},
		{"a line of the log, and the look comes late", func(w *test) (View, time.Time) {
			w.sets++
			w.clock = w.clock.Add(300 * ms)
			told := w.clock
			w.w.Note(hint)
			w.clock = w.clock.Add(40 * ms)
			w.w.Note(hint) // the first counts
			return w.after(40 * ms), told
		}},
		{"a View that says it again", func(w *test) (View, time.Time) {
			w.sets++
			if v := w.after(time.Second); v.Told.IsZero() {
				t.Error("a change without a beginning")
			}
			return w.after(time.Second), time.Time{}
		}},
		{"the look fails at first", func(w *test) (View, time.Time) {
			w.sets++
			w.w.Note(hint)
			told := w.clock
			w.fails["look"] = envoyadmin.ErrTimeout
			w.after(time.Second)
			w.fails["look"] = nil
			return w.after(5 * time.Second), told
		}},
		{"the dump fails at first", func(w *test) (View, time.Time) {
			w.sets++
			told := w.clock.Add(time.Second)
			w.fails["dump"] = envoyadmin.ErrTimeout
			w.after(time.Second)
			w.fails["dump"] = nil
			return w.after(5 * time.Second), told
		}},
		{"a hint that came to nothing is not of the next change", func(w *test) (View, time.Time) {
			w.w.Note(hint)
			w.after(100 * ms) // and again, over another connection
			w.after(time.Second)
			w.after(time.Second)
			w.sets++
			began := w.clock.Add(time.Second)
			return w.after(time.Second), began
		}},
		{"two changes that nobody took", func(w *test) (View, time.Time) {
			w.sets++
			w.clock = w.clock.Add(time.Second)
			told := w.clock
			w.w.Step(w.Context())
			w.sets++
			return w.after(time.Second), told
		}},
		{"two, and the first was taken", func(w *test) (View, time.Time) {
			w.sets++
			w.after(time.Second)
			w.sets++
			began := w.clock.Add(time.Second)
			return w.after(time.Second), began
		}},
		{"a hint while the dump is under way", func(w *test) (View, time.Time) {
			w.sets++
			var told time.Time
			w.while["dump"] = func() {
				w.sets++
				w.clock = w.clock.Add(10 * ms)
				told = w.clock
				w.w.Note(hint)
				w.while["look"] = func() { <-w.w.Views() } // of the first
			}
			return w.after(time.Second), told
		}},
		{"one that changes back", func(w *test) (View, time.Time) {
			w.sets++
			w.while["look"] = func() {} // it shows the change, and the dump does not
			w.while["dump"] = nil
			w.w.change.looked(envoyadmin.Fingerprint{Process: 1, Listeners: 99}, false)
			w.sets--
			w.w.detector.Again()
			w.after(time.Second)
			w.sets++
			began := w.clock.Add(time.Second)
			return w.after(time.Second), began
		}},
		{"a restart, and the control plane is away for a while", func(w *test) (View, time.Time) {
			w.restart()
			for range 20 {
				w.after(time.Second)
			}
			w.serve()
			told := w.clock
			w.w.Note(hint)
			return w.after(50 * ms), told
		}},
		{"one that waits until Envoy is live", func(w *test) (View, time.Time) {
			w.restart()
			w.after(time.Second)
			w.dynamic = true
			w.sets++
			told := w.clock.Add(time.Second)
			w.after(time.Second)
			w.after(time.Second)
			w.state = "LIVE"
			return w.after(time.Second), told
		}},
	} {
		w := watch(t, running())
		if v, _ := w.step(); !v.Told.Equal(w.clock) {
			t.Errorf("%s: of the first dump it says %v", tt.name, v.Told)
		}
		w.clock = w.clock.Add(300 * ms) // a full dump may be asked for again
		if v, want := tt.play(w); !v.Told.Equal(want) {
			t.Errorf("%s: %v, want %v", tt.name, v.Told.Sub(w.clock), want.Sub(w.clock))
		}
	}
}

// TestRejections: each rejection that is new counts.
func TestRejections(t *testing.T) {
	e := running()
	w := watch(t, e)
	for i, rejected := range []string{"", "a", "a", "long", "long", "", "a"} {
		e.rejected = rejected
		e.sets++
		v := w.after(time.Second)
		if want := []int{0, 1, 1, 2, 2, 2, 3}[i]; v.Rejections != want {
			t.Errorf("%d: %d rejections, want %d", i, v.Rejections, want)
		}
	}
}

// TestConnected: whether Envoy has a stream is told where something tells it.
func TestConnected(t *testing.T) {
	for _, tt := range []struct {
		name        string
		play        func(w *test) View
		stands, has bool
	}{
		{"asked", func(w *test) View { return w.after(0) }, true, true},
		{"it takes no configuration by a stream", func(w *test) View {
			w.stats.Streams = false
			return w.after(0)
		}, false, false},
		{"one answer against it", func(w *test) View {
			w.after(0)
			w.stats.Connected = false
			return w.after(15 * time.Second)
		}, true, true},
		{"two", func(w *test) View {
			w.stats.Connected = false
			w.after(0)
			w.after(15 * time.Second)
			return w.after(15 * time.Second)
		}, false, true},
		{"its log says that it ended", func(w *test) View {
			w.after(0)
			w.w.Note(envoyadmin.LogEvent{Kind: envoyadmin.StreamClosed, Code: 14, Count: 1})
			return <-w.w.Views()
		}, false, true},
		{"and that it is back", func(w *test) View {
			w.after(0)
			w.w.Note(envoyadmin.LogEvent{Kind: envoyadmin.StreamClosed, Code: 14, Count: 1})
			w.w.Note(envoyadmin.LogEvent{Kind: envoyadmin.ListenerChanged, Count: 1})
			return <-w.w.Views()
		}, true, true},
		{"another process", func(w *test) View {
			w.after(0)
			w.restart()
			w.stats.Streams = false
			return w.after(time.Second)
		}, false, false},
		{"Envoy is down", func(w *test) View {
			w.after(0)
			w.down = envoyadmin.ErrRefused
			return w.after(time.Second)
		}, false, false},
	} {
		w := watch(t, running())
		if stands, known := tt.play(w).Connected(); stands != tt.stands || known != tt.has {
			t.Errorf("%s: %v, known %v; want %v, %v", tt.name, stands, known, tt.stands, tt.has)
		}
	}
}
