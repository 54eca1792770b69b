package bootstrap

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// DefaultDrain is how long Drain waits for connections to end: Envoy's unit gives --drain-time-s the same.
const DefaultDrain = 10 * time.Second

// handover is how long a stop takes at least: the agent asks for Envoy's state each second, and the jumps must be out before
// nobody accepts any more.
const handover = 2500 * time.Millisecond

// Drain asks Envoy to send its clients away and waits until they have gone, at most limit; it is what ExecStop= of Envoy's unit runs before TERM. New
// connections are still accepted meanwhile (skip_exit).
//
// When Envoy is to be stopped, its state becomes DRAINING, by which the agent takes the jumps out: without Envoy the VM reaches
// its services directly. When it is only restarted the state stays LIVE and the jumps stay in, so that the gap for new
// connections is Envoy's own start, however long an old connection is waited for.
//
// mainPID is systemd's $MAINPID; empty says that Envoy has ended by itself, and there is nothing to do. admin is the address of the
// admin interface, HOST:PORT or unix://PATH.
func Drain(ctx context.Context, admin, mainPID string, limit time.Duration) error {
	if mainPID == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		network, address := "tcp", admin
		if path, ok := strings.CutPrefix(admin, "unix://"); ok {
			network, address = "unix", path
		}
		return (&net.Dialer{Timeout: 2 * time.Second}).DialContext(ctx, network, address)
	}}}
	// Everyone is sent away: HTTP/1 by Connection: close, HTTP/2 by GOAWAY.
	paths := []string{"/drain_listeners?graceful&skip_exit"}
	var jumpsOut time.Time
	if job, err := systemd.Job(ctx, systemd.EnvoyUnit); err != nil || job != "restart" {
		paths = append([]string{"/healthcheck/fail"}, paths...)
		if agent, err := systemd.UnitState(ctx, systemd.AgentUnit); err != nil || agent.Active == "active" { // at shutdown it has stopped before
			jumpsOut = time.Now().Add(handover)
		}
	}
	for _, path := range paths {
		if err := post(ctx, client, path); err != nil {
			return fmt.Errorf("drain Envoy: %w", err)
		}
	}
	// /stats walks every stat: half a second of Envoy's main thread with 10,000 clusters, while its workers go on.
	for wait := 100 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		n, err := connections(ctx, client)
		if err != nil && ctx.Err() == nil {
			return fmt.Errorf("drain Envoy: %w", err)
		}
		if err == nil && n == 0 && time.Now().After(jumpsOut) || !sleep(ctx, wait) {
			return nil
		}
	}
}

func post(ctx context.Context, client *http.Client, path string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://envoy"+path, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("post %s: status %d", path, resp.StatusCode)
	}
	return nil
}

// connections is how many downstream connections Envoy's workers hold, those of the admin interface not counted.
func connections(ctx context.Context, client *http.Client) (n int, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, `http://envoy/stats?filter=^listener\..*\.downstream_cx_active$`, nil)
	if err != nil {
		return 0, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return 0, errors.New("get /stats: status " + strconv.Itoa(resp.StatusCode))
	}
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), ": ")
		// listener.0.0.0.0_15001.downstream_cx_active is the sum of listener.0.0.0.0_15001.worker_0.downstream_cx_active and so on.
		if strings.HasPrefix(name, "listener.admin.") || strings.Contains(name, ".worker_") || strings.Contains(name, ".main_thread.") {
			continue
		}
		active, err := strconv.Atoi(value)
		if err != nil {
			return 0, fmt.Errorf("get /stats: %q", lines.Text())
		}
		n += active
	}
	return n, lines.Err()
}
