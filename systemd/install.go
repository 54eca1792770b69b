package systemd

import (
	"bytes"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unicode"

	"github.com/service-proxy-agent/service-proxy-agent/internal/atomicfile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/layout"
)

// The units, by name.
const (
	AgentUnit        = "service-proxy-agent.service"
	InterceptionUnit = "service-proxy-interception.service"
	EnvoyUnit        = "service-proxy-envoy.service"
	BootstrapUnit    = "service-proxy-bootstrap.service"
	BootstrapPath    = "service-proxy-bootstrap.path"
	ReadyTarget      = "service-proxy-ready.target"
	ReadyUnit        = "service-proxy-ready.service"
	ReadyPath        = "service-proxy-ready.path"
	RotateTimer      = "service-proxy-rotate.timer"
	RotateUnit       = "service-proxy-rotate.service"
)

// ConfDir is for drop-ins that depend on the VM. Units there could not be masked: ours are in a
// folder that systemd reads between the administrator's and the distribution's, or in the
// distribution's own (internal/layout). See docs/design/facts.md#systemd-masks-by-a-link.
const ConfDir = "/etc/systemd/system"

// CatalogDatabase is made of all the journal's catalogs by `journalctl --update-catalog`, and only
// then do readers find ours.
const CatalogDatabase = "/var/lib/systemd/catalog/database"

// CatalogFile is the journal's catalog of the agent's messages.
func CatalogFile() string { return layout.Here.CatalogDir + "/service-proxy-agent.catalog" }

// ReadyFile is what the agent writes into its runtime folder when it is ready:
// service-proxy-ready.path starts the target then.
const ReadyFile = "ready"

// HungFile is what the agent's unit leaves in its runtime folder when systemd's watchdog has ended
// it, so that the next run can tell.
const HungFile = "hung"

//go:embed units tmpfiles.d sysusers.d catalog
var embedded embed.FS

// File is one file of the units' set.
type File struct {
	Path string // absolute
	Text []byte
}

// Files are the units and what goes with them, sorted by path.
func Files() []File { return FilesIn(layout.Here) }

// FilesIn are those of a layout.
func FilesIn(l layout.Layout) []File {
	var files []File
	for folder, dir := range map[string]string{
		"units": l.UnitDir, "tmpfiles.d": l.TmpfilesDir,
		"sysusers.d": l.SysusersDir, "catalog": l.CatalogDir,
	} {
		entries, err := embedded.ReadDir(folder)
		if err != nil {
			panic(err) // embedded at build time
		}
		for _, entry := range entries {
			text, err := embedded.ReadFile(folder + "/" + entry.Name())
			if err != nil {
				panic(err)
			}
			files = append(files, File{filepath.Join(dir, entry.Name()), []byte(l.Text(string(text)))})
		}
	}
	slices.SortFunc(files, func(a, b File) int { return strings.Compare(a.Path, b.Path) })
	return files
}

// Install writes the files that are missing or differ, beneath root ("/" on a VM), and returns
// their paths. The caller reloads systemd when there are any.
func Install(root string) (changed []string, err error) {
	for _, file := range Files() {
		path := filepath.Join(root, file.Path)
		if have, err := os.ReadFile(path); err == nil && bytes.Equal(have, file.Text) {
			continue
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return changed, fmt.Errorf("install %q: %w", file.Path, err)
		}
		if err := atomicfile.Write(path, file.Text, 0o644); err != nil {
			return changed, fmt.Errorf("install %q: %w", file.Path, err)
		}
		changed = append(changed, file.Path)
	}
	return changed, nil
}

// Remove deletes what Install wrote, which is nothing where a package has it, and the drop-ins, and
// returns the paths.
func Remove(root string) (removed []string, err error) {
	var errs []error
	var files []File
	if !layout.Here.Packaged {
		files = Files()
	}
	for _, file := range files {
		switch err := os.Remove(filepath.Join(root, file.Path)); {
		case err == nil:
			removed = append(removed, file.Path)
		case !errors.Is(err, fs.ErrNotExist):
			errs = append(errs, fmt.Errorf("remove %q: %w", file.Path, err))
		}
	}
	for _, unit := range []string{EnvoyUnit, RotateUnit} {
		switch changed, err := SetWritable(root, unit, ""); {
		case err != nil:
			errs = append(errs, err)
		case changed:
			removed = append(removed, AccessLogDropIn(unit))
		}
	}
	return removed, errors.Join(errs...)
}

// AccessLogDropIn is where SetWritable keeps a unit's right.
func AccessLogDropIn(unit string) string {
	return filepath.Join(ConfDir, unit+".d", "50-service-proxy-access-log.conf")
}

// SetWritable gives a unit the right to write in dir, for an access log outside /var/log/envoy, by
// a drop-in beneath root; "" takes the drop-in away. It says whether anything changed. The path
// must be absolute and clean. See docs/design/facts.md#systemd-reads-few-escapes.
func SetWritable(root, unit, dir string) (changed bool, err error) {
	path := filepath.Join(root, AccessLogDropIn(unit))
	if dir == "" {
		if err := os.Remove(path); errors.Is(err, fs.ErrNotExist) {
			return false, nil
		} else if err != nil {
			return false, fmt.Errorf("remove drop-in: %w", err)
		}
		_ = os.Remove(filepath.Dir(path)) // stays where the administrator has drop-ins too
		return true, nil
	}
	quoted, err := quotePath(dir)
	if err != nil {
		return false, err
	}
	text := []byte(
		"# Written by service-proxy-agent bootstrap: the attribute's access-log is outside " +
			"/var/log/envoy.\n[Service]\nReadWritePaths=" + quoted + "\n")
	if have, err := os.ReadFile(path); err == nil && bytes.Equal(have, text) {
		return false, nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return false, fmt.Errorf("install drop-in: %w", err)
	}
	return true, atomicfile.Write(path, text, 0o644)
}

// quotePath writes a path as one quoted word of ReadWritePaths=, to be skipped where it does
// not exist ("-"): specifiers doubled (systemd.unit(5)), quotes and backslashes escaped.
// systemd reads no \x20 there (config_parse_namespace_path_strv unquotes only), so control
// characters cannot be written.
func quotePath(path string) (string, error) {
	if !filepath.IsAbs(path) || filepath.Clean(path) != path ||
		strings.ContainsFunc(path, unicode.IsControl) {
		return "", fmt.Errorf("path %q in a unit: want it absolute, clean and without control characters",
			path)
	}
	return `"-` + strings.NewReplacer("%", "%%", `"`, `\"`, `\`, `\\`).Replace(path) + `"`, nil
}
