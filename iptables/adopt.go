package iptables

import "slices"

// InboundRedirect is the chain that redirects inbound connections: Table.Has says whether there are any.
const InboundRedirect = chainInRedirect

// Settling says whether the ruleset lets connections through that conntrack has not seen from their start (see
// Interception.Settling).
func (r Ruleset) Settling() bool {
	for _, name := range []string{chainOutput, chainInbound} {
		if rules, ok := r.chain(name); ok && slices.Contains(rules, ruleSettling) {
			return true
		}
	}
	return false
}

// WithoutJumps is the ruleset with its chains and no jump to them: it redirects nothing.
func (r Ruleset) WithoutJumps() Ruleset {
	r.jumps = nil
	return r
}

// Len is the number of lines of the plan between *nat and COMMIT.
func (p Plan) Len() int { return len(p.lines) }
