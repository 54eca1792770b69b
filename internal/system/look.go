package system

import (
	"bufio"
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/internal/authorities"
)

// System is what was seen of a machine. What could not be seen is "", 0 or nil.
type System struct {
	ID     string // of os-release: debian, rhel, sles, cos…
	Name   string // PRETTY_NAME of os-release
	Kernel string // its release, as uname -r says it
	Arch   string // as Go names it
	// Installed: the agent, an Envoy and the units are in place, so that a look at this VM may find
	// nothing to write.
	Installed bool

	Systemd  Systemd
	Folders  []Folder
	SELinux  SELinux
	Cgroups  string   // v2, v1, or hybrid
	NoGroups []string // that the units name and the VM does not have
	Packages Packages
	IPTables IPTables
	Modules  Modules
	Libc     Libc
}

// Systemd is the init system.
type Systemd struct {
	Running bool
	Version int
	Package string // the distribution's version of it, as systemctl shows it in parentheses
}

// Folder is where a path, or what there is of it, is mounted.
type Folder struct {
	Path             string
	ReadOnly, NoExec bool
}

// SELinux is the state of the kernel's SELinux.
type SELinux struct {
	Mode       string // enforcing, permissive; "": not in this kernel, or switched off
	Restorecon bool   // the program is there
}

// Packages are what bootstrap installs where it is missing.
type Packages struct {
	Manager string   // the package manager; "": none that bootstrap knows
	Missing []string // names of packages
}

// IPTables is what `iptables` is.
type IPTables struct {
	Version string // 1.8.9; "": not there, or it does not say
	Backend string // nft or legacy
	Err     string // what it says instead of its version
}

// Modules are the parts of the kernel that the rules need.
type Modules struct {
	Listed   bool // this kernel's modules are listed below /lib/modules
	Disabled bool // kernel.modules_disabled: nothing is loaded any more
	Missing  []string
	// Unloaded are there to be loaded when they are needed.
	Unloaded []string
}

// Libc is the VM's C library against what an Envoy asks of it.
type Libc struct {
	Version string // of glibc
	Needed  string // by the Envoy at Envoy
	Envoy   string // a path; "": there is no Envoy yet
}

// Options are how to look.
type Options struct {
	// Root is what all paths are beneath; "" for /.
	Root string
	// Run has a program of PATH say something, and returns what it printed.
	Run func(ctx context.Context, name string, args ...string) (string, error)
	// Envoys are where an Envoy may be, the first that is there counts; paths beneath Root.
	Envoys []string
	// Programs are what must be there for Installed; paths beneath Root.
	Programs []string
}

// The folders that are looked at: what bootstrap writes into, and where programs are run from.
const (
	binDir = "/usr/local/bin" // of layout.Envoy
	libDir = "/usr/local/lib" // of layout.KeptDir
	tmpDir = "/tmp"
)

var folders = []string{binDir, libDir, "/etc", "/var/lib", "/var/log", "/run", tmpDir}

// Managers are the package managers that bootstrap knows, the first that is there is used.
var Managers = []string{"apt-get", "dnf", "yum", "zypper"}

// sbin is where iptables is; PATH may lack it in a startup script.
var sbin = []string{"/usr/sbin", "/sbin", "/usr/bin", "/bin", "/usr/local/sbin"}

// HasProgram says whether a program is in one of the folders where a distribution has it.
func HasProgram(root, name string) bool {
	return slices.ContainsFunc(sbin, func(dir string) bool {
		info, err := os.Stat(filepath.Join(root, dir, name))
		return err == nil && info.Mode()&0o111 != 0
	})
}

// MissingPackages are those that the image lacks. Their names are the same everywhere.
func MissingPackages(root string) []string {
	var packages []string
	if !HasProgram(root, "iptables") || !HasProgram(root, "iptables-restore") {
		packages = append(packages, "iptables")
	}
	if authorities.File(root) == "" {
		packages = append(packages, "ca-certificates")
	}
	return packages
}

// groups are those that the units name beside the agent's own.
var groups = []string{"tty", "dialout"}

// Look sees how the machine is. It changes nothing.
func Look(ctx context.Context, o Options) System {
	s := System{Arch: runtime.GOARCH}
	at := func(name string) string { return filepath.Join(o.Root, name) }
	s.ID, s.Name = osRelease(at)
	s.Kernel = line(at("/proc/sys/kernel/osrelease"))
	s.Installed = len(o.Programs) > 0 && !slices.ContainsFunc(o.Programs, func(name string) bool {
		_, err := os.Stat(at(name))
		return err != nil
	})
	s.Systemd = lookSystemd(ctx, at, o)
	for _, name := range folders {
		s.Folders = append(s.Folders, mounted(o.Root, name))
	}
	s.SELinux = LookSELinux(o.Root)
	s.Cgroups = cgroups(at)
	s.NoGroups = missingGroups(at)
	s.Packages.Missing = MissingPackages(o.Root)
	for _, name := range Managers {
		if HasProgram(o.Root, name) {
			s.Packages.Manager = name
			break
		}
	}
	if HasProgram(o.Root, "iptables") {
		s.IPTables = lookIPTables(ctx, o)
	}
	s.Modules = lookModules(at, s.Kernel, needed(s.IPTables.Backend))
	s.Libc = lookLibc(at, o)
	return s
}

