package cloudlog

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/service-proxy-agent/service-proxy-agent/internal/report"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

func TestParseMode(t *testing.T) {
	for text, want := range map[string]Mode{
		"auto": Auto, "on": On, "true": On, "off": Off, "false": Off, "": Off,
	} {
		if got, err := ParseMode(text); got != want || err != nil {
			t.Errorf("%q: %q, %v", text, got, err)
		}
	}
	for _, text := range []string{"yes", "On", "1", " on"} {
		_, err := ParseMode(text)
		if err == nil || !strings.Contains(err.Error(), "use auto, on or off") {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// TestRequest: the whole request of two events.
func TestRequest(t *testing.T) {
	inBubble(t, "", func(t *testing.T) {
		var body []byte
		var header http.Header
		w := run(t, Auto, func(c *cloud, _ *Options) {
			c.metadata[createdBy] = "projects/123/regions/us-central1/instanceGroupManagers/web"
			c.fault = func(req *http.Request, text []byte) (*http.Response, error, bool) {
				body, header = text, req.Header.Clone()
				if req.Method+" "+req.URL.String() !=
					"POST https://logging.googleapis.com/v2/entries:write" {
					t.Errorf("asked %s %s", req.Method, req.URL)
				}
				return nil, nil, false
			}
		})
		defer w.stop()
		w.process = "process"
		w.Say(report.Event{Severity: report.Error, Message: "It <broke>",
			Finding: symptom.Finding{ID: symptom.EnvoyDown, Key: "k", Cause: "cause", Next: "next"},
			Fields: []report.Field{
				{Key: "service", Value: "web"}, {Key: "message", Value: "another"},
				{Key: "localTimestamp", Value: "another"}, {Key: "empty"}}})
		w.after(99750 * time.Microsecond)
		w.say("two")
		w.after(2 * time.Second)
		const want = `{"logName":"projects/my-project/logs/service-proxy-agent",` +
			`"resource":{"type":"gce_instance",` +
			`"labels":{"instance_id":"42","project_id":"my-project","zone":"us-central1-a"}},` +
			`"labels":{"compute.googleapis.com/instance_group_manager/name":"web",` +
			`"compute.googleapis.com/instance_group_manager/region":"us-central1",` +
			`"instance_name":"vm-1"},"partialSuccess":true,"entries":[` +
			`{"timestamp":"2000-01-01T00:00:00Z","severity":"ERROR","insertId":"process-000000000000",` +
			`"jsonPayload":{"cause":"cause","id":"envoy-down","key":"k",` +
			`"localTimestamp":"2000-01-01T00:00:00.0000Z","message":"It <broke>","next":"next",` +
			`"service":"web"}},` +
			`{"timestamp":"2000-01-01T00:00:00.09975Z","severity":"INFO",` +
			`"insertId":"process-000000000001",` +
			`"jsonPayload":{"localTimestamp":"2000-01-01T00:00:00.0997Z","message":"two"}}]}` + "\n"
		if string(body) != want {
			t.Errorf("have %s\nwant %s", body, want)
		}
		if header.Get("Authorization") != "Bearer ya29.token-1" ||
			header.Get("Content-Type") != "application/json" {
			t.Errorf("header %v", header)
		}
		if s := w.State(); !s.Enabled || !s.Up || s.Writes != 2 || s.Failures+s.Dropped != 0 ||
			!s.LastSuccess.Equal(time.Date(2000, 1, 1, 0, 0, 1, 0, time.UTC)) {
			t.Errorf("state %+v", s)
		}
		if w.logged() != "" {
			t.Errorf("logged: %s", w.logged())
		}
	})
}

// TestGroups: labels of the VM's instance group.
func TestGroups(t *testing.T) {
	const p = "compute.googleapis.com/instance_group_manager/"
	for by, want := range map[string]map[string]string{
		"": {},
		"projects/1/zones/z-a/instanceGroupManagers/m": {p + "name": "m", p + "zone": "z-a"},
		"projects/1/regions/r/instanceGroupManagers/m": {p + "name": "m", p + "region": "r"},
		"projects/1/zones/z-a/instanceTemplates/m":     {},
		"projects/1/cells/c/instanceGroupManagers/m":   {},
		"somebody": {},
	} {
		v := &vm{labels: map[string]string{}}
		v.addGroup(by)
		if diff := cmp.Diff(want, v.labels); diff != "" {
			t.Errorf("%q: %s", by, diff)
		}
	}
}

// TestPayload: nothing secret, and no more than some KiB.
func TestPayload(t *testing.T) {
	huge := strings.Repeat(`"\`, 5000)
	e := report.Event{Message: "line 1\nBearer s3cr3t at https://u:s3cr3t@host/x?sig=s3cr3t&a",
		Finding: symptom.Finding{ID: "id", Cause: huge, Next: "call ya29.s3cr3t", Key: huge}}
	for i := range 100 {
		e.Fields = append(e.Fields, report.Field{Key: fmt.Sprint("f", i), Value: huge + "?k=s3cr3t"})
	}
	w := New(Options{Mode: On})
	w.Say(e)
	text := string(w.queue[0].text)
	if strings.Contains(text, "s3cr3t") || len(text) > 2*maxPayload+512 || !json.Valid([]byte(text)) {
		t.Errorf("%d bytes: %s", len(text), text)
	}
	if !strings.Contains(text, `"line 1 Bearer [...] at https://host/x"`) {
		t.Errorf("%s", text)
	}
}

// TestTrouble: whatever a request meets, all is written once when that is over, the log tells of
// both ends once, and neither rate nor memory is exceeded meanwhile.
func TestTrouble(t *testing.T) {
	read := 0
	for _, tt := range []struct {
		name  string
		fault func(*http.Request, []byte) (*http.Response, error, bool)
		says  string // in LastError
	}{
		{"500", status(500, `{"error":{"message":"internal"}}`), "status 500 Internal Server Error: internal"},
		{"502 of a balancer", status(502, `<html>`), "status 502 Bad Gateway: the answer is not"},
		{"503", status(503, `{"error":{"message":"see https://x/?k=v"}}`), "Unavailable: see https://x/"},
		{"429", status(429, `{"error":{"message":"quota"}}`), "429 Too Many Requests: quota"},
		{"404", status(404, `{"error":{"message":"no such project"}}`), "404 Not Found: no such project"},
		{"401 for ever", status(401, `{}`), "401 Unauthorized"},
		{"a redirect", func(*http.Request, []byte) (*http.Response, error, bool) {
			return answer(302, "", "Location", "https://example.com/?token=s3cr3t"), nil, true
		}, "status 302 Found: the answer is not"},
		{"a page for people", status(200, `<html>sign in`), "the answer is not Cloud Logging's"},
		{"null", status(200, `null`), "the answer is not Cloud Logging's"},
		{"half an answer", status(200, `{`), "the answer is not Cloud Logging's"},
		{"no answer's body", status(200, ``), "the answer is not Cloud Logging's"},
		{"an endless answer", func(*http.Request, []byte) (*http.Response, error, bool) {
			resp := answer(200, "")
			resp.Body = endless{&read}
			return resp, nil, true
		}, "the answer is not Cloud Logging's"},
		{"a slow answer", func(req *http.Request, _ []byte) (*http.Response, error, bool) {
			resp := answer(200, "")
			resp.Body = bodyUntil{req.Context(), &slow{left: 3600}}
			return resp, nil, true
		}, "no answer in time"},
		{"reset", func(*http.Request, []byte) (*http.Response, error, bool) {
			return nil, errReset, true
		}, "write entries: connection reset by peer"},
		{"hangs", (*cloud)(nil).hang, "no answer in time"},
		{"a proxy's words", func(*http.Request, []byte) (*http.Response, error, bool) {
			return nil, fmt.Errorf("proxy http://u:s3cr3t@p/?x=s3cr3t"), true
		}, "proxy http://p/"},
	} {
		inBubble(t, tt.name, func(t *testing.T) {
			w := run(t, Auto, nil)
			defer w.stop()
			w.say("before")
			w.after(3 * time.Second)
			w.cloud.set(tt.fault)
			var want []string
			for i := range 60 {
				w.say("during %d", i)
				want = append(want, fmt.Sprintf("during %d", i))
				w.after(10 * time.Second)
				w.bounds()
			}
			s := w.State()
			if s.Up || !s.Enabled || !strings.Contains(s.LastError, tt.says) || s.Writes != 1 ||
				s.Dropped != 0 || s.Failures < 10 || s.Failures > 30 {
				t.Errorf("after ten minutes: %+v", s)
			}
			w.cloud.set(nil)
			w.after(75 * time.Second)
			s = w.State()
			if !s.Up || s.LastError != "" || s.Writes != 61 || s.Dropped != 0 {
				t.Errorf("over: %+v", s)
			}
			got, _ := w.cloud.messages()
			if diff := cmp.Diff(append([]string{"before"}, want...), got); diff != "" {
				t.Error(diff)
			}
			if logged := w.logged(); logged != "warn: Cloud Logging takes no entries\n"+
				"info: Cloud Logging takes entries again" {
				t.Errorf("logged:\n%s", logged)
			}
			for _, e := range w.logs.All() {
				if text := fmt.Sprint(e.ContextMap()); strings.Contains(text, "s3cr3t") {
					t.Errorf("logged %s", text)
				}
			}
			w.bounds()
		})
	}
	if read > 60*(maxAnswer+64<<10) {
		t.Errorf("%d bytes of endless answers were read", read)
	}
}

// bodyUntil is a body as net/http's: it ends with the request's context.
type bodyUntil struct {
	ctx context.Context
	io.ReadCloser
}

func (b bodyUntil) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if b.ctx.Err() != nil {
		return 0, b.ctx.Err()
	}
	return n, err
}

func status(code int, body string) func(*http.Request, []byte) (*http.Response, error, bool) {
	return func(*http.Request, []byte) (*http.Response, error, bool) {
		return answer(code, body), nil, true
	}
}

// TestShortTrouble: what is over within half a minute is not worth a line.
func TestShortTrouble(t *testing.T) {
	inBubble(t, "", func(t *testing.T) {
		w := run(t, Auto, nil)
		defer w.stop()
		w.cloud.answers(503, "{}")
		w.say("one")
		w.after(10 * time.Second)
		w.cloud.set(nil)
		w.after(20 * time.Second)
		if s := w.State(); s.Writes != 1 || s.Failures == 0 || !s.Up || w.logged() != "" {
			t.Errorf("%+v, logged %q", s, w.logged())
		}
	})
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	header := func(pairs ...string) http.Header { return answer(503, "", pairs...).Header }
	for _, tt := range []struct {
		header http.Header
		want   time.Duration
	}{
		{header(), 0},
		{header("Retry-After", "45"), 45 * time.Second},
		{header("Retry-After", "0"), 0},
		{header("Retry-After", "-1"), 0},
		{header("Retry-After", "soon"), 0},
		{header("Retry-After", "4000000000"), maxTold},
		{header("Retry-After", "99999999999999999999"), 0},
		{header("Retry-After", now.Add(time.Minute).Format(http.TimeFormat)), time.Minute},
		{header("Retry-After", now.Add(-time.Minute).Format(http.TimeFormat)), 0},
		{header("Retry-After", now.AddDate(1, 0, 0).Format(http.TimeFormat)), maxTold},
		// This VM's clock is a year behind.
		{header("Retry-After", now.AddDate(1, 0, 0).Format(http.TimeFormat), "Date",
			now.AddDate(1, 0, 0).Add(-time.Minute).Format(http.TimeFormat)), time.Minute},
	} {
		if got := retryAfter(tt.header, now); got != tt.want {
			t.Errorf("%v: %v, want %v", tt.header, got, tt.want)
		}
	}
	for name, tt := range map[string]struct{ header, floor, roof string }{
		"seconds": {"200", "3m20s", "3m42s"},
		"a year":  {"31536000", "10m", "11m2s"},
	} {
		inBubble(t, name, func(t *testing.T) {
			w := run(t, Auto, nil)
			defer w.stop()
			w.cloud.answers(429, "{}", "Retry-After", tt.header)
			w.say("one")
			w.after(1500 * time.Millisecond)
			w.cloud.set(nil)
			floor, _ := time.ParseDuration(tt.floor)
			roof, _ := time.ParseDuration(tt.roof)
			w.after(floor - time.Second)
			if n := w.cloud.count(); n != 1 {
				t.Errorf("%d requests before Retry-After", n)
			}
			w.after(roof - floor + time.Second)
			if n := w.cloud.count(); n != 2 || w.State().Writes != 1 {
				t.Errorf("%d requests after it: %+v", n, w.State())
			}
		})
	}
}

// TestToken: one token for many requests, a new one before it ends, and another after a 401.
func TestToken(t *testing.T) {
	inBubble(t, "", func(t *testing.T) {
		w := run(t, Auto, nil)
		defer w.stop()
		for range 2 * 60 {
			w.say("x")
			w.after(time.Minute)
		}
		// 3599 s less the four minutes of the margin, in two hours.
		if _, tokens := w.cloud.asked(); tokens != 3 {
			t.Errorf("%d tokens in two hours", tokens)
		}
		w.cloud.revoke()
		w.say("y")
		w.after(3 * time.Second)
		if s := w.State(); s.Writes != 121 || s.Failures != 1 || w.logged() != "" {
			t.Errorf("%+v, logged %q", s, w.logged())
		}
		if _, tokens := w.cloud.asked(); tokens != 5 {
			t.Errorf("%d tokens after one was revoked", tokens)
		}
	})
	for name, text := range map[string]string{
		"nonsense": "<html>", "no token": "{}", "a header": `{"access_token":"a\r\nX: y"}`,
	} {
		inBubble(t, name, func(t *testing.T) {
			w := run(t, Auto, func(c *cloud, o *Options) {
				o.Read = func(ctx context.Context, path string) ([]byte, error) {
					if path == account+"token" {
						return []byte(text), nil
					}
					return c.read(ctx, path)
				}
			})
			defer w.stop()
			w.say("x")
			w.after(time.Minute)
			if s := w.State(); s.Up || s.LastError !=
				"get a token: the metadata server's answer cannot be read" || w.cloud.count() != 0 {
				t.Errorf("%+v", s)
			}
		})
	}
}

// TestRefused: a 403 turns it off with one line; a probe every ten minutes turns it on again.
func TestRefused(t *testing.T) {
	inBubble(t, "", func(t *testing.T) {
		w := run(t, Auto, nil)
		defer w.stop()
		w.cloud.answers(403, `{"error":{"message":"Permission 'logging.logEntries.create' denied"}}`)
		for i := range 55 {
			w.say("%d", i)
			if w.after(time.Minute); i == 20 {
				w.cloud.set((*cloud)(nil).hang) // no news
			}
			if i == 35 {
				w.cloud.answers(403, "{}")
			}
		}
		s := w.State()
		if n := w.cloud.count(); n != 6 || s.Enabled || s.Up || s.Failures != 6 {
			t.Errorf("in 55 minutes %d requests, %+v", n, s)
		}
		w.cloud.set(nil)
		w.after(11 * time.Minute)
		if s := w.State(); !s.Enabled || !s.Up || s.Writes != 55 || s.Dropped != 0 {
			t.Errorf("granted: %+v", s)
		}
		logs := w.logs.All()
		if len(logs) != 2 || !strings.Contains(logs[0].Message, "roles/logging.logWriter") ||
			!strings.Contains(logs[0].Message, "scope logging.write") ||
			!strings.Contains(fmt.Sprint(logs[0].ContextMap()), "logging.logEntries.create") ||
			logs[1].Message != "Cloud Logging takes entries again" {
			t.Errorf("logged\n%s", w.logged())
		}
		w.bounds()
	})
}

// TestPoisoned: what cannot be taken is dropped and counted, and the rest goes on.
func TestPoisoned(t *testing.T) {
	poisoned := func(answers string) func(*http.Request, []byte) (*http.Response, error, bool) {
		return func(_ *http.Request, body []byte) (*http.Response, error, bool) {
			return answer(400, answers), nil, strings.Contains(string(body), "poison")
		}
	}
	const partly = `{"error":{"code":400,"message":"bad","details":[{"@type":` +
		`"type.googleapis.com/google.logging.v2.WriteLogEntriesPartialErrors",` +
		`"logEntryErrors":{"1":{"code":3,"message":"bad"}}}]}}`
	for _, tt := range []struct {
		name, answers   string
		writes, dropped uint64
	}{
		{"all", `{"error":{"message":"bad"}}`, 1, 3},
		{"not JSON", `<html>`, 1, 3},
		{"one", partly, 3, 1},
		{"a place beyond", strings.Replace(partly, `"1"`, `"77"`, 1), 1, 3},
	} {
		inBubble(t, tt.name, func(t *testing.T) {
			w := run(t, Auto, nil)
			defer w.stop()
			w.cloud.set(poisoned(tt.answers))
			w.say("a")
			w.say("poison")
			w.say("b")
			w.after(1500 * time.Millisecond)
			w.say("c")
			w.after(10 * time.Second)
			_, said := w.cloud.messages()
			if s := w.State(); s.Writes != tt.writes+1 || s.Dropped != tt.dropped || !s.Up ||
				uint64(said) != tt.dropped || s.Failures != 1 {
				t.Errorf("said %d dropped, %+v", said, s)
			}
		})
	}
}

// TestFull: the oldest are dropped beyond 256 KiB, and as many are spoken of.
func TestFull(t *testing.T) {
	inBubble(t, "", func(t *testing.T) {
		w := run(t, Auto, nil)
		defer w.stop()
		w.cloud.set((*cloud)(nil).hang)
		const all = 3000
		pad := strings.Repeat("x", 300)
		for i := range all {
			w.say("%d %s", i, pad)
			if w.after(200 * time.Millisecond); i%100 == 0 {
				w.bounds()
			}
		}
		s := w.State()
		if s.Dropped < all/2 || s.Dropped > all*9/10 {
			t.Errorf("%+v", s)
		}
		w.cloud.set(nil)
		w.after(15 * time.Minute)
		s = w.State()
		got, said := w.cloud.messages()
		if uint64(said) != s.Dropped || len(got)+said != all || int(s.Writes) <= len(got) {
			t.Errorf("%d arrived, %d said to be dropped of %d: %+v", len(got), said, all, s)
		}
		// In order, and the newest. (While a request is under way, what it holds is not the oldest.)
		last := -1
		for i, m := range got {
			n, _ := strconv.Atoi(strings.Fields(m)[0])
			if n <= last || i > maxEntries && n != last+1 {
				t.Fatalf("%d comes after %d", n, last)
			}
			last = n
		}
		if last != all-1 {
			t.Errorf("the newest is %d", last)
		}
		w.bounds()
	})
}

// TestRates: for ten minutes far more is said than may be written.
func TestRates(t *testing.T) {
	inBubble(t, "", func(t *testing.T) {
		w := run(t, Auto, nil)
		defer w.stop()
		const all = 20 * 600
		for i := range all {
			w.say("%d", i)
			if w.after(50 * time.Millisecond); i%200 == 0 {
				w.bounds()
			}
		}
		got, _ := w.cloud.messages()
		if n := w.cloud.count(); n > 601 || len(got) < 1900 || len(got) > 2200 {
			t.Errorf("%d requests, %d entries", n, len(got))
		}
		w.after(10 * time.Minute) // the queue empties
		got, said := w.cloud.messages()
		if s := w.State(); len(got)+said != all || s.Dropped != uint64(said) || !s.Up {
			t.Errorf("%d arrived, %d said to be dropped of %d: %+v", len(got), said, all, s)
		}
		w.bounds()
	})
}

// TestModes: where entries are written, and what is said of where they are not.
func TestModes(t *testing.T) {
	noServer := fmt.Errorf("read %q: no route", "scopes")
	for _, tt := range []struct {
		name   string
		mode   Mode
		change func(*cloud, *Options)
		on     bool
		logged string
		mended bool // after what is missing came
	}{
		{"auto", Auto, nil, true, "", true},
		{"auto, elsewhere", Auto, func(c *cloud, o *Options) {
			c.away, o.onCompute = noServer, func() bool { return false }
		}, false, "info: Cloud Logging is off", true},
		{"auto, the metadata server is late", Auto, func(c *cloud, o *Options) { c.away = noServer },
			false, "warn: Cloud Logging takes no entries", true},
		{"auto, no scope", Auto, func(c *cloud, o *Options) {
			c.metadata[account+"scopes"] = scopeURL + "devstorage.read_only"
		}, false, "info: Cloud Logging is off", true},
		{"auto, no account", Auto, func(c *cloud, o *Options) { delete(c.metadata, account+"scopes") },
			false, "info: Cloud Logging is off", true},
		{"on, no scope", On, func(c *cloud, o *Options) { delete(c.metadata, account+"scopes") },
			true, "", true},
		{"on, elsewhere", On, func(c *cloud, o *Options) {
			c.away, o.onCompute = noServer, func() bool { return false }
		}, true, "warn: Cloud Logging takes no entries", true},
		{"auto, a server of another kind", Auto, func(c *cloud, o *Options) {
			c.metadata["instance/id"] = ""
		}, false, "warn: Cloud Logging takes no entries", true},
		{"off", Off, nil, false, "", false},
	} {
		inBubble(t, tt.name, func(t *testing.T) {
			w := run(t, tt.mode, tt.change)
			defer w.stop()
			w.say("early")
			w.after(3 * time.Minute)
			if s := w.State(); s.Enabled != tt.on || s.Dropped != 0 || w.logged() != tt.logged {
				t.Errorf("%+v, logged %q", s, w.logged())
			}
			w.mu.Lock()
			if len(w.queue) > 0 && w.deaf {
				t.Error("it keeps what it will never write")
			}
			w.mu.Unlock()
			reads, _ := w.cloud.asked()
			w.after(27 * time.Minute)
			if all, _ := w.cloud.asked(); all-reads > 6*40 {
				t.Errorf("%d questions in 27 minutes", all-reads)
			}
			fresh := newCloud()
			w.cloud.mu.Lock()
			w.cloud.away, w.cloud.metadata = nil, fresh.metadata
			w.cloud.mu.Unlock()
			w.after(11 * time.Minute)
			w.say("late")
			w.after(3 * time.Second)
			got, _ := w.cloud.messages()
			if s := w.State(); s.Enabled != tt.mended || slices.Contains(got, "late") != tt.mended {
				t.Errorf("mended: %+v, %q", s, got)
			}
			if wasOff := strings.Contains(tt.logged, "off"); tt.mended &&
				slices.Contains(got, "early") == wasOff {
				t.Errorf("written: %q", got)
			}
		})
	}
}

// TestEnd: what is queued at the end is tried once, for a moment.
func TestEnd(t *testing.T) {
	for _, tt := range []struct {
		name  string
		fault func(*http.Request, []byte) (*http.Response, error, bool)
		begun bool // the end comes while a request hangs
		lost  uint64
		took  time.Duration
	}{
		{"taken", nil, false, 0, 0},
		{"hangs", (*cloud)(nil).hang, false, 2, lastLimit},
		{"hangs before, too", (*cloud)(nil).hang, true, 2, lastLimit},
		{"refused", status(403, "{}"), true, 2, 0},
		{"asked to be left alone", func(*http.Request, []byte) (*http.Response, error, bool) {
			return answer(429, "{}", "Retry-After", "60"), nil, true
		}, true, 2, 0},
	} {
		inBubble(t, tt.name, func(t *testing.T) {
			w := run(t, Auto, nil)
			w.cloud.set(tt.fault)
			w.say("a")
			w.say("b")
			if tt.begun {
				w.after(2 * time.Second)
			}
			before, requests := time.Now(), w.cloud.count()
			w.stop()
			if took := time.Since(before); took != tt.took {
				t.Errorf("took %v", took)
			}
			if n := w.cloud.count() - requests; n > 1 || tt.took == 0 && tt.begun && n != 0 {
				t.Errorf("%d more requests", n)
			}
			got, _ := w.cloud.messages()
			if s := w.State(); s.Dropped != tt.lost || len(got) != 2-int(tt.lost) ||
				strings.Contains(w.logged(), "are lost") != (tt.lost > 0 && s.Enabled) {
				t.Errorf("%+v, logged\n%s", s, w.logged())
			}
		})
	}
}

// TestRandomFaults: under random faults each entry arrives once or is counted as dropped.
func TestRandomFaults(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if text, ok := os.LookupEnv("CLOUDLOG_SEED"); ok {
		seed, _ = strconv.ParseUint(text, 10, 64)
	}
	rounds := 4
	if os.Getenv("SOAK") != "" {
		rounds = 300
	}
	for n := range rounds {
		seed := seed + uint64(n)
		inBubble(t, "", func(t *testing.T) {
			defer func() {
				if t.Failed() {
					t.Logf("seed: CLOUDLOG_SEED=%d", seed)
				}
			}()
			randomFaults(t, seed)
		})
	}
}

// ids are the insertIds of a request.
func ids(t *testing.T, body []byte) (all []string) {
	var in struct{ Entries []written }
	if err := json.Unmarshal(body, &in); err != nil {
		t.Error(err)
	}
	for _, e := range in.Entries {
		all = append(all, e.InsertID)
	}
	return all
}

func randomFaults(t *testing.T, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 0))
	w := run(t, Auto, nil)
	defer w.stop()
	unsure := map[string]bool{} // written, and the answer lost
	note := func(body []byte) {
		for _, id := range ids(t, body) {
			unsure[id] = true
		}
	}
	ofRun := rand.New(rand.NewPCG(seed, 1)) // another goroutine's
	fault := func(req *http.Request, body []byte) (*http.Response, error, bool) {
		r := ofRun
		switch r.IntN(14) {
		case 0, 1:
			time.Sleep(time.Duration(r.IntN(9)) * time.Second)
			return nil, nil, false
		case 2: // written, and the answer is lost
			note(body)
			w.cloud.take(req, body)
			return nil, errReset, true
		case 3: // the same, by time
			note(body)
			w.cloud.take(req, body)
			return w.cloud.hang(req, body)
		case 4:
			return w.cloud.hang(req, body)
		case 5:
			return answer(429, "{}", "Retry-After", strconv.Itoa(r.IntN(200))), nil, true
		case 6:
			return answer(503, "busy"), nil, true
		case 7:
			return answer(200, "<html>"), nil, true
		case 8:
			w.cloud.revoke()
			return nil, nil, false
		case 9:
			if r.IntN(4) == 0 {
				return answer(403, "{}"), nil, true
			}
		case 10: // but not what was taken before
			if r.IntN(4) == 0 && !slices.ContainsFunc(ids(t, body), func(id string) bool {
				return unsure[id]
			}) {
				return answer(400, "{}"), nil, true
			}
		}
		return nil, nil, false
	}
	said := 0
	for range 5 + r.IntN(15) {
		w.cloud.set(nil)
		if r.IntN(3) > 0 {
			w.cloud.set(fault)
		}
		for range r.IntN(300) {
			w.say("%d %s", said, strings.Repeat("x", r.IntN(900)))
			said++
			if r.IntN(20) == 0 {
				w.after(time.Duration(r.IntN(3000)) * time.Millisecond)
			}
		}
		w.after(time.Duration(r.IntN(90)) * time.Second)
		w.bounds()
	}
	w.cloud.set(nil)
	w.after(12 * time.Minute) // a probe, at the most
	w.say("last")             // what it has to tell of drops needs a request that is taken
	w.after(12 * time.Minute)
	said++
	got, dropped := w.cloud.messages()
	seen := map[string]int{}
	for _, m := range got {
		seen[m]++
		if seen[m] > 1 {
			t.Errorf("%.20q arrived twice", m)
		}
	}
	s := w.State()
	missing := said - len(got)
	// One that was written and whose answer was lost may be dropped later on.
	if int(s.Dropped) < missing || int(s.Dropped) > missing+len(unsure) {
		t.Errorf("%d of %d missing, %d dropped, %d unsure", missing, said, s.Dropped, len(unsure))
	}
	if dropped != int(s.Dropped) {
		t.Errorf("%d said to be dropped, %d were", dropped, s.Dropped)
	}
	if !s.Up || s.LastError != "" {
		t.Errorf("%+v", s)
	}
	w.bounds()
	synctest.Wait()
}

// TestToldLate: all was dropped, and nothing else is said. What was dropped is told nevertheless,
// once entries are taken, and the channel is well then; until then it is asked at the usual pace.
func TestToldLate(t *testing.T) {
	inBubble(t, "", func(t *testing.T) {
		w := run(t, Auto, nil)
		defer w.stop()
		w.cloud.answers(400, `{"error":{"message":"bad"}}`)
		w.say("a")
		w.say("b")
		w.after(10 * time.Minute)
		if s, n := w.State(), w.cloud.count(); s.Up || s.Dropped != 2 || n < 8 || n > 30 {
			t.Errorf("%d requests in ten minutes, %+v", n, s)
		}
		w.cloud.set(nil)
		w.after(maxBackOff + collect)
		got, said := w.cloud.messages()
		if s := w.State(); !s.Up || len(got) != 0 || said != 2 || s.Dropped != 2 || s.Writes != 1 {
			t.Errorf("arrived: %q, %d said to be dropped, %+v", got, said, s)
		}
		n := w.cloud.count()
		w.after(time.Hour)
		if more := w.cloud.count() - n; more != 0 {
			t.Errorf("%d requests with nothing to say", more)
		}
		w.bounds()
	})
}
