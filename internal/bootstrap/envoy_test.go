package bootstrap

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"

	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/authorities"
	"github.com/service-proxy-agent/service-proxy-agent/internal/logs"
	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/test/platform"
)

// fakeBinary is a program for this machine as far as its header tells, and beyond that its version.
func fakeBinary(t *testing.T, version string) string {
	t.Helper()
	header := elf.Header64{Type: uint16(elf.ET_EXEC), Version: uint32(elf.EV_CURRENT), Ehsize: 64,
		Machine: uint16(machines[runtime.GOARCH])}
	copy(header.Ident[:], elf.ELFMAG)
	header.Ident[elf.EI_CLASS] = byte(elf.ELFCLASS64)
	header.Ident[elf.EI_DATA] = byte(elf.ELFDATA2LSB)
	header.Ident[elf.EI_VERSION] = byte(elf.EV_CURRENT)
	var out bytes.Buffer
	if err := binary.Write(&out, binary.LittleEndian, header); err != nil {
		t.Fatal(err)
	}
	return out.String() + version
}

// fakeVM is a root folder with bootstrap's commands played: `envoy --version` says what fakeBinary
// put into the file, in the words of the real one (1.40.0 and 1.36.4, run), `systemctl is-enabled`
// says enabled, everything else succeeds. What the real commands do with the units is the box's to
// show.
type fakeVM struct {
	*testing.T
	root string
	ran  []string
}

func newFakeVM(t *testing.T) *fakeVM {
	v := &fakeVM{T: t, root: t.TempDir()}
	mkdir(t, filepath.Join(v.root, "run"), 0o755)
	return v
}

func (v *fakeVM) options() Options {
	command := func(_ context.Context, cmd *exec.Cmd) error {
		ran := append([]string{filepath.Base(cmd.Path)}, cmd.Args[1:]...)
		v.ran = append(v.ran, strings.Join(ran, " "))
		switch {
		case len(cmd.Args) == 2 && cmd.Args[1] == "--version":
			fmt.Fprintf(cmd.Stdout, "envoy  version: abc/%s/Clean/RELEASE/BoringSSL\n",
				version(v.T, cmd.Path))
		case len(cmd.Args) > 1 && cmd.Args[1] == "is-enabled":
			fmt.Fprintln(cmd.Stdout, "enabled")
		}
		return nil
	}
	return Options{Root: v.root, look: fineSystem, command: command}
}

// version is what fakeBinary put into the file.
func version(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if errors.Is(err, os.ErrNotExist) {
		return "none"
	}
	if err != nil || len(text) < 64 {
		t.Fatal(name, len(text), err)
	}
	return string(text[64:])
}

func (v *fakeVM) put(name, text string) {
	v.Helper()
	mkdir(v.T, filepath.Dir(filepath.Join(v.root, name)), 0o755)
	// Binaries may be linked to, and are replaced, never written to.
	_ = os.Remove(filepath.Join(v.root, name))
	if err := os.WriteFile(filepath.Join(v.root, name), []byte(text), 0o755); err != nil {
		v.Fatal(err)
	}
}

// bootstrap is one run as far as Envoy's binary: a boot, or a change of the attribute. A run's
// state is on the disk afterwards.
func (v *fakeVM) bootstrap(cfg attribute.Config) *Failure {
	v.Helper()
	b := newBootstrapper(v.options())
	state, err := progress.Read(b.path(progress.StateDir))
	if err != nil {
		v.Fatal(err)
	}
	b.state = state
	b.state.Attempt = 1
	failure := failed(StepEnvoy, b.installEnvoy(v.Context(), cfg), ofDisk)
	b.save()
	return failure
}

// tryEnvoy is the step that installs Envoy. wish is a failure with which the VM goes on.
func tryEnvoy(t *testing.T, b *bootstrapper, cfg attribute.Config) (wish, failure *Failure) {
	t.Helper()
	f := failed(StepEnvoy, b.installEnvoy(t.Context(), cfg), ofDisk)
	if f != nil && f.goesOn {
		return f, nil
	}
	return nil, f
}

