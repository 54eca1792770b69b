package envoywatch

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
)

// run is a Watch that runs, in a bubble. Its envoy belongs to the questions while it runs.
func run(t *testing.T, e *envoy, p *way) (w *Watch, logged chan envoyadmin.LogEvent, end func()) {
	logged = make(chan envoyadmin.LogEvent)
	o := Options{Admin: e, Logged: logged}
	if p != nil {
		o.Probe = p.try
	}
	w = New(o)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	return w, logged, func() {
		t.Helper()
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run ended: %v", err)
		}
	}
}

// TestHang: what the log says is in a View at once while the admin interface hangs for 10 s,
// whatever was asked.
func TestHang(t *testing.T) {
	for _, question := range []string{"look", "dump", "ready", "info", "stats", "clusters", "bootstrap"} {
		t.Run(question, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := running()
				asked := false
				e.while[question] = func() {
					asked = true
					time.Sleep(10 * time.Second)
				}
				e.fails[question] = envoyadmin.ErrTimeout
				w, logged, end := run(t, e, nil)
				defer end()
				if question == "look" {
					time.Sleep(time.Second)
				}
				time.Sleep(time.Second)
				aside := question == "clusters" || question == "bootstrap"
				if aside {
					time.Sleep(asideFirst)
				}
				synctest.Wait()
				if !asked {
					t.Fatal("not asked")
				}
				for range 3 { // and not only the first line
					began := time.Now()
					logged <- envoyadmin.LogEvent{
						Kind: envoyadmin.StreamClosed, Code: 7, Message: "denied", Count: 1,
					}
					synctest.Wait()
					select {
					case v := <-w.Views():
						if v.Stream == nil || !v.Stream.When.Equal(began) {
							t.Errorf("the newest View says %+v", v.Stream)
						}
					default:
						t.Error("no View")
					}
					time.Sleep(time.Second)
				}
				time.Sleep(20 * time.Second)
				v := <-w.Views()
				if aside { // and its stream was seen to stand meanwhile
					if v.Err != nil {
						t.Errorf("after the answer it says %v", v.Err)
					}
					return
				}
				if v.Stream == nil || v.Stream.Message != "denied" {
					t.Errorf("after the answer it says %+v", v.Stream)
				}
				if question != "stats" && !errors.Is(v.Err, envoyadmin.ErrTimeout) {
					t.Errorf("after the answer it says %v", v.Err)
				}
			})
		})
	}
}

// TestHangAndProbe: what a probe found is told while the admin interface hangs, too.
func TestHangAndProbe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := running()
		e.stats.Version, e.dynamic = 0, false
		p := &way{hangs: make(chan bool)}
		p.blocked = map[string]error{"td:443": errors.New("no route")}
		w, _, end := run(t, e, p)
		defer end()
		time.Sleep(500 * time.Millisecond)
		e.set(func() { e.while["look"] = func() { time.Sleep(10 * time.Second) } })
		time.Sleep(time.Second)
		close(p.hangs)
		synctest.Wait()
		if v := <-w.Views(); v.Probe == nil {
			t.Error("it says nothing of the way")
		}
		e.mu.Lock()
		defer e.mu.Unlock()
		if asked := strings.Join(e.asked, " "); !strings.HasSuffix(asked, "look") {
			t.Errorf("it does not hang: asked %s", asked)
		}
	})
}

// TestRun: a change is seen within a second, and at once where the log tells of it.
func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := running()
		w, logged, end := run(t, e, nil)
		time.Sleep(500 * time.Millisecond)
		if v := <-w.Views(); v.Generation != 1 {
			t.Errorf("generation %d", v.Generation)
		}
		e.set(func() { e.sets++ })
		time.Sleep(600 * time.Millisecond)
		if v := <-w.Views(); v.Generation != 2 {
			t.Errorf("a second later it is generation %d", v.Generation)
		}
		time.Sleep(200 * time.Millisecond) // one dump each 200 ms
		e.set(func() { e.sets++ })
		logged <- envoyadmin.LogEvent{Kind: envoyadmin.ListenerChanged, Count: 1}
		synctest.Wait()
		if v := <-w.Views(); v.Generation != 3 {
			t.Errorf("at the hint it is generation %d", v.Generation)
		}
		close(logged) // and on it goes without
		time.Sleep(time.Second)
		e.set(func() { e.sets++ })
		time.Sleep(1100 * time.Millisecond) // not in the moment of a look
		if v := <-w.Views(); v.Generation != 4 {
			t.Errorf("without a log it is generation %d", v.Generation)
		}
		end()
		if n := len(e.asked); n > 20 {
			t.Errorf("asked %d questions in 3 s: %s", n, strings.Join(e.asked, " "))
		}
		if len(w.Views()) > 0 {
			t.Error("a View behind the end")
		}
	})
}

// TestLogEndsDuringQuestion: the log is followed no more, and the question goes on.
func TestLogEndsDuringQuestion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := running()
		e.while["dump"] = func() { time.Sleep(10 * time.Second) }
		w, logged, end := run(t, e, nil)
		defer end()
		time.Sleep(time.Second)
		close(logged)
		time.Sleep(9500 * time.Millisecond)
		if v := <-w.Views(); v.Generation != 1 || v.LogErr != "" {
			t.Errorf("generation %d, %q", v.Generation, v.LogErr)
		}
	})
}
