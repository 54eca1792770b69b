package main

import (
	"bufio"
	"context"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/explain"
)

// TestServe: the address may stand behind a space; what is printed opens the page, and is nowhere
// else; Ctrl-C ends it with 0.
func TestServe(t *testing.T) {
	for _, args := range [][]string{{"--serve", "127.0.0.1:0"}, {"--serve=[::1]:0"},
		{"localhost:0", "--serve"}} {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		out, in := io.Pipe()
		root := rootCommand()
		root.SetArgs(append([]string{"status"}, args...))
		root.SetOut(in)
		ended := make(chan error, 1)
		go func() { ended <- root.ExecuteContext(ctx); in.Close() }()
		printed := bufio.NewReader(out)
		link, err := printed.ReadString('\n')
		if err != nil {
			t.Fatalf("%q: %v, %v", args, err, <-ended)
		}
		link = strings.TrimSpace(link)
		rest := make(chan string, 1)
		go func() { text, _ := io.ReadAll(printed); rest <- string(text) }()
		client := http.Client{Timeout: 30 * time.Second,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
		res, err := client.Get(link)
		if err != nil {
			t.Fatalf("%q: %v", args, err)
		}
		res.Body.Close()
		if res.StatusCode != 303 || !strings.Contains(link, res.Header.Get("Location")+"open/") {
			t.Errorf("%q: %d, %v", args, res.StatusCode, res.Header)
		}
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("%q: %v", args, err)
		}
		token := link[strings.LastIndex(link, "/")+1:]
		if text := <-rest; strings.Contains(text, token) || !strings.Contains(text, " -L ") {
			t.Errorf("%q: also printed: %q", args, text)
		}
		for _, file := range []string{"/proc/self/cmdline", "/proc/self/environ"} {
			if has, err := os.ReadFile(file); err != nil || strings.Contains(string(has), token) {
				t.Errorf("%s has the token: %v", file, err)
			}
		}
	}
}

func TestServedText(t *testing.T) {
	const link = "http://127.0.0.1:15080/FOLDER/open/TOKEN"
	at := netip.MustParseAddrPort("127.0.0.1:15080")
	for host, want := range map[string]string{
		"web-1":                  "gcloud compute ssh web-1 -- -N -L 15080:127.0.0.1:15080",
		"web-1.c.p.internal":     "ssh web-1 --",
		"":                       "ssh VM --",
		"\x1b[31m":               "ssh �[31m --",
		strings.Repeat("x", 300): "x… --",
	} {
		text := servedText(link, at, host)
		if !strings.HasPrefix(text, link+"\n") || !strings.Contains(text, want) {
			t.Errorf("%q: %s", host, text)
		}
	}
}

// TestFormQuestion: the form takes what the command takes, and says what is wrong in inert words.
func TestFormQuestion(t *testing.T) {
	web := netip.MustParseAddrPort("10.0.0.1:80")
	for query, want := range map[string]explain.Question{
		"to=10.0.0.1:80": {To: web},
		"to=10.0.0.1:80&direction=outbound&uid=nobody":   {To: web},
		"to=10.0.0.1:80&direction=inbound&uid=":          {To: web, Inbound: true},
		"to=10.0.0.1:80&try=1&udp=1&gid=0&config=/etc/x": {To: web},
	} {
		form, err := url.ParseQuery(query)
		if err != nil {
			t.Fatal(err)
		}
		if have, err := formQuestion(form); err != nil || have != want {
			t.Errorf("%q: %+v, %v", query, have, err)
		}
	}
	for query, want := range map[string]string{
		"":                                       "ADDRESS:PORT",
		"to=web.test:80":                         "is no address",
		"to=10.0.0.1:0":                          "is not a port",
		"to=10.0.0.1:80&direction=sideways":      `the direction is "sideways"`,
		"to=10.0.0.1:80&direction=%1b%00":        "use outbound or inbound",
		"to=10.0.0.1:80&direction=inbound&uid=0": "leave the user empty",
	} {
		form, err := url.ParseQuery(query)
		if err != nil {
			t.Fatal(err)
		}
		_, err = formQuestion(form)
		if err == nil || !strings.Contains(wrong(err), want) ||
			strings.ContainsAny(wrong(err), "\x00\x1b") {
			t.Errorf("%q: %v; want %q", query, err, want)
		}
	}
}
