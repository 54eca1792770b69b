package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/internal/exitcode"
	"github.com/service-proxy-agent/service-proxy-agent/internal/server"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/test/schema"
)

// watched is a watcher whose daemon is a function of how often it was asked, from 0.
type watched struct {
	watcher
	out, errors bytes.Buffer
	asked       int
}

func newWatched(answer func(n int) (status.Status, error)) *watched {
	w := &watched{}
	w.watcher = watcher{tell: teller{out: &w.out}, errors: &w.errors,
		window: func() (int, bool) { return 0, false },
		ask: func(context.Context) (body []byte, s status.Status, err error) {
			if s, err = answer(w.asked); err == nil {
				body, err = json.MarshalIndent(s, "", "  ")
			}
			w.asked++
			return body, s, err
		}}
	return w
}

// runs has it look for so long, and returns the exit code.
func (w *watched) runs(t *testing.T, d time.Duration) int {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	var exit *exitError
	err := w.run(ctx)
	if errors.As(err, &exit) && exit.err == nil {
		return exit.code
	}
	if err != nil {
		t.Errorf("it says %v once more", err)
	}
	return 0
}

// aStatus is healthy, and told after so many passes.
func aStatus(n int) status.Status {
	return status.Status{Version: "1.2.3", Started: time.Unix(946_681_200, 0).UTC(), Heartbeat: time.Now(),
		Mode: "intercepting", Ready: true, Passes: uint64(n), Cost: status.Cost{Resident: uint64(n << 20)},
		Channels: []status.Channel{{Name: "serial", Enabled: true, Up: true, Written: uint64(n)}}}
}

var (
	sick = []symptom.Finding{
		{ID: symptom.EnvoyDown, Severity: symptom.Error, Cause: "Envoy is not running"}}
	errGone = errors.New("nothing listens")
)

// a minute: it is well, sick from 20 s on, gone from 40 s on, and well again at 50 s.
func aMinute(n int) (status.Status, error) {
	s := aStatus(n)
	switch {
	case n >= 40 && n < 50:
		return s, errGone
	case n >= 20 && n < 40:
		s.Findings = sick
	}
	return s, nil
}

// TestWatchText: where nobody can draw, a text is printed when something other than ages and counts
// has changed, and the exit code is that of the last look.
func TestWatchText(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWatched(aMinute)
		if code := w.runs(t, 60*time.Second); code != 0 {
			t.Errorf("exit code %d, want 0", code)
		}
		var heads []string
		for line := range strings.Lines(w.out.String()) {
			if strings.Contains(line, "ealthy: ") || strings.Contains(line, "no answer") {
				heads = append(heads, strings.TrimSpace(line))
			}
		}
		want := []string{"Healthy: intercepting", "Not healthy: Envoy is not running",
			"2000-01-01T00:00:40Z no answer from the agent: nothing listens; `systemctl status " +
				"service-proxy-agent` tells whether it runs", "Healthy: intercepting"}
		if strings.Join(heads, "\n") != strings.Join(want, "\n") || w.asked < 59 {
			t.Errorf("asked %d times, told %q, want %q", w.asked, heads, want)
		}
		for limit, want := range map[time.Duration]int{
			30 * time.Second: exitcode.No, 45 * time.Second: exitcode.NotKnown} {
			if code := newWatched(aMinute).runs(t, limit); code != want {
				t.Errorf("Ctrl-C after %v: exit code %d, want %d", limit, code, want)
			}
		}
	})
}

// TestWatchJSON: a line of JSON a change; that nobody answers is said elsewhere.
func TestWatchJSON(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWatched(aMinute)
		w.tell.json = true
		w.runs(t, 60*time.Second)
		var ids []string
		for line := range strings.Lines(w.out.String()) {
			schema.Valid(t, "status", []byte(line))
			var s status.Status
			if err := json.Unmarshal([]byte(line), &s); err != nil {
				t.Fatal(err)
			}
			id := "well"
			if len(s.Findings) > 0 {
				id = string(s.Findings[0].ID)
			}
			ids = append(ids, id)
		}
		if have := strings.Join(ids, " "); have != "well envoy-down well" ||
			strings.Count(w.errors.String(), "no answer from the agent: nothing listens") != 1 {
			t.Errorf("%s; errors: %s", have, w.errors.String())
		}
	})
}

// columns of the terminal that screen is.
const columns = 120

