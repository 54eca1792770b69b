// Package neighbour finds Google's closed service proxy agent on this VM: the one that
// `gcloud compute instance-templates create --service-proxy enabled` installs without
// --service-proxy-agent-location. It has our unit's name, our chains and our guest attributes.
//
// What is known of it: the name of its unit, service-proxy-agent.service (Google's documents,
// and the tests of Istio that ran it), Envoy in /usr/local/bin/envoy with its admin interface
// on port 15000, the chains and the guest attributes. What is not known: where its unit and its
// program lie, as which user its Envoy runs, and whether that has a unit of its own. So it is
// found by several marks, each of which may be missing, and nothing is taken for granted but
// the unit's name. See docs/design/facts.md#gce-closed-agent.
//
// It changes nothing. Package agent tells of what is found here, and internal/bootstrap takes over.
package neighbour

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/service-proxy-agent/service-proxy-agent/internal/layout"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// Unit is a unit file of our agent's name that is not ours.
type Unit struct {
	Path string
	// Program is what it starts, as its first ExecStart= names it; "" where that tells nothing.
	Program string
	// First says that systemd takes it and not ours, which is there or will be.
	First bool
}

// unitDirs are where systemd looks for unit files, the first one first (systemd.unit(5)). What
// generators make is not among them: it is made of files that lie elsewhere.
var unitDirs = []string{systemd.ConfDir, "/run/systemd/system", layout.Archive.UnitDir,
	"/lib/systemd/system", layout.Packages.UnitDir}

// maxUnit is far above what a unit file has.
const maxUnit = 256 << 10

// Units are the unit files of our agent's name beneath root that are not ours, the first one that
// systemd would take first. One that masks our unit is no other's.
func Units(root string) (units []Unit, err error) {
	var errs []error
	first := true
	for _, dir := range unitDirs {
		path := filepath.Join(dir, systemd.AgentUnit)
		if dir == "/lib/systemd/system" && sameDir(root, dir, layout.Packages.UnitDir) {
			continue // Debian's /lib is a link
		}
		text, err := readUnit(filepath.Join(root, path))
		ours := dir == layout.Here.UnitDir
		switch {
		case errors.Is(err, fs.ErrNotExist):
			first = first && !ours // ours is to come there
			continue
		case err != nil:
			errs = append(errs, fmt.Errorf("look for another agent's unit: %w", err))
			continue
		}
		switch program, own := starts(text); {
		case program == "", own: // masked by the administrator, or nothing that could run
		default:
			units = append(units, Unit{Path: path, Program: program, First: first || ours})
		}
		first = false
	}
	return units, errors.Join(errs...)
}

func sameDir(root, a, b string) bool {
	infoA, errA := os.Stat(filepath.Join(root, a))
	infoB, errB := os.Stat(filepath.Join(root, b))
	return errA == nil && errB == nil && os.SameFile(infoA, infoB)
}

// readUnit reads a unit file; "" for one that masks, which is empty or leads to /dev/null.
func readUnit(path string) (string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() {
		return "", nil
	}
	if info.Size() > maxUnit {
		return "", fmt.Errorf("read %q: %d bytes are no unit file", path, info.Size())
	}
	text, err := os.ReadFile(path)
	return string(text), err
}

// starts is what a unit file starts, and whether that is our daemon: an administrator may have
// copied our unit to change it (`systemctl edit --full`).
func starts(unit string) (program string, ours bool) {
	const prefixes, quotes = "@-:+!|", "\"';"
	section := ""
	unit = strings.ReplaceAll(unit, "\\\n", " ")
	for line := range strings.Lines(unit) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "[") {
			section = line
		}
		value, is := strings.CutPrefix(line, "ExecStart")
		value, isToo := strings.CutPrefix(strings.TrimSpace(value), "=")
		if section != "[Service]" || !is || !isToo {
			continue
		}
		words := strings.Fields(value)
		if len(words) == 0 { // it takes back what stood before
			program, ours = "", false
			continue
		}
		argv0 := strings.Trim(strings.TrimLeft(words[0], prefixes), quotes)
		if program == "" {
			program = argv0
		}
		// By way of another program, too: nice, env, or a shell.
		for i, word := range words[1:] {
			ours = ours || strings.Trim(word, quotes) == "run" &&
				Named(strings.Trim(words[i], prefixes+quotes))
		}
	}
	return program, ours
}

// ownName is our program's name, and as far as is known the closed agent's, too.
const ownName = "service-proxy-agent"

// ownCommands are our commands that go on for longer than a moment.
var ownCommands = []string{"run", "bootstrap", "envoy", "wait", "drain", "cleanup", "status",
	"doctor", "explain", "diff", "bundle", "version", "help"}

// Named says whether a program has the closed agent's name, which ours has, too.
func Named(program string) bool { return filepath.Base(program) == ownName }

// Ours says whether a process with this program and command line is one of ours.
func Ours(program string, args []string) bool {
	return Named(program) && len(args) > 1 && slices.Contains(ownCommands, args[1])
}
