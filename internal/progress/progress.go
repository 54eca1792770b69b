// Package progress is where bootstrap and the daemon meet: how far bootstrap came, written by it
// into a file and published by the daemon, and the daemon's request for another run.
//
// It takes no step and publishes nothing. Package bootstrap is before it in the flow, and agent is
// after it.
package progress

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"time"
	"unicode"

	"github.com/service-proxy-agent/service-proxy-agent/internal/atomicfile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/identity"
	"github.com/service-proxy-agent/service-proxy-agent/internal/untrusted"
)

// Where the two meet.
const (
	// StateDir holds StateFile, which bootstrap writes and the daemon reads and publishes.
	StateDir = "/var/lib/service-proxy-agent"
	// RuntimeDir holds RequestFile, which the daemon writes; a path unit starts bootstrap then.
	RuntimeDir = "/run/service-proxy-agent"

	StateFile   = "bootstrap.json"
	RequestFile = "bootstrap-requested"

	// OwnerFile says whose Envoy's configuration beside it is, and what else bootstrap keeps of the
	// VM outside of StateDir. Bootstrap writes it, for anyone to read.
	OwnerFile = "/etc/service-proxy-agent/owner.json"

	// What the daemon keeps in StateDir for its next start.
	AttributeFile = "attribute.json"
	FailureFile   = "last-failure.json"
	HistoryFile   = "history.json"
	BrakeFile     = "interception.json"
)

// Values of State.Status, as the guest attribute bootstrap-status has them. "" stands for: never
// started.
const (
	InProgress = "IN PROGRESS"
	Failed     = "FAILED"
	Finished   = "FINISHED"
)

// State is how far bootstrap came. It is small: the daemon reads it each second.
type State struct {
	identity.Owner // whose it is

	Status  string    `json:"status"`
	Step    string    `json:"step,omitempty"` // the step under way, or the one that failed
	Time    time.Time `json:"time"`           // of the last change
	Attempt int       `json:"attempt"`        // in this run of bootstrap, from 1

	// Failure is the last failure, one line: step, cause, what to do. It stays after bootstrap has
	// finished.
	Failure     string    `json:"failure,omitempty"`
	FailureTime time.Time `json:"failure_time,omitzero"`
	// Next says, while Status is Failed, what bootstrap does by itself; Permanent that this is only
	// waiting for someone to mend the cause, so that autohealing may count it as failed for good.
	Next      string    `json:"next,omitempty"`
	Retry     time.Time `json:"retry,omitzero"`
	Permanent bool      `json:"permanent,omitempty"`

	EnvoyVersion string `json:"envoy_version,omitempty"` // of the installed binary
	EnvoySource  string `json:"envoy_source,omitempty"`  // where it came from, without a URL's query
	// PrimarySum is Sum of the source that the binary is really from; "" when it is not ours.
	// (Earlier versions wrote primary-source's here even when the binary came from a fallback, but
	// never in EnvoySource: who compares must look at both.)
	PrimarySum string `json:"primary_sum,omitempty"`
	// The same of the binary that the last upgrade replaced, for a rollback.
	PreviousSource string `json:"previous_source,omitempty"`
	PreviousSum    string `json:"previous_sum,omitempty"`

	// AttributeSum is Sum of the attribute's text that a finished bootstrap has brought about; see
	// Stale.
	AttributeSum string `json:"attribute_sum,omitempty"`

	// Envoy is the configuration that was written for Envoy; nil: none was.
	Envoy *EnvoyConfig `json:"envoy,omitempty"`

	MadeUsers []string `json:"made_users,omitempty"` // users that were not there before us
	MadeLogs  bool     `json:"made_logs,omitempty"`  // nor was the folder of Envoy's logs

	// Story is what was done, oldest first, at most maxStory lines: for the serial port. Seq goes on
	// counting over restarts.
	Story []Line `json:"story,omitempty"`

	// Before is what was found, while it is not known whether it is this VM's: to be gone on with, or
	// to be discarded, when it is.
	Before *State `json:"before,omitempty"`
	// Discarded is what bootstrap found of another VM, and discarded; nil: nothing.
	Discarded *identity.Discarded `json:"discarded,omitempty"`
}

// OfDisk is what of it is true of the disk, whichever VM has it: which Envoy is installed, and from
// where, and which users and logs bootstrap has made. Without it an Envoy of ours would be taken
// for somebody else's.
func (s State) OfDisk() State {
	return State{
		EnvoyVersion: s.EnvoyVersion, EnvoySource: s.EnvoySource, PrimarySum: s.PrimarySum,
		MadeUsers: s.MadeUsers, MadeLogs: s.MadeLogs,
	}
}

