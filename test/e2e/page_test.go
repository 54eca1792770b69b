//go:build lab

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/html"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// page runs status --html, and returns the text of the page.
func page(t *testing.T, m *mesh.Mesh, a *mesh.Agent, uid uint32, file string) (text string,
	code int) {
	t.Helper()
	args := []string{"status", "--proxy-user", fmt.Sprint(lab.EnvoyUID),
		"--envoy-log", m.Envoy.LogPath, "--html", file}
	body, stderr, code, err := a.RunAs(t.Context(), uid, nil, args...)
	must(t, err)
	if file != "-" {
		written, err := os.ReadFile(file)
		must(t, err)
		body = string(written)
	}
	if strings.Contains(body, nasty) || strings.Contains(body, "<script") {
		t.Error("a name is not escaped")
	}
	var out strings.Builder
	z := html.NewTokenizer(strings.NewReader(body))
	for z.Next() != html.ErrorToken {
		if token := z.Token(); token.Type == html.TextToken {
			out.WriteString(token.Data + " ")
		}
	}
	text = strings.Join(strings.Fields(out.String()), " ")
	_, text, _ = strings.Cut(text, "Skip to the content ") // what stands before is the style
	if code == 64 || !strings.HasPrefix(body, "<!DOCTYPE html>") {
		t.Fatalf("exit code %d, %q: %.400s", code, stderr, body)
	}
	return text, code
}

// TestPage: status --html counts the connections of each service, by root and as who may not look,
// with and without Envoy and the daemon, with the exit codes of status.
func TestPage(t *testing.T) {
	t.Parallel()
	config := services(controlplane.Service{Name: nasty, Prefixes: controlplane.VIPs("10.10.0.9"),
		Port: 81, Endpoints: endpoints()})
	m, a := start(t, mesh.Options{Config: config})
	must(t, a.WaitReady(within(t, 20*time.Second)))
	for range 3 {
		through(t, m, db4)
	}
	file := filepath.Join(t.TempDir(), "page.html")
	text, code := page(t, m, a, 0, file)
	if code != 0 || !strings.Contains(text, "Connections to 3 services go through Envoy.") ||
		!regexp.MustCompile(` db 10\.10\.0\.2:9000 [3-9] `).MatchString(text) {
		t.Errorf("healthy: exit code %d: %s", code, text)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	text, code = page(t, m, a, 1000, "-")
	if code != 2 || !strings.Contains(text, "The agent does not answer") ||
		!strings.Contains(text, "Connections were not counted: needs root") ||
		!strings.Contains(text, "db 10.10.0.2:") {
		t.Errorf("an ordinary user: exit code %d: %s", code, text)
	}
	m.Envoy.Kill()
	_, err := a.Wait(within(t, 20*time.Second), "Envoy is missed",
		func(s status.Status) bool { return !s.Healthy() })
	must(t, err)
	text, code = page(t, m, a, 0, "-")
	if code != 1 || !strings.Contains(text, " Not healthy: Envoy is not running") {
		t.Errorf("Envoy is down: exit code %d: %s", code, text)
	}
	a.Kill()
	text, code = page(t, m, a, 0, "-")
	if code != 2 || !strings.Contains(text, "The agent does not answer") ||
		!strings.Contains(text, "Envoy is not running") {
		t.Errorf("no daemon: exit code %d: %s", code, text)
	}
}
