//go:build browser

package page

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestInBrowser opens the pages in Chromium: at the width of a phone and of a wide screen, in light
// and dark, and on paper. Nothing may stand out at the right, nothing may be asked for, and nothing
// is complained of. PAGES is a folder for the pages and their pictures, for people and for a
// validator.
func TestInBrowser(t *testing.T) {
	dir := os.Getenv("PAGES")
	if dir == "" {
		dir = t.TempDir()
	}
	dir, err := filepath.Abs(dir)
	must(t, err)
	must(t, os.MkdirAll(dir, 0o755))
	c := startChromium(t)
	for name, html := range pages(t) {
		file := filepath.Join(dir, name+".html")
		must(t, os.WriteFile(file, []byte(html), 0o644))
		for _, look := range []struct {
			width         int
			scheme, media string
		}{{400, "light", "screen"}, {400, "dark", "screen"}, {1600, "light", "screen"},
			{1600, "dark", "screen"}, {800, "dark", "print"}} {
			c.open(t, "file://"+file, look.width, look.scheme, look.media)
			var wide int
			c.evaluate(t, "document.documentElement.scrollWidth", &wide)
			if wide > look.width {
				t.Errorf("%s at %d: %d wide", name, look.width, wide)
			}
			// Nothing that can be seen reaches out of it either: a cell cut off is as bad.
			var cut []string
			c.evaluate(t, cutOff, &cut)
			if len(cut) > 0 {
				t.Errorf("%s at %d: cut off: %q", name, look.width, cut)
			}
			c.shoot(t, filepath.Join(dir, fmt.Sprintf("%s-%d-%s-%s.png", name, look.width, look.scheme,
				look.media)))
		}
	}
	for _, e := range c.events {
		switch url := e.Params.Request.URL; {
		case e.Method == "Network.requestWillBeSent" && !strings.HasPrefix(url, "file://"+dir) &&
			url != "about:blank":
			t.Errorf("it asks for %s", url)
		case e.Method == "Log.entryAdded":
			t.Errorf("the browser says %s", e.Params.Entry.Text)
		}
	}
}

// cutOff are the elements whose text is wider than they are, where nothing scrolls.
const cutOff = `[...document.querySelectorAll("main *")].filter(e =>
	e instanceof HTMLElement && e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 1 &&
	getComputedStyle(e).display != "inline" && !e.closest(".wide, pre")).slice(0, 5).
	map(e => e.tagName + "." + e.className + " " + e.textContent.slice(0, 60))`

// chromium is a browser that is told what to do by its DevTools protocol, on a pipe.
type chromium struct {
	in      io.Writer
	out     *bufio.Reader
	session string
	last    int
	events  []event
}

// event is a message of the browser's: an answer, or that something happened.
type event struct {
	ID     int
	Method string
	Error  *struct{ Message string }
	Result json.RawMessage
	Params struct {
		Request struct{ URL string }
		Entry   struct{ Text string }
	}
}

func startChromium(t *testing.T) *chromium {
	t.Helper()
	path := ""
	for _, name := range []string{"chromium-headless-shell", "chromium"} {
		if found, err := exec.LookPath(name); err == nil && path == "" {
			path = found
		}
	}
	if path == "" {
		t.Fatal("no Chromium: apt-get install chromium-headless-shell")
	}
	cmd := exec.CommandContext(t.Context(), path, "--headless", "--no-sandbox", "--disable-gpu",
		"--remote-debugging-pipe", "--user-data-dir="+t.TempDir(), "--hide-scrollbars", "about:blank")
	itsIn, in, err := os.Pipe()
	must(t, err)
	out, itsOut, err := os.Pipe()
	must(t, err)
	cmd.ExtraFiles = []*os.File{itsIn, itsOut}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	must(t, cmd.Start())
	itsIn.Close()
	itsOut.Close()
	must(t, out.SetDeadline(time.Now().Add(5*time.Minute)))
	c := &chromium{in: in, out: bufio.NewReader(out)}
	t.Cleanup(func() {
		in.Close()
		_ = cmd.Process.Kill() // it has ended, or is to
		_ = cmd.Wait()
		out.Close()
		if t.Failed() {
			t.Logf("%s", stderr.String())
		}
	})
	var target struct{ TargetID string }
	c.call(t, "Target.createTarget", map[string]any{"url": "about:blank"}, &target)
	var attached struct{ SessionID string }
	c.call(t, "Target.attachToTarget", map[string]any{"targetId": target.TargetID, "flatten": true},
		&attached)
	c.session = attached.SessionID
	for _, domain := range []string{"Page", "Network", "Log"} {
		c.call(t, domain+".enable", nil, nil)
	}
	return c
}

// call asks for something and waits for the answer.
func (c *chromium) call(t *testing.T, method string, params map[string]any, result any) {
	t.Helper()
	c.last++
	message := map[string]any{"id": c.last, "method": method}
	if params != nil {
		message["params"] = params
	}
	if c.session != "" {
		message["sessionId"] = c.session
	}
	text, err := json.Marshal(message)
	must(t, err)
	_, err = c.in.Write(append(text, 0))
	must(t, err)
	e := c.wait(t, func(e event) bool { return e.ID == c.last })
	if e.Error != nil {
		t.Fatalf("%s: %s", method, e.Error.Message)
	}
	if result != nil {
		must(t, json.Unmarshal(e.Result, result))
	}
}

// wait reads until a message is what is waited for. Events are kept.
func (c *chromium) wait(t *testing.T, is func(event) bool) event {
	t.Helper()
	for {
		text, err := c.out.ReadBytes(0)
		if errors.Is(err, io.EOF) {
			t.Fatal("the browser has ended")
		}
		must(t, err)
		var e event
		must(t, json.Unmarshal(bytes.TrimSuffix(text, []byte{0}), &e))
		if e.Method != "" {
			c.events = append(c.events, e)
		}
		if is(e) {
			return e
		}
	}
}

func (c *chromium) open(t *testing.T, url string, width int, scheme, media string) {
	t.Helper()
	c.call(t, "Emulation.setDeviceMetricsOverride", map[string]any{"width": width, "height": 900,
		"deviceScaleFactor": 1, "mobile": width < 600}, nil)
	c.call(t, "Emulation.setEmulatedMedia", map[string]any{"media": media, "features": []any{
		map[string]any{"name": "prefers-color-scheme", "value": scheme}}}, nil)
	c.call(t, "Page.navigate", map[string]any{"url": url}, nil)
	c.wait(t, func(e event) bool { return e.Method == "Page.loadEventFired" })
}

func (c *chromium) evaluate(t *testing.T, expression string, value any) {
	t.Helper()
	var r struct {
		Result struct{ Value json.RawMessage }
	}
	c.call(t, "Runtime.evaluate", map[string]any{"expression": expression, "returnByValue": true}, &r)
	must(t, json.Unmarshal(r.Result.Value, value))
}

func (c *chromium) shoot(t *testing.T, file string) {
	t.Helper()
	var r struct{ Data string }
	c.call(t, "Page.captureScreenshot", map[string]any{"captureBeyondViewport": true}, &r)
	png, err := base64.StdEncoding.DecodeString(r.Data)
	must(t, err)
	must(t, os.WriteFile(file, png, 0o644))
}
