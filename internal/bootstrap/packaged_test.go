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

	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/layout"
	"github.com/service-proxy-agent/service-proxy-agent/internal/logs"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// asPackage has the rest of the test run as a package's program.
func asPackage(t *testing.T) {
	layout.Here = layout.Packages
	t.Cleanup(func() { layout.Here = layout.Archive })
}

// newPackagedVM has what the two packages bring, with an Envoy 1.30.1.
func newPackagedVM(t *testing.T) *fakeVM {
	t.Helper()
	asPackage(t)
	v := newFakeVM(t)
	v.unpack()
	v.put(layout.Here.ArchivedEnvoy, fakeBinary(t, "1.30.1"))
	for _, name := range []string{"iptables", "iptables-restore"} {
		v.put("/usr/sbin/"+name, "x")
	}
	mkdir(t, filepath.Join(v.root, "/var/lib/service-proxy-agent"), 0o700)
	return v
}

// unpack lays down the files of the agent's package, and its program: this test's own, which the
// linker has marked as ours.
func (v *fakeVM) unpack() {
	v.Helper()
	if _, err := systemd.Install(v.root + "/"); err != nil {
		v.Fatal(err)
	}
	mkdir(v.T, filepath.Join(v.root, filepath.Dir(layout.Here.Agent)), 0o755)
	self, err := os.Executable()
	if err == nil {
		err = linkOrCopy(self, filepath.Join(v.root, layout.Here.Agent))
	}
	if err != nil {
		v.Fatal(err)
	}
}

// An archive is not laid down over a package, nothing of the VM changes, and nothing is published.
func TestArchiveOverPackage(t *testing.T) {
	v := newPackagedVM(t)
	layout.Here = layout.Archive
	dir := v.archive("2.0.0", "1.30.9")
	before := tree(t, v.root)
	err := Install(t.Context(), v.options(), dir)
	if err == nil || !strings.Contains(err.Error(), "the package service-proxy-agent") {
		t.Errorf("have %v", err)
	}
	if diff := changed(before, tree(t, v.root)); len(diff) > 0 || len(v.ran) > 0 {
		t.Errorf("changed %q, ran %q", diff, v.ran)
	}
	layout.Here = layout.Packages // nor is it by the package's own program
	if err := Install(t.Context(), v.options(), dir); err == nil {
		t.Error("the package's program installs an archive")
	}
}

