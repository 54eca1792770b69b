package iptables

import (
	"bytes"
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"time"
)

// Machine stands for a machine's iptables, where a Kernel is not to run the programs of this one.
// The tests have one in memory: iptablestest.Machine.
type Machine interface {
	// Run does what a program does, which may be named with a folder before it. An exit of -1 stands
	// for a program that did not end in its time.
	Run(program string, args []string, stdin string) (stdout, stderr string, exit int)
	// Chains are the names of the chains in the nat table of a program. exists is false where nobody
	// has made that table yet.
	Chains(program string) (names []string, exists bool)
}

// onMachine is a Kernel's machine that is not this one.
func onMachine(m Machine) machine {
	return machine{
		lookPath: func(_, name string) (string, error) { return "/usr/sbin/" + name, nil },
		run: func(ctx context.Context, _ time.Duration, _ *ownPIDs, stdin []byte, stdout *bytes.Buffer,
			name string, args ...string) error {
			command := strings.Join(append([]string{filepath.Base(name)}, args...), " ")
			if err := ctx.Err(); err != nil {
				return fmt.Errorf("%s: %w: %w", command, ErrCouldNotLook, err)
			}
			out, stderr, exit := m.Run(name, args, string(stdin))
			stdout.WriteString(out)
			switch exit {
			case 0:
				return nil
			case -1:
				return fmt.Errorf("%s: %w: no end", command, ErrCouldNotLook)
			}
			return classify(command, exit, stderr)
		},
		natChains: func(f Family) ([]string, error) {
			names, _ := m.Chains(programOf(NFT, f))
			return names, nil
		},
		hasLegacy: func(f Family) (bool, error) {
			_, exists := m.Chains(programOf(Legacy, f))
			return exists, nil
		},
		hasFilter: func(tool) (bool, error) { return false, nil },
		firstPIDs: func() bool { return true },
	}
}

// programOf is the name of a family's program for a backend, e.g. "ip6tables-legacy".
func programOf(backend string, f Family) string {
	if f == IPv6 {
		return "ip6tables-" + backend
	}
	return "iptables-" + backend
}
