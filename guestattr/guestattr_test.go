package guestattr

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/test/clock"
)

// server is a metadata server on connections in memory, which synctest can see through.
type server struct {
	start time.Time
	conns chan net.Conn
	done  chan struct{}

	mu      sync.Mutex
	values  map[string]string
	queries []time.Time
	dials   int
	log     []string                                               // "12s PUT key value"
	handle  func(w http.ResponseWriter, r *http.Request) (ok bool) // nil or true: go on
}

func newServer(t *testing.T) *server {
	s := &server{start: time.Now(), conns: make(chan net.Conn), done: make(chan struct{}),
		values: map[string]string{}}
	h := &http.Server{Handler: s}
	go h.Serve(s)
	t.Cleanup(func() { h.Close() })
	return s
}

func (s *server) Accept() (net.Conn, error) {
	select {
	case c := <-s.conns:
		return c, nil
	case <-s.done:
		return nil, net.ErrClosed
	}
}
func (s *server) Close() error   { close(s.done); return nil }
func (s *server) Addr() net.Addr { return &net.TCPAddr{} }

func (s *server) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	a, b := net.Pipe()
	s.mu.Lock()
	s.dials++
	s.mu.Unlock()
	select {
	case s.conns <- b:
		return a, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

const path = "/computeMetadata/v1/instance/guest-attributes/gce-service-proxy/"

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	s.mu.Lock()
	s.queries = append(s.queries, time.Now())
	handle := s.handle
	s.mu.Unlock()
	if handle != nil && !handle(w, r) {
		return
	}
	key, ok := strings.CutPrefix(r.URL.Path, path)
	if !ok || r.Header.Get("Metadata-Flavor") != "Google" || r.Header.Get("X-Forwarded-For") != "" {
		http.Error(w, "not a guest attribute query", http.StatusBadRequest)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.log = append(s.log,
		strings.TrimSpace(fmt.Sprintf("%v %s %s %s", time.Since(s.start).Round(time.Second), r.Method,
			key, body)))
	switch r.Method {
	case http.MethodPut:
		s.values[key] = string(body)
	case http.MethodGet:
		v, ok := s.values[key]
		if !ok {
			http.NotFound(w, r)
			return
		}
		io.WriteString(w, v)
	}
}

func (s *server) on(handle func(w http.ResponseWriter, r *http.Request) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.handle = handle
}

func (s *server) answer(code int, text string) {
	s.on(func(w http.ResponseWriter, r *http.Request) bool { http.Error(w, text, code); return false })
}

func (s *server) get(key string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.values[key]
}

func (s *server) set(key, value string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.values[key] = value
}

// seen is the log so far, which it empties.
func (s *server) seen() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.log
	s.log = nil
	return l
}

// checkBudget fails when any minute saw more than six queries, three in the bucket and three that
// refill it, or any second more than three.
func (s *server) checkBudget(t *testing.T) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.queries {
		if i+3 < len(s.queries) && s.queries[i+3].Sub(s.queries[i]) < time.Second {
			t.Errorf("four queries within a second, at %v", s.queries[i].Sub(s.start))
			return
		}
		if i+6 < len(s.queries) && s.queries[i+6].Sub(s.queries[i]) < time.Minute {
			t.Errorf("seven queries within %v, at %v", s.queries[i+6].Sub(s.queries[i]),
				s.queries[i].Sub(s.start))
			return
		}
	}
}

// bubble runs f with a running Writer in fake time, and stops it afterwards.
func bubble(t *testing.T, f func(t *testing.T, w *Writer, s *server, logs *observer.ObservedLogs)) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t)
		core, logs := observer.New(zap.InfoLevel)
		w := New(Options{Host: "metadata", Log: zap.New(core), Dial: s.dial})
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- w.Run(ctx) }()
		f(t, w, s, logs)
		stop()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
		s.checkBudget(t)
	})
}

