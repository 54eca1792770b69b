//go:build lab

package envoyadmin

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// The Envoys of these tests, in build/ of the repository.
var envoyVersions = []string{"1.36.4", "1.40.0"}

const newest = "1.40.0"

// envoy is an Envoy that a test runs, in a network namespace of its own, asked over a unix socket, with its listeners in a file (LDS).
type envoy struct {
	t       testing.TB
	version string
	dir     string
	cmd     *exec.Cmd
	client  *Client
}

func (e *envoy) path(name string) string { return filepath.Join(e.dir, name) }

// binary finds an Envoy.
func binary(t testing.TB, version string) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			break
		}
		if dir == "/" {
			t.Fatal("no go.mod above the test")
		}
	}
	path := filepath.Join(dir, "build", "envoy-"+version)
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%v: make tools fetches it", err)
	}
	return path
}

const bootstrapYAML = `
node: {id: lab-node, cluster: lab, locality: {zone: z1}, metadata: {TRAFFICDIRECTOR_NETWORK_NAME: default, N: 5, deep: {a: b}}}
admin: {address: {pipe: {path: DIR/admin.sock}}}
bootstrap_extensions:
- {name: internal, typed_config: {"@type": type.googleapis.com/envoy.extensions.bootstrap.internal_listener.v3.InternalListener}}
dynamic_resources:
  lds_config: {resource_api_version: V3, path_config_source: {path: DIR/lds.yaml}}
DYNAMIC
static_resources:
  listeners:
  - name: of-the-bootstrap
    address: {socket_address: {address: 127.0.0.1, port_value: 15090}}
    filter_chains: [{filters: [{name: tcp, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: x, cluster: a}}]}]
  clusters:
  - {name: a, type: STATIC, load_assignment: {cluster_name: a, endpoints: [{lb_endpoints: [HOST1, HOST2]}]}}
  - {name: b, type: STATIC, load_assignment: {cluster_name: b, endpoints: [{lb_endpoints: [HOST1]}]}}
CLUSTERS
`

// start runs an Envoy with these listeners, and waits until it is live.
func start(t testing.TB, version, listeners string, replace ...string) *envoy {
	t.Helper()
	e := prepare(t, version)
	e.listeners(listeners)
	e.boot(replace...)
	e.run()
	return e
}

// prepare makes the files that do not depend on what is run.
func prepare(t testing.TB, version string) *envoy {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("the lab makes network namespaces: run it as root")
	}
	dir, err := os.MkdirTemp("", "envoyadmin") // short: a unix socket's path has at most 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	e := &envoy{t: t, version: version, dir: dir}
	e.certificate()
	e.write("rds.yaml", "resources: []\n")
	if e.client, err = New("unix://" + e.path("admin.sock")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.client.Close)
	return e
}

// boot writes what Envoy is started with.
func (e *envoy) boot(replace ...string) {
	host := `{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: %d}}}, health_status: %s}`
	replace = append(replace, "HOST1", fmt.Sprintf(host, 1, "HEALTHY"), "HOST2", fmt.Sprintf(host, 2, "UNHEALTHY"), "DIR", e.dir, "DYNAMIC", "", "CLUSTERS", "")
	e.write("boot.yaml", strings.NewReplacer(replace...).Replace(bootstrapYAML))
}

func (e *envoy) run() {
	e.t.Helper()
	log, err := os.OpenFile(e.path("envoy.err.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		e.t.Fatal(err)
	}
	defer log.Close()
	e.cmd = exec.Command("unshare", "-n", "sh", "-c", `ip link set lo up && exec "$@"`, "sh", binary(e.t, e.version), "-c", e.path("boot.yaml"),
		"--concurrency", "1", "-l", "info", "--disable-hot-restart")
	e.cmd.Stderr = log
	if err := e.cmd.Start(); err != nil {
		e.t.Fatal(err)
	}
	cmd := e.cmd
	e.t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	e.until(time.Minute, func() error {
		state, err := e.client.Ready(context.Background())
		if err == nil && state != "LIVE" {
			err = errors.New(state)
		}
		return err
	})
}

// until waits for something to become true.
func (e *envoy) until(limit time.Duration, ok func() error) {
	e.t.Helper()
	var err error
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if err = ok(); err == nil {
			return
		}
	}
	log, _ := os.ReadFile(e.path("envoy.err.log"))
	e.t.Fatalf("%v\n%s", err, log[max(0, len(log)-3000):])
}

