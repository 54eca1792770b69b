//go:build box

package box

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/bootstrap"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
)

// install runs gcloud's recipe as OS Config does, and says how long it took.
func (v *VM) install() time.Duration {
	v.t.Helper()
	start := time.Now()
	out, err := v.try("osconfig-recipe")
	if err != nil {
		v.t.Fatalf("the recipe failed: %v\n%s", err, out)
	}
	return time.Since(start)
}

// ready boots a VM, installs, and waits until a service answers.
func ready(t *testing.T, opts options) *VM {
	t.Helper()
	v := newVM(t, opts)
	v.boot()
	v.install()
	v.waitFinished(90 * time.Second)
	v.eventually(30*time.Second, "the service answers through Envoy", v.checkVIP)
	return v
}

// serve starts an application on the serving port.
func (v *VM) serve() {
	v.t.Helper()
	if _, err := v.lab.Echo(v.lab.VM, servingPort, lab.EchoOptions{Name: "application"}); err != nil {
		v.t.Fatal(err)
	}
}

// waitFinished waits for bootstrap itself, not for the guest attribute, which comes
// within its rate budget.
func (v *VM) waitFinished(limit time.Duration) {
	v.t.Helper()
	v.eventually(limit, "bootstrap has finished", func() error {
		if state := v.state(); state.Status != progress.Finished {
			return fmt.Errorf("it is %q at %q; last failure %q", state.Status, state.Step, state.Failure)
		}
		return nil
	})
}

// checkInbound says whether the serving port answers through Envoy, from outside.
func (v *VM) checkInbound() error {
	resp, err := v.lab.Client.HTTP().Get(
		"http://" + netip.AddrPortFrom(lab.VMAddr, servingPort).String() + "/")
	if err != nil {
		return err
	}
	resp.Body.Close()
	if have, want := resp.Header.Get(controlplane.ServedByHeader),
		fmt.Sprintf("inbound-%d", servingPort); !strings.HasPrefix(have, want) {
		return fmt.Errorf("%s is %q, want %q…", controlplane.ServedByHeader, have, want)
	}
	return nil
}

// property is what systemctl shows of a unit.
func (v *VM) property(unit, name string) string {
	v.t.Helper()
	return strings.TrimSpace(v.run("systemctl", "show", "--value", "-p", name, unit))
}

func (v *VM) envoyPID() string { return v.property("service-proxy-envoy.service", "MainPID") }
func (v *VM) agentPID() string { return v.property("service-proxy-agent.service", "MainPID") }

