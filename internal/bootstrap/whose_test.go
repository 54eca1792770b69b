package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/service-proxy-agent/service-proxy-agent/internal/identity"
	"github.com/service-proxy-agent/service-proxy-agent/internal/layout"
	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// machine makes the root that of this machine, in this boot; tag "" is a machine whose firmware
// does not tell it from a clone.
func (v *fakeVM) machine(id, tag, boot string) {
	v.Helper()
	v.put("/etc/machine-id", id+"\n")
	v.put("/sys/class/dmi/id/board_asset_tag", tag+"\n")
	v.put("/proc/sys/kernel/random/boot_id", boot+"\n")
}

// idServer is a metadata server that tells this instance id, and of the attribute that there is
// none; "": it is away.
func idServer(t *testing.T, id string) {
	t.Helper()
	if id == "" {
		t.Setenv("GCE_METADATA_HOST", "127.0.0.1:1")
		return
	}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasSuffix(r.URL.Path, "/instance/id") {
			http.NotFound(w, r)
			return
		}
		_, _ = io.WriteString(w, id)
	}))
	t.Cleanup(srv.Close)
	t.Setenv("GCE_METADATA_HOST", strings.TrimPrefix(srv.URL, "http://"))
}

// asking is for a question to that server: one that is away is not waited for.
func asking(t *testing.T) (context.Context, context.CancelFunc) {
	if strings.HasSuffix(os.Getenv("GCE_METADATA_HOST"), ":1") {
		return context.WithTimeout(t.Context(), 50*time.Millisecond)
	}
	return context.WithCancel(t.Context())
}

// own is what Envoy's unit asks.
func (v *fakeVM) own(boot string) error {
	ctx, cancel := asking(v.T)
	defer cancel()
	return Own(ctx, v.options(), boot)
}

// finished is what a node knows of itself at last, but for whose it is.
var finished = progress.State{
	Status: progress.Finished, EnvoyVersion: "1.30.1", EnvoySource: "gs://b/1.tgz", PrimarySum: "s1",
	PreviousSource: "gs://b/0.tgz", PreviousSum: "s0", AttributeSum: "a", MadeUsers: []string{EnvoyUser},
	MadeLogs: true,
	Failure:  "of long ago", Envoy: &progress.EnvoyConfig{File: EnvoyConfig, Node: "vm-1"},
	Story: []progress.Line{{Seq: 7, Severity: "INFO", Text: "finished"}},
}

// node lays down all that a finished node, the instance 1, has on its disk.
func (v *fakeVM) node() {
	v.Helper()
	b := newBootstrapper(v.options())
	b.vm.Instance = "1"
	v.put(filepath.Join(layout.Here.UnitDir, systemd.EnvoyUnit), "[Service]\n")
	v.put(EnvoyConfig, `{"node":{"id":"vm-1"}}`)
	v.put(filepath.Join(previousDir, "envoy"), "x")
	v.put("/var/log/envoy/envoy.err.log", "of vm-1\n")
	v.put("/var/log/envoy/envoy.err.log.1", "of vm-1\n")
	state := finished
	state.Owner = b.vm.Owner
	mkdir(v.T, b.path(progress.StateDir), 0o700)
	for _, err := range []error{
		progress.Write(b.path(progress.StateDir), state), b.writeOwner(b.vm.Owner),
		b.writeRolledBack(rolledBack{EnvoySource: "s2"}),
	} {
		if err != nil {
			v.Fatal(err)
		}
	}
}

// begin is a start of bootstrap as far as whose the disk is.
func (v *fakeVM) begin() (*bootstrapper, error) {
	b := newBootstrapper(v.options())
	b.readState()
	b.state.Attempt = 1
	b.begin(StepAttribute)
	ctx, cancel := asking(v.T)
	defer cancel()
	err := b.claim(ctx)
	if err == nil {
		b.save()
	}
	return b, err
}

// left are the files that are a VM's, and of a node.
func (v *fakeVM) left() (names []string) {
	for _, name := range []string{EnvoyConfig, rolledBackFile, previousDir, "/var/log/envoy/envoy.err.log.1"} {
		if _, err := os.Lstat(filepath.Join(v.root, name)); err == nil {
			names = append(names, name)
		}
	}
	return names
}

