package envoyadmin

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// world is an Envoy as the detector's user meets it: a state, what questions cost, and how
// much was spent on them.
type world struct {
	t          *testing.T
	mu         sync.Mutex // state, changed
	state      Fingerprint
	look, dump time.Duration
	fail       error

	names []string      // of the listeners
	named time.Duration // what a look by names takes
	hint  string        // the listener that a hint names
	next  Fingerprint   // of the Envoy that a new connection leads to, after a hot restart

	share                float64 // of the Detector, where it is not the default one
	taken                []taken
	looks, nameds, dumps int
	redials              int
	spent                time.Duration
	lastDump             time.Time
	longestAfter         time.Duration // from a change to a dump that holds it
	changed              time.Time
	seen                 Fingerprint
}

// drive does what Next says until the time is over. hints wakes it up, as the log does.
func (w *world) drive(d *Detector, length time.Duration, hints <-chan struct{}) {
	end := time.Now().Add(length)
	for time.Now().Before(end) {
		action, wait := d.Next(time.Now())
		began := time.Now()
		switch action {
		case Wait:
			if wait <= 0 {
				w.t.Fatalf("told to wait for %v", wait)
			}
			select {
			case <-hints:
				d.Hint(time.Now(), w.hint)
			case <-time.After(min(wait, time.Until(end))):
			}
			continue
		case Look, LookNamed:
			f, took := w.now(), w.look
			if action == LookNamed {
				took = w.named
				w.nameds++
			}
			time.Sleep(took)
			w.looks++
			if d.Looked(began, time.Now(), f, w.fail) {
				w.redial()
			}
		case Dump:
			f := w.now()
			time.Sleep(w.dump)
			w.dumps++
			w.lastDump = time.Now()
			if w.fail == nil && f != w.seen {
				w.seen = f
				w.mu.Lock()
				w.longestAfter = max(w.longestAfter, time.Since(w.changed))
				w.mu.Unlock()
			}
			told := Snapshot{Fingerprint: f, Names: w.names, Bytes: w.bytes()}
			if d.Dumped(began, time.Now(), told, w.fail) {
				w.redial()
			}
		}
		w.spent += time.Since(began)
		if w.fail == nil {
			w.took(began)
		}
	}
}

// bytes are as many as Envoy takes that long for: 10 MB a second.
func (w *world) bytes() int64 { return int64(w.dump / 100) }

func (w *world) redial() {
	w.redials++
	if w.next != (Fingerprint{}) {
		w.state = w.next
	}
}

// took notes a question that was answered, and holds that no window of time has more of them than
// the bucket allows, and one question, and 1 % for looks that nothing asks for.
func (w *world) took(began time.Time) {
	ended := time.Now()
	w.taken = append(w.taken, taken{began, ended})
	size := max(reserve, reserveDumps*w.dump)
	share := cmp.Or(w.share, DefaultShare)
	var sum, longest time.Duration
	for i := len(w.taken) - 1; i >= 0; i-- {
		one := w.taken[i].ended.Sub(w.taken[i].began)
		sum, longest = sum+one, max(longest, one)
		window := ended.Sub(w.taken[i].began)
		if limit := size + time.Duration((share+0.01)*float64(window)) + longest; sum > limit {
			w.t.Fatalf("%v taken within %v, want %v at most", sum, window, limit)
		}
	}
}

// taken is the time of a question.
type taken struct{ began, ended time.Time }

func (w *world) now() Fingerprint {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.state
}

func (w *world) change() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.state.sum = rand.Uint64()
	w.changed = time.Now()
}

func share(w *world, of time.Duration) float64 { return 100 * float64(w.spent) / float64(of) }

// The costs that were measured.
var costs = map[string][2]time.Duration{
	"10 services":     {900 * time.Microsecond, 2 * time.Millisecond},
	"1,000 services":  {4300 * time.Microsecond, 40 * time.Millisecond},
	"10,000 services": {30 * time.Millisecond, 335 * time.Millisecond},
	"100 MB":          {300 * time.Millisecond, 5 * time.Second},
}

