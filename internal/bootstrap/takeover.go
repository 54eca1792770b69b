package bootstrap

import (
	"context"
	"debug/buildinfo"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/internal/atomicfile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/drain"
	"github.com/service-proxy-agent/service-proxy-agent/internal/layout"
	"github.com/service-proxy-agent/service-proxy-agent/internal/logs"
	"github.com/service-proxy-agent/service-proxy-agent/internal/neighbour"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/internal/sockdiag"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// Google's closed agent has our unit's name, our chains, and Envoy's ports. So ours cannot run
// beside it, and takes its place where that is asked for: by `bootstrap --take-over`, or by
// installing a release archive over it. Nobody else is fought: a run of bootstrap that finds
// it says so.
//
// It goes on until ours has all that it needs (packages, an Envoy that accepts its configuration):
// what cannot be finished changes nothing. Then, in moments:
//
//   - its unit is moved aside, its agent is killed, and none of what it would run at its end is
//     run: nobody knows what that takes out of the kernel. Its chains and jumps stay as they are.
//   - its Envoy serves on, is drained, and ours is started in its place, as an upgrade does it. New
//     connections are refused in between, and none goes past.
//   - our daemon adopts the chains, which have our names, as those of an earlier run of its own.
//
// All of that is done apart from bootstrap's unit, by a transient one: the sandbox of the former
// hides the processes that it is about, and whoever kills the one leaves the other.

const (
	// takeOverUnit is the transient unit.
	takeOverUnit = "service-proxy-take-over.service"
	// takeOverLimit is how long it may take: draining, stopping and starting an Envoy.
	takeOverLimit = 2 * time.Minute
	// guardFile is a drop-in of our agent's unit for as long as the closed agent's processes are in
	// it: it would else be killed for not answering our watchdog, all of its processes at once, and
	// started anew as ours.
	guardFile = runUnits + "/" + systemd.AgentUnit + ".d/50-take-over.conf"
	guard     = "# Written by service-proxy-agent bootstrap while it takes over from another " +
		"agent.\n[Service]\nRestart=no\nWatchdogSec=0\nKillMode=process\nExecStop=\nExecStopPost=\n"
)

// them is what is seen of the closed agent.
type them struct {
	units []neighbour.Unit
	neighbour.Found
}

// here says whether anything of it is in the way of ours.
func (t them) here() bool {
	return len(t.Agents) > 0 || slices.ContainsFunc(t.units,
		func(u neighbour.Unit) bool { return u.First })
}

// neighbours looks for the closed agent, its processes included: nothing may hide them.
func (b *bootstrapper) neighbours() (t them, err error) {
	if t.units, err = neighbour.Units(b.Root); err != nil {
		return t, err
	}
	var programs []string
	for _, unit := range t.units {
		programs = append(programs, unit.Program)
	}
	all, err := b.processes([]uint16{attribute.OutboundPort, attribute.EnvoyAdminPort},
		programs...)
	if err != nil {
		return t, err
	}
	t.Found = neighbour.Sort(all, t.units)
	return t, nil
}

// theirsRuns says by systemd whether the closed agent runs in our agent's unit, for where processes
// are hidden: the unit is up, and nobody answers on our socket.
func (b *bootstrapper) theirsRuns(ctx context.Context) bool {
	out, _ := b.exec(ctx, time.Minute, "systemctl", "is-active", systemd.AgentUnit) // says it in words
	return strings.TrimSpace(out) == "active" && !daemonRuns()
}

// yield says whether our agent's unit is to be left alone, because another agent has it and is to
// have it for a while yet. It is an error where that was not asked for to end.
func (b *bootstrapper) yield(ctx context.Context) (held bool, err error) {
	h, err := b.readHandover()
	if err != nil {
		return false, err
	}
	units, err := neighbour.Units(b.Root)
	if err != nil {
		return false, err
	}
	first := slices.IndexFunc(units, func(u neighbour.Unit) bool { return u.First })
	switch {
	case h.under(handoverWanted, handoverTaking):
		return true, b.keepReplaced(h, units)
	case h.under(handoverGiving):
		return false, &Failure{Err: errors.New("the agent that was here before is being given back"),
			Advice: "run bootstrap --remove again, or install the archive anew", Permanent: true}
	case len(units) == 0, first < 0 && !b.theirsRuns(ctx):
		return false, nil // nothing of it, or behind ours
	case daemonRuns():
		return true, nil // it has come to lie beside ours, which goes on and tells of it
	}
	unit := units[max(first, 0)]
	return false, &Failure{Permanent: true, Advice: "nothing of it is touched; " +
		"run service-proxy-agent bootstrap --take-over to have ours in its place",
		Err: fmt.Errorf("another agent, Google's as it seems, has the unit %s (%s)",
			systemd.AgentUnit, unit.Path)}
}

// keepReplaced keeps a unit of theirs that lies where ours is about to be written.
func (b *bootstrapper) keepReplaced(h *handover, units []neighbour.Unit) error {
	for _, unit := range units {
		if filepath.Dir(unit.Path) != layout.Here.UnitDir {
			continue
		}
		file := keptFile{Path: unit.Path, Replaced: true}
		h.note(file)
		if err := errors.Join(b.writeHandover(h), b.keep(file)); err != nil {
			return err
		}
	}
	return nil
}

// want writes down that ours is to take the place of what was seen, and what a new binary of ours
// would overwrite. Without anything running it is done at once. It says whether anything was there.
func (b *bootstrapper) want(ctx context.Context, by string) (is bool, err error) {
	t, err := b.neighbours()
	if err != nil {
		return false, err
	}
	h, err := b.readHandover()
	if err != nil {
		return false, err
	}
	if h.under(handoverTaking) {
		return true, nil
	}
	if !t.here() && !h.under(handoverWanted, handoverGiving) {
		return false, nil
	}
	if h == nil {
		h = &handover{LogDir: b.exists(logs.Dir) && !b.exists(progress.StateDir)}
	}
	if !h.under(handoverWanted) {
		h.Phase, h.By, h.Failure, h.Active = handoverWanted, by, "", false
	}
	h.Active = h.Active || len(t.Agents) > 0
	inPlace := func(u neighbour.Unit) bool { return u.Program == layout.Here.Agent }
	if slices.ContainsFunc(t.units, inPlace) && b.exists(layout.Here.Agent) &&
		!isOurBinary(b.path(layout.Here.Agent)) {
		file := keptFile{Path: layout.Here.Agent, Replaced: true}
		h.note(file)
		if err := errors.Join(b.writeHandover(h), b.keep(file)); err != nil {
			return false, err
		}
	}
	if len(t.Agents)+len(t.Envoys) > 0 {
		b.say("INFO", "taking over from another agent, Google's as it seems ("+seen(t)+"): it goes on "+
			"until ours is ready")
		if err := b.writeHandover(h); err != nil {
			return false, err
		}
		return true, b.setGuard(ctx, t)
	}
	// It does not run: what stands in the way is moved, and that is all.
	files, err := b.shadows(t.units)
	if err != nil {
		return false, err
	}
	if err := b.keepReplaced(h, t.units); err != nil {
		return false, err
	}
	files = slices.DeleteFunc(files, func(f keptFile) bool {
		return filepath.Dir(f.Path) == layout.Here.UnitDir
	})
	moved, err := b.moveAside(h, b.unmoved(h, files))
	if err != nil {
		return false, err
	}
	h.Phase = handoverTaken
	if err := b.writeHandover(h); err != nil {
		return false, err
	}
	b.say("INFO", "moved aside the units of another agent, Google's as it seems, which did not run: "+
		strings.Join(moved, ", "))
	return true, b.systemctl(ctx, time.Minute, "daemon-reload")
}

// seen is what was seen, for people.
func seen(t them) string {
	var said []string
	for _, unit := range t.units {
		said = append(said, unit.Path)
	}
	for _, p := range t.Agents {
		said = append(said, p.String())
	}
	return progress.OneLine(strings.Join(said[:min(len(said), 3)], "; "))
}

// setGuard protects running processes of theirs from our unit, where that is taken for theirs.
func (b *bootstrapper) setGuard(ctx context.Context, t them) error {
	first := slices.ContainsFunc(t.units, func(u neighbour.Unit) bool {
		return u.First && filepath.Dir(u.Path) != layout.Here.UnitDir
	})
	if first || len(t.Agents)+len(t.Envoys) == 0 || t.Ours {
		return nil
	}
	return b.writeGuard(ctx)
}

func (b *bootstrapper) writeGuard(ctx context.Context) error {
	err := os.MkdirAll(filepath.Dir(b.path(guardFile)), 0o755)
	if err == nil {
		err = atomicfile.Write(b.path(guardFile), []byte(guard), 0o644)
	}
	if err != nil {
		return err
	}
	return b.systemctl(ctx, time.Minute, "daemon-reload")
}

func (b *bootstrapper) exists(path string) bool {
	_, err := os.Lstat(b.path(path))
	return err == nil
}

// TakeOver has ours take the place of Google's closed agent, and returns what was done, one line
// each. The work is bootstrap's, in its unit: what is cut short here goes on there, and at the
// next boot.
func TakeOver(ctx context.Context, opts Options) (done []string, err error) {
	b := newBootstrapper(opts)
	if b.Root == "" && os.Geteuid() != 0 {
		return nil, fmt.Errorf("take over: %w; run as root", fs.ErrPermission)
	}
	state, noState := progress.Read(b.path(progress.StateDir))
	if noState == nil {
		b.state = state
	}
	if !b.exists(layout.Here.Agent) {
		return nil, fmt.Errorf("take over: ours is not installed: there is no %q; install a release "+
			"archive, which takes over by itself", layout.Here.Agent)
	}
	is, err := b.beginTakeOver(ctx)
	if err != nil {
		return nil, fmt.Errorf("take over: %w", err)
	}
	if !is {
		return []string{"no other agent is here: there is nothing to take over"}, nil
	}
	began := time.Now()
	err = b.systemctl(ctx, time.Minute, "restart", "--no-block", systemd.BootstrapUnit)
	if err != nil {
		return nil, fmt.Errorf("take over: %w", err)
	}
	return b.awaitTakeOver(ctx, began)
}

// beginTakeOver is the wish, with the installation's lock held.
func (b *bootstrapper) beginTakeOver(ctx context.Context) (is bool, err error) {
	unlock, err := b.lockInstall(ctx)
	if err != nil {
		return false, err
	}
	defer unlock()
	if is, err = b.want(ctx, "bootstrap --take-over"); err != nil || !is {
		return is, err
	}
	b.save()
	return is, b.installUnits(ctx)
}

// awaitTakeOver waits until bootstrap has taken over.
func (b *bootstrapper) awaitTakeOver(ctx context.Context, began time.Time) ([]string, error) {
	const limit = 5 * time.Minute
	failure := ""
	for {
		h, err := b.readHandover()
		if err != nil {
			return nil, fmt.Errorf("take over: %w", err)
		}
		if h.under(handoverTaken) {
			return b.taken(h), nil
		}
		state, err := progress.Read(b.path(progress.StateDir))
		if err == nil && state.Status == progress.Failed && state.Time.After(began) {
			failure = state.FailureLine()
		}
		if failure != "" && state.Permanent || time.Since(began) > limit ||
			!sleep(ctx, 200*time.Millisecond) {
			if failure == "" {
				failure = "bootstrap has not come so far; see journalctl -u " + systemd.BootstrapUnit
			}
			return nil, fmt.Errorf("take over: not yet, and the other agent goes on meanwhile: %s", failure)
		}
	}
}

// taken says what a take-over has done.
func (b *bootstrapper) taken(h *handover) (done []string) {
	for _, file := range h.Kept {
		what := "moved aside "
		if file.Replaced {
			what = "replaced "
		}
		done = append(done, what+file.Path)
	}
	for _, unit := range h.Units {
		done = append(done, "stopped and masked "+unit.Name)
	}
	if h.Envoy.Program != "" {
		done = append(done, fmt.Sprintf("replaced its Envoy %s (uid %d) by %s", h.Envoy.Program,
			h.Envoy.UID, systemd.EnvoyUnit))
	}
	return append(done, "bootstrap --remove gives all of it back")
}

// takeOver has the transient unit take over, and waits until it has.
func (b *bootstrapper) takeOver(ctx context.Context, h *handover) error {
	b.say("INFO", "stopping the other agent and starting ours in its place; new connections are "+
		"refused while one Envoy follows the other")
	h.Failure = ""
	if err := b.writeHandover(h); err != nil {
		return err
	}
	out, runErr := b.exec(ctx, time.Minute, "systemd-run", "--quiet", "--no-block", "--collect",
		"--unit="+takeOverUnit, "--property=Restart=on-failure", "--property=RestartSec=100ms",
		"--property=StartLimitIntervalSec=0", "--property=SyslogFacility=user",
		layout.Here.Agent, "bootstrap", "--take-over-now")
	deadline := time.Now().Add(takeOverLimit)
	for {
		now, err := b.readHandover()
		switch {
		case err != nil:
			return err
		case now.under(handoverTaken):
			for _, line := range b.taken(now) {
				b.say("INFO", line)
			}
			return nil
		case now != nil && now.Failure != "":
			return errors.New(now.Failure)
		case time.Now().After(deadline) || !sleep(ctx, 100*time.Millisecond):
			if runErr != nil { // it runs already, of an earlier try that was killed, as a rule
				return said(runErr, out)
			}
			return &Failure{Err: fmt.Errorf("the other agent was not replaced within %v", takeOverLimit),
				Advice: "see journalctl -u " + takeOverUnit}
		}
	}
}

// TakeOverNow stops the closed agent and starts ours in its place. It is what the transient unit
// runs, which is started anew when it is killed: what it finds done it leaves. An error is in the
// record, for bootstrap, which tries again in its own time.
func TakeOverNow(ctx context.Context, opts Options) error {
	b := newBootstrapper(opts)
	unlock, err := b.lockInstall(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	h, err := b.readHandover()
	if err != nil {
		return err
	}
	if !h.under(handoverWanted, handoverTaking) {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, takeOverLimit)
	defer cancel()
	if err := b.takeOverNow(ctx, h); err != nil {
		b.Log.Error("could not take over", zap.Error(err))
		h.Failure = progress.OneLine(err.Error())
		return b.writeHandover(h)
	}
	h.Phase, h.Failure = handoverTaken, ""
	return b.writeHandover(h)
}

func (b *bootstrapper) takeOverNow(ctx context.Context, h *handover) error {
	t, err := b.neighbours()
	if err != nil {
		return err
	}
	files, err := b.shadows(t.units)
	if err != nil {
		return err
	}
	h.Phase = handoverTaking
	others := b.describe(ctx, h, t)
	for _, unit := range others {
		of, err := b.filesOf(unit)
		if err != nil {
			return err
		}
		files = append(files, of...)
	}
	files = b.unmoved(h, files)
	if _, err := b.moveAside(h, files); err != nil { // the record is written before the first goes
		return err
	}
	if err := b.writeGuard(ctx); err != nil {
		return err
	}
	for _, unit := range h.Units {
		if err := b.systemctl(ctx, time.Minute, "mask", unit.Name); err != nil {
			return err
		}
	}
	if err := b.killAgents(ctx, h); err != nil {
		return err
	}
	if err := b.letOut(ctx); err != nil {
		return err
	}
	if err := b.replaceEnvoy(ctx, h); err != nil {
		return err
	}
	return b.startAgent(ctx)
}

// describe adds to the record what is seen, and returns the names of units of theirs besides that
// of our name: those whose main process is theirs. A process that merely is in some service, which
// started it and went on (OS Config, for one), is loose.
func (b *bootstrapper) describe(ctx context.Context, h *handover, t them) (others []string) {
	h.Active = h.Active || len(t.Agents) > 0
	for i, p := range append(slices.Clone(t.Envoys), t.Agents...) {
		if i == 0 && len(t.Envoys) > 0 && h.Envoy.Program == "" {
			h.Envoy = keptEnvoy{UID: p.UID, Program: p.Program, Unit: p.Unit}
		}
		switch {
		case p.Unit == systemd.AgentUnit:
		case p.Unit != "" && b.mainPID(ctx, p.Unit) == p.PID:
			if !slices.ContainsFunc(h.Units, func(u keptUnit) bool { return u.Name == p.Unit }) {
				h.Units = append(h.Units, keptUnit{Name: p.Unit, Active: true})
			}
		case !slices.Contains(h.Loose, p.String()):
			h.Loose = append(h.Loose, p.String())
		}
	}
	for _, unit := range h.Units {
		others = append(others, unit.Name)
	}
	return others
}

func (b *bootstrapper) mainPID(ctx context.Context, unit string) int {
	out, _ := b.exec(ctx, time.Minute, "systemctl", "show", "--value", "-p", "MainPID", "--", unit)
	pid, _ := strconv.Atoi(strings.TrimSpace(out))
	return pid
}

// filesOf are the files by which a unit stands in the administrator's folder, where it cannot be
// masked, and its links.
func (b *bootstrapper) filesOf(unit string) (files []keptFile, err error) {
	for _, pattern := range []string{unit, "*.wants/" + unit, "*.requires/" + unit} {
		paths, err := filepath.Glob(b.path(filepath.Join(systemd.ConfDir, pattern)))
		if err != nil {
			return nil, err
		}
		for _, path := range paths {
			to, _ := os.Readlink(path) // a file's is empty
			if to != os.DevNull {
				files = append(files, keptFile{Path: strings.TrimPrefix(path, b.Root), Link: to})
			}
		}
	}
	return files, nil
}

// killAgents ends the closed agent's processes but for its Envoy, by SIGKILL: what it would do at
// its end, or systemd for it, is not to be done. Their unit is ours by now, and guarded.
func (b *bootstrapper) killAgents(ctx context.Context, h *handover) error {
	for n := 0; ; n++ {
		t, err := b.neighbours()
		if err != nil {
			return err
		}
		if len(t.Agents) == 0 {
			return nil
		}
		if n == 100 || ctx.Err() != nil {
			return fmt.Errorf("the other agent does not end, or comes again: %s", seen(t))
		}
		b.describe(ctx, h, t)
		for _, p := range t.Agents {
			if p.Still() {
				_ = syscall.Kill(p.PID, syscall.SIGKILL) // gone by itself, it may be
			}
		}
		sleep(ctx, 20*time.Millisecond)
	}
}

// letOut has the chains let our Envoy out.
func (b *bootstrapper) letOut(ctx context.Context) error {
	uid, _, err := lookup(EnvoyUser)
	if err != nil || b.LetOut == nil {
		return err
	}
	changed, err := b.LetOut(ctx, uint32(uid))
	if len(changed) > 0 {
		b.Log.Info("our Envoy is let out of the chains that are there", zap.Strings("chains", changed))
	}
	return err
}

// admin is where an Envoy's admin interface is, ours and as far as is known theirs.
var admin = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), attribute.EnvoyAdminPort)

