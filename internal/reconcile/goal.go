package reconcile

import (
	"net/netip"
	"slices"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// goal is what the kernel shall have.
type goal struct {
	shape    shape
	compiled bool             // want is of shape
	want     iptables.Ruleset // the whole
	// target is want, or what the kernel takes of it, or an earlier run's rules without their
	// jumps.
	target iptables.Ruleset
	// kept are an earlier run's rules of this boot, until it is known what is wanted; empty: none.
	kept iptables.Ruleset

	services []netip.Prefix // of want
	ports    int            // address-less services of want

	left     []iptables.RefusedError // rules of want that are not in target
	leftAt   time.Time               // when the kernel refused the last of these
	settling time.Time               // until when older connections are let through
}

// compile makes the ruleset that the want, the gates and the time ask for, if any of them changed.
func (g *goal) compile(
	want iptables.Interception, serial uint64, gates *gates, now time.Time,
) (changed bool) {
	shape := shapeOf(want, serial, gates, now.Before(g.settling))
	if g.compiled && shape == g.shape {
		return false
	}
	g.shape, g.compiled = shape, true
	g.want = shape.ruleset(want)
	g.target, g.left = g.want, nil
	g.services, g.ports = want.Services, len(want.ServicePorts)
	return true
}

// offerAgain makes the target whole again, when it is time to offer the kernel what it refused.
func (g *goal) offerAgain(now time.Time) (changed bool) {
	if len(g.left) == 0 || now.Sub(g.leftAt) <= retryLeft {
		return false
	}
	g.target, g.left = g.want, nil
	return true
}

// unknown notes that it is not known what is wanted. Once it is again, the kernel is compared
// with it whatever it was: who looked in between looked for something else.
func (g *goal) unknown() { g.compiled = false }

// leave makes the target the rules that an earlier run left, without their jumps.
func (g *goal) leave(ours iptables.Ruleset) { g.target = ours.WithoutJumps() }

// giveUp keeps an earlier run's rules no longer: it is known what is wanted, or they must not
// intercept, or nobody can tell whether they may.
func (g *goal) giveUp(o Order, gates *gates) {
	if o.Known || !o.UserKnown || mustLeave(g.kept, gates) {
		g.kept = iptables.Ruleset{}
	}
}

// settle begins the time in which older connections are let through.
func (g *goal) settle(now time.Time) { g.settling = now.Add(settle) }

// installed notes what the kernel took of the target. Rules that were left out before stay so: only
// offerAgain and compile begin anew with the whole.
func (g *goal) installed(r iptables.Result, now time.Time) {
	g.target = r.Ruleset
	if len(r.Left) == 0 {
		return
	}
	for _, l := range r.Left {
		same := func(k iptables.RefusedError) bool { return k.Rule == l.Rule }
		if !slices.ContainsFunc(g.left, same) {
			g.left = append(g.left, l)
		}
	}
	g.leftAt = now
}

// lacks says whether a rule is left out without which a packet goes another way. Comments take
// none.
func (g *goal) lacks() bool {
	return slices.ContainsFunc(g.left, func(l iptables.RefusedError) bool {
		return l.Rule != iptables.CommentMatch
	})
}

// redirects is what the target redirects.
func (g *goal) redirects(dnsPort uint16) redirected {
	if !g.target.Intercepting() {
		return redirected{}
	}
	r := redirected{services: g.services}
	if g.shape.dns {
		r.dns = dnsPort
	}
	return r
}
