package bootstrap

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
)

// What a power cut leaves of a file being replaced is taken away by the next run, and nothing else
// is.
func TestRemoveLeftovers(t *testing.T) {
	root := t.TempDir()
	ours := []string{progress.StateDir + "/." + progress.StateFile + ".123",
		"/etc/service-proxy-agent/.envoy.json.123", "/etc/service-proxy-agent/.envoy.new.json",
		"/usr/local/bin/.envoy.new", "/usr/local/lib/systemd/system/.service-proxy-agent.service.123"}
	others := []string{progress.StateDir + "/" + progress.StateFile,
		"/etc/service-proxy-agent/envoy.json", "/etc/service-proxy-agent/.mine", "/usr/local/bin/envoy",
		"/usr/local/lib/systemd/system/.other.service.123"}
	for _, name := range append(append([]string(nil), ours...), others...) {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	newBootstrapper(Options{Root: root}).removeLeftovers()
	for _, name := range ours {
		if _, err := os.Lstat(filepath.Join(root, name)); err == nil {
			t.Errorf("left: %s", name)
		}
	}
	for _, name := range others {
		if _, err := os.Lstat(filepath.Join(root, name)); err != nil {
			t.Errorf("gone: %s", name)
		}
	}
}

// TestRemoveLeavesYours: a web config file, say, beside Envoy's configuration.
func TestRemoveLeavesYours(t *testing.T) {
	root := t.TempDir()
	yours := filepath.Join(filepath.Dir(EnvoyConfig), "web-config.yml")
	for _, name := range []string{EnvoyConfig, yours} {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	r := removal{bootstrapper: newBootstrapper(Options{Root: root})}
	r.removeFiles(progress.State{}, nil)
	_, gone := os.Lstat(filepath.Join(root, EnvoyConfig))
	_, left := os.Lstat(filepath.Join(root, yours))
	if gone == nil || left != nil || len(r.errs) > 0 {
		t.Errorf("%v, %v, %v", gone, left, r.errs)
	}
	if want := "left " + filepath.Dir(EnvoyConfig) + ", which has files of yours"; !slices.Contains(
		r.done, want) {
		t.Errorf("said %q", r.done)
	}
}
