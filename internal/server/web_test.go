package server

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/crypto/bcrypt"

	"github.com/service-proxy-agent/service-proxy-agent/test/platform/authority"
)

// protected is a server of metrics by a web config file that can be changed.
type protected struct {
	t      *testing.T
	public *Public
	logs   *observer.ObservedLogs
	dir    string
	ca     *authority.Authority
	addr   string
}

const withTLS = "tls_server_config: {cert_file: agent.crt, key_file: agent.key}\n"

// protect runs one until the test ends. With text that is not good it does not listen yet.
func protect(t *testing.T, text string) *protected {
	t.Helper()
	ca, err := authority.New()
	if err != nil {
		t.Fatal(err)
	}
	s := &protected{t: t, dir: t.TempDir(), ca: ca}
	s.issue("agent", "127.0.0.1")
	s.write(text)
	core, logs := observer.New(zap.InfoLevel)
	metrics := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, "m 1\n")
	})
	s.logs = logs
	s.public, err = NewMetrics("127.0.0.1:0", filepath.Join(s.dir, "web.yml"), metrics, zap.New(core))
	if err != nil {
		t.Fatal(err)
	}
	s.public.reread = 10 * time.Millisecond
	s.addr = startPublic(t, s.public)
	return s
}

func (s *protected) issue(name string, hosts ...string) tls.Certificate {
	s.t.Helper()
	cert, err := s.ca.Files(s.dir, name, hosts...)
	if err != nil {
		s.t.Fatal(err)
	}
	return cert
}

func (s *protected) write(text string) {
	s.t.Helper()
	path := filepath.Join(s.dir, "web.yml")
	if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		s.t.Fatal(err)
	}
}

// client trusts the authority; with HTTP/2 where the server has it.
func (s *protected) client(with ...tls.Certificate) *http.Client {
	config := &tls.Config{RootCAs: s.ca.Pool(), Certificates: with}
	transport := &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true}
	s.t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Timeout: 10 * time.Second, Transport: transport}
}

