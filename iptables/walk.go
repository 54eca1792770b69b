package iptables

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Hook is where a packet is walked: it enters table nat at the first two, and table filter at the
// third.
type Hook uint8

const (
	Output     Hook = iota + 1 // made on this machine
	Prerouting                 // come in by an interface
	Input                      // for a socket of this machine
)

// Proto is the transport protocol of a packet.
type Proto uint8

const (
	TCP Proto = 6
	UDP Proto = 17
)

func (p Proto) String() string {
	switch p {
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	}
	return strconv.Itoa(int(p))
}

// Packet is the first packet of a connection: the only one that table nat sees.
type Packet struct {
	Hook     Hook
	Src, Dst netip.AddrPort // a source without an address is anybody
	Proto    Proto
	UID, GID uint32 // the socket's creator; of no meaning but in OUTPUT
	// InInterface is what it came in by, in PREROUTING and INPUT. "" in INPUT: any but loopback, and
	// in PREROUTING one that no rule names.
	InInterface string
	DstLocal    bool // the destination is an address of this machine (addrtype LOCAL)
	// Syn says that the packet opens a connection. A TCP packet without it belongs to one that
	// conntrack has not seen from its start.
	Syn bool
	// Redirected says that a rule of table nat has led it here (--ctstate DNAT).
	Redirected bool
}

// Action is what becomes of a packet.
type Action uint8

const (
	Pass     Action = iota + 1 // goes its own way
	Redirect                   // goes to Verdict.Port on this machine
	// another program's rule decides (DNAT, DROP, REDIRECT of its own, ...); only from Table.Walk
	Taken
	CannotTell // depends on a match or target that this package does not know
	Dropped    // or rejected; only from Filter.Walk
)

func (a Action) String() string {
	words := [...]string{"", "pass", "redirect", "taken", "cannot tell", "dropped"}
	if int(a) < len(words) {
		return words[a]
	}
	return "Action(" + strconv.Itoa(int(a)) + ")"
}

// Verdict is where a packet goes and which rule says so. Chain and Rule (in iptables-save's form
// without "-A CHAIN") are empty when no rule took the packet.
type Verdict struct {
	Action Action
	Port   uint16 // for Redirect
	Chain  string
	Rule   string
}

// Walk says what the ruleset does with the packet, as if nobody else had rules.
func (r Ruleset) Walk(p Packet) Verdict {
	w := walker{packet: p, rules: func(name string) ([]string, bool) {
		if isJumpSite(name) {
			return r.jumpsFrom(name), true
		}
		return r.chain(name)
	}, note: func(Step) {}}
	return w.start()
}

// Walk says what the table does with the packet, other programs' rules included.
func (t Table) Walk(p Packet) Verdict {
	return t.walker(p, func(Step) {}).start()
}

func (t Table) walker(p Packet, note func(Step)) walker {
	return walker{packet: p, rules: func(name string) ([]string, bool) {
		rules, ok := t.chains[name]
		// A built-in chain without a rule need not be there, nor the table that it would be in.
		return rules, ok || isJumpSite(name)
	}, note: note}
}

type walker struct {
	packet Packet
	rules  func(chain string) ([]string, bool)
	note   func(Step) // told of each rule that matches, and of each chain's end that is come to
}

// maxDepth bounds the walk through a table that leads in a circle; the kernel refuses those,
// a broken save may not.
const maxDepth = 64

func (w walker) start() Verdict {
	builtin := builtinOutput
	if w.packet.Hook == Prerouting {
		builtin = builtinPrerouting
	}
	verdict := w.chain(builtin, 0)
	if verdict.Action == 0 {
		// the policy of table nat is ACCEPT; one that is not would drop, which nobody sets
		return Verdict{Action: Pass}
	}
	return verdict
}

// chain walks one chain. A verdict of no action means that the packet came to
// its end or was returned.
func (w walker) chain(name string, depth int) Verdict {
	rules, ok := w.rules(name)
	if !ok || depth > maxDepth {
		w.note(Step{Chain: name, Did: NotRead})
		return Verdict{Action: CannotTell, Chain: name}
	}
	passed := 0
	for n, spec := range rules {
		p := parseRule(spec)
		m := p.matches(w.packet)
		if m == no {
			passed++
			continue
		}
		found, did := w.target(name, spec, p)
		w.note(Step{Chain: name, Index: n + 1, Rule: spec, Comment: p.comment, Target: p.target,
			Did: did, Perhaps: m == maybe, Passed: passed})
		passed = 0
		if did == WentOn {
			continue
		}
		if did == Jumped {
			inner := w.chain(p.target, depth+1)
			if inner.Action == 0 && !p.goTo {
				continue // back from there, whether it went there or not
			}
			if inner.Action != 0 {
				found = inner
			}
		}
		if m == maybe {
			return Verdict{Action: CannotTell, Chain: name, Rule: spec}
		}
		if found.Action == 0 { // RETURN, or the end of a chain gone to
			return Verdict{}
		}
		return found
	}
	w.note(Step{Chain: name, Did: Ended, Passed: passed})
	return Verdict{}
}

