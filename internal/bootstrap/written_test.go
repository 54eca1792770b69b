package bootstrap

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"maps"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/service-proxy-agent/service-proxy-agent/internal/logs"
	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
	"github.com/service-proxy-agent/service-proxy-agent/test/platform"
)

// listed are the paths that docs/files.md says bootstrap writes.
var listed = []string{
	"/var/lib/service-proxy-agent", "/run/service-proxy-*", "/usr/local/bin/service-proxy-agent", "/usr/local/bin/envoy", "/usr/local/lib/service-proxy-agent",
	"/usr/local/lib/systemd/system", "/usr/local/lib/systemd/catalog", "/usr/local/lib/tmpfiles.d", "/usr/local/lib/sysusers.d", "/etc/service-proxy-agent", "/var/log/envoy",
	"/etc/systemd/system/service-proxy-*",
	"/usr/local/share/man/man8", "/usr/local/share/bash-completion/completions", "/usr/local/share/zsh/site-functions",
	"/etc/fish/completions",
}

// isListed says that the path is one of those, or beneath it, or a folder on the way there.
func isListed(path string) bool {
	return slices.ContainsFunc(listed, func(pattern string) bool {
		for p := path; p != "/"; p = filepath.Dir(p) {
			if ok, err := filepath.Match(pattern, p); ok && err == nil {
				return true
			}
		}
		return strings.HasPrefix(pattern, path+"/")
	})
}

// tree is what is beneath the root: of each path its kind and mode, and its content or target.
func tree(t *testing.T, root string) map[string]string {
	t.Helper()
	found := map[string]string{}
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		what := info.Mode().String()
		switch {
		case info.Mode().IsRegular():
			text, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			what += fmt.Sprintf(" %x", sha256.Sum256(text))
		case info.Mode()&fs.ModeSymlink != 0:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			what += " " + target
		}
		found[strings.TrimPrefix(path, root)] = what
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// changed are the paths that differ between two looks, sorted.
func changed(before, after map[string]string) []string {
	all := maps.Clone(before)
	maps.Copy(all, after)
	var paths []string
	for _, path := range slices.Sorted(maps.Keys(all)) {
		if before[path] != after[path] {
			paths = append(paths, path)
		}
	}
	return paths
}

// Bootstrap writes what docs/files.md lists and nothing else, and --remove leaves the VM as it was
// but for settings. What the commands it runs would write (systemctl enable, systemd-sysusers,
// systemd-tmpfiles, the package manager) is played here and not written.
func TestWritesOnlyWhatIsListed(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(readme), "- **Files**:")
	section, _, _ = strings.Cut(section, "- **Lines**")
	for _, words := range []string{"`/usr/local`", "`/etc`", "`/var/lib/service-proxy-agent`", "`/run`",
		"`/var/log/envoy`", "](docs/files.md)"} {
		if !strings.Contains(section, words) {
			t.Errorf("the README does not list %s", words)
		}
	}
	page, err := os.ReadFile(filesPage)
	if err != nil {
		t.Fatal(err)
	}
	for _, pattern := range append(slices.Clone(listed), systemd.CatalogDatabase) {
		if !strings.Contains(string(page), "\n| `"+strings.TrimSuffix(pattern, "*")) {
			t.Errorf("docs/files.md does not list %s", pattern)
		}
	}

	v := newFakeVM(t)
	s := newSources(t, v)
	for name, text := range map[string]string{
		"/etc/passwd": "root:x:0:0::/root:/bin/sh\n", "/etc/hosts": "127.0.0.1 localhost\n", "/etc/default/service-proxy-agent": "SERVICE_PROXY_AGENT_LISTEN=\n",
		"/etc/systemd/system/other.service": "[Service]\n", "/etc/systemd/system/service-proxy-envoy.service.d/mine.conf": "[Service]\n", "/usr/sbin/iptables": "x", "/usr/sbin/iptables-restore": "x",
		"/usr/local/bin/other": "x", "/usr/local/lib/systemd/system/other.service": "[Unit]\n", "/var/log/syslog": "x", "/srv/data/file": "x",
		"/run/other.lock": "", "/etc/iptables/rules.v4": "*nat\nCOMMIT\n",
	} {
		v.put(name, text)
	}
	mkdir(t, filepath.Join(v.root, "/usr/local/lib/tmpfiles.d"), 0o755)
	mkdir(t, filepath.Join(v.root, "/usr/local/lib/sysusers.d"), 0o755)
	mkdir(t, filepath.Join(v.root, "/usr/local/lib/systemd/catalog"), 0o755)
	mkdir(t, filepath.Join(v.root, "/var/lib"), 0o755)
	for _, pattern := range shared { // folders stay
		mkdir(t, filepath.Join(v.root, filepath.Dir(pattern)), 0o755)
	}
	dirs := []string{v.archive("1.0.0", "1.30.9"), v.archive("2.0.0", "1.30.9")}
	before := tree(t, v.root)

	for _, dir := range dirs {
		if err := Install(t.Context(), v.options(), dir); err != nil {
			t.Fatal(err)
		}
	}
	server := httptest.NewServer(platform.New(platform.VM{}))
	defer server.Close()
	// no systemctl: what is asked of systemd directly is not this machine's
	t.Setenv("PATH", t.TempDir())
	t.Setenv("GCE_METADATA_HOST", strings.TrimPrefix(server.URL, "http://"))
	for _, step := range []struct {
		primary, accessLog string
		// the step at which it ends: the last one starts Envoy, by a systemd that is not there
		want string
	}{
		{"1.30.1", "/srv/data/access.log", StepStart},
		{"1.30.2", "/var/log/envoy/sub/access.log", StepStart},
	} {
		mkdir(t, filepath.Join(v.root, logs.Dir), 0o770) // tmpfiles.d's
		cfg := s.config(step.primary, "")
		cfg.AccessLog = step.accessLog
		b := newBootstrapper(v.options())
		b.state = v.state()
		f := b.attempt(t.Context(), metadata.Attribute{Config: cfg})
		if f == nil || f.Step != step.want {
			t.Fatalf("%+v", f)
		}
		b.fail(f, 0)
	}
	if _, err := Rollback(t.Context(), v.options()); err != nil {
		t.Fatal(err)
	}
	after := tree(t, v.root)
	paths := changed(before, after)
	checkPlaces(t, v.root, slices.DeleteFunc(slices.Clone(paths),
		func(path string) bool { return path == "/srv/data/access.log" })) // the attribute names it
	for _, path := range paths {
		if !isListed(path) && path != "/srv/data/access.log" { // the attribute names that one
			t.Errorf("written, and not listed: %s: %q, then %q", path, before[path], after[path])
		}
	}
	for _, pattern := range listed { // a list that matches nothing would say nothing
		if !slices.ContainsFunc(paths, func(path string) bool {
			ok, _ := filepath.Match(pattern+"*", path)
			return ok || strings.HasPrefix(path, pattern+"/")
		}) &&
			!strings.HasPrefix(pattern, "/etc/systemd") {
			t.Errorf("listed, and not written: %s", pattern)
		}
	}

	// The rules are out.
	done, err := Remove(t.Context(), v.options(), func(context.Context) ([]string, error) {
		return nil, nil
	})
	if err != nil || !slices.Contains(done, "left /etc/default/service-proxy-agent, which is yours") {
		t.Errorf("said %q, %v", done, err)
	}
	if left := changed(before, tree(t, v.root)); strings.Join(left, " ") != "/srv/data/access.log" {
		t.Errorf("--remove left or took: %q", left)
	}
}
