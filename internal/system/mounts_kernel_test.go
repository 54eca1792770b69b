//go:build kernel

package system

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// inOwnMounts runs do on a thread that has a mount namespace of its own, which ends with it.
func inOwnMounts(t *testing.T, do func(t *testing.T)) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
			t.Errorf("a mount namespace: %v; run as root", err)
			return
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			t.Error(err)
			return
		}
		do(t)
	}()
	<-done
}

// TestMounts looks at folders that are really mounted so.
func TestMounts(t *testing.T) {
	for _, tt := range []struct {
		name   string
		mounts map[string]uintptr // below the root
		id     string
		want   Verdict
		words  string
	}{
		{"plain", nil, "debian", Works, ""},
		{"read-only /usr", map[string]uintptr{"usr": unix.MS_RDONLY}, "debian", Refused,
			"/usr/local/bin, /usr/local/lib are on a read-only file system; make that folder writable"},
		{"read-only /usr/local/bin", map[string]uintptr{"usr/local/bin": unix.MS_RDONLY}, "debian", Refused,
			"/usr/local/bin is on a read-only file system"},
		{"a writable /usr/local in a read-only /usr",
			map[string]uintptr{"usr": unix.MS_RDONLY, "usr/local": 0}, "debian", Works, ""},
		{"noexec /usr/local", map[string]uintptr{"usr/local": unix.MS_NOEXEC}, "debian", Refused,
			"/usr/local/bin is mounted noexec"},
		{"noexec /tmp", map[string]uintptr{"tmp": unix.MS_NOEXEC}, "debian", Limited,
			"gcloud's recipe"},
		{"noexec /run", map[string]uintptr{"run": unix.MS_NOEXEC}, "debian", Works, ""},
		{"noexec /var and /run", map[string]uintptr{"run": unix.MS_NOEXEC, "var": unix.MS_NOEXEC},
			"debian", Limited, "/var/lib and /run are mounted noexec"},
		// As Google's documents have it: / read-only, /var and /tmp noexec, /etc writable.
		{"COS", map[string]uintptr{"usr": unix.MS_RDONLY, "var": unix.MS_NOEXEC, "tmp": unix.MS_NOEXEC,
			"run": unix.MS_NOEXEC}, "cos", Refused,
			"nothing can be installed; use an image of Debian, Ubuntu, Red Hat or SUSE"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inOwnMounts(t, func(t *testing.T) {
				root := t.TempDir()
				for _, dir := range []string{"usr", "etc", "var/lib", "var/log", "run", "tmp"} {
					if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
						t.Error(err)
						return
					}
				}
				mount := func(dir string, flags uintptr) bool {
					at := filepath.Join(root, dir)
					err := os.MkdirAll(at, 0o755)
					if err == nil {
						err = unix.Mount("tmpfs", at, "tmpfs", 0, "size=1m")
					}
					// What is mounted inside needs its folder before this is read-only.
					for inner := range tt.mounts {
						if err == nil && strings.HasPrefix(inner, dir+"/") {
							err = os.MkdirAll(filepath.Join(root, inner), 0o755)
						}
					}
					for _, sub := range []string{"local/bin", "local/lib"} {
						if err == nil && dir == "usr" {
							err = os.MkdirAll(filepath.Join(at, sub), 0o755)
						}
					}
					if err == nil && flags != 0 {
						err = unix.Mount("", at, "", unix.MS_REMOUNT|unix.MS_BIND|flags, "")
					}
					if err != nil {
						t.Errorf("mount %s: %v", dir, err)
					}
					return err == nil
				}
				for _, dir := range []string{"usr", "usr/local", "usr/local/bin", "var", "run", "tmp"} {
					if flags, ok := tt.mounts[dir]; ok && !mount(dir, flags) {
						return
					}
				}
				// The mounts do what they are for, or this test would show nothing.
				for dir, flags := range tt.mounts {
					err := os.WriteFile(filepath.Join(root, dir, "x"), []byte("#!/bin/sh\n"), 0o755)
					if (flags&unix.MS_RDONLY != 0) != (err != nil) {
						t.Errorf("write to %s: %v", dir, err)
					}
					if err != nil {
						continue
					}
					err = exec.Command(filepath.Join(root, dir, "x")).Run()
					if (flags&unix.MS_NOEXEC != 0) != (err != nil) {
						t.Errorf("run in %s: %v", dir, err)
					}
				}
				s := base().look(t) // the rest of a machine
				s.ID, s.Folders = tt.id, nil
				for _, name := range folders {
					s.Folders = append(s.Folders, mounted(root, name))
				}
				r := New(s)
				said := ""
				for _, row := range r.Rows {
					if row.Lacks != "" {
						said += row.Lacks + "; " + row.WayOut + "\n"
					}
				}
				if r.Verdict != tt.want || !strings.Contains(said, tt.words) {
					t.Errorf("it %s: %q, want %s: %q", r.Verdict, said, tt.want, tt.words)
				}
			})
		})
	}
}
