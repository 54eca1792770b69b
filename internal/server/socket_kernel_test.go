//go:build kernel

package server

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestSocketOtherUser: another user is kept out by the socket's mode, and without
// that by the peer's uid.
func TestSocketOtherUser(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("needs root, to become another user")
	}
	dir, err := os.MkdirTemp("", "agent")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	serveSocket(t, dir, Answers{Status: func() any { return "secret" }})
	ask := func() string {
		t.Helper()
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "SERVER_TEST_ASK="+dir)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return string(out)
	}
	if got := ask(); !strings.Contains(got, "permission denied; run as root") {
		t.Errorf("the other user got %q", got)
	}
	if err := os.Chmod(filepath.Join(dir, socketName), 0o666); err != nil {
		t.Fatal(err)
	}
	if got := ask(); !strings.HasPrefix(got, "error: ask agent") {
		t.Errorf("past the mode, the other user got %q", got)
	}
}
