package cloudlog

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/internal/report"
)

// cloud is Cloud Logging and the metadata server, in memory. What the real ones do is as in
// test/platform, and its sources are named there: entries of one timestamp and insertId are one.
// Partial errors are as documented for WriteLogEntriesPartialErrors.
type cloud struct {
	mu       sync.Mutex
	metadata map[string]string // by path; "": 404
	away     error             // of every read of the metadata server
	reads    []string
	tokens   int // handed out; the newest is the valid one
	lasts    int // seconds
	requests []request
	entries  []written
	seen     map[string]bool // by timestamp and insertId
	// fault answers instead, if ok; a request that it wants to be carried out, it hands to take
	fault func(req *http.Request, body []byte) (resp *http.Response, err error, ok bool)
}

type request struct {
	at      time.Time
	entries int
	bytes   int
}

// written is an entry as it came.
type written struct {
	Timestamp   time.Time         `json:"timestamp"`
	Severity    string            `json:"severity"`
	InsertID    string            `json:"insertId"`
	JSONPayload map[string]string `json:"jsonPayload"`
}

const scopeURL = "https://www.googleapis.com/auth/"

func newCloud() *cloud {
	return &cloud{
		seen: map[string]bool{}, lasts: 3599,
		metadata: map[string]string{
			"project/project-id": "my-project", "instance/id": "42", "instance/name": "vm-1",
			"instance/zone":    "projects/123/zones/us-central1-a",
			account + "scopes": scopeURL + "devstorage.read_only\n" + scopeURL + "logging.write\n",
		},
	}
}

func (c *cloud) read(ctx context.Context, path string) ([]byte, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reads = append(c.reads, path)
	if c.away != nil {
		return nil, c.away
	}
	if path == account+"token" {
		c.tokens++
		return fmt.Appendf(nil, `{"access_token":"ya29.token-%d","expires_in":%d,"token_type":"Bearer"}`,
			c.tokens, c.lasts), nil
	}
	if text, ok := c.metadata[path]; ok {
		return []byte(text), nil
	}
	return nil, &metadata.Error{Path: path, Code: 404}
}

func answer(code int, body string, header ...string) *http.Response {
	h := http.Header{}
	for i := 0; i+1 < len(header); i += 2 {
		h.Set(header[i], header[i+1])
	}
	return &http.Response{StatusCode: code, Header: h, Body: io.NopCloser(strings.NewReader(body))}
}

func (c *cloud) RoundTrip(req *http.Request) (*http.Response, error) {
	body, err := io.ReadAll(req.Body)
	if err != nil {
		return nil, err
	}
	var in struct{ Entries []written }
	if err := json.Unmarshal(body, &in); err != nil {
		return answer(400, err.Error()), nil
	}
	c.mu.Lock()
	c.requests = append(c.requests, request{time.Now(), len(in.Entries), len(body)})
	fault := c.fault
	c.mu.Unlock()
	if fault != nil {
		if resp, err, ok := fault(req, body); ok {
			return resp, err
		}
	}
	return c.take(req, body), nil
}

// take does what a request asks for.
func (c *cloud) take(req *http.Request, body []byte) *http.Response {
	c.mu.Lock()
	defer c.mu.Unlock()
	if req.Header.Get("Authorization") != fmt.Sprintf("Bearer ya29.token-%d", c.tokens) {
		return answer(401, `{"error":{"code":401,"message":"invalid credentials"}}`)
	}
	var in struct{ Entries []written }
	if err := json.Unmarshal(body, &in); err != nil {
		return answer(400, "")
	}
	for _, e := range in.Entries {
		if key := e.Timestamp.String() + e.InsertID; !c.seen[key] {
			c.seen[key] = true
			c.entries = append(c.entries, e)
		}
	}
	return answer(200, "{}")
}

func (c *cloud) set(fault func(*http.Request, []byte) (*http.Response, error, bool)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fault = fault
}

