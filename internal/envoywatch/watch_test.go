package envoywatch

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// TestFirstLook: one Step is enough to know an Envoy that serves.
func TestFirstLook(t *testing.T) {
	e := running()
	e.rejected = "bad"
	w := watch(t, e)
	v, wait := w.step()
	w.wantQuestions("dump info ready stats")
	if wait != time.Second {
		t.Errorf("it waits %v", wait)
	}
	want := View{
		State: "LIVE", Generation: 1, Told: e.clock, Configured: true, Stands: true,
		Rejected: []envoyadmin.Rejected{{Name: "bad"}}, Past: Past{Dumps: 1, Rejections: 1,
			Bucket: envoyadmin.Bucket{Level: 6 * time.Second, Size: 6 * time.Second, Share: 0.1}},
	}
	want.Info, want.Snapshot = v.Info, v.Snapshot
	if diff := cmp.Diff(want, v, cmp.Comparer(func(a, b envoyadmin.Fingerprint) bool {
		return a == b
	})); diff != "" {
		t.Errorf("the View is not as wanted (-want +got):\n%s", diff)
	}
	if v.Info.Node.ID != "node" || names(v) != "dynamic1" {
		t.Errorf("it is %+v", v)
	}
	read := w.logs.FilterMessage("listeners read").All()
	if len(read) != 1 {
		t.Fatalf("logged %d times that listeners were read", len(read))
	}
	if fields := fmt.Sprint(read[0].ContextMap()); fields !=
		"map[bytes:100 generation:1 hinted:false listeners:1 took:2ms]" {
		t.Errorf("logged %s", fields)
	}
	if n := w.logs.FilterMessage("envoy restarted").Len(); n != 0 {
		t.Error("a first Envoy is called restarted")
	}
}

// TestPace: an Envoy that rests is asked for its state and a look each second, for its stream each
// 15 s, and for nothing in between.
func TestPace(t *testing.T) {
	w := watch(t, running())
	w.step()
	w.questions()
	w.after(time.Second - 1)
	w.wantQuestions("")
	w.after(1)
	w.wantQuestions("look ready")
	for range 13 {
		w.after(time.Second)
	}
	w.questions()
	w.after(time.Second)
	w.wantQuestions("look ready stats")
	w.after(time.Second)
	w.wantQuestions("look ready")

	w.state = "DRAINING" // what is not LIVE is asked for at each Step
	w.after(time.Second)
	w.questions()
	if v := w.after(time.Millisecond); v.State != "DRAINING" {
		t.Errorf("the state is %q", v.State)
	}
	w.wantQuestions("ready")
	w.after(time.Second - time.Millisecond)
	w.wantQuestions("look ready")

	w.fails["look"] = envoyadmin.ErrTimeout // and then the detector waits longer than a second
	w.takes["look"] = 5 * time.Second
	w.clock = w.clock.Add(time.Second)
	if _, wait := w.step(); wait != time.Second {
		t.Errorf("it waits %v", wait)
	}
}

// TestPaceOfStatistics: where statistics take long, they are asked for as much more rarely.
func TestPaceOfStatistics(t *testing.T) {
	e := running()
	e.takes["stats"] = 20 * time.Millisecond
	w := watch(t, e)
	w.step()
	w.questions()
	for range 19 {
		w.after(time.Second)
	}
	if asked := w.questions(); strings.Contains(asked, "stats") {
		t.Errorf("asked within 20 s: %s", asked)
	}
	w.after(time.Second)
	if asked := w.questions(); !strings.Contains(asked, "stats") {
		t.Errorf("not asked after 20 s: %s", asked)
	}
}

