// Package explain says what becomes of a connection: whether the kernel leads it to Envoy, by which
// rule, what Envoy does with it, and if it is not intercepted why not and what would change that.
//
// It is pure: Explain makes an Answer of a Question and of what was Seen, which package agent
// gathers. The way through the kernel is iptables.Table.Trace, the same walk that the tests hold
// against the kernel; the choice of a filter chain is envoyadmin.Choose. Whatever others have
// written (names, rules, comments) is made short and printable here, once, for every output.
package explain

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// Question is a connection that may be made.
type Question struct {
	To       netip.AddrPort
	UID, GID uint32 // of who makes it; of no meaning when it comes in
	UDP      bool
	Inbound  bool   // it comes in from elsewhere
	In       string // the interface it comes in by
	Try      bool   // make the connection, and see what becomes of it
}

// Family is the family of the address.
func (q Question) Family() iptables.Family {
	if q.To.Addr().Is4() {
		return iptables.IPv4
	}
	return iptables.IPv6
}

// Seen is what a Question is answered by.
type Seen struct {
	Source  netip.Addr // that the kernel would give the connection; the zero Addr: not known
	Local   bool       // the address is one of this machine
	NoRoute error      // the kernel has no way to the address
	WayErr  error      // why these three are not known; nil: they are

	// The kernel's table, and what it should be.
	Have     iptables.Table
	HaveErr  error
	Want     iptables.Ruleset
	Asked    iptables.Interception // what Want was made of
	Known    bool                  // Want and Asked are
	Counters []iptables.Counter    // of Path's steps; nil: not asked for
	CountErr error                 // why some are not known

	Tried *Tried // nil: it was not made

	// The daemon. Mode is status.Status.Mode; "": it does not answer.
	Mode, NotReady string

	// Envoy. Its listeners tell something where EnvoyErr is nil.
	Listeners  []envoyadmin.Listener
	Configured bool // it has completed a listener update
	EnvoyErr   error
	Services   []Service // of the family, in the listeners' order
	Refused    []symptom.Refusal
	Routes     []envoyadmin.Routes // of the choice's chains
	Endpoints  []envoyadmin.ClusterEndpoints
	BehindErr  error // why routes or endpoints are not known
	ProxyUser  string
}

// Service is one that Envoy has been told of, by one of its addresses.
type Service struct {
	Name   string
	Prefix netip.Prefix // the zero Prefix: any address
	Port   uint16       // 0: any
}

// Packet is the first packet of the connection.
func (q Question) Packet(s Seen) iptables.Packet {
	p := iptables.Packet{Hook: iptables.Output, Dst: q.To, Proto: iptables.TCP, UID: q.UID, GID: q.GID,
		DstLocal: s.Local, Syn: true}
	if q.UDP {
		p.Proto, p.Syn = iptables.UDP, false
	}
	if q.Inbound {
		p.Hook, p.InInterface, p.UID, p.GID = iptables.Prerouting, q.In, 0, 0
	} else if s.Source.IsValid() {
		p.Src = netip.AddrPortFrom(s.Source, 0)
	}
	return p
}

// Path is the way of the question's first packet through the kernel's table.
func (q Question) Path(s Seen) ([]iptables.Step, iptables.Verdict) {
	return s.Have.Trace(q.Packet(s))
}

// Choice is what Envoy does with the connection that was redirected to a port of it.
func (q Question) Choice(s Seen, port uint16) envoyadmin.Choice {
	at := netip.AddrFrom4([4]byte{127, 0, 0, 1}) // where REDIRECT leads on OUTPUT
	if q.Family() == iptables.IPv6 {
		at = netip.IPv6Loopback()
	}
	if q.Inbound {
		at = q.To.Addr() // on PREROUTING: to an address of the interface
	}
	return envoyadmin.Choose(s.Listeners, envoyadmin.Connection{
		At: netip.AddrPortFrom(at, port), To: q.To})
}

// Verdict says whether a connection goes to Envoy.
type Verdict string

const (
	Intercepted    Verdict = "intercepted"
	NotIntercepted Verdict = "not intercepted"
	Unknown        Verdict = "unknown"
)

