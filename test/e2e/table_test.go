//go:build lab

package e2e

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
	"github.com/service-proxy-agent/service-proxy-agent/test/platform"
)

// metric is what the agent's /metrics says of one series, without the prefix; 0 where it is absent.
func metric(t testing.TB, a *mesh.Agent, series string) float64 {
	t.Helper()
	code, body, err := a.Get("/metrics")
	if err != nil || code != http.StatusOK {
		t.Fatalf("/metrics: %d %v", code, err)
	}
	for line := range strings.Lines(body) {
		if value, ok := strings.CutPrefix(line, "service_proxy_agent_"+series+" "); ok {
			n, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			must(t, err)
			return n
		}
	}
	return 0
}

// finding is the series of one finding of severity error.
func finding(id symptom.ID) string { return fmt.Sprintf(`finding{id=%q,severity="error"}`, id) }

// says checks what a command prints, by patterns, and its exit code.
func says(t *testing.T, a *mesh.Agent, uid uint32, code int, patterns []string, args ...string) {
	t.Helper()
	stdout, stderr, got, err := a.RunAs(within(t, 10*time.Second), uid, nil, args...)
	must(t, err)
	if got != code {
		t.Errorf("uid %d, %q: exit code %d, want %d", uid, args, got, code)
	}
	for _, p := range patterns {
		if !regexp.MustCompile("(?m)" + p).MatchString(stdout + stderr) {
			t.Errorf("uid %d, %q does not say %q:\n%s%s", uid, args, p, stdout, stderr)
		}
	}
}

// fullDisk is a disk of the agent's own for its state folder, with no room on it. It stands in the
// mount namespace of a process that ends with the test, and the agent is started in it.
func fullDisk(t *testing.T, a *mesh.Agent) (makeRoom func()) {
	t.Helper()
	must(t, mkdir(a.StateDir()))
	holder := exec.CommandContext(t.Context(), "unshare", "-m", "sh", "-c",
		`mount -t tmpfs -o size=64k none "$1" && { cat /dev/zero >"$1/full"; echo; exec sleep infinity; }`, "sh", a.StateDir())
	holder.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := holder.StdoutPipe()
	must(t, err)
	must(t, lab.Start(holder))
	t.Cleanup(func() { holder.Process.Kill(); holder.Wait() })
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal("no disk: ", err)
	}
	pid := strconv.Itoa(holder.Process.Pid)
	a.Under = []string{"nsenter", "--target", pid, "--mount", "--"}
	return func() { must(t, os.Remove(filepath.Join("/proc", pid, "root", a.StateDir(), "full"))) }
}

