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
	"strings"
	"testing"
	"time"
)

// The Envoys of these tests, in build/ of the repository.
var envoyVersions = []string{"1.36.4", "1.40.0"}

const newest = "1.40.0"

// envoy is an Envoy that a test runs, in a network namespace of its own, asked over a unix socket,
// with its listeners in a file (LDS).
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
node:
  {id: lab-node, cluster: lab, locality: {zone: z1},
   metadata: {TRAFFICDIRECTOR_NETWORK_NAME: default, N: 5, deep: {a: b}}}
admin: {address: {pipe: {path: LABDIR/admin.sock}}}
bootstrap_extensions:
- {name: internal, typed_config: {"@type": type.googleapis.com/envoy.extensions.bootstrap.internal_listener.v3.InternalListener}}
dynamic_resources:
  lds_config: {resource_api_version: V3, path_config_source: {path: LABDIR/lds.yaml}}
DYNAMIC
static_resources:
  listeners:
  - name: of-the-bootstrap
    address: {socket_address: {address: 127.0.0.1, port_value: 15090}}
    filter_chains: [{filters: [{name: tcp, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: x, cluster: a}}]}]
  clusters:
  - {name: a, type: STATIC,
     load_assignment: {cluster_name: a, endpoints: [{lb_endpoints: [HOST1, HOST2]}]}}
  - {name: b, type: STATIC,
     load_assignment: {cluster_name: b, endpoints: [{lb_endpoints: [HOST1]}]}}
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
	replace = append(replace, "HOST1", fmt.Sprintf(host, 1, "HEALTHY"), "HOST2",
		fmt.Sprintf(host, 2, "UNHEALTHY"), "LABDIR", e.dir, "DYNAMIC", "", "CLUSTERS", "")
	e.write("boot.yaml", strings.NewReplacer(replace...).Replace(bootstrapYAML))
}

