package bootstrap

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/internal/atomicfile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// installWait is how long an installation waits for another one, which takes seconds.
var installWait = 3 * time.Minute

// lockInstall keeps others from putting binaries into place meanwhile: OS Config's recipe, a
// startup-script, a rollback and bootstrap itself may come at the same time. It is apart from
// bootstrap's own lock, which is held for as long as bootstrap tries: a new archive may be what it
// waits for.
func (b *bootstrapper) lockInstall(ctx context.Context) (unlock func(), err error) {
	deadline := time.Now().Add(installWait)
	name := b.path(installLock)
	for waited := false; ; {
		f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return nil, fmt.Errorf("take the installation's lock: %w", err)
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil && isStill(f, name) { // Remove takes the file away
			return func() { f.Close() }, nil
		}
		f.Close()
		if err == nil {
			continue
		}
		if !waited {
			waited = true
			b.Log.Info("waiting for another installation to end", zap.String("lock", installLock))
		}
		if time.Now().After(deadline) || !sleep(ctx, 100*time.Millisecond) {
			return nil, fmt.Errorf("take the installation's lock %q: another installation has not ended within %v; find it with fuser -v %s, and try again",
				installLock, installWait, installLock)
		}
	}
}

// isStill says that the open file still has this name.
func isStill(f *os.File, name string) bool {
	open, errF := f.Stat()
	named, errN := os.Lstat(name)
	return errF == nil && errN == nil && os.SameFile(open, named)
}

// rolledBack is what Rollback has taken out, and what is not installed again: a startup-script
// brings the same archive at every boot, and bootstrap looks at primary-source. It is not in the
// state, which may be lost.
type rolledBack struct {
	Agent       string `json:"agent,omitempty"`        // the binary's SHA-256
	EnvoySource string `json:"envoy_source,omitempty"` // State.PrimarySum
}

func (b *bootstrapper) readRolledBack() (back rolledBack, err error) {
	text, err := os.ReadFile(b.path(rolledBackFile))
	if errors.Is(err, fs.ErrNotExist) {
		return back, nil
	}
	if err == nil {
		err = json.Unmarshal(text, &back)
	}
	if err != nil {
		return rolledBack{}, fmt.Errorf("read what was rolled back: %w; remove %q", err, rolledBackFile)
	}
	return back, nil
}

func (b *bootstrapper) writeRolledBack(back rolledBack) error {
	text, err := json.Marshal(back)
	if err != nil {
		return err
	}
	return atomicfile.Write(b.path(rolledBackFile), append(text, '\n'), 0o644)
}

// wasRolledBack says that the Envoy of this source was taken out by Rollback. Once another source
// is wanted that is forgotten: to want this one again is a new wish.
func (b *bootstrapper) wasRolledBack(ctx context.Context, source string) (bool, error) {
	back, err := b.readRolledBack()
	if err != nil || source == "" || back.EnvoySource == "" || back.EnvoySource == progress.Sum(source) {
		return source != "" && back.EnvoySource == progress.Sum(source), err
	}
	unlock, err := b.lockInstall(ctx)
	if err != nil {
		return false, err
	}
	defer unlock()
	if back, err = b.readRolledBack(); err != nil {
		return false, err
	}
	back.EnvoySource = ""
	return false, b.writeRolledBack(back)
}

