package server

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// TestMain is also another agent, a process that holds the socket until its stdin ends, and
// another user who asks.
func TestMain(m *testing.M) {
	if dir := os.Getenv("SERVER_TEST_ASK"); dir != "" {
		askAsAnother(dir)
		return
	}
	dir := os.Getenv("SERVER_TEST_HOLD")
	if dir == "" {
		os.Exit(m.Run())
	}
	l, err := Socket(dir)
	if err != nil {
		os.Stdout.WriteString(err.Error() + "\n")
		os.Exit(1)
	}
	os.Stdout.WriteString("held\n")
	bufio.NewReader(os.Stdin).ReadByte()
	l.Close()
}

// askAsAnother gives up root and asks for the status.
func askAsAnother(dir string) {
	if err := syscall.Setuid(65533); err != nil {
		os.Stdout.WriteString(err.Error())
		return
	}
	body, err := Dial(dir).Get(context.Background(), "/status")
	if err != nil {
		body = []byte("error: " + err.Error())
	}
	os.Stdout.Write(body)
}

// startOther starts another process that takes the socket in dir, and returns what it says of it.
func startOther(t *testing.T, dir string) (cmd *exec.Cmd, says string) {
	t.Helper()
	cmd = exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "SERVER_TEST_HOLD="+dir)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); cmd.Wait() })
	says, err = bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return cmd, strings.TrimSpace(says)
}

// serveSocket serves a until the test ends or stop is called.
func serveSocket(t *testing.T, dir string, a Answers) (stop func()) {
	t.Helper()
	l, err := Socket(dir)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- l.Serve(ctx, a, nil) }()
	stop = func() {
		t.Helper()
		cancel()
		select {
		case err, open := <-ended:
			if open && err != nil {
				t.Errorf("Serve: %v", err)
			}
			if open {
				close(ended)
			}
		case <-time.After(2 * time.Second):
			t.Error("Serve did not end within 2 s")
		}
	}
	t.Cleanup(stop)
	return stop
}

func TestSocket(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "made")
	var paused atomic.Int32
	stop := serveSocket(t, dir, Answers{
		Status: func() any { return map[string]string{"mode": "hold"} },
		Pause:  func(context.Context) error { paused.Add(1); return nil },
	})
	fi, err := os.Stat(filepath.Join(dir, socketName))
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v; want mode 0600", fi.Mode(), err)
	}
	c := Dial(dir)
	body, err := c.Get(t.Context(), "/status")
	var status map[string]string
	if err != nil || json.Unmarshal(body, &status) != nil || status["mode"] != "hold" {
		t.Errorf("/status: %q, %v", body, err)
	}
	if body, err := c.Post(t.Context(), "/pause"); err != nil || string(body) != "paused\n" ||
		paused.Load() != 1 {
		t.Errorf("/pause: %q, %v; paused %d times", body, err, paused.Load())
	}
	var answer *StatusError
	if _, err := c.Get(t.Context(), "/pause"); !errors.As(err, &answer) ||
		answer.Code != http.StatusMethodNotAllowed || paused.Load() != 1 {
		t.Errorf("GET /pause: %v; want 405", err)
	}
	if _, err := c.Get(t.Context(), "/metrics"); !errors.As(err, &answer) ||
		answer.Code != http.StatusNotFound {
		t.Errorf("/metrics: %v; want 404", err)
	}
	if body, err := c.Get(t.Context(), "/debug/pprof/goroutine?debug=1"); err != nil ||
		!strings.Contains(string(body), "goroutine profile") {
		t.Errorf("goroutine profile: %.60q, %v", body, err)
	}
	stop()
	if _, err := os.Lstat(filepath.Join(dir, socketName)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left behind: %v", err)
	}
	if _, err := c.Get(t.Context(), "/status"); !errors.Is(err, ErrNoAgent) {
		t.Errorf("after the end: %v; want ErrNoAgent", err)
	}
}

func TestSocketErrors(t *testing.T) {
	dir := t.TempDir()
	serveSocket(t, dir, Answers{
		Status: func() any { return func() {} }, // no JSON
		Pause:  func(context.Context) error { return errors.New("the loop\nis stuck") },
	})
	var answer *StatusError
	if _, err := Dial(dir).Post(t.Context(), "/pause"); !errors.As(err, &answer) ||
		answer.Text != "the loop is stuck" {
		t.Errorf("/pause: %v", err)
	}
	if _, err := Dial(dir).Get(t.Context(), "/status"); !errors.As(err, &answer) ||
		answer.Code != 500 {
		t.Errorf("/status: %v", err)
	}
}

