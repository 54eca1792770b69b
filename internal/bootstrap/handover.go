package bootstrap

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/atomicfile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/layout"
	"github.com/service-proxy-agent/service-proxy-agent/internal/neighbour"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// Where it is kept what stood here before ours took over: what was there is written down first, so
// that whatever is cut short is finished by the next try, and Remove can give it back.
const (
	handoverDir  = layout.KeptDir + "/take-over"
	handoverFile = handoverDir + "/record.json"
	keptDir      = handoverDir + "/files" // files under the paths that they had
)

// Phases of a handover, in their order.
const (
	handoverWanted = "wanted" // theirs goes on until ours is ready to take its place
	handoverTaking = "taking" // theirs is being stopped, and ours started
	handoverTaken  = "taken"
	handoverGiving = "giving back"
)

// handover is the record of a take-over from Google's closed agent.
type handover struct {
	Phase string    `json:"phase"`
	Time  time.Time `json:"time"`         // of the last change
	By    string    `json:"by,omitempty"` // whose wish it was
	// Failure is why the last try ended; "" when it has not.
	Failure string `json:"failure,omitempty"`

	Kept   []keptFile `json:"kept,omitempty"`
	Active bool       `json:"active"` // its agent ran
	Units  []keptUnit `json:"units,omitempty"`
	// Envoy is the one that it had; zero: none was seen.
	Envoy keptEnvoy `json:"envoy,omitzero"`
	// Loose are processes of its that belonged to no service, which nobody can start again.
	Loose []string `json:"loose,omitempty"`
	// LogDir says that the folder of Envoy's logs was there before ours came.
	LogDir bool `json:"log_dir,omitempty"`
}

// keptFile is a file or link that was moved aside, or replaced.
type keptFile struct {
	Path string `json:"path"`
	Link string `json:"link,omitempty"` // what it leads to; "": it is a file
	// Replaced: ours is in its place, and stays there until it is given back.
	Replaced bool `json:"replaced,omitempty"`
}

// keptUnit is another unit of its, which is masked meanwhile.
type keptUnit struct {
	Name   string `json:"name"`
	Active bool   `json:"active"`
}

// keptEnvoy is an Envoy that was replaced.
type keptEnvoy struct {
	UID     uint32 `json:"uid"`
	Program string `json:"program"`
	Unit    string `json:"unit,omitempty"`
}

// under says whether there is a record, and it is in one of these phases.
func (h *handover) under(phases ...string) bool {
	return h != nil && slices.Contains(phases, h.Phase)
}

// readHandover reads the record; nil: ours took over from nobody.
func (b *bootstrapper) readHandover() (*handover, error) {
	text, err := os.ReadFile(b.path(handoverFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var h handover
	if err == nil {
		err = json.Unmarshal(text, &h)
	}
	if err != nil {
		return nil, fmt.Errorf("read from whom ours took over: %w; mend %q, which has what is to be "+
			"given back", err, handoverFile)
	}
	return &h, nil
}

func (b *bootstrapper) writeHandover(h *handover) error {
	h.Time = time.Now().UTC()
	text, err := json.MarshalIndent(h, "", "  ")
	if err == nil {
		err = os.MkdirAll(b.path(handoverDir), 0o755)
	}
	if err == nil {
		err = atomicfile.Write(b.path(handoverFile), append(text, '\n'), 0o600)
	}
	if err != nil {
		return fmt.Errorf("write down what stands here: %w", err)
	}
	return nil
}

// note has the record keep a file, which is written down before the file is touched.
func (h *handover) note(file keptFile) {
	for i, k := range h.Kept {
		if k.Path == file.Path {
			h.Kept[i] = file
			return
		}
	}
	h.Kept = append(h.Kept, file)
}

// kept says whether the file is in the record.
func (h *handover) kept(path string) bool {
	return h != nil && slices.ContainsFunc(h.Kept, func(k keptFile) bool { return k.Path == path })
}

// keep makes the copy of a file. Where it is gone already an earlier try has moved it.
func (b *bootstrapper) keep(file keptFile) error {
	if file.Link != "" {
		return nil // the record has all of it
	}
	info, err := os.Lstat(b.path(file.Path))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	copied := b.path(filepath.Join(keptDir, file.Path))
	if err := os.MkdirAll(filepath.Dir(copied), 0o755); err != nil {
		return err
	}
	temp := copied + ".new"
	_ = os.Remove(temp) // of a try that was cut short
	if err := copyFile(b.path(file.Path), temp, info.Mode().Perm()); err != nil {
		return err
	}
	return os.Rename(temp, copied)
}

// bring puts a kept file back where it was, over what is there.
func (b *bootstrapper) bring(file keptFile) error {
	target := b.path(file.Path)
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return err
	}
	dir, base := filepath.Split(target)
	temp := filepath.Join(dir, "."+base+".back")
	_ = os.Remove(temp)
	if file.Link != "" {
		if err := os.Symlink(file.Link, temp); err != nil {
			return err
		}
		return os.Rename(temp, target)
	}
	copied := b.path(filepath.Join(keptDir, file.Path))
	info, err := os.Lstat(copied)
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Lstat(target); err == nil {
			return nil // it was never moved
		}
	}
	if err != nil {
		return err
	}
	if err := copyFile(copied, temp, info.Mode().Perm()); err != nil {
		return err
	}
	return os.Rename(temp, target)
}

