package main

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/agent"
	"github.com/service-proxy-agent/service-proxy-agent/internal/exitcode"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// TestHTMLUsage is 64 before anything is looked at.
func TestHTMLUsage(t *testing.T) {
	for _, args := range [][]string{{"--html", ""}, {"--html", "page.html", "-o", "json"},
		{"--html", "page.html", "--watch"}, {"--html", "page.html", "--envoy-admin", "x"}} {
		if code := execute(t.Context(), append([]string{"status"}, args...)); code != exitcode.Usage {
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

// TestPageVerdict: a page is answered by what it says, be it the look's or the daemon's word.
func TestPageVerdict(t *testing.T) {
	now := time.Now()
	down := []symptom.Finding{{ID: symptom.EnvoyDown, Severity: symptom.Error, Cause: "it is down"}}
	well := status.Status{Mode: "intercepting", Ready: true, Heartbeat: now}
	ill := well
	ill.Findings = down
	for _, tt := range []struct {
		name   string
		daemon *status.Status
		looks  symptom.Facts
		want   int
	}{
		{"both well", &well, symptom.Facts{}, 0},
		{"the daemon knows an error", &ill, symptom.Facts{}, exitcode.No},
		{"the look sees one", &well, symptom.Facts{UserErr: errors.New("no such user")}, exitcode.No},
		{"no daemon", nil, symptom.Facts{UserErr: errors.New("no such user")}, exitcode.NotKnown},
	} {
		looked := agent.Looked{Daemon: tt.daemon, Facts: tt.looks}
		looked.Seen.Now = now
		err := pageVerdict(contentOf(t.Context(), looked))
		code := 0
		if exit := (*exitError)(nil); errors.As(err, &exit) {
			code = exit.code
		}
		if code != tt.want {
			t.Errorf("%s: exit code %d (%v), want %d", tt.name, code, err, tt.want)
		}
	}
}