// replaceEnvoy ends their Envoy, draining, and starts ours in its place.
func (b *bootstrapper) replaceEnvoy(ctx context.Context, h *handover) error {
	if err := b.enable(ctx, systemd.EnvoyUnit); err != nil {
		return err
	}
	t, err := b.neighbours()
	if err != nil {
		return err
	}
	owned := func(uid uint32) error { return sockdiag.OwnedBy(admin, uid) }
	if p, has := behind(t.Envoys, owned); has {
		b.Log.Info("draining the other agent's Envoy", zap.Stringer("process", p))
		err := drain.Run(ctx, admin.String(), strconv.Itoa(p.PID), drain.DefaultLimit)
		if err != nil {
			b.Log.Warn("the other agent's Envoy is not drained", zap.Error(err))
		}
	}
	out, _ := b.exec(ctx, time.Minute, "systemctl", "is-active", systemd.EnvoyUnit) // says it in words
	was := mayReload(strings.TrimSpace(out))
	began := time.Now()
	if err := b.endEnvoys(ctx, h, t); err != nil {
		return err
	}
	if err := b.systemctl(ctx, time.Minute, "start", systemd.EnvoyUnit); err != nil {
		return err
	}
	uid, _, err := lookup(EnvoyUser)
	if err != nil {
		return err
	}
	for {
		err := sockdiag.OwnedBy(admin, uint32(uid))
		if err == nil {
			break
		}
		if time.Since(began) > 30*time.Second || !sleep(ctx, 10*time.Millisecond) {
			return fmt.Errorf("our Envoy does not answer on its admin port %v: %w; see %s/envoy.err.log",
				admin, err, logs.Dir)
		}
	}
	b.Log.Info("our Envoy runs in place of the other agent's",
		zap.Duration("without_envoy", time.Since(began)))
	if was { // ours had come first, and has yet to be asked for what has changed
		return nil
	}
	return b.forgetRestart(true)
}

