package bootstrap

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"
)

// TestShared: the manual and completion of the newest archive are installed, those of an earlier
// one go, and what others have there stays.
func TestShared(t *testing.T) {
	v := newFakeVM(t)
	foreign := []string{"/usr/local/share/man/man8/other.8", "/etc/fish/completions/other.fish",
		"/usr/local/share/man/man8/service-proxy-agent-mine.8"}
	for _, name := range foreign {
		v.put(name, "other")
	}
	const page = "/usr/local/share/man/man8/service-proxy-agent.8"
	for _, version := range []string{"1", "2"} {
		v.install(version, "")
		want := "/usr/local/share/man/man8/service-proxy-agent-" + version + ".8 " + page +
			" /usr/local/share/bash-completion/completions/service-proxy-agent" +
			" /usr/local/share/zsh/site-functions/_service-proxy-agent" +
			" /etc/fish/completions/service-proxy-agent.fish"
		if have := strings.Join(sharedIn(v.root), " "); have != want {
			t.Errorf("installed %s, want %s", have, want)
		}
		file := filepath.Join(v.root, page)
		if text, err := os.ReadFile(file); err != nil || string(text) != sharedText(version, page) {
			t.Errorf("%s is %q, %v", page, text, err)
		}
		if info, err := os.Stat(file); err != nil || info.Mode() != 0o644 {
			t.Errorf("%s: %v, %v", page, info.Mode(), err)
		}
	}
	// An archive without them: pages of another version would mislead.
	dir := v.archive("3", "")
	if err := os.RemoveAll(filepath.Join(dir, sharedRoot)); err != nil {
		t.Fatal(err)
	}
	if err := Install(t.Context(), v.options(), dir); err != nil {
		t.Fatal(err)
	}
	if have := sharedIn(v.root); len(have) != 0 {
		t.Errorf("left %q", have)
	}
	v.install("3", "")
	r := &removal{bootstrapper: newBootstrapper(v.options())}
	r.removeShared()
	if have := sharedIn(v.root); len(have) != 0 || len(r.done) != 5 || len(r.errs) > 0 {
		t.Errorf("after removal %q is left; %q, %v", have, r.done, r.errs)
	}
	for _, name := range foreign {
		if _, err := os.Stat(filepath.Join(v.root, name)); err != nil {
			t.Error(err)
		}
	}
}

// TestOurPages: each page that an archive brings is known again as ours.
func TestOurPages(t *testing.T) {
	pages, err := filepath.Glob("../../docs/man/*")
	if err != nil || len(pages) < 2 {
		t.Fatalf("%q, %v", pages, err)
	}
	for _, page := range pages {
		if !isOurPage(page) {
			t.Errorf("%s is not known as ours, and would not be installed", page)
		}
	}
}

// TestSharedLinks: an archive's link, or what hangs when it is read, is no page, and the rest is
// installed.
func TestSharedLinks(t *testing.T) {
	v := newFakeVM(t)
	dir := v.archive("1", "")
	const man = "/usr/local/share/man/man8/service-proxy-agent"
	v.put("/etc/secret", sharedText("1", "secret"))
	from := filepath.Join(dir, sharedRoot)
	for _, err := range []error{
		os.Symlink(filepath.Join(v.root, "/etc/secret"), filepath.Join(from, man+"-link.8")),
		unix.Mkfifo(filepath.Join(from, man+"-hangs.8"), 0o644),
		os.Mkdir(filepath.Join(from, man+"-folder.8"), 0o755),
		os.Remove(filepath.Join(from, shared[1])),
		os.Symlink(filepath.Join(v.root, "/etc/secret"), filepath.Join(from, shared[1])),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := Install(t.Context(), v.options(), dir); err != nil {
		t.Fatal(err)
	}
	want := man + "-1.8 " + man + ".8 " + shared[2] // there is no fish
	if have := strings.Join(sharedIn(v.root), " "); have != want {
		t.Errorf("installed %s, want %s", have, want)
	}
}

// TestSharedIsNoFailure: where they cannot be written the VM is installed all the same, and it is
// said. A file where the folder should be fails for root, too. A shell that is not there gets
// nothing.
func TestSharedIsNoFailure(t *testing.T) {
	v := newFakeVM(t)
	v.put("/usr/local/share/man", "a file")
	core, told := observer.New(zap.WarnLevel)
	opts := v.options()
	opts.Log = zap.New(core)
	if err := Install(t.Context(), opts, v.archive("1", "")); err != nil {
		t.Fatal(err)
	}
	if told.FilterMessage("cannot install the manual and the shells' completion").Len() != 1 {
		t.Errorf("told %v", told.All())
	}
	if have := sharedIn(v.root); len(have) != 2 { // of bash and zsh
		t.Errorf("installed %q", have)
	}
	if _, err := os.Stat(filepath.Join(v.root, "/etc/fish")); err == nil {
		t.Error("it made fish's folder")
	}
}
