//go:build box

package box

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/service-proxy-agent/service-proxy-agent/internal/bootstrap"
)

// checkSystem: `bootstrap --check` says of this Debian that the agent works, without a limit.
func (v *VM) checkSystem(t *testing.T) {
	t.Helper()
	before := v.kernelState()
	out, code := v.asks("service-proxy-agent", "bootstrap", "--check")
	body, inJSON := v.asks("service-proxy-agent", "bootstrap", "--check", "-o", "json")
	var report struct{ Verdict, System string }
	if err := json.Unmarshal([]byte(body), &report); err != nil || code != 0 || inJSON != 0 ||
		report.Verdict != "works" || !strings.Contains(report.System, v.release) {
		t.Errorf("exit codes %d and %d, %v:\n%s", code, inJSON, err, out)
	}
	if diff := cmp.Diff(before, v.kernelState()); diff != "" {
		t.Errorf("a check changes the kernel:\n%s", diff)
	}
	t.Logf("%s", out)
}

// kernelState is what a look may change without a word: modules, and tables that the kernel makes
// for whoever asks.
func (v *VM) kernelState() string {
	v.t.Helper()
	return v.run("sh", "-c", "cut -d' ' -f1 /proc/modules | sort; "+
		"cat /proc/net/ip_tables_names /proc/net/ip6_tables_names 2>/dev/null; true")
}

// dnf stands for Red Hat's, which is not here: it writes down how it was called, and installs
// Debian's packages. What the real one does within our unit's sandbox is not shown by it.
const dnf = `#!/bin/sh
echo "dnf $*" >>/var/log/dnf.called
exec dpkg --install $(ls /var/local/repo/*.deb |
	grep -v -e syslog -e libestr -e libfastjson -e liblognorm) >/var/log/dnf.said 2>&1
`

