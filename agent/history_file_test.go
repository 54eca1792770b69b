package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/internal/identity"
	"github.com/service-proxy-agent/service-proxy-agent/internal/mailbox"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/internal/untrusted"
	"github.com/service-proxy-agent/service-proxy-agent/test/schema"
)

// fullHistory has as many transitions as there may be, each as long as it may be.
func fullHistory() history {
	var h history
	for i := range maxTransitions {
		words := strings.Repeat("<\"& ", 1000) // what JSON has longer words for
		h.add(status.Transition{Kind: status.OfFinding, ID: symptom.ListenerRejected, Severity: "error",
			Text: fmt.Sprint(i, words), Key: fmt.Sprint(i, words), By: words}, testStart)
	}
	return h
}

// TestTransitionsKept: they are kept for nobody else to read, and what was written is read.
func TestTransitionsKept(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	if all, err := loadTransitions(dir, mine); err != nil || len(all) > 0 {
		t.Errorf("nothing is kept, and it is %v, %v", all, err)
	}
	h := fullHistory()
	h.lines[7].Times, h.lines[7].First = 10_000, testStart.Add(-time.Hour)
	if err := (keptTransitions{mine.Owner, h.lines}).save(dir); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, historyFile)
	for path, mode := range map[string]os.FileMode{path: 0o600, dir: 0o700 | os.ModeDir} {
		if info, err := os.Stat(path); err != nil || info.Mode() != mode {
			t.Errorf("%s: mode %v, %v, want %v", path, info.Mode(), err, mode)
		}
	}
	if info, err := os.Stat(path); err != nil || info.Size() > 64<<10 {
		t.Errorf("%d bytes, %v", info.Size(), err)
	}
	for _, vm := range []struct {
		identity.VM
		want []status.Transition
	}{{mine, h.lines}, {aClone, nil}} {
		if all, err := loadTransitions(dir, vm.VM); err != nil || !slices.Equal(all, vm.want) {
			t.Errorf("on %+v: %v, %v", vm.VM, inLines(all), err)
		}
	}
	if err := (keptTransitions{}).save(filepath.Join(path, "below-a-file")); err == nil {
		t.Error("kept where no folder can be made")
	}
}

// TestTransitionsOfOthers: whatever the file holds, what is read of it can be shown and kept again.
func TestTransitionsOfOthers(t *testing.T) {
	one := func(fields string) string {
		return `{"transitions":[{"time":"2026-11-28T18:00:00Z","kind":"mode","severity":"info",` + fields + `}]}`
	}
	for _, test := range []struct {
		name, text string
		want       []string // nil: an error
	}{
		{"empty", "", nil},
		{"half", `{"transitions":[{"kind":"mode",`, nil},
		{"garbage", "\x00\xff\x1b[2J", nil},
		{"too long", `{"machine":"` + strings.Repeat("x", maxHistoryFile) + `"}`, nil},
		{"of another type", `{"transitions":"none"}`, nil},
		{"null", "null", []string{}},
		{"no transition in it", one(`"text":""`), []string{}},
		{"without a time", `{"transitions":[{"kind":"mode","text":"x"}]}`, []string{}},
		{"of a newer version", `{"schema":9,` + one(`"text":"x","where":{"zone":"z"}`)[1:], []string{"18:00 x"}},
		{"of the future", strings.Replace(one(`"text":"x"`), "2026", "2126", 1), []string{"18:00 x"}},
		{"of the year 10000 in UTC",
			strings.Replace(one(`"text":"x"`), "2026-11-28T18:00:00Z", "9999-12-31T23:59:59-01:00", 1), []string{}},
		{"of another zone", strings.Replace(one(`"text":"x"`), "18:00:00Z", "19:00:00+01:00", 1),
			[]string{"18:00 x"}},
		{"began in the year 10000", one(`"text":"x","times":3,"first":"9999-12-31T23:59:59-01:00"`),
			[]string{"18:00 x"}},
		{"fewer times than once", one(`"text":"x","times":-3,"first":"2026-11-28T17:00:00Z"`),
			[]string{"18:00 x"}},
		{"often", one(`"text":"x","times":3,"first":"2026-11-28T17:00:00Z"`), []string{"17:00-18:00 x3 x"}},
		{"as often as a number can say", one(`"text":"x","times":9223372036854775807,"first":"2026-11-28T17:00:00Z"`),
			[]string{"17:00-18:00 x1000000000 x"}},
		{"hostile", one(`"text":"\u001b[2J\nx","by":"\u0000sh"`), []string{"18:00 by \ufffdsh \ufffd[2J x"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, historyFile), []byte(test.text), 0o600); err != nil {
				t.Fatal(err)
			}
			all, err := loadTransitions(dir, identity.VM{})
			if err == nil != (test.want != nil) || !slices.Equal(inLines(all), test.want) {
				t.Errorf("%q, %v, want %q", inLines(all), err, test.want)
			}
		})
	}
}

