package platform_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"cloud.google.com/go/compute/metadata"

	"github.com/service-proxy-agent/service-proxy-agent/test/platform"
	"github.com/service-proxy-agent/service-proxy-agent/test/platform/authority"
)

// start serves an emulator on loopback and says its base URL.
func start(t *testing.T, vm platform.VM) (*platform.Emulator, string) {
	t.Helper()
	e := platform.New(vm)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	e.Serve(ln, nil)
	closed(t, e)
	return e, "http://" + ln.Addr().String()
}

// closed closes e at the test's end.
func closed(t *testing.T, e *platform.Emulator) {
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
}

// reply is an answer, read.
type reply struct {
	status int
	header http.Header
	body   string
}

// ask sends one request; headers come in pairs.
func ask(t *testing.T, method, url, body string, headers ...string) reply {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	client := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error {
		return http.ErrUseLastResponse
	}}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return reply{resp.StatusCode, resp.Header, string(got)}
}

const (
	v1    = "/computeMetadata/v1"
	guest = v1 + "/instance/guest-attributes/"
)

// flavor is the header that the metadata server wants.
var flavor = []string{"Metadata-Flavor", "Google"}

func TestMetadataPaths(t *testing.T) {
	const attribute = `{"labels":{"a":"<é>"}}`
	e, base := start(t, platform.VM{
		Attributes: map[string]string{"gce-service-proxy": attribute, "enable-oslogin": "TRUE"}})
	e.SetGuestAttribute("ns", "key", "value")
	for _, c := range []struct {
		path   string
		status int
		body   string
	}{
		{"/instance/attributes/gce-service-proxy", 200, attribute},
		{"/instance/attributes/", 200, "enable-oslogin\ngce-service-proxy\n"},
		{"/instance/attributes", 301, ""},
		{"/instance/attributes/absent", 404, ""},
		{"/instance/attributes/gce-service-proxy/", 404, ""},
		{"/instance/attributes/?recursive=true", 200, `{"enable-oslogin":"TRUE","gce-service-proxy":"{\"labels\":{\"a\":\"<é>\"}}"}`},
		{"/instance/attributes/gce-service-proxy?alt=json", 200, `"{\"labels\":{\"a\":\"<é>\"}}"`},
		{"/instance/id", 200, "4520031799277581759"},
		{"/instance/name", 200, "vm-1"},
		{"/instance/zone", 200, "projects/123456789012/zones/us-central1-a"},
		{"/instance/network-interfaces/", 200, "0/\n"},
		{"/instance/network-interfaces/0/network", 200, "projects/123456789012/networks/default"},
		{"/instance/network-interfaces/0/ip", 200, "10.128.0.2"},
		{"/instance/network-interfaces/1/ip", 404, ""},
		{"/instance/service-accounts/default/scopes", 200, platform.CloudPlatform + "\n"},
		{"/instance/service-accounts/default/email", 200, "123456789012-compute@developer.gserviceaccount.com"},
		{"/instance/service-accounts/default/?recursive=true&alt=text", 200, "aliases default\nemail 123456789012-compute@developer.gserviceaccount.com\nscopes " + platform.CloudPlatform + "\n"},
		{"/project/project-id", 200, "my-project"},
		{"/project/?recursive=true", 200, `{"attributes":{},"numericProjectId":123456789012,"projectId":"my-project"}`},
		{"/instance/guest-attributes/ns/key", 200, "value"},
		{"/instance/guest-attributes/ns/", 200, "key\n"},
		{"/instance/guest-attributes/?recursive=true", 200, `{"ns":{"key":"value"}}`},
		{"/instance/guest-attributes", 301, ""},
		{"/instance/guest-attributes/ns/absent", 404, ""},
		{"/nowhere", 404, ""},
		{"/instance/id?wait_for_change=true&timeout_sec=x", 400, ""},
	} {
		r := ask(t, "GET", base+v1+c.path, "", flavor...)
		if r.status != c.status || c.body != "" && r.body != c.body {
			t.Errorf("GET %s: %d %q, want %d %q", c.path, r.status, r.body, c.status, c.body)
		}
		if r.header.Get("Metadata-Flavor") != "Google" || r.header.Get("Date") == "" ||
			r.status == 200 && r.header.Get("Etag") == "" {
			t.Errorf("GET %s: headers %v", c.path, r.header)
		}
	}
	var token struct {
		AccessToken string `json:"access_token"`
		TokenType   string `json:"token_type"`
		ExpiresIn   int    `json:"expires_in"`
	}
	r := ask(t, "GET", base+v1+"/instance/service-accounts/default/token", "", flavor...)
	if err := json.Unmarshal([]byte(r.body), &token); err != nil || token.AccessToken != e.Token() ||
		token.TokenType != "Bearer" || token.ExpiresIn <= 0 {
		t.Errorf("token %q: %v", r.body, err)
	}
	all := ask(t, "GET", base+v1+"/?recursive=true", "", flavor...)
	if !json.Valid([]byte(all.body)) || strings.Contains(all.body, e.Token()) ||
		!strings.Contains(all.body, `"networkInterfaces":[{`) {
		t.Errorf("everything: %s", all.body)
	}
	if r := ask(t, "GET", base+v1+"/instance/id", ""); r.status != 403 {
		t.Errorf("without Metadata-Flavor: %d", r.status)
	}
	if r := ask(t, "GET", base+v1+"/instance/id", "",
		append(flavor, "X-Forwarded-For", "10.0.0.1")...); r.status != 403 {
		t.Errorf("with X-Forwarded-For: %d", r.status)
	}
	e.ResetBudget() // we asked faster than a VM may
	if r := ask(t, "GET", base+"/", ""); r.status != 200 ||
		r.header.Get("Metadata-Flavor") != "Google" {
		t.Errorf("the root, by which clients find out that they are on GCE: %d %v", r.status, r.header)
	}
}

