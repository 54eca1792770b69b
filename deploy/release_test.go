// Package deploy tests what makes a release: its version and its changelog. That two of one commit
// are the same byte for byte takes minutes: test/release.sh.
package deploy

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// repository is a folder with version.sh and with git's history of it.
type repository struct {
	*testing.T
	dir string
}

func (r repository) run(name string, args ...string) string {
	r.Helper()
	c := exec.CommandContext(r.Context(), name, args...)
	c.Dir = r.dir
	c.Env = append(os.Environ(), "VERSION=", "SOURCE_DATE_EPOCH=", "GIT_CONFIG_GLOBAL=/dev/null",
		"GIT_CONFIG_SYSTEM=/dev/null", "GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@b", "GIT_COMMITTER_NAME=a",
		"GIT_COMMITTER_EMAIL=a@b", "GIT_COMMITTER_DATE=1700000000 +0000",
		"GIT_CEILING_DIRECTORIES="+os.TempDir())
	var stderr bytes.Buffer
	c.Stderr = &stderr
	out, err := c.Output()
	if err != nil {
		r.Fatalf("%s %q: %v: %s", name, args, err, stderr.String())
	}
	return strings.TrimSpace(string(out))
}

func (r repository) git(line string) string { r.Helper(); return r.run("git", strings.Fields(line)...) }

// want the version, where HASH is the commit's and DIRTY is of a change.
func (r repository) want(version string) {
	r.Helper()
	if hash := "HASH"; strings.Contains(version, hash) {
		version = strings.ReplaceAll(version, hash, r.git("rev-parse HEAD")[:12])
	}
	if have := r.run("deploy/version.sh"); have != version {
		r.Errorf("version %q, want %q", have, version)
	}
}