func sleep(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func TestFirstStart(t *testing.T) {
	bubble(t, func(t *testing.T, w *Writer, s *server, logs *observer.ObservedLogs) {
		w.Set(AgentHeartbeat, "T0")
		w.Set(ProxyVersion, "1.40.0")
		w.Set(BootstrapStatus, "FINISHED")
		sleep(time.Second)
		want := []string{"0s PUT bootstrap-status FINISHED", "0s PUT proxy-version 1.40.0",
			"0s PUT agent-heartbeat T0"}
		// Run may have found the heartbeat before the rest was set.
		got := s.seen()
		if len(got) == 3 && strings.HasSuffix(got[0], "T0") {
			got = append(got[1:], got[0])
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("(-want +got)\n%s", d)
		}
		if logs.Len() != 0 {
			t.Errorf("logged %v; want silence", logs.All())
		}
	})
}

// TestSteady is an agent's day: a heartbeat set each second, nothing else new.
func TestSteady(t *testing.T) {
	bubble(t, func(t *testing.T, w *Writer, s *server, _ *observer.ObservedLogs) {
		w.Set(BootstrapStatus, "FINISHED")
		w.Set(ProxyVersion, "1.40.0")
		sleep(0)
		for range 3595 {
			w.Set(AgentHeartbeat, time.Now().Format(time.RFC3339))
			sleep(time.Second)
		}
		beats, reads, last := 0, 0, time.Duration(0)
		for _, l := range s.seen() {
			f := strings.Fields(l)
			at, err := time.ParseDuration(f[0])
			if err != nil {
				t.Fatal(err)
			}
			switch {
			case f[2] == AgentHeartbeat:
				if beats > 0 && (at-last < heartbeatEvery || at-last > heartbeatEvery+2*time.Second) {
					t.Errorf("heartbeats %v apart", at-last)
				}
				beats, last = beats+1, at
			case f[1] == http.MethodGet:
				reads++
			}
		}
		if beats != 60 {
			t.Errorf("%d heartbeats in an hour; want 60", beats)
		}
		if reads != 10 {
			t.Errorf("%d read back in an hour; want 5 for each of the 2 values", reads)
		}
		if st := w.State(); st.Pending != 0 || st.Failures != 0 || st.Lost+st.Changed != 0 ||
			!st.Enabled {
			t.Errorf("%+v", st)
		}
		if s.dials != len(s.queries) { // a connection kept for a minute would only be found dead
			t.Errorf("%d connections for %d queries; want one each", s.dials, len(s.queries))
		}
	})
}

// TestChurn is a failure whose count grows each second: it may neither break the budget nor starve
// the heartbeat or a new value.
func TestChurn(t *testing.T) {
	bubble(t, func(t *testing.T, w *Writer, s *server, _ *observer.ObservedLogs) {
		var beat time.Time
		for i := range 1800 {
			w.Set(AgentLastFailure, fmt.Sprintf("no answer (%d times)", i))
			w.Set(AgentHeartbeat, time.Now().Format(time.RFC3339))
			if i == 900 {
				w.Set(ProxyVersion, "1.41.0")
			}
			if i == 960 && s.get(ProxyVersion) != "1.41.0" {
				t.Error("proxy-version not written after a minute")
			}
			sleep(time.Second)
			if v := s.get(AgentHeartbeat); v != "" {
				var err error
				if beat, err = time.Parse(time.RFC3339, v); err != nil {
					t.Fatal(err)
				}
			}
			if i > 60 && time.Since(beat) > 2*time.Minute {
				t.Fatalf("heartbeat is %v old", time.Since(beat))
			}
		}
		// Tokens are short, and every one but the heartbeat's goes to the failure.
		s.seen()
		if st := w.State(); st.Superseded < 1500 || st.Writes < 80 {
			t.Errorf("%+v; want about 90 writes and the rest superseded", st)
		}
	})
}

// TestPromises: with all of it changing each second for hours, what the server holds is not older
// than was promised, whatever changes besides now and then.
func TestPromises(t *testing.T) {
	bubble(t, func(t *testing.T, w *Writer, s *server, _ *observer.ObservedLogs) {
		oldest := map[string]time.Duration{}
		for i := range 4 * 3600 {
			now := time.Now().Format(time.RFC3339)
			for _, key := range []string{AgentHeartbeat, AgentLastFailure} {
				w.Set(key, now)
			}
			w.SetWithTail(AgentStatus, now+" services=", fmt.Sprint(i))
			if i%1000 == 10 {
				w.Set(ProxyVersion, now)
			}
			sleep(time.Second)
			for _, key := range []string{AgentHeartbeat, AgentLastFailure, AgentStatus} {
				value, _, _ := strings.Cut(s.get(key), " ")
				at, err := time.Parse(time.RFC3339, value)
				if err != nil && i > 60 {
					t.Fatal(err)
				}
				if i > 60 {
					oldest[key] = max(oldest[key], time.Since(at))
				}
			}
		}
		t.Log(oldest)
		for key, limit := range map[string]time.Duration{AgentHeartbeat: 2 * time.Minute,
			AgentLastFailure: time.Minute, AgentStatus: 100 * time.Second} {
			if oldest[key] > limit+time.Second { // the one that it does not hold came a second later
				t.Errorf("%s was %v old, at most %v", key, oldest[key], limit)
			}
		}
	})
}

// TestTail: a change of the tail alone waits until five minutes after the last write, unless the
// head changes meanwhile.
func TestTail(t *testing.T) {
	bubble(t, func(t *testing.T, w *Writer, s *server, _ *observer.ObservedLogs) {
		for _, step := range []struct {
			at         time.Duration
			head, tail string
		}{
			{0, "a n=", "1"},
			{10 * time.Second, "a n=", "2"},
			{time.Minute, "b n=", "2"},
			{2 * time.Minute, "b n=", "3"},
			{3 * time.Minute, "b n=", "2"}, // as it is written
			{10 * time.Minute, "b n=", "4"},
			{11 * time.Minute, "b n=", "5"},
			{16 * time.Minute, "b n=", "50"},
			{17 * time.Minute, "b n=", ""},
		} {
			sleep(step.at - time.Since(s.start))
			w.SetWithTail("k", step.head, step.tail)
			if step.at == 11*time.Minute {
				if n := w.State().Pending; n != 0 {
					t.Errorf("%d pending while the tail may wait", n)
				}
			}
		}
		sleep(10 * time.Minute)
		var puts []string
		for _, line := range s.seen() {
			if strings.Contains(line, "PUT") {
				puts = append(puts, line)
			}
		}
		if d := cmp.Diff([]string{"0s PUT k a n=1", "1m0s PUT k b n=2",
			"10m0s PUT k b n=4", "15m0s PUT k b n=5",
			"17m0s PUT k b n="}, puts); d != "" {
			t.Errorf("(-want +got)\n%s", d)
		}
		// What somebody else changed is not the tail's.
		s.set("k", "b n=7")
		sleep(checkEvery + time.Minute)
		if got := s.get("k"); got != "b n=" {
			t.Errorf("it is %q after it was read back", got)
		}
	})
}

// TestStatusRests: a status that changes at once again, as at a start, is written once, and leaves
// the tokens to what comes meanwhile.
func TestStatusRests(t *testing.T) {
	bubble(t, func(t *testing.T, w *Writer, s *server, _ *observer.ObservedLogs) {
		w.Set(AgentHeartbeat, "T0")
		w.Set(AgentStatus, "not-ready")
		sleep(time.Second)
		w.Set(AgentLastFailure, "one")
		w.Set(ProxyVersion, "1.40.0")
		w.Set(AgentStatus, "ready")
		sleep(time.Minute - 2*time.Second)
		if d := cmp.Diff([]string{"0s PUT agent-heartbeat T0", "1s PUT agent-last-failure one",
			"1s PUT proxy-version 1.40.0", "20s PUT agent-status ready"}, s.seen()); d != "" {
			t.Errorf("(-want +got)\n%s", d)
		}
	})
}

func TestFailureBeforeHeartbeat(t *testing.T) {
	bubble(t, func(t *testing.T, w *Writer, s *server, _ *observer.ObservedLogs) {
		w.Set(BootstrapStatus, "FINISHED")
		w.Set(ProxyVersion, "1.40.0")
		w.Set(AgentLastFailure, "one")
		sleep(10 * time.Second)
		s.seen()
		w.Set(AgentHeartbeat, "T10")
		w.Set(AgentLastFailure, "two")
		sleep(50 * time.Second)
		if d := cmp.Diff([]string{"20s PUT agent-last-failure two", "40s PUT agent-heartbeat T10"},
			s.seen()); d != "" {
			t.Errorf("(-want +got)\n%s", d)
		}
	})
}

// TestFailures has the server fail in each way for three minutes; the newest values
// must be there soon after.
func TestFailures(t *testing.T) {
	for _, tt := range []struct {
		name     string
		fail     func(s *server)
		says     string
		disabled bool
		recovery time.Duration
	}{
		{"disabled", func(s *server) { s.answer(403, "Guest attributes endpoint access is disabled.") },
			"403 Guest attributes endpoint access is disabled.", true, probeEvery},
		{"not found", func(s *server) { s.answer(404, "") }, "404 Not Found", false, maxBackOff},
		{"too many requests", func(s *server) { s.answer(429, "<html>\nslow down") }, "429 <html> slow down", false, maxBackOff},
		{"unavailable", func(s *server) { s.answer(503, "") }, "503 Service Unavailable", false, maxBackOff},
		{"redirect", func(s *server) {
			s.on(func(w http.ResponseWriter, r *http.Request) bool {
				http.Redirect(w, r, "http://elsewhere/", http.StatusFound)
				return false
			})
		}, "302 Found", false, maxBackOff},
		{"hang", func(s *server) {
			s.on(func(w http.ResponseWriter, r *http.Request) bool { <-r.Context().Done(); return false })
		}, "no answer from the metadata server within 5s", false, maxBackOff + queryLimit},
		{"endless header", func(s *server) {
			s.on(func(w http.ResponseWriter, r *http.Request) bool {
				w.Header().Set("X", strings.Repeat("x", 1<<20))
				return false
			})
		}, "exceeded 65536 bytes", false, maxBackOff},
		{"connection cut", func(s *server) {
			s.on(func(http.ResponseWriter, *http.Request) bool { panic(http.ErrAbortHandler) })
		}, "EOF", false, maxBackOff},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, w *Writer, s *server, logs *observer.ObservedLogs) {
				w.Set(ProxyVersion, "1.39.0")
				sleep(time.Minute)
				tt.fail(s)
				for i := range 180 {
					w.Set(AgentLastFailure, fmt.Sprintf("failure %d", i))
					w.Set(AgentHeartbeat, fmt.Sprintf("T%d", i))
					sleep(time.Second)
				}
				st := w.State()
				if st.Enabled == tt.disabled || !strings.Contains(st.LastError, tt.says) || st.Failures == 0 ||
					st.Pending != 2 {
					t.Errorf("while failing: %+v; want %q", st, tt.says)
				}
				// 2 s, 4 s, … 30 s apart; once refused, two minutes apart.
				if limit := map[bool]uint64{true: 2, false: 10}[tt.disabled]; st.Failures > limit {
					t.Errorf("%d queries failed in three minutes; want at most %d", st.Failures, limit)
				}
				if strings.ContainsAny(st.LastError, "\n") {
					t.Errorf("LastError has several lines: %q", st.LastError)
				}
				if logs.Len() != 1 {
					t.Errorf("logged %d lines while failing; want 1: %v", logs.Len(), logs.All())
				}
				s.on(nil)
				sleep(tt.recovery + time.Second)
				if got := s.get(AgentLastFailure) + " " + s.get(AgentHeartbeat); got != "failure 179 T179" {
					t.Errorf("after recovery the server holds %q; want the newest values", got)
				}
				if st := w.State(); !st.Enabled || st.LastError != "" || st.Pending != 0 {
					t.Errorf("after recovery: %+v", st)
				}
				if logs.Len() != 2 {
					t.Errorf("logged %d lines; want 2: %v", logs.Len(), logs.All())
				}
			})
		})
	}
}

