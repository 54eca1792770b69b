package cloudlog

import (
	"compress/gzip"
	"context"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// TestDial: what requests really go by. It waits for nothing: a request each.
func TestDial(t *testing.T) {
	elsewhere := 0
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		elsewhere++
	}))
	defer other.Close()
	for _, tt := range []struct {
		name   string
		tls    bool
		answer http.HandlerFunc
		want   string // in the error; "": none
	}{
		{"fine", false, func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "{}") }, ""},
		{"a redirect", false, func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, other.URL, http.StatusTemporaryRedirect)
		}, "status 307"},
		{"packed", false, func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Accept-Encoding") != "" {
				t.Errorf("it takes %s", r.Header.Get("Accept-Encoding"))
			}
			w.Header().Set("Content-Encoding", "gzip")
			z := gzip.NewWriter(w)
			io.WriteString(z, "{}")
			z.Close()
		}, "not Cloud Logging's"},
		{"a long header", false, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("X", strings.Repeat("x", 2*maxAnswer))
		}, "server response headers exceeded"},
		{"cut off", false, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "10")
			io.WriteString(w, "{}")
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}, "unexpected EOF"},
		{"an authority that the VM does not trust", true, func(w http.ResponseWriter, _ *http.Request) {
			t.Error("it was asked, with the token")
		}, "certificate signed by unknown authority"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			srv := httptest.NewUnstartedServer(tt.answer)
			srv.Config.ErrorLog = log.New(io.Discard, "", 0)
			if tt.tls {
				srv.StartTLS()
			} else {
				srv.Start()
			}
			defer srv.Close()
			t.Setenv(EndpointEnv, srv.URL)
			t.Setenv("HTTP_PROXY", other.URL) // not for a token in plain text
			c := newCloud()
			w := New(Options{Mode: On, Read: c.read})
			defer w.hangUp()
			w.run.vm = &vm{project: "p"}
			err := w.write(t.Context(), nil)
			if err == nil != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
	if elsewhere != 0 {
		t.Errorf("%d requests went elsewhere", elsewhere)
	}
	t.Setenv(EndpointEnv, "nonsense://\x7f")
	w := New(Options{Mode: On, Read: newCloud().read})
	w.run.vm = &vm{}
	if err := w.write(context.Background(), nil); err == nil {
		t.Error("a nonsense endpoint")
	}
}
