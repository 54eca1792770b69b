package bootstrap

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/service-proxy-agent/service-proxy-agent/internal/layout"
	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/internal/system"
)

// fineSystem is a machine on which the agent works, for tests in which a folder is the VM.
func fineSystem(context.Context) system.System {
	return system.System{ID: "debian", Name: "Debian GNU/Linux 12 (bookworm)", Arch: "amd64",
		Systemd: system.Systemd{Running: true, Version: 252}, Cgroups: "v2",
		Modules: system.Modules{Listed: true}}
}

// on is a VM that such a machine is.
func on(v *fakeVM, change func(*system.System)) Options {
	opts := v.options()
	opts.look = func(ctx context.Context) system.System {
		s := fineSystem(ctx)
		change(&s)
		return s
	}
	return opts
}

// Bootstrap's first step refuses in one line, for good, and has changed nothing then; what works
// with limits says so once, and goes on.
func TestFirstStepLooksAtTheSystem(t *testing.T) {
	steps0 := steps
	defer func() { steps = steps0 }()
	steps = slices.Clone(steps[:1])
	v := newFakeVM(t)
	b := newBootstrapper(on(v, func(s *system.System) { s.Systemd.Running = false }))
	b.state.Attempt = 1
	f := b.attempt(t.Context(), metadata.Attribute{})
	if f == nil || !f.Permanent || f.Step != StepSystem || f.Advice == "" ||
		!strings.HasPrefix(f.Error(), "look at the system: Debian GNU/Linux 12 (bookworm): systemd does") {
		t.Errorf("refused with %v", f)
	}
	if len(v.ran) > 0 {
		t.Errorf("it ran %q", v.ran)
	}

	limited := on(v, func(s *system.System) { s.Systemd.Version = 245 })
	b = newBootstrapper(limited)
	told := func() (n int) {
		for _, line := range b.state.Story {
			if line.Severity == "WARNING" && strings.HasPrefix(line.Text, "this system: systemd 245 skips") {
				n++
			}
		}
		return n
	}
	for attempt := 1; attempt <= 3; attempt++ {
		b.state.Attempt = attempt
		if f := b.attempt(t.Context(), metadata.Attribute{}); f != nil {
			t.Fatal(f)
		}
	}
	if told() != 1 {
		t.Errorf("told %d times: %v", told(), b.state.Story)
	}
	b.state.Attempt, b.again, b.state.Story = 1, true, nil // the next boot
	if f := b.attempt(t.Context(), metadata.Attribute{}); f != nil || told() != 0 {
		t.Errorf("a VM that was finished: %v, told %d times", f, told())
	}

	// What has worked is not refused, whatever is thought of it.
	b = newBootstrapper(on(v, func(s *system.System) { s.Modules.Missing = []string{"xt_owner"} }))
	b.again = true
	for b.state.Attempt = 1; b.state.Attempt <= 3; b.state.Attempt++ {
		if f := b.attempt(t.Context(), metadata.Attribute{}); f != nil {
			t.Errorf("a VM that was finished is refused: %v", f)
		}
	}
	if n := strings.Count(fmt.Sprint(b.state.Story), "has no xt_owner"); n != 1 {
		t.Errorf("told %d times: %v", n, b.state.Story)
	}
}

// An upgrade of a VM that works is not refused either.
func TestUpgradeIsNotRefused(t *testing.T) {
	t.Setenv("GCE_METADATA_HOST", "127.0.0.1:1")
	v := newFakeVM(t)
	v.install("1", "")
	opts := on(v, func(s *system.System) { s.NoGroups = []string{"dialout"} })
	if err := quickly(t, opts, v.archive("2", "")); err == nil {
		t.Error("a VM that was never finished is upgraded where it cannot work")
	}
	state := progress.State{Status: progress.Finished}
	if err := progress.Write(filepath.Join(v.root, progress.StateDir), state); err != nil {
		t.Fatal(err)
	}
	if err := quickly(t, opts, v.archive("3", "")); err != nil {
		t.Error(err)
	}
	v.want("upgraded", "3", "none")
}

// A VM that has another name now has worked before, too, though whose the disk is comes out after
// the system was looked at.
func TestAnotherNameIsNotRefused(t *testing.T) {
	steps0 := steps
	defer func() { steps = steps0 }()
	steps = slices.Clone(steps[:1])
	v := newFakeVM(t)
	v.install("1", "")
	v.machine("m", "tag-1", "b1")
	v.node()
	v.machine("n", "tag-1", "b2")
	opts := on(v, func(s *system.System) { s.NoGroups = []string{"dialout"} })
	for range 2 { // also what the first start has written down
		b := newBootstrapper(opts)
		b.readState()
		b.state.Attempt = 1
		if f := b.attempt(t.Context(), metadata.Attribute{}); f != nil {
			t.Error(f)
		}
	}
	t.Setenv("GCE_METADATA_HOST", "127.0.0.1:1")
	if err := quickly(t, opts, v.archive("2", "")); err != nil {
		t.Error(err)
	}
}

// quickly installs without waiting for a metadata server that refuses.
func quickly(t *testing.T, opts Options, dir string) (err error) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { err = Install(t.Context(), opts, dir) })
	return err
}

