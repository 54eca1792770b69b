//go:build box

package box

import (
	"fmt"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/test/platform/authority"
)

// checkProtected does with deploy/examples/web-config.yml what its comments say: the agent reads it
// in the unit's sandbox, and serves by TLS with a password. It leaves things as they were.
func (v *VM) checkProtected() {
	v.t.Helper()
	ca, err := authority.New()
	if err != nil {
		v.t.Fatal(err)
	}
	dir := "etc/service-proxy-agent"
	if _, err := ca.Files(filepath.Join(v.root, dir), "metrics", "127.0.0.1"); err != nil {
		v.t.Fatal(err)
	}
	text := v.example("web-config.yml")
	v.write(dir+"/web-config.yml", text, 0o600)
	commented := func(pattern string) string {
		lines := regexp.MustCompile(`(?m)^# +(`+pattern+`.*)$`).FindAllStringSubmatch(text, -1)
		if len(lines) != 2 {
			v.t.Fatalf("the example has %d comments %s", len(lines), pattern)
		}
		return fmt.Sprintf("%s\n%s\n", lines[0][1], lines[1][1])
	}
	v.run("bash", "-euc", commented("ch(own|mod) "))
	v.write("etc/default/service-proxy-agent", commented("SERVICE_PROXY_AGENT_"), 0o644)
	v.run("systemctl", "restart", "service-proxy-agent")
	v.eventually(30*time.Second, "metrics by TLS and password", func() error {
		out, err := v.try("curl", "-sSf", "--cacert", "/"+dir+"/ca.crt", "-u", "prometheus:change-me",
			"https://127.0.0.1:9460/metrics")
		if err == nil && !strings.Contains(out, "\nservice_proxy_agent_ready ") {
			err = fmt.Errorf("%q", out)
		}
		return err
	})
	v.run("sh", "-euc", "cd /"+dir+"; rm web-config.yml metrics.* ca.crt /etc/default/service-proxy-agent")
	v.run("systemctl", "restart", "service-proxy-agent")
}
