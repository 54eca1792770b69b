package explain

import (
	"fmt"
	"math/bits"
	"net/netip"
	"slices"
	"strings"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// why finds the reason of a verdict.
type why struct {
	q       Question
	s       Seen
	steps   []iptables.Step
	verdict iptables.Verdict
	answer  *Answer
}

// say sets the reason, what to do, and the setting that would change the verdict.
func (w why) say(setting, next, format string, args ...any) {
	w.answer.Why, w.answer.Next, w.answer.Setting = fmt.Sprintf(format, args...), next, setting
}

func (w why) note(format string, args ...any) {
	w.answer.Notes = append(w.answer.Notes, fmt.Sprintf(format, args...))
}

// Settings that an answer names: keys of the attribute, flags of the agent, and what is none.
const (
	excludeRanges = "exclude-outbound-ip-ranges"
	excludePorts  = "exclude-outbound-port-ranges"
	proxyUser     = "--proxy-user"
	interfaces    = "--intercept-interfaces"
	servingPorts  = "serving-ports"
	controlPlane  = "control plane"
	interceptDNS  = "intercept-dns"
	resolverUsers = "--resolver-users"
	whenDown      = "--when-envoy-down"
)

// rule is the rule of the way that a step tells of.
func (w why) rule(step iptables.Step) {
	w.answer.Rule = &Rule{Chain: safe(step.Chain), Index: step.Index, Text: safe(step.Rule),
		Ours: iptables.IsOurs(step.Chain)}
}

// decided is the step that the verdict names.
func (w why) decided() (iptables.Step, bool) {
	for _, step := range slices.Backward(w.steps) {
		if step.Index > 0 && step.Chain == w.verdict.Chain && step.Rule == w.verdict.Rule {
			return step, true
		}
	}
	return iptables.Step{Chain: w.verdict.Chain, Rule: w.verdict.Rule}, w.verdict.Rule != ""
}

func (w why) cannotTell() {
	step, ok := w.decided()
	if !ok {
		w.say("", "run it as root", "chain %s was not read, so that nobody can tell what becomes of the "+
			"connection there", safe(w.verdict.Chain))
		return
	}
	w.rule(step)
	w.say("", fmt.Sprintf("see by the rule's counter in `%s -t nat -vnL %s` whether it takes the "+
		"connection", w.program(), safe(step.Chain)),
		"rule %d of chain %s has a match or target that this program does not know: %s", step.Index,
		safe(step.Chain), safe(step.Rule))
}

func (w why) program() string {
	if w.q.Family() == iptables.IPv6 {
		return "ip6tables"
	}
	return "iptables"
}

// intercepted says why a connection is intercepted, and what Envoy does with it.
func (w why) intercepted() {
	if step, ok := w.decided(); ok {
		w.rule(step)
	}
	way := w.through()
	service, isService := w.service()
	switch {
	case w.q.UDP || w.s.Known && w.verdict.Port == w.s.Asked.DNSPort &&
		w.verdict.Port != w.s.Asked.OutboundPort:
		w.say(interceptDNS, "", "DNS questions are redirected to Envoy's port %d", w.verdict.Port)
		return // its DNS listener has no chains
	case w.q.Inbound && w.s.Known && w.verdict.Port == w.s.Asked.InboundPort:
		w.say(servingPorts, "", "port %d is a serving port, and Envoy takes it at port %d", w.q.To.Port(),
			w.verdict.Port)
	case w.s.Known && w.s.Asked.All:
		w.say(excludeRanges, "", "everything outbound is redirected to Envoy's port %d "+
			"(intercept-all-outbound)", w.verdict.Port)
	case isService:
		w.say(excludeRanges, "", "it is an address of service %s, and redirected to Envoy's port %d",
			service.Name, w.verdict.Port)
	default:
		w.say(excludeRanges, "", "rule %q redirects it to Envoy's port %d", way, w.verdict.Port)
	}
	if w.s.EnvoyErr != nil {
		w.answer.Why += "; what Envoy does with it is not known: " + safe(w.s.EnvoyErr.Error())
		w.answer.Next = "see whether Envoy runs, by `service-proxy-agent doctor`: where nothing " +
			"accepts on that port, the connection fails"
		return
	}
	if slices.ContainsFunc(w.s.Have.Rules("SERVICE_PROXY_OUTPUT"), func(rule string) bool {
		return strings.Contains(rule, "--comment settling ")
	}) {
		w.note("the rules are new: connections that are older than they go the old way until they end")
	}
	if w.s.Mode == "bypass" || w.s.Mode == "hold" || w.s.Mode == "off" ||
		w.s.Mode == "paused" {
		w.note("the agent says that it does not intercept now (%s), and the rules do", w.s.Mode)
	}
	w.behind()
}

// through is the rule that leads to the one which redirects: that of the service.
func (w why) through() string {
	for _, step := range slices.Backward(w.steps) {
		if step.Did == iptables.Jumped {
			return safe(step.Rule)
		}
	}
	return safe(w.verdict.Rule)
}

// service is the most specific service that the address is one of.
func (w why) service() (found Service, ok bool) {
	best := -1
	for _, s := range w.s.Services {
		if s.Prefix.IsValid() && !s.Prefix.Contains(w.q.To.Addr()) ||
			!s.Prefix.IsValid() && s.Port != w.q.To.Port() {
			continue
		}
		score := 0
		if s.Prefix.IsValid() {
			score = 2 * (s.Prefix.Bits() + 1)
		}
		if s.Port == w.q.To.Port() {
			score++
		}
		if score > best {
			found, best, ok = s, score, true
		}
	}
	found.Name = safe(found.Name)
	if ok && found.Name == "" {
		found.Name = "without a name"
	}
	return found, ok
}

// not says why a connection is not intercepted.
func (w why) not() {
	asked := w.asked()
	ended, byForeign := w.endedByForeign()
	returned, wasReturned := w.returned()
	ours := w.s.Have.Ours()
	switch {
	case byForeign && !asked:
		w.foreign(ended)
	case wasReturned:
		w.excluded(returned)
	case w.q.UDP && (w.q.To.Port() != 53 || w.q.Inbound):
		w.say("", "", "only DNS questions that are sent from here (port 53) are intercepted of UDP")
	case ours.Empty(), !asked && !w.wants():
		w.noRules()
	case !ours.Intercepting():
		w.noJumps()
	case w.q.Inbound:
		w.notServing()
	default:
		w.noService()
	}
	if byForeign && asked {
		w.note("rule %d of chain %s, which is not ours, then decides: %s", ended.Index,
			safe(ended.Chain), safe(ended.Rule))
	}
}

// asked says whether the connection came to a chain of ours.
func (w why) asked() bool {
	return slices.ContainsFunc(w.steps, func(s iptables.Step) bool { return iptables.IsOurs(s.Chain) })
}

// wants says whether anything is to be intercepted of the question's kind.
func (w why) wants() bool {
	switch {
	case !w.s.Known:
		return true
	case w.q.UDP:
		return w.s.Asked.DNSPort != 0
	case w.q.Inbound:
		return w.s.Asked.InboundPort != 0 || len(w.s.Asked.Interfaces) > 0
	}
	return w.s.Asked.OutboundPort != 0
}

// endedByForeign is the rule of somebody else's by which the way ends.
func (w why) endedByForeign() (iptables.Step, bool) {
	if len(w.steps) == 0 {
		return iptables.Step{}, false
	}
	last := w.steps[len(w.steps)-1]
	return last, last.Index > 0 && !iptables.IsOurs(last.Chain)
}

// returned is the rule of ours that lets the connection go.
func (w why) returned() (iptables.Step, bool) {
	for _, step := range slices.Backward(w.steps) {
		if step.Did == iptables.Returned && iptables.IsOurs(step.Chain) {
			return step, true
		}
	}
	return iptables.Step{}, false
}

func (w why) foreign(step iptables.Step) {
	what := "takes the connection before a rule of ours does"
	if w.verdict.Action == iptables.Pass {
		what = "lets the connection go before it comes to ours"
	}
	w.rule(step)
	jump := "SERVICE_PROXY_OUTPUT"
	switch {
	case w.q.Inbound:
		jump = "SERVICE_PROXY_INBOUND"
	case w.q.UDP:
		jump = "SERVICE_PROXY_DNS"
	}
	w.say("", "move it behind the jump to "+jump+", or leave the address out of it",
		"rule %d of chain %s, which is not ours, %s: %s", step.Index, safe(step.Chain), what,
		safe(step.Rule))
}

// excluded says what a RETURN of ours is for: its comment tells.
func (w why) excluded(step iptables.Step) {
	w.rule(step)
	to := w.q.To
	switch step.Comment {
	case "proxy-user", "proxy-group":
		who := fmt.Sprintf("user %d is the proxy's (%s)", w.q.UID, safe(w.s.ProxyUser))
		if step.Comment == "proxy-group" {
			who = fmt.Sprintf("group %d is that of the proxy's user (%s)", w.q.GID, safe(w.s.ProxyUser))
		}
		w.say(proxyUser, "ask with --uid for the user of the application",
			"%s: the proxy's own connections are never redirected, since they would come back to it", who)
	case "root":
		w.say("", "run the application as an ordinary user",
			"with intercept-all-outbound root's connections are not redirected")
	case iptables.Loopback, iptables.LinkLocal, iptables.MetadataServer:
		what := step.Comment
		for _, r := range w.q.Family().Reserved() {
			if r.Prefix.Contains(to.Addr()) {
				what = r.Name // the most specific one is the last
			}
		}
		w.say("", "", "%s (%s) is never redirected outbound", to.Addr(),
			strings.ReplaceAll(what, "-", " "))
	case "excluded":
		if strings.Contains(step.Rule, "--dport") || !strings.HasPrefix(step.Rule, "-d ") {
			w.say(excludePorts, fmt.Sprintf("take port %d out of %s in the attribute", to.Port(),
				excludePorts), "port %d is excluded by %s", to.Port(), excludePorts)
			break
		}
		w.say(excludeRanges, fmt.Sprintf("take %s out of %s in the attribute", to.Addr(), excludeRanges),
			"%s is excluded by %s", to.Addr(), excludeRanges)
	case "local-resolver":
		w.say(resolverUsers, "ask with --uid for the user of the application",
			"user %d is the VM's resolver, whose questions must leave the VM", w.q.UID)
	case "settling":
		w.say("", "open a new connection", "the rules are new, and packets of older connections pass")
	case "routed-through":
		w.say("", "", "%s is not an address of this VM: what is only routed through is never inbound",
			to.Addr())
	default:
		w.say("", "", "rule %d of chain %s lets it go: %s", step.Index, step.Chain, safe(step.Rule))
	}
	if service, ok := w.service(); ok && !w.q.Inbound {
		w.answer.Why += fmt.Sprintf("; it is an address of service %s", service.Name)
	}
}

// off: an operator has turned interception off.
func (w why) off() {
	w.say("", "take the metadata key service-proxy-agent-interception away, of the instance or the "+
		"project: `service-proxy-agent doctor` says whose it is, and has the command",
		"interception is off, as intended: metadata has service-proxy-agent-interception=off")
}

// noRules: nothing of ours is in the kernel.
func (w why) noRules() {
	family := w.q.Family()
	switch {
	case w.s.Mode == "off":
		w.off()
	case w.s.EnvoyErr != nil:
		w.say("", "look why with `service-proxy-agent doctor`",
			"there are no %s rules of ours, and Envoy does not answer: %s", family,
			safe(w.s.EnvoyErr.Error()))
	case !w.s.Known:
		w.say("", "look why with `service-proxy-agent doctor`",
			"there are no %s rules of ours; what they should be is not known", family)
	case w.wants():
		w.say("", w.run(), "the %s rules are not in the kernel", family)
	case w.q.UDP:
		w.say(interceptDNS, "set intercept-dns in the attribute, with a DNS listener in Envoy",
			"DNS questions are not intercepted: intercept-dns is off, or Envoy has no DNS listener")
	case w.q.Inbound:
		w.say(servingPorts, "name the port in serving-ports of the attribute; Envoy needs an inbound "+
			"listener for it", "nothing inbound is intercepted: no serving port has a chain in an inbound "+
			"listener of Envoy's")
	case len(w.s.Listeners) == 0 && !w.s.Configured:
		w.say(controlPlane, "look why with `service-proxy-agent doctor`",
			"Envoy has not received its configuration, so that there is nothing to redirect to")
	case family == iptables.IPv6 && len(w.s.Listeners) > 0:
		w.say(controlPlane, "have the control plane give the interception listener an IPv6 address (::)",
			"IPv6 is not intercepted: Envoy's interception listener has no IPv6 address")
	default:
		w.say(controlPlane, "have the control plane send a listener that is bound, TCP, and looks up "+
			"the original destination", "Envoy has no %s listener that takes redirected connections", family)
	}
}

// run is what to do where rules are missing.
func (w why) run() string {
	if w.s.Mode == "" {
		return "start the agent: `systemctl start service-proxy-agent`"
	}
	return "the agent repairs that by itself; if it does not, see `service-proxy-agent status`"
}

// noJumps: the chains stand, and no packet comes to them.
func (w why) noJumps() {
	reason := ""
	if w.s.NotReady != "" {
		reason = ": " + safe(w.s.NotReady)
	}
	switch w.s.Mode {
	case "hold":
		w.say("", "it goes in by itself; see `service-proxy-agent status`",
			"interception is held back until Envoy is ready%s", reason)
	case "bypass":
		w.say(whenDown, "see `service-proxy-agent status` why Envoy is down",
			"interception is bypassed while Envoy is down%s", reason)
	case "off":
		w.off()
	case "paused":
		w.say("", "start it again: `systemctl restart service-proxy-agent`",
			"interception is paused: `service-proxy-agent cleanup` was called")
	default:
		w.say("", w.run(), "no jump leads to the %s rules of ours, so that nothing is redirected",
			w.q.Family())
	}
}

// notServing: an inbound connection to a port that is none of the serving ports.
func (w why) notServing() {
	a := w.s.Asked
	switch {
	case w.s.Known && len(a.Interfaces) > 0 && !w.s.Local:
		w.say(interfaces, "", "%s is not an address of this VM, and not one of a service's that is "+
			"intercepted for interface %q", w.q.To.Addr(), safe(w.q.In))
	case !w.s.Local:
		w.say(interfaces, "set --intercept-interfaces to intercept what containers send",
			"%s is not an address of this VM, and nothing is intercepted of what comes in by interface %q "+
				"for elsewhere", w.q.To.Addr(), safe(w.q.In))
	default:
		w.say(servingPorts, fmt.Sprintf("name %d in serving-ports of the attribute; Envoy needs an "+
			"inbound listener for it", w.q.To.Port()),
			"port %d is no serving port with a chain in Envoy's inbound listener: connections go to the "+
				"application directly", w.q.To.Port())
	}
}

// noService: the connection went through our chains, and no row had its address.
func (w why) noService() {
	to := w.q.To
	service, isService := w.service()
	switch {
	case w.s.EnvoyErr != nil:
		w.say("", "look why with `service-proxy-agent doctor`",
			"no rule has its address, and Envoy does not tell which services it has been told of: %s",
			safe(w.s.EnvoyErr.Error()))
		return
	case isService && !w.asked():
		w.say("", w.run(), "it is an address of service %s, and no jump leads to the rules of ours",
			service.Name)
		return
	case isService && w.wanted().Action == iptables.Redirect:
		w.say("", w.run(), "it is an address of service %s, and its rule is missing in the kernel",
			service.Name)
		return
	case w.refusal():
		return
	case !w.s.Configured && len(w.s.Services) == 0:
		w.say(controlPlane, "look why with `service-proxy-agent doctor`",
			"Envoy has not received its configuration, so that it knows of no service")
		return
	}
	names := w.names()
	finding := symptom.NotConfigured(to, len(names), names[:min(len(names), maxNamed)])
	w.answer.Finding = &finding
	w.say(controlPlane, finding.Next, "%s", finding.Cause)
	w.nearest()
}

// names are the services that Envoy has been told of.
func (w why) names() (names []string) {
	seen := map[string]bool{}
	for _, s := range w.s.Services {
		name := safe(s.Name)
		if name == "" && s.Prefix.IsValid() {
			name = s.Prefix.String()
		} else if name == "" {
			name = fmt.Sprintf("port %d", s.Port)
		}
		if !seen[name] {
			seen[name] = true
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// refusal says that Envoy has been told of the address, and the agent would not make a rule of it.
func (w why) refusal() bool {
	for _, r := range w.s.Refused {
		prefix, err := netip.ParsePrefix(r.Entry)
		if err == nil && prefix.Contains(w.q.To.Addr()) ||
			r.Entry == fmt.Sprintf("port %d", w.q.To.Port()) {
			w.say(controlPlane, "leave it out of the listener", "listener %q of Envoy's has %s, and no "+
				"rule was made of it: %s", safe(r.Listener), safe(r.Entry), safe(r.Reason))
			return true
		}
	}
	return false
}

// nearest finds the service that comes next to the address: the same one at another port, else the
// one whose prefix has most bits in common with it.
func (w why) nearest() {
	best := Nearest{Bits: -1}
	for _, s := range w.s.Services {
		if !s.Prefix.IsValid() {
			continue
		}
		common := min(commonBits(s.Prefix.Addr(), w.q.To.Addr()), s.Prefix.Bits())
		if common > best.Bits {
			best = Nearest{Service: safe(s.Name), Prefix: s.Prefix.String(), Port: s.Port, Bits: common}
		}
	}
	if best.Bits < 0 {
		return
	}
	name := best.Service
	if name == "" {
		name = "without a name"
	}
	best.Text = fmt.Sprintf("nearest is service %s at %s: %d of %d bits are the same", name,
		best.Prefix, best.Bits, w.q.To.Addr().BitLen())
	w.answer.Nearest = &best
}

// commonBits is how many bits two addresses begin alike with.
func commonBits(a, b netip.Addr) int {
	if a.Is4() != b.Is4() {
		return 0
	}
	x, y := a.AsSlice(), b.AsSlice()
	n := 0
	for i := range x {
		if x[i] != y[i] {
			return n + bits.LeadingZeros8(x[i]^y[i])
		}
		n += 8
	}
	return n
}

// wanted is the verdict of the rules as they should be.
func (w why) wanted() iptables.Verdict {
	if !w.s.Known {
		return iptables.Verdict{}
	}
	return w.s.Want.Walk(w.q.Packet(w.s))
}

// differs tells where the kernel's rules give another answer than they should.
func (w why) differs() {
	want := w.wanted()
	foreign := w.answer.Rule != nil && !w.answer.Rule.Ours // which is the reason, and told
	if !w.s.Known || foreign || w.verdict.Action == iptables.CannotTell ||
		want.Action == iptables.CannotTell ||
		(want.Action == iptables.Redirect) == (w.verdict.Action == iptables.Redirect) &&
			want.Port == w.verdict.Port {
		return
	}
	should := "not be intercepted"
	if want.Action == iptables.Redirect {
		should = fmt.Sprintf("go to port %d", want.Port)
	}
	w.note("the kernel's rules are not as they should be: by Envoy's listeners and the attribute the "+
		"connection should %s; `service-proxy-agent diff` shows the difference", should)
}
