package chaos

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"time"
)

// Result of a game.
type Result struct {
	Violations []Violation
	Seen       map[Kind]int // observations, excused or not
	Events     int          // faults that were begun
	Counts     Counts
	Took       time.Duration
	Calm       time.Duration // the longest from the last fault until rules and connections were right
}

// Limits of a calm. A second or so of it is the control plane's and Envoy's.
const (
	// calmLimit is for everything to be as wanted, beside what Heals and Tells of a fault add.
	calmLimit = 5 * time.Second
	// raceLimit is added for an agent with the race detector, beside others on two processors.
	raceLimit = 5 * time.Second
	// giveUp, beyond that, ends a game that no longer gets calm.
	giveUp = 30 * time.Second
)

// active is a fault that is on.
type active struct {
	span  *Span
	fault Fault
	until time.Duration // on the game's clock
	end   func() error
}

// game is a sequence being played.
type game struct {
	w      *World
	active []active
	heals  time.Duration // the longest of the faults since the last calm
	tells  time.Duration // the same for what the agent says
	calmed time.Duration // the longest until the rules were right
	events int
}

// Play plays a sequence on a lab of its own and judges what was seen. An error is a lab that could
// not be made or a fault that could not be played.
func Play(ctx context.Context, s Setting, sequence []Event, opts Options) (r Result, err error) {
	began := time.Now()
	starting, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	w, err := newWorld(starting, s, opts)
	if err != nil {
		return r, err
	}
	defer func() {
		w.end()
		w.tasks.Wait()
		err = errors.Join(err, w.Close())
	}()
	watching, stop := context.WithCancel(ctx)
	defer stop()
	var counts counter
	if err := w.prepare(watching, &counts); err != nil {
		return r, err
	}
	before, err := w.picture(ctx)
	if err != nil {
		return r, err
	}
	if err := w.StartAgent(); err != nil {
		return r, err
	}
	w.Started = time.Now()
	g := &game{w: w}
	calm := g.calm(ctx) // the first
	w.Started = time.Now()
	w.Log("it begins at %s", w.Started.Format("15:04:05.000"))
	var watchers sync.WaitGroup
	watchers.Go(func() { w.watchMachine(watching) })
	for _, watch := range w.watchers(&counts) {
		watchers.Go(func() { watch(watching) })
	}
	if calm {
		calm, err = g.play(ctx, sequence)
	}
	if calm {
		g.calm(ctx)
	} else {
		g.endAll()
	}
	stop()
	watchers.Wait()
	w.end()
	w.tasks.Wait()
	if err == nil {
		w.leave(ctx, before)
	}
	if opts.AgentLog != "" {
		if err := os.WriteFile(opts.AgentLog, []byte(w.Agent.Log()), 0o644); err != nil {
			return r, err
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	spans := make([]Span, 0, len(w.spans))
	for _, s := range w.spans {
		spans = append(spans, *s)
	}
	r = Result{Violations: Judge(w.observations, spans, time.Now()), Events: g.events,
		Counts: counts.get(), Took: time.Since(began), Calm: g.calmed, Seen: map[Kind]int{}}
	for _, o := range w.observations {
		r.Seen[o.Kind]++
	}
	return r, err
}

// play walks through the events, until one cannot be played, or it no longer gets calm. The clock
// stands in calms.
func (g *game) play(ctx context.Context, sequence []Event) (calm bool, err error) {
	start := time.Now()
	for _, e := range sequence {
		if err := g.wait(ctx, start, e.At); err != nil {
			return false, err
		}
		if e.Name == Calm {
			began := time.Now()
			if !g.calm(ctx) {
				return false, nil
			}
			start = start.Add(time.Since(began))
			continue
		}
		if err := g.begin(e); err != nil {
			return false, err
		}
	}
	return true, nil
}

// wait takes back what is over until the game's clock shows at.
func (g *game) wait(ctx context.Context, start time.Time, at time.Duration) error {
	for {
		next := at
		i := -1
		for j, a := range g.active {
			if a.until <= next {
				next, i = a.until, j
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Until(start.Add(next))):
		}
		if i < 0 {
			return nil
		}
		if err := g.end(i); err != nil {
			return err
		}
	}
}

func (g *game) begin(e Event) error {
	f, ok := Find(slices.Concat(Faults(g.w.Setting), g.w.Options.More), e.Name)
	if !ok {
		return fmt.Errorf("play %q: no fault of that name in this setting", e)
	}
	if slices.ContainsFunc(g.active, func(a active) bool { return f.meets(a.fault) }) {
		g.w.Log("%s is left out: another of its group is on", e)
		return nil
	}
	span := &Span{Event: e, Begin: time.Now(), Excuses: f.Excuses, Hinders: f.Hinders,
		Recovery: f.Recovery, EnvoyAway: f.EnvoyAway}
	g.w.mu.Lock()
	g.w.spans = append(g.w.spans, span)
	g.w.mu.Unlock()
	g.w.Log("%s", e)
	end, err := f.Begin(g.w, rand.New(rand.NewPCG(uint64(e.Seed), 0)))
	if err != nil {
		return fmt.Errorf("play %q: %w", e, err)
	}
	g.events++
	g.heals, g.tells = max(g.heals, f.Heals), max(g.tells, f.Tells)
	g.active = append(g.active, active{span, f, e.At + e.Hold, end})
	if e.Hold == 0 {
		return g.end(len(g.active) - 1)
	}
	return nil
}

func (g *game) end(i int) (err error) {
	a := g.active[i]
	g.active = slices.Delete(g.active, i, i+1)
	if a.end != nil {
		err = a.end()
	}
	g.w.mu.Lock()
	a.span.End = time.Now()
	g.w.mu.Unlock()
	if a.span.Hold > 0 {
		g.w.Log("    %s is over", a.span.Name)
	}
	if err != nil {
		return fmt.Errorf("take back %q: %w", a.span.Event, err)
	}
	return nil
}

// endAll takes everything back, the newest first.
func (g *game) endAll() {
	for len(g.active) > 0 {
		if err := g.end(len(g.active) - 1); err != nil {
			g.w.Observe(Observation{Kind: Broken, From: time.Now(), To: time.Now(), Text: err.Error()})
		}
	}
}

// calm takes everything back and waits until all is as wanted: the rules and connections, and then
// what the agent says of them. What is not so in time is late.
func (g *game) calm(ctx context.Context) bool {
	g.endAll()
	w := g.w
	w.envoyKnows(ctx)
	began := time.Now()
	w.mu.Lock()
	acts := calmLimit + max(g.heals, w.actsBy.Sub(began))
	tells := max(acts, calmLimit+max(g.tells, w.tellsBy.Sub(began)))
	w.mu.Unlock()
	if w.Options.Race {
		acts, tells = acts+raceLimit, tells+raceLimit
	}
	g.heals, g.tells = 0, 0
	if !g.comes(ctx, began, acts, w.checkRules) {
		return false
	}
	g.calmed = max(g.calmed, time.Since(began))
	if !g.comes(ctx, began, tells, w.checkWords) {
		return false
	}
	w.tell(ctx)
	return true
}

// comes waits until there is nothing wrong, within limit from began on.
func (g *game) comes(ctx context.Context, began time.Time, limit time.Duration,
	check func(context.Context) error) bool {
	w := g.w
	late, last := false, errors.New("not looked at")
	for last != nil && ctx.Err() == nil {
		looking, cancel := context.WithTimeout(ctx, limit+giveUp)
		err := check(looking)
		cancel()
		took := time.Since(began)
		if took > limit && !late && cmp.Or(err, last) != nil {
			text := fmt.Sprintf("%.1f s after the last fault: %v", limit.Seconds(), cmp.Or(err, last))
			w.Observe(Observation{Kind: Late, From: began.Add(limit), To: time.Now(), Text: text})
			w.Log("NOT CALM %s", text)
			late = true
		}
		if last = err; err == nil {
			w.Log("calm after %.2f s", took.Seconds())
			return true
		}
		if took > limit+giveUp {
			w.Log("it does not get calm: %v", err)
			return false
		}
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
	return false
}