// TestChange: a new set is dumped once and counts; the same set read again is no news.
func TestChange(t *testing.T) {
	w := watch(t, running())
	w.step()
	w.questions()
	v := w.after(10 * time.Minute) // the Detector asks for all once more
	w.wantQuestions("dump ready stats bootstrap")
	if v.Generation != 1 || v.Dumps != 2 {
		t.Errorf("generation %d, %d dumps", v.Generation, v.Dumps)
	}
	w.sets++
	v = w.after(time.Second)
	w.wantQuestions("look dump ready clusters")
	if names(v) != "dynamic2" || v.Generation != 2 || v.Dumps != 3 {
		t.Errorf("%s, generation %d, %d dumps", names(v), v.Generation, v.Dumps)
	}
	v = w.after(10 * time.Minute)
	if v.Generation != 2 || v.Dumps != 4 {
		t.Errorf("generation %d, %d dumps", v.Generation, v.Dumps)
	}
	w.rejected = "bad" // by its Fingerprint it is another one
	if v = w.after(time.Second); v.Generation != 3 || len(v.Rejected) != 1 {
		t.Errorf("generation %d, rejected %v", v.Generation, v.Rejected)
	}
}

// TestHint: a line of the log makes the next Step look at once, and one that moves nothing has the
// next look go over a new connection.
func TestHint(t *testing.T) {
	for kind, redials := range map[envoyadmin.LogKind]string{
		envoyadmin.ListenerChanged:  "redial ", // workers were started: it may be another Envoy's
		envoyadmin.ListenerRejected: "",
	} {
		w := watch(t, running())
		w.step()
		w.clock = w.clock.Add(300 * time.Millisecond)
		w.questions()
		w.sets++
		w.w.Note(envoyadmin.LogEvent{Kind: kind, Count: 1})
		if len(w.w.Views()) > 0 {
			t.Errorf("%v: a View that says nothing new", kind)
		}
		if v, _ := w.step(); v.Generation != 2 {
			t.Errorf("%v: generation %d", kind, v.Generation)
		}
		w.wantQuestions(redials + "look dump")

		w.clock = w.clock.Add(300 * time.Millisecond)
		w.w.Note(envoyadmin.LogEvent{Kind: kind, Count: 1})
		_, wait := w.step()
		w.wantQuestions(redials + "look redial")
		if wait != 50*time.Millisecond {
			t.Errorf("%v: it waits %v", kind, wait)
		}
	}
}

// TestHintDuringQuestion: a hint that comes while the last question of a Step is under way is seen
// by the next, which is due at once.
func TestHintDuringQuestion(t *testing.T) {
	w := watch(t, running())
	w.step()
	w.clock = w.clock.Add(time.Second)
	w.takes["ready"] = 300 * time.Millisecond
	w.while["ready"] = func() {
		w.sets++
		w.w.Note(envoyadmin.LogEvent{Kind: envoyadmin.ListenerChanged, Count: 1})
	}
	if _, wait := w.step(); wait != 0 {
		t.Errorf("it waits %v", wait)
	}
	if v, wait := w.step(); v.Generation != 2 || wait == 0 {
		t.Errorf("generation %d, waits %v", v.Generation, wait)
	}
}

// TestWords: what the log says of the stream is in a View at once, in all its words.
func TestWords(t *testing.T) {
	w := watch(t, running())
	w.step()
	note := func(e envoyadmin.LogEvent) (v View, put bool) {
		e.Count = 1
		w.w.Note(e)
		select {
		case v = <-w.w.Views():
			return v, true
		default:
			return v, false
		}
	}
	w.clock = w.clock.Add(time.Minute)
	v, _ := note(envoyadmin.LogEvent{
		Kind: envoyadmin.StreamClosed, Target: "td:443", Code: 7, Message: "denied",
	})
	want := &symptom.Stream{Target: "td:443", Code: 7, Message: "denied", When: w.clock}
	if diff := cmp.Diff(want, v.Stream); diff != "" {
		t.Errorf("the stream (-want +got):\n%s", diff)
	}
	if v.Generation != 1 || !v.Configured || v.State != "LIVE" {
		t.Errorf("it does not say the rest: %+v", v)
	}
	v, put := note(envoyadmin.LogEvent{Kind: envoyadmin.ListenerChanged})
	if !put || v.Stream != nil {
		t.Errorf("put %v; the stream stands, and it says %+v", put, v.Stream)
	}
	v, _ = note(envoyadmin.LogEvent{Kind: envoyadmin.LogUnreadable, Details: "no permission"})
	if v.LogErr != "no permission" {
		t.Errorf("it says %q of the log", v.LogErr)
	}
	if v, put := note(envoyadmin.LogEvent{Kind: envoyadmin.LogUnreadable}); !put || v.LogErr != "" {
		t.Errorf("put %v; the log can be read again, and it says %q", put, v.LogErr)
	}
	missing := envoyadmin.LogEvent{Kind: envoyadmin.LogMissing, Details: "no such file"}
	if v, _ := note(missing); v.LogErr != "no such file" {
		t.Errorf("an Envoy that runs has no log, and it says %q", v.LogErr)
	}
	w.w.outage.Err = envoyadmin.ErrRefused
	if v, _ := note(missing); v.LogErr != "" {
		t.Errorf("Envoy may not have run, and it says %q", v.LogErr)
	}
	w.w.outage.Err = nil
	if _, put := note(envoyadmin.LogEvent{Kind: envoyadmin.Other, Message: "a cluster"}); put {
		t.Error("a View for what it does not tell")
	}
}

