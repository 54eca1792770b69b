package bootstrap

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/logs"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
)

// TestAttributeChange: which keys restart Envoy when they change, for each key of
// docs/attribute.md, whose last column says the same. That the live ones change the rules is tested
// where rules are decided, in package agent.
func TestAttributeChange(t *testing.T) {
	doc, err := os.ReadFile("../../docs/attribute.md")
	if err != nil {
		t.Fatal(err)
	}
	change := map[string]string{} // key -> what docs/attribute.md says of a change
	rows := regexp.MustCompile("(?m)^\\| `(.+?)` \\|.*\\| (.+?) \\|$")
	for _, row := range rows.FindAllStringSubmatch(string(doc), -1) {
		change[strings.ReplaceAll(row[1], "`<br>`", "")] = row[2]
	}
	// TestSourceChange's.
	const ours = "installs that Envoy and restarts, unless the one there is not ours; " +
		"where it fails the working one stays"
	for _, tt := range []struct {
		key, from, to string // JSON; "": without it
		want          string
	}{
		{"api-version", `"0.2"`, `"0.3"`, "–"},
		{"service.serving-ports", `[80]`, `[80, 8080]`, "restart"},
		{"traffic-interception.intercept-all-outbound", "", `true`, "live"},
		{"traffic-interception.exclude-outbound-ip-ranges", "", `["8.8.8.8"]`, "live"},
		{"traffic-interception.exclude-outbound-port-ranges", `["81"]`, `["81", "90-99"]`, "live"},
		{"traffic-interception.intercept-dns", "", `true`, "live"},
		{"labels", `{"app": "a"}`, `{"app": "b"}`, "restart"},
		{"proxy-spec.proxy-port", "", `16001`, "restart"},
		{"proxy-spec.tracing", `"OFF"`, `"ON"`, "restart"},
		{"proxy-spec.access-log", "", `"/var/log/envoy/access.log"`, "restart"},
		{"proxy-spec.network", "", `"prod"`, "restart"},
		{"proxy-spec.scope", "", `"canary"`, "restart"},
		{"proxy-spec.mesh", `"a"`, `"b"`, "restart"},
		{"proxy-spec.project-number", "", `"1"`, "restart"},
		{"proxy-spec.primary-source", `"gs://b/1.tgz"`, `"gs://b/2.tgz"`, ours},
		{"proxy-spec.secondary-source", `"gs://b/1.tgz"`, `"gs://b/2.tgz"`, "nothing"},
		{"proxy-spec.xds-version", `3`, `2`, "–"},
		{"some-newer-key", "", `1`, ""},
	} {
		if change[tt.key] != tt.want {
			t.Errorf("docs/attribute.md says of a change of %s %q, want %q", tt.key, change[tt.key], tt.want)
		}
		delete(change, tt.key)
		for _, values := range [][2]string{{tt.from, tt.to}, {tt.to, tt.from}} {
			accept := func(context.Context, *exec.Cmd) error { return nil } // Envoy does
			b := newBootstrapper(Options{Root: t.TempDir(), command: accept})
			for _, dir := range []string{"/run", logs.Dir} {
				mkdir(t, b.path(dir), 0o755)
			}
			var restart bool
			for _, value := range values {
				_ = os.Remove(b.path(restartFile)) // as after the start of Envoy
				text := "{}"
				if outer, inner, ok := strings.Cut(tt.key, "."); ok && value != "" {
					text = fmt.Sprintf(`{%q: {%q: %s}}`, outer, inner, value)
				} else if value != "" {
					text = fmt.Sprintf(`{%q: %s}`, tt.key, value)
				}
				cfg, err := attribute.Parse([]byte(text))
				if err != nil {
					t.Fatal(err)
				}
				for _, err := range []error{b.makeLogs(t.Context(), cfg),
					b.configureEnvoy(t.Context(), cfg, testVM)} {
					if err != nil {
						t.Fatalf("%s: %v", text, err)
					}
				}
				_, err = os.Lstat(b.path(restartFile))
				restart = err == nil
				// The daemon holds the Envoy that runs against this.
				node, err := envoyNode(cfg, testVM)
				if wrote := b.state.Envoy; err != nil || wrote == nil || wrote.File != EnvoyConfig ||
					wrote.Node != node.Id || !slices.Equal(wrote.Targets, []string{trafficDirector}) {
					t.Errorf("%s: wrote down %+v, %v", text, wrote, err)
				}
			}
			if restart != (tt.want == "restart") {
				t.Errorf("%s from %s to %s: Envoy restarts: %v", tt.key, values[0], values[1], restart)
			}
		}
	}
	for key, says := range change {
		t.Errorf("docs/attribute.md has %s (%s), which is not tested", key, says)
	}
}