// get asks for a path, as user:password unless that is "".
func (s *protected) get(c *http.Client, url, user string) (*http.Response, string, error) {
	s.t.Helper()
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	if name, password, given := strings.Cut(user, ":"); given {
		req.SetBasicAuth(name, password)
	}
	res, err := c.Do(req)
	if err != nil {
		return nil, "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	return res, string(body), err
}

func hashed(t *testing.T, password string) string {
	t.Helper()
	hash, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	return string(hash)
}

// TestProtected: metrics by TLS, HTTP/2 and a user, and nothing else.
func TestProtected(t *testing.T) {
	s := protect(t, withTLS+"basic_auth_users: {ops: "+hashed(t, "secret")+"}\n"+
		"http_server_config: {headers: {X-Frame-Options: deny}}\n")
	for _, tt := range []struct {
		path, user string
		code       int
		body       string
	}{
		{"/metrics", "ops:secret", 200, "m 1\n"},
		{"/metrics", "ops:secret", 200, "m 1\n"}, // by what is known of it
		{"/metrics", "", 401, "Unauthorized\n"},
		{"/healthz", "", 401, "Unauthorized\n"},
		{"/healthz", "ops:secret", 404, "404 page not found\n"},
	} {
		res, body, err := s.get(s.client(), "https://"+s.addr+tt.path, tt.user)
		if err != nil || res.StatusCode != tt.code || body != tt.body {
			t.Errorf("%s as %q: %v %q, %v; want %d %q", tt.path, tt.user, res, body, err, tt.code, tt.body)
			continue
		}
		if res.ProtoMajor != 2 || res.Header.Get("X-Frame-Options") != "deny" {
			t.Errorf("%s: %s, %v", tt.path, res.Proto, res.Header)
		}
		challenge := res.Header.Get("WWW-Authenticate")
		if (tt.code == 401) != (challenge == "Basic") {
			t.Errorf("%s as %q: WWW-Authenticate %q", tt.path, tt.user, challenge)
		}
	}
	res, body, err := s.get(s.client(), "http://"+s.addr+"/metrics", "ops:secret")
	if err != nil || res.StatusCode != 400 ||
		!strings.Contains(body, "sent an HTTP request to an HTTPS server") {
		t.Errorf("plain HTTP: %v %q, %v", res, body, err)
	}
	stranger := http.Client{Timeout: 10 * time.Second}
	if _, _, err = s.get(&stranger, "https://"+s.addr+"/metrics", ""); err == nil {
		t.Error("a client that does not know the authority was answered")
	}
}

// TestProtectedWrongPassword: 401, also for a user who is not there.
func TestProtectedWrongPassword(t *testing.T) {
	s := protect(t, "basic_auth_users: {ops: "+hashed(t, "secret")+", dev: "+hashed(t, "other")+"}\n")
	for _, user := range []string{"ops:other", "dev:secret", "nobody:secret", "ops:", ":"} {
		res, _, err := s.get(s.client(), "http://"+s.addr+"/metrics", user)
		if err != nil || res.StatusCode != 401 {
			t.Errorf("%q: %v, %v", user, res, err)
		}
	}
	if res, body, err := s.get(s.client(), "http://"+s.addr+"/metrics", "dev:other"); err != nil ||
		body != "m 1\n" {
		t.Errorf("after that: %v %q, %v", res, body, err)
	}
	s.write("basic_auth_users: {ops: " + hashed(t, "new") + "}\n")
	for user, want := range map[string]int{"ops:secret": 401, "ops:new": 200, "dev:other": 401} {
		if res, _, err := s.get(s.client(), "http://"+s.addr+"/metrics", user); err != nil ||
			res.StatusCode != want {
			t.Errorf("after a change, %q: %v, %v", user, res, err)
		}
	}
}

// TestProtectedHTTP1: http2: false is heard.
func TestProtectedHTTP1(t *testing.T) {
	s := protect(t, withTLS+"http_server_config: {http2: false}\n")
	res, body, err := s.get(s.client(), "https://"+s.addr+"/metrics", "")
	if err != nil || res.ProtoMajor != 1 || body != "m 1\n" || !res.Close {
		t.Errorf("%v %q, %v", res, body, err)
	}
}

// TestProtectedClients: by certificates of the authority in the file, and by their names.
func TestProtectedClients(t *testing.T) {
	const tlsText = "tls_server_config:\n  cert_file: agent.crt\n  key_file: agent.key\n" +
		"  client_auth_type: RequireAndVerifyClientCert\n  client_ca_file: ca.crt\n"
	s := protect(t, tlsText)
	scraper, other := s.issue("scraper", "prometheus.example"), s.issue("other", "other.example")
	elsewhere, err := authority.New()
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := elsewhere.Certificate("prometheus.example")
	if err != nil {
		t.Fatal(err)
	}
	check := func(when string, want bool, with ...tls.Certificate) {
		t.Helper()
		_, body, err := s.get(s.client(with...), "https://"+s.addr+"/metrics", "")
		if (err == nil && body == "m 1\n") != want {
			t.Errorf("%s: %q, %v", when, body, err)
		}
	}
	check("no certificate", false)
	check("of another authority", false, foreign)
	check("of ours", true, scraper)
	check("of ours, by any name", true, other)
	s.write(tlsText + "  client_allowed_sans: [prometheus.example]\n")
	check("by name", true, scraper)
	check("by another name", false, other)
}

// TestProtectedRotation: the next connection has the new certificate.
func TestProtectedRotation(t *testing.T) {
	s := protect(t, withTLS)
	serial := func() string {
		t.Helper()
		d := tls.Dialer{Config: &tls.Config{RootCAs: s.ca.Pool()}}
		c, err := d.DialContext(t.Context(), "tcp", s.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		return c.(*tls.Conn).ConnectionState().PeerCertificates[0].SerialNumber.String()
	}
	was := serial()
	cert := s.issue("agent", "127.0.0.1")
	if is := serial(); is == was || is != cert.Leaf.SerialNumber.String() {
		t.Errorf("serial %s, was %s, want %s", is, was, cert.Leaf.SerialNumber)
	}
	// TLS that comes and goes, on one listener.
	s.write("basic_auth_users: {ops: " + hashed(t, "secret") + "}\n")
	if _, body, err := s.get(s.client(), "http://"+s.addr+"/metrics", "ops:secret"); err != nil ||
		body != "m 1\n" {
		t.Errorf("without TLS: %q, %v", body, err)
	}
	s.write(withTLS)
	serial()
}

// TestProtectedBroken: a file that cannot be used is reported once, by name and line, and does not
// open what it protects: nothing is served, or by the last good one. It is over once it is mended.
func TestProtectedBroken(t *testing.T) {
	const broken = withTLS + "basic_auth_user: {}\n"
	s := protect(t, broken)
	path := filepath.Join(s.dir, "web.yml")
	says := func(want ...string) {
		t.Helper()
		for _, w := range append(want, path) {
			if err := s.public.Err(); err == nil || !strings.Contains(err.Error(), w) {
				t.Errorf("Err = %v; want %q", err, w)
			}
		}
	}
	says(`line 2: unknown key "basic_auth_user"`)
	if s.addr != "" {
		t.Fatal("it listens already")
	}
	s.write(withTLS)
	eventually(t, "listening", func() bool { return s.public.Addr() != nil && s.public.Err() == nil })
	s.addr = s.public.Addr().String()
	served := func(when string) {
		t.Helper()
		if _, body, err := s.get(s.client(), "https://"+s.addr+"/metrics", ""); err != nil ||
			body != "m 1\n" {
			t.Errorf("%s: %q, %v", when, body, err)
		}
	}
	served("mended")
	for name, breaks := range map[string]func(){
		"unknown key":          func() { s.write(broken) },
		"an empty file":        func() { s.write("") },
		"no file":              func() { os.Remove(path) },
		"key of another":       func() { os.WriteFile(filepath.Join(s.dir, "agent.key"), nil, 0o600) },
		"half of a new config": func() { s.write("tls_server_config: {cert_file: agent.crt") },
	} {
		breaks()
		eventually(t, name+" is noticed", func() bool { return s.public.Err() != nil })
		says("the last good one stays in force")
		served(name)
		s.issue("agent", "127.0.0.1")
		s.write(withTLS)
		eventually(t, name+" is over", func() bool { return s.public.Err() == nil })
		served(name + ", over")
	}
	eventually(t, "the last line in the log", func() bool { return s.logs.Len() >= 2+2*5 })
	if n := s.logs.Len(); n != 2+2*5 {
		t.Errorf("%d lines in the log: %v", n, s.logs.All())
	}
}

// TestMetricsPortTaken names the flag that chooses the port.
func TestMetricsPortTaken(t *testing.T) {
	other, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	p, err := NewMetrics(other.Addr().String(), "", http.NotFoundHandler(), nil)
	if err != nil {
		t.Fatal(err)
	}
	startPublic(t, p)
	if err := p.Err(); err == nil || !strings.HasSuffix(err.Error(), "with --metrics-listen") {
		t.Errorf("Err = %v", err)
	}
}

// TestPublicWithoutMetrics: with metrics elsewhere there are none here.
func TestPublicWithoutMetrics(t *testing.T) {
	p, err := NewPublic("127.0.0.1:0", yes, yes, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	base := "http://" + startPublic(t, p)
	for path, want := range map[string]int{"/metrics": 404, "/healthz": 200, "/healthz/ready": 200} {
		req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, base+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != want {
			t.Errorf("%s: %s", path, res.Status)
		}
	}
}