// TestMetadataLibrary has the official client, unchanged, find everything.
func TestMetadataLibrary(t *testing.T) {
	e, base := start(t, platform.VM{Attributes: map[string]string{"gce-service-proxy": "{}"}})
	t.Setenv("GCE_METADATA_HOST", strings.TrimPrefix(base, "http://"))
	client := metadata.NewClient(nil)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for what, get := range map[string]func() (string, error){
		"my-project":    func() (string, error) { return client.ProjectIDWithContext(ctx) },
		"us-central1-a": func() (string, error) { return client.ZoneWithContext(ctx) },
		"vm-1":          func() (string, error) { return client.InstanceNameWithContext(ctx) },
		"{}":            func() (string, error) { return client.InstanceAttributeValueWithContext(ctx, "gce-service-proxy") },
	} {
		if got, err := get(); err != nil || got != what {
			t.Errorf("got %q, %v, want %q", got, err, what)
		}
	}
	var missing metadata.NotDefinedError
	if _, err := client.InstanceAttributeValueWithContext(ctx, "absent"); !errors.As(err, &missing) {
		t.Errorf("absent attribute: %v", err)
	}
	// A subscription sees a change and a deletion.
	var values []string
	err := client.SubscribeWithContext(ctx, "instance/attributes/gce-service-proxy",
		func(_ context.Context, value string, ok bool) error {
			if !ok {
				value = "deleted"
			}
			values = append(values, value)
			switch len(values) {
			case 1:
				e.SetAttribute("gce-service-proxy", `{"a":1}`)
			case 2:
				e.DeleteAttribute("gce-service-proxy")
			}
			return nil
		})
	// The library returns without an error after a deletion that it told of.
	if got := strings.Join(values, " "); err != nil || got != `{} {"a":1} deleted` {
		t.Errorf("subscription saw %q, %v", got, err)
	}
}

func TestLongPoll(t *testing.T) {
	e, base := start(t, platform.VM{Attributes: map[string]string{"a": "1"}})
	url := base + v1 + "/instance/attributes/a"
	first := ask(t, "GET", url, "", flavor...)
	wait := url + "?wait_for_change=true&last_etag=" + first.header.Get("Etag")

	began := time.Now()
	same := ask(t, "GET", wait+"&timeout_sec=0.2", "", flavor...)
	if took := time.Since(began); same.body != "1" ||
		same.header.Get("Etag") != first.header.Get("Etag") || took < 150*time.Millisecond {
		t.Errorf("timeout: %+v after %s", same, took)
	}
	go func() {
		time.Sleep(50 * time.Millisecond)
		e.SetGuestAttribute("x", "y", "z") // nothing that this poll is about
		time.Sleep(50 * time.Millisecond)
		e.SetAttribute("a", "2")
	}()
	began = time.Now()
	if r := ask(t, "GET", wait+"&timeout_sec=60", "", flavor...); r.body != "2" ||
		time.Since(began) < 90*time.Millisecond {
		t.Errorf("change: %+v after %s", r, time.Since(began))
	}
	// An ETag of long ago is answered at once; so is one that is gone.
	if r := ask(t, "GET", wait, "", flavor...); r.body != "2" {
		t.Errorf("old ETag: %+v", r)
	}
	e.DeleteAttribute("a")
	if r := ask(t, "GET", wait, "", flavor...); r.status != 404 {
		t.Errorf("gone: %+v", r)
	}
}