// target says what a rule that matches does. A Verdict of no action is a RETURN's, or that of the
// end of a chain which it leads to.
func (w walker) target(chain, spec string, p parsed) (found Verdict, did Did) {
	if letsPass(p.target) {
		return Verdict{}, WentOn
	}
	found = Verdict{Chain: chain, Rule: spec}
	switch p.target {
	case "RETURN":
		return found, Returned
	case "ACCEPT":
		found.Action = Pass
		return found, Accepted
	case "REDIRECT":
		if port, err := strconv.ParseUint(p.toPorts, 10, 16); err == nil && isOurs(chain) {
			found.Action, found.Port = Redirect, uint16(port)
			return found, Redirected
		}
		found.Action = Taken
		return found, Took
	}
	if _, ok := w.rules(p.target); ok {
		return found, Jumped
	}
	if isTerminal(p.target) {
		found.Action = Taken
		return found, Took
	}
	found.Action = CannotTell
	return found, NotKnown
}

// letsPass says whether a packet goes on to the next rule after this target.
func letsPass(target string) bool {
	switch target {
	case "", "LOG", "NFLOG", "ULOG", "MARK", "CONNMARK", "TRACE", "SET", "CONNSECMARK",
		"SECMARK", "AUDIT":
		return true
	}
	return false
}

// isTerminal says whether a target of others' is known to end a packet's way through the table.
func isTerminal(target string) bool {
	switch target {
	case "DROP", "DNAT", "SNAT", "MASQUERADE", "NETMAP", "QUEUE", "NFQUEUE":
		// those that table nat takes
		return true
	}
	return false
}

// match is the answer of a rule's matches.
type match uint8

const (
	no match = iota
	maybe
	yes
)

func (p parsed) matches(k Packet) match {
	if p.proto != "" && (p.proto == k.Proto.String()) == p.protoNot {
		return no
	}
	unsure := p.unknown || p.out.name != ""
	if !k.Src.Addr().IsValid() {
		unsure = unsure || p.src.prefix.IsValid()
	} else if !p.src.matches(k.Src.Addr()) {
		return no
	}
	if !p.dst.matches(k.Dst.Addr()) {
		return no
	}
	switch in := p.in.comes(k); {
	case in == maybe:
		unsure = true
	case (in == yes) == p.in.not:
		return no
	}
	if p.hasStates && p.statesMatch(k) == p.statesNot {
		return no
	}
	if p.hasDports {
		in := false
		for _, r := range p.dports {
			in = in || r.First <= k.Dst.Port() && k.Dst.Port() <= r.Last
		}
		if in == p.dportsNot {
			return no
		}
	}
	if p.syn && (k.Proto != TCP || k.Syn == p.synNot) {
		return no
	}
	if !p.uid.matches(k, k.UID) || !p.gid.matches(k, k.GID) {
		return no
	}
	if p.dstLocal && k.DstLocal == p.dstLocNot {
		return no
	}
	if unsure {
		return maybe
	}
	return yes
}

// statesMatch says whether one of the rule's states is that of a first packet.
func (p parsed) statesMatch(k Packet) bool {
	return slices.Contains(p.states, "NEW") || k.Redirected && slices.Contains(p.states, "DNAT")
}

// comes says whether the packet came in by an interface of this name, whatever the match makes of
// that.
func (m interfaceMatch) comes(k Packet) match {
	in := k.InInterface
	switch {
	case m.name == "":
		return yes // no interface match, which is never negated
	case k.Hook == Output:
		in = "" // a packet made here came in by none
	case k.Hook == Input && in == "" && m.name != "lo" && m.name != "+":
		return maybe
	}
	if m.matches(in) {
		return yes
	}
	return no
}

func (m addressMatch) matches(a netip.Addr) bool {
	return !m.prefix.IsValid() || m.prefix.Contains(a) != m.not
}

func (m interfaceMatch) matches(name string) bool {
	if prefix, ok := strings.CutSuffix(m.name, "+"); ok {
		return strings.HasPrefix(name, prefix)
	}
	return name == m.name
}

// matches is true for a rule without owner match. A packet from outside has no owner: the match,
// negated or not, fails.
func (r *idRange) matches(k Packet, id uint32) bool {
	if r == nil {
		return true
	}
	return k.Hook == Output && (r.first <= id && id <= r.last) != r.not
}

// takes says whether a rule that stands before jump in its built-in chain may keep packets from it
// that the jump is meant for. It errs on the side of yes: the answer only words what is repaired
// anyway, by putting the jump first.
func (t Table) takes(spec, jump string) bool {
	return t.mayEnd(parseRule(spec), parseRule(jump), true, 0)
}

func (t Table) mayEnd(p, jump parsed, builtin bool, depth int) bool {
	if p.proto != "" && !p.protoNot && p.proto != jump.proto || p.protoNot && p.proto == jump.proto {
		return false
	}
	if jump.hasDports && p.hasDports && !p.dportsNot && !overlap(p.dports, jump.dports) {
		return false
	}
	if letsPass(p.target) {
		return false
	}
	if p.target == "RETURN" {
		return builtin // in a built-in chain it means the policy; in a user chain the packet comes back
	}
	rules, ok := t.chains[p.target]
	if !ok || depth > maxDepth {
		return true // an extension, or a chain that was not read
	}
	if p.goTo && builtin {
		return true // its end is the end of the built-in chain
	}
	for _, spec := range rules {
		if t.mayEnd(parseRule(spec), jump, false, depth+1) {
			return true
		}
	}
	return false
}

func overlap(a, b []PortRange) bool {
	for _, x := range a {
		for _, y := range b {
			if x.First <= y.Last && y.First <= x.Last {
				return true
			}
		}
	}
	return false
}
