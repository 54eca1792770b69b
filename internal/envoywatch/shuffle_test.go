package envoywatch

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
)

// told says whether this Envoy's set is news: an update came before it.
func (e *envoy) told() bool { return e.dynamic || e.stats.Version != 0 || !e.lds }

// mishap is something that may happen to an Envoy at any time, between questions or during one.
type mishap struct {
	name    string
	happens func(*test, *rand.Rand)
}

var questions = []string{"look", "dump", "ready", "info", "stats", "bootstrap", "clusters", "panics"}

var mishaps = []mishap{
	{"restart", func(t *test, _ *rand.Rand) { t.restart() }},
	{"hot restart", func(t *test, _ *rand.Rand) { t.restart(); t.state = "LIVE" }},
	{"serve", func(t *test, _ *rand.Rand) { t.serve() }},
	{"change", func(t *test, _ *rand.Rand) {
		if t.dynamic {
			t.sets++
		}
	}},
	{"told of nothing", func(t *test, _ *rand.Rand) {
		t.state, t.dynamic, t.stats.Version, t.warming = "LIVE", false, 7, false
		t.sets++
	}},
	{"warm", func(t *test, _ *rand.Rand) { t.warming = t.dynamic && !t.warming; t.sets++ }},
	{"hang", func(t *test, r *rand.Rand) {
		question := questions[r.IntN(len(questions))]
		t.fails[question], t.takes[question] = envoyadmin.ErrTimeout, 5*time.Second
	}},
	{"down", func(t *test, _ *rand.Rand) { t.down = envoyadmin.ErrRefused }},
	{"heal", func(t *test, _ *rand.Rand) { t.heal() }},
	{"hint", func(t *test, _ *rand.Rand) {
		t.w.Note(envoyadmin.LogEvent{Kind: envoyadmin.ListenerChanged, Count: 1})
	}},
	{"stream ends", func(t *test, r *rand.Rand) {
		t.stats.Connected = false
		code := []int{0, 7, 14}[r.IntN(3)]
		t.w.Note(envoyadmin.LogEvent{Kind: envoyadmin.StreamClosed, Code: code, Count: 1})
	}},
	{"endpoints sicken", func(t *test, r *rand.Rand) {
		t.clusters = []envoyadmin.ClusterHealth{{Name: "a", Total: 4, Healthy: r.IntN(5)}}
		t.panics = map[string]uint64{"a": r.Uint64N(3)}
	}},
	{"stream stands", func(t *test, _ *rand.Rand) { t.stats.Connected = true }},
}

func (e *envoy) heal() {
	e.down = nil
	clear(e.fails)
	clear(e.takes)
	for _, question := range questions {
		e.takes[question] = time.Millisecond
	}
}

// TestShuffled plays mishaps in random order. No set counts that was read before Envoy was told of
// one, whatever happens when; and once it rests, all that a View tells is so.
func TestShuffled(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	for n := range 2000 {
		shuffled(t, seed+uint64(n))
		if t.Failed() {
			return
		}
	}
}

func shuffled(t *testing.T, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 0))
	e := running()
	e.lds = r.IntN(8) > 0
	e.heal()
	w := watch(t, e)
	var story []string
	happen := func(where string) {
		m := mishaps[r.IntN(len(mishaps))]
		story = append(story, where+m.name)
		m.happens(w, r)
	}
	for range 30 {
		switch question := questions[r.IntN(len(questions))]; r.IntN(3) {
		case 0:
			happen("")
		case 1:
			e.while[question] = func() { happen("while " + question + ": ") }
		}
		d := time.Duration(r.IntN(2000)) * time.Millisecond
		w.clock = w.clock.Add(d)
		v, wait := w.step()
		story = append(story, fmt.Sprintf("+%v: %s", d, w.questions()))
		if wait < 0 || wait > time.Second {
			t.Errorf("seed %d: it waits %v", seed, wait)
		}
		if dump := v.Snapshot.Bytes - 100; v.Generation > 0 && !e.news[dump] {
			t.Fatalf("seed %d: dump %d counts, which was read before an update:\n%q",
				seed, dump, story)
		}
	}
	e.heal()
	clear(e.while)
	e.stats.Connected, e.warming = true, false
	v := w.after(6000 * time.Second) // 1,000 times as long as the longest question
	for range 60 {
		v = w.after(time.Second)
	}
	if e.state == "LIVE" && (v.Configured != e.told() || v.Err != nil || v.State != "LIVE") {
		t.Fatalf("seed %d: at rest configured %v (told: %v), %v, %s:\n%q",
			seed, v.Configured, e.told(), v.Err, v.State, story)
	}
	if v.Configured && v.Snapshot.Fingerprint != e.fingerprint() {
		t.Fatalf("seed %d: at rest it is %+v, want %+v:\n%q",
			seed, v.Snapshot.Fingerprint, e.fingerprint(), story)
	}
	// Of one that is not configured the statistics tell that first, at their pace.
	if v.Configured && (v.Stream != nil || v.Apart) {
		t.Fatalf("seed %d: at rest the stream is %+v, apart %v:\n%q",
			seed, v.Stream, v.Apart, story)
	}
}