func TestDetectorIdle(t *testing.T) {
	for name, cost := range costs {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := &world{t: t, look: cost[0], dump: cost[1], state: Fingerprint{Process: 1}}
				d := new(Detector)
				w.drive(d, time.Minute, nil)
				if w.dumps != 1 {
					t.Fatalf("%d full dumps at the start", w.dumps)
				}
				w.spent, w.dumps, w.looks = 0, 0, 0
				w.drive(d, 8*time.Minute, nil)
				if s := share(w, 8*time.Minute); s > 1 || w.dumps > 0 || w.looks < 8*60/31 {
					t.Errorf("idle: %.2f %% of the time, %d looks, %d dumps", s, w.looks, w.dumps)
				}
			})
		})
	}
}

func TestDetectorChangesAfterCalm(t *testing.T) {
	for name, cost := range costs {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := &world{t: t, look: cost[0], dump: cost[1], state: Fingerprint{Process: 1}}
				d := new(Detector)
				hints := make(chan struct{}, 1)
				w.drive(d, 3*time.Minute, nil)
				w.longestAfter = 0
				w.change()
				hints <- struct{}{}
				w.drive(d, time.Minute, hints)
				if want := cost[0] + cost[1]; w.longestAfter != want {
					t.Errorf("with a hint seen after %v, want %v: a look and a dump at once", w.longestAfter, want)
				}
				if !d.Early() {
					t.Error("a look for a hint counts as one that was due")
				}
				w.longestAfter = 0
				w.change()
				w.drive(d, time.Minute, hints)
				if limit := min(max(lookFloor, lookShare*cost[0]), lookCeiling) + cost[0] +
					cost[1]; w.longestAfter == 0 || w.longestAfter > limit {
					t.Errorf("without a hint seen after %v, want at most %v", w.longestAfter, limit)
				}
				if d.Early() {
					t.Error("a look that was due counts as one for a hint")
				}
			})
		})
	}
}

func TestDetectorOneChangeASecond(t *testing.T) {
	for name, cost := range costs {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := &world{t: t, look: cost[0], dump: cost[1], state: Fingerprint{Process: 1}}
				d := new(Detector)
				w.drive(d, time.Minute, nil)
				hints := make(chan struct{}, 1)
				done := make(chan struct{})
				go func() {
					defer close(done)
					for range 20 * 60 {
						w.change()
						select {
						case hints <- struct{}{}:
						default:
						}
						time.Sleep(time.Second)
					}
				}()
				w.drive(d, 10*time.Minute, hints) // what was saved is spent
				w.spent = 0
				w.drive(d, 10*time.Minute, hints)
				<-done
				if s := share(w, 10*time.Minute); s > 11 {
					t.Errorf("%.2f %% of the time", s)
				}
				w.drive(d, 2*time.Minute, hints)
				if w.seen != w.state {
					t.Error("the last change was not seen")
				}
			})
		})
	}
}

// TestDetectorLatest is what the README says of 10,000 services that change each second: how old
// the oldest change is when the dump that holds it is there. What a full dump takes then was
// measured: 335 ms of TCP chains, 1.1 s of HTTP.
func TestDetectorLatest(t *testing.T) {
	for name, test := range map[string]struct{ look, dump, limit time.Duration }{
		"TCP chains":  {30 * time.Millisecond, 335 * time.Millisecond, 6 * time.Second},
		"HTTP chains": {50 * time.Millisecond, 1100 * time.Millisecond, 15 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := &world{t: t, look: test.look, dump: test.dump, state: Fingerprint{Process: 1}}
				d := new(Detector)
				w.drive(d, time.Minute, nil)
				var oldest time.Duration
				changed := time.Now() // the oldest change that no dump holds
				hints := make(chan struct{}, 1)
				for range 300 {
					w.change()
					hints <- struct{}{}
					dumps := w.dumps
					w.drive(d, time.Second-time.Nanosecond, hints)
					if w.dumps > dumps {
						oldest = max(oldest, w.lastDump.Sub(changed))
						changed = time.Now()
					}
					time.Sleep(time.Nanosecond)
				}
				if oldest == 0 || oldest > test.limit {
					t.Errorf("a change was seen after %v, want %v at most", oldest, test.limit)
				}
				t.Logf("a change is seen after %v at most", oldest.Round(100*time.Millisecond))
			})
		})
	}
}