// An archive is not laid down where the agent cannot be. It is tried again where somebody may mend
// that while the machine runs, and only there.
func TestInstallRefuses(t *testing.T) {
	t.Setenv("GCE_METADATA_HOST", "127.0.0.1:1")
	readOnly := []system.Folder{{Path: "/usr/local/bin", ReadOnly: true}}
	for _, tt := range []struct {
		name   string
		change func(*system.System)
		want   string
		again  bool
	}{
		{"no systemd", func(s *system.System) { s.Systemd.Running = false }, "systemd does not run", false},
		{"too old", func(s *system.System) { s.Systemd.Version = 237 }, "append:", false},
		{"architecture", func(s *system.System) { s.Arch = "riscv64" }, "no build for riscv64", false},
		{"COS", func(s *system.System) { s.ID, s.Folders = "cos", readOnly },
			"/usr/local/bin is on a read-only file system", false},
		{"read-only", func(s *system.System) { s.Folders = readOnly },
			"/usr/local/bin is on a read-only file system", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			v := newFakeVM(t)
			err := quickly(t, on(v, tt.change), v.archive("1", ""))
			if err == nil || !strings.Contains(err.Error(), tt.want) ||
				strings.Contains(err.Error(), "\n") || strings.Contains(err.Error(), "not tried again") {
				t.Errorf("have %v", err)
			}
			if _, err := os.Stat(filepath.Join(v.root, layout.Here.Agent)); err == nil {
				t.Error("it was installed")
			}
			again := slices.ContainsFunc(v.ran, func(ran string) bool {
				return strings.HasPrefix(ran, "systemd-run ")
			})
			if again != tt.again {
				t.Errorf("tried again: %v; ran %q", again, v.ran)
			}
		})
	}
}

// Each package manager, as a stand-in that is asked as the real one would be and installs or does
// not. zypper ends with a code of its own when it has more to say than that all is well.
func TestPackageManagers(t *testing.T) {
	const zypperSkipped = "exit 106"
	for _, tt := range []struct {
		manager, ends string
		installs      bool
		want          string // of what was run, the last line
		fails         string
	}{
		{"apt-get", "exit 0", true, "apt-get -qq -y -o DPkg::Lock::Timeout=120 -o Acquire::Retries=2 " +
			"-o Dpkg::Options::=--force-confold --no-install-recommends install iptables ca-certificates", ""},
		{"dnf", "exit 0", true,
			"dnf -q -y --setopt=install_weak_deps=False install iptables ca-certificates", ""},
		{"dnf", "echo 'Error: Unable to find a match: iptables'; exit 1", false, "",
			"Error: Unable to find a match: iptables; mend the image's package repositories"},
		{"yum", "exit 0", true, "yum -q -y install iptables ca-certificates", ""},
		{"zypper", "exit 0", true, "zypper --quiet --non-interactive install --no-recommends " +
			"iptables ca-certificates", ""},
		{"zypper", zypperSkipped, true, "zypper --quiet --non-interactive install --no-recommends " +
			"iptables ca-certificates", ""},
		{"zypper", "echo \"Package 'iptables' not found.\"; exit 104", false, "", "not found"},
		{"dnf", "exit 0", false, "", "dnf installed it, and it is still not there"},
	} {
		t.Run(tt.manager+" "+tt.ends, func(t *testing.T) {
			root := t.TempDir()
			logged := filepath.Join(root, "ran")
			bin := filepath.Join(root, "usr/sbin")
			mkdir(t, bin, 0o755)
			mkdir(t, filepath.Join(root, "etc/pki/tls/certs"), 0o755)
			install := ""
			if tt.installs {
				install = "for p in iptables iptables-restore; do echo '#!/bin/sh' >$0.d; chmod 755 $0.d; " +
					"mv $0.d \"$(dirname \"$0\")/$p\"; done; echo x >" + root + "/etc/pki/tls/certs/ca-bundle.crt\n"
			}
			script := "#!/bin/sh\necho \"$(basename \"$0\") $*\" >>" + logged +
				"\ncase \"$*\" in *install*) ;; *) exit 0 ;; esac\n" + install + tt.ends + "\n"
			for _, name := range []string{tt.manager, "dpkg"} {
				if err := os.WriteFile(filepath.Join(bin, name), []byte(script), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
			b := newBootstrapper(Options{Root: root, command: func(_ context.Context, c *exec.Cmd) error {
				return c.Run()
			}})
			err := b.installPackages(t.Context())
			if tt.fails != "" {
				if err == nil || !strings.Contains(err.Error()+"; "+failed("", err, ofOthers).Advice, tt.fails) {
					t.Errorf("have %v, want %q", err, tt.fails)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			lines := strings.Split(strings.TrimSpace(read(t, logged)), "\n")
			if have := lines[len(lines)-1]; have != tt.want {
				t.Errorf("it ran\n%s\nwant\n%s", have, tt.want)
			}
		})
	}
}

// What is installed gets SELinux's labels where there is SELinux, and nothing is run where not.
func TestLabels(t *testing.T) {
	for _, tt := range []struct {
		mode, program string
		want          bool
	}{{"1", "restorecon", true}, {"0", "restorecon", true}, {"", "restorecon", false}, {"1", "", false}} {
		v := newFakeVM(t)
		if tt.mode != "" {
			v.put("/sys/fs/selinux/enforce", tt.mode)
		}
		if tt.program != "" {
			v.put("/usr/sbin/"+tt.program, "")
		}
		v.install("1", "1.30.1")
		have := slices.ContainsFunc(v.ran, func(ran string) bool {
			return strings.HasPrefix(ran, "restorecon -R "+v.root+layout.Here.Agent+" ")
		})
		if have != tt.want {
			t.Errorf("mode %q, %q: ran %q", tt.mode, tt.program, v.ran)
		}
	}
}
