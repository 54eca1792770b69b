package supervisor

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"time"
)

// lookLimit is for one question.
const lookLimit = time.Second

// get asks the admin interface whose address Envoy has written into the file, on a connection of
// its own, and returns the beginning of the answer.
func get(file, path string) (string, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	address, network := string(bytes.TrimSpace(text)), "tcp"
	if strings.HasPrefix(address, "/") || strings.HasPrefix(address, "@") {
		network = "unix"
	}
	client := http.Client{Timeout: lookLimit, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, network, address)
		},
	}}
	resp, err := client.Get("http://envoy" + path)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
	return string(body), err
}

// look asks twice: what the process had been told before it answered the first, such as to close,
// is done when it answers the second. An Envoy without an admin interface has none to lose.
func look(file string) Admin {
	if info, err := os.Stat(file); err != nil || info.Size() == 0 {
		return AdminAnswers
	}
	for range 2 {
		_, err := get(file, "/ready")
		switch {
		case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, fs.ErrNotExist):
			return AdminGone
		case err != nil:
			return AdminUnknown
		}
	}
	return AdminAnswers
}

// listens says whether an Envoy has listeners, which another one without its control plane would
// not have. One that does not tell may have some.
func listens(file string) bool {
	body, err := get(file, "/listeners")
	return err != nil || strings.TrimSpace(body) != ""
}
