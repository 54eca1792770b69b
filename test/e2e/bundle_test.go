//go:build lab

package e2e

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/lua/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/service-proxy-agent/service-proxy-agent/internal/bundle"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
	"github.com/service-proxy-agent/service-proxy-agent/test/schema"
)

// secretive is a listener with secrets wherever a control plane may put some. Another one is like
// it and refused, for its header's name: Envoy quotes all of it in its log then.
func secretive(t *testing.T, name string, port int, header string) *listenerv3.Listener {
	t.Helper()
	l := &listenerv3.Listener{}
	must(t, protojson.Unmarshal(fmt.Appendf(nil, `{"name":"%s",
		"address":{"socket_address":{"address":"127.0.0.1","port_value":%d}},
		"metadata":{"filter_metadata":{"com.example":{"key":"s3cr3t"}}},
		"filter_chains":[{"filters":[{"name":"hcm","typed_config":{
		"@type":"type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
		"stat_prefix":"%[1]s","http_filters":[
		{"name":"lua","typed_config":{"@type":"type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua",
		"default_source_code":{"inline_string":"-- s3cr3t\n"}}},
		{"name":"router","typed_config":{"@type":"type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}],
		"route_config":{"name":"r","virtual_hosts":[{"name":"v","domains":["*"],"routes":[
		{"match":{"prefix":"/","headers":[{"name":"x-auth","string_match":{"exact":"s3cr3t"}}]},
		"request_headers_to_add":[{"header":{"key":"%[3]s","value":"s3cr3t"}}],
		"direct_response":{"status":200,"body":{"inline_string":"s3cr3t"}}}]}]}}}]}]}`, name, port, header), l))
	return l
}

