//go:build lab

package e2e

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/rulediff"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// diff runs the command as a user, in both forms, and has them agree.
func diff(t *testing.T, m *mesh.Mesh, a *mesh.Agent, uid uint32, args ...string) (text string,
	code int) {
	t.Helper()
	args = append([]string{"diff", "--proxy-user", fmt.Sprint(lab.EnvoyUID),
		"--envoy-log", m.Envoy.LogPath}, args...)
	ctx := within(t, 30*time.Second)
	var body string
	var jsonCode int
	var jsonErr error
	done := make(chan struct{})
	go func() {
		defer close(done)
		body, _, jsonCode, jsonErr = a.RunAs(ctx, uid, nil, append(slices.Clip(args), "-o", "json")...)
	}()
	text, stderr, code, err := a.RunAs(ctx, uid, nil, args...)
	<-done
	must(t, err)
	must(t, jsonErr)
	if stderr != "" {
		t.Errorf("%q: stderr %s", args, stderr)
	}
	var d rulediff.Difference
	must(t, json.Unmarshal([]byte(body), &d))
	if jsonCode != code || d.Exit != code {
		t.Errorf("%q: exit code %d, of JSON %d, in it %d\n%s\n%s", args, code, jsonCode, d.Exit, text, body)
	}
	return text, code
}

// differs fails unless the command ends so and says all of it.
func differs(t *testing.T, m *mesh.Mesh, a *mesh.Agent, uid uint32, code int, say []string,
	args ...string) {
	t.Helper()
	text, is := diff(t, m, a, uid, args...)
	if is != code {
		t.Errorf("%q: exit code %d, want %d\n%s", args, is, code, text)
	}
	for _, line := range say {
		if !strings.Contains(text, line) {
			t.Errorf("%q: no %q in\n%s", args, line, text)
		}
	}
}

