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

// TestPlannedStop restarts Envoy while a connection goes on that nobody ends, and then stops it when it is idle: the restart
// keeps the jumps, so that new connections wait for Envoy's own start only, and the stop takes them out before nobody
// accepts any more.
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
	if resp, err := http.ReadResponse(bufio.NewReader(held), nil); err != nil || resp.StatusCode != http.StatusOK {
		t.Fatal(resp, err)
	}

	load := v.startLoad(100)
	time.Sleep(time.Second)
	start := time.Now()
	v.run("systemctl", "restart", "service-proxy-envoy.service")
	took := time.Since(start)
	v.eventually(30*time.Second, "the service answers through Envoy", v.checkVIP)
	total, failed, gap := load.stop()
	t.Logf("a restart took %.1f s with one connection that went on; of %d new ones %d failed, the longest time without one was %v", took.Seconds(), total, failed, gap)
	if gap > 2*time.Second {
		t.Errorf("the gap for new connections was %v, want at most 2 s", gap)
	}
	if took < 5*time.Second {
		t.Errorf("the restart took %v: the old connection was not waited for", took)
	}

	held.Close()
	v.eventually(30*time.Second, "ready again", func() error { _, err := v.try("service-proxy-agent", "wait", "--timeout", "1s"); return err })
	v.run("systemctl", "stop", "service-proxy-envoy.service")
	if rules := v.run("iptables-save", "-t", "nat"); strings.Contains(rules, "-A OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT") || !strings.Contains(rules, "SERVICE_PROXY_SERVICE_CIDRS") {
		t.Errorf("Envoy is stopped; want the chains without the jump, have\n%s", rules)
	}
	v.run("systemctl", "start", "service-proxy-envoy.service")
	v.eventually(30*time.Second, "the service answers through Envoy", v.checkVIP)
}
