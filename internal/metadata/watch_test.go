package metadata

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
)

// fakeAttribute is a metadata server that serves the attribute alone, with the real one's long
// poll: wait_for_change with last_etag and timeout_sec, 403 without Metadata-Flavor
// (https://cloud.google.com/compute/docs/metadata/querying-metadata), a missing key's 404 at once
// even with wait_for_change (cloud.google.com/go/compute/metadata, SubscribeWithContext, gives up
// there). That a long poll answers 404 when the key is deleted meanwhile is an assumption: no
// document says so.
type fakeAttribute struct {
	mu      sync.Mutex
	text    string
	code    int
	version int
	changed chan struct{}
	polls   int
}

func (f *fakeAttribute) set(code int, text string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.code, f.text = code, text
	f.version++
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *fakeAttribute) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Metadata-Flavor") != "Google" ||
		r.URL.Path != "/computeMetadata/v1/instance/attributes/gce-service-proxy" {
		http.Error(w, "bad request", http.StatusForbidden)
		return
	}
	f.mu.Lock()
	f.polls++
	etag, changed := fmt.Sprintf("e%d", f.version), f.changed
	f.mu.Unlock()
	if q := r.URL.Query(); q.Get("wait_for_change") == "true" && q.Get("last_etag") == etag &&
		q.Get("timeout_sec") != "" {
		select {
		case <-changed:
		case <-r.Context().Done():
			return
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	w.Header().Set("ETag", fmt.Sprintf("e%d", f.version))
	w.WriteHeader(f.code)
	_, _ = w.Write([]byte(f.text))
}

func TestWatch(t *testing.T) {
	fake := &fakeAttribute{changed: make(chan struct{})}
	fake.set(200, `{"labels": {"a": "1"}}`)
	srv := httptest.NewServer(fake)
	defer srv.Close()
	t.Setenv("GCE_METADATA_HOST", strings.TrimPrefix(srv.URL, "http://"))
	ctx, cancel := context.WithCancel(context.Background())
	got, ended := make(chan Attribute, 10), make(chan struct{})
	go func() {
		defer close(ended)
		Watch(ctx, nil, func(a Attribute) { got <- a })
	}()
	next := func() Attribute {
		t.Helper()
		select {
		case a := <-got:
			return a
		case <-time.After(10 * time.Second):
			t.Fatal("nothing emitted")
			panic("unreachable")
		}
	}
	if a := next(); a.Err != nil || a.Config.Labels["a"] != "1" {
		t.Fatalf("have %+v", a)
	}
	start := time.Now()
	fake.set(200, `{"labels": {"a": "2"}}`)
	if a := next(); a.Err != nil || a.Config.Labels["a"] != "2" || time.Since(start) > watchPoll-time.Second {
		t.Errorf("have %+v after %v", a, time.Since(start))
	}
	fake.set(200, `{"labels": {"a": 2}}`)
	var keyErr *attribute.KeyError
	if a := next(); !errors.As(a.Err, &keyErr) || keyErr.Key != `labels["a"]` {
		t.Errorf("have %v", a.Err)
	}
	fake.set(404, "")
	if a := next(); !errors.Is(a.Err, ErrNoAttribute) {
		t.Errorf("have %v", a.Err)
	}
	fake.mu.Lock()
	polls := fake.polls
	fake.mu.Unlock()
	time.Sleep(300 * time.Millisecond)
	fake.mu.Lock()
	if fake.polls > polls+1 {
		t.Errorf("%d polls in 0.3 s of a missing key", fake.polls-polls)
	}
	fake.mu.Unlock()
	cancel()
	select {
	case <-ended:
	case <-time.After(time.Second):
		t.Error("the watcher is deaf to its context")
	}
}

// A server that fails is said once, and the value again when it is back.
func TestWatchErrors(t *testing.T) {
	fake := &fakeAttribute{changed: make(chan struct{})}
	fake.set(503, "busy")
	srv := httptest.NewServer(fake)
	defer srv.Close()
	t.Setenv("GCE_METADATA_HOST", strings.TrimPrefix(srv.URL, "http://"))
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	got := make(chan Attribute, 10)
	go Watch(ctx, nil, func(a Attribute) { got <- a })
	var metaErr *Error
	if a := <-got; !errors.As(a.Err, &metaErr) || metaErr.Code != 503 {
		t.Fatalf("have %v", a.Err)
	}
	time.Sleep(1200 * time.Millisecond) // one retry more
	fake.set(200, `{}`)
	select {
	case a := <-got:
		if a.Err != nil {
			t.Errorf("the error was said again: %v", a.Err)
		}
	case <-time.After(10 * time.Second):
		t.Error("the recovery was not noticed")
	}
}
