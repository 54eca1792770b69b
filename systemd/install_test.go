package systemd

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/service-proxy-agent/service-proxy-agent/internal/layout"
)

// The exposures that systemd-analyze computes from the units alone. They are
// printed, for the record.
func TestExposure(t *testing.T) {
	limits := map[string]float64{AgentUnit: 1.8, EnvoyUnit: 1.3}
	for _, file := range Files() {
		name := filepath.Base(file.Path)
		if filepath.Ext(name) != ".service" {
			continue
		}
		limit, ok := limits[name]
		if !ok {
			limit = 3
		}
		out, err := exec.Command("systemd-analyze", "security", "--offline=true", "--no-pager",
			filepath.Join("units", name)).CombinedOutput()
		if err != nil {
			t.Fatalf("systemd-analyze (of systemd 250 or later): %v\n%s", err, out)
		}
		m := regexp.MustCompile(`exposure level for \S+: ([0-9.]+)`).FindSubmatch(out)
		if m == nil {
			t.Fatalf("no exposure of %s in:\n%s", name, out)
		}
		exposure, err := strconv.ParseFloat(string(m[1]), 64)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%-36s exposure %.1f, limit %.1f", name, exposure, limit)
		if exposure > limit {
			t.Errorf("%s: exposure %.1f, want at most %.1f", name, exposure, limit)
		}
	}
}

// systemd reads the units without a complaint about a key or value it does not know.
func TestVerify(t *testing.T) {
	root := t.TempDir()
	if _, err := Install(root); err != nil {
		t.Fatal(err)
	}
	for _, bin := range []string{"usr/local/bin/service-proxy-agent", "usr/local/bin/envoy",
		"bin/true"} {
		path := filepath.Join(root, bin)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, file := range Files() {
		if !strings.HasPrefix(file.Path, layout.Here.UnitDir) {
			continue
		}
		out, _ := exec.Command("systemd-analyze", "verify", "--root="+root, "--man=no",
			"--recursive-errors=no", filepath.Base(file.Path)).CombinedOutput()
		for line := range strings.Lines(string(out)) {
			if strings.Contains(line, "nknown key") || strings.Contains(line, "nvalid") ||
				strings.Contains(line, "ailed to parse") || strings.Contains(line, "Unknown section") {
				t.Error(line)
			}
		}
	}
}

// No unit may be bound to Envoy: Envoy's automatic restart would take the rules out.
func TestNothingRequiresEnvoy(t *testing.T) {
	bound := regexp.MustCompile(`(?m)^(Requires|Requisite|BindsTo|PartOf)=.*envoy`)
	for _, file := range Files() {
		if line := bound.Find(file.Text); line != nil {
			t.Errorf("%s: %s", file.Path, line)
		}
	}
}

func TestInstallRemove(t *testing.T) {
	root := t.TempDir()
	changed, err := Install(root)
	if err != nil || len(changed) != len(Files()) {
		t.Fatalf("first: %d of %d files, %v", len(changed), len(Files()), err)
	}
	if changed, err := Install(root); err != nil || len(changed) != 0 {
		t.Errorf("second: %v, %v", changed, err)
	}
	unit := filepath.Join(root, layout.Here.UnitDir, AgentUnit)
	if err := os.WriteFile(unit, []byte("old"), 0o644); err != nil {
		t.Fatal(err)
	}
	if changed, err := Install(root); err != nil || len(changed) != 1 {
		t.Errorf("after a change: %v, %v", changed, err)
	}
	for _, unit := range []string{EnvoyUnit, RotateUnit} {
		if _, err := SetWritable(root, unit, "/srv/logs"); err != nil {
			t.Fatal(err)
		}
	}
	removed, err := Remove(root)
	if err != nil || len(removed) != len(Files())+2 {
		t.Errorf("removed %v, %v", removed, err)
	}
	if removed, err := Remove(root); err != nil || len(removed) != 0 {
		t.Errorf("removed again %v, %v", removed, err)
	}
	err = filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			t.Errorf("left behind: %s", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

func TestSetWritable(t *testing.T) {
	root := t.TempDir()
	path := filepath.Join(root, AccessLogDropIn(EnvoyUnit))
	for _, tt := range []struct{ dir, want string }{
		{"/srv/logs", `ReadWritePaths="-/srv/logs"`},
		{`/srv/100% "my" logs\`, `ReadWritePaths="-/srv/100%% \"my\" logs\\"`},
	} {
		changed, err := SetWritable(root, EnvoyUnit, tt.dir)
		if err != nil || !changed {
			t.Fatalf("%q: %v, %v", tt.dir, changed, err)
		}
		if changed, err := SetWritable(root, EnvoyUnit, tt.dir); err != nil || changed {
			t.Errorf("%q again: %v, %v", tt.dir, changed, err)
		}
		text, err := os.ReadFile(path)
		if err != nil || !strings.HasSuffix(string(text), "[Service]\n"+tt.want+"\n") {
			t.Errorf("%q: have %q, %v", tt.dir, text, err)
		}
	}
	for _, dir := range []string{"logs", "/srv/../etc", "/srv/a\nExecStart=/bin/evil"} {
		if _, err := SetWritable(root, EnvoyUnit, dir); err == nil {
			t.Errorf("%q is accepted", dir)
		}
	}
	if changed, err := SetWritable(root, EnvoyUnit, ""); err != nil || !changed {
		t.Errorf("taking it away: %v, %v", changed, err)
	}
	if changed, err := SetWritable(root, EnvoyUnit, ""); err != nil || changed {
		t.Errorf("taking it away again: %v, %v", changed, err)
	}
}
