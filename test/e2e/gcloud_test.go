//go:build lab

package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

func writeFile(path, text string) error { return os.WriteFile(path, []byte(text), 0o644) }
func mkdir(path string) error           { return os.MkdirAll(path, 0o755) }

// TestGcloud: unmodified gcloud reads what the agent wrote, all keys and one alone. Without gcloud on PATH the same API
// calls are made by the test.
func TestGcloud(t *testing.T) {
	m, a := start(t, mesh.Options{Config: services()})
	must(t, a.WaitReady(within(t, 20*time.Second)))
	must(t, m.Platform.Wait(within(t, 20*time.Second), func() bool {
		g := m.Platform.GuestAttributes("gce-service-proxy")
		return g["proxy-version"] != "" && g["agent-heartbeat"] != ""
	}))
	info, err := m.Envoy.Admin(t.Context(), "/server_info")
	must(t, err)
	var server struct{ Version string }
	must(t, json.Unmarshal([]byte(info), &server))
	if got := m.Platform.GuestAttributes("gce-service-proxy")["proxy-version"]; got != server.Version {
		t.Errorf("proxy-version %q, want Envoy's %q", got, server.Version)
	}
	beat, err := time.Parse(time.RFC3339, m.Platform.GuestAttributes("gce-service-proxy")["agent-heartbeat"])
	if err != nil || time.Since(beat) > time.Minute || beat.Location() != time.UTC {
		t.Errorf("heartbeat %v, %v", beat, err)
	}
	if b := m.Platform.Budget(); !b.Kept() {
		t.Errorf("budget: %+v", b)
	}

	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	m.Platform.Serve(ln, nil)
	base := "http://" + ln.Addr().String()
	read := func(query string) [][]string {
		if _, err := exec.LookPath("gcloud"); err != nil {
			fmt.Println("NOT RUN: gcloud is not on PATH; asking the API itself")
			return askAPI(t, base, query)
		}
		cmd := exec.CommandContext(t.Context(), "gcloud", "compute", "instances", "get-guest-attributes", "vm-1", "--zone=us-central1-a", "--project=my-project", "--query-path="+query)
		cmd.Env = m.Platform.GcloudEnv(base, t.TempDir(), os.Getenv("PATH"))
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("gcloud: %v\n%s", err, out)
		}
		var rows [][]string
		for line := range strings.Lines(string(out)) {
			rows = append(rows, strings.Fields(line))
		}
		return rows
	}
	header := []string{"NAMESPACE", "KEY", "VALUE"}
	want := [][]string{header, {"gce-service-proxy", "proxy-version", server.Version}}
	if got := read("gce-service-proxy/proxy-version"); !slices.EqualFunc(got, want, slices.Equal) {
		t.Errorf("one key: %q, want %q", got, want)
	}
	got := read("gce-service-proxy/")
	attributes := m.Platform.GuestAttributes("gce-service-proxy")
	if len(got) != len(attributes)+1 || !slices.Equal(got[0], header) {
		t.Fatalf("all keys: %q, want %d rows", got, len(attributes))
	}
	for _, row := range got[1:] {
		if row[0] != "gce-service-proxy" || strings.Join(row[2:], " ") != attributes[row[1]] {
			t.Errorf("row %q, want value %q", row, attributes[row[1]])
		}
	}
}

// askAPI is the call that gcloud makes, as rows of its table.
func askAPI(t *testing.T, base, query string) [][]string {
	resp, err := http.Get(base + "/compute/v1/projects/my-project/zones/us-central1-a/instances/vm-1/getGuestAttributes?alt=json&queryPath=" + query)
	must(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	must(t, err)
	var answer struct {
		QueryValue struct {
			Items []struct{ Namespace, Key, Value string }
		}
	}
	must(t, json.Unmarshal(body, &answer))
	rows := [][]string{{"NAMESPACE", "KEY", "VALUE"}}
	for _, i := range answer.QueryValue.Items {
		rows = append(rows, append([]string{i.Namespace, i.Key}, strings.Fields(i.Value)...))
	}
	return rows
}
