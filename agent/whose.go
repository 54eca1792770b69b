package agent

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/internal/atomicfile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/identity"
	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/internal/report"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// whose is whose the state is that this run has found. The zero value knows nothing of the VM.
type whose struct {
	run      string                    // the runtime folder
	vm       identity.VM               // as it was known at the start
	instance atomic.Pointer[string]    // as the metadata server has told it to this run; nil: not yet
	found    map[string]identity.Owner // of the state folder's files, by name
	// hold: some of it may be ours or not, so that nothing may be written in its place
	hold      bool
	ends      atomic.Bool    // the id has told otherwise: this run ends, and the next one begins right
	believed  identity.Owner // whose the state says it is that this run goes by
	discarded *identity.Discarded
}

// stateFile is a file of one VM, and what it is to a person.
type stateFile struct{ name, what string }

// keptFiles are what the daemon keeps in the state folder.
var keptFiles = []stateFile{
	{progress.AttributeFile, "the attribute that was kept"},
	{progress.FailureFile, "the last failures"},
	{progress.HistoryFile, "the history"},
	{progress.BrakeFile, "whether the brake was on"},
}

// ofBootstrap is what bootstrap discards by itself: what is told of it here is what will go.
var ofBootstrap = []stateFile{
	{progress.StateFile, "how far bootstrap came"},
	{progress.OwnerFile, "Envoy's configuration and logs"},
}

// askLimit bounds how long a start waits to be told the VM's id, where only that can tell whose the
// state is.
const askLimit = 3 * time.Second

// instanceFile keeps the VM's id in the runtime folder, for the next starts in this boot.
const instanceFile = "instance"

// find looks whose the state is that lies in dir, and removes what is another VM's. ask asks for
// this VM's id, and run is the runtime folder.
func (w *whose) find(ctx context.Context, dir, run string, vm identity.VM,
	ask func(context.Context) (string, error), log *zap.Logger) {
	w.run, w.vm, w.found = run, vm, map[string]identity.Owner{}
	kept := identity.Read(filepath.Join(run, instanceFile))
	if kept.Boot == vm.Boot && kept.Machine == vm.Machine {
		w.vm.Instance = kept.Instance
	}
	for _, f := range keptFiles {
		if _, err := os.Lstat(filepath.Join(dir, f.name)); err == nil {
			w.found[f.name] = identity.Read(filepath.Join(dir, f.name))
		}
	}
	if state, err := progress.Read(dir); err == nil && state.Status != "" {
		w.found[progress.StateFile] = state.Whose(dir)
	}
	w.found[progress.OwnerFile] = identity.Read(progress.OwnerFile)
	if w.open() {
		ctx, cancel := context.WithTimeout(ctx, askLimit)
		if id, err := ask(ctx); err == nil && id != "" {
			w.vm.Instance = id
			w.keep(id)
		} // else the machine decides
		cancel()
	}
	var what []string
	var others identity.Owner
	for _, f := range keptFiles {
		of, there := w.found[f.name]
		if !there {
			continue
		}
		switch w.vm.Judge(of) {
		case identity.Ours, identity.Likely:
			w.believed = cmp.Or(w.believed, of)
		case identity.Unknown:
			w.hold = true
		case identity.Others:
			err := os.Remove(filepath.Join(dir, f.name))
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				log.Warn("cannot remove what is another VM's; it is not believed", zap.Error(err))
			}
			what, others = append(what, f.what), moreOf(others, of)
		}
	}
	for _, f := range ofBootstrap {
		if of := w.found[f.name]; w.vm.Judge(of) == identity.Others {
			what, others = append(what, f.what), moreOf(others, of)
		}
	}
	if what != nil {
		w.discarded = &identity.Discarded{Instance: others.Instance, This: w.vm.Instance, What: what,
			At: time.Now().UTC().Truncate(time.Second)}
	}
	if w.hold {
		log.Warn("whose the state in the state folder is cannot be told yet: " +
			"it is neither gone by nor replaced until the metadata server tells this VM's id")
	}
}

// moreOf is the one that says more: what a run kept before it was told the id says less.
func moreOf(a, b identity.Owner) identity.Owner {
	if a.Instance != "" {
		return a
	}
	return b
}

// open says whether something is left that the VM's id would tell.
func (w *whose) open() bool {
	for _, of := range w.found {
		if v := w.vm.Judge(of); v == identity.Unknown || v == identity.Likely {
			return true
		}
	}
	return false
}