func TestSlowServer(t *testing.T) {
	bubble(t, func(t *testing.T, w *Writer, s *server, logs *observer.ObservedLogs) {
		s.on(func(http.ResponseWriter, *http.Request) bool { time.Sleep(4 * time.Second); return true })
		w.Set(ProxyVersion, "1")
		sleep(2 * time.Second)
		w.Set(ProxyVersion, "2") // while 1 is on its way
		sleep(10 * time.Second)
		if got := s.get(ProxyVersion); got != "2" {
			t.Errorf("proxy-version is %q; want 2", got)
		}
		if logs.Len() != 0 {
			t.Errorf("logged %v", logs.All())
		}
	})
}

// TestTimedOutWriteMayHaveWorked: the server takes a value and fails to say so; then the old
// value is wanted again.
func TestTimedOutWriteMayHaveWorked(t *testing.T) {
	bubble(t, func(t *testing.T, w *Writer, s *server, _ *observer.ObservedLogs) {
		w.Set(BootstrapStatus, "FINISHED")
		sleep(time.Minute)
		s.on(func(w http.ResponseWriter, r *http.Request) bool {
			s.set(BootstrapStatus, "FAILED")
			<-r.Context().Done()
			return false
		})
		w.Set(BootstrapStatus, "FAILED")
		sleep(3 * time.Second)
		w.Set(BootstrapStatus, "FINISHED")
		sleep(3 * time.Second)
		s.on(nil)
		sleep(time.Minute)
		if got := s.get(BootstrapStatus); got != "FINISHED" {
			t.Errorf("bootstrap-status is %q; want FINISHED", got)
		}
	})
}

func TestReadBack(t *testing.T) {
	bubble(t, func(t *testing.T, w *Writer, s *server, logs *observer.ObservedLogs) {
		w.Set(BootstrapStatus, "FINISHED")
		w.Set(ProxyVersion, "1.40.0")
		sleep(time.Second)
		s.mu.Lock()
		delete(s.values, BootstrapStatus)
		s.mu.Unlock()
		s.set(ProxyVersion, strings.Repeat("x", 1<<20))
		sleep(checkEvery + time.Minute)
		if a, b := s.get(BootstrapStatus), s.get(ProxyVersion); a != "FINISHED" || b != "1.40.0" {
			t.Errorf("after %v: %q, %.20q; want them written again", checkEvery, a, b)
		}
		if st := w.State(); st.Lost != 1 || st.Changed != 1 || st.Pending != 0 {
			t.Errorf("%+v; want one lost, one changed", st)
		}
		// Somebody who insists is not fought: one rewrite each ten minutes.
		s.seen()
		for range 3600 {
			s.set(ProxyVersion, "theirs")
			sleep(time.Second)
		}
		puts := 0
		for _, l := range s.seen() {
			if strings.Contains(l, "PUT") {
				puts++
			}
		}
		if puts < 4 || puts > 6 {
			t.Errorf("%d rewrites in an hour; want about 5", puts)
		}
	})
}