// TestBundle: of a VM with secrets planted in every source the bundle holds none, and all else; as
// another user, with an Envoy that hangs, a full disk, or nobody who waits, it is whole or not
// there.
func TestBundle(t *testing.T) {
	t.Parallel()
	config := services()
	config.Services[1].Name = "db?key=s3cr3t"
	config.Listeners = []*listenerv3.Listener{secretive(t, "planted", 15777, "x-added"),
		secretive(t, "https://h/?X-Goog-Signature=s3cr3t", 15778, "x-added")}
	m, err := mesh.New(within(t, 30*time.Second), mesh.Options{Backend: lab.NFT, Config: config,
		NoEnvoy: true,
		Attribute: `{"labels":{"app":"s3cr3t"},"proxy-spec":{"network":"","primary-source":` +
			`"https://h/envoy.tgz?X-Goog-Signature=s3cr3t"},"service":{"serving-ports":[8081]},"new":"s3cr3t"}`})
	must(t, err)
	t.Cleanup(func() { _ = m.Close() }) // what the agent may do is not what this test is of
	m.Envoy, err = m.StartEnvoy(lab.EnvoyOptions{ControlPlane: m.CPAddr, LogLevel: "debug",
		Metadata: map[string]any{"team": "s3cr3t"}, Args: []string{"--service-zone", "z?key=s3cr3t"}})
	must(t, err)
	a := m.NewAgent()
	must(t, os.MkdirAll(a.StateDir(), 0o755))
	must(t, os.WriteFile(filepath.Join(a.StateDir(), "bootstrap.json"), []byte(`{"status":"FAILED",`+
		`"step":"download Envoy","failure":"get https://h/e.tgz?X-Goog-Signature=s3cr3t: Bearer s3cr3t",`+
		`"story":[{"seq":1,"severity":"ERROR","text":"x-api-key: s3cr3t"}]}`), 0o644))
	must(t, a.Start())
	must(t, a.WaitReady(within(t, 30*time.Second)))
	bad := config
	bad.Listeners = append(slices.Clip(bad.Listeners), secretive(t, "refused", 15779, ":path"))
	_, err = m.CP.Set(bad)
	must(t, err)
	must(t, m.CP.WaitRejected(within(t, 20*time.Second), 1))
	log, err := os.OpenFile(m.Envoy.LogPath, os.O_APPEND|os.O_WRONLY, 0)
	must(t, err)
	_, err = fmt.Fprintln(log, "[2026-11-29 04:00:00.000][1][info][x] planted Bearer s3cr3t, "+
		"'set-cookie: a=s3cr3t'\n':path', '/s3cr3t'")
	must(t, err)
	must(t, log.Close())
	for _, rule := range []string{"OUTPUT", "INPUT"} { // of somebody else
		_, err = m.VM.Run(t.Context(), "iptables", "-A", rule, "-d", "203.0.113.9", "-m", "comment",
			"--comment", "planted token=s3cr3t", "-j", "ACCEPT")
		must(t, err)
	}

	dir := t.TempDir()
	path := filepath.Join(dir, "b.tgz")
	began := time.Now()
	stdout, stderr, code, err := a.RunAs(t.Context(), 0, a.Settings(), "bundle", "-f", path)
	if err != nil || code != 0 || !strings.Contains(stdout, path+": ") ||
		!strings.Contains(stdout, "tar -tzf "+path) {
		t.Fatalf("bundle: exit code %d, %v after %v:\n%s%s", code, err, time.Since(began), stdout, stderr)
	}
	files, manifest := unpacked(t, path)
	for name, text := range files {
		// Also as bytes are in JSON: in base64 at each of the three places.
		for _, secret := range []string{"s3cr3t", "czNjcjN0", "MzY3Izd", "zM2NyM3", m.Platform.Token()} {
			if at := strings.Index(text, secret); at >= 0 {
				t.Errorf("%s has a secret: %s", name, text[max(0, at-200):at+len(secret)])
			}
		}
	}
	for name, text := range map[string]string{
		bundle.LookFile: `"facts"`, "doctor.txt": "errors", "doctor.json": `"checks"`, "status.json": `"services"`, "status.txt": "web",
		"index.html": "<html", "bootstrap.json": "download Envoy", "settings/attribute.json": "serving-ports",
		"envoy/config_dump.json": `"x-auth"`, "envoy/server_info.json": "LIVE", "envoy/clusters.txt": "web",
		"envoy/listeners.txt": "planted", "envoy/log.txt": "planted", "envoy/stats.txt": "listener_manager.listener_added",
		"metrics.prom": "service_proxy_agent", "rules/iptables-save.txt": "SERVICE_PROXY_OUTPUT",
		"rules/ip6tables-save.txt": "SERVICE_PROXY_OUTPUT", "network/sysctls.txt": "nf_conntrack_max",
		"network/addresses.txt": lab.VMAddr.String(), "network/sockets.txt": "15001", "processes.txt": "envoy",
	} {
		if !strings.Contains(files[name], text) {
			t.Errorf("%s has no %q:\n%.2000s", name, text, files[name])
		}
	}
	for _, g := range manifest.Gaps {
		// There is no systemd here, and programs of the machine may be missing.
		if !strings.HasPrefix(g.Name, "logs/") && !strings.HasPrefix(g.Name, "units/") &&
			!strings.Contains(g.Why, "there is no program") {
			t.Errorf("a gap: %s: %s", g.Name, g.Why)
		}
	}
	if _, stderr, code, err := a.RunAs(t.Context(), 0, a.Settings(), "bundle", "-f", path); err != nil ||
		code != 2 || !strings.Contains(stderr, "--overwrite") {
		t.Errorf("over one that is there: exit code %d, %v, %s", code, err, stderr)
	}
	binary, err := mesh.Binary()
	must(t, err)
	checkOthers(t, m, a, binary)
	checkHung(t, m, a, binary)
}

// unpacked is what a bundle holds, by the names of its files.
func unpacked(t *testing.T, path string) (files map[string]string, m bundle.Manifest) {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	if info, err := f.Stat(); err != nil || info.Mode() != 0o600 {
		t.Errorf("the bundle is %v, %v", info.Mode(), err)
	}
	zip, err := gzip.NewReader(f)
	must(t, err)
	files = map[string]string{}
	for archive := tar.NewReader(zip); ; {
		header, err := archive.Next()
		if err == io.EOF {
			break
		}
		must(t, err)
		text, err := io.ReadAll(archive)
		must(t, err)
		_, name, _ := strings.Cut(header.Name, "/")
		files[name] = string(text)
	}
	schema.Valid(t, "bundle", []byte(files[bundle.ManifestFile]))
	must(t, json.Unmarshal([]byte(files[bundle.ManifestFile]), &m))
	return files, m
}

