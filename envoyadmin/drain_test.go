package envoyadmin

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"
)

// draining serves what Envoy 1.40 answers to a drain; text is the body of /stats.
func draining(t *testing.T, text string, code int) (client *Client, asked *[]string) {
	t.Helper()
	asked = new([]string)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		*asked = append(*asked, r.Method+" "+r.URL.String())
		w.WriteHeader(code)
		fmt.Fprint(w, text)
	}))
	t.Cleanup(server.Close)
	client, err := New(strings.TrimPrefix(server.URL, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	return client, asked
}

func TestConnections(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		code       int
		want       int
		err        error
	}{
		{"the sums alone", "listener.0.0.0.0_15001.downstream_cx_active: 3\n" +
			"listener.0.0.0.0_15001.worker_0.downstream_cx_active: 3\n" +
			"listener.admin.downstream_cx_active: 1\n" +
			"listener.admin.main_thread.downstream_cx_active: 1\n" +
			"listener.[__1]_15001.main_thread.downstream_cx_active: 7\n" +
			"listener.[__1]_15001.downstream_cx_active: 2\n", 200, 5, nil},
		// stat_prefix may hold anything; Envoy replaces colons alone (utility.cc, sanitizeStatsName)
		{"a name of people's own", "listener.the \"web\" {v2}.downstream_cx_active: 4\n", 200, 4, nil},
		{"none", "", 200, 0, nil},
		{"no number", "listener.a.downstream_cx_active: x\n", 200, 0, ErrNotJSON},
		{"no stats", "<html>", 200, 0, ErrNotJSON},
		{"other stats", "<title>a: 1\n", 200, 0, ErrNotJSON},
		{"an error", "listener.a.downstream_cx_active: 1\n", 503, 0, ErrStatus},
	} {
		client, asked := draining(t, tt.text, tt.code)
		if n, err := client.Connections(t.Context()); n != tt.want || !errors.Is(err, tt.err) {
			t.Errorf("%s: %d, %v; want %d, %v", tt.name, n, err, tt.want, tt.err)
		}
		want := []string{`GET /stats?filter=%5Elistener%5C..%2A%5C.downstream_cx_active%24`}
		if !slices.Equal(*asked, want) {
			t.Errorf("%s: asked %q", tt.name, *asked)
		}
	}
}

func TestDrain(t *testing.T) {
	client, asked := draining(t, "OK\n", 200)
	err := errors.Join(client.FailHealthCheck(t.Context()), client.DrainListeners(t.Context()))
	if err != nil {
		t.Error(err)
	}
	want := []string{"POST /healthcheck/fail", "POST /drain_listeners?graceful&skip_exit"}
	if !slices.Equal(*asked, want) {
		t.Errorf("asked %q, want %q", *asked, want)
	}
	client, _ = draining(t, "no", 400)
	err = client.FailHealthCheck(t.Context())
	if want := `post "/healthcheck/fail": status 400 Bad Request`; err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
	client.ShortLimit = time.Nanosecond
	if err := client.DrainListeners(t.Context()); !errors.Is(err, ErrTimeout) {
		t.Errorf("without an answer: %v", err)
	}
}
