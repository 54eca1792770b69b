//go:build packages

// Package packages builds the .deb and .rpm as `make packages` does, with a small program in place
// of Envoy, and looks into them. test/packages.sh runs it, and brings the tools of both kinds. How
// they behave on a VM is test/box's TestPackages.
package packages

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/service-proxy-agent/service-proxy-agent/internal/layout"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

const version, epoch = "1.2.3", "1700000000"

// arches are the architectures, in the words of both kinds.
var arches = map[string]string{"amd64": "x86_64", "arm64": "aarch64"}

// files are the packages of an architecture.
func files(arch string, envoy bool) (deb, rpm []string) {
	deb, rpm = []string{"service-proxy-agent_" + version + "_" + arch + ".deb"},
		[]string{"service-proxy-agent-" + version + "-1." + arches[arch] + ".rpm"}
	if envoy {
		deb = append(deb, "service-proxy-agent-envoy_1.40.0+"+version+"_"+arch+".deb")
		rpm = append(rpm, "service-proxy-agent-envoy-1.40.0+"+version+"-1."+arches[arch]+".rpm")
	}
	return deb, rpm
}

// build makes all packages; that of Envoy for this machine's architecture alone, as the program
// that stands for it is.
func build(t *testing.T) string {
	t.Helper()
	out := t.TempDir()
	cmd := exec.Command("../../deploy/packages/build.sh")
	cmd.Env = append(os.Environ(), "VERSION="+version, "SOURCE_DATE_EPOCH="+epoch,
		"ENVOY_VERSION=1.40.0", "ENVOY=none", "ENVOY_ARM64=none", "OUT="+out, "TMPDIR="+t.TempDir())
	cmd.Env = append(cmd.Env, map[string]string{"amd64": "ENVOY", "arm64": "ENVOY_ARM64"}[runtime.GOARCH]+
		"=/bin/true")
	if said, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, said)
	}
	return out
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out, stderr.String())
	}
	return string(out)
}

func sums(t *testing.T, dir string) map[string]string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	for _, e := range entries {
		text, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		all[e.Name()] = fmt.Sprintf("%x", sha256.Sum256(text))
	}
	return all
}

func TestPackages(t *testing.T) {
	t.Cleanup(func() {
		if _, err := os.Stat(layout.Packages.Agent); err == nil {
			t.Errorf("%s is on this machine", layout.Packages.Agent)
		}
	})
	dir := build(t)
	var want []string
	for arch := range arches {
		deb, rpm := files(arch, arch == runtime.GOARCH)
		want = slices.Concat(want, deb, rpm)
	}
	have := sums(t, dir)
	for _, name := range want {
		if have[name] == "" {
			t.Errorf("there is no %s", name)
		}
	}
	if len(have) != len(want) {
		t.Errorf("have %v", have)
	}
	if t.Failed() {
		t.FailNow()
	}
	t.Run("reproducible", func(t *testing.T) {
		again := sums(t, build(t))
		for name, sum := range have {
			if again[name] != sum {
				t.Errorf("%s is another one when it is built again", name)
			}
		}
	})
	t.Run("deb", func(t *testing.T) { checkDeb(t, dir) })
	t.Run("rpm", func(t *testing.T) { checkRPM(t, dir) })
	t.Run("page", func(t *testing.T) {
		var all []string
		deb, rpm := files(runtime.GOARCH, true)
		for _, name := range deb {
			for line := range strings.Lines(run(t, "dpkg-deb", "-c", filepath.Join(dir, name))) {
				if path := strings.TrimPrefix(strings.Fields(line)[5], "."); !strings.HasSuffix(path, "/") {
					all = append(all, path)
				}
			}
		}
		for _, name := range rpm {
			all = append(all, strings.Fields(run(t, "rpm", "-qp", "--nosignature", "--list",
				filepath.Join(dir, name)))...)
		}
		checkPage(t, all)
	})
	deb, rpm := files(runtime.GOARCH, true)
	// The files of the other architecture are the same but for the program.
	t.Run("lintian", func(t *testing.T) {
		cmd := exec.Command("lintian", slices.Concat([]string{"--profile", "debian", "--fail-on",
			"error,warning"}, deb)...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	})
	t.Run("rpmlint", func(t *testing.T) {
		config, err := filepath.Abs("../../deploy/packages/rpmlint.toml")
		if err != nil {
			t.Fatal(err)
		}
		// It unpacks by `cpio -id` where it stands, and the names that nfpm writes are absolute: they
		// would be files of this machine.
		bin := t.TempDir()
		cpio := "#!/bin/sh\nexec /usr/bin/cpio --no-absolute-filenames \"$@\"\n"
		if err := os.WriteFile(filepath.Join(bin, "cpio"), []byte(cpio), 0o755); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("rpmlint", slices.Concat([]string{"-c", config}, rpm)...)
		cmd.Dir, cmd.Env = dir, append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"))
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), " 0 errors, 0 warnings,") {
			t.Errorf("%v\n%s", err, out)
		}
	})
}

