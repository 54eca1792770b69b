//go:build lab

package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// served looks at the page of `status --serve` as a browser of an ordinary user does, whose
// connections the rules redirect: those to the page they leave alone.
func served(t *testing.T, m *mesh.Mesh, a *mesh.Agent) {
	t.Helper()
	binary, err := mesh.Binary()
	must(t, err)
	cmd := m.VM.Command(t.Context(), binary, "status", "--serve", "127.0.0.1:0", "--proxy-user",
		fmt.Sprint(lab.EnvoyUID), "--envoy-log", m.Envoy.LogPath)
	cmd.Env = a.Environ()
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, lab.Start(cmd))
	link, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("it prints nothing: %v: %v: %s", err, cmd.Wait(), stderr.String())
	}
	base, err := url.Parse(strings.TrimSpace(link))
	must(t, err)
	client := m.VM.HTTPAs(1000)
	client.Timeout = 30 * time.Second
	cookie := ""
	ask := func(path string, want int) (body string, header http.Header) {
		t.Helper()
		to, err := base.Parse(path)
		must(t, err)
		req, err := http.NewRequest(http.MethodGet, to.String(), nil)
		must(t, err)
		req.Header.Set("Cookie", cookie)
		res, err := client.Do(req)
		must(t, err)
		defer res.Body.Close()
		text, err := io.ReadAll(res.Body)
		must(t, err)
		if res.StatusCode != want {
			t.Fatalf("%s: %d, want %d: %.500s", path, res.StatusCode, want, text)
		}
		return string(text), res.Header
	}
	if body, _ := ask("/", 403); strings.Contains(body, "route-web") || strings.Contains(body, "10.10.") {
		t.Errorf("a stranger is told %s", body)
	}
	_, header := ask(base.Path, 303)
	cookie, _, _ = strings.Cut(header.Get("Set-Cookie"), ";")
	home, err := base.Parse(header.Get("Location"))
	must(t, err)
	base = home
	page, _ := ask("", 200)
	for _, want := range []string{"10.10.0.9", "&lt;script&gt;", "http-equiv=\"refresh\""} {
		if !strings.Contains(page, want) {
			t.Errorf("the page lacks %q: %s", want, page)
		}
	}
	answer, _ := ask("explain?to=10.10.0.9:81&uid=1000&direction=outbound", 200)
	if !strings.Contains(answer, "10.10.0.9:81/tcp by uid 1000 is intercepted") {
		t.Errorf("the answer is %s", answer)
	}
	for _, body := range []string{page, answer} {
		if strings.Contains(body, "<script") || strings.ContainsAny(body, "\x1b\x07\u202e") {
			t.Errorf("a name is not inert in %s", body)
		}
	}
	wrong, _ := ask("explain?to=web.test:80&uid=%3Cscript%3E", 200)
	if !strings.Contains(wrong, "is no address") || strings.Contains(wrong, "<script") {
		t.Errorf("a wrong question: %s", wrong)
	}
	must(t, cmd.Process.Signal(syscall.SIGINT))
	if err := cmd.Wait(); err != nil || stderr.String() != "" {
		t.Errorf("Ctrl-C: %v: %s", err, stderr.String())
	}
}
