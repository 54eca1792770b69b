package system

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/service-proxy-agent/service-proxy-agent/internal/terminal/terminaltest"
	"github.com/service-proxy-agent/service-proxy-agent/test/schema"
)

var update = flag.Bool("update", false, "write the golden files")

// imitated is a root folder in which files of a system stand, and what its programs would say.
type imitated struct {
	files map[string]string
	says  map[string]string // by program; "": it cannot be run
}

const groupFile = "root:x:0:\ntty:x:5:\ndialout:x:20:\n"

// base is what a machine has that is fine.
func base() imitated {
	return imitated{
		files: map[string]string{
			"etc/os-release": "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nID=debian\n",
			"etc/group":      groupFile, "run/systemd/system/x": "", "sys/fs/cgroup/cgroup.controllers": "",
			"proc/sys/kernel/osrelease": "6.1.0-27-amd64\n", "proc/sys/kernel/modules_disabled": "0\n",
			"proc/modules": "nf_nat 57344 1 nft_chain_nat, Live 0x0000000000000000\n",
			"lib/modules/6.1.0-27-amd64/modules.builtin": "kernel/net/netfilter/nf_tables.ko\n",
			"lib/modules/6.1.0-27-amd64/modules.dep": "kernel/net/netfilter/xt_owner.ko.xz:\n" +
				"kernel/net/netfilter/xt_REDIRECT.ko: kernel/net/netfilter/nf_nat.ko\n" +
				"kernel/net/netfilter/xt_addrtype.ko.zst:\nkernel/net/netfilter/xt_tcpudp.ko:\n" +
				"kernel/net/netfilter/nft_compat.ko:\nkernel/net/ipv4/netfilter/iptable_nat.ko:\n" +
				"kernel/net/ipv4/netfilter/ip_tables.ko:\n",
			"usr/sbin/iptables": "", "usr/sbin/iptables-restore": "", "usr/bin/apt-get": "",
			"etc/ssl/certs/ca-certificates.crt": "x",
		},
		says: map[string]string{"systemctl": "systemd 252 (252.39-1~deb12u1)\n+PAM +AUDIT\n",
			"iptables": "iptables v1.8.9 (nf_tables)\n"},
	}
}

// with is the base with other files, "-" for none, and other words of its programs.
func with(files, says map[string]string) imitated {
	i := base()
	maps.Copy(i.files, files)
	maps.Copy(i.says, says)
	return i
}