func (v *fakeVM) state() progress.State {
	v.Helper()
	state, err := progress.Read(filepath.Join(v.root, progress.StateDir))
	if err != nil {
		v.Fatal(err)
	}
	return state
}

// sources is an https server of Envoy archives, which fails as it is told.
type sources struct {
	*httptest.Server
	mu    sync.Mutex
	fails map[string][]http.HandlerFunc // the next answers of a path, instead of its archive
	asked map[string]int
}

// newSources serves /VERSION.tgz, an archive with that Envoy, to the VM, which trusts it.
func newSources(t *testing.T, v *fakeVM) *sources {
	t.Helper()
	s := &sources{fails: map[string][]http.HandlerFunc{}, asked: map[string]int{}}
	s.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, ".sha256") {
			http.NotFound(w, r)
			return
		}
		s.mu.Lock()
		s.asked[r.URL.Path]++
		var fail http.HandlerFunc
		if next := s.fails[r.URL.Path]; len(next) > 0 {
			fail, s.fails[r.URL.Path] = next[0], next[1:]
		}
		s.mu.Unlock()
		if fail != nil {
			fail(w, r)
			return
		}
		name := strings.TrimSuffix(strings.TrimPrefix(r.URL.Path, "/"), ".tgz")
		_, _ = w.Write(pack(t, file("usr/local/bin/envoy", fakeBinary(t, name))))
	}))
	t.Cleanup(s.Close)
	ca, err := os.ReadFile(filepath.Join(tlsRoot(t, s.Server), authorities.Files[0]))
	if err != nil {
		t.Fatal(err)
	}
	v.put(authorities.Files[0], string(ca))
	quickRetries(t)
	return s
}

// fail has the next n answers of an archive be these, in turn.
func (s *sources) fail(name string, n int, with ...http.HandlerFunc) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fails["/"+name+".tgz"] = nil
	for i := range n {
		s.fails["/"+name+".tgz"] = append(s.fails["/"+name+".tgz"], with[i%len(with)])
	}
}

// requests are how often an archive was asked for since the last call.
func (s *sources) requests(name string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.asked["/"+name+".tgz"]
	delete(s.asked, "/"+name+".tgz")
	return n
}

func status(code int) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) }
}

// reset ends the connection in the middle of the answer.
func reset(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Length", "1000")
	_, _ = w.Write([]byte("half"))
	panic(http.ErrAbortHandler)
}

const always = 1000

func (s *sources) config(primary, secondary string) attribute.Config {
	cfg := attribute.Default()
	if primary != "" {
		cfg.PrimarySource = s.URL + "/" + primary + ".tgz"
	}
	if secondary != "" {
		cfg.SecondarySource = s.URL + "/" + secondary + ".tgz"
	}
	return cfg
}

// What may pass is tried again before anything else is taken; what somebody must mend is not.
func TestDownloadRetries(t *testing.T) {
	for _, tt := range []struct {
		name  string
		fails int
		with  []http.HandlerFunc
		want  string // the Envoy
		asked int
	}{
		{"429, 503, a reset, then the archive", 3, []http.HandlerFunc{status(429), status(503), reset}, "1.30.1", 4},
		{"408 and 500", 2, []http.HandlerFunc{status(408), status(500)}, "1.30.1", 3},
		{"503 without end", always, []http.HandlerFunc{status(503)}, "1.30.2", 4},
		{"404", always, []http.HandlerFunc{status(404)}, "1.30.2", 1},
		{"403", always, []http.HandlerFunc{status(403)}, "1.30.2", 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			v := newFakeVM(t)
			s := newSources(t, v)
			s.fail("1.30.1", tt.fails, tt.with...)
			if f := v.bootstrap(s.config("1.30.1", "1.30.2")); f != nil {
				t.Fatal(f)
			}
			if have, asked := version(t, filepath.Join(v.root, EnvoyBinary)),
				s.requests("1.30.1"); have != tt.want || asked != tt.asked {
				t.Errorf("Envoy %s after %d requests, want %s after %d", have, asked, tt.want, tt.asked)
			}
		})
	}
}