// write replaces a file by rename, which is what Envoy watches for.
func (e *envoy) write(name, text string) {
	e.t.Helper()
	if err := os.WriteFile(e.path(name+".new"), []byte(text), 0o644); err != nil {
		e.t.Fatal(err)
	}
	if err := os.Rename(e.path(name+".new"), e.path(name)); err != nil {
		e.t.Fatal(err)
	}
}

// listeners pushes listeners, given as the elements of a YAML list.
func (e *envoy) listeners(yaml string) {
	e.t.Helper()
	if yaml == "" {
		yaml = "[]"
	}
	yaml = strings.NewReplacer("RDS", e.path("rds.yaml"), "CERT", e.path("cert.pem"), "KEY", e.path("key.pem"), "PIPE", e.path("pipe")).Replace(yaml)
	e.write("lds.yaml", "resources:\n"+yaml)
}

func (e *envoy) certificate() {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		e.t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "lab"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		e.t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		e.t.Fatal(err)
	}
	e.write("cert.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert})))
	e.write("key.pem", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})))
}

// fetch asks without any of our limits.
func (e *envoy) fetch(path string) []byte {
	e.t.Helper()
	response, err := e.client.http.Get("http://envoy-admin" + path)
	if err != nil {
		e.t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		e.t.Fatal(err)
	}
	return body
}

// mainThread is the CPU time of Envoy's main thread. The kernel counts it in ticks of 10 ms.
func (e *envoy) mainThread() time.Duration {
	e.t.Helper()
	pid := e.cmd.Process.Pid
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/stat", pid, pid))
	if err != nil {
		e.t.Fatal(err)
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	user, _ := strconv.Atoi(fields[11])
	system, err := strconv.Atoi(fields[12])
	if err != nil {
		e.t.Fatal(err)
	}
	return time.Duration(user+system) * 10 * time.Millisecond
}

// TestShapes pushes each shape to each Envoy and reads it back. The golden files say what is in the pushed YAML. With -update the answers of the
// newest Envoy are recorded for TestRecorded.
func TestShapes(t *testing.T) {
	shapes, err := filepath.Glob("testdata/shapes/*.yaml")
	if err != nil || len(shapes) == 0 {
		t.Fatal("no shapes", err)
	}
	for _, version := range envoyVersions {
		t.Run(version, func(t *testing.T) {
			for _, file := range shapes {
				name := strings.TrimSuffix(filepath.Base(file), ".yaml")
				t.Run(name, func(t *testing.T) {
					yaml, err := os.ReadFile(file)
					if err != nil {
						t.Fatal(err)
					}
					e := start(t, version, string(yaml))
					var s Snapshot
					e.until(10*time.Second, func() error {
						s, err = e.client.Listeners(t.Context())
						if err == nil && (len(s.Warming) > 0 || s.Fingerprint.Listeners == 0) {
							err = fmt.Errorf("not done: %s", render(s))
						}
						return err
					})
					if *update && version == newest {
						e.record(name)
					}
					golden(t, name, strings.ReplaceAll(render(s), e.dir, "/run/lab"))
					f, err := e.client.Fingerprint(t.Context())
					if err != nil || f != s.Fingerprint {
						t.Errorf("the fingerprint is %+v, %v, and of the full dump %+v", f, err, s.Fingerprint)
					}
				})
			}
		})
	}
}

// record keeps the answers for TestRecorded.
func (e *envoy) record(name string) {
	dir := filepath.Join("testdata", "dumps", name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		e.t.Fatal(err)
	}
	for file, path := range map[string]string{"dynamic.json": dynamicPath, "static.json": staticPath, "masked.json": maskedPath} {
		answer := bytes.ReplaceAll(e.fetch(path), []byte(e.dir), []byte("/run/lab"))
		if err := os.WriteFile(filepath.Join(dir, file), answer, 0o644); err != nil {
			e.t.Fatal(err)
		}
	}
	info, err := e.client.ServerInfo(context.Background())
	if err != nil {
		e.t.Fatal(err)
	}
	short := fmt.Sprintf("{\"version\": %q, \"state\": %q, \"uptime_current_epoch\": \"3s\", \"node\": {\"id\": %q}}\n", info.Text, info.State, info.Node.ID)
	if err := os.WriteFile(filepath.Join(dir, "info.json"), []byte(short), 0o644); err != nil {
		e.t.Fatal(err)
	}
}
