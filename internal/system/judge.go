package system

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Verdict is what a row comes to.
type Verdict string

// The verdicts, from good to bad.
const (
	Works   Verdict = "works"
	Unknown Verdict = "unknown" // cannot be told beforehand
	Limited Verdict = "limited" // works, but for what the row says
	Refused Verdict = "refused" // does not work
)

var order = []Verdict{Works, Unknown, Limited, Refused}

// Row is one property of a machine.
type Row struct {
	What    string  `json:"what"`
	Seen    string  `json:"seen"`
	Needed  string  `json:"needed"`
	Verdict Verdict `json:"verdict"`
	// Lacks says what is amiss, WayOut what to do; "" where it works.
	Lacks  string `json:"lacks,omitempty"`
	WayOut string `json:"way_out,omitempty"`

	// Passes: somebody may mend it while the machine runs, so that trying again makes sense.
	Passes bool `json:"-"`
}

// Judge says of each property whether the agent works with it. It is pure.
func Judge(s System) []Row {
	rows := []Row{
		{What: "system", Seen: s.Title(), Needed: "Linux", Verdict: Works},
		s.architecture(), s.systemd(), s.writable(), s.executable(), s.selinux(), s.cgroups(),
		s.groups(), s.packages(), s.iptables(), s.modules(), s.libc(),
	}
	return rows
}

// Title names the machine's system.
func (s System) Title() string {
	name := s.Name
	if name == "" {
		name = "a system without os-release"
	}
	if s.Kernel != "" {
		name += ", kernel " + s.Kernel
	}
	return name
}

// Refusal is the one line for a machine on which the agent cannot be: the system and what it
// lacks, and the way out. It is of the first refused row; ok is false without one.
func Refusal(s System, rows []Row) (row Row, lacks string, ok bool) {
	n := 0
	for _, r := range slices.Backward(rows) {
		if r.Verdict == Refused {
			row, ok = r, true
			n++
		}
	}
	if !ok {
		return Row{}, "", false
	}
	name := s.Name
	if name == "" {
		name = "this system"
	}
	lacks = name + ": " + row.Lacks
	if n > 1 {
		lacks += fmt.Sprintf(" (and %d more, which service-proxy-agent bootstrap --check tells)", n-1)
	}
	return row, lacks, true
}

func (s System) architecture() Row {
	r := Row{What: "architecture", Seen: s.Arch, Needed: "amd64 or arm64", Verdict: Works}
	if s.Arch != "amd64" && s.Arch != "arm64" {
		r.refuse("there is no build for "+s.Arch, "use a machine type of x86-64 or Arm64")
	}
	return r
}

func (r *Row) refuse(lacks, wayOut string) { r.Verdict, r.Lacks, r.WayOut = Refused, lacks, wayOut }
func (r *Row) limit(lacks, wayOut string)  { r.Verdict, r.Lacks, r.WayOut = Limited, lacks, wayOut }

// Versions of systemd: append: and Type=exec came with 240, and Red Hat has both in its 239 from
// release 32 on (systemd-rhel8's v239-32).
const (
	systemdAppend   = 240
	systemdRedHat   = 239
	redHatAppend    = 32
	systemdComplete = 247 // ProtectProc= and ProcSubset=, the youngest lines of the units
)

// sandbox are the lines of the units' sandbox that a systemd skips, by the version that brought
// them. Red Hat's 239 has RestrictSUIDSGID=, too.
var sandbox = []struct {
	version int
	line    string
}{
	{247, "ProtectProc="}, {247, "ProcSubset="}, {245, "ProtectClock="}, {244, "ProtectKernelLogs="},
	{242, "ProtectHostname="}, {242, "RestrictSUIDSGID="},
}

var redHatRelease = regexp.MustCompile(`^239-(\d+)\.el8`)