// TestApart: Envoy has no stream, and its log does not say so.
func TestApart(t *testing.T) {
	e := running()
	e.stats.Connected = false
	w := watch(t, e)
	if v, _ := w.step(); v.Apart {
		t.Error("apart after one answer")
	}
	if v := w.after(15 * time.Second); !v.Apart {
		t.Error("not apart after two")
	}
	w.stats.Connected = true
	if v := w.after(15 * time.Second); v.Apart {
		t.Error("still apart")
	}

	e = running()
	e.stats = envoyadmin.ControlPlane{Version: 7} // it has no stream to be apart from
	w = watch(t, e)
	w.step()
	for range 3 {
		if v := w.after(15 * time.Second); v.Apart {
			t.Error("an Envoy without a stream is apart")
		}
	}

	e = running()
	e.fails["stats"] = envoyadmin.ErrForbiddenPath
	w = watch(t, e)
	w.step()
	for range 3 {
		if v := w.after(15 * time.Second); v.Apart || v.Err != nil {
			t.Errorf("no answer about the stream: apart %v, %v", v.Apart, v.Err)
		}
	}
}

// TestRefused: nothing listens. Since when, since when it was last asked, systemd's word and the
// last error of the log.
func TestRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "envoy.err.log")
	log := func(line string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(line), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	log("[2026-01-02 03:04:05.678][1][critical][main] [source/server.cc:1] first\tword\n")
	e := running()
	units, word := 0, "failed, exit code 1"
	w := watch(t, e, func(o *Options) {
		o.LogPath = path
		o.Unit = func(context.Context) string { units++; return word }
	})
	if v, _ := w.step(); v.LastError != "" || v.Unit != "" || units != 0 {
		t.Errorf("of an Envoy that runs: %q, unit %q", v.LastError, v.Unit)
	}
	w.down = envoyadmin.ErrRefused
	down := w.clock.Add(time.Second)
	v := w.after(time.Second)
	if !errors.Is(v.Err, envoyadmin.ErrRefused) || !v.Since.Equal(down) || !v.Asked.Equal(down) {
		t.Errorf("%v since %v, asked %v; want since %v", v.Err, v.Since, v.Asked, down)
	}
	if v.LastError != "first word" || v.Unit != word || units != 1 {
		t.Errorf("it says %q, unit %q, asked %d times", v.LastError, v.Unit, units)
	}
	if v.Generation != 1 || !v.Configured || v.State != "LIVE" {
		t.Errorf("it forgot what it knew: %+v", v)
	}
	log("[2026-01-02 03:04:05.678][1][critical][main] [source/server.cc:1] " +
		strings.Repeat("x", 400) + "\n")
	word = ""
	if v = w.after(5*time.Second - 1); v.LastError != "first word" || units != 1 {
		t.Errorf("too soon it says %q, unit asked %d times", v.LastError, units)
	}
	v = w.after(1)
	if !strings.HasPrefix(v.LastError, "xxx") || len(v.LastError) > 303 || units != 2 {
		t.Errorf("it says %q, unit asked %d times", v.LastError, units)
	}
	if v.Unit != "failed, exit code 1" {
		t.Errorf("no word of systemd's is taken for one: %q", v.Unit)
	}
	if !v.Since.Equal(down) || v.Asked.Equal(down) {
		t.Errorf("since %v, asked %v", v.Since, v.Asked)
	}
	w.down = nil
	if v = w.after(10 * time.Second); v.Err != nil || v.Unit != "" {
		t.Errorf("it answers again: %v, unit %q", v.Err, v.Unit)
	}
	w.down = envoyadmin.ErrRefused
	if v = w.after(time.Second); !v.Since.Equal(w.clock) {
		t.Errorf("down again at %v, and it says %v", w.clock, v.Since)
	}
}