// Worked says whether bootstrap has ever finished on this disk, be it on another VM.
func (s State) Worked() bool {
	return s.Status == Finished || s.AttributeSum != "" || s.Before != nil && s.Before.Worked()
}

// Whose is whose the state is. One of a version that did not say is of the VM whose the daemon's
// files beside it are.
func (s State) Whose(dir string) identity.Owner {
	if s.Owner != (identity.Owner{}) || s.Status == "" {
		return s.Owner
	}
	return identity.ReadAny(dir, AttributeFile, FailureFile, HistoryFile)
}

// EnvoyConfig is what tells the Envoy that was configured from any other.
type EnvoyConfig struct {
	File    string   `json:"file"`
	Node    string   `json:"node"`    // its id
	Targets []string `json:"targets"` // its control planes, host:port
}

// Line is one line of the story.
type Line struct {
	Seq      int       `json:"seq"`
	Time     time.Time `json:"time"`
	Severity string    `json:"severity"` // INFO, WARNING or ERROR
	Text     string    `json:"text"`
}

const maxStory = 64

// maxState is far above what maxStory lines, each of at most 1 KB, come to.
const maxState = 1 << 20

// Tell adds a line to the story; the oldest goes when there are too many.
func (s *State) Tell(now time.Time, severity, text string) {
	seq := 1
	if n := len(s.Story); n > 0 {
		seq = s.Story[n-1].Seq + 1
	}
	s.Story = append(s.Story, Line{seq, now.UTC(), severity, OneLine(text)})
	s.Story = s.Story[max(0, len(s.Story)-maxStory):]
}

// FailureLine is the value of the guest attribute bootstrap-last-failure: what failed, and what
// comes next while it still does. "" without a failure.
func (s State) FailureLine() string {
	switch {
	case s.Failure == "":
		return ""
	case s.Status == Failed && s.Next != "":
		return OneLine(s.Failure + "; " + s.Next)
	default:
		return OneLine(s.Failure + " (at " + s.FailureTime.UTC().Format(time.RFC3339) + ")")
	}
}

// Stale says that bootstrap has finished, but for another text of the attribute than this one: the
// daemon then calls Request, where the text is well-formed. (A bootstrap that has not finished
// watches the attribute itself.)
func (s State) Stale(text []byte) bool {
	return s.Status == Finished && s.AttributeSum != Sum(string(text))
}

// Sum stands for a text in the state where the text itself must not be: a URL, which may be signed.
func Sum(text string) string {
	if text == "" {
		return ""
	}
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:8])
}

// Read reads the state from dir. Without a file it is the zero State: bootstrap was never started
// here. The folder belongs to the daemon's user: root reads what that user may have written, and
// must believe nothing that would harm.
func Read(dir string) (State, error) {
	var state State
	text, err := untrusted.ReadFile(filepath.Join(dir, StateFile), maxState)
	if errors.Is(err, fs.ErrNotExist) {
		return state, nil
	}
	if err != nil {
		return state, fmt.Errorf("read bootstrap's state: %w", err)
	}
	if err := json.Unmarshal(text, &state); err != nil {
		return State{}, fmt.Errorf("parse bootstrap's state: %w", err)
	}
	return state, nil
}

// Write replaces the state in dir. The folder belongs to the daemon's user, whom root must not
// trust: a new file under a random name and a rename follow no link planted there.
func Write(dir string, state State) error {
	text, err := json.MarshalIndent(state, "", "  ")
	if err != nil {
		return fmt.Errorf("write bootstrap's state: %w", err)
	}
	// Anyone may read it; the folder is 0700.
	return atomicfile.Write(filepath.Join(dir, StateFile), append(text, '\n'), 0o644)
}

// Request asks for a run of bootstrap, which only root can do: service-proxy-bootstrap.path starts
// the unit when the file appears in dir (RuntimeDir). A run that is waiting for its next attempt
// takes it up at once.
func Request(dir, reason string) error {
	return atomicfile.Write(filepath.Join(dir, RequestFile), []byte(OneLine(reason)+"\n"), 0o600)
}

// OneLine makes text fit a guest attribute or a serial line: nothing that a terminal obeys or does
// not show, at most 1 KB.
func OneLine(text string) string {
	text = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(text, "?"))
	const most = 1000
	if len(text) > most {
		text = strings.ToValidUTF8(text[:most], "") + "…"
	}
	return strings.TrimSpace(text)
}
