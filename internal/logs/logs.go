// Package logs makes the folders of Envoy's logs and rotates what is in them, as root in folders
// where Envoy's user, who is not trusted, can put anything: no link of that user's is followed.
//
// What is logged, and where, is the attribute's and package bootstrap's, which is before it in the
// flow. What is in a log is read by envoyadmin.
package logs

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/internal/untrusted"
)

// Dir is the folder of Envoy's logs, 1770 root:envoy, which tmpfiles.d makes.
const Dir = "/var/log/envoy"

// InDir says that the path is beneath Dir.
func InDir(name string) bool { return strings.HasPrefix(name, Dir+"/") }

// Make makes the access log's folder beneath root, and outside Dir, in a folder that may be
// another's, the file too. own gives what is made to Envoy's user.
func Make(root, name string, own func(*os.File) error) error {
	dir, err := makeFolder(root, filepath.Dir(name), own)
	if err != nil {
		return err
	}
	defer dir.Close()
	if InDir(name) {
		return nil
	}
	const flags = os.O_WRONLY | os.O_CREATE | os.O_EXCL
	file, err := untrusted.OpenIn(dir, filepath.Base(name), flags, 0o640)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return &fs.PathError{Op: "create", Path: name, Err: err}
	}
	return errors.Join(own(file), file.Close())
}

// makeFolder opens a folder for logs, made for Envoy's user where it is missing: beneath Dir with
// all that leads to it, elsewhere it alone, since a longer path that is missing is a slip of the
// pen, or a disk that is not mounted.
func makeFolder(root, name string, own func(*os.File) error) (dir *os.File, err error) {
	var parent *os.File
	if up := filepath.Dir(name); InDir(up) {
		parent, err = makeFolder(root, up, own)
	} else {
		parent, err = untrusted.OpenFolder(root, up)
	}
	if err != nil {
		return nil, err
	}
	defer parent.Close()
	err = unix.Mkdirat(int(parent.Fd()), filepath.Base(name), 0o750)
	switch {
	case errors.Is(err, fs.ErrExist) && !InDir(name):
		return untrusted.OpenFolder(root, name) // somebody else's, it may be
	case err != nil && !errors.Is(err, fs.ErrExist):
		return nil, &fs.PathError{Op: "mkdir", Path: name, Err: err}
	}
	dir, err = untrusted.OpenFolderIn(parent, filepath.Base(name)) // Dir is Envoy's, too
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	if err := own(dir); err != nil {
		dir.Close()
		return nil, err
	}
	return dir, nil
}