// TestTransitionsOfNewerVersions: words that this version does not know are told in its own form,
// which docs/status.schema.json has.
func TestTransitionsOfNewerVersions(t *testing.T) {
	dir := t.TempDir()
	text := `{"transitions":[
		{"time":"2026-11-28T18:00:00Z","kind":"newer","severity":"fatal","text":"x","id":"Bad ID"},
		{"time":"2026-11-28T18:00:00Z","kind":"finding","severity":"info","text":"y","id":"-"},
		{"time":"2026-11-28T18:00:00Z","kind":"finding","severity":"info","text":"z","id":"newer-one"}]}`
	if err := os.WriteFile(filepath.Join(dir, historyFile), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	all, err := loadTransitions(dir, identity.VM{})
	if err != nil || len(all) != 3 {
		t.Fatalf("%+v, %v", all, err)
	}
	body, err := json.Marshal(status.Status{Schema: status.Schema, Mode: "hold", History: all})
	if err != nil {
		t.Fatal(err)
	}
	schema.Valid(t, "status", body)
	if all[2].ID != "newer-one" {
		t.Errorf("the last line is %+v", all[2])
	}
}

// TestKeptThatHang: what has the name of a file in the state folder and is none is an error, and is
// not waited for: the rules would wait, too.
func TestKeptThatHang(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{historyFile, failureFile, keptFile} {
		if err := unix.Mkfifo(filepath.Join(dir, name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if all, err := loadTransitions(dir, mine); !errors.Is(err, untrusted.ErrNotRegular) {
		t.Errorf("transitions %v, %v", all, err)
	}
	if kept, err := loadKept(dir); !errors.Is(err, untrusted.ErrNotRegular) {
		t.Errorf("attribute %v, %v", kept, err)
	}
	loadFailures(dir, mine)
}

// FuzzLoadTransitions: what is read is bounded and in its form, and can be written.
func FuzzLoadTransitions(f *testing.F) {
	f.Add([]byte(`{"machine":"mine","transitions":[{"time":"9999-12-31T23:59:59-01:00","kind":"x","text":"y"}]}`))
	text, err := json.Marshal(keptTransitions{mine.Owner, fullHistory().lines})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, text []byte) {
		if err := os.WriteFile(filepath.Join(dir, historyFile), text, 0o600); err != nil {
			t.Fatal(err)
		}
		all, err := loadTransitions(dir, mine)
		if err != nil {
			return
		}
		var h history
		h.lines = slices.Clone(all)
		h.add(status.Transition{Kind: status.OfAgent, Severity: "info", Text: "started"}, testStart)
		err = (keptTransitions{mine.Owner, h.lines}).save(dir)
		if err != nil || len(h.lines) > maxTransitions {
			t.Fatalf("%d lines, %v", len(h.lines), err)
		}
		again, err := loadTransitions(dir, mine)
		if err != nil || len(again) != len(h.lines) {
			t.Fatalf("%v, %d lines, want %d", err, len(again), len(h.lines))
		}
		for i, line := range h.lines {
			if again[i] != line {
				t.Fatalf("line %d is %+v, and was %+v", i, again[i], line)
			}
		}
	})
}

// TestRunBegins: a run goes on with the history of the one before, and says so where it cannot.
func TestRunBegins(t *testing.T) {
	core, logs := observer.New(zap.InfoLevel)
	a := &Agent{log: zap.New(core), started: testStart, settings: Settings{StateDir: t.TempDir(),
		Version: "1.2.3"}, kept: newKept()}
	a.kept.whose.vm = mine
	lines := []status.Transition{{Time: testStart.Add(-time.Hour), Kind: status.OfMode,
		Severity: "info", Text: "interception: hold"}}
	if err := (keptTransitions{mine.Owner, lines}).save(a.settings.StateDir); err != nil {
		t.Fatal(err)
	}
	h := a.history()
	if got := inLines(h.lines); logs.Len() > 0 ||
		!slices.Equal(got, []string{"17:00 interception: hold",
			"18:00 service-proxy-agent 1.2.3 started"}) {
		t.Errorf("%q, %v", got, logs.All())
	}
	path := filepath.Join(a.settings.StateDir, historyFile)
	if err := os.WriteFile(path, []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	h = a.history()
	if len(h.lines) != 1 || logs.FilterMessage("the transitions of earlier runs are lost").Len() != 1 {
		t.Errorf("%q, %v", inLines(h.lines), logs.All())
	}
}

// disk notes what is saved on it, and when.
type disk struct {
	sync.Mutex // for who looks at it, or changes it, while keep runs
	saved      []int
	at         []time.Duration
	began      time.Time
	full       bool
	slow       time.Duration
	errs       int // that were told
}

func (d *disk) save(n int) error {
	d.Lock()
	slow := d.slow
	d.Unlock()
	time.Sleep(slow)
	d.Lock()
	defer d.Unlock()
	if d.at = append(d.at, time.Since(d.began)); d.full {
		return errors.New("no space left on device")
	}
	d.saved = append(d.saved, n)
	return nil
}

func (d *disk) done(err error) {
	d.Lock()
	defer d.Unlock()
	if err != nil {
		d.errs++
	}
}

// kept has keep run beside what play does, until it has done it.
func keptBy(t *testing.T, d *disk, play func(put func(int))) (ended time.Duration) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		d.began = time.Now()
		box := mailbox.New[int]()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			keep(ctx, box.Get(), keepEvery, d.save, d.done)
		}()
		play(func(n int) { box.Put(n); synctest.Wait() })
		cancel()
		began := time.Now()
		<-done
		ended = time.Since(began)
		time.Sleep(time.Hour) // a write that hangs ends with it
	})
	return ended
}

