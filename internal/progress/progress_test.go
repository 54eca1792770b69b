package progress

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestState(t *testing.T) {
	dir := t.TempDir()
	if have, err := Read(dir); err != nil || !cmp.Equal(have, State{}) {
		t.Errorf("without a file: %+v, %v", have, err)
	}
	want := State{Status: Failed, Step: "install Envoy", Time: time.Unix(1700000000, 0).UTC(),
		Failure: "install Envoy: x", Next: "it is tried again",
		Story: []Line{{1, time.Unix(1700000000, 0).UTC(), "INFO", "text"}}}
	if err := Write(dir, want); err != nil {
		t.Fatal(err)
	}
	have, err := Read(dir)
	if diff := cmp.Diff(want, have); err != nil || diff != "" {
		t.Errorf("%v (-want +have):\n%s", err, diff)
	}
	if err := os.WriteFile(filepath.Join(dir, StateFile), []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Read(dir); err == nil {
		t.Error("half a file is no error")
	}
	// As much as is read of a file in that folder, and no more.
	for _, tt := range []struct {
		size int
		ok   bool
	}{{1 << 20, true}, {1<<20 + 1, false}} {
		text := "{}" + strings.Repeat(" ", tt.size-2)
		if err := os.WriteFile(filepath.Join(dir, StateFile), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		_, err := Read(dir)
		if (err == nil) != tt.ok || err != nil &&
			!strings.HasPrefix(err.Error(), "read bootstrap's state: ") {
			t.Errorf("a file of %d bytes: %v", tt.size, err)
		}
	}
}

// The words and names are read by others: the guest attribute's by whoever watches the fleet, the
// files' by the units and by versions before and after this one.
func TestWords(t *testing.T) {
	for _, tt := range []struct{ have, want string }{
		{InProgress, "IN PROGRESS"}, {Failed, "FAILED"}, {Finished, "FINISHED"},
		{StateDir, "/var/lib/service-proxy-agent"}, {RuntimeDir, "/run/service-proxy-agent"},
		{StateFile, "bootstrap.json"}, {RequestFile, "bootstrap-requested"},
		{Sum("https://example.com/envoy.tgz"), "9e3a96dbd3937390"}, {Sum(""), ""},
	} {
		if tt.have != tt.want {
			t.Errorf("have %q, want %q", tt.have, tt.want)
		}
	}
}

// The daemon tells the lines whose number is higher than the last it has told.
func TestTell(t *testing.T) {
	var s State
	now := time.Unix(1700000000, 0).In(time.FixedZone("", 3600))
	for i := range 70 {
		s.Tell(now, "INFO", fmt.Sprintf("step\n%d", i+1))
		if i == 0 && s.Story[0].Seq != 1 {
			t.Errorf("it begins with %+v", s.Story[0])
		}
	}
	if len(s.Story) != 64 {
		t.Fatalf("%d lines", len(s.Story))
	}
	for i, line := range s.Story {
		want := Line{7 + i, time.Unix(1700000000, 0).UTC(), "INFO", fmt.Sprintf("step %d", 7+i)}
		if line != want {
			t.Errorf("line %d is %+v, want %+v", i, line, want)
		}
	}
}

func TestOneLine(t *testing.T) {
	for _, tt := range []struct{ text, want string }{
		{" a\tb\u2029c\xff ", "a b c?"},
		{"a\u202Eb\u200bc", "a b c"},
		{strings.Repeat("x", 1000), strings.Repeat("x", 1000)},
		{strings.Repeat("x", 1001), strings.Repeat("x", 1000) + "…"},
		{strings.Repeat("x", 999) + "éé", strings.Repeat("x", 999) + "…"},
	} {
		if have := OneLine(tt.text); have != tt.want {
			t.Errorf("%q is %q, want %q", tt.text, have, tt.want)
		}
	}
}

// The folder belongs to the daemon's user: root follows no link planted there.
func TestWriteStateFollowsNoLink(t *testing.T) {
	dir, precious := t.TempDir(), filepath.Join(t.TempDir(), "precious")
	if err := os.WriteFile(precious, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(precious, filepath.Join(dir, StateFile)); err != nil {
		t.Fatal(err)
	}
	if err := Write(dir, State{Status: Finished}); err != nil {
		t.Fatal(err)
	}
	if have, err := os.ReadFile(precious); err != nil || string(have) != "x" {
		t.Errorf("the link's target is %q, %v", have, err)
	}
	if have, err := Read(dir); err != nil || have.Status != Finished {
		t.Errorf("have %+v, %v", have, err)
	}
}

func TestFailureLine(t *testing.T) {
	at := time.Unix(1700000000, 0)
	for _, tt := range []struct {
		state State
		want  string
	}{
		{State{}, ""},
		{State{Status: Failed, Failure: "a", Next: "b"}, "a; b"},
		{State{Status: Finished, Failure: "a", FailureTime: at}, "a (at 2023-11-14T22:13:20Z)"},
		{State{Status: Finished, Failure: "a", FailureTime: at, Next: "b"},
			"a (at 2023-11-14T22:13:20Z)"},
		{State{Status: Failed, Failure: "a", FailureTime: at}, "a (at 2023-11-14T22:13:20Z)"},
		{State{Status: Failed, Failure: "a\nb\x00\u2028c", Next: "d"}, "a b  c; d"},
	} {
		if have := tt.state.FailureLine(); have != tt.want {
			t.Errorf("have %q, want %q", have, tt.want)
		}
	}
	long := State{Status: Failed, Failure: strings.Repeat("é", 2000), Next: "x"}
	if have := long.FailureLine(); len(have) > 1024 {
		t.Errorf("%d bytes", len(have))
	}
}

func TestStale(t *testing.T) {
	s := State{Status: Finished, AttributeSum: Sum("a")}
	if s.Stale([]byte("a")) || !s.Stale([]byte("b")) {
		t.Error("a finished bootstrap is stale for another text, and for no other reason")
	}
	s.Status = Failed
	if s.Stale([]byte("b")) {
		t.Error("one that has not finished watches the attribute itself")
	}
}

func TestRequest(t *testing.T) {
	dir := t.TempDir()
	if err := Request(dir, "the attribute\nhas changed"); err != nil {
		t.Fatal(err)
	}
	if have, err := os.ReadFile(filepath.Join(dir, RequestFile)); err != nil ||
		string(have) != "the attribute has changed\n" {
		t.Errorf("have %q, %v", have, err)
	}
	// Root alone has to read it, and whoever asked.
	if info, err := os.Stat(filepath.Join(dir, RequestFile)); err != nil ||
		info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	if err := Request(filepath.Join(dir, "absent"), "x"); err == nil {
		t.Error("an absent folder is no error")
	}
}
