package neighbour

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// Process is one that has to do with a service proxy.
type Process struct {
	PID     int
	UID     uint32
	Program string   // the file that runs, be it deleted
	Args    []string // its command line
	Unit    string   // the service it belongs to, "" for none
	// Started is when, in ticks since the boot: with the PID it says that it is the same process.
	Started string
	// Listens says that it holds one of the ports that were asked for.
	Listens bool
}

// Envoy says whether it is one.
func (p Process) Envoy() bool { return p.Listens || filepath.Base(p.Program) == "envoy" }

// Ours says whether it is a process of ours.
func (p Process) Ours() bool {
	return Ours(p.Program, p.Args) || slices.Contains([]string{systemd.EnvoyUnit,
		systemd.BootstrapUnit, systemd.InterceptionUnit, systemd.ReadyUnit, systemd.RotateUnit}, p.Unit)
}

// String is the process for people.
func (p Process) String() string {
	command := strings.Join(p.Args, " ")
	if command == "" {
		command = p.Program
	}
	return fmt.Sprintf("pid %d, %.200s", p.PID, command)
}

// Processes are those of this network namespace, whose rules they could write, in the agent's unit,
// those that hold one of the ports, and those of the closed agent's name or one of these programs.
// Only root sees all of them, and only where nothing hides them (ProtectProc=).
func Processes(ports []uint16, programs ...string) ([]Process, error) {
	here, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("look for other agents: %w", err)
	}
	inodes, err := listening("/proc/thread-self/net", ports)
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("look for other agents: %w", err)
	}
	var all []Process
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		p, ok := readProcess("/proc", pid, inodes)
		if !ok {
			continue
		}
		of, err := os.Readlink(filepath.Join("/proc", entry.Name(), "ns/net"))
		if err == nil && of == here && (p.Unit == systemd.AgentUnit || p.Listens || Named(p.Program) ||
			slices.Contains(programs, p.Program)) {
			all = append(all, p)
		}
	}
	// The first is likely to have started the others.
	slices.SortFunc(all, func(a, b Process) int { return cmp.Compare(a.PID, b.PID) })
	return all, nil
}

// Found is what of the processes is whose.
type Found struct {
	Agents, Envoys []Process // the closed agent's, and the Envoys that are not ours: first who listens
	Ours           bool      // our daemon runs in its unit
}

// Sort says which processes are the closed agent's, whose unit files these are.
func Sort(all []Process, units []Unit) (f Found) {
	f.Ours = slices.ContainsFunc(all, func(p Process) bool {
		return p.Unit == systemd.AgentUnit && p.Ours()
	})
	for _, p := range all {
		inUnit := p.Unit == systemd.AgentUnit && !f.Ours // else they are our daemon's children
		switch {
		case p.Ours():
		case Named(p.Program) && len(p.Args) == 0:
			// Whose it is only its command line tells, which the kernel does not have while it starts a
			// program and once it has taken its memory back.
		case inUnit && slices.Contains([]string{"systemd", "systemd-executor"},
			filepath.Base(p.Program)):
			// It is about to start a unit's program, in the unit already: ours as well as theirs.
		case p.Envoy() && (p.Listens || inUnit):
			f.Envoys = append(f.Envoys, p)
		case inUnit, p.Unit != systemd.AgentUnit && (Named(p.Program) ||
			!anybodys(p.Program) &&
				slices.ContainsFunc(units, func(u Unit) bool { return u.Program == p.Program })):
			f.Agents = append(f.Agents, p)
		}
	}
	slices.SortStableFunc(f.Envoys, func(a, b Process) int {
		switch {
		case a.Listens == b.Listens:
			return 0
		case a.Listens:
			return -1
		}
		return 1
	})
	return f
}

// anybodys says that the program is where the distribution has its own: a shell, an interpreter or
// a container's tool, which others run, too.
func anybodys(program string) bool {
	return slices.Contains([]string{"/bin", "/sbin", "/usr/bin", "/usr/sbin"}, filepath.Dir(program))
}

// Still says whether the process is still there, and the same.
func (p Process) Still() bool {
	now, ok := readProcess("/proc", p.PID, nil)
	return ok && now.Started == p.Started
}

// readProcess reads one; not ok: it has ended, is a zombie or a thread of the kernel, or may not be
// looked at.
func readProcess(proc string, pid int, inodes map[string]bool) (p Process, ok bool) {
	dir := filepath.Join(proc, strconv.Itoa(pid))
	info, err := os.Stat(dir)
	if err != nil {
		return p, false
	}
	p.PID = pid
	if stat, ok := info.Sys().(*syscall.Stat_t); ok {
		p.UID = stat.Uid
	}
	program, err := os.Readlink(filepath.Join(dir, "exe"))
	if err != nil {
		return p, false
	}
	p.Program = strings.TrimSuffix(program, " (deleted)")
	// The name in parentheses may hold blanks: what counts stands behind the last one (proc(5)).
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return p, false
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) < 20 || fields[0] == "Z" || fields[0] == "X" {
		return p, false
	}
	p.Started = fields[19]
	cmdline, err := os.ReadFile(filepath.Join(dir, "cmdline"))
	if err != nil {
		return p, false
	}
	if text := strings.TrimSuffix(string(cmdline), "\x00"); text != "" {
		p.Args = strings.Split(text, "\x00")
	}
	cgroup, err := os.ReadFile(filepath.Join(dir, "cgroup"))
	if err != nil {
		return p, false
	}
	p.Unit = unitOf(string(cgroup))
	if len(inodes) == 0 {
		return p, true
	}
	files, _ := os.ReadDir(filepath.Join(dir, "fd"))
	for _, file := range files {
		to, _ := os.Readlink(filepath.Join(dir, "fd", file.Name()))
		if inodes[to] {
			p.Listens = true
			break
		}
	}
	return p, true
}

// unitOf is the service of a /proc/PID/cgroup: the last part of a path that is one, of version 2's
// hierarchy or systemd's own of version 1.
func unitOf(cgroup string) (unit string) {
	for line := range strings.Lines(cgroup) {
		_, rest, _ := strings.Cut(strings.TrimSpace(line), ":")
		controllers, path, _ := strings.Cut(rest, ":")
		if controllers != "" && controllers != "name=systemd" {
			continue
		}
		for part := range strings.SplitSeq(path, "/") {
			if strings.HasSuffix(part, ".service") {
				unit = part
			}
		}
	}
	return unit
}

// listening are the sockets that listen on the ports, as links in /proc/PID/fd name them.
func listening(net string, ports []uint16) (map[string]bool, error) {
	inodes := map[string]bool{}
	for _, name := range []string{"tcp", "tcp6"} {
		text, err := os.ReadFile(filepath.Join(net, name))
		if errors.Is(err, fs.ErrNotExist) && name == "tcp6" {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("look who listens: %w", err)
		}
		for line := range strings.Lines(string(text)) {
			// sl local_address rem_address st … inode: proc_net_tcp in the kernel's documents
			f := strings.Fields(line)
			if len(f) < 10 || f[3] != "0A" {
				continue
			}
			_, hex, _ := strings.Cut(f[1], ":")
			port, err := strconv.ParseUint(hex, 16, 16)
			if err == nil && slices.Contains(ports, uint16(port)) {
				inodes["socket:["+f[9]+"]"] = true
			}
		}
	}
	return inodes, nil
}
