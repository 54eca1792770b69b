package bootstrap

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/layout"
	"github.com/service-proxy-agent/service-proxy-agent/internal/system"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// Install lays down what the unpacked release archive in dir holds: the agent's binary, the Envoy
// that came along, users and units; enables the units, starts them without waiting, and ends. OS
// Config runs it once per disk, in a folder that is deleted afterwards, and waits for its output to
// close, so every retry is somebody else's: Run's, once the unit stands; until then a transient
// unit's, which Install starts on a copy of the archive. As an upgrade it replaces the agent and
// leaves Envoy, its configuration and the kernel's rules alone.
// See docs/design/facts.md#gce-recipe-runs-once.
func Install(ctx context.Context, opts Options, dir string) error {
	b := newBootstrapper(opts)
	// Not a failure of this VM's, which is a node by its package: nothing is published.
	if err := b.refuseBesidePackage(); err != nil {
		return err
	}
	b.readState()
	b.state.Attempt = 1
	if opts.look == nil {
		b.look = func(ctx context.Context) system.System { return b.lookAt(ctx, archiveEnvoy(dir)) }
	}
	retry := slices.ContainsFunc(retryDirs, func(path string) bool { return dir == b.path(path) })
	seen := b.look(ctx)
	failure, passes := refused(seen, system.Judge(seen))
	// Over an installation that works nothing is refused, as in checkSystem.
	refused := failure != nil && !b.state.Worked()
	if !refused {
		failure, passes = b.install(ctx, dir, retry), true
	} else {
		failure.Step = StepInstall
	}
	if failure == nil {
		return nil
	}
	b.pub = newPublisher(ctx, b.Log)
	defer b.pub.end()
	b.fail(failure, 15*time.Second)
	if !retry && passes {
		// What refuses says it all in its one line.
		if err := b.installLater(ctx, dir); err != nil && !refused {
			return fmt.Errorf("%w (and it is not tried again: %w)", failure, err)
		}
	}
	return failure
}

// retryDirs are where the archive may wait while its installation is tried again: the first that
// can hold it and run what is in it. Not below /usr/local, which is what failed. /run is the last
// resort: Debian and Ubuntu mount it noexec, with a tenth of the memory, which may not hold an
// Envoy.
var retryDirs = []string{"/var/lib/service-proxy-agent-archive", "/run/service-proxy-agent-archive"}

// retryUnit is the transient unit that tries again.
const retryUnit = "service-proxy-install.service"

// installLater has systemd try the installation again, on a copy of the archive.
func (b *bootstrapper) installLater(ctx context.Context, dir string) error {
	b.stopRetry(ctx) // another archive's, which would run this copy, and whose unit keeps this one out
	var errs []error
	for _, path := range retryDirs {
		copied := b.path(path)
		agent, err := b.copyArchive(ctx, dir, copied)
		if err != nil {
			errs = append(errs, err, os.RemoveAll(copied))
			continue
		}
		out, err := b.exec(ctx, time.Minute, "systemd-run", "--quiet", "--no-block", "--collect",
			"--unit="+retryUnit, "--property=Restart=on-failure", "--property=RestartSec=15",
			"--property=StartLimitIntervalSec=0", "--property=SyslogFacility=user",
			agent, "bootstrap", "--archive", copied)
		if err != nil {
			return said(err, out)
		}
		return nil
	}
	return errors.Join(errs...)
}

// copyArchive copies what Install needs of the archive in dir, and returns the agent of the copy,
// which runs there.
func (b *bootstrapper) copyArchive(ctx context.Context, dir, copied string) (string, error) {
	if err := os.RemoveAll(copied); err != nil {
		return "", err
	}
	from, to := filepath.Join(dir, runtime.GOARCH), filepath.Join(copied, runtime.GOARCH)
	if err := os.MkdirAll(to, 0o700); err != nil {
		return "", err
	}
	for _, name := range []string{"service-proxy-agent", "envoy"} {
		err := copyFile(filepath.Join(from, name), filepath.Join(to, name), 0o755)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
	}
	// The rest of it is worth no failure.
	_ = os.CopyFS(filepath.Join(copied, sharedRoot), os.DirFS(filepath.Join(dir, sharedRoot)))
	agent := filepath.Join(to, "service-proxy-agent")
	// systemd would find out too late that the folder is mounted noexec.
	if out, err := b.exec(ctx, time.Minute, agent, "version"); err != nil {
		return "", said(err, out)
	}
	return agent, nil
}

// stopRetry stops the installation that is tried again, if there is one: mostly there is not.
func (b *bootstrapper) stopRetry(ctx context.Context) {
	_, _ = b.exec(ctx, time.Minute, "systemctl", "stop", retryUnit)
}

// endRetry forgets the installation that was to be tried again, and returns what it removed, one
// line each. self: that installation is the one that runs. The lock is held, which the other may be
// waiting for with an older archive.
func (b *bootstrapper) endRetry(ctx context.Context, self bool) (done []string) {
	for _, path := range retryDirs {
		if _, err := os.Lstat(b.path(path)); err != nil {
			continue
		}
		if !self {
			b.stopRetry(ctx)
		}
		// else: it does no harm, and the next overwrites it
		if err := os.RemoveAll(b.path(path)); err == nil {
			done = append(done, "removed "+path)
		}
	}
	return done
}

