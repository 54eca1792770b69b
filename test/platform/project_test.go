package platform_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/test/platform"
)

// TestProject: the metadata of a project is seen by all of its VMs and by no other, beside
// their own.
func TestProject(t *testing.T) {
	project := platform.NewProject()
	vm := func(name string, p *platform.Project) string {
		_, base := start(t, platform.VM{Name: name, Project: p,
			Attributes: map[string]string{"own": name}})
		return base + v1
	}
	a, b, other := vm("a", project), vm("b", project), vm("c", nil)
	project.SetAttribute("key", "value")
	project.SetAttribute("gone", "")
	project.DeleteAttribute("gone")
	for _, c := range []struct {
		url    string
		status int
		body   string
	}{
		{a + "/project/attributes/key", 200, "value"},
		{b + "/project/attributes/key", 200, "value"},
		{b + "/project/attributes/", 200, "key\n"},
		{b + "/project/?recursive=true", 200, `{"attributes":{"key":"value"},"numericProjectId":123456789012,"projectId":"my-project"}`},
		{b + "/instance/attributes/own", 200, "b"},
		{b + "/instance/attributes/key", 404, ""},
		{b + "/project/attributes/own", 404, ""},
		{a + "/project/attributes/gone", 404, ""},
		{other + "/project/attributes/key", 404, ""},
		{other + "/project/attributes/", 200, ""},
	} {
		if r := ask(t, "GET", c.url, "", flavor...); r.status != c.status ||
			c.status == 200 && r.body != c.body {
			t.Errorf("%s: %d %q, want %d %q", c.url, r.status, r.body, c.status, c.body)
		}
	}
}

// TestProjectLongPoll: what becomes of a key wakes those who wait for it, on each VM.
func TestProjectLongPoll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		project := platform.NewProject()
		project.SetAttribute("key", "1")
		for range 2 {
			e := platform.New(platform.VM{Project: project})
			dial := e.Pipe()
			client := &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}
			asked := func(query string) (int, string) {
				req, err := http.NewRequestWithContext(t.Context(), "GET",
					"http://x"+v1+"/project/attributes/key"+query, nil)
				if err != nil {
					t.Fatal(err)
				}
				req.Header.Set("Metadata-Flavor", "Google")
				resp, err := client.Do(req)
				if err != nil {
					t.Fatal(err)
				}
				defer resp.Body.Close()
				return resp.StatusCode, resp.Header.Get("ETag")
			}
			_, etag := asked("")
			for i, change := range []func(){
				func() { project.SetAttribute("key", fmt.Sprint(time.Now())) },
				func() { project.DeleteAttribute("key") },
			} {
				time.AfterFunc(time.Second, change)
				began := time.Now()
				status, now := asked("?wait_for_change=true&timeout_sec=10&last_etag=" + etag)
				if took := time.Since(began); took != time.Second || status != []int{200, 404}[i] {
					t.Errorf("change %d: %d after %v", i, status, took)
				}
				etag = now
			}
			project.SetAttribute("key", "1")
			if err := e.Close(); err != nil {
				t.Error(err)
			}
		}
	})
}

// TestSetMetadata: the calls by which metadata of a project and of an instance is added and
// removed, as `gcloud compute project-info add-metadata` and `... instances add-metadata` do: all
// is read, and all is replaced if the fingerprint is still the one that was read.
func TestSetMetadata(t *testing.T) {
	_, base := start(t, platform.VM{Attributes: map[string]string{"there": "yes"}})
	project := base + "/compute/v1/projects/my-project"
	for _, test := range []struct{ read, set, field, shown string }{
		{project, project + "/setCommonInstanceMetadata", "commonInstanceMetadata", "/project/attributes/"},
		{project + "/zones/us-central1-a/instances/vm-1",
			project + "/zones/us-central1-a/instances/vm-1/setMetadata", "metadata", "/instance/attributes/"},
	} {
		type metadata struct {
			Fingerprint string              `json:"fingerprint"`
			Items       []map[string]string `json:"items"`
		}
		read := func() (m metadata) {
			t.Helper()
			var all map[string]json.RawMessage
			r := ask(t, "GET", test.read, "")
			if err := json.Unmarshal([]byte(r.body), &all); err != nil || r.status != 200 {
				t.Fatalf("%s: %d %v", test.read, r.status, err)
			}
			if err := json.Unmarshal(all[test.field], &m); err != nil {
				t.Fatal(err)
			}
			return m
		}
		set := func(m metadata) (int, string) {
			t.Helper()
			body, err := json.Marshal(m)
			if err != nil {
				t.Fatal(err)
			}
			r := ask(t, "POST", test.set, string(body))
			return r.status, r.body
		}
		m := read()
		before := m
		m.Items = append(m.Items, map[string]string{"key": "k", "value": "v"})
		code, body := set(m)
		var operation struct{ Name, Status, SelfLink string }
		if err := json.Unmarshal([]byte(body), &operation); err != nil || code != 200 ||
			operation.Status != "DONE" {
			t.Errorf("%s: %d %s", test.set, code, body)
		}
		if r := ask(t, "GET", base+v1+test.shown+"k", "", flavor...); r.body != "v" {
			t.Errorf("the VM sees %d %q", r.status, r.body)
		}
		if code, body := set(m); code != 412 { // somebody else has changed it since
			t.Errorf("an old fingerprint: %d %s", code, body)
		}
		before.Fingerprint = read().Fingerprint
		if code, body := set(before); code != 200 {
			t.Errorf("set back: %d %s", code, body)
		}
		if r := ask(t, "GET", base+v1+test.shown+"k", "", flavor...); r.status != 404 {
			t.Errorf("the VM sees %d %q", r.status, r.body)
		}
		if r := ask(t, "POST", test.set, "{"); r.status != 400 {
			t.Errorf("no JSON: %d", r.status)
		}
	}
	if r := ask(t, "GET", project+"/global/operations/operation-1", ""); r.status != 200 ||
		!strings.Contains(r.body, `"DONE"`) {
		t.Errorf("the operation: %d %s", r.status, r.body)
	}
	if r := ask(t, "GET", base+v1+"/instance/attributes/there", "", flavor...); r.body != "yes" {
		t.Errorf("what was there: %d %q", r.status, r.body)
	}
	if r := ask(t, "GET", project+"/nothing", ""); r.status != 404 {
		t.Errorf("unknown: %d", r.status)
	}
}
