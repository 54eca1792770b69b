package agent

import (
	"context"
	"reflect"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/internal/mailbox"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// How often the daemon looks around. The dear ones (two programs that list table filter, a question
// for each service) are asked at once when what is wanted changes, but not more often than the
// others.
const (
	aroundEvery = 5 * time.Second
	dearEvery   = 20 * time.Second
	// aroundLimit ends a look, and what was seen before aroundKept counts no longer: a source that
	// fails or hangs must not keep a finding for ever.
	aroundLimit = 10 * time.Second
	aroundKept  = time.Minute
	// routesKept is for how long the answer on routes stands while the kernel tells of no change.
	routesKept = 5 * time.Minute
	// silentFor is how long nothing may listen on a serving port before it is said: an application
	// that starts after the proxy is as it should be.
	silentFor = 10 * time.Second
	// dropsKept is how long a packet that a full table has cost is remembered.
	dropsKept = time.Minute
)

// surroundings is the task that looks around beside the loop: nothing that it asks may hold a pass.
type surroundings struct {
	ask   questions
	log   *zap.Logger
	asked *mailbox.Box[about]
	found *mailbox.Box[symptom.Surroundings]
}

func newSurroundings(ask questions, log *zap.Logger) *surroundings {
	return &surroundings{ask: ask, log: log, asked: mailbox.New[about](),
		found: mailbox.New[symptom.Surroundings]()}
}

// run looks until ctx ends. Each source has a goroutine of its own while it is asked, so that one
// which hangs holds none of the others.
func (s *surroundings) run(ctx context.Context) error {
	seen := sight{sources: map[symptom.Source]*sourceSight{}, silence: silence{}}
	moved, end := s.routesMoved()
	defer end()
	answers := make(chan answer, len(aroundSources)) // room for all: a late one finds nobody waiting
	// Most often a pass wakes it: each asks.
	tick := time.NewTicker(aroundEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case a := <-s.asked.Get():
			seen.want(a)
		case one := <-answers:
			if one.err != nil {
				s.log.Debug("could not look around", zap.String("source", string(one.source)),
					zap.Error(one.err))
			}
			if seen.take(one, time.Now()) {
				s.found.Put(seen.facts)
			}
		case <-tick.C:
			if seen.forget(time.Now()) {
				s.found.Put(seen.facts)
			}
		}
		for _, source := range seen.due(time.Now(), moved) {
			go func(a about) {
				limited, cancel := context.WithTimeout(ctx, aroundLimit)
				defer cancel()
				answers <- s.ask.look(limited, source, a)
			}(seen.about)
		}
	}
}

// routesMoved begins to listen to the kernel for changes of routes. Where that cannot be, each time
// they may have changed.
func (s *surroundings) routesMoved() (moved func() bool, end func()) {
	moved, end = func() bool { return true }, func() {}
	if s.ask.news == nil {
		return moved, end
	}
	news, err := s.ask.news()
	if err != nil {
		s.log.Debug("no news of routes", zap.Error(err))
		return moved, end
	}
	return news.Any, news.Close
}

// sight is what the task knows. It decides what to ask and what counts; it asks nobody.
type sight struct {
	about   about
	known   bool // there is an about
	sources map[symptom.Source]*sourceSight
	facts   symptom.Surroundings
	silence silence
	drops   drops
	figures time.Time // when those of conntrack's table were last taken
}

type sourceSight struct {
	asked, seen time.Time
	answered    time.Time // seen, but by an answer; zero: the last question failed
	busy        bool      // it has not answered yet
	stale       bool      // what is wanted has changed since it was asked
}

func (s *sight) want(a about) {
	if s.known && !s.about.differs(a) {
		return
	}
	s.about, s.known = a, true
	for _, source := range s.sources {
		source.stale = true
	}
}

// due are the sources that are to be asked now. moved says whether routes may have changed since it
// was last called: while they have not, there is nothing to ask.
func (s *sight) due(now time.Time, moved func() bool) (sources []symptom.Source) {
	if !s.known {
		return nil
	}
	for _, source := range aroundSources {
		of := s.sources[source]
		if of == nil {
			of = &sourceSight{}
			s.sources[source] = of
		}
		every := aroundEvery
		if dear := source == symptom.FromFilter || source == symptom.FromRoutes; dear && !of.stale {
			every = dearEvery
		}
		if of.busy || !of.asked.IsZero() && now.Sub(of.asked) < every {
			continue
		}
		if source == symptom.FromRoutes && !moved() && of.stands(now) {
			of.seen, of.asked = now, now
			continue
		}
		of.busy, of.stale, of.asked = true, false, now
		sources = append(sources, source)
	}
	return sources
}

// stands says whether the last answer is still true where nothing has changed around.
func (s *sourceSight) stands(now time.Time) bool {
	return !s.stale && !s.answered.IsZero() && now.Sub(s.answered) < routesKept
}

// take puts what a source told among the facts, and says whether they changed: only that is worth a
// pass. One that failed changes nothing: what it told before counts for a while.
func (s *sight) take(one answer, now time.Time) (news bool) {
	of := s.sources[one.source]
	of.busy, of.answered = false, time.Time{}
	if one.err != nil {
		return false
	}
	of.seen, of.answered = now, now
	before := s.facts
	switch one.source {
	case symptom.FromSockets:
		one.facts.Silent = s.silence.lasting(one.facts.Silent, now)
	case symptom.FromConntrack:
		one.facts.Conntrack.Dropped = s.drops.lately(one.full, now)
		// The figures are in the words of a finding, and so in a guest attribute.
		if told := s.facts.Conntrack; told.Level() > 0 && told.Level() == one.facts.Conntrack.Level() &&
			told.Max == one.facts.Conntrack.Max && now.Sub(s.figures) < wordsEvery {
			one.facts.Conntrack = told
		} else {
			s.figures = now
		}
	}
	take(&s.facts, one)
	return !reflect.DeepEqual(before, s.facts)
}

// forget takes out what is too old, and says whether there was something.
func (s *sight) forget(now time.Time) (forgot bool) {
	for source, of := range s.sources {
		if !of.seen.IsZero() && now.Sub(of.seen) > aroundKept {
			of.seen, forgot = time.Time{}, true
			take(&s.facts, answer{source: source})
		}
	}
	return forgot
}

// silence is since when nothing has listened on a port.
type silence map[uint16]time.Time

// lasting are those of the quiet ports that have been so for long enough.
func (s silence) lasting(quiet []uint16, now time.Time) (ports []uint16) {
	for port := range s {
		if !slices.Contains(quiet, port) {
			delete(s, port)
		}
	}
	for _, port := range quiet {
		if _, ok := s[port]; !ok {
			s[port] = now
		}
		if now.Sub(s[port]) > silentFor {
			ports = append(ports, port)
		}
	}
	return ports
}

// drops are the counts of the last minute, the oldest first.
type drops []struct {
	at   time.Time
	full uint64
}

// lately is how many packets were dropped in the last minute.
func (d *drops) lately(full uint64, now time.Time) uint64 {
	*d = append(*d, struct {
		at   time.Time
		full uint64
	}{now, full})
	for len(*d) > 1 && now.Sub((*d)[0].at) > dropsKept {
		*d = (*d)[1:]
	}
	if first := (*d)[0].full; full > first {
		return full - first
	}
	return 0 // the counters began anew, or nothing was dropped
}
