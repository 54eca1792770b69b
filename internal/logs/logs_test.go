package logs

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/internal/untrusted"
)

func TestRotateFolder(t *testing.T) {
	dir, elsewhere := t.TempDir(), filepath.Join(t.TempDir(), "precious.log")
	big := strings.Repeat("x", 200)
	write(t, elsewhere, big)
	write(t, filepath.Join(dir, "envoy.err.log"), big)
	write(t, filepath.Join(dir, "small.log"), "small")
	write(t, filepath.Join(dir, "other.txt"), big)
	write(t, filepath.Join(dir, "linked.log"), big)
	for _, err := range []error{
		// as a file of others', linked here
		os.Link(filepath.Join(dir, "linked.log"), filepath.Join(t.TempDir(), "second-name")),
		os.Symlink(elsewhere, filepath.Join(dir, "symlink.log")),
		os.Symlink(elsewhere, filepath.Join(dir, "envoy.err.log.1")), // planted where the copy goes
		os.Mkdir(filepath.Join(dir, "folder.log"), 0o755),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	// The writer holds its file open for appending, as systemd opened it for Envoy.
	writer, err := os.OpenFile(filepath.Join(dir, "envoy.err.log"), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer writer.Close()
	if err := rotateFolder(dir, 100); err != nil {
		t.Fatal(err)
	}
	if _, err := writer.WriteString("new"); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"envoy.err.log": "new", "envoy.err.log.1": big, "small.log": "small", "other.txt": big, "linked.log": big,
	} {
		have, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || string(have) != want {
			t.Errorf("%s: %d bytes, want %d: %v", name, len(have), len(want), err)
		}
	}
	if have, err := os.ReadFile(elsewhere); err != nil || string(have) != big {
		t.Errorf("a link was followed: %q, %v", have, err)
	}
	if info, err := os.Lstat(filepath.Join(dir, "envoy.err.log.1")); err != nil ||
		!info.Mode().IsRegular() || info.Mode().Perm() != 0o640 {
		t.Errorf("the copy is %v, %v", info.Mode(), err)
	}
	if err := rotateFolder(filepath.Join(dir, "absent"), 100); err != nil {
		t.Errorf("without the folder: %v", err)
	}
}

// The access log is rotated wherever the configuration says, and no link that Envoy's user
// has planted is followed.
func TestRotateAccessLog(t *testing.T) {
	big := strings.Repeat("x", 200)
	for _, name := range []string{"/var/log/envoy/access", "/var/log/envoy/sub/access.json",
		"/srv/my logs/access.log"} {
		root := t.TempDir()
		if err := rotateAccessLog(root, "", 100); err != nil {
			t.Errorf("without an access log: %v", err)
		}
		mkdir(t, filepath.Join(root, "/elsewhere"), 0o755)
		write(t, filepath.Join(root, "/elsewhere/"+filepath.Base(name)), big)
		if err := rotateAccessLog(root, name, 100); err != nil {
			t.Errorf("%s: without a folder: %v", name, err)
		}
		mkdir(t, filepath.Join(root, filepath.Dir(filepath.Dir(name))), 0o1777)
		mkdir(t, filepath.Join(root, filepath.Dir(name)), 0o755)
		write(t, filepath.Join(root, name), big)
		if err := rotateAccessLog(root, name, 100); err != nil {
			t.Fatal(err)
		}
		if have, old := read(t, filepath.Join(root, name)),
			read(t, filepath.Join(root, name+".1")); have != "" || old != big {
			t.Errorf("%s: %d bytes, and %d in the copy", name, len(have), len(old))
		}

		// the log itself
		link(t, filepath.Join(root, "/elsewhere/"+filepath.Base(name)), filepath.Join(root, name))
		if err := rotateAccessLog(root, name, 100); err != nil {
			t.Errorf("%s: a link: %v", name, err)
		}
		link(t, filepath.Join(root, "/elsewhere"), filepath.Join(root, filepath.Dir(name))) // its folder
		if err := rotateAccessLog(root, name, 100); !errors.Is(err, untrusted.ErrLink) {
			t.Errorf("%s: a link for its folder: %v", name, err)
		}
		if have := read(t, filepath.Join(root, "/elsewhere/"+filepath.Base(name))); have != big {
			t.Errorf("%s: a link was followed, %d bytes are left", name, len(have))
		}
	}
}

// Bootstrap makes the access log's folder, and outside Dir the file; not where a link
// of Envoy's user leads.
func TestMake(t *testing.T) {
	root := t.TempDir()
	own := func(*os.File) error { return nil }
	mkdir(t, filepath.Join(root, Dir), 0o1770)
	mkdir(t, filepath.Join(root, "/srv/envoys"), 0o770)
	mkdir(t, filepath.Join(root, "/etc/precious"), 0o755)
	mkdir(t, filepath.Join(root, "/data"), 0o755)
	link(t, "/data", filepath.Join(root, "/srv/disk")) // the administrator's
	link(t, "../data", filepath.Join(root, "/srv/also"))
	link(t, "/etc/precious", filepath.Join(root, Dir+"/planted"))
	link(t, "../../etc/precious", filepath.Join(root, "/srv/envoys/planted"))
	link(t, "loop", filepath.Join(root, "/data/loop"))
	for _, tt := range []struct {
		name string
		want error
		made string // "": the folder alone
	}{
		{Dir + "/a/b/c/access.log", nil, ""},
		{"/srv/logs/access.log", nil, "/srv/logs/access.log"},
		{"/srv/disk/access.log", nil, "/data/access.log"},
		{"/srv/disk/sub/access.log", nil, "/data/sub/access.log"},
		{"/srv/also/other.log", nil, "/data/other.log"},
		{"/srv/envoys/sub/access.log", nil, "/srv/envoys/sub/access.log"},
		{"/srv/no/such/access.log", fs.ErrNotExist, ""},
		{Dir + "/planted/access.log", untrusted.ErrLink, ""},
		{Dir + "/planted/sub/access.log", untrusted.ErrLink, ""},
		{"/srv/envoys/planted/access.log", untrusted.ErrLink, ""},
		{"/srv/envoys/planted/sub/access.log", untrusted.ErrLink, ""},
		{"/data/loop/access.log", unix.ELOOP, ""},
	} {
		for range 2 { // as every run of bootstrap
			if err := Make(root, tt.name, own); !errors.Is(err, tt.want) {
				t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
			}
		}
		made := tt.made
		if made == "" {
			made = filepath.Dir(tt.name)
		}
		if _, err := os.Stat(filepath.Join(root, made)); tt.want == nil && err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	if left, err := os.ReadDir(filepath.Join(root, "/etc/precious")); err != nil || len(left) > 0 {
		t.Errorf("a planted link was followed: %v, %v", left, err)
	}
}

func mkdir(t *testing.T, name string, mode fs.FileMode) {
	t.Helper()
	// os.Chmod takes another sticky bit
	if err := errors.Join(os.MkdirAll(name, 0o755), unix.Chmod(name, uint32(mode))); err != nil {
		t.Fatal(err)
	}
}

func write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), 0o640); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// link puts a link in the place of what is there.
func link(t *testing.T, target, name string) {
	t.Helper()
	if err := errors.Join(os.RemoveAll(name), os.Symlink(target, name)); err != nil {
		t.Fatal(err)
	}
}