func (s System) systemd() Row {
	r := Row{What: "systemd", Needed: "240 or later, or Red Hat's 239-32", Verdict: Works,
		Seen: strconv.Itoa(s.Systemd.Version)}
	if s.Systemd.Package != "" {
		r.Seen += " (" + s.Systemd.Package + ")"
	}
	redHat := redHatRelease.FindStringSubmatch(s.Systemd.Package)
	backported := false
	if redHat != nil && s.Systemd.Version == systemdRedHat {
		release, err := strconv.Atoi(redHat[1])
		backported = err == nil && release >= redHatAppend
	}
	switch v := s.Systemd.Version; {
	case !s.Systemd.Running:
		r.Seen = "not running"
		r.refuse("systemd does not run here (there is no /run/systemd/system)",
			"use an image that boots with systemd; beside an Envoy of your own, "+
				"`service-proxy-agent run` needs none")
	case v == 0:
		r.Seen, r.Verdict = "it does not say its version", Unknown
	case v < systemdAppend && !backported:
		way := "use an image with systemd 240 or later"
		if redHat != nil {
			way = "update the package systemd to 239-32 or later"
		}
		r.refuse(fmt.Sprintf("systemd %d does not know append:, by which Envoy's unit has its log", v),
			way)
	case v < systemdComplete:
		var skipped []string
		for _, l := range sandbox {
			if v < l.version && (!backported || l.line != "RestrictSUIDSGID=") {
				skipped = append(skipped, l.line)
			}
		}
		r.limit(fmt.Sprintf("systemd %d skips lines of the units' sandbox: %s", v,
			strings.Join(skipped, " ")), "all else works; systemd 247 has them")
	}
	return r
}

// writable is where bootstrap must be able to write. An image that brings all of it may do
// without /usr/local.
func (s System) writable() Row {
	r := Row{What: "folders", Needed: "writable", Verdict: Works, Seen: "writable"}
	var fixed []string
	usr := true // all of them are below /usr/local
	for _, f := range s.Folders {
		if f.ReadOnly && f.Path != tmpDir {
			fixed = append(fixed, f.Path)
			usr = usr && (f.Path == binDir || f.Path == libDir)
		}
	}
	if len(fixed) == 0 {
		return r
	}
	r.Seen, r.Passes = "read-only: "+strings.Join(fixed, " "), s.ID != "cos"
	are := strings.Join(fixed, ", ")
	if len(fixed) == 1 {
		are += " is on a read-only file system"
	} else {
		are += " are on a read-only file system"
	}
	switch {
	case s.ID == "cos":
		r.refuse(are+", so that nothing can be installed",
			"use an image of Debian, Ubuntu, Red Hat or SUSE")
	case usr && s.Installed:
		r.limit(are+": what is installed stays as it is, and nothing is upgraded",
			"make it writable for an upgrade")
	default:
		r.refuse(are, "make that folder writable, or use an image where it is")
	}
	return r
}

// executable is where programs are run from.
func (s System) executable() Row {
	r := Row{What: "noexec", Needed: "programs run in " + binDir, Verdict: Works, Seen: "nowhere"}
	no := map[string]bool{}
	var where []string
	for _, f := range s.Folders {
		if f.NoExec {
			no[f.Path] = true
			where = append(where, f.Path)
		}
	}
	if len(where) > 0 {
		r.Seen = strings.Join(where, " ")
	}
	switch {
	case no[binDir]:
		r.Passes = true
		r.refuse(binDir+" is mounted noexec, so that no program runs there",
			"mount it without noexec, or use an image where it is")
	case no[tmpDir] && !s.Installed:
		r.limit("/tmp is mounted noexec, so that gcloud's recipe, which unpacks there, cannot run",
			"install by deploy/examples/startup-script.sh")
	case no["/var/lib"] && no["/run"] && !s.Installed:
		r.limit("/var/lib and /run are mounted noexec, so that an installation which fails is not tried "+
			"again by itself", "look at its exit code")
	}
	return r
}

func (s System) selinux() Row {
	r := Row{What: "SELinux", Seen: s.SELinux.Mode, Needed: "any", Verdict: Works}
	switch {
	case s.SELinux.Mode == "":
		r.Seen = "off"
	case s.SELinux.Mode != "enforcing":
	case !s.SELinux.Restorecon:
		r.limit("SELinux is enforcing and there is no restorecon, so that what is installed may have "+
			"wrong labels", "install policycoreutils")
	default:
		r.limit("SELinux is enforcing, under which the agent was never run; its files get their labels "+
			"by restorecon", "if a unit does not start, see `ausearch -m avc`")
	}
	return r
}

func (s System) cgroups() Row {
	r := Row{What: "cgroups", Seen: s.Cgroups, Needed: "any", Verdict: Works}
	if s.Cgroups == "" {
		r.Seen, r.Verdict = "not seen", Unknown
	}
	return r
}

