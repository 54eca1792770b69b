package bootstrap

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
)

var update = flag.Bool("update", false, "rewrite the golden files")

var testVM = VM{Name: "vm-1", Zone: "europe-west1-b", IP: "10.132.0.2", Network: "default",
	ProjectNumber: "987654321"}

const testCA = "/etc/ssl/certs/ca-certificates.crt"

// captures are the attributes that real gcloud wrote, parsed; the Anthos form is left out.
func captures(t *testing.T) map[string]attribute.Config {
	t.Helper()
	files, err := filepath.Glob("../attribute/testdata/*.attr")
	if err != nil || len(files) == 0 {
		t.Fatal("no captures", err)
	}
	configs := map[string]attribute.Config{}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".attr")
		if name == "asm-managed" {
			continue
		}
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		cfg, err := attribute.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		configs[name] = cfg
	}
	return configs
}

func TestEnvoyConfig(t *testing.T) {
	for name, cfg := range captures(t) {
		have, err := envoyConfig(cfg, testVM, testCA)
		if err != nil {
			t.Fatal(err)
		}
		golden := filepath.Join("testdata", "envoy", name+".json")
		if *update {
			if err := os.MkdirAll(filepath.Dir(golden), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(golden, have, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(golden)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want), string(have)); diff != "" {
			t.Errorf("%s (-want +have):\n%s", name, diff)
		}
	}
}

// Labels are people's text: they end as values of the JSON, whatever they hold, and never replace a
// key of Traffic Director's.
func TestEnvoyConfigLabels(t *testing.T) {
	cfg := attribute.Default()
	cfg.Labels = map[string]string{
		"TRAFFICDIRECTOR_NETWORK_NAME": "evil", "INSTANCE_IP": "1.2.3.4",
		"a\"}},\n\"admin\": {": "\x00\x1b[1m\u2028'\"\\é中\r\n- yaml: [", "": "",
	}
	text, err := envoyConfig(cfg, testVM, testCA)
	if err != nil {
		t.Fatal(err)
	}
	var doc struct {
		Node struct{ Metadata map[string]string }
	}
	if err := json.Unmarshal(text, &doc); err != nil {
		t.Fatal(err)
	}
	meta := doc.Node.Metadata
	if meta["TRAFFICDIRECTOR_NETWORK_NAME"] != "default" || meta["INSTANCE_IP"] != testVM.IP {
		t.Errorf("a label replaced a key of ours: %v", meta)
	}
	for key, value := range cfg.Labels {
		if strings.HasPrefix(key, "TRAFFIC") || key == "INSTANCE_IP" {
			continue
		}
		if have, ok := meta[key]; !ok || have != value {
			t.Errorf("label %q: have %q, want %q", key, have, value)
		}
	}
	if strings.Contains(string(text), "OpenCensus") || strings.Contains(string(text), "opencensus") {
		t.Error("OpenCensus is refused by Envoy 1.31 and later")
	}
}

func TestEnvoyNodeID(t *testing.T) {
	for _, tt := range []struct {
		change func(*attribute.Config)
		want   string
	}{
		{func(*attribute.Config) {}, "projects/987654321/networks/default/nodes/vm-1.europe-west1-b.10.132.0.2"},
		{func(c *attribute.Config) { c.Network = "n" }, "projects/987654321/networks/n/nodes/vm-1.europe-west1-b.10.132.0.2"},
		{func(c *attribute.Config) { c.Network, c.Mesh, c.ProjectNumber = "n", "m", "1" }, "projects/1/networks/mesh:m/nodes/vm-1.europe-west1-b.10.132.0.2"},
		{func(c *attribute.Config) { c.Scope = "s" }, "projects/987654321/networks/scope:s/nodes/vm-1.europe-west1-b.10.132.0.2"},
	} {
		cfg := attribute.Default()
		tt.change(&cfg)
		node, err := envoyNode(cfg, testVM)
		if err != nil || node.GetId() != tt.want {
			t.Errorf("have %q, %v, want %q", node.GetId(), err, tt.want)
		}
	}
}
