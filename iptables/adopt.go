package iptables

import (
	"slices"
	"strconv"
	"strings"
)

// Ports are where the ruleset redirects outbound connections, inbound ones and DNS
// questions to; 0: it does not.
func (r Ruleset) Ports() (outbound, inbound, dns uint16) {
	return r.redirect(chainRedirect), r.redirect(chainInRedirect), r.redirect(chainDNS)
}

// redirect is the port of the chain's first REDIRECT.
func (r Ruleset) redirect(name string) uint16 {
	rules, _ := r.chain(name)
	for _, spec := range rules {
		if _, to, ok := strings.Cut(spec, "-j REDIRECT --to-ports "); ok {
			port, _ := strconv.ParseUint(to, 10, 16) // 0 where somebody made it a range
			return uint16(port)
		}
	}
	return 0
}

// Settling says whether the ruleset lets connections through that conntrack has not seen from their
// start (see Interception.Settling).
func (r Ruleset) Settling() bool {
	for _, name := range []string{chainOutput, chainInbound} {
		if rules, ok := r.chain(name); ok && slices.Contains(rules, ruleSettling) {
			return true
		}
	}
	return false
}

// Redirects says whether a rule of it has a NAT target, be it that no packet comes there. As long
// as one is in, the kernel follows all connections; with the first of them it begins to.
func (r Ruleset) Redirects() bool {
	return slices.ContainsFunc(r.chains, func(c chain) bool {
		return slices.ContainsFunc(c.rules, func(spec string) bool { return target(spec) == "REDIRECT" })
	})
}

// WithoutJumps is the ruleset with its chains and no jump to them: it redirects nothing.
func (r Ruleset) WithoutJumps() Ruleset {
	r.jumps = nil
	return r
}

// Len is the number of lines of the plan between *nat and COMMIT.
func (p Plan) Len() int { return len(p.lines) }

// WithoutComments is the ruleset as a kernel without the comment match takes it.
func (r Ruleset) WithoutComments() Ruleset {
	bare := Ruleset{family: r.family, jumps: r.jumps}
	for _, c := range r.chains {
		rules := make([]string, len(c.rules))
		for i, spec := range c.rules {
			rules[i] = withoutComment(spec)
		}
		bare.chains = append(bare.chains, chain{c.name, rules})
	}
	return bare
}
