//go:build box

package box

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/platform"
)

// nodeOf is the id by which an instance of the box's project presents itself.
func nodeOf(vm platform.VM) string {
	return "projects/123456789012/networks/default/nodes/" + vm.Name + ".us-central1-a." + vm.IP
}

// TestClone is the life of a disk that several VMs have. A node runs; another VM starts from a copy
// of its disk, before its metadata server answers, and comes up as itself; the node itself stays
// what it was over a reboot without a metadata server; then its disk is prepared as an image, and a
// third VM, made of that, is a node after its first boot.
func TestClone(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	if text := os.Getenv("SEED"); text != "" {
		seed, _ = strconv.ParseUint(text, 10, 64)
	}
	t.Logf("SEED=%d", seed)
	random := rand.New(rand.NewPCG(seed, 0))

	first := platform.VM{ID: 4520031799277581759, Name: "vm-1", IP: "10.128.0.2"}
	v := newVM(t, options{instance: first})
	start := time.Now()
	v.boot()
	v.install()
	v.waitFinished(90 * time.Second)
	plain := time.Since(start)
	v.eventually(30*time.Second, "the service answers through Envoy", v.checkVIP)
	v.waitStatus(60*time.Second, progress.Finished)

	t.Run("clone", func(t *testing.T) { v.checkClone(t, random) })
	if t.Failed() {
		return
	}
	v.checkCannotAsk()
	v.checkRebootAlone(t)
	prepared := v.checkImage(t)
	t.Logf("from power on to FINISHED: %.1f s plain, %.1f s from a prepared image",
		plain.Seconds(), prepared.Seconds())
}

// checkClone starts another VM from a copy of the running one's disk.
func (v *VM) checkClone(t *testing.T, random *rand.Rand) {
	second := platform.VM{ID: 7700000000000000002, Name: "vm-2", IP: "10.128.0.3"}
	v.run("sync")
	c := newVM(t, options{of: v, instance: second})
	// In place of the firmware's tag, which no box has, and which no two VMs share.
	c.write("etc/machine-id", strings.Repeat("2a", 16)+"\n", 0o444)
	c.write("etc/hostname", "vm-2\n", 0o644)
	if out, err := c.lab.VM.Run(context.Background(), "ip", "addr", "add", second.IP+"/32", "dev",
		"eth0"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	seen := c.watchStatus(t)
	away := time.Duration(random.IntN(6000)) * time.Millisecond
	back := c.platform.Inject(platform.Fault{Prefix: "/computeMetadata/", Status: http.StatusServiceUnavailable})
	began := time.Now().UTC()
	c.boot()
	c.eventually(30*time.Second, "the agent runs", func() error {
		if have := c.property("service-proxy-agent.service", "ActiveState"); have != "active" {
			return fmt.Errorf("it is %s", have)
		}
		return nil
	})
	time.Sleep(away)
	if have := c.property("service-proxy-envoy.service", "ActiveState"); have != "activating" {
		t.Errorf("Envoy's unit is %s before the metadata server answers", have)
	}
	if nodes := c.xds.Nodes(); len(nodes) > 0 {
		t.Errorf("before it is known which VM this is, it presents itself as %q", nodes[0].ID)
	}
	back()
	// Until bootstrap has begun, what it left on the other VM is on this disk.
	c.eventually(90*time.Second, "bootstrap has finished for this VM", func() error {
		state := c.state()
		if state.Status != progress.Finished || state.Instance != strconv.FormatUint(second.ID, 10) {
			return fmt.Errorf("it is %q for %s; last failure %q", state.Status, state.Instance, state.Failure)
		}
		return nil
	})
	c.eventually(30*time.Second, "the service answers through Envoy", c.checkVIP)
	c.waitStatus(60*time.Second, progress.Finished)
	have := seen()
	t.Logf("the metadata server was away for %v after the agent's start; bootstrap-status was %q", away, have)
	own := fmt.Sprintf("FINISHED of %d, FINISHED", second.ID)
	if !slices.Contains(have, own) {
		t.Errorf("bootstrap-status was never %q", own)
	}
	for _, s := range have {
		if strings.HasPrefix(s, progress.Finished) && s != own {
			t.Errorf("bootstrap-status was %q", s)
		}
	}
	c.waitNode(30*time.Second, func(n controlplane.Node) string {
		return cmp.Diff(nodeOf(second), n.ID)
	})
	for _, n := range c.xds.Nodes() {
		if n.ID != nodeOf(second) {
			t.Errorf("it presented itself as %q", n.ID)
		}
	}
	var s status.Status
	text, _ := c.asks("service-proxy-agent", "status", "-o", "json")
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	if len(s.History) == 0 {
		t.Error("the history is empty")
	}
	for _, line := range s.History {
		if line.Time.Before(began) {
			t.Errorf("in the history: %+v", line)
		}
	}
	c.checkTold(t, string(symptom.OtherVMsState), 1)
	c.doctor(0)
	c.power()
}

// watchStatus notes each bootstrap-status that is seen from outside, in order; of a FINISHED, for
// which instance bootstrap has finished by then.
func (v *VM) watchStatus(t *testing.T) (seen func() []string) {
	ctx, cancel := context.WithCancel(context.Background())
	var all []string
	asks, ended := make(chan chan []string), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case ask := <-asks:
				ask <- slices.Clone(all)
			case <-tick.C:
				s := v.guest(guestattr.BootstrapStatus)
				state, err := progress.Read(filepath.Join(v.root, progress.StateDir))
				if s == progress.Finished && err == nil {
					s += fmt.Sprintf(" of %s, %s", state.Instance, state.Status)
				}
				if s != "" && (len(all) == 0 || all[len(all)-1] != s) {
					all = append(all, s)
				}
			}
		}
	}()
	t.Cleanup(func() { cancel(); <-ended })
	return func() []string {
		ask := make(chan []string)
		asks <- ask
		return <-ask
	}
}

