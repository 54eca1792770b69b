package agent

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/internal/conntrack"
	"github.com/service-proxy-agent/service-proxy-agent/internal/sockdiag"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

func TestSilence(t *testing.T) {
	s := silence{}
	start := time.Unix(1000, 0)
	for _, step := range []struct {
		after time.Duration
		quiet []uint16
		want  []uint16
	}{
		{0, []uint16{80, 81}, nil},
		{10 * time.Second, []uint16{80, 81}, nil},
		{11 * time.Second, []uint16{80, 81, 82}, []uint16{80, 81}},
		{12 * time.Second, []uint16{81, 82}, []uint16{81}}, // 80 listens
		{13 * time.Second, []uint16{80, 81}, []uint16{81}}, // and no longer
		{22 * time.Second, []uint16{80, 82}, nil},
		{24 * time.Second, []uint16{80, 82}, []uint16{80}},
		{25 * time.Second, nil, nil},
	} {
		if got := s.lasting(step.quiet, start.Add(step.after)); !slices.Equal(got, step.want) {
			t.Errorf("after %v: %v, want %v", step.after, got, step.want)
		}
	}
	if len(s) != 0 {
		t.Errorf("remembered: %v", s)
	}
}

// TestFiguresOfConntrack: they change at each look, and a guest attribute that holds them does not.
func TestFiguresOfConntrack(t *testing.T) {
	s := sight{sources: map[symptom.Source]*sourceSight{symptom.FromConntrack: {}}}
	start, full := time.Unix(1000, 0), uint64(0)
	var told []symptom.Conntrack
	for i := range 60 { // five minutes
		count := 50 + i%3
		if i >= 12 {
			count, full = 95+i%3, uint64(i/24*i)
		}
		s.take(answer{source: symptom.FromConntrack, full: full, facts: symptom.Surroundings{
			Conntrack: symptom.Conntrack{Count: count, Max: 100}}}, start.Add(time.Duration(i)*aroundEvery))
		if is := s.facts.Conntrack; is.Level() > 0 && (len(told) == 0 || told[len(told)-1] != is) {
			told = append(told, is)
		}
	}
	if n := len(told); n > 5 || told[0].Level() != symptom.Warning ||
		told[n-1].Level() != symptom.Error {
		t.Errorf("%d times: %v", n, told)
	}
}

func TestDrops(t *testing.T) {
	var d drops
	start := time.Unix(1000, 0)
	for _, step := range []struct {
		after      time.Duration
		full, want uint64
	}{
		{0, 500, 0}, // from before the agent's time
		{5 * time.Second, 500, 0},
		{10 * time.Second, 507, 7},
		{15 * time.Second, 507, 7},
		{60 * time.Second, 509, 9},
		{70 * time.Second, 509, 2},
		{130 * time.Second, 509, 0},
		{135 * time.Second, 3, 0}, // the module was loaded anew
		{200 * time.Second, 3, 0},
		{205 * time.Second, 4, 1},
	} {
		if got := d.lately(step.full, start.Add(step.after)); got != step.want {
			t.Errorf("after %v: %d, want %d", step.after, got, step.want)
		}
	}
	for i := range 1000 {
		d.lately(4, start.Add(300*time.Second+time.Duration(i)*aroundEvery))
	}
	if len(d) > 20 {
		t.Errorf("%d counts are kept", len(d))
	}
}

// played is a kernel whose sources are played: each may hang until it is let go, fail, or take its
// time.
type played struct {
	mu      sync.Mutex
	hangs   map[symptom.Source]bool
	fails   map[symptom.Source]bool
	asked   map[symptom.Source][]time.Time
	running map[symptom.Source]int
	release chan struct{}
	random  *rand.Rand

	dropped bool
	silent  bool
}

func newPlayed(seed uint64) *played {
	return &played{hangs: map[symptom.Source]bool{}, fails: map[symptom.Source]bool{},
		asked: map[symptom.Source][]time.Time{}, running: map[symptom.Source]int{},
		release: make(chan struct{}), random: rand.New(rand.NewPCG(seed, 0))}
}

var playedSources = []symptom.Source{symptom.FromFilter, symptom.FromSockets,
	symptom.FromConntrack}

var errPlayed = errors.New("played")

// ask is one question: it says how it ends.
func (p *played) ask(source symptom.Source) error {
	p.mu.Lock()
	p.asked[source] = append(p.asked[source], time.Now())
	p.running[source]++
	hangs, fails, release := p.hangs[source], p.fails[source], p.release
	delay := time.Duration(p.random.IntN(900)) * time.Millisecond
	p.mu.Unlock()
	if hangs {
		<-release
	}
	time.Sleep(delay)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.running[source]--
	if fails {
		return errPlayed
	}
	return nil
}

