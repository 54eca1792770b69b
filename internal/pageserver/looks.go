package pageserver

import (
	"context"
	"sync"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/page"
)

const (
	// A look costs Envoy's main thread up to half of the time that it takes. So the next one waits for
	// ten times that; one that hung costs nothing.
	leastPause = time.Second
	mostPause  = 10 * time.Second
	// patience is how long a new look is waited for where there is an older one.
	patience = 2 * time.Second
	// lookLimit is the same for the first. A look ends within nine seconds, whatever hangs.
	lookLimit = 12 * time.Second
)

// looks makes one look at a time, for all who ask.
type looks struct {
	ctx  context.Context // until which the looks are made
	look func(context.Context) page.Content

	mu      sync.Mutex
	last    page.Content
	ended   time.Time // of the last one; zero: none has ended yet
	next    time.Time // not before then
	running chan struct{}
}

// newest is the newest content, with its age: a new one where it comes in time, else the last. It
// is not there where the first look takes its time, or ctx ends.
func (l *looks) newest(ctx context.Context) (content page.Content, there bool) {
	running, wait := l.start()
	if running != nil {
		timer := time.NewTimer(wait)
		defer timer.Stop()
		select {
		case <-running:
		case <-timer.C:
		case <-ctx.Done():
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	content = l.last
	content.Age = time.Since(l.ended)
	return content, !l.ended.IsZero()
}

// start has a look made if it is time for one, and none is under way. running is closed at its end,
// and nil where the last one is new enough; wait is how long to wait for it.
func (l *looks) start() (running chan struct{}, wait time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if l.running == nil && !now.Before(l.next) {
		l.running = make(chan struct{})
		go l.once(now)
	}
	if l.ended.IsZero() {
		return l.running, lookLimit
	}
	return l.running, patience
}

func (l *looks) once(began time.Time) {
	content := l.look(l.ctx)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.last, l.ended = content, time.Now()
	l.next = l.ended.Add(min(max(leastPause, 10*l.ended.Sub(began)), mostPause))
	close(l.running)
	l.running = nil
}