// TestFirstBoot is the whole way: boot, gcloud's recipe, IN PROGRESS, FINISHED, the node as the
// control plane sees it, a service from inside, a serving port from outside, an application that
// waited, the serial port, and that nothing was found wrong. Then what was written, the units,
// and an agent that hangs.
func TestFirstBoot(t *testing.T) {
	t.Parallel()
	for _, release := range releases() {
		t.Run(release, func(t *testing.T) {
			v := newVM(t, options{release: release})
			v.boot()
			before := v.written(t)
			v.run("systemctl", "enable", "application.service")
			if have := v.guest(guestattr.BootstrapStatus); have != "" {
				t.Errorf("before: bootstrap-status %q", have)
			}
			v.serve()
			start := time.Now()
			took := v.install()
			// A busy machine takes its time for both; bootstrap's end is told in its own budget, later.
			if took > 20*time.Second && v.state().Status == progress.Finished {
				t.Errorf("the recipe took %v: it must not wait for bootstrap", took)
			}
			seen := false
			v.eventually(90*time.Second, "bootstrap-status FINISHED", func() error {
				switch status := v.guest(guestattr.BootstrapStatus); status {
				case progress.InProgress:
					seen = true
					return fmt.Errorf("still %q", status)
				case progress.Finished:
					return nil
				default:
					return fmt.Errorf("it is %q: %s", status, v.guest(guestattr.BootstrapLastFailure))
				}
			})
			finished := time.Since(start)
			if !seen {
				t.Error("IN PROGRESS was never seen from outside")
			}
			v.eventually(30*time.Second, "the service answers through Envoy", v.checkVIP)
			t.Logf("the recipe took %.1f s; FINISHED after %.1f s; the service answered after %.1f s",
				took.Seconds(), finished.Seconds(), time.Since(start).Seconds())
			v.eventually(30*time.Second, "the serving port answers through Envoy", v.checkInbound)
			v.eventually(60*time.Second, "proxy-version", func() error {
				if have := v.guest(guestattr.ProxyVersion); !strings.Contains(have, "1.40.0") {
					return fmt.Errorf("it is %q", have)
				}
				return nil
			})
			v.eventually(30*time.Second, "the application that waits for the target runs", func() error {
				out, err := v.try("systemctl", "is-active", "service-proxy-ready.target", "application.service")
				if err != nil {
					return fmt.Errorf("%w: %q", err, out)
				}
				return nil
			})

			nodes := v.xds.Nodes()
			if len(nodes) == 0 {
				t.Fatal("no node asked the control plane")
			}
			node := nodes[0]
			if want := "projects/123456789012/networks/default/nodes/vm-1.us-central1-a.10.128.0.2"; node.ID != want {
				t.Errorf("node id %q, want %q", node.ID, want)
			}
			if node.Authorization != "Bearer "+v.platform.Token() {
				t.Errorf("authorization %q: not the VM's own token", node.Authorization)
			}
			if diff := cmp.Diff(
				nodeMetadata(map[string]any{"app": "review", "TRAFFICDIRECTOR_INBOUND_BACKEND_PORTS": "8080",
					"TRAFFICDIRECTOR_INBOUND_INTERCEPTION_PORT": "15006"}), node.Metadata); diff != "" {
				t.Errorf("node metadata (-want +have):\n%s", diff)
			}
			serial := v.Serial()
			for _, line := range []string{bootstrap.StepInstall, bootstrap.StepPackages, bootstrap.StepEnvoy,
				bootstrap.StepStart, "finished: Envoy 1.40.0"} {
				if !strings.Contains(serial, line) {
					t.Errorf("the serial port does not tell %q:\n%s", line, serial)
				}
			}
			v.eventually(30*time.Second, "Cloud Logging tells the end of the story too", func() error {
				for _, e := range v.platform.LogEntries() {
					if text, _ := e.JSONPayload["message"].(string); strings.HasPrefix(text, "ready: Envoy ") {
						return nil
					}
				}
				return fmt.Errorf("it has %+v", v.platform.LogEntries())
			})
			v.checkQuiet(t)
			v.checkSystem(t)
			v.checkWritten(t, before)
			v.checkUnits(t)
			if out := v.run("systemctl", "list-units", "--no-legend", "--failed",
				"service-proxy-*"); out != "" {
				t.Errorf("failed units:\n%s", out)
			}
			v.checkWatchdog(t)
		})
	}
}

// releases are the Debians to boot: all with SOAK=1.
func releases() []string {
	if os.Getenv("SOAK") != "" {
		return []string{"bookworm", "bullseye", "trixie"}
	}
	return []string{"bookworm"}
}

// nodeMetadata is what every node of the box says, and more.
func nodeMetadata(more map[string]any) map[string]any {
	meta := map[string]any{
		"INSTANCE_IP": "10.128.0.2", "TRAFFICDIRECTOR_CLIENT_TYPE": "gce-managed-envoy", "TRAFFICDIRECTOR_INTERCEPTION_PORT": "15001",
		"TRAFFICDIRECTOR_NETWORK_NAME": "default", "TRAFFICDIRECTOR_GCP_PROJECT_NUMBER": "123456789012", "TRAFFICDIRECTOR_ENABLE_TRACING": "false",
	}
	maps.Copy(meta, more)
	return meta
}