// alongside is a command beside the agent that a test ends at its own time.
func alongside(t *testing.T, m *mesh.Mesh, a *mesh.Agent, uid uint32, argv ...string) (*exec.Cmd,
	*strings.Builder) {
	t.Helper()
	cmd := m.VM.CommandAs(context.WithoutCancel(t.Context()), uid, argv[0], argv[1:]...)
	var out strings.Builder
	cmd.Env, cmd.Stdout, cmd.Stderr = append(a.Environ(), a.Settings()...), &out, &out
	must(t, lab.Start(cmd))
	t.Cleanup(func() { _ = cmd.Process.Kill() }) // it has ended, unless the test failed
	return cmd, &out
}

// checkOthers makes a bundle as another user than root, and one for which there is no room.
func checkOthers(t *testing.T, m *mesh.Mesh, a *mesh.Agent, binary string) {
	t.Helper()
	dir := t.TempDir()
	must(t, os.Chown(dir, 1000, 1000))
	for d := dir; d != "/tmp" && d != "/"; d = filepath.Dir(d) {
		must(t, os.Chmod(d, 0o755))
	}
	cmd, out := alongside(t, m, a, 1000, binary, "bundle", "-f", dir+"/b.tgz")
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	_, manifest := unpacked(t, dir+"/b.tgz")
	if gaps := named(manifest); gaps["rules/iptables-save.txt"] != "needs root" ||
		gaps["status.json"] != "needs root" || manifest.User != 1000 {
		t.Errorf("uid %d, gaps: %v", manifest.User, gaps)
	}
	cmd, out = alongside(t, m, a, 0, "unshare", "-m", "sh", "-c", `mount -t tmpfs -o size=8k none "$1" && `+
		`{ "$0" bundle -f "$1/b.tgz"; echo "code $?"; ls -A "$1"; }`, binary, t.TempDir())
	if err := cmd.Wait(); err != nil || !strings.Contains(out.String(), "no space left on device") ||
		!strings.HasSuffix(out.String(), "code 2\n") {
		t.Errorf("a full disk: %v: %s", err, out)
	}
}

// checkHung makes bundles while Envoy hangs: nobody waits longer for one than half a minute, and
// who does not wait that long leaves nothing behind.
func checkHung(t *testing.T, m *mesh.Mesh, a *mesh.Agent, binary string) {
	t.Helper()
	m.Envoy.Pause()
	defer m.Envoy.Continue()
	path, began := filepath.Join(t.TempDir(), "b.tgz"), time.Now()
	whole, said := alongside(t, m, a, 0, binary, "bundle", "-f", path)
	for name, signal := range map[string]syscall.Signal{
		"interrupted": syscall.SIGINT, "killed": syscall.SIGKILL} {
		dir := t.TempDir()
		cmd, out := alongside(t, m, a, 0, binary, "bundle", "-f", dir+"/b.tgz")
		eventually(t, 10*time.Second, "the file is made", func() (bool, string) {
			fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", cmd.Process.Pid))
			return slices.ContainsFunc(fds, func(fd string) bool {
				to, _ := os.Readlink(fd)
				return strings.HasPrefix(to, dir+"/")
			}), fmt.Sprint(fds)
		})
		must(t, cmd.Process.Signal(signal))
		_ = cmd.Wait() // the exit code is looked at
		if signal == syscall.SIGINT && (cmd.ProcessState.ExitCode() != 2 ||
			!strings.Contains(out.String(), "nothing was written")) {
			t.Errorf("%s: exit code %d: %s", name, cmd.ProcessState.ExitCode(), out)
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("%s: left: %v, %v", name, left, err)
		}
	}
	if err := whole.Wait(); err != nil || time.Since(began) > 33*time.Second {
		t.Fatalf("%v after %v: %s", err, time.Since(began), said)
	}
	files, manifest := unpacked(t, path)
	if gaps := named(manifest); !strings.Contains(gaps["envoy/server_info.json"], "no answer") ||
		!strings.Contains(gaps["envoy/config_dump.json"], "not asked") {
		t.Errorf("gaps: %v", gaps)
	}
	if !strings.Contains(files["rules/iptables-save.txt"], "SERVICE_PROXY_OUTPUT") {
		t.Errorf("rules: %.1000s", files["rules/iptables-save.txt"])
	}
}

// named are the gaps of a manifest by their names.
func named(m bundle.Manifest) map[string]string {
	all := map[string]string{}
	for _, g := range m.Gaps {
		all[g.Name] = g.Why
	}
	return all
}