// screen is what a terminal shows after these bytes; its cursor must be seen, and lines go on, in
// the end. What is written behind its last column goes there.
func screen(t *testing.T, written string) (lines []string) {
	t.Helper()
	var rows [][]rune
	row, column, cursor, wraps := 0, 0, true, true
	for written != "" {
		text, rest, _ := strings.Cut(written, "\x1b[")
		for _, r := range text {
			if r == '\n' {
				row, column = row+1, 0
				continue
			}
			rows = append(rows, make([][]rune, max(0, row+1-len(rows)))...)
			at := min(column, columns-1)
			rows[row] = append(rows[row], make([]rune, max(0, at+1-len(rows[row])))...)
			rows[row][at], column = r, at+1
		}
		at := min(column, columns-1)
		switch written = rest; {
		case rest == "":
		case rest[0] == 'H':
			row, column, written = 0, 0, rest[1:]
		case rest[0] == 'K' || rest[0] == 'J':
			if row < len(rows) {
				rows[row] = rows[row][:min(at, len(rows[row]))]
			}
			if rest[0] == 'J' {
				rows = rows[:min(row, len(rows))]
			}
			written = rest[1:]
		case strings.HasPrefix(rest, "2J"):
			rows, written = nil, rest[2:]
		case strings.HasPrefix(rest, "?25"):
			cursor, written = rest[3] == 'h', rest[4:]
		case strings.HasPrefix(rest, "?7"):
			wraps, written = rest[2] == 'h', rest[3:]
		default:
			t.Fatalf("not known: %q", rest[:min(len(rest), 20)])
		}
	}
	if !cursor || !wraps {
		t.Errorf("cursor %v, lines that go on %v in the end", cursor, wraps)
	}
	for _, row := range rows {
		lines = append(lines, string(row))
	}
	return lines
}

// TestWatchTerminal: on a terminal it is drawn each second, in the window that there is.
func TestWatchTerminal(t *testing.T) {
	for _, tt := range []struct {
		name  string
		limit time.Duration
		rows  int
		holds func(lines []string) bool
	}{
		{"well", 15500 * time.Millisecond, 40, func(lines []string) bool {
			return lines[0] == "Healthy: intercepting" && strings.Contains(strings.Join(lines, "\n"), "15 MB") &&
				len(lines) < 20
		}},
		{"sick", 30 * time.Second, 40, func(lines []string) bool {
			return lines[0] == "Not healthy: Envoy is not running"
		}},
		{"gone: what was known stays, and grows old", 45500 * time.Millisecond, 40, func(lines []string) bool {
			text := strings.Join(lines, "\n")
			return strings.HasPrefix(text, "No answer from the agent: nothing listens; ") &&
				strings.Contains(text, "what it said last:\nNot healthy: Envoy is not running") &&
				strings.Contains(text, "last pass 6 s ago")
		}},
		{"well again: nothing of the longer text stays", 55500 * time.Millisecond, 40, func(lines []string) bool {
			return lines[0] == "Healthy: intercepting" && !strings.Contains(strings.Join(lines, "\n"), "said last")
		}},
		{"a small window", 10 * time.Second, 6, func(lines []string) bool {
			return len(lines) == 5 && lines[0] == "Healthy: intercepting" && strings.Contains(lines[4], " more lines")
		}},
		{"three rows", 10 * time.Second, 3, func(lines []string) bool {
			return len(lines) == 2 && lines[0] == "Healthy: intercepting" && !strings.Contains(lines[1], "more")
		}},
		{"two rows", 10 * time.Second, 2, func(lines []string) bool {
			return slices.Equal(lines, []string{"Healthy: intercepting"})
		}},
		{"a window of unknown size", 10 * time.Second, 0, func(lines []string) bool { return len(lines) > 6 }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWatched(aMinute)
				w.window = func() (int, bool) { return tt.rows, true }
				w.runs(t, tt.limit)
				if lines := screen(t, w.out.String()+" "); len(lines) == 0 || !tt.holds(lines[:len(lines)-1]) {
					t.Errorf("the screen is\n%s", strings.Join(lines, "\n"))
				}
			})
		})
	}
}

