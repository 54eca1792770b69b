package server

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

func yes() (bool, string) { return true, "" }

// startPublic runs p until the test ends, and returns its address once it listens.
func startPublic(t *testing.T, p *Public) string {
	t.Helper()
	p.retry = 10 * time.Millisecond
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(2 * time.Second):
			t.Error("Run did not end within 2 s")
		}
	})
	eventually(t, "listening or failing", func() bool { return p.Addr() != nil || p.Err() != nil })
	if p.Addr() == nil {
		return ""
	}
	return p.Addr().String()
}

// Addr is where the server listens; nil while it does not.
func (p *Public) Addr() net.Addr {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.addr
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 10 s: %s", what)
		}
	}
}

func newPublic(t *testing.T, listen string, healthz,
	ready Health) (*Public, *observer.ObservedLogs) {
	t.Helper()
	core, logs := observer.New(zap.InfoLevel)
	metrics := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, "m 1\n")
	})
	p, err := NewPublic(listen, healthz, ready, metrics, zap.New(core))
	if err != nil {
		t.Fatal(err)
	}
	return p, logs
}

func TestPublic(t *testing.T) {
	var down atomic.Bool
	ready := func() (bool, string) {
		return !down.Load(), map[bool]string{true: "Envoy is\nnot LIVE"}[down.Load()]
	}
	p, _ := newPublic(t, "127.0.0.1:0", yes, ready)
	base := "http://" + startPublic(t, p)
	for _, tt := range []struct {
		method, path string
		down         bool
		code         int
		body         string
	}{
		{"GET", "/metrics", false, 200, "m 1\n"},
		{"GET", "/healthz", false, 200, "ok\n"},
		{"HEAD", "/healthz", false, 200, ""},
		{"GET", "/healthz/ready", false, 200, "ok\n"},
		{"GET", "/healthz/ready", true, 503, "Envoy is not LIVE\n"},
		{"GET", "/healthz", true, 200, "ok\n"},
		{"POST", "/healthz", false, 405, "Method Not Allowed\n"},
		{"DELETE", "/metrics", false, 405, "Method Not Allowed\n"},
		{"GET", "/", false, 404, "404 page not found\n"},
		{"GET", "/status", false, 404, "404 page not found\n"},
		{"POST", "/pause", false, 404, "404 page not found\n"},
		{"GET", "/debug/pprof/", false, 404, "404 page not found\n"},
		{"GET", "/healthz/ready/x", false, 404, "404 page not found\n"},
	} {
		t.Run(fmt.Sprint(tt.method, tt.path, tt.down), func(t *testing.T) {
			down.Store(tt.down)
			req, err := http.NewRequest(tt.method, base+tt.path, nil)
			if err != nil {
				t.Fatal(err)
			}
			res, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			body, _ := io.ReadAll(res.Body)
			if res.StatusCode != tt.code || string(body) != tt.body {
				t.Errorf("%d %q; want %d %q", res.StatusCode, body, tt.code, tt.body)
			}
		})
	}
}

func TestPublicHugeHeader(t *testing.T) {
	p, _ := newPublic(t, "127.0.0.1:0", yes, yes)
	addr := startPublic(t, p)
	req, err := http.NewRequest("GET", "http://"+addr+"/healthz", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X", strings.Repeat("x", 64<<10))
	// The server may close while the header is still being sent: then the client sees a reset
	// instead of the answer.
	if res, err := http.DefaultClient.Do(req); err == nil {
		res.Body.Close()
		if res.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
			t.Errorf("%s; want 431", res.Status)
		}
	}
	res, err := http.Get("http://" + addr + "/healthz")
	if err != nil || res.StatusCode != 200 {
		t.Fatalf("afterwards: %v, %v", res, err)
	}
	res.Body.Close()
}

// TestPublicSlowCaller: a caller that holds its connections open is held to its share, and is cut
// off. This machine is one caller, whose users may have all of 127.0.0.0/8 as their source.
func TestPublicSlowCaller(t *testing.T) {
	p, _ := newPublic(t, ":0", yes, yes)
	_, port, err := net.SplitHostPort(startPublic(t, p))
	if err != nil {
		t.Fatal(err)
	}
	for n := range 2 * maxPerHost {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 1, byte(n+1))}}
		c, err := d.Dial("tcp", "127.0.0.1:"+port)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		io.WriteString(c, "GET /healthz HTTP/1.1\r\n") // and never the rest
	}
	client := http.Client{
		Timeout: 3 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	ask := func(at string) error {
		res, err := client.Get("http://" + net.JoinHostPort(at, port) + "/healthz")
		if err == nil {
			res.Body.Close()
		}
		return err
	}
	for _, at := range []string{"127.0.0.1", "::1"} {
		if ask(at) == nil {
			t.Errorf("over %s the slow caller was answered above its %d connections", at, maxPerHost)
		}
	}
	eventually(t, "the caller's share is free again", func() bool { return ask("127.0.0.1") == nil })
}

