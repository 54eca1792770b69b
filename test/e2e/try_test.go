//go:build lab

package e2e

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/explain"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// tried runs explain --try.
func tried(t *testing.T, m *mesh.Mesh, a *mesh.Agent, args ...string) (explain.Answer, int) {
	t.Helper()
	args = append([]string{"explain", "--try", "-o", "json", "--proxy-user", fmt.Sprint(lab.EnvoyUID),
		"--envoy-log", m.Envoy.LogPath}, args...)
	out, stderr, code, err := a.Run(within(t, 20*time.Second), args...)
	must(t, err)
	var answer explain.Answer
	if err := json.Unmarshal([]byte(out), &answer); err != nil {
		t.Fatalf("%v: %v: %q %q", args, err, out, stderr)
	}
	return answer, code
}

// TestTry: explain --try makes connections through a real Envoy, and what becomes of them is what
// the rules say; also while Envoy is stopped, and beside what decides outside of table nat.
func TestTry(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, backend lab.Backend) {
		config := services(controlplane.Service{Name: "kept", Prefixes: controlplane.VIPs("10.10.0.5"),
			Port: 81, Endpoints: endpoints()})
		attribute := `{"api-version":"0.2","proxy-spec":{"network":""},
			"traffic-interception":{"exclude-outbound-ip-ranges":["10.10.0.5"]}}`
		m, a := start(t, mesh.Options{Backend: backend, Config: config, Attribute: attribute})
		must(t, a.WaitReady(within(t, 20*time.Second)))
		through(t, m, web4)

		seed := rand.Uint64()
		r := rand.New(rand.NewPCG(seed, 0))
		services := []string{web4.String(), web6.String(), db4.String(), "10.10.0.1:82"}
		others := []string{"10.10.0.5:81", extra.String(), other4.String(), other6.String(), "127.0.0.1:15000",
			"127.0.0.1:9", netip.AddrPortFrom(lab.VMAddr, mesh.AppPort).String()}
		count := map[string]int{}
		for range soak(100, 8) {
			to := append(services, others...)[r.IntN(len(services)+len(others))]
			if r.IntN(2) == 0 {
				to = services[r.IntN(len(services))]
			}
			uid := []uint32{0, 1000, 65534, lab.EnvoyUID}[r.IntN(4)]
			answer, code := tried(t, m, a, to, "--uid", fmt.Sprint(uid))
			intercepted := uid != lab.EnvoyUID && strings.Contains(strings.Join(services, " "), to)
			if answer.Tried == nil || answer.Tried.Agreement != explain.Agree || code != map[bool]int{
				true: 0, false: 1}[intercepted] || answer.Tried.Port == 15001 != intercepted ||
				intercepted && answer.Tried.Answer != "connected" {
				t.Fatalf("seed %d: %s by uid %d: exit code %d, %s: %+v", seed, to, uid, code, answer.Why,
					answer.Tried)
			}
			count[answer.Tried.Answer]++
		}
		t.Logf("seed %d: %v", seed, count)
		tryRefusals(t, a)
		tryBehind(t, m, a)

		m.Envoy.Pause()
		begun := time.Now()
		answer, code := tried(t, m, a, web4.String())
		m.Envoy.Continue()
		if answer.Tried == nil || answer.Tried.Agreement != explain.Agree || answer.Tried.Port != 15001 ||
			code != 2 {
			t.Errorf("while Envoy is stopped: exit code %d, %s: %+v", code, answer.Why, answer.Tried)
		}
		t.Logf("while Envoy was stopped: %v after %v", answer.Tried, time.Since(begun))

		out, err := m.VM.Command(t.Context(), "iptables", "-w", "-t", "raw", "-A", "OUTPUT", "-d",
			web4.Addr().String(), "-j", "NOTRACK").CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		answer, code = tried(t, m, a, web4.String())
		if code != 2 || answer.Verdict != explain.Unknown || answer.Tried == nil ||
			answer.Tried.Agreement == explain.Agree {
			t.Errorf("beside an exemption from tracking: exit code %d, %s: %+v", code, answer.Why, answer.Tried)
		}
	})
}

// tryBehind looks what a service behind Envoy sees of a connection that says nothing: one by HTTP
// nothing, one by TCP a connection.
func tryBehind(t *testing.T, m *mesh.Mesh, a *mesh.Agent) {
	t.Helper()
	connections := func(cluster string) string {
		text, err := m.Envoy.Admin(t.Context(), "/stats?filter="+cluster+".upstream_cx_total")
		must(t, err)
		return text
	}
	web, db := connections("web"), connections("db")
	if web == "" || db == "" {
		t.Fatalf("no statistics of the clusters: %q, %q", web, db)
	}
	tried(t, m, a, db4.String())
	eventually(t, 5*time.Second, "a connection of Envoy's to the TCP service", func() (bool, string) {
		now := connections("db")
		return now != db, now
	})
	tried(t, m, a, web4.String())
	if now := connections("web"); now != web {
		t.Errorf("a connection to the HTTP service: %s, before %s", now, web)
	}
}

// tryRefusals are questions that nobody may try, or that nobody can.
func tryRefusals(t *testing.T, a *mesh.Agent) {
	t.Helper()
	for _, args := range [][]string{{"--inbound"}, {"--udp"}} {
		_, stderr, code, err := a.Run(t.Context(), append([]string{"explain", "--try", web4.String()},
			args...)...)
		must(t, err)
		if code != 64 || !strings.Contains(stderr, "--try") {
			t.Errorf("%q: exit code %d, %q; want 64 and why", args, code, stderr)
		}
	}
	out, _, code, err := a.RunAs(t.Context(), 1000, nil, "explain", "--try", "-o", "json",
		"--proxy-user", fmt.Sprint(lab.EnvoyUID), web4.String())
	if err != nil || code != 2 {
		t.Errorf("as an ordinary user: exit code %d, %v, %s", code, err, out)
	}
}