// TestWatchResized: another window is filled at once, not at the next look.
func TestWatchResized(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWatched(aMinute)
		rows, resized := 40, make(chan os.Signal)
		w.window, w.resized = func() (int, bool) { return rows, true }, resized
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { _ = w.run(ctx); close(ended) }()
		synctest.Wait()
		rows = 6
		resized <- unix.SIGWINCH
		synctest.Wait()
		cancel()
		<-ended
		if lines := screen(t, w.out.String()+" "); w.asked != 1 || len(lines) != 6 {
			t.Errorf("asked %d times; the screen is\n%s", w.asked, strings.Join(lines, "\n"))
		}
	})
}

// TestWatchInOneRow: what is there is the verdict, and nothing scrolls it away.
func TestWatchInOneRow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWatched(aMinute)
		w.window = func() (int, bool) { return 1, true }
		w.runs(t, 10*time.Second)
		if lines := screen(t, w.out.String()); !slices.Equal(lines, []string{"Healthy: intercepting"}) {
			t.Errorf("the screen is\n%s", strings.Join(lines, "\n"))
		}
	})
}

// TestWatchedByNobody: it ends when nobody reads any longer, also where nothing changes.
func TestWatchedByNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, out, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer out.Close()
		w := newWatched(func(n int) (status.Status, error) {
			if n == 5 {
				r.Close()
			}
			return aStatus(n), nil
		})
		w.tell.out = out
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		var exit *exitError
		if err := w.run(ctx); !errors.As(err, &exit) || exit.code != exitcode.NotKnown || w.asked != 6 {
			t.Errorf("asked %d times, %v", w.asked, err)
		}
	})
}

// TestWatchFullRow: a line that fills its row keeps its last letter.
func TestWatchFullRow(t *testing.T) {
	t.Setenv("COLUMNS", fmt.Sprint(columns))
	synctest.Test(t, func(t *testing.T) {
		words := strings.Repeat("x", columns-len("Not healthy: "))
		w := newWatched(func(n int) (status.Status, error) {
			s := aStatus(n)
			s.Findings = []symptom.Finding{{ID: symptom.EnvoyDown, Severity: symptom.Error, Cause: words}}
			return s, nil
		})
		w.window = func() (int, bool) { return 40, true }
		w.runs(t, 3*time.Second)
		if lines := screen(t, w.out.String()+" "); lines[0] != "Not healthy: "+words {
			t.Errorf("the screen is\n%s", strings.Join(lines, "\n"))
		}
	})
}

// TestWatchSuspended: on Ctrl-Z the shell gets its cursor and its long lines back, and on fg all is
// drawn anew over what it wrote.
func TestWatchSuspended(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWatched(aMinute)
		suspended, continued := make(chan os.Signal), make(chan os.Signal)
		w.window = func() (int, bool) { return 40, true }
		w.suspended, w.continued = suspended, continued
		w.suspend = func() error {
			screen(t, w.out.String()+" ")
			w.out.WriteString("\x1b[40;1H[1]+  Stopped")
			return nil
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { _ = w.run(ctx); close(ended) }()
		synctest.Wait()
		suspended <- unix.SIGTSTP
		synctest.Wait()
		stopped := w.out.Len()
		continued <- unix.SIGCONT
		synctest.Wait()
		drawn := w.out.String()[stopped:]
		if !strings.HasPrefix(drawn, toDraw+"\x1b[2J\x1b[H\x1b[KHealthy: intercepting\n") || w.asked != 1 {
			t.Errorf("asked %d times; then it drew %q", w.asked, drawn)
		}
		cancel()
		<-ended
	})
}

// TestStatusOfOlderAgent: it is put into the form that this program promises.
func TestStatusOfOlderAgent(t *testing.T) {
	t.Setenv("RUNTIME_DIRECTORY", t.TempDir())
	socket, err := server.Socket(server.Dir())
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	older := map[string]any{"version": "1.0.0", "heartbeat": "2026-11-28T12:00:00Z", "started": "2026-11-28T12:00:00Z",
		"mode": "hold", "ready": false, "bootstrap": map[string]any{}, "passes": 1, "drift_repaired": 0,
		"envoy": map[string]any{"admin": "x", "configured": false, "listeners": 0, "rejected": 0}}
	go func() {
		defer close(ended)
		_ = socket.Serve(ctx, server.Answers{Status: func() any { return older }}, nil)
	}()
	defer func() { stop(); <-ended }()
	body, s, err := askStatus(t.Context())
	if err != nil || s.Version != "1.0.0" {
		t.Fatalf("%+v, %v", s, err)
	}
	schema.Valid(t, "status", body)
}
