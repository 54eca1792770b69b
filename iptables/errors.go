package iptables

import (
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// What can be wrong with the kernel or its tools. Errors of Kernel's methods are to be asked by
// errors.Is and errors.As.
var (
	// ErrNoIPTables: the programs are not installed. Debian and Ubuntu have them in package iptables,
	// which is optional there.
	ErrNoIPTables = errors.New("iptables is not installed")
	// ErrNoTable: the kernel has no table nat for the family: its modules are missing
	// or may not be loaded.
	ErrNoTable = errors.New("the kernel has no nat table")
	// ErrLocked: another program held the lock, or wrote the table at the same moment, for longer
	// than we wait. Try again.
	ErrLocked = errors.New("another program holds the iptables lock")
	// ErrIncompatible: PREROUTING or OUTPUT hold rules made by nft that iptables cannot read.
	// See docs/design/facts.md#iptables-cannot-read.
	ErrIncompatible = errors.New("table nat is incompatible")
	// ErrNotRoot: CAP_NET_ADMIN (legacy: CAP_NET_RAW and a writable
	// /run/xtables.lock as well) is missing. See docs/design/facts.md#what-iptables-may.
	ErrNotRoot = errors.New("not permitted to change iptables")
	// ErrCouldNotLook: a read did not end in its time, was killed, or could not be started on a
	// machine out of memory. What the kernel has is unknown, which is not the same as fine.
	ErrCouldNotLook = errors.New("could not look")
	// ErrUnusable: the family was found unusable; Families says why.
	ErrUnusable = errors.New("family is not usable")
)

// CommandError is an iptables that ended with an error that has no class of its own.
type CommandError struct {
	Command string // name and arguments
	Exit    int    // -1 if it failed by a signal (SIGSEGV, say)
	Stderr  string // first lines
}

func (e *CommandError) Error() string {
	return fmt.Sprintf("%s: exit %d: %s", e.Command, e.Exit, e.Stderr)
}

// RefusedError is a line of a payload that iptables or the kernel did not take. Nothing of
// the payload was applied.
type RefusedError struct {
	Family Family
	Line   int // of the payload, from 1; 0 if iptables did not say
	// that line, e.g. "-A SERVICE_PROXY_DNS -m owner --uid-owner 101 -j RETURN"; "COMMIT" if the table
	// was refused as a whole
	Rule   string
	Stderr string
	// NoModules is why the kernel can load no module before a reboot, which may be all that the rule
	// lacks; "": it can, or that is not known.
	NoModules string `json:",omitempty"`
}

func (e *RefusedError) Error() string {
	return fmt.Sprintf("%s rule refused: line %d %q: %s", e.Family, e.Line, e.Rule, e.Stderr)
}

var lineNumber = regexp.MustCompile(`\bline:? (\d+)`)

// classify puts an ended command's words into an error. The texts are those of
// iptables 1.8.2 to 1.8.11.
func classify(command string, exit int, stderr string) error {
	text := oneLine(stderr)
	base := &CommandError{Command: command, Exit: exit, Stderr: text}
	has := func(parts ...string) bool {
		for _, p := range parts {
			if strings.Contains(stderr, p) {
				return true
			}
		}
		return false
	}
	switch {
	case has("xtables lock", "Resource temporarily unavailable",
		"Device or resource busy (try again)"):
		return fmt.Errorf("%w: %w", ErrLocked, base)
	case has("Permission denied", "Operation not permitted", "you must be root"):
		return fmt.Errorf("%w: %w", ErrNotRoot, base)
	case has("is incompatible"):
		return fmt.Errorf("%w: %w", ErrIncompatible, base)
	// iptables-nft without nf_tables says one of the last two, the one without nfnetlink even when it
	// is asked for its version.
	case has("Table does not exist", "can't initialize", "do you need to insmod",
		"Address family not supported", "Failed to initialize nft",
		"Could not fetch rule set generation id"):
		return fmt.Errorf("%w: %w", ErrNoTable, base)
	}
	return base
}

// refused says which line of the plan a failed restore complained about.
func refused(p Plan, err error) error {
	var command *CommandError
	if !errors.As(err, &command) {
		return err
	}
	for _, class := range []error{ErrLocked, ErrNotRoot, ErrIncompatible, ErrNoTable} {
		if errors.Is(err, class) {
			return err
		}
	}
	m := lineNumber.FindStringSubmatch(command.Stderr)
	if m == nil {
		return err
	}
	n, _ := strconv.Atoi(m[1])
	return &RefusedError{Family: p.family, Line: n, Rule: p.line(n), Stderr: command.Stderr}
}

// oneLine joins the lines of a message and leaves out the usage hint; what is
// left is cut at 500 bytes.
func oneLine(stderr string) string {
	var parts []string
	for line := range strings.SplitSeq(stderr, "\n") {
		line = strings.TrimSpace(line)
		if line != "" && !strings.HasPrefix(line, "Try `") && !strings.HasPrefix(line, "# Warning") {
			parts = append(parts, line)
		}
	}
	s := strings.Join(parts, "; ")
	if len(s) > 500 {
		s = s[:500] + "..."
	}
	return s
}
