package bootstrap

import (
	"context"
	"errors"
	"path/filepath"
	"runtime"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/internal/layout"
	"github.com/service-proxy-agent/service-proxy-agent/internal/system"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// Check looks whether the agent can be on this machine, and changes nothing.
func Check(ctx context.Context, opts Options) system.Report {
	return system.New(newBootstrapper(opts).look(ctx))
}

// lookAt is how the machine is. An Envoy may also be where envoys say.
func (b *bootstrapper) lookAt(ctx context.Context, envoys ...string) system.System {
	return system.Look(ctx, system.Options{
		Root: b.Root,
		Run: func(ctx context.Context, name string, args ...string) (string, error) {
			out, err := b.exec(ctx, 10*time.Second, name, args...)
			if err != nil {
				err = said(err, out)
			}
			return out, err
		},
		Envoys: append(envoys, EnvoyBinary, layout.Here.ArchivedEnvoy),
		Programs: []string{layout.Here.Agent, EnvoyBinary,
			filepath.Join(layout.Here.UnitDir, systemd.AgentUnit)},
	})
}

// checkSystem is the first step: a machine on which the agent cannot be is told at once, in one
// line, and nothing is changed there. What it does not have in full is said once. Where bootstrap
// has finished before, nothing is refused: that it works is seen, and a wrong judgement must not
// take a VM out of the mesh. (On a disk that is not known to be this VM's, too: it works on the
// disk.)
func (a *attempt) checkSystem(ctx context.Context) error {
	seen := a.look(ctx)
	rows := system.Judge(seen)
	failure, _ := refused(seen, rows)
	worked := a.again || a.state.Worked()
	switch {
	case failure != nil && !worked:
		return failure
	case a.state.Attempt > 1:
	case failure != nil:
		a.say("WARNING", failure.Err.Error()+"; "+failure.Advice+
			"; it worked before, so bootstrap goes on")
	case !a.again:
		for _, row := range rows {
			if row.Verdict == system.Limited {
				a.say("WARNING", "this system: "+row.Lacks+"; "+row.WayOut)
			}
		}
	}
	return nil
}

// refused is the failure of a machine on which the agent cannot be, nil for another. passes says
// that the machine may become one where it can.
func refused(seen system.System, rows []system.Row) (f *Failure, passes bool) {
	row, lacks, ok := system.Refusal(seen, rows)
	if !ok {
		return nil, false
	}
	return &Failure{Err: errors.New(lacks), Advice: row.WayOut, Permanent: true}, row.Passes
}

// label gives what is installed the labels that SELinux's policy has for it. A file that was linked
// or moved from another folder has that folder's, and systemd may not run it. Where there is no
// SELinux there is nothing to do.
func (b *bootstrapper) label(ctx context.Context, paths ...string) {
	seen := system.LookSELinux(b.Root)
	if seen.Mode == "" || !seen.Restorecon || len(paths) == 0 {
		return
	}
	args := []string{"-R"}
	for _, path := range paths {
		args = append(args, b.path(path))
	}
	if out, err := b.exec(ctx, time.Minute, "restorecon", args...); err != nil {
		b.Log.Warn("cannot set SELinux's labels", zap.Error(said(err, out)))
	}
}

// archiveEnvoy is the Envoy of an unpacked archive.
func archiveEnvoy(dir string) string { return filepath.Join(dir, runtime.GOARCH, "envoy") }
