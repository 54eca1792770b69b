package agent

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/atomicfile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/identity"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/untrusted"
)

const (
	historyFile = progress.HistoryFile
	// maxHistoryFile is more than the transitions ever take.
	maxHistoryFile = 256 << 10
	maxKeptFile    = 4 << 20 // the attribute's and the failures'
	maxWord        = 64      // of an ID, which another version may have
	// maxTimes is more than ever happens, and a sum of them is still a number.
	maxTimes = 1_000_000_000
)

// wordsOfID is the form of an ID, as docs/status.schema.json has it.
var wordsOfID = regexp.MustCompile(`^[a-z0-9]+(-[a-z0-9]+)*$`)

// keptTransitions are the last ones as the state folder keeps them for the next start. Nobody
// changes them.
type keptTransitions struct {
	identity.Owner
	Transitions []status.Transition `json:"transitions"`
}

// loadTransitions reads those of earlier runs on this VM.
func loadTransitions(dir string, vm identity.VM) ([]status.Transition, error) {
	path := filepath.Join(dir, historyFile)
	text, err := readKept(path, maxHistoryFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	k := keptTransitions{}
	if err := json.Unmarshal(text, &k); err != nil {
		return nil, fmt.Errorf("read %q: %w", path, err)
	}
	if !vm.Judge(k.Owner).Believed() {
		return nil, nil
	}
	return k.sound(), nil
}

// readKept reads a file of the state folder, of so many bytes at most. The rules wait for it: so it
// waits for nobody, as it would for a FIFO that has its name.
func readKept(path string, most int64) ([]byte, error) {
	file, err := untrusted.OpenRegular(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return io.ReadAll(io.LimitReader(file, most))
}

// sound are the transitions as this program would have written them, whoever has: another version
// of it, or somebody by hand.
func (k keptTransitions) sound() (all []status.Transition) {
	for _, t := range k.Transitions[max(0, len(k.Transitions)-maxTransitions):] {
		t = bounded(t)
		if t.Kind != "" && !slices.Contains(status.Kinds, t.Kind) {
			t.Kind = status.OfAgent // a newer version's: docs/status.schema.json lists those of this one
		}
		if len(t.ID) > maxWord || !wordsOfID.MatchString(string(t.ID)) {
			t.ID = ""
		}
		t.Time, t.First = t.Time.UTC(), t.First.UTC()
		if t.Times < 2 || t.First.IsZero() || !written(t.First) {
			t.Times, t.First = 0, time.Time{}
		}
		t.Times = min(t.Times, maxTimes)
		switch t.Severity {
		case "info", "warning", "error":
		default:
			t.Severity = "info"
		}
		if t.Text != "" && t.Kind != "" && !t.Time.IsZero() && written(t.Time) {
			all = append(all, t)
		}
	}
	return all
}

// written says whether a time can be written as JSON: 9999-12-31T23:59:59-01:00 can be read, and is
// of the year 10000 in UTC.
func written(t time.Time) bool { return t.Year() >= 0 && t.Year() <= 9999 }

func (k keptTransitions) save(dir string) error {
	var text bytes.Buffer
	e := json.NewEncoder(&text)
	e.SetEscapeHTML(false) // it may be read by eye
	if err := e.Encode(k); err != nil {
		return err
	}
	return keepFile(dir, historyFile, text.Bytes())
}

// keepFile writes a file of the state folder, for root and the agent's user alone: URLs in it may
// be signed.
func keepFile(dir, name string, text []byte) error {
	// systemd makes it; without, somebody runs the agent by hand
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return atomicfile.Write(filepath.Join(dir, name), text, 0o600)
}