// TestLiveAttribute changes the attribute of a running VM: what Envoy need not know takes effect
// without its restart, what it must know by a hot restart, with no connection lost; a malformed one
// changes nothing. The captures of real gcloud go through it one after the other.
func TestLiveAttribute(t *testing.T) {
	t.Parallel()
	v := ready(t, options{})
	excluded := regexp.MustCompile(`-d 198\.51\.100\.0/24 .*-j RETURN`)
	pid := v.envoyPID()

	v.platform.SetAttribute("gce-service-proxy", fmt.Sprintf(`{"api-version": "0.2", "service": {"serving-ports": [%d]}, "labels": {"app": "review"},
		"proxy-spec": {"network": ""}, "traffic-interception": {"exclude-outbound-ip-ranges": ["198.51.100.0/24"]}}`, servingPort))
	start := time.Now()
	v.eventually(15*time.Second, "the exclude is in the rules", func() error {
		if rules := v.run("iptables-save", "-t", "nat"); !excluded.MatchString(rules) {
			return fmt.Errorf("the rules are\n%s", rules)
		}
		return nil
	})
	t.Logf("an exclude took effect in %.1f s", time.Since(start).Seconds())
	v.platform.SetAttribute("gce-service-proxy", `{"labels": {"app": 5}}`)
	time.Sleep(3 * time.Second)
	// Over a restart, too: the agent's own user has kept the last good one.
	v.run("systemctl", "restart", "service-proxy-agent.service")
	v.eventually(15*time.Second, "the kept attribute is in force", func() error {
		status := v.run("sh", "-c",
			"service-proxy-agent status; stat -c '%a %U' /var/lib/service-proxy-agent/attribute.json")
		if !strings.Contains(status, "by an earlier run, and kept") ||
			!strings.Contains(status, "600 service-proxy-agent\n") {
			return errors.New(status)
		}
		return nil
	})
	if kept := v.run("cat", "/var/lib/service-proxy-agent/attribute.json"); !strings.Contains(
		kept, `"machine":"`) || !strings.Contains(kept, `"instance":"`) {
		t.Errorf("it does not say whose it is: %s", kept)
	}
	agent := strings.TrimSpace(
		v.run("systemctl", "show", "--value", "-p", "MainPID", "service-proxy-agent.service"))
	if rules := v.run("iptables-save", "-t", "nat"); !excluded.MatchString(rules) {
		t.Errorf("a malformed attribute changed the rules:\n%s", rules)
	}
	if have := v.envoyPID(); have != pid {
		t.Errorf("Envoy was restarted: pid %s, then %s", pid, have)
	}

	load := v.startLoad(200)
	time.Sleep(time.Second)
	v.platform.SetAttribute("gce-service-proxy",
		fmt.Sprintf(
			`{"api-version": "0.2", "service": {"serving-ports": [%d]}, "labels": {"app": "other"}, "proxy-spec": {"network": ""}}`, servingPort))
	v.waitNode(30*time.Second, func(n controlplane.Node) string {
		return cmp.Diff("other", n.Metadata["app"])
	})
	time.Sleep(3 * time.Second)
	load.refusedNone(t, "a changed label restarted Envoy")
	if have := v.agentPID(); have != agent {
		t.Errorf("the agent was restarted: pid %s, then %s", agent, have)
	}

	files, err := filepath.Glob("../../internal/attribute/testdata/*.attr")
	if err != nil || len(files) == 0 {
		t.Fatal("no captures", err)
	}
	ports := map[string]any{"TRAFFICDIRECTOR_INBOUND_BACKEND_PORTS": "80,8080",
		"TRAFFICDIRECTOR_INBOUND_INTERCEPTION_PORT": "15006"}
	with := func(a, b map[string]any) map[string]any { c := maps.Clone(a); maps.Copy(c, b); return c }
	labels := map[string]any{"app": "review", "version": "canary"}
	want := map[string]map[string]any{
		"agent-location": nodeMetadata(ports), "docs-example": nodeMetadata(labels), "intercept-all-excludes": nodeMetadata(ports),
		"intercept-all-exclude-reversed-ports": nodeMetadata(nil),
		"intercept-dns":                        nodeMetadata(map[string]any{"TRAFFICDIRECTOR_INBOUND_BACKEND_PORTS": "80", "TRAFFICDIRECTOR_INBOUND_INTERCEPTION_PORT": "15006"}),
		"labels-odd":                           nodeMetadata(map[string]any{"app": `a,b "q" \ x`, "unicode": "é中", "empty": ""}),
		"everything": nodeMetadata(with(with(ports, labels), map[string]any{"TRAFFICDIRECTOR_ENABLE_TRACING": "true",
			"TRAFFICDIRECTOR_ACCESS_LOG_PATH": "/var/log/envoy/access.log"})),
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".attr")
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if name == "asm-managed" {
			continue // refused: TestMachineFailures
		}
		id := "projects/123456789012/networks/default/nodes/vm-1.us-central1-a.10.128.0.2"
		if name == "everything" {
			// Its primary-source is another than what Envoy came from: it is installed anew from there.
			v.platform.PutObject("my-bucket", "envoy.tgz", envoyArchive(t))
			id = "projects/123456789012/networks/mesh:sidecar-mesh/nodes/vm-1.us-central1-a.10.128.0.2"
		}
		v.endDrain()
		v.platform.SetAttribute("gce-service-proxy", string(text))
		v.waitNode(60*time.Second, func(n controlplane.Node) string {
			return cmp.Diff(want[name], n.Metadata) + cmp.Diff(id, n.ID)
		})
	}
}

