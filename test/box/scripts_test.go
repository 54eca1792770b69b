//go:build box

package box

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/internal/layout"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
	"github.com/service-proxy-agent/service-proxy-agent/test/machine"
)

// image is Debian's root filesystem in a chroot, where dpkg is real and systemd does not run.
// systemctl changes links as the real one does, is told whether the agent runs (a file,
// agent-active) and which unit has its name (fragment), and writes down the rest (systemctl.log).
type image struct {
	*testing.T
	root string
}

const fakeSystemctl = `#!/bin/sh
case "$*" in
*is-active*service-proxy-agent.service) [ -e /agent-active ] ;;
*is-active*) false ;;
*FragmentPath*) cat /fragment ;;
*is-enabled* | *preset* | *enable* | *disable* | *mask*)
	exec /usr/bin/systemctl.real --root=/ "$@"
	;;
*) echo "systemctl $*" >>/systemctl.log ;;
esac
`

var (
	ourUnits = []string{systemd.AgentUnit, systemd.BootstrapUnit, systemd.BootstrapPath,
		systemd.ReadyPath, systemd.RotateTimer, systemd.EnvoyUnit}
	settings = "/etc/default/service-proxy-agent"
)

func newImage(t *testing.T) *image {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("the box needs root")
	}
	work := t.TempDir()
	v := &image{t, filepath.Join(work, "root")}
	for _, dir := range []string{"upper", "work", "root"} {
		if err := os.Mkdir(filepath.Join(work, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	data := fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work",
		machine.RootFS(t, "bookworm", runtime.GOARCH), work, work)
	if err := unix.Mount("overlay", v.root, "overlay", 0, data); err != nil {
		t.Fatalf("mount the overlay: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(v.root, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount the overlay: %v", err)
		}
	})
	v.mount("/proc", "proc", unix.MS_RDONLY)
	if err := os.Rename(v.root+"/usr/bin/systemctl", v.root+"/usr/bin/systemctl.real"); err != nil {
		t.Fatal(err)
	}
	v.put("/usr/bin/systemctl", fakeSystemctl, 0o755)
	v.put("/fragment", "/lib/systemd/system/"+systemd.AgentUnit+"\n", 0o644)
	v.put("/run/systemd/system/.keep", "", 0o644) // systemd runs
	debs(t, v.root, "1.0.0", "none")
	debs(t, v.root, "2.0.0", "none")
	return v
}

func (v *image) mount(dir, what string, flags uintptr) {
	v.Helper()
	path := v.root + dir
	if err := unix.Mount(what, path, what, flags, ""); err != nil {
		v.Fatal(err)
	}
	v.Cleanup(func() {
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
			v.Error(err)
		}
	})
}

func (v *image) put(name, text string, mode os.FileMode) {
	v.Helper()
	path := filepath.Join(v.root, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		v.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		v.Fatal(err)
	}
}

func (v *image) read(name string) string {
	text, _ := os.ReadFile(filepath.Join(v.root, name)) // absent is empty
	return string(text)
}

func (v *image) remove(name string) {
	v.Helper()
	if err := os.RemoveAll(filepath.Join(v.root, name)); err != nil {
		v.Fatal(err)
	}
}

func (v *image) has(name string) bool {
	_, err := os.Lstat(filepath.Join(v.root, name))
	return err == nil
}

