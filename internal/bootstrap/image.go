package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/layout"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// PrepareImage makes the disk fit to be an image, and returns what it did, one line each: all that
// a first boot would install is installed and enabled, Envoy too where one is to be had, and
// nothing is left that is of this VM. It refuses on a VM that is a running node: that would go out
// of the mesh by it. What is cut short is done by doing it again; an image of a disk on which it
// was cut short is a clone, which finds that out by itself.
func PrepareImage(
	ctx context.Context, opts Options, clean func(context.Context) (removed []string, err error),
) (done []string, err error) {
	b := newBootstrapper(opts)
	if b.Root == "" && os.Geteuid() != 0 {
		return nil, fmt.Errorf("prepare the image: %w; run as root", fs.ErrPermission)
	}
	if err := b.mayBecomeImage(ctx); err != nil {
		return nil, fmt.Errorf("prepare the image: %w", err)
	}
	r := &removal{bootstrapper: b}
	r.stop(ctx, b.present(unitsOverRules)) // none of them may write what is taken away below
	unlock, err := b.lock()
	if err != nil {
		return r.done, fmt.Errorf("prepare the image: %w", err)
	}
	defer unlock()
	if state, err := progress.Read(b.path(progress.StateDir)); err == nil {
		b.state = state.OfDisk() // whoever made it
	}
	b.state.Attempt = 1
	if err := b.installForImage(ctx, r); err != nil {
		return r.done, fmt.Errorf("prepare the image: %w", err)
	}
	removed, err := clean(ctx)
	if r.done = append(r.done, removed...); err != nil {
		return r.done, fmt.Errorf("prepare the image: the rules could not be taken out: %w", err)
	}
	r.stop(ctx, b.present(unitsUnderRules))
	r.done = append(r.done, r.endRetry(ctx, false)...)
	r.forgetVM(ctx)
	if err := errors.Join(r.errs...); err != nil {
		return r.done, fmt.Errorf("prepare the image: %w; try again", err)
	}
	return append(r.done, "ready: shut this VM down and make the image of its disk; "+
		"at its next boot it would be a node"), nil
}

// mayBecomeImage says why the disk must stay as it is.
func (b *bootstrapper) mayBecomeImage(ctx context.Context) error {
	if _, err := os.Stat(b.path(layout.Here.Agent)); err != nil {
		return fmt.Errorf("the agent is not installed: %w; "+
			"run service-proxy-agent-bootstrap.sh of the release archive first, or install the package", err)
	}
	t, err := b.neighbours()
	if err != nil {
		return err
	}
	if t.here() {
		return fmt.Errorf("another agent, Google's as it seems, is here (%s); use another VM, or run "+
			"bootstrap --take-over first", seen(t))
	}
	// Its exit code says no more than what it prints.
	out, _ := b.exec(ctx, time.Minute, "systemctl", "is-active", systemd.EnvoyUnit)
	switch state := strings.TrimSpace(out); state {
	case "active", "reloading", "activating", "deactivating":
		return fmt.Errorf("this VM is a running node of the mesh: %s is %s; use another VM, "+
			"or take it out of the mesh with `systemctl stop %s %s`", systemd.EnvoyUnit, state,
			systemd.InterceptionUnit, systemd.EnvoyUnit)
	}
	return nil
}

// installForImage does what a first boot would, but for what needs to know the VM.
func (b *bootstrapper) installForImage(ctx context.Context, r *removal) error {
	attr := b.readAttribute(ctx)
	if attr.Err != nil { // an image is mostly made on a VM without one
		attr.Config = attribute.Default()
	}
	const enableEnvoy = "enable Envoy's unit"
	for _, s := range []struct {
		name  string
		do    func() error
		means meaning
	}{
		{StepUnits, func() error { return b.installUnits(ctx) }, ofDisk},
		{StepPackages, func() error { return b.installPackages(ctx) }, ofOthers},
		{StepEnvoy, func() error { return b.installEnvoy(ctx, attr.Config) }, ofDisk},
		{enableEnvoy, func() error { return b.enable(ctx, systemd.EnvoyUnit) }, ofOthers},
	} {
		failure := failed(s.name, s.do(), s.means)
		switch {
		case failure == nil:
			r.done = append(r.done, "done: "+s.name)
			b.save() // which Envoy is there, and from where
		case s.name == StepEnvoy && failure.Permanent && b.state.EnvoyVersion == "":
			// The VMs' own primary-source may have one.
			r.done = append(r.done, "left Envoy out: "+failure.Error())
		case failure.goesOn:
			r.done = append(r.done, "left: "+failure.Error())
		default:
			return failure
		}
	}
	return nil
}

// forgetVM takes away what is of this VM, and leaves what is true of its disk.
func (r *removal) forgetVM(ctx context.Context) {
	r.errs = append(r.errs, r.removeOfVM(ctx))
	for _, dir := range []string{progress.StateDir, progress.RuntimeDir} {
		entries, err := os.ReadDir(r.path(dir))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			r.errs = append(r.errs, err)
		}
		for _, e := range entries {
			r.errs = append(r.errs, os.RemoveAll(filepath.Join(r.path(dir), e.Name())))
		}
	}
	r.done = append(r.done, "removed what was of this VM: the files in "+progress.StateDir+
		", Envoy's configuration and logs, what upgrades had replaced")
	// Nobody's, and without a status: bootstrap has not begun on the VM that finds it.
	if state := r.state.OfDisk(); state.EnvoyVersion != "" || state.MadeUsers != nil {
		if err := os.MkdirAll(r.path(progress.StateDir), 0o700); err != nil {
			r.errs = append(r.errs, err)
		}
		r.errs = append(r.errs, progress.Write(r.path(progress.StateDir), state))
	}
}
