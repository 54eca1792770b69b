package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/internal/layout"
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
			return nil, fmt.Errorf("take the installation's lock %q: another installation has not "+
				"ended within %v; find it with fuser -v %s, and try again",
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
	for _, other := range b.upgraded() {
		if other == installed {
			continue
		}
		if err := os.Remove(b.previous(other)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// upgraded are the binaries that bootstrap upgrades.
func (b *bootstrapper) upgraded() []string {
	if layout.Here.Packaged {
		return []string{EnvoyBinary}
	}
	return []string{layout.Here.Agent, EnvoyBinary}
}

// previous is where the binary is kept that the last upgrade has replaced.
func (b *bootstrapper) previous(installed string) string {
	return b.path(b.previousOf(installed))
}

func (b *bootstrapper) previousOf(installed string) string {
	return filepath.Join(previousDir, filepath.Base(installed))
}

// replace moves the new file to the installed path, and what was there to previousDir.
func (b *bootstrapper) replace(fresh, installed string) error {
	target := b.path(installed)
	h, err := b.readHandover()
	if err != nil {
		return err
	}
	// Theirs is nothing that a rollback should bring back.
	theirs := installed == layout.Here.Agent && h.kept(layout.Here.Agent) && !isOurBinary(target)
	if _, err := os.Lstat(target); err == nil && !theirs {
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
