package webconfig

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/test/platform/authority"
)

const (
	// Of "secret".
	secretHash = "$2a$05$P.gci5xAAh55I8YCiBtrF.N7wLzWkaFUT.kQuB8.0kZePA0ZbORXu"
	pair       = "tls_server_config:\n  cert_file: a.crt\n  key_file: a.key\n"
)

// TestParse: what is wrong is named by key and line.
func TestParse(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		want       string // in the error; "": none
	}{
		{"TLS", pair, ""},
		{"users", "basic_auth_users: {ops: " + secretHash + "}", ""},
		{"everything", pair + "  client_auth_type: RequireAndVerifyClientCert\n  client_ca_file: ca\n" +
			"  client_allowed_sans: [a]\n  min_version: TLS12\n  max_version: TLS13\n" +
			"  cipher_suites: [TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256]\n" +
			"  curve_preferences: [X25519, CurveP256]\n  prefer_server_cipher_suites: true\n" +
			"http_server_config:\n  http2: yes\n  headers:\n    X-XSS-Protection: 1\n" +
			"rate_limit: {interval: 1s, burst: 20}\nbasic_auth_users: {ops: " + secretHash + "}\n", ""},
		{"no limit", pair + "rate_limit: {interval: 0, burst: 0}", ""},
		{"empty", "", "it sets nothing"},
		{"comments", "# tls_server_config:\n", "it sets nothing"},
		{"null", "tls_server_config:\n", "it sets nothing"},
		{"unknown key", "tls_config: {}\n" + pair, `line 1: unknown key "tls_config"`},
		{"unknown key of a section", pair + "  keyfile: x\n",
			`line 4: unknown key "keyfile" in tls_server_config`},
		{"two", pair + "  a: x\nhttp_server_config: {b: x}\n",
			`line 4: unknown key "a" in tls_server_config; line 5: unknown key "b" in http_server_config`},
		{"twice", pair + pair, "line 4: mapping key \"tls_server_config\" already defined at line 1"},
		{"no YAML", pair + "  key: [", "line 4"},
		{"text", "secret", "line 1: want keys and values, have a str"},
		{"a list", "basic_auth_users: [secret]", "line 1: want keys and values, have a seq"},
		{"no bool", "http_server_config: {http2: secret}", "line 1: want a bool, have a str"},
		{"no key", "tls_server_config: {cert_file: a}", "has neither key nor key_file"},
		{"no certificate", "tls_server_config: {key_file: a}", "has neither cert nor cert_file"},
		{"both", pair + "  key: secret\n", "has both key and key_file"},
		{"CA for nothing", pair + "  client_ca_file: ca\n", "use RequireAndVerifyClientCert"},
		{"no CA", pair + "  client_auth_type: RequireAndVerifyClientCert\n", "needs client_ca_file"},
		{"names that nobody verified", pair + "  client_auth_type: VerifyClientCertIfGiven\n" +
			"  client_ca_file: ca\n  client_allowed_sans: [a]\n",
			"client_allowed_sans needs client_auth_type"},
		{"any certificate", pair + "  client_auth_type: RequireAnyClientCert\n",
			"lets every certificate in"},
		{"a CA that nobody asks", pair + "  client_auth_type: RequireClientCert\n  client_ca_file: ca\n",
			"lets every certificate in"},
		{"a CA that nobody asks, or none", pair + "  client_auth_type: RequestClientCert\n" +
			"  client_ca_file: ca\n", "use RequireAndVerifyClientCert"},
		{"client_auth_type", pair + "  client_auth_type: Require\n",
			`line 4: unknown client_auth_type "Require"; use one of NoClientCert, `},
		{"version", pair + "  min_version: TLS1.2\n", `line 4: unknown TLS version "TLS1.2"`},
		{"curve", pair + "  curve_preferences:\n  - P256\n", `line 5: unknown curve "P256"`},
		{"cipher", pair + "  cipher_suites: [TLS_RSA_WITH_RC4_128_SHA]\n", "line 4: unknown cipher suite"},
		{"HTTP/2", pair + "  cipher_suites: [TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384]\n", "http2: false"},
		{"no HTTP/2", pair + "  cipher_suites: [TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384]\n" +
			"http_server_config: {http2: false}\n", ""},
		{"header", "http_server_config: {headers: {Server: x}}", `cannot set "Server"`},
		{"value", "http_server_config: {headers: {X-Frame-Options: x}}", "use deny or sameorigin"},
		{"password", "basic_auth_users:\n  ops: secret\n", "line 2: basic_auth_users wants bcrypt"},
		{"dear", "basic_auth_users: {ops: " + strings.Replace(secretHash, "$05$", "$15$", 1) + "}",
			"line 1: a hash in basic_auth_users has cost 15"},
		{"interval", "rate_limit: {interval: 5}", `line 1: rate_limit.interval is "5"`},
		{"burst", "rate_limit: {interval: 1s}", "lets nobody in"},
	} {
		_, err := parse([]byte(tt.text))
		switch {
		case tt.want == "" && err != nil, tt.want != "" && err == nil,
			err != nil && !strings.Contains(err.Error(), tt.want):
			t.Errorf("%s: %v; want %q", tt.name, err, tt.want)
		case err != nil && (strings.Contains(err.Error(), "secret") || strings.Contains(err.Error(), "$2a$") ||
			strings.Contains(err.Error(), "\n")):
			t.Errorf("%s: %q tells what it should not, or is no line", tt.name, err)
		}
	}
}

