package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/layout"
	"github.com/service-proxy-agent/service-proxy-agent/internal/logs"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// Units in the order in which Remove stops them: who would put the rules back, and after the rules
// who needs them.
var (
	unitsOverRules = []string{systemd.BootstrapPath, systemd.ReadyPath, systemd.RotateTimer,
		systemd.BootstrapUnit, systemd.ReadyTarget, systemd.ReadyUnit, systemd.AgentUnit}
	unitsUnderRules = []string{systemd.InterceptionUnit, systemd.EnvoyUnit}
	enabledUnits    = []string{systemd.BootstrapPath, systemd.ReadyPath, systemd.RotateTimer,
		systemd.BootstrapUnit, systemd.AgentUnit, systemd.EnvoyUnit}
)

// Remove takes everything of ours off the VM and returns what it did and what it left, one line
// each. The kernel's rules go first, by clean; where that fails Envoy is left running, since rules
// without it would cut the VM off. It goes on after any other error.
func Remove(
	ctx context.Context, opts Options, clean func(context.Context) (removed []string, err error),
) (done []string, err error) {
	b := newBootstrapper(opts)
	if b.Root == "" && os.Geteuid() != 0 {
		return nil, fmt.Errorf("remove: %w; run as root", fs.ErrPermission)
	}
	unlock, err := b.lockInstall(ctx)
	if err != nil {
		return nil, fmt.Errorf("remove: %w", err)
	}
	defer func() {
		_ = os.Remove(b.path(installLock)) // made by this very run, at the latest
		unlock()
	}()
	// Without it a binary of ours is taken for the administrator's and left.
	state, _ := progress.Read(b.path(progress.StateDir))
	r := &removal{bootstrapper: b}
	r.done = b.endRetry(ctx, false) // it would install all of it again
	h, err := b.readHandover()
	if err != nil {
		return r.done, fmt.Errorf("remove: %w", err)
	}
	over, under := b.present(unitsOverRules), b.present(unitsUnderRules)
	unit, theirs, err := b.others(h, over)
	r.unitOfOthers = unit
	switch {
	case err != nil:
		return r.done, fmt.Errorf("remove: %w", err)
	case theirs:
		r.done = append(r.done, "left the rules, which are those of another agent")
		r.stop(ctx, slices.DeleteFunc(slices.Clone(over),
			func(name string) bool { return unit && name == systemd.AgentUnit }))
		if err := r.keepRules(ctx); err != nil {
			return r.done, fmt.Errorf("remove: %w; try again", err)
		}
		r.stop(ctx, b.present([]string{systemd.EnvoyUnit}))
	case h != nil:
		if err := r.giveBack(ctx, h, over); err != nil {
			return r.done, fmt.Errorf("remove: the agent that was here before could not be given back, so "+
				"the rest of ours was left: %w; try again", errors.Join(append(r.errs, err)...))
		}
	default:
		// The rules go when nobody runs any longer who would put them back, and before Envoy does.
		r.stop(ctx, over)
		// The interception unit's stop does this, too, but a stop whose command failed is a stop all the
		// same (seen: status 219, no cgroup for the command).
		removed, err := clean(ctx)
		r.done = append(r.done, removed...)
		if err != nil {
			return r.done, fmt.Errorf("remove: the rules could not be taken out, so Envoy was left "+
				"running: %w; try again", errors.Join(append(r.errs, err)...))
		}
		r.stop(ctx, under)
	}
	r.removeUnits(ctx, len(over)+len(under) > 0)
	if !layout.Here.Packaged {
		r.removeShared()
	}
	failed := len(r.errs)
	r.removeFiles(state, h)
	if !layout.Here.Packaged {
		r.removeUsers(ctx, state)
	}
	if b.KeepState {
		r.leaveForPurge(state)
	}
	if len(r.errs) == failed {
		r.remove(layout.KeptDir) // with it what was kept for a next try
		if !b.KeepState {
			r.remove(progress.StateDir)
		}
		if !h.kept(layout.Here.Agent) && !layout.Here.Packaged {
			r.remove(layout.Here.Agent)
		}
	} else { // without the state the next try would take our Envoy for yours
		r.done = append(r.done, "left "+progress.StateDir+" and "+layout.Here.Agent+", to try again with")
	}
	if _, err := os.Stat(b.path("/etc/default/service-proxy-agent")); err == nil {
		r.done = append(r.done, "left /etc/default/service-proxy-agent, which is yours")
	}
	if layout.Here.Packaged && !b.KeepState {
		r.done = append(r.done, "left the program, its units and its users, which are those of the "+
			"package "+PackageName+": remove that with the package manager")
	}
	return r.done, errors.Join(r.errs...)
}

// removal is what one Remove has done, and what went wrong.
type removal struct {
	*bootstrapper
	done []string
	errs []error
	// unitOfOthers: the unit of our agent's name is another agent's.
	unitOfOthers bool
}