// TestDetectorBurst: after a minute of calm each of five changes two seconds apart is seen by a
// dump of its own, at once. What follows without end is seen at Share of the time.
func TestDetectorBurst(t *testing.T) {
	for name, cost := range costs {
		for _, share := range []float64{0.05, DefaultShare, 0.5} {
			t.Run(fmt.Sprintf("%s at %v", name, share), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := &world{t: t, look: cost[0], dump: cost[1], state: Fingerprint{Process: 1},
						share: share}
					d := &Detector{Share: share}
					calm := time.Minute + time.Duration(2/share*float64(cost[1]))
					w.drive(d, calm, nil)
					for i := range 5 {
						w.longestAfter = 0
						w.change()
						d.Hint(time.Now(), "")
						dumps := w.dumps
						w.drive(d, max(2*time.Second, 2*cost[1]), nil)
						if want := cost[0] + cost[1]; w.longestAfter != want || w.dumps != dumps+1 {
							t.Errorf("change %d was seen after %v by %d dumps, want %v by one", i,
								w.longestAfter, w.dumps-dumps, want)
						}
					}
				})
			})
		}
	}
}

// TestDetectorStraight: a hint that names a listener asks for a dump at once, whatever that takes,
// and one that comes to nothing does so once.
func TestDetectorStraight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t, look: time.Millisecond, dump: 4 * time.Millisecond,
			state: Fingerprint{Process: 1}}
		d := new(Detector)
		w.drive(d, time.Minute, nil)
		play := func(listener string, change bool) string {
			w.looks, w.dumps, w.redials = 0, 0, 0
			if change {
				w.change()
			}
			d.Hint(time.Now(), listener)
			w.drive(d, 200*time.Millisecond, nil)
			got := fmt.Sprintf("%d looks, %d dumps, %d redials", w.looks, w.dumps, w.redials)
			w.drive(d, 2*time.Second, nil)
			return got
		}
		for _, step := range []struct {
			listener string
			change   bool
			dump     time.Duration
			want     string
		}{
			{"a", true, 4 * time.Millisecond, "0 looks, 1 dumps, 0 redials"},
			{"", true, 4 * time.Millisecond, "1 looks, 1 dumps, 0 redials"},
			{"a", false, 4 * time.Millisecond, "1 looks, 1 dumps, 1 redials"},
			{"a", true, 50 * time.Millisecond, "0 looks, 1 dumps, 0 redials"},
			{"a", true, 50 * time.Millisecond, "0 looks, 1 dumps, 0 redials"},
			{"", true, 50 * time.Millisecond, "1 looks, 1 dumps, 0 redials"},
		} {
			if w.dump == step.dump { // it takes that long for good
				for range leastOf {
					play("", true)
				}
			}
			w.dump = step.dump
			if got := play(step.listener, step.change); got != step.want {
				t.Errorf("%+v: %s", step, got)
			}
			if step.change && !d.Early() {
				t.Errorf("%+v: not for the hint", step)
			}
		}
	})
}

