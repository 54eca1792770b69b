package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/exitcode"
	"github.com/service-proxy-agent/service-proxy-agent/internal/server"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
)

// Wrong usage is 64 with every command, before anything is done (and what is here would do no harm
// to this machine if it were).
func TestWrongUsage(t *testing.T) {
	for _, args := range []string{
		"", "nonsense", "run x", "run --nonsense", "run --log-level loud", "run --when-envoy-down maybe", "run --listen x",
		"run --metrics-listen x", "run --metrics-listen 127.0.0.1:15020", "run --web-config-file /etc/web-config.yml",
		"bootstrap --remove --rollback", "bootstrap --rollback --rotate-logs", "bootstrap --rotate-logs --log-level loud", "bootstrap --rotate-logs --log-level fatal",
		"status -o yaml", "status --watch --html x", "status x", "status --serve 0.0.0.0:0", "status --serve :0", "status --serve=x", "status --serve x y",
		"status --serve=127.0.0.1:0 x", "status --serve -o json", "status --serve --history", "status --serve -w", "status --serve --html x", "wait --listen x", "wait --timeout soon", "wait --timeout -1s", "drain --limit x", "drain --limit -1s", "help nonsense", "help run x", "version x", "version -o yaml", "cleanup x",
		"diff x", "diff -o yaml", "diff --config=", "diff --config /no/such/file",
		"explain", "explain web.test:80", "explain 10.0.0.1", "explain 10.0.0.1:80 -o yaml", "explain 10.0.0.1:0",
		"explain 10.0.0.1:80 --inbound --uid 0", "explain 10.0.0.1:80 --in-interface eth0", "explain 10.0.0.1:80 x",
		"bundle x", "bundle --file=", "bundle --envoy-admin x",
		"doctor --envoy-admin x", "explain 10.0.0.1:80 --envoy-admin x", "diff --envoy-admin 127.0.0.1:0",
	} {
		if have := execute(t.Context(), strings.Fields(args)); have != exitcode.Usage {
			t.Errorf("%q: exit code %d, want %d", args, have, exitcode.Usage)
		}
	}
	bad := filepath.Join(t.TempDir(), "bad.json")
	if err := os.WriteFile(bad, []byte(`{"service":{"serving-ports":[0]}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if have := execute(t.Context(), []string{"diff", "--config", bad}); have != exitcode.Usage {
		t.Errorf("diff with a malformed attribute: exit code %d, want %d", have, exitcode.Usage)
	}
	t.Setenv("SERVICE_PROXY_AGENT_TIMEOUT", "soon")
	if have := execute(t.Context(), []string{"wait"}); have != exitcode.Usage {
		t.Errorf("a bad environment twin: exit code %d, want %d", have, exitcode.Usage)
	}
}

// With the HTTP listener off, wait asks the socket.
func TestWaitWithoutListener(t *testing.T) {
	t.Setenv("RUNTIME_DIRECTORY", t.TempDir())
	t.Setenv("SERVICE_PROXY_AGENT_LISTEN", "")
	wait := func(limit time.Duration) int {
		return execute(t.Context(), []string{"wait", "--timeout", limit.String()})
	}
	if have := wait(10 * time.Millisecond); have != exitcode.No {
		t.Errorf("without an agent: exit code %d, want %d", have, exitcode.No)
	}
	socket, err := server.Socket(server.Dir())
	if err != nil {
		t.Fatal(err)
	}
	var newest atomic.Value
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = socket.Serve(ctx, server.Answers{Status: newest.Load}, nil)
	}()
	defer func() { stop(); <-ended }()
	for name, tt := range map[string]struct {
		status status.Status
		want   int
	}{
		"ready":     {status.Status{Ready: true, Heartbeat: time.Now()}, 0},
		"not ready": {status.Status{NotReady: "no pass yet"}, exitcode.No},
		"stuck":     {status.Status{Ready: true, Heartbeat: time.Now().Add(-6 * time.Minute)}, exitcode.No},
	} {
		newest.Store(tt.status)
		if have := wait(300 * time.Millisecond); have != tt.want {
			t.Errorf("%s: exit code %d, want %d", name, have, tt.want)
		}
	}
	newest.Store(status.Status{})
	time.AfterFunc(100*time.Millisecond, func() {
		newest.Store(status.Status{Ready: true, Heartbeat: time.Now()})
	})
	if have := wait(5 * time.Second); have != 0 {
		t.Errorf("ready in time: exit code %d", have)
	}
}
