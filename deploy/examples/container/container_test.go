// Package container holds the examples of docs/container.md, and tests that they and the page
// agree.
package container

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/service-proxy-agent/service-proxy-agent/internal/envfile"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

const page = "../../../docs/container.md"

func read(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// command is the unit's `docker run …`, as a shell takes it.
func command(t *testing.T) string {
	t.Helper()
	_, line, _ := strings.Cut(read(t, systemd.EnvoyUnit), "ExecStart=/bin/sh -c 'exec /usr/bin/")
	line, _, found := strings.Cut(line, "'\n")
	if !found || !strings.HasPrefix(line, "docker run ") {
		t.Fatalf("the unit runs %q", line)
	}
	return strings.ReplaceAll(line, "$$", "$")
}

// TestPage: the line in the page is the unit's.
func TestPage(t *testing.T) {
	line := "\n    " + strings.ReplaceAll(command(t), "\n", "\n    ") + "\n"
	if !strings.Contains(read(t, page), line) {
		t.Errorf("%s does not have\n%s", page, line)
	}
}

// TestShared: what the agent's settings name is where the page's bootstrap and the unit's flags put
// it, in folders that the container shares under the same path.
func TestShared(t *testing.T) {
	settings := envfile.Parse(read(t, "service-proxy-agent.default"))
	var bootstrap bootstrapv3.Bootstrap
	_, text, _ := strings.Cut(read(t, page), "\n    {\"admin\"")
	text, _, _ = strings.Cut(text, "\n")
	if err := protojson.Unmarshal([]byte(`{"admin"`+text), &bootstrap); err != nil {
		t.Fatalf("the page's bootstrap: %v", err)
	}
	pipe := bootstrap.GetAdmin().GetAddress().GetPipe()
	if pipe.GetMode() != 0o660 ||
		settings["SERVICE_PROXY_AGENT_ENVOY_ADMIN"] != "unix://"+pipe.GetPath() ||
		!strings.Contains(read(t, systemd.EnvoyUnit), "--envoy-admin unix://"+pipe.GetPath()+"\n") {
		t.Errorf("the page's socket is %v, the settings are %v", pipe, settings)
	}
	log := settings["SERVICE_PROXY_AGENT_ENVOY_LOG"]
	line := command(t)
	if !strings.Contains(line, " --log-path "+log+" ") {
		t.Errorf("the log is not at %q:\n%s", log, line)
	}
	for _, path := range []string{pipe.GetPath(), log} {
		if dir := filepath.Dir(path); !strings.Contains(line, " -v "+dir+":"+dir+" ") {
			t.Errorf("%s is not shared:\n%s", dir, line)
		}
	}
}

// TestUnit: systemd can read it, beside a docker.
func TestUnit(t *testing.T) {
	root := t.TempDir()
	for _, name := range []string{"usr/bin/docker", "usr/bin/install", "bin/sh",
		"usr/local/bin/service-proxy-agent", "etc/systemd/system/docker.service",
		"etc/systemd/system/" + systemd.EnvoyUnit} {
		path, text, mode := filepath.Join(root, name), "", os.FileMode(0o755)
		switch filepath.Base(name) {
		case "docker.service":
			text, mode = "[Service]\nExecStart=/usr/bin/docker\n", 0o644
		case systemd.EnvoyUnit:
			text, mode = read(t, systemd.EnvoyUnit), 0o644
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
	}
	out, err := exec.CommandContext(t.Context(), "systemd-analyze", "verify", "--root="+root,
		"--man=no", "--recursive-errors=no", systemd.EnvoyUnit).CombinedOutput()
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, systemd.EnvoyUnit) {
			t.Error(line)
		}
	}
	if err != nil && len(out) == 0 {
		t.Errorf("systemd-analyze: %v", err)
	}
}