// TestNames: the keys by the names that people and gcloud ask for, and which of them goes first.
func TestNames(t *testing.T) {
	bubble(t, func(t *testing.T, w *Writer, s *server, _ *observer.ObservedLogs) {
		for _, key := range []string{AgentStatus, AgentHeartbeat, "other-b", "other-a", ProxyVersion, AgentLastFailure,
			BootstrapLastFailure, BootstrapStatus} {
			w.Set(key, "v")
		}
		sleep(3 * time.Minute)
		var keys []string
		for _, l := range s.seen() {
			keys = append(keys, strings.Fields(l)[2])
		}
		want := []string{"bootstrap-status", "bootstrap-last-failure", "agent-last-failure",
			"proxy-version", "other-a", "other-b", "agent-heartbeat", "agent-status"}
		if len(keys) > 0 && keys[0] != want[0] { // Run may have found one before the rest was set
			keys, want = keys[1:], slices.DeleteFunc(want, func(k string) bool { return k == keys[0] })
		}
		if d := cmp.Diff(want, keys); d != "" {
			t.Errorf("(-want +got)\n%s", d)
		}
	})
}

// TestOthersNoticed: what another process writes, or the platform loses, is said once for each time
// with the key, counted, and written again; a value that is as it was is silent.
func TestOthersNoticed(t *testing.T) {
	for _, tt := range []struct {
		name          string
		do            func(s *server)
		says          string
		lost, changed uint64
	}{
		{"nothing", func(*server) {}, "", 0, 0},
		{"overwritten", func(s *server) { s.set(BootstrapStatus, "FAILED") }, "guest attribute was changed by others, writing it again", 0, 1},
		{"emptied", func(s *server) { s.set(BootstrapStatus, "") }, "guest attribute was changed by others, writing it again", 0, 1},
		{"something added", func(s *server) { s.set(BootstrapStatus, "FINISHED ") }, "guest attribute was changed by others, writing it again", 0, 1},
		{"deleted", func(s *server) {
			s.mu.Lock()
			defer s.mu.Unlock()
			delete(s.values, BootstrapStatus)
		}, "guest attribute was lost, writing it again", 1, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, w *Writer, s *server, logs *observer.ObservedLogs) {
				w.Set(BootstrapStatus, "FINISHED")
				sleep(time.Minute)
				tt.do(s)
				sleep(checkEvery)
				if got := s.get(BootstrapStatus); got != "FINISHED" {
					t.Errorf("it is %q after %v", got, checkEvery)
				}
				sleep(time.Hour) // and no more is made of it
				st := w.State()
				if st.Lost != tt.lost || st.Changed != tt.changed || st.Reads != 7 || st.Failures != 0 ||
					!st.Enabled {
					t.Errorf("%+v; want %d lost, %d changed, read back 7 times", st, tt.lost, tt.changed)
				}
				all := logs.All()
				if tt.says == "" && len(all) == 0 {
					return
				}
				if len(all) != 1 || all[0].Message != tt.says ||
					all[0].ContextMap()["key"] != "bootstrap-status" {
					t.Errorf("logged %v; want %q", all, tt.says)
				}
			})
		})
	}
}

// TestReadCutShort: half an answer is no value of somebody else's.
func TestReadCutShort(t *testing.T) {
	bubble(t, func(t *testing.T, w *Writer, s *server, logs *observer.ObservedLogs) {
		w.Set(BootstrapStatus, "FINISHED")
		sleep(time.Minute)
		s.on(func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Content-Length", "8")
			io.WriteString(w, "FINI")
			return false
		})
		sleep(checkEvery)
		s.on(nil)
		sleep(time.Minute)
		if st := w.State(); st.Changed != 0 || st.Failures == 0 || st.Writes != 1 || st.LastError != "" {
			t.Errorf("%+v; want failures and no change, and nothing written again", st)
		}
		if logs.Len() != 2 || logs.All()[0].Message != "guest attributes cannot be written" {
			t.Errorf("logged %v", logs.All())
		}
	})
}

// TestDisabled is a VM without enable-guest-attributes=TRUE for an hour: nothing but a
// question every two minutes, and one line. What was Set meanwhile is there within two minutes
// of its being enabled.
func TestDisabled(t *testing.T) {
	bubble(t, func(t *testing.T, w *Writer, s *server, logs *observer.ObservedLogs) {
		s.answer(403, "Guest attributes endpoint access is disabled.")
		w.Set(BootstrapStatus, "FINISHED")
		for i := range 3600 {
			w.Set(AgentHeartbeat, fmt.Sprintf("T%d", i))
			w.Set(AgentLastFailure, fmt.Sprintf("failure %d", i))
			sleep(time.Second)
		}
		if n := len(s.queries); n != 31 { // the last at its end
			t.Errorf("%d questions in an hour; want 31", n)
		}
		if st := w.State(); st.Enabled || st.Pending != 3 || st.Writes != 0 || !st.Since.Equal(s.start) {
			t.Errorf("%+v; want it off since the start", st)
		}
		if logs.Len() != 1 ||
			!strings.Contains(logs.All()[0].Message,
				"set enable-guest-attributes=TRUE in the VM's metadata") {
			t.Errorf("logged %v; want what to do, once", logs.All())
		}
		s.on(nil)
		enabled := time.Now()
		sleep(probeEvery)
		if d := cmp.Diff(map[string]string{"bootstrap-status": "FINISHED", "agent-heartbeat": "T3599",
			"agent-last-failure": "failure 3599"}, s.values); d != "" {
			t.Errorf("(-want +got)\n%s", d)
		}
		if st := w.State(); !st.Enabled || st.LastError != "" || st.Pending != 0 ||
			st.Since.Before(enabled) {
			t.Errorf("%+v; want it on", st)
		}
		if logs.Len() != 2 || logs.All()[1].Message != "guest attributes are written again" {
			t.Errorf("logged %v", logs.All())
		}
	})
}