func TestGuestAttributes(t *testing.T) {
	e, base := start(t, platform.VM{})
	put := func(path, body string) int {
		return ask(t, "PUT", base+guest+path, body, flavor...).status
	}
	if s := put("ns/key", "v"); s != 200 || e.GuestAttributes("ns")["key"] != "v" {
		t.Fatalf("PUT: %d, %v", s, e.GuestAttributes("ns"))
	}
	for _, bad := range []string{"key", "a/b/c", "a/b.c", "a/"} {
		if s := put(bad, "v"); s != 400 {
			t.Errorf("PUT %s: %d, want 400", bad, s)
		}
	}
	if s := ask(t, "DELETE", base+guest+"ns/key", "", flavor...).status; s != 200 {
		t.Errorf("DELETE: %d", s)
	}
	if s := ask(t, "DELETE", base+guest+"ns/key", "", flavor...).status; s != 404 {
		t.Errorf("DELETE again: %d", s)
	}
	if s := ask(t, "PUT", base+v1+"/instance/attributes/a", "v", flavor...).status; s != 405 {
		t.Errorf("PUT of an attribute: %d", s)
	}
	if b := e.Budget(); b.Queries != 7 || b.PeakPerMinute != 7 || b.PeakPerSecond != 7 ||
		b.OursPerMinute != 0 || b.Kept() {
		t.Errorf("budget: %+v", b)
	}
	e.ResetBudget()
	e.Update(func(v *platform.VM) { v.GuestAttributesDisabled = true })
	r := ask(t, "PUT", base+guest+"ns/key", "v", flavor...)
	if r.status != 403 ||
		strings.TrimSpace(r.body) != "Guest attributes endpoint access is disabled." {
		t.Errorf("disabled: %+v", r)
	}
}

// TestBudget: whoever writes more than the VM's budget, or than our share of it, loses writes
// without a word, and the test fails when the emulator is closed.
func TestBudget(t *testing.T) {
	for _, c := range []struct {
		name    string
		path    string
		at      []time.Duration
		lost    int
		exceeds bool
	}{
		{"a start and its heartbeats", "gce-service-proxy/k", []time.Duration{0, 0, 0, 20e9, 40e9, 60e9, 80e9, 100e9}, 0, false},
		{"four at once", "gce-service-proxy/k", []time.Duration{0, 0, 0, 999e6}, 1, true},
		{"seven of ours in a minute", "gce-service-proxy/k", []time.Duration{0, 0, 10e9, 20e9, 30e9, 40e9, 59e9}, 0, true},
		{"six in each", "gce-service-proxy/k", []time.Duration{0, 0, 10e9, 20e9, 30e9, 40e9, 60e9}, 0, false},
		{"ten of others'", "guestInventory/k", []time.Duration{0, 0, 5e9, 10e9, 15e9, 20e9, 25e9, 30e9, 35e9, 40e9}, 0, false},
		{"eleven", "guestInventory/k", []time.Duration{0, 0, 5e9, 10e9, 15e9, 20e9, 25e9, 30e9, 35e9, 40e9, 59e9}, 1, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e, began := platform.New(platform.VM{}), time.Now()
				for _, at := range c.at {
					time.Sleep(at - time.Since(began))
					w, r := httptest.NewRecorder(),
						httptest.NewRequest("PUT", guest+c.path, strings.NewReader("v"))
					r.Header.Set("Metadata-Flavor", "Google")
					if e.ServeHTTP(w, r); w.Code != 200 {
						t.Errorf("after %v: %d", at, w.Code)
					}
				}
				namespace, key, _ := strings.Cut(c.path, "/")
				if _, kept := e.GuestAttributes(namespace)[key]; kept == (c.lost > 0) ||
					e.Budget().Lost != c.lost {
					t.Errorf("the value is there: %v, %+v", kept, e.Budget())
				}
				e.Rebooted() // which makes up for nothing
				if err := e.Close(); (err != nil) != c.exceeds {
					t.Errorf("Close: %v", err)
				}
			})
		})
	}
}

