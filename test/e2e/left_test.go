//go:build lab

package e2e

import (
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// TestRuleRefused: the kernel refuses the rules that spare Envoy's own traffic. Outbound
// interception would loop without them and is left out, what else the kernel takes is installed and
// kept so, the refused rules are named in both families, and a change offers them again.
func TestRuleRefused(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, backend lab.Backend) {
		m, a := start(t, mesh.Options{Backend: backend, Config: services(), NoOwnerMatch: true})
		left := func(family string) string {
			return fmt.Sprintf(
				`The kernel refuses the %s rule "-A SERVICE_PROXY_OUTPUT -m owner --uid-owner %d -m comment --comment proxy-user -j RETURN": `, family, lab.EnvoyUID)
		}
		s, err := a.Wait(within(t, 20*time.Second), "the refused rules named",
			func(s status.Status) bool {
				said := 0
				for _, f := range s.Findings {
					if f.ID == symptom.RuleRefused &&
						(strings.HasPrefix(f.Cause, left("IPv4")) || strings.HasPrefix(f.Cause, left("IPv6"))) {
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
		// the user's and the group's, in two families
		if n := metric(t, a, finding(symptom.RuleRefused)); n != 4 {
			t.Errorf("finding rules-not-applied: %v", n)
		}
		says(t, a, 0, 1, []string{`^  ERROR rules-not-applied: The kernel refuses the IPv4 rule`,
			`^  ERROR rules-not-applied: The kernel refuses the IPv6 rule`}, "status")
		if code, body, err := a.Get("/healthz"); err != nil || code != http.StatusOK {
			t.Errorf("/healthz: %d %q %v: a new VM has the same kernel", code, body, err)
		}
		// The rest is in: inbound goes through Envoy, and nothing is led outbound to where it could loop.
		inbound := func() {
			t.Helper()
			resp, err := m.Client.HTTP().Get(
				"http://" + netip.AddrPortFrom(lab.VMAddr, mesh.AppPort).String() + "/")
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
		if strings.Contains(have, "-j SERVICE_PROXY_OUTPUT") || strings.Contains(have, "-m owner") ||
			!strings.Contains(have, "-d 10.10.0.1/32") || !strings.Contains(have, "-d fd10::1/128") {
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
		_, err = m.VM.Run(t.Context(), "iptables", "-w", "-t", "nat", "-D", "PREROUTING", "-p", "tcp",
			"-j", "SERVICE_PROXY_INBOUND")
		must(t, err)
		eventually(t, 5*time.Second, "the chains as before", func() (bool, string) {
			now := chains(t, m)
			return now == have, now
		})
		inbound()
		if n := tried(); n != 2 {
			t.Errorf("offered %v times in two families after a repair", n)
		}
		// A change offers the whole.
		_, err = m.CP.Set(services(service(1)))
		must(t, err)
		eventually(t, 10*time.Second, "the change in the chains", func() (bool, string) {
			now := chains(t, m)
			return strings.Contains(now, "-d "+service(1).Prefixes[0].String()+" ") && !strings.Contains(
				now, "-m owner"), now
		})
		eventually(t, 5*time.Second, "the whole offered again", func() (bool, string) {
			n := tried()
			return n > 2, fmt.Sprint(n)
		})
		says(t, a, 0, 0, []string{`^removed `}, "cleanup")
		if now := chains(t, m); strings.TrimSpace(now) != "" {
			t.Errorf("after cleanup:\n%s", now)
		}
	})
}

// TestLocked: another program holds the xtables lock for longer than we wait. (A lock of the test's
// own: the usual one is the whole machine's, and other labs would wait as well.)
func TestLocked(t *testing.T) {
	t.Parallel()
	m, err := mesh.New(within(t, 30*time.Second),
		mesh.Options{Backend: lab.Legacy, Config: services()})
	must(t, err)
	lock, err := os.Create(filepath.Join(m.Dir, "xtables.lock"))
	must(t, err)
	defer lock.Close()
	a := m.NewAgent()
	a.Under = []string{"env", "XTABLES_LOCKFILE=" + lock.Name()}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("agent's log:\n%s", a.Log())
		}
		must(t, m.Close())
	})
	must(t, a.Start())
	must(t, a.WaitReady(within(t, 20*time.Second)))
	locked := func() (n float64) {
		for _, family := range []string{"IPv4", "IPv6"} {
			n += metric(t, a, fmt.Sprintf(`applies_total{family=%q,outcome="locked"}`, family))
		}
		return n
	}
	if n := locked(); n != 0 {
		t.Errorf("%v applies were locked out", n)
	}
	const latency = "redirect_latency_seconds_count"
	redirected := metric(t, a, latency)
	must(t, unix.Flock(int(lock.Fd()), unix.LOCK_EX))
	_, err = m.CP.Set(services(service(7)))
	must(t, err)
	s, err := a.Wait(within(t, 30*time.Second), "the words", func(s status.Status) bool {
		return strings.HasPrefix(s.LastFailure,
			"The IPv4 rules could not be applied: apply IPv4 rules: another program holds the iptables lock: ") &&
			strings.Contains(s.LastFailure, "it is tried again; `lsof /run/xtables.lock` names the program")
	})
	must(t, err)
	t.Log(s.LastFailure)
	if n := metric(t, a, finding(symptom.RuleRefused)); n != 1 {
		t.Errorf("finding rules-not-applied: %v", n)
	}
	if locked() == 0 {
		t.Error("no apply counts as locked out")
	}
	if n := metric(t, a, `lock_wait_seconds_total{family="IPv4"}`); n < 4 {
		t.Errorf("it waited %v s for the lock, as told; iptables waits 5", n)
	}
	if n := metric(t, a, latency); n != redirected {
		t.Error("a change counts as redirected that is locked out")
	}
	through(t, m, web4) // what was in stays
	must(t, unix.Flock(int(lock.Fd()), unix.LOCK_UN))
	_, err = a.Wait(within(t, 30*time.Second), "its end", func(s status.Status) bool {
		return s.Ready && strings.Contains(s.LastFailure, "(over; ")
	})
	must(t, err)
	through(t, m, netip.AddrPortFrom(service(7).Prefixes[0].Addr(), 9000))
	if n := metric(t, a, latency); n != redirected+1 {
		t.Errorf("%v changes count as redirected, want the one that was locked out", n-redirected)
	}
	if n := metric(t, a, finding(symptom.RuleRefused)); n != 0 {
		t.Errorf("finding rules-not-applied when it is over: %v", n)
	}
}
