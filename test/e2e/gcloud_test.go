//go:build lab

package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
	"github.com/service-proxy-agent/service-proxy-agent/test/platform"
)

func writeFile(path, text string) error { return os.WriteFile(path, []byte(text), 0o644) }
func mkdir(path string) error           { return os.MkdirAll(path, 0o755) }

// TestGcloud: a VM's small story is read from outside, on all three channels that gcloud reads: by
// the requests that gcloud 528 was seen to make and, where it is on PATH, by gcloud itself. (It
// comes with Google's own installer only, so `make test` says at its end when there was none.) The
// serial port and Cloud Logging tell the same in the same order, and the guest attributes how it
// ended.
func TestGcloud(t *testing.T) {
	t.Parallel()
	m, a := start(t, mesh.Options{Config: services()})
	play(t, m, a)

	must(t, m.Platform.Wait(within(t, 2*time.Minute), func() bool { // within its budget of writes
		s, err := a.Status(t.Context())
		must(t, err)
		g := m.Platform.GuestAttributes(guestattr.Namespace)
		head, _ := s.Line()
		return g["proxy-version"] != "" && g["agent-heartbeat"] != "" &&
			g["agent-last-failure"] == s.LastFailure && strings.HasPrefix(g["agent-status"], head)
	}))
	attributes := m.Platform.GuestAttributes(guestattr.Namespace)
	beat, err := time.Parse(time.RFC3339, attributes["agent-heartbeat"])
	if err != nil || time.Since(beat) > 3*time.Minute || beat.Location() != time.UTC {
		t.Errorf("heartbeat %v, %v", beat, err)
	}
	if b := m.Platform.Budget(); !b.Kept() {
		t.Errorf("budget: %+v", b)
	}
	info, err := m.Envoy.Admin(t.Context(), "/server_info")
	must(t, err)
	var server struct{ Version string }
	must(t, json.Unmarshal([]byte(info), &server))

	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	m.Platform.Serve(ln, nil)
	base := "http://" + ln.Addr().String()
	readers := map[string]func(q question) string{"by API": func(q question) string {
		return askAPI(t, base, q)
	}}
	if gcloud, err := exec.LookPath("gcloud"); err == nil {
		readers["by gcloud"] = func(q question) string { return askGcloud(t, m, gcloud, base, q) }
	}
	for by, said := range askAll(readers) {
		checkAttributes(t, by, said, attributes, server.Version)
		checkStory(t, by, said, attributes, server.Version)
	}
	// Whoever asks, the request is the same to the letter.
	asked := map[string]bool{}
	for _, r := range m.Platform.Requests() {
		if !strings.HasPrefix(r.Path, "/computeMetadata/") && r.Path != "/v2/entries:write" {
			asked[strings.TrimSuffix(r.Method+" "+r.Path+"?"+r.Query, "?")] = true
		}
	}
	want := []string{
		"GET " + vmPath + "/getGuestAttributes?alt=json&queryPath=gce-service-proxy%2F",
		"GET " + vmPath + "/getGuestAttributes?alt=json&queryPath=gce-service-proxy%2Fproxy-version",
		"GET " + vmPath + "/serialPort?alt=json&port=1",
		"POST /v2/entries:list?alt=json",
	}
	if got := slices.Sorted(maps.Keys(asked)); !slices.Equal(got, want) {
		t.Errorf("requests\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// play is the story: a start, a service that comes, a listener that Envoy rejects, and Envoy killed
// and back. It ends when all is well again, and told.
func play(t *testing.T, m *mesh.Mesh, a *mesh.Agent) {
	t.Helper()
	must(t, a.WaitReady(within(t, 20*time.Second)))
	more := services(service(1))
	_, err := m.CP.Set(more)
	must(t, err)
	through(t, m, extraOf(service(1)))
	more.Listeners = append(more.Listeners,
		controlplane.RefusedListener("bad", 16001, "/root/access.log"))
	_, err = m.CP.Set(more)
	must(t, err)
	_, err = a.Wait(within(t, 20*time.Second), "the rejection", func(s status.Status) bool {
		return hasFinding(s, symptom.AccessLogUnwritable)
	})
	must(t, err)
	more.Listeners = nil
	_, err = m.CP.Set(more)
	must(t, err)
	_, err = a.Wait(within(t, 20*time.Second), "its end", func(s status.Status) bool {
		return strings.Contains(s.LastFailure, "(over; ")
	})
	must(t, err)
	m.Envoy.Kill()
	_, err = a.Wait(within(t, 10*time.Second), "the failure", func(s status.Status) bool {
		return !s.Ready && hasFinding(s, symptom.EnvoyDown)
	})
	must(t, err)
	must(t, m.Envoy.Start())
	_, err = a.Wait(within(t, 20*time.Second), "its end", func(s status.Status) bool {
		return s.Ready && strings.Contains(s.LastFailure, "(over; ")
	})
	must(t, err)
	must(t, m.Platform.Wait(within(t, 20*time.Second), func() bool {
		return len(told(m.Platform.LogEntries())) == len(lines(m.Platform.Serial()))
	}))
}

// extraOf is where clients look for a service of [service].
func extraOf(s controlplane.Service) netip.AddrPort {
	return netip.AddrPortFrom(s.Prefixes[0].Addr(), s.Port)
}

// question is one that people ask from outside: one of these is not empty.
type question struct {
	attributes string // the path
	serial     bool
	log        string // the filter
}

const (
	oneKey  = "gce-service-proxy/proxy-version"
	allKeys = "gce-service-proxy/"
	// The guide's own query
	// (https://cloud.google.com/traffic-director/docs/troubleshooting, "Determine the Envoy version").
	versionFilter = `resource.type="gce_instance" resource.labels.instance_id="4520031799277581759" ` +
		`jsonPayload.message:"Envoy version"`
	allFilter = `logName="projects/my-project/logs/service-proxy-agent"`

	vmPath = "/compute/v1/projects/my-project/zones/us-central1-a/instances/vm-1"
)

var questions = []question{{attributes: oneKey}, {attributes: allKeys}, {serial: true},
	{log: versionFilter}, {log: allFilter}}

// askAll asks everybody everything, at the same time: gcloud takes a second or more to start.
func askAll(readers map[string]func(question) string) map[string]map[question]string {
	var mu sync.Mutex
	var wg sync.WaitGroup
	said := map[string]map[question]string{}
	for by, read := range readers {
		said[by] = map[question]string{}
		for _, q := range questions {
			wg.Go(func() {
				answer := read(q)
				mu.Lock()
				defer mu.Unlock()
				said[by][q] = answer
			})
		}
	}
	wg.Wait()
	return said
}

// checkAttributes: all of them, and one alone, as gcloud's table.
func checkAttributes(t *testing.T, by string, said map[question]string,
	attributes map[string]string, version string) {
	t.Helper()
	rows := func(q string) (rows [][]string) {
		for line := range strings.Lines(said[question{attributes: q}]) {
			rows = append(rows, strings.Fields(line))
		}
		return rows
	}
	header := []string{"NAMESPACE", "KEY", "VALUE"}
	want := [][]string{header, {"gce-service-proxy", "proxy-version", version}}
	if got := rows(oneKey); !slices.EqualFunc(got, want, slices.Equal) {
		t.Errorf("%s: one key: %q, want %q", by, got, want)
	}
	got := rows(allKeys)
	if len(got) != len(attributes)+1 || !slices.Equal(got[0], header) {
		t.Errorf("%s: all keys: %q, want %d rows", by, got, len(attributes))
		return
	}
	for _, row := range got[1:] {
		// A heartbeat may have come since.
		if row[0] != "gce-service-proxy" || row[1] != "agent-heartbeat" &&
			strings.Join(row[2:], " ") != attributes[row[1]] {
			t.Errorf("%s: row %q, want value %q", by, row, attributes[row[1]])
		}
	}
}

// checkStory: all channels tell the same.
func checkStory(t *testing.T, by string, said map[question]string, attributes map[string]string,
	version string) {
	t.Helper()
	var versions, entries []platform.LogEntry
	must(t, json.Unmarshal([]byte(said[question{log: versionFilter}]), &versions))
	must(t, json.Unmarshal([]byte(said[question{log: allFilter}]), &entries))
	serial, log := lines(said[question{serial: true}]), told(entries)
	if !slices.Equal(serial, log) {
		t.Errorf("%s: the serial port tells\n%s\nCloud Logging tells\n%s", by,
			strings.Join(serial, "\n"), strings.Join(log, "\n"))
	}
	if want := []string{"INFO Envoy Version: " + version}; !slices.Equal(told(versions), want) {
		t.Errorf("%s: the guide's query finds %q, want %q", by, told(versions), want)
	}
	for _, e := range entries {
		local, err := time.Parse("2006-01-02T15:04:05.0000Z", fmt.Sprint(e.JSONPayload["localTimestamp"]))
		if err != nil || local.Sub(e.Timestamp).Abs() > time.Millisecond ||
			e.Resource.Type != "gce_instance" || e.Resource.Labels["zone"] != "us-central1-a" ||
			e.Resource.Labels["project_id"] != "my-project" || e.Labels["instance_name"] != "vm-1" {
			t.Errorf("%s: entry %+v, %v", by, e, err)
		}
	}
	next := 0
	story := []string{`service-proxy-agent \S+ started`, "Envoy Version: ", "interception: intercepting",
		"[0-9]+ services are intercepted", "ready: ", `service found: s1 \(10\.20\.0\.1:9000\)`,
		"Envoy rejected listener bad", "over: Envoy rejected listener bad", "Envoy is not running",
		"over: Envoy is not running"}
	for _, line := range serial {
		if next < len(story) && regexp.MustCompile(`^[A-Z]+ `+story[next]).MatchString(line) {
			next++
		}
	}
	if next < len(story) {
		t.Errorf("%s: after the others there is no line %q in\n%s", by, story[next],
			strings.Join(serial, "\n"))
	}
	// And how it ended, in the last words that were said of a failure.
	last := ""
	for _, line := range serial {
		if text, over := strings.CutPrefix(line, "INFO over: "); over {
			last = text
		}
	}
	if failure := attributes["agent-last-failure"]; last == "" ||
		!strings.HasPrefix(failure, last) || !strings.Contains(failure, "(over; ") {
		t.Errorf("agent-last-failure %q, want %q, over", failure, last)
	}
	if line := attributes["agent-status"]; !regexp.MustCompile(
		`^v1 state=ready finding=none since=\S+Z agent=\S+ envoy=[0-9.]+ services=3$`).MatchString(line) {
		t.Errorf("agent-status %q", line)
	}
}

// lines are those of ours on the serial port, without their time: "INFO message" and so on.
func lines(serial string) (all []string) {
	for line := range strings.Lines(serial) {
		if part := serialLine.FindStringSubmatch(line); part != nil {
			all = append(all, part[1]+" "+part[2])
		}
	}
	return all
}

// told are the entries in the same form.
func told(entries []platform.LogEntry) (all []string) {
	for _, e := range entries {
		all = append(all, fmt.Sprintf("%s %v", e.Severity, e.JSONPayload["message"]))
	}
	return all
}

// askGcloud has the real one print what it prints.
func askGcloud(t *testing.T, m *mesh.Mesh, gcloud, base string, q question) string {
	args := []string{"logging", "read", q.log, "--format=json", "--order=asc"}
	switch {
	case q.serial:
		args = []string{"compute", "instances", "get-serial-port-output", "vm-1", "--zone=us-central1-a"}
	case q.attributes != "":
		args = []string{"compute", "instances", "get-guest-attributes", "vm-1", "--zone=us-central1-a",
			"--query-path=" + q.attributes}
	}
	cmd := exec.CommandContext(t.Context(), gcloud, append(args, "--project=my-project")...)
	cmd.Env = m.Platform.GcloudEnv(base, t.TempDir(), os.Getenv("PATH"))
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Errorf("gcloud %q: %v\n%s", args, err, stderr.String())
	}
	return string(out)
}

// askAPI makes the call that gcloud makes, and prints the answer as gcloud does.
func askAPI(t *testing.T, base string, q question) string {
	method, path, body := http.MethodGet, vmPath+"/serialPort?alt=json&port=1", ""
	switch {
	case q.attributes != "":
		path = vmPath + "/getGuestAttributes?alt=json&queryPath=" + url.QueryEscape(q.attributes)
	case q.log != "":
		method, path = http.MethodPost, "/v2/entries:list?alt=json"
		body = fmt.Sprintf(`{"filter":%q,"orderBy":"timestamp asc","pageSize":1000,`+
			`"resourceNames":["projects/my-project"]}`, q.log)
	}
	req, err := http.NewRequestWithContext(t.Context(), method, base+path, strings.NewReader(body))
	if err != nil {
		t.Error(err)
		return ""
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Error(err)
		return ""
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Errorf("%s: %s %s %v", path, resp.Status, answer, err)
	}
	var in struct {
		QueryValue struct {
			Items []struct{ Namespace, Key, Value string }
		}
		Contents string
		Entries  json.RawMessage
	}
	if err := json.Unmarshal(answer, &in); err != nil {
		t.Errorf("%s: %s %v", path, answer, err)
	}
	table := "NAMESPACE KEY VALUE\n"
	for _, i := range in.QueryValue.Items {
		table += fmt.Sprintf("%s %s %s\n", i.Namespace, i.Key, i.Value)
	}
	switch {
	case q.serial:
		return in.Contents
	case q.log != "":
		return string(in.Entries)
	}
	return table
}
