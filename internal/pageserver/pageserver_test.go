package pageserver

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/page"
	"github.com/service-proxy-agent/service-proxy-agent/internal/server"
)

// secret is what only the page tells.
const secret = "web-1.internal"

// served is a server that runs until the test ends.
type served struct {
	*Server
	t *testing.T
}

// serve starts one. Its page is the content in plain words.
func serve(t *testing.T, at string, pages Pages) served {
	t.Helper()
	if pages.Look == nil {
		pages.Look = func(context.Context) page.Content { return page.Content{Host: secret} }
	}
	if pages.Explain == nil {
		pages.Explain = func(_ context.Context, form url.Values) string {
			return fmt.Sprintf("of %q", form.Get("to"))
		}
	}
	s, err := Listen(t.Context(), "--serve", netip.MustParseAddrPort(at), pages)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return served{s, t}
}

// ask asks for a path of the folder: header names and values are behind it, "Host" among them.
func (s served) ask(method, path string, headers ...string) (*http.Response, string) {
	s.t.Helper()
	return s.askOutside(method, strings.TrimSuffix(s.folder, "/")+path, headers...)
}

// askOutside asks for any path.
func (s served) askOutside(method, path string, headers ...string) (*http.Response, string) {
	s.t.Helper()
	req, err := http.NewRequest(method, "http://"+s.Addr().String()+path, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		if headers[i] == "Host" {
			req.Host = headers[i+1]
			continue
		}
		req.Header.Add(headers[i], headers[i+1])
	}
	return s.do(req)
}

