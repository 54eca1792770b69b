package supervisor

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
)

// TestBeside: a second supervisor, started by hand with the folder of the one that runs, ends
// before it has touched what that one's epochs talk by.
func TestBeside(t *testing.T) {
	dir := t.TempDir()
	base, r := newRegion(t, 0)
	first := &supervisor{o: Options{Dir: dir, Log: zap.NewNop()}, bases: map[int]uint32{1: base}}
	first.note()
	hot := socketOf(first.prefix(), "parent", base, 0)
	if err := os.WriteFile(hot, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := listen(dir)
	if err != nil {
		t.Fatal(err)
	}
	go serve(l, func(conn net.Conn) { conn.Close() })
	o := Options{Dir: dir, Argv: []string{"/bin/true"}, Log: zap.NewNop()}
	if status, err := Run(o); err == nil || !strings.Contains(err.Error(), "runs already") {
		t.Errorf("%v, %v", status, err)
	}
	for _, path := range []string{hot, string(r), filepath.Join(dir, basesName)} {
		if _, err := os.Stat(path); err != nil {
			t.Errorf("the second one has taken it away: %v", err)
		}
	}
	if conn, err := net.Dial("unix", filepath.Join(dir, controlName)); err != nil {
		t.Errorf("the first one's socket: %v", err)
	} else {
		conn.Close()
	}

	l.(*net.UnixListener).SetUnlinkOnClose(false) // as one that was killed
	l.Close()
	if status, err := Run(o); err != nil || status != (Status{}) {
		t.Errorf("after one that was killed: %v, %v", status, err)
	}
	if _, err := os.Stat(string(r)); err == nil {
		t.Error("the memory of one that was killed stays")
	}
}

// TestAnswerOfAStranger: the folder is of Envoy's user, and root asks.
func TestAnswerOfAStranger(t *testing.T) {
	for name, tt := range map[string]struct{ says, want string }{
		"a terminal's orders": {"1 \x1b]0;x\a\u009bfailed\r\n", "]0;xfailed"},
		"without an end":      {"1 " + strings.Repeat("x", 1<<20), ""},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			l, err := listen(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			took := make(chan int, 1)
			go func() {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				defer conn.Close()
				_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
				n, _ := conn.Write([]byte(tt.says)) // not taken: it has hung up
				took <- n
				if n == len(tt.says) {
					_, _ = conn.Read(make([]byte, 100))
				}
			}()
			a, err := Reload(t.Context(), dir)
			if a.Text != tt.want || (err == nil) != (tt.want != "") {
				t.Errorf("%q, %v", a.Text, err)
			}
			if n := <-took; tt.want == "" && n == len(tt.says) {
				t.Errorf("all %d bytes were read", n)
			}
		})
	}
}

// TestFull: in a runtime folder without room no reload is tried, and the epoch that has taken over
// none the less, whose file stayed empty, is not given up.
func TestFull(t *testing.T) {
	dir := t.TempDir()
	base, r := newRegion(t, 0)
	file := filepath.Join(dir, "admin-1")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(dir, "envoy")
	if err := os.WriteFile(program, []byte("#!/bin/sh\nprintf 11.104\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	// file takes no files.
	s := &supervisor{o: Options{Dir: file, Argv: []string{program}, Log: zap.NewNop()},
		bases: map[int]uint32{1: base}, events: make(chan Event, 1)}
	c := &child{Start: Start{N: 1, Chain: 1}, admin: file, exited: make(chan struct{})}
	refused := s.check(c)
	if refused == nil || refused.Code != NotDone || !strings.Contains(refused.Text, "no room") {
		t.Errorf("a reload: %v", refused)
	}
	go s.watch(c, r)
	select {
	case e := <-s.events:
		if e != (Live{1}) {
			t.Errorf("%#v", e)
		}
	case <-time.After(5 * time.Second):
		t.Error("an epoch that serves is not seen to do so")
	}
	close(c.exited)
}
