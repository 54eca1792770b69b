package envoyadmin

import (
	"bufio"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"runtime"
	"runtime/metrics"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/test/clock"
)

func TestNew(t *testing.T) {
	for _, good := range []string{"127.0.0.1:15000", "localhost:1", "[::1]:65535",
		"unix:///run/envoy.sock", "unix:/run/envoy.sock"} {
		if c, err := New(good); err != nil || c.addr != good {
			t.Errorf("%s: %v", good, err)
		}
	}
	for _, bad := range []string{"", "127.0.0.1", ":15000", "127.0.0.1:0", "127.0.0.1:65536",
		"127.0.0.1:http", "::1:15000", "unix:", "unix://run/x", "unix:///" + strings.Repeat("x", 108)} {
		_, err := New(bad)
		var typed *BadAddressError
		if !errors.As(err, &typed) || typed.Reason == "" {
			t.Errorf("%q: got %v", bad, err)
		}
	}
}

// All kinds, to see that an error matches one alone.
var kinds = []error{ErrRefused, ErrTimeout, ErrUntrusted, ErrStatus, ErrForbiddenPath, ErrRedirect,
	ErrEncoding, ErrEmpty, ErrNotJSON, ErrTruncated, ErrTooLarge, ErrTooDeep, ErrConnection}

func checkKind(t *testing.T, err error, want ...error) {
	t.Helper()
	for _, kind := range kinds {
		wanted := false
		for _, w := range want {
			wanted = wanted || w == kind
		}
		if errors.Is(err, kind) != wanted {
			t.Errorf("%v: is %q: %v, want %v", err, kind, !wanted, wanted)
		}
	}
}

// infoAnswer is what an Envoy says of itself: /server_info of 1.40.0 without what is not read.
// TestLife asks real ones.
const infoAnswer = `{"version":"0a1b/1.40.0/Clean/RELEASE/BoringSSL","state":"LIVE","uptime_current_epoch":"100s","node":{"id":"n"}}`

// slack is for a machine that is busy: limits are tested against answers that never end.
const slack = 10 * time.Second

// faulty is an Envoy that knows itself and gives every other answer by a raw writer to the
// connection. But for 403 (TestForbidden asks a real one) no Envoy was seen to answer so: these are
// answers of a sick process, or of one that is no Envoy.
func faulty(t *testing.T, answer func(w *bufio.Writer, conn net.Conn)) *Client {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				r := bufio.NewReader(conn)
				for {
					request, err := http.ReadRequest(r)
					if err != nil {
						return
					}
					if request.URL.Path == "/server_info" {
						fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s",
							len(infoAnswer), infoAnswer)
						continue
					}
					w := bufio.NewWriter(conn)
					answer(w, conn)
					w.Flush()
					return
				}
			}()
		}
	}()
	c, err := New(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c.ShortLimit, c.LongLimit = 300*time.Millisecond, 600*time.Millisecond
	t.Cleanup(c.Close)
	return c
}

// watchHeap looks all the time at what the collector found to be held, until end is called, which
// returns by how much that has grown at most. (How large the heap is says nothing on a busy
// machine, where the collector lags behind.)
func watchHeap() (end func() (grew uint64)) {
	runtime.GC()
	live := func() uint64 {
		sample := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
		metrics.Read(sample)
		return sample[0].Value.Uint64()
	}
	before := live()
	most := before
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for {
			most = max(most, live())
			select {
			case <-tick.C:
			case <-stop:
				return
			}
		}
	}()
	return func() uint64 { close(stop); <-stopped; return most - before }
}