// checkNew says whether the VM goes on without another's past, and with what is true of its disk.
func (v *fakeVM) checkNew(instance, other string) {
	v.Helper()
	state := v.state()
	want := finished.OfDisk()
	want.Owner = identity.Here(v.root).Owner
	want.Instance = instance
	want.Status, want.Step, want.Attempt = state.Status, state.Step, state.Attempt
	want.Time, want.Discarded, want.Story = state.Time, state.Discarded, state.Story
	for _, line := range state.Story {
		if line.Text == finished.Story[0].Text {
			v.Errorf("told of another: %+v", line)
		}
	}
	if d := cmp.Diff(want, state); d != "" || state.Status == progress.Finished {
		v.Errorf("(-want +have)\n%s", d)
	}
	if d := state.Discarded; d == nil || d.Instance != other || d.This != instance ||
		len(d.What) != 1+len(ofVM) {
		v.Errorf("discarded: %+v", d)
	}
	if left := v.left(); left != nil {
		v.Errorf("left: %q", left)
	}
	if text := read(v.T, filepath.Join(v.root, "/var/log/envoy/envoy.err.log")); text != "" {
		v.Errorf("Envoy's log has %q", text)
	}
	if of := identity.Read(filepath.Join(v.root, progress.OwnerFile)); of != want.Owner {
		v.Errorf("the disk is %+v's, want %+v's", of, want.Owner)
	}
}

// TestClone: a disk that another VM has left becomes this VM's own as soon as its id is known, also
// where the machine looks the same, and where the attribute is missing.
func TestClone(t *testing.T) {
	for _, tag := range []string{"tag-2", ""} {
		t.Run("tag "+tag, func(t *testing.T) {
			v := newFakeVM(t)
			v.machine("m", strings.Replace(tag, "2", "1", 1), "b1")
			v.node()
			v.machine("m", tag, "b2")
			idServer(t, "")
			for range 2 { // not known yet: neither believed nor thrown away
				b, err := v.begin()
				if err == nil {
					t.Fatal("the disk is claimed without an id")
				}
				if b.again && tag != "" || v.state().Status == progress.Finished {
					t.Errorf("%+v is believed", v.state())
				}
				if len(v.left()) != 4 {
					t.Errorf("left: %q", v.left())
				}
				b.fail(&Failure{Step: StepAttribute, Err: err}, time.Second) // which is written down
			}
			if state := v.state(); tag != "" && (state.Before == nil || state.Before.Instance != "1" ||
				state.Before.Status != progress.Finished || state.AttributeSum != "" || state.Envoy != nil) {
				t.Errorf("%+v", state)
			}
			idServer(t, "2")
			b := newBootstrapper(v.options())
			b.readState()
			b.state.Attempt = 1
			f := b.attempt(t.Context(), metadata.Attribute{Err: metadata.ErrNoAttribute})
			if f == nil || f.Step != StepAttribute || !f.Permanent {
				t.Errorf("%+v", f)
			}
			v.checkNew("2", "1")
			if !slices.Contains(v.ran, "systemctl stop "+systemd.EnvoyUnit) {
				t.Errorf("ran %q", v.ran)
			}
			at := v.state().Discarded.At
			if _, err := v.begin(); err != nil {
				t.Fatal(err)
			}
			if d := v.state().Discarded; d == nil || !d.At.Equal(at) {
				t.Errorf("discarded again: %+v", d)
			}
		})
	}
}

