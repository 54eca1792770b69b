package pageserver

import (
	"context"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/page"
)

// record is what h answers, without a connection.
func record(h http.Handler, method, path string, headers ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, path, nil)
	for i := 0; i < len(headers); i += 2 {
		if headers[i] == "Host" {
			r.Host = headers[i+1]
			continue
		}
		r.Header.Set(headers[i], headers[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

// many asks for the newest content n times at once, and returns which look each was given.
func many(l *looks, n int) (hosts map[string]int) {
	hosts = map[string]int{}
	var mu sync.Mutex
	var all sync.WaitGroup
	for range n {
		all.Go(func() {
			content, there := l.newest(l.ctx)
			mu.Lock()
			defer mu.Unlock()
			if !there {
				content.Host = "none"
			}
			hosts[content.Host]++
		})
	}
	all.Wait()
	return hosts
}

// Those who ask at once share a look, and one follows another after a pause only.
func TestLooksAreShared(t *testing.T) {
	for _, tt := range []struct{ took, pause time.Duration }{
		{10 * time.Millisecond, time.Second}, {500 * time.Millisecond, 5 * time.Second},
		{9 * time.Second, 10 * time.Second},
	} {
		synctest.Test(t, func(t *testing.T) {
			var made atomic.Int32
			l := &looks{ctx: t.Context(), look: func(context.Context) page.Content {
				host := strconv.Itoa(int(made.Add(1)))
				time.Sleep(tt.took)
				return page.Content{Host: host}
			}}
			if have := many(l, 20); have["1"] != 20 {
				t.Errorf("the first: %v", have)
			}
			time.Sleep(tt.pause - time.Millisecond)
			if have := many(l, 20); have["1"] != 20 {
				t.Errorf("within the pause: %v", have)
			}
			time.Sleep(time.Millisecond)
			if have := many(l, 20); tt.took < patience && have["2"] != 20 ||
				tt.took > patience && have["1"] != 20 {
				t.Errorf("after it: %v", have)
			}
			time.Sleep(tt.took)
			if n := made.Load(); n != 2 {
				t.Errorf("%d looks, want 2", n)
			}
		})
	}
}

// While a look hangs the last one is shown, with its age, and no other is begun.
func TestALookHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var made atomic.Int32
		hang := make(chan struct{})
		l := &looks{ctx: t.Context(), look: func(context.Context) page.Content {
			n := made.Add(1)
			if n == 2 {
				<-hang
			}
			return page.Content{Host: strconv.Itoa(int(n))}
		}}
		many(l, 1)
		time.Sleep(time.Minute)
		for range 5 {
			if have := many(l, 20); have["1"] != 20 || made.Load() != 2 {
				t.Errorf("%v, %d looks", have, made.Load())
			}
		}
		content, _ := l.newest(t.Context())
		if want := time.Minute + 6*patience; content.Age != want {
			t.Errorf("its age is %v, want %v", content.Age, want)
		}
		close(hang)
		synctest.Wait()
		if have := many(l, 20); have["2"] != 20 {
			t.Errorf("after it: %v", have)
		}
	})
}

// Where the first look hangs nothing can be shown, and it is said.
func TestTheFirstLookHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hang := make(chan struct{})
		s := &site{looks: looks{ctx: t.Context(), look: func(context.Context) page.Content {
			<-hang
			return page.Content{Host: secret}
		}}}
		began := time.Now()
		w := record(s, "GET", "/")
		if w.Code != 503 || w.Header().Get("Refresh") != "2" || time.Since(began) != lookLimit {
			t.Errorf("%d after %v: %v", w.Code, time.Since(began), w.Header())
		}
		close(hang)
		if w := record(s, "GET", "/"); w.Code != 200 || !strings.Contains(w.Body.String(), secret) {
			t.Errorf("after it: %d %q", w.Code, w.Body)
		}
	})
}

// One question is answered at a time. Nobody waits for one that hangs longer than is said.
func TestAQuestionHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked atomic.Int32
		hang := make(chan struct{})
		s := &site{asking: make(chan struct{}, 1),
			explain: func(context.Context, url.Values) string {
				asked.Add(1)
				<-hang
				return "the answer"
			}}
		began := time.Now()
		var all sync.WaitGroup
		for range 5 {
			all.Go(func() {
				text := s.answer(t.Context(), nil)
				if !strings.HasPrefix(text, "There is no answer within 20s") &&
					!strings.HasPrefix(text, "Another question is still being answered") {
					t.Errorf("%q", text)
				}
			})
		}
		all.Wait()
		if took := time.Since(began); took != explainLimit || asked.Load() != 1 {
			t.Errorf("%d questions, %v", asked.Load(), took)
		}
		close(hang)
		synctest.Wait()
		if text := s.answer(t.Context(), nil); text != "the answer" {
			t.Errorf("after it: %q", text)
		}
	})
}
