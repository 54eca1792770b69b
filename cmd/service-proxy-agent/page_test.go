package main

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestHTMLUsage is 64 before anything is looked at.
func TestHTMLUsage(t *testing.T) {
	for _, args := range [][]string{{"--html", ""}, {"--html", "page.html", "-o", "json"},
		{"--html", "page.html", "--watch"}, {"--html", "page.html", "--envoy-admin", "x"}} {
		if code := execute(t.Context(), append([]string{"status"}, args...)); code != exitUsage {
			t.Errorf("%q: exit code %d", args, code)
		}
	}
}

// TestHTMLReplacesFiles and nothing else: /dev/null is still a device, and /dev/stdout a link.
func TestHTMLReplacesFiles(t *testing.T) {
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	for _, err := range []error{unix.Mkfifo(file("fifo"), 0o600), os.Symlink("/nowhere", file("link")),
		os.Mkdir(file("folder"), 0o700), os.WriteFile(file("old"), nil, 0o644)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		name string
		kind os.FileMode
		ok   bool
	}{
		{"fifo", os.ModeNamedPipe, false}, {"link", os.ModeSymlink, false},
		{"folder", os.ModeDir, false}, {"old", 0, true}, {"new", 0, true},
	} {
		err := replaceFile(file(tt.name), []byte("page"))
		info, statErr := os.Lstat(file(tt.name))
		if statErr != nil || (err == nil) != tt.ok || info.Mode().Type() != tt.kind {
			t.Errorf("%s: %v, and it is now %v", tt.name, err, info.Mode())
		}
		if tt.ok && info.Mode().Perm() != 0o600 {
			t.Errorf("%s is %v", tt.name, info.Mode())
		}
	}
}
