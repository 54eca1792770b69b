package bootstrap

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/internal/untrusted"
)

// maxLog is the size at which a log is rotated; with one old copy kept, and a minute between looks, a log's share of the disk is
// about 150 MB at worst (1,000 lines a second).
const maxLog = 64 << 20

// RotateLogs copies each log of LogDir, and the access log wherever it is, that is larger than 64 MiB to NAME.1 and truncates it in place. Where there is no room
// for the copy it only truncates: a full disk is worse than a lost log.
func RotateLogs(opts Options) error {
	b := newBootstrapper(opts)
	return errors.Join(rotateLogs(b.path(LogDir), maxLog), b.rotateAccessLog(maxLog))
}

// rotateAccessLog rotates what Envoy's configuration names as the access log. (Not what the state names: the daemon's user, who writes there, could have root
// truncate any file.)
func (b *bootstrapper) rotateAccessLog(limit int64) error {
	text, err := os.ReadFile(b.path(EnvoyConfig))
	if errors.Is(err, os.ErrNotExist) {
		return nil // bootstrap has not come so far
	}
	if err != nil {
		return fmt.Errorf("rotate the access log: %w", err)
	}
	var config struct {
		Node struct {
			Metadata map[string]any `json:"metadata"`
		} `json:"node"`
	}
	if err := json.Unmarshal(text, &config); err != nil {
		return fmt.Errorf("rotate the access log: %q: %w", EnvoyConfig, err)
	}
	name, ok := config.Node.Metadata[accessLogKey].(string)
	if !ok || filepath.Dir(name) == "/dev" {
		return nil
	}
	dir, err := untrusted.OpenFolder(b.Root, filepath.Dir(name))
	if errors.Is(err, os.ErrNotExist) {
		return nil // Envoy may still make it
	}
	if err != nil {
		return fmt.Errorf("rotate the access log: %w", err)
	}
	defer dir.Close()
	if err := rotate(int(dir.Fd()), filepath.Base(name), limit); err != nil {
		return fmt.Errorf("rotate %q: %w", name, err)
	}
	return nil
}

func rotateLogs(folder string, limit int64) error {
	dir, err := os.OpenFile(folder, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil // bootstrap has not come so far
	}
	if err != nil {
		return fmt.Errorf("rotate logs: %w", err)
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return fmt.Errorf("rotate logs: %w", err)
	}
	var errs []error
	for _, name := range names {
		if !strings.HasSuffix(name, ".log") {
			continue
		}
		if err := rotate(int(dir.Fd()), name, limit); err != nil {
			errs = append(errs, fmt.Errorf("rotate %q: %w", filepath.Join(folder, name), err))
		}
	}
	return errors.Join(errs...)
}

// rotate works by openat alone: Envoy's user, who is not trusted, can make files and links in the folder.
func rotate(dir int, name string, limit int64) error {
	fd, err := unix.Openat(dir, name, unix.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EISDIR) || errors.Is(err, unix.ENXIO) {
		return nil // a link, gone again, a folder, a socket
	}
	if err != nil {
		return err
	}
	file := os.NewFile(uintptr(fd), name)
	defer file.Close()
	var info unix.Stat_t
	if err := unix.Fstat(fd, &info); err != nil {
		return err
	}
	// A second name may be a file elsewhere that Envoy's user has linked here.
	if info.Mode&unix.S_IFMT != unix.S_IFREG || info.Nlink != 1 || info.Size <= limit {
		return nil
	}
	err = copyLog(dir, file, name+".1", info)
	if err != nil {
		_ = unix.Unlinkat(dir, name+".1", 0) // half a copy
	}
	return errors.Join(file.Truncate(0), err)
}

func copyLog(dir int, from *os.File, to string, info unix.Stat_t) error {
	if err := unix.Unlinkat(dir, to, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	fd, err := unix.Openat(dir, to, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, info.Mode&0o640)
	if err != nil {
		return err
	}
	file := os.NewFile(uintptr(fd), to)
	// Not more than was there at the look: a writer as fast as we would never let it end.
	_, err = io.Copy(file, io.LimitReader(from, info.Size))
	return errors.Join(err, file.Close())
}