// A working Envoy is replaced by the wanted one only, whatever the sources do, and what is said to
// be installed is.
func TestFallbackReplacesNoWorkingEnvoy(t *testing.T) {
	v := newFakeVM(t)
	s := newSources(t, v)
	v.put(archiveDir+"/envoy", fakeBinary(t, "1.30.9"))
	const dead = "1.30.8" // a source that fails
	s.fail(dead, always, status(503))
	for i, step := range []struct {
		name, primary, secondary string
		brk                      func()
		want, source             string
		fails                    bool
	}{
		{"first boot, all is well", "1.30.1", "", nil, "1.30.1", "/1.30.1.tgz", false},
		{"the wanted one cannot be had", "1.30.2", "1.30.3", func() { s.fail("1.30.2", always, status(503)) }, "1.30.1", "/1.30.1.tgz", true},
		{"nor later", "1.30.2", "1.30.3", func() { s.fail("1.30.2", always, status(404)) }, "1.30.1", "/1.30.1.tgz", true},
		{"it can", "1.30.2", "1.30.3", func() { s.fail("1.30.2", 0) }, "1.30.2", "/1.30.2.tgz", false},
		{"and stays", "1.30.2", "1.30.3", func() { s.fail("1.30.2", always, status(503)) }, "1.30.2", "/1.30.2.tgz", false},
		{"Envoy is lost, and its source away", "1.30.2", dead, func() { os.Remove(filepath.Join(v.root, EnvoyBinary)) }, "1.30.9", "the agent's archive", false},
		{"still away: the fallback runs on", "1.30.2", dead, nil, "1.30.9", "the agent's archive", false},
		{"a new archive is no source for a working Envoy", "1.30.2", dead, func() { v.put(archiveDir+"/envoy", fakeBinary(t, "1.31.0")) }, "1.30.9", "the agent's archive", false},
		{"the next boot finds the source back", "1.30.2", dead, func() { s.fail("1.30.2", 0) }, "1.30.2", "/1.30.2.tgz", false},
		{"no source is wanted any more", "", "", nil, "1.30.2", "/1.30.2.tgz", false},
	} {
		if step.brk != nil {
			step.brk()
		}
		f := v.bootstrap(s.config(step.primary, step.secondary))
		if (f != nil) != step.fails {
			t.Errorf("%d %s: %v", i, step.name, f)
		}
		state := v.state()
		if have := version(t, filepath.Join(v.root, EnvoyBinary)); have != step.want ||
			state.EnvoyVersion != step.want || !strings.HasSuffix(state.EnvoySource, step.source) {
			t.Errorf("%d %s: Envoy %s, said to be %s from %s; want %s from %s", i, step.name, have,
				state.EnvoyVersion, state.EnvoySource, step.want, step.source)
		}
	}
}