// TestKeep: the first is written at once, the last in any case, and of a burst a few.
func TestKeep(t *testing.T) {
	seed := rand.Uint64()
	t.Log("seed ", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	d := &disk{}
	keptBy(t, d, func(put func(int)) {
		for i := range 10_000 {
			put(i)
			if random.IntN(100) == 0 {
				time.Sleep(time.Duration(random.IntN(100)) * time.Millisecond)
			}
		}
		time.Sleep(keepEvery)
	})
	if n := len(d.saved); d.saved[0] != 0 || d.saved[n-1] != 9999 || n > 20 {
		t.Errorf("saved %v", d.saved)
	}
	for i := 1; i < len(d.at); i++ {
		if d.at[i]-d.at[i-1] < keepEvery {
			t.Errorf("written at %v", d.at)
		}
	}
}

// TestKeepWithin: what was told is on the disk a second and a write later.
func TestKeepWithin(t *testing.T) {
	d := &disk{slow: 20 * time.Millisecond}
	keptBy(t, d, func(put func(int)) {
		for i := range 100 {
			put(i)
			time.Sleep(keepEvery + 40*time.Millisecond)
			synctest.Wait()
			d.Lock()
			if d.saved[len(d.saved)-1] != i {
				t.Errorf("%d is not on the disk: %v", i, d.saved)
			}
			d.Unlock()
		}
	})
}

// TestKeepOnAFullDisk: it goes on, tries now and then, and writes the newest when there is room,
// at once where it is news.
func TestKeepOnAFullDisk(t *testing.T) {
	d := &disk{full: true}
	keptBy(t, d, func(put func(int)) {
		for i := range 10_000 {
			put(i)
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		d.Lock()
		if n := len(d.at); n < 300 || n > 361 || d.errs != n {
			t.Errorf("%d attempts in an hour, %d told", n, d.errs)
		}
		d.full = false
		d.Unlock()
		time.Sleep(keepAgain)
	})
	if !slices.Equal(d.saved, []int{9999}) {
		t.Errorf("saved %v", d.saved)
	}
	d = &disk{full: true}
	keptBy(t, d, func(put func(int)) {
		put(1)
		time.Sleep(keepEvery)
		d.Lock()
		d.full = false
		d.Unlock()
		put(2)
		d.Lock()
		if !slices.Equal(d.saved, []int{2}) {
			t.Errorf("saved %v", d.saved)
		}
		d.Unlock()
		time.Sleep(time.Hour)
	})
	if len(d.at) != 2 {
		t.Errorf("written at %v", d.at)
	}
}

// TestKeepAtTheEnd: a planned stop writes what is not written, and waits for no disk that hangs.
func TestKeepAtTheEnd(t *testing.T) {
	d := &disk{}
	keptBy(t, d, func(put func(int)) { put(1); put(2); put(3) })
	if !slices.Equal(d.saved, []int{1, 3}) {
		t.Errorf("saved %v", d.saved)
	}
	d = &disk{}
	ended := keptBy(t, d, func(put func(int)) {
		put(1)
		put(2)
		d.Lock()
		d.slow = time.Minute
		d.Unlock()
	})
	if ended != keepLast {
		t.Errorf("a disk that hangs held it up for %v", ended)
	}
	d = &disk{}
	keptBy(t, d, func(put func(int)) { put(1) })
	if !slices.Equal(d.saved, []int{1}) {
		t.Errorf("saved %v: once is enough", d.saved)
	}
}
