package bootstrap

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/service-proxy-agent/service-proxy-agent/internal/layout"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// archive is an unpacked release archive beneath the root, as OS Config or a startup-script has it.
func (v *fakeVM) archive(agent, envoy string) (dir string) {
	v.Helper()
	dir = filepath.Join("/var/tmp", "archive-"+agent)
	v.put(filepath.Join(dir, runtime.GOARCH, "service-proxy-agent"), fakeBinary(v.T, agent))
	for _, pattern := range append(shared, "/usr/local/share/man/man8/service-proxy-agent.8") {
		name := strings.Replace(pattern, "*", "-"+agent, 1)
		v.put(filepath.Join(dir, sharedRoot, name), sharedText(agent, name))
	}
	if envoy != "" {
		v.put(filepath.Join(dir, runtime.GOARCH, "envoy"), fakeBinary(v.T, envoy))
	}
	return filepath.Join(v.root, dir)
}

// sharedText is what an archive with this agent has under this name.
func sharedText(agent, name string) string {
	return ".TH SERVICE-PROXY-AGENT 8 2026-11-29 service-proxy-agent Manual\n" + agent + " " + name
}

func (v *fakeVM) install(agent, envoy string) {
	v.Helper()
	if err := Install(v.Context(), v.options(), v.archive(agent, envoy)); err != nil {
		v.Fatal(err)
	}
}

func (v *fakeVM) rollback() (done []string) {
	v.Helper()
	done, err := Rollback(v.Context(), v.options())
	if err != nil {
		v.Fatal(err)
	}
	return done
}

// want checks the versions of what is installed.
func (v *fakeVM) want(when, agent, envoy string) {
	v.Helper()
	if have := version(v.T, filepath.Join(v.root, layout.Here.Agent)); have != agent {
		v.Errorf("%s: agent %s, want %s", when, have, agent)
	}
	if have := version(v.T, filepath.Join(v.root, EnvoyBinary)); have != envoy {
		v.Errorf("%s: Envoy %s, want %s", when, have, envoy)
	}
}

// One upgrade is one generation: a rollback brings back what the last one has replaced, and nothing
// that was replaced long before.
func TestRollbackIsOneGeneration(t *testing.T) {
	v := newFakeVM(t)
	s := newSources(t, v)
	boot := func(primary string) {
		t.Helper()
		if f := v.bootstrap(s.config(primary, "")); f != nil {
			t.Fatal(f)
		}
	}
	v.install("1.0.0", "")
	boot("1.30.1")
	boot("1.30.2")
	v.install("2.0.0", "")
	v.want("upgraded", "2.0.0", "1.30.2")
	v.rollback()
	v.want("the agent came last", "1.0.0", "1.30.2")
	v.rollback()
	v.want("and forth", "2.0.0", "1.30.2")
	boot("1.30.3")
	v.rollback()
	v.want("Envoy came last", "2.0.0", "1.30.2")
}

