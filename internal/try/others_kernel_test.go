//go:build kernel

package try

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os/exec"
	"slices"
	"strings"

	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// unknownComment begins the comments of rules with a match that package iptables does not know.
const unknownComment = "unknown-"

// unknownMatches are such matches. Some match always, some never, some depend.
var unknownMatches = []string{
	"-m mark --mark 0x1", "-m mark --mark 0x0", "-m conntrack --ctstate NEW", "-m state --state NEW",
	"-m conntrack --ctstate ESTABLISHED", "-m tcp --sport 1024:65535", "-m tcp --sport 1:1023",
	"-m tcp --sport 32768:45000", "-m addrtype --src-type LOCAL", "-m addrtype --dst-type UNICAST",
	"-m owner --socket-exists", "-m length --length 1:30", "-m limit --limit 1/sec",
	"-m tcp --tcp-flags SYN,ACK SYN", "-m pkttype --pkt-type unicast", "-m cgroup --cgroup 1",
	"-m connmark --mark 0x0", "-o lo", "-o eth1", "-o eth+", "-m multiport --ports 80,443",
}

// taken are those of the matches that this kernel takes, in a rule of the hook.
func (a *agreement) taken(matches []string) (all []string) {
	ctx, cancel := context.WithCancel(a.t.Context())
	defer cancel()
	for _, m := range matches {
		cmd := exec.CommandContext(ctx, "sh", "-c", fmt.Sprintf("%s -w -t nat -A OUTPUT -p tcp %s",
			program(a.backend, a.family, ""), m))
		if cmd.Run() == nil {
			all = append(all, m)
		}
	}
	if len(all) < len(matches)/2 {
		a.t.Fatalf("this kernel takes only %q", all)
	}
	return all
}

// others are rules of other programs around ours.
type others struct {
	lines []string // as iptables-restore takes them
	// twins are the rules with an unknown match without it, by their comment.
	twins map[string]string
}

// others makes some: in front of our jumps and behind them, in the built-in chain and in chains of
// their own.
func (a *agreement) others(r *rand.Rand, hook iptables.Hook) others {
	o := others{twins: map[string]string{}}
	builtin := "OUTPUT"
	if hook == iptables.Prerouting {
		builtin = "PREROUTING"
	}
	for range r.IntN(4) {
		o.add(a, r, hook, "-I "+builtin, []string{"FOREIGN_A", "FOREIGN_B"})
	}
	for range r.IntN(3) {
		o.add(a, r, hook, "-A "+builtin, []string{"FOREIGN_A", "FOREIGN_B"})
	}
	for range r.IntN(3) {
		o.add(a, r, hook, "-A FOREIGN_A", []string{"FOREIGN_B"})
	}
	for range r.IntN(3) {
		o.add(a, r, hook, "-A FOREIGN_B", nil)
	}
	return o
}

func (o *others) add(a *agreement, r *rand.Rand, hook iptables.Hook, where string,
	chains []string) {
	words := a.match(r, hook)
	// A chain may ask for an interface that nothing of OUTPUT has come in by.
	if hook == iptables.Output && strings.Contains(where, "FOREIGN") && r.IntN(5) == 0 {
		words = append(words, pick(r, []string{"-i eth0", "! -i eth0", "-i +"}))
	}
	target := a.target(r, chains)
	// Targets that name ports need the protocol.
	tcp := slices.Contains(words, "-p tcp")
	if !tcp && (strings.Contains(target, "REDIRECT") || strings.Contains(target, "DNAT")) {
		words = slices.DeleteFunc(words, func(w string) bool { return strings.Contains(w, "-p ") })
		words, tcp = append([]string{"-p tcp"}, words...), true
	}
	known := strings.Join(append(slices.Clone(words), target), " ")
	if r.IntN(4) == 0 && len(o.twins) < 4 {
		unknown := pick(r, a.unknown)
		if hook == iptables.Prerouting && (strings.HasPrefix(unknown, "-o") ||
			strings.Contains(unknown, "owner") || strings.Contains(unknown, "cgroup")) {
			unknown = "-m mark --mark 0x0"
		}
		if strings.Contains(strings.Join(words, " "), unknown[:min(len(unknown), 8)]) {
			unknown = "-m connmark --mark 0x0"
		}
		if !tcp {
			words = slices.DeleteFunc(words, func(w string) bool { return strings.Contains(w, "-p ") })
			words = append([]string{"-p tcp"}, words...)
			known = strings.Join(append(slices.Clone(words), target), " ")
		}
		comment := fmt.Sprintf("%s%d-", unknownComment, len(o.twins))
		o.twins[comment] = known
		known = strings.Join(append(slices.Clone(words), unknown, "-m comment --comment "+comment, target), " ")
	} else if r.IntN(6) == 0 {
		known = strings.Replace(known, "-j ", `-m comment --comment "not \"-j ACCEPT\"" -j `, 1)
	}
	o.lines = append(o.lines, where+" "+known)
}

