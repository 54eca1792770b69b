package iptables

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Counter is what the kernel has counted for a rule: the first packets of connections, since table
// nat sees no others.
type Counter struct {
	Packets, Bytes uint64
	Known          bool
}

// errChanged says that a rule is no longer where it was walked.
var errChanged = errors.New("the rules were changed meanwhile")

// Counters asks for the counters of the rules of a Trace, and returns one for each step. Only the
// chains on the way are listed. A counter is known if its rule still stands where it was walked;
// the error says why others are not.
func (k *Kernel) Counters(ctx context.Context, f Family, steps []Step) ([]Counter, error) {
	counters := make([]Counter, len(steps))
	t, err := k.tool(ctx, f)
	if err != nil {
		return counters, err
	}
	if k.machine.counted == nil {
		return counters, errors.New("this machine does not count")
	}
	if missing, err := k.wouldMake(t); err != nil || missing {
		return counters, err
	}
	var chains []string
	for _, s := range steps {
		if s.Index > 0 && !slices.Contains(chains, s.Chain) {
			chains = append(chains, s.Chain)
		}
	}
	listed, err := k.list(ctx, t, chains)
	for i, s := range steps {
		if s.Index == 0 {
			continue
		}
		lines, ok := listed[s.Chain]
		if !ok {
			continue
		}
		if s.Index <= len(lines) {
			counters[i] = counter(lines[s.Index-1], "-A "+s.Chain+" "+s.Rule)
		}
		if !counters[i].Known && err == nil {
			err = fmt.Errorf("chain %s: %w", s.Chain, errChanged)
		}
	}
	return counters, err
}

// list lists the rules of chains with their counters, without the line that makes the chain.
func (k *Kernel) list(ctx context.Context, t tool, chains []string) (map[string][]string, error) {
	listed, err := aside(ctx, func() (map[string][]string, error) {
		listed := map[string][]string{}
		count, err := k.machine.counted(t)
		if err != nil {
			return nil, err
		}
		var errs []error
		for _, chain := range chains {
			lines, err := count(chain)
			if err != nil {
				errs = append(errs, fmt.Errorf("chain %s: %w", chain, err))
				continue
			}
			listed[chain] = slices.DeleteFunc(lines, func(line string) bool {
				return !strings.HasPrefix(line, "-A ")
			})
		}
		return listed, errors.Join(errs...)
	})
	if err != nil {
		err = fmt.Errorf("list %s chains: %w", t.family, err)
	}
	return listed, err
}

// counted is how the rules of a chain are listed with their counters on this machine.
func counted(t tool) (func(chain string) ([]string, error), error) {
	tables, err := goTables(t.list, t.family)
	if err != nil {
		return nil, err
	}
	return func(chain string) ([]string, error) {
		lines, err := tables.ListWithCounters("nat", chain)
		return lines, fromGo("iptables -v -S "+chain, err)
	}, nil
}

// counter reads the counters out of a rule that is listed with them, "-c PACKETS BYTES" before its
// target or at its end. It is not known if the rest is not the rule.
func counter(line, rule string) Counter {
	const mark = " -c "
	for at := 0; ; {
		i := strings.Index(line[at:], mark)
		if i < 0 {
			return Counter{}
		}
		at += i
		words := strings.SplitN(line[at+len(mark):], " ", 3)
		if len(words) >= 2 {
			rest := ""
			if len(words) == 3 {
				rest = " " + words[2]
			}
			packets, err1 := strconv.ParseUint(words[0], 10, 64)
			bytes, err2 := strconv.ParseUint(words[1], 10, 64)
			if err1 == nil && err2 == nil && line[:at]+rest == rule {
				return Counter{packets, bytes, true}
			}
		}
		at += len(mark)
	}
}