// TestTable walks through rows of the README's table that neither TestSymptoms nor another test
// reads to their end: what the agent does, its words, the metric that moves, and how it is over.
func TestTable(t *testing.T) {
	t.Parallel()
	m, err := mesh.New(within(t, 30*time.Second),
		mesh.Options{Backend: lab.NFT, Config: services(), NoRuntime: true})
	must(t, err)
	a := m.NewAgent()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("agent's log:\n%s", a.Log())
		}
		must(t, m.Close())
	})
	m.Platform.Update(func(v *platform.VM) { v.GuestAttributesDisabled = true })
	makeRoom := fullDisk(t, a)
	must(t, a.Start())
	must(t, a.WaitReady(within(t, 20*time.Second)))
	through(t, m, web4)
	before := chains(t, m)
	healthy := []string{`\AHealthy: intercepting 2 services and 1 serving port since `,
		`^mode +intercepting: `, `^agent +\S+, started \S+ \(.* ago\), last pass \d+ s ago$`, `^ready +yes$`,
		`^Envoy +LIVE, 2 listeners, on 127\.0\.0\.1:15000$`, `^ +version \S+/1\.\S+$`,
		`^IPv4 rules +as wanted, jumps in, \d+ rules \(nft\), 2 service prefixes, to Envoy's ports 15001 out, 15006 in, `,
		`^IPv6 rules +as wanted, jumps in, \d+ rules \(nft\), 1 service prefix, `}

	// The words are in the table of the symptoms.
	t.Run("guest attributes disabled", func(t *testing.T) {
		eventually(t, 5*time.Second, "the metric", func() (bool, string) {
			return metric(t, a, `channel_enabled{channel="guest_attributes"}`) == 0, "1"
		})
		// a warning: healthy
		says(t, a, 0, 0, append(healthy, `^  WARNING guest-attributes-off: Guest attributes are disabled`), "status")
	})

	t.Run("Envoy is down, disk full", func(t *testing.T) {
		drift(t, m, a, "IPv4", jumpRemoved)
		m.Envoy.Kill()
		_, err := a.Wait(within(t, 10*time.Second), "the failure", func(s status.Status) bool {
			return strings.HasPrefix(
				s.LastFailure, "Envoy is not running: nothing accepts on its admin address 127.0.0.1:15000")
		})
		must(t, err)
		if n := metric(t, a, finding(symptom.EnvoyDown)); n != 1 {
			t.Errorf("finding envoy-down: %v", n)
		}
		for _, to := range []netip.AddrPort{web4, web6} {
			if _, err := lab.HTTPProbe(t.Context(), m.VM, 1000, to); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("%s with Envoy down: %v, want it refused", to, err)
			}
		}
		says(t, a, 0, 1, []string{`\ANot healthy: Envoy is not running`, `^ready +no: Envoy: `,
			`^Envoy +down since \S+ \(.* ago\), nothing answers on 127\.0\.0\.1:15000`,
			`^  ERROR envoy-down: Envoy is not running`}, "status")
		must(t, m.Envoy.Start())
		_, err = a.Wait(within(t, 10*time.Second), "its end", func(s status.Status) bool {
			return s.Ready && strings.Contains(s.LastFailure, "(over; ")
		})
		must(t, err)
		if n := metric(t, a, finding(symptom.EnvoyDown)); n != 0 {
			t.Errorf("finding envoy-down when it is over: %v", n)
		}
		through(t, m, web4)
		// The disk: it went on, said so once for two failures to write, and knows
		// nothing after a restart.
		if n := strings.Count(a.Log(), "history is not kept"); n != 1 ||
			!strings.Contains(a.Log(), "no space left on device") {
			t.Errorf("said %d times that history is not kept", n)
		}
		if n := strings.Count(a.Log(), "transitions are not kept"); n != 1 {
			t.Errorf("said %d times that transitions are not kept", n)
		}
		remembers(t, a, "", "IPv4 rules repaired: jump removed", "Envoy is not running", "not ready: ",
			"over: Envoy is not running", "ready: Envoy ")
		a.Kill()
		m.Platform.Update(func(v *platform.VM) { v.GuestAttributesDisabled = false })
		must(t, a.Start())
		must(t, a.WaitReady(within(t, 10*time.Second)))
		s, err := a.Status(t.Context())
		must(t, err)
		if s.LastFailure != "" {
			t.Errorf("remembered without a disk: %q", s.LastFailure)
		}
		if first := s.History[0]; first.Kind != status.OfAgent || first.Times > 0 {
			t.Errorf("remembered without a disk: %+v", first)
		}
		if n := metric(t, a, `channel_enabled{channel="guest_attributes"}`); n != 1 {
			t.Errorf("channel_enabled of guest attributes: %v", n)
		}
	})

	room := len(a.Log())
	t.Run("Envoy restarted, control plane away", func(t *testing.T) {
		makeRoom()
		drift(t, m, a, "IPv6", jumpRemoved)
		m.CP.GoAway()
		must(t, m.Envoy.Restart())
		_, err := a.Wait(within(t, 45*time.Second), "the words", func(s status.Status) bool {
			return strings.HasPrefix(s.LastFailure, "Cannot reach the Traffic Director API server: ") &&
				strings.Contains(s.LastFailure, "connection refused")
		})
		must(t, err)
		if n := metric(t, a, finding(symptom.ControlPlaneConnect)); n != 1 {
			t.Errorf("finding control-plane-unreachable: %v", n)
		}
		if now := chains(t, m); now != before {
			t.Errorf("the rules changed:\n%s", now)
		}
		must(t, m.CP.ComeBack())
		_, err = a.Wait(within(t, 45*time.Second), "its end", func(s status.Status) bool {
			return s.Ready && strings.Contains(s.LastFailure, "(over; ")
		})
		must(t, err)
		if n := metric(t, a, finding(symptom.ControlPlaneConnect)); n != 0 {
			t.Errorf("finding control-plane-unreachable when it is over: %v", n)
		}
		// With room on the disk a restart forgets nothing that is older than a second.
		time.Sleep(1500 * time.Millisecond)
		a.Kill()
		must(t, a.Start())
		s, err := a.Wait(within(t, 10*time.Second), "ready", func(s status.Status) bool {
			return s.Ready
		})
		must(t, err)
		// behind the drift, which is the newer
		if !strings.Contains(s.LastFailure, "Cannot reach the Traffic Director API server: ") {
			t.Errorf("remembered %q", s.LastFailure)
		}
		remembers(t, a, a.Log()[room:], "IPv6 rules repaired: jump removed",
			"Cannot reach the Traffic Director API server: ")
	})

	t.Run("killed at any moment", func(t *testing.T) { killed(t, m, a) })

	t.Run("a change is seen by its hint", func(t *testing.T) {
		a.Kill()
		a.SetArgs("--log-level", "debug")
		defer a.SetArgs()
		must(t, a.Start())
		must(t, a.WaitReady(within(t, 10*time.Second)))
		seenByHint(t, m, a)
	})

	// A fresh one, with nothing of the above left to tell.
	t.Run("nothing happens", func(t *testing.T) {
		a.Kill()
		const ready = "ready: Envoy "
		before := strings.Count(m.Platform.Serial(), ready)
		must(t, a.Start())
		must(t, a.WaitReady(within(t, 10*time.Second)))
		must(t, m.Platform.Wait(within(t, 10*time.Second), func() bool {
			return m.Platform.GuestAttributes("gce-service-proxy")["proxy-version"] != ""
		}))
		eventually(t, 5*time.Second, "ready on serial", func() (bool, string) {
			return strings.Count(m.Platform.Serial(), ready) > before, m.Platform.Serial()
		})
		serial, log, passes := m.Platform.Serial(), a.Log(), metric(t, a, "passes_total")
		time.Sleep(time.Duration(soak(400, 4)) * time.Second)
		if now := m.Platform.Serial(); now != serial {
			t.Errorf("said on serial: %s", strings.TrimPrefix(now, serial))
		}
		if now := a.Log(); now != log {
			t.Errorf("said in the log: %s", strings.TrimPrefix(now, log))
		}
		if n := metric(t, a, "passes_total"); n < passes+3 {
			t.Errorf("%v passes", n-passes)
		}
	})
	if t.Failed() {
		return
	}

	// What needs no root, and what says that it does.
	t.Run("another user", func(t *testing.T) {
		const user = 1000
		says(t, a, user, 0, []string{`^service-proxy-agent \S+ \([0-9a-f]+\) linux/\w+ go1\.\d+`},
			"version")
		for _, help := range [][]string{{"--help"}, {"help"}, {"help", "run"}, {"run", "--help"},
			{"status", "--help"}, {"cleanup", "--help"}} {
			says(t, a, user, 0, []string{`^Usage:$`}, help...)
		}
		says(t, a, user, 0, nil, "wait", "--timeout", "5s")
		says(t, a, user, 2, []string{
			`^service-proxy-agent: no answer from the agent: .*agent\.sock.*permission denied`}, "status")
		says(t, a, user, 1,
			[]string{`^service-proxy-agent: --listen is empty, so that only the agent's socket can tell`},
			"wait", "--listen", "", "--timeout", "5s")
		says(t, a, user, 1, []string{`^service-proxy-agent: cleanup: .*root`}, "cleanup")
		if now := chains(t, m); !strings.Contains(now, "-A OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT") {
			t.Errorf("cleanup by another user:\n%s", now)
		}
	})
}