// endDrain has the Envoy before the one that serves end now: the next hot restart waits for it.
func (v *VM) endDrain() {
	v.t.Helper()
	if all := v.epochs(); len(all) > 1 {
		v.run("sh", "-c", fmt.Sprintf("kill %d || true", all[0].pid))
	}
}

// waitNode waits until the newest stream's node is as diff wants it ("": it is).
func (v *VM) waitNode(limit time.Duration, diff func(controlplane.Node) string) {
	v.t.Helper()
	v.eventually(limit, "the node at the control plane", func() error {
		nodes := v.xds.Nodes()
		if len(nodes) == 0 {
			return fmt.Errorf("none")
		}
		if d := diff(nodes[len(nodes)-1]); d != "" {
			return fmt.Errorf("(-want +have)\n%s", d)
		}
		return nil
	})
}

// load is new connections to the service at a steady rate, as an ordinary user of the VM.
type load struct {
	cancel    context.CancelFunc
	done      chan struct{}
	perSecond int

	mu            sync.Mutex
	total, failed int
	last          time.Time // of the last success
	gap           time.Duration
	firstError    string
	cut           int       // failures of connections that Envoy had accepted
	began, ended  time.Time // when the first and the last connection that failed were begun
	// failures other than these and of a port that nobody listens on for the moment
	unexplained []string
}

func (v *VM) startLoad(perSecond int) *load {
	ctx, cancel := context.WithCancel(context.Background())
	l := &load{cancel: cancel, done: make(chan struct{}), perSecond: perSecond, last: time.Now()}
	client := v.lab.VM.HTTPAs(12345)
	// One that hangs is neither refused nor cut. It is told from one that an Envoy accepts late, which
	// has to share the processors while it starts (handed and outage: up to ten seconds).
	client.Timeout = 5 * time.Second
	if os.Getenv("SOAK") == "" {
		client.Timeout *= 3
	}
	go func() {
		defer close(l.done)
		var all sync.WaitGroup
		tick := time.NewTicker(time.Second / time.Duration(perSecond))
		defer tick.Stop()
		for ctx.Err() == nil {
			<-tick.C
			all.Add(1)
			go func() {
				defer all.Done()
				begun := time.Now()
				err := get(client)
				l.mu.Lock()
				defer l.mu.Unlock()
				l.total++
				if err != nil {
					if l.failed++; l.began.IsZero() || begun.Before(l.began) {
						l.began = begun
					}
					if begun.After(l.ended) {
						l.ended = begun
					}
					if l.firstError == "" {
						l.firstError = err.Error()
					}
					switch {
					case errors.Is(err, syscall.ECONNREFUSED):
					case errors.Is(err, syscall.ECONNRESET), errors.Is(err, io.EOF),
						strings.Contains(err.Error(), "server closed idle connection"): // before it asked
						l.cut++
					default:
						l.unexplained = append(l.unexplained, err.Error())
					}
					return
				}
				l.gap = max(l.gap, time.Since(l.last))
				l.last = time.Now()
			}()
		}
		all.Wait()
	}()
	return l
}

func get(client *http.Client) error {
	resp, err := client.Get("http://" + vip.String() + "/")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK || resp.Header.Get(controlplane.ServedByHeader) != "web" {
		return fmt.Errorf("status %d, served by %q", resp.StatusCode,
			resp.Header.Get(controlplane.ServedByHeader))
	}
	return nil
}

// stop ends the load and says how many connections were made, how many failed or escaped, and the
// longest time between two successes.
func (l *load) stop() (total, failed int, gap time.Duration) {
	l.cancel()
	<-l.done
	return l.total, l.failed, l.gap
}