// TestSince: when it last came to be as it is, which a time-out after a time-out or a success after
// a success does not move.
func TestSince(t *testing.T) {
	bubble(t, func(t *testing.T, w *Writer, s *server, _ *observer.ObservedLogs) {
		if st := w.State(); !st.Since.IsZero() || !st.Enabled {
			t.Errorf("before the first query: %+v", st)
		}
		tick := func(d time.Duration) { // a value each minute
			for end := time.Now().Add(d); time.Now().Before(end); sleep(time.Minute) {
				w.Set(ProxyVersion, time.Now().String())
			}
		}
		for _, step := range []struct {
			what  string
			on    func()
			moved bool
		}{
			{"written", func() { s.on(nil) }, true},
			{"written again", func() { s.on(nil) }, false},
			{"unavailable", func() { s.answer(503, "") }, true},
			{"and for another reason", func() { s.answer(500, "") }, false},
			{"disabled", func() { s.answer(403, "") }, true},
			{"disabled, and unavailable", func() { s.answer(503, "") }, false},
			{"written at last", func() { s.on(nil) }, true},
			{"unavailable", func() { s.answer(503, "") }, true},
			{"written", func() { s.on(nil) }, true},
			{"disabled", func() { s.answer(403, "") }, true},
			{"written", func() { s.on(nil) }, true},
			{"and again", func() { s.on(nil) }, false},
		} {
			step.on()
			before := w.State().Since
			tick(5 * time.Minute)
			if moved := !w.State().Since.Equal(before); moved != step.moved {
				t.Errorf("%s: since %v, before %v", step.what, w.State().Since.Sub(s.start),
					before.Sub(s.start))
			}
		}
	})
}

// TestBackOffStartsAnew: after a recovery the next failure is tried again within seconds, not
// after the last pause.
func TestBackOffStartsAnew(t *testing.T) {
	bubble(t, func(t *testing.T, w *Writer, s *server, _ *observer.ObservedLogs) {
		s.answer(503, "")
		w.Set(ProxyVersion, "1")
		sleep(5 * time.Minute)
		s.on(nil)
		sleep(time.Minute)
		s.answer(503, "")
		w.Set(ProxyVersion, "2")
		sleep(time.Second)
		s.on(nil)
		sleep(firstBackOff)
		if got := s.get(ProxyVersion); got != "2" {
			t.Errorf(
				"proxy-version is %q, three seconds after a write failed once; want it tried again after %v", got, firstBackOff)
		}
		// Nor does a pause outlast what it was for.
		w.Set(ProxyVersion, "3")
		sleep(0)
		if got := s.get(ProxyVersion); got != "3" {
			t.Errorf("proxy-version is %q, want 3 at once", got)
		}
	})
}

// TestBackOff: a failure is tried again after 2 s, 4 s, 8 s and so on, as far as there are tokens,
// and never later than half a minute.
func TestBackOff(t *testing.T) {
	bubble(t, func(t *testing.T, w *Writer, s *server, _ *observer.ObservedLogs) {
		s.answer(503, "")
		w.Set(ProxyVersion, "1")
		sleep(5 * time.Minute)
		var at []string
		for _, q := range s.queries {
			at = append(at, q.Sub(s.start).Round(time.Second).String())
		}
		want := "0s 2s 6s 20s 40s 1m10s 1m40s 2m10s 2m40s 3m10s 3m40s 4m10s 4m40s"
		if got := strings.Join(at, " "); got != want {
			t.Errorf("tried at %s; want %s", got, want)
		}
	})
}

// TestLongValue: the longest value is written whole, and known again when read back;
// one byte more is not it.
func TestLongValue(t *testing.T) {
	bubble(t, func(t *testing.T, w *Writer, s *server, _ *observer.ObservedLogs) {
		long := strings.Repeat("x", MaxValue)
		w.Set(AgentLastFailure, long)
		sleep(checkEvery + time.Minute)
		if st := w.State(); s.get(AgentLastFailure) != long || st.Reads != 1 || st.Changed != 0 {
			t.Errorf("%d bytes are there, %+v", len(s.get(AgentLastFailure)), st)
		}
		s.set(AgentLastFailure, long+"x")
		sleep(checkEvery)
		if st := w.State(); s.get(AgentLastFailure) != long || st.Reads != 2 || st.Changed != 1 {
			t.Errorf("%d bytes are there, %+v", len(s.get(AgentLastFailure)), st)
		}
		w.Set(AgentLastFailure, long+"x")
		sleep(time.Minute)
		if got := s.get(AgentLastFailure); len(got) != MaxValue || !strings.HasSuffix(got, "x…") {
			t.Errorf("%d bytes are there, %.10q", len(got), got[len(got)-8:])
		}
	})
}

// TestClockSetBack: a heartbeat that was due before the clock was set back by six hours is not kept
// behind what changes all the time for so long.
func TestClockSetBack(t *testing.T) {
	w := New(Options{})
	before := time.Now()
	after := func(d time.Duration) time.Time { return clock.Set(before.Add(d), -6*time.Hour) }
	w.values[AgentHeartbeat] = &value{want: "new", head: 3, written: "old", sure: true, since: before,
		last: before}
	w.values[AgentLastFailure] = &value{want: "new", head: 3, written: "old", sure: true,
		since: after(3 * time.Minute), last: after(2 * time.Minute)}
	for _, in := range []time.Duration{3 * time.Minute, 4 * time.Minute} {
		want := AgentHeartbeat
		if in == 4*time.Minute {
			want = AgentLastFailure // which is late by then, and goes first however late the other is
		}
		if key, _, at := w.next(after(in)); key != want || at.After(after(in)) {
			t.Errorf("after %v: %s at %v, want %s now", in, key, at, want)
		}
	}
}

// TestHeartbeatAlone: a heartbeat that came too early is written when its minute is over, though
// nobody says another word.
func TestHeartbeatAlone(t *testing.T) {
	bubble(t, func(t *testing.T, w *Writer, s *server, _ *observer.ObservedLogs) {
		w.Set(AgentHeartbeat, "T0")
		sleep(10 * time.Second)
		w.Set(AgentHeartbeat, "T10")
		sleep(10 * time.Minute)
		if d := cmp.Diff([]string{"0s PUT agent-heartbeat T0", "1m0s PUT agent-heartbeat T10"},
			s.seen()); d != "" {
			t.Errorf("(-want +got)\n%s", d)
		}
	})
}