// try runs a command of the image, with a root shell's PATH, no input, and no network.
func (v *image) try(name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: v.root, Cloneflags: syscall.CLONE_NEWNET}
	cmd.Path, cmd.Err = "/usr/bin/"+name, nil
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C",
		"HOME=/root", "DEBIAN_FRONTEND=noninteractive"}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (v *image) run(name string, args ...string) string {
	v.Helper()
	out, err := v.try(name, args...)
	if err != nil {
		v.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

// dpkg installs or removes the agent's package; what it depends on is not of interest.
func (v *image) dpkg(args ...string) {
	v.Helper()
	v.run("dpkg", append([]string{"--force-depends"}, args...)...)
}

func (v *image) deb(version string) string {
	v.Helper()
	names, err := filepath.Glob(v.root + "/root/" + version + "/service-proxy-agent_*.deb")
	if err != nil || len(names) != 1 {
		v.Fatal(names, err)
	}
	return strings.TrimPrefix(names[0], v.root)
}

// removed removes the package and leaves what a purge takes. Without systemd there are no rules.
func (v *image) removed() {
	v.Helper()
	v.remove("/run/systemd")
	v.dpkg("-r", "service-proxy-agent")
	v.put("/run/systemd/system/.keep", "", 0o644)
}

// ran are the calls of systemctl since the last call, but for what only looks.
func (v *image) ran() string {
	v.Helper()
	log := v.read("/systemctl.log")
	v.remove("/systemctl.log")
	return log
}

func (v *image) enabled(unit string) string {
	out, _ := v.try("systemctl", "is-enabled", unit) // its exit code says no more than its word
	return strings.TrimSpace(out)
}

// archive lays down what an archive's installation is made of, of which the timer is disabled.
func (v *image) archive() {
	v.Helper()
	for _, file := range systemd.FilesIn(layout.Archive) {
		v.put(file.Path, string(file.Text), 0o644)
	}
	v.put("/var/lib/service-proxy-agent/bootstrap.json", "{}", 0o600)
	v.put("/etc/service-proxy-agent/envoy.json", "{}", 0o644)
	v.put("/var/log/envoy/envoy.err.log", "x\n", 0o644)
	cmd := exec.Command("go", "build", "-o", v.root+layout.Archive.Agent, "./cmd/service-proxy-agent")
	cmd.Dir = moduleRoot(v.T)
	if out, err := cmd.CombinedOutput(); err != nil {
		v.Fatalf("%v\n%s", err, out)
	}
	v.run("systemctl", append([]string{"enable"}, ourUnits...)...)
	v.run("systemctl", "disable", systemd.RotateTimer)
}

func restarts(log string) bool {
	return strings.Contains(log, "restart "+systemd.AgentUnit)
}

func starts(log string) bool {
	return slices.ContainsFunc(strings.Split(log, "\n"), func(line string) bool {
		return strings.Contains(line, " start ") && strings.Contains(line, systemd.AgentUnit)
	})
}

// TestDebOverArchive: dpkg by itself, in a root shell whose PATH finds the archive's program first,
// has the package take the archive's place. What was disabled stays so, also where the script that
// does it is killed in between.
func TestDebOverArchive(t *testing.T) {
	t.Parallel()
	for name, killed := range map[string]bool{"at once": false, "killed in between": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			v := newImage(t)
			v.archive()
			v.put("/agent-active", "", 0o644)
			if killed {
				v.run("mv", "/usr/bin/deb-systemd-helper", "/usr/bin/helper.real")
				v.put("/usr/bin/deb-systemd-helper", "#!/bin/sh\nkill -9 $PPID\n", 0o755)
				if out, err := v.try("dpkg", "--force-depends", "-i", v.deb("1.0.0")); err == nil ||
					v.has(layout.Archive.Agent) {
					t.Fatalf("the script was not killed after the archive's program had gone:\n%s", out)
				}
				v.run("mv", "/usr/bin/helper.real", "/usr/bin/deb-systemd-helper")
				v.dpkg("--configure", "-a")
			} else {
				v.dpkg("-i", v.deb("1.0.0"))
			}
			if log := v.ran(); !restarts(log) || starts(log) {
				t.Errorf("the agent that ran is not restarted:\n%s", log)
			}
			for range 2 {
				for _, unit := range ourUnits {
					want := "enabled"
					if unit == systemd.RotateTimer {
						want = "disabled"
					}
					if have := v.enabled(unit); have != want {
						t.Errorf("%s is %s, want %s", unit, have, want)
					}
				}
				v.dpkg("-i", v.deb("2.0.0"))
			}
			if have := v.run("find", "/usr/local", "/run", "-name", "service-proxy-*", "-not",
				"-name", "service-proxy-envoy-unit"); have != "" {
				t.Errorf("left:\n%s", have)
			}
		})
	}
}

// TestDebPurgedUnderArchive: a package that was removed is purged when the archive has taken its
// place. What the two share is the archive's.
func TestDebPurgedUnderArchive(t *testing.T) {
	t.Parallel()
	v := newImage(t)
	v.dpkg("-i", v.deb("1.0.0"))
	v.removed()
	v.archive()
	v.dpkg("-P", "service-proxy-agent")
	for _, unit := range ourUnits {
		if have := v.enabled(unit); have != "enabled" && unit != systemd.RotateTimer {
			t.Errorf("%s is %s", unit, have)
		}
	}
	for _, name := range []string{"/var/lib/service-proxy-agent/bootstrap.json",
		"/etc/service-proxy-agent/envoy.json", "/var/log/envoy/envoy.err.log", layout.Archive.Agent} {
		if !v.has(name) {
			t.Errorf("%s is gone", name)
		}
	}
	v.run("getent", "passwd", "envoy", "service-proxy-agent")
	if have := v.run("find", "/var/lib/systemd", "-name", "service-proxy-*"); have != "" ||
		v.has("/var/lib/service-proxy-agent.made") {
		t.Errorf("left:\n%s", have)
	}
}