// outage ends the load, during which Envoy was restarted. It has held if all connections that were
// lost were begun within 2 s, when nobody listened: none hung, none went past Envoy, and few were
// cut that Envoy took in its last moment, before it ended at TERM. In make test, where Envoy may
// have to share the processors while it starts, all of that may take five times as long.
func (l *load) outage(t *testing.T, what string) {
	t.Helper()
	limit, lastMoment := 2*time.Second, l.perSecond/10
	if os.Getenv("SOAK") == "" {
		limit, lastMoment = 5*limit, 5*lastMoment
	}
	total, failed, gap := l.stop()
	t.Logf("%s: of %d new connections %d failed, %d of them cut, the longest time without one was %v",
		what, total, failed, l.cut, gap)
	if gap > limit {
		t.Errorf("%s: the gap for new connections was %v, want at most %v", what, gap, limit)
	}
	if len(l.unexplained) > 0 {
		t.Errorf("%s: %d connections neither refused nor cut, first %s", what, len(l.unexplained),
			l.unexplained[0])
	}
	if l.cut > lastMoment {
		t.Errorf("%s: %d connections were cut, want at most %d", what, l.cut, lastMoment)
	}
	if outage := l.ended.Sub(l.began); outage > limit {
		t.Errorf("%s: connections failed over %v, want at most %v", what, outage, limit)
	}
	if total-failed < l.perSecond {
		t.Errorf("%s: only %d connections were made", what, total-failed)
	}
}

// TestUpgrade reinstalls, upgrades and rolls back under load, without a lost connection and with
// the same Envoy process; then reboots.
func TestUpgrade(t *testing.T) {
	t.Parallel()
	v := ready(t, options{})
	pid := v.envoyPID()
	seconds := 3
	if os.Getenv("SOAK") != "" {
		seconds = 30
	}
	for _, step := range []struct {
		name, version string
		do            func()
	}{
		{"reinstall", "1.0.0", func() { v.install() }},
		{"upgrade", "2.0.0", func() {
			v.platform.PutObject(bucket, archive, packageRelease(t, "2.0.0", envoyBinary(t)))
			v.install()
		}},
		{"rollback", "1.0.0", func() { t.Log(v.run("service-proxy-agent", "bootstrap", "--rollback")) }},
		{"a startup-script with the archive that was rolled back", "1.0.0", func() { v.install() }},
	} {
		load := v.startLoad(200)
		time.Sleep(time.Second)
		step.do()
		time.Sleep(time.Duration(seconds) * time.Second)
		total, failed, gap := load.stop()
		t.Logf("%s: %d connections, %d lost, longest gap %v", step.name, total, failed, gap)
		if failed > 0 {
			t.Errorf("%s: %d of %d connections were lost: %s", step.name, failed, total, load.firstError)
		}
		if have := v.envoyPID(); have != pid {
			t.Errorf("%s: Envoy was restarted: pid %s, then %s", step.name, pid, have)
		}
		if out := v.run("service-proxy-agent", "version"); !strings.Contains(out, step.version) {
			t.Errorf("%s: version %q, want %s", step.name, out, step.version)
		}
		v.waitFinished(60 * time.Second)
	}
	v.shutdown()
	v.checkNoRules()
	v.boot()
	v.eventually(60*time.Second, "after a reboot: the service answers through Envoy", v.checkVIP)
	v.waitFinished(60 * time.Second)
	v.waitStatus(90*time.Second, progress.Finished)
}