// TestWaitingIsFree: values that wait for tokens, day and night, cost next to no
// CPU: who waits sleeps.
func TestWaitingIsFree(t *testing.T) {
	used := func() time.Duration {
		var r unix.Rusage
		if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
			t.Fatal(err)
		}
		return time.Duration(r.Utime.Nano() + r.Stime.Nano())
	}
	before := used()
	bubble(t, func(t *testing.T, w *Writer, s *server, _ *observer.ObservedLogs) {
		for range 60 {
			for _, key := range first[1:] { // with the next one more than a minute's tokens
				w.Set(key, time.Now().String())
			}
			w.Set(BootstrapStatus, time.Now().String())
			sleep(time.Minute)
		}
	})
	if d := used() - before; d > 2*time.Second {
		t.Errorf("an hour took %v of CPU", d)
	}
}

// TestPending: a heartbeat counts once its minute is over, anything else at once.
func TestPending(t *testing.T) {
	bubble(t, func(t *testing.T, w *Writer, s *server, _ *observer.ObservedLogs) {
		w.Set(AgentHeartbeat, "T0")
		sleep(0)
		s.answer(503, "")
		w.Set(AgentHeartbeat, "T1")
		for _, step := range []struct {
			at   time.Duration
			want int
		}{{0, 0}, {59 * time.Second, 0}, {time.Minute, 1}, {2 * time.Minute, 1}} {
			sleep(step.at - time.Since(s.start))
			if st := w.State(); st.Pending != step.want {
				t.Errorf("after %v: %d pending, want %d", step.at, st.Pending, step.want)
			}
		}
		w.Set(ProxyVersion, "1")
		w.Set(BootstrapStatus, "FINISHED")
		if st := w.State(); st.Pending != 3 {
			t.Errorf("%d pending, want 3", st.Pending)
		}
	})
}

// TestEnabledAgain: what was written before the channel was off may be gone.
func TestEnabledAgain(t *testing.T) {
	bubble(t, func(t *testing.T, w *Writer, s *server, _ *observer.ObservedLogs) {
		w.Set(BootstrapStatus, "FINISHED")
		sleep(time.Minute)
		s.answer(403, "Guest attributes endpoint access is disabled.")
		w.Set(AgentHeartbeat, "T1")
		sleep(time.Minute)
		s.mu.Lock()
		clear(s.values)
		s.mu.Unlock()
		s.on(nil)
		sleep(probeEvery)
		if a, b := s.get(BootstrapStatus), s.get(AgentHeartbeat); a != "FINISHED" || b != "T1" {
			t.Errorf("after enabling: %q, %q; want both", a, b)
		}
	})
}

func TestFlush(t *testing.T) {
	bubble(t, func(t *testing.T, w *Writer, s *server, _ *observer.ObservedLogs) {
		for i := range 5 {
			w.Set(fmt.Sprintf("k%d", i), "v")
		}
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		if err := w.Flush(ctx); err == nil || !strings.Contains(err.Error(), "write 1 guest attributes") {
			t.Errorf("Flush for 30 s = %v; want one value to be left", err)
		}
		if err := w.Flush(t.Context()); err != nil || s.get("k4") != "v" {
			t.Errorf("Flush = %v, k4 is %q", err, s.get("k4"))
		}
		s.answer(403, "Guest attributes endpoint access is disabled.")
		w.Set("k0", "w")
		if err := w.Flush(t.Context()); err == nil || !strings.Contains(err.Error(), "disabled") {
			t.Errorf("Flush while disabled = %v", err)
		}
	})
	// A server that fails may answer the next time: it is waited for, and its words are the reason.
	bubble(t, func(t *testing.T, w *Writer, s *server, _ *observer.ObservedLogs) {
		s.answer(503, "")
		w.Set("k0", "v")
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		if err := w.Flush(ctx); err == nil ||
			!strings.HasPrefix(err.Error(), "write 1 guest attributes: ") ||
			!strings.Contains(err.Error(), "503") {
			t.Errorf("Flush of a server that fails = %v", err)
		}
		if d := time.Since(s.start); d != 5*time.Second {
			t.Errorf("Flush ended after %v", d)
		}
	})
}

// TestCrashLoop starts a new Writer every two seconds for ten minutes, as systemd would: together
// they keep to the budget, and still get values out.
func TestCrashLoop(t *testing.T) {
	budget := filepath.Join(t.TempDir(), "budget")
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t)
		for i := range 300 {
			w := New(Options{Host: "metadata", Budget: budget, Dial: s.dial})
			w.Set(AgentLastFailure, fmt.Sprintf("crash %d", i))
			w.Set(BootstrapStatus, "FINISHED")
			w.Set(ProxyVersion, "1.40.0")
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			w.Run(ctx)
			cancel()
		}
		s.checkBudget(t)
		if n := len(s.seen()); n < 10 || n > 33 {
			t.Errorf("%d writes in ten minutes; want most of the budget of 33", n)
		}
	})
}

// TestSharedBudget: two programs that write at the same time keep to one budget.
func TestSharedBudget(t *testing.T) {
	budget := filepath.Join(t.TempDir(), "budget")
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t)
		var all sync.WaitGroup
		for _, key := range []string{BootstrapStatus, AgentLastFailure} {
			w := New(Options{Host: "metadata", Budget: budget, Dial: s.dial})
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute-time.Second)
			defer cancel()
			all.Go(func() { w.Run(ctx) })
			all.Go(func() {
				for i := 0; ctx.Err() == nil; i++ {
					w.Set(key, fmt.Sprint(i))
					time.Sleep(time.Second)
				}
			})
		}
		all.Wait()
		s.checkBudget(t)
		if n := len(s.seen()); n < 20 || n > 33 {
			t.Errorf("%d writes in ten minutes; want most of the budget of 33", n)
		}
	})
}