// answers has every request answered alike.
func (c *cloud) answers(code int, body string, header ...string) {
	c.set(func(*http.Request, []byte) (*http.Response, error, bool) {
		return answer(code, body, header...), nil, true
	})
}

func (c *cloud) hang(req *http.Request, _ []byte) (*http.Response, error, bool) {
	<-req.Context().Done()
	return nil, req.Context().Err(), true
}

// messages are of the entries, in the order in which they came; and how many entries were dropped
// by the word of those that say so.
func (c *cloud) messages() (messages []string, saidDropped int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.entries {
		if n, said := 0, e.JSONPayload["dropped"]; said != "" {
			fmt.Sscan(said, &n)
			saidDropped += n
			continue
		}
		messages = append(messages, e.JSONPayload["message"])
	}
	return messages, saidDropped
}

func (c *cloud) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.requests)
}

// asked is how much the metadata server was asked for, and how many tokens there were.
func (c *cloud) asked() (questions, tokens int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.reads), c.tokens
}

// revoke makes the newest token invalid.
func (c *cloud) revoke() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tokens++
}

// world is a Writer that runs against a cloud. To be made within a synctest bubble.
type world struct {
	*Writer
	t     *testing.T
	cloud *cloud
	logs  *observer.ObservedLogs
	stop  func()
}

func run(t *testing.T, mode Mode, change func(*cloud, *Options)) *world {
	t.Helper()
	core, logs := observer.New(zapcore.InfoLevel)
	c := newCloud()
	o := Options{Mode: mode, Log: zap.New(core), Transport: c, Read: c.read,
		onCompute: func() bool { return true }}
	if change != nil {
		change(c, &o)
	}
	w := &world{Writer: New(o), t: t, cloud: c, logs: logs}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- w.Run(ctx) }()
	w.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	synctest.Wait()
	return w
}

func (w *world) say(format string, args ...any) {
	w.Say(report.Event{Severity: report.Info, Message: fmt.Sprintf(format, args...)})
}

// after lets time pass.
func (w *world) after(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// logged is what was logged, without the facts.
func (w *world) logged() string {
	var all []string
	for _, e := range w.logs.All() {
		all = append(all, e.Level.String()+": "+e.Message)
	}
	return strings.Join(all, "\n")
}

// bounds fails where a rate or the memory was exceeded.
func (w *world) bounds() {
	w.t.Helper()
	w.cloud.mu.Lock()
	defer w.cloud.mu.Unlock()
	all := w.cloud.requests
	first, sum := 0, 0
	for i, r := range all {
		if i > 0 && r.at.Sub(all[i-1].at) < time.Second {
			w.t.Errorf("requests at %v and %v", all[i-1].at, r.at)
		}
		for sum += r.entries; r.at.Sub(all[first].at) >= time.Minute; first++ {
			sum -= all[first].entries
		}
		if sum > 300 || r.entries > maxEntries || r.bytes > maxBatch+1024 {
			w.t.Errorf("at %v %d entries within a minute, %d and %d bytes in a request",
				r.at, sum, r.entries, r.bytes)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	held := 0
	for _, e := range w.queue {
		held += e.size()
	}
	if w.bytes > maxQueue || held > w.bytes {
		w.t.Errorf("%d bytes are held, %d by the count", held, w.bytes)
	}
}

func inBubble(t *testing.T, name string, f func(t *testing.T)) {
	t.Run(name, func(t *testing.T) { synctest.Test(t, f) })
}

var errReset = errors.New("connection reset by peer")

// slow is a body of one byte a second.
type slow struct{ left int }

func (s *slow) Read(p []byte) (int, error) {
	if s.left == 0 {
		return 0, io.EOF
	}
	time.Sleep(time.Second)
	s.left--
	return copy(p, " "), nil
}
func (s *slow) Close() error { return nil }

// endless is a body without an end, that counts what was read.
type endless struct{ read *int }

func (e endless) Read(p []byte) (int, error) {
	*e.read += len(p)
	return copy(p, bytes.Repeat([]byte(" "), len(p))), nil
}
func (e endless) Close() error { return nil }