// An `envoy --version` that was not let run to its end (memory short, a slow disk at boot) says
// nothing about the binary, so it stays, and is asked again; one that fails by itself is replaced.
// The wanted one cannot be had meanwhile.
func TestOneFailedVersionReplacesNoWorkingEnvoy(t *testing.T) {
	// As the kernel and os/exec say it: the command that is run instead.
	shell := func(script string) func(context.Context) *exec.Cmd {
		return func(ctx context.Context) *exec.Cmd {
			return exec.CommandContext(ctx, "/bin/sh", "-c", script)
		}
	}
	program := func(text string, mode os.FileMode) func(context.Context) *exec.Cmd {
		name := filepath.Join(t.TempDir(), "envoy")
		if err := os.WriteFile(name, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return func(ctx context.Context) *exec.Cmd { return exec.CommandContext(ctx, name) }
	}
	fails := func(err error) func(context.Context) *exec.Cmd {
		return func(context.Context) *exec.Cmd { return &exec.Cmd{Err: err} }
	}
	for _, tt := range []struct {
		name    string
		command func(context.Context) *exec.Cmd
		replace bool
		says    string
	}{
		{"killed", shell("kill -9 $$"), false, "signal: killed"},
		{"crashed", shell("kill -SEGV $$"), false, "signal: segmentation fault"},
		{"no process", fails(&os.PathError{Op: "fork/exec", Path: "envoy", Err: syscall.EAGAIN}), false, "resource temporarily unavailable"},
		{"no memory", fails(&os.PathError{Op: "fork/exec", Path: "envoy", Err: syscall.ENOMEM}), false, "cannot allocate memory"},
		{"being written", fails(&os.PathError{Op: "fork/exec", Path: "envoy", Err: syscall.ETXTBSY}), false, "text file busy"},
		{"gives up", shell("echo no such library; exit 127"), true, "exit status 127: no such library"},
		{"no program", program("\x00", 0o755), true, "exec format error"},
		{"not executable", program("\x00", 0o644), true, "permission denied"},
		{"its loader is not there", program("#!/nonexistent/loader", 0o755), true, "no such file"},
		{"another program", shell("echo I am not Envoy"), true, "does not say its version"},
		{"too old", shell("echo envoy version: abc/1.24.8/Clean"), true, "version 1.24.8 is too old"},
	} {
		for _, own := range []bool{false, true} { // own: it is the administrator's
			v := newFakeVM(t)
			s := newSources(t, v)
			v.put(archiveDir+"/envoy", fakeBinary(t, "1.30.9"))
			if own {
				v.put(EnvoyBinary, fakeBinary(t, "1.30.1"))
			}
			if f := v.bootstrap(s.config("1.30.1", "")); f != nil {
				t.Fatal(f)
			}
			s.fail("1.30.1", always, status(404))
			opts := v.options()
			play, failed := opts.command, false
			opts.command = func(ctx context.Context, cmd *exec.Cmd) error {
				if failed || !slices.Contains(cmd.Args, "--version") {
					return play(ctx, cmd)
				}
				failed = true
				instead := tt.command(ctx)
				instead.Stdout, instead.Stderr = cmd.Stdout, cmd.Stderr
				return instead.Run()
			}
			b := newBootstrapper(opts)
			b.state = v.state()
			b.state.Attempt = 1
			wish, failure := tryEnvoy(t, b, s.config("1.30.1", ""))
			have := version(t, v.root+EnvoyBinary)
			if tt.replace {
				told := slices.ContainsFunc(b.state.Story, func(l progress.Line) bool {
					return strings.Contains(l.Text, "archive in place of "+EnvoyBinary) &&
						strings.Contains(l.Text, tt.says)
				})
				if have != "1.30.9" || wish != nil || failure != nil || !told {
					t.Errorf("%s, own %v: have %s, %v, %v, told %+v", tt.name, own, have, wish, failure,
						b.state.Story)
				}
				continue
			}
			if have != "1.30.1" || failure == nil || failure.Permanent ||
				!strings.Contains(failure.Error(), tt.says) {
				t.Errorf("%s, own %v: have %s from %s, %v", tt.name, own, have, b.state.EnvoySource, failure)
			}
			if wish, failure := tryEnvoy(t, b, s.config("1.30.1", "")); wish != nil || failure != nil {
				t.Errorf("%s, own %v, asked again: %v, %v", tt.name, own, wish, failure)
			}
		}
	}
}

// Nor does one that has run out of time.
func TestVersionTimesOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBootstrapper(
			Options{Root: t.TempDir(), command: func(ctx context.Context, _ *exec.Cmd) error {
				<-ctx.Done()
				return ctx.Err()
			}})
		mkdir(t, b.path(filepath.Dir(EnvoyBinary)), 0o755)
		write(t, b.path(EnvoyBinary), fakeBinary(t, "1.30.1"))
		_, f := tryEnvoy(t, b, attribute.Default())
		if f == nil || f.Permanent || !strings.Contains(f.Error(), "no end after 20s") {
			t.Errorf("have %v", f)
		}
	})
}

