package agent

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/internal/identity"
	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/internal/reconcile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// The emergency brake: the metadata key service-proxy-agent-interception, on the instance or else
// on the project, by which an operator turns the interception of one VM or of a fleet off, live.

// brake is what the key asks for, as the loop goes by it.
type brake struct {
	// Awaited: the metadata server has not told both places yet, nor been silent for too long. Until
	// then nothing is put in that a brake may forbid: what an earlier run left stays as it is.
	Awaited bool
	Off     bool
	Since   time.Time      // when an agent of this VM first saw it off, UTC; zero: it is not
	By      metadata.Place // whose key is in force; "": none is
	// Bypass: the key asks for --when-envoy-down=bypass, whatever is set.
	Bypass bool
	Bad    string         // a value that nobody understands, printable; "": there is none
	BadBy  metadata.Place // whose
}

// whenDown is what becomes of the jumps when Envoy goes down: the key is the fleet's, and wins over
// what is set on the VM.
func (b brake) whenDown(s Settings) reconcile.WhenEnvoyDown {
	if b.Bypass {
		return reconcile.Bypass
	}
	return s.WhenEnvoyDown
}

// whose is the metadata that the key in force is of, in words.
func (b brake) whose() string {
	if b.By == metadata.OfInstance {
		return "this VM's metadata"
	}
	return "the project's metadata"
}

// text is the mode as it is told when it is another one.
func (b brake) text(mode string) string {
	if mode != modeOff {
		return mode
	}
	return fmt.Sprintf("%s, by %s (%s) since %s", mode, b.whose(), metadata.InterceptionKey,
		b.Since.Format(time.RFC3339))
}

const (
	modeOff   = "off"     // status.Status.Mode with the brake on
	bySetting = "setting" // status.Interception.WhenEnvoyDownBy of what is set on the VM
)

// status is what is told of it.
func (b brake) status(s Settings) status.Interception {
	is := status.Interception{State: "on", WhenEnvoyDown: string(b.whenDown(s)),
		WhenEnvoyDownBy: bySetting}
	if b.Off {
		is.State, is.Since, is.By = modeOff, b.Since, string(b.By)
	}
	if b.Bypass {
		is.WhenEnvoyDownBy = string(b.By)
	}
	return is
}

// facts is what findings are made of.
func (b brake) facts() symptom.Brake {
	return symptom.Brake{Off: b.Off, Since: b.Since, By: string(b.By), WhenEnvoyDown: b.Bypass,
		Bad: b.Bad, BadBy: string(b.BadBy)}
}

// placesOfKey is where the key may be, in the order of what wins.
var placesOfKey = [...]metadata.Place{metadata.OfInstance, metadata.OfProject}

// keyAt is the key at one place.
type keyAt struct {
	// Wish is what it last asked for, as far as it was understood; "": it is not there.
	Wish metadata.Wish `json:"wish,omitempty"`
	Bad  string        `json:"bad,omitempty"` // what is there now instead
	told bool          // by the metadata server, to this run
}

// next is the key after one more look. One that failed, and a value that nobody understands,
// change nothing.
func (k keyAt) next(look metadata.Interception) keyAt {
	if look.Err != nil {
		return k
	}
	k.told = true
	switch wish, ok := look.Wish(); {
	case !look.Set:
		k.Wish, k.Bad = "", ""
	case ok:
		k.Wish, k.Bad = wish, ""
	default:
		k.Bad = cmp.Or(symptom.Printable(look.Value, maxBadKey), "(empty)")
	}
	return k
}

// maxBadKey bounds a value that nobody understands where it is told.
const maxBadKey = 64

// keptBrake is the key at both places, as the state folder keeps it for the next start, with whose
// it is.
type keptBrake struct {
	Keys  map[metadata.Place]keyAt `json:"keys"`
	Since time.Time                `json:"since,omitzero"` // when it was first seen off, UTC
	identity.Owner
}

// brake is what the key asks for. late says that whoever has not answered was waited for
// long enough.
func (k keptBrake) brake(late bool) (b brake) {
	for _, at := range placesOfKey {
		key := k.Keys[at]
		if key.Wish != "" && b.By == "" {
			b.By, b.Off, b.Bypass = at, key.Wish == metadata.WishOff, key.Wish == metadata.WishBypass
		}
		if key.Bad != "" && b.Bad == "" {
			b.Bad, b.BadBy = key.Bad, at
		}
		b.Awaited = b.Awaited || !key.told && !late
	}
	if b.Off {
		b.Since = k.Since
	}
	return b
}

