//go:build lab

package e2e

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/test/platform"
)

// gcloudFlags stands for gcloud where it is not on PATH. It knows the flags and keys of
// googlecloudsdk/command_lib/compute/instance_templates/flags.py, and cannot know what
// gcloud makes of them.
const gcloudFlags = `#!/bin/sh
set -eu
[ "$1 $2 $3" = "compute instance-templates create" ] && shift 4
while [ $# -gt 0 ]; do
	case $1 in
	--service-proxy)
		for option in $(echo "$2" | tr , ' '); do
			case $option in enabled|serving-ports=*|proxy-port=*|tracing=*|access-log=*|network=*) ;; *) echo "unknown $option" >&2; exit 2 ;; esac
		done ;;
	--service-proxy-labels|--service-proxy-agent-location) ;;
	*) echo "unrecognized arguments: $1" >&2; exit 2 ;;
	esac
	shift 2
done
`

// TestExampleTemplate runs deploy/examples/create-template.sh: gcloud takes its flags, and makes of
// them an attribute that the agent understands, the metadata that it needs, and a recipe that
// installs the archive.
func TestExampleTemplate(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	var template struct {
		Properties struct {
			Metadata        struct{ Items []struct{ Key, Value string } }
			ServiceAccounts []struct{ Scopes []string }
		}
	}
	var server *httptest.Server
	server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		self := server.URL + "/compute/v1/projects/my-project/global/instanceTemplates/web"
		answer := map[string]any{"kind": "compute#instanceTemplate", "name": "web", "selfLink": self,
			"creationTimestamp": "2026-11-24T00:00:00Z",
			"properties":        map[string]any{"machineType": "e2-small", "scheduling": map[string]any{}}}
		if r.Method == http.MethodPost {
			body, err := io.ReadAll(r.Body)
			mu.Lock()
			defer mu.Unlock()
			if err != nil || json.Unmarshal(body, &template) != nil {
				t.Errorf("gcloud sent %q, %v", body, err)
			}
			answer = map[string]any{"kind": "compute#operation", "name": "op", "status": "DONE",
				"operationType": "insert", "targetLink": self,
				"selfLink": server.URL + "/compute/v1/projects/my-project/global/operations/op"}
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(answer) // gcloud says what it lacks
	}))
	defer server.Close()

	emulator := platform.New(platform.VM{})
	defer emulator.Close()
	path := os.Getenv("PATH")
	_, err := exec.LookPath("gcloud")
	real := err == nil
	if !real {
		dir := t.TempDir()
		must(t, os.WriteFile(filepath.Join(dir, "gcloud"), []byte(gcloudFlags), 0o755))
		path = dir + ":" + path
	}
	cmd := exec.CommandContext(t.Context(), "../../deploy/examples/create-template.sh", "web",
		"gs://bucket/a.tgz")
	cmd.Env = append(emulator.GcloudEnv(server.URL, t.TempDir(), path),
		"CLOUDSDK_CORE_PROJECT=my-project")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("gcloud: %v\n%s", err, out)
	}
	if !real {
		t.Log("NOT RUN: gcloud is not on PATH; only its flags were looked at")
		return
	}
	metadata := map[string]string{}
	for _, item := range template.Properties.Metadata.Items {
		metadata[item.Key] = item.Value
	}
	config, err := attribute.Parse([]byte(metadata["gce-service-proxy"]))
	must(t, err)
	if diff := cmp.Diff([]uint16{80, 8080}, config.ServingPorts); diff != "" ||
		config.ProxyPort != 15001 {
		t.Errorf("proxy-port %d, serving-ports (-want +have)\n%s", config.ProxyPort, diff)
	}
	if diff := cmp.Diff(map[string]string{"app": "review", "version": "canary"},
		config.Labels); diff != "" {
		t.Errorf("labels (-want +have)\n%s", diff)
	}
	if metadata["enable-guest-attributes"] != "TRUE" {
		t.Errorf("metadata %v", metadata)
	}
	for _, step := range []string{
		"gsutil cp gs://bucket/a.tgz ", "/service-proxy-agent/service-proxy-agent-bootstrap.sh"} {
		if !strings.Contains(metadata["gce-software-declaration"], step) {
			t.Errorf("the recipe has no %q: %s", step, metadata["gce-software-declaration"])
		}
	}
	for _, account := range template.Properties.ServiceAccounts {
		if !slices.Contains(account.Scopes, "https://www.googleapis.com/auth/cloud-platform") {
			t.Errorf("scopes %q", account.Scopes)
		}
	}
}