// present are the units that are there: systemctl stops nothing of a list in which it does not know
// one.
func (b *bootstrapper) present(units []string) (there []string) {
	for _, unit := range units {
		if _, err := os.Stat(b.path(filepath.Join(layout.Here.UnitDir, unit))); err == nil {
			there = append(there, unit)
		}
	}
	return there
}

func (r *removal) run(ctx context.Context, limit time.Duration, args ...string) {
	if err := r.systemctl(ctx, limit, args...); err != nil {
		r.errs = append(r.errs, err)
		return
	}
	r.done = append(r.done, "systemctl "+strings.Join(args, " "))
}

// stop stops the units one by one, in this order.
func (r *removal) stop(ctx context.Context, units []string) {
	for _, unit := range units {
		r.run(ctx, 2*time.Minute, "stop", unit)
	}
}

func (r *removal) removeUnits(ctx context.Context, some bool) {
	enabled := enabledUnits
	if r.KeepState { // the package manager keeps that in mind until its purge
		enabled = nil
	}
	for _, unit := range r.present(enabled) {
		if unit == systemd.AgentUnit && r.unitOfOthers {
			continue // by its name, which is all that systemctl goes by
		}
		r.run(ctx, time.Minute, "disable", unit)
	}
	removed, err := systemd.Remove(r.Root + "/")
	for _, path := range removed {
		r.done = append(r.done, "removed "+path)
	}
	r.errs = append(r.errs, err)
	if slices.Contains(removed, systemd.CatalogFile()) {
		if out, err := r.exec(ctx, time.Minute, "journalctl", "--update-catalog"); err != nil {
			r.done = append(r.done, "left the words of our messages in "+systemd.CatalogDatabase+": "+
				said(err, out).Error())
		}
	}
	if some {
		r.run(ctx, time.Minute, "daemon-reload")
	}
}

// removeFiles removes what bootstrap writes. An Envoy that was here before stays, and so does the
// folder of its logs.
func (r *removal) removeFiles(state progress.State, h *handover) {
	paths := []string{archiveDir, previousDir, rolledBackFile,
		progress.RuntimeDir, restartFile, unitChangedFile, seenUnitFile, lockFile}
	switch {
	case r.KeepState:
	case h != nil && h.LogDir:
		r.done = append(r.done, "left "+logs.Dir+", which was here before")
	default:
		paths = append(paths, logs.Dir)
	}
	if !r.KeepState {
		paths = append(paths, EnvoyConfig, progress.OwnerFile, filepath.Dir(EnvoyConfig))
	}
	switch {
	case h.kept(EnvoyBinary): // and was brought back
	case state.PrimarySum != "":
		paths = slices.Insert(paths, 0, EnvoyBinary)
	case r.exists(EnvoyBinary):
		r.done = append(r.done, "left "+EnvoyBinary+", which was here before")
	}
	r.remove(paths...)
}

// leaveForPurge notes what the package's purge is to remove of what bootstrap has made as an
// archive's. What was here when the package came, its postinst has looked at.
func (r *removal) leaveForPurge(state progress.State) {
	var made []string
	for _, name := range []string{AgentUser, EnvoyUser} {
		if slices.Contains(state.MadeUsers, name) {
			made = append(made, "user "+name)
		}
	}
	if state.MadeLogs {
		made = append(made, logs.Dir)
	}
	if err := r.noteMade(made...); err != nil {
		r.errs = append(r.errs, err)
	}
	r.done = append(r.done, "left state, configuration and logs, which a purge removes")
}

func (r *removal) remove(paths ...string) {
	for _, path := range paths {
		if _, err := os.Lstat(r.path(path)); err != nil {
			continue
		}
		remove := os.RemoveAll
		if path == filepath.Dir(EnvoyConfig) {
			remove = os.Remove // people may keep files of their own there
		}
		err := remove(r.path(path))
		if errors.Is(err, syscall.ENOTEMPTY) {
			r.done = append(r.done, "left "+path+", which has files of yours")
			continue
		}
		if err != nil {
			r.errs = append(r.errs, fmt.Errorf("remove: %w", err))
			continue
		}
		r.done = append(r.done, "removed "+path)
	}
}

// noSuchUser is userdel's exit code, of its man page.
const noSuchUser = 6

// removeUsers removes the users that bootstrap has made, and no other name that the state may hold:
// the daemon's user may write it.
func (r *removal) removeUsers(ctx context.Context, state progress.State) {
	for _, name := range []string{AgentUser, EnvoyUser} {
		if !slices.Contains(state.MadeUsers, name) {
			continue
		}
		out, err := r.exec(ctx, time.Minute, "userdel", name)
		var exit *exec.ExitError
		if errors.As(err, &exit) && exit.ExitCode() == noSuchUser {
			continue // an earlier try, or somebody, removed it
		}
		if err != nil {
			r.errs = append(r.errs, said(err, out))
			continue
		}
		r.done = append(r.done, "removed user "+name)
	}
}
