package agent

import (
	"cmp"
	"context"
	"errors"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// question is one that a look asks, beside all others.
type question struct {
	of    []symptom.Source
	limit time.Duration
	// ask returns what to make of the answer, and why the sources told nothing, if they did not. What
	// it learns goes into the look by take alone, which is called for an answer that comes in time.
	ask func(context.Context) (take func(*looking), err error)
}

// grace is how long after its limit an answer still counts: a question that heeds its limit has an
// answer then, too, if only that there was none.
const grace = 300 * time.Millisecond

// askAll asks all questions at once and takes the answers that come in time. A question that hangs,
// in a read that nothing can interrupt, say, is left behind.
func (l *looking) askAll(ctx context.Context, questions ...question) {
	type answer struct {
		n    int
		take func(*looking)
		err  error
	}
	answers := make(chan answer, len(questions))
	began, open := time.Now(), map[int]time.Time{}
	for n, q := range questions {
		open[n] = began.Add(q.limit + grace)
		for _, source := range q.of {
			l.unseen[source] = errNoAnswer.Error()
		}
		go func() {
			limited, cancel := context.WithTimeout(ctx, q.limit)
			defer cancel()
			take, err := q.ask(limited)
			answers <- answer{n, take, err}
		}()
	}
	for len(open) > 0 {
		first := began.Add(lookLimit)
		for n, until := range open {
			if !time.Now().Before(until) {
				delete(open, n)
			} else if until.Before(first) {
				first = until
			}
		}
		timer := time.NewTimer(time.Until(first))
		select {
		case a := <-answers:
			if _, waits := open[a.n]; waits {
				delete(open, a.n)
				l.answered(questions[a.n].of, a.take, a.err)
			}
		case <-timer.C:
		case <-ctx.Done():
			clear(open)
		}
		timer.Stop()
	}
}

func (l *looking) answered(of []symptom.Source, take func(*looking), err error) {
	for _, source := range of {
		delete(l.unseen, source)
		if err != nil {
			l.unseen[source] = whyNot(err)
		}
	}
	if take != nil {
		take(l)
	}
}

// errNeedsRoot is what is said of all that another user may not see.
var errNeedsRoot = errors.New("needs root")

// needsRoot says whether root would have been answered.
func needsRoot(err error) bool {
	return os.Geteuid() != 0 && (errors.Is(err, errNeedsRoot) || errors.Is(err, fs.ErrPermission) ||
		errors.Is(err, iptables.ErrNotRoot) || errors.Is(err, unix.EPERM))
}

// whyNot is why a source told nothing, in few words. What another user may not see has the same
// words for every source.
func whyNot(err error) string {
	switch {
	case needsRoot(err):
		return errNeedsRoot.Error()
	case errors.Is(err, context.DeadlineExceeded):
		return errNoAnswer.Error()
	}
	return cmp.Or(guestattr.OneLine(err.Error(), 300), "no answer")
}
