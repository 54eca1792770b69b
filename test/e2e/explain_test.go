//go:build lab

package e2e

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/service-proxy-agent/service-proxy-agent/internal/explain"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// nasty is a name that a terminal would obey, and a browser.
const nasty = "na\x1b[31msty\x07\u202e<script>"

// explained runs explain in both forms, whose exit codes must be the same.
func explained(t *testing.T, m *mesh.Mesh, a *mesh.Agent, args ...string) (answer explain.Answer,
	text string, code int) {
	t.Helper()
	args = append([]string{"explain", "--proxy-user", fmt.Sprint(lab.EnvoyUID),
		"--envoy-log", m.Envoy.LogPath}, args...)
	text, stderr, code, err := a.Run(t.Context(), args...)
	must(t, err)
	out, _, jsonCode, err := a.Run(t.Context(), append(args, "-o", "json")...)
	must(t, err)
	if jsonCode != code {
		t.Errorf("%v: exit code %d as text, %d as JSON", args, code, jsonCode)
	}
	if err := json.Unmarshal([]byte(out), &answer); err != nil {
		t.Fatalf("%v: %v: %q %q", args, err, out, stderr)
	}
	for _, r := range strings.ReplaceAll(text, "\n", "") {
		if !unicode.IsPrint(r) {
			t.Fatalf("%v: %q is not printable in %q", args, r, text)
		}
	}
	if t.Failed() || testing.Verbose() {
		t.Logf("%v\n%s", args, text)
	}
	return answer, unwrapped(text), code
}

// unwrapped is a text for people with its long lines in one.
func unwrapped(text string) string {
	return strings.NewReplacer("\n      ", " ", "\n    ", " ").Replace(text)
}