// TestDetectorStale: hints that came before a dump was made, as of an update of many listeners, are
// looked into before another dump is. One that came while it was read has another at once.
func TestDetectorStale(t *testing.T) {
	var d Detector
	now := time.Unix(1e9, 0)
	s := Snapshot{Fingerprint: Fingerprint{Process: 1}, Names: []string{"a", "b"}, Bytes: 5_300_000}
	dump := func() {
		began := now
		now = now.Add(300 * time.Millisecond)
		d.Dumped(began, now, s, nil)
	}
	next := func(want Action) {
		t.Helper()
		if got, wait := d.Next(now); got != want {
			t.Fatalf("action %d after %v, want %d", got, wait, want)
		}
	}
	next(Dump)
	dump()
	d.Hint(now, "a")
	next(Dump)
	d.Hint(now, "b")
	s.Fingerprint.Listeners = 2
	dump()
	next(LookNamed)
	d.Looked(now, now.Add(30*time.Millisecond), s.Fingerprint, nil)
	now = now.Add(time.Second)
	d.Hint(now, "a")
	next(LookNamed) // the last one came to nothing
	d.Looked(now, now.Add(30*time.Millisecond), s.Fingerprint, nil)
	now = now.Add(time.Minute)
	next(LookNamed)
	d.Looked(now, now.Add(30*time.Millisecond), s.Fingerprint, nil)

	now = now.Add(time.Minute)
	d.Hint(now, "a")
	next(Dump)
	s.Fingerprint.Listeners, s.Made = 3, now.Add(200*time.Millisecond)
	d.Hint(now.Add(250*time.Millisecond), "b")
	dump()
	next(Dump)
}

// TestDetectorNamed: looks are by names where there are few, but for each tenth, one for a hint
// that names none of them, and the one behind a removal.
func TestDetectorNamed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t, look: 30 * time.Millisecond, named: 10 * time.Millisecond,
			dump: 300 * time.Millisecond, state: Fingerprint{Process: 1}, names: []string{"a", "b"}}
		d := new(Detector)
		w.drive(d, time.Second, nil)
		w.drive(d, 9*time.Minute, nil)
		if all := w.looks - w.nameds; w.nameds < 8*all || w.nameds > 9*all+9 || w.looks < 27 {
			t.Errorf("%d looks, %d by names", w.looks, w.nameds)
		}
		one := func(hint bool) string {
			w.looks, w.nameds = 0, 0
			w.change()
			if hint {
				d.Hint(time.Now(), "")
			}
			for range 60 {
				if w.drive(d, time.Second, nil); w.looks > 0 {
					break
				}
			}
			return fmt.Sprintf("%d looks, %d by names", w.looks, w.nameds)
		}
		d.looks.named = 0
		if got := one(false); got != "1 looks, 1 by names" {
			t.Errorf("without a hint: %s", got)
		}
		if got := one(true); got != "1 looks, 0 by names" {
			t.Errorf("for a hint: %s", got)
		}
		w.names = []string{"a"}
		one(false)
		if got := one(false); got != "1 looks, 0 by names" {
			t.Errorf("behind a removal: %s", got)
		}
		if got := one(false); got != "1 looks, 1 by names" {
			t.Errorf("and then: %s", got)
		}
		for i := range 33 {
			w.names = append(w.names, fmt.Sprintf("a%02d", i))
		}
		one(false)
		if got := one(false); got != "1 looks, 0 by names" {
			t.Errorf("of many: %s", got)
		}
	})
}

// TestDetectorUnlike: looks by names that differ from the dump without end are given up.
func TestDetectorUnlike(t *testing.T) {
	var d Detector
	now := time.Unix(1e9, 0)
	whole := Snapshot{Fingerprint: Fingerprint{Process: 1, Listeners: 2}, Names: []string{"a", "b"}}
	dumps, named := 0, 0
	for end := now.Add(time.Hour); now.Before(end); {
		action, wait := d.Next(now)
		began := now
		now = now.Add(max(wait, 10*time.Millisecond))
		switch action {
		case LookNamed:
			named++
			d.Looked(began, now, Fingerprint{Process: 1, Listeners: 1}, nil)
		case Look:
			d.Looked(began, now, whole.Fingerprint, nil)
		case Dump:
			dumps++
			d.Dumped(began, now, whole, nil)
		}
	}
	if named != 1 || dumps > 8 {
		t.Errorf("%d looks by names, %d dumps in an hour", named, dumps)
	}
}

