package bootstrap

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/internal/atomicfile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/logs"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/internal/untrusted"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// MinimumEnvoy is the oldest Envoy that is installed or kept: older ones have no drain_listeners?graceful&skip_exit we can rely on, and known holes.
var MinimumEnvoy = [3]int{1, 24, 9}

const envoyAdvice = "give primary-source=gs://BUCKET/OBJECT.tgz in --service-proxy, or install Envoy 1.24.9 or later as " + EnvoyBinary

// archiveSource is the Envoy that came with the agent, as a source.
const archiveSource = "the agent's archive"

// installEnvoy sees to a good binary at EnvoyBinary. A working one stays, unless it is ours and
// from another source than primary-source: then it gives way to that, and to nothing else. Where
// none works the sources are tried in turn: primary-source, secondary-source, what came with the
// agent. Where it cannot be told whether it works nothing is replaced: it may run the traffic.
//
// wish is why the wanted Envoy could not be installed although another works, so that the VM goes
// on with what it has.
func (b *bootstrapper) installEnvoy(ctx context.Context, cfg attribute.Config) (wish, failure *Failure) {
	b.removeTemps()
	sources := []struct{ name, url string }{
		{"primary-source", cfg.PrimarySource},
		{"secondary-source", cfg.SecondarySource},
		{archiveSource, b.path(filepath.Join(archiveDir, "envoy"))},
	}
	var refused []string
	inPlaceOf := ""
	version, err := b.envoyVersion(ctx, EnvoyBinary)
	works := err == nil
	switch {
	case works:
		b.state.EnvoyVersion = version
		left, err := b.wasRolledBack(ctx, cfg.PrimarySource)
		if err != nil {
			return nil, diskFailure(StepEnvoy, err)
		}
		if cfg.PrimarySource == "" || b.state.PrimarySum == "" || installedFrom(b.state, cfg.PrimarySource) || left {
			return nil, nil
		}
		if b.state.Attempt == 1 {
			b.say("INFO", "installing Envoy from primary-source; the one here is from "+b.state.EnvoySource)
		}
		sources = sources[:1]
	case errors.Is(err, errBinary):
		refused = append(refused, fmt.Sprintf("%s: %v", EnvoyBinary, err))
		inPlaceOf = " in place of " + refused[0] // which may be the administrator's
	case !errors.Is(err, fs.ErrNotExist):
		return nil, &Failure{Step: StepEnvoy, Err: fmt.Errorf("%s: %w", EnvoyBinary, err),
			Advice: "it stays as it is; if this lasts, mend it, or remove it and another is installed"}
	}

	permanent := true
	var last error
	for _, source := range sources {
		if source.url == "" {
			continue
		}
		fromArchive := source.name == archiveSource
		from, sum := redact(source.url), progress.Sum(source.url)
		if fromArchive {
			if _, err := os.Lstat(source.url); err != nil {
				continue
			}
			from, sum = archiveSource, progress.Sum(archiveSource)
		}
		version, err := b.installEnvoyFrom(ctx, source.url, fromArchive)
		if err == nil {
			if works {
				b.state.PreviousSource, b.state.PreviousSum = b.state.EnvoySource, b.state.PrimarySum
			}
			b.state.EnvoyVersion, b.state.EnvoySource, b.state.PrimarySum = version, from, sum
			b.say("INFO", fmt.Sprintf("installed Envoy %s from %s%s", version, from, inPlaceOf))
			if cfg.PrimarySource != "" && source.name != "primary-source" {
				b.noteFallback(strings.Join(refused, "; "))
			}
			return nil, nil
		}
		if ctx.Err() != nil {
			return nil, &Failure{Step: StepEnvoy, Err: ctx.Err()}
		}
		var download *downloadError
		if !errors.As(err, &download) && !errors.Is(err, errArchive) && !errors.Is(err, errBinary) && !errors.Is(err, errUntold) {
			failure := diskFailure(StepEnvoy, err) // the disk's failure is not the source's
			if works {
				return failure, nil
			}
			return nil, failure
		}
		if errors.As(err, &download) && !download.permanent || errors.Is(err, errUntold) {
			permanent = false
		}
		refused = append(refused, source.name+": "+err.Error())
		if b.state.Attempt == 1 {
			b.say("WARNING", source.name+": "+err.Error())
		}
		last = err
	}
	if len(refused) == 0 {
		return nil, &Failure{Step: StepEnvoy, Err: errors.New("there is no Envoy: none on this VM, no primary-source, and none came with the agent"),
			Advice: envoyAdvice, Permanent: true}
	}
	f := &Failure{Step: StepEnvoy, Err: errors.New(strings.Join(refused, "; ")), Permanent: permanent, Advice: envoyAdvice}
	switch {
	case works && (installedFrom(b.state, cfg.SecondarySource) || b.state.EnvoySource == archiveSource):
		b.noteFallback(strings.Join(refused, "; ")) // as at the first boot
		return nil, nil
	case works:
		f.Advice = fmt.Sprintf("Envoy %s from %s goes on meanwhile; mend that source", b.state.EnvoyVersion, b.state.EnvoySource)
		return f, nil
	case last != nil:
		f.Advice = "mend that source, or " + envoyAdvice
		if errors.Is(last, errNoSpace) {
			f.Advice = "make room on that disk"
		}
	}
	return nil, f
}

