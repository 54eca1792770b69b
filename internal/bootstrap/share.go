package bootstrap

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/internal/atomicfile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/layout"
	"github.com/service-proxy-agent/service-proxy-agent/internal/untrusted"
)

// shared are the files that a person uses beside the program, ours alone: its manual, and what
// completes a command line in bash, zsh and fish. They are where those look that no package owns.
// fish does not look beneath /usr/local (3.6, without XDG_DATA_DIRS).
var shared = []string{
	layout.Archive.ShareDir + "/man/man8/service-proxy-agent*.8",
	layout.Archive.ShareDir + "/bash-completion/completions/service-proxy-agent",
	layout.Archive.ShareDir + "/zsh/site-functions/_service-proxy-agent",
	"/etc/fish/completions/service-proxy-agent.fish",
}

// sharedIn are those that there are beneath a root.
func sharedIn(root string) (names []string) {
	for _, pattern := range shared {
		found, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			continue // no pattern of ours is malformed
		}
		for _, path := range found {
			if strings.HasSuffix(pattern, "*.8") && !isOurPage(path) {
				continue // somebody's own page beside ours
			}
			names = append(names, filepath.Join(filepath.Dir(pattern), filepath.Base(path)))
		}
	}
	return names
}

// isOurPage says whether a page of the manual is of this program: its first line says so.
func isOurPage(path string) bool {
	text, err := untrusted.ReadFile(path, mostShared)
	first, _, _ := strings.Cut(string(text), "\n")
	return err == nil && strings.HasPrefix(first, ".TH SERVICE-PROXY-AGENT") &&
		strings.HasSuffix(first, " service-proxy-agent Manual")
}

// mostShared is more than one of these files has.
const mostShared = 1 << 20

// sharedRoot is the folder of an archive in which they are as they shall be on the VM.
const sharedRoot = "root"

// placeShared lays down what the archive brings of them, and takes away what an earlier one has
// brought and this one has not. The VM does without, so that what goes wrong is told, and is no
// failure.
func (b *bootstrapper) placeShared(archive string) {
	from := filepath.Join(archive, sharedRoot)
	wanted := sharedIn(from)
	var errs []error
	for _, name := range wanted {
		if _, err := os.Stat(b.path(filepath.Dir(name))); err != nil &&
			!strings.HasPrefix(name, layout.Archive.ShareDir) {
			continue // that shell is not here
		}
		errs = append(errs, placeText(filepath.Join(from, name), b.path(name)))
	}
	for _, name := range sharedIn(b.path("/")) {
		if !slices.Contains(wanted, name) {
			errs = append(errs, os.Remove(b.path(name)))
		}
	}
	if err := errors.Join(errs...); err != nil {
		b.Log.Warn("cannot install the manual and the shells' completion", zap.Error(err))
	}
}

func placeText(from, to string) error {
	text, err := untrusted.ReadFile(from, mostShared)
	if err != nil {
		return err
	}
	if have, err := os.ReadFile(to); err == nil && bytes.Equal(have, text) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	return atomicfile.Write(to, text, 0o644)
}

// removeShared removes them; their folders are everybody's.
func (r *removal) removeShared() {
	for _, name := range sharedIn(r.path("/")) {
		if err := os.Remove(r.path(name)); err != nil {
			r.errs = append(r.errs, fmt.Errorf("remove: %w", err))
			continue
		}
		r.done = append(r.done, "removed "+name)
	}
}