// A rollback is not undone by what runs at every boot, and does not outlive what comes after it.
func TestRollbackStays(t *testing.T) {
	v := newFakeVM(t)
	s := newSources(t, v)
	primary := ""
	boot := func() { // a startup-script brings an archive each time
		t.Helper()
		if f := v.bootstrap(s.config(primary, "")); f != nil {
			t.Fatal(f)
		}
	}
	v.install("1.0.0", "1.30.9")
	boot()
	v.install("2.0.0", "1.30.9")
	v.ran = nil
	v.rollback()
	v.want("rolled back", "1.0.0", "1.30.9")
	for _, ran := range []string{"systemctl stop " + systemd.BootstrapUnit,
		"service-proxy-agent bootstrap --install-units", "systemctl restart " + systemd.AgentUnit,
		"systemctl start --no-block " + systemd.BootstrapUnit} {
		if !slices.Contains(v.ran, ran) {
			t.Errorf("it did not run %q: %q", ran, v.ran)
		}
	}
	if strings.Contains(strings.Join(v.ran, " "), systemd.EnvoyUnit) {
		t.Errorf("it touched Envoy: %q", v.ran)
	}
	units := filepath.Join(v.root, layout.Here.UnitDir, systemd.AgentUnit)
	if err := os.WriteFile(units, []byte("version 1's"), 0o644); err != nil {
		t.Fatal(err)
	}
	v.install("2.0.0", "1.30.9")
	boot()
	v.want("the same archive at the next boot", "1.0.0", "1.30.9")
	if have := read(t, units); have != "version 1's" {
		t.Error("the units are those of the version that was rolled back")
	}
	v.install("3.0.0", "1.30.9")
	v.want("a newer archive", "3.0.0", "1.30.9")
	v.install("2.0.0", "1.30.9")
	v.want("the old one again, since it was asked for", "2.0.0", "1.30.9")

	primary = "1.30.1"
	boot()
	v.want("another Envoy", "2.0.0", "1.30.1")
	v.ran = nil
	v.rollback()
	v.want("rolled back", "2.0.0", "1.30.9")
	if !slices.Contains(v.ran, "systemctl reload "+systemd.EnvoyUnit) ||
		slices.Contains(v.ran, "systemctl restart "+systemd.AgentUnit) {
		t.Errorf("ran %q", v.ran)
	}
	boot()
	v.want("bootstrap looks again", "2.0.0", "1.30.9")
	if have := v.state(); have.EnvoyVersion != "1.30.9" || have.EnvoySource != archiveSource {
		t.Errorf("said to be %s from %s", have.EnvoyVersion, have.EnvoySource)
	}
	// loses nothing but history
	if err := os.Remove(filepath.Join(v.root, progress.StateDir, progress.StateFile)); err != nil {
		t.Fatal(err)
	}
	boot()
	v.want("the state is lost", "2.0.0", "1.30.9")
}

// To want another Envoy, and then the one that was rolled back, is a new wish.
func TestRollbackOfEnvoyIsForgotten(t *testing.T) {
	v := newFakeVM(t)
	s := newSources(t, v)
	v.install("1.0.0", "")
	for _, step := range []struct {
		primary  string
		rollback bool
		want     string
	}{
		{"1.30.1", false, "1.30.1"}, {"1.30.2", true, "1.30.1"}, {"1.30.2", false, "1.30.1"}, {"1.30.1", false, "1.30.1"}, {"1.30.2", false, "1.30.2"},
	} {
		if f := v.bootstrap(s.config(step.primary, "")); f != nil {
			t.Fatal(f)
		}
		if step.rollback {
			v.rollback()
		}
		v.want("primary-source "+step.primary, "1.0.0", step.want)
	}
}