// behind is the one of their Envoys that has the admin interface. One that came over ours has not,
// and lives for as long as it tries: what it was to be asked would be asked of ours, which never
// opens a listener again once it has drained it.
func behind(
	envoys []neighbour.Process, owned func(uid uint32) error,
) (p neighbour.Process, has bool) {
	i := slices.IndexFunc(envoys, func(p neighbour.Process) bool {
		return p.Listens && owned(p.UID) == nil
	})
	if i < 0 {
		return p, false
	}
	return envoys[i], true
}

// endEnvoys stops their Envoys, and waits until the ports are free.
func (b *bootstrapper) endEnvoys(ctx context.Context, h *handover, t them) error {
	for began := time.Now(); len(t.Envoys) > 0; {
		for _, p := range t.Envoys {
			signal := syscall.SIGTERM
			if time.Since(began) > 3*time.Second {
				signal = syscall.SIGKILL
			}
			of := slices.ContainsFunc(h.Units, func(u keptUnit) bool { return u.Name == p.Unit })
			switch {
			case of:
				if err := b.systemctl(ctx, time.Minute, "stop", p.Unit); err != nil {
					return err
				}
			case p.Still():
				_ = syscall.Kill(p.PID, signal) // gone by itself, it may be
			}
		}
		for range 20 { // a look at all processes costs more than one at the ports
			if !busy() {
				for _, p := range t.Envoys {
					if p.Still() {
						_ = syscall.Kill(p.PID, syscall.SIGKILL) // nothing is left for it to do
					}
				}
				return nil
			}
			sleep(ctx, 5*time.Millisecond)
		}
		if time.Since(began) > 20*time.Second || ctx.Err() != nil {
			return fmt.Errorf("the other agent's Envoy does not end: %v", t.Envoys[0])
		}
		var err error
		if t, err = b.neighbours(); err != nil {
			return err
		}
	}
	return nil
}

