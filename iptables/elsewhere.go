package iptables

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	goiptables "github.com/coreos/go-iptables/iptables"
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
	tables, err := goTables(programOf(backend, f), f)
	if err != nil {
		return e, err
	}
	chains, err := tables.ListChains("nat")
	if err != nil {
		return e, fromGo(err)
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
			return e, fromGo(err)
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

// goTables is coreos/go-iptables on one program. A lock that is held ends what it runs after five
// seconds.
func goTables(program string, f Family) (*goiptables.IPTables, error) {
	path, err := lookPath("", program)
	if err != nil {
		return nil, fmt.Errorf("find %q: %w", program, ErrNoIPTables)
	}
	proto := goiptables.ProtocolIPv4
	if f == IPv6 {
		proto = goiptables.ProtocolIPv6
	}
	tables, err := goiptables.New(goiptables.IPFamily(proto), goiptables.Path(path),
		goiptables.Timeout(5))
	if err != nil {
		return nil, fmt.Errorf("ask %s for its version: %w", program, err)
	}
	return tables, nil
}

// fromGo is an error of go-iptables in the classes of this package.
func fromGo(err error) error {
	var failed *goiptables.Error
	if !errors.As(err, &failed) {
		return err
	}
	return classify("iptables", failed.ExitStatus(), failed.Error())
}

// aside asks beside the caller, who has a time limit where go-iptables takes none: what does not
// answer in time is left alone, and its answer goes nowhere.
func aside[T any](ctx context.Context, ask func() (T, error)) (T, error) {
	type answer struct {
		got T
		err error
	}
	answers := make(chan answer, 1)
	go func() {
		got, err := ask()
		answers <- answer{got, err}
	}()
	select {
	case a := <-answers:
		return a.got, a.err
	case <-ctx.Done():
		var none T
		return none, fmt.Errorf("%w: %w", ErrCouldNotLook, ctx.Err())
	}
}
