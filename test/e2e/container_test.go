//go:build lab

package e2e

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/layout"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

const (
	agentUID = lab.EnvoyUID + 1 // with Envoy's group besides
	firstUID = 100_000          // uid 0 of a user namespace
)

// asUnit starts the agent as its unit does: as a user of its own in Envoy's group, with two
// capabilities. Other commands are root's.
const asUnit = `[ "$2" != run ] || set -- setpriv --reuid %[1]d --regid %[1]d --groups %[2]d,%[3]d \
	--inh-caps=-all,+net_admin,+net_raw --ambient-caps=-all,+net_admin,+net_raw \
	--bounding-set=-all,+net_admin,+net_raw --no-new-privs -- "$@"
exec "$@"`

// contained is a mesh whose Envoy runs in a container, and an agent beside it that is not started.
func contained(t *testing.T, c lab.Container) (*mesh.Mesh, *mesh.Agent) {
	t.Helper()
	m, err := mesh.New(within(t, 30*time.Second), mesh.Options{
		Config: services(looping), NoEnvoy: true})
	must(t, err)
	if c.Network != nil {
		c.Network = m.Client
	}
	m.Envoy, err = m.StartEnvoy(lab.EnvoyOptions{ControlPlane: m.CPAddr, Container: &c,
		Args: imageArgs(t)})
	must(t, err)
	a := m.NewAgent("--envoy-admin", "unix://"+m.Envoy.AdminSocket)
	a.Under = []string{"sh", "-c",
		fmt.Sprintf(asUnit, agentUID, lab.EnvoyUID, firstUID+lab.EnvoyUID), "sh"}
	for _, dir := range []string{a.RunDir(), a.StateDir()} {
		must(t, os.MkdirAll(dir, 0o755))
		must(t, os.Chown(dir, agentUID, agentUID))
	}
	must(t, os.Chown(m.Serial.Path, agentUID, -1))
	t.Cleanup(func() {
		if t.Failed() {
			said, _ := os.ReadFile(filepath.Join(m.Dir, "container.out"))
			t.Logf("agent's log:\n%s\nEnvoy's:\n%s\n%s", a.Log(), m.Envoy.LogTail(20), said)
		}
		must(t, m.Close())
	})
	return m, a
}

// containerExamples are the files that docs/container.md tells of.
const containerExamples = "../../deploy/examples/container/"

// imageArgs are Envoy's arguments in the example of its unit.
func imageArgs(t *testing.T) []string {
	t.Helper()
	unit, err := os.ReadFile(containerExamples + systemd.EnvoyUnit)
	must(t, err)
	_, line, _ := strings.Cut(string(unit), " envoyproxy/envoy:")
	line, _, found := strings.Cut(line, "'\n")
	words := strings.Fields(strings.ReplaceAll(line, "\\\n", " "))
	if !found || len(words) < 2 {
		t.Fatalf("no arguments in the example:\n%s", unit)
	}
	return words[1:] // behind the image's tag
}

// looping is a service whose address is its endpoint's: Envoy's own connection to it would come
// back to Envoy, for ever, if the rules did not let it out.
var looping = controlplane.Service{Name: "looping", Port: mesh.EndpointPort, HTTP: true,
	Prefixes: controlplane.VIPs(lab.EndpointAddr(1).String()), Endpoints: endpoints()}

