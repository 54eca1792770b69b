package try

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// Agreement is how what the rules say stands to what the kernel did.
type Agreement uint8

const (
	Agree     Agreement = iota + 1
	Differ              // one of the two is wrong
	OnlyTried           // the rules alone do not tell: what the kernel did is the answer
	OnlyRules           // what the kernel did could not be told
)

func (a Agreement) String() string {
	words := [...]string{"", "agree", "differ", "only tried", "only rules"}
	if int(a) < len(words) {
		return words[a]
	}
	return "Agreement(" + strconv.Itoa(int(a)) + ")"
}

// Comparison is an Agreement with both sides in words.
type Comparison struct {
	Agreement Agreement
	Rules     string // what the rules say
	Tried     string // what the kernel did
}

// Compare puts beside each other what the rules of table nat say of a connection and what became of
// it.
func Compare(v iptables.Verdict, o Outcome) Comparison {
	c := Comparison{Agreement: Differ, Rules: rulesSay(v), Tried: o.String()}
	switch {
	case o.Led == Unseen:
		c.Agreement = OnlyRules
	case v.Action == iptables.CannotTell:
		c.Agreement = OnlyTried
	case matches(v, o):
		c.Agreement = Agree
	}
	return c
}

// matches says whether the two are one. A rule that leads to where a packet goes anyway changes
// nothing, so that the address itself can be both.
func matches(v iptables.Verdict, o Outcome) bool {
	switch v.Action {
	case iptables.Pass:
		return o.Led == Itself
	case iptables.Redirect:
		return o.local && o.Where.Port() == v.Port
	case iptables.Taken:
		addr, port, ok := leadsTo(v.Rule)
		if !ok {
			return true // it may lead anywhere
		}
		if port == 0 {
			port = o.Ask.To.Port()
		}
		if !addr.IsValid() {
			return o.local && o.Where.Port() == port
		}
		return o.Where == netip.AddrPortFrom(addr, port)
	}
	return false
}

// leadsTo is the one place to which a rule of others' gives a connection: the address of a DNAT, or
// no address for a REDIRECT, and the port; 0: it stays. False for other rules, and for those that
// choose among several places.
func leadsTo(rule string) (addr netip.Addr, port uint16, ok bool) {
	words := strings.Fields(rule)
	value := func(option string) string {
		for i, w := range words[:max(len(words)-1, 0)] {
			if w == option {
				return words[i+1]
			}
		}
		return ""
	}
	switch value("-j") {
	case "REDIRECT":
		text := value("--to-ports")
		if text == "" {
			return netip.Addr{}, 0, true
		}
		n, err := strconv.ParseUint(text, 10, 16)
		return netip.Addr{}, uint16(n), err == nil
	case "DNAT":
		text := value("--to-destination")
		if a, err := netip.ParseAddr(text); err == nil {
			return a, 0, true
		}
		a, err := netip.ParseAddrPort(text)
		return a.Addr(), a.Port(), err == nil
	}
	return netip.Addr{}, 0, false
}

func rulesSay(v iptables.Verdict) string {
	by := ""
	if v.Rule != "" {
		by = fmt.Sprintf(" by -A %s %s", v.Chain, v.Rule)
	}
	switch v.Action {
	case iptables.Pass:
		return "the rules let it pass" + by
	case iptables.Redirect:
		return fmt.Sprintf("the rules redirect it to port %d", v.Port) + by
	case iptables.Taken:
		return "another program's rule takes it" + by
	}
	return "the rules alone do not tell" + by
}

// String says where the kernel led the connection, and what came of it.
func (o Outcome) String() string {
	var led string
	switch o.Led {
	case Itself:
		led = fmt.Sprintf("the kernel led it to %v itself", o.Ask.To)
	case Here:
		led = fmt.Sprintf("the kernel redirected it to port %d of this machine", o.Where.Port())
	case Elsewhere:
		led = fmt.Sprintf("the kernel led it to %v instead", o.Where)
	default:
		led = "where the kernel led it cannot be told: " + o.Why
	}
	text := led + "; " + o.Answer.String()
	if o.Answer == Failed {
		text += ": " + o.Err.Error()
	}
	if o.State != "" && o.Answer != Connected {
		text += " (conntrack: " + o.State + ")"
	}
	return text
}