// noteFallback leaves a line for bootstrap-last-failure: a VM whose Envoy is not from
// primary-source shall be found.
func (b *bootstrapper) noteFallback(why string) {
	b.state.Failure = progress.OneLine(fmt.Sprintf("%s: %s; Envoy %s from %s is used instead, and primary-source tried again at the next boot",
		StepEnvoy, why, b.state.EnvoyVersion, b.state.EnvoySource))
	b.state.FailureTime = time.Now()
}

var (
	errBinary  = errors.New("bad Envoy")
	errUntold  = errors.New("cannot tell whether this Envoy works")
	errNoSpace = syscall.ENOSPC
)

// installedFrom says that the installed Envoy is from this source, a URL.
func installedFrom(s progress.State, source string) bool {
	return source != "" && s.PrimarySum == progress.Sum(source) && s.EnvoySource == redact(source)
}

// Temporary files, all of them under these two names, so that what a power cut leaves is found again.
func (b *bootstrapper) newEnvoy() string {
	return b.path(filepath.Join(filepath.Dir(EnvoyBinary), ".envoy.new"))
}
func (b *bootstrapper) newArchive() string { return b.path(filepath.Join(libDir, ".archive.new")) }

// newConfig is Envoy's configuration until Envoy has accepted it. Envoy tells the format by the name's end.
func (b *bootstrapper) newConfig() string {
	return b.path(filepath.Join(filepath.Dir(EnvoyConfig), ".envoy.new.json"))
}

// removeLeftovers takes away what a power cut has left of files being replaced (atomicfile's random names) in folders that no one else cleans.
func (b *bootstrapper) removeLeftovers() {
	names := []string{filepath.Join(progress.StateDir, progress.StateFile), EnvoyConfig}
	for _, file := range systemd.Files() {
		names = append(names, file.Path)
	}
	for _, name := range names {
		left, err := filepath.Glob(b.path(filepath.Join(filepath.Dir(name), "."+filepath.Base(name)+".*")))
		if err != nil {
			continue // no pattern of ours is malformed
		}
		for _, path := range left {
			if err := os.Remove(path); err != nil {
				b.Log.Warn("cannot remove what an earlier run has left", zap.Error(err))
			}
		}
	}
	b.removeTemps()
}

func (b *bootstrapper) removeTemps() {
	_ = os.Remove(b.newConfig())
	_ = os.Remove(b.newEnvoy()) // what cannot be removed fails the creation after this
	_ = os.Remove(b.newArchive())
}

