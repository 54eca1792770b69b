package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
)

// The order in which the serial port tells of them, and in which a VM is made a node.
func TestStepsInOrder(t *testing.T) {
	want := []string{"look at the system", "read the attribute", "read the VM's metadata", "install units and users",
		"install packages", "install Envoy", "make the log files", "configure Envoy", "start Envoy"}
	var have []string
	for _, s := range steps {
		have = append(have, s.name)
	}
	if !slices.Equal(have, want) {
		t.Errorf("have %q, want %q", have, want)
	}
}

// A step that fails is the last, unless the VM goes on without it: then its failure is told when
// the others are done, or theirs instead.
func TestAttemptGoesOn(t *testing.T) {
	defer func(real []step) { steps = real }(steps)
	var ran []string
	fake := func(name string, err error) step {
		return step{name, func(*attempt, context.Context) error {
			ran = append(ran, name)
			return err
		}, ofOthers}
	}
	goesOn := &Failure{Err: errors.New("lesser"), goesOn: true}
	fails := &Failure{Err: errors.New("worse"), Advice: "mend it", Permanent: true}
	for _, tt := range []struct {
		steps []step
		ran   string
		fails string
	}{
		{[]step{fake("1", nil), fake("2", nil)}, "1 2", ""},
		{[]step{fake("1", fails), fake("2", nil)}, "1", "1: worse; mend it"},
		{[]step{fake("1", errors.New("plain")), fake("2", nil)}, "1", "1: plain"},
		{[]step{fake("1", goesOn), fake("2", nil), fake("3", nil)}, "1 2 3", "1: lesser"},
		{[]step{fake("1", goesOn), fake("2", fails), fake("3", nil)}, "1 2", "2: worse; mend it"},
	} {
		ran, steps = nil, tt.steps
		fails.Step, goesOn.Step = "", ""
		b := newBootstrapper(Options{Root: t.TempDir()})
		have := ""
		if f := b.attempt(t.Context(), metadata.Attribute{}); f != nil {
			have = f.Error()
		}
		if strings.Join(ran, " ") != tt.ran || have != tt.fails {
			t.Errorf("ran %q, fails %q; want %q, %q", ran, have, tt.ran, tt.fails)
		}
		if last := b.state.Step; last != ran[len(ran)-1] || len(b.state.Story) != 0 {
			t.Errorf("the state is at %q, and says %v", last, b.state.Story)
		}
	}
}

// What the errors of each step mean: what to do, and whether waiting helps.
func TestMeanings(t *testing.T) {
	_, malformed := attribute.Parse([]byte(`{"proxy-spec": {"proxy-port": "x"}}`))
	disk := func(errno syscall.Errno) error {
		return fmt.Errorf("x: %w", &os.PathError{Op: "open", Path: "p", Err: errno})
	}
	means := map[string]meaning{}
	for _, s := range steps {
		means[s.name] = s.means
	}
	onDisk := []string{StepUnits, StepEnvoy, StepLogs, StepConfigure}
	others := []string{StepVM, StepPackages, StepStart}
	for _, tt := range []struct {
		err       error
		steps     []string
		advice    string
		permanent bool
	}{
		{malformed, []string{StepAttribute}, "correct it in the VM's metadata", true},
		{metadata.ErrNoAttribute, []string{StepAttribute}, "", true},
		{fmt.Errorf("x: %w", attribute.ErrAnthos), []string{StepAttribute}, "", true},
		{&metadata.Error{Path: "x", Err: errors.New("refused")}, []string{StepAttribute}, "", false},
		{disk(syscall.ENOSPC), onDisk, "make room on that disk", false},
		{disk(syscall.EDQUOT), onDisk, "make room on that disk", false},
		{disk(syscall.EROFS), onDisk, "make that folder writable, or use an image where it is", false},
		{disk(syscall.EACCES), onDisk, "run as root", false},
		{disk(syscall.EPERM), onDisk, "run as root", false},
		{disk(syscall.EIO), onDisk, "", false},
		// A firewall's EPERM is no disk's.
		{disk(syscall.EPERM), others, "", false},
		{disk(syscall.EPERM), []string{StepAttribute}, "", false},
	} {
		for _, step := range tt.steps {
			f := failed(step, tt.err, means[step])
			if f.Step != step || f.Advice != tt.advice || f.Permanent != tt.permanent ||
				!errors.Is(f, tt.err) {
				t.Errorf("%v in %q: have %+v", tt.err, step, f)
			}
		}
	}
	if f := failed(StepVM, nil, ofDisk); f != nil {
		t.Errorf("no error: %v", f)
	}
	// A step that knows better says it itself, and may be a part of another.
	own := &Failure{Step: StepUnits, Err: disk(syscall.EPERM), Advice: "mine"}
	if f := failed(StepInstall, own, ofDisk); f.Step != StepUnits || f.Advice != "mine" {
		t.Errorf("have %+v", f)
	}
}

// TestStepsAreExplained: docs/symptoms.md has what to do about each step, and about each of the
// words that say more of one.
func TestStepsAreExplained(t *testing.T) {
	page, err := os.ReadFile("../../docs/symptoms.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(page), "\n### `bootstrap-failed`\n")
	section, _, _ = strings.Cut(section, "\n### ")
	words := []string{errChecksum.Error(), errNoAccount.Error(), errArchive.Error(),
		(&statusError{code: http.StatusForbidden}).Error(),
		(&statusError{code: http.StatusNotFound}).Error()}
	for _, s := range steps {
		words = append(words, s.name+":")
	}
	for _, w := range words {
		if !strings.Contains(section, "`"+w+"`") && !strings.Contains(section, "\n| **"+w+"**") {
			t.Errorf("it does not explain %q", w)
		}
	}
}
