package neighbour

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/service-proxy-agent/service-proxy-agent/internal/layout"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

const closed = "[Unit]\nDescription=x\n[Service]\nType=notify\nExecStart=/opt/google/agent \\\n --port 1\n"

// ownUnit is our unit as it is installed.
func ownUnit(t *testing.T) string {
	t.Helper()
	for _, file := range systemd.Files() {
		if filepath.Base(file.Path) == systemd.AgentUnit {
			return string(file.Text)
		}
	}
	t.Fatal("no unit of ours")
	return ""
}

func TestUnits(t *testing.T) {
	own := ownUnit(t)
	const etc, run, usr = "/etc/systemd/system/", "/run/systemd/system/", "/usr/lib/systemd/system/"
	ours := layout.Here.UnitDir + "/"
	for _, tt := range []struct {
		name  string
		files map[string]string // by folder
		want  []Unit
	}{
		{"none", nil, nil},
		{"ours", map[string]string{ours: own}, nil},
		{"theirs of the administrator's folder, ours to come", map[string]string{etc: closed},
			[]Unit{{etc + systemd.AgentUnit, "/opt/google/agent", true}}},
		{"theirs before ours", map[string]string{etc: closed, ours: own},
			[]Unit{{etc + systemd.AgentUnit, "/opt/google/agent", true}}},
		{"theirs until the reboot", map[string]string{run: closed, ours: own},
			[]Unit{{run + systemd.AgentUnit, "/opt/google/agent", true}}},
		{"theirs behind ours", map[string]string{usr: closed, ours: own},
			[]Unit{{usr + systemd.AgentUnit, "/opt/google/agent", false}}},
		{"theirs of a package, ours to come", map[string]string{usr: closed},
			[]Unit{{usr + systemd.AgentUnit, "/opt/google/agent", false}}},
		{"theirs in our place", map[string]string{ours: closed},
			[]Unit{{ours + systemd.AgentUnit, "/opt/google/agent", true}}},
		{"two", map[string]string{etc: closed, usr: closed},
			[]Unit{{etc + systemd.AgentUnit, "/opt/google/agent", true},
				{usr + systemd.AgentUnit, "/opt/google/agent", false}}},
		{"ours, edited", map[string]string{etc: own + "Nice=5\n", ours: own}, nil},
		{"ours of a package", map[string]string{
			usr: strings.ReplaceAll(own, "/usr/local/bin", "/usr/bin")}, nil},
		{"masked", map[string]string{etc: "", ours: own}, nil},
		{"their program has our place", map[string]string{
			etc: "[Service]\nExecStart=-/usr/local/bin/service-proxy-agent --v=1\n"},
			[]Unit{{etc + systemd.AgentUnit, "/usr/local/bin/service-proxy-agent", true}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			root := t.TempDir()
			for dir, text := range tt.files {
				if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
					t.Fatal(err)
				}
				name := filepath.Join(root, dir, systemd.AgentUnit)
				if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			have, err := Units(root)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, have); diff != "" {
				t.Errorf("(-want +have)\n%s", diff)
			}
		})
	}
}