// TestPowerCut kills the box at moments of bootstrap; the next boot always ends in FINISHED.
// OS Config, which records a recipe when it has ended, runs it again where it was cut off
// itself. The short form cuts in the recipe and in the two steps that write most; the long one
// at 20 random moments.
func TestPowerCut(t *testing.T) {
	t.Parallel()
	type cut struct {
		step  string // wait until bootstrap is there; "": from the recipe's start
		after time.Duration
	}
	cuts := []cut{{"", 900 * time.Millisecond}, {bootstrap.StepPackages, time.Second},
		{bootstrap.StepEnvoy, 0}}
	if os.Getenv("SOAK") != "" {
		cuts = nil
		for range 20 {
			cuts = append(cuts, cut{"", rand.N(9 * time.Second)})
		}
	}
	for i, c := range cuts {
		t.Run(fmt.Sprintf("%d %s %v", i, c.step, c.after), func(t *testing.T) {
			v := newVM(t, options{})
			v.boot()
			recorded := make(chan bool, 1)
			go func() {
				_, err := v.try("osconfig-recipe")
				recorded <- err == nil
			}()
			if c.step != "" {
				v.eventually(60*time.Second, "bootstrap is at "+c.step, func() error {
					if have := v.state(); have.Step != c.step && have.Status != progress.Finished {
						return fmt.Errorf("it is at %q", have.Step)
					}
					return nil
				})
			}
			time.Sleep(c.after)
			at := v.state()
			v.power()
			done := <-recorded
			t.Logf("cut: recipe recorded: %v, bootstrap %q at %q", done, at.Status, at.Step)
			v.boot()
			if !done {
				v.install()
			}
			v.waitFinished(120 * time.Second)
			v.eventually(30*time.Second, "the service answers through Envoy", v.checkVIP)
			for _, dir := range []string{"usr/local/bin", "etc/service-proxy-agent",
				"usr/local/lib/service-proxy-agent"} {
				left, err := filepath.Glob(filepath.Join(v.root, dir, ".*new*"))
				if err != nil || len(left) > 0 {
					t.Errorf("left behind: %v, %v", left, err)
				}
			}
		})
	}
}

// TestShutdown looks at the order: application, agent, rules, Envoy drained, Envoy. On an image
// that has iptables and uses its legacy backend: the agent's own user takes the lock that root
// made, and has the modules loaded for it.
func TestShutdown(t *testing.T) {
	t.Parallel()
	v := newVM(t, options{prepare: func(root string) {
		if err := os.MkdirAll(filepath.Join(root, "var/log/journal"), 0o755); err != nil {
			t.Fatal(err)
		}
		// The kernel here may have them built in, so there is only the call to see.
		const modprobe = "#!/bin/sh\necho \"$*\" >>/run/modprobe.log\n"
		if err := os.WriteFile(filepath.Join(root, "usr/sbin/modprobe"), []byte(modprobe),
			0o755); err != nil {
			t.Fatal(err)
		}
		const legacy = `apt-get -qq update && apt-get -qq -y install iptables &&
			update-alternatives --set iptables /usr/sbin/iptables-legacy &&
			update-alternatives --set ip6tables /usr/sbin/ip6tables-legacy`
		if out, err := exec.Command("chroot", root, "sh", "-c", legacy).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}})
	v.boot()
	v.serve() // else that is warned of
	v.run("systemctl", "enable", "application.service")
	// as Docker might: the lock is root's, 0600
	v.run("sh", "-c", "rm -f /run/xtables.lock; iptables -t nat -nL")
	if have := v.run("stat", "-c", "%a %U", "/run/xtables.lock"); have != "600 root\n" {
		t.Errorf("the lock is %q before", have)
	}
	v.install()
	v.waitFinished(90 * time.Second)
	v.eventually(30*time.Second, "the service answers through Envoy", v.checkVIP)
	v.eventually(30*time.Second, "the serving port's row", func() error {
		return v.checkRows("iptables-legacy-save", true)
	})
	for _, program := range []string{"iptables-nft-save", "ip6tables-nft-save"} {
		if err := v.checkRows(program, false); err != nil {
			t.Error(err)
		}
	}
	v.checkQuiet(t)
	if have := v.run("stat", "-c", "%a %U %G",
		"/run/xtables.lock"); have != "660 root service-proxy-agent\n" {
		t.Errorf("the lock is %q", have)
	}
	if asked := v.run("cat", "/run/modprobe.log"); !strings.Contains(asked, "ip_tables") ||
		!strings.Contains(asked, "ip6_tables") {
		t.Errorf("modprobe was asked for %q", asked)
	}
	for _, module := range []string{"ip_tables", "ip6_tables"} {
		loaded := v.property("modprobe@"+module+".service", "ExecMainExitTimestampMonotonic")
		started := v.property("service-proxy-agent.service", "ExecMainStartTimestampMonotonic")
		if a, err := strconv.Atoi(loaded); err != nil || a == 0 {
			t.Errorf("modprobe@%s ended at %q", module, loaded)
		} else if b, err := strconv.Atoi(started); err != nil || b < a {
			t.Errorf("the agent started at %q, before %s was loaded at %q", started, module, loaded)
		}
	}
	v.eventually(30*time.Second, "the application runs", func() error {
		_, err := v.try("systemctl", "is-active", "application.service")
		return err
	})
	// A stop by hand takes the rules out, and what is there from then on is not the agent's.
	v.run("systemctl", "stop", "service-proxy-interception.service")
	if have := v.property("service-proxy-interception.service", "Result"); have != "success" {
		t.Errorf("the stop of the interception: %s", have)
	}
	if have := v.run("cat", "/run/service-proxy-agent/intercepting"); have != "none\n" {
		t.Errorf("the mark of rules of this boot holds %q", have)
	}
	if err := v.checkRows("iptables-legacy-save", false); err != nil {
		t.Error(err)
	}
	v.run("systemctl", "start", "service-proxy-agent.service")
	v.eventually(30*time.Second, "the rules are back", func() error {
		return v.checkRows("iptables-legacy-save", true)
	})
	start := time.Now()
	v.shutdown()
	t.Logf("the shutdown took %.1f s", time.Since(start).Seconds())
	journal, err := v.lab.Service.Run(context.Background(), "journalctl", "--no-pager", "-o", "cat",
		"-D", filepath.Join(v.root, "var/log/journal"))
	if err != nil {
		t.Fatal(err)
	}
	at := 0
	for _, line := range []string{"Stopped application.service", "Stopped service-proxy-agent.service",
		"Stopped service-proxy-interception.service", "Stopped service-proxy-envoy.service"} {
		next := strings.LastIndex(journal, line)
		if next < 0 || next < at {
			t.Errorf("%q is not in its place in the journal", line)
		}
		at = max(at, next)
	}
	v.checkNoRules()
}

