package bootstrap

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

// TestShared: the manual and completion of the newest archive are installed, those of an earlier one
// go, and what others have there stays.
func TestShared(t *testing.T) {
	v := newFakeVM(t)
	foreign := []string{"man/man8/other.8", "bash-completion/completions/other"}
	for _, name := range foreign {
		v.put(filepath.Join(shareDir, name), "other")
	}
	installed := func() string { return strings.Join(sharedIn(filepath.Join(v.root, shareDir)), " ") }
	const completion = " bash-completion/completions/service-proxy-agent zsh/site-functions/" +
		"_service-proxy-agent fish/vendor_completions.d/service-proxy-agent.fish"
	for _, version := range []string{"1", "2"} {
		v.install(version, "")
		want := "man/man8/service-proxy-agent-" + version + ".8 man/man8/service-proxy-agent.8" + completion
		if have := installed(); have != want {
			t.Errorf("installed %s, want %s", have, want)
		}
		page := filepath.Join(v.root, shareDir, "man/man8/service-proxy-agent.8")
		text, err := os.ReadFile(page)
		if err != nil || string(text) != version+" man/man8/service-proxy-agent.8" {
			t.Errorf("%s is %q, %v", page, text, err)
		}
		if info, err := os.Stat(page); err != nil || info.Mode() != 0o644 {
			t.Errorf("%s: %v, %v", page, info.Mode(), err)
		}
	}
	// An archive without them: pages of another version would mislead.
	dir := v.archive("3", "")
	if err := os.RemoveAll(filepath.Join(dir, "share")); err != nil {
		t.Fatal(err)
	}
	if err := Install(t.Context(), v.options(), dir); err != nil {
		t.Fatal(err)
	}
	if have := installed(); have != "" {
		t.Errorf("left %s", have)
	}
	for _, name := range foreign {
		if _, err := os.Stat(filepath.Join(v.root, shareDir, name)); err != nil {
			t.Error(err)
		}
	}
}

// TestSharedIsNoFailure: where they cannot be written the VM is installed all the same, and it is
// said. A file where the folder should be fails for root, too.
func TestSharedIsNoFailure(t *testing.T) {
	v := newFakeVM(t)
	v.put(shareDir+"/man", "a file")
	core, told := observer.New(zap.WarnLevel)
	opts := v.options()
	opts.Log = zap.New(core)
	if err := Install(t.Context(), opts, v.archive("1", "")); err != nil {
		t.Fatal(err)
	}
	if told.FilterMessage("cannot install the manual and the shells' completion").Len() != 1 {
		t.Errorf("told %v", told.All())
	}
	if have := sharedIn(filepath.Join(v.root, shareDir)); len(have) != 3 { // what can be is there
		t.Errorf("installed %q", have)
	}
}
