package iptables

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// degrade installs as much of want as the kernel takes, after it has refused the whole. It asks the
// kernel about each kind of rule by itself, in a chain that nothing leads to, leaves out those that
// are refused and installs the rest in one transaction. Comments go first: a kernel without the
// comment match then loses nothing else.
//
// A rule that protects others is not left out alone. Without the RETURN for the proxy's user, its
// own connections would be redirected to itself; without `! --dst-type LOCAL`, routed traffic would
// be taken for inbound. The jump to the chain goes with it: no interception rather than a loop.
// See docs/design/facts.md#routed-is-not-inbound.
//
// If each rule by itself is taken, the error of the whole is returned: then somebody else wrote at
// the same moment, and trying again is the remedy.
func (k *Kernel) degrade(
	ctx context.Context, t tool, want Ruleset, attempts int, whole error,
) (Result, error) {
	left, reduced, err := k.reduce(ctx, t, want)
	if errors.Is(err, ErrCouldNotLook) {
		// It is known all the same that nothing was written, and what was refused. Where a module is
		// missing, each question has the kernel look for it.
		return Result{Attempts: attempts},
			fmt.Errorf("%w (and could not find out which rule: %v)", whole, err)
	}
	if err != nil {
		err = fmt.Errorf("%w (and could not find out which rule: %w)", whole, err)
		return Result{Attempts: attempts}, err
	}
	if len(left) == 0 {
		return Result{Attempts: attempts}, whole
	}
	have, err := k.read(ctx, t) // the probes' chain may be left over
	if err != nil {
		return Result{Attempts: attempts}, err
	}
	result, _, err := k.apply(ctx, t, NewPlan(reduced, have))
	result.Attempts += attempts
	if err != nil {
		return result, err
	}
	result.Left = left
	return result, nil
}

// CommentMatch is the Rule of a RefusedError when only comments were left out: every packet
// goes the way it should.
const CommentMatch = "-m comment"

// reduce asks the kernel about every rule of want that differs in more than an address or a port,
// and returns those that it refuses and the ruleset without them.
func (k *Kernel) reduce(ctx context.Context, t tool,
	want Ruleset) (left []RefusedError, reduced Ruleset, err error) {
	verdicts := map[string]error{}
	ask := func(spec string) (error, error) {
		kind := kindOf(spec)
		if verdict, ok := verdicts[kind]; ok {
			return verdict, nil
		}
		verdict, err := k.probeRule(ctx, t, spec)
		if err == nil {
			verdicts[kind] = verdict
		}
		return verdict, err
	}
	b := builder{family: want.family, chains: map[string][]string{}}
	broken := map[string]bool{} // chains that may not be jumped to
	for _, c := range want.chains {
		b.add(c.name)
		for _, spec := range c.rules {
			verdict, err := ask(spec)
			if err != nil {
				return nil, Ruleset{}, err
			}
			bare := withoutComment(spec)
			if verdict == nil {
				b.add(c.name, spec)
				continue
			}
			if bare != spec {
				bareVerdict, err := ask(bare)
				if err != nil {
					return nil, Ruleset{}, err
				}
				if bareVerdict == nil {
					left = append(left, leftOut(want.family, CommentMatch, verdict))
					b.add(c.name, bare)
					continue
				}
			}
			left = append(left, leftOut(want.family, "-A "+c.name+" "+spec, verdict))
			if protects(c.name, spec) {
				broken[c.name] = true
			}
		}
	}
	// A chain that cannot redirect or cannot tell whom to spare takes the jumps to it along.
	for name, specs := range b.chains {
		b.chains[name] = slices.DeleteFunc(specs, func(spec string) bool { return broken[target(spec)] })
	}
	for _, j := range want.jumps {
		verdict, err := ask(j.spec)
		if err != nil {
			return nil, Ruleset{}, err
		}
		switch {
		case verdict != nil:
			left = append(left, leftOut(want.family, "-A "+j.chain+" "+j.spec, verdict))
		case !broken[target(j.spec)]:
			b.jumps = append(b.jumps, j)
		}
	}
	return slices.CompactFunc(left, func(a, b RefusedError) bool { return a.Rule == b.Rule }),
		b.ruleset(), nil
}

// protects says whether leaving out the rule would make its chain do harm.
func protects(chain, spec string) bool {
	p := parseRule(spec)
	if p.target == "REDIRECT" {
		return true // a chain without its REDIRECT does nothing, so nothing should lead there
	}
	if p.target != "RETURN" {
		return false
	}
	return (chain == chainOutput || chain == chainDNS) && p.uid != nil ||
		chain == chainInbound && p.dstLocal
}

