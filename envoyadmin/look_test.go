package envoyadmin

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestNameable(t *testing.T) {
	many := func(n int, format string) (names []string) {
		for i := range n {
			names = append(names, fmt.Sprintf(format, i))
		}
		return names
	}
	for _, test := range []struct {
		what  string
		names []string
		want  string
	}{
		{"none", nil, ""},
		{"one", []string{"a.b"}, `^a\.b$`},
		{"one twice", []string{"a", "a"}, `^a(?:|)$`},
		{"two", []string{"outbound", "inbound"}, `^(?:outbound|inbound)$`},
		{"alike", []string{"LISTENER-out", "LISTENER-in", "LISTENER"}, `^LISTENER(?:-out|-in|)$`},
		{"the same first byte of two characters", []string{"ü", "ö"}, `^(?:ü|ö)$`},
		{"the longest", []string{strings.Repeat("x", maxNamedBytes)},
			"^" + strings.Repeat("x", maxNamedBytes) + "$"},
		{"too long", []string{strings.Repeat("x", maxNamedBytes+1)}, ""},
		{"cut", []string{"a" + strings.Repeat("x", 60), "b" + strings.Repeat("x", 60)},
			"^(?:a" + strings.Repeat("x", 44) + "|b" + strings.Repeat("x", 44) + `)\C*$`},
		{"cut until they are alike", many(32, "LISTENER-%d/with-a-long-tail-of-its-own"),
			`^LISTENER-(?:0|1|2|3|4|5|6|7|8|9)\C*$`},
		{"too many", many(33, "LISTENER-%d"), ""},
		{"too different", many(20, "%02d_10.0.0.1"), ""},
		{"no name", []string{"a", ""}, ""},
		{"no text", []string{"a\xff"}, ""},
		{"a line end", []string{"a\nb"}, ""},
	} {
		if got := expression(test.names); got != test.want || Nameable(test.names) != (got != "") {
			t.Errorf("%s: got %q, want %q", test.what, got, test.want)
		}
	}
	// What Go's syntax has of RE2's is matched here, and all of it by real Envoys (TestExpression).
	for _, names := range [][]string{{"a+b|c"}, {"(", ")"}, {`\E`, `\d$`}} {
		re := regexp.MustCompile(expression(names))
		for _, name := range names {
			if !re.MatchString(name) || re.MatchString(name+"x") || re.MatchString("x"+name) {
				t.Errorf("%s does not match %q alone", re, name)
			}
		}
	}
}

// heedless is an Envoy with these listeners, and a static one. One that heeds no names is as Envoy
// was before name_regex, which takes a parameter that it does not know for nothing.
type heedless struct {
	mu     sync.Mutex
	names  []string // of listeners that are active
	heeds  bool
	asked  []string
	status map[string]int // by path, instead of an answer
}

func (e *heedless) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if code := e.status[r.URL.Path]; code != 0 {
		w.WriteHeader(code)
		return
	}
	const element = `{"@type":"type.googleapis.com/envoy.admin.v3.ListenersConfigDump.%s",%s}`
	var elements []string
	query := r.URL.Query()
	switch {
	case r.URL.Path == "/server_info":
		io.WriteString(w, infoAnswer)
		return
	case r.URL.Path == "/listeners":
		e.asked = append(e.asked, "listeners")
		for _, name := range append([]string{"static"}, e.names...) {
			elements = append(elements, fmt.Sprintf(`{"name":%q,"local_address":{}}`, name))
		}
		fmt.Fprintf(w, `{"listener_statuses":[%s]}`, strings.Join(elements, ","))
		return
	case query.Get("resource") == "static_listeners":
		elements = append(elements, fmt.Sprintf(element, "StaticListener",
			`"listener":{"@type":"type.googleapis.com/envoy.config.listener.v3.Listener","name":"static"}`))
	default:
		what := "dump"
		match := regexp.MustCompile("")
		if query.Has("mask") {
			what = "look"
		}
		if of := query.Get("name_regex"); of != "" {
			what = "named"
			if e.heeds {
				match = regexp.MustCompile(of)
			}
		}
		e.asked = append(e.asked, what)
		for _, name := range e.names {
			if match.MatchString(name) {
				elements = append(elements, fmt.Sprintf(element, "DynamicListener",
					fmt.Sprintf(`"name":%q,"active_state":{"last_updated":"2026-01-01T00:00:00Z"}`, name)))
			}
		}
	}
	fmt.Fprintf(w, `{"configs":[%s]}`, strings.Join(elements, ","))
}

// set sets the listeners, and what was asked so far is forgotten.
func (e *heedless) set(names ...string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.names, e.asked = names, nil
}