func (p *played) questions(t *testing.T) questions {
	q := calm()
	q.filter = func(context.Context, iptables.Family) (iptables.Filter, error) {
		if err := p.ask(symptom.FromFilter); err != nil {
			return iptables.Filter{}, err
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.dropped {
			return filterOf(t, ":INPUT DROP [0:0]"), nil
		}
		return iptables.Filter{}, nil
	}
	q.listeners = func(port uint16) ([]sockdiag.Listener, error) {
		if port == mesh().serving[0] { // once for both
			if err := p.ask(symptom.FromSockets); err != nil {
				return nil, err
			}
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		return make([]sockdiag.Listener, map[bool]int{false: 1}[p.silent]), nil
	}
	q.load = func(context.Context) (conntrack.Load, error) {
		if err := p.ask(symptom.FromConntrack); err != nil {
			return conntrack.Load{}, err
		}
		return conntrack.Load{Count: 7, Max: 100}, nil
	}
	return q
}

// lookingAround runs the task and the loop's side of it: newest is what was found last.
func lookingAround(t *testing.T, p *played) (s *surroundings, newest func() symptom.Surroundings) {
	t.Helper()
	s = newSurroundings(p.questions(t), zap.NewNop())
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	all.Go(func() {
		if err := s.run(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		cancel()
		close(p.release)
		all.Wait()
		time.Sleep(5 * time.Second) // the last questions end
	})
	var last symptom.Surroundings
	return s, func() symptom.Surroundings {
		synctest.Wait()
		select {
		case last = <-s.found.Get():
		default:
		}
		return last
	}
}

// TestSurroundingsWithASourceThatHangs: whichever it is, the others go on at their pace, it is not
// asked a second time, and what it told is forgotten after a minute.
func TestSurroundingsWithASourceThatHangs(t *testing.T) {
	for _, hung := range playedSources {
		synctest.Test(t, func(t *testing.T) {
			p := newPlayed(1)
			p.dropped, p.silent = true, true
			s, newest := lookingAround(t, p)
			s.asked.Put(mesh())
			time.Sleep(25 * time.Second)
			all := newest()
			if len(all.Dropped) != 2 || len(all.Silent) != 2 || all.Conntrack.Count != 7 {
				t.Fatalf("%s: before: %+v", hung, all)
			}
			p.mu.Lock()
			p.hangs[hung] = true
			clear(p.asked)
			p.mu.Unlock()
			time.Sleep(50 * time.Second)
			all = newest()
			if len(all.Dropped) != 2 || len(all.Silent) != 2 || all.Conntrack.Count != 7 {
				t.Errorf("%s: while it may have been a moment: %+v", hung, all)
			}
			time.Sleep(45 * time.Second)
			all = newest()
			if (len(all.Dropped) == 0) != (hung == symptom.FromFilter) ||
				(len(all.Silent) == 0) != (hung == symptom.FromSockets) ||
				(all.Conntrack.Count == 0) != (hung == symptom.FromConntrack) {
				t.Errorf("%s: after a minute: %+v", hung, all)
			}
			p.mu.Lock()
			defer p.mu.Unlock()
			for source, least := range map[symptom.Source]int{symptom.FromFilter: 4, symptom.FromSockets: 15,
				symptom.FromConntrack: 15} {
				switch n := len(p.asked[source]); {
				case source == hung && n > 1:
					t.Errorf("%s hangs and was asked %d times", source, n)
				case source != hung && n < least:
					t.Errorf("%s hangs: %s was asked %d times in 95 s", hung, source, n)
				}
			}
		})
	}
}

// TestSurroundingsAtRandom: sources that take their time, fail and hang, and a want that changes,
// in random order. What changes is told within a minute of their recovery, no source is asked twice
// at a time or faster than it may, and the loop's side never waits.
func TestSurroundingsAtRandom(t *testing.T) {
	n := 200
	seed := rand.Uint64N(1 << 32)
	t.Logf("seed %d", seed)
	for i := range n {
		synctest.Test(t, func(t *testing.T) {
			p := newPlayed(seed + uint64(i))
			random := rand.New(rand.NewPCG(seed+uint64(i), 1))
			s, newest := lookingAround(t, p)
			a := mesh()
			for range 30 {
				p.mu.Lock()
				switch source := playedSources[random.IntN(len(playedSources))]; random.IntN(6) {
				case 0:
					p.hangs[source] = true
				case 1:
					p.fails[source] = !p.fails[source]
				case 2:
					p.dropped = !p.dropped
				case 3:
					p.silent = !p.silent
				case 4:
					a.serial++
				case 5:
					a.jumps[0] = !a.jumps[0]
				}
				for source, n := range p.running {
					if n > 2 || n > 1 && source != symptom.FromFilter {
						t.Errorf("seed %d: %s was asked %d times at once", seed+uint64(i), source, n)
					}
				}
				p.mu.Unlock()
				began := time.Now()
				s.asked.Put(a)
				if time.Since(began) != 0 {
					t.Error("the loop waited")
				}
				newest()
				time.Sleep(time.Duration(random.IntN(20000)) * time.Millisecond)
			}
			p.mu.Lock()
			clear(p.hangs)
			clear(p.fails)
			old := p.release
			p.release = make(chan struct{})
			close(old)
			want := [2]bool{p.dropped, p.silent}
			p.mu.Unlock()
			time.Sleep(time.Minute)
			all := newest()
			got := [2]bool{len(all.Dropped) > 0, len(all.Silent) > 0}
			if got != want || all.Conntrack.Count != 7 {
				t.Errorf("seed %d: dropped, silent: %v, want %v; %+v", seed+uint64(i), got, want, all)
			}
			p.mu.Lock()
			defer p.mu.Unlock()
			for source, asked := range p.asked {
				for j := 1; j < len(asked); j++ {
					if gap := asked[j].Sub(asked[j-1]); gap < aroundEvery {
						t.Errorf("seed %d: %s was asked again after %v", seed+uint64(i), source, gap)
					}
				}
			}
		})
	}
}

// TestSurroundingsReachTheLoop: what the task finds is a finding of the next pass, and the loop
// tells it what to look for.
func TestSurroundingsReachTheLoop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlayed(1)
		p.silent = true
		s, _ := lookingAround(t, p)
		s.asked.Put(mesh())
		time.Sleep(20 * time.Second)
		synctest.Wait()
		seen := Observation{Around: <-s.found.Get()}
		f := seen.Facts(Want{}, nil)
		if !slices.Equal(f.Silent, mesh().serving) || f.Conntrack.Max != 100 {
			t.Errorf("%+v", f.Surroundings)
		}
	})
}

