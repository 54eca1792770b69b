package agent

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/internal/atomicfile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/internal/reconcile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// The emergency brake: the metadata key service-proxy-agent-interception, on the instance or else on
// the project, by which an operator turns the interception of one VM or of a fleet off, live.

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

// placesOfKey is where the key may be, in the order of what wins.
var placesOfKey = [...]metadata.Place{metadata.OfInstance, metadata.OfProject}

// keyAt is the key at one place.
type keyAt struct {
	// Wish is what it last asked for, as far as it was understood; "": it is not there.
	Wish metadata.Wish `json:"wish,omitempty"`
	Bad  string        `json:"bad,omitempty"` // what is there now instead
	told bool          // by the metadata server, to this run
}

// next is the key after one more look. One that failed, and a value that nobody understands, change
// nothing.
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
	// the VM's id, "" where the metadata server did not tell it
	Instance string `json:"instance,omitempty"`
	Machine  string `json:"machine,omitempty"` // identity.Owner.Machine
}

// brake is what the key asks for. late says that whoever has not answered was waited for long
// enough.
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

// told is what of it the metadata server has told this run.
func (k keptBrake) told(now time.Time) keptBrake {
	is := keptBrake{Keys: map[metadata.Place]keyAt{}, Machine: k.Machine}
	for at, key := range k.Keys {
		if key.told {
			is.Keys[at] = key
		}
	}
	if is.brake(false).Off {
		is.Since = now.UTC().Truncate(time.Second)
	}
	return is
}

// same says whether both would be kept as the same.
func (k keptBrake) same(o keptBrake) bool {
	for _, at := range placesOfKey {
		if a, b := k.Keys[at], o.Keys[at]; a.Wish != b.Wish || a.Bad != b.Bad {
			return false
		}
	}
	return k.Since.Equal(o.Since) && k.Instance == o.Instance && k.Machine == o.Machine
}

const brakeFile = "interception.json"

// loadBrake reads what an earlier run on this machine kept. That of the VM which this one's disk was
// made from is not this VM's.
func loadBrake(dir, machine string) (keptBrake, error) {
	none := keptBrake{Machine: machine}
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
	if machine == "" || k.Machine != machine {
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
	// systemd makes it; without, somebody runs the agent by hand
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return atomicfile.Write(filepath.Join(dir, brakeFile), text, 0o600)
}

// brakeLate is for how long a run waits for what the metadata server says of the brake before it
// goes by what an earlier one kept: as long as for the attribute of a server that hangs.
const brakeLate = 10 * time.Second

// watchBrake passes on what the key asks for, and has it kept for the next start.
func (a *Agent) watchBrake(ctx context.Context) error {
	kept, err := loadBrake(a.settings.StateDir, a.kept.whose.vm.Machine)
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
	late := a.config != nil                            // whose rules ask no metadata server
	told, saved, ours := kept.brake(late), kept, false // as the loop begins with
	for {
		var answered bool
		select {
		case <-ctx.Done():
			return nil
		case <-waits.C:
			late = true
		case l := <-looks:
			kept, answered = kept.take(l.at, l.Interception, time.Now()), l.Err == nil
		}
		if is := kept.brake(late); is != told {
			told = is
			a.brakes.Put(is)
		}
		if answered && !ours { // it is told first: what was kept is another VM's very rarely
			kept, ours = a.ownBrake(ctx, kept)
			a.brakes.Put(kept.brake(late))
		}
		if !kept.same(saved) {
			saved = kept
			a.kept.brake.Put(kept)
		}
	}
}

// ownBrake is what was kept, with whose it is: the metadata server, which has just answered, tells
// the VM's id. That of another VM is discarded but for what this run was told. known: it has told.
func (a *Agent) ownBrake(ctx context.Context, kept keptBrake) (own keptBrake, known bool) {
	ctx, cancel := context.WithTimeout(ctx, time.Second) // the other place may have news
	defer cancel()
	id, err := metadata.ReadInstance(ctx)
	if err != nil || id == "" {
		return kept, false
	}
	if kept.Instance != "" && kept.Instance != id {
		a.log.Warn("the brake kept in the state folder is another instance's and is discarded",
			zap.String("of", kept.Instance), zap.String("this", id))
		kept = kept.told(time.Now())
	}
	kept.Instance = id
	return kept, true
}