// checkTold says how often a finding was told in the journal, on the serial port and in Cloud
// Logging since this boot.
func (v *VM) checkTold(t *testing.T, id string, times int) {
	t.Helper()
	const words = "State of another VM"
	if have := v.run("journalctl", "-b", "--no-pager", "-q", "-o", "cat", "SERVICE_PROXY_ID="+id); strings.Count(have, words) != times {
		t.Errorf("the journal has\n%s", have)
	}
	if serial := v.Serial(); strings.Count(serial, words) != times {
		t.Errorf("the serial port has\n%s", serial)
	}
	v.eventually(30*time.Second, "Cloud Logging tells it", func() error {
		n := 0
		for _, e := range v.platform.LogEntries() {
			if text, _ := e.JSONPayload["message"].(string); strings.Contains(text, words) {
				n++
			}
		}
		if n != times {
			return fmt.Errorf("%d times", n)
		}
		return nil
	})
}

// checkCannotAsk ends Envoy where its unit cannot ask for a while whose its configuration is: that
// is no answer, and Envoy comes back by itself.
func (v *VM) checkCannotAsk() {
	const unit, program = "service-proxy-envoy.service", "/usr/local/bin/service-proxy-agent"
	before := v.property(unit, "NRestarts")
	v.run("mv", program, program+".away")
	v.run("systemctl", "kill", "--signal=KILL", unit)
	v.eventually(30*time.Second, "it is tried", func() error {
		if have := v.property(unit, "NRestarts"); have == before {
			return fmt.Errorf("%s restarts", have)
		}
		return nil
	})
	time.Sleep(2 * time.Second) // the count comes before the start
	v.run("mv", program+".away", program)
	v.eventually(30*time.Second, "the service answers through Envoy", v.checkVIP)
}