// shadows are the files of theirs that stand in the way of our unit: unit files that systemd would
// take instead of ours, drop-ins, which it would apply to ours, and the links that enable theirs,
// which keep `systemctl enable` from making ours.
func (b *bootstrapper) shadows(units []neighbour.Unit) (files []keptFile, err error) {
	if len(units) == 0 {
		return nil, nil
	}
	var paths []string
	for _, unit := range units {
		if dir := filepath.Dir(unit.Path); dir == systemd.ConfDir || dir == runUnits ||
			dir == layout.Here.UnitDir {
			paths = append(paths, unit.Path)
		}
	}
	for _, dir := range []string{systemd.ConfDir, runUnits} {
		dropIns, err := filepath.Glob(b.path(filepath.Join(dir, systemd.AgentUnit+".d", "*")))
		if err != nil {
			return nil, err
		}
		for _, path := range dropIns {
			if path = strings.TrimPrefix(path, b.Root); path != guardFile {
				paths = append(paths, path)
			}
		}
	}
	for _, pattern := range []string{"*", "*.wants/*", "*.requires/*"} {
		links, err := filepath.Glob(b.path(filepath.Join(systemd.ConfDir, pattern)))
		if err != nil {
			return nil, err
		}
		for _, path := range links {
			to, err := os.Readlink(path)
			if err != nil || filepath.Dir(to) == layout.Here.UnitDir || to == os.DevNull ||
				filepath.Base(path) != systemd.AgentUnit && filepath.Base(to) != systemd.AgentUnit {
				continue // no link, ours, or a mask
			}
			paths = append(paths, strings.TrimPrefix(path, b.Root))
		}
	}
	for _, path := range paths {
		info, err := os.Lstat(b.path(path))
		if err != nil {
			return nil, err
		}
		file := keptFile{Path: path}
		if info.Mode()&fs.ModeSymlink != 0 {
			if file.Link, err = os.Readlink(b.path(path)); err != nil {
				return nil, err
			}
		} else if !info.Mode().IsRegular() {
			continue
		}
		if !slices.ContainsFunc(files, func(f keptFile) bool { return f.Path == path }) {
			files = append(files, file)
		}
	}
	return files, nil
}

// unmoved adds to the files what the record has of an earlier try and is still there: a link, say,
// whose unit was moved before it.
func (b *bootstrapper) unmoved(h *handover, files []keptFile) []keptFile {
	for _, file := range h.Kept {
		has := slices.ContainsFunc(files, func(f keptFile) bool { return f.Path == file.Path })
		if has || file.Replaced || !b.exists(file.Path) {
			continue
		}
		to, _ := os.Readlink(b.path(file.Path))
		if to != file.Link || filepath.Dir(to) == layout.Here.UnitDir {
			continue // ours by now
		}
		files = append(files, file)
	}
	return files
}

const runUnits = "/run/systemd/system"

// moveAside keeps the files and takes them away, each noted before.
func (b *bootstrapper) moveAside(h *handover, files []keptFile) (moved []string, err error) {
	for _, file := range files {
		h.note(file)
	}
	if err := b.writeHandover(h); err != nil {
		return nil, err
	}
	for _, file := range files { // all are kept before the first goes
		if err := b.keep(file); err != nil {
			return nil, fmt.Errorf("keep what stands here: %w", err)
		}
	}
	for _, file := range files {
		if err := os.Remove(b.path(file.Path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return moved, fmt.Errorf("move aside: %w", err)
		}
		if dir := filepath.Dir(b.path(file.Path)); strings.HasSuffix(dir, ".d") {
			_ = os.Remove(dir) // stays where something else is in it
		}
		moved = append(moved, file.Path)
	}
	return moved, nil
}
