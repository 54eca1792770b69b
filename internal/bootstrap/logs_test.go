package bootstrap

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/logs"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// The access log is rotated wherever Envoy's configuration says.
func TestConfiguredAccessLog(t *testing.T) {
	b := newBootstrapper(Options{Root: t.TempDir()})
	if have, err := b.configuredAccessLog(); have != "" || err != nil {
		t.Errorf("without a configuration: %q, %v", have, err)
	}
	mkdir(t, b.path(filepath.Dir(EnvoyConfig)), 0o755)
	for _, name := range []string{"", "/var/log/envoy/sub/access.json", "/srv/my logs/access.log"} {
		text, err := envoyConfig(attribute.Config{AccessLog: name}, VM{Name: "vm"}, "ca")
		if err != nil {
			t.Fatal(err)
		}
		write(t, b.path(EnvoyConfig), string(text))
		if have, err := b.configuredAccessLog(); have != name || err != nil {
			t.Errorf("have %q, %v; want %q", have, err, name)
		}
	}
	write(t, b.path(EnvoyConfig), "{")
	if err := RotateLogs(b.Options); err == nil || !strings.Contains(err.Error(), EnvoyConfig) {
		t.Errorf("half a configuration: %v", err)
	}
}

// The right to write outside logs.Dir comes, for Envoy and for the rotation, and goes.
func TestAccessLogDropIns(t *testing.T) {
	var ran []string
	b := newBootstrapper(
		Options{Root: t.TempDir(), command: func(_ context.Context, cmd *exec.Cmd) error {
			ran = append(ran, strings.Join(cmd.Args, " "))
			return nil
		}})
	mkdir(t, b.path("/run"), 0o755)
	mkdir(t, b.path("/srv"), 0o755)
	mkdir(t, b.path(logs.Dir), 0o1770)
	for _, tt := range []struct {
		log     string
		granted bool
		reloads int
	}{
		{"/srv/logs/a.log", true, 1}, {"/srv/logs/a.log", true, 0}, {"/dev/stdout", false, 1}, {"", false, 0}, {"/srv/logs/a.log", true, 1}, {logs.Dir + "/../envoy/a.log", false, 1},
	} {
		ran = nil
		if f := b.makeLogs(t.Context(), attribute.Config{AccessLog: tt.log}); f != nil {
			t.Fatalf("%s: %v", tt.log, f)
		}
		if len(ran) != tt.reloads {
			t.Errorf("%s: ran %q, want %d", tt.log, ran, tt.reloads)
		}
		for _, unit := range []string{systemd.EnvoyUnit, systemd.RotateUnit} {
			text, err := os.ReadFile(b.path(systemd.AccessLogDropIn(unit)))
			if have := err == nil && strings.Contains(string(text), `"-/srv/logs"`); have != tt.granted {
				t.Errorf("%s: %s: granted: %v, want %v: %q, %v", tt.log, unit, have, tt.granted, text, err)
			}
		}
	}
}

// Envoy quotes its configuration in its log and in what it refuses, a package manager its
// repository's URL: nothing of that goes into bootstrap-last-failure.
func TestLastLogLineRedacted(t *testing.T) {
	const secret = "s3cr3t"
	const refused = "Proto constraint validation failed (HeaderValueOptionValidationError.AppendAction: value must be one of the defined enum values): " +
		`key: "authorization" value: "Bearer ` + secret + `"`
	const short = "Proto constraint validation failed (HeaderValueOption.AppendAction: value must be one of the defined enum values)"
	const stamp = "[2026-11-24 22:00:00.000][1][warning][config] [x.cc:1] "
	// One line that is longer than what is kept: its beginning, and with it what it is, is lost.
	long := `value: "` + strings.Repeat("x", maxTail) + secret + `"`
	for _, tt := range []struct{ name, text, want string }{
		{"a constraint", stamp + "delta config rejected: listener a: " + refused + "\n", short},
		{"a value", "x\n" + `  value: "` + secret + "\"\n\n", `value: "[...]"`},
		{"a token", stamp + "no: Bearer " + secret, stamp + "no: Bearer [...]"},
		{"what people need", stamp + "cannot bind '127.0.0.1:15001': Address already in use\n", stamp + "cannot bind '127.0.0.1:15001': Address already in use"},
		{"cut at its beginning", long, ""},
		{"and another line", long + "\nthe end\n", "the end"},
		{"nothing", "", ""},
		{"as much as is kept", strings.Repeat("x\n", maxTail/2-1) + "y\n", "y"},
	} {
		b := newBootstrapper(
			Options{Root: t.TempDir(), command: func(_ context.Context, cmd *exec.Cmd) error {
				for rest := tt.text; rest != ""; rest = rest[min(len(rest), 4096):] {
					_, _ = cmd.Stdout.Write([]byte(rest[:min(len(rest), 4096)]))
				}
				return errors.New("exit status 1")
			}})
		mkdir(t, b.path(logs.Dir), 0o755)
		write(t, b.path(logs.Dir+"/envoy.err.log"), tt.text)
		if got, want := b.lastLogLine(""), tt.want; got != want {
			t.Errorf("%s, in the log:\n got %s\nwant %s", tt.name, got, want)
		}
		want := "exit status 1"
		if tt.want != "" {
			want += ": " + tt.want
		}
		f := failed(StepConfigure, b.configureEnvoy(t.Context(), attribute.Default(), VM{}), ofDisk)
		if f == nil || !strings.HasSuffix(f.Err.Error(), want) || strings.Contains(f.Error(), secret) {
			t.Errorf("%s, of envoy --mode validate:\n got %v\nwant …%s", tt.name, f, want)
		}
	}
	if got := complaint("x\nE: Failed to fetch https://user:" + secret +
		"@apt.example.com/dists/x  403  Forbidden\n"); got !=
		"E: Failed to fetch https://apt.example.com/dists/x  403  Forbidden" {
		t.Errorf("got %s", got)
	}
}

func mkdir(t *testing.T, name string, mode fs.FileMode) {
	t.Helper()
	// os.Chmod takes another sticky bit
	if err := errors.Join(os.MkdirAll(name, 0o755), unix.Chmod(name, uint32(mode))); err != nil {
		t.Fatal(err)
	}
}

func write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), 0o640); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// link puts a link in the place of what is there.
func link(t *testing.T, target, name string) {
	t.Helper()
	if err := errors.Join(os.RemoveAll(name), os.Symlink(target, name)); err != nil {
		t.Fatal(err)
	}
}