// now is the VM as it is known by now.
func (w *whose) now() identity.VM {
	vm := w.vm
	if id := w.instance.Load(); id != nil {
		vm.Instance = *id
	}
	return vm
}

// owner is whose what is written now is. While the id is not known it is that of the VM whose state
// this run goes by: all of it is gone on with, or discarded, together.
func (w *whose) owner() identity.Owner {
	vm := w.now()
	if w.ends.Load() {
		vm = w.vm // as what it is written beside
	}
	o := vm.Owner
	switch {
	case o.Instance != "":
	case w.vm.Judge(w.believed) == identity.Likely:
		return w.believed // no more certain than before
	default:
		o.Instance = w.believed.Instance
	}
	return o
}

// keep notes the VM's id.
func (w *whose) keep(id string) {
	w.instance.Store(&id)
	text, err := json.Marshal(w.now().Owner)
	if err == nil && w.run != "" {
		// Without it the next start asks again.
		_ = atomicfile.Write(filepath.Join(w.run, instanceFile), append(text, '\n'), 0o644)
	}
}

// learn asks for the VM's id where this run was not told it yet. It returns errWhose if that
// tells something else of the state than the start went by: what is written counts from the
// next start on.
func (w *whose) learn(ctx context.Context, ask func(context.Context) (string, error)) error {
	switch {
	case w.ends.Load():
		return errWhose
	case w.instance.Load() != nil:
		return nil
	}
	id, err := ask(ctx)
	if err == nil && id == "" {
		err = errNoID
	}
	if err != nil {
		return err
	}
	is := w.vm
	is.Instance = id
	if w.hold || slices.ContainsFunc(keptFiles, func(f stateFile) bool {
		of, there := w.found[f.name]
		return there && w.vm.Judge(of).Believed() != is.Judge(of).Believed()
	}) {
		w.ends.Store(true) // first: nothing may be written as the new one's
		w.keep(id)
		return errWhose
	}
	w.keep(id)
	return nil
}

var (
	errNoID = errors.New("the metadata server does not tell the VM's id")
	// errWhose ends an agent that has gone by what is another VM's, or has not gone by its own;
	// systemd starts it again.
	errWhose = errors.New("whose the state in the state folder is has become known: starting anew")
)

// watchWhose finds out the VM's id, however long that takes.
func (a *Agent) watchWhose(ctx context.Context) (anew error) {
	_ = again(ctx, func(ctx context.Context) error {
		err := a.kept.whose.learn(ctx, metadata.ReadInstance)
		if errors.Is(err, errWhose) {
			anew, err = err, nil
		}
		return err
	})
	return anew
}

// progress is bootstrap's state, as far as it is this VM's.
func (w *whose) progress(dir string) (progress.State, error) {
	state, err := progress.Read(dir)
	of := state.Owner
	if of == (identity.Owner{}) {
		of = w.found[progress.StateFile] // an earlier version's
	}
	if err == nil && !w.now().Judge(of).Believed() {
		return progress.State{}, nil
	}
	return state, err
}

// toldFor is for how long after a start it is told that another VM's state was found at it.
const toldFor = 10 * time.Minute

// otherVMs is what this start has found of another VM: by itself, and by bootstrap. nil: nothing,
// or long ago.
func (o Observation) otherVMs() (all *symptom.Discarded) {
	if o.Held { // this run ends as soon as it is known what it holds, and the next one tells
		return nil
	}
	for _, d := range []*identity.Discarded{o.Discarded, o.Bootstrap.Discarded} {
		switch {
		case d == nil || o.Now.Sub(d.At) >= toldFor:
		case all == nil:
			all = &symptom.Discarded{Instance: d.Instance, This: d.This, What: d.What, At: d.At}
		default:
			all.Instance, all.This = cmp.Or(all.Instance, d.Instance), cmp.Or(all.This, d.This)
			all.What = slices.Compact(slices.Sorted(slices.Values(slices.Concat(all.What, d.What))))
		}
	}
	return all
}

// tellOtherVMs tells of it once, on each channel, though it is advice: nothing else says why a VM
// has no past. That it was told is in the history.
func (t *told) tellOtherVMs(findings []symptom.Finding) {
	at := slices.IndexFunc(findings, func(f symptom.Finding) bool {
		return f.ID == symptom.OtherVMsState
	})
	if at < 0 || t.past.has(findings[at]) {
		return
	}
	t.tell(status.OfAgent, report.Event{Severity: report.Info, Message: findings[at].Text(),
		Finding: findings[at]})
}