// installEnvoyFrom puts one source's Envoy into place, the old one kept, or changes nothing.
func (b *bootstrapper) installEnvoyFrom(ctx context.Context, source string, fromArchive bool) (version string, err error) {
	defer b.removeTemps()
	for _, dir := range []string{filepath.Dir(EnvoyBinary), libDir} {
		if err := os.MkdirAll(b.path(dir), 0o755); err != nil {
			return "", err
		}
	}
	if fromArchive {
		if err := linkOrCopy(source, b.newEnvoy()); err != nil {
			return "", err
		}
	} else {
		b.say("INFO", "downloading Envoy from "+redact(source))
		archive, err := create(b.newArchive(), 0o600)
		if err != nil {
			return "", err
		}
		defer archive.Close()
		if err := b.download(ctx, source, archive); err != nil {
			var pathErr *fs.PathError
			if errors.As(err, &pathErr) && pathErr.Op == "write" {
				return "", pathErr // our disk's, not the source's
			}
			return "", err
		}
		into, err := create(b.newEnvoy(), 0o755)
		if err != nil {
			return "", err
		}
		err = unpackEnvoy(archive, into)
		if err == nil {
			err = into.Sync()
		}
		if err := errors.Join(err, into.Close()); err != nil {
			return "", err
		}
	}
	if err := checkBinary(b.newEnvoy()); err != nil {
		return "", fmt.Errorf("%w: %w", errBinary, err)
	}
	version, err = b.envoyVersion(ctx, filepath.Join(filepath.Dir(EnvoyBinary), ".envoy.new"))
	if err != nil {
		return "", err
	}
	unlock, err := b.lockInstall(ctx)
	if err != nil {
		return "", err
	}
	defer unlock()
	if err := b.markRestart(); err != nil {
		return "", err
	}
	if err := b.upgrade(b.newEnvoy(), EnvoyBinary); err != nil {
		return "", err
	}
	return version, nil
}

// writeNew makes a new file with this text, on the disk when it returns.
func writeNew(path string, text []byte, mode fs.FileMode) error {
	f, err := create(path, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// fileSum is the SHA-256 of a file.
func fileSum(name string) (sum [sha256.Size]byte, err error) {
	f, err := os.Open(name)
	if err != nil {
		return sum, err
	}
	defer f.Close()
	hash := sha256.New()
	if _, err := io.Copy(hash, f); err != nil {
		return sum, err
	}
	return [sha256.Size]byte(hash.Sum(nil)), nil
}

// create makes a new file, and follows no link that stands in its place.
func create(path string, mode fs.FileMode) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW, mode)
	if err != nil {
		return nil, err
	}
	return f, f.Chmod(mode)
}

// linkOrCopy makes to another name of the file from, or a copy where they are on different disks. Binaries are only ever replaced, never written
// to, so a shared inode is safe.
func linkOrCopy(from, to string) error {
	err := os.Link(from, to)
	if err == nil || !errors.Is(err, syscall.EXDEV) && !errors.Is(err, syscall.EPERM) && !errors.Is(err, syscall.EMLINK) {
		return err
	}
	return copyFile(from, to, 0o755)
}

func copyFile(from, to string, mode fs.FileMode) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := create(to, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	if err == nil {
		err = out.Sync()
	}
	if err = errors.Join(err, out.Close()); err != nil {
		_ = os.Remove(to)
	}
	return err
}

var versionForm = regexp.MustCompile(`/(\d+)\.(\d+)\.(\d+)[-/]`)

// envoyVersion runs the binary, as Envoy's user, and returns its version: fs.ErrNotExist when there
// is none, errBinary when it is no Envoy that can be used, and errUntold when it was not let run to
// its end.
func (b *bootstrapper) envoyVersion(ctx context.Context, binary string) (string, error) {
	if _, err := os.Stat(b.path(binary)); err != nil {
		return "", err
	}
	as, err := b.envoyCredential()
	if err != nil {
		return "", err
	}
	out, err := b.execAs(ctx, 20*time.Second, as, b.path(binary), "--version")
	if err != nil {
		kind := errUntold
		if failedByItself(err) {
			kind = errBinary
		}
		return "", fmt.Errorf("%w: %w", kind, said(err, out))
	}
	m := versionForm.FindStringSubmatch(out)
	if m == nil {
		return "", fmt.Errorf("%w: it does not say its version: %.80q", errBinary, out)
	}
	version := strings.Join(m[1:4], ".")
	for i, part := range m[1:4] {
		n, err := strconv.Atoi(part)
		if err != nil || n < MinimumEnvoy[i] {
			return version, fmt.Errorf("%w: version %s is too old, want %d.%d.%d or later", errBinary, version,
				MinimumEnvoy[0], MinimumEnvoy[1], MinimumEnvoy[2])
		}
		if n > MinimumEnvoy[i] {
			break
		}
	}
	return version, nil
}

