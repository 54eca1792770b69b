package agent

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/identity"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

func TestFailure(t *testing.T) {
	start := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	down := symptom.Finding{
		ID: symptom.EnvoyDown, Severity: symptom.Error,
		Cause: "Envoy is not running", Next: "see the log",
	}
	rejected := symptom.Finding{
		ID: symptom.ListenerRejected, Key: "l", Severity: symptom.Error, Cause: "rejected",
	}
	under := symptom.Finding{
		ID: symptom.EnvoyNotConfigured, Severity: symptom.Error, Cause: "not configured",
		ExplainedBy: symptom.ListenerRejected,
	}
	warning := symptom.Finding{
		ID: symptom.DriftRepaired, Severity: symptom.Warning, Cause: "drift",
	}
	const text = "Envoy is not running; see the log"
	over := text + " (over; 2026-01-02T03:04:06Z to 2026-01-02T03:04:08Z, 1 time)"
	steps := []struct {
		after    time.Duration
		findings []symptom.Finding
		want     string
	}{
		{0, nil, ""},
		{0, []symptom.Finding{warning}, ""},
		{time.Second, []symptom.Finding{down, warning},
			text + " (since 2026-01-02T03:04:06Z, 1 time)"},
		// The newest is told: the older one is known, and may last for days.
		{2 * time.Second, []symptom.Finding{down, rejected},
			"rejected; and 1 more, see `service-proxy-agent status` " +
				"(since 2026-01-02T03:04:07Z, 1 time)"},
		{2 * time.Second, []symptom.Finding{down},
			text + " (since 2026-01-02T03:04:06Z, 1 time)"},
		{3 * time.Second, nil, over},
		{4 * time.Second, []symptom.Finding{under}, over},
		{5 * time.Second, []symptom.Finding{down},
			text + " (since 2026-01-02T03:04:06Z, 2 times)"},
		{6 * time.Second, []symptom.Finding{rejected},
			"rejected (since 2026-01-02T03:04:11Z, 1 time)"},
		{7 * time.Second, nil,
			"rejected (over; 2026-01-02T03:04:11Z to 2026-01-02T03:04:12Z, 1 time)"},
		{8 * time.Second, []symptom.Finding{down, rejected}, // of two at once the worst
			text + "; and 1 more, see `service-proxy-agent status` " +
				"(since 2026-01-02T03:04:13Z, 1 time)"},
		{9 * time.Second, []symptom.Finding{rejected},
			"rejected (since 2026-01-02T03:04:11Z, 2 times)"},
		{10 * time.Second, nil,
			"rejected (over; 2026-01-02T03:04:11Z to 2026-01-02T03:04:15Z, 2 times)"},
		{3 * time.Hour, []symptom.Finding{rejected},
			"rejected (since 2026-01-02T06:04:05Z, 1 time)"},
	}
	dir := t.TempDir()
	var f Failures
	for _, s := range steps {
		f = f.next(s.findings, start.Add(s.after))
		if f.String() != s.want {
			t.Errorf("after %v: %q, want %q", s.after, f, s.want)
		}
		if err := f.save(dir); err != nil {
			t.Fatal(err)
		}
		if back := loadFailures(dir, identity.VM{}); back.String() != f.String() || !back.equal(f) {
			t.Errorf("after %v: read back %q", s.after, back)
		}
	}
}

// TestFailureIs: which failure is which, what it says, and when one that comes again is another.
func TestFailureIs(t *testing.T) {
	start := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	found := func(key, cause string) symptom.Finding {
		return symptom.Finding{
			ID: symptom.ListenerRejected, Key: key, Severity: symptom.Error, Cause: cause,
		}
	}
	f := Failures{}.next([]symptom.Finding{found("a", "of a"), found("b", "of b")}, start)
	f = f.next([]symptom.Finding{found("b", "of b, in new words")}, start.Add(time.Second))
	want := Failures{
		Lasting: []Failure{
			{symptom.ListenerRejected, "b", "of b, in new words", start, time.Time{}, 1},
		},
		Over: Failure{symptom.ListenerRejected, "a", "of a", start, start.Add(time.Second), 1},
	}
	if !f.equal(want) {
		t.Errorf("it is %+v, want %+v", f, want)
	}
	other := want
	other.Over.Times++
	if f.equal(other) {
		t.Error("equal to one with another that is over")
	}
	other = want
	other.Lasting = nil
	if f.equal(other) {
		t.Error("equal to one with nothing that lasts")
	}

	over := f.next(nil, start.Add(time.Minute))
	if over.Over.Key != "b" || len(over.Lasting) != 0 {
		t.Errorf("all is over: %+v", over)
	}
	for _, tt := range []struct {
		after time.Duration
		key   string
		times int
	}{
		{time.Hour - time.Second, "b", 2},
		{time.Hour, "b", 1},
		{time.Second, "a", 1}, // only the last one that ended is known
	} {
		again := found(tt.key, "again")
		f := over.next([]symptom.Finding{again}, start.Add(time.Minute+tt.after))
		if is := f.Lasting[0]; is.Times != tt.times || is.First.Equal(start) != (tt.times == 2) {
			t.Errorf("%s after %v: %+v, want %d times", tt.key, tt.after, is, tt.times)
		}
	}
	// Whole seconds, in UTC: what is told, kept and compared is the same.
	east := time.FixedZone("east", 3600)
	late := start.Add(999 * time.Millisecond).In(east)
	f = Failures{}.next([]symptom.Finding{found("a", "of a")}, late)
	if first := f.Lasting[0].First; first != start {
		t.Errorf("it came at %v, want %v", first, start)
	}
}

// mine is a VM, and aClone one that was made from its disk; neither has been told its id yet.
var (
	mine   = identity.VM{Owner: identity.Owner{Machine: "mine", Boot: "1"}, Tagged: true}
	aClone = identity.VM{Owner: identity.Owner{Machine: "a clone", Boot: "2"}, Tagged: true}
)

// TestFailuresKept: they are kept for nobody else to read, and what cannot be read is no history.
func TestFailuresKept(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	if f := loadFailures(dir, identity.VM{}); !f.equal(Failures{}) {
		t.Errorf("nothing is kept, and it is %+v", f)
	}
	f := Failures{Over: Failure{Text: "x"}}
	if err := f.save(dir); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, failureFile)
	for path, mode := range map[string]os.FileMode{path: 0o600, dir: 0o700 | os.ModeDir} {
		if info, err := os.Stat(path); err != nil || info.Mode() != mode {
			t.Errorf("%s: mode %v, %v, want %v", path, info.Mode(), err, mode)
		}
	}
	f.Owner = mine.Owner
	if err := f.save(dir); err != nil {
		t.Fatal(err)
	}
	for _, vm := range []struct {
		identity.VM
		want string
	}{{mine, "x"}, {aClone, ""}} {
		if f := loadFailures(dir, vm.VM); f.Over.Text != vm.want {
			t.Errorf("on %+v: %+v", vm.VM, f)
		}
	}
	half := []byte(`{"over":{"text":"half"},"lasting":[{`)
	if err := os.WriteFile(path, half, 0o600); err != nil {
		t.Fatal(err)
	}
	if f := loadFailures(dir, identity.VM{}); !f.equal(Failures{}) {
		t.Errorf("half of it is read: %+v", f)
	}
	if err := f.save(filepath.Join(path, "below-a-file")); err == nil {
		t.Error("kept where no folder can be made")
	}
}