func (i imitated) look(t *testing.T) System {
	t.Helper()
	root := t.TempDir()
	for name, text := range i.files {
		if text == "-" {
			continue
		}
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	s := Look(t.Context(), Options{Root: root,
		Run: func(_ context.Context, name string, args ...string) (string, error) {
			if len(args) != 1 || args[0] != "--version" {
				t.Errorf("it runs %s %q", name, args)
			}
			if i.says[name] == "" {
				return "", errors.New("run " + name + ": executable file not found in $PATH")
			}
			return i.says[name], nil
		}})
	s.Arch = "amd64"
	return s
}

// rhel is Red Hat's, with dnf, and no Debian of the base.
func rhel(name, systemd, modules string, more map[string]string) imitated {
	files := map[string]string{
		"etc/os-release":  "NAME=\"Red Hat Enterprise Linux\"\nID=\"rhel\"\nPRETTY_NAME=\"" + name + "\"\n",
		"usr/bin/apt-get": "-", "usr/bin/dnf": "", "usr/bin/yum": "",
		"etc/ssl/certs/ca-certificates.crt": "-", "etc/pki/tls/certs/ca-bundle.crt": "x",
		"sys/fs/selinux/enforce": "1", "usr/sbin/restorecon": "",
		"proc/sys/kernel/osrelease": modules,
	}
	for _, list := range []string{"modules.dep", "modules.builtin"} {
		files["lib/modules/"+modules+"/"+list] = base().files["lib/modules/6.1.0-27-amd64/"+list]
	}
	maps.Copy(files, more)
	return with(files, map[string]string{"systemctl": systemd})
}

func systems() map[string]imitated {
	osRelease := func(id, name string) map[string]string {
		return map[string]string{"etc/os-release": "ID=" + id + "\nPRETTY_NAME=\"" + name + "\"\n"}
	}
	also := func(files map[string]string, more map[string]string) map[string]string {
		maps.Copy(files, more)
		return files
	}
	return map[string]imitated{
		"debian-12": base(),
		"ubuntu-24.04": with(osRelease("ubuntu", "Ubuntu 24.04.1 LTS"),
			map[string]string{"systemctl": "systemd 255 (255.4-1ubuntu8.4)\n"}),
		"ubuntu-20.04": with(osRelease("ubuntu", "Ubuntu 20.04.6 LTS"),
			map[string]string{"systemctl": "systemd 245 (245.4-4ubuntu3.24)\n",
				"iptables": "iptables v1.8.4 (legacy)\n"}),
		"ubuntu-18.04": with(osRelease("ubuntu", "Ubuntu 18.04.6 LTS"),
			map[string]string{"systemctl": "systemd 237\n", "iptables": "iptables v1.6.1\n"}),
		"rhel-9": rhel("Red Hat Enterprise Linux 9.4 (Plow)", "systemd 252 (252-46.el9_5.2)\n",
			"5.14.0-427.el9.x86_64", nil),
		"rhel-8.10": rhel("Red Hat Enterprise Linux 8.10 (Ootpa)", "systemd 239 (239-82.el8_10.5)\n",
			"4.18.0-553.el8_10.x86_64", nil),
		"rhel-8.2": rhel("Red Hat Enterprise Linux 8.2 (Ootpa)", "systemd 239 (239-31.el8_2.2)\n",
			"4.18.0-193.el8.x86_64", nil),
		"rhel-7": rhel("Red Hat Enterprise Linux Server 7.9 (Maipo)", "systemd 219\n",
			"3.10.0-1160.el7.x86_64", map[string]string{"usr/bin/dnf": "-"}),
		"sles-15": with(also(osRelease("sles", "SUSE Linux Enterprise Server 15 SP6"),
			map[string]string{"usr/bin/apt-get": "-", "usr/bin/zypper": "", "usr/sbin/iptables": "-",
				"usr/sbin/iptables-restore": "-"}),
			map[string]string{"systemctl": "systemd 254 (254.10+suse.84.ge8d77af424)\n"}),
		"no-systemd": with(map[string]string{"run/systemd/system/x": "-"},
			map[string]string{"systemctl": ""}),
	}
}

// TestImitated is what is said on each system that is imitated by its files and the words of its
// programs. None of them but Debian was run.
func TestImitated(t *testing.T) {
	for name, i := range systems() {
		t.Run(name, func(t *testing.T) {
			s := i.look(t)
			for j := range s.Folders { // the test machine's own
				s.Folders[j].ReadOnly, s.Folders[j].NoExec = false, false
			}
			r := New(s)
			var have bytes.Buffer
			if err := r.Text(&have, false, 100); err != nil {
				t.Fatal(err)
			}
			terminaltest.Fits(t, r.Text)
			if _, lacks, ok := Refusal(s, r.Rows); ok {
				have.WriteString("\nrefused: " + lacks + "\n")
				if strings.Contains(lacks, "\n") || r.Exit != 1 {
					t.Errorf("exit %d, %q", r.Exit, lacks)
				}
			}
			golden(t, filepath.Join("testdata", name+".txt"), have.Bytes())
			body, err := r.JSON()
			if err != nil {
				t.Fatal(err)
			}
			schema.Valid(t, "check", body)
		})
	}
}

func golden(t *testing.T, file string, have []byte) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, have, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(have)); diff != "" {
		t.Errorf("%s (-want +have):\n%s", file, diff)
	}
}

