package metadata

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// TestReadVM: the answers are in the forms of
// https://cloud.google.com/compute/docs/metadata/predefined-metadata-keys.
func TestReadVM(t *testing.T) {
	answers := map[string]string{
		"instance/name": "web-1\n", "instance/zone": "projects/123/zones/europe-west1-b",
		"project/project-id": "shop-prod", "project/numeric-project-id": "123",
		"instance/network-interfaces/0/network": "projects/456/networks/shared",
	}
	fail := ""
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		path := strings.TrimPrefix(r.URL.Path, "/computeMetadata/v1/")
		text, known := answers[path]
		if !known || path == fail {
			http.NotFound(w, r)
			return
		}
		_, _ = w.Write([]byte(text))
	}))
	defer srv.Close()
	t.Setenv(HostEnv, strings.TrimPrefix(srv.URL, "http://"))
	want := VM{Name: "web-1", Zone: "europe-west1-b", Project: "shop-prod", ProjectNumber: "123",
		Network: "shared", NetworkProject: "456"}
	if vm, err := ReadVM(t.Context()); err != nil || vm != want {
		t.Errorf("it is %+v, %v, want %+v", vm, err, want)
	}
	for fail = range answers {
		if vm, err := ReadVM(t.Context()); err == nil || vm != (VM{}) {
			t.Errorf("without %q: %+v, %v", fail, vm, err)
		}
	}
}

// TestReadVMAsksAtOnce: a server that answers nobody before all have asked is no server that hangs;
// and where it does, that the caller's time is over is said, and not another limit.
func TestReadVMAsksAtOnce(t *testing.T) {
	all := make(chan struct{})
	var come atomic.Int32
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if come.Add(1) == 5 {
			close(all)
		}
		select {
		case <-all:
			_, _ = w.Write([]byte("x"))
		case <-r.Context().Done():
		}
	}))
	defer srv.Close()
	t.Setenv(HostEnv, strings.TrimPrefix(srv.URL, "http://"))
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if vm, err := ReadVM(ctx); err != nil || vm.Name != "x" || vm.ProjectNumber != "x" {
		t.Errorf("it is %+v, %v", vm, err)
	}
	all = make(chan struct{})
	ctx, cancel = context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := Read(ctx, "instance/name"); !errors.Is(err, context.DeadlineExceeded) ||
		!strings.Contains(err.Error(), "no answer in time") {
		t.Errorf("it hangs: %v", err)
	}
}

func TestOffset(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 900_000_000, time.UTC) // the server's Date is of :05
	date := now.Format(http.TimeFormat)
	for _, tt := range []struct {
		name  string
		ahead time.Duration // of this machine's clock
		took  time.Duration
		date  string
		want  time.Duration
		known bool
	}{
		{"right", 0, time.Millisecond, date, 0, true},
		{"a second is not told", time.Second, time.Millisecond, date, 0, true},
		{"nor one behind", -time.Second, time.Millisecond, date, 0, true},
		{"ahead", 37 * time.Second, time.Millisecond, date, 37 * time.Second, true},
		{"behind", -time.Hour, time.Millisecond, date, -time.Hour, true},
		{"right, and it took its time", 0, slowest, date, 0, true},
		{"it took too long", time.Hour, slowest + 1, date, 0, false},
		{"no Date", time.Hour, time.Millisecond, "", 0, false},
		{"no date", time.Hour, time.Millisecond, "yesterday", 0, false},
	} {
		sent := now.Add(tt.ahead - tt.took/2)
		ahead, known := offset(sent, sent.Add(tt.took), tt.date)
		if (ahead-tt.want).Abs() > time.Second || known != tt.known || tt.want == 0 && ahead != 0 {
			t.Errorf("%s: %v, %v, want %v, %v", tt.name, ahead, known, tt.want, tt.known)
		}
	}
}

// TestClock asks a server whose clock is another.
func TestClock(t *testing.T) {
	date := func() string { return time.Now().Add(-time.Hour).UTC().Format(http.TimeFormat) }
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header()["Date"] = nil
		if d := date(); d != "" {
			w.Header().Set("Date", d)
		}
		_, _ = w.Write([]byte("42"))
	}))
	defer srv.Close()
	t.Setenv(HostEnv, strings.TrimPrefix(srv.URL, "http://"))
	if ahead, err := Clock(t.Context()); err != nil || (ahead-time.Hour).Abs() > 2*time.Second {
		t.Errorf("it is %v ahead, %v", ahead, err)
	}
	date = func() string { return "" }
	if ahead, err := Clock(t.Context()); err == nil || ahead != 0 {
		t.Errorf("without a Date it is %v ahead, %v", ahead, err)
	}
}

// TestInstanceIsANumber: an answer that is no id is none, and tells nobody that the state is
// another VM's. (What a server has not is left to the caller.)
func TestInstanceIsANumber(t *testing.T) {
	text := ""
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte(text))
	}))
	defer srv.Close()
	t.Setenv(HostEnv, strings.TrimPrefix(srv.URL, "http://"))
	for _, text = range []string{"4520031799277581759", "18446744073709551615\n", ""} {
		if id, err := ReadInstance(t.Context()); err != nil || id != strings.TrimSpace(text) {
			t.Errorf("%q: %q, %v", text, id, err)
		}
	}
	for _, text = range []string{"<html>captive portal</html>", "null", "-1", "18446744073709551616",
		"1 2", "\x00", "0x10", strings.Repeat("[", 1000)} {
		id, err := ReadInstance(t.Context())
		var told *Error
		if !errors.As(err, &told) || id != "" || len(err.Error()) > 200 {
			t.Errorf("%.20q: it is %.20q, %v", text, id, err)
		}
	}
}
