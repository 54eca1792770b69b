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
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
	"github.com/service-proxy-agent/service-proxy-agent/test/platform"
)

var serialLine = regexp.MustCompile(`^\S+ service-proxy-agent/1 ([A-Z]+): (.*?)\r?\n$`)

// serialStory is what was told on the serial port.
func serialStory(m *mesh.Mesh) []string { return lines(m.Platform.Serial()) }

// cloudStory is the same of Cloud Logging.
func cloudStory(m *mesh.Mesh) []string { return told(m.Platform.LogEntries()) }

// TestCloudLogging: what is told on the serial port is told in Cloud Logging, in the same words and
// order, each entry once, while requests fail, and when they are answered again.
func TestCloudLogging(t *testing.T) {
	t.Parallel()
	m, err := mesh.New(within(t, 30*time.Second), mesh.Options{Config: services()})
	must(t, err)
	m.Platform.SetAttribute("created-by",
		"projects/123456789012/zones/us-central1-a/instanceGroupManagers/web")
	a := m.NewAgent()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("agent's log:\n%s", a.Log())
		}
		must(t, m.Close())
	})
	same := func(what string, least int) {
		t.Helper()
		ctx := within(t, 60*time.Second)
		if m.Platform.Wait(ctx, func() bool {
			serial := serialStory(m)
			return len(serial) >= least && slices.Equal(serial, cloudStory(m))
		}) != nil {
			t.Fatalf("%s: the serial port and Cloud Logging differ:\n%s", what,
				cmp.Diff(serialStory(m), cloudStory(m)))
		}
	}
	must(t, a.Start())
	must(t, a.WaitReady(within(t, 20*time.Second)))
	same("at the start", 3)

	// Two failures, of which the first is told while no request is answered.
	remove := m.Platform.Inject(platform.Fault{Prefix: "/v2/entries:write", Hang: true})
	m.Envoy.Kill()
	_, err = a.Wait(within(t, 20*time.Second), "Envoy down", func(s status.Status) bool {
		return hasFinding(s, symptom.EnvoyDown)
	})
	must(t, err)
	before := len(m.Platform.LogEntries())
	eventually(t, 20*time.Second, "a failing channel", func() (bool, string) {
		up := metric(t, a, `channel_up{channel="cloud_logging"}`)
		return up == 0, fmt.Sprint("up: ", up)
	})
	if n := len(m.Platform.LogEntries()); n != before {
		t.Errorf("%d entries while requests hang", n-before)
	}
	remove()
	must(t, m.Envoy.Start())
	must(t, a.WaitReady(within(t, 20*time.Second)))
	same("after a failure", 6)

	// What was not sent yet is, at the end.
	m.Envoy.Kill()
	_, err = a.Wait(within(t, 20*time.Second), "Envoy down", func(s status.Status) bool {
		return hasFinding(s, symptom.EnvoyDown)
	})
	must(t, err)
	_, err = a.Stop()
	must(t, err)
	same("after the end", 8)
	checkEntries(t, m)
	checkQuery(t, m)
}

// checkEntries looks at all that an entry has beside its message.
func checkEntries(t *testing.T, m *mesh.Mesh) {
	t.Helper()
	var last time.Time
	down := 0
	for _, e := range m.Platform.LogEntries() {
		local, err := time.Parse("2006-01-02T15:04:05.0000Z", e.JSONPayload["localTimestamp"].(string))
		if err != nil || !local.Equal(e.Timestamp.Truncate(100*time.Microsecond)) ||
			e.Timestamp.Before(last) || e.ReceiveTimestamp.Before(e.Timestamp) {
			t.Errorf("times of %+v: %v", e, err)
		}
		last = e.Timestamp
		if diff := cmp.Diff(platform.MonitoredResource{Type: "gce_instance",
			Labels: map[string]string{"project_id": "my-project", "zone": "us-central1-a",
				"instance_id": "4520031799277581759"}}, e.Resource); diff != "" {
			t.Errorf("resource: %s", diff)
		}
		if diff := cmp.Diff(map[string]string{"instance_name": "vm-1",
			"compute.googleapis.com/instance_group_manager/name": "web",
			"compute.googleapis.com/instance_group_manager/zone": "us-central1-a"},
			e.Labels); diff != "" {
			t.Errorf("labels: %s", diff)
		}
		if e.LogName != "projects/my-project/logs/service-proxy-agent" || e.InsertID == "" {
			t.Errorf("%+v", e)
		}
		if e.JSONPayload["id"] == string(symptom.EnvoyDown) && e.Severity == "ERROR" {
			down++
			if e.JSONPayload["cause"] == nil || e.JSONPayload["next"] == nil {
				t.Errorf("a failure without its cause or next step: %v", e.JSONPayload)
			}
		}
	}
	if down != 2 {
		t.Errorf("%d entries say that Envoy is down, want 2", down)
	}
}

// checkQuery reads entries from outside, by a query of the guides' form.
func checkQuery(t *testing.T, m *mesh.Mesh) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	m.Platform.Serve(ln, nil)
	base := "http://" + ln.Addr().String()
	const filter = `resource.type="gce_instance" jsonPayload.message:"IS live AND the rules"`
	body, err := json.Marshal(map[string]any{
		"resourceNames": []string{"projects/my-project"}, "filter": filter})
	must(t, err)
	resp, err := http.Post(base+"/v2/entries:list", "application/json",
		strings.NewReader(string(body)))
	must(t, err)
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	must(t, err)
	var found struct{ Entries []platform.LogEntry }
	must(t, json.Unmarshal(text, &found))
	if len(found.Entries) != 2 {
		t.Errorf("%d entries for %s, want 2: %s", len(found.Entries), filter, text)
	}
	gcloud, err := exec.LookPath("gcloud")
	if err != nil {
		t.Logf("NOT RUN with the real gcloud: %v", err)
		return
	}
	cmd := exec.CommandContext(t.Context(), gcloud, "logging", "read", filter,
		"--project=my-project", "--format=value(jsonPayload.message)")
	cmd.Env = m.Platform.GcloudEnv(base, t.TempDir(), os.Getenv("PATH"))
	out, err := cmd.CombinedOutput()
	if err != nil || strings.Count(string(out), "is live and the rules") != 2 {
		t.Errorf("gcloud logging read: %v\n%s", err, out)
	}
}
