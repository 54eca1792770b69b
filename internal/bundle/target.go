package bundle

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Target is the file that a bundle is written to: under its name it is whole, or not there. Until
// Commit it has no name where the file system can do that, so that not even a process that is
// killed leaves anything behind. It is its owner's alone, and no link that somebody has planted is
// followed.
type Target struct {
	path    string
	replace bool
	f       *os.File
	temp    string // its name until then, where it must have one
}

// ErrExists says that the file is there and may not be replaced.
var ErrExists = errors.New("it is there already")

// Create makes the file, still without its name.
func Create(path string, replace bool) (*Target, error) { return create(path, replace, unix.Open) }

func create(path string, replace bool, open func(dir string, flags int, mode uint32) (int, error),
) (*Target, error) {
	t := &Target{path: path, replace: replace}
	info, err := os.Lstat(path)
	switch {
	case err == nil && info.IsDir():
		return nil, t.failed(errors.New("it is a folder; name a file"))
	case err == nil && !info.Mode().IsRegular() && replace:
		return nil, t.failed(errors.New("it is no regular file"))
	case err == nil && !replace:
		return nil, t.failed(ErrExists)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return nil, t.failed(err)
	}
	dir := filepath.Dir(path)
	fd, err := open(dir, unix.O_TMPFILE|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
	switch {
	case err == nil:
		t.f = os.NewFile(uintptr(fd), path)
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EISDIR), errors.Is(err, unix.EINVAL):
		if t.f, err = os.CreateTemp(dir, ".bundle-*"); err != nil {
			return nil, t.failed(err)
		}
		t.temp = t.f.Name()
	default:
		return nil, t.failed(err)
	}
	return t, nil
}

// Write writes to the file.
func (t *Target) Write(b []byte) (int, error) {
	n, err := t.f.Write(b)
	if err != nil {
		err = t.failed(err)
	}
	return n, err
}

// Commit gives the file its name.
func (t *Target) Commit() (err error) {
	defer t.Discard()
	// The umask has its say where the file was made.
	if err := t.f.Chmod(0o600); err != nil {
		return t.failed(err)
	}
	if err := t.f.Sync(); err != nil { // a full disk may say so only now
		return t.failed(err)
	}
	if t.temp == "" && !t.replace {
		return t.failed(t.link(t.path))
	}
	if t.temp == "" {
		name := filepath.Join(filepath.Dir(t.path), ".bundle-"+rand.Text())
		if err := t.link(name); err != nil {
			return t.failed(err)
		}
		t.temp = name
	}
	if t.replace {
		err = os.Rename(t.temp, t.path)
	} else if err = unix.Renameat2(unix.AT_FDCWD, t.temp, unix.AT_FDCWD, t.path,
		unix.RENAME_NOREPLACE); errors.Is(err, unix.EINVAL) {
		if err = os.Link(t.temp, t.path); err == nil {
			err = os.Remove(t.temp)
		}
	}
	if err == nil {
		t.temp = ""
	}
	return t.failed(err)
}

// link gives a file without a name one: open(2), O_TMPFILE.
func (t *Target) link(name string) error {
	return unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", t.f.Fd()), unix.AT_FDCWD, name,
		unix.AT_SYMLINK_FOLLOW)
}

// Discard leaves nothing of a file that was not committed.
func (t *Target) Discard() {
	t.f.Close()
	if t.temp != "" {
		os.Remove(t.temp)
		t.temp = ""
	}
}

func (t *Target) failed(err error) error {
	var of *fs.PathError
	if errors.As(err, &of) {
		err = of.Err
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, fs.ErrExist):
		err = ErrExists
	}
	return fmt.Errorf("write %q: %w", t.path, err)
}