// TestOtherSystems imitates other systems in a Debian, one difference after the other, each in a
// mount namespace of its own, before anything is installed: `bootstrap --check` says the right
// line, and changes nothing. Then the box is like a Red Hat 8 as far as files and programs go, and
// the agent is installed and works.
func TestOtherSystems(t *testing.T) {
	t.Parallel()
	const redHat = "NAME=\"Red Hat Enterprise Linux\"\nID=\"rhel\"\n" +
		"PRETTY_NAME=\"Red Hat Enterprise Linux 8.10 (Ootpa)\"\n"
	v := newVM(t, options{prepare: func(root string) {
		for name, text := range map[string]string{
			"usr/bin/dnf":         dnf,
			"usr/sbin/restorecon": "#!/bin/sh\necho \"restorecon $*\" >>/var/log/restorecon.called\n",
			"var/local/systemctl": "#!/bin/sh\n[ \"$*\" != --version ] || { echo \"systemd $(cat /etc/systemd.imitated)\"; exit; }\n" +
				"exec /usr/bin/systemctl \"$@\"\n",
			"var/local/rhel": redHat,
		} {
			if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		for _, name := range []string{"etc/default", "usr/bin/apt-get"} {
			if err := os.RemoveAll(filepath.Join(root, name)); err != nil {
				t.Fatal(err)
			}
		}
	}})
	v.boot()
	v.run("sh", "-c", "mkdir /root/a && cd /root/a && gsutil cp gs://"+bucket+"/"+archive+" . && tar -xzf *.tgz")
	const here = "/root/a/service-proxy-agent"
	files := func() map[string]string {
		all := v.written(t)
		for name := range all {
			if regexp.MustCompile(`^(/run/(systemd|log|udev|dbus|utmp)|/var/log/journal|/var/lib/systemd|/tmp/|/etc/resolv)`).MatchString(name) {
				delete(all, name)
			}
		}
		return all
	}
	before, kernel := files(), v.kernelState()
	mount := func(path, options string) string {
		return fmt.Sprintf("mount --bind %s %s; mount -o remount,bind,%s %s; ", path, path, options, path)
	}
	says := func(version string) string {
		return "cp -r /etc /run/etc; mount --bind /run/etc /etc; echo '" + version +
			"' >/etc/systemd.imitated; mkdir -p /run/sbin; cp /var/local/systemctl /run/sbin/; PATH=/run/sbin:$PATH; "
	}
	rhel := func(name string) string {
		return "cp /var/local/rhel /run/os; sed -i 's/8.10/" + name + "/' /run/os; mount --bind /run/os /etc/os-release; "
	}
	for _, tt := range []struct {
		name, change string
		code         int
		want         []string
	}{
		{"nothing", "", 0, []string{"Debian GNU/Linux 12 (bookworm)", "works    systemd       252",
			"iptables and ca-certificates missing, dnf installs"}},
		{"RHEL 8", says("239 (239-82.el8_10.5)") + rhel("8.10"), 0, []string{"Red Hat Enterprise Linux 8.10",
			"limited  systemd", "239 (239-82.el8_10.5)", "ProtectProc="}},
		{"RHEL 8.2", says("239 (239-31.el8_2.2)") + rhel("8.2"), 1, []string{"refused  systemd",
			"does not know append:", "update the package systemd to 239-32"}},
		{"RHEL 9", says("252 (252-46.el9_5.2)") + rhel("9.4") + "mount -t tmpfs tmpfs /sys/fs; " +
			"mkdir /sys/fs/selinux; echo 1 >/sys/fs/selinux/enforce; ", 0,
			[]string{"Red Hat Enterprise Linux 9.4", "works    systemd", "limited  SELinux       enforcing"}},
		{"SLES 15", says("254 (254.10+suse.84)") + "echo 'ID=sles\nPRETTY_NAME=\"SUSE Linux Enterprise " +
			"Server 15 SP6\"' >/run/os; mount --bind /run/os /etc/os-release; cp -r /usr/bin /run/bin; " +
			"mv /run/bin/dnf /run/bin/zypper; mount --bind /run/bin /usr/bin; ", 0,
			[]string{"SUSE Linux Enterprise Server 15 SP6", "zypper installs"}},
		{"Ubuntu 20.04", says("245 (245.4-4ubuntu3.24)") + "printf 'ID=ubuntu\\nPRETTY_NAME=\"Ubuntu " +
			"20.04.6 LTS\"\\n' >/run/os; mount --bind /run/os /etc/os-release; ", 0,
			[]string{"Ubuntu 20.04.6 LTS", "limited  systemd", "ProtectProc= ProcSubset="}},
		{"Ubuntu 24.04", says("255 (255.4-1ubuntu8.4)") + "printf 'ID=ubuntu\\nPRETTY_NAME=\"Ubuntu " +
			"24.04.1 LTS\"\\n' >/run/os; mount --bind /run/os /etc/os-release; ", 0,
			[]string{"Ubuntu 24.04.1 LTS", "works here\n"}},
		{"COS", mount("/usr", "ro") + mount("/var", "noexec") + mount("/tmp", "noexec") +
			"printf 'ID=cos\\nPRETTY_NAME=\"Container-Optimized OS from Google\"\\n' >/run/os; " +
			"mount --bind /run/os /etc/os-release; ", 1, []string{"Container-Optimized OS from Google", "refused  folders",
			"use an image of Debian, Ubuntu, Red Hat or SUSE", "limited  noexec"}},
		{"read-only /usr", mount("/usr", "ro"), 1, []string{"refused  folders",
			"/usr/local/bin, /usr/local/lib are on a read-only file system"}},
		{"noexec /usr/local", mount("/usr/local", "noexec"), 1, []string{"refused  noexec",
			"/usr/local/bin is mounted noexec"}},
		{"noexec /tmp", mount("/tmp", "noexec"), 0, []string{"limited  noexec", "startup-script.sh"}},
		{"no package manager", "mount --bind /dev/null /usr/bin/dnf; ", 1, []string{"refused  packages",
			"no package manager"}},
		{"no systemd", "mkdir /run/empty; mount --bind /run/empty /run/systemd; ", 1, []string{"refused  systemd", "does not run here"}},
	} {
		// What a case needs it writes into a /run of the namespace's own.
		script := "set -e; mkdir -p /run/own; mount -t tmpfs tmpfs /run/own; mkdir /run/own/systemd; " +
			"mount --rbind /run/systemd /run/own/systemd; mount --rbind /run/own /run; " +
			tt.change + here + "/amd64/service-proxy-agent bootstrap --check"
		out, code := v.asks("unshare", "--mount", "--propagation", "private", "sh", "-c", script)
		ok := code == tt.code
		for _, want := range tt.want {
			ok = ok && strings.Contains(out, want)
		}
		if !ok {
			t.Errorf("%s: exit code %d, want %d and %q:\n%s", tt.name, code, tt.code, tt.want, out)
		}
	}
	if diff := cmp.Diff(before, files()); diff != "" {
		t.Errorf("a check writes (-before +after):\n%s", diff)
	}
	if diff := cmp.Diff(kernel, v.kernelState()); diff != "" {
		t.Errorf("a check changes the kernel:\n%s", diff)
	}

	// As a Red Hat 8, but for the kernel and systemd itself.
	v.run("sh", "-c", `cp /var/local/rhel /etc/os-release.new; mv /etc/os-release.new /etc/os-release
echo '239 (239-82.el8_10.5)' >/etc/systemd.imitated
mkdir -p /usr/local/sbin; cp /var/local/systemctl /usr/local/sbin/systemctl`)
	v.install()
	v.waitFinished(90 * time.Second)
	v.eventually(30*time.Second, "the service answers through Envoy", v.checkVIP)
	const want = "dnf -q -y --setopt=install_weak_deps=False install iptables ca-certificates\n"
	if have := v.run("cat", "/var/log/dnf.called"); have != want {
		t.Errorf("dnf was called by %q, want %q", have, want)
	}
	limit := "this system: systemd 239 skips lines of the units' sandbox"
	v.eventually(30*time.Second, "the serial port tells the limit", func() error {
		if !strings.Contains(v.Serial(), limit) {
			return fmt.Errorf("it has\n%s", v.Serial())
		}
		return nil
	})
	v.bootstrapAgain()
	v.eventually(60*time.Second, "another look of bootstrap", func() error {
		if n := strings.Count(fmt.Sprint(v.state().Story), "finished: "); n != 2 {
			return fmt.Errorf("it has ended %d times", n)
		}
		return nil
	})
	if n := strings.Count(fmt.Sprint(v.state().Story), limit); n != 1 {
		t.Errorf("the limit is told %d times: %v", n, v.state().Story)
	}
	if !strings.Contains(v.Serial(), bootstrap.StepSystem) {
		t.Errorf("the serial port does not tell of %q", bootstrap.StepSystem)
	}
	out, code := v.asks("service-proxy-agent", "bootstrap", "--check")
	if code != 0 || !strings.Contains(out, "works here, with limits") {
		t.Errorf("exit code %d:\n%s", code, out)
	}
}
