package untrusted

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

// A file read with its limit is read whole.
func TestReadFile(t *testing.T) {
	name := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(name, []byte("12345"), 0o640); err != nil {
		t.Fatal(err)
	}
	if have, err := ReadFile(name, 5); err != nil || string(have) != "12345" {
		t.Errorf("have %q, %v", have, err)
	}
	if have, err := ReadFile(name, 4); err == nil {
		t.Errorf("beyond the limit: have %q", have)
	}
	if _, err := ReadFile(name+".none", 4); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("an absent file: %v", err)
	}
}
