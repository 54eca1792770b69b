//go:build lab

package e2e

import (
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/agent"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// TestRuleRefused: the kernel refuses the rules that spare Envoy's own traffic. Outbound interception
// would loop without them and is left out, what else the kernel takes is installed and kept so, the
// refused rules are named in both families, and a change offers them again.
func TestRuleRefused(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, backend lab.Backend) {
		m, a := start(t, mesh.Options{Backend: backend, Config: services(), NoOwnerMatch: true})
		left := func(family string) string {
			return fmt.Sprintf(`The kernel refuses the %s rule "-A SERVICE_PROXY_OUTPUT -m owner --uid-owner %d -m comment --comment proxy-user -j RETURN": `, family, lab.EnvoyUID)
		}
		s, err := a.Wait(within(t, 20*time.Second), "the refused rules named", func(s agent.Status) bool {
			said := 0
			for _, f := range s.Findings {
				if f.ID == symptom.RuleRefused && (strings.HasPrefix(f.Cause, left("IPv4")) || strings.HasPrefix(f.Cause, left("IPv6"))) {
					said++
				}
			}
			return said == 2 && strings.HasPrefix(s.LastFailure, "The kernel refuses the ")
		})
		must(t, err)
		t.Log(s.LastFailure)
		if !strings.Contains(s.LastFailure, "nvalid argument") && backend == lab.NFT {
			t.Errorf("%q does not have the kernel's words", s.LastFailure)
		}
		if s.Ready || !strings.Contains(s.NotReady, "rules are not as wanted") {
			t.Errorf("ready: %v, %q", s.Ready, s.NotReady)
		}
		if n := metric(t, a, finding(symptom.RuleRefused)); n != 4 { // the user's and the group's, in two families
			t.Errorf("finding rules-not-applied: %v", n)
		}
		says(t, a, 0, 1, []string{`^error +The kernel refuses the IPv4 rule`, `^error +The kernel refuses the IPv6 rule`}, "status")
		if code, body, err := a.Get("/healthz"); err != nil || code != http.StatusOK {
			t.Errorf("/healthz: %d %q %v: a new VM has the same kernel", code, body, err)
		}
		// The rest is in: inbound goes through Envoy, and nothing is led outbound to where it could loop.
		inbound := func() {
			t.Helper()
			resp, err := m.Client.HTTP().Get("http://" + netip.AddrPortFrom(lab.VMAddr, mesh.AppPort).String() + "/")
			must(t, err)
			resp.Body.Close()
			if by := resp.Header.Get(controlplane.ServedByHeader); !strings.HasPrefix(by, "inbound-") {
				t.Errorf("inbound served by %q", by)
			}
		}
		inbound()
		escapes(t, m, web4)
		escapes(t, m, web6)
		have := chains(t, m)
		if strings.Contains(have, "-j SERVICE_PROXY_OUTPUT") || strings.Contains(have, "-m owner") || !strings.Contains(have, "-d 10.10.0.1/32") || !strings.Contains(have, "-d fd10::1/128") {
			t.Errorf("the chains:\n%s", have)
		}
		// Such rules are kept like any others, and the refused ones are not offered again and again.
		tried := func() (n float64) {
			for _, family := range []string{"IPv4", "IPv6"} {
				n += metric(t, a, fmt.Sprintf(`applies_total{family=%q,outcome="refused"}`, family))
			}
			return n
		}
		if n := tried(); n != 2 {
			t.Errorf("offered %v times in two families", n)
		}
		_, err = m.VM.Run(t.Context(), "iptables", "-w", "-t", "nat", "-D", "PREROUTING", "-p", "tcp", "-j", "SERVICE_PROXY_INBOUND")
		must(t, err)
		eventually(t, 5*time.Second, "the chains as before", func() (bool, string) { now := chains(t, m); return now == have, now })
		inbound()
		if n := tried(); n != 2 {
			t.Errorf("offered %v times in two families after a repair", n)
		}
		// A change offers the whole.
		_, err = m.CP.Set(services(service(1)))
		must(t, err)
		eventually(t, 10*time.Second, "the change in the chains", func() (bool, string) {
			now := chains(t, m)
			return strings.Contains(now, "-d "+service(1).Prefixes[0].String()+" ") && !strings.Contains(now, "-m owner"), now
		})
		eventually(t, 5*time.Second, "the whole offered again", func() (bool, string) { n := tried(); return n > 2, fmt.Sprint(n) })
		says(t, a, 0, 0, []string{`^removed `}, "cleanup")
		if now := chains(t, m); strings.TrimSpace(now) != "" {
			t.Errorf("after cleanup:\n%s", now)
		}
	})
}
