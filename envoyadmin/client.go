// Package envoyadmin asks Envoy's admin interface what it does, and reads what
// Envoy's log says of it.
//
// The dump of the listeners is the only truth about what to intercept. It is large, and Envoy makes
// it on its main thread, where it also takes updates, so the package asks in two steps: a masked
// dump (the Fingerprint, 30 ms of Envoy's time at 10,000 services, half of that by the listeners'
// names) tells whether anything moved, and only then the whole is asked for (Listeners, 300 ms).
// A Detector says when to do which; a line in Envoy's log (FollowLog) is the hint that makes a
// change seen at once. Answers are read as a stream: what is not needed is dropped token by token,
// what is needed is parsed by the types of go-control-plane one filter chain at a time, so memory
// follows the number of chains and not the size of their filters.
//
// An answer is material from a process that may be sick, or may not be Envoy: size, depth and time
// are limited, and each failure has its own error (see ErrRefused and the others). What is
// well-formed but not understood is reported per listener (Skipped).
//
// It decides nothing about interception: package agent turns Snapshot.Listeners into what the
// kernel shall do, and internal/symptom puts errors into words. It changes nothing in Envoy: only
// GET requests are sent, except to one that is to be stopped (FailHealthCheck, DrainListeners).
package envoyadmin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Limits of time and size. They are generous against what was measured (10,000 HTTP filter chains:
// 19 MB in 0.3 s of Envoy's time) and small against what would hurt: a pass waits for them, and the
// agent's memory follows maxValue, not the size of the answer.
const (
	// After a hot restart the Envoy of before answers on its connections until it ends, by default for
	// 15 minutes, and takes no more listeners. A new connection costs 3 ms of Envoy's time: identify.
	connectionAge = 30 * time.Second

	// the admin port is on this machine: the kernel answers at once or drops
	connectLimit = 1 * time.Second
	shortLimit   = 5 * time.Second  // of a short question: /ready, /server_info, the masked dump
	longLimit    = 20 * time.Second // of a long one: the dump of the listeners, /clusters, /stats
	// Envoy makes a dump as a whole before it sends the first byte, in some 0.03 ms for each chain on
	// an idle machine and longer on a busy one: no byte tells that it is at it. So an answer is
	// awaited for dumpPatience times what the last one took, and twice as long behind each that did
	// not come, up to longestLimit. What that costs Envoy the Detector bounds, whatever is awaited.
	dumpPatience = 4
	longestLimit = 2 * time.Minute

	// bytes of a short answer; /server_info has 124 KB, the masked dump 115 bytes a listener
	maxShort = 8 << 20
	maxLong  = 512 << 20 // bytes of a long one
	// bytes of one JSON value that is read as a whole; strings are cut before (shortener)
	maxValue = 1 << 20
	// the same of a listener's addresses and of a filter chain match: 200,000 prefixes
	maxPrefixes = 16 << 20
	// bytes of one filter_chain_matcher: the only large value that must be looked at as a whole
	maxMatcher = 32 << 20
	// JSON objects and arrays within each other; Envoy's protobuf parser allows 100 messages
	maxDepth  = 256
	maxHeader = 64 << 10 // bytes of response headers
	// bytes that are read of an answer that is no answer. Envoy's quote the regular expression.
	maxRefusal = 16 << 10
)

// Client talks to one Envoy. It keeps one or two connections open; their end tells that Envoy
// ended (see Process). Its methods may be called from several goroutines. Set the fields
// before the first question.
type Client struct {
	// Trust, if set, is asked on each new connection before anything is sent: an error ends the
	// question with ErrUntrusted.
	Trust func(net.Conn) error
	// ConnectLimit, ShortLimit and LongLimit replace the time limits of connecting, of short and of
	// long questions: 1 s, 5 s and 20 s. A dump of the listeners may take longer where earlier ones
	// did, up to two minutes.
	ConnectLimit, ShortLimit, LongLimit time.Duration

	addr      string
	http      *http.Client
	namedFrom time.Duration // what a look at all must take for one by names to be worth it

	dials atomic.Uint64 // connections made; a new one may lead to a new Envoy
	book  book

	mu      sync.Mutex
	redials time.Time  // when Redial was last called
	process uint64     // counts Envoys seen
	info    ServerInfo // of that Envoy
	asOf    uint64     // dials when info was asked
	alive   time.Time  // when that Envoy is known to have run last
	statics *dump      // the static listeners of that Envoy, which never change; nil: not asked yet
	// lookTook is what the last look at all took, of whatever Envoy
	lookTook time.Duration
	misled   int // how often in a row a look by names was of no use with that Envoy

	dumpTook  time.Duration // the last dump that was answered
	dumpsLost int           // in a row that were not in time
}

// New makes a client for Envoy's admin interface at "host:port" or "unix:///path". It does not
// connect yet. The error is a *BadAddressError.
func New(addr string) (*Client, error) {
	network, target := "tcp", addr
	if rest, ok := strings.CutPrefix(addr, "unix:"); ok {
		network, target = "unix", strings.TrimPrefix(rest, "//")
		switch {
		case !filepath.IsAbs(target):
			return nil, &BadAddressError{
				Addr: addr, Reason: "the path of a unix socket must be absolute, as in unix:///run/envoy.sock"}
		case len(target) > 107: // sun_path has 108 bytes with its NUL, unix(7)
			return nil, &BadAddressError{
				Addr: addr, Reason: "the path of a unix socket has at most 107 bytes"}
		}
	} else if host, port, err := net.SplitHostPort(addr); err != nil {
		return nil, &BadAddressError{Addr: addr, Reason: "want host:port or unix:///path"}
	} else if _, err := netip.ParseAddrPort(net.JoinHostPort("::1", port)); err != nil || port == "0" {
		return nil, &BadAddressError{
			Addr: addr, Reason: fmt.Sprintf("%q is not a port from 1 to 65535", port)}
	} else if host == "" {
		return nil, &BadAddressError{Addr: addr, Reason: "the host is missing"}
	}
	c := &Client{ConnectLimit: connectLimit, ShortLimit: shortLimit, LongLimit: longLimit, addr: addr,
		namedFrom: namedFrom, redials: time.Now()}
	c.http = &http.Client{
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				conn, err := (&net.Dialer{Timeout: c.ConnectLimit}).DialContext(ctx, network, target)
				if err != nil {
					return nil, err
				}
				if c.Trust != nil {
					if err := c.Trust(conn); err != nil {
						conn.Close()
						return nil, fmt.Errorf("%w: %w", ErrUntrusted, err)
					}
				}
				c.dials.Add(1)
				return conn, nil
			},
			// Envoy's main thread answers one question after the other anyway. The second connection lets a
			// short question (is it ready?) be asked while a long answer is read.
			MaxConnsPerHost:        2,
			MaxIdleConnsPerHost:    2,
			DisableCompression:     true, // else net/http would unpack gzip on its own, without a limit
			MaxResponseHeaderBytes: maxHeader,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return c, nil
}

// Close closes idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Redial has the next question go over a new connection, which may lead to another Envoy
// (connectionAge). It happens by itself every now and then; a connection that is in use then is
// left for the next time.
func (c *Client) Redial() {
	c.mu.Lock()
	c.redials = time.Now()
	c.mu.Unlock()
	c.http.CloseIdleConnections()
}

// answered takes note that the Envoy that is known ran when a question was sent which it answered:
// else a later one could not be told from one that was young when it was asked. When the answer was
// read says nothing: this process may have waited for a processor, or been stopped, since it came.
func (c *Client) answered(sent time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.asOf == c.dials.Load() && sent.After(c.alive) {
		c.alive = sent
	}
}

// get asks for a path and hands the body to read, all within the limits.
func (c *Client) get(ctx context.Context, q Question, path string, limit time.Duration,
	maxBytes int64, read func(io.Reader) error) error {
	return c.do(ctx, q, http.MethodGet, path, limit, maxBytes, read)
}

func (c *Client) do(ctx context.Context, q Question, method, path string, limit time.Duration,
	maxBytes int64, read func(io.Reader) error) error {
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	sent := time.Now()
	err := c.request(limited, method, path, maxBytes, read)
	c.book.note(q, sent, time.Now(), err)
	if err != nil {
		var asked *url.Error
		if errors.As(err, &asked) {
			err = asked.Err // says the URL once more
		}
		what, _, _ := strings.Cut(path, "?")
		return fmt.Errorf("%s %q: %w", strings.ToLower(method), what, classify(ctx, limited, err))
	}
	return nil
}

func (c *Client) request(ctx context.Context, method, path string, maxBytes int64,
	read func(io.Reader) error) error {
	c.mu.Lock()
	aged := time.Since(c.redials) >= connectionAge
	c.mu.Unlock()
	if aged {
		c.Redial()
	}
	// The host is what Envoy sees in the Host header: it takes any.
	request, err := http.NewRequestWithContext(ctx, method, "http://envoy-admin"+path, nil)
	if err != nil {
		return err
	}
	sent := time.Now()
	response, err := c.http.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	switch encoding := response.Header.Get("Content-Encoding"); {
	case response.StatusCode >= 300 && response.StatusCode < 400:
		return ErrRedirect
	case response.StatusCode != http.StatusOK &&
		!(path == readyPath && response.StatusCode == http.StatusServiceUnavailable):
		// The body is dropped: it may hold anything, and Envoy's own texts say no more than the code.
		// It is read as far as theirs go, or the connection would end, as that of an Envoy that ended.
		_, _ = io.CopyN(io.Discard, response.Body, maxRefusal)
		return &StatusError{Code: response.StatusCode}
	case encoding != "" && encoding != "identity":
		return fmt.Errorf("%w: %q", ErrEncoding, encoding)
	case response.ContentLength > maxBytes:
		return fmt.Errorf("%w: %d bytes of at most %d", ErrTooLarge, response.ContentLength, maxBytes)
	}
	body := &limitReader{from: response.Body, left: maxBytes}
	if err := read(body); err != nil {
		return err
	}
	// Read to the end, so that the connection can be used again. Readers of JSON have seen the end of
	// the value, not of the body.
	if _, err = io.Copy(io.Discard, body); err == nil {
		c.answered(sent)
	}
	return err
}

// Copy asks for a path and hands the answer to read as it is. It is for people who look at Envoy as
// a whole, and not booked: what it costs Envoy depends on the path.
func (c *Client) Copy(ctx context.Context, path string, maxBytes int64,
	read func(io.Reader) error) error {
	return c.do(ctx, order, http.MethodGet, path, c.LongLimit, maxBytes, read)
}

// dumpLimit is how long a dump of the listeners may take.
func (c *Client) dumpLimit() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	usual := max(c.LongLimit, dumpPatience*c.dumpTook)
	return max(c.LongLimit, min(usual<<min(c.dumpsLost, 8), longestLimit))
}