// take is the key after one more look at one place.
func (k keptBrake) take(at metadata.Place, look metadata.Interception, now time.Time) keptBrake {
	was := k.brake(false).Off
	keys := map[metadata.Place]keyAt{}
	for _, place := range placesOfKey {
		keys[place] = k.Keys[place]
	}
	keys[at] = keys[at].next(look)
	k.Keys = keys
	switch off := k.brake(false).Off; {
	case !off:
		k.Since = time.Time{}
	case !was || k.Since.IsZero():
		k.Since = now.UTC().Truncate(time.Second)
	}
	return k
}

// same says whether both would be kept as the same.
func (k keptBrake) same(o keptBrake) bool {
	for _, at := range placesOfKey {
		if a, b := k.Keys[at], o.Keys[at]; a.Wish != b.Wish || a.Bad != b.Bad {
			return false
		}
	}
	return k.Since.Equal(o.Since) && k.Owner == o.Owner
}

const brakeFile = progress.BrakeFile

// loadBrake reads what an earlier run on this VM kept.
func loadBrake(dir string, vm identity.VM) (keptBrake, error) {
	var none keptBrake
	text, err := readKept(filepath.Join(dir, brakeFile), maxHistoryFile)
	if errors.Is(err, fs.ErrNotExist) {
		return none, nil
	}
	var k keptBrake
	if err == nil {
		err = json.Unmarshal(text, &k)
	}
	if err != nil {
		return none, fmt.Errorf("read the brake kept by an earlier run: %w", err)
	}
	if !vm.Judge(k.Owner).Believed() {
		return none, nil
	}
	for at, key := range k.Keys {
		if key.Wish != metadata.WishOff && key.Wish != metadata.WishBypass {
			key.Wish = ""
		}
		key.Bad = symptom.Printable(key.Bad, maxBadKey)
		k.Keys[at] = key
	}
	if k.Since = k.Since.UTC(); !written(k.Since) {
		k.Since = time.Time{}
	}
	return k, nil
}

func (k keptBrake) save(dir string) error {
	text, err := json.Marshal(k)
	if err != nil {
		return err
	}
	return keepFile(dir, brakeFile, text)
}

// brakeLate is for how long a run waits for what the metadata server says of the brake before it
// goes by what an earlier one kept.
const brakeLate = 5 * time.Second

// readBrake asks both places at once, by what an earlier run kept. The error is of a place that
// gives no usable answer.
func readBrake(ctx context.Context, kept keptBrake) (brake, error) {
	var asked sync.WaitGroup
	looks := make([]metadata.Interception, len(placesOfKey))
	for i, at := range placesOfKey {
		asked.Go(func() { looks[i] = metadata.ReadInterception(ctx, at) })
	}
	asked.Wait()
	var err error
	for i, at := range placesOfKey {
		kept, err = kept.take(at, looks[i], time.Now()), cmp.Or(err, looks[i].Err)
	}
	return kept.brake(true), err
}

// watchBrake passes on what the key asks for, and has it kept for the next start.
func (a *Agent) watchBrake(ctx context.Context) error {
	of := &a.kept.whose
	kept, err := loadBrake(a.settings.StateDir, of.now())
	if err != nil {
		a.log.Warn("whether an earlier run had the brake on is not known", zap.Error(err))
	}
	type look struct {
		at metadata.Place
		metadata.Interception
	}
	looks := make(chan look)
	var watches sync.WaitGroup
	defer watches.Wait()
	for _, at := range placesOfKey {
		watches.Go(func() {
			metadata.WatchInterception(ctx, at, func(i metadata.Interception) {
				select {
				case looks <- look{at, i}:
				case <-ctx.Done():
				}
			})
		})
	}
	waits := time.NewTimer(brakeLate)
	defer waits.Stop()
	late := a.config != nil               // whose rules ask no metadata server
	told, saved := kept.brake(late), kept // as the loop begins with
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-waits.C:
			late = true
		case l := <-looks:
			kept = kept.take(l.at, l.Interception, time.Now())
		}
		if is := kept.brake(late); is != told {
			told = is
			a.brakes.Put(is)
		}
		// It says whose it is. (Where the VM's id tells that it is another's, the run ends: watchWhose.)
		if kept.Owner = of.owner(); !kept.same(saved) {
			saved = kept
			a.kept.brake.Put(kept)
		}
	}
}
