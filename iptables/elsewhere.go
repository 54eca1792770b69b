package iptables

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
)

// Elsewhere is what table nat holds, of one family, in the backend that iptables is not: the kernel
// asks both.
type Elsewhere struct {
	Family  Family
	Backend string
	// Chains are those of ours there, by name, and Jumps the rules that lead to them from the
	// built-in ones: "-A OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT". An agent left them when iptables was
	// the other backend.
	Chains, Jumps []string
	Others        []OtherChain // with rules of others, at our hooks
}

// OtherBackend looks into the backend that iptables is not; used is the one that it is. It is the
// look of a person who has no agent: by coreos/go-iptables, and by nothing of Kernel. It makes no
// table: legacy is asked only where the kernel names its table nat, which only root may read. What
// it found comes with an error, too.
func OtherBackend(ctx context.Context, used string) ([]Elsewhere, error) {
	if used != NFT && used != Legacy {
		return nil, fmt.Errorf("look into the other backend: %w: it is not known which one iptables is",
			ErrCouldNotLook)
	}
	backend := Legacy
	if used == Legacy {
		backend = NFT
	}
	var found []Elsewhere
	var errs []error
	for _, f := range families {
		there, err := hasTable(backend, f)
		if err == nil && !there {
			continue
		}
		e := Elsewhere{Family: f, Backend: backend}
		if err == nil {
			e, err = aside(ctx, func() (Elsewhere, error) { return lookElsewhere(backend, f) })
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("look into the %s backend (%s): %w", backend, f, err))
			continue
		}
		if len(e.Chains)+len(e.Jumps)+len(e.Others) > 0 {
			found = append(found, e)
		}
	}
	return found, errors.Join(errs...)
}

// hasTable says whether a backend has a nat table, without making one.
func hasTable(backend string, f Family) (bool, error) {
	if backend == Legacy {
		return hasLegacyTable(f, "nat", func(name string) ([]byte, error) {
			if name == "/proc/modules" { // a guess, and a wrong one makes a table
				return nil, fs.ErrNotExist
			}
			return os.ReadFile(name)
		})
	}
	return (&Kernel{machine: thisMachine}).hasNFTTable(f)
}

func lookElsewhere(backend string, f Family) (Elsewhere, error) {
	e := Elsewhere{Family: f, Backend: backend}
	program := programOf(backend, f)
	path, err := lookPath("", program)
	if err != nil {
		return e, fmt.Errorf("find %q: %w", program, ErrNoIPTables)
	}
	tables, err := goTables(path, f)
	if err != nil {
		return e, err
	}
	chains, err := tables.ListChains("nat")
	if err != nil {
		return e, fromGo(program+" -S", err)
	}
	for _, name := range chains {
		if isOurs(name) {
			e.Chains = append(e.Chains, name)
		}
	}
	for hook, builtin := range map[Hook]string{Output: builtinOutput, Prerouting: builtinPrerouting} {
		if !slices.Contains(chains, builtin) {
			continue
		}
		rules, err := tables.List("nat", builtin)
		if err != nil {
			return e, fromGo(program+" -S "+builtin, err)
		}
		n := 0
		for _, line := range rules {
			spec, isRule := strings.CutPrefix(line, "-A "+builtin+" ")
			switch {
			case !isRule:
			case isOurs(target(spec)):
				e.Jumps = append(e.Jumps, line)
			default:
				n++
			}
		}
		if n > 0 {
			family := map[Family]string{IPv4: "ip", IPv6: "ip6"}[f]
			e.Others = append(e.Others, OtherChain{Backend: backend, Family: family, Table: "nat",
				Chain: builtin, Hook: hook, Priority: ourPriority, Rules: n})
		}
	}
	slices.Sort(e.Jumps)
	slices.SortFunc(e.Others, func(a, b OtherChain) int { return strings.Compare(a.Chain, b.Chain) })
	return e, nil
}