// TestSameVM: a VM goes on with its own after a plain reboot, before its id is known too, and where
// its machine has got another name once it is. An earlier version's state is believed where the
// daemon's says that it is ours.
func TestSameVM(t *testing.T) {
	for _, tt := range []struct {
		name, tag string
		away      bool // the metadata server is
		known     bool
	}{
		{"reboot", "tag-1", false, true},
		{"reboot, the server away", "tag-1", true, true},
		{"reboot where a clone would look the same, the server away", "", true, true},
		{"another name", "tag-2", false, true},
		{"another name, the server away", "tag-2", true, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			v := newFakeVM(t)
			first := tt.tag
			if first != "" {
				first = "tag-1"
			}
			v.machine("m", first, "b1")
			v.node()
			v.machine("m", tt.tag, "b2")
			idServer(t, map[bool]string{true: "", false: "1"}[tt.away])
			b, err := v.begin()
			if (err == nil) == tt.away {
				t.Fatal(err)
			}
			if len(v.left()) != 4 || v.state().Discarded != nil {
				t.Errorf("left: %q, %+v", v.left(), v.state().Discarded)
			}
			if own := v.own("b2"); (own == nil) != tt.known {
				t.Errorf("Envoy may start: %v", own)
			}
			if have := b.state.AttributeSum == "a" && b.state.PrimarySum == "s1"; have != tt.known {
				t.Errorf("%+v", b.state)
			}
			if tt.known {
				return
			}
			b.fail(&Failure{Step: StepAttribute, Err: errors.New("x")}, time.Second)
			idServer(t, "1")
			if _, err := v.begin(); err != nil {
				t.Fatal(err)
			}
			state := v.state()
			if state.AttributeSum != "a" || state.Envoy == nil || state.Before != nil ||
				state.Instance != "1" || state.PreviousSum != "s0" || len(v.left()) != 4 {
				t.Errorf("%+v, left %q", state, v.left())
			}
		})
	}
}

// TestNamelessTwice: a VM whose machine has another name at each boot, and whose metadata server
// was away in one of them, goes on with its own when its id is known.
func TestNamelessTwice(t *testing.T) {
	v := newFakeVM(t)
	v.machine("m", "tag-1", "b1")
	v.node()
	idServer(t, "")
	for i, id := range []string{"n", "o"} {
		v.machine(id, "tag-1", "b"+strconv.Itoa(2+i))
		b, err := v.begin()
		if err == nil {
			t.Fatal("claimed without an id")
		}
		b.fail(&Failure{Step: StepAttribute, Err: err}, time.Second)
	}
	v.machine("p", "tag-1", "b4")
	idServer(t, "1")
	if _, err := v.begin(); err != nil {
		t.Fatal(err)
	}
	if state := v.state(); state.AttributeSum != "a" || state.Before != nil || state.Discarded != nil ||
		len(v.left()) != 4 {
		t.Errorf("%+v, left %q", state, v.left())
	}
}

// TestOwnerNotWritten: a VM whose disk takes nothing more goes on, as it does without the file.
func TestOwnerNotWritten(t *testing.T) {
	v := newFakeVM(t)
	v.machine("m", "tag-1", "b1")
	v.node()
	v.machine("m", "tag-1", "b2")
	idServer(t, "1")
	path := filepath.Join(v.root, progress.OwnerFile)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	mkdir(t, filepath.Join(path, "in its place"), 0o755) // root, too, cannot replace it by a file
	b, err := v.begin()
	if err != nil || b.vm.Instance != "1" || len(v.left()) != 4 {
		t.Errorf("%v, %+v, left %q", err, b.vm, v.left())
	}
}

// TestStateOfEarlierVersion: it does not say whose it is. What the daemon has left beside it does.
func TestStateOfEarlierVersion(t *testing.T) {
	for instance, want := range map[string]bool{"1": true, "2": false} {
		v := newFakeVM(t)
		v.machine("m", "tag-"+instance, "b2")
		v.put(EnvoyConfig, "{}")
		dir := filepath.Join(v.root, progress.StateDir)
		mkdir(t, dir, 0o700)
		if err := progress.Write(dir, finished); err != nil {
			t.Fatal(err)
		}
		v.put(filepath.Join(progress.StateDir, progress.AttributeFile), `{"text":"{}","instance":"1"}`)
		idServer(t, instance)
		if _, err := v.begin(); err != nil {
			t.Fatal(err)
		}
		_, err := os.Lstat(filepath.Join(v.root, EnvoyConfig))
		if state := v.state(); (state.AttributeSum == "a") != want || (err == nil) != want ||
			state.Instance != instance {
			t.Errorf("on %s: %+v, %v", instance, state, err)
		}
	}
}

