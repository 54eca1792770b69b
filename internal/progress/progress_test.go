package progress

import (
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
		{State{Status: Failed, Failure: "a\nb\x00\u2028c", Next: "d"}, "a b  c; d"},
	} {
		if have := tt.state.FailureLine(); have != tt.want {
			t.Errorf("have %q, want %q", have, tt.want)
		}
	}
	if have := (State{Status: Failed, Failure: strings.Repeat("é", 2000), Next: "x"}).FailureLine(); len(have) > 1024 {
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
	if err := Request(filepath.Join(dir, "absent"), "x"); err == nil {
		t.Error("an absent folder is no error")
	}
}
