package bootstrap

import (
	"crypto/sha256"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/internal/layout"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// Temporary files, all of them under these names, so that what a power cut leaves is found again.
const (
	newEnvoyBinary = "/usr/local/bin/.envoy.new" // beside layout.Envoy
	newArchive     = layout.KeptDir + "/.archive.new"
	// Until Envoy has accepted it. Envoy tells the format by the name's end.
	newConfig = "/etc/service-proxy-agent/.envoy.new.json"
)

func (b *bootstrapper) removeTemps() {
	for _, name := range []string{newConfig, newEnvoyBinary, newArchive} {
		_ = os.Remove(b.path(name)) // what cannot be removed fails the creation after this
	}
}

// removeLeftovers takes away what a power cut has left of files being replaced (atomicfile's random
// names) in folders that no one else cleans.
func (b *bootstrapper) removeLeftovers() {
	names := []string{filepath.Join(progress.StateDir, progress.StateFile), EnvoyConfig,
		progress.OwnerFile}
	if !layout.Here.Packaged {
		for _, file := range systemd.Files() {
			names = append(names, file.Path)
		}
		names = append(names, shared...)
	}
	for _, name := range names {
		dir, base := filepath.Split(name)
		left, err := filepath.Glob(b.path(dir + "." + base + ".*"))
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

// linkOrCopy makes to another name of the file from, or a copy where they are on different disks.
// Binaries are only ever replaced, never written to, so a shared inode is safe.
func linkOrCopy(from, to string) error {
	err := os.Link(from, to)
	for _, errno := range []syscall.Errno{syscall.EXDEV, syscall.EPERM, syscall.EMLINK} {
		if errors.Is(err, errno) {
			return copyFile(from, to, 0o755)
		}
	}
	return err
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