func (s System) groups() Row {
	r := Row{What: "groups", Seen: "all there", Needed: strings.Join(groups, " "), Verdict: Works}
	if len(s.NoGroups) > 0 {
		names := strings.Join(s.NoGroups, " ")
		r.Seen, r.Passes = "missing: "+names, true
		r.refuse("there is no group "+names+", by which the agent's unit writes to the serial port",
			"make it: groupadd --system "+s.NoGroups[0])
	}
	return r
}

func (s System) packages() Row {
	r := Row{What: "packages", Seen: "all there", Verdict: Works,
		Needed: "iptables and ca-certificates, or apt-get, dnf, yum or zypper"}
	if len(s.Packages.Missing) == 0 {
		return r
	}
	names := strings.Join(s.Packages.Missing, " and ")
	if s.Packages.Manager != "" {
		r.Seen = names + " missing, " + s.Packages.Manager + " installs"
		return r
	}
	r.Seen, r.Passes = names+" missing, no package manager", true
	r.refuse(names+" missing, and no package manager to install it by (apt-get, dnf, yum, zypper)",
		"use an image with "+names)
	return r
}

// iptablesOldest is the first whose iptables-restore waits for the lock (-w).
const iptablesOldest = "1.6.2"

func (s System) iptables() Row {
	r := Row{What: "iptables", Needed: iptablesOldest + " or later", Verdict: Works,
		Seen: strings.TrimSpace(s.IPTables.Version + " " + s.IPTables.Backend)}
	switch {
	case s.IPTables.Err != "":
		r.Seen, r.Verdict = s.IPTables.Err, Unknown
	case s.IPTables.Version == "":
		r.Seen = "not there yet"
	case less(s.IPTables.Version, iptablesOldest):
		r.Passes = true
		r.refuse("iptables "+s.IPTables.Version+" cannot wait for its lock in iptables-restore",
			"update the package iptables to "+iptablesOldest+" or later")
	}
	return r
}

// inboundOnly is what rules for serving ports need, and others do not.
const inboundOnly = "xt_addrtype"

func (s System) modules() Row {
	m := s.Modules
	r := Row{What: "kernel", Verdict: Works, Seen: "all there",
		Needed: strings.Join(needed(s.IPTables.Backend), " ")}
	gone, way := m.Missing, "install the rest of the kernel's modules, in Red Hat's kernel-modules "+
		"and kernel-modules-extra, say"
	if m.Disabled && len(m.Unloaded) > 0 {
		gone = slices.Concat(m.Missing, m.Unloaded)
		way = "load them at boot before kernel.modules_disabled is set (/etc/modules-load.d)"
	}
	names := strings.Join(gone, " ")
	lacks := "the kernel has no " + names
	if m.Disabled && len(m.Unloaded) > 0 {
		lacks = "kernel.modules_disabled is set, and these are not loaded: " + names
	}
	switch {
	case len(gone) == 1 && gone[0] == inboundOnly:
		r.Seen = "missing: " + names
		r.limit(lacks+", so that serving ports are not intercepted", way)
	case len(gone) > 0:
		r.Seen = "missing: " + names
		r.refuse(lacks, way)
	case len(m.Unloaded) > 0:
		r.Seen = "loaded when needed: " + strings.Join(m.Unloaded, " ")
	case !m.Listed:
		r.Seen, r.Verdict = "not told: no list of modules for this kernel", Unknown
	}
	return r
}

func (s System) libc() Row {
	l := s.Libc
	r := Row{What: "glibc", Seen: l.Version, Needed: "no Envoy here yet", Verdict: Works}
	if l.Envoy != "" {
		r.Needed = l.Needed
		if l.Needed == "" {
			r.Needed = "none, " + l.Envoy + " is static"
		}
	}
	switch {
	case l.Version == "":
		r.Seen = "not seen"
		if l.Needed != "" {
			r.Verdict = Unknown
		}
	case l.Needed != "" && less(l.Version, l.Needed):
		r.limit(fmt.Sprintf("%s needs glibc %s, and this is %s, so that it does not run here", l.Envoy,
			l.Needed, l.Version), "give primary-source with an Envoy that was built for this system")
	}
	return r
}
