package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/internal/layout"
	"github.com/service-proxy-agent/service-proxy-agent/internal/logs"
	"github.com/service-proxy-agent/service-proxy-agent/internal/users"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// InstallUnits installs the units of this binary, for Rollback, which calls the older one.
func InstallUnits(ctx context.Context, opts Options) error {
	b := newBootstrapper(opts)
	if failure := failed(StepUnits, b.installUnits(ctx), ofDisk); failure != nil {
		return failure
	}
	return nil
}

// installUnits writes the units, makes the users and folders, and enables what starts at boot.
func (b *bootstrapper) installUnits(ctx context.Context) error {
	if err := b.noteUnit(); err != nil {
		return err
	}
	held, err := b.yield(ctx)
	if err != nil {
		return err
	}
	var changed []string
	if !layout.Here.Packaged {
		if changed, err = systemd.Install(b.Root + "/"); err != nil {
			return err
		}
	}
	if len(changed) > 0 {
		b.say("INFO", fmt.Sprintf("installed %d units and their files", len(changed)))
	}
	missing := b.missingUsers()
	if err := b.makeUsers(ctx); err != nil {
		return err
	}
	if len(missing) > 0 {
		b.state.MadeUsers, b.state.MadeLogs = missing, !b.exists(logs.Dir)
		b.say("INFO", "made users "+strings.Join(missing, ", "))
		b.save()
	}
	folders := b.path(layout.Here.TmpfilesDir + "/service-proxy-agent.conf")
	if out, err := b.exec(ctx, time.Minute, "systemd-tmpfiles", "--create", folders); err != nil {
		return said(err, out)
	}
	b.updateCatalog(ctx)
	if len(changed) > 0 {
		if err := b.systemctl(ctx, time.Minute, "daemon-reload"); err != nil {
			return &Failure{Err: err} // no file's of ours
		}
	}
	units := []string{systemd.AgentUnit, systemd.BootstrapUnit, systemd.BootstrapPath,
		systemd.ReadyPath, systemd.RotateTimer}
	if held {
		units = units[1:]
	}
	if err := b.enable(ctx, units...); err != nil {
		return &Failure{Err: err}
	}
	return nil
}

// noteUnit remembers that Envoy's unit is about to be another than the one that it was started as,
// where that needs a start: an Envoy that takes over from the one that runs does so in its unit.
func (b *bootstrapper) noteUnit() error {
	if layout.Here.Packaged {
		return b.noteSeenUnit()
	}
	have, err := os.ReadFile(b.path(filepath.Join(layout.Here.UnitDir, systemd.EnvoyUnit)))
	if err != nil || !systemd.NeedsStart(string(have), systemd.EnvoyUnit) {
		return nil
	}
	return b.markUnitChanged("its unit is another now")
}

// updateCatalog has the journal know the catalog of this version, for `journalctl -x`. The database
// is made of all catalogs, so it is older than ours where it does not have it yet. Without it the
// log is as good: a failure is told, and the next run tries again. Of a package its scripts have it
// done, or systemd's.
func (b *bootstrapper) updateCatalog(ctx context.Context) {
	if layout.Here.Packaged {
		return
	}
	ours, err := os.Stat(b.path(systemd.CatalogFile()))
	if err != nil {
		return
	}
	all, err := os.Stat(b.path(systemd.CatalogDatabase))
	if err == nil && !all.ModTime().Before(ours.ModTime()) {
		return
	}
	if out, err := b.exec(ctx, time.Minute, "journalctl", "--update-catalog"); err != nil {
		b.Log.Warn("journalctl -x will not explain our messages", zap.Error(said(err, out)))
	}
}

// enable enables the units that are not, but for those that the administrator has masked. A
// package's scripts have enabled its units: one that is disabled is so by the administrator, or by
// Remove, and stays that.
func (b *bootstrapper) enable(ctx context.Context, units ...string) error {
	return b.enableBut(ctx, layout.Here.Packaged, units...)
}

// enableBut is enable, which leaves the disabled ones where it is told to. It is one call, as each
// has systemd read all its units again.
func (b *bootstrapper) enableBut(ctx context.Context, disabled bool, units ...string) error {
	args := []string{"enable"}
	for _, unit := range units {
		// Its exit code says no more than its word.
		out, err := b.exec(ctx, time.Minute, "systemctl", "is-enabled", unit)
		switch word := strings.TrimSpace(out); {
		case word == "enabled":
		case word == "masked", word == "masked-runtime":
			b.masked = append(b.masked, unit)
			b.Log.Warn("leaving a masked unit alone", zap.String("unit", unit))
		case word == "disabled" && disabled:
			b.disabled = append(b.disabled, unit)
			b.Log.Info("leaving a disabled unit alone", zap.String("unit", unit))
		case word == "":
			return fmt.Errorf("ask whether %s is enabled: %w", unit, err)
		default:
			args = append(args, unit)
		}
	}
	if len(args) == 1 {
		return nil
	}
	return b.systemctl(ctx, time.Minute, args...)
}

// missingUsers are those of ours that the VM does not have. Beneath another root there are none to
// ask.
func (b *bootstrapper) missingUsers() []string {
	var missing []string
	for _, name := range []string{AgentUser, EnvoyUser} {
		if _, _, err := lookup(name); b.Root == "" && err != nil {
			missing = append(missing, name)
		}
	}
	return missing
}

// makeUsers makes the users that are missing, by systemd-sysusers where it is there.
func (b *bootstrapper) makeUsers(ctx context.Context) error {
	users := b.path(layout.Here.SysusersDir + "/service-proxy-agent.conf")
	out, err := b.exec(ctx, time.Minute, "systemd-sysusers", users)
	if err == nil {
		return nil
	}
	if !errors.Is(err, exec.ErrNotFound) {
		return said(err, out)
	}
	for _, name := range []string{AgentUser, EnvoyUser} {
		if _, err := b.exec(ctx, time.Minute, "getent", "passwd", name); err == nil {
			continue
		}
		out, err := b.exec(ctx, time.Minute, "useradd", "--system", "--user-group",
			"--no-create-home", "--home-dir", "/nonexistent", "--shell", "/usr/sbin/nologin", name)
		if err != nil {
			return said(err, out)
		}
	}
	return nil
}

func lookup(name string) (uid, gid int, err error) {
	u, g, err := users.IDs(name)
	return int(u), int(g), err
}