// A package takes the place of an archive's installation: one unit of each name is left, which are
// enabled as they were, and state, Envoy and configuration stay.
func TestPackageOverArchive(t *testing.T) {
	v := newFakeVM(t)
	dir := v.archive("1.0.0", "1.30.9")
	if err := Install(t.Context(), v.options(), dir); err != nil {
		t.Fatal(err)
	}
	self, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	v.put(layout.Archive.Agent, string(self)) // the fake one is nobody's
	const wants = "/etc/systemd/system/multi-user.target.wants/"
	mkdir(t, filepath.Join(v.root, wants), 0o755)
	for name, to := range map[string]string{
		systemd.AgentUnit: filepath.Join(layout.Archive.UnitDir, systemd.AgentUnit),
		"other.service":   "/usr/lib/systemd/system/other.service"} {
		if err := os.Symlink(to, filepath.Join(v.root, wants, name)); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range map[string]string{EnvoyBinary: "envoy", EnvoyConfig: "{}",
		"/etc/default/service-proxy-agent": "A=B\n", "/usr/local/bin/other": "x",
		"/usr/local/lib/systemd/system/other.service": "[Unit]\n"} {
		v.put(name, text)
	}
	if _, err := Adopt(v.options()); err == nil {
		t.Error("an archive's program adopts")
	}
	asPackage(t)
	v.unpack()
	before := tree(t, v.root)
	done, err := Adopt(v.options())
	if err != nil {
		t.Fatal(err)
	}
	t.Log(strings.Join(done, "\n"))
	after := tree(t, v.root)
	gone := 0
	for _, path := range changed(before, after) {
		switch {
		case path == wants+systemd.AgentUnit:
			if !strings.HasSuffix(after[path], " /usr/lib/systemd/system/"+systemd.AgentUnit) {
				t.Errorf("%s leads to %s", path, after[path])
			}
		case path == seenUnitFile:
		case strings.HasPrefix(path, "/usr/local/"), strings.HasPrefix(path, "/etc/fish/"):
			gone++
			if after[path] != "" {
				t.Errorf("changed: %s", path)
			}
		default:
			t.Errorf("changed: %s: %q, then %q", path, before[path], after[path])
		}
	}
	for _, file := range systemd.FilesIn(layout.Archive) {
		if after[file.Path] != "" {
			t.Errorf("left: %s", file.Path)
		}
	}
	for _, path := range []string{layout.Archive.Agent, archiveDir} {
		if after[path] != "" {
			t.Errorf("left: %s", path)
		}
	}
	for _, path := range []string{EnvoyBinary, EnvoyConfig, "/usr/local/bin/other",
		"/usr/local/lib/systemd/system/other.service"} {
		if after[path] == "" {
			t.Errorf("gone: %s", path)
		}
	}
	if again, err := Adopt(v.options()); err != nil || len(again) > 0 {
		t.Errorf("a second time: %q, %v", again, err)
	}
	// That the unit names another program needs no start of Envoy.
	if err := InstallUnits(t.Context(), v.options()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(v.root, unitChangedFile)); err == nil {
		t.Error("Envoy would be restarted for it")
	}
}

// Bootstrap of a package writes none of the package's files, and remove leaves them: with the state
// for the package manager's own remove, and without it for a person's.
func TestPackagedWritesNoFileOfThePackage(t *testing.T) {
	v := newPackagedVM(t)
	before := tree(t, v.root)
	if err := InstallUnits(t.Context(), v.options()); err != nil {
		t.Fatal(err)
	}
	if f := v.bootstrap(attribute.Default()); f != nil {
		t.Fatal(f)
	}
	mkdir(t, filepath.Join(v.root, logs.Dir), 0o770)
	v.put(EnvoyConfig, "{}")
	for _, path := range changed(before, tree(t, v.root)) {
		if strings.HasPrefix(path, "/usr/") && !strings.HasPrefix(path, "/usr/local") {
			t.Errorf("written: %s", path)
		}
	}
	if have := version(t, filepath.Join(v.root, EnvoyBinary)); have != "1.30.1" {
		t.Errorf("Envoy is %q", have)
	}
	for _, ran := range v.ran {
		if strings.Contains(ran, "daemon-reload") {
			t.Errorf("ran %q", ran)
		}
	}
	v.ran = nil
	opts := v.options()
	opts.KeepState = true
	clean := func(context.Context) ([]string, error) { return nil, nil }
	done, err := Remove(t.Context(), opts, clean)
	if err != nil {
		t.Fatal(done, err)
	}
	after := tree(t, v.root)
	for _, path := range []string{progress.StateDir, EnvoyConfig, logs.Dir} {
		if after[path] == "" {
			t.Errorf("remove took %s, which is the purge's", path)
		}
	}
	for _, path := range []string{EnvoyBinary, layout.KeptDir, seenUnitFile} {
		if after[path] != "" {
			t.Errorf("remove left %s", path)
		}
	}
	if slices.ContainsFunc(v.ran, func(ran string) bool { return strings.Contains(ran, "disable") }) {
		t.Errorf("ran %q", v.ran)
	}
	if made, err := os.ReadFile(filepath.Join(v.root, madeFile)); err == nil {
		t.Errorf("a purge would remove %q", made)
	}
	done, err = Remove(t.Context(), v.options(), clean)
	if err != nil || !strings.Contains(done[len(done)-1], "package manager") {
		t.Errorf("said %q, %v", done, err)
	}
	after = tree(t, v.root)
	for path := range before {
		if strings.HasPrefix(path, "/usr/") && after[path] != before[path] {
			t.Errorf("remove changed %s", path)
		}
	}
}

// A purge removes what an archive's bootstrap has made, once, and of logs and users that were here
// before nothing.
func TestLeaveForPurge(t *testing.T) {
	users := []string{EnvoyUser}
	for name, c := range map[string]struct {
		state progress.State
		made  string // noted by the package's postinst
		want  string
	}{
		"a package's":            {made: "user envoy\n", want: "user envoy\n"},
		"a package's, with logs": {made: logs.Dir + "\n", want: logs.Dir + "\n"},
		"an archive's": {state: progress.State{MadeUsers: users, MadeLogs: true},
			want: "user envoy\n" + logs.Dir + "\n"},
		"an archive's, over logs": {state: progress.State{MadeUsers: users}, want: "user envoy\n"},
		"both":                    {progress.State{MadeLogs: true}, logs.Dir + "\n", logs.Dir + "\n"},
	} {
		t.Run(name, func(t *testing.T) {
			v := newPackagedVM(t)
			mkdir(t, filepath.Join(v.root, logs.Dir), 0o755)
			if c.made != "" {
				v.put(madeFile, c.made)
			}
			r := &removal{bootstrapper: newBootstrapper(v.options())}
			r.leaveForPurge(c.state)
			have, _ := os.ReadFile(filepath.Join(v.root, madeFile)) // absent is nothing
			if string(have) != c.want || len(r.errs) > 0 {
				t.Errorf("a purge would remove %q, want %q (%v)", have, c.want, r.errs)
			}
		})
	}
}

// Giving back to the agent that was here before takes its own files, and none of the package's.
func TestPackagedGivesBack(t *testing.T) {
	v := newPackagedVM(t)
	theirs := filepath.Join(systemd.ConfDir, systemd.AgentUnit)
	v.put(filepath.Join(keptDir, theirs), "[Service]\n")
	before := tree(t, v.root)
	r := &removal{bootstrapper: newBootstrapper(v.options())}
	h := &handover{Phase: handoverGiving, Kept: []keptFile{{Path: theirs}}}
	if err := r.restore(t.Context(), h); err != nil {
		t.Fatal(err)
	}
	after := tree(t, v.root)
	if after[theirs] == "" {
		t.Errorf("%s is not back", theirs)
	}
	for path := range before {
		if strings.HasPrefix(path, "/usr/lib/") && after[path] != before[path] {
			t.Errorf("changed: %s", path)
		}
	}
}

// An Envoy of the package gives way to the one of its upgrade, once, and not to one that was rolled
// back. An Envoy that is not of a package stays.
func TestPackagedEnvoyIsUpgraded(t *testing.T) {
	v := newPackagedVM(t)
	run := func(want string) {
		t.Helper()
		if f := v.bootstrap(attribute.Default()); f != nil {
			t.Fatal(f)
		}
		if have := version(t, filepath.Join(v.root, EnvoyBinary)); have != want {
			t.Errorf("Envoy is %q, want %q", have, want)
		}
	}
	run("1.30.1")
	v.put(layout.Here.ArchivedEnvoy, fakeBinary(t, "1.30.2"))
	run("1.30.2")
	if _, err := Rollback(t.Context(), v.options()); err != nil {
		t.Fatal(err)
	}
	run("1.30.1")
	v.put(layout.Here.ArchivedEnvoy, fakeBinary(t, "1.30.3"))
	run("1.30.3")
	if err := os.Remove(filepath.Join(v.root, layout.Here.ArchivedEnvoy)); err != nil {
		t.Fatal(err)
	}
	run("1.30.3") // the package was removed
	v.put(EnvoyBinary, fakeBinary(t, "1.30.9"))
	state := v.state()
	state.PrimarySum, state.EnvoySource = "", ""
	if err := progress.Write(filepath.Join(v.root, progress.StateDir), state); err != nil {
		t.Fatal(err)
	}
	v.put(layout.Here.ArchivedEnvoy, fakeBinary(t, "1.30.4"))
	run("1.30.9") // the administrator's
}

// An archive's Envoy that is the package's, too, is not replaced by itself, and then the package's.
func TestPackagedEnvoyIsTheArchives(t *testing.T) {
	v := newPackagedVM(t)
	v.put(EnvoyBinary, fakeBinary(t, "1.30.1"))
	state := progress.State{EnvoyVersion: "1.30.1", EnvoySource: archiveSource,
		PrimarySum: progress.Sum(archiveSource)}
	if err := progress.Write(filepath.Join(v.root, progress.StateDir), state); err != nil {
		t.Fatal(err)
	}
	if f := v.bootstrap(attribute.Default()); f != nil {
		t.Fatal(f)
	}
	if _, err := os.Stat(filepath.Join(v.root, restartFile)); err == nil {
		t.Error("Envoy would be restarted for it")
	}
	if have := v.state().EnvoySource; have != packageSource {
		t.Errorf("it is from %q", have)
	}
}

// A run of bootstrap starts what an installation has started, which `bootstrap --remove` has stopped,
// and enables nothing: what is masked or disabled the administrator has, and it stays as it is.
func TestPackagedLeavesDisabledUnits(t *testing.T) {
	v := newPackagedVM(t)
	opts := v.options()
	run := opts.command
	opts.command = func(ctx context.Context, cmd *exec.Cmd) error {
		word := map[string]string{systemd.RotateTimer: "masked", systemd.ReadyPath: "disabled",
			systemd.AgentUnit: "disabled", systemd.EnvoyUnit: "disabled"}[cmd.Args[len(cmd.Args)-1]]
		if len(cmd.Args) == 3 && cmd.Args[1] == "is-enabled" && word != "" {
			fmt.Fprintln(cmd.Stdout, word)
			return errors.New("exit status 1")
		}
		return run(ctx, cmd)
	}
	b := newBootstrapper(opts)
	if err := (&attempt{bootstrapper: b}).installWantedUnits(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := b.enable(t.Context(), systemd.EnvoyUnit); err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(v.ran, "systemctl start --no-block service-proxy-bootstrap.path") {
		t.Errorf("ran %q", v.ran)
	}
	if i := slices.IndexFunc(v.ran, func(ran string) bool {
		return strings.HasPrefix(ran, "systemctl enable")
	}); i >= 0 {
		t.Errorf("ran %q", v.ran[i])
	}
}

// An upgrade that changes Envoy's unit in what only a start brings is noticed by what the last look
// of this boot has seen.
func TestPackagedUnitChanges(t *testing.T) {
	v := newPackagedVM(t)
	look := func() (changed bool) {
		t.Helper()
		if err := InstallUnits(t.Context(), v.options()); err != nil {
			t.Fatal(err)
		}
		_, err := os.Stat(filepath.Join(v.root, unitChangedFile))
		return err == nil
	}
	for range 2 {
		if look() {
			t.Error("nothing has changed")
		}
	}
	unit, err := os.ReadFile(filepath.Join(v.root, seenUnitFile))
	if err != nil {
		t.Fatal(err)
	}
	v.put(seenUnitFile, strings.Replace(string(unit), "Restart=always", "Restart=no", 1))
	if look() {
		t.Error("that needs no start")
	}
	v.put(seenUnitFile, strings.Replace(string(unit), "User=envoy", "User=root", 1))
	if !look() {
		t.Error("that needs a start")
	}
}

// Without an Envoy the package that has one is named first.
func TestPackagedAdvice(t *testing.T) {
	v := newPackagedVM(t)
	if err := os.Remove(filepath.Join(v.root, layout.Here.ArchivedEnvoy)); err != nil {
		t.Fatal(err)
	}
	f := v.bootstrap(attribute.Default())
	if f == nil || !strings.HasPrefix(f.Advice, "install the package service-proxy-agent-envoy, ") {
		t.Errorf("have %+v", f)
	}
}
