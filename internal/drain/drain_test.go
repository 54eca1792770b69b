package drain

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// fakeAdmin is Envoy's admin interface as far as drain asks it; the names of the statistics are as
// Envoy 1.40 prints them (the box's TestPlannedStop has the real one).
type fakeAdmin struct {
	mu     sync.Mutex
	posted []string
	active int
	epochs []int // answers to /server_info; the last one stays
}

func (f *fakeAdmin) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r.Method == http.MethodPost {
		f.posted = append(f.posted, r.URL.String())
		return
	}
	if r.URL.Path == "/server_info" && len(f.epochs) > 0 {
		fmt.Fprintf(w, `{"version":"a/1.40.0/Clean/RELEASE/BoringSSL","state":"LIVE",
			"command_line_options":{"restart_epoch":%d}}`, f.epochs[0])
		f.epochs = f.epochs[min(1, len(f.epochs)-1):]
		return
	}
	fmt.Fprintf(w, "listener.0.0.0.0_15001.downstream_cx_active: %d\n"+
		"listener.0.0.0.0_15001.worker_0.downstream_cx_active: %d\n"+
		"listener.admin.downstream_cx_active: 1\n", f.active, f.active)
	if f.active > 0 {
		f.active--
	}
}

func TestRun(t *testing.T) {
	t.Setenv("PATH", t.TempDir()) // to ask the systemd of this machine may take long
	admin := &fakeAdmin{active: 2}
	srv := httptest.NewServer(admin)
	defer srv.Close()
	addr := strings.TrimPrefix(srv.URL, "http://")
	if err := Run(context.Background(), addr, "", time.Minute); err != nil || len(admin.posted) != 0 {
		t.Errorf("without a process: %v, %v", err, admin.posted)
	}
	start := time.Now()
	if err := Run(context.Background(), addr, "17", time.Minute); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(start); took < 250*time.Millisecond || took > 30*time.Second {
		t.Errorf("it took %v: want it to wait for the two connections, and no longer", took)
	}
	want := "[/healthcheck/fail /drain_listeners?graceful&skip_exit]"
	if fmt.Sprint(admin.posted) != want {
		t.Errorf("posted %v, want %v", admin.posted, want)
	}
	admin.active = 1000
	start = time.Now()
	err := Run(context.Background(), addr, "17", 300*time.Millisecond)
	if err != nil || time.Since(start) > 30*time.Second {
		t.Errorf("connections that stay: %v after %v", err, time.Since(start))
	}
	admin.posted = nil
	if err := Run(context.Background(), addr, "17", 0); err != nil || fmt.Sprint(admin.posted) != want {
		t.Errorf("a limit of 0: %v, posted %v", err, admin.posted)
	}
	srv.Close()
	if err := Run(context.Background(), addr, "17", time.Second); err == nil {
		t.Error("an admin port that is closed is no error")
	}
}

// TestRunOfARestart: a systemd that does not answer at once, on a busy machine, is asked again. One
// that never does stands for a stop.
func TestRunOfARestart(t *testing.T) {
	for _, tt := range []struct {
		name, systemctl, want string
	}{
		{"a restart", "echo '17 service-proxy-envoy.service restart running'",
			"[/drain_listeners?graceful&skip_exit]"},
		{"told at the third try", "echo >>$0.n; [ $(wc -l <$0.n) -ge 3 ] || exit 1\n" +
			"echo '17 service-proxy-envoy.service restart running'",
			"[/drain_listeners?graceful&skip_exit]"},
		{"never told", "exit 1", "[/healthcheck/fail /drain_listeners?graceful&skip_exit]"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			err := os.WriteFile(filepath.Join(dir, "systemctl"), []byte("#!/bin/sh\n"+
				"[ \"$1\" = list-jobs ] || exit 1\n"+tt.systemctl+"\n"), 0o700)
			if err != nil {
				t.Fatal(err)
			}
			t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
			admin := &fakeAdmin{}
			srv := httptest.NewServer(admin)
			defer srv.Close()
			addr := strings.TrimPrefix(srv.URL, "http://")
			if err := Run(t.Context(), addr, "17", 30*time.Second); err != nil {
				t.Fatal(err)
			}
			if have := fmt.Sprint(admin.posted); have != tt.want {
				t.Errorf("posted %v, want %v", have, tt.want)
			}
		})
	}
}

// An Envoy that takes connections and never answers holds up its own stop for the limit, and no
// longer.
func TestRunUnanswered(t *testing.T) {
	ended := make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-ended }))
	defer srv.Close()
	defer close(ended)
	start := time.Now()
	err := Run(t.Context(), strings.TrimPrefix(srv.URL, "http://"), "17", 700*time.Millisecond)
	took := time.Since(start)
	if err == nil || took < 700*time.Millisecond || took > 30*time.Second {
		t.Errorf("%v after %v", err, took)
	}
}

// TestRunInReload: the next Envoy takes over in the middle of a stop. It knows nothing of that, and
// is asked, too.
func TestRunInReload(t *testing.T) {
	admin := &fakeAdmin{active: 3, epochs: []int{0, 0, 1, 1}}
	srv := httptest.NewServer(admin)
	defer srv.Close()
	if err := Run(t.Context(), strings.TrimPrefix(srv.URL, "http://"), "17", time.Minute); err != nil {
		t.Fatal(err)
	}
	const ask = "/healthcheck/fail /drain_listeners?graceful&skip_exit"
	if have, want := fmt.Sprint(admin.posted), fmt.Sprintf("[%s %[1]s]", ask); have != want {
		t.Errorf("posted %v, want %v", have, want)
	}
}
