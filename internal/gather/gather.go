// Package gather collects what a bundle holds: it asks this VM's programs, files, Envoy and daemon,
// all beside each other and each with its own limits of time and size, and takes out of every
// answer what must not leave the VM. Nothing is changed by it.
//
// What is asked is a table (sources.go). What cannot be had is a gap with its reason; nothing
// fails.
// Package bundle is next in the flow.
package gather

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/internal/bundle"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// Source is one file of the bundle, and how it comes about.
type Source struct {
	Name string // of the file
	From string // whose answer it is, for people: a command, a path, a question
	// After names a source that is waited for before this one is asked: "" for none. Envoy answers one
	// question after the other, so that two at once would only make each other late.
	After string
	Limit time.Duration // of asking, from then on
	Most  int           // bytes that are kept
	Get   func(context.Context) (Answer, error)
	Mask  Mask
}

// Mask takes out of an answer what must not leave the VM.
type Mask struct {
	Name  string // in the manifest
	Apply func([]byte) ([]byte, error)
}

// Answer is what a source gave.
type Answer struct {
	Data []byte
	Cut  string       // what is missing of it
	Gaps []bundle.Gap // of its parts
}

// errAbsent says that there is nothing, which is as it should be: no file then, and no gap.
var errAbsent = errors.New("it is not there")

// limit bounds a bundle's gathering as a whole, whatever hangs. grace is how long after its own
// limit an answer still counts: who heeds the limit has a partial one then.
const (
	limit = 27 * time.Second
	grace = waitDelay + 500*time.Millisecond
)

// Run asks all sources and returns files and gaps, in the order of the sources. What hangs is left
// behind.
func Run(ctx context.Context, sources []Source) (files []bundle.File, gaps []bundle.Gap) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	done := map[string]chan struct{}{}
	for _, s := range sources {
		done[s.Name] = make(chan struct{})
	}
	results := make([]chan result, len(sources))
	for n, s := range sources {
		results[n] = make(chan result, 1)
		go func() {
			r := s.ask(ctx, done[s.After])
			close(done[s.Name])
			results[n] <- r
		}()
	}
	for n, s := range sources {
		r := <-results[n]
		if r.file != nil {
			files = append(files, *r.file)
		}
		if r.err != nil {
			gaps = append(gaps, bundle.Gap{Name: s.Name, Why: whyNot(r.err)})
		}
		for _, g := range r.gaps {
			gaps = append(gaps, bundle.Gap{Name: tell(g.Name), Why: tell(g.Why)})
		}
	}
	return files, gaps
}

type result struct {
	file *bundle.File
	gaps []bundle.Gap
	err  error
}

// ask asks the source, once the one before has ended, and masks its answer. It returns in time even
// where the source does not.
func (s Source) ask(ctx context.Context, before <-chan struct{}) result {
	if before != nil {
		select {
		case <-before:
		case <-ctx.Done():
			return result{err: errors.New("not asked: the time was over")}
		}
	}
	limited, cancel := context.WithTimeout(ctx, s.Limit)
	defer cancel()
	type told struct {
		Answer
		err error
	}
	answers := make(chan told, 1)
	go func() {
		answer, err := s.Get(limited)
		answers <- told{answer, err}
	}()
	select {
	case t := <-answers:
		return s.take(t.Answer, t.err)
	case <-limited.Done():
	}
	select { // a partial one
	case t := <-answers:
		return s.take(t.Answer, t.err)
	case <-time.After(grace):
		return result{err: fmt.Errorf("no answer within %s", s.Limit)}
	}
}

// take makes a file of an answer.
func (s Source) take(answer Answer, err error) result {
	r := result{gaps: answer.Gaps, err: err}
	switch {
	case errors.Is(err, errAbsent):
		r.err = nil
		return r
	case err != nil && len(answer.Data) == 0:
		return r
	}
	cut := answer.Cut
	data, err := s.Mask.Apply(answer.Data)
	if err != nil && cut == "" {
		cut = "its end, which could not be read: " + tell(err.Error())
	}
	if len(data) > s.Most {
		data, cut = data[:s.Most], fmt.Sprintf("its end: more than %d bytes", s.Most)
	}
	r.file = &bundle.File{Name: s.Name, Source: s.From, Redacted: s.Mask.Name, Cut: cut, Data: data}
	return r
}

// tell makes words of others fit a manifest and a terminal.
func tell(text string) string { return symptom.Printable(bundle.Secrets(text), 300) }

// whyNot is why a source told nothing, in few words.
func whyNot(err error) string {
	denied := errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EPERM) || errors.Is(err, errRoot)
	switch {
	case denied && os.Geteuid() != 0:
		return "needs root"
	case errors.Is(err, context.DeadlineExceeded):
		return tell("no answer in time: " + err.Error())
	}
	return tell(err.Error())
}

// errRoot is the error of a program that says that it needs to be root.
var errRoot = errors.New("it needs root")
