package envoyadmin

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
)

// FailHealthCheck has Envoy tell everyone that it is about to end: its state becomes DRAINING.
// See docs/design/facts.md#envoy-drains-listener.
func (c *Client) FailHealthCheck(ctx context.Context) error {
	return c.post(ctx, "/healthcheck/fail")
}

// DrainListeners has Envoy send its clients away: HTTP/1 by Connection: close, HTTP/2 by GOAWAY.
// New connections are still accepted (skip_exit). See docs/design/facts.md#envoy-drains-listener.
func (c *Client) DrainListeners(ctx context.Context) error {
	return c.post(ctx, "/drain_listeners?graceful&skip_exit")
}

func (c *Client) post(ctx context.Context, path string) error {
	return c.do(ctx, order, http.MethodPost, path, c.ShortLimit, maxShort, func(body io.Reader) error {
		_, err := io.Copy(io.Discard, body)
		return err
	})
}

// Connections asks how many downstream connections Envoy's workers hold, those of the admin
// interface not counted. It walks every stat: half a second of Envoy's main thread with 10,000
// clusters, while its workers go on.
func (c *Client) Connections(ctx context.Context) (n int, err error) {
	err = c.statLines(ctx, `^listener\..*\.downstream_cx_active$`, func(name, value string) error {
		if !strings.HasPrefix(name, "listener.") {
			return errStatLines
		}
		// listener.0.0.0.0_15001.downstream_cx_active is the sum of
		// listener.0.0.0.0_15001.worker_0.downstream_cx_active and so on.
		if strings.HasPrefix(name, "listener.admin.") || strings.Contains(name, ".worker_") ||
			strings.Contains(name, ".main_thread.") {
			return nil
		}
		active, err := strconv.Atoi(value)
		if err != nil {
			return fmt.Errorf("%w: %s is %q", ErrNotJSON, name, value)
		}
		n += active
		return nil
	})
	if err != nil {
		return 0, err
	}
	return n, nil
}