// TestDifferences changes one thing of a machine that is fine, and one row says so.
func TestDifferences(t *testing.T) {
	fine := func() System {
		s := base().look(t)
		for i := range s.Folders {
			s.Folders[i].ReadOnly, s.Folders[i].NoExec = false, false
		}
		return s
	}
	set := func(change func(*Folder), paths ...string) func(*System) {
		return func(s *System) {
			for i := range s.Folders {
				for _, path := range paths {
					if s.Folders[i].Path == path {
						change(&s.Folders[i])
					}
				}
			}
		}
	}
	ro, noexec := func(f *Folder) { f.ReadOnly = true }, func(f *Folder) { f.NoExec = true }
	for _, tt := range []struct {
		name    string
		change  func(*System)
		row     string
		verdict Verdict
		lacks   string
	}{
		{"nothing", func(*System) {}, "", Works, ""},
		{"architecture", func(s *System) { s.Arch = "s390x" }, "architecture", Refused, "no build for s390x"},
		{"systemd 246", func(s *System) { s.Systemd.Version = 246 }, "systemd", Limited,
			"ProtectProc= ProcSubset="},
		{"systemd 241", func(s *System) { s.Systemd.Version = 241 }, "systemd", Limited,
			"ProtectHostname= RestrictSUIDSGID="},
		{"systemd 239", func(s *System) { s.Systemd.Version = 239 }, "systemd", Refused, "append:"},
		{"Red Hat's 239-32", func(s *System) { s.Systemd = Systemd{true, 239, "239-32.el8"} }, "systemd",
			Limited, "ProtectKernelLogs= ProtectHostname="},
		{"Red Hat's 239-31", func(s *System) { s.Systemd = Systemd{true, 239, "239-31.el8_2.2"} },
			"systemd", Refused, "append:"},
		{"no word of systemd", func(s *System) { s.Systemd.Version = 0 }, "systemd", Unknown, ""},
		{"read-only /usr", set(ro, "/usr/local/bin", "/usr/local/lib"), "folders", Refused,
			"/usr/local/bin, /usr/local/lib are on a read-only file system"},
		{"read-only /usr, all installed", func(s *System) {
			set(ro, "/usr/local/bin", "/usr/local/lib")(s)
			s.Installed = true
		}, "folders", Limited, "nothing is upgraded"},
		{"read-only /etc, all installed", func(s *System) {
			set(ro, "/etc")(s)
			s.Installed = true
		}, "folders", Refused, "/etc is on a read-only file system"},
		{"read-only /tmp", set(ro, "/tmp"), "", Works, ""},
		{"noexec /run", set(noexec, "/run"), "", Works, ""},
		{"noexec /var/lib", set(noexec, "/var/lib"), "", Works, ""},
		{"noexec both", set(noexec, "/var/lib", "/run"), "noexec", Limited, "not tried again"},
		{"noexec /tmp", set(noexec, "/tmp"), "noexec", Limited, "gcloud's recipe"},
		{"noexec /tmp, all installed", func(s *System) {
			set(noexec, "/tmp")(s)
			s.Installed = true
		}, "", Works, ""},
		{"noexec /usr/local", set(noexec, "/usr/local/bin", "/usr/local/lib"), "noexec", Refused,
			"/usr/local/bin is mounted noexec"},
		{"SELinux permissive", func(s *System) { s.SELinux.Mode = "permissive" }, "", Works, ""},
		{"SELinux enforcing", func(s *System) { s.SELinux = SELinux{"enforcing", true} }, "SELinux",
			Limited, "never run"},
		{"no restorecon", func(s *System) { s.SELinux.Mode = "enforcing" }, "SELinux", Limited,
			"no restorecon"},
		{"cgroups v1", func(s *System) { s.Cgroups = "v1" }, "", Works, ""},
		{"no cgroups", func(s *System) { s.Cgroups = "" }, "cgroups", Unknown, ""},
		{"no group", func(s *System) { s.NoGroups = []string{"dialout"} }, "groups", Refused,
			"no group dialout"},
		{"no iptables", func(s *System) { s.Packages.Missing = []string{"iptables"} }, "", Works, ""},
		{"nor a package manager", func(s *System) { s.Packages = Packages{"", []string{"iptables"}} },
			"packages", Refused, "iptables missing, and no package manager"},
		{"old iptables", func(s *System) { s.IPTables.Version = "1.6.1" }, "iptables", Refused,
			"iptables 1.6.1"},
		{"iptables 1.10.0", func(s *System) { s.IPTables.Version = "1.10.0" }, "", Works, ""},
		{"iptables that fails", func(s *System) { s.IPTables = IPTables{Err: "exit status 1"} },
			"iptables", Unknown, ""},
		{"no owner match", func(s *System) { s.Modules.Missing = []string{"xt_owner"} }, "kernel", Refused,
			"the kernel has no xt_owner"},
		{"no addrtype", func(s *System) { s.Modules.Missing = []string{"xt_addrtype"} }, "kernel", Limited,
			"serving ports are not intercepted"},
		{"modules_disabled", func(s *System) { s.Modules.Disabled = true }, "kernel", Refused,
			"kernel.modules_disabled is set, and these are not loaded: xt_owner"},
		{"modules_disabled, all loaded", func(s *System) {
			s.Modules = Modules{Listed: true, Disabled: true}
		}, "", Works, ""},
		{"an old glibc", func(s *System) { s.Libc = Libc{"2.28", "2.30", "/usr/local/bin/envoy"} }, "glibc",
			Limited, "/usr/local/bin/envoy needs glibc 2.30, and this is 2.28"},
		{"a glibc that will do", func(s *System) { s.Libc = Libc{"2.100", "2.30", "x"} }, "", Works, ""},
		{"no glibc", func(s *System) { s.Libc = Libc{"", "2.30", "x"} }, "glibc", Unknown, ""},
	} {
		s := fine()
		tt.change(&s)
		r := New(s)
		want := map[Verdict]Verdict{Works: Works, Unknown: Works, Limited: Limited, Refused: Refused}
		if r.Verdict != want[tt.verdict] || (r.Exit == 1) != (tt.verdict == Refused) {
			t.Errorf("%s: %s, exit %d", tt.name, r.Verdict, r.Exit)
		}
		for _, row := range r.Rows {
			verdict, lacks := Works, ""
			if row.What == tt.row {
				verdict, lacks = tt.verdict, tt.lacks
			}
			if row.Verdict != verdict || !strings.Contains(row.Lacks, lacks) ||
				(row.Lacks != "") != (row.WayOut != "") || (row.Lacks != "") != (verdict == Limited ||
				verdict == Refused) {
				t.Errorf("%s: %+v, want %s %q", tt.name, row, verdict, lacks)
			}
		}
	}
}