// TestDebKeepsSettings: settings that were there before the package are no reason to ask, and stay.
func TestDebKeepsSettings(t *testing.T) {
	t.Parallel()
	const own = "SERVICE_PROXY_AGENT_LOG_LEVEL=debug\n"
	v := newImage(t)
	check := func(when string) {
		t.Helper()
		if have := v.read(settings); have != own {
			t.Errorf("%s: %q", when, have)
		}
		if have := v.run("find", "/etc/default", "-name", "service-proxy-agent?*", "-not",
			"-name", "*.dpkg-*"); have != "" {
			t.Errorf("%s: left %s", when, have)
		}
	}
	v.put(settings, own, 0o644)
	v.dpkg("--unpack", v.deb("1.0.0"))
	v.remove("/run/systemd")
	v.dpkg("-r", "service-proxy-agent")
	check("unpacked and removed again")
	v.dpkg("-P", "service-proxy-agent")
	v.put(settings, own, 0o644) // a purge takes it, as each configuration file of a package
	v.put("/run/systemd/system/.keep", "", 0o644)

	v.dpkg("-i", v.deb("1.0.0"))
	check("installed")
	v.dpkg("-i", v.deb("2.0.0"))
	check("upgraded")
	v.removed()
	check("removed")
	v.dpkg("-i", v.deb("1.0.0"))
	check("installed again")

	// dpkg cannot unpack it: another has a file.
	v.removed()
	v.dpkg("-P", "service-proxy-agent")
	v.put(settings, own, 0o644)
	v.put("/root/other/DEBIAN/control", "Package: other\nVersion: 1\nArchitecture: all\n"+
		"Maintainer: a <a@example.com>\nDescription: x\n", 0o644)
	v.put("/root/other"+layout.Packages.Agent, "", 0o755)
	v.run("dpkg-deb", "-b", "/root/other", "/root/other.deb")
	v.dpkg("-i", "/root/other.deb")
	if out, err := v.try("dpkg", "--force-depends", "-i", v.deb("1.0.0")); err == nil {
		t.Errorf("installed over another package:\n%s", out)
	}
	check("not unpacked")
}

// TestDebStartsAgent: the first installation starts the agent, also after one that failed. An
// upgrade restarts the one that runs, and starts none that somebody has stopped; nor does it touch
// another agent whose unit has the name.
func TestDebStartsAgent(t *testing.T) {
	t.Parallel()
	v := newImage(t)
	v.run("mv", "/usr/bin/systemd-sysusers", "/usr/bin/sysusers.real")
	v.put("/usr/bin/systemd-sysusers", "#!/bin/sh\nexit 1\n", 0o755)
	if out, err := v.try("dpkg", "--force-depends", "-i", v.deb("1.0.0")); err == nil {
		t.Fatalf("the first installation has not failed:\n%s", out)
	}
	v.run("mv", "/usr/bin/sysusers.real", "/usr/bin/systemd-sysusers")
	v.ran()
	v.dpkg("-i", v.deb("1.0.0"))
	if log := v.ran(); !starts(log) {
		t.Errorf("the agent is not started after an installation that had failed:\n%s", log)
	}
	v.dpkg("-i", v.deb("2.0.0"))
	if log := v.ran(); starts(log) || restarts(log) {
		t.Errorf("an upgrade starts the agent, which somebody has stopped:\n%s", log)
	}
	v.put("/agent-active", "", 0o644)
	v.dpkg("-i", v.deb("1.0.0"))
	if log := v.ran(); !restarts(log) {
		t.Errorf("an upgrade does not restart the agent:\n%s", log)
	}
	v.put("/fragment", systemd.ConfDir+"/"+systemd.AgentUnit+"\n", 0o644)
	v.dpkg("-i", v.deb("2.0.0"))
	if log := v.ran(); starts(log) || restarts(log) {
		t.Errorf("an upgrade restarts another agent:\n%s", log)
	}
	v.removed()
	v.remove("/agent-active")
	v.dpkg("-P", "service-proxy-agent")
	v.ran()
	v.dpkg("-i", v.deb("2.0.0"))
	if log := v.ran(); starts(log) || !strings.Contains(log, systemd.BootstrapUnit) {
		t.Errorf("an installation starts another agent, or not bootstrap:\n%s", log)
	}
}

