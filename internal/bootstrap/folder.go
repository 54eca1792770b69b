package bootstrap

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

var errForeignLink = errors.New("it is a link that another user may have put there")

// openFolder opens the folder with this absolute path beneath root, part by part: what we make, own and truncate for Envoy's user, who is not trusted, must not
// be elsewhere, and that user may put a link at any place in its folders. A link is followed only where nobody but us can have put it: /var/log may well be one.
func openFolder(root, name string) (*os.File, error) {
	fail := func(err error) (*os.File, error) { return nil, &fs.PathError{Op: "open", Path: name, Err: err} }
	dir, err := os.Open(root + "/")
	if err != nil {
		return nil, err
	}
	defer func() { dir.Close() }()
	parts := split(name)
	for links := 0; len(parts) > 0; {
		next, err := openIn(dir, parts[0], unix.O_RDONLY|unix.O_DIRECTORY, 0)
		target, link := "", false
		if err != nil {
			target, link = readLink(dir, parts[0])
		}
		switch {
		case link && !oursAlone(dir):
			return fail(fmt.Errorf("%q: %w", parts[0], errForeignLink))
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

// openIn opens a file of the folder, and follows no link there.
func openIn(dir *os.File, name string, flags int, mode uint32) (*os.File, error) {
	fd, err := unix.Openat(int(dir.Fd()), name, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, mode)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
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
	return unix.Fstat(int(dir.Fd()), &info) == nil && int(info.Uid) == os.Geteuid() && info.Mode&0o022 == 0
}