// TestBudgetOfRoot: what root makes in the daemon's folder is the daemon's.
func TestBudgetOfRoot(t *testing.T) {
	dir, uid, gid := t.TempDir(), os.Getuid(), os.Getgid()
	if uid == 0 { // nobody else can give a folder away, and what they make is theirs anyway
		uid, gid = 12345, 12346
		if err := os.Chown(dir, uid, gid); err != nil {
			t.Fatal(err)
		}
	}
	at := time.Unix(1700000000, 5)
	f, _, err := openBudget(filepath.Join(dir, "budget"))
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if err := setTime(f.Name(), at); err != nil {
		t.Fatal(err)
	}
	fi, err := os.Stat(filepath.Join(dir, "budget"))
	if err != nil {
		t.Fatal(err)
	}
	if st := fi.Sys().(*syscall.Stat_t); int(st.Uid) != uid || int(st.Gid) != gid ||
		!fi.ModTime().Equal(at) || fi.Mode() != 0o600 {
		t.Errorf("it belongs to %d:%d, %v, of %v", st.Uid, st.Gid, fi.Mode(), fi.ModTime())
	}
}

// TestBudgetFile: a file from the future (a clock step), one that cannot be
// made, one that is a link.
func TestBudgetFile(t *testing.T) {
	dir := t.TempDir()
	link, dangling, fifo, elsewhere := filepath.Join(dir, "link"), filepath.Join(dir, "dangling"),
		filepath.Join(dir, "fifo"), filepath.Join(dir, "elsewhere")
	future := time.Unix(2e9, 0) // by synctest's clock
	if err := errors.Join(os.Symlink(elsewhere, link),
		os.Symlink(filepath.Join(dir, "nowhere"), dangling), unix.Mkfifo(fifo, 0o666),
		os.WriteFile(elsewhere, nil, 0o600), os.Chtimes(elsewhere, future, future)); err != nil {
		t.Fatal(err)
	}
	for name, path := range map[string]string{
		"future": filepath.Join(dir, "future"), "no folder": filepath.Join(dir, "no", "such"), "link": link, "dangling": dangling, "fifo": fifo,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				switch name {
				case "link", "dangling", "fifo":
					if err := setTime(path, time.Now()); err != nil {
						t.Fatal(err)
					}
				case "future":
					if err := os.WriteFile(path, nil, 0o600); err != nil {
						t.Fatal(err)
					}
					if err := os.Chtimes(path, time.Time{}, time.Now().Add(1000*time.Hour)); err != nil {
						t.Fatal(err)
					}
				}
				s := newServer(t)
				core, logs := observer.New(zap.InfoLevel)
				w := New(Options{Host: "metadata", Budget: path, Log: zap.New(core), Dial: s.dial})
				w.Set(BootstrapStatus, "FINISHED")
				w.Set(ProxyVersion, "1.40.0")
				ctx, cancel := context.WithTimeout(t.Context(), 2*unkeptEvery+time.Second)
				defer cancel()
				w.Run(ctx)
				if s.get(BootstrapStatus) != "FINISHED" || s.get(ProxyVersion) != "1.40.0" {
					t.Error("not written within a minute")
				}
				first, least := s.queries[0].Sub(s.start), unkeptEvery
				if name == "future" {
					least = refill
				}
				if first < least {
					t.Errorf("first query after %v; want the bucket to be taken for empty", first)
				}
				if want := map[string]int{"future": 0, "no folder": 1, "link": 1, "dangling": 1,
					"fifo": 1}[name]; logs.Len() != want ||
					want == 1 && logs.All()[0].Message != "guest attribute budget is not kept for the next start, writing less" {
					t.Errorf("logged %v; want %d lines", logs.All(), want)
				}
			})
		})
	}
	if fi, err := os.Lstat(elsewhere); err != nil || !fi.ModTime().Equal(future) {
		t.Errorf("the link was followed: %v, %v", fi, err)
	}
	if _, err := os.Lstat(filepath.Join(dir, "nowhere")); err == nil {
		t.Error("the dangling link was followed")
	}
}

// TestBudgetUnkept: while the budget's file can be written by nobody, here because its folder is
// away, what is spent is not known to the next start. So these spend so little that the next one
// may take what the file leaves it. When the folder is back, a running one keeps the file again.
func TestBudgetUnkept(t *testing.T) {
	for _, c := range []struct {
		name       string
		away, back time.Duration // the folder
		killed     time.Duration // the first Writer, which the second one follows at once
		says       int           // lines of the first one: it is not kept, it is again
	}{
		{"at the kill", time.Second, 41 * time.Second, 41 * time.Second, 1},
		{"back before the kill", 10 * time.Second, 25 * time.Second, 45 * time.Second, 2},
		{"between queries", 61 * time.Second, 62 * time.Second, 120 * time.Second, 0},
		{"from the start", 0, 90 * time.Second, 90 * time.Second, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := unkept{folder: filepath.Join(t.TempDir(), "run")}
			synctest.Test(t, func(t *testing.T) {
				w.begin(t)
				w.start(t)
				logs := w.logs
				at := make(map[time.Duration][]func(*testing.T))
				at[c.away] = append(at[c.away], w.away)
				at[c.back] = append(at[c.back], w.back)
				at[c.killed] = append(at[c.killed], w.kill, w.start)
				for s := time.Duration(0); s < 4*time.Minute; s += time.Second {
					for _, do := range at[s] {
						do(t)
					}
					sleep(time.Second)
				}
				w.kill(t)
				w.s.checkBudget(t)
				if n := len(w.s.seen()); n < 10 {
					t.Errorf("%d queries in four minutes", n)
				}
				if logs.Len() != c.says {
					t.Errorf("it said %v, want %d lines", logs.All(), c.says)
				}
			})
		})
	}
}

// TestBudgetShuffled: the folder comes and goes, programs are killed and started, and the budget is
// kept whatever the order.
func TestBudgetShuffled(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	for i := range uint64(10) {
		w := unkept{folder: filepath.Join(t.TempDir(), "run")}
		random := rand.New(rand.NewPCG(seed, i))
		synctest.Test(t, func(t *testing.T) {
			w.begin(t)
			w.start(t)
			for range 60 {
				switch random.IntN(3) {
				case 0:
					w.away(t)
				case 1:
					w.back(t)
				default:
					w.kill(t)
					w.start(t)
				}
				sleep(time.Duration(random.Int64N(int64(40 * time.Second))))
			}
			w.kill(t)
			w.s.checkBudget(t)
			// At least half of what a run without a file may spend.
			if n, least := len(w.s.seen()), int(time.Since(w.s.start)/(2*unkeptEvery)); n < least {
				t.Errorf("%d queries in %v, want %d", n, time.Since(w.s.start), least)
			}
		})
		if t.Failed() {
			t.Fatalf("SEED=%d, game %d", seed, i)
		}
	}
}