// TestSourceChange: another primary-source is another Envoy, where the one there came from us;
// secondary-source alone changes nothing, nor does one that went away.
func TestSourceChange(t *testing.T) {
	self, err := os.Executable() // a program for this machine
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	const elf = 64 // bytes, its header: as much as checkBinary looks at, with no sections
	header := append([]byte(nil), program[:elf]...)
	clear(header[32:48]) // e_phoff, e_shoff
	clear(header[54:64]) // e_phentsize … e_shstrndx

	sources := t.TempDir()
	archive := func(version string) string {
		name := filepath.Join(sources, version+".tgz")
		write(t, name, string(pack(t, file("usr/local/bin/envoy", string(header)+version))))
		return "file://" + name
	}
	one, two := archive("1.30.1"), archive("1.30.2")
	for _, tt := range []struct {
		name      string
		foreign   bool // somebody else's Envoy is there before us
		from, to  attribute.Config
		installed string // at last
		restart   bool
	}{
		{"the same", false, attribute.Config{PrimarySource: one}, attribute.Config{PrimarySource: one}, "1.30.1", false},
		{"another primary", false, attribute.Config{PrimarySource: one}, attribute.Config{PrimarySource: two}, "1.30.2", true},
		{"the primary goes", false, attribute.Config{PrimarySource: one}, attribute.Config{}, "1.30.1", false},
		{"another secondary", false, attribute.Config{PrimarySource: one, SecondarySource: one}, attribute.Config{PrimarySource: one, SecondarySource: two}, "1.30.1", false},
		{"a secondary comes", false, attribute.Config{PrimarySource: one}, attribute.Config{PrimarySource: one, SecondarySource: two}, "1.30.1", false},
		{"a primary, and not ours", true, attribute.Config{}, attribute.Config{PrimarySource: two}, "1.29.0", false},
		{"another primary, and not ours", true, attribute.Config{PrimarySource: one}, attribute.Config{PrimarySource: two}, "1.29.0", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBootstrapper(
				Options{Root: t.TempDir(), command: func(_ context.Context, cmd *exec.Cmd) error {
					text, err := os.ReadFile(cmd.Path)
					if err == nil {
						_, err = fmt.Fprintf(cmd.Stdout, "envoy  version: 0/%s/Clean/RELEASE/BoringSSL\n", text[elf:])
					}
					return err
				}})
			for _, dir := range []string{"/run", filepath.Dir(EnvoyBinary)} {
				mkdir(t, b.path(dir), 0o755)
			}
			if tt.foreign {
				write(t, b.path(EnvoyBinary), string(header)+"1.29.0")
			}
			var restart bool
			for _, cfg := range []attribute.Config{tt.from, tt.to} {
				_ = os.Remove(b.path(restartFile)) // as after the start of Envoy
				if wish, f := tryEnvoy(t, b, cfg); wish != nil || f != nil {
					t.Fatal(f)
				}
				_, err := os.Lstat(b.path(restartFile))
				restart = err == nil
			}
			if have := strings.TrimPrefix(read(t, b.path(EnvoyBinary)),
				string(header)); have != tt.installed || restart != tt.restart {
				t.Errorf("Envoy %s is there, restart: %v; want %s, %v", have, restart, tt.installed, tt.restart)
			}
		})
	}
}

// TestPublisherEnds: without a daemon bootstrap writes its status itself, and ends as soon as
// the last one is written.
func TestPublisherEnds(t *testing.T) {
	var mu sync.Mutex
	values := map[string]string{}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		text, err := io.ReadAll(r.Body)
		mu.Lock()
		defer mu.Unlock()
		values[filepath.Base(r.URL.Path)] = string(text)
		if err != nil || r.Method != http.MethodPut {
			http.Error(w, "want a PUT", http.StatusBadRequest)
		}
	}))
	defer srv.Close()
	t.Setenv("GCE_METADATA_HOST", strings.TrimPrefix(srv.URL, "http://"))
	p := newPublisher(t.Context(), newBootstrapper(Options{}).Log)
	p.publish(progress.State{Status: progress.Failed, Failure: "make room on that disk"}, true)
	began := time.Now()
	p.end()
	if took := time.Since(began); took > 15*time.Second {
		t.Errorf("it ended after %v", took)
	}
	mu.Lock()
	defer mu.Unlock()
	if values["bootstrap-status"] != "FAILED" ||
		!strings.Contains(values["bootstrap-last-failure"], "make room on that disk") {
		t.Errorf("written: %q", values)
	}
}