func (s served) do(req *http.Request) (*http.Response, string) {
	s.t.Helper()
	client := http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	res, err := client.Do(req)
	if err != nil {
		s.t.Fatalf("%s %s: %v", req.Method, req.URL, err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	s.protected(res, req.Method+" "+req.URL.String())
	return res, string(body)
}

// protected fails where an answer lacks a header that protects it.
func (s served) protected(res *http.Response, what string) {
	s.t.Helper()
	for name, want := range map[string]string{
		"Content-Security-Policy":      page.Policy(true) + "; frame-ancestors 'none'",
		"X-Content-Type-Options":       "nosniff",
		"X-Frame-Options":              "DENY",
		"Referrer-Policy":              "no-referrer",
		"Cache-Control":                "no-store",
		"Cross-Origin-Opener-Policy":   "same-origin",
		"Cross-Origin-Embedder-Policy": "require-corp",
		"Cross-Origin-Resource-Policy": "same-origin",
	} {
		if have := res.Header.Get(name); have != want {
			s.t.Errorf("%s: %d with %s %q, want %q", what, res.StatusCode, name, have, want)
		}
	}
	if !res.Close {
		s.t.Errorf("%s: the connection is kept", what)
	}
}

func (s served) path() string { return "/" + linkName + s.token }

// enter opens the link, and returns the cookie as a browser sends it.
func (s served) enter() string {
	s.t.Helper()
	res, _ := s.ask("GET", s.path())
	if res.StatusCode != 303 || len(res.Cookies()) != 1 {
		s.t.Fatalf("the link: %d, %v", res.StatusCode, res.Cookies())
	}
	c := res.Cookies()[0]
	return c.Name + "=" + c.Value
}

// The link opens the page once, in one browser, and who only looks where it leads spends nothing.
func TestLink(t *testing.T) {
	s := serve(t, "127.0.0.1:0", Pages{})
	if !strings.HasPrefix(s.Link(), "http://127.0.0.1:") || len(s.token) < 26 {
		t.Errorf("the link is %q", s.Link())
	}
	res, body := s.ask("HEAD", s.path())
	if res.StatusCode != 503 || body != "" || len(res.Cookies()) > 0 {
		t.Errorf("HEAD: %d %q %v", res.StatusCode, body, res.Cookies())
	}
	for _, ahead := range [][]string{{"Sec-Purpose", "prefetch;prerender"}, {"Purpose", "prefetch"},
		{"X-Moz", "prefetch"}, {"X-Purpose", "preview"}} {
		if res, body := s.ask("GET", s.path(), ahead...); res.StatusCode != 503 || body != "" ||
			len(res.Cookies()) > 0 {
			t.Errorf("%s: %d %q %v", ahead, res.StatusCode, body, res.Cookies())
		}
	}
	wrong := "A" + s.token[1:]
	if wrong == s.token {
		wrong = "B" + s.token[1:]
	}
	for _, path := range []string{"", wrong, s.token[1:], s.token + "x", strings.ToLower(s.token),
		"/" + s.token, s.token + "/", "?" + s.token} {
		if res, body := s.ask("GET", "/"+linkName+path); res.StatusCode != 403 || body != notAllowed {
			t.Errorf("the link with %q: %d %q", path, res.StatusCode, body)
		}
	}

	res, body = s.ask("GET", s.path())
	if res.StatusCode != 303 || res.Header.Get("Location") != s.folder || body != "" {
		t.Errorf("the link: %d to %q, %q", res.StatusCode, res.Header.Get("Location"), body)
	}
	set := res.Header.Values("Set-Cookie")
	if len(set) != 1 {
		t.Fatalf("cookies: %q", set)
	}
	flags := "; Path=" + s.folder + "; HttpOnly; SameSite=Strict"
	name, value, _ := strings.Cut(strings.TrimSuffix(set[0], flags), "=")
	if name != fmt.Sprintf("service-proxy-agent-%d", s.Addr().Port()) || len(value) < 26 ||
		strings.Contains(value, ";") || strings.Contains(value, s.token) {
		t.Errorf("cookie %q", set[0])
	}

	if res, body := s.ask("GET", s.path()); res.StatusCode != 403 || body != notAllowed ||
		len(res.Cookies()) > 0 {
		t.Errorf("the link again: %d %q %v", res.StatusCode, body, res.Cookies())
	}
	if res, _ := s.ask("GET", s.path(), "Cookie", name+"="+value); res.StatusCode != 303 ||
		len(res.Cookies()) > 0 {
		t.Errorf("the link again by whom it let in: %d", res.StatusCode)
	}
	if res, body := s.ask("GET", "/", "Cookie", name+"="+value); res.StatusCode != 200 ||
		!strings.Contains(body, secret) ||
		res.Header.Get("Content-Type") != "text/html; charset=utf-8" {
		t.Errorf("the page: %d %q %v", res.StatusCode, body, res.Header)
	}
	if other := serve(t, "127.0.0.1:0", Pages{}); other.token == s.token {
		t.Error("two servers have one token")
	} else if res, _ := other.ask("GET", "/", "Cookie",
		fmt.Sprintf("service-proxy-agent-%d=%s", other.Addr().Port(), value)); res.StatusCode != 403 {
		t.Errorf("the session of another server: %d", res.StatusCode)
	}
}

// Of many who come with the link at once one is let in.
func TestLinkOnceForMany(t *testing.T) {
	s := serve(t, "127.0.0.1:0", Pages{})
	h := s.handler(t.Context())
	var mu sync.Mutex
	codes := map[int]int{}
	var all sync.WaitGroup
	for range 50 {
		all.Go(func() {
			w := record(h, "GET", s.folder+linkName+s.token, "Host", s.Addr().String())
			mu.Lock()
			defer mu.Unlock()
			codes[w.Code]++
		})
	}
	all.Wait()
	if codes[303] != 1 || codes[403] != 49 {
		t.Errorf("answers: %v", codes)
	}
}

// TestClickedElsewhere: a link that was clicked on a page, as in a terminal in the browser, leads
// on by a page, since a redirect would not be given the cookie.
func TestClickedElsewhere(t *testing.T) {
	s := serve(t, "127.0.0.1:0", Pages{})
	res, body := s.ask("GET", s.path(), "Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate",
		"Sec-Fetch-Dest", "document")
	if res.StatusCode != 200 || res.Header.Get("Refresh") != "0; url="+s.folder ||
		len(res.Cookies()) != 1 ||
		strings.Contains(body, s.token) || strings.Contains(body, secret) {
		t.Errorf("%d %q %v", res.StatusCode, body, res.Header)
	}
}

// TestWhoIsLetIn: with the session's cookie, by what else the browser tells.
func TestWhoIsLetIn(t *testing.T) {
	s := serve(t, "127.0.0.1:0", Pages{})
	cookie := s.enter()
	port := s.Addr().Port()
	at := func(host string) []string { return []string{"Host", fmt.Sprintf("%s:%d", host, port)} }
	for _, tt := range []struct {
		name         string
		method, path string
		headers      []string
		want         int
	}{
		{"no browser", "GET", "/", nil, 200},
		{"typed", "GET", "/", []string{"Sec-Fetch-Site", "none", "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "document"}, 200},
		{"the form", "GET", "/explain?to=10.0.0.1:80", []string{"Sec-Fetch-Site", "same-origin", "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "document"}, 200},
		{"HEAD", "HEAD", "/", nil, 200},
		{"localhost", "GET", "/", at("localhost"), 200},
		{"LOCALHOST", "GET", "/", at("LOCALHOST"), 200},
		{"IPv6", "GET", "/", at("[::1]"), 200},

		{"a name that leads here", "GET", "/", at("rebound.example"), 421},
		{"localhost as a part", "GET", "/", at("localhost.evil.example"), 421},
		{"another loopback address", "GET", "/", at("127.0.0.2"), 421},
		{"any address", "GET", "/", at("0.0.0.0"), 421},
		{"a number", "GET", "/", at("2130706433"), 421},
		{"a trailing dot", "GET", "/", at("localhost."), 421},
		{"no port", "GET", "/", []string{"Host", "127.0.0.1"}, 421},
		{"another port", "GET", "/", []string{"Host", fmt.Sprint("127.0.0.1:", port+1)}, 421},
		{"another port's name", "GET", "/", []string{"Host", fmt.Sprint("127.0.0.1:0", port)}, 421},
		{"a user", "GET", "/", []string{"Host", fmt.Sprint("127.0.0.1@evil:", port)}, 421},

		{"POST", "POST", "/", nil, 405}, {"PUT", "PUT", "/", nil, 405},
		{"DELETE", "DELETE", "/", nil, 405}, {"OPTIONS", "OPTIONS", "/", nil, 405},
		{"TRACE", "TRACE", "/", nil, 405}, {"CONNECT", "CONNECT", "/", nil, 405},
		{"get", "get", "/", nil, 405}, {"PROPFIND", "PROPFIND", "/", nil, 405},
		{"POST to the link", "POST", s.path(), nil, 405},

		{"another site's link", "GET", "/", []string{"Sec-Fetch-Site", "cross-site"}, 403},
		{"another port's link", "GET", "/", []string{"Sec-Fetch-Site", "same-site"}, 403},
		{"several", "GET", "/", []string{"Sec-Fetch-Site", "none", "Sec-Fetch-Site", "cross-site"}, 403},
		{"a frame", "GET", "/", []string{"Sec-Fetch-Site", "same-origin", "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "iframe"}, 403},
		{"a picture", "GET", "/", []string{"Sec-Fetch-Dest", "image"}, 403},
		{"a script's question", "GET", "/", []string{"Sec-Fetch-Mode", "cors"}, 403},
		{"a web socket", "GET", "/", []string{"Sec-Fetch-Mode", "websocket"}, 403},
		{"another origin", "GET", "/", []string{"Origin", "http://evil.example"}, 403},
		{"another port's origin", "GET", "/", []string{"Origin", fmt.Sprint("http://127.0.0.1:", port+1)}, 403},
		{"no origin", "GET", "/", []string{"Origin", "null"}, 403},
		{"its own origin", "GET", "/", []string{"Origin", "http://" + s.Addr().String()}, 200},

		{"no such page", "GET", "/status", nil, 404}, {"its icon", "GET", "/favicon.ico", nil, 404},
		{"up", "GET", "/../../etc/passwd", nil, 404}, {"up, hidden", "GET", "/%2e%2e/%2e%2e/etc/passwd", nil, 404},
		{"two slashes", "GET", "//", nil, 404}, {"below", "GET", "/explain/", nil, 404},
		{"a dot", "GET", "/./", nil, 404}, {"an end of text", "GET", "/%00", nil, 404},
		{"pprof", "GET", "/debug/pprof/", nil, 404},
	} {
		res, body := s.ask(tt.method, tt.path, append([]string{"Cookie", cookie}, tt.headers...)...)
		if res.StatusCode != tt.want {
			t.Errorf("%s: %d %q, want %d", tt.name, res.StatusCode, body, tt.want)
		}
		if tt.want != 200 && (strings.Contains(body, secret) || strings.Contains(body, "passwd") ||
			res.Header.Get("Content-Type") != "text/plain; charset=utf-8") {
			t.Errorf("%s: %q %v", tt.name, body, res.Header)
		}
		if (tt.want == 405) != (res.Header.Get("Allow") == "GET, HEAD") {
			t.Errorf("%s: Allow %q", tt.name, res.Header.Get("Allow"))
		}
	}
}

// Without the cookie every path has the same answer, and no look is made.
func TestStranger(t *testing.T) {
	s := serve(t, "127.0.0.1:0", Pages{
		Look: func(context.Context) page.Content {
			t.Error("a look for a stranger")
			return page.Content{}
		},
		Explain: func(context.Context, url.Values) string {
			t.Error("an answer for a stranger")
			return ""
		},
	})
	name := fmt.Sprintf("service-proxy-agent-%d", s.Addr().Port())
	for _, cookie := range []string{"", name + "=", name + "=" + s.token, name, "x=y",
		name + "=" + strings.Repeat("A", 26)} {
		for _, path := range []string{"/", "/explain", "/explain?to=10.0.0.1:80", "/status", "/open",
			"/%2e"} {
			for where, ask := range map[string]func(string, string, ...string) (*http.Response, string){
				"in the folder": s.ask, "outside": s.askOutside} {
				res, body := ask("GET", path, "Cookie", cookie)
				if res.StatusCode != 403 || body != notAllowed || len(res.Cookies()) > 0 {
					t.Errorf("%s %s with %q: %d %q", path, where, cookie, res.StatusCode, body)
				}
			}
		}
	}
}

// Outside of the folder there is nothing, for nobody: another server at this address, to which the
// cookie would be sent as well, can not lead there.
func TestFolder(t *testing.T) {
	s := serve(t, "127.0.0.1:0", Pages{})
	cookie := s.enter()
	if other := serve(t, "127.0.0.1:0", Pages{}); other.folder == s.folder || len(s.folder) < 18 {
		t.Errorf("folders %q and %q", s.folder, other.folder)
	}
	for _, path := range []string{"/", "/explain", s.path(), strings.TrimSuffix(s.folder, "/"),
		"/." + s.folder, "/" + s.folder, strings.ToLower(s.folder), s.folder[:8] + "/"} {
		if res, body := s.askOutside("GET", path, "Cookie", cookie); res.StatusCode != 403 ||
			body != notAllowed {
			t.Errorf("%s: %d %q", path, res.StatusCode, body)
		}
	}
	// The page leads to itself and to the form within it.
	_, body := s.ask("GET", "/", "Cookie", cookie)
	links := regexp.MustCompile(`(href|action)="([^"#]*)`)
	for _, link := range links.FindAllStringSubmatch(body, -1) {
		if to := link[2]; to != "" && to != "explain" && !strings.HasPrefix(to, "explain?") &&
			!strings.HasPrefix(to, "./") {
			t.Errorf("the page leads to %q", to)
		}
	}
}

// Another server at this address may have set a cookie of the same name.
func TestTwoCookies(t *testing.T) {
	s := serve(t, "127.0.0.1:0", Pages{})
	cookie := s.enter()
	name, _, _ := strings.Cut(cookie, "=")
	if res, _ := s.ask("GET", "/", "Cookie", name+"=planted; "+cookie); res.StatusCode != 200 {
		t.Errorf("with another before it: %d", res.StatusCode)
	}
}

// raw sends words that http.Client would not, and returns the answer.
func (s served) raw(words string) (*http.Response, string) {
	s.t.Helper()
	c, err := net.DialTimeout("tcp", s.Addr().String(), 10*time.Second)
	if err != nil {
		s.t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := io.WriteString(c, words); err != nil {
		s.t.Fatal(err)
	}
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		s.t.Fatalf("%q: %v", words, err)
	}
	defer res.Body.Close()
	// net/http resets the connection behind its answer where it has not read all of the request.
	body, _ := io.ReadAll(res.Body)
	return res, string(body)
}

func TestRawRequests(t *testing.T) {
	s := serve(t, "127.0.0.1:0", Pages{})
	cookie := "\r\nCookie: " + s.enter() + "\r\n\r\n"
	at := s.Addr().String()
	for _, tt := range []struct {
		name, words string
		want        int
		ours        bool // the answer: else it is net/http's, which says no more than the code
	}{
		{"as a proxy", "GET http://evil.example/ HTTP/1.1\r\nHost: " + at + cookie, 421, true},
		{"OPTIONS *", "OPTIONS * HTTP/1.1\r\nHost: " + at + cookie, 405, true},
		{"up", "GET " + s.folder + "../../etc/passwd HTTP/1.1\r\nHost: " + at + cookie, 404, true},
		{"HTTP/1.0 without a host", "GET / HTTP/1.0" + cookie, 421, true},
		{"no host", "GET / HTTP/1.1" + cookie, 400, false},
		{"two hosts", "GET / HTTP/1.1\r\nHost: " + at + "\r\nHost: x" + cookie, 400, false},
		{"no path", "GET <script> HTTP/1.1\r\nHost: " + at + cookie, 400, false},
		{"a long header", "GET / HTTP/1.1\r\nHost: " + at + "\r\nX: " + strings.Repeat("x", 16<<10) + cookie, 431, false},
	} {
		res, body := s.raw(tt.words)
		if res.StatusCode != tt.want || strings.Contains(body, secret) ||
			strings.Contains(body, "<script>") {
			t.Errorf("%s: %d %q, want %d", tt.name, res.StatusCode, body, tt.want)
		}
		if tt.ours {
			s.protected(res, tt.name)
		}
	}
}

// What is typed into the form is shown short, printable and escaped.
func TestHostileQuestion(t *testing.T) {
	s := serve(t, "127.0.0.1:0", Pages{Explain: func(_ context.Context, form url.Values) string {
		return form.Get("to")
	}})
	cookie := s.enter()
	for _, typed := range []string{
		`"><script>alert(1)</script>`, `<img src=x onerror=alert(1)>`, "\x1b[31m\x00\u202e<b>",
		"{{.}}<script>", strings.Repeat("<img>", 1000), "\xff\xfe<svg/onload=1>",
		"' onfocus='<script>", "</pre></textarea><script>",
	} {
		for _, field := range []string{"to", "uid", "direction"} {
			query := url.Values{"to": {"10.0.0.1:80"}}
			query.Set(field, typed)
			res, body := s.ask("GET", "/explain?"+query.Encode(), "Cookie", cookie)
			if res.StatusCode != 200 || !strings.Contains(body, "<form") {
				t.Errorf("%s %q: %d %q", field, typed, res.StatusCode, body)
			}
			for _, active := range []string{"<script", "<img", "<b>", "<svg/", "\x1b", "\x00", "\u202e",
				typed} {
				if strings.Contains(body, active) {
					t.Errorf("%s %q: %q is in %q", field, typed, active, body)
				}
			}
		}
	}
	for _, query := range []string{"?to", "?%zz", "?to=a&to=b", "?;",
		"?to=" + strings.Repeat("9", 6000)} {
		if res, body := s.ask("GET", "/explain"+query, "Cookie", cookie); res.StatusCode != 200 ||
			!strings.Contains(body, "<form") || len(body) > 40<<10 {
			t.Errorf("%q: %d %q", query, res.StatusCode, body)
		}
	}
}

// The form alone asks nothing.
func TestNothingAsked(t *testing.T) {
	s := serve(t, "127.0.0.1:0", Pages{Explain: func(context.Context, url.Values) string {
		t.Error("a question that nobody asked")
		return ""
	}})
	if res, _ := s.ask("GET", "/explain", "Cookie", s.enter()); res.StatusCode != 200 {
		t.Errorf("%d", res.StatusCode)
	}
}

// A page that cannot be made is no half page.
func TestNoPage(t *testing.T) {
	w := httptest.NewRecorder()
	show(w, func(w io.Writer) error {
		fmt.Fprint(w, "<p>half")
		return errors.New("\x1b<b>full")
	})
	if w.Code != 500 || w.Header().Get("Content-Type") != "text/plain; charset=utf-8" ||
		strings.Contains(w.Body.String(), "half") || strings.Contains(w.Body.String(), "\x1b") {
		t.Errorf("%d %q %v", w.Code, w.Body, w.Header())
	}
}

// Who connects and says nothing takes a place, and no more than there are: package server's limits
// hold here.
func TestManySlow(t *testing.T) {
	s := serve(t, "127.0.0.1:0", Pages{})
	dial := func() net.Conn {
		c, err := net.DialTimeout("tcp", s.Addr().String(), 10*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	for range 16 {
		dial()
	}
	c := dial()
	_ = c.SetReadDeadline(time.Now().Add(time.Minute))
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the seventeenth: %v", err)
	}
}

// Ctrl-C ends it, whatever hangs.
func TestEnds(t *testing.T) {
	hang, looking, asking := make(chan struct{}), make(chan struct{}), make(chan struct{})
	defer close(hang)
	s, err := Listen(t.Context(), "--serve", netip.MustParseAddrPort("127.0.0.1:0"), Pages{
		Look:    func(context.Context) page.Content { close(looking); <-hang; return page.Content{} },
		Explain: func(context.Context, url.Values) string { close(asking); <-hang; return "" },
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	one := served{s, t}
	cookie := one.enter()
	idle, err := net.DialTimeout("tcp", s.Addr().String(), 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer idle.Close()
	for _, path := range []string{"/", "/explain?to=x"} {
		c, err := net.DialTimeout("tcp", s.Addr().String(), 10*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: %s\r\nCookie: %s\r\n\r\n",
			strings.TrimSuffix(s.folder, "/")+path, s.Addr(), cookie)
	}
	<-looking
	<-asking
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if c, err := net.DialTimeout("tcp", s.Addr().String(), 10*time.Second); err == nil {
		c.Close()
		t.Error("it still listens")
	}
}

func TestIPv6(t *testing.T) {
	s := serve(t, "[::1]:0", Pages{})
	if !strings.HasPrefix(s.Link(), "http://[::1]:") {
		t.Errorf("the link is %q", s.Link())
	}
	if res, body := s.ask("GET", "/", "Cookie", s.enter()); res.StatusCode != 200 ||
		!strings.Contains(body, secret) {
		t.Errorf("%d %q", res.StatusCode, body)
	}
}

func TestAddress(t *testing.T) {
	for text, want := range map[string]string{
		"127.0.0.1:15080": "127.0.0.1:15080", "localhost:80": "127.0.0.1:80", "[::1]:0": "[::1]:0",
		"127.1.2.3:1": "127.1.2.3:1", "[::ffff:127.0.0.1]:1": "127.0.0.1:1",
	} {
		if have, err := Address(text); err != nil || have.String() != want {
			t.Errorf("%s: %v, %v", text, have, err)
		}
	}
	for text, want := range map[string]string{
		"0.0.0.0:80": "gcloud compute ssh VM -- -L 80:127.0.0.1:80", ":0": "-L 15080:127.0.0.1:15080",
		"10.0.0.1:80": "no TLS", "[::]:80": "loopback", "web.test:80": "loopback", "[::1%lo]:80": "loopback",
		"127.1:80": "loopback", "[::ffff:10.0.0.1]:80": "loopback", "127.0.0.1": "as in 127.0.0.1:15080",
		"8080": "as in", "": "as in", "127.0.0.1:http": "from 0", "127.0.0.1:65536": "from 0",
		"127.0.0.1:-1": "from 0", "127.0.0.1:": "from 0", "localhost.:80": "loopback",
	} {
		if have, err := Address(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, %v; want %q", text, have, err, want)
		}
	}
}

// A port that somebody has is named with its holder.
func TestInUse(t *testing.T) {
	s := serve(t, "127.0.0.1:0", Pages{})
	_, err := Listen(t.Context(), "--serve", s.Addr(), Pages{})
	var taken *server.ListenError
	if !errors.As(err, &taken) || len(taken.Holders) != 1 ||
		!strings.Contains(err.Error(), "--serve") {
		t.Errorf("%v", err)
	}
}