// dumped notes what came of a dump of the listeners.
func (c *Client) dumped(took time.Duration, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case err == nil:
		c.dumpTook, c.dumpsLost = took, 0
	case errors.Is(err, ErrTimeout):
		c.dumpsLost++
	}
}

// limitReader is an io.LimitedReader that tells the limit from the end.
type limitReader struct {
	from io.Reader
	left int64
}

func (r *limitReader) Read(p []byte) (int, error) {
	if r.left < 0 {
		return 0, ErrTooLarge
	}
	if int64(len(p)) > r.left+1 {
		p = p[:r.left+1] // one more than allowed, to see whether there is more
	}
	n, err := r.from.Read(p)
	if r.left -= int64(n); r.left < 0 {
		return 0, ErrTooLarge
	}
	return n, err
}

const readyPath = "/ready"

// Ready asks whether Envoy is ready: "LIVE", or why not, in Envoy's words ("PRE_INITIALIZING",
// "INITIALIZING", "DRAINING"). It is the cheapest question.
func (c *Client) Ready(ctx context.Context) (state string, err error) {
	err = c.get(ctx, ReadyQuestion, readyPath, c.ShortLimit, 64<<10, func(body io.Reader) error {
		text, err := io.ReadAll(body)
		if err != nil {
			return err
		}
		state = strings.TrimSpace(string(text))
		switch {
		case state == "":
			return ErrEmpty
		case strings.ContainsFunc(state, func(r rune) bool { return r != '_' && (r < 'A' || r > 'Z') }):
			return fmt.Errorf("%w: want a state in capital letters", ErrNotJSON)
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	return state, nil
}
