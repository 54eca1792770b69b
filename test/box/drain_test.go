//go:build box

package box

import (
	"bufio"
	"context"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
)

// TestPlannedStop restarts Envoy while a connection goes on that nobody ends, and then stops it
// when it is idle: the restart keeps the jumps, so that new connections wait for Envoy's own start
// only, and the stop takes them out before nobody accepts any more.
func TestPlannedStop(t *testing.T) {
	t.Parallel()
	v := ready(t, options{})
	held, err := v.lab.VM.DialAs(context.Background(), 12345, vip)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if _, err := io.WriteString(held, "GET / HTTP/1.1\r\nHost: held\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if resp, err := http.ReadResponse(bufio.NewReader(held), nil); err != nil ||
		resp.StatusCode != http.StatusOK {
		t.Fatal(resp, err)
	}

	jumps := v.watchJump()
	load := v.startLoad(100)
	time.Sleep(time.Second)
	start := time.Now()
	v.run("systemctl", "restart", "service-proxy-envoy.service")
	took := time.Since(start)
	v.eventually(30*time.Second, "the service answers through Envoy", v.checkVIP)
	load.outage(t, "a restart with one connection that went on")
	t.Logf("it took %.1f s", took.Seconds())
	if out := jumps(); out != "" {
		t.Errorf("the jump was taken out for a restart:\n%s", out)
	}
	if took < 5*time.Second {
		t.Errorf("the restart took %v: the old connection was not waited for", took)
	}

	held.Close()
	v.eventually(30*time.Second, "ready again", func() error {
		_, err := v.try("service-proxy-agent", "wait", "--timeout", "1s")
		return err
	})
	v.run("systemctl", "stop", "service-proxy-envoy.service")
	if rules := v.run("iptables-save", "-t", "nat"); strings.Contains(rules,
		"-A OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT") || !strings.Contains(rules, "SERVICE_PROXY_SERVICE_CIDRS") {
		t.Errorf("Envoy is stopped; want the chains without the jump, have\n%s", rules)
	}
	v.run("systemctl", "start", "service-proxy-envoy.service")
	v.eventually(30*time.Second, "the service answers through Envoy", v.checkVIP)
}