// TestBudgetOfAReboot: a VM that starts anew has a bucket of its own again, and
// the VM's budget still.
func TestBudgetOfAReboot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := platform.New(platform.VM{})
		put := func(n int) {
			for range n {
				w, r := httptest.NewRecorder(), httptest.NewRequest("PUT", guest+"gce-service-proxy/k",
					strings.NewReader("v"))
				r.Header.Set("Metadata-Flavor", "Google")
				e.ServeHTTP(w, r)
				time.Sleep(time.Second)
			}
		}
		put(5)
		e.Rebooted()
		put(5)
		if b := e.Budget(); !b.Kept() || b.OursPerMinute != 5 || b.PeakPerMinute != 10 {
			t.Errorf("%+v", b)
		}
		e.Rebooted()
		put(1)
		if b := e.Budget(); b.Kept() || b.Lost != 1 {
			t.Errorf("%+v", b)
		}
	})
}

func TestFaults(t *testing.T) {
	e, base := start(t, platform.VM{})
	url := base + v1 + "/instance/id"
	e.Inject(platform.Fault{Prefix: v1 + "/instance/", Status: 503, Body: "try later", Times: 2})
	for i, want := range []int{503, 503, 200} {
		if r := ask(t, "GET", url, "", flavor...); r.status != want {
			t.Errorf("request %d: %d, want %d", i, r.status, want)
		}
	}
	remove := e.Inject(
		platform.Fault{Method: "GET", Status: 429, Header: map[string]string{"Retry-After": "1"}})
	if r := ask(t, "GET", url, "", flavor...); r.status != 429 || r.header.Get("Retry-After") != "1" {
		t.Errorf("429: %+v", r)
	}
	remove()
	e.Inject(platform.Fault{Delay: 100 * time.Millisecond, Times: 1})
	began := time.Now()
	if r := ask(t, "GET", url, "", flavor...); r.status != 200 ||
		time.Since(began) < 100*time.Millisecond {
		t.Errorf("slow: %+v after %s", r, time.Since(began))
	}
	remove = e.Inject(platform.Fault{Hang: true})
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := http.DefaultClient.Do(req); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("hang: %v", err)
	}
	remove()

	e.SetClock(-time.Hour)
	date, err := http.ParseTime(ask(t, "GET", url, "", flavor...).header.Get("Date"))
	if off := time.Since(date); err != nil || off < 59*time.Minute || off > 61*time.Minute {
		t.Errorf("the clock is off by %s, %v", off, err)
	}
	if n := len(e.Requests()); n != 7 {
		t.Errorf("%d requests recorded", n)
	}
}