// TestDetectorStopped: an Envoy that is stopped for a while, whatever is asked then, is looked at
// soon after it goes on, and owes nothing for it.
func TestDetectorStopped(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	for range 300 {
		length := time.Duration(r.Int64N(int64(10 * time.Minute)))
		changed, unread := r.IntN(2) == 0, r.IntN(4) == 0
		synctest.Test(t, func(t *testing.T) {
			w := &world{t: t, look: 3 * time.Millisecond, dump: 30 * time.Millisecond,
				state: Fingerprint{Process: 1}}
			d := new(Detector)
			if !unread {
				w.drive(d, time.Minute, nil)
			}
			began := time.Now()
			if changed { // the look is answered, and the dump is not
				w.change()
				d.Hint(time.Now(), "")
				if action, _ := d.Next(began); action == Look {
					d.Looked(began, began.Add(w.look), w.now(), nil)
				}
			}
			w.fail, w.look, w.dump = ErrTimeout, shortLimit, longLimit
			for time.Since(began) < length {
				w.drive(d, time.Second, nil)
				asked := time.Now()
				time.Sleep(shortLimit) // whether it is ready
				d.Took(ReadyQuestion, asked, time.Now(), ErrTimeout)
			}
			w.fail, w.look, w.dump = nil, 3*time.Millisecond, 30*time.Millisecond
			w.change()
			w.longestAfter = 0
			d.Back(time.Now())
			w.drive(d, time.Minute, nil)
			if w.longestAfter == 0 || w.longestAfter > time.Second {
				t.Errorf("stopped for %v: seen %v after it goes on", length, w.longestAfter)
			}
			if b := d.Bucket(time.Now()); b.Level < b.Size-time.Second {
				t.Errorf("stopped for %v: it has %v left of %v", length, b.Level, b.Size)
			}
		})
	}
}

// TestDetectorTooMuch: an Envoy that answers looks, and whose full dump takes too long each time,
// is tried ever more rarely; if something moves all the time, at Share of the time. Once it has
// less to tell that is seen.
func TestDetectorTooMuch(t *testing.T) {
	for _, moves := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			d := new(Detector)
			f := Fingerprint{Process: 1, Listeners: 1}
			var dumps []time.Duration
			began := time.Now()
			run := func(length time.Duration, err error) {
				for end := time.Now().Add(length); time.Now().Before(end); {
					action, wait := d.Next(time.Now())
					asked := time.Now()
					switch action {
					case Wait:
						time.Sleep(wait)
					case Look, LookNamed:
						time.Sleep(40 * time.Millisecond)
						if moves {
							f.sum++
						}
						d.Looked(asked, time.Now(), f, nil)
					case Dump:
						dumps = append(dumps, time.Since(began))
						if err != nil {
							time.Sleep(longLimit)
						}
						d.Dumped(asked, time.Now(), Snapshot{Fingerprint: f}, err)
					}
				}
			}
			run(10*time.Hour, ErrTimeout)
			got := len(dumps)
			if least, most := 6, 12; !moves && (got < least || got > most) {
				t.Errorf("%d dumps in ten hours: %v", got, dumps)
			}
			spent := float64(got*int(longLimit)) / float64(10*time.Hour)
			if moves && (spent > 0.101 || spent < 0.05) {
				t.Errorf("%.1f %% of the time", 100*spent)
			}
			f.sum++ // somebody made it smaller
			before := len(dumps)
			run(10*time.Minute, nil)
			if len(dumps) == before || d.moved {
				t.Error("it was not read once it could be")
			}
		})
	}
}

// Hints without end that lead to nothing, as of a listener that is refused again and again.
func TestDetectorStorm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t, look: time.Millisecond, dump: 2 * time.Millisecond,
			state: Fingerprint{Process: 1}}
		d := new(Detector)
		w.drive(d, time.Minute, nil)
		w.looks, w.dumps = 0, 0
		hints := make(chan struct{})
		go func() {
			for range 60_000 {
				hints <- struct{}{}
				time.Sleep(time.Millisecond)
			}
		}()
		w.drive(d, time.Minute, hints)
		if w.looks > 70 || w.dumps > 0 || w.redials != 1 {
			t.Errorf("%d looks, %d dumps and %d new connections in a minute of hints", w.looks,
				w.dumps, w.redials)
		}
		for range 60_000 { // let the other end
			select {
			case <-hints:
			case <-time.After(time.Second):
			}
		}
		// After a quiet time the next hint is heeded at once again.
		w.drive(d, time.Minute, nil)
		w.change()
		d.Hint(time.Now(), "")
		w.longestAfter = 0
		w.drive(d, 10*time.Second, nil)
		if w.longestAfter != w.look+w.dump {
			t.Errorf("after the storm a change was seen after %v", w.longestAfter)
		}
	})
}