// common are the files of the agent in both kinds of package.
func common() []string {
	want := []string{layout.Packages.Agent, "/etc/default/service-proxy-agent",
		"/usr/share/bash-completion/completions/service-proxy-agent",
		"/usr/share/fish/vendor_completions.d/service-proxy-agent.fish"}
	for _, file := range systemd.FilesIn(layout.Packages) {
		want = append(want, file.Path)
	}
	pages, _ := filepath.Glob("../../docs/man/*.8") // the pattern is good
	for _, page := range pages {
		want = append(want, "/usr/share/man/man8/"+filepath.Base(page)+".gz")
	}
	return want
}

func sameFiles(t *testing.T, what string, have, want []string) {
	t.Helper()
	slices.Sort(have)
	slices.Sort(want)
	for _, name := range have {
		if !slices.Contains(want, name) {
			t.Errorf("%s: %s is not expected", what, name)
		}
	}
	for _, name := range want {
		if !slices.Contains(have, name) {
			t.Errorf("%s: there is no %s", what, name)
		}
	}
}

// checkDeb: what the packages hold and depend on, that units and manual name the package's program,
// and that the program is one that knows that it is a package's.
func checkDeb(t *testing.T, dir string) {
	for arch := range arches {
		names, _ := files(arch, arch == runtime.GOARCH)
		for i, name := range names {
			deb, root := filepath.Join(dir, name), t.TempDir()
			run(t, "dpkg-deb", "-x", deb, root)
			var have []string
			for line := range strings.Lines(run(t, "dpkg-deb", "-c", deb)) {
				f := strings.Fields(line)
				if f[1] != "root/root" {
					t.Errorf("%s: %s", name, line)
				}
				if path := strings.TrimPrefix(f[5], "."); !strings.HasSuffix(path, "/") {
					have = append(have, path)
					if want := modeOf(path); f[0] != want {
						t.Errorf("%s: %s has %s, want %s", name, path, f[0], want)
					}
				}
			}
			field := func(name string) string {
				return strings.TrimSpace(run(t, "dpkg-deb", "-f", deb, name))
			}
			if field("Architecture") != arch {
				t.Errorf("%s is for %s", name, field("Architecture"))
			}
			if i == 1 {
				sameFiles(t, name, have, []string{layout.Packages.ArchivedEnvoy,
					"/usr/share/doc/service-proxy-agent-envoy/copyright",
					"/usr/share/doc/service-proxy-agent-envoy/changelog.gz",
					"/usr/share/lintian/overrides/service-proxy-agent-envoy"})
				if have := field("Depends"); !regexp.MustCompile(`^libc6 \(>= 2\.\d+\)$`).MatchString(have) {
					t.Errorf("%s depends on %q", name, have)
				}
				continue
			}
			sameFiles(t, name, withoutLicences(have), append(common(),
				"/etc/needrestart/conf.d/service-proxy-agent.conf",
				"/usr/share/zsh/vendor-completions/_service-proxy-agent",
				"/usr/share/doc/service-proxy-agent/copyright",
				"/usr/share/doc/service-proxy-agent/changelog.gz",
				"/usr/share/lintian/overrides/service-proxy-agent"))
			if have := field("Depends"); have != "systemd, iptables, ca-certificates" {
				t.Errorf("%s depends on %q", name, have)
			}
			if have := field("Recommends"); have != "service-proxy-agent-envoy" {
				t.Errorf("%s recommends %q", name, have)
			}
			if have := run(t, "dpkg-deb", "-I", deb, "conffiles"); have !=
				"/etc/default/service-proxy-agent\n/etc/needrestart/conf.d/service-proxy-agent.conf\n" {
				t.Errorf("%s has the configuration %q", name, have)
			}
			checkTexts(t, root)
			if arch == runtime.GOARCH {
				if have := run(t, root+layout.Packages.Agent, "version"); !strings.HasPrefix(have,
					"service-proxy-agent "+version+" ") {
					t.Errorf("the program says %q", have)
				}
				out, err := exec.Command(root+layout.Packages.Agent, "bootstrap", "--archive", root).
					CombinedOutput()
				if err == nil || !strings.Contains(string(out), "the package service-proxy-agent") {
					t.Errorf("the program does not know that it is a package's: %v\n%s", err, out)
				}
			}
		}
	}
}

