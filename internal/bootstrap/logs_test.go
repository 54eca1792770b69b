package bootstrap

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

func TestRotateLogs(t *testing.T) {
	dir, elsewhere := t.TempDir(), filepath.Join(t.TempDir(), "precious.log")
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	big := strings.Repeat("x", 200)
	write(elsewhere, big)
	write(filepath.Join(dir, "envoy.err.log"), big)
	write(filepath.Join(dir, "small.log"), "small")
	write(filepath.Join(dir, "other.txt"), big)
	write(filepath.Join(dir, "linked.log"), big)
	for _, err := range []error{
		os.Link(filepath.Join(dir, "linked.log"), filepath.Join(t.TempDir(), "second-name")), // as a file of others', linked here
		os.Symlink(elsewhere, filepath.Join(dir, "symlink.log")),
		os.Symlink(elsewhere, filepath.Join(dir, "envoy.err.log.1")), // planted where the copy goes
		os.Mkdir(filepath.Join(dir, "folder.log"), 0o755),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	// The writer holds its file open for appending, as systemd opened it for Envoy.
	writer, err := os.OpenFile(filepath.Join(dir, "envoy.err.log"), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer writer.Close()
	if err := rotateLogs(dir, 100); err != nil {
		t.Fatal(err)
	}
	if _, err := writer.WriteString("new"); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"envoy.err.log": "new", "envoy.err.log.1": big, "small.log": "small", "other.txt": big, "linked.log": big,
	} {
		have, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || string(have) != want {
			t.Errorf("%s: %d bytes, want %d: %v", name, len(have), len(want), err)
		}
	}
	if have, err := os.ReadFile(elsewhere); err != nil || string(have) != big {
		t.Errorf("a link was followed: %q, %v", have, err)
	}
	if info, err := os.Lstat(filepath.Join(dir, "envoy.err.log.1")); err != nil || !info.Mode().IsRegular() || info.Mode().Perm() != 0o640 {
		t.Errorf("the copy is %v, %v", info.Mode(), err)
	}
	if err := rotateLogs(filepath.Join(dir, "absent"), 100); err != nil {
		t.Errorf("without the folder: %v", err)
	}
}

// fakeAdmin is Envoy's admin interface as far as drain asks it.
type fakeAdmin struct {
	mu     sync.Mutex
	posted []string
	active int
}

func (f *fakeAdmin) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r.Method == http.MethodPost {
		f.posted = append(f.posted, r.URL.String())
		return
	}
	fmt.Fprintf(w, "listener.0.0.0.0_15001.downstream_cx_active: %d\nlistener.0.0.0.0_15001.worker_0.downstream_cx_active: %d\nlistener.admin.downstream_cx_active: 1\n",
		f.active, f.active)
	if f.active > 0 {
		f.active--
	}
}

func TestDrain(t *testing.T) {
	admin := &fakeAdmin{active: 2}
	srv := httptest.NewServer(admin)
	defer srv.Close()
	addr := strings.TrimPrefix(srv.URL, "http://")
	if err := Drain(context.Background(), addr, "", time.Minute); err != nil || len(admin.posted) != 0 {
		t.Errorf("without a process: %v, %v", err, admin.posted)
	}
	start := time.Now()
	if err := Drain(context.Background(), addr, "17", time.Minute); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(start); took < 250*time.Millisecond || took > 5*time.Second {
		t.Errorf("it took %v: want it to wait for the two connections, and no longer", took)
	}
	if want := "[/healthcheck/fail /drain_listeners?graceful&skip_exit]"; fmt.Sprint(admin.posted) != want {
		t.Errorf("posted %v, want %v", admin.posted, want)
	}
	admin.active = 1000
	start = time.Now()
	if err := Drain(context.Background(), addr, "17", 300*time.Millisecond); err != nil || time.Since(start) > 2*time.Second {
		t.Errorf("connections that stay: %v after %v", err, time.Since(start))
	}
	srv.Close()
	if err := Drain(context.Background(), addr, "17", time.Second); err == nil {
		t.Error("an admin port that is closed is no error")
	}
}