// TestDiff: what others did while the daemon was stopped is told and nothing is changed by it;
// then, while it runs, with another attribute, as an ordinary user, after cleanup and without any
// daemon.
func TestDiff(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, backend lab.Backend) {
		m, a := start(t, mesh.Options{Backend: backend, Config: services()})
		must(t, a.WaitReady(within(t, 20*time.Second)))
		run := func(line string) {
			t.Helper()
			words := strings.Fields(line)
			_, err := m.VM.Run(t.Context(), words[0], words[1:]...)
			must(t, err)
		}
		same := []string{"IPv4 and IPv6 rules are as wanted: 2 services, ", " rules, " + string(backend)}
		differs(t, m, a, 0, 0, same)

		const row = "-A SERVICE_PROXY_SERVICE_CIDRS -d 10.10.0.1/32 -j SERVICE_PROXY_REDIRECT"
		const dnat = "OUTPUT -d 192.0.2.9/32 -p tcp -j DNAT --to-destination 192.0.2.8:80"
		must(t, syscall.Kill(a.PID(), syscall.SIGSTOP))
		run("iptables -w -t nat -D " + strings.TrimPrefix(row, "-A "))
		run("iptables -w -t nat -A SERVICE_PROXY_OUTPUT -p tcp -j ACCEPT")
		run("iptables -w -t nat -I " + strings.Replace(dnat, "OUTPUT ", "OUTPUT 1 ", 1))
		run("ip6tables -w -t nat -N ISTIO_OUTPUT")
		was := chains(t, m)
		differs(t, m, a, 0, 1, []string{"- " + row + "\n", "+ -A SERVICE_PROXY_OUTPUT -p tcp -j ACCEPT\n",
			"! -A " + dnat + "  # stands before our jump", "! :ISTIO_OUTPUT  # ",
			"+ -A OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT  # wanted, in another place\n",
			"IPv4 rules differ: 2 lines absent (-), 2 lines unwanted (+), 2 lines of others matter (!); " +
				"IPv6 rules are as wanted", "no agent answers"})
		if is := chains(t, m); is != was {
			t.Errorf("diff changed\n%s\nto\n%s", was, is)
		}
		must(t, syscall.Kill(a.PID(), syscall.SIGCONT))
		_, err := a.Wait(within(t, 10*time.Second), "a repair", func(s status.Status) bool {
			return s.Undone > 0
		})
		must(t, err)
		differs(t, m, a, 0, 0, append(same, "1 line of others matters (!), which is no difference"))
		if backend == lab.NFT {
			run("nft add table inet firewall")
			run("nft add chain inet firewall nat-out { type nat hook output priority -110 ; }")
			differs(t, m, a, 0, 0, append(same, "! nft inet firewall nat-out hook output priority -110"))
		}

		differs(t, m, a, 1000, 2, []string{"IPv4: could not look: ", "IPv6: could not look: "})
		file := filepath.Join(t.TempDir(), "new.json")
		must(t, os.WriteFile(file, []byte(`{"proxy-spec":{"network":""},"service":{"serving-ports":[8081]},`+
			`"traffic-interception":{"exclude-outbound-ip-ranges":["10.9.0.0/16"]}}`), 0o644))
		must(t, os.Chmod(filepath.Dir(file), 0o755))
		must(t, os.Chmod(filepath.Dir(filepath.Dir(file)), 0o755))
		excludes := []string{
			"+ -A SERVICE_PROXY_OUTPUT -d 10.9.0.0/16 -m comment --comment excluded -j RETURN\n",
			"0 lines would go (-), 1 line would come (+)"}
		differs(t, m, a, 0, 1, excludes, "--config", file)
		differs(t, m, a, 1000, 1, excludes, "--config", file)
		must(t, os.WriteFile(file, []byte(mesh.Attribute), 0o644))
		differs(t, m, a, 0, 0, []string{"rules stay as they are"}, "--config", file)
		must(t, os.WriteFile(file, []byte(`{"service":{"serving-ports":"x"}}`), 0o644))
		if _, stderr, code, err := a.Run(t.Context(), "diff", "--config", file); err != nil || code != 64 ||
			!strings.Contains(stderr, "key service.serving-ports: ") {
			t.Errorf("a malformed file: exit code %d, %v, %s", code, err, stderr)
		}

		a.Kill()
		differs(t, m, a, 0, 0, append(same, "no agent answers"))
		must(t, a.Start())
		must(t, a.WaitReady(within(t, 20*time.Second)))
		_, _, _, err = a.Run(t.Context(), "cleanup")
		must(t, err)
		differs(t, m, a, 0, 0, []string{"paused by cleanup", "as wanted: 2 services, 0 rules"})
		a.Kill()
		m.Envoy.Stop()
		differs(t, m, a, 0, 2, []string{"could not look: it is not known what is wanted: Envoy: "})
	})
}

// TestDiffDuringChanges: a change that the daemon follows is no difference, whenever it is looked
// at, also while the daemon or Envoy does not get to run for a moment.
func TestDiffDuringChanges(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, backend lab.Backend) {
		m, a := start(t, mesh.Options{Backend: backend, Config: services()})
		must(t, a.WaitReady(within(t, 20*time.Second)))
		seed := uint64(time.Now().UnixNano())
		t.Logf("seed %d", seed)
		random := rand.New(rand.NewPCG(seed, 0))
		for range soak(100, 4) {
			var all []controlplane.Service
			for range 1 + random.IntN(20) {
				all = append(all, both(random.IntN(60)))
			}
			_, err := m.CP.Set(services(distinct(all)...))
			must(t, err)
			if pid := a.PID(); random.IntN(2) == 0 {
				must(t, syscall.Kill(pid, syscall.SIGSTOP))
				goOn := time.AfterFunc(time.Duration(random.IntN(300))*time.Millisecond, func() {
					_ = syscall.Kill(pid, syscall.SIGCONT)
				})
				defer goOn.Stop()
			}
			time.Sleep(time.Duration(random.IntN(100)) * time.Millisecond) // not in step with anything
			if text, code := diff(t, m, a, 0); code != 0 {
				t.Fatalf("exit code %d\n%s", code, text)
			}
		}
	})
}