// match is some matches that package iptables knows.
func (a *agreement) match(r *rand.Rand, hook iptables.Hook) (words []string) {
	not := func() string {
		if r.IntN(4) == 0 {
			return "! "
		}
		return ""
	}
	switch r.IntN(12) {
	case 0: // any protocol
	case 1:
		words = append(words, not()+"-p udp")
	default:
		words = append(words, "-p tcp")
		switch r.IntN(6) {
		case 0:
			words = append(words, fmt.Sprintf("-m tcp %s--dport %d", not(), pick(r, openPorts)))
		case 1:
			words = append(words, fmt.Sprintf("-m multiport %s--dports %d,440:450", not(), pick(r, openPorts)))
		case 2:
			words = append(words, "-m tcp "+not()+"--syn")
		case 3:
			words = append(words, fmt.Sprintf("-m tcp --dport :%d", pick(r, openPorts)))
		}
	}
	if r.IntN(3) == 0 {
		if prefix := a.prefixes(r, 1)[0]; prefix.Bits() > 0 {
			words = append(words, not()+"-d "+prefix.String())
		}
	}
	if r.IntN(6) == 0 {
		near := a.local[r.IntN(3)]
		words = append(words, not()+"-s "+netip.PrefixFrom(near, near.BitLen()-8).Masked().String())
	}
	if r.IntN(6) == 0 {
		words = append(words, "-m addrtype "+not()+"--dst-type LOCAL")
	}
	if hook == iptables.Prerouting {
		if r.IntN(3) == 0 {
			words = append(words, not()+"-i "+pick(r, []string{"eth0", "docker0", "eth+", "lo"}))
		}
		return words
	}
	switch r.IntN(6) {
	case 0:
		words = append(words, fmt.Sprintf("-m owner %s--uid-owner %d", not(), pick(r, uids)))
	case 1:
		words = append(words, fmt.Sprintf("-m owner %s--uid-owner 1000-1001", not()))
	case 2:
		words = append(words, fmt.Sprintf("-m owner %s--gid-owner %d", not(), pick(r, gids)))
	}
	return words
}

// target is what a rule of others' does: end the way, lead elsewhere, jump, or only count.
func (a *agreement) target(r *rand.Rand, chains []string) string {
	if len(chains) > 0 && r.IntN(3) == 0 {
		return pick(r, []string{"-j ", "-j ", "-g "}) + pick(r, chains)
	}
	there := pick(r, a.remote)
	here := pick(r, a.local)
	with := func(addr netip.Addr, port uint16) string {
		return netip.AddrPortFrom(addr, port).String()
	}
	return pick(r, []string{"-j ACCEPT", "-j RETURN", "-j RETURN", "-j CONNMARK --set-mark 0x1",
		"-j MARK --set-mark 0x1", "-j ACCEPT", fmt.Sprintf("-j REDIRECT --to-ports %d", foreignPort),
		"-j REDIRECT", "-j DNAT --to-destination " + there.String(),
		"-j DNAT --to-destination " + with(there, pick(r, openPorts)),
		"-j DNAT --to-destination " + with(here, closedPort)})
}