// TestOwn: Envoy starts where its configuration is this VM's, at once where the machine says so.
func TestOwn(t *testing.T) {
	for _, tt := range []struct {
		name          string
		was, is, boot string // the tags, and the boot that Envoy's unit is told
		id            string // that the metadata server tells now
		want          bool
	}{
		{"reboot", "tag-1", "tag-1", "b2", "", true},
		{"clone", "tag-1", "tag-2", "b2", "2", false},
		{"clone, the server away", "tag-1", "tag-2", "b2", "", false},
		{"another name", "tag-1", "tag-2", "b2", "1", true},
		{"looks the same, the server away", "", "", "b2", "", true},
		{"clone that looks the same", "", "", "b2", "2", false},
		{"restart in the same boot, where the server would be asked else", "", "", "b-1", "2", true},
	} {
		v := newFakeVM(t)
		v.machine("m", tt.was, "b1")
		v.node()
		v.machine("m", tt.is, "")
		idServer(t, tt.id)
		if err := v.own(tt.boot); (err == nil) != tt.want ||
			err != nil && !errors.Is(err, ErrOthers) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	v := newFakeVM(t)
	v.machine("m", "tag-1", "b1")
	idServer(t, "")
	if err := v.own("b1"); err != nil {
		t.Errorf("an earlier version's: %v", err)
	}
}

// killedRoot has TestKilledDiscard's child make the disk beneath it its own.
const killedRoot = "SERVICE_PROXY_AGENT_KILLED_ROOT"

// TestKilledDiscard: bootstrap is killed at any moment while it discards another VM's state. Never
// is a part of that believed, Envoy never starts with it, and the next run ends where an
// undisturbed one does.
func TestKilledDiscard(t *testing.T) {
	if root := os.Getenv(killedRoot); root != "" {
		v := &fakeVM{T: t, root: root}
		fmt.Println("begins")
		_, err := v.begin()
		fmt.Println("ends", err)
		return
	}
	rounds := 12
	if os.Getenv("SOAK") != "" {
		rounds = 300
	}
	seed := rand.Uint64()
	if text := os.Getenv("SEED"); text != "" {
		seed, _ = strconv.ParseUint(text, 10, 64)
	}
	t.Logf("SEED=%d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	idServer(t, "2")
	cut := 0
	for i := range rounds {
		v := newFakeVM(t)
		v.machine("m", "tag-1", "b1")
		v.node()
		v.machine("m", "tag-2", "b2")
		for range 1 + random.IntN(2) {
			if v.kill(time.Duration(random.IntN(9000)) * time.Microsecond) {
				cut++
			}
			state := v.state()
			if identity.Here(v.root).Judge(state.Owner).Believed() &&
				(state.Status == progress.Finished || state.AttributeSum != "" || state.Envoy != nil) {
				t.Errorf("round %d: %+v is believed", i, state)
			}
			_, config := os.Lstat(filepath.Join(v.root, EnvoyConfig))
			if own := v.own("b2"); config == nil && own == nil {
				t.Errorf("round %d: Envoy would start with another's configuration", i)
			}
		}
		if _, err := v.begin(); err != nil {
			t.Fatal(err)
		}
		v.checkNew("2", "1")
		if t.Failed() {
			return
		}
	}
	t.Logf("%d rounds, %d kills before the end", rounds, cut)
	if cut == 0 {
		t.Error("no kill came before the end: this has shown nothing")
	}
}

// kill begins in a process of its own and kills it after a time; it says whether that came before
// the end.
func (v *fakeVM) kill(after time.Duration) (cut bool) {
	v.Helper()
	cmd := exec.CommandContext(context.Background(), os.Args[0], "-test.run=^TestKilledDiscard$", "-test.v")
	cmd.Env = append(os.Environ(), killedRoot+"="+v.root)
	out, err := cmd.StdoutPipe()
	if err != nil {
		v.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		v.Fatal(err)
	}
	var said strings.Builder
	buf := make([]byte, 4096)
	for !strings.Contains(said.String(), "begins\n") {
		n, err := out.Read(buf)
		said.Write(buf[:n])
		if err != nil {
			v.Fatalf("%v: %s", err, &said)
		}
	}
	time.Sleep(after)
	_ = cmd.Process.Kill()
	rest, _ := io.ReadAll(out)
	_ = cmd.Wait()
	return !strings.Contains(said.String()+string(rest), "ends <nil>")
}
