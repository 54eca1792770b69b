//go:build lab

package e2e

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// doctor is a doctor to ask: as whom, beneath which command, with what.
type doctor struct {
	m     *mesh.Mesh
	a     *mesh.Agent
	uid   uint32
	under []string
	env   []string
	args  []string
}

// examine runs doctor in both forms.
func (d doctor) examine(t *testing.T) diagnosis {
	t.Helper()
	binary, err := mesh.Binary()
	must(t, err)
	args := append([]string{"doctor", "--proxy-user", fmt.Sprint(lab.EnvoyUID)}, d.args...)
	if d.m.Envoy != nil {
		args = slices.Insert(args, 1, "--envoy-log", d.m.Envoy.LogPath)
	}
	return diagnosed(t, func(ctx context.Context, form ...string) (a run) {
		argv := slices.Concat(d.under, []string{binary}, args, form)
		cmd := d.m.VM.Command(ctx, argv[0], argv[1:]...)
		if d.uid != 0 {
			cmd = d.m.VM.CommandAs(ctx, d.uid, argv[0], argv[1:]...)
		}
		cmd.Env = append(d.a.Environ(), d.env...)
		var out, stderr strings.Builder
		cmd.Stdout, cmd.Stderr = &out, &stderr
		if a.err = lab.Start(cmd); a.err == nil {
			_ = cmd.Wait() // its exit code is looked at
			a.stdout, a.stderr, a.code = out.String(), stderr.String(), cmd.ProcessState.ExitCode()
		}
		if a.stderr != "" {
			t.Errorf("it says %s", a.stderr)
		}
		return a
	})
}

// found are the errors and warnings.
func (d diagnosis) found() []string { return d.troubles(symptom.Found, symptom.Warning) }

// TestDoctor: a healthy VM has nothing, also for who may not see all; an Envoy that was killed is
// found, with what follows from it under it, with and without the daemon; and a daemon that hangs.
func TestDoctor(t *testing.T) {
	beside(t)
	onBoth(t, func(t *testing.T, backend lab.Backend) {
		m, a := start(t, mesh.Options{Backend: backend, Config: services()})
		must(t, a.WaitReady(within(t, 30*time.Second)))
		e := doctor{m: m, a: a}.examine(t)
		if e.code != 0 || len(e.found()) > 0 {
			t.Errorf("healthy: %d: %s", e.code, e.text)
		}
		if e.took > 5*time.Second {
			tooDear(t, "healthy: it took %v", e.took)
		}
		e = doctor{m: m, a: a, uid: 1000}.examine(t)
		if e.code != 2 || len(e.found()) > 0 || e.Unseen[symptom.FromKernel] != "needs root" {
			t.Errorf("an ordinary user: %d: %s", e.code, e.text)
		}
		for _, source := range []symptom.Source{symptom.FromEnvoy, symptom.FromMetadata,
			symptom.FromSockets, symptom.FromClusters} {
			if why, unseen := e.Unseen[source]; unseen {
				t.Errorf("an ordinary user cannot see %s: %s", source, why)
			}
		}

		must(t, syscall.Kill(a.PID(), syscall.SIGSTOP))
		e = doctor{m: m, a: a}.examine(t)
		must(t, syscall.Kill(a.PID(), syscall.SIGCONT))
		if e.code != 1 || len(e.found()) != 1 || e.Findings[0].ID != symptom.AgentStuck {
			t.Errorf("a daemon that hangs: %d: %s", e.code, e.text)
		}

		_, err := a.Stop()
		must(t, err)
		// What only the daemon knows is not known then, and the rules are as they should be.
		e = doctor{m: m, a: a}.examine(t)
		if e.code != 2 || len(e.found()) > 0 || len(e.Unseen) != 1 {
			t.Errorf("without the daemon: %d: %s", e.code, e.text)
		}
		_, err = m.VM.Run(t.Context(), "iptables", "-t", "nat", "-F", "SERVICE_PROXY_SERVICE_CIDRS")
		must(t, err)
		e = doctor{m: m, a: a}.examine(t)
		if e.code != 1 || len(e.found()) != 1 || e.Findings[0].ID != symptom.RulesDiffer {
			t.Errorf("rules that nobody repairs: %d: %s", e.code, e.text)
		}

		must(t, a.Start())
		must(t, a.WaitReady(within(t, 30*time.Second)))
		m.Envoy.Kill()
		down := func(what string) {
			t.Helper()
			e := doctor{m: m, a: a}.examine(t)
			if e.code != 1 || len(e.Findings) == 0 || e.Findings[0].ID != symptom.EnvoyDown {
				t.Fatalf("%s: %d: %s", what, e.code, e.text)
			}
			for _, f := range e.Findings[1:] {
				if f.Severity > symptom.Advice && f.ExplainedBy != symptom.EnvoyDown {
					t.Errorf("%s: also %+v", what, f)
				}
			}
		}
		down("Envoy was killed")
		_, err = a.Stop()
		must(t, err)
		down("Envoy was killed, without the daemon")
	})
}

