package envoyadmin

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// inTime runs test in a time of its own, with a client of an Envoy that knows itself and leaves
// dumps to answer, which writes the body.
func inTime(t *testing.T, answer func(path string, body func(string)),
	test func(*testing.T, *Client)) {
	synctest.Test(t, func(t *testing.T) {
		c, err := New("127.0.0.1:15000")
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		c.http.Transport.(*http.Transport).DialContext = func(context.Context, string, string) (
			net.Conn, error) {
			ours, envoys := net.Pipe()
			c.dials.Add(1)
			go func() {
				defer envoys.Close()
				for from := bufio.NewReader(envoys); ; {
					request, err := http.ReadRequest(from)
					if err != nil {
						return
					}
					if request.URL.Path == "/server_info" {
						up := int(time.Since(began).Seconds())
						info := strings.Replace(infoAnswer, `"100s"`, fmt.Sprintf(`"%ds"`, 100+up), 1)
						fmt.Fprintf(envoys, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(info), info)
						continue
					}
					fmt.Fprint(envoys, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
					answer(request.URL.String(), func(s string) { fmt.Fprint(envoys, s) })
					return
				}
			}()
			return ours, nil
		}
		test(t, c)
		time.Sleep(2 * time.Hour) // until no answer is under way
		c.Close()
	})
}

// TestPatience: behind each dump that did not come in time the next is awaited for twice as long,
// up to two minutes, and behind one that came four times what that took.
func TestPatience(t *testing.T) {
	var takes atomic.Int64 // ns; one that was given up still asks
	inTime(t, func(path string, body func(string)) {
		if path == dynamicPath {
			time.Sleep(time.Duration(takes.Load()))
		}
		body(`{}`)
	}, func(t *testing.T, c *Client) {
		for i, want := range []struct {
			takes, after time.Duration
			err          error
		}{
			{time.Hour, 20 * time.Second, ErrTimeout},
			{time.Hour, 40 * time.Second, ErrTimeout},
			{time.Hour, 80 * time.Second, ErrTimeout},
			{time.Hour, 2 * time.Minute, ErrTimeout},
			{time.Hour, 2 * time.Minute, ErrTimeout},
			{100 * time.Second, 100 * time.Second, nil},
			{time.Hour, 2 * time.Minute, ErrTimeout},
			{time.Second, time.Second, nil},
			{time.Hour, 20 * time.Second, ErrTimeout},
			{10 * time.Second, 10 * time.Second, nil},
			{39 * time.Second, 39 * time.Second, nil},
		} {
			takes.Store(int64(want.takes))
			began := time.Now()
			_, err := c.Listeners(t.Context())
			if took := time.Since(began); took != want.after || !errors.Is(err, want.err) {
				t.Errorf("dump %d: %v after %v", i, err, took)
			}
		}
	})
}
