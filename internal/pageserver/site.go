package pageserver

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/page"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

const (
	// explainLimit is for a look and what is asked behind it.
	explainLimit = 20 * time.Second
	// answerLimit is for the whole of an answer, through a slow ssh, too: 10,000 services are some
	// megabytes. Only who was let in has this long; package server's limits are shorter.
	answerLimit = time.Minute
	// mostTyped is how much is shown again of what was typed.
	mostTyped = 100
)

// site answers those whom [guard] has let in.
type site struct {
	host    string
	explain func(context.Context, url.Values) string
	looks   looks
	asking  chan struct{} // has room for the one question that is being answered
}

func (s *site) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	// Where there is no connection (a test), there is no deadline either.
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(answerLimit))
	switch r.URL.Path {
	case "/":
		s.overview(w, r)
	case "/" + page.ExplainPath:
		s.question(w, r)
	default:
		say(w, http.StatusNotFound, "There is no such page here.\n")
	}
}

func (s *site) overview(w http.ResponseWriter, r *http.Request) {
	content, there := s.looks.newest(r.Context())
	if !there {
		w.Header().Set("Refresh", "2")
		say(w, http.StatusServiceUnavailable, "The first look is not done yet. Once it is, it is here.\n")
		return
	}
	content.Live, content.Paused = true, r.URL.Query().Has(page.PausedQuery)
	show(w, func(w io.Writer) error { return page.Render(w, content) })
}

func (s *site) question(w http.ResponseWriter, r *http.Request) {
	form := r.URL.Query()
	typed := func(field string) string { return symptom.Printable(form.Get(field), mostTyped) }
	q := page.Question{Time: time.Now(), Host: s.host, To: typed("to"), UID: typed("uid"),
		Direction: page.Outbound}
	if form.Get("direction") == page.Inbound {
		q.Direction = page.Inbound
	}
	if form.Has("to") {
		q.Answer = s.answer(r.Context(), form)
	}
	show(w, func(w io.Writer) error { return page.RenderQuestion(w, q) })
}

// show writes a page, which is whole or not there.
func show(w http.ResponseWriter, render func(io.Writer) error) {
	var body bytes.Buffer
	if err := render(&body); err != nil {
		say(w, http.StatusInternalServerError, "The page could not be made: "+
			symptom.Printable(err.Error(), 1000)+"\n")
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	_, _ = body.WriteTo(w) // the browser may be gone
}

// answer answers one question at a time. One that does not end keeps others out, and nobody waits
// for it longer than explainLimit.
func (s *site) answer(ctx context.Context, form url.Values) string {
	ctx, cancel := context.WithTimeout(ctx, explainLimit)
	defer cancel()
	select {
	case s.asking <- struct{}{}:
	case <-ctx.Done():
		return "Another question is still being answered; ask again."
	}
	answered := make(chan string, 1)
	go func() {
		defer func() { <-s.asking }()
		answered <- s.explain(ctx, form)
	}()
	select {
	case text := <-answered:
		return text
	case <-ctx.Done():
		return "There is no answer within " + explainLimit.String() + "; see the page for what hangs."
	}
}
