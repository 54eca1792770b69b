package bundle

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestTarget: a file is whole or not there, its owner's alone, and nothing that is there already is
// written to, whoever put it there and when. The same where the file system wants a name at once.
func TestTarget(t *testing.T) {
	const old = "what was there"
	for _, tt := range []struct {
		name    string
		before  func(t *testing.T, path string) // it is created
		between func(t *testing.T, path string) // and committed
		replace bool
		create  error
		commit  error
	}{
		{name: "a new file"},
		{name: "one that is there", before: write(old), create: ErrExists},
		{name: "one that comes meanwhile", between: write(old), commit: ErrExists},
		{name: "one to replace", before: write(old), replace: true},
		{name: "none to replace", replace: true},
		{name: "a link", before: link, create: ErrExists},
		{name: "a link that comes meanwhile", between: link, commit: ErrExists},
		{name: "a link to replace", before: link, replace: true, create: errAny},
		{name: "a folder", before: func(t *testing.T, path string) { must(t, os.Mkdir(path, 0o700)) }, create: errAny},
	} {
		for _, named := range []bool{false, true} {
			dir := t.TempDir()
			path := filepath.Join(dir, "b.tgz")
			must(t, os.WriteFile(dir+"/victim", []byte(old), 0o644))
			open := unix.Open
			if named {
				open = func(string, int, uint32) (int, error) { return -1, unix.EOPNOTSUPP }
			}
			if tt.before != nil {
				tt.before(t, path)
			}
			target, err := create(path, tt.replace, open)
			if !is(err, tt.create) {
				t.Errorf("%s: create: %v, want %v", tt.name, err, tt.create)
			}
			if err == nil {
				_, err = target.Write([]byte("new"))
				must(t, err)
				if tt.between != nil {
					tt.between(t, path)
				}
				if err := target.Commit(); !is(err, tt.commit) {
					t.Errorf("%s: commit: %v, want %v", tt.name, err, tt.commit)
				}
			}
			if text, err := os.ReadFile(dir + "/victim"); err != nil || string(text) != old {
				t.Errorf("%s: the victim has %q, %v", tt.name, text, err)
			}
			if tt.create == nil && tt.commit == nil {
				info, err := os.Lstat(path)
				text, _ := os.ReadFile(path)
				if err != nil || info.Mode() != 0o600 || string(text) != "new" {
					t.Errorf("%s: %v, %q, %v", tt.name, info, text, err)
				}
			}
			left, err := os.ReadDir(dir)
			must(t, err)
			for _, f := range left {
				if f.Name() != "victim" && f.Name() != "b.tgz" {
					t.Errorf("%s: %s is left", tt.name, f.Name())
				}
			}
		}
	}
	if _, err := Create("/no/such/folder/b.tgz", false); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no folder: %v", err)
	}
}

// A bundle that is given up leaves nothing.
func TestDiscard(t *testing.T) {
	for _, err := range []error{nil, unix.EOPNOTSUPP} {
		dir := t.TempDir()
		target, err := create(filepath.Join(dir, "b"), false, func(d string, flags int, mode uint32) (int, error) {
			if err != nil {
				return -1, err
			}
			return unix.Open(d, flags, mode)
		})
		must(t, err)
		_, err = target.Write([]byte("half"))
		must(t, err)
		target.Discard()
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("%v is left, %v", left, err)
		}
	}
}

var errAny = errors.New("any")

func is(err, want error) bool {
	return err == nil && want == nil || err != nil && (want == errAny || errors.Is(err, want))
}

func write(text string) func(*testing.T, string) {
	return func(t *testing.T, path string) { must(t, os.WriteFile(path, []byte(text), 0o600)) }
}

func link(t *testing.T, path string) {
	must(t, os.Symlink(filepath.Join(filepath.Dir(path), "victim"), path))
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