// Answer is what becomes of the connection. Its texts are short and printable.
type Answer struct {
	To        string  `json:"to"`
	Protocol  string  `json:"protocol"`  // tcp, udp
	Direction string  `json:"direction"` // outbound, inbound
	UID       *uint32 `json:"uid,omitempty"`
	GID       *uint32 `json:"gid,omitempty"`
	Interface string  `json:"in_interface,omitempty"`

	Verdict Verdict `json:"verdict"`
	Port    uint16  `json:"port,omitempty"` // of Envoy's, where it is intercepted
	Why     string  `json:"why"`
	Next    string  `json:"next,omitempty"`
	// Setting is the one setting that would change the verdict; "": none would.
	Setting string `json:"setting,omitempty"`
	// Rule decides: it redirects, excludes, or is somebody else's that takes the connection.
	Rule *Rule `json:"rule,omitempty"`
	// Nearest is the service that comes next to the address; Rule and Nearest are for a "no".
	Nearest *Nearest `json:"nearest,omitempty"`

	// Tried is the connection as it was made; nil: it was not asked for, or there is no way for it.
	Tried *Tried `json:"tried,omitempty"`

	Path     []Step   `json:"path"`
	Listener string   `json:"listener,omitempty"`
	Chains   []Chain  `json:"chains"`
	Notes    []string `json:"notes"`
	// Finding is the row of docs/symptoms.md that the answer is: 12 or 14.
	Finding *symptom.Finding `json:"finding,omitempty"`
	// Unseen is what could not be looked at, by source, and why.
	Unseen map[symptom.Source]string `json:"unseen,omitempty"`
}

// Complete says whether everything was seen that the answer rests on.
func (a Answer) Complete() bool {
	_, kernel := a.Unseen[symptom.FromKernel]
	_, envoy := a.Unseen[symptom.FromEnvoy]
	_, way := a.Unseen[symptom.FromRoutes]
	return a.Verdict != Unknown && !kernel && !envoy && !way && (a.Tried == nil || a.Tried.Error == "")
}

// Rule is one rule of the kernel's table.
type Rule struct {
	Chain string `json:"chain"`
	Index int    `json:"index,omitempty"` // from 1; 0: not known
	Text  string `json:"text"`            // in iptables-save's form without "-A CHAIN"
	Ours  bool   `json:"ours"`
}

// Nearest is a service near an address that is not one.
type Nearest struct {
	Service string `json:"service,omitempty"`
	Prefix  string `json:"prefix,omitempty"`
	Port    uint16 `json:"port,omitempty"`
	Bits    int    `json:"common_bits"` // that the address has in common with the prefix
	Text    string `json:"text"`
}

// Step is a rule that matched on the way, or the end of a chain.
type Step struct {
	Chain   string  `json:"chain"`
	Index   int     `json:"index,omitempty"`
	Rule    string  `json:"rule,omitempty"`
	Did     string  `json:"did"`
	To      string  `json:"to,omitempty"` // the chain that is jumped to
	Perhaps bool    `json:"perhaps,omitempty"`
	Passed  int     `json:"passed"`            // rules before it that did not match
	Packets *uint64 `json:"packets,omitempty"` // connections that the kernel has counted
	Bytes   *uint64 `json:"bytes,omitempty"`
}

// Chain is a filter chain of Envoy's that may take the connection.
type Chain struct {
	Name    string   `json:"name,omitempty"`
	Service string   `json:"service,omitempty"`
	Default bool     `json:"default,omitempty"`
	None    bool     `json:"none,omitempty"` // no chain: Envoy closes the connection
	When    []string `json:"when"`
	Kind    string   `json:"kind,omitempty"` // http, tcp
	TLS     bool     `json:"tls,omitempty"`
	Route   string   `json:"route,omitempty"`
	Hosts   []Host   `json:"virtual_hosts"`
	// HostCount is of all virtual hosts; 0 where the route was not asked for.
	HostCount int       `json:"virtual_host_count,omitempty"`
	Clusters  []Cluster `json:"clusters"`
}

// Host is a virtual host of an HTTP chain's routes.
type Host struct {
	Name     string   `json:"name,omitempty"`
	Domains  []string `json:"domains"`
	Domain   int      `json:"domain_count"`
	Clusters []string `json:"clusters"`
	Cluster  int      `json:"cluster_count"`
	ByHeader bool     `json:"by_header,omitempty"`
}

// Cluster is one of a chain's, with its endpoints where they are known.
type Cluster struct {
	Name      string     `json:"name"`
	Known     bool       `json:"known"` // Envoy has it, and was asked for its endpoints
	Healthy   int        `json:"healthy"`
	Degraded  int        `json:"degraded"`
	Total     int        `json:"total"`
	Endpoints []Endpoint `json:"endpoints"` // some
}

