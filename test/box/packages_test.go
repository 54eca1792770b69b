//go:build box

package box

import (
	"crypto/sha256"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/service-proxy-agent/service-proxy-agent/internal/layout"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
	"github.com/service-proxy-agent/service-proxy-agent/test/machine"
)

// debs puts the .deb of a version, and of Envoy with the first one, into the VM's /root/VERSION.
func debs(t *testing.T, root, version, envoy string) {
	t.Helper()
	dir := filepath.Join(root, "root", version)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range machine.Packages(t, version, envoy) {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

const aptInstall = "DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o Dpkg::Use-Pty=0 install "

// disk is all that is on the VM's disk, with content, mode and owner, but for logs, for what dpkg
// and apt keep for themselves, and for the backups that programs make of passwd and the like.
func (v *VM) disk() map[string]string {
	v.t.Helper()
	skip := regexp.MustCompile(`^/(proc|sys|dev|run|tmp|root|var/(log|tmp|cache|backups)|` +
		`var/lib/(apt|dpkg|ucf|systemd/(catalog|deb-systemd-helper-(enabled|masked)|timers|random-seed|timesync|linger))|` +
		`etc/(passwd|shadow|group|gshadow|subuid|subgid)-|etc/\.pwd\.lock)$`)
	all := map[string]string{}
	err := filepath.WalkDir(v.root, func(path string, entry fs.DirEntry, err error) error {
		name := strings.TrimPrefix(path, v.root)
		switch {
		case os.IsNotExist(err): // gone meanwhile
			return nil
		case err != nil:
			return err
		case skip.MatchString(name) && entry.IsDir():
			return fs.SkipDir
		case skip.MatchString(name), name == "":
			return nil
		}
		info, err := entry.Info()
		if err != nil {
			return nil // gone meanwhile
		}
		what := info.Mode().String() + owner(info)
		switch {
		case info.Mode()&fs.ModeSymlink != 0:
			to, _ := os.Readlink(path)
			what += " " + to
		case info.Mode().IsRegular():
			text, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			what += fmt.Sprintf(" %x", sha256.Sum256(text))
		}
		all[name] = what
		return nil
	})
	if err != nil {
		v.t.Fatal(err)
	}
	return all
}

func owner(info fs.FileInfo) string {
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return ""
	}
	return fmt.Sprintf(" %d:%d", stat.Uid, stat.Gid)
}

// noUnits says what systemd still knows of ours.
func (v *VM) noUnits() {
	v.t.Helper()
	if out, _ := v.try("sh", "-c", "systemctl list-units --all --no-legend --plain 'service-proxy-*' | "+
		"grep -v 'not-found'; systemctl list-unit-files --no-legend 'service-proxy-*'; "+
		"ls -d /run/service-proxy* 2>/dev/null; true"); strings.TrimSpace(out) != "" {
		v.t.Errorf("left behind:\n%s", out)
	}
}

// processes are ours, with their users. (A minimal image has no ps.)
const processes = `for p in /proc/[0-9]*; do
	args=$(tr '\0' ' ' <$p/cmdline) 2>/dev/null
	case $args in */envoy\ *|*/service-proxy-agent\ *) echo "process $(stat -c %U $p) $args" ;; esac
done`

// TestPackages has the life of a VM with the packages: install, upgrade under load, remove, install
// again, purge. Then the disk is as it was, and a VM without the attribute is no node by a package
// that is there.
func TestPackages(t *testing.T) {
	t.Parallel()
	for _, release := range releases() {
		t.Run(release, func(t *testing.T) {
			v := newVM(t, options{release: release})
			v.livesWithPackages(t)
		})
	}
}

func (v *VM) livesWithPackages(t *testing.T) {
	debs(t, v.root, "1.0.0", envoyBinary(t))
	debs(t, v.root, "2.0.0", "none")
	v.boot()
	// What the packages depend on stays: it is not ours.
	v.run("sh", "-c", "apt-get -qq update; "+aptInstall+"iptables ca-certificates")
	rules := v.run("iptables-save", "-t", "nat")
	before := v.disk()

	start := time.Now()
	out := v.run("sh", "-c", aptInstall+"/root/1.0.0/*.deb")
	took := time.Since(start)
	v.waitFinished(90 * time.Second)
	v.eventually(30*time.Second, "the service answers through Envoy", v.checkVIP)
	t.Logf("apt took %.1f s, the service answered after %.1f s\n%s", took.Seconds(),
		time.Since(start).Seconds(), out)
	v.serve() // else that is warned of
	v.waitStatus(60*time.Second, progress.Finished)
	v.checkQuiet(t)
	v.checkUnits(t)
	if list := v.run("journalctl", "--list-catalog"); !strings.Contains(list, "service-proxy-agent") {
		t.Errorf("the journal does not know the catalog:\n%s", list)
	}
	if have := v.run("systemctl", "show", "--value", "-p", "FragmentPath", systemd.AgentUnit); have !=
		layout.Packages.UnitDir+"/"+systemd.AgentUnit+"\n" && have != "/lib/systemd/system/"+systemd.AgentUnit+"\n" {
		t.Errorf("systemd has %s", have)
	}
	if said, err := v.try("sh", "-c", "mkdir /root/a && cd /root/a && gsutil cp gs://"+bucket+"/"+archive+
		" . && tar -xzf *.tgz && service-proxy-agent/service-proxy-agent-bootstrap.sh"); err == nil ||
		!strings.Contains(said, "the package service-proxy-agent") {
		t.Errorf("an archive over the package: %v\n%s", err, said)
	}

	// An upgrade: another agent, the same Envoy process, no connection lost.
	envoy, agent := v.envoyPID(), v.agentPID()
	load := v.startLoad(200)
	time.Sleep(time.Second)
	out = v.run("sh", "-c", aptInstall+"/root/2.0.0/*.deb")
	v.eventually(30*time.Second, "the new agent runs", func() error {
		if have := v.agentPID(); have == agent || have == "0" {
			return fmt.Errorf("its process is %s", have)
		}
		return nil
	})
	time.Sleep(3 * time.Second)
	total, failed, gap := load.stop()
	t.Logf("upgrade: %d connections, %d lost, longest gap %v\n%s", total, failed, gap, out)
	if failed > 0 || total < 200 {
		t.Errorf("upgrade: %d of %d connections were lost: %s", failed, total, load.firstError)
	}
	if have := v.envoyPID(); have != envoy {
		t.Errorf("Envoy was restarted: pid %s, then %s", envoy, have)
	}
	if have := v.run("service-proxy-agent", "version"); !strings.Contains(have, "2.0.0") {
		t.Errorf("version %q", have)
	}
	v.waitFinished(60 * time.Second)

	if os.Getenv("SOAK") != "" {
		v.upgradesEnvoy(t)
	}

	// A person's --remove leaves the package's files. With its units enabled again, and bootstrap
	// started, the VM is a node again.
	t.Log(v.run("service-proxy-agent", "bootstrap", "--remove"))
	v.run("dpkg", "--verify", "service-proxy-agent")
	v.run("test", "!", "-e", layout.Envoy)
	v.platform.ResetBudget()
	v.run("systemctl", "enable", "service-proxy-agent.service", "service-proxy-bootstrap.service",
		"service-proxy-bootstrap.path", "service-proxy-ready.path", "service-proxy-rotate.timer",
		"service-proxy-envoy.service")
	v.run("systemctl", "start", "service-proxy-bootstrap")
	v.waitFinished(60 * time.Second)
	v.eventually(30*time.Second, "the VM is ready once more", func() error {
		if _, err := v.try("systemctl", "is-active", systemd.ReadyTarget); err != nil {
			return err
		}
		return v.checkVIP()
	})

	// Somebody stops it: an upgrade, here to the version before, leaves it stopped.
	v.run("systemctl", "stop", systemd.InterceptionUnit)
	v.run("sh", "-c", aptInstall+"--allow-downgrades /root/1.0.0/service-proxy-agent_*.deb")
	if have := v.property(systemd.AgentUnit, "ActiveState"); have != "inactive" {
		t.Errorf("an agent that was stopped is %s after an upgrade", have)
	}
	v.run("systemctl", "start", systemd.AgentUnit)
	v.eventually(30*time.Second, "the service answers through Envoy again", v.checkVIP)

	// Remove takes the rules, and leaves the state.
	t.Log(v.run("sh", "-c", "apt-get -qq -y -o Dpkg::Use-Pty=0 remove service-proxy-agent service-proxy-agent-envoy"))
	if have := v.run("iptables-save", "-t", "nat"); strings.Contains(have, "SERVICE_PROXY") {
		t.Errorf("the rules after remove:\n%s", have)
	}
	if have := v.run("sh", "-c", processes); have != "" {
		t.Errorf("runs after remove:\n%s", have)
	}
	v.run("test", "-e", "/var/lib/service-proxy-agent/bootstrap.json")
	v.run("test", "-e", "/etc/service-proxy-agent/envoy.json")
	v.run("test", "!", "-e", layout.Envoy)
	// What was spent of the budget of guest attributes is forgotten with the removal: nine queries in
	// that minute at the most, of the ten that Compute Engine allows.
	v.platform.ResetBudget()
	v.run("sh", "-c", aptInstall+"/root/1.0.0/*.deb")
	v.waitFinished(90 * time.Second)
	v.eventually(30*time.Second, "the service answers through Envoy after another installation", v.checkVIP)

	t.Log(v.run("sh", "-c", "apt-get -qq -y -o Dpkg::Use-Pty=0 purge service-proxy-agent service-proxy-agent-envoy"))
	v.noUnits()
	if have := v.run("iptables-save", "-t", "nat"); withoutComments(have) != withoutComments(rules) {
		t.Errorf("the rules before:\n%s\nafter:\n%s", rules, have)
	}
	if diff := cmp.Diff(before, v.disk()); diff != "" {
		t.Errorf("the disk after purge (-before +after):\n%s", diff)
	}
	if list := v.run("journalctl", "--list-catalog"); strings.Contains(list, "service-proxy-agent") {
		t.Errorf("left behind in the journal's catalog:\n%s", list)
	}

	// A VM that is to be no node, which somebody has settings for. Nobody is asked about them.
	v.platform.ResetBudget()
	v.platform.DeleteAttribute("gce-service-proxy")
	const own = "SERVICE_PROXY_AGENT_LOG_LEVEL=debug\n"
	v.write("etc/default/service-proxy-agent", own, 0o644)
	v.run("sh", "-c", aptInstall+"/root/1.0.0/*.deb </dev/null")
	if have, err := os.ReadFile(filepath.Join(v.root, "etc/default/service-proxy-agent")); err != nil ||
		string(have) != own {
		t.Errorf("the settings are %q: %v", have, err)
	}
	v.eventually(30*time.Second, "bootstrap says that there is no attribute", func() error {
		state := v.state()
		if state.Status != progress.Failed {
			return fmt.Errorf("it is %q: %q", state.Status, state.Failure)
		}
		return nil
	})
	if have := v.run("iptables-save", "-t", "nat"); strings.Contains(have, "SERVICE_PROXY") {
		t.Errorf("rules on a VM without the attribute:\n%s", have)
	}
	v.run("test", "!", "-e", layout.Envoy)
}

// upgradesEnvoy upgrades Envoy's package: bootstrap takes the new one into service by a hot
// restart. It is the same Envoy, which can take over from itself, in another file.
func (v *VM) upgradesEnvoy(t *testing.T) {
	t.Helper()
	program, err := os.ReadFile(envoyBinary(t))
	if err != nil {
		t.Fatal(err)
	}
	program = append(program, '\n')
	other := filepath.Join(t.TempDir(), "envoy")
	if err := os.WriteFile(other, program, 0o755); err != nil {
		t.Fatal(err)
	}
	debs(t, v.root, "3.0.0", other)
	before := v.epochs()
	load := v.startLoad(200)
	time.Sleep(time.Second)
	v.run("sh", "-c", aptInstall+"/root/3.0.0/service-proxy-agent-envoy_*.deb")
	v.eventually(90*time.Second, "the new Envoy serves", func() error {
		info, err := os.Stat(filepath.Join(v.root, layout.Envoy))
		if err != nil || info.Size() != int64(len(program)) {
			return fmt.Errorf("it is not installed: %v", err)
		}
		if all := v.epochs(); len(all) == 0 || len(before) == 0 ||
			all[len(all)-1].pid == before[len(before)-1].pid {
			return fmt.Errorf("its processes are %v, and were %v", all, before)
		}
		if have := v.property(systemd.BootstrapUnit, "ActiveState"); have != "inactive" {
			return fmt.Errorf("bootstrap is %s", have)
		}
		return nil
	})
	time.Sleep(time.Second)
	load.refusedNone(t, "an upgrade of Envoy's package")
	v.waitFinished(30 * time.Second)
}

func withoutComments(rules string) string {
	return regexp.MustCompile(`(?m)^#.*\n| ?\[\d+:\d+\]`).ReplaceAllString(rules, "")
}

// result is what a VM has become: files with mode and owner, units, users, rules. Where the archive
// and the packages differ by layout alone, both say the package's place.
func (v *VM) result() []string {
	v.t.Helper()
	const look = `find / -xdev \( -path /proc -o -path /sys -o -path /run -o -path /root -o -path /tmp ` +
		`-o -path /var/log/journal -o -path /var/lib/dpkg -o -path /var/lib/systemd -o -path /var/tmp \) -prune -o ` +
		`\( -path '*service-proxy*' -o -path '*/envoy*' \) -printf 'file %M %u:%g %p %l\n'; ` +
		`find /run -path /run/systemd -prune -o -path '*service-proxy*' -prune -printf 'file %M %u:%g %p %l\n'; ` +
		`for u in $(systemctl list-unit-files --no-legend --plain 'service-proxy-*' | cut -d' ' -f1); do ` +
		`echo "unit $u $(systemctl show -p UnitFileState --value $u) $(systemctl show -p ActiveState --value $u)"; done; ` +
		`grep -E '^(envoy|service-proxy-agent):' /etc/passwd | sed -E 's/:[0-9]+:[0-9]+:/:UID:GID:/; s/^/user /'; ` +
		processes + `; ` +
		`iptables-save -t nat | sed -E '/^#/d; s/\[[0-9]+:[0-9]+\]//; s/^/rule /'`
	var lines []string
	for line := range strings.Lines(v.run("sh", "-c", look)) {
		line = layout.Packages.Text(strings.TrimSpace(line))
		for archive, packages := range map[string]string{
			layout.Archive.ArchivedEnvoy:    layout.Packages.ArchivedEnvoy,
			layout.Archive.TmpfilesDir:      layout.Packages.TmpfilesDir,
			layout.Archive.SysusersDir:      layout.Packages.SysusersDir,
			layout.Archive.CatalogDir:       layout.Packages.CatalogDir,
			"/usr/share/zsh/site-functions": "/usr/share/zsh/vendor-completions",
		} {
			line = strings.ReplaceAll(line, archive, packages)
		}
		line = strings.ReplaceAll(line, " /lib/systemd/system/", " /usr/lib/systemd/system/")
		line = regexp.MustCompile(`(man8/\S*\.8)\.gz`).ReplaceAllString(line, "$1")
		line = regexp.MustCompile(`--(restart-epoch|base-id)[ =]\S+`).ReplaceAllString(line, "")
		// What comes and goes by the minute.
		if !strings.Contains(line, "settling") && !strings.Contains(line, "last-failure.json") {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	archive := systemd.FilesIn(layout.Archive)
	for i, file := range systemd.FilesIn(layout.Packages) {
		text, err := os.ReadFile(filepath.Join(v.root, file.Path))
		if err != nil {
			text, err = os.ReadFile(filepath.Join(v.root, archive[i].Path))
		}
		if err != nil {
			v.t.Error(err)
		}
		lines = append(lines, fmt.Sprintf("text %s %.8x", file.Path,
			sha256.Sum256([]byte(layout.Packages.Text(string(text))))))
	}
	slices.Sort(lines)
	return slices.Compact(lines)
}

// TestSameVM: from the archive, from packages on an image, and by a startup script the same VM
// results. The image is made in a chroot, where nothing is started.
func TestSameVM(t *testing.T) {
	t.Parallel()
	results := map[string][]string{}
	for name, how := range map[string]struct {
		prepare func(v *VM)
		install func(v *VM)
	}{
		"archive": {install: func(v *VM) { v.install() }},
		"startup-script": {install: func(v *VM) {
			script := strings.ReplaceAll(v.example("startup-script.sh"),
				"gs://BUCKET/service-proxy-agent-VERSION.tgz", "gs://"+bucket+"/"+archive)
			v.write("root/startup-script", script, 0o755)
			v.run("bash", "/root/startup-script")
		}},
		"packages": {prepare: func(v *VM) {
			debs(v.t, v.root, "1.0.0", envoyBinary(v.t))
			v.write("usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n", 0o755)
			out, err := exec.Command("chroot", v.root, "sh", "-ec", "apt-get -qq update; "+aptInstall+
				"/root/1.0.0/*.deb; rm /usr/sbin/policy-rc.d").CombinedOutput()
			if err != nil {
				v.t.Fatalf("%v\n%s", err, out)
			}
			v.t.Logf("%s", out)
			if _, err := os.Stat(filepath.Join(v.root, layout.Envoy)); err == nil {
				v.t.Error("an installation into an image ran bootstrap")
			}
		}, install: func(*VM) {}},
	} {
		t.Run(name, func(t *testing.T) {
			v := newVM(t, options{})
			if how.prepare != nil {
				how.prepare(v)
			}
			v.boot()
			how.install(v)
			v.serve()
			v.waitFinished(90 * time.Second)
			v.eventually(30*time.Second, "the service answers through Envoy", v.checkVIP)
			v.eventually(30*time.Second, "the serving port answers through Envoy", v.checkInbound)
			v.eventually(30*time.Second, "the VM is ready", func() error {
				_, err := v.try("systemctl", "is-active", systemd.ReadyTarget)
				return err
			})
			v.eventually(30*time.Second, "bootstrap has ended", func() error {
				if have := v.property(systemd.BootstrapUnit, "ActiveState"); have != "inactive" {
					return fmt.Errorf("it is %s", have)
				}
				return nil
			})
			results[name] = v.result()
		})
	}
	if t.Failed() {
		return
	}
	if diff := cmp.Diff(results["archive"], results["startup-script"]); diff != "" {
		t.Errorf("archive and startup script differ:\n%s", diff)
	}
	t.Logf("all of %d files, units, users, processes and rules, paths apart:\n%s",
		len(results["archive"]), strings.Join(results["archive"], "\n"))
	var differ []string
	for _, a := range results["archive"] {
		if !slices.Contains(results["packages"], a) {
			differ = append(differ, "- "+a)
		}
	}
	for _, p := range results["packages"] {
		if !slices.Contains(results["archive"], p) {
			differ = append(differ, "+ "+p)
		}
	}
	t.Logf("archive and packages differ by:\n%s", strings.Join(differ, "\n"))
	for _, line := range differ {
		if !ofPackages.MatchString(line) {
			t.Errorf("archive and packages differ: %s", line)
		}
	}
}

// ofPackages is what the VM of packages has besides, or without which it does: what Debian wants of
// each package, and what the archive keeps for itself.
var ofPackages = regexp.MustCompile(`^(- file \S+ root:root /usr/local/lib/service-proxy-agent/archive|` +
	`\+ file \S+ root:root (` + strings.Join([]string{
	`/usr/lib/service-proxy-agent`,
	`/run/service-proxy-envoy-unit`,
	`/usr/share/doc/service-proxy-agent(-envoy)?(/\S*)?`,
	`/usr/share/lintian/overrides/service-proxy-agent(-envoy)?`,
	`/etc/default/service-proxy-agent`,
	`/etc/needrestart/conf\.d/service-proxy-agent\.conf`,
	`/var/lib/service-proxy-agent\.made`,
	`/usr/share/fish/vendor_completions\.d/service-proxy-agent\.fish`,
}, "|") + `))$`)

// TestArchiveToPackage: the package takes the place of an archive's installation on a VM that
// serves, under load, without a lost connection or another Envoy; and no unit is left twice.
func TestArchiveToPackage(t *testing.T) {
	t.Parallel()
	v := ready(t, options{})
	debs(t, v.root, "2.0.0", "none")
	if !v.state().MadeLogs { // for the package's purge
		t.Error("the archive's bootstrap does not say that it has made the folder of Envoy's logs")
	}
	envoy, agent := v.envoyPID(), v.agentPID()
	load := v.startLoad(200)
	time.Sleep(time.Second)
	// By dpkg itself, in whose PATH the archive's program comes first. apt sets one of its own.
	out := v.run("sh", "-c", "dpkg -i /root/2.0.0/*.deb </dev/null")
	v.eventually(30*time.Second, "the package's agent runs", func() error {
		if have := v.agentPID(); have == agent || have == "0" {
			return fmt.Errorf("its process is %s", have)
		}
		return nil
	})
	time.Sleep(3 * time.Second)
	total, failed, gap := load.stop()
	t.Logf("from the archive to the package: %d connections, %d lost, longest gap %v\n%s", total, failed,
		gap, out)
	if failed > 0 || total < 200 {
		t.Errorf("%d of %d connections were lost: %s", failed, total, load.firstError)
	}
	v.waitFinished(60 * time.Second)
	if have := v.envoyPID(); have != envoy {
		t.Errorf("Envoy was restarted: pid %s, then %s", envoy, have)
	}
	if have := v.run("sh", "-c", "find /usr/local /etc/systemd /etc/fish -name '*service-proxy-*' "+
		"-not -path '/etc/systemd/system/*.wants/*' 2>/dev/null; "+
		"find /etc/systemd/system -lname '/usr/local/*'; true"); strings.TrimSpace(have) != layout.KeptDir {
		t.Errorf("left of the archive:\n%s", have)
	}
	exe := v.run("readlink", "/proc/"+v.agentPID()+"/exe")
	if strings.TrimSpace(exe) != layout.Packages.Agent {
		t.Errorf("the agent that runs is %s", exe)
	}
	for _, unit := range []string{systemd.AgentUnit, systemd.BootstrapUnit, systemd.EnvoyUnit,
		systemd.BootstrapPath, systemd.ReadyPath, systemd.RotateTimer} {
		if have := v.property(unit, "UnitFileState"); have != "enabled" {
			t.Errorf("%s is %s", unit, have)
		}
	}
	// A reload of the unit that names another program goes to the supervisor that runs.
	v.run("systemctl", "reload", systemd.EnvoyUnit)
	v.eventually(30*time.Second, "the service answers through Envoy", v.checkVIP)
}