// upgrade moves the new file to the installed path, and what was there to previousDir, which holds
// what one upgrade has replaced and nothing older: a rollback shall not bring back what an upgrade
// of long ago has replaced.
func (b *bootstrapper) upgrade(fresh, installed string) error {
	_, err := os.Lstat(b.path(installed))
	if err := b.replace(fresh, installed); err != nil {
		return err
	}
	if err != nil { // the first one
		return nil
	}
	for _, other := range []string{AgentBinary, EnvoyBinary} {
		if other == installed {
			continue
		}
		if err := os.Remove(b.previous(other)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// previous is where the binary is kept that the last upgrade has replaced.
func (b *bootstrapper) previous(installed string) string {
	return b.path(filepath.Join(previousDir, filepath.Base(installed)))
}

// replace moves the new file to the installed path, and what was there to previousDir.
func (b *bootstrapper) replace(fresh, installed string) error {
	target := b.path(installed)
	if _, err := os.Lstat(target); err == nil {
		previous := b.previous(installed)
		if err := os.MkdirAll(filepath.Dir(previous), 0o755); err != nil {
			return err
		}
		temp := previous + ".new"
		_ = os.Remove(temp)
		if err := linkOrCopy(target, temp); err != nil {
			return err
		}
		if err := os.Rename(temp, previous); err != nil {
			return err
		}
	}
	if err := os.Rename(fresh, target); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(target))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// Rollback swaps agent or Envoy, whichever the last upgrade has replaced, with what was there
// before, restarts it (Envoy draining), and returns what it did, one line each. What it has taken
// out is not installed again until another archive or primary-source comes. A second Rollback goes
// back.
func Rollback(ctx context.Context, opts Options) (done []string, err error) {
	b := newBootstrapper(opts)
	if b.Root == "" && os.Geteuid() != 0 {
		return nil, fmt.Errorf("roll back: %w; run as root", fs.ErrPermission)
	}
	unlock, err := b.lockInstall(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	var swap []string
	for _, installed := range []string{AgentBinary, EnvoyBinary} {
		if _, err := os.Stat(b.previous(installed)); err == nil {
			swap = append(swap, installed)
		}
	}
	if len(swap) == 0 {
		return nil, fmt.Errorf("roll back: nothing was upgraded here: %q is empty", previousDir)
	}
	systemctl := func(limit time.Duration, args ...string) error {
		if out, err := b.exec(ctx, limit, "systemctl", args...); err != nil {
			return fmt.Errorf("roll back: %w", said(err, out))
		}
		return nil
	}
	// A bootstrap under way would write its own state over this one, or install what it is just
	// downloading.
	if err := systemctl(time.Minute, "stop", systemd.BootstrapUnit); err != nil {
		return nil, err
	}
	state, noState := progress.Read(b.path(progress.StateDir))
	back, err := b.readRolledBack()
	if err != nil {
		return nil, fmt.Errorf("roll back: %w", err)
	}
	for _, installed := range swap {
		if installed == AgentBinary {
			sum, err := fileSum(b.path(installed))
			if err != nil {
				return done, fmt.Errorf("roll back %q: %w", installed, err)
			}
			back.Agent = hex.EncodeToString(sum[:])
		} else {
			back.EnvoySource = state.PrimarySum
			state.PreviousSource, state.EnvoySource = state.EnvoySource, state.PreviousSource
			state.PreviousSum, state.PrimarySum = state.PrimarySum, state.PreviousSum
		}
		// Before the swap: what is cut short between the two is done by the next Rollback.
		if err := b.writeRolledBack(back); err != nil {
			return done, fmt.Errorf("roll back %q: %w", installed, err)
		}
		temp, err := b.temp(installed)
		if err != nil {
			return done, fmt.Errorf("roll back %q: %w", installed, err)
		}
		if err := linkOrCopy(b.previous(installed), temp); err != nil {
			return done, fmt.Errorf("roll back %q: %w", installed, err)
		}
		if err := b.replace(temp, installed); err != nil {
			return done, fmt.Errorf("roll back %q: %w", installed, err)
		}
		done = append(done, "brought back the previous "+installed)
	}
	if noState == nil {
		noState = progress.Write(b.path(progress.StateDir), state)
	}
	if noState != nil {
		b.Log.Warn("the state does not know where this Envoy is from", zap.Error(noState))
	}
	for _, installed := range swap {
		if installed == EnvoyBinary {
			if err := systemctl(2*time.Minute, "try-restart", systemd.EnvoyUnit); err != nil {
				return done, err
			}
			done = append(done, "restarted "+systemd.EnvoyUnit+", draining its connections")
			continue
		}
		if out, err := b.exec(ctx, time.Minute, b.path(AgentBinary), "bootstrap", "--install-units"); err != nil {
			return done, fmt.Errorf("install the previous units: %w", said(err, out))
		}
		if err := systemctl(time.Minute, "restart", systemd.AgentUnit); err != nil {
			return done, err
		}
		done = append(done, "restarted "+systemd.AgentUnit)
	}
	// It looks whether all is as the attribute wants it for this version; where the administrator
	// lets it.
	if out, _ := b.exec(ctx, time.Minute, "systemctl", "is-enabled", systemd.BootstrapUnit); strings.HasPrefix(out, "masked") {
		return done, nil
	}
	return done, systemctl(time.Minute, "start", "--no-block", systemd.BootstrapUnit)
}

// temp is a new name beside the installed path. What others have left there, cut short, goes: the
// lock is held.
func (b *bootstrapper) temp(installed string) (string, error) {
	dir, prefix := filepath.Split(b.path(installed))
	prefix = "." + prefix + ".new-"
	left, err := filepath.Glob(filepath.Join(dir, prefix+"*"))
	if err != nil {
		return "", err
	}
	for _, path := range left {
		if err := os.Remove(path); err != nil {
			return "", err
		}
	}
	f, err := os.CreateTemp(dir, prefix)
	if err != nil {
		return "", err
	}
	// The name is ours alone now; a link needs it free.
	return f.Name(), errors.Join(f.Close(), os.Remove(f.Name()))
}