// Endpoint is one of a cluster's.
type Endpoint struct {
	Address string `json:"address"`
	Health  string `json:"health"`
}

// Bounds of an answer.
const (
	maxLine  = 300 // bytes of a text of others'
	maxShown = 100 // steps
	maxNamed = 5   // services
)

// safe is a text of others' as it may be printed anywhere.
func safe(s string) string { return symptom.Printable(s, maxLine) }

// Explain answers a question.
func Explain(q Question, s Seen) Answer {
	a := Answer{To: q.To.String(), Protocol: "tcp", Direction: "outbound",
		Unseen: map[symptom.Source]string{}}
	if q.UDP {
		a.Protocol = "udp"
	}
	if q.Inbound {
		a.Direction, a.Interface = "inbound", safe(q.In)
	} else {
		a.UID, a.GID = &q.UID, &q.GID
	}
	if s.NoRoute != nil && !q.Inbound {
		a.Verdict, a.Why = NotIntercepted, "the kernel has no way there: "+safe(s.NoRoute.Error())
		a.Next = fmt.Sprintf("give this machine a route to %s: without one a connection fails before "+
			"any rule sees it", q.To.Addr())
		return a
	}
	if s.WayErr != nil {
		a.Unseen[symptom.FromRoutes] = safe(s.WayErr.Error())
	}
	if s.EnvoyErr != nil {
		a.Unseen[symptom.FromEnvoy] = safe(s.EnvoyErr.Error())
	}
	if s.BehindErr != nil {
		a.Unseen[symptom.FromClusters] = safe(s.BehindErr.Error())
	}
	if s.HaveErr != nil {
		a.Unseen[symptom.FromKernel] = safe(s.HaveErr.Error())
		a.Verdict = Unknown
		a.Why = fmt.Sprintf("the %s rules could not be read: %s", q.Family(),
			a.Unseen[symptom.FromKernel])
		return a
	}
	steps, verdict := q.Path(s)
	a.steps(steps, s)
	w := why{q: q, s: s, steps: steps, verdict: verdict, answer: &a}
	switch verdict.Action {
	case iptables.Redirect:
		a.Verdict, a.Port = Intercepted, verdict.Port
		w.intercepted()
	case iptables.CannotTell:
		a.Verdict = Unknown
		w.cannotTell()
	default:
		a.Verdict = NotIntercepted
		w.not()
	}
	w.differs()
	w.tried()
	return a
}

// steps takes the way over, with what was counted.
func (a *Answer) steps(steps []iptables.Step, s Seen) {
	for i, step := range steps {
		if i == maxShown {
			a.Notes = append(a.Notes, fmt.Sprintf("the path has %d more steps", len(steps)-i))
			break
		}
		one := Step{Chain: safe(step.Chain), Index: step.Index, Rule: safe(step.Rule),
			Did: string(step.Did), Perhaps: step.Perhaps, Passed: step.Passed}
		if step.Did == iptables.Jumped {
			one.To = safe(step.Target)
		}
		if i < len(s.Counters) && s.Counters[i].Known {
			one.Packets, one.Bytes = &s.Counters[i].Packets, &s.Counters[i].Bytes
		}
		a.Path = append(a.Path, one)
	}
	if s.CountErr != nil {
		a.Notes = append(a.Notes, "not all counters are known: "+safe(s.CountErr.Error()))
	}
}

// ParseAddress reads ADDRESS:PORT.
func ParseAddress(text string) (netip.AddrPort, error) {
	host, port, err := net.SplitHostPort(text)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("%q is not ADDRESS:PORT; as in 10.0.0.1:80 or [fd00::1]:80",
			safe(text))
	}
	addr, err := netip.ParseAddr(host)
	switch {
	case err != nil && host == "":
		return netip.AddrPort{}, fmt.Errorf("%q has no address; as in 10.0.0.1:80", safe(text))
	case err != nil:
		return netip.AddrPort{}, fmt.Errorf("%q is no address: explain takes one, since a name may "+
			"lead to several; `getent ahosts %s` looks it up", safe(host), safe(host))
	case addr.Zone() != "" || addr.IsUnspecified() || addr.IsMulticast():
		return netip.AddrPort{}, fmt.Errorf("%q is no address that a connection goes to", safe(host))
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return netip.AddrPort{}, fmt.Errorf("%q is not a port from 1 to 65535", safe(port))
	}
	return netip.AddrPortFrom(addr.Unmap(), uint16(n)), nil
}