// TestSurroundingsOfANewWant: a want that has changed is looked at within seconds, one that is the
// same at the usual pace.
func TestSurroundingsOfANewWant(t *testing.T) {
	for name, test := range map[string]struct {
		change func(*about)
		again  bool
	}{
		"the same":        {func(*about) {}, false},
		"other services":  {func(a *about) { a.serial++ }, true},
		"the jumps go":    {func(a *about) { a.jumps[1] = false }, true},
		"another address": {func(a *about) { a.local = a.local[:1] }, true},
		"another port":    {func(a *about) { a.serving = []uint16{8080} }, true},
	} {
		synctest.Test(t, func(t *testing.T) {
			p := newPlayed(1)
			s, _ := lookingAround(t, p)
			a := mesh()
			s.asked.Put(a)
			time.Sleep(time.Second)
			test.change(&a)
			s.asked.Put(a)
			time.Sleep(2 * aroundEvery)
			synctest.Wait()
			p.mu.Lock()
			defer p.mu.Unlock()
			if again := len(p.asked[symptom.FromFilter]) > 1; again != test.again {
				t.Errorf("%s: asked again within seconds: %v", name, again)
			}
		})
	}
}

// TestRoutesAreAskedWhenTheyMove: while the kernel tells of no change the answer stands, and is not
// forgotten; a failure, another want, a change and five minutes each ask again.
func TestRoutesAreAskedWhenTheyMove(t *testing.T) {
	start := time.Unix(1000, 0)
	s := sight{sources: map[symptom.Source]*sourceSight{}, silence: silence{}}
	missing := symptom.Surroundings{NoRoute: []symptom.Unrouted{{Count: 1}}}
	a := mesh()
	s.want(a)
	var moved, fails bool
	var asked []int
	var news int // passes that the answers are worth
	for second := range 800 {
		now := start.Add(time.Duration(second) * time.Second)
		switch second {
		case 50:
			moved = true
		case 90:
			a.serial++
			s.want(a)
		case 130:
			moved, fails = true, true
		case 150:
			fails = false
		}
		for _, source := range s.due(now, func() bool { was := moved; moved = false; return was }) {
			if source == symptom.FromRoutes {
				asked = append(asked, second)
			}
			one := answer{source: source}
			if one.facts = missing; source == symptom.FromRoutes && fails {
				one.err = errPlayed
			}
			if s.take(one, now) {
				news++
			}
		}
		s.forget(now)
		if len(s.facts.NoRoute) != 1 {
			t.Fatalf("forgotten after %d s", second)
		}
	}
	if want := []int{0, 60, 90, 130, 150, 450, 750}; !slices.Equal(asked, want) {
		t.Errorf("asked after %v s, want %v", asked, want)
	}
	if news != 1 {
		t.Errorf("news %d times, want once: the answers are all the same", news)
	}
}