// letOut asks that service, which only an Envoy that is let out can answer.
func letOut(t *testing.T, m *mesh.Mesh) {
	t.Helper()
	at := netip.AddrPortFrom(lab.EndpointAddr(1), mesh.EndpointPort)
	eventually(t, 5*time.Second, "Envoy's own connections", func() (bool, string) {
		resp, err := m.VM.HTTPAs(1000).Get("http://" + at.String() + "/")
		if err != nil {
			return false, err.Error()
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK &&
			resp.Header.Get(controlplane.ServedByHeader) == looping.Name, fmt.Sprint(resp)
	})
}

// TestContainer: an Envoy with root, processes and IPC of its own, on the VM's network and as an
// ordinary user without capabilities, which shares its log and its admin socket with the VM. All is
// as beside an Envoy of the VM's own.
func TestContainer(t *testing.T) {
	t.Parallel()
	m, a := contained(t, lab.Container{})
	m.CP.Hang() // it takes the stream, and answers later
	must(t, m.Envoy.Restart())
	must(t, a.Start())
	_, err := a.Wait(within(t, 10*time.Second), "an Envoy without listeners",
		func(s status.Status) bool { return hasFinding(s, symptom.EnvoyNotConfigured) })
	must(t, err)
	escapes(t, m, web4)
	m.CP.Serve()
	must(t, a.WaitReady(within(t, 20*time.Second)))
	for _, to := range []netip.AddrPort{web4, web6, db4} {
		through(t, m, to)
	}
	letOut(t, m)
	// Inside it has no other process, nor the VM's files.
	if inside, err := os.ReadDir(fmt.Sprintf("/proc/%d/root/proc/1", m.Envoy.PID())); err != nil ||
		len(inside) == 0 {
		t.Errorf("its root: %v", err)
	}
	if _, err := os.Stat(fmt.Sprintf("/proc/%d/root%s", m.Envoy.PID(), m.Dir)); err == nil {
		t.Errorf("it has the VM's %s", m.Dir)
	}

	push, err := m.CP.Set(services(looping, service(1)))
	must(t, err)
	must(t, m.CP.WaitAccepted(within(t, 10*time.Second), push))
	eventually(t, 5*time.Second, "the new service in the rules", func() (bool, string) {
		out := chains(t, m)
		return strings.Contains(out, "-d "+service(1).Prefixes[0].String()), out
	})
	before := chains(t, m)
	_, err = m.VM.Run(t.Context(), "iptables", "-w", "-t", "nat", "-F", "SERVICE_PROXY_SERVICE_CIDRS")
	must(t, err)
	eventually(t, 5*time.Second, "the repair", func() (bool, string) {
		out := chains(t, m)
		return out == before, out
	})

	m.Envoy.Kill()
	_, err = a.Wait(within(t, 10*time.Second), "the failure", func(s status.Status) bool {
		return !s.Ready && strings.HasPrefix(s.LastFailure, "Envoy is not running")
	})
	must(t, err)
	if r, err := lab.HTTPProbe(t.Context(), m.VM, 1000, web4); err == nil {
		t.Errorf("without Envoy: %+v, want a refused connection", r)
	}
	must(t, m.Envoy.Start())
	must(t, a.WaitReady(within(t, 20*time.Second)))
	through(t, m, web4)
	if after := chains(t, m); after != before {
		t.Errorf("the rules changed:\n%s\nbefore:\n%s", after, before)
	}
	s, err := a.Status(t.Context())
	must(t, err)
	if !s.Healthy() || !strings.Contains(a.Log(), "over: Envoy is not running") {
		t.Errorf("findings %v", s.Findings)
	}
}

// TestContainerPaused: SIGSTOP, which is what `docker pause` comes to. The rules stay, and it is
// told.
func TestContainerPaused(t *testing.T) {
	t.Parallel()
	m, a := contained(t, lab.Container{})
	must(t, a.Start())
	must(t, a.WaitReady(within(t, 20*time.Second)))
	through(t, m, web4)
	before := chains(t, m)
	m.Envoy.Pause()
	_, err := a.Wait(within(t, 15*time.Second), "an Envoy that does not answer",
		func(s status.Status) bool {
			return strings.HasPrefix(s.LastFailure, "Envoy's admin interface on unix:///") &&
				strings.Contains(s.LastFailure, "did not answer in time")
		})
	must(t, err)
	if now := chains(t, m); now != before {
		t.Errorf("the rules changed:\n%s\nbefore:\n%s", now, before)
	}
	m.Envoy.Continue()
	must(t, a.WaitReady(within(t, 20*time.Second)))
	through(t, m, web4)
}

// TestContainerApart: what is not set up right for a container is said, with what to do about it.
func TestContainerApart(t *testing.T) {
	t.Parallel()
	bridge := new(lab.Namespace) // stands for the lab's
	for _, tt := range []struct {
		name      string
		container lab.Container
		id        symptom.ID
		says      string // its cause and next step hold each of these, by |
		mend      func(*testing.T, *mesh.Mesh)
	}{
		{"log not shared", lab.Container{LogApart: true}, symptom.LogUnreadable,
			"envoy.log: no such file or directory|in a folder that it shares|--envoy-log",
			func(t *testing.T, m *mesh.Mesh) { // a line that it might have written
				must(t, os.WriteFile(m.Envoy.LogPath, []byte("[…][info][main] […] starting\n"), 0o644))
			}},
		{"socket not shared", lab.Container{SocketApart: true}, symptom.EnvoyDown,
			"Envoy is not running|a container must share the folder of that socket", nil},
		{"socket closed", lab.Container{SocketMode: 0o600}, symptom.AdminUnreadable,
			"permission denied|Envoy's group|mode 0660 (mode: 432)",
			func(t *testing.T, m *mesh.Mesh) { must(t, os.Chmod(m.Envoy.AdminSocket, 0o660)) }},
		{"bridge", lab.Container{Network: bridge}, symptom.InterceptionNotReady,
			"15001 does not accept IPv4|give that the VM's network (--network host)", nil},
		{"published", lab.Container{Network: bridge}, symptom.ForeignOwner,
			"Port 15001 (outbound interception) is held by root|must not be published|the VM's network",
			nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			m, a := contained(t, tt.container)
			if tt.name == "published" {
				publish(t, m, attribute.OutboundPort)
			}
			must(t, a.Start())
			// At first Envoy may only be about to answer, and other words are said.
			_, err := a.Wait(within(t, 20*time.Second), tt.says, func(s status.Status) bool {
				return contains(words(s, tt.id), tt.says)
			})
			must(t, err)
			if tt.id == symptom.LogUnreadable {
				must(t, a.WaitReady(within(t, 20*time.Second))) // it is but a warning
			} else {
				escapes(t, m, web4)
			}
			out, _, _, err := a.RunAs(t.Context(), 0, a.Settings(), "doctor")
			must(t, err)
			// Root may open the socket, and what the daemon cannot see is told.
			if !strings.Contains(out, string(tt.id)) && tt.mend == nil {
				t.Errorf("doctor does not know of %s:\n%s", tt.id, out)
			}
			if strings.Contains(out, "invalid AddrPort") {
				t.Errorf("doctor:\n%s", out)
			}
			if tt.mend == nil {
				return
			}
			tt.mend(t, m)
			_, err = a.Wait(within(t, 10*time.Second), "an end of it", func(s status.Status) bool {
				return s.Ready && !hasFinding(s, tt.id)
			})
			must(t, err)
			through(t, m, web4)
		})
	}
}

