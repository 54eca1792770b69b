//go:build lab

package e2e

import (
	"encoding/json"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
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

// TestGcloud: what the agent wrote is read from outside, all keys and one alone: by the request
// that gcloud 528 was seen to make and, where it is on PATH, by gcloud itself. It comes with
// Google's own installer only, so `make test` says at its end when there was none.
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
	beat, err := time.Parse(
		time.RFC3339, m.Platform.GuestAttributes("gce-service-proxy")["agent-heartbeat"])
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
	readers := map[string]func(query string) [][]string{"by API": func(query string) [][]string {
		return askAPI(t, base, query)
	}}
	if gcloud, err := exec.LookPath("gcloud"); err == nil {
		readers["by gcloud"] = func(query string) [][]string {
			return askGcloud(t, m, gcloud, base, query)
		}
	}
	header := []string{"NAMESPACE", "KEY", "VALUE"}
	want := [][]string{header, {"gce-service-proxy", "proxy-version", server.Version}}
	attributes := m.Platform.GuestAttributes("gce-service-proxy")
	for by, read := range readers {
		if got := read("gce-service-proxy/proxy-version"); !slices.EqualFunc(got, want, slices.Equal) {
			t.Errorf("%s: one key: %q, want %q", by, got, want)
		}
		got := read("gce-service-proxy/")
		if len(got) != len(attributes)+1 || !slices.Equal(got[0], header) {
			t.Fatalf("%s: all keys: %q, want %d rows", by, got, len(attributes))
		}
		for _, row := range got[1:] {
			if row[0] != "gce-service-proxy" || strings.Join(row[2:], " ") != attributes[row[1]] {
				t.Errorf("%s: row %q, want value %q", by, row, attributes[row[1]])
			}
		}
	}
	// Whoever asks, the request is the same to the letter.
	asked := map[string]bool{}
	for _, r := range m.Platform.Requests() {
		if strings.HasSuffix(r.Path, "/getGuestAttributes") {
			asked[r.Method+" "+r.Path+"?"+r.Query] = true
		}
	}
	const vm = "GET /compute/v1/projects/my-project/zones/us-central1-a/instances/vm-1/getGuestAttributes?alt=json&queryPath=gce-service-proxy%2F"
	if len(asked) != 2 || !asked[vm] || !asked[vm+"proxy-version"] {
		t.Errorf("requests %q, want %q and one with proxy-version at its end",
			slices.Collect(maps.Keys(asked)), vm)
	}
}

// askGcloud has the real one print its table.
func askGcloud(t *testing.T, m *mesh.Mesh, gcloud, base, query string) (rows [][]string) {
	cmd := exec.CommandContext(t.Context(), gcloud, "compute", "instances", "get-guest-attributes",
		"vm-1", "--zone=us-central1-a", "--project=my-project", "--query-path="+query)
	cmd.Env = m.Platform.GcloudEnv(base, t.TempDir(), os.Getenv("PATH"))
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("gcloud: %v\n%s", err, out)
	}
	for line := range strings.Lines(string(out)) {
		rows = append(rows, strings.Fields(line))
	}
	return rows
}

// askAPI is the call that gcloud makes, as rows of its table.
func askAPI(t *testing.T, base, query string) [][]string {
	resp, err := http.Get(base +
		"/compute/v1/projects/my-project/zones/us-central1-a/instances/vm-1/getGuestAttributes?alt=json&queryPath=" + url.QueryEscape(query))
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
