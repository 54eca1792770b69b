package iptables

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	goiptables "github.com/coreos/go-iptables/iptables"
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
	if t.backend == Legacy {
		// To list a legacy table makes it where there is none.
		if exists, err := k.machine.hasLegacy(f); err != nil || !exists {
			return counters, err
		}
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
	type answer struct {
		listed map[string][]string
		err    error
	}
	ended := make(chan answer, 1)
	// go-iptables takes no context: one that hangs is left behind, which only a command that ends soon
	// can afford.
	go func() {
		a := answer{listed: map[string][]string{}}
		count, err := k.machine.counted(t)
		if err != nil {
			ended <- answer{err: err}
			return
		}
		for _, chain := range chains {
			lines, err := count(chain)
			if err != nil {
				a.err = errors.Join(a.err, fmt.Errorf("list chain %s: %w", chain, err))
				continue
			}
			a.listed[chain] = slices.DeleteFunc(lines, func(line string) bool {
				return !strings.HasPrefix(line, "-A ")
			})
		}
		ended <- a
	}()
	select {
	case a := <-ended:
		return a.listed, a.err
	case <-ctx.Done():
		return nil, fmt.Errorf("list %s chains: %w: %w", t.family, ErrCouldNotLook, ctx.Err())
	}
}

// counted is how the rules of a chain are listed with their counters on this machine.
func counted(t tool) (func(chain string) ([]string, error), error) {
	protocol := goiptables.ProtocolIPv4
	if t.family == IPv6 {
		protocol = goiptables.ProtocolIPv6
	}
	seconds, _ := strconv.Atoi(lockWait)
	table, err := goiptables.New(goiptables.IPFamily(protocol), goiptables.Path(t.list),
		goiptables.Timeout(seconds))
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", t.list, err)
	}
	return func(chain string) ([]string, error) {
		lines, err := table.ListWithCounters("nat", chain)
		var failed *goiptables.Error
		if errors.As(err, &failed) {
			_, text, _ := strings.Cut(failed.Error(), ": ") // without the whole command line
			err = classify("iptables -v -S "+chain, failed.ExitStatus(), text)
		}
		return lines, err
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