// Two installations at once come one after the other: OS Config's recipe and a startup-script start
// at the same boot.
func TestInstallWaits(t *testing.T) {
	v := newFakeVM(t)
	first, second := v.archive("1.0.0", "1.30.1"), v.archive("2.0.0", "1.30.2")
	inside, goOn, waits := make(chan struct{}), make(chan struct{}), make(chan struct{})
	var stopped atomic.Bool
	slow := v.options()
	slow.command = func(_ context.Context, cmd *exec.Cmd) error {
		if stopped.CompareAndSwap(false, true) { // at its first command, the files are there
			close(inside)
			<-goOn
		}
		return newFakeVM(t).options().command(t.Context(), cmd)
	}
	patient := newFakeVM(t).options()
	patient.Root = v.root
	patient.Log = zap.New(zapcore.NewNopCore(), zap.WithFatalHook(zapcore.WriteThenPanic)).WithOptions(
		zap.WrapCore(func(zapcore.Core) zapcore.Core {
			return zapcore.RegisterHooks(zapcore.NewCore(zapcore.NewJSONEncoder(zapcore.EncoderConfig{}),
				zapcore.AddSync(&strings.Builder{}), zap.InfoLevel),
				func(e zapcore.Entry) error {
					if strings.Contains(e.Message, "waiting for another installation") {
						close(waits)
					}
					return nil
				})
		}))
	ended, running := make(chan error, 2), 2
	go func() { ended <- Install(t.Context(), slow, first) }()
	<-inside
	go func() { ended <- Install(t.Context(), patient, second) }()
	select {
	case <-waits:
	case err := <-ended:
		running--
		t.Errorf("the second did not wait: %v", err)
	}
	v.want("the first is at it", "1.0.0", "none")
	close(goOn)
	for range running {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	v.want("both", "2.0.0", "none")
}

// One that does not end is not waited for without end, and the error says what to do.
func TestInstallGivesUpWaiting(t *testing.T) {
	v := newFakeVM(t)
	defer func(d time.Duration) { installWait = d }(installWait)
	installWait = 150 * time.Millisecond
	unlock, err := newBootstrapper(v.options()).lockInstall(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	if _, err := Rollback(t.Context(), v.options()); err == nil ||
		!strings.Contains(err.Error(), "another installation has not ended within 150ms") {
		t.Errorf("have %v", err)
	}
}

// An older archive whose installation failed, and is tried again, is stopped before the lock is
// given back: it waits for that, and would go over the newer one.
func TestOlderRetryCannotTakeTheLock(t *testing.T) {
	v := newFakeVM(t)
	v.install("1.0.0", "")
	v.put(filepath.Join(retryDirs[0], runtime.GOARCH, "service-proxy-agent"), fakeBinary(t, "1.5.0"))
	opts := v.options()
	play, stopped := opts.command, false
	opts.command = func(ctx context.Context, cmd *exec.Cmd) error {
		if slices.Equal(cmd.Args, []string{"systemctl", "stop", retryUnit}) {
			stopped = true
			// it runs still
			if f := newBootstrapper(v.options()).install(t.Context(), v.root+retryDirs[0], true); f == nil {
				t.Error("the older one has taken the lock")
			}
		}
		return play(ctx, cmd)
	}
	defer func(d time.Duration) { installWait = d }(installWait)
	installWait = 0
	if err := Install(t.Context(), opts, v.archive("2.0.0", "")); err != nil {
		t.Fatal(err)
	}
	if have := version(t, v.root+layout.Here.Agent); have != "2.0.0" || !stopped {
		t.Errorf("after the newer archive's installation: agent %s; stopped: %v", have, stopped)
	}
}

// A lock file that Remove has taken away keeps nobody out, so whoever has it takes the new one.
func TestInstallLockOfRemovedFile(t *testing.T) {
	v := newFakeVM(t)
	b := newBootstrapper(v.options())
	unlock, err := b.lockInstall(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	old, err := os.Open(b.path(installLock))
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	if err := os.Remove(b.path(installLock)); err != nil {
		t.Fatal(err)
	}
	if isStill(old, b.path(installLock)) {
		t.Error("a file that is gone has its name still")
	}
	unlock()
	unlock, err = b.lockInstall(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	if isStill(old, b.path(installLock)) {
		t.Error("another file has its name")
	}
}

// What an installation that was cut short has left is taken away, and never put into place.
func TestInstallLeavesNoTemporaries(t *testing.T) {
	v := newFakeVM(t)
	for _, left := range []string{"/usr/local/bin/.service-proxy-agent.new-123",
		archiveDir + "/.envoy.new-123"} {
		v.put(left, "half")
	}
	v.install("1.0.0", "1.30.1")
	v.install("2.0.0", "1.30.2")
	for _, dir := range []string{"/usr/local/bin", archiveDir, previousDir} {
		if left, err := filepath.Glob(filepath.Join(v.root, dir, "*.new*")); err != nil || len(left) > 0 {
			t.Errorf("left: %v, %v", left, err)
		}
		if left, err := filepath.Glob(filepath.Join(v.root, dir, ".*.new*")); err != nil ||
			len(left) > 0 {
			t.Errorf("left: %v, %v", left, err)
		}
	}
	v.want("upgraded", "2.0.0", "none")
}
