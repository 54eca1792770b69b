package agent

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/service-proxy-agent/service-proxy-agent/internal/identity"
	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// leave has a VM leave all of its state in a folder, as a run that ends does.
func leave(t *testing.T, dir string, of identity.Owner) {
	t.Helper()
	for _, err := range []error{
		saveKept(dir, &keptAttribute{Text: keptText, Owner: of}),
		Failures{Over: Failure{Text: "x"}, Owner: of}.save(dir),
		keptTransitions{of, []status.Transition{
			{Time: testStart, Kind: status.OfMode, Text: "x"}}}.save(dir),
		keptBrake{Owner: of}.take(metadata.OfProject, says("off"), testStart).save(dir),
		progress.Write(dir, progress.State{Owner: of, Status: progress.Finished}),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestWhose: what a start goes by, and what is in the folder after it, for each VM that may find
// the folder, with and without a metadata server.
func TestWhose(t *testing.T) {
	named := func(vm identity.VM, instance string) identity.VM { vm.Instance = instance; return vm }
	looksSame := identity.VM{Owner: identity.Owner{Machine: mine.Machine, Boot: "2"}}
	away := errors.New("no route to host")
	for _, tt := range []struct {
		name    string
		vm      identity.VM
		id      string // as the metadata server tells it at the start; "": it is away
		asked   bool
		goesBy  bool
		left    bool // in the folder
		hold    bool
		later   string // the id, when it is known
		changed bool
	}{
		{name: "rebooted", vm: mine, goesBy: true, left: true, later: "1"},
		{name: "a clone", vm: aClone, id: "2", asked: true},
		{name: "a clone, the server away", vm: aClone, asked: true, left: true, hold: true, later: "2", changed: true},
		{name: "the machine has got another name", vm: aClone, id: "1", asked: true, goesBy: true, left: true},
		{name: "the machine has got another name, the server away", vm: aClone, asked: true, left: true, hold: true, later: "1", changed: true},
		{name: "a clone that looks the same", vm: looksSame, id: "2", asked: true},
		{name: "a clone that looks the same, the server away", vm: looksSame, asked: true, goesBy: true, left: true, later: "2", changed: true},
		{name: "rebooted where a clone would look the same", vm: looksSame, id: "1", asked: true, goesBy: true, left: true},
		{name: "a container that was copied in this boot", vm: mine, goesBy: true, left: true, later: "2", changed: true},
		{name: "rebooted where a clone would look the same, the server away", vm: looksSame, asked: true, goesBy: true, left: true, later: "1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir, run := filepath.Join(t.TempDir(), "state"), t.TempDir()
			leave(t, dir, named(mine, "1").Owner)
			asked := false
			ask := func(context.Context) (string, error) {
				asked = true
				if tt.id == "" {
					return "", away
				}
				return tt.id, nil
			}
			core, logs := observer.New(zap.InfoLevel)
			var w whose
			w.find(t.Context(), dir, run, tt.vm, ask, zap.New(core))
			if asked != tt.asked || w.hold != tt.hold || logs.Len() != 0 != tt.hold {
				t.Errorf("asked %v, holds %v: %v", asked, w.hold, logs.All())
			}
			kept, err := loadKept(dir)
			if (kept != nil) != tt.left || err != nil {
				t.Errorf("the attribute: %+v, %v", kept, err)
			}
			failures := loadFailures(dir, w.vm)
			transitions, err := loadTransitions(dir, w.vm)
			boot, bootErr := w.progress(dir)
			braked, err2 := loadBrake(dir, w.vm)
			goesBy := []bool{kept != nil && w.vm.Judge(kept.Owner).Believed(), failures.Over.Text != "",
				len(transitions) > 0, boot.Status == progress.Finished, braked.brake(true).Off}
			if slices.Contains(goesBy, !tt.goesBy) || err != nil || err2 != nil || bootErr != nil {
				t.Errorf("goes by attribute, failures, history, bootstrap, brake: %v, %v, %v, %v", goesBy,
					err, bootErr, err2)
			}
			for _, f := range keptFiles {
				if _, err := os.Stat(filepath.Join(dir, f.name)); (err == nil) != tt.left {
					t.Errorf("%s: %v", f.name, err)
				}
			}
			if discarded := !tt.goesBy && !tt.left; (w.discarded != nil) != discarded {
				t.Errorf("discarded: %+v", w.discarded)
			} else if discarded {
				d := *w.discarded
				if d.Instance != "1" || d.This != "2" || len(d.What) != len(keptFiles)+1 ||
					time.Since(d.At) > time.Minute {
					t.Errorf("discarded: %+v", d)
				}
			}
			if tt.later == "" {
				return
			}
			told := func(id string) func(context.Context) (string, error) {
				return func(context.Context) (string, error) { return id, nil }
			}
			if err := w.learn(t.Context(), told("")); err != errNoID {
				t.Error(err)
			}
			for range 2 { // whoever asks hears it
				err = w.learn(t.Context(), told(tt.later))
				if errors.Is(err, errWhose) != tt.changed || (err == nil) == tt.changed ||
					w.now().Instance != tt.later || w.owner().Instance == tt.later && tt.changed {
					t.Errorf("%v, %+v, writes as %+v", err, w.now(), w.owner())
				}
			}
			if !tt.changed {
				return
			}
			// What this run still writes is discarded or gone on with together with what it found: the
			// next start goes by all of it, or by none.
			if !tt.hold {
				leave(t, dir, w.owner())
			}
			// In this boot the id is known from now on.
			var next whose
			next.find(t.Context(), dir, run, tt.vm, func(context.Context) (string, error) {
				t.Error("asked again")
				return "", away
			}, zap.NewNop())
			boot, _ = next.progress(dir)
			believed := []bool{loadFailures(dir, next.vm).Over.Text != "", boot.Status == progress.Finished}
			if want := tt.later == "1"; next.hold || slices.Contains(believed, !want) ||
				(next.discarded == nil) != want {
				t.Errorf("the next start goes by %v, and has discarded %+v", believed, next.discarded)
			}
		})
	}
}

// TestWhoseBefore: what versions that did not say it have left is of the VM whose the rest is.
func TestWhoseBefore(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	old := identity.Owner{Machine: mine.Machine}
	leave(t, dir, old)
	if err := progress.Write(dir, progress.State{Status: progress.Finished}); err != nil {
		t.Fatal(err)
	}
	never := func(context.Context) (string, error) { return "", errors.New("away") }
	for _, tt := range []struct {
		vm   identity.VM
		want string
	}{{mine, progress.Finished}, {aClone, ""}} {
		var w whose
		w.find(t.Context(), dir, t.TempDir(), tt.vm, never, zap.NewNop())
		if state, err := w.progress(dir); err != nil || state.Status != tt.want {
			t.Errorf("on %+v: %+v, %v", tt.vm, state, err)
		}
	}
}

// TestHeldIsNotReplaced: while it is not known whose it is, nothing is written in its place.
func TestHeldIsNotReplaced(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	leave(t, dir, mine.Owner)
	a := &Agent{log: zap.NewNop(), settings: Settings{StateDir: dir}, kept: newKept()}
	a.kept.whose.find(t.Context(), dir, t.TempDir(), aClone,
		func(context.Context) (string, error) { return "", errors.New("away") }, zap.NewNop())
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); a.keepHistory(ctx) }()
	a.kept.failures.Put(Failures{Over: Failure{Text: "another"}})
	a.kept.attribute.Put(&keptAttribute{Text: "{}"})
	a.kept.transitions.Put(keptTransitions{})
	cancel()
	<-ended
	if f := loadFailures(dir, mine); f.Over.Text != "x" {
		t.Errorf("%+v", f)
	}
	if k, err := loadKept(dir); err != nil || k.Text != keptText {
		t.Errorf("%+v, %v", k, err)
	}
	if all, err := loadTransitions(dir, mine); err != nil || len(all) != 1 {
		t.Errorf("%+v, %v", all, err)
	}
}

