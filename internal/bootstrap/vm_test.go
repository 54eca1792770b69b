package bootstrap

import (
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
)

// A metadata server that fails at any of the questions is no VM without an answer: the error names
// the question, and nothing is made up.
func TestReadVMFails(t *testing.T) {
	const nic = "instance/network-interfaces/0/"
	values := map[string]string{"instance/name": "vm-1", "instance/zone": "projects/1/zones/z",
		"project/numeric-project-id": "1", nic + "network": "projects/1/networks/default",
		nic + "ip": "", nic + "ipv6s": "fd20::1"}
	serve := func(refused string, refuse http.HandlerFunc) {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			path := strings.TrimPrefix(r.URL.Path, "/computeMetadata/v1/")
			if value, ok := values[path]; ok && path != refused {
				says(value)(w, r)
				return
			}
			refuse(w, r)
		}))
		t.Cleanup(srv.Close)
		t.Setenv("GCE_METADATA_HOST", strings.TrimPrefix(srv.URL, "http://"))
	}
	serve("", http.NotFound)
	want := VM{Name: "vm-1", Zone: "z", IP: "fd20::1", Network: "default", ProjectNumber: "1"}
	if vm, err := readVM(t.Context()); err != nil || vm != want {
		t.Fatalf("have %+v, %v", vm, err)
	}
	for path := range values {
		serve(path, status(http.StatusForbidden))
		vm, err := readVM(t.Context())
		if err == nil || !strings.Contains(err.Error(), path) || vm.IP != "" {
			t.Errorf("%s: have %+v, %v", path, vm, err)
		}
	}
	for _, path := range []string{"instance/name", "instance/zone", nic + "network"} {
		serve(path, says(" \n"))
		wantText := `read "` + path + `" from the metadata server: it is empty`
		if _, err := readVM(t.Context()); err == nil || err.Error() != wantText {
			t.Errorf("%s: %v", path, err)
		}
	}
	serve(nic+"ip", says("10.0.0\n"))
	if _, err := readVM(t.Context()); err == nil || !strings.HasPrefix(err.Error(),
		`read "`+nic+`ip" from the metadata server: `) {
		t.Errorf("have %v", err)
	}
	serve(nic+"ipv6s", http.NotFound)
	const none = `the VM has no address: the metadata server has neither "` + nic + `ip" nor "` +
		nic + `ipv6s"`
	if _, err := readVM(t.Context()); err == nil || err.Error() != none {
		t.Errorf("have %v", err)
	}
}

// What a label may not be in protobuf is an error, and no configuration.
func TestEnvoyConfigOfBadLabel(t *testing.T) {
	cfg := attribute.Default()
	cfg.Labels = map[string]string{"app": "\xff"}
	text, err := envoyConfig(cfg, testVM, testCA)
	if text != nil || err == nil || !strings.HasPrefix(err.Error(), "encode the labels: ") {
		t.Errorf("have %q, %v", text, err)
	}
	if node, err := envoyNode(cfg, testVM); node != nil || err == nil {
		t.Errorf("have %v, %v", node, err)
	}
}

// Each key of the attribute is a value of the node's metadata, all of them strings, and only what
// was given is there.
func TestEnvoyNodeMetadata(t *testing.T) {
	plain := map[string]string{
		"INSTANCE_IP":                        "10.132.0.2",
		"TRAFFICDIRECTOR_CLIENT_TYPE":        "gce-managed-envoy",
		"TRAFFICDIRECTOR_INTERCEPTION_PORT":  "15001",
		"TRAFFICDIRECTOR_NETWORK_NAME":       "default",
		"TRAFFICDIRECTOR_GCP_PROJECT_NUMBER": "987654321",
		"TRAFFICDIRECTOR_ENABLE_TRACING":     "false",
	}
	for _, tt := range []struct {
		name   string
		change func(*attribute.Config)
		want   map[string]string // what differs from plain, and what comes to it
	}{
		{"plain", func(*attribute.Config) {}, nil},
		{"port", func(c *attribute.Config) { c.ProxyPort = 16001 },
			map[string]string{"TRAFFICDIRECTOR_INTERCEPTION_PORT": "16001"}},
		{"network", func(c *attribute.Config) { c.Network = "n" },
			map[string]string{"TRAFFICDIRECTOR_NETWORK_NAME": "n"}},
		{"scope", func(c *attribute.Config) { c.Scope = "s" }, nil},
		{"mesh", func(c *attribute.Config) { c.Mesh = "m" }, nil},
		{"project", func(c *attribute.Config) { c.ProjectNumber = "1" },
			map[string]string{"TRAFFICDIRECTOR_GCP_PROJECT_NUMBER": "1"}},
		{"tracing", func(c *attribute.Config) { c.Tracing = true },
			map[string]string{"TRAFFICDIRECTOR_ENABLE_TRACING": "true"}},
		{"access log", func(c *attribute.Config) { c.AccessLog = "/dev/stdout" },
			map[string]string{"TRAFFICDIRECTOR_ACCESS_LOG_PATH": "/dev/stdout"}},
		{"a serving port", func(c *attribute.Config) { c.ServingPorts = []uint16{80} },
			map[string]string{"TRAFFICDIRECTOR_INBOUND_BACKEND_PORTS": "80",
				"TRAFFICDIRECTOR_INBOUND_INTERCEPTION_PORT": "15006"}},
		{"serving ports", func(c *attribute.Config) { c.ServingPorts = []uint16{80, 8080, 443} },
			map[string]string{"TRAFFICDIRECTOR_INBOUND_BACKEND_PORTS": "80,8080,443",
				"TRAFFICDIRECTOR_INBOUND_INTERCEPTION_PORT": "15006"}},
		{"label", func(c *attribute.Config) { c.Labels = map[string]string{"app": "a"} },
			map[string]string{"app": "a"}},
	} {
		cfg := attribute.Default()
		tt.change(&cfg)
		node, err := envoyNode(cfg, testVM)
		if err != nil {
			t.Fatal(err)
		}
		have := map[string]string{}
		for key, value := range node.GetMetadata().GetFields() {
			have[key] = value.GetStringValue()
		}
		want := maps.Clone(plain)
		maps.Copy(want, tt.want)
		if diff := cmp.Diff(want, have); diff != "" {
			t.Errorf("%s (-want +have):\n%s", tt.name, diff)
		}
	}
}

// The same input is the same bytes, whatever the order of the labels: a difference restarts Envoy.
func TestEnvoyConfigIsStable(t *testing.T) {
	golden, err := os.ReadFile("testdata/envoy/labels-odd.json")
	if err != nil {
		t.Fatal(err)
	}
	cfg := captures(t)["labels-odd"]
	if len(cfg.Labels) < 2 {
		t.Fatal("there is no order of ", cfg.Labels)
	}
	for range 50 { // a map's order is drawn
		if have, err := envoyConfig(cfg, testVM, testCA); err != nil || !slices.Equal(have, golden) {
			t.Fatalf("have %s, %v", have, err)
		}
	}
}