// failedByItself says that a command failed for what it is, and will again: the kernel cannot run it
// (ENOENT: the loader it names is not there), or it gave up. A time-out, a signal and a fork that
// failed say more of the VM: a slow disk, no memory.
func failedByItself(err error) bool {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.Exited()
	}
	for _, errno := range []syscall.Errno{syscall.ENOEXEC, syscall.EACCES, syscall.ENOENT, syscall.ELIBBAD} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

// envoyCredential is Envoy's user, for what is run in its place; nil beneath another root, where nothing is owned.
func (b *bootstrapper) envoyCredential() (*syscall.Credential, error) {
	if b.Root != "" {
		return nil, nil
	}
	uid, gid, err := lookup(EnvoyUser)
	if err != nil {
		return nil, err
	}
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
}

func lookup(name string) (uid, gid int, err error) {
	u, err := user.Lookup(name)
	if err != nil {
		return 0, 0, err
	}
	uid, errU := strconv.Atoi(u.Uid)
	gid, errG := strconv.Atoi(u.Gid)
	return uid, gid, errors.Join(errU, errG)
}

// letEnvoyRead makes a file of ours root:envoy.
func (b *bootstrapper) letEnvoyRead(name string) error {
	if b.Root != "" {
		return nil
	}
	_, gid, err := lookup(EnvoyUser)
	if err != nil {
		return err
	}
	return os.Lchown(name, 0, gid)
}

// configureEnvoy writes Envoy's configuration when it has changed and Envoy accepts it.
func (b *bootstrapper) configureEnvoy(ctx context.Context, cfg attribute.Config, vm VM) *Failure {
	fail := func(err error) *Failure { return diskFailure(StepConfigure, err) }
	text, err := envoyConfig(cfg, vm, b.caFile())
	if err != nil {
		return fail(err)
	}
	target := b.path(EnvoyConfig)
	_, restart := os.Lstat(b.path(restartFile))
	if have, err := os.ReadFile(target); err == nil && bytes.Equal(have, text) && restart != nil {
		return nil // and this Envoy has accepted it before
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return fail(err)
	}
	temp := b.newConfig()
	defer os.Remove(temp)
	if err := writeNew(temp, text, 0o640); err != nil {
		return fail(err)
	}
	if err := b.letEnvoyRead(temp); err != nil {
		return fail(err)
	}
	as, err := b.envoyCredential()
	if err != nil {
		return fail(err)
	}
	if out, err := b.execAs(ctx, time.Minute, as, b.path(EnvoyBinary), "--mode", "validate", "-l", "error", "-c", temp); err != nil {
		return &Failure{Step: StepConfigure, Err: fmt.Errorf("Envoy %s refuses its configuration: %w", b.state.EnvoyVersion, said(err, out)),
			Advice: "install another Envoy by primary-source, or report this", Permanent: true}
	}
	if have, err := os.ReadFile(target); err == nil && bytes.Equal(have, text) {
		return nil
	}
	if err := b.markRestart(); err != nil {
		return fail(err)
	}
	if err := os.Rename(temp, target); err != nil {
		return fail(err)
	}
	b.say("INFO", "wrote Envoy's configuration, node "+"projects/"+vm.ProjectNumber+"/…/"+vm.Name)
	return nil
}

// markRestart remembers, before the change, that the Envoy that runs is not what is installed: a run that is cut short is made good by the next.
func (b *bootstrapper) markRestart() error {
	return atomicfile.Write(b.path(restartFile), nil, 0o600)
}

