package bootstrap

import (
	"cmp"
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
	"github.com/service-proxy-agent/service-proxy-agent/internal/untrusted"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

func TestRotateLogs(t *testing.T) {
	dir, elsewhere := t.TempDir(), filepath.Join(t.TempDir(), "precious.log")
	big := strings.Repeat("x", 200)
	write(t, elsewhere, big)
	write(t, filepath.Join(dir, "envoy.err.log"), big)
	write(t, filepath.Join(dir, "small.log"), "small")
	write(t, filepath.Join(dir, "other.txt"), big)
	write(t, filepath.Join(dir, "linked.log"), big)
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

// The access log is rotated wherever the configuration says, and no link that Envoy's user has planted is followed.
func TestRotateAccessLog(t *testing.T) {
	big := strings.Repeat("x", 200)
	for _, name := range []string{"/var/log/envoy/access", "/var/log/envoy/sub/access.json", "/srv/my logs/access.log"} {
		b := newBootstrapper(Options{Root: t.TempDir()})
		if err := b.rotateAccessLog(100); err != nil {
			t.Errorf("without a configuration: %v", err)
		}
		mkdir(t, b.path(filepath.Dir(EnvoyConfig)), 0o755)
		mkdir(t, b.path("/elsewhere"), 0o755)
		write(t, b.path("/elsewhere/"+filepath.Base(name)), big)
		text, err := envoyConfig(attribute.Config{AccessLog: name}, VM{Name: "vm"}, "ca")
		if err != nil {
			t.Fatal(err)
		}
		write(t, b.path(EnvoyConfig), string(text))
		if err := b.rotateAccessLog(100); err != nil {
			t.Errorf("%s: without a folder: %v", name, err)
		}
		mkdir(t, b.path(filepath.Dir(filepath.Dir(name))), 0o1777)
		mkdir(t, b.path(filepath.Dir(name)), 0o755)
		write(t, b.path(name), big)
		if err := b.rotateAccessLog(100); err != nil {
			t.Fatal(err)
		}
		if have, old := read(t, b.path(name)), read(t, b.path(name+".1")); have != "" || old != big {
			t.Errorf("%s: %d bytes, and %d in the copy", name, len(have), len(old))
		}

		link(t, b.path("/elsewhere/"+filepath.Base(name)), b.path(name)) // the log itself
		if err := b.rotateAccessLog(100); err != nil {
			t.Errorf("%s: a link: %v", name, err)
		}
		link(t, b.path("/elsewhere"), b.path(filepath.Dir(name))) // its folder
		if err := b.rotateAccessLog(100); !errors.Is(err, untrusted.ErrLink) {
			t.Errorf("%s: a link for its folder: %v", name, err)
		}
		if have := read(t, b.path("/elsewhere/"+filepath.Base(name))); have != big {
			t.Errorf("%s: a link was followed, %d bytes are left", name, len(have))
		}
	}
}

// Bootstrap makes the access log's folder, and outside LogDir the file; not where a link of Envoy's user leads.
func TestMakeAccessLog(t *testing.T) {
	b := newBootstrapper(Options{Root: t.TempDir()})
	mkdir(t, b.path(LogDir), 0o1770)
	mkdir(t, b.path("/srv/envoys"), 0o770)
	mkdir(t, b.path("/etc/precious"), 0o755)
	mkdir(t, b.path("/data"), 0o755)
	link(t, "/data", b.path("/srv/disk")) // the administrator's
	link(t, "../data", b.path("/srv/also"))
	link(t, "/etc/precious", b.path(LogDir+"/planted"))
	link(t, "../../etc/precious", b.path("/srv/envoys/planted"))
	link(t, "loop", b.path("/data/loop"))
	for _, tt := range []struct {
		name string
		want error
		made string // "": the folder alone
	}{
		{LogDir + "/a/b/c/access.log", nil, ""},
		{"/srv/logs/access.log", nil, "/srv/logs/access.log"},
		{"/srv/disk/access.log", nil, "/data/access.log"},
		{"/srv/disk/sub/access.log", nil, "/data/sub/access.log"},
		{"/srv/also/other.log", nil, "/data/other.log"},
		{"/srv/envoys/sub/access.log", nil, "/srv/envoys/sub/access.log"},
		{"/srv/no/such/access.log", fs.ErrNotExist, ""},
		{LogDir + "/planted/access.log", untrusted.ErrLink, ""},
		{LogDir + "/planted/sub/access.log", untrusted.ErrLink, ""},
		{"/srv/envoys/planted/access.log", untrusted.ErrLink, ""},
		{"/srv/envoys/planted/sub/access.log", untrusted.ErrLink, ""},
		{"/data/loop/access.log", unix.ELOOP, ""},
	} {
		for range 2 { // as every run of bootstrap
			if err := b.makeAccessLog(tt.name); !errors.Is(err, tt.want) {
				t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
			}
		}
		made := tt.made
		if made == "" {
			made = filepath.Dir(tt.name)
		}
		if _, err := os.Stat(b.path(made)); tt.want == nil && err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	if left, err := os.ReadDir(b.path("/etc/precious")); err != nil || len(left) > 0 {
		t.Errorf("a planted link was followed: %v, %v", left, err)
	}
}

// The right to write outside LogDir comes, for Envoy and for the rotation, and goes.
func TestAccessLogDropIns(t *testing.T) {
	var ran []string
	b := newBootstrapper(Options{Root: t.TempDir(), command: func(_ context.Context, cmd *exec.Cmd) error {
		ran = append(ran, strings.Join(cmd.Args, " "))
		return nil
	}})
	mkdir(t, b.path("/run"), 0o755)
	mkdir(t, b.path("/srv"), 0o755)
	mkdir(t, b.path(LogDir), 0o1770)
	for _, tt := range []struct {
		log     string
		granted bool
		reloads int
	}{
		{"/srv/logs/a.log", true, 1}, {"/srv/logs/a.log", true, 0}, {"/dev/stdout", false, 1}, {"", false, 0}, {"/srv/logs/a.log", true, 1}, {LogDir + "/../envoy/a.log", false, 1},
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
		b := newBootstrapper(Options{Root: t.TempDir(), command: func(_ context.Context, cmd *exec.Cmd) error {
			for rest := tt.text; rest != ""; rest = rest[min(len(rest), 4096):] {
				_, _ = cmd.Stdout.Write([]byte(rest[:min(len(rest), 4096)]))
			}
			return errors.New("exit status 1")
		}})
		mkdir(t, b.path(LogDir), 0o755)
		write(t, b.path(LogDir+"/envoy.err.log"), tt.text)
		if got, want := b.lastLogLine(), cmp.Or(tt.want, "(none)"); got != want {
			t.Errorf("%s, in the log:\n got %s\nwant %s", tt.name, got, want)
		}
		want := "exit status 1"
		if tt.want != "" {
			want += ": " + tt.want
		}
		f := b.configureEnvoy(t.Context(), attribute.Default(), VM{})
		if f == nil || !strings.HasSuffix(f.Err.Error(), want) || strings.Contains(f.Error(), secret) {
			t.Errorf("%s, of envoy --mode validate:\n got %v\nwant …%s", tt.name, f, want)
		}
	}
	if got := complaint("x\nE: Failed to fetch https://user:" + secret + "@apt.example.com/dists/x  403  Forbidden\n"); got !=
		"E: Failed to fetch https://apt.example.com/dists/x  403  Forbidden" {
		t.Errorf("got %s", got)
	}
}

func mkdir(t *testing.T, name string, mode fs.FileMode) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(name, 0o755), unix.Chmod(name, uint32(mode))); err != nil { // os.Chmod takes another sticky bit
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