// TestDoctorWhereAllHangs: whatever hangs, doctor ends in time and says that it does not know.
func TestDoctorWhereAllHangs(t *testing.T) {
	t.Parallel()
	m, err := mesh.New(within(t, 30*time.Second), mesh.Options{NoEnvoy: true, Config: services()})
	must(t, err)
	t.Cleanup(func() { must(t, m.Close()) })
	dir := t.TempDir()
	must(t, os.Chmod(dir, 0o755))
	// Envoy's admin interface and the metadata server take connections, and the log is a FIFO.
	var silent []net.Listener
	listen := func(addr string) {
		ln, err := m.VM.ListenAs(lab.EnvoyUID, "tcp", addr)
		must(t, err)
		silent = append(silent, ln)
	}
	listen("127.0.0.1:15000")
	listen("127.0.0.1:8")
	must(t, syscall.Mkfifo(filepath.Join(dir, "log"), 0o644))
	// So does the daemon's socket.
	run := filepath.Join(dir, "run")
	must(t, os.Mkdir(run, 0o755))
	ln, err := net.Listen("unix", filepath.Join(run, "agent.sock"))
	must(t, err)
	silent = append(silent, ln)
	defer func() {
		for _, ln := range silent {
			ln.Close()
		}
	}()
	// And every program that is asked.
	bin := filepath.Join(dir, "bin")
	must(t, os.Mkdir(bin, 0o755))
	for _, name := range []string{"iptables", "ip6tables", "systemctl"} {
		for _, suffix := range []string{"", "-save", "-restore", "-nft", "-legacy"} {
			must(t, os.WriteFile(filepath.Join(bin, name+suffix), []byte("#!/bin/sh\nexec sleep 60\n"), 0o755))
		}
	}
	e := doctor{m: m, a: m.NewAgent(), args: []string{"--envoy-log", filepath.Join(dir, "log")},
		env: []string{"PATH=" + bin + ":" + os.Getenv("PATH"), "RUNTIME_DIRECTORY=" + run,
			"STATE_DIRECTORY=" + filepath.Join(dir, "state"), "GCE_METADATA_HOST=127.0.0.1:8"}}.examine(t)
	if e.code != 2 {
		t.Errorf("exit code %d:\n%s", e.code, e.text)
	}
	if e.took > doctorLimit {
		tooDear(t, "it took %v", e.took)
	}
}

// TestDoctorOfAnotherVM: where nothing of the agent's is, nothing of it is missing: on a VM that
// somebody set up by hand, beside Istio's chains, and in a container beside an Envoy.
func TestDoctorOfAnotherVM(t *testing.T) {
	t.Parallel()
	m, err := mesh.New(within(t, 30*time.Second), mesh.Options{Config: services()})
	must(t, err)
	t.Cleanup(func() { must(t, m.Close()) })
	m.Platform.DeleteAttribute("gce-service-proxy")
	for _, rule := range []string{"-N ISTIO_OUTPUT", "-N ISTIO_REDIRECT",
		"-A ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports 15001", "-A OUTPUT -p tcp -j ISTIO_OUTPUT",
		"-A ISTIO_OUTPUT -d 10.99.0.0/16 -j ISTIO_REDIRECT"} {
		_, err := m.VM.Run(t.Context(), "iptables", append([]string{"-t", "nat"}, strings.Fields(rule)...)...)
		must(t, err)
	}
	before, err := m.VM.Run(t.Context(), "iptables-save")
	must(t, err)
	byHand := doctor{m: m, a: m.NewAgent()}
	if e := byHand.examine(t); e.code != 0 || len(e.found()) > 0 || len(e.Unseen) > 0 {
		t.Errorf("by hand: %d, unseen %v: %s", e.code, e.Unseen, e.text)
	}
	after, err := m.VM.Run(t.Context(), "iptables-save")
	must(t, err)
	if rules(before) != rules(after) {
		t.Errorf("it changed\n%s\ninto\n%s", before, after)
	}

	// A container has neither iptables nor systemd, and another name for Envoy's user.
	container := doctor{m: m, a: m.NewAgent(), args: []string{"--proxy-user", "nobody-of-that-name"},
		under: []string{"unshare", "-m", "sh", "-c", `for p in iptables ip6tables systemctl; do
			for q in $(which -a $p $p-save) /usr/sbin/$p /usr/sbin/$p-save; do
				! [ -e "$q" ] || mount --bind /dev/null "$(readlink -f "$q")"; done; done; exec "$@"`, "sh"}}
	if e := container.examine(t); e.code != 2 || len(e.found()) > 0 ||
		len(e.Unseen) != 2 || e.Unseen[symptom.FromKernel] == "" {
		t.Errorf("in a container: %d, unseen %v: %s", e.code, e.Unseen, e.text)
	}
	m.CP.Refuse(codes.PermissionDenied, "Permission denied.")
	// Whoever comes later finds it in the log's end.
	eventually(t, 20*time.Second, "the stream ends", func() (bool, string) {
		log, err := os.ReadFile(m.Envoy.LogPath)
		return err == nil && strings.Contains(string(log), "closed: 7"), fmt.Sprint(err)
	})
	e := container.examine(t)
	if e.code != 1 || len(e.found()) != 1 || e.Findings[0].ID != symptom.PermissionDenied {
		t.Errorf("refused: %d: %s", e.code, e.text)
	}
	m.CP.Serve()
}

// rules are the lines of a save but for what changes by itself.
func rules(save string) string {
	var all []string
	for line := range strings.Lines(save) {
		if !strings.HasPrefix(line, "#") {
			line, _, _ = strings.Cut(line, "[")
			all = append(all, strings.TrimSpace(line))
		}
	}
	return strings.Join(all, "\n")
}