// The first of several refusals is the line, and says that there are more.
func TestRefusal(t *testing.T) {
	s := base().look(t)
	s.Arch, s.NoGroups, s.Systemd.Running = "s390x", []string{"tty"}, false
	row, lacks, ok := Refusal(s, Judge(s))
	if !ok || row.What != "architecture" || lacks != "Debian GNU/Linux 12 (bookworm): there is no build "+
		"for s390x (and 2 more, which service-proxy-agent bootstrap --check tells)" {
		t.Errorf("%v %q", row, lacks)
	}
	_, lacks, ok = Refusal(System{}, Judge(System{}))
	if !ok || !strings.HasPrefix(lacks, "this system: ") {
		t.Error(lacks)
	}
}

// What others wrote into os-release moves no terminal.
func TestForeignNames(t *testing.T) {
	s := with(map[string]string{"etc/os-release": "PRETTY_NAME='\x1b[2Ja" + strings.Repeat("b", 500) + "'"},
		nil).look(t)
	if strings.Contains(s.Name, "\x1b") || len(s.Name) > 110 {
		t.Errorf("%q", s.Name)
	}
}

// TestGlibc asks this machine's own files, and its programs for comparison.
func TestGlibc(t *testing.T) {
	out, err := exec.Command("getconf", "GNU_LIBC_VERSION").Output()
	if err != nil {
		t.Fatal(err)
	}
	want := strings.TrimPrefix(strings.TrimSpace(string(out)), "glibc ")
	shell, err := exec.LookPath("sh")
	if err != nil {
		t.Fatal(err)
	}
	l := Look(t.Context(), Options{Envoys: []string{"/none", shell},
		Run: func(context.Context, string, ...string) (string, error) { return "", nil }}).Libc
	if l.Version != want || l.Envoy != shell || l.Needed == "" || less(l.Version, l.Needed) {
		t.Errorf("%+v, want %s", l, want)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s needs %q", self, glibc(self, true, false)) // static or not, as it was built
	if have := glibc("/etc/passwd", true, false); have != "" {
		t.Errorf("no program needs %q", have)
	}
}

// Groups may be the image's own, on an ostree.
func TestGroups(t *testing.T) {
	for _, tt := range []struct {
		etc, usr string
		want     []string
	}{
		{groupFile, "-", nil}, {"tty:x:5:\n", "dialout:x:20:\n", nil}, {"-", "-", nil},
		{"xtty:x:5:\ndialout:x:20:\n", "-", []string{"tty"}},
	} {
		s := with(map[string]string{"etc/group": tt.etc, "usr/lib/group": tt.usr}, nil).look(t)
		if diff := cmp.Diff(tt.want, s.NoGroups); diff != "" {
			t.Errorf("%+v: %s", tt, diff)
		}
	}
}

func TestCgroups(t *testing.T) {
	for want, files := range map[string][]string{
		"v2": {"cgroup.controllers"}, "hybrid": {"systemd/cgroup.procs", "unified/cgroup.procs"},
		"v1": {"systemd/cgroup.procs"}, "": {"x"},
	} {
		i := with(map[string]string{"sys/fs/cgroup/cgroup.controllers": "-"}, nil)
		for _, name := range files {
			i.files["sys/fs/cgroup/"+name] = ""
		}
		if have := i.look(t).Cgroups; have != want {
			t.Errorf("%v is %q, want %q", files, have, want)
		}
	}
}

// TestSchema: what is documented is what is written.
func TestSchema(t *testing.T) { schema.Properties(t, "check", Report{}) }