// line is the first line of a small file, "" where it cannot be read.
func line(name string) string {
	text, err := os.ReadFile(name)
	if err != nil {
		return ""
	}
	first, _, _ := strings.Cut(string(text), "\n")
	return printable(strings.TrimSpace(first))
}

// printable moves no terminal, and is no longer than a name should be.
func printable(text string) string {
	text = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return -1
		}
		return r
	}, strings.ToValidUTF8(text, "?"))
	if all := []rune(text); len(all) > 100 {
		text = string(all[:100]) + "…"
	}
	return text
}

// osRelease is os-release(5): the administrator's, else the distribution's.
func osRelease(at func(string) string) (id, name string) {
	for _, file := range []string{"/etc/os-release", "/usr/lib/os-release"} {
		text, err := os.ReadFile(at(file))
		if err != nil {
			continue
		}
		for l := range strings.Lines(string(text)) {
			key, value, _ := strings.Cut(strings.TrimSpace(l), "=")
			value = strings.Trim(value, `"'`)
			switch key {
			case "ID":
				id = printable(value)
			case "PRETTY_NAME":
				name = printable(value)
			}
		}
		return id, name
	}
	return "", ""
}

var systemdVersion = regexp.MustCompile(`^systemd (\d+)(?: \(([^)]*)\))?`)

func lookSystemd(ctx context.Context, at func(string) string, o Options) (s Systemd) {
	_, err := os.Stat(at("/run/systemd/system")) // sd_booted(3)
	s.Running = err == nil
	out, err := o.Run(ctx, "systemctl", "--version")
	if m := systemdVersion.FindStringSubmatch(out); err == nil && m != nil {
		s.Version, _ = strconv.Atoi(m[1])
		s.Package = printable(m[2])
	}
	return s
}

// mounted is how the path, or the deepest folder above it that is there, is mounted.
func mounted(root, name string) Folder {
	f := Folder{Path: name}
	for dir := name; ; dir = filepath.Dir(dir) {
		var fs unix.Statfs_t
		err := unix.Statfs(filepath.Join(root, dir), &fs)
		if errors.Is(err, unix.ENOENT) && dir != "/" {
			continue
		}
		if err == nil {
			f.ReadOnly, f.NoExec = fs.Flags&unix.ST_RDONLY != 0, fs.Flags&unix.ST_NOEXEC != 0
		}
		return f
	}
}

// LookSELinux sees the state of SELinux, by its file system.
func LookSELinux(root string) SELinux {
	mode := map[string]string{"1": "enforcing", "0": "permissive"}[line(
		filepath.Join(root, "/sys/fs/selinux/enforce"))]
	return SELinux{mode, HasProgram(root, "restorecon")}
}

// cgroups tells the setups apart as cgroups(7) and systemd's documents describe them.
func cgroups(at func(string) string) string {
	is := func(name string) bool {
		_, err := os.Stat(at("/sys/fs/cgroup/" + name))
		return err == nil
	}
	switch {
	case is("cgroup.controllers"):
		return "v2"
	case is("unified/cgroup.procs"):
		return "hybrid"
	case is("systemd/cgroup.procs"):
		return "v1"
	}
	return ""
}

// missingGroups are those that neither the administrator's nor the image's file has. Where there is
// no file, nothing is known.
func missingGroups(at func(string) string) (missing []string) {
	var all []byte
	for _, file := range []string{"/etc/group", "/usr/lib/group"} { // the other is ostree's
		text, _ := os.ReadFile(at(file))
		all = append(all, text...)
	}
	if len(all) == 0 {
		return nil
	}
	for _, group := range groups {
		if !bytes.HasPrefix(all, []byte(group+":")) && !bytes.Contains(all, []byte("\n"+group+":")) {
			missing = append(missing, group)
		}
	}
	return missing
}

var iptablesVersion = regexp.MustCompile(`v(\d+\.\d+\.\d+)(?: \((nf_tables|legacy)\))?`)

