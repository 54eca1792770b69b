package bootstrap

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Rules without an Envoy would cut the VM off: where they cannot be taken out, nothing else is.
func TestRemoveLeavesAllWhereRulesStay(t *testing.T) {
	root := t.TempDir()
	paths := []string{EnvoyConfig, AgentBinary}
	for _, path := range paths {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(root, path)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, path), nil, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	remove := func(why error) ([]string, error) {
		return Remove(t.Context(), Options{Root: root}, func(context.Context) ([]string, error) { return []string{"removed a chain"}, why })
	}
	done, err := remove(errors.New("the lock is held"))
	if err == nil || !strings.Contains(err.Error(), "the lock is held") || !strings.Contains(err.Error(), "Envoy was left running") || len(done) != 1 {
		t.Errorf("done %q, %v", done, err)
	}
	for _, path := range paths {
		if _, err := os.Stat(filepath.Join(root, path)); err != nil {
			t.Error(err)
		}
	}
	if done, err := remove(nil); err != nil || len(done) < 1+len(paths) {
		t.Errorf("done %q, %v", done, err)
	}
	for _, path := range paths {
		if _, err := os.Stat(filepath.Join(root, path)); err == nil {
			t.Errorf("left behind: %s", path)
		}
	}
}