// A downloaded Envoy that was not let say its version makes way for the next source where there is
// none, and is tried again.
func TestDownloadedEnvoyIsKilled(t *testing.T) {
	v := newFakeVM(t)
	s := newSources(t, v)
	opts := v.options()
	opts.command = func(_ context.Context, cmd *exec.Cmd) error {
		return exec.Command("/bin/sh", "-c", "kill -9 $$").Run()
	}
	b := newBootstrapper(opts)
	if _, f := tryEnvoy(t, b, s.config("1.30.1", "1.30.2")); f == nil || f.Permanent ||
		strings.Count(f.Error(), "signal: killed") != 2 {
		t.Errorf("have %v", f)
	}
}

// A state of an earlier version booked the primary source when a fallback was installed: its own
// other word is believed.
func TestFallbackOfEarlierVersion(t *testing.T) {
	v := newFakeVM(t)
	s := newSources(t, v)
	cfg := s.config("1.30.1", "")
	v.put(EnvoyBinary, fakeBinary(t, "1.30.9"))
	mkdir(t, filepath.Join(v.root, progress.StateDir), 0o755)
	if err := progress.Write(filepath.Join(v.root, progress.StateDir), progress.State{
		PrimarySum: progress.Sum(cfg.PrimarySource), EnvoySource: "the agent's archive"}); err != nil {
		t.Fatal(err)
	}
	if f := v.bootstrap(cfg); f != nil {
		t.Fatal(f)
	}
	if have := version(t, filepath.Join(v.root, EnvoyBinary)); have != "1.30.1" {
		t.Errorf("have %s", have)
	}
}

// An Envoy that is the administrator's is never replaced while it runs.
func TestEnvoyOfOthersStays(t *testing.T) {
	v := newFakeVM(t)
	s := newSources(t, v)
	v.put(EnvoyBinary, fakeBinary(t, "1.30.9"))
	if f := v.bootstrap(s.config("1.30.1", "")); f != nil {
		t.Fatal(f)
	}
	if have := version(t, filepath.Join(v.root, EnvoyBinary)); have != "1.30.9" ||
		v.state().PrimarySum != "" {
		t.Errorf("have %s, %+v", have, v.state())
	}
}

// The wanted Envoy is one thing, the rest of what the attribute says another: it is done with the
// Envoy that works.
func TestWishDoesNotStopTheRest(t *testing.T) {
	v := newFakeVM(t)
	s := newSources(t, v)
	server := httptest.NewServer(platform.New(platform.VM{}))
	defer server.Close()
	t.Setenv("GCE_METADATA_HOST", strings.TrimPrefix(server.URL, "http://"))
	t.Setenv("PATH", t.TempDir()) // no systemctl: the last step is where it ends
	for _, program := range []string{"iptables", "iptables-restore"} {
		v.put("/usr/sbin/"+program, "x")
	}
	mkdir(t, filepath.Join(v.root, logs.Dir), 0o770)
	if f := v.bootstrap(s.config("1.30.1", "")); f != nil {
		t.Fatal(f)
	}
	s.fail("1.30.2", always, status(503))
	b := newBootstrapper(v.options())
	b.state = v.state()
	cfg := s.config("1.30.2", "")
	cfg.Labels = map[string]string{"app": "new"}
	if f := b.attempt(t.Context(), metadata.Attribute{Config: cfg}); f == nil || f.Step != StepStart {
		t.Errorf("it ended with %v", f)
	}
	if have := read(t, filepath.Join(v.root, EnvoyConfig)); !strings.Contains(have, `"app": "new"`) {
		t.Errorf("Envoy's configuration: %s", have)
	}
}