// TestLimiter: what one caller holds leaves room for others, and what it gives back is there again.
func TestLimiter(t *testing.T) {
	from := func(a string) netip.Prefix {
		return hostOf(&net.TCPAddr{IP: net.ParseIP(a), Port: 4711})
	}
	l := newLimiter(nil)
	enter := func(n int, a string) (got int) {
		for range n {
			if l.enter(from(a)) {
				got++
			}
		}
		return got
	}
	own := []string{"127.0.0.1", "127.255.0.9", "::1", "::ffff:127.0.0.1"}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok && !n.IP.IsLinkLocalUnicast() {
			own = append(own, n.IP.String())
		}
	}
	got := 0
	for _, a := range own {
		got += enter(maxConns, a)
	}
	if got != maxPerHost {
		t.Errorf("this machine got %d connections, want %d", got, maxPerHost)
	}
	// Documentation addresses: 203.0.113.0/24, 2001:db8::/32.
	for i, tt := range []struct {
		from string
		want int
	}{
		{"203.0.113.1", maxPerHost}, {"203.0.113.2", maxPerHost}, {"::ffff:203.0.113.1", 0},
		{"2001:db8::1", maxPerHost}, {"2001:db8::2", 0}, {"2001:db8:0:1::2", maxPerHost},
	} {
		if got := enter(maxConns, tt.from); got != tt.want {
			t.Errorf("%d: %s got %d connections, want %d", i, tt.from, got, tt.want)
		}
	}
	l.leave(from("203.0.113.1"))
	if got := enter(2, "203.0.113.1"); got != 1 {
		t.Errorf("after one left, %d came in", got)
	}
	for range maxPerHost {
		l.leave(from("203.0.113.2"))
	}
	if _, kept := l.hosts[from("203.0.113.2")]; kept {
		t.Error("a caller without connections is remembered")
	}
	for n := range 256 {
		enter(maxPerHost, fmt.Sprintf("203.0.113.%d", n))
	}
	if l.total != maxConns || enter(1, "198.51.100.1") != 0 {
		t.Errorf("%d connections in all, want %d", l.total, maxConns)
	}
}

// TestPublicOneRequest: a connection is not kept.
func TestPublicOneRequest(t *testing.T) {
	p, _ := newPublic(t, "127.0.0.1:0", yes, yes)
	c, err := net.Dial("tcp", startPublic(t, p))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
	c.SetReadDeadline(time.Now().Add(5 * time.Second))
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil || !res.Close {
		t.Errorf("%v, %v; want Connection: close", res, err)
	}
}

// TestPublicPortTaken: said once, by whom, and served as soon as the port is free.
func TestPublicPortTaken(t *testing.T) {
	other, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	addr := other.Addr().String()
	p, logs := newPublic(t, addr, yes, yes)
	startPublic(t, p)
	_, port, _ := net.SplitHostPort(addr)
	want := fmt.Sprintf(
		"listen on %s: address already in use by uid %d; find it with `ss -ltnp 'sport = :%s'` and stop it, or choose another port with --listen", addr, os.Getuid(), port)
	if err := p.Err(); err == nil || err.Error() != want {
		t.Errorf("Err = %v; want %s", err, want)
	}
	time.Sleep(100 * time.Millisecond)
	if logs.Len() != 1 {
		t.Errorf("logged %d lines while it is taken; want 1: %v", logs.Len(), logs.All())
	}
	other.Close()
	eventually(t, "listening", func() bool { return p.Err() == nil && p.Addr() != nil })
	res, err := http.Get("http://" + addr + "/healthz")
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if logs.Len() != 2 {
		t.Errorf("logged %v; want that it listens after all", logs.All())
	}
}

func TestPublicNoSuchAddress(t *testing.T) {
	p, _ := newPublic(t, "192.0.2.1:15020", yes, yes)
	startPublic(t, p)
	var le *ListenError
	if err := p.Err(); !errors.As(err, &le) ||
		!strings.Contains(err.Error(), "choose an address of this VM, or :15020 for all") {
		t.Errorf("Err = %v", err)
	}
}

func TestNewPublicBadListen(t *testing.T) {
	for _, listen := range []string{"", "15020", "localhost", ":http", ":70000", "[::1:80"} {
		if _, err := NewPublic(listen, yes, yes, http.NotFoundHandler(), nil); err == nil ||
			!strings.Contains(err.Error(), listen) {
			t.Errorf("NewPublic(%q): %v; want an error that names it", listen, err)
		}
	}
}
