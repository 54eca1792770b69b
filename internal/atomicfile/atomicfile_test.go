package atomicfile

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// TestSweep: what a killed Write left goes, and nothing else.
func TestSweep(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "history.json")
	if err := Write(path, []byte("whole"), 0o600); err != nil {
		t.Fatal(err)
	}
	left, err := os.CreateTemp(dir, prefix(path)) // as Write makes it
	if err != nil {
		t.Fatal(err)
	}
	left.Close()
	others := []string{".history.json.", ".history.json.bak", ".history.json.1.bak", "history.json.7",
		".other.json.7"}
	for _, name := range others {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	Sweep(path)
	Sweep(filepath.Join(dir, "no", "folder"))
	var names []string
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	want := append(others, "history.json")
	slices.Sort(want)
	if !slices.Equal(names, want) {
		t.Errorf("there are %q, want %q", names, want)
	}
}