// TestFaults gives each bad answer to each question: an error of its own kind, in time,
// and with little memory.
func TestFaults(t *testing.T) {
	type write = func(w *bufio.Writer, conn net.Conn)
	body := func(header, body string) write {
		return func(w *bufio.Writer, _ net.Conn) {
			fmt.Fprintf(w, "HTTP/1.1 200 OK\r\n%sContent-Length: %d\r\n\r\n%s", header, len(body), body)
		}
	}
	status := func(line string) write {
		return func(w *bufio.Writer, _ net.Conn) {
			fmt.Fprintf(w, "HTTP/1.1 %s\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 2\r\n\r\n{}",
				line)
		}
	}
	endless := func(start, more string) write {
		return func(w *bufio.Writer, conn net.Conn) {
			fmt.Fprintf(w, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n%s", start)
			for chunk := strings.Repeat(more, 1+(64<<10)/len(more)); ; {
				if _, err := w.WriteString(chunk); err != nil {
					return
				}
			}
		}
	}
	zipped := func(w *bufio.Writer, _ net.Conn) {
		fmt.Fprint(w, "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n")
		z := gzip.NewWriter(w)
		io.WriteString(z, `{"configs":[]}`)
		z.Close()
	}
	const entry = `{"@type":"type.googleapis.com/envoy.admin.v3.ListenersConfigDump.DynamicListener","name":"l","active_state":{"listener":`
	tests := []struct {
		name   string
		answer write
		want   []error
	}{
		{"silent", func(w *bufio.Writer, conn net.Conn) { io.Copy(io.Discard, conn) }, []error{ErrTimeout}},
		{"slow", func(w *bufio.Writer, conn net.Conn) {
			fmt.Fprint(w, "HTTP/1.1 200 OK\r\n\r\n")
			for w.WriteByte(' ') == nil && w.Flush() == nil {
				time.Sleep(20 * time.Millisecond)
			}
		}, []error{ErrTimeout}},
		{"hangs within", func(w *bufio.Writer, conn net.Conn) {
			fmt.Fprint(w, "HTTP/1.1 200 OK\r\n\r\n"+`{"configs":[`)
			w.Flush()
			io.Copy(io.Discard, conn)
		}, []error{ErrTimeout}},
		{"closed at once", func(w *bufio.Writer, conn net.Conn) { conn.Close() }, []error{ErrTruncated}},
		{"reset", func(w *bufio.Writer, conn net.Conn) { conn.(*net.TCPConn).SetLinger(0); conn.Close() }, []error{ErrConnection}},
		{"truncated by length", func(w *bufio.Writer, _ net.Conn) {
			fmt.Fprint(w, "HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n"+`{"configs":[{`)
		}, []error{ErrTruncated}},
		{"truncated chunks", func(w *bufio.Writer, _ net.Conn) {
			fmt.Fprint(w, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{\"con\r\n")
		}, []error{ErrTruncated}},
		{"truncated without length", func(w *bufio.Writer, _ net.Conn) { fmt.Fprint(w, "HTTP/1.1 200 OK\r\n\r\n"+`{"configs":[{"name":"a`) }, []error{ErrTruncated}},
		{"empty", body("", ""), []error{ErrEmpty}},
		{"blank", body("", " \n "), []error{ErrTruncated}},
		{"HTML", body("Content-Type: text/html\r\n", "<!DOCTYPE html><html><body>Sign in</body></html>"), []error{ErrNotJSON}},
		{"not HTTP", func(w *bufio.Writer, _ net.Conn) { fmt.Fprint(w, "SSH-2.0-OpenSSH_9.2\r\n") }, []error{ErrConnection}},
		{"other JSON", body("", `{"status":"ok"}`), []error{ErrNotJSON}},
		{"an array", body("", `[]`), []error{ErrNotJSON}},
		{"null", body("", `null`), []error{ErrNotJSON}},
		{"configs of another kind", body("", `{"configs":{"a":1}}`), []error{ErrNotJSON}},
		{"sections that were not asked for", body("", `{"configs":[{"@type":"type.googleapis.com/envoy.admin.v3.BootstrapConfigDump"}]}`), []error{ErrNotJSON}},
		{"two values", body("", `{"configs":[]}{"configs":[]}`), []error{ErrNotJSON}},
		{"a comma too many", body("", `{"configs":[],}`), []error{ErrNotJSON}},
		{"no values", body("", `{"configs"}`), []error{ErrNotJSON}},
		{"gzip", zipped, []error{ErrEncoding}},
		{"redirect", status("302 Found"), []error{ErrRedirect}},
		{"forbidden", status("403 Forbidden"), []error{ErrStatus, ErrForbiddenPath}},
		{"not found", status("404 Not Found"), []error{ErrStatus}},
		{"unavailable", status("503 Service Unavailable"), []error{ErrStatus}},
		{"too long by its header", func(w *bufio.Writer, _ net.Conn) {
			fmt.Fprintf(w, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n{", int64(maxLong)+1)
		}, []error{ErrTooLarge}},
		{"endless headers", func(w *bufio.Writer, _ net.Conn) {
			fmt.Fprint(w, "HTTP/1.1 200 OK\r\n")
			for {
				if _, err := w.WriteString("X-More: and more\r\n"); err != nil {
					return
				}
			}
		}, []error{ErrConnection}},
		{"an endless string", endless(`{"configs":[{"name":"`, "x"), []error{ErrTooLarge}},
		{"an endless name", endless(`{"configs":[{"`, "x"), []error{ErrTooLarge}},
		{"endless space", endless(`{"configs":[`, " "), []error{ErrTooLarge}},
		{"an endless number", endless(`{"configs":[{"active_state":`, "1"), []error{ErrTooLarge}},
		{"an endless address", endless(`{"configs":[`+entry+`{"additional_addresses":[`, `{"address":{}},`), []error{ErrTooLarge}},
		{"an endless listener", endless(`{"configs":[`+entry+`{"stat_prefix":[`, `"x",`), []error{ErrTimeout}},
		{"endless depth", endless(`{"configs":[{"client_status":`, `[`), []error{ErrTooDeep}},
		{"endless depth in a match", endless(`{"configs":[`+entry+`{"filter_chains":[{"filter_chain_match":`, `{"a":`), []error{ErrTooDeep}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if test.want[0] == ErrTimeout {
				t.Parallel()
			}
			c := faulty(t, test.answer)
			short, long := c.ShortLimit, c.LongLimit
			held := watchHeap()
			for name, ask := range map[string]func() error{
				"listeners":   func() error { _, err := c.Listeners(t.Context()); return err },
				"fingerprint": func() error { _, err := c.Fingerprint(t.Context(), nil); return err },
			} {
				c.ShortLimit, c.LongLimit = short, long
				if test.want[0] != ErrTimeout &&
					!(name == "fingerprint" && strings.Contains(test.name, "an endless")) {
					// What kind of error it is must not depend on how fast this machine is.
					c.ShortLimit, c.LongLimit = time.Minute, time.Minute
				}
				began := time.Now()
				err := ask()
				if took := time.Since(began); took > c.LongLimit+slack {
					t.Errorf("%s took %v", name, took)
				}
				if name == "fingerprint" && strings.Contains(test.name, "an endless") {
					// It skips listeners, and gives up at the smaller limit of all.
					if !errors.Is(err, ErrTooLarge) && !errors.Is(err, ErrTimeout) {
						t.Errorf("fingerprint: %v", err)
					}
					continue
				}
				checkKind(t, err, test.want...)
				if err != nil && !strings.HasPrefix(err.Error(), `get "/config_dump`) {
					t.Errorf("%s: %q does not say what was asked for", name, err)
				}
			}
			if grew := held(); test.want[0] != ErrTimeout && grew > 64<<20 {
				t.Errorf("%d MB more were held", grew>>20)
			}
			// The other questions end too.
			c.ShortLimit, c.LongLimit = short, long
			for name, ask := range map[string]func() error{
				"ready":         func() error { _, err := c.Ready(t.Context()); return err },
				"clusters":      func() error { _, err := c.Clusters(t.Context()); return err },
				"bootstrap":     func() error { _, err := c.Bootstrap(t.Context()); return err },
				"control plane": func() error { _, err := c.ControlPlane(t.Context()); return err },
				"panics": func() error {
					_, err := c.Panics(t.Context())
					if test.name == "empty" || test.name == "blank" {
						return ErrEmpty // no cluster was ever in panic: not an error
					}
					return err
				},
			} {
				began := time.Now()
				if err := ask(); err == nil {
					t.Errorf("%s: no error", name)
				}
				if took := time.Since(began); took > c.LongLimit+slack {
					t.Errorf("%s took %v", name, took)
				}
			}
		})
	}
}

func TestRefused(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	path := filepath.Join(t.TempDir(), "no.sock")
	dead := filepath.Join(t.TempDir(), "dead.sock")
	u, err := net.Listen("unix", dead)
	if err != nil {
		t.Fatal(err)
	}
	u.(*net.UnixListener).SetUnlinkOnClose(false)
	u.Close()
	for _, addr := range []string{l.Addr().String(), "unix://" + path, "unix://" + dead} {
		c, err := New(addr)
		if err != nil {
			t.Fatal(err)
		}
		_, err = c.Ready(t.Context())
		checkKind(t, err, ErrRefused)
		_, err = c.Listeners(t.Context())
		checkKind(t, err, ErrRefused)
	}
}

// A full backlog: the port listens, and nothing ever answers, not even the handshake.
func TestNeverAccepts(t *testing.T) {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd)
	if err := errors.Join(syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}),
		syscall.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	name, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	addr := fmt.Sprintf("127.0.0.1:%d", name.(*syscall.SockaddrInet4).Port)
	for range 3 { // fill it
		if conn, err := net.DialTimeout("tcp", addr, 100*time.Millisecond); err == nil {
			defer conn.Close()
		}
	}
	c, err := New(addr)
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	_, err = c.Ready(t.Context())
	checkKind(t, err, ErrTimeout)
	if took := time.Since(began); took > connectLimit+slack {
		t.Errorf("took %v", took)
	}
}

// What the caller cancels is the caller's error.
func TestCancelled(t *testing.T) {
	c := faulty(t, func(_ *bufio.Writer, conn net.Conn) { io.Copy(io.Discard, conn) })
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	_, err := c.Listeners(ctx)
	checkKind(t, err)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestTrust(t *testing.T) {
	c := recorded(t, "istio")
	var asked atomic.Int32
	foreign := errors.New("uid 1234")
	c.Trust = func(conn net.Conn) error {
		asked.Add(1)
		if conn.RemoteAddr().String() != c.addr {
			t.Errorf("asked about %v", conn.RemoteAddr())
		}
		return foreign
	}
	_, err := c.Listeners(t.Context())
	checkKind(t, err, ErrUntrusted)
	if !errors.Is(err, foreign) || asked.Load() != 1 {
		t.Errorf("got %v, asked %d times", err, asked.Load())
	}
	foreign = nil
	for range 5 {
		if _, err := c.Fingerprint(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
	}
	if asked.Load() != 2 {
		t.Errorf("asked %d times: once per connection is meant", asked.Load())
	}
}

// The good answers were seen of Envoy 1.40.0; the others are of somebody else.
func TestReady(t *testing.T) {
	for _, test := range []struct {
		code int
		body string
		want error
	}{{200, "LIVE\n", nil}, {503, "PRE_INITIALIZING\n", nil},
		{503, "upstream connect error", ErrNotJSON}, {200, "<html>", ErrNotJSON}, {200, "", ErrEmpty}, {404, "LIVE", ErrStatus}} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(test.code)
			io.WriteString(w, test.body)
		}))
		c, _ := New(server.Listener.Addr().String())
		state, err := c.Ready(t.Context())
		if test.want == nil && (err != nil || state != strings.TrimSpace(test.body)) {
			t.Errorf("%d %q: got %q, %v", test.code, test.body, state, err)
		} else if test.want != nil {
			checkKind(t, err, test.want)
		}
		server.Close()
	}
}

