package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/layout"
	"github.com/service-proxy-agent/service-proxy-agent/internal/logs"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// TestRenewEnvoy: what runs after each answer of systemd's, and what is told. The answers have the
// form of those in TestParseReload of package systemd.
func TestRenewEnvoy(t *testing.T) {
	const says = "service-proxy-agent: the next Envoy cannot take over from the one that runs: its hot " +
		"restart version is 12.104, and that of the one that runs 11.104\n" +
		"[2026-11-29 10:00:00.000][7][info][main] [source/server/server.cc:1] something of Envoy's\n"
	const hot = "restarting Envoy without a gap (hot restart)"
	show := func(status string) string {
		return "ExecReload={ path=/usr/local/bin/service-proxy-agent ; argv[]=" +
			"/usr/local/bin/service-proxy-agent envoy --reload ; ignore_errors=no ; start_time=[" +
			"Sun 2026-11-29 16:26:59 UTC] ; stop_time=[n/a] ; pid=79 ; " + status + " }\nCanReload=yes\n"
	}
	for _, tt := range []struct {
		name    string
		mark    string // of the unit
		fails   bool   // the reload
		show    string
		log     string
		told    string
		started bool
		err     string
	}{
		{name: "the next takes over", told: hot},
		{name: "another unit", mark: "its unit is another now\n", started: true,
			told: "restarting Envoy, draining its connections: its unit is another now"},
		{name: "another hot restart", fails: true, show: show("code=exited ; status=2"), log: says,
			started: true, told: hot + "|restarting Envoy, draining its connections: the next Envoy cannot " +
				"take over from the one that runs: its hot restart version is 12.104, and that of the one " +
				"that runs 11.104"},
		{name: "nothing in the log", fails: true, show: show("code=exited ; status=2"), started: true,
			told: hot + "|restarting Envoy, draining its connections: the next Envoy cannot take over"},
		{name: "a unit of the administrator's", fails: true, show: "CanReload=no\n", started: true,
			told: hot + "|restarting Envoy, draining its connections: its unit cannot do better"},
		{name: "the next fails", fails: true, show: show("code=exited ; status=1"), told: hot,
			log: "service-proxy-agent: epoch 1 of Envoy ended by signal 9 (killed) before it was live; " +
				"the one before goes on\n",
			err: "the next Envoy did not take over from the one that runs: epoch 1 of Envoy ended by " +
				"signal 9 (killed) before it was live; the one before goes on"},
		{name: "it hangs, and the log has the words of one before", fails: true, log: says,
			show: show("code=(null) ; status=0/0"), told: hot,
			err: "the next Envoy did not take over from the one that runs: run systemctl: exit status 1: " +
				"Job for service-proxy-envoy.service failed."},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var ran []string
			b := newBootstrapper(Options{Root: t.TempDir(),
				command: func(_ context.Context, cmd *exec.Cmd) error {
					line := strings.Join(append([]string{filepath.Base(cmd.Path)}, cmd.Args[1:]...), " ")
					ran = append(ran, line)
					switch {
					case strings.HasPrefix(line, "systemctl show "):
						fmt.Fprint(cmd.Stdout, tt.show)
					case line == "systemctl reload "+systemd.EnvoyUnit && tt.fails:
						fmt.Fprintln(cmd.Stderr, "Job for service-proxy-envoy.service failed.")
						return errors.New("exit status 1")
					}
					return nil
				}})
			for _, dir := range []string{"/run", logs.Dir} {
				mkdir(t, b.path(dir), 0o755)
			}
			write(t, b.path(logs.Dir+"/envoy.err.log"), tt.log)
			if err := b.markRestart(); err != nil {
				t.Fatal(err)
			}
			if tt.mark != "" {
				write(t, b.path(unitChangedFile), tt.mark)
			}
			var told []string
			started, err := b.renewEnvoy(t.Context(), func(text string) { told = append(told, text) })
			if have := strings.Join(told, "|"); have != tt.told {
				t.Errorf("told %q, want %q", have, tt.told)
			}
			if have := fmt.Sprint(err); tt.err == "" && err != nil || tt.err != "" && have != tt.err {
				t.Errorf("error %q, want %q", have, tt.err)
			}
			if restarted := slices.Contains(ran, "systemctl restart "+systemd.EnvoyUnit); started !=
				tt.started || restarted != tt.started {
				t.Errorf("started %v, ran %q; want %v", started, ran, tt.started)
			}
			if err := b.forgetRestart(started); err != nil {
				t.Error(err)
			}
			for name, want := range map[string]bool{restartFile: false,
				unitChangedFile: tt.mark != "" && !tt.started} {
				if _, err := os.Lstat(b.path(name)); (err == nil) != want {
					t.Errorf("%s is there: %v", name, err == nil)
				}
			}
		})
	}
}

// TestLoses: an Envoy that does not answer may have all its services; one that is not there, or
// never tells of its stream, is not waited for.
func TestLoses(t *testing.T) {
	stats := func(connected string) string {
		return "control_plane.connected_state: " + connected + "\nlistener_manager.lds.version: 7\n"
	}
	for _, tt := range []struct {
		name   string
		status int
		body   string
		want   string // of the error; "": none
	}{
		{"connected", 200, stats("1"), ""},
		{"apart", 200, stats("0"), "the next one would get no services"},
		{"no stream of its own", 200, "listener_manager.lds.version: 7\n", ""},
		{"nothing of it", 200, "\n", ""},
		{"an error", 503, "busy", "does not say"},
		{"forbidden", 403, "", "does not say"},
		{"not of Envoy", 200, "<html>", "does not say"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.WriteHeader(tt.status)
				fmt.Fprint(w, tt.body)
			}))
			defer server.Close()
			client, err := envoyadmin.New(server.Listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			unreachable := errors.New("no route")
			err = loses(t.Context(), client, unreachable)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil ||
				!strings.Contains(err.Error(), tt.want) || !errors.Is(err, unreachable)) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
			server.Close()
			if err := loses(t.Context(), client, unreachable); err != nil {
				t.Errorf("without an Envoy: %v", err)
			}
		})
	}
}

// TestUnitChanged: an installation over one whose Envoy ran without a supervisor, or in another
// sandbox, remembers that before it writes the unit; one that changes nothing of that does not.
func TestUnitChanged(t *testing.T) {
	unit := filepath.Join(layout.Here.UnitDir, systemd.EnvoyUnit)
	for _, tt := range []struct {
		name, old, new string
		want           bool
	}{
		{"the same", "", "", false},
		{"how it is stopped", "TimeoutStopSec=30\n", "TimeoutStopSec=20\n", false},
		{"Envoy itself", "ExecStart=/usr/local/bin/service-proxy-agent envoy -- ", "ExecStart=", true},
	} {
		v := newFakeVM(t)
		v.install("1.0.0", "")
		text := read(t, filepath.Join(v.root, unit))
		if !strings.Contains(text, tt.old) {
			t.Fatalf("no %q", tt.old)
		}
		v.put(unit, strings.Replace(text, tt.old, tt.new, 1))
		v.install("2.0.0", "")
		if _, err := os.Lstat(filepath.Join(v.root, unitChangedFile)); (err == nil) != tt.want {
			t.Errorf("%s: remembered %v", tt.name, err == nil)
		}
	}
}