// checkRows says whether the program shows rules of ours, by want.
func (v *VM) checkRows(program string, want bool) error {
	rules, err := v.lab.VM.Run(context.Background(), program, "-t", "nat")
	if err != nil {
		return err
	}
	if strings.Contains(rules, "SERVICE_PROXY_") != want {
		return fmt.Errorf("%s shows\n%s", program, rules)
	}
	return nil
}

// checkNoRules is for after a shutdown: the network namespace outlives the box.
func (v *VM) checkNoRules() {
	v.t.Helper()
	for _, program := range []string{"iptables-nft-save", "ip6tables-nft-save", "iptables-legacy-save",
		"ip6tables-legacy-save"} {
		if err := v.checkRows(program, false); err != nil {
			v.t.Errorf("after the shutdown: %v", err)
		}
	}
}

// TestIPv6Only installs on a VM that has no IPv4: its metadata server is fd20:ce::254, its node's
// address an IPv6 one, and the service is reached by IPv6.
func TestIPv6Only(t *testing.T) {
	t.Parallel()
	v := ready(t, options{ipv6: true})
	v.serve() // else that is warned of
	if out := v.run("ip", "-4", "-o", "addr", "show", "scope", "global"); out != "" {
		t.Fatalf("the VM has IPv4: %s", out)
	}
	v.waitStatus(60*time.Second, progress.Finished)
	want := "projects/123456789012/networks/default/nodes/vm-1.us-central1-a." + lab.VMAddr6.String()
	v.waitNode(10*time.Second, func(n controlplane.Node) string {
		return cmp.Diff(want, n.ID) + cmp.Diff(any(lab.VMAddr6.String()), n.Metadata["INSTANCE_IP"])
	})
	if rules := v.run("ip6tables-save", "-t", "nat"); !strings.Contains(
		rules, "-d "+vip6.Addr().String()+"/128") {
		t.Errorf("the rules are\n%s", rules)
	}
	v.checkQuiet(t)
}