// A link to /dev/null masks, Debian's /lib is a link to /usr/lib, and what cannot be read is said.
func TestUnitsOfLinks(t *testing.T) {
	root := t.TempDir()
	for _, dir := range []string{"etc/systemd/system", "usr/lib/systemd/system"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	mask := filepath.Join(root, "etc/systemd/system", systemd.AgentUnit)
	theirs := filepath.Join(root, "usr/lib/systemd/system", systemd.AgentUnit)
	for _, err := range []error{os.Symlink("/dev/null", mask), os.Symlink("usr/lib", root+"/lib"),
		os.WriteFile(theirs, []byte(closed), 0o644)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	want := []Unit{{"/usr/lib/systemd/system/" + systemd.AgentUnit, "/opt/google/agent", false}}
	if have, err := Units(root); err != nil || !slices.Equal(have, want) {
		t.Errorf("have %+v, %v", have, err)
	}
	if err := os.Truncate(theirs, maxUnit+1); err != nil {
		t.Fatal(err)
	}
	if _, err := Units(root); err == nil || !strings.Contains(err.Error(), "no unit file") {
		t.Error(err)
	}
}

func TestStarts(t *testing.T) {
	for _, tt := range []struct {
		unit, program string
		ours          bool
	}{
		{"", "", false},
		{"[Service]\nExecStart=/usr/local/bin/service-proxy-agent run\n", "/usr/local/bin/service-proxy-agent", true},
		{"[Service]\nExecStart = /usr/bin/service-proxy-agent run --listen=:1\n", "/usr/bin/service-proxy-agent", true},
		{"[Service]\nExecStart=/usr/local/bin/service-proxy-agent\n", "/usr/local/bin/service-proxy-agent", false},
		{"[Service]\nExecStart=/a\nExecStart=\nExecStart=!!/b c\n", "/b", false},
		{"[Service]\nExecStart=/usr/bin/nice -n 5 /usr/local/bin/service-proxy-agent run\n", "/usr/bin/nice", true},
		{"[Service]\nExecStart=/bin/sh -c '. /x; exec /usr/local/bin/service-proxy-agent run'\n", "/bin/sh", true},
		{"[Service]\nExecStart=/bin/sh -c \"/usr/local/bin/service-proxy-agent --port 1\"\n", "/bin/sh", false},
		{"[Service]\nExecStartPre=/usr/bin/service-proxy-agent run\nExecStart=\"/b\"\n", "/b", false},
		{"[Unit]\nExecStart=/usr/bin/service-proxy-agent run\n", "", false},
		{"[Service]\n# ExecStart=/usr/bin/service-proxy-agent run\n", "", false},
	} {
		if program, ours := starts(tt.unit); program != tt.program || ours != tt.ours {
			t.Errorf("%q: %q, %v", tt.unit, program, ours)
		}
	}
}

func TestUnitOf(t *testing.T) {
	for text, want := range map[string]string{
		"":               "",
		"0::/init.scope": "",
		"0::/system.slice/service-proxy-agent.service\n":                             systemd.AgentUnit,
		"0::/box/payload/system.slice/service-proxy-agent.service/sub\n":             systemd.AgentUnit,
		"5:memory:/x.service\n1:name=systemd:/system.slice/a.service\n0::/\n":        "a.service",
		"0::/user.slice/user-0.slice/user@0.service/app.slice/run-1.service\n":       "run-1.service",
		"4:pids:/system.slice/b.service\n1:name=systemd:/user.slice/x.scope\n0::/\n": "",
	} {
		if have := unitOf(text); have != want {
			t.Errorf("%q: %q", text, have)
		}
	}
}

// A real process: a shell of another name that listens is found by its port, is no longer "still"
// there once it has ended, and none of the rest of this machine is taken for one.
func TestProcesses(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	file, err := ln.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	cmd := exec.Command("sleep", "60")
	cmd.ExtraFiles = []*os.File{file} // it holds the port, too
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	port := uint16(ln.Addr().(*net.TCPAddr).Port)
	find := func() (Process, bool) {
		all, err := Processes([]uint16{port})
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range all {
			if p.PID == cmd.Process.Pid {
				return p, true
			}
		}
		return Process{}, false
	}
	p, ok := find()
	if !ok || !p.Listens || !p.Envoy() || p.Ours() || p.UID != uint32(os.Getuid()) ||
		!strings.HasSuffix(p.String(), "sleep 60") || !p.Still() {
		t.Fatalf("%v %+v", ok, p)
	}
	other := p
	other.Started += "0"
	if other.Still() {
		t.Error("a process that has its number later is taken for it")
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if _, ok := find(); ok || p.Still() {
		t.Error("it is still there")
	}
}

// A process that ends while it is read is none: what of it could no longer be read says nothing.
func TestReadProcess(t *testing.T) {
	for _, missing := range []string{"", "cmdline", "cgroup"} {
		proc := t.TempDir()
		if err := os.Mkdir(filepath.Join(proc, "7"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink("/usr/local/bin/envoy", filepath.Join(proc, "7/exe")); err != nil {
			t.Fatal(err)
		}
		for name, text := range map[string]string{
			"stat":    "7 (x) S" + strings.Repeat(" 1", 50),
			"cmdline": "/usr/local/bin/envoy\x00-c\x00",
			"cgroup":  "0::/system.slice/" + systemd.EnvoyUnit + "\n",
		} {
			if name == missing {
				continue
			}
			if err := os.WriteFile(filepath.Join(proc, "7", name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if p, ok := readProcess(proc, 7, nil); ok != (missing == "") || ok && !p.Ours() {
			t.Errorf("without %q: %v %+v", missing, ok, p)
		}
	}
}

func TestOurs(t *testing.T) {
	for _, tt := range []struct {
		p    Process
		want bool
	}{
		{Process{Program: "/usr/local/bin/service-proxy-agent", Args: []string{"x", "run"}}, true},
		{Process{Program: "/usr/local/bin/service-proxy-agent", Args: []string{"x", "-v"}}, false},
		{Process{Program: "/usr/local/bin/service-proxy-agent"}, false},
		{Process{Program: "/opt/agent", Args: []string{"x", "run"}}, false},
		{Process{Program: "/usr/local/bin/envoy", Unit: systemd.EnvoyUnit}, true},
		{Process{Program: "/usr/local/bin/envoy", Unit: systemd.AgentUnit}, false},
	} {
		if have := tt.p.Ours(); have != tt.want {
			t.Errorf("%v: %v", tt.p, have)
		}
	}
}

// What is in our unit is theirs, or our daemon's child where that runs; Envoys are found by their
// ports wherever they are, and one on other ports is nobody's business.
func TestSort(t *testing.T) {
	at := func(pid int, unit, program string, args ...string) Process {
		return Process{PID: pid, Unit: unit, Program: program, Args: append([]string{program}, args...)}
	}
	units := []Unit{{Path: "/etc/x", Program: "/opt/google/agent"}}
	listens := at(5, "docker.service", "/usr/bin/proxy")
	listens.Listens = true
	ours := at(7, systemd.AgentUnit, "/usr/local/bin/service-proxy-agent", "run")
	all := []Process{
		at(1, systemd.AgentUnit, "/bin/sh", "/opt/google/agent"),
		at(2, systemd.AgentUnit, "/usr/local/bin/envoy", "-c", "x"),
		at(3, "osconfig.service", "/opt/google/agent"), listens,
		at(4, "other.service", "/usr/local/bin/envoy"),
		at(6, systemd.EnvoyUnit, "/usr/local/bin/envoy"),
		at(8, "", "/root/service-proxy-agent", "-v"),
		at(9, "", "/root/service-proxy-agent", "bootstrap"),
	}
	pids := func(all []Process) (pids []int) {
		for _, p := range all {
			pids = append(pids, p.PID)
		}
		return pids
	}
	f := Sort(all, units)
	if !slices.Equal(pids(f.Agents), []int{1, 3, 8}) || !slices.Equal(pids(f.Envoys), []int{5, 2}) ||
		f.Ours {
		t.Errorf("%+v", f)
	}
	f = Sort(append(all, ours), units)
	if !f.Ours || !slices.Equal(pids(f.Agents), []int{3, 8}) ||
		!slices.Equal(pids(f.Envoys), []int{5}) {
		t.Errorf("beside ours: %+v", f)
	}
	// A unit that starts a shell or an interpreter makes no agent of all the others that run.
	shell := []Process{at(9, systemd.AgentUnit, "/usr/bin/bash", "/opt/x"), at(10, "ssh.service", "/usr/bin/bash")}
	f = Sort(shell, []Unit{{Path: "/etc/x", Program: "/usr/bin/bash"}})
	if !slices.Equal(pids(f.Agents), []int{9}) {
		t.Errorf("a shell: %+v", f)
	}
	// One that is just being started, or has all but ended, has no command line for a moment: it may
	// be ours as well. Theirs that has another name can still be told.
	starts := []Process{
		{PID: 11, Unit: systemd.AgentUnit, Program: "/usr/local/bin/service-proxy-agent"},
		{PID: 12, Program: "/usr/local/bin/service-proxy-agent"},
		{PID: 13, Unit: systemd.AgentUnit, Program: "/opt/google/agent"},
		at(14, systemd.AgentUnit, "/usr/lib/systemd/systemd"),
		at(15, systemd.AgentUnit, "/usr/lib/systemd/systemd-executor", "--deserialize", "9")}
	f = Sort(starts, nil)
	if !slices.Equal(pids(f.Agents), []int{13}) || len(f.Envoys) > 0 {
		t.Errorf("without a command line: %+v", f)
	}
}
