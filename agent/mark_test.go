package agent

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

func marked(dir string) bool { return readMark(dir, zap.NewNop()).set }

// TestMark: rules may be adopted once an agent of this boot had its jumps in, and not
// after they were taken out.
func TestMark(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	t.Setenv("RUNTIME_DIRECTORY", dir)
	if err := Unmark(); err != nil || marked(dir) {
		t.Errorf("without a folder: %v", err)
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if marked(dir) {
		t.Error("marked after a reboot")
	}
	if err := os.WriteFile(filepath.Join(dir, systemd.ReadyFile), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if !marked(dir) {
		t.Error("not marked after a version that made no mark was ready")
	}
	m := &mark{dir: dir, log: zap.NewNop()}
	m.put()
	if !m.set || !marked(dir) {
		t.Error("not marked")
	}
	if err := Unmark(); err != nil || marked(dir) {
		t.Errorf("marked after the rules were taken out: %v", err)
	}
	// of a link that the folder's owner planted for root
	victim := filepath.Join(t.TempDir(), "victim")
	if err := os.WriteFile(victim, []byte("kept"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Remove(filepath.Join(dir, markName)),
		os.Symlink(victim, filepath.Join(dir, markName)), Unmark()); err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(victim); err != nil || string(text) != "kept" || marked(dir) {
		t.Errorf("what a planted link leads to holds %q, %v", text, err)
	}
	if m = readMark(dir, zap.NewNop()); m.set {
		t.Error("marked by a planted link")
	}
	if m.put(); !marked(dir) {
		t.Error("not marked anew")
	}
	// The folder is not there for a while.
	m = &mark{dir: filepath.Join(dir, "later"), log: zap.NewNop()}
	m.put()
	if err := os.Mkdir(m.dir, 0o755); err != nil || marked(m.dir) {
		t.Errorf("marked where nothing can be: %v", err)
	}
	if m.put(); !marked(m.dir) {
		t.Error("not marked when it could be")
	}
	if err := os.WriteFile(filepath.Join(dir, markName), []byte("another-boot\n"),
		0o600); err != nil || marked(dir) {
		t.Errorf("marked by another boot: %v", err)
	}
}