// checkRebootAlone reboots a node whose metadata server is away: Envoy starts as it was configured,
// the kept attribute is in force, and nothing is discarded.
func (v *VM) checkRebootAlone(t *testing.T) {
	config := v.run("cat", "/etc/service-proxy-agent/envoy.json")
	before := v.state()
	v.shutdown()
	back := v.platform.Inject(platform.Fault{Prefix: "/computeMetadata/", Status: http.StatusServiceUnavailable})
	v.boot()
	v.eventually(30*time.Second, "Envoy runs", func() error {
		if have := v.property("service-proxy-envoy.service", "ActiveState"); have != "active" {
			return fmt.Errorf("it is %s", have)
		}
		return nil
	})
	v.eventually(30*time.Second, "the kept attribute is in force", func() error {
		if status, _ := v.try("service-proxy-agent", "status"); !strings.Contains(status, "by an earlier run, and kept") {
			return fmt.Errorf("%s", status)
		}
		return nil
	})
	if have := v.run("cat", "/etc/service-proxy-agent/envoy.json"); have != config {
		t.Errorf("Envoy's configuration was\n%s\nand is\n%s", config, have)
	}
	after := v.state()
	if after.Discarded != nil || after.Instance != before.Instance ||
		after.AttributeSum != before.AttributeSum {
		t.Errorf("bootstrap knew %+v, and knows %+v", before, after)
	}
	back()
	v.waitFinished(90 * time.Second)
	v.eventually(30*time.Second, "the service answers through Envoy", v.checkVIP)
	for _, n := range v.xds.Nodes() {
		if n.ID != nodeOf(v.instance) {
			t.Errorf("it presented itself as %q", n.ID)
		}
	}
	v.checkTold(t, string(symptom.OtherVMsState), 0)
}

// checkImage makes the node's disk an image, and boots another VM of it. It returns how long that
// took, from power on to FINISHED.
func (v *VM) checkImage(t *testing.T) time.Duration {
	if out, code := v.asks("service-proxy-agent", "bootstrap", "--prepare-image"); code != 1 ||
		!strings.Contains(out, "running node") {
		t.Errorf("on a running node: exit code %d\n%s", code, out)
	}
	if err := v.checkVIP(); err != nil {
		t.Errorf("after the refusal: %v", err)
	}
	v.run("systemctl", "stop", "service-proxy-interception.service", "service-proxy-envoy.service")
	t.Log(v.run("service-proxy-agent", "bootstrap", "--prepare-image"))
	for _, dir := range []string{progress.StateDir, "/var/log/envoy", "/etc/service-proxy-agent"} {
		found, err := filepath.Glob(filepath.Join(v.root, dir, "*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range found {
			switch filepath.Base(name) {
			case progress.StateFile, "envoy.err.log", "envoy.out.log":
			default:
				t.Errorf("left: %s", name)
			}
		}
	}
	v.shutdown()
	v.checkNoRules()

	third := platform.VM{ID: 8800000000000000003, Name: "vm-3", IP: "10.128.0.2"}
	v.instance = third
	v.platform.Update(func(vm *platform.VM) { vm.ID, vm.Name = third.ID, third.Name })
	for key := range v.platform.GuestAttributes(guestattr.Namespace) {
		v.platform.DeleteGuestAttribute(guestattr.Namespace, key)
	}
	v.write("etc/machine-id", "", 0o444) // as images have it
	told := len(v.Serial())
	start := time.Now()
	v.boot()
	v.waitFinished(90 * time.Second)
	took := time.Since(start)
	v.eventually(30*time.Second, "the service answers through Envoy", v.checkVIP)
	v.waitNode(30*time.Second, func(n controlplane.Node) string {
		return cmp.Diff(nodeOf(third), n.ID)
	})
	v.waitStatus(60*time.Second, progress.Finished)
	for _, r := range v.platform.Requests() {
		if r.At.After(start) && strings.HasPrefix(r.Host, "storage.") {
			t.Errorf("it asked for %s", r.Path)
		}
	}
	if state := v.state(); state.Discarded != nil || state.Failure != "" ||
		state.Instance != strconv.FormatUint(third.ID, 10) {
		t.Errorf("%+v", state)
	}
	if serial := v.Serial()[told:]; strings.Contains(serial, "another VM") {
		t.Errorf("the serial port has\n%s", serial)
	}
	return took
}