// TestDebPurgeOfMount: where a disk is mounted for Envoy's logs, a purge empties it and goes on.
func TestDebPurgeOfMount(t *testing.T) {
	t.Parallel()
	v := newImage(t)
	v.dpkg("-i", v.deb("1.0.0"))
	v.removed()
	for _, dir := range []string{"/var/log/envoy", "/var/lib/service-proxy-agent"} {
		v.mount(dir, "tmpfs", 0)
		v.put(dir+"/x", "x", 0o644)
	}
	v.dpkg("-P", "service-proxy-agent")
	for _, name := range []string{"/var/log/envoy/x", "/var/lib/service-proxy-agent/x",
		"/var/lib/service-proxy-agent.made"} {
		if v.has(name) {
			t.Errorf("%s is left", name)
		}
	}
	if out, err := v.try("getent", "passwd", "envoy"); err == nil {
		t.Errorf("left: %s", out)
	}
}

// TestNeedrestart: it is told to leave Envoy alone, and nothing else.
func TestNeedrestart(t *testing.T) {
	t.Parallel()
	v := newImage(t)
	v.dpkg("-i", v.deb("1.0.0"))
	have := v.run("perl", "-e", `our %nrconf = (override_rc => {qr(^dbus) => 0});
		eval do { local $/; open my $f, "<", "/etc/needrestart/conf.d/service-proxy-agent.conf"; <$f> };
		die $@ if $@;
		for my $unit (@ARGV) { for (keys %{$nrconf{override_rc}}) {
			print "$unit\n" if $unit =~ /$_/ && !$nrconf{override_rc}->{$_} } }`,
		systemd.EnvoyUnit, systemd.AgentUnit, systemd.BootstrapUnit)
	if have != systemd.EnvoyUnit+"\n" {
		t.Errorf("it leaves alone %q", have)
	}
}

// TestRPMScripts plays those of the .rpm, for which no registry has a system, on what the .deb has
// laid down.
func TestRPMScripts(t *testing.T) {
	t.Parallel()
	v := newImage(t)
	preset := "/usr/lib/systemd/system-preset/80-service-proxy-agent.preset"
	for name, to := range map[string]string{"preset": preset, "scripts/agent.post": "/root/agent.post",
		"scripts/envoy.post": "/root/envoy.post"} {
		text, err := os.ReadFile(filepath.Join(moduleRoot(t), "deploy/packages", name))
		if err != nil {
			t.Fatal(err)
		}
		v.put(to, string(text), 0o644)
	}
	v.dpkg("-i", v.deb("1.0.0"))
	v.run("systemctl", append([]string{"disable"}, ourUnits...)...)
	v.run("systemctl", "mask", systemd.ReadyPath)
	v.ran()

	v.run("sh", "/root/agent.post", "1")
	log := v.ran()
	for _, unit := range ourUnits {
		want := "enabled"
		if unit == systemd.ReadyPath {
			want = "masked"
		}
		if have := v.enabled(unit); have != want {
			t.Errorf("%s is %s, want %s", unit, have, want)
		}
		if started := strings.Contains(log, "start "+unit+"\n"); started !=
			(unit != systemd.ReadyPath && unit != systemd.EnvoyUnit) {
			t.Errorf("%s is started: %v", unit, started)
		}
	}

	v.put("/agent-active", "", 0o644)
	for _, enabled := range []bool{true, false} {
		if !enabled {
			v.run("systemctl", "disable", systemd.BootstrapUnit)
		}
		for _, script := range []string{"agent.post", "envoy.post"} {
			v.run("sh", "/root/"+script, "2")
			log := v.ran()
			if have := strings.Contains(log, "restart "+systemd.BootstrapUnit); have != enabled {
				t.Errorf("%s starts bootstrap, which is enabled %v: %v\n%s", script, enabled, have, log)
			}
			if script == "agent.post" && !restarts(log) {
				t.Errorf("an upgrade does not restart the agent:\n%s", log)
			}
		}
	}
	v.put("/fragment", systemd.ConfDir+"/"+systemd.AgentUnit+"\n", 0o644)
	v.run("sh", "/root/agent.post", "2")
	if log := v.ran(); restarts(log) {
		t.Errorf("an upgrade restarts another agent:\n%s", log)
	}
	v.put("/fragment", layout.Packages.UnitDir+"/"+systemd.AgentUnit+"\n", 0o644)

	v.run("systemctl", "unmask", systemd.ReadyPath)
	v.archive()
	v.run("sh", "/root/agent.post", "1")
	if have := v.enabled(systemd.RotateTimer); have != "disabled" {
		t.Errorf("what was disabled of the archive is %s", have)
	}
	if have := v.enabled(systemd.AgentUnit); have != "enabled" {
		t.Errorf("the agent is %s", have)
	}
}
