package bootstrap

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/internal/atomicfile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/identity"
	"github.com/service-proxy-agent/service-proxy-agent/internal/logs"
	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// ofVM are the files that are one VM's and no other's, beside the state itself, and what they are
// to a person. The binaries, units and users are the disk's: they stay whichever VM has it.
var ofVM = []struct{ path, what string }{
	{EnvoyConfig, "Envoy's configuration"},
	{logs.Dir, "Envoy's logs"},
	{rolledBackFile, "what was rolled back"},
	{previousDir, "what upgrades have replaced"},
}

// readState takes up what earlier runs left, if it is this VM's: what may not be waits until the
// VM's id is known (claim).
func (b *bootstrapper) readState() {
	dir := b.path(progress.StateDir)
	state, err := progress.Read(dir)
	if err != nil {
		b.Log.Warn("starting without history", zap.Error(err)) // losing it loses nothing but history
	}
	of := state.Whose(dir)
	if b.vm.Judge(of).Believed() {
		b.state = state
		if b.state.Owner = of; of == (identity.Owner{}) {
			b.state.Owner = b.vm.Owner
		}
		return
	}
	if of.Instance == "" && state.Before != nil { // of a start that was not told the id either
		state, of = *state.Before, state.Before.Owner
	}
	b.state = state.OfDisk()
	b.state.Owner, b.state.Before = b.vm.Owner, &state
	b.state.Before.Owner, b.state.Before.Before = of, nil
}

// claim finds out the VM's id, if it is not known yet, and with it whose all is that was found:
// another VM's is discarded.
func (b *bootstrapper) claim(ctx context.Context) error {
	if b.vm.Instance != "" {
		return nil
	}
	id, err := metadata.ReadInstance(ctx)
	if err == nil && id == "" {
		err = errors.New(`read "instance/id" from the metadata server: it is empty`)
	}
	if err != nil {
		return err
	}
	vm := b.vm
	vm.Instance = id
	state := b.state.Owner
	if b.state.Before != nil {
		state = b.state.Before.Owner
	}
	disk := identity.Read(b.path(progress.OwnerFile))
	switch {
	case vm.Judge(state) == identity.Others:
		err = b.discard(ctx, vm, state)
	case vm.Judge(disk) == identity.Others: // an earlier run was cut short, or lost its state
		err = b.discard(ctx, vm, disk)
	case b.state.Before != nil:
		b.goOn()
	}
	if err == nil && disk != vm.Owner {
		if err := b.writeOwner(vm.Owner); err != nil { // a full disk, say, on which all else stands
			b.Log.Warn("cannot write down whose this disk is", zap.Error(err))
		}
	}
	if err != nil {
		return fmt.Errorf("make this disk this VM's: %w", err)
	}
	b.vm, b.state.Owner = vm, vm.Owner
	return nil
}

// goOn takes up a state that has turned out to be ours.
func (b *bootstrapper) goOn() {
	now := b.state
	b.state = *now.Before
	b.state.Status, b.state.Step, b.state.Attempt = now.Status, now.Step, now.Attempt
	b.state.Story = now.Story
	if now.Failure != "" {
		b.state.Failure, b.state.FailureTime = now.Failure, now.FailureTime
	}
}

// discard makes a VM without a past of one that has another's. It is told first, by the state; what
// is cut short then is done by the next run, since the file that says whose all is comes last.
func (b *bootstrapper) discard(ctx context.Context, vm identity.VM, of identity.Owner) error {
	if told := b.state.Discarded; told == nil || told.This != vm.Instance {
		attempt := b.state.Attempt
		found := identity.Discarded{Instance: of.Instance, This: vm.Instance, What: b.foundOfVM(),
			At: time.Now().UTC().Truncate(time.Second)}
		b.state = b.state.OfDisk()
		b.state.Status, b.state.Step, b.state.Attempt = progress.InProgress, StepAttribute, attempt
		b.state.Owner, b.state.Discarded, b.again = vm.Owner, &found, false
		b.save()
		// The daemon tells the world.
		b.Log.Warn("this VM's disk is a copy of another VM's; its state is discarded",
			zap.String("of", of.Instance), zap.String("this", vm.Instance), zap.Strings("what", found.What))
	}
	return b.removeOfVM(ctx)
}

// foundOfVM is what there is to be discarded.
func (b *bootstrapper) foundOfVM() []string {
	what := []string{"how far bootstrap came"}
	for _, f := range ofVM {
		if _, err := os.Lstat(b.path(f.path)); err == nil {
			what = append(what, f.what)
		}
	}
	return what
}

// removeOfVM removes what is one VM's. An Envoy that runs with it is stopped first.
func (b *bootstrapper) removeOfVM(ctx context.Context) error {
	_, config := os.Lstat(b.path(EnvoyConfig))
	if config == nil && len(b.present([]string{systemd.EnvoyUnit})) > 0 {
		if err := b.systemctl(ctx, 2*time.Minute, "stop", systemd.EnvoyUnit); err != nil {
			return &Failure{Err: err}
		}
	}
	var errs []error
	for _, f := range ofVM {
		if f.path == logs.Dir {
			errs = append(errs, logs.Empty(b.Root))
			continue
		}
		errs = append(errs, os.RemoveAll(b.path(f.path)))
	}
	for _, path := range []string{restartFile, progress.OwnerFile} {
		if err := os.Remove(b.path(path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (b *bootstrapper) writeOwner(of identity.Owner) error {
	path := b.path(progress.OwnerFile)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	text, err := json.Marshal(of)
	if err != nil {
		return err
	}
	return atomicfile.Write(path, append(text, '\n'), 0o644)
}

// askLimit bounds how long the start of Envoy waits for the metadata server, where only that can
// tell whose Envoy's configuration is.
const askLimit = 3 * time.Second

// ErrOthers is the error of Own where Envoy's configuration is not known to be this VM's.
var ErrOthers = errors.New("Envoy's configuration is of another VM, which this one's disk is a " +
	"copy of, or may be: bootstrap writes this VM's own, and starts Envoy then")

// Own says by a nil error that Envoy may start with the configuration that is there: Envoy's unit
// asks, as Envoy's user. boot is this boot's id (%b of systemd.unit(5)): the unit's sandbox hides
// the kernel's. Where the metadata server is away the machine decides.
func Own(ctx context.Context, opts Options, boot string) error {
	of := identity.Read(filepath.Join(opts.Root, progress.OwnerFile))
	vm := identity.Here(opts.Root)
	if vm.Boot == "" {
		vm.Boot = identity.Boot(boot)
	}
	if vm.Judge(of) != identity.Ours {
		ctx, cancel := context.WithTimeout(ctx, askLimit)
		defer cancel()
		vm.Instance, _ = metadata.ReadInstance(ctx)
	}
	if !vm.Judge(of).Believed() {
		return ErrOthers
	}
	return nil
}
