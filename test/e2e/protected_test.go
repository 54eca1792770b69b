//go:build lab

package e2e

import (
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
	"github.com/service-proxy-agent/service-proxy-agent/test/platform/authority"
)

// TestProtectedMetrics: with --metrics-listen and a web config file /metrics has TLS and a user,
// and /healthz stays plain where health checkers ask. Until the file's certificate is there, a
// finding says so and the agent does its job.
func TestProtectedMetrics(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "web-config.yml")
	hash, err := bcrypt.GenerateFromPassword([]byte("change-me"), bcrypt.MinCost)
	must(t, err)
	must(t, os.WriteFile(path, fmt.Appendf(nil, "tls_server_config:\n  cert_file: metrics.crt\n"+
		"  key_file: metrics.key\nbasic_auth_users:\n  prometheus: %s\n", hash), 0o600))
	m, a := start(t, mesh.Options{Config: services()},
		"--metrics-listen", "127.0.0.1:9460", "--web-config-file", path)
	must(t, a.WaitReady(within(t, 30*time.Second)))
	through(t, m, web4)
	unserved := func(f symptom.Finding) bool { return f.ID == symptom.ListenAddress }
	s, err := a.Wait(within(t, 10*time.Second), "the finding", func(s status.Status) bool {
		return slices.ContainsFunc(s.Findings, unserved)
	})
	must(t, err)
	found := s.Findings[slices.IndexFunc(s.Findings, unserved)]
	if !strings.Contains(found.Cause, "tls_server_config.cert_file") || !s.Healthy() {
		t.Errorf("%+v", found)
	}

	ca, err := authority.New()
	must(t, err)
	_, err = ca.Files(dir, "metrics", "127.0.0.1")
	must(t, err)
	_, err = a.Wait(within(t, 30*time.Second), "no finding", func(s status.Status) bool {
		return !slices.ContainsFunc(s.Findings, unserved)
	})
	must(t, err)
	client := m.VM.HTTP()
	client.Transport.(*http.Transport).TLSClientConfig = &tls.Config{RootCAs: ca.Pool()}
	client.Transport.(*http.Transport).ForceAttemptHTTP2 = true
	scrape := func(user, password string) (code int, body string) {
		t.Helper()
		req, err := http.NewRequestWithContext(within(t, 10*time.Second), http.MethodGet,
			"https://127.0.0.1:9460/metrics", nil)
		must(t, err)
		if user != "" {
			req.SetBasicAuth(user, password)
		}
		resp, err := client.Do(req)
		must(t, err)
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		must(t, err)
		if resp.ProtoMajor != 2 {
			t.Errorf("%s", resp.Proto)
		}
		return resp.StatusCode, string(text)
	}
	if code, body := scrape("prometheus", "change-me"); code != 200 ||
		!strings.Contains(body, "\nservice_proxy_agent_ready 1\n") {
		t.Errorf("with the password: %d, %d bytes", code, len(body))
	}
	for _, user := range []string{"", "prometheus", "nobody"} {
		if code, body := scrape(user, "wrong"); code != 401 || strings.Contains(body, "service_proxy") {
			t.Errorf("%q with a wrong password: %d, %q", user, code, body)
		}
	}
	for ask, want := range map[string]int{"/metrics": 404, "/healthz": 200, "/healthz/ready": 200} {
		if code, body, err := a.Get(ask); err != nil || code != want {
			t.Errorf("--listen's %s: %d %q, %v", ask, code, body, err)
		}
	}
}