// seenByHint makes changes until the agent, which logs at debug, says that it saw one in a look
// that a hint of Envoy's log asked for. On a busy machine the next full dump must wait, since the
// last one took long, and the look that is due comes before.
func seenByHint(t *testing.T, m *mesh.Mesh, a *mesh.Agent) {
	t.Helper()
	const enough = 20
	early := regexp.MustCompile(`\tlisteners read\t.*"hinted": true`)
	pushes, began := 0, time.Now()
	for pushes < soak(6, 1) || !early.MatchString(a.Log()) {
		if pushes == enough {
			t.Fatalf("none of %d changes was seen by its hint:\n%s", pushes, a.Log())
		}
		_, err := m.CP.Set(services(service(pushes)))
		must(t, err)
		row := "-d " + service(pushes).Prefixes[0].String() + " "
		eventually(t, 10*time.Second, "the service in the rules", func() (bool, string) {
			out := chains(t, m)
			return strings.Contains(out, row), out
		})
		pushes++
	}
	// Who asks once a second sees one a second at the most when each waits for the one before.
	took := time.Since(began).Round(time.Millisecond)
	t.Logf("%d one after the other, in %v", pushes, took)
	if limit := time.Duration(pushes) * time.Second * 3 / 4; os.Getenv("SOAK") != "" && took > limit {
		t.Errorf("that is more than %v", limit)
	}
}

