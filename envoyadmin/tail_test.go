package envoyadmin

import (
	"os"
	"path/filepath"
	"testing"
)

// A tail is of whole lines: a line is in it only with its beginning.
func TestTail(t *testing.T) {
	name := filepath.Join(t.TempDir(), "log")
	for _, tt := range []struct {
		text  string
		limit int64
		want  string
	}{
		{"", 4, ""},
		{"one\ntwo\n", 100, "one\ntwo\n"},
		{"one\ntwo\n", 8, "one\ntwo\n"},
		{"one\ntwo\n", 7, "two\n"},
		{"one\ntwo\n", 4, "two\n"}, // what is before ends a line
		{"one\ntwo\n", 3, ""},
		{"one\ntwo", 3, "two"},
		{"a long line", 4, ""},
	} {
		if err := os.WriteFile(name, []byte(tt.text), 0o600); err != nil {
			t.Fatal(err)
		}
		file, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		if have, err := Tail(file, tt.limit); err != nil || string(have) != tt.want {
			t.Errorf("%d bytes of %q: %q, %v; want %q", tt.limit, tt.text, have, err, tt.want)
		}
		file.Close()
		if _, err := Tail(file, tt.limit); err == nil {
			t.Error("a closed file has a tail")
		}
	}
}