// makeLogs makes the access log's folder, and outside logs.Dir, which Envoy's sandbox would refuse, sees to the right to write there. logs.Dir itself is made by tmpfiles.d.
func (b *bootstrapper) makeLogs(ctx context.Context, cfg attribute.Config) *Failure {
	fail := func(err error) *Failure { return diskFailure(StepLogs, err) }
	outside, name := "", filepath.Clean(cfg.AccessLog)
	if dir := filepath.Dir(name); cfg.AccessLog != "" && dir != logs.Dir && dir != "/dev" { // /dev/stdout is envoy.out.log
		if !logs.InDir(name) {
			outside = dir
		}
		if err := logs.Make(b.Root, name, b.giveToEnvoy); err != nil {
			f := fail(fmt.Errorf("make the access log: %w", err))
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, untrusted.ErrLink) {
				f.Advice = "give access-log a path in a folder that exists, " + logs.Dir + " for instance"
			}
			return f
		}
	}
	changed, err := systemd.SetWritable(b.Root+"/", systemd.EnvoyUnit, outside)
	if err != nil {
		return fail(err)
	}
	if changed {
		if err := b.markRestart(); err != nil {
			return fail(err)
		}
	}
	rotation, err := systemd.SetWritable(b.Root+"/", systemd.RotateUnit, outside)
	if err != nil {
		return fail(err)
	}
	if changed || rotation {
		if out, err := b.exec(ctx, time.Minute, "systemctl", "daemon-reload"); err != nil {
			return fail(said(err, out))
		}
	}
	return nil
}

// giveToEnvoy makes Envoy's user the owner of an open file.
func (b *bootstrapper) giveToEnvoy(f *os.File) error {
	if b.Root != "" {
		return nil
	}
	uid, gid, err := lookup(EnvoyUser)
	if err != nil {
		return err
	}
	return f.Chown(uid, gid)
}

// startEnvoy starts Envoy's unit, or restarts it, draining, when what it runs with has changed, and waits for its admin interface.
func (b *bootstrapper) startEnvoy(ctx context.Context) *Failure {
	if f := b.enable(ctx, systemd.EnvoyUnit); f != nil {
		f.Step = StepStart
		return f
	}
	before, err := systemd.UnitState(ctx, systemd.EnvoyUnit)
	if err != nil {
		return &Failure{Step: StepStart, Err: err}
	}
	marker := b.path(restartFile)
	_, changed := os.Lstat(marker)
	verb := "start"
	if before.Active == "active" && changed == nil {
		verb = "restart"
		b.say("INFO", "restarting Envoy, draining its connections")
	}
	if before.Active != "active" || verb == "restart" {
		if out, err := b.exec(ctx, 2*time.Minute, "systemctl", verb, systemd.EnvoyUnit); err != nil {
			return &Failure{Step: StepStart, Err: said(err, out), Advice: "see journalctl -u " + systemd.EnvoyUnit}
		}
	}
	if err := b.waitForAdmin(ctx, 20*time.Second); err != nil {
		return &Failure{Step: StepStart, Err: err, Advice: "see " + logs.Dir + "/envoy.err.log"}
	}
	if err := os.Remove(marker); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return diskFailure(StepStart, err)
	}
	return nil
}

// waitForAdmin waits until Envoy's admin port accepts: Envoy has read its configuration then. It need not have heard from the control plane: that is the
// agent's to watch.
func (b *bootstrapper) waitForAdmin(ctx context.Context, limit time.Duration) error {
	deadline := time.Now().Add(limit)
	for {
		conn, err := net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", attribute.AdminPort), time.Second)
		if err == nil {
			conn.Close()
			return nil
		}
		if time.Now().After(deadline) || !sleep(ctx, 100*time.Millisecond) {
			state, stateErr := systemd.UnitState(ctx, systemd.EnvoyUnit)
			if stateErr != nil {
				return fmt.Errorf("Envoy does not answer on its admin port: %w", err)
			}
			return fmt.Errorf("Envoy does not answer on its admin port; its unit is %s (%s), exit code %d, %d restarts; last line of its log: %s",
				state.Active, state.Sub, state.ExitCode, state.Restarts, b.lastLogLine())
		}
	}
}

func (b *bootstrapper) lastLogLine() string {
	f, err := untrusted.Open(b.path(logs.Dir + "/envoy.err.log"))
	if err != nil {
		return "(none)"
	}
	defer f.Close()
	end := &tail{}
	if info, err := f.Stat(); err == nil && info.Size() > maxTail {
		_, _ = f.Seek(-maxTail-1, io.SeekEnd) // more than it keeps: it sees that this is not all
	}
	_, _ = io.Copy(end, io.LimitReader(f, maxTail+1))
	return fmt.Sprintf("%.300s", cmp.Or(lastLine(end.String()), "(none)"))
}
