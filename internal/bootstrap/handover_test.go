package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/service-proxy-agent/service-proxy-agent/internal/layout"
	"github.com/service-proxy-agent/service-proxy-agent/internal/neighbour"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

const (
	closedUnit   = systemd.ConfDir + "/" + systemd.AgentUnit
	closedDropIn = closedUnit + ".d/10-closed.conf"
	closedLink   = systemd.ConfDir + "/multi-user.target.wants/" + systemd.AgentUnit
	closedText   = "[Service]\nExecStart=/opt/google/agent\n"
)

// withClosed is a VM with a closed agent that is enabled, and what systemctl does to links.
func withClosed(t *testing.T) (v *fakeVM, opts Options) {
	v = newFakeVM(t)
	v.put(closedUnit, closedText)
	v.put(closedDropIn, "[Service]\nNice=1\n")
	v.put("/etc/systemd/system/other.service", "[Service]\nExecStart=/x\n")
	mkdir(t, filepath.Join(v.root, filepath.Dir(closedLink)), 0o755)
	if err := os.Symlink(closedUnit, filepath.Join(v.root, closedLink)); err != nil {
		t.Fatal(err)
	}
	opts = v.options()
	run, link := opts.command, filepath.Join(v.root, closedLink)
	opts.command = func(ctx context.Context, cmd *exec.Cmd) error {
		switch args := strings.Join(cmd.Args[1:], " "); {
		case args == "is-enabled "+systemd.AgentUnit:
			if _, err := os.Lstat(link); err != nil {
				fmt.Fprintln(cmd.Stdout, "disabled")
				return errors.New("exit status 1")
			}
		case strings.HasPrefix(args, "enable ") && strings.Contains(args, systemd.AgentUnit):
			// as the real one, which follows no link of another's
			if err := os.Symlink(filepath.Join(layout.Here.UnitDir, systemd.AgentUnit), link); err != nil {
				return err
			}
		case args == "disable "+systemd.AgentUnit:
			_ = os.Remove(link)
		}
		return run(ctx, cmd)
	}
	return v, opts
}

// closedThere is what of the closed agent is in its place.
func (v *fakeVM) closedThere() (there []string) {
	for _, path := range []string{closedUnit, closedDropIn, closedLink} {
		to, err := os.Readlink(filepath.Join(v.root, path))
		text, readErr := os.ReadFile(filepath.Join(v.root, path))
		switch {
		case err == nil && to == closedUnit, path == closedUnit && string(text) == closedText,
			path == closedDropIn && readErr == nil:
			there = append(there, path)
		}
	}
	return there
}

// An archive that is installed over a closed agent which does not run has its place at once, and
// --remove gives it back word for word, its links included.
func TestInstallOverWhatDoesNotRun(t *testing.T) {
	v, opts := withClosed(t)
	before := tree(t, v.root)
	dir := v.archive("1.0.0", "")
	if err := Install(t.Context(), opts, dir); err != nil {
		t.Fatal(err)
	}
	if there := v.closedThere(); len(there) > 0 {
		t.Errorf("in the way: %q", there)
	}
	to, _ := os.Readlink(filepath.Join(v.root, closedLink))
	if filepath.Dir(to) != layout.Here.UnitDir {
		t.Errorf("ours is not enabled: %q", to)
	}
	if !slices.Contains(v.ran, "systemctl daemon-reload") {
		t.Errorf("ran %q", v.ran)
	}
	done, err := Remove(t.Context(), opts, func(context.Context) ([]string, error) {
		t.Error("the rules were taken out, which are another's from now on")
		return nil, nil
	})
	if err != nil || !slices.Contains(done, "brought back "+closedUnit) {
		t.Errorf("%q, %v", done, err)
	}
	for _, ran := range v.ran {
		if ran == "systemctl start "+systemd.AgentUnit {
			t.Error("it was started, and did not run before")
		}
	}
	var left []string
	for _, path := range changed(before, tree(t, v.root)) {
		if before[path] != "" || !strings.HasPrefix(path, "/var/tmp") && !isFolder(v, path) {
			left = append(left, path)
		}
	}
	if len(left) > 0 {
		t.Errorf("--remove left or took %q", left)
	}
	// And once more, with nothing of ours there.
	if _, err := Remove(t.Context(), opts, func(context.Context) ([]string, error) {
		t.Error("the rules of another agent were taken out")
		return nil, nil
	}); err != nil {
		t.Error(err)
	}
	if there := v.closedThere(); len(there) != 3 {
		t.Errorf("there is %q", there)
	}
}