// TestExample: the file in deploy/examples can be used as it is, with one's own certificates.
func TestExample(t *testing.T) {
	text, err := os.ReadFile("../../deploy/examples/web-config.yml")
	if err != nil {
		t.Fatal(err)
	}
	c, err := parse(text)
	if err != nil {
		t.Fatal(err)
	}
	if c.TLS == nil || len(c.Users) != 1 {
		t.Errorf("%+v", c)
	}
	ca, err := authority.New()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if _, err := ca.Files(dir, "metrics", "web-1"); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "web-config.yml")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	f := Open(path)
	if err := f.Load(); err != nil || f.TLS() == nil {
		t.Error(err)
	}
}

// TestLoadFails: a file that cannot be read is named, with what to do.
func TestLoadFails(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	if err := unix.Mkfifo(path("fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"large": strings.Repeat("#", maxFile+1), "fifo.yml": "tls_server_config: {cert_file: fifo, key: x}",
		"gone.yml": "tls_server_config: {cert_file: gone, key: x}",
		"pem.yml":  "tls_server_config: {cert: x, key: x}", "private": "rate_limit: {interval: 0}",
	} {
		if err := os.WriteFile(path(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]string{
		"":         "it is no regular file",
		"none":     "no such file or directory; under systemd the agent sees no files below /home",
		"large":    "it has more than 1048576 bytes",
		"fifo.yml": "tls_server_config.cert_file: read " + path("fifo") + ": it is no regular file",
		"gone.yml": "tls_server_config.cert_file: open " + path("gone") + ": no such file",
		"pem.yml":  "tls_server_config: the certificate and its key: ",
	} {
		f := Open(path(name))
		if err := f.Load(); err == nil || !strings.Contains(err.Error(), want) ||
			!strings.Contains(err.Error(), path(name)) {
			t.Errorf("%q: %v; want %q", name, err, want)
		}
		if f.TLS() != nil {
			t.Errorf("%q: TLS", name)
		}
	}
	if err := os.Chmod(path("private"), 0); err != nil {
		t.Fatal(err)
	}
	err := asNobody(t, func() error { return Open(path("private")).Load() })
	if err == nil || !strings.Contains(err.Error(), "readable for the user ") {
		t.Errorf("%v", err)
	}
}

// asNobody runs f on a thread that is not root in the file system.
func asNobody(t *testing.T, f func() error) error {
	t.Helper()
	if os.Geteuid() != 0 {
		return f()
	}
	ended := make(chan error)
	go func() {
		runtime.LockOSThread() // and ends with the goroutine
		if err := syscall.Setfsuid(65534); err != nil {
			ended <- err
			return
		}
		ended <- f()
	}()
	return <-ended
}

func everybody(netip.Addr) netip.Prefix { return netip.Prefix{} }

// TestGuard: nobody is let in before a file was loaded, and no more than its rate limit says.
func TestGuard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "web.yml")
		if err := os.WriteFile(path, []byte("rate_limit: {interval: 10s, burst: 2}"), 0o600); err != nil {
			t.Fatal(err)
		}
		f := Open(path)
		served := http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})
		ask := func() int {
			w := httptest.NewRecorder()
			f.Guard(served, everybody).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
			return w.Code
		}
		if got := ask(); got != 503 {
			t.Errorf("before it is loaded: %d", got)
		}
		for n, want := range []int{200, 200, 429, 429} {
			if err := f.Load(); err != nil { // the same file is no new budget
				t.Fatal(err)
			}
			if got := ask(); got != want {
				t.Errorf("request %d: %d, want %d", n, got, want)
			}
		}
		time.Sleep(10 * time.Second)
		if a, b := ask(), ask(); a != 200 || b != 429 {
			t.Errorf("after the interval: %d, %d", a, b)
		}
	})
}

