// Package untrusted opens files and folders where another user, who is not trusted, may have put
// something else in their place: a link, a FIFO, a second name of a file that is not theirs, a file
// without end. What is read is still that user's word: whether to believe it is up to the caller.
//
// Whoever replaces such a file uses atomicfile, which follows no link either.
package untrusted

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// Why something was not opened. Test for them with errors.Is.
var (
	ErrLink       = errors.New("it is a link that another user may have put there")
	ErrNotRegular = errors.New("not a regular file")
)

// OpenFolder opens the folder with this absolute path beneath root, part by part: what we make, own
// and truncate for Envoy's user must not be elsewhere, and that user may put a link at any place in
// its folders. A link is followed only where nobody but us can have put it: /var/log may well be
// one.
func OpenFolder(root, name string) (*os.File, error) {
	fail := func(err error) (*os.File, error) {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	dir, err := os.Open(root + "/")
	if err != nil {
		return nil, err
	}
	defer func() { dir.Close() }()
	parts := split(name)
	for links := 0; len(parts) > 0; {
		next, err := OpenIn(dir, parts[0], unix.O_RDONLY|unix.O_DIRECTORY, 0)
		target, link := "", false
		if err != nil {
			target, link = readLink(dir, parts[0])
		}
		switch {
		case link && !oursAlone(dir):
			return fail(fmt.Errorf("%q: %w", parts[0], ErrLink))
		case link:
			if links++; links > 40 { // path_resolution(7)
				return fail(unix.ELOOP)
			}
			if parts = append(split(target), parts[1:]...); !path.IsAbs(target) {
				continue
			}
			if next, err = os.Open(root + "/"); err != nil {
				return nil, err
			}
		case err != nil:
			return fail(err)
		default:
			parts = parts[1:]
		}
		dir.Close()
		dir = next
	}
	opened := dir
	dir = nil // a nil file's Close is an error that nobody sees
	return opened, nil
}

func split(name string) []string {
	return strings.FieldsFunc(name, func(r rune) bool { return r == '/' })
}

// OpenIn opens a file of the folder, and follows no link there.
func OpenIn(dir *os.File, name string, flags int, mode uint32) (*os.File, error) {
	flags |= unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC
	fd, err := unix.Openat(int(dir.Fd()), name, flags, mode)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// OpenFolderIn opens a folder of the folder. A link in its place is ErrLink.
func OpenFolderIn(dir *os.File, name string) (*os.File, error) {
	f, err := OpenIn(dir, name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err == nil {
		return f, nil
	}
	if _, link := readLink(dir, name); link {
		return nil, ErrLink
	}
	return nil, err
}

func readLink(dir *os.File, name string) (target string, ok bool) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(int(dir.Fd()), name, buf)
	if err != nil || n == len(buf) {
		return "", false
	}
	return string(buf[:n]), true
}

// oursAlone says that nobody but us can make a link in the folder.
func oursAlone(dir *os.File) bool {
	var info unix.Stat_t
	return unix.Fstat(int(dir.Fd()), &info) == nil && int(info.Uid) == os.Geteuid() &&
		info.Mode&0o022 == 0
}

// OpenRegular opens a file to read, if it is one: whatever else has its name, a FIFO above all,
// would be waited for. It follows links: the name is somebody's who is trusted.
func OpenRegular(name string) (*os.File, error) { return openRegular(name, 0) }

func openRegular(name string, flags int) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC|flags, 0)
	if err != nil {
		return nil, err
	}
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		f.Close()
		return nil, errors.Join(err, &fs.PathError{Op: "open", Path: name, Err: ErrNotRegular})
	}
	return f, nil
}

// Open opens a file to read in a folder of another user, who may have put anything there: a link,
// or a second name of a file that is not theirs, is not followed. A file without a name was
// replaced just now; who opens another's file by a second name cannot take the first away.
func Open(name string) (*os.File, error) {
	f, err := openRegular(name, unix.O_NOFOLLOW)
	if err != nil {
		return nil, err
	}
	var info unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &info); err != nil || info.Nlink > 1 {
		f.Close()
		return nil, errors.Join(err, &fs.PathError{Op: "open", Path: name, Err: ErrLink})
	}
	return f, nil
}

// ReadFile reads such a file, which is an error when it is larger than limit.
func ReadFile(name string, limit int64) ([]byte, error) {
	f, err := Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(text)) > limit {
		err = fmt.Errorf("larger than %d bytes", limit)
		err = &fs.PathError{Op: "read", Path: name, Err: err}
	}
	if err != nil {
		return nil, err
	}
	return text, nil
}