// TestNewUser does what the README says: installs, sees it work, breaks it and finds out why; then
// takes everything away again.
func TestNewUser(t *testing.T) {
	t.Parallel()
	v := newVM(t, options{})
	v.boot()
	v.walk(t)
	const man = "/usr/local/share/man/man8/service-proxy-agent.8"
	v.run("test", "-e", man)
	said, code := v.typed(`sudo service-proxy-agent bootstrap --remove`)
	if code != 0 {
		t.Errorf("exit code %d", code)
	}
	t.Log(said)
	for _, rule := range []string{"jump -A OUTPUT", "SERVICE_PROXY_SERVICE_CIDRS"} {
		if !strings.Contains(said, rule) {
			t.Errorf("it does not say that it removed %s", rule)
		}
	}
	for _, name := range []string{man, "/usr/local/bin/envoy", "/usr/local/bin/service-proxy-agent",
		"/etc/service-proxy-agent", "/usr/local/lib/service-proxy-agent",
		"/var/lib/service-proxy-agent", "/var/log/envoy", "/run/service-proxy-agent", "/usr/local/lib/systemd/system/service-proxy-agent.service"} {
		if out, err := v.try("test", "-e", name); err == nil {
			t.Errorf("left behind: %s %s", name, out)
		}
		if !strings.Contains(said, name) {
			t.Errorf("it does not say that it removed %s", name)
		}
	}
	if out := v.run("sh", "-c",
		"find / -xdev -name '*service-proxy*' -not -path '/proc/*' -not -path '/var/log/journal/*'; grep -E '^(envoy|service-proxy-agent):' /etc/passwd || true"); strings.TrimSpace(out) != "" {
		t.Errorf("left behind:\n%s", out)
	}
	if rules := v.run("iptables-save", "-t", "nat"); strings.Contains(rules, "SERVICE_PROXY") {
		t.Errorf("left behind:\n%s", rules)
	}
	if list := v.run("journalctl", "--list-catalog"); strings.Contains(list, "service-proxy-agent") {
		t.Errorf("left behind in the journal's catalog:\n%s", list)
	}
	// And it can be installed again. What was spent of the budget of guest attributes is forgotten
	// with all else: nine queries in that minute at the most, of the ten that Compute Engine allows.
	v.platform.ResetBudget()
	v.install()
	v.waitFinished(90 * time.Second)
	v.eventually(30*time.Second, "the service answers through Envoy", v.checkVIP)
}

// TestStartupScript installs from deploy/examples/startup-script.sh at every boot, as Google's
// guest agent runs it, on a VM whose /tmp is noexec: the boot is not held up, nothing waits for
// itself, nothing is left over, and a second boot finds everything done.
func TestStartupScript(t *testing.T) {
	t.Parallel()
	v := newVM(t, options{prepare: func(root string) {
		for name, text := range map[string]string{
			"usr/bin/google_metadata_script_runner":             startupScripts,
			"etc/systemd/system/google-startup-scripts.service": startupUnit,
		} {
			if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Symlink("/etc/systemd/system/google-startup-scripts.service",
			filepath.Join(root,
				"etc/systemd/system/multi-user.target.wants/google-startup-scripts.service")); err != nil {
			t.Fatal(err)
		}
	}})
	// which template.tf replaces, too
	const placeholder = "gs://BUCKET/service-proxy-agent-VERSION.tgz"
	script := v.example("startup-script.sh")
	if !strings.Contains(script, placeholder) ||
		!strings.Contains(v.example("template.tf"), placeholder) {
		t.Fatalf("no %q in the examples", placeholder)
	}
	v.platform.SetAttribute(
		"startup-script", strings.ReplaceAll(script, placeholder, "gs://"+bucket+"/"+archive))
	for boot := range 2 {
		start := time.Now()
		v.boot()
		v.eventually(40*time.Second, "multi-user.target", func() error {
			_, err := v.try("systemctl", "is-active", "multi-user.target")
			return err
		})
		booted := time.Since(start)
		v.waitFinished(90 * time.Second)
		v.eventually(30*time.Second, "the service answers through Envoy", v.checkVIP)
		v.eventually(30*time.Second, "the script has ended", func() error {
			if have := v.property("google-startup-scripts.service", "ActiveState"); have != "inactive" {
				return fmt.Errorf("it is %s", have)
			}
			return nil
		})
		if left := v.run("sh", "-c",
			"ls -d /var/lib/service-proxy-agent-* /var/lib/metadata-scripts* 2>/dev/null || true"); left != "" {
			t.Errorf("left behind: %s", left)
		}
		t.Logf("boot %d: multi-user.target after %.1f s, the service answered after %.1f s", boot+1,
			booted.Seconds(), time.Since(start).Seconds())
		if boot == 0 {
			v.shutdown()
		}
	}
}