// withoutLicences leaves out the texts of what is linked in, which a release has.
func withoutLicences(names []string) []string {
	return slices.DeleteFunc(names, func(name string) bool {
		return strings.HasPrefix(filepath.Base(name), "THIRD_PARTY_LICENSES")
	})
}

func modeOf(path string) string {
	if path == layout.Packages.Agent || path == layout.Packages.ArchivedEnvoy {
		return "-rwxr-xr-x"
	}
	return "-rw-r--r--"
}

// checkPage: docs/packages.md lists where the packages' files are, all of them and no other place.
func checkPage(t *testing.T, files []string) {
	text, err := os.ReadFile("../../docs/packages.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(text), "## What is written")
	table, _, _ = strings.Cut(table, "Their scripts:")
	var listed []string
	for _, m := range regexp.MustCompile("`(/[^`]+)`").FindAllStringSubmatch(table, -1) {
		listed = append(listed, m[1])
	}
	covers := func(place, file string) bool {
		return file == place || strings.HasPrefix(file, place+"/")
	}
	for _, file := range files {
		if !slices.ContainsFunc(listed, func(place string) bool { return covers(place, file) }) &&
			!strings.HasPrefix(file, "/usr/share/doc/") && !strings.HasPrefix(file, "/usr/share/licenses/") &&
			!strings.HasPrefix(file, "/usr/share/lintian/") {
			t.Errorf("docs/packages.md does not list %s", file)
		}
	}
	for _, place := range listed {
		if place != "/usr" && place != "/etc" &&
			!slices.ContainsFunc(files, func(file string) bool { return covers(place, file) }) {
			t.Errorf("docs/packages.md lists %s, where the packages have nothing", place)
		}
	}
}

// checkTexts: nothing of the archive's places is named but what bootstrap itself puts there.
func checkTexts(t *testing.T, root string) {
	names := []string{}
	for _, file := range systemd.FilesIn(layout.Packages) {
		names = append(names, root+file.Path)
	}
	pages, _ := filepath.Glob(root + "/usr/share/man/man8/*") // the pattern is good
	for _, name := range append(names, pages...) {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(name, ".gz") {
			text = []byte(strings.ReplaceAll(run(t, "gzip", "-dc", name), `\-`, "-"))
		}
		for _, not := range []string{layout.Archive.Agent, layout.Archive.UnitDir,
			layout.Archive.ShareDir} {
			if bytes.Contains(text, []byte(not)) {
				t.Errorf("%s names %s", strings.TrimPrefix(name, root), not)
			}
		}
	}
	agent, err := os.ReadFile(root + layout.Packages.UnitDir + "/" + systemd.AgentUnit)
	if err != nil || !bytes.Contains(agent, []byte("\nExecStart="+layout.Packages.Agent+" run\n")) {
		t.Errorf("the agent's unit does not start the package's program: %v", err)
	}
}

// checkRPM asks rpm for the list of files, the scripts and the dependencies.
func checkRPM(t *testing.T, dir string) {
	for arch := range arches {
		_, names := files(arch, arch == runtime.GOARCH)
		for i, name := range names {
			ask := func(args ...string) string {
				return run(t, "rpm", slices.Concat([]string{"-qp", "--nosignature"}, args,
					[]string{filepath.Join(dir, name)})...)
			}
			have := strings.Fields(ask("--list"))
			requires := strings.Fields(ask("--requires"))
			scripts := ask("--scripts")
			if i == 1 {
				sameFiles(t, name, have, []string{layout.Packages.ArchivedEnvoy,
					filepath.Dir(layout.Packages.ArchivedEnvoy),
					"/usr/share/licenses/service-proxy-agent-envoy",
					"/usr/share/licenses/service-proxy-agent-envoy/LICENSE"})
				if len(requires) != 1 || !regexp.MustCompile(
					`^libc\.so\.6\(GLIBC_2\.\d+\)\(64bit\)$`).MatchString(requires[0]) {
					t.Errorf("%s requires %q", name, requires)
				}
				if !strings.Contains(scripts, "restart service-proxy-bootstrap.service") {
					t.Errorf("%s has the scripts\n%s", name, scripts)
				}
				continue
			}
			sameFiles(t, name, withoutLicences(have), append(common(),
				"/usr/share/zsh/site-functions/_service-proxy-agent",
				"/usr/lib/systemd/system-preset/80-service-proxy-agent.preset",
				"/usr/share/licenses/service-proxy-agent", "/usr/share/licenses/service-proxy-agent/LICENSE"))
			sameFiles(t, name+" requires", requires, []string{"systemd", "iptables", "ca-certificates"})
			if have := ask("--recommends"); have != "service-proxy-agent-envoy\n" {
				t.Errorf("%s recommends %q", name, have)
			}
			if have := ask("--configfiles"); have != "/etc/default/service-proxy-agent\n" {
				t.Errorf("%s has the configuration %q", name, have)
			}
			for _, part := range []string{"preinstall scriptlet", "postinstall scriptlet",
				"preuninstall scriptlet", "postuninstall scriptlet", "systemctl --no-reload preset",
				"bootstrap --remove --keep-state || exit 1", "bootstrap --adopt || exit 1"} {
				if !strings.Contains(scripts, part) {
					t.Errorf("%s: its scripts have no %q:\n%s", name, part, scripts)
				}
			}
			for _, file := range systemd.FilesIn(layout.Packages) {
				unit := filepath.Base(file.Path)
				preset, err := os.ReadFile("../../deploy/packages/preset")
				if err != nil {
					t.Fatal(err)
				}
				installs := bytes.Contains(file.Text, []byte("\n[Install]\n"))
				if installs != bytes.Contains(preset, []byte("\nenable "+unit+"\n")) {
					t.Errorf("the presets are wrong about %s", unit)
				}
			}
		}
	}
}

// TestScripts: shells read the scripts, and what they enable are the units that can be.
func TestScripts(t *testing.T) {
	scripts, err := filepath.Glob("../../deploy/packages/scripts/*")
	if err != nil || len(scripts) == 0 {
		t.Fatal("no scripts", err)
	}
	for _, script := range scripts {
		run(t, "sh", "-n", script)
	}
	for _, name := range []string{"agent.postinst", "agent.postrm", "agent.post", "agent.preun"} {
		text, err := os.ReadFile("../../deploy/packages/scripts/" + name)
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range systemd.FilesIn(layout.Packages) {
			unit := filepath.Base(file.Path)
			if bytes.Contains(file.Text, []byte("\n[Install]\n")) && !bytes.Contains(text, []byte(unit)) {
				t.Errorf("%s does not name %s", name, unit)
			}
		}
	}
}