// TestNoWords: without a log and a unit there is nothing to say of them.
func TestNoWords(t *testing.T) {
	e := running()
	e.down = envoyadmin.ErrRefused
	if v, _ := watch(t, e).step(); v.LastError != "" || v.Unit != "" || v.Err == nil {
		t.Errorf("%+v", v)
	}
	w := watch(t, e, func(o *Options) { o.LogPath = "/nowhere/envoy.log" })
	if v, _ := w.step(); v.LastError != "" || v.Err == nil {
		t.Errorf("%+v", v)
	}
	e.down = envoyadmin.ErrTimeout // it is there
	w = watch(t, e, func(o *Options) {
		o.Unit = func(context.Context) string { t.Error("its unit is asked for"); return "" }
	})
	w.step()
}

// TestOneOfTwo: each kind of question must be answered, or Envoy's state is not known. An answer to
// the one does not hide that the other is missing.
func TestOneOfTwo(t *testing.T) {
	for _, tt := range []struct{ fails, other string }{{"look", "ready"}, {"ready", "look"}} {
		w := watch(t, running())
		w.step()
		w.fails[tt.fails] = errors.New(tt.fails + " failed")
		since := w.clock.Add(time.Second)
		for range 10 {
			v := w.after(time.Second)
			if v.Err == nil || v.Err.Error() != tt.fails+" failed" || !v.Since.Equal(since) {
				t.Fatalf("%s fails: %v since %v", tt.fails, v.Err, v.Since)
			}
			if !v.Asked.Equal(w.clock) {
				t.Fatalf("%s fails: asked at %v, not %v", tt.fails, v.Asked, w.clock)
			}
		}
		w.fails[tt.other] = errors.New(tt.other + " failed")
		v := w.after(time.Second)
		if v.Err == nil || v.Err.Error() != "look failed" || !v.Since.Equal(since) {
			t.Errorf("both fail: %v since %v", v.Err, v.Since)
		}
		delete(w.fails, tt.fails)
		v = w.after(time.Second)
		if v.Err == nil || v.Err.Error() != tt.other+" failed" || !v.Since.Equal(since) {
			t.Errorf("%s fails: %v since %v", tt.other, v.Err, v.Since)
		}
		clear(w.fails)
		if v = w.after(time.Second); v.Err != nil {
			t.Errorf("none fails: %v", v.Err)
		}
	}
}

// TestAskedOfWhatCounts: while the dump fails, when the state was asked for says nothing of it.
func TestAskedOfWhatCounts(t *testing.T) {
	w := watch(t, running())
	w.step()
	w.fails["look"], w.fails["ready"] = envoyadmin.ErrTimeout, envoyadmin.ErrTimeout
	w.takes["look"], w.takes["ready"] = 5*time.Second, 5*time.Second
	v := w.after(time.Second)
	if asked := w.clock.Add(-5 * time.Second); !v.Asked.Equal(asked) || !v.Since.Equal(asked) {
		t.Errorf("asked %v, since %v, want %v", v.Asked, v.Since, asked)
	}
}

// TestBack: an Envoy that did not answer in time is left alone for a while, as is an address that
// somebody else holds, but one that answers for its state again is looked at again at once.
func TestBack(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want string // asked as soon as it answers for its state again
	}{
		{envoyadmin.ErrTimeout, "look ready; look ready"},
		{envoyadmin.ErrUntrusted, "ready; look ready"},
		{envoyadmin.ErrNotJSON, "ready; "},
	} {
		w := watch(t, running())
		w.step()
		w.fails["look"], w.fails["ready"] = tt.err, tt.err
		w.takes["look"] = 5 * time.Second
		w.after(time.Second)
		w.questions()
		delete(w.fails, "ready")
		w.after(time.Second)
		asked := w.questions()
		w.after(time.Millisecond)
		if asked += "; " + w.questions(); asked != tt.want {
			t.Errorf("%v: asked %q, want %q", tt.err, asked, tt.want)
		}
	}
}