func TestStorage(t *testing.T) {
	ca, err := authority.New()
	if err != nil {
		t.Fatal(err)
	}
	cert, err := ca.Certificate("storage.googleapis.com", "127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	e := platform.New(platform.VM{})
	closed(t, e)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	e.Serve(ln, &cert)
	e.PutObject("b", "dir/x.tgz", []byte("content"))
	e.PutObject("open", "y", []byte("for all"))
	e.MakePublic("open")
	e.PutObject("denied", "y", []byte("for others"))
	e.Deny("denied")
	client := &http.Client{
		Transport: &http.Transport{TLSClientConfig: ca.ClientConfig("storage.googleapis.com")}}
	for _, c := range []struct {
		path, token string
		status      int
		body        string
	}{
		{"/storage/v1/b/b/o/dir%2Fx.tgz?alt=media", e.Token(), 200, "content"},
		{"/download/storage/v1/b/b/o/dir%2Fx.tgz?alt=media", e.Token(), 200, "content"},
		{"/storage/v1/b/b/o/dir%2Fx.tgz", e.Token(), 200, ""},
		{"/b/dir/x.tgz", e.Token(), 200, "content"},
		{"/b/dir/x.tgz", "another", 401, ""},
		{"/storage/v1/b/b/o/dir%2Fx.tgz?alt=media", "", 401, ""},
		{"/b/dir/x.tgz", "", 403, ""},
		{"/b/absent", "", 403, ""},
		{"/denied/y", e.Token(), 403, ""},
		{"/storage/v1/b/denied/o/y?alt=media", e.Token(), 403, ""},
		{"/storage/v1/b/b/o/absent?alt=media", e.Token(), 404, ""},
		{"/open/y", "", 200, "for all"},
		{"/open", "", 404, ""},
	} {
		req, err := http.NewRequest("GET", "https://"+ln.Addr().String()+c.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if c.token != "" {
			req.Header.Set("Authorization", "Bearer "+c.token)
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != c.status || c.body != "" && string(body) != c.body {
			t.Errorf("GET %s: %d %q %v, want %d %q", c.path, resp.StatusCode, body, err, c.status, c.body)
		}
	}
}

func TestLogging(t *testing.T) {
	e := platform.New(platform.VM{})
	call := func(path, token, body string) *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		req := httptest.NewRequest("POST", path, strings.NewReader(body))
		if token != "" {
			req.Header.Set("Authorization", "Bearer "+token)
		}
		e.ServeHTTP(w, req)
		return w
	}
	const write = `{"logName":"projects/my-project/logs/service-proxy-agent","resource":{"type":"gce_instance","labels":{"zone":"z"}},
		"entries":[{"severity":"INFO","jsonPayload":{"message":"one"}},{"severity":"ERROR","jsonPayload":{"message":"two"}}]}`
	if w := call("/v2/entries:write", "", write); w.Code != 401 {
		t.Errorf("write without a token: %d", w.Code)
	}
	if w := call("/v2/entries:write", e.Token(), write); w.Code != 200 || len(e.LogEntries()) != 2 {
		t.Fatalf("write: %d %s", w.Code, w.Body)
	}
	if w := call("/v2/entries:write", e.Token(), `{"logName":"x","entries":[{}]}`); w.Code != 400 {
		t.Errorf("bad log name: %d", w.Code)
	}
	for filter, want := range map[string]string{
		``:                 "one,two",
		`severity>=ERROR`:  "two",
		`severity>=NOTICE`: "two",
		`logName="projects/my-project/logs/service-proxy-agent" AND severity=INFO`:   "one",
		`logName:service-proxy-agent jsonPayload.message="two"`:                      "two",
		`resource.type="gce_instance" AND timestamp>="2100-01-01T00:00:00Z"`:         "",
		`timestamp>="2000-01-01T00:00:00Z" AND resource.labels.zone=z`:               "one,two",
		`resource.type="gce_instance" jsonPayload.message:"TW"`:                      "two",
		`(resource.type="gce_instance" jsonPayload.message:"TW") AND severity=ERROR`: "two",
	} {
		body, err := json.Marshal(
			map[string]any{"resourceNames": []string{"projects/my-project"}, "filter": filter})
		if err != nil {
			t.Fatal(err)
		}
		w := call("/v2/entries:list", "", string(body))
		var out struct{ Entries []platform.LogEntry }
		if err := json.Unmarshal(w.Body.Bytes(), &out); err != nil || w.Code != 200 {
			t.Errorf("filter %q: %d %s", filter, w.Code, w.Body)
		}
		var got []string
		for _, entry := range out.Entries {
			got = append(got, entry.JSONPayload["message"].(string))
		}
		if strings.Join(got, ",") != want {
			t.Errorf("filter %q: %q, want %q", filter, got, want)
		}
	}
	for _, filter := range []string{"NOT severity=INFO", "severity=INFO OR severity=ERROR"} {
		if w := call("/v2/entries:list", "", `{"filter":"`+filter+`"}`); w.Code != 400 {
			t.Errorf("a filter beyond the emulator: %d", w.Code)
		}
	}
}

// TestLoggingRetry: a request that is made again, because its answer did not come, writes nothing
// again.
func TestLoggingRetry(t *testing.T) {
	e, base := start(t, platform.VM{})
	entry := func(insertID, timestamp string) string {
		return `{"insertId":"` + insertID + `","timestamp":"` + timestamp + `"}`
	}
	const first, later = "2026-01-01T00:00:00.5Z", "2026-01-01T00:00:01Z"
	write := func(entries ...string) reply {
		return ask(t, "POST", base+"/v2/entries:write",
			`{"logName":"projects/my-project/logs/l","resource":{"type":"gce_instance"},"entries":[`+
				strings.Join(entries, ",")+`]}`, "Authorization", "Bearer "+e.Token())
	}
	remove := e.Inject(platform.Fault{Prefix: "/v2/entries:write", Status: 503, Body: "busy",
		Header: map[string]string{"Retry-After": "7"}})
	if r := write(entry("a", first)); r.status != 503 || r.header.Get("Retry-After") != "7" ||
		len(e.LogEntries()) != 0 {
		t.Errorf("a fault: %+v", r)
	}
	remove()
	for range 2 {
		if r := write(entry("a", first), entry("b", first), entry("a", later)); r.status != 200 {
			t.Errorf("%+v", r)
		}
	}
	if all := e.LogEntries(); len(all) != 3 {
		t.Errorf("%d entries: %+v", len(all), all)
	}
}

// TestGcloud reads the VM from outside, by the requests that gcloud 528 was seen to make and, where
// it is on PATH, by gcloud itself: it comes with Google's own installer only, so `make test` says
// at its end when there was none.
func TestGcloud(t *testing.T) {
	e, base := start(t, platform.VM{})
	e.SetGuestAttribute("gce-service-proxy", "proxy-version", "1.40.0")
	e.SetGuestAttribute("gce-service-proxy", "bootstrap-status", "FINISHED")
	e.SetGuestAttribute("another", "key", "value")
	if _, err := io.WriteString(e, "first line\nsecond line\n"); err != nil {
		t.Fatal(err)
	}
	instance := base + "/compute/v1/projects/my-project/zones/us-central1-a/instances/vm-1"
	for _, c := range []struct {
		path   string
		status int
		has    string
	}{
		{"/getGuestAttributes?alt=json&queryPath=gce-service-proxy%2F", 200,
			`"items":[{"key":"bootstrap-status","namespace":"gce-service-proxy","value":"FINISHED"},{"key":"proxy-version","namespace":"gce-service-proxy","value":"1.40.0"}]`},
		{"/getGuestAttributes?alt=json&queryPath=gce-service-proxy%2Fproxy-version", 200, `"items":[{"key":"proxy-version",`},
		{"/getGuestAttributes?queryPath=absent%2F", 404, "was not found"},
		{"/serialPort?port=1&start=11", 200, `"contents":"second line\n"`},
		{"", 200, `"status":"RUNNING"`},
		{"x", 404, ""},
	} {
		if r := ask(t, "GET", instance+c.path, ""); r.status != c.status ||
			!strings.Contains(r.body, c.has) {
			t.Errorf("GET %s: %d %s, want %d %s", c.path, r.status, r.body, c.status, c.has)
		}
	}

	gcloud, err := exec.LookPath("gcloud")
	if err != nil {
		t.Logf("NOT RUN with the real gcloud: %v", err)
		return
	}
	const entry = `{"logName":"projects/my-project/logs/service-proxy-agent","resource":{"type":"gce_instance"},"entries":[{"severity":"INFO","jsonPayload":{"message":"Envoy Version: 1.40.0"}}]}`
	if r := ask(t, "POST", base+"/v2/entries:write", entry, "Authorization",
		"Bearer "+e.Token()); r.status != 200 {
		t.Fatalf("write entry: %+v", r)
	}
	env := e.GcloudEnv(base, t.TempDir(), os.Getenv("PATH"))
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"compute", "instances", "get-guest-attributes", "vm-1", "--query-path=gce-service-proxy/"},
			"NAMESPACE          KEY               VALUE\ngce-service-proxy  bootstrap-status  FINISHED\ngce-service-proxy  proxy-version     1.40.0\n"},
		{[]string{"compute", "instances", "get-guest-attributes", "vm-1", "--query-path=gce-service-proxy/proxy-version"},
			"NAMESPACE          KEY            VALUE\ngce-service-proxy  proxy-version  1.40.0\n"},
		{[]string{"compute", "instances", "get-serial-port-output", "vm-1"}, "first line\nsecond line\n\n"},
		{[]string{"logging", "read", `logName="projects/my-project/logs/service-proxy-agent"`, "--format=value(jsonPayload.message)"}, "Envoy Version: 1.40.0\n"},
	} {
		cmd := exec.CommandContext(t.Context(), gcloud, c.args...)
		cmd.Env = env
		var stderr strings.Builder
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil || string(out) != c.want {
			t.Errorf("gcloud %s: %v\n%s%s\nwant\n%s", strings.Join(c.args, " "), err, out,
				stderr.String(), c.want)
		}
	}
}
