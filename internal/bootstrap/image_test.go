package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// imageVM is a VM on which an image may be made: installed from an archive, and a node once.
func imageVM(t *testing.T) *fakeVM {
	t.Helper()
	v := newFakeVM(t)
	v.machine("m", "tag-1", "b1")
	idServer(t, "1")
	v.put("/usr/sbin/iptables", "x")
	v.put("/usr/sbin/iptables-restore", "x")
	v.put("/etc/ssl/certs/ca-certificates.crt", "x")
	if err := Install(t.Context(), v.options(), v.archive("1.0.0", "1.30.9")); err != nil {
		t.Fatal(err)
	}
	v.node()
	v.put(filepath.Join(progress.StateDir, progress.AttributeFile), `{"text":"{}","instance":"1"}`)
	v.put(filepath.Join(progress.RuntimeDir, "guest-attributes.budget"), "")
	return v
}

// prepare is PrepareImage where systemctl says this of Envoy's unit; the command with this number
// fails, counted from 1.
func (v *fakeVM) prepare(envoy string, fails int) (done []string, err error) {
	opts := v.options()
	usual, n := opts.command, 0
	opts.command = func(ctx context.Context, cmd *exec.Cmd) error {
		if n++; n == fails {
			return errors.New("killed")
		}
		if len(cmd.Args) > 1 && cmd.Args[1] == "is-active" {
			v.ran = append(v.ran, "systemctl is-active")
			fmt.Fprintln(cmd.Stdout, envoy)
			return errors.New("exit status 3")
		}
		return usual(ctx, cmd)
	}
	return PrepareImage(v.Context(), opts, func(context.Context) ([]string, error) {
		return []string{"removed jump"}, nil
	})
}

// TestPrepareImage: all is installed and enabled, and nothing of the VM is left; a VM that finds
// the disk begins at the beginning, with the Envoy that is there.
func TestPrepareImage(t *testing.T) {
	v := imageVM(t)
	v.ran = nil
	done, err := v.prepare("inactive", 0)
	if err != nil {
		t.Fatalf("%v\n%s", err, strings.Join(done, "\n"))
	}
	if !strings.HasPrefix(done[len(done)-1], "ready: ") || !slices.Contains(done, "removed jump") {
		t.Errorf("said %q", done)
	}
	if left := v.left(); left != nil {
		t.Errorf("left %q", left)
	}
	for _, dir := range []string{progress.StateDir, progress.RuntimeDir,
		filepath.Dir(progress.OwnerFile)} {
		found, err := filepath.Glob(filepath.Join(v.root, dir, "*"))
		want := []string{filepath.Join(v.root, progress.StateDir, progress.StateFile)}
		if dir != progress.StateDir {
			want = nil
		}
		if err != nil || !slices.Equal(found, want) {
			t.Errorf("left in %s: %q, %v", dir, found, err)
		}
	}
	disk := finished.OfDisk()
	disk.EnvoyVersion, disk.EnvoySource, disk.PrimarySum = "1.30.9", archiveSource, progress.Sum(archiveSource)
	if d := cmp.Diff(disk, v.state()); d != "" {
		t.Errorf("(-want +have)\n%s", d)
	}
	if have := version(t, filepath.Join(v.root, EnvoyBinary)); have != "1.30.9" {
		t.Errorf("Envoy %s is there", have)
	}
	for _, unit := range []string{systemd.AgentUnit, systemd.BootstrapUnit, systemd.EnvoyUnit,
		systemd.ReadyPath, systemd.RotateTimer} {
		if !slices.Contains(v.ran, "systemctl is-enabled "+unit) {
			t.Errorf("%s is not enabled", unit)
		}
	}
	for _, line := range v.ran {
		if strings.HasPrefix(line, "systemctl start") || strings.HasPrefix(line, "systemctl restart") {
			t.Errorf("ran %q", line)
		}
	}

	v.machine("m", "tag-2", "b2")
	idServer(t, "")
	if b, err := v.begin(); err == nil || b.again || b.state.Before != nil {
		t.Errorf("%+v, %v", b.state, err)
	}
	idServer(t, "2")
	if _, err := v.begin(); err != nil {
		t.Fatal(err)
	}
	if state := v.state(); state.Discarded != nil || state.Instance != "2" || state.EnvoyVersion != "1.30.9" {
		t.Errorf("%+v", state)
	}
}

// TestPrepareImageRefuses: a running node stays one, and where the agent is not there is no image.
func TestPrepareImageRefuses(t *testing.T) {
	v := imageVM(t)
	before := tree(t, v.root)
	for _, state := range []string{"active", "activating", "reloading", "deactivating"} {
		done, err := v.prepare(state, 0)
		if err == nil || !strings.Contains(err.Error(), "running node") ||
			!strings.Contains(err.Error(), "systemctl stop") || done != nil {
			t.Errorf("%s: %q, %v", state, done, err)
		}
	}
	if changed := changed(before, tree(t, v.root)); changed != nil {
		t.Errorf("changed %q", changed)
	}
	empty := newFakeVM(t)
	if _, err := empty.prepare("inactive", 0); err == nil ||
		!strings.Contains(err.Error(), "not installed") {
		t.Errorf("nothing installed: %v", err)
	}
}

// TestPrepareImageCut: wherever it ends too early, doing it again comes to the same.
func TestPrepareImageCut(t *testing.T) {
	v := imageVM(t)
	if _, err := v.prepare("inactive", 0); err != nil {
		t.Fatal(err)
	}
	want, n := tree(t, v.root), 0
	for fails := 1; ; fails++ {
		v := imageVM(t)
		if _, err := v.prepare("inactive", fails); err == nil {
			// is-active, updates of the catalog and what is asked for only: it goes on without
			if fails > 40 {
				break
			}
		} else {
			n++
		}
		if _, err := v.prepare("inactive", 0); err != nil {
			t.Fatalf("after %d: %v", fails, err)
		}
		if d := changed(want, tree(t, v.root)); d != nil {
			t.Fatalf("after command %d failed: %q differ: %+v", fails, d, v.state())
		}
	}
	if n < 10 {
		t.Errorf("only %d failures: this has shown little", n)
	}
}

// TestPrepareImageBesideAnother: a VM that is another agent's node is left as it is: the unit of
// our agent's name is that one's, and so are the chains.
func TestPrepareImageBesideAnother(t *testing.T) {
	v := imageVM(t)
	v.put(closedUnit, closedText)
	v.ran = nil
	_, err := v.prepare("inactive", 0)
	if err == nil || !strings.Contains(err.Error(), "another agent") {
		t.Errorf("have %v", err)
	}
	if slices.ContainsFunc(v.ran, func(ran string) bool { return strings.Contains(ran, " stop ") }) ||
		len(v.left()) != 4 {
		t.Errorf("ran %q, left %q", v.ran, v.left())
	}
}
