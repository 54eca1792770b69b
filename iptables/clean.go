package iptables

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Cleanup takes everything of ours out of both families' nat tables, in whichever backend it is,
// and says what it removed, one thing a string. A family or backend that cannot be cleaned does not
// stop the others; the errors are joined, and one that could not be looked into (ErrCouldNotLook)
// is one of them. Connections that are being redirected go on, since NAT was decided at their first
// packet, as long as a rule of anybody's that uses conntrack keeps it on. A chain of ours that
// somebody else's rule leads to stays, empty.
func (k *Kernel) Cleanup(ctx context.Context) ([]string, error) {
	var removed []string
	var errs []error
	for _, f := range families {
		t, err := k.tool(ctx, f)
		if err != nil {
			if errors.Is(err, ErrNoTable) { // then nothing of ours can be there
				continue
			}
			if errors.Is(err, ErrNoIPTables) { // on nft, what the programs made stays when they go
				if names, _ := k.machine.natChains(f); !slices.ContainsFunc(names, isOurs) {
					continue
				}
			}
			errs = append(errs, err)
			continue
		}
		said, err := k.clean(ctx, t)
		removed = append(removed, said...)
		if err != nil {
			errs = append(errs, err)
		}
	}
	said, err := k.CleanOtherBackend(ctx)
	return append(removed, said...), errors.Join(append(errs, err)...)
}

// CleanOtherBackend takes what is ours out of the backend that is not used: it is there when the
// machine's iptables was switched under us. It looks without creating the other backend's tables,
// and never touches what is not ours.
func (k *Kernel) CleanOtherBackend(ctx context.Context) ([]string, error) {
	var removed []string
	var errs []error
	for _, f := range families {
		t, ok, err := k.otherBackend(ctx, f)
		if err != nil {
			errs = append(errs, err)
		}
		if !ok {
			continue
		}
		said, err := k.clean(ctx, t)
		removed = append(removed, said...)
		if err != nil {
			errs = append(errs, err)
		}
	}
	return removed, errors.Join(errs...)
}

// clean removes what is ours from one table. It goes round again as long as others' writes, or a
// write of which the end was not seen, leave something behind. What it says was removed is what was
// there and is not there any more; without an error nothing is left.
func (k *Kernel) clean(ctx context.Context, t tool) (removed []string, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("clean %s (%s): %w", t.family, t.backend, err)
		}
	}()
	var before Table
	for n := 0; ; n++ {
		have, readErr := k.read(ctx, t)
		if readErr != nil {
			return removed, errors.Join(err, readErr)
		}
		for _, what := range gone(before, have) {
			removed = append(removed, fmt.Sprintf("%s (%s) %s", t.family, t.backend, what))
		}
		plan := NewPlan(Ruleset{family: t.family}, have)
		if plan.Empty() {
			return removed, nil
		}
		if n == attempts {
			if err == nil {
				drift := Diff(Ruleset{family: t.family}, have)
				err = fmt.Errorf(
					"removed %d times, and there is again %q: stop what puts it there, then clean up again",
					n, drift[0])
			}
			return removed, err
		}
		if _, _, err = k.apply(ctx, t, plan); err != nil && !errors.Is(err, ErrCouldNotLook) {
			return removed, err
		}
		before = have
	}
}

// gone is what of ours was there before and is not there now, one thing a string.
func gone(before, now Table) (what []string) {
	was, is, held := before.Ours(), now.Ours(), now.heldByOthers()
	for _, j := range was.jumps {
		if !slices.Contains(is.jumps, j) {
			what = append(what, fmt.Sprintf("jump -A %s %s", j.chain, j.spec))
		}
	}
	for _, c := range was.chains {
		said := fmt.Sprintf("chain %s with %d rules", c.name, len(c.rules))
		by, isHeld := held[c.name]
		switch rules, ok := is.chain(c.name); {
		case !ok:
			what = append(what, said)
		case isHeld && len(rules) == 0 && len(c.rules) > 0:
			what = append(what,
				fmt.Sprintf("%s, which stays empty because of another program's rule -A %s %s", said,
					by.chain, by.spec))
		}
	}
	return what
}

// otherBackend returns the programs of the backend that is not used, if that has a nat
// table for the family.
func (k *Kernel) otherBackend(ctx context.Context, f Family) (tool, bool, error) {
	other := Legacy
	k.mu.Lock()
	if used, ok := k.tools[f]; ok && used.backend == Legacy {
		other = NFT
	}
	k.mu.Unlock()
	has := k.hasNFTTable
	if other == Legacy {
		has = k.machine.hasLegacy
	}
	if ok, err := has(f); err != nil || !ok {
		return tool{}, false, err
	}
	t, err := k.find(ctx, other, f)
	if err != nil {
		return tool{}, false, fmt.Errorf("look into the %s backend: %w", other, err)
	}
	return t, true, nil
}

// hasLegacyTable says whether there may be a legacy table ("nat", "filter"), without making it:
// asking the kernel for it by name, as iptables-legacy-save and every one of its socket options do,
// makes it wherever its module is loaded. /proc names the tables, in a file that is root's (0440,
// also for the group root); the agent, an ordinary user with capabilities, has to go by the
// modules. See docs/design/facts.md#legacy-look-makes-the-table.
func hasLegacyTable(
	f Family, table string, readFile func(string) ([]byte, error),
) (bool, error) {
	file := "/proc/thread-self/net/ip_tables_names"
	if f == IPv6 {
		file = "/proc/thread-self/net/ip6_tables_names"
	}
	names, err := readFile(file)
	switch {
	case errors.Is(err, os.ErrNotExist): // ip_tables is not loaded
		return false, nil
	case err == nil:
		return slices.Contains(strings.Fields(string(names)), table), nil
	}
	if modules, err := readFile("/proc/modules"); err == nil {
		if may, ok := legacyByModules(f, table, modules); ok {
			return may, nil
		}
	}
	return false, fmt.Errorf("%w into the legacy backend: %w; run as root", ErrCouldNotLook, err)
}

// legacyByModules says by /proc/modules whether a legacy table may be there, and whether that
// can be said at all. Nobody has made one if its module could be loaded and is not. If it is
// loaded, somebody has, in this network namespace most likely: looking makes an empty one at worst.
// That costs a look at each connection's first packet and a warning of iptables-nft's, and starts
// no conntrack (a rule with a NAT target does). Built in says nothing, and then the agent would
// make a table on every machine there is.
func legacyByModules(f Family, table string, modules []byte) (may, ok bool) {
	base, module := "ip_tables", "iptable_"+table
	if f == IPv6 {
		base, module = "ip6_tables", "ip6table_"+table
	}
	for line := range strings.Lines(string(modules)) {
		switch name, _, _ := strings.Cut(line, " "); name {
		case module:
			return true, true
		case base: // what is built upon a module is one itself
			ok = true
		}
	}
	return false, ok
}

func (k *Kernel) hasNFTTable(f Family) (bool, error) {
	names, err := k.machine.natChains(f)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) ||
		errors.Is(err, unix.EPROTONOSUPPORT) {
		return false, nil // a kernel without nf_tables
	}
	return len(names) > 0, err
}
