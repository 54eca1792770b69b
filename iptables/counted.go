package iptables

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// Counters are those of all rules of a table: by chain, in the order of its rules.
type Counters map[string][]Counter

// counted reads table nat with its counters by one save.
func (k *Kernel) counted(ctx context.Context, f Family) (Table, Counters, error) {
	t, err := k.tool(ctx, f)
	if err != nil {
		return Table{}, nil, err
	}
	if missing, err := k.wouldMake(t); err != nil || missing {
		return Table{family: f}, nil, err
	}
	save, err := k.run(ctx, readLimit, nil, t.saving, "-c", "-t", "nat")
	if err != nil {
		return Table{}, nil, fmt.Errorf("read %s counters: %w", f, err)
	}
	return ParseCounted(f, save)
}

// ReadCounters reads the counters of the rules of a table. A counter is known if its rule still
// stands where it was read.
func (k *Kernel) ReadCounters(ctx context.Context, have Table) (Counters, error) {
	now, counters, err := k.counted(ctx, have.family)
	if err != nil {
		return nil, err
	}
	for chain, counted := range counters {
		for i := range counted {
			if rules := have.chains[chain]; i >= len(rules) || rules[i] != now.chains[chain][i] {
				counted[i] = Counter{}
			}
		}
	}
	return counters, nil
}

// Of returns the counters of the rules of a Trace, one for each step, as Kernel.Counters does. The
// error says that some are not known.
func (c Counters) Of(steps []Step) (counters []Counter, err error) {
	counters = make([]Counter, len(steps))
	for i, s := range steps {
		if s.Index == 0 {
			continue
		}
		if counted := c[s.Chain]; s.Index <= len(counted) {
			counters[i] = counted[s.Index-1]
		}
		if !counters[i].Known && err == nil {
			err = fmt.Errorf("chain %s: %w", s.Chain, errChanged)
		}
	}
	return counters, err
}

// ParseCounted is Parse with the counters that the save has before its rules.
func ParseCounted(family Family, save []byte) (Table, Counters, error) {
	t, c := Table{family: family, chains: map[string][]string{}}, Counters{}
	err := eachLine(save, "nat", func(line string) {
		t.line(line)
		count, rule := "", line
		if strings.HasPrefix(line, "[") {
			count, rule, _ = strings.Cut(line, "] ")
		}
		rule = strings.TrimPrefix(rule, "-A ")
		if chain, _, _ := strings.Cut(rule, " "); len(c[chain]) < len(t.chains[chain]) {
			c[chain] = append(c[chain], countOf(count))
		}
	})
	if err != nil {
		return Table{}, nil, fmt.Errorf("parse %s save: %w", family, err)
	}
	return t, c, nil
}

// countOf reads "[PACKETS:BYTES".
func countOf(s string) Counter {
	packets, bytes, _ := strings.Cut(strings.TrimPrefix(s, "["), ":")
	p, err1 := strconv.ParseUint(packets, 10, 64)
	b, err2 := strconv.ParseUint(bytes, 10, 64)
	if err1 != nil || err2 != nil {
		return Counter{}
	}
	return Counter{p, b, true}
}

// Save is the table in the form of `iptables-save -c -t nat`, without policies and without the
// counters that are not known. ParseCounted reads it.
func (t Table) Save(c Counters) string {
	var b strings.Builder
	b.WriteString("*nat\n")
	names := slices.Sorted(maps.Keys(t.chains))
	for _, name := range names {
		b.WriteString(":" + name + " - [0:0]\n")
	}
	for _, name := range names {
		for i, rule := range t.chains[name] {
			if i < len(c[name]) && c[name][i].Known {
				fmt.Fprintf(&b, "[%d:%d] ", c[name][i].Packets, c[name][i].Bytes)
			}
			b.WriteString("-A " + name + " " + rule + "\n")
		}
	}
	b.WriteString("COMMIT\n")
	return b.String()
}