// After a hot restart the Envoy of before still answers, and the hint is of the new one.
func TestDetectorHotRestart(t *testing.T) {
	for name, cost := range costs {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := &world{t: t, look: cost[0], dump: cost[1], state: Fingerprint{Process: 1}}
				d := new(Detector)
				w.drive(d, 3*time.Minute, nil)
				for process := range uint64(3) {
					w.next = Fingerprint{Process: process + 2}
					d.Hint(time.Now(), "")
					time.Sleep(time.Millisecond) // until it is taken
					w.changed, w.longestAfter = time.Now(), 0
					w.drive(d, 3*time.Minute, nil)
					if limit := 2*cost[0] + max(soon, cost[0]) + cost[1]; w.seen != w.next ||
						w.longestAfter > limit {
						t.Errorf("process %d: seen %+v after %v, want at most %v", process+2, w.seen,
							w.longestAfter, limit)
					}
				}
				if w.redials != 3 {
					t.Errorf("%d new connections", w.redials)
				}
				w.drive(d, 10*time.Minute, nil)
				if w.redials != 3 {
					t.Errorf("%d new connections without a hint", w.redials-3)
				}
			})
		})
	}
}

// A listener becomes active without a line in the log: while one is warming, the detector looks
// again soon, but not for ever.
func TestDetectorWarming(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t, look: time.Millisecond, dump: 2 * time.Millisecond,
			state: Fingerprint{Process: 1}}
		d := new(Detector)
		w.drive(d, time.Minute, nil)
		w.state.Warming = 1
		w.change()
		d.Hint(time.Now(), "")
		w.drive(d, 300*time.Millisecond, nil)
		if w.seen != w.state {
			t.Fatal("warming was not seen")
		}
		w.longestAfter = 0
		w.state.Warming = 0
		w.change()
		w.drive(d, 2*time.Second, nil)
		if w.longestAfter == 0 || w.longestAfter > 300*time.Millisecond {
			t.Errorf("active seen after %v", w.longestAfter)
		}
		w.state.Warming = 1
		w.change()
		w.drive(d, 30*time.Second, nil)
		w.spent = 0
		w.drive(d, 5*time.Minute, nil)
		if s := share(w, 5*time.Minute); s > 1 {
			t.Errorf("warming for minutes: %.2f %% of the time", s)
		}
	})
}

func TestDetectorRestartAndFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t, look: time.Millisecond, dump: 2 * time.Millisecond,
			state: Fingerprint{Process: 1}}
		d := new(Detector)
		w.drive(d, time.Minute, nil)
		w.looks, w.fail = 0, ErrRefused
		w.drive(d, time.Minute, nil)
		if w.looks < 55 || w.looks > 65 || w.redials > 0 {
			t.Errorf(
				"%d questions in a minute to an Envoy that is down, want one a second, and %d redials",
				w.looks, w.redials)
		}
		w.fail = nil
		w.state.Process = 2
		w.change()
		w.longestAfter = 0
		w.drive(d, 5*time.Second, nil)
		if w.longestAfter == 0 || w.longestAfter > lookFloor+10*time.Millisecond {
			t.Errorf("the new process was seen after %v", w.longestAfter)
		}
		w.fail, w.look, w.dump, w.spent = ErrTimeout, shortLimit, longLimit, 0
		w.drive(d, 10*time.Minute, nil)
		if s := share(w, 10*time.Minute); s > 20 {
			t.Errorf("an Envoy that does not answer is asked %.0f %% of the time", s)
		}
	})
}