// guessing is passwords whose comparisons take a second each and are counted.
func guessing() (p *passwords, busyFor *time.Duration, atOnce *int) {
	p, busyFor, atOnce = newPasswords(), new(time.Duration), new(int)
	now := 0
	p.compare = func(h, password []byte) error {
		now++
		*atOnce = max(*atOnce, now)
		time.Sleep(time.Second)
		*busyFor += time.Second
		now--
		if string(h) != "hash of "+string(password) {
			return errors.New("no")
		}
		return nil
	}
	return p, busyFor, atOnce
}

// TestGuessing: who guesses passwords, from many addresses and over many connections, gets a tenth
// of one processor, and keeps nobody out whose password was right before.
func TestGuessing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, busyFor, atOnce := guessing()
		users := map[string]hash{"ops": "hash of right"}
		from := func(n int) netip.Prefix {
			return netip.PrefixFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(n)}), 32)
		}
		check := func(name, password string, n int) verdict {
			return p.check(t.Context(), users, name, password, from(n))
		}
		if got := check("ops", "right", 0); got != right {
			t.Fatalf("the right password: %d", got)
		}
		*busyFor = 0
		end := time.Now().Add(10 * time.Minute)
		for n := range 64 {
			go func() {
				for time.Now().Before(end) {
					name := []string{"ops", "nobody"}[n%2]
					if got := check(name, "wrong", n%8); got == right {
						t.Error("a wrong password is right")
					}
					time.Sleep(time.Second)
				}
			}()
		}
		for time.Now().Before(end) {
			before := time.Now()
			if got := check("ops", "right", 200); got != right || !time.Now().Equal(before) {
				t.Fatalf("the right password: %d after %v", got, time.Since(before))
			}
			time.Sleep(15 * time.Second)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if *atOnce != 1 {
			t.Errorf("%d comparisons at once", *atOnce)
		}
		if *busyFor > 62*time.Second || *busyFor < 50*time.Second {
			t.Errorf("guesses took %v of ten minutes", *busyFor)
		}
		if len(p.waiting) > 0 || len(p.known) != 1 {
			t.Errorf("kept: %v, %d", p.waiting, len(p.known))
		}
	})
}

// TestGuessingNewcomer: a right password that is not known yet gets its turn between guesses, and a
// new hash ends the old one.
func TestGuessingNewcomer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, _, _ := guessing()
		users := map[string]hash{"ops": "hash of right"}
		guesser := netip.MustParsePrefix("203.0.113.1/32")
		for range 16 {
			go p.check(t.Context(), users, "ops", "wrong", guesser)
		}
		synctest.Wait()
		if got := p.check(t.Context(), users, "ops", "wrong", guesser); got != busy {
			t.Errorf("over another connection of the guesser's: %d", got)
		}
		scraper := netip.MustParsePrefix("203.0.113.2/32")
		verdicts := []verdict{}
		for range 4 { // a scrape each five seconds
			verdicts = append(verdicts, p.check(t.Context(), users, "ops", "right", scraper))
		}
		if verdicts[len(verdicts)-1] != right {
			t.Errorf("%v", verdicts)
		}
		users = map[string]hash{"ops": "hash of new"}
		if got := p.check(t.Context(), users, "ops", "right", scraper); got != wrong {
			t.Errorf("the old password: %d", got)
		}
	})
}

// TestGuessingMany: guesses from many addresses, without a pause, keep nobody out who has not
// guessed, also where nothing is known yet; and what is kept of guessers ends.
func TestGuessingMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPasswords()
		p.compare = func(h, password []byte) error {
			time.Sleep(60 * time.Millisecond) // cost 10
			if string(password) != "right" {
				return errors.New("no")
			}
			return nil
		}
		users := map[string]hash{"ops": "hash"}
		end := time.Now().Add(time.Minute)
		for n := range 64 {
			guesser := netip.PrefixFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(n)}), 32)
			go func() {
				for time.Now().Before(end) {
					p.check(t.Context(), users, "ops", "wrong", guesser)
					time.Sleep(10 * time.Millisecond)
				}
			}()
		}
		// As long as their first guesses take.
		time.Sleep(50 * time.Second)
		scraper := netip.MustParsePrefix("203.0.114.1/32")
		if got := p.check(t.Context(), users, "ops", "right", scraper); got != right {
			t.Errorf("the right password: %d", got)
		}
		time.Sleep(2 * failedFor)
		p.check(t.Context(), users, "ops", "wrong", netip.MustParsePrefix("203.0.114.2/32"))
		if len(p.failed) != 1 || len(p.waiting) > 0 {
			t.Errorf("kept: %v, %v", p.failed, p.waiting)
		}
	})
}