// TestCancelled: a question that was given up says nothing of Envoy, and nothing is put any more.
func TestCancelled(t *testing.T) {
	w := watch(t, running())
	w.step()
	w.clock = w.clock.Add(time.Second)
	ctx, cancel := context.WithCancel(t.Context())
	w.fails["ready"] = fmt.Errorf("get: %w", context.Canceled)
	w.while["ready"] = cancel
	if wait := w.w.Step(ctx); wait != 0 {
		t.Errorf("it waits %v", wait)
	}
	if len(w.w.Views()) > 0 {
		t.Error("a View behind the end")
	}
	if v := w.w.view(); v.Err != nil {
		t.Errorf("it says %v", v.Err)
	}
	w.questions()
	w.w.Step(ctx)
	w.wantQuestions("")
}

// TestPutBeforeQuestion: a new set is in a View before the next question, which may hang, and so is
// a dump that failed. That nothing listens is told together with systemd's word.
func TestPutBeforeQuestion(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*envoy)
		told   bool
	}{
		{"nothing new", func(e *envoy) {}, false},
		{"a new set", func(e *envoy) { e.sets++ }, true},
		{"a look fails", func(e *envoy) { e.fails["look"] = envoyadmin.ErrTimeout }, true},
		{"a dump fails",
			func(e *envoy) { e.sets++; e.fails["dump"] = envoyadmin.ErrTimeout }, true},
		{"nothing listens", func(e *envoy) { e.fails["look"] = envoyadmin.ErrRefused }, false},
	} {
		w := watch(t, running())
		w.step()
		w.clock = w.clock.Add(time.Second)
		tt.change(w.envoy)
		var told []View
		w.while["ready"] = func() {
			select {
			case v := <-w.w.Views():
				told = append(told, v)
			default:
			}
		}
		last, _ := w.step()
		if (len(told) == 1) != tt.told {
			t.Errorf("%s: while Envoy is asked for its state %d Views are put", tt.name, len(told))
		}
		for _, v := range told {
			if v.Generation != last.Generation || !errors.Is(v.Err, last.Err) {
				t.Errorf("%s: first generation %d and %v, then generation %d and %v",
					tt.name, v.Generation, v.Err, last.Generation, last.Err)
			}
		}
	}
}

// TestFacts: symptoms are found in what a View says, and in all of it.
func TestFacts(t *testing.T) {
	v := View{
		Outage: Outage{
			Err: errors.New("e"), Since: time.Unix(1, 0), Asked: time.Unix(2, 0),
			LastError: "last", Unit: "failed",
		},
		State: "LIVE",
		Info: envoyadmin.ServerInfo{
			Version: envoyadmin.Version{Major: 1}, Node: envoyadmin.Node{ID: "node"},
		},
		Snapshot: envoyadmin.Snapshot{Skipped: []envoyadmin.Skipped{{Listener: "s"}}},
		Rejected: []envoyadmin.Rejected{{Name: "r"}}, Configured: true,
		Stream: &symptom.Stream{Code: 7}, Apart: true, Way: Way{Probed: true, Probe: errors.New("p")},
		LogErr: "log",
	}
	want := symptom.Envoy{
		Admin: "127.0.0.1:15000", Err: v.Err, Since: v.Since, Unit: "failed", LastError: "last",
		State: "LIVE", Version: v.Info.Version, Configured: true, Rejected: v.Rejected,
		Skipped: v.Snapshot.Skipped, Stream: v.Stream, Apart: true, LogErr: "log", Probe: v.Probe,
		Probed: true, Node: "node",
	}
	got := v.Facts("127.0.0.1:15000")
	same := cmp.Comparer(func(a, b error) bool { return errors.Is(a, b) })
	if diff := cmp.Diff(want, got, same); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