// TestFingerprintNamed: whether Envoy heeds names or not, what is told is what a look at all tells;
// an Envoy that will not be asked so is not asked so again.
func TestFingerprintNamed(t *testing.T) {
	names := []string{"a", "b"}
	for _, test := range []struct {
		what          string
		heeds, heeded string // what is asked of one that heeds names, and of one that does not
		now           []string
		status        map[string]int
		twice         string // what is asked the second time; "": the same
	}{
		{"nothing moved", "named listeners", "named listeners", []string{"a", "b"}, nil, ""},
		{"one is gone", "named look", "named look", []string{"b"}, nil, ""},
		{"one has come", "named listeners look", "named listeners", []string{"a", "b", "c"}, nil, ""},
		{"forbidden", "named look", "named look", []string{"a", "b"},
			map[string]int{"/listeners": http.StatusForbidden}, "look"},
	} {
		for _, heeds := range []bool{true, false} {
			e := &heedless{heeds: heeds}
			server := httptest.NewServer(e)
			defer server.Close()
			c, err := New(server.Listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.namedFrom = 0
			e.set(names...)
			if s, err := c.Listeners(t.Context()); err != nil || !slices.Equal(s.Names, names) {
				t.Fatalf("names %q, %v", s.Names, err)
			}
			e.status = test.status
			want := test.heeds
			if !heeds {
				want = test.heeded
			}
			for i := range 2 {
				if i == 1 && test.twice != "" {
					want = test.twice
				}
				e.set(test.now...)
				named, err := c.Fingerprint(t.Context(), names)
				if err != nil {
					t.Fatal(err)
				}
				if got := strings.Join(e.asked, " "); got != want {
					t.Errorf("%s, heeds %v, time %d: asked %q, want %q", test.what, heeds, i, got, want)
				}
				if all, err := c.Fingerprint(t.Context(), nil); err != nil || all != named {
					t.Errorf("%s, heeds %v: got %+v, of all %+v, %v", test.what, heeds, named, all, err)
				}
			}
		}
	}
}

// TestFingerprintNotNamed: where the static listeners are not known it cannot be told which are
// new, and what is not Nameable is not asked for.
func TestFingerprintNotNamed(t *testing.T) {
	e := &heedless{heeds: true}
	server := httptest.NewServer(e)
	defer server.Close()
	c, err := New(server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.namedFrom = 0
	e.set("a")
	if _, err := c.Fingerprint(t.Context(), []string{"a"}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Listeners(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Fingerprint(t.Context(), []string{""}); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(e.asked, " "); got != "look dump look" {
		t.Errorf("asked %q", got)
	}
}

// TestFingerprintCheap: an Envoy that answers a look at all fast enough is asked of all.
func TestFingerprintCheap(t *testing.T) {
	e := &heedless{heeds: true}
	server := httptest.NewServer(e)
	defer server.Close()
	c, err := New(server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	e.set("a")
	if _, err := c.Listeners(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, took := range []time.Duration{0, namedFrom - 1, namedFrom} {
		c.lookTook = took
		if _, err := c.Fingerprint(t.Context(), []string{"a"}); err != nil {
			t.Fatal(err)
		}
	}
	if got := strings.Join(e.asked, " "); got != "dump look look named listeners" {
		t.Errorf("asked %q", got)
	}
}

// TestNamedFaults: what is wrong with either answer of a look by names is an error of its kind.
func TestNamedFaults(t *testing.T) {
	body := func(text string) string {
		return fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(text), text)
	}
	const found = `{"configs":[{"@type":"type.googleapis.com/envoy.admin.v3.ListenersConfigDump.` +
		`DynamicListener","name":"a","active_state":{}}]}`
	for _, test := range []struct {
		listeners string
		want      error
	}{
		{body(`{"status":"ok"}`), ErrNotJSON},
		{body(`{"listener_statuses":7}`), ErrNotJSON},
		{body(`{"listener_statuses":[{"name":"a"`), ErrTruncated},
		{body(``), ErrEmpty},
		{"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n", ErrStatus},
		{"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n", ErrRedirect},
	} {
		c := faulty(t, func(w *bufio.Writer, conn net.Conn) { io.WriteString(w, test.listeners) })
		c.namedFrom = 0
		c.http.Transport = answeringDumps{c.http.Transport, found}
		if _, err := c.Listeners(t.Context()); err != nil {
			t.Fatal(err)
		}
		_, err := c.Fingerprint(t.Context(), []string{"a"})
		checkKind(t, err, test.want)
	}
}

// answeringDumps answers /config_dump itself.
type answeringDumps struct {
	http.RoundTripper
	answer string
}

func (a answeringDumps) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Path != "/config_dump" {
		return a.RoundTripper.RoundTrip(r)
	}
	text := a.answer
	if strings.Contains(url.QueryEscape(r.URL.RawQuery), "static") {
		text = "{}"
	}
	w := httptest.NewRecorder()
	io.WriteString(w, text)
	return w.Result(), nil
}