// TestDetectorKilledWhileAsked: an Envoy that was stopped, or busy, and is killed then, breaks the
// connection on which a question waited. That is no reason to look at the next Envoy late.
func TestDetectorKilledWhileAsked(t *testing.T) {
	broken := fmt.Errorf("%w: connection reset by peer", ErrConnection)
	for _, waited := range []time.Duration{
		0, 1500 * time.Millisecond, 4 * time.Second, longLimit - 1,
	} {
		for _, hinted := range []bool{false, true} {
			t.Run(fmt.Sprint(waited, hinted), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := &world{t: t, look: time.Millisecond, dump: 2 * time.Millisecond,
						state: Fingerprint{Process: 1}}
					d := new(Detector)
					w.drive(d, time.Minute, nil)
					w.change()
					d.Hint(time.Now(), "")
					for action := Wait; action != Dump; {
						began := time.Now()
						action, _ = d.Next(began)
						switch action {
						case Look, LookNamed:
							d.Looked(began, time.Now(), w.now(), nil)
						case Dump:
							time.Sleep(waited)
							d.Dumped(began, time.Now(), Snapshot{}, broken)
						case Wait:
							time.Sleep(10 * time.Millisecond)
						}
					}
					w.state.Process = 2
					w.change()
					w.longestAfter = 0
					if hinted {
						d.Hint(time.Now(), "")
					}
					w.drive(d, 5*time.Second, nil)
					if w.longestAfter == 0 || w.longestAfter > 2*lookFloor {
						t.Errorf("the next Envoy was seen after %v", w.longestAfter)
					}
				})
			})
		}
	}
}

// Whatever happens, the rules hold: waits are positive, dumps are spaced (world checks
// both), and the end is seen.
func TestDetectorRandom(t *testing.T) {
	for range 50 {
		s := rand.Uint64()
		synctest.Test(t, func(t *testing.T) {
			r := rand.New(rand.NewPCG(s, 0))
			w := &world{t: t, look: time.Duration(r.IntN(1e8)), dump: time.Duration(r.IntN(1e9)),
				state: Fingerprint{Process: 1}}
			d := new(Detector)
			for range 100 {
				switch r.IntN(5) {
				case 0:
					w.change()
				case 1:
					w.change()
					d.Hint(time.Now(), "")
				case 2:
					d.Hint(time.Now(), "")
				case 3:
					w.state.Warming = r.IntN(2)
				case 4:
					w.fail = []error{nil, nil, ErrTimeout}[r.IntN(3)]
				}
				w.drive(d, time.Duration(r.IntN(3e9)), nil)
			}
			w.fail = nil
			w.drive(d, 2*time.Minute, nil)
			if w.seen != w.state {
				t.Errorf("seed %d: the last change was not seen", s)
			}
		})
	}
}

func TestPace(t *testing.T) {
	var p Pace
	now := time.Unix(0, 0)
	if !p.Due(now) {
		t.Error("the zero value is not due")
	}
	p.Floor = time.Minute
	p.Asked(now, now.Add(time.Millisecond))
	if p.Due(now.Add(59*time.Second)) || !p.Due(now.Add(61*time.Second)) {
		t.Error("the floor is not kept")
	}
	p.Asked(now, now.Add(time.Second))
	if p.Due(now.Add(1000*time.Second)) || !p.Due(now.Add(1001*time.Second)) {
		t.Error("one part in 1,000 is not kept")
	}
}

// TestDetectorFirstLook: the first look at an Envoy takes many times as long as the next, and does
// not put that one off.
func TestDetectorFirstLook(t *testing.T) {
	var d Detector
	now := time.Unix(1e9, 0)
	f := Fingerprint{Process: 1, Listeners: 1}
	d.Dumped(now, now.Add(time.Millisecond), Snapshot{Fingerprint: f}, nil)
	for _, took := range []time.Duration{80 * time.Millisecond, 2 * time.Millisecond} {
		now = now.Add(lookFloor + time.Millisecond)
		if action, wait := d.Next(now); action != Look {
			t.Fatalf("before a look that takes %v: %v for %v", took, action, wait)
		}
		d.Looked(now, now.Add(took), f, nil)
		now = now.Add(took)
	}
}