// TestExplain asks for each kind of connection and holds the answer against what becomes of it.
func TestExplain(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, backend lab.Backend) {
		config := services(
			controlplane.Service{Name: nasty, Prefixes: controlplane.VIPs("10.10.0.9"), Port: 81,
				Endpoints: endpoints(), Unhealthy: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.99:1")}},
			controlplane.Service{Name: "kept", Prefixes: controlplane.VIPs("10.10.0.5"), Port: 81,
				Endpoints: endpoints()})
		attribute := `{"api-version":"0.2","proxy-spec":{"network":""},
			"service":{"serving-ports":[8081]},
			"traffic-interception":{"exclude-outbound-ip-ranges":["10.10.0.5"]}}`
		m, a := start(t, mesh.Options{Backend: backend, Config: config, Attribute: attribute})
		must(t, a.WaitReady(within(t, 20*time.Second)))
		through(t, m, web4)

		inbound := netip.AddrPortFrom(lab.VMAddr, mesh.AppPort).String()
		for _, tt := range []struct {
			name, args string
			code       int
			setting    string
			finding    symptom.ID
			words      string // of the text
		}{
			{"a service", web4.String(), 0, "exclude-outbound-ip-ranges", "", `route "route-web"`},
			{"of IPv6", web6.String(), 0, "exclude-outbound-ip-ranges", "", "1 of 1 endpoints healthy"},
			{"of TCP", db4.String(), 0, "exclude-outbound-ip-ranges", "", `filter chain "db", tcp`},
			{"a port without a chain", "10.10.0.1:82", 0, "exclude-outbound-port-ranges",
				symptom.NoFilterChain, "Envoy has no configuration for 10.10.0.1:82"},
			{"one that is excluded", "10.10.0.5:81", 1, "exclude-outbound-ip-ranges", "",
				"10.10.0.5 is excluded by exclude-outbound-ip-ranges"},
			{"no service", extra.String(), 1, "control plane", symptom.ServiceNotConfigured,
				"It has been told of 4 services: "},
			{"next to one", "10.10.0.3:81", 1, "control plane", symptom.ServiceNotConfigured,
				"at 10.10.0.2/32: 31 of 32 bits"},
			{"the proxy's user", web4.String() + " --uid " + fmt.Sprint(lab.EnvoyUID), 1, "--proxy-user",
				"", "is the proxy's"},
			{"root", web4.String() + " --uid root", 0, "exclude-outbound-ip-ranges", "", "by uid 0 is"},
			{"loopback", "127.0.0.1:81", 1, "", "", "127.0.0.1 (loopback) is never redirected"},
			{"the metadata server", "169.254.169.254:80", 1, "", "", "(metadata server) is never redirected"},
			{"inbound", inbound + " --inbound", 0, "serving-ports", "", "is a serving port"},
			{"inbound, another port", netip.AddrPortFrom(lab.VMAddr, 80).String() + " --inbound", 1,
				"serving-ports", "", "port 80 is no serving port"},
			{"a DNS question", "8.8.8.8:53 --udp", 1, "intercept-dns", "", "intercept-dns is off"},
			{"a nasty name", "10.10.0.9:81", 0, "exclude-outbound-ip-ranges", "",
				"1 of 2 endpoints healthy"},
		} {
			answer, text, code := explained(t, m, a, strings.Fields(tt.args)...)
			var finding symptom.ID
			if answer.Finding != nil {
				finding = answer.Finding.ID
			}
			if code != tt.code || answer.Setting != tt.setting || finding != tt.finding ||
				!strings.Contains(text, tt.words) {
				t.Errorf("%s: exit code %d, setting %q, finding %q:\n%s\nwant %+v", tt.name, code,
					answer.Setting, finding, text, tt)
			}
			// For some minutes after a first install.
			notes := slices.DeleteFunc(answer.Notes, func(note string) bool {
				return strings.HasPrefix(note, "the rules are new: ")
			})
			if len(notes) > 0 || len(answer.Unseen) > 0 {
				t.Errorf("%s: notes %q, unseen %v", tt.name, notes, answer.Unseen)
			}
		}
		explainCounts(t, m, a)
		served(t, m, a)
		explainedElsewhere(t, m, a, web4.String(), web6.String(), db4.String(), "10.10.0.1:82",
			"10.10.0.5:81", "10.10.0.9:81", extra.String(), "10.10.0.3:81", web4.String()+" --uid root",
			web4.String()+" --uid "+fmt.Sprint(lab.EnvoyUID), inbound+" --inbound",
			"127.0.0.1:81", "8.8.8.8:53 --udp", inbound, "[fd99::1]:80")
		for _, args := range [][]string{{}, {"web.test:81"}, {"10.10.0.1"}, {"10.10.0.1:0"},
			{"10.10.0.1:81", "--uid", "nobody-knows-them"}, {"10.10.0.1:81", "--inbound", "--uid", "0"}} {
			_, stderr, code, err := a.Run(t.Context(), append([]string{"explain"}, args...)...)
			must(t, err)
			if code != 64 || stderr == "" {
				t.Errorf("explain %q: exit code %d, %q; want 64 and why", args, code, stderr)
			}
		}
		explainWithout(t, m, a)
	})
}

// explainCounts sends connections, and finds them counted.
func explainCounts(t *testing.T, m *mesh.Mesh, a *mesh.Agent) {
	t.Helper()
	counted := func() uint64 {
		answer, _, _ := explained(t, m, a, db4.String())
		last := answer.Path[len(answer.Path)-2] // the row of the service
		if last.Packets == nil || !strings.Contains(last.Rule, "10.10.0.2/32") {
			t.Fatalf("not the row of the service: %+v", answer.Path)
		}
		return *last.Packets
	}
	before := counted()
	for range 3 {
		through(t, m, db4)
	}
	if after := counted(); after-before != 3 {
		t.Errorf("%d connections counted, want 3", after-before)
	}
}