func lookIPTables(ctx context.Context, o Options) (i IPTables) {
	out, err := o.Run(ctx, "iptables", "--version")
	m := iptablesVersion.FindStringSubmatch(out)
	switch {
	case err != nil:
		i.Err = printable(err.Error())
	case m == nil:
		i.Err = "it does not say its version"
	default:
		i.Version, i.Backend = m[1], "legacy" // before 1.8 there was only one, and it did not say
		if m[2] == "nf_tables" {
			i.Backend = "nft"
		}
	}
	return i
}

// needed are the kernel's modules without which the rules cannot be. What a kernel names otherwise
// (nft's chain type of nat has had three names) is not among them.
func needed(backend string) []string {
	all := []string{"nf_nat", "xt_owner", "xt_REDIRECT", "xt_addrtype", "xt_tcpudp"}
	switch backend {
	case "nft":
		all = append(all, "nf_tables", "nft_compat")
	case "legacy":
		all = append(all, "ip_tables", "iptable_nat")
	}
	return all
}

// lookModules finds the modules in what the kernel has loaded and in what depmod(8) has listed.
// What is built in is in a list, too.
func lookModules(at func(string) string, kernel string, need []string) (m Modules) {
	m.Disabled = line(at("/proc/sys/kernel/modules_disabled")) == "1"
	here, loadable := map[string]bool{}, map[string]bool{}
	names(at("/proc/modules"), " ", here)
	if kernel != "" && !strings.Contains(kernel, "/") {
		dir := at("/lib/modules/" + kernel)
		builtin := names(filepath.Join(dir, "modules.builtin"), "\n", here)
		m.Listed = names(filepath.Join(dir, "modules.dep"), ":", loadable) && builtin
	}
	for _, name := range need {
		switch {
		case here[name]:
		case loadable[name]:
			m.Unloaded = append(m.Unloaded, name)
		case m.Listed:
			m.Missing = append(m.Missing, name)
		}
	}
	return m
}

// names adds the modules of a list to all: each line begins with a module's name or path, and that
// ends at the separator.
func names(file, separator string, all map[string]bool) bool {
	f, err := os.Open(file)
	if err != nil {
		return false
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		name, _, _ := strings.Cut(lines.Text(), separator)
		name, _, _ = strings.Cut(filepath.Base(name), ".ko")
		all[strings.ReplaceAll(name, "-", "_")] = true
	}
	return true
}

// lookLibc compares the versions of symbols that an Envoy asks for with those that glibc has.
func lookLibc(at func(string) string, o Options) (l Libc) {
	for _, pattern := range []string{"/lib64/libc.so.6", "/lib/*-linux-gnu/libc.so.6",
		"/usr/lib64/libc.so.6", "/usr/lib/*-linux-gnu/libc.so.6", "/lib/libc.so.6"} {
		found, _ := filepath.Glob(at(pattern)) // no pattern of ours is malformed
		for _, name := range found {
			l.Version = glibc(name, false, o.Root == "")
			if l.Version != "" {
				break
			}
		}
		if l.Version != "" {
			break
		}
	}
	for _, name := range o.Envoys {
		if _, err := os.Stat(at(name)); err == nil {
			l.Envoy, l.Needed = name, NeededLibc(at(name))
			break
		}
	}
	return l
}

// NeededLibc is the newest version of glibc's symbols that an ELF file needs, whatever machine it
// is for; "" where it needs none, or is no such file.
func NeededLibc(name string) string { return glibc(name, true, false) }

// glibc is the newest version of glibc's symbols that an ELF file needs, or else defines. own: it
// must be of this machine's kind.
func glibc(name string, needs, own bool) string {
	f, err := elf.Open(name)
	if err != nil {
		return ""
	}
	defer f.Close()
	machine := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}[runtime.GOARCH]
	if own && f.Machine != machine {
		return ""
	}
	var all []string
	if needs {
		libraries, err := f.DynamicVersionNeeds()
		if err != nil {
			return ""
		}
		for _, library := range libraries {
			for _, need := range library.Needs {
				all = append(all, need.Dep)
			}
		}
	} else {
		versions, err := f.DynamicVersions()
		if err != nil {
			return ""
		}
		for _, version := range versions {
			all = append(all, version.Name)
		}
	}
	newest := ""
	for _, version := range all {
		// GLIBC_PRIVATE is no version.
		if v, ok := strings.CutPrefix(version, "GLIBC_"); ok && v[0] >= '0' && v[0] <= '9' &&
			less(newest, v) {
			newest = v
		}
	}
	return newest
}

// less compares versions of numbers with dots between them; "" is less than all.
func less(a, b string) bool { return slices.Compare(numbers(a), numbers(b)) < 0 }

func numbers(version string) (all []int) {
	for word := range strings.SplitSeq(version, ".") {
		n, err := strconv.Atoi(word)
		if err != nil {
			break
		}
		all = append(all, n)
	}
	return all
}