// An agent that has come to have the unit of our agent's name, after ours was installed, is not
// stopped or disabled by --remove, and its rules stay.
func TestRemoveBesideAnother(t *testing.T) {
	v, opts := withClosed(t)
	theirs := map[string]string{closedUnit: closedText, closedDropIn: "[Service]\nNice=1\n"}
	for path := range theirs {
		if err := os.Remove(filepath.Join(v.root, path)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(filepath.Join(v.root, closedLink)); err != nil {
		t.Fatal(err)
	}
	if err := Install(t.Context(), opts, v.archive("1.0.0", "")); err != nil {
		t.Fatal(err)
	}
	for path, text := range theirs {
		v.put(path, text)
	}
	if err := errors.Join(os.Remove(filepath.Join(v.root, closedLink)),
		os.Symlink(closedUnit, filepath.Join(v.root, closedLink))); err != nil {
		t.Fatal(err)
	}
	opts.processes = func([]uint16, ...string) ([]neighbour.Process, error) {
		return []neighbour.Process{{PID: 1 << 22, Program: "/opt/google/agent", Unit: systemd.AgentUnit}}, nil
	}
	usual := opts.command
	opts.command = func(ctx context.Context, cmd *exec.Cmd) error {
		switch args := strings.Join(cmd.Args[1:], " "); args {
		case "stop " + systemd.AgentUnit:
			t.Error("it was stopped")
		case "stop " + systemd.InterceptionUnit:
			if _, err := os.Lstat(filepath.Join(v.root, rulesGuard)); err != nil {
				t.Error("that takes the rules out")
			}
		}
		return usual(ctx, cmd)
	}
	if _, err := Remove(t.Context(), opts, func(context.Context) ([]string, error) {
		t.Error("the rules of another agent were taken out")
		return nil, nil
	}); err != nil {
		t.Error(err)
	}
	if there := v.closedThere(); len(there) != 3 {
		t.Errorf("there is %q", there)
	}
	if newBootstrapper(opts).exists(layout.Here.Agent) {
		t.Error("ours is left")
	}
}

func isFolder(v *fakeVM, path string) bool {
	info, err := os.Lstat(filepath.Join(v.root, path))
	return err == nil && info.IsDir()
}

// While a closed agent runs, an archive that is installed leaves it, its unit and its links alone,
// and has bootstrap take over; nothing starts or enables the unit that is still its own.
func TestInstallOverWhatRuns(t *testing.T) {
	v, opts := withClosed(t)
	opts.processes = func([]uint16, ...string) ([]neighbour.Process, error) {
		return []neighbour.Process{{PID: 1 << 22, Program: "/opt/google/agent", Unit: systemd.AgentUnit}}, nil
	}
	if err := Install(t.Context(), opts, v.archive("1.0.0", "")); err != nil {
		t.Fatal(err)
	}
	if there := v.closedThere(); len(there) != 3 {
		t.Errorf("there is %q", there)
	}
	b := newBootstrapper(opts)
	h, err := b.readHandover()
	if err != nil || !h.under(handoverWanted) || !h.Active {
		t.Errorf("%+v, %v", h, err)
	}
	for _, ran := range v.ran {
		if strings.Contains(ran, systemd.AgentUnit) && !strings.HasPrefix(ran, "systemctl is-") {
			t.Errorf("ran %q", ran)
		}
	}
	if !slices.Contains(v.ran, "systemctl restart --no-block "+systemd.BootstrapUnit) {
		t.Errorf("ran %q", v.ran)
	}
	// Where that never came to be, --remove has nothing to give back, and stops nothing of theirs.
	v.ran = nil
	if _, err := Remove(t.Context(), opts, func(context.Context) ([]string, error) {
		t.Error("the rules are another's")
		return nil, nil
	}); err != nil {
		t.Error(err)
	}
	if slices.Contains(v.ran, "systemctl stop "+systemd.AgentUnit) {
		t.Errorf("ran %q", v.ran)
	}
	if there := v.closedThere(); len(there) != 3 {
		t.Errorf("there is %q", there)
	}
}

// The guard is there for as long as the processes are theirs and the unit is ours.
func TestGuard(t *testing.T) {
	v, opts := withClosed(t)
	for _, path := range []string{closedUnit, closedDropIn, closedLink} {
		if err := os.Remove(filepath.Join(v.root, path)); err != nil {
			t.Fatal(err)
		}
	}
	v.put("/usr/lib/systemd/system/"+systemd.AgentUnit, closedText) // a package's
	opts.processes = func([]uint16, ...string) ([]neighbour.Process, error) {
		return []neighbour.Process{{PID: 1 << 22, Program: "/opt/google/agent", Unit: systemd.AgentUnit}}, nil
	}
	if err := Install(t.Context(), opts, v.archive("1.0.0", "")); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(v.root, guardFile))
	if err != nil || !strings.Contains(string(text), "KillMode=process") {
		t.Errorf("%q, %v", text, err)
	}
	if _, err := os.Stat(filepath.Join(v.root, layout.Here.UnitDir, systemd.AgentUnit)); err != nil {
		t.Error(err)
	}
}

// Without a wish nobody is fought: bootstrap says whose the unit is, and what to do.
func TestYield(t *testing.T) {
	v, opts := withClosed(t)
	err := InstallUnits(t.Context(), opts)
	var f *Failure
	if !errors.As(err, &f) || !f.Permanent || !strings.Contains(err.Error(), closedUnit) ||
		!strings.Contains(err.Error(), "bootstrap --take-over") {
		t.Errorf("%v", err)
	}
	if _, err := os.Stat(filepath.Join(v.root, layout.Here.UnitDir)); err == nil {
		t.Error("units were installed all the same")
	}
	b := newBootstrapper(opts)
	if err := b.writeHandover(&handover{Phase: handoverGiving}); err != nil {
		t.Fatal(err)
	}
	if err := InstallUnits(t.Context(), opts); !errors.As(err, &f) ||
		!strings.Contains(err.Error(), "--remove") {
		t.Errorf("%v", err)
	}
	v.put(handoverFile, "{")
	err = InstallUnits(t.Context(), opts)
	if err == nil || !strings.Contains(err.Error(), handoverFile) {
		t.Errorf("%v", err)
	}
}

// Their program may have our program's path: it is kept, is nothing that a rollback brings back,
// and --remove puts it where it was.
func TestTheirProgramInOurPlace(t *testing.T) {
	v, opts := withClosed(t)
	v.put(closedUnit, "[Service]\nExecStart="+layout.Here.Agent+" --v=2\n")
	v.put(layout.Here.Agent, "theirs")
	if err := Install(t.Context(), opts, v.archive("1.0.0", "")); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(newBootstrapper(opts).previous(layout.Here.Agent)); err == nil {
		t.Error("a rollback would bring theirs back")
	}
	v.want("installed", "1.0.0", "none")
	if _, err := Remove(t.Context(), opts, func(context.Context) ([]string, error) {
		return nil, nil
	}); err != nil {
		t.Error(err)
	}
	if text, err := os.ReadFile(filepath.Join(v.root, layout.Here.Agent)); string(text) != "theirs" {
		t.Errorf("%q, %v", text, err)
	}
}

// Whatever moment a take-over is cut short at, the next one ends it, and all can be given back.
func TestMoveAsideIsCutShort(t *testing.T) {
	for cut := range 8 {
		v, opts := withClosed(t)
		before := tree(t, v.root)
		b := newBootstrapper(opts)
		units, err := neighbour.Units(b.Root)
		if err != nil {
			t.Fatal(err)
		}
		files, err := b.shadows(units)
		if err != nil || len(files) != 3 {
			t.Fatalf("%+v, %v", files, err)
		}
		// The first try, as far as it came: written down, n kept, n removed.
		h := &handover{Phase: handoverTaking}
		steps := []func() error{func() error {
			for _, file := range files {
				h.note(file)
			}
			return b.writeHandover(h)
		}}
		for _, file := range files {
			steps = append(steps, func() error { return b.keep(file) })
		}
		for _, file := range files {
			steps = append(steps, func() error { return os.Remove(b.path(file.Path)) })
		}
		for _, step := range steps[:min(cut, len(steps))] {
			if err := step(); err != nil {
				t.Fatal(err)
			}
		}
		// The next one knows what was written, and sees what is there.
		if h, err = b.readHandover(); err != nil {
			t.Fatal(err)
		}
		if h == nil {
			h = &handover{}
		}
		if units, err = neighbour.Units(b.Root); err != nil {
			t.Fatal(err)
		}
		if files, err = b.shadows(units); err != nil {
			t.Fatal(err)
		}
		// What was noted and not moved is moved, too, once nothing else tells of it.
		if _, err := b.moveAside(h, b.unmoved(h, files)); err != nil {
			t.Fatal(err)
		}
		if there := v.closedThere(); len(there) > 0 {
			t.Errorf("cut after %d: in the way: %q", cut, there)
		}
		// And back, cut short after each file.
		for n := range len(h.Kept) + 1 {
			for _, file := range h.Kept[:n] {
				if err := b.bring(file); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := os.RemoveAll(b.path("/usr")); err != nil {
			t.Fatal(err)
		}
		if diff := changed(before, tree(t, v.root)); len(diff) > 0 {
			t.Errorf("cut after %d: %q", cut, diff)
		}
	}
}

// The wait of --take-over ends with what bootstrap says, where that is for somebody to mend.
func TestTakeOverTellsWhyNot(t *testing.T) {
	v, opts := withClosed(t)
	opts.processes = func([]uint16, ...string) ([]neighbour.Process, error) {
		return []neighbour.Process{{PID: 1 << 22, Program: "/opt/google/agent", Unit: systemd.AgentUnit}}, nil
	}
	if _, err := TakeOver(t.Context(), opts); err == nil ||
		!strings.Contains(err.Error(), "ours is not installed") {
		t.Errorf("%v", err)
	}
	v.put(layout.Here.Agent, fakeBinary(t, "1.0.0"))
	run := opts.command
	opts.command = func(ctx context.Context, cmd *exec.Cmd) error {
		if strings.Join(cmd.Args[1:], " ") == "restart --no-block "+systemd.BootstrapUnit {
			b := newBootstrapper(opts)
			b.state, _ = progress.Read(b.path(progress.StateDir))
			b.fail(&Failure{Step: StepEnvoy, Err: errors.New("no Envoy to be had"), Permanent: true}, 0)
		}
		return run(ctx, cmd)
	}
	_, err := TakeOver(t.Context(), opts)
	if err == nil || !strings.Contains(err.Error(), "no Envoy to be had") ||
		!strings.Contains(err.Error(), "goes on meanwhile") {
		t.Errorf("%v", err)
	}
	if there := v.closedThere(); len(there) != 3 {
		t.Errorf("there is %q", there)
	}
	v, opts = withClosed(t)
	v.put(layout.Here.Agent, fakeBinary(t, "1.0.0"))
	for _, path := range []string{closedUnit, closedDropIn, closedLink} {
		if err := os.Remove(filepath.Join(v.root, path)); err != nil {
			t.Fatal(err)
		}
	}
	if done, err := TakeOver(t.Context(), opts); err != nil || len(done) != 1 ||
		!strings.Contains(done[0], "nothing to take over") {
		t.Errorf("%q, %v", done, err)
	}
}

// TestBehind has the one Envoy drained that has the admin interface, which may be ours.
func TestBehind(t *testing.T) {
	const theirs, ours = 4242, 996
	listens := neighbour.Process{PID: 2, UID: theirs, Listens: true}
	tries := neighbour.Process{PID: 3, UID: theirs}
	for _, tt := range []struct {
		name   string
		envoys []neighbour.Process
		admin  uint32
		want   int
	}{
		{"theirs serves", []neighbour.Process{listens}, theirs, 2},
		{"theirs serves, and one more starts", []neighbour.Process{tries, listens}, theirs, 2},
		{"ours serves, theirs tries to start", []neighbour.Process{tries}, ours, 0},
		{"ours has the admin interface, theirs another port", []neighbour.Process{listens}, ours, 0},
		{"nobody", nil, theirs, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, has := behind(tt.envoys, func(uid uint32) error {
				if uid != tt.admin {
					return errors.New("another user has it")
				}
				return nil
			})
			if has != (tt.want != 0) || p.PID != tt.want {
				t.Errorf("%v, %v, want pid %d", p, has, tt.want)
			}
		})
	}
}