func (e *envoy) run() {
	e.t.Helper()
	log, err := os.OpenFile(e.path("envoy.err.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		e.t.Fatal(err)
	}
	defer log.Close()
	e.cmd = exec.Command("unshare", "-n", "sh", "-c", `ip link set lo up && exec "$@"`, "sh",
		binary(e.t, e.version), "-c", e.path("boot.yaml"),
		"--concurrency", "1", "-l", "info", "--disable-hot-restart")
	e.cmd.Stderr = log
	if err := e.cmd.Start(); err != nil {
		e.t.Fatal(err)
	}
	cmd := e.cmd
	e.t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	e.until(3*time.Minute, func() error { // 10,000 clusters take 5 s, and 40 s on a busy machine
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
		yaml = " []"
	}
	yaml = strings.NewReplacer("RDS", e.path("rds.yaml"), "CERT", e.path("cert.pem"), "KEY",
		e.path("key.pem"), "PIPE", e.path("pipe")).Replace(yaml)
	e.write("lds.yaml", "resources:\n"+yaml)
}

func (e *envoy) certificate() {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		e.t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "lab"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
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

// TestShapes pushes each shape to each Envoy and reads it back. The golden files say what is in the
// pushed YAML. With -update the answers of the newest Envoy are recorded for TestRecorded.
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
					f, err := e.client.Fingerprint(t.Context(), nil)
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
	for file, path := range map[string]string{"dynamic.json": dynamicPath, "static.json": staticPath,
		"masked.json": maskedPath} {
		answer := bytes.ReplaceAll(e.fetch(path), []byte(e.dir), []byte("/run/lab"))
		if err := os.WriteFile(filepath.Join(dir, file), answer, 0o644); err != nil {
			e.t.Fatal(err)
		}
	}
	info, err := e.client.ServerInfo(context.Background())
	if err != nil {
		e.t.Fatal(err)
	}
	short := fmt.Sprintf(
		"{\"version\": %q, \"state\": %q, \"uptime_current_epoch\": \"3s\", \"node\": {\"id\": %q}}\n", info.Text, info.State, info.Node.ID)
	if err := os.WriteFile(filepath.Join(dir, "info.json"), []byte(short), 0o644); err != nil {
		e.t.Fatal(err)
	}
}

// TestLife follows an Envoy through its life: start, change, rejection, restart.
func TestLife(t *testing.T) {
	for _, version := range envoyVersions {
		t.Run(version, func(t *testing.T) {
			yaml, err := os.ReadFile("testdata/shapes/dual-stack.yaml")
			if err != nil {
				t.Fatal(err)
			}
			e := start(t, version, string(yaml))
			ctx := t.Context()
			info, err := e.client.ServerInfo(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if info.Version.String() != version || info.State != "LIVE" || info.Node.ID != "lab-node" ||
				info.Node.Zone != "z1" || info.LogLevel != "info" || info.Config == "" {
				t.Errorf("got %+v", info)
			}
			if got := info.Node.Metadata; got["TRAFFICDIRECTOR_NETWORK_NAME"] != "default" ||
				got["N"] != "5" || len(got) != 2 {
				t.Errorf("metadata %v", got)
			}
			b, err := e.client.Bootstrap(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if b.Admin != "unix://"+e.path("admin.sock") || b.Node.ID != "lab-node" || len(b.Targets) != 0 {
				t.Errorf("got %+v", b)
			}
			clusters, err := e.client.Clusters(ctx)
			if err != nil {
				t.Fatal(err)
			}
			health := map[string]ClusterHealth{}
			for _, c := range clusters {
				health[c.Name] = c
			}
			if a := health["a"]; a.Total != 2 || a.Healthy != 1 || health["b"].Healthy != 1 {
				t.Errorf("got %+v", clusters)
			}
			if panics, err := e.client.Panics(ctx); err != nil || len(panics) != 0 {
				t.Errorf("got %v, %v", panics, err)
			}
			plane, err := e.client.ControlPlane(ctx)
			if err != nil || plane.Connected || plane.Successes != 1 || plane.Rejected != 0 {
				t.Errorf("got %+v, %v", plane, err)
			}

			events := FollowLog(ctx, e.path("envoy.err.log"))
			first, err := e.client.Fingerprint(ctx, nil)
			if err != nil {
				t.Fatal(err)
			}
			// A filter chain more: the version stays, the fingerprint does not.
			e.listeners(strings.Replace(string(yaml), "10.0.0.1", "10.0.0.77", 1))
			if event := next(t, events, 5*time.Second); event.Kind != ListenerChanged ||
				event.Listener != "both" {
				t.Errorf("got %+v", event)
			}
			began := time.Now()
			e.until(5*time.Second, func() error {
				s, err := e.client.Listeners(ctx)
				if err == nil && !strings.Contains(render(s), "10.0.0.77/32") {
					err = errors.New("the new chain is not active")
				}
				return err
			})
			t.Logf("active %v after its line in the log", time.Since(began).Round(time.Millisecond))
			second, err := e.client.Fingerprint(ctx, nil)
			if err != nil || second == first {
				t.Errorf("the fingerprint stayed: %+v, %v", second, err)
			}
			// Refused: the old one stays, and the addresses of the refused are never read.
			e.listeners(strings.Replace(string(yaml), "10.0.0.1", "not-an-address", 1))
			event := next(t, events, 5*time.Second)
			if event.Kind != ListenerRejected || event.Details == "" {
				t.Errorf("got %+v", event)
			}
			s, err := e.client.Listeners(ctx)
			if err != nil || len(s.Rejected) != 1 || s.Rejected[0].Details != event.Details ||
				!strings.Contains(render(s), "10.0.0.77/32") {
				t.Errorf("%v, log %+v:\n%s", err, event, render(s))
			}
			if plane, err = e.client.ControlPlane(ctx); err != nil || plane.Rejected == 0 {
				t.Errorf("got %+v, %v", plane, err)
			}
			// Gone altogether.
			e.listeners("")
			if event := next(t, events, 5*time.Second); event.Kind != ListenerChanged {
				t.Errorf("got %+v", event)
			}
			e.until(5*time.Second, func() error {
				s, err := e.client.Listeners(ctx)
				if err == nil && len(s.Listeners) != 1 {
					err = errors.New(render(s))
				}
				return err
			})

			// Another process: seen by the first question, whatever its listeners are.
			before, err := e.client.Fingerprint(ctx, nil)
			if err != nil {
				t.Fatal(err)
			}
			e.cmd.Process.Kill()
			e.cmd.Wait()
			_, err = e.client.Fingerprint(ctx, nil)
			checkKind(t, err, ErrRefused)
			e.run()
			after, err := e.client.Fingerprint(ctx, nil)
			if err != nil || after.Process <= before.Process {
				t.Errorf("%+v, then %+v, %v", before, after, err)
			}
		})
	}
}

// TestWarming holds a listener back: it waits for routes. It is told apart, by the full dump and by
// the masked one, and seen when it becomes active.
func TestWarming(t *testing.T) {
	for _, version := range envoyVersions {
		t.Run(version, func(t *testing.T) {
			e := start(t, version, "")
			ctx := t.Context()
			e.listeners(`- "@type": type.googleapis.com/envoy.config.listener.v3.Listener
  name: waits
  address: {socket_address: {address: 127.0.0.1, port_value: 15033}}
  filter_chains: [{filters: [{name: http, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager, stat_prefix: x,
    http_filters: [{name: router, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}],
    rds: {route_config_name: r, config_source: {resource_api_version: V3, initial_fetch_timeout: 2s,
      api_config_source: {api_type: GRPC, transport_api_version: V3,
        grpc_services: [{envoy_grpc: {cluster_name: b}}]}}}}}]}]
`)
			var s Snapshot
			e.until(5*time.Second, func() (err error) {
				if s, err = e.client.Listeners(ctx); err == nil && len(s.Warming) == 0 {
					err = fmt.Errorf("not warming: %s", render(s))
				}
				return err
			})
			if s.Warming[0].Name != "waits" || len(s.Listeners) != 1 {
				t.Errorf("got %s", render(s))
			}
			f, err := e.client.Fingerprint(ctx, nil)
			if err != nil || f != s.Fingerprint || f.Warming != 1 {
				t.Errorf("got %+v, %v", f, err)
			}
			e.until(10*time.Second, func() (err error) {
				if f, err = e.client.Fingerprint(ctx, nil); err == nil && f.Warming > 0 {
					err = errors.New("still warming")
				}
				return err
			})
			if s, err = e.client.Listeners(ctx); err != nil || len(s.Listeners) != 2 {
				t.Errorf("got %s, %v", render(s), err)
			}
		})
	}
}

// TestBootstrapRefused: why an Envoy does not start, without the configuration that it quotes.
func TestBootstrapRefused(t *testing.T) {
	for _, version := range envoyVersions {
		e := prepare(t, version)
		e.write("boot.yaml",
			`static_resources: {clusters: [{name: "", metadata: {filter_metadata: {a: {authorization: "Bearer s3cr3t"}}}}]}`)
		said, err := exec.Command("unshare", "-n", binary(t, version), "-c", e.path("boot.yaml"),
			"--disable-hot-restart").CombinedOutput()
		if err == nil || !bytes.Contains(said, []byte("s3cr3t")) {
			t.Fatalf("%s: %v\n%s", version, err, said)
		}
		e.write("envoy.err.log", string(said))
		const want = "Proto constraint validation failed (Bootstrap.StaticResources.Clusters[0].Name: value length must be at least 1 characters)"
		if got, err := LastError(e.path("envoy.err.log")); got != want || err != nil {
			t.Errorf("%s: got %q, %v", version, got, err)
		}
	}
}

// TestForbidden asks an Envoy that allows few paths (1.37 and later).
func TestForbidden(t *testing.T) {
	e := prepare(t, newest)
	e.listeners("")
	e.boot("admin: {", "admin: {allow_paths: [{exact: /ready}, {exact: /server_info}], ")
	e.run()
	_, err := e.client.Listeners(t.Context())
	checkKind(t, err, ErrStatus, ErrForbiddenPath)
	_, err = e.client.Clusters(t.Context())
	checkKind(t, err, ErrStatus, ErrForbiddenPath)
}

// TestStreamClosed has an Envoy ask a control plane that is not there, and one that is no gRPC
// server; the bootstrap tells which.
func TestStreamClosed(t *testing.T) {
	for _, version := range envoyVersions {
		t.Run(version, func(t *testing.T) {
			e := prepare(t, version)
			e.listeners("")
			e.boot("  lds_config: {resource_api_version: V3, path_config_source: {path: LABDIR/lds.yaml}}", `  ads_config: {api_type: GRPC, transport_api_version: V3, grpc_services: [{google_grpc: {target_uri: "dns:///127.0.0.1:9", stat_prefix: td}}]}
  lds_config: {resource_api_version: V3, initial_fetch_timeout: 1s, ads: {}}`)
			events := FollowLog(t.Context(), e.path("envoy.err.log"))
			e.run()
			for {
				event := next(t, events, 20*time.Second)
				if event.Kind != StreamClosed {
					continue
				}
				if event.Code == 0 || event.Method != "StreamAggregatedResources" {
					t.Errorf("got %+v", event)
				}
				t.Logf("%+v", event)
				break
			}
			b, err := e.client.Bootstrap(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if len(b.Targets) != 1 || b.Targets[0] != (Target{Address: "127.0.0.1:9"}) {
				t.Errorf("got %+v", b.Targets)
			}
			plane, err := e.client.ControlPlane(t.Context())
			if err != nil || plane.Successes != 0 {
				t.Errorf("got %+v, %v", plane, err)
			}
			t.Logf("%+v", plane)
		})
	}
}
