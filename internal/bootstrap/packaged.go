package bootstrap

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/service-proxy-agent/service-proxy-agent/internal/atomicfile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/layout"
	"github.com/service-proxy-agent/service-proxy-agent/internal/neighbour"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// Where a distribution's package has brought the agent, bootstrap does all that it does elsewhere
// but for the package's files, which the package manager puts there and takes away. The archive and
// a package of one VM would have two units of each name, of which systemd takes the archive's. So a
// package that comes over an archive's installation takes its place (Adopt), and an archive is not
// installed over a package.

// PackageName is the agent's, with which its files come and go.
const PackageName = "service-proxy-agent"

// madeFile says what the package has made that was not there before, a user, a group or a folder a
// line: what its purge removes. The package's scripts write and read it, and Remove adds what
// bootstrap has made.
const madeFile = "/var/lib/service-proxy-agent.made"

// seenUnitFile is Envoy's unit as it was at the last look of this boot, by which an upgrade of the
// package is noticed: it has put the new one into place before any program of ours runs.
const seenUnitFile = "/run/service-proxy-envoy-unit"

// refuseBesidePackage is why an archive cannot be installed: a package has the agent.
func (b *bootstrapper) refuseBesidePackage() error {
	unit := filepath.Join(layout.Packages.UnitDir, systemd.AgentUnit)
	if !layout.Here.Packaged && (!b.exists(layout.Packages.Agent) || !b.exists(unit)) {
		return nil
	}
	return fmt.Errorf("the package %s has installed the agent here (%s), and systemd would take the "+
		"archive's units in place of the package's, so nothing was changed; upgrade it with the "+
		"package manager, or remove the package first", PackageName, layout.Packages.Agent)
}

// noteSeenUnit is noteUnit for a package. What only the place of our program tells apart needs no
// start: the supervisor that runs goes on.
func (b *bootstrapper) noteSeenUnit() error {
	ours, err := os.ReadFile(b.path(filepath.Join(layout.Here.UnitDir, systemd.EnvoyUnit)))
	if err != nil {
		return err
	}
	have, err := os.ReadFile(b.path(seenUnitFile))
	switch {
	case err == nil && string(have) == string(ours):
		return nil
	case err == nil && systemd.NeedsStart(layout.Here.Text(string(have)), systemd.EnvoyUnit):
		if err := b.markUnitChanged("its unit is another now"); err != nil {
			return err
		}
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return err
	}
	return atomicfile.Write(b.path(seenUnitFile), ours, 0o644)
}

// Adopt takes away what a release archive has installed on this VM, for the package that is being
// installed in its place, and returns what it did, one line each. Rules, Envoy, configuration and
// state stay as they are, and so does which units are enabled. The package's scripts call it.
func Adopt(opts Options) (done []string, err error) {
	b := newBootstrapper(opts)
	if b.Root == "" && os.Geteuid() != 0 {
		return nil, fmt.Errorf("adopt: %w; run as root", fs.ErrPermission)
	}
	if !layout.Here.Packaged {
		return nil, errors.New("adopt: this program is an archive's, which Install puts into place")
	}
	r := &removal{bootstrapper: b}
	b.adopt(r)
	if err := errors.Join(r.errs...); err != nil {
		return r.done, fmt.Errorf("adopt: %w", err)
	}
	return r.done, nil
}

func (b *bootstrapper) adopt(r *removal) {
	envoyUnit := filepath.Join(layout.Archive.UnitDir, systemd.EnvoyUnit)
	if text, err := os.ReadFile(b.path(envoyUnit)); err == nil && !b.exists(seenUnitFile) {
		// It is what the Envoy that runs was started as.
		r.errs = append(r.errs, atomicfile.Write(b.path(seenUnitFile), text, 0o644))
	}
	others, err := neighbour.Units(b.Root)
	if err != nil {
		r.errs = append(r.errs, err)
		return
	}
	theirs := map[string]bool{}
	for _, unit := range others { // of another agent, which is told of and not touched
		theirs[unit.Path] = true
	}
	r.moveLinks()
	for _, file := range systemd.FilesIn(layout.Archive) {
		if !theirs[file.Path] {
			r.remove(file.Path)
		}
	}
	r.removeShared()
	if isOurBinary(b.path(layout.Archive.Agent)) {
		r.remove(layout.Archive.Agent)
	}
	// No longer a source of Envoy, nor anything to roll back to.
	r.remove(archiveDir, b.previousOf(layout.Archive.Agent))
}

// moveLinks has the links by which the archive's units are enabled lead to the package's.
func (r *removal) moveLinks() {
	links, err := filepath.Glob(r.path(filepath.Join(systemd.ConfDir, "*.wants", "service-proxy-*")))
	if err != nil {
		r.errs = append(r.errs, err)
	}
	for _, link := range links {
		to, err := os.Readlink(link)
		name, is := strings.CutPrefix(to, layout.Archive.UnitDir+"/")
		if err != nil || !is {
			continue
		}
		err = os.Remove(link)
		if err == nil {
			err = os.Symlink(filepath.Join(layout.Here.UnitDir, name), link)
		}
		if err != nil {
			r.errs = append(r.errs, err)
			continue
		}
		r.done = append(r.done, strings.TrimPrefix(link, r.Root)+" leads to the package's unit")
	}
}

// noteMade adds to madeFile what a purge is to remove of what bootstrap has made.
func (b *bootstrapper) noteMade(names ...string) error {
	text, err := os.ReadFile(b.path(madeFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	all := string(text)
	for _, name := range names {
		if !strings.Contains("\n"+all, "\n"+name+"\n") {
			all += name + "\n"
		}
	}
	if all == string(text) {
		return nil
	}
	return atomicfile.Write(b.path(madeFile), []byte(all), 0o644)
}