// TestSocketHeld: the second agent learns who holds the socket, and leaves it alone.
func TestSocketHeld(t *testing.T) {
	dir := t.TempDir()
	cmd, says := startOther(t, dir)
	if says != "held" {
		t.Fatalf("the first says %q", says)
	}
	_, err := Socket(dir)
	var held *HeldError
	if !errors.As(err, &held) || held.PID != cmd.Process.Pid || held.UID != os.Getuid() {
		t.Fatalf("Socket = %v; want held by process %d", err, cmd.Process.Pid)
	}
	if !strings.Contains(err.Error(), "stop it first") {
		t.Errorf("%q names no next step", err)
	}
	if c, err := net.Dial("unix", filepath.Join(dir, socketName)); err != nil {
		t.Errorf("the first lost its socket: %v", err)
	} else {
		c.Close()
	}
}

// TestSocketStale: an agent that was killed leaves a socket, which the next one replaces.
func TestSocketStale(t *testing.T) {
	dir := t.TempDir()
	cmd, _ := startOther(t, dir)
	cmd.Process.Signal(syscall.SIGKILL)
	cmd.Wait()
	if _, err := os.Lstat(filepath.Join(dir, socketName)); err != nil {
		t.Fatalf("no stale socket: %v", err)
	}
	if _, err := Dial(dir).Get(t.Context(), "/status"); !errors.Is(err, ErrNoAgent) {
		t.Errorf("status from a stale socket: %v; want ErrNoAgent", err)
	}
	serveSocket(t, dir, Answers{Status: func() any { return 1 }})
	if body, err := Dial(dir).Get(t.Context(), "/status"); err != nil || string(body) != "1\n" {
		t.Errorf("/status: %q, %v", body, err)
	}
}

// TestSocketRace starts many agents at once: one gets the socket and keeps it.
func TestSocketRace(t *testing.T) {
	dir := t.TempDir()
	got := make(chan *Local, 20)
	for range cap(got) {
		go func() {
			l, err := Socket(dir)
			var held *HeldError
			if err != nil && !errors.As(err, &held) {
				t.Errorf("Socket: %v", err)
			}
			got <- l
		}()
	}
	var winner *Local
	for range cap(got) {
		if l := <-got; l != nil {
			if winner != nil {
				t.Error("two agents got the socket")
			}
			winner = l
		}
	}
	if winner == nil {
		t.Fatal("nobody got the socket")
	}
	defer winner.Close()
	c, err := net.Dial("unix", filepath.Join(dir, socketName))
	if err != nil {
		t.Fatalf("the winner's socket: %v", err)
	}
	c.Close()
}

func TestSocketNotASocket(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, socketName)
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Socket(dir); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("Socket = %v; want an error that names %s", err, path)
	}
	if b, _ := os.ReadFile(path); string(b) != "precious" {
		t.Error("the file was touched")
	}
}

// TestSocketLockIsLink: a link in place of the lock is not followed.
func TestSocketLockIsLink(t *testing.T) {
	dir := t.TempDir()
	if err := os.Symlink(filepath.Join(dir, "elsewhere"), filepath.Join(dir, lockName)); err != nil {
		t.Fatal(err)
	}
	if l, err := Socket(dir); err == nil {
		l.Close()
		t.Error("the lock was taken through a link")
	}
}

// TestClientHang: an agent that accepts and never answers does not hold up the command for long.
func TestClientHang(t *testing.T) {
	dir := t.TempDir()
	ended := make(chan struct{})
	serveSocket(t, dir, Answers{Status: func() any { <-ended; return nil }})
	defer close(ended)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := Dial(dir).Get(ctx, "/status"); err == nil ||
		!strings.Contains(err.Error(), "no answer in time") {
		t.Errorf("Get: %v", err)
	}
}

func TestDir(t *testing.T) {
	for env, want := range map[string]string{"": "/run/service-proxy-agent", "/run/a": "/run/a",
		"/run/a:/run/b": "/run/a"} {
		t.Setenv("RUNTIME_DIRECTORY", env)
		if got := Dir(); got != want {
			t.Errorf("Dir with RUNTIME_DIRECTORY=%q: %q; want %q", env, got, want)
		}
	}
}