// TestContainerUserNamespace: the rules and the owners of sockets know the VM's uids alone. An
// Envoy in a user namespace is another user than --proxy-user says if that is what it is inside;
// with the VM's number all is well.
func TestContainerUserNamespace(t *testing.T) {
	t.Parallel()
	m, a := contained(t, lab.Container{FirstUID: firstUID})
	must(t, a.Start())
	outside := fmt.Sprint(firstUID + lab.EnvoyUID)
	want := "runs as uid " + outside + "|--proxy-user=" + outside
	_, err := a.Wait(within(t, 20*time.Second), want, func(s status.Status) bool {
		return contains(words(s, symptom.EnvoyOtherUser), want)
	})
	must(t, err)
	escapes(t, m, web4)
	a.Kill()
	a.SetArgs("--envoy-admin", "unix://"+m.Envoy.AdminSocket, "--proxy-user", outside)
	must(t, a.Start())
	must(t, a.WaitReady(within(t, 20*time.Second)))
	through(t, m, web4)
	letOut(t, m)
}

// TestContainerInstall: the example installs what the agent needs but for Envoy's image, twice, and
// leaves settings that are there.
func TestContainerInstall(t *testing.T) {
	t.Parallel()
	binary, err := mesh.Binary()
	must(t, err)
	root := t.TempDir()
	settings := filepath.Join(root, "etc/default/service-proxy-agent")
	for range 2 {
		cmd := exec.CommandContext(t.Context(), containerExamples+"install.sh", binary)
		cmd.Env = append(os.Environ(), "ROOT="+root)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	if text, err := os.ReadFile(settings); err != nil ||
		!strings.Contains(string(text), "unix:///run/envoy/admin.sock") {
		t.Errorf("settings: %q, %v", text, err)
	}
	for _, file := range systemd.Files() {
		_, err := os.Stat(filepath.Join(root, file.Path))
		unit := filepath.Base(file.Path)
		want := strings.HasPrefix(file.Path, layout.Archive.UnitDir) && unit != systemd.EnvoyUnit &&
			!strings.HasPrefix(unit, "service-proxy-bootstrap.")
		if want && err != nil {
			t.Error(err)
		}
	}
	for path, mode := range map[string]os.FileMode{
		"usr/local/bin/service-proxy-agent":       0o755,
		"etc/systemd/system/" + systemd.EnvoyUnit: 0o644,
		"var/log/envoy": os.ModeDir | os.ModeSticky | 0o770,
		"usr/local/lib/systemd/system/" + systemd.EnvoyUnit: 0, // not beside the image's
	} {
		info, err := os.Stat(filepath.Join(root, path))
		if (err == nil) != (mode != 0) || err == nil && info.Mode() != mode {
			t.Errorf("%s: %v, want mode %v", path, err, mode)
		}
	}
}

// publish does for a port what Docker's proxy does for `-p`: root listens in the VM, and forwards
// to the container.
func publish(t *testing.T, m *mesh.Mesh, port uint16) {
	t.Helper()
	ln, err := m.Listen(m.VM, netip.AddrPortFrom(netip.IPv4Unspecified(), port))
	must(t, err)
	go func() {
		for {
			from, err := ln.Accept()
			if err != nil {
				return // the lab's end
			}
			go func() {
				defer from.Close()
				to, err := m.Client.Dial(context.Background(), netip.AddrPortFrom(lab.ClientAddr, port))
				if err != nil {
					return
				}
				defer to.Close()
				go func() { _, _ = io.Copy(to, from) }()
				_, _ = io.Copy(from, to)
			}()
		}
	}()
}

// words are what the findings of an ID say.
func words(s status.Status, id symptom.ID) string {
	var all []string
	for _, f := range s.Findings {
		if f.ID == id {
			all = append(all, f.Cause+"; "+f.Next)
		}
	}
	return strings.Join(all, "\n")
}

// contains says whether a text has each of the parts, which | divides.
func contains(text, parts string) bool {
	for part := range strings.SplitSeq(parts, "|") {
		if !strings.Contains(text, part) {
			return false
		}
	}
	return true
}