func fresh(t *testing.T) repository {
	t.Helper()
	r := repository{t, t.TempDir()}
	for _, name := range []string{"deploy/version.sh", ".gitattributes"} {
		text, err := os.ReadFile(filepath.Join("..", name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(filepath.Join(r.dir, filepath.Dir(name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(r.dir, name), text, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

// committed has two commits.
func committed(t *testing.T) repository {
	t.Helper()
	r := fresh(t)
	r.git("init -q")
	r.git("add .")
	r.git("commit -qm one")
	r.git("commit -qm two --allow-empty")
	return r
}

func (r repository) change() {
	r.Helper()
	if err := os.WriteFile(filepath.Join(r.dir, ".gitattributes"), nil, 0o755); err != nil {
		r.Fatal(err)
	}
}

// TestVersion: one story of commits, tags and changes.
func TestVersion(t *testing.T) {
	r := committed(t)
	r.want("0.0.0-dev.2+gHASH")
	r.git("tag latest") // is of no version
	r.git("tag v1")
	r.want("0.0.0-dev.2+gHASH")
	r.git("tag v1.2.9")
	r.want("1.2.9")
	r.git("commit -qm three --allow-empty")
	r.want("1.2.10-dev.1+gHASH")
	r.git("tag v1.3.0-rc.1")
	r.want("1.3.0-rc.1")
	r.git("commit -qm four --allow-empty")
	r.want("1.3.0-rc.1.dev.1+gHASH")
	r.git("tag v1.3.0")
	r.want("1.3.0")
	r.change()
	r.want("1.3.1-dev.0+gHASH.dirty")
}

func TestVersionUntagged(t *testing.T) {
	r := committed(t)
	r.change()
	r.want("0.0.0-dev.2+gHASH.dirty")
	if have, want := r.run("deploy/version.sh", "--commit"), r.git("rev-parse HEAD")[:12]; have != want {
		t.Errorf("commit %q, want %q", have, want)
	}
	if have := r.run("deploy/version.sh", "--time"); have != "1700000000" {
		t.Errorf("time %q", have)
	}
}

func TestVersionShallow(t *testing.T) {
	r := committed(t)
	at := filepath.Join(t.TempDir(), "shallow")
	r.git("clone -q --depth=1 file://" + r.dir + " " + at)
	repository{t, at}.want("0.0.0-dev.0+gHASH")
}

// TestVersionArchived: in an archive of a commit there is no git, but perhaps one around it.
func TestVersionArchived(t *testing.T) {
	for _, tag := range []string{"", "v1.2.3"} {
		r := committed(t)
		if tag != "" {
			r.git("tag " + tag)
			r.git("commit -qm three --allow-empty")
		}
		around := committed(t)
		around.git("tag v9.9.9")
		inside := repository{t, filepath.Join(around.dir, "inside")}
		if err := os.Mkdir(inside.dir, 0o755); err != nil {
			t.Fatal(err)
		}
		r.git("archive -o " + around.dir + "/a.tar HEAD")
		inside.run("tar", "-xf", "../a.tar")
		hash, want := r.git("rev-parse HEAD")[:12], "1.2.4-dev.1+g"
		if tag == "" {
			want = "0.0.0-dev.0+g"
		}
		inside.want(want + hash)
		if have := inside.run("deploy/version.sh", "--commit"); have != hash {
			t.Errorf("commit %q, want %q", have, hash)
		}
		if have := inside.run("deploy/version.sh", "--time"); have != "1700000000" {
			t.Errorf("time %q", have)
		}
	}
}

// TestVersionUnknown: a copy of the files, within another repository.
func TestVersionUnknown(t *testing.T) {
	around := committed(t)
	around.run("cp", "-r", "deploy", "inside")
	around.run("mkdir", "copy")
	around.run("mv", "inside", "copy/deploy")
	r := repository{t, filepath.Join(around.dir, "copy")}
	r.want("0.0.0-dev.0+unknown")
	if have := r.run("deploy/version.sh", "--commit"); have != "unknown" {
		t.Errorf("commit %q", have)
	}
}

// TestVersionOfPackages: what comes before a release sorts before it.
func TestVersionOfPackages(t *testing.T) {
	for version, want := range map[string]string{
		"1.2.3":                      "1.2.3",
		"1.2.4-dev.5+g0123456789ab":  "1.2.4~dev.5+g0123456789ab",
		"1.3.0-rc.1.dev.5+g01.dirty": "1.3.0~rc.1.dev.5+g01.dirty",
		"1.3.0-rc-1":                 "1.3.0~rc.1",
	} {
		c := exec.CommandContext(t.Context(), "./version.sh", "--package")
		c.Env = append(os.Environ(), "VERSION="+version)
		if have, err := c.Output(); err != nil || strings.TrimSpace(string(have)) != want {
			t.Errorf("%s: %q (%v), want %q", version, have, err, want)
		}
	}
}

var (
	versionRE = regexp.MustCompile(`^## ((\d+)\.(\d+)\.(\d+)(-[0-9a-z.]+)?) - \d{4}-\d\d-\d\d$`)
	groups    = []string{"### Added", "### Changed", "### Deprecated", "### Removed", "### Fixed",
		"### Security"}
)

// TestChangelog has the form of Keep a Changelog, and changelog.sh finds each version in it.
func TestChangelog(t *testing.T) {
	page, err := os.ReadFile("../CHANGELOG.md")
	if err != nil {
		t.Fatal(err)
	}
	versions := []string{"1.2.4-dev.5+g0123456789ab"} // what is unreleased
	for line := range strings.Lines(string(page)) {
		line = strings.TrimSuffix(line, "\n")
		m := versionRE.FindStringSubmatch(line)
		switch {
		case m != nil:
			versions = append(versions, m[1])
		case strings.HasPrefix(line, "## ") && (line != "## Unreleased" || len(versions) > 1),
			strings.HasPrefix(line, "### ") && !slices.Contains(groups, line):
			t.Errorf("a heading %q", line)
		}
	}
	if len(versions) < 2 {
		t.Error("no version has a section")
	}
	for _, v := range versions {
		if out, err := exec.CommandContext(t.Context(), "./changelog.sh", v).Output(); err != nil ||
			strings.Contains(string(out), "\n## ") {
			t.Errorf("%s: %v\n%s", v, err, out)
		}
	}
	for _, no := range []string{"0.1", "0.1.00", "99.0.0", "Unreleased"} {
		if out, err := exec.CommandContext(t.Context(), "./changelog.sh", no).Output(); err == nil {
			t.Errorf("%s has notes:\n%s", no, out)
		}
	}
}

// TestRenovate: each of its expressions still finds Envoy's version where it stands.
func TestRenovate(t *testing.T) {
	text, err := os.ReadFile("../renovate.json")
	if err != nil {
		t.Fatal(err)
	}
	var config struct {
		CustomManagers []struct{ ManagerFilePatterns, MatchStrings []string }
	}
	if err := json.Unmarshal(text, &config); err != nil {
		t.Fatal(err)
	}
	files, err := exec.CommandContext(t.Context(), "find", "..", "-name", "*.sh", "-o", "-name", "*.go",
		"-o", "-name", "Makefile").Output()
	if err != nil {
		t.Fatal(err)
	}
	versions := map[string]string{} // the file that has it
	for _, m := range config.CustomManagers {
		found := false
		name := regexp.MustCompile(strings.Trim(m.ManagerFilePatterns[0], "/"))
		for _, file := range strings.Fields(string(files)) {
			if !name.MatchString(strings.TrimPrefix(file, "../")) {
				continue
			}
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			for _, match := range regexp.MustCompile(m.MatchStrings[0]).FindAllSubmatch(text, -1) {
				versions[string(match[1])], found = file, true
			}
		}
		if !found {
			t.Errorf("%s finds nothing in %s", m.MatchStrings[0], m.ManagerFilePatterns[0])
		}
	}
	if len(versions) != 1 {
		t.Errorf("versions of Envoy: %v", versions)
	}
}
