package bootstrap

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/internal/atomicfile"
)

// shareDir holds what a person uses beside the program: its manual, and what completes a command
// line. Everything that reads such files looks beneath /usr/local, too, which no package owns.
const shareDir = "/usr/local/share"

// shared are the files there that are ours, and those beneath share in an archive.
var shared = []string{
	"man/man8/service-proxy-agent*.8",
	"bash-completion/completions/service-proxy-agent",
	"zsh/site-functions/_service-proxy-agent",
	"fish/vendor_completions.d/service-proxy-agent.fish",
}

// sharedIn are the files of ours beneath a folder, relative to it.
func sharedIn(dir string) (names []string) {
	for _, pattern := range shared {
		found, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			continue // no pattern of ours is malformed
		}
		for _, path := range found {
			names = append(names, filepath.Join(filepath.Dir(pattern), filepath.Base(path)))
		}
	}
	return names
}

// placeShared lays down what the archive brings of these, and takes away what an earlier one has
// brought and this one has not. The VM does without them, so that what goes wrong is told, and is no
// failure.
func (b *bootstrapper) placeShared(archive string) {
	from, to := filepath.Join(archive, "share"), b.path(shareDir)
	wanted := sharedIn(from)
	var errs []error
	for _, name := range wanted {
		errs = append(errs, placeText(filepath.Join(from, name), filepath.Join(to, name)))
	}
	for _, name := range sharedIn(to) {
		if !slices.Contains(wanted, name) {
			errs = append(errs, os.Remove(filepath.Join(to, name)))
		}
	}
	if err := errors.Join(errs...); err != nil {
		b.Log.Warn("cannot install the manual and the shells' completion", zap.Error(err))
	}
}

func placeText(from, to string) error {
	text, err := os.ReadFile(from)
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
	removed := 0
	for _, name := range sharedIn(r.path(shareDir)) {
		if err := os.Remove(filepath.Join(r.path(shareDir), name)); err != nil {
			r.errs = append(r.errs, fmt.Errorf("remove: %w", err))
			continue
		}
		removed++
	}
	if removed > 0 {
		r.done = append(r.done, fmt.Sprintf("removed %d files of the manual and the shells' completion "+
			"in %s", removed, shareDir))
	}
}