// install is one installation. retry: it is the one that was to be tried again.
func (b *bootstrapper) install(ctx context.Context, dir string, retry bool) *Failure {
	return failed(StepInstall, b.layDown(ctx, dir, retry), ofDisk)
}

// layDown is one installation but for its name.
func (b *bootstrapper) layDown(ctx context.Context, dir string, retry bool) (err error) {
	if b.Root == "" && os.Geteuid() != 0 {
		return fs.ErrPermission
	}
	arch := filepath.Join(dir, runtime.GOARCH)
	agent, envoy := filepath.Join(arch, "service-proxy-agent"), filepath.Join(arch, "envoy")
	if _, err := os.Stat(agent); err != nil {
		return err
	}
	unlock, err := b.lockInstall(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	defer func() {
		if err == nil {
			b.endRetry(ctx, retry)
		}
	}()
	back, err := b.readRolledBack()
	if err != nil {
		return err
	}
	sum, err := fileSum(agent)
	if err != nil {
		return err
	}
	if b.exists(layout.Here.Agent) && back.Agent == hex.EncodeToString(sum[:]) {
		b.Log.Warn("this archive's agent was rolled back on this VM, so nothing is installed; " +
			"a newer archive will be, or run bootstrap --rollback again")
		return nil
	}
	b.say("INFO", StepInstall)
	// Who installs ours over another agent means it to take over.
	if _, err := b.want(ctx, "an archive that was installed"); err != nil {
		return err
	}
	// Units before the binary they run would start what is not there; the binary alone does nothing.
	newAgent, err := b.place(agent, layout.Here.Agent)
	if err != nil {
		return err
	}
	if back.Agent != "" {
		back.Agent = "" // another archive has come
		if err := b.writeRolledBack(back); err != nil {
			return err
		}
	}
	if _, err := os.Stat(envoy); err == nil {
		if _, err := b.place(envoy, layout.Here.ArchivedEnvoy); err != nil {
			return err
		}
	}
	agentUnit := b.path(filepath.Join(layout.Here.UnitDir, systemd.AgentUnit))
	before, _ := os.ReadFile(agentUnit) // absent is other than what comes
	if failure := failed(StepUnits, b.installUnits(ctx), ofDisk); failure != nil {
		return failure
	}
	after, err := os.ReadFile(agentUnit)
	if err != nil {
		return err
	}
	b.placeShared(dir)
	b.label(ctx, layout.Here.Agent, layout.Here.UnitDir)
	return b.startUnits(ctx, newAgent || !bytes.Equal(before, after))
}

// startUnits starts what starts at boot, without waiting, and restarts a running agent that is
// another now. Masked units are left alone.
func (b *bootstrapper) startUnits(ctx context.Context, another bool) error {
	start := [][]string{
		{"start", "--no-block", systemd.AgentUnit, systemd.BootstrapPath, systemd.ReadyPath,
			systemd.RotateTimer},
		{"restart", "--no-block", systemd.BootstrapUnit},
	}
	h, err := b.readHandover()
	if err != nil {
		return err
	}
	if h.under(handoverWanted, handoverTaking) { // bootstrap does it, when it takes over
		another = false
		start[0] = slices.DeleteFunc(start[0], func(arg string) bool { return arg == systemd.AgentUnit })
	}
	if another {
		// The rules stay while it restarts (service-proxy-interception.service), so no connection is
		// lost.
		start = append([][]string{{"try-restart", "--no-block", systemd.AgentUnit}}, start...)
	}
	for _, args := range start {
		args = slices.DeleteFunc(args, func(arg string) bool { return slices.Contains(b.masked, arg) })
		if len(args) == 2 {
			continue
		}
		if err := b.systemctl(ctx, time.Minute, args...); err != nil {
			return &Failure{Err: err} // no file's of ours
		}
	}
	return nil
}

// place copies a file of the archive to its installed path, atomically, the old one kept; it says
// whether they differed.
func (b *bootstrapper) place(from, installed string) (changed bool, err error) {
	target := b.path(installed)
	same, err := sameFile(from, target)
	if err != nil || same {
		return false, err
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return false, err
	}
	temp, err := b.temp(installed)
	if err != nil {
		return false, err
	}
	if err := copyFile(from, temp, 0o755); err != nil {
		return false, err
	}
	if installed == layout.Here.ArchivedEnvoy { // a source, nothing to go back to
		return true, os.Rename(temp, target)
	}
	return true, b.upgrade(temp, installed)
}

// sameFile compares contents; an absent b is different.
func sameFile(a, b string) (bool, error) {
	infoA, err := os.Stat(a)
	if err != nil {
		return false, err
	}
	infoB, err := os.Stat(b)
	if err != nil || infoA.Size() != infoB.Size() {
		return false, nil
	}
	sumA, err := fileSum(a)
	if err != nil {
		return false, err
	}
	sumB, err := fileSum(b)
	return err == nil && sumA == sumB, nil
}
