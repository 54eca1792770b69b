//go:build box

package box

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"

	"github.com/service-proxy-agent/service-proxy-agent/internal/bundle"
)

// checkBundle: a bundle of a VM has what systemd and bootstrap know, no gap, and none of the
// secrets that are planted where only a whole VM has a place for them.
func (v *VM) checkBundle() {
	v.t.Helper()
	const dropIn = "/etc/systemd/system/service-proxy-envoy.service.d/planted.conf"
	const defaults = "/etc/default/service-proxy-agent"
	was, err := os.ReadFile(filepath.Join(v.root, defaults))
	there := err == nil
	v.run("mkdir", "-p", filepath.Dir(dropIn))
	v.write(dropIn, "[Service]\nEnvironment=PLANTED=s3cr3t \\\n  B=s3cr3t\nExecStartPre=-/bin/true --key s3cr3t\n", 0o644)
	v.run("systemctl", "daemon-reload")
	v.write(defaults, string(was)+"\nPLANTED=s3cr3t\nSERVICE_PROXY_AGENT_LOG_LEVEL=info\n", 0o600)
	defer func() {
		v.run("rm", "-r", filepath.Dir(dropIn))
		v.run("systemctl", "daemon-reload")
		if there {
			v.write(defaults, string(was), 0o644)
		} else {
			v.run("rm", defaults)
		}
	}()
	for _, unit := range []string{"service-proxy-agent.service", "service-proxy-envoy.service"} {
		// What root says about a process of a unit is in the unit's journal.
		v.run("sh", "-c", `for text in "planted authorization: Basic s3cr3t" "https://u:s3cr3t@h/?s3cr3t"; do `+
			`printf 'MESSAGE=%s\nOBJECT_PID=%s\n' "$text" "$0" | logger --journald; done`,
			v.property(unit, "MainPID"))
	}
	v.run("journalctl", "--sync")
	out := v.run("service-proxy-agent", "bundle", "-f", "/root/bundle.tgz")
	path := filepath.Join(v.root, "root/bundle.tgz")
	defer os.Remove(path)
	manifest, err := bundle.Read(path, bundle.ManifestFile)
	if err != nil {
		v.t.Fatalf("%v\n%s", err, out)
	}
	var m bundle.Manifest
	if err := json.Unmarshal(manifest, &m); err != nil {
		v.t.Fatal(err)
	}
	files := map[string]string{bundle.ManifestFile: string(manifest)}
	for _, f := range m.Files {
		data, err := bundle.Read(path, f.Name)
		if err != nil {
			v.t.Error(err)
		}
		files[f.Name] = string(data)
	}
	for name, text := range files {
		for line := range strings.Lines(text) {
			if strings.Contains(line, "s3cr3t") || strings.Contains(line, v.platform.Token()) {
				v.t.Errorf("%s has a secret: %.300s", name, line)
			}
		}
	}
	for name, text := range map[string]string{
		"logs/agent.txt": "planted authorization", "logs/envoy.txt": "planted authorization",
		"logs/bootstrap.txt": "bootstrap", "units/cat.txt": "planted.conf",
		"units/show.txt": "ActiveState=active", "settings/environment.txt": "PLANTED=",
		"settings/attribute.json": "serving-ports", "bootstrap.json": "FINISHED",
		"envoy/bootstrap.json": `"node"`, "envoy/config_dump.json": "TRAFFICDIRECTOR_INTERCEPTION_LISTENER",
		"versions.txt": "1.40.0", "versions-os.txt": "Debian", "index.html": "<html",
	} {
		if !strings.Contains(files[name], text) {
			v.t.Errorf("%s has no %q:\n%.2000s", name, text, files[name])
		}
	}
	if cat := files["units/cat.txt"]; !strings.Contains(cat, "ExecStart=/usr/local/bin/service-proxy-agent envoy -- ") {
		v.t.Errorf("our own units are masked:\n%.3000s", cat)
	}
	for _, g := range m.Gaps {
		if !strings.Contains(g.Why, "there is no program") {
			v.t.Errorf("a gap: %s: %s", g.Name, g.Why)
		}
	}
}