// TestOwnEnvoy: an Envoy and a control plane of one's own, no bootstrap, and the attribute from a
// file or none at all: the metadata server is not asked for it.
func TestOwnEnvoy(t *testing.T) {
	t.Parallel()
	m, err := mesh.New(within(t, 30*time.Second),
		mesh.Options{Backend: lab.NFT, Config: services(), NoRuntime: true})
	must(t, err)
	t.Cleanup(func() { must(t, m.Close()) })
	file := filepath.Join(m.Dir, "attribute.json")
	must(
		t, writeFile(file,
			`{"api-version":"0.2","proxy-spec":{},"traffic-interception":{"exclude-outbound-ip-ranges":["10.10.0.2"]},"service":{"serving-ports":[8081]}}`))
	for _, test := range []struct {
		config   string
		excluded bool
		inbound  string // who serves the serving port
	}{
		{file, true, "inbound-8081-" + lab.VMAddr.String()},
		{"none", false, ""},
	} {
		a := m.NewAgent("--config", test.config)
		must(t, a.Start())
		if err := a.WaitReady(within(t, 20*time.Second)); err != nil {
			t.Fatalf("--config %s: %v", test.config, err)
		}
		through(t, m, web4)
		through(t, m, web6)
		if test.excluded {
			escapes(t, m, db4)
		} else {
			through(t, m, db4)
		}
		resp, err := m.Client.HTTP().Get(
			"http://" + netip.AddrPortFrom(lab.VMAddr, mesh.AppPort).String() + "/")
		must(t, err)
		resp.Body.Close()
		if by := resp.Header.Get(controlplane.ServedByHeader); by != test.inbound {
			t.Errorf("--config %s: the serving port is served by %q, want %q", test.config, by, test.inbound)
		}
		// Envoy's user is spared.
		if r, err := lab.HTTPProbe(t.Context(), m.VM, m.Envoy.UID, web4); err != nil || !r.Escaped {
			t.Errorf("as Envoy's user: %+v %v", r, err)
		}
		a.Kill()
		if t.Failed() {
			t.Log(a.Log())
		}
	}
	for _, r := range m.Platform.Requests() {
		if strings.HasSuffix(r.Path, "/attributes/gce-service-proxy") {
			t.Errorf("asked the metadata server for %s", r.Path)
		}
	}

	// Root's traffic is everybody's.
	a := m.NewAgent("--config", "none", "--proxy-user", "root")
	must(t, a.Start())
	_, err = a.Wait(within(t, 10*time.Second), "root refused", func(s status.Status) bool {
		return !s.Ready &&
			strings.Contains(s.LastFailure, "it is root, whose traffic cannot be told from everybody else's")
	})
	must(t, err)
}