// TestOtherVMsTold: once on each channel, also over a restart within the time in which it stands.
func TestOtherVMsTold(t *testing.T) {
	var lines []status.Transition
	for run := range 2 {
		told, take := heard()
		told.past.lines = lines
		for pass := range 3 {
			p := intercepting()
			p.seen.Now = testStart.Add(time.Duration(run*60+pass) * time.Second)
			p.findings = symptom.Check(symptom.Facts{Discarded: &symptom.Discarded{
				Instance: "1", This: "2", What: []string{"the history"}, At: time.Now().Add(-time.Minute).UTC()}})
			told.publish(p, "nft")
		}
		want := 1 - run
		if have := strings.Count(take(), "INFO State of another VM (instance 1)"); have != want {
			t.Errorf("run %d: told %d times, want %d", run, have, want)
		}
		lines = told.past.lines
	}
}

// TestOtherVMs: what the daemon and bootstrap have discarded is one thing to tell, for ten minutes.
func TestOtherVMs(t *testing.T) {
	by := func(ago time.Duration, what ...string) *identity.Discarded {
		return &identity.Discarded{Instance: "1", This: "2", What: what, At: testStart.Add(-ago)}
	}
	for _, tt := range []struct {
		daemon, bootstrap *identity.Discarded
		want              string
	}{
		{nil, nil, ""},
		{by(0, "a", "b"), nil, "a b"},
		{nil, by(time.Minute, "c"), "c"},
		{by(0, "a", "b"), by(0, "b", "c"), "a b c"},
		{by(toldFor, "a"), nil, ""},
		{by(toldFor, "a"), by(toldFor-1, "c"), "c"},
	} {
		o := Observation{Now: testStart, Self: Self{Discarded: tt.daemon},
			Bootstrap: progress.State{Discarded: tt.bootstrap}}
		have := ""
		if d := o.otherVMs(); d != nil {
			have = strings.Join(d.What, " ")
		}
		if have != tt.want {
			t.Errorf("%+v and %+v: %q, want %q", tt.daemon, tt.bootstrap, have, tt.want)
		}
	}
}