// busy says whether anybody listens on Envoy's ports.
func busy() bool {
	for _, port := range []uint16{attribute.OutboundPort, attribute.EnvoyAdminPort} {
		if all, err := sockdiag.Listeners(port); err != nil || len(all) > 0 {
			return true
		}
	}
	return false
}

// startAgent starts our daemon, which adopts the chains: they are of this boot, and the ports that
// they lead to were in use.
func (b *bootstrapper) startAgent(ctx context.Context) error {
	if b.Adopt != nil && haveRuntimeDir() {
		if err := b.Adopt(); err != nil {
			return err
		}
	}
	if err := os.Remove(b.path(guardFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := b.systemctl(ctx, time.Minute, "daemon-reload"); err != nil {
		return err
	}
	_, _ = b.exec(ctx, time.Minute, "systemctl", "reset-failed", systemd.AgentUnit) // if it is that
	// With their unit of its name the link that enables ours was moved aside, too.
	if err := b.enableBut(ctx, false, systemd.AgentUnit); err != nil {
		return err
	}
	if slices.Contains(b.masked, systemd.AgentUnit) {
		return nil
	}
	return b.systemctl(ctx, time.Minute, "start", systemd.AgentUnit)
}

// isOurBinary says by what the linker wrote into it whether a program is ours.
func isOurBinary(path string) bool {
	info, err := buildinfo.ReadFile(path)
	return err == nil && info.Main.Path == ownModule
}

const ownModule = "github.com/service-proxy-agent/service-proxy-agent"
