package iptables

import (
	"context"
	"errors"
	"fmt"
	"slices"
)

// LetOut has the rules that are there let a user's traffic out: where another agent's chains of our
// names are taken over, or given back, the next Envoy may run as another user than the one that
// they know, and must reach its control plane before anybody makes new chains. It puts a RETURN at
// the head of each chain of our names that OUTPUT jumps to, and changes nothing where one is there.
// It returns the chains that it changed, by family.
func (k *Kernel) LetOut(ctx context.Context, uid uint32) (changed []string, err error) {
	var errs []error
	for _, state := range k.Families() {
		if state.Why != nil {
			continue // nothing can be redirected there
		}
		t, err := k.tool(ctx, state.Family)
		if err == nil {
			var chains []string
			chains, err = k.letOut(ctx, t, uid)
			changed = append(changed, chains...)
		}
		if err != nil && !errors.Is(err, ErrNoTable) {
			errs = append(errs, fmt.Errorf("let uid %d out (%s): %w", uid, state.Family, err))
		}
	}
	return changed, errors.Join(errs...)
}

func (k *Kernel) letOut(ctx context.Context, t tool, uid uint32) (changed []string, err error) {
	have, err := k.read(ctx, t)
	if err != nil {
		return nil, err
	}
	plan := letOut(have, uid)
	if plan.Empty() {
		return nil, nil
	}
	defer k.stand(t.family).writing()()
	if err := k.restore(ctx, t, plan); err != nil {
		return nil, err
	}
	for _, chain := range plan.touched {
		changed = append(changed, fmt.Sprintf("%s %s", t.family, chain))
	}
	return changed, nil
}

// letOut is the plan.
func letOut(have Table, uid uint32) Plan {
	p := Plan{family: have.family, have: have}
	out := fmt.Sprintf("-m owner --uid-owner %d -j RETURN", uid)
	for _, spec := range have.chains[builtinOutput] {
		chain := target(spec)
		if !isOurs(chain) || slices.Contains(p.touched, chain) || lets(have.chains[chain], uid) {
			continue
		}
		p.lines = append(p.lines, "-I "+chain+" 1 "+out)
		p.touched = append(p.touched, chain)
	}
	return p
}

// lets says whether rules begin with RETURNs of which one is for the user.
func lets(rules []string, uid uint32) bool {
	plain := fmt.Sprintf("-m owner --uid-owner %d -j RETURN", uid)
	ours := fmt.Sprintf("-m owner --uid-owner %d -m comment --comment proxy-user -j RETURN", uid)
	for _, spec := range rules {
		if spec == plain || spec == ours {
			return true
		}
		if target(spec) != "RETURN" {
			return false
		}
	}
	return false
}