// explainWithout asks when others are away: the agent, the rules, Envoy.
func explainWithout(t *testing.T, m *mesh.Mesh, a *mesh.Agent) {
	t.Helper()
	_, err := a.Stop()
	must(t, err)
	if _, text, code := explained(t, m, a, web4.String()); code != 0 {
		t.Errorf("without the agent: exit code %d\n%s", code, text)
	}
	if _, stderr, code, err := a.RunAs(t.Context(), 1000, nil, "explain", "--proxy-user",
		fmt.Sprint(lab.EnvoyUID), web4.String()); err != nil || code != 2 {
		t.Errorf("as an ordinary user: exit code %d, %v, %s", code, err, stderr)
	}
	// Somebody's rule before ours, and one that nobody knows.
	sh := func(args ...string) {
		out, err := m.VM.Command(t.Context(), "iptables", append([]string{"-w", "-t", "nat"},
			args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("iptables %q: %v: %s", args, err, out)
		}
	}
	foreign := []string{"OUTPUT", "-p", "tcp", "-d", "10.10.0.1/32", "-j", "DNAT", "--to-destination",
		"192.0.2.7"}
	sh(slices.Concat([]string{"-I"}, foreign)...)
	answer, text, code := explained(t, m, a, web4.String())
	if code != 1 || answer.Rule == nil || answer.Rule.Ours || !strings.Contains(text,
		"-d 10.10.0.1/32 -p tcp -j DNAT --to-destination 192.0.2.7") {
		t.Errorf("with a rule of somebody else's: exit code %d\n%s", code, text)
	}
	sh(slices.Concat([]string{"-D"}, foreign)...)
	// A row that is gone: the kernel's rules and those wanted are not the same.
	sh("-D", "SERVICE_PROXY_SERVICE_CIDRS", "-d", "10.10.0.2/32", "-j", "SERVICE_PROXY_REDIRECT")
	answer, text, code = explained(t, m, a, db4.String())
	if code != 1 || !strings.Contains(text, "its rule is missing in the kernel") ||
		len(answer.Notes) != 1 || !strings.Contains(answer.Notes[0], "diff") {
		t.Errorf("without a row: exit code %d\n%s", code, text)
	}
	m.Envoy.Kill()
	if answer, text, code := explained(t, m, a, web4.String()); code != 2 ||
		answer.Verdict != explain.Intercepted || answer.Unseen[symptom.FromEnvoy] == "" {
		t.Errorf("without Envoy: exit code %d\n%s", code, text)
	}
	if _, stderr, code, err := a.Run(t.Context(), "cleanup"); err != nil || code != 0 {
		t.Errorf("cleanup: exit code %d, %v, %s", code, err, stderr)
	}
	if _, text, code := explained(t, m, a, web4.String()); code != 2 ||
		!strings.Contains(text, "there are no IPv4 rules of ours") {
		t.Errorf("without rules: exit code %d\n%s", code, text)
	}
}

// TestExplainOfAnEmptyKernel: before any agent has run, nothing is intercepted, which is an answer;
// and to ask makes no table.
func TestExplainOfAnEmptyKernel(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, backend lab.Backend) {
		m, err := mesh.New(within(t, 30*time.Second), mesh.Options{Backend: backend, Config: services()})
		must(t, err)
		t.Cleanup(func() { must(t, m.Close()) })
		a := m.NewAgent()
		binary, err := mesh.Binary()
		must(t, err)
		for _, args := range [][]string{{web4.String()}, {web6.String()}, {web4.String(), "--try"},
			{"10.128.0.2:8081", "--inbound"}} {
			answer, text, code := explained(t, m, a, args...)
			if code != 1 || answer.Verdict != explain.NotIntercepted {
				t.Errorf("%v: exit code %d\n%s", args, code, text)
			}
		}
		for _, command := range []string{"doctor", "diff", "explain " + web4.String()} {
			// An answer that nobody gets is none, whatever was found.
			full := m.VM.Command(t.Context(), "sh", "-c", binary+" "+command+" --proxy-user "+
				fmt.Sprint(lab.EnvoyUID)+" --envoy-log "+m.Envoy.LogPath+" >/dev/full")
			full.Env = a.Environ()
			must(t, lab.Start(full))
			if _ = full.Wait(); full.ProcessState.ExitCode() != 2 {
				t.Errorf("%s on a full disk: %v", command, full.ProcessState)
			}
		}
		legacy, err := m.VM.Run(t.Context(), "cat", "/proc/net/ip_tables_names",
			"/proc/net/ip6_tables_names")
		must(t, err)
		nft, err := m.VM.Run(t.Context(), "nft", "list", "ruleset")
		must(t, err)
		if strings.TrimSpace(legacy+nft) != "" {
			t.Errorf("it made %s%s", legacy, nft)
		}
	})
}