// unkept is a Writer that has something new to say all the time, and its budget's folder.
type unkept struct {
	folder string
	s      *server
	logs   *observer.ObservedLogs
	end    func()
}

func (u *unkept) begin(t *testing.T) {
	u.s = newServer(t)
	if err := os.Mkdir(u.folder, 0o755); err != nil {
		t.Fatal(err)
	}
}

func (u *unkept) start(t *testing.T) {
	core, logs := observer.New(zap.InfoLevel)
	w := New(Options{Host: "metadata", Budget: filepath.Join(u.folder, "budget"), Log: zap.New(core),
		Dial: u.s.dial})
	u.logs = logs
	ctx, stop := context.WithCancel(t.Context())
	var all sync.WaitGroup
	all.Go(func() { w.Run(ctx) })
	all.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			for _, key := range first {
				w.Set(key, fmt.Sprint(i))
			}
			time.Sleep(time.Second)
		}
	})
	u.end = func() { stop(); all.Wait() }
}

func (u *unkept) kill(*testing.T) { u.end() }

func (u *unkept) away(t *testing.T) { u.move(t, u.folder, u.folder+"-away") }
func (u *unkept) back(t *testing.T) { u.move(t, u.folder+"-away", u.folder) }

func (u *unkept) move(t *testing.T, from, to string) {
	if err := os.Rename(from, to); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
}

// TestBudgetHeld: while another program holds the budget's file, nothing is sent, and nobody waits
// for it in the kernel, where the daemon's stop could not reach it.
func TestBudgetHeld(t *testing.T) {
	budget := filepath.Join(t.TempDir(), "budget")
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t)
		held, err := os.Create(budget)
		if err != nil {
			t.Fatal(err)
		}
		defer held.Close()
		if err := errors.Join(os.Chtimes(budget, time.Time{}, time.Now()),
			unix.Flock(int(held.Fd()), unix.LOCK_EX)); err != nil {
			t.Fatal(err)
		}
		w := New(Options{Host: "metadata", Budget: budget, Dial: s.dial})
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- w.Run(ctx) }()
		w.Set(ProxyVersion, "1")
		sleep(time.Second)
		if n := len(s.seen()); n != 0 || w.State().Pending != 1 {
			t.Errorf("%d queries while the file is held", n)
		}
		if err := unix.Flock(int(held.Fd()), unix.LOCK_UN); err != nil {
			t.Fatal(err)
		}
		sleep(time.Second)
		if got := s.get(ProxyVersion); got != "1" {
			t.Errorf("proxy-version is %q once it is free", got)
		}
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// TestAbsent: what was never said is not written; what was, can become empty.
func TestAbsent(t *testing.T) {
	bubble(t, func(t *testing.T, w *Writer, s *server, _ *observer.ObservedLogs) {
		w.Set(AgentLastFailure, "")
		sleep(time.Minute)
		w.Set(AgentLastFailure, "one")
		sleep(time.Minute)
		w.Set(AgentLastFailure, "")
		sleep(time.Minute)
		if d := cmp.Diff([]string{"1m0s PUT agent-last-failure one", "2m0s PUT agent-last-failure"},
			s.seen()); d != "" {
			t.Errorf("(-want +got)\n%s", d)
		}
	})
}

// TestStopDuringQuery: a query that hangs does not hold up the end.
func TestStopDuringQuery(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t)
		s.on(func(w http.ResponseWriter, r *http.Request) bool { <-r.Context().Done(); return false })
		w := New(Options{Host: "metadata", Dial: s.dial})
		w.Set(ProxyVersion, "1")
		ctx, stop := context.WithTimeout(t.Context(), time.Second)
		defer stop()
		if err := w.Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
		if d := time.Since(s.start); d != time.Second {
			t.Errorf("Run ended after %v; want 1s", d)
		}
	})
}

func TestHost(t *testing.T) {
	for _, tt := range []struct{ env, option, want string }{
		{"", "", "169.254.169.254"}, {"127.0.0.1:8080", "", "127.0.0.1:8080"}, {"127.0.0.1:8080", "127.0.0.1:1", "127.0.0.1:1"},
	} {
		t.Setenv("GCE_METADATA_HOST", tt.env)
		if w := New(Options{Host: tt.option}); w.base != "http://"+tt.want+path {
			t.Errorf("env %q, option %q: %s", tt.env, tt.option, w.base)
		}
	}
}

func TestOneLine(t *testing.T) {
	for _, tt := range []struct {
		in    string
		limit int
		want  string
	}{
		{"plain", 10, "plain"},
		{"", 10, ""},
		{"  two\r\n\tlines\x00\x1b[31m ", 40, "two lines [31m"},
		{"exactly 10", 10, "exactly 10"},
		{"one byte over", 12, "one byte …"},
		{"ääää", 7, "ää…"},
		{"äääää", 8, "ää…"},
		{"日本語日本語", 10, "日本…"},
		{"bad \xff utf8", 20, "bad \uFFFD utf8"},
		{"a\u202Eb\u2066c\u200bd\ufeffe\ue000f", 20, "a b c d e f"},
		{"日本語", 4, "…"},
		{"ab", 3, "ab"},
		{"abcd", 3, "…"},
	} {
		if got := OneLine(tt.in, tt.limit); got != tt.want {
			t.Errorf("OneLine(%q, %d) = %q; want %q", tt.in, tt.limit, got, tt.want)
		}
	}
}

func FuzzOneLine(f *testing.F) {
	f.Add("a\nb", 3)
	f.Add("ä\u2028\x85\xff", 5)
	f.Fuzz(func(t *testing.T, s string, limit int) {
		if limit < 3 || limit > 1<<16 {
			return
		}
		got := OneLine(s, limit)
		if len(got) > limit || !utf8.ValidString(got) ||
			strings.ContainsAny(got, "\n\r\x00\u2028\u0085") {
			t.Errorf("OneLine(%q, %d) = %q", s, limit, got)
		}
	})
}