// envoys is an admin address where one Envoy after the other answers. {} is what Envoys from 1.36.4
// to 1.40.0 answer to a dump with nothing in it. The real restart is in TestLife; that uptimes are
// whole seconds is from protobuf's Duration as 1.40.0 writes it.
type envoys struct {
	static, dynamic, infos atomic.Int32
	version                atomic.Value // string
	uptime                 atomic.Int64 // seconds
}

func (e *envoys) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch uri := r.URL.RequestURI(); uri {
	case "/server_info":
		e.infos.Add(1)
		fmt.Fprintf(w, `{"version":%q,"state":"LIVE","uptime_current_epoch":"%ds"}`, e.version.Load(),
			e.uptime.Load())
	case staticPath:
		e.static.Add(1)
		io.WriteString(w, "{}")
	case dynamicPath, maskedPath:
		e.dynamic.Add(1)
		io.WriteString(w, "{}")
	default:
		http.NotFound(w, r)
	}
}

// A new process is seen by its new connection and its uptime: static listeners are asked for once
// of each, and the fingerprint differs.
func TestProcess(t *testing.T) {
	e := new(envoys)
	e.version.Store("x/1.40.0/Clean")
	e.uptime.Store(1000)
	server := httptest.NewServer(e)
	defer server.Close()
	c, err := New(server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	ask := func() Fingerprint {
		t.Helper()
		s, err := c.Listeners(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		f, err := c.Fingerprint(t.Context(), nil)
		if err != nil || f != s.Fingerprint {
			t.Fatalf("%+v, %+v, %v", f, s.Fingerprint, err)
		}
		return f
	}
	first := ask()
	if again := ask(); again != first || e.static.Load() != 1 || e.infos.Load() != 1 {
		t.Errorf("asked %d times for static listeners, %d times who it is", e.static.Load(),
			e.infos.Load())
	}
	server.CloseClientConnections() // the same process, another connection
	if again := ask(); again != first || e.static.Load() != 1 || e.infos.Load() != 2 {
		t.Errorf("the same process is taken for another: %+v, %+v", first, again)
	}
	server.CloseClientConnections()
	e.uptime.Store(0)
	second := ask()
	if second == first || second.Process != first.Process+1 || e.static.Load() != 2 {
		t.Errorf("the new process is not seen: %+v, %+v", first, second)
	}
	// Two young ones in a row: their uptimes cannot tell them apart.
	server.CloseClientConnections()
	if third := ask(); third.Process != second.Process+1 || e.static.Load() != 3 {
		t.Errorf("a process as young as the last is not seen: %+v, %+v", second, third)
	}
}

// One that ended a moment after it had answered, and another that is as old as it would be:
// seen with an Envoy that is restarted every one or two seconds. Its uptime may be a second
// more than it has been there.
func TestProcessRestartedQuickly(t *testing.T) {
	e := new(envoys)
	e.version.Store("x/1.40.0/Clean")
	server := httptest.NewServer(e)
	defer server.Close()
	c, err := New(server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		lived  time.Duration // that the known one has answered for
		uptime int64         // of the one that is met next
	}{{1500 * time.Millisecond, 0}, {1500 * time.Millisecond, 1}, {2500 * time.Millisecond, 1},
		{5 * time.Second, 1}, {time.Hour, 0}} {
		before, err := c.Fingerprint(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		c.info.Asked, c.alive = c.info.Asked.Add(-step.lived), c.alive.Add(-step.lived)
		c.answered(time.Now())
		server.CloseClientConnections()
		e.uptime.Store(step.uptime)
		after, err := c.Fingerprint(t.Context(), nil)
		if err != nil || after.Process != before.Process+1 {
			t.Errorf("after %v, uptime %d: %+v, then %+v, %v", step.lived, step.uptime, before, after, err)
		}
	}
}

// TestProcessRestartedUnread: an answer that was read late, since this process had to wait for a
// processor, does not tell that its Envoy still ran then.
func TestProcessRestartedUnread(t *testing.T) {
	t.Parallel() // it sleeps
	e := new(envoys)
	e.version.Store("x/1.40.0/Clean")
	server := httptest.NewServer(e)
	defer server.Close()
	c, err := New(server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	before, err := c.Fingerprint(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	const question = ServerInfoQuestion
	err = c.get(t.Context(), question, "/server_info", time.Minute, maxShort, func(io.Reader) error {
		time.Sleep(2600 * time.Millisecond) // another one starts at the beginning of this
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	server.CloseClientConnections()
	e.uptime.Store(2)
	if after, err := c.Fingerprint(t.Context(), nil); err != nil || after.Process != before.Process+1 {
		t.Errorf("%+v, then %+v, %v", before, after, err)
	}
}

// A process that was young when it was asked, and is known to have gone on since then, is not
// another after a new connection.
func TestProcessGrowsOld(t *testing.T) {
	e := new(envoys)
	e.version.Store("x/1.40.0/Clean")
	server := httptest.NewServer(e)
	defer server.Close()
	c, err := New(server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	first, err := c.Fingerprint(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	// that was a minute ago
	c.info.Asked, c.alive = c.info.Asked.Add(-time.Minute), c.alive.Add(-time.Minute)
	e.uptime.Store(60)
	if _, err := c.Fingerprint(t.Context(), nil); err != nil || e.infos.Load() != 1 {
		t.Errorf("asked %d times who it is, %v", e.infos.Load(), err)
	}
	c.Redial()
	again, err := c.Fingerprint(t.Context(), nil)
	if err != nil || again != first || e.infos.Load() != 2 {
		t.Errorf("%+v, then %+v, %v; asked %d times who it is", first, again, err, e.infos.Load())
	}
}

// The Envoy of before goes on answering on its connections after a hot restart, which took its port
// (seen with Envoy 1.40.0: TestHotRestart of test/e2e). A new connection leads to the new one.
func TestRedial(t *testing.T) {
	for name, redial := range map[string]func(*Client){
		"asked for": func(c *Client) { c.Redial() },
		"by age":    func(c *Client) { c.redials = c.redials.Add(-connectionAge) },
	} {
		t.Run(name, func(t *testing.T) {
			var e [2]envoys
			for i := range e {
				e[i].version.Store("x/1.40.0/Clean")
			}
			e[0].uptime.Store(1000)
			old := httptest.NewServer(&e[0])
			defer old.Close()
			addr := old.Listener.Addr().String()
			c, err := New(addr)
			if err != nil {
				t.Fatal(err)
			}
			before, err := c.Fingerprint(t.Context(), nil)
			if err != nil {
				t.Fatal(err)
			}
			old.Listener.Close()
			l, err := net.Listen("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			server := &http.Server{Handler: &e[1]}
			go server.Serve(l)
			defer server.Close()
			f, err := c.Fingerprint(t.Context(), nil)
			if err != nil || f != before || e[1].infos.Load() != 0 {
				t.Fatalf("%+v, %v: the connection of before is gone", f, err)
			}
			redial(c)
			if f, err := c.Fingerprint(t.Context(), nil); err != nil || f.Process != before.Process+1 {
				t.Errorf("got %+v, %v", f, err)
			}
		})
	}
}

func TestVersions(t *testing.T) {
	for text, want := range map[string]Version{
		"9e55/1.40.0/Clean/RELEASE/BoringSSL": {1, 40, 0}, "1.9.1": {1, 9, 1},
		"9e55/1.19.0-dev/Modified/DEBUG/BoringSSL": {1, 19, 0},
		"own-build": {}, "a/b/c": {}, "1.2": {}, "x/1.2.99999999": {}, "": {},
	} {
		got, err := ParseVersion(text)
		if got != want || (err == nil) != (want != Version{}) {
			t.Errorf("%q: got %v, %v", text, got, err)
		}
	}
	if !(Version{1, 9, 0}).Less(Minimum) || Minimum.Less(Minimum) ||
		!(Version{1, 24, 8}).Less(Advised) || (Version{2, 0, 0}).Less(Advised) {
		t.Error("Less is wrong")
	}
	// What is asked depends on it.
	for version, want := range map[string][2]string{
		"x/1.40.0/y": {maskedPath, dynamicPath}, "x/1.19.0/y": {maskedPath, dynamicPath},
		"x/1.18.3/y": {dynamicPath, dynamicPath}, "x/1.13.0/y": {dynamicPath, dynamicPath},
		"x/1.12.7/y": {everythingPath, everythingPath}, "own": {maskedPath, dynamicPath},
	} {
		var asked []string
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			switch uri := r.URL.RequestURI(); uri {
			case "/server_info":
				fmt.Fprintf(w, `{"version":%q}`, version)
			case staticPath:
				io.WriteString(w, "{}")
			case everythingPath:
				asked = append(asked, uri)
				io.WriteString(
					w, `{"configs":[{"@type":"type.googleapis.com/envoy.admin.v2alpha.ListenersConfigDump"}]}`)
			default:
				asked = append(asked, uri)
				io.WriteString(w, "{}")
			}
		}))
		c, _ := New(server.Listener.Addr().String())
		if _, err := c.Fingerprint(t.Context(), nil); err != nil {
			t.Error(version, err)
		}
		if _, err := c.Listeners(t.Context()); err != nil {
			t.Error(version, err)
		}
		if len(asked) != 2 || asked[0] != want[0] || asked[1] != want[1] {
			t.Errorf("%s: asked for %q", version, asked)
		}
		server.Close()
	}
}

func TestSameProcess(t *testing.T) {
	now := time.Now()
	a := ServerInfo{Uptime: 100 * time.Second, Asked: now, Text: "v"}
	later := now.Add(time.Minute)
	for name, test := range map[string]struct {
		b    ServerInfo
		want bool
	}{
		"later":       {ServerInfo{Uptime: 160 * time.Second, Asked: later, Text: "v"}, true},
		"restarted":   {ServerInfo{Uptime: 5 * time.Second, Asked: later, Text: "v"}, false},
		"upgraded":    {ServerInfo{Uptime: 160 * time.Second, Asked: later, Text: "w"}, false},
		"hot restart": {ServerInfo{Uptime: 160 * time.Second, Asked: later, Text: "v", Epoch: 1}, false},
		// Its uptime is by the wall clock, and steps with it.
		"clock set forth": {ServerInfo{Uptime: 3*time.Hour + 160*time.Second,
			Asked: clock.Set(later, 3*time.Hour), Text: "v"}, true},
		"clock set back": {ServerInfo{Uptime: 160*time.Second - 6*time.Hour,
			Asked: clock.Set(later, -6*time.Hour), Text: "v"}, true},
		"an older one": {ServerInfo{Uptime: 7 * time.Hour, Asked: later, Text: "v"}, false},
	} {
		if got := test.b.SameProcess(a); got != test.want {
			t.Errorf("%s: got %v", name, got)
		}
	}
}

// TestAsked: each question is booked once, under its name, answered or not; only an answer is a
// sign of life.
func TestAsked(t *testing.T) {
	c := answering(t, "1.40.0", `{"configs":[]}`)
	ask := []func(context.Context) error{
		func(ctx context.Context) error { _, err := c.Fingerprint(ctx, nil); return err },
		func(ctx context.Context) error { _, err := c.Listeners(ctx); return err },
	}
	if a := c.Asked(); a != (Asked{}) {
		t.Errorf("before the first: %+v", a)
	}
	for _, f := range ask {
		if err := f(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	a := c.Asked()
	for q, want := range map[Question]uint64{
		DumpQuestion: 2, LookQuestion: 1, ServerInfoQuestion: 1, // a dump is of dynamic and static ones
		ReadyQuestion: 0, BootstrapQuestion: 0, StatsQuestion: 0, ClustersQuestion: 0,
	} {
		if cost := a.Questions[q]; cost.Count != want || (cost.Took > 0) != (want > 0) {
			t.Errorf("%v: %+v, want %d", q, cost, want)
		}
	}
	if a.Answered.IsZero() {
		t.Error("nothing was answered, as told")
	}
	if _, err := c.Ready(t.Context()); err == nil {
		t.Fatal("that is no state")
	}
	_, _ = c.ControlPlane(t.Context())
	_, _ = c.Clusters(t.Context())
	_, _ = c.Bootstrap(t.Context())
	_ = c.FailHealthCheck(t.Context())
	b := c.Asked()
	for _, q := range []Question{ReadyQuestion, BootstrapQuestion, StatsQuestion, ClustersQuestion} {
		if b.Questions[q].Count != 1 {
			t.Errorf("%v: %+v, want 1", q, b.Questions[q])
		}
	}
	seen := map[string]bool{}
	for q := range b.Questions {
		seen[Question(q).String()] = true
	}
	if len(seen) != len(b.Questions) || seen[order.String()] {
		t.Errorf("names: %v", seen)
	}
}