// kindOf is the rule with its addresses, ports and target chain left out: 10,000
// services are one kind.
func kindOf(spec string) string {
	words, _ := splitWords(spec)
	for i := 1; i < len(words); i++ {
		switch words[i-1] {
		case "-d", "--dport", "--to-ports", "-i":
			words[i] = "*"
		case "-j":
			if isOurs(words[i]) {
				words[i] = "*"
			}
		}
	}
	return strings.Join(words, " ")
}

func withoutComment(spec string) string {
	words, _ := splitWords(spec)
	for i := 0; i+3 < len(words); i++ {
		if words[i] == "-m" && words[i+1] == "comment" && words[i+2] == "--comment" {
			return strings.Join(slices.Delete(words, i, i+4), " ")
		}
	}
	return spec
}

// probeRule asks the kernel whether it takes one rule. verdict is its refusal, err that
// it could not be asked.
func (k *Kernel) probeRule(ctx context.Context, t tool, spec string) (verdict, err error) {
	if to := target(spec); isOurs(to) { // that chain may not be there yet
		spec = strings.TrimSuffix(spec, to) + "RETURN"
	}
	const declared = ":" + chainProbe + " - [0:0]"
	err = k.restore(ctx, t, Plan{family: t.family, lines: []string{
		declared, "-A " + chainProbe + " " + spec,
	}})
	refusal, isRefusal := errors.AsType[*RefusedError](err)
	if isRefusal && mayBeOvertaken(refusal.Rule) {
		err = k.addAlone(ctx, t, spec)
		refusal, isRefusal = errors.AsType[*RefusedError](err)
	} else if isRefusal {
		return refusal, nil
	}
	if err != nil && !isRefusal && !errors.Is(err, ErrLocked) {
		return nil, err
	}
	// Overtaken, too, on legacy. What stays behind is taken for drift, so this tries longer.
	var removed error
	for range 4 * attempts {
		removal := Plan{family: t.family, lines: []string{declared, "-X " + chainProbe}}
		if removed = k.restore(ctx, t, removal); removed == nil {
			break
		}
	}
	switch {
	case errors.Is(err, ErrLocked):
		return nil, err
	case removed != nil:
		return nil, fmt.Errorf("remove probe: %w", removed)
	case isRefusal:
		return refusal, nil
	}
	return nil, nil
}

// addAlone appends a rule to the probe's chain by `iptables -A`. That tells what a restore on
// legacy does not, which names COMMIT whatever was wrong: whether the kernel refused the rule, or
// another program wrote at the same moment (EAGAIN, which is ErrLocked: iptables-standalone.c). No
// rule is left out for the second. See docs/design/facts.md#legacy-names-commit.
func (k *Kernel) addAlone(ctx context.Context, t tool, spec string) (err error) {
	words, _ := splitWords(spec)
	run := func(args ...string) error {
		for range attempts {
			_, err = k.run(ctx, writeLimit, nil, t.list,
				append([]string{"-w", lockWait, "-t", "nat"}, args...)...)
			if !errors.Is(err, ErrLocked) {
				break
			}
		}
		return err
	}
	// Without the chain the rule would be refused for that. Else, Chain already exists is all that can
	// be wrong with this and not with the next.
	if err := run("-N", chainProbe); errors.Is(err, ErrLocked) {
		return err
	}
	err = run(append([]string{"-A", chainProbe}, words...)...)
	command, ok := errors.AsType[*CommandError](err)
	if !ok || errors.Is(err, ErrLocked) || errors.Is(err, ErrNotRoot) || errors.Is(err, ErrNoTable) {
		return err
	}
	// Who writes without the lock may put back the table as it was before the chain, if both have as
	// many rules: that is all the kernel compares.
	if run("-S", chainProbe) != nil {
		return fmt.Errorf("%w: the probe's chain went away", ErrLocked)
	}
	return &RefusedError{
		Family: t.family, Rule: "-A " + chainProbe + " " + spec, Stderr: command.Stderr,
	}
}

func leftOut(f Family, rule string, verdict error) RefusedError {
	var refusal *RefusedError
	if errors.As(verdict, &refusal) {
		return RefusedError{Family: f, Rule: rule, Stderr: refusal.Stderr}
	}
	return RefusedError{Family: f, Rule: rule, Stderr: verdict.Error()}
}
