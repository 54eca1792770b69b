package logs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/internal/untrusted"
)

// maxSize is the size at which a log is rotated. With one old copy kept, and a minute between
// looks, a log's share of the disk is about 150 MB at worst (1,000 lines a second).
const maxSize = 64 << 20

// Rotate copies each log of Dir, and the access log wherever it is, that is larger than 64 MiB to
// NAME.1 and truncates it in place. Where there is no room for the copy it only truncates: a full
// disk is worse than a lost log. Both are beneath root; accessLog may be "".
// See docs/design/facts.md#envoy-keeps-its-log.
func Rotate(root, accessLog string) error {
	return errors.Join(rotateFolder(filepath.Join(root, Dir), maxSize),
		rotateAccessLog(root, accessLog, maxSize))
}

func rotateAccessLog(root, name string, limit int64) error {
	if name == "" || filepath.Dir(name) == "/dev" {
		return nil
	}
	dir, err := untrusted.OpenFolder(root, filepath.Dir(name))
	if errors.Is(err, fs.ErrNotExist) {
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

func rotateFolder(folder string, limit int64) error {
	dir, err := os.OpenFile(folder, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
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

// rotate works by openat alone: Envoy's user, who is not trusted, can make files and links in the
// folder.
func rotate(dir int, name string, limit int64) error {
	const flags = unix.O_RDWR | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC
	fd, err := unix.Openat(dir, name, flags, 0)
	switch {
	case errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENOENT),
		errors.Is(err, unix.EISDIR), errors.Is(err, unix.ENXIO):
		return nil // a link, gone again, a folder, a socket
	case err != nil:
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
	const flags = unix.O_WRONLY | unix.O_CREAT | unix.O_EXCL | unix.O_NOFOLLOW | unix.O_CLOEXEC
	fd, err := unix.Openat(dir, to, flags, info.Mode&0o640)
	if err != nil {
		return err
	}
	file := os.NewFile(uintptr(fd), to)
	// Not more than was there at the look: a writer as fast as we would never let it end.
	_, err = io.Copy(file, io.LimitReader(from, info.Size))
	return errors.Join(err, file.Close())
}

// Empty takes away all that was logged in Dir, beneath root: another VM's. The files that systemd
// opens for Envoy stay, empty.
func Empty(root string) error {
	dir, err := os.OpenFile(filepath.Join(root, Dir),
		os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("empty the logs: %w", err)
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	errs := []error{err}
	for _, name := range names {
		if name != "envoy.err.log" && name != "envoy.out.log" {
			errs = append(errs, os.RemoveAll(filepath.Join(root, Dir, name)))
			continue
		}
		// A link of Envoy's user is not followed, and a second name of a file elsewhere is none of
		// theirs to empty.
		file, err := untrusted.OpenIn(dir, name, os.O_WRONLY, 0)
		if err != nil {
			errs = append(errs, os.Remove(filepath.Join(root, Dir, name)))
			continue
		}
		var info unix.Stat_t
		if err := unix.Fstat(int(file.Fd()), &info); err == nil && info.Nlink == 1 &&
			info.Mode&unix.S_IFMT == unix.S_IFREG {
			errs = append(errs, file.Truncate(0))
		} else {
			errs = append(errs, err)
		}
		file.Close()
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("empty the logs: %w", err)
	}
	return nil
}
