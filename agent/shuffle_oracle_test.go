package agent

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/envoywatch"
	"github.com/service-proxy-agent/service-proxy-agent/internal/reconcile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// oracle says what the nat table must hold after each pass. It was written apart from the code
// under test and uses none of it: it knows what Envoy answered, the attribute, and who listens
// where.
//
// A pass must leave the table exactly as the oracle says, with these exceptions: somebody else
// wrote and the agent may not know of it yet (damaged), the agent's programs fail (faults) or
// failed a moment ago (recovering). How long these may last is for calm and rest to say. What
// others wrote stays in any case.
type oracle struct {
	w        *world
	believed int // number of the dump that counts for the loop, 0: none in this run
	state    string

	families [2]expectation
	was      [2]tables // before the pass
	wrote    [2]int    // the agent's restores before the pass
	read     [2]int    // its saves before the pass
	looked   [2]int    // its listings and saves before the pass
	failed   [2]int    // programs of its that had failed before the pass
	marked   bool      // before the pass
	goesOn   bool      // the last pass asked for another one at once: they are judged as one
}

// expectation is what the oracle knows of one family.
type expectation struct {
	foreign    tables // what others have put there
	damaged    bool   // others wrote since the table was last as expected
	untold     int    // writes of others that the agent cannot know of yet
	recovering bool   // the agent's programs failed since
	read       bool   // the agent has read the table since they failed
	blind      bool   // its last try to read or write failed
	adopted    bool   // this run has read the table
	seen       tables // as the agent has read it last
	unseen     bool   // others wrote since
	told       bool   // and the pass before this one could know
	kept       tables // an earlier run's that go on until it is known what is wanted; nil: none
	had        bool   // this run has put jumps in or taken them out, or found those that it wants
	first      bool   // the next jump to go in is a first install
	settling   time.Time
	ports      [sides]port
	wrong      string // how the table differed from what is expected at the end of the last pass
	judged     judged // the last pass
}

// port is what the passes saw of one interception port.
type port struct {
	ready  bool // the proxy accepted, and nothing came since for which jumps are taken out
	denied bool // somebody else held it, Envoy drained, or it was closed for too long
	closed int  // looks in a row that found nobody
	since  time.Time
}

// tables are the chains of a nat table with their rules.
type tables = map[string][]string

// How long an Envoy may be away under bypass, and for how many looks.
const (
	bypassLooks = 3
	bypassAway  = 2 * time.Second
)

// firstInstall is how long older connections are let through after a first install.
const firstInstall = 5 * time.Minute

// settlingRow lets through what conntrack has not seen from its start.
const settlingRow = "-p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN " +
	"-m comment --comment settling -j RETURN"

func ours(chain string) bool { return strings.HasPrefix(chain, "SERVICE_PROXY_") }

func builtin(chain string) bool {
	return slices.Contains([]string{"PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"}, chain)
}

// jump says whether a rule leads to a chain of ours.
func jump(rule string) bool {
	_, to, _ := strings.Cut(rule, "-j ")
	return ours(to)
}

// The rules of others that are there from the start. The ones in OUTPUT and PREROUTING take packets
// that are ours if ours do not come first.
var canaries = [2][]string{
	{
		":CANARY - [0:0]", "-A CANARY -p tcp -m tcp --dport 80 -j ACCEPT",
		"-A OUTPUT -d 10.10.0.0/16 -j CANARY", "-A PREROUTING -p tcp -m tcp --dport 8080 -j ACCEPT",
		"-A POSTROUTING -s 172.17.0.0/16 -j MASQUERADE",
	},
	{
		":CANARY - [0:0]", "-A CANARY -p tcp -m tcp --dport 80 -j ACCEPT",
		"-A OUTPUT -d fd10::/16 -j CANARY", "-A PREROUTING -p tcp -m tcp --dport 8080 -j ACCEPT",
		"-A POSTROUTING -s fd17::/16 -j MASQUERADE",
	},
}

func (o *oracle) begin() {
	for i, f := range bothFamilies {
		o.w.nat.restore(f, "*nat\n"+strings.Join(canaries[i], "\n")+"\nCOMMIT\n")
		o.written(f)
		o.families[i].damaged, o.families[i].untold = false, 0
	}
}

// started notes that a run of the agent begins, which knows nothing.
func (o *oracle) started() {
	o.believed, o.state, o.goesOn = 0, "", false
	for i := range o.families {
		was := o.families[i]
		o.families[i] = expectation{
			foreign: was.foreign, damaged: was.damaged, untold: was.untold, unseen: was.unseen,
			first: was.first, settling: was.settling, wrong: was.wrong,
		}
	}
}

// written notes that somebody else has written.
func (o *oracle) written(f iptables.Family) {
	e := &o.families[index(f)]
	e.foreign, e.damaged = othersOf(o.w.nat.chains(f)), true
	e.unseen = true
	e.untold++
}

// othersOf is what of a table is not ours.
func othersOf(t tables) tables {
	others := tables{}
	for name, rules := range t {
		if !ours(name) {
			others[name] = slices.DeleteFunc(slices.Clone(rules), func(rule string) bool {
				return builtin(name) && jump(rule)
			})
		}
	}
	return others
}

// oursOf is what of a table is ours, with our jumps by the built-in chains that hold them.
func oursOf(t tables) tables {
	mine := tables{}
	for name, rules := range t {
		switch {
		case ours(name):
			mine[name] = rules
		case builtin(name):
			for _, rule := range rules {
				if jump(rule) {
					mine[name] = append(mine[name], rule)
				}
			}
		}
	}
	return mine
}

// chainsOf are our chains, without the jumps to them.
func chainsOf(t tables) tables {
	mine := oursOf(t)
	delete(mine, "PREROUTING")
	delete(mine, "OUTPUT")
	return mine
}

// jumps says whether any packet comes to our chains.
func jumps(t tables) bool {
	return slices.ContainsFunc(t["PREROUTING"], jump) || slices.ContainsFunc(t["OUTPUT"], jump)
}

// view checks what the loop is told of Envoy. A dump counts only if Envoy had taken an update when
// it was read, and never in the place of a later one.
func (o *oracle) view(v envoywatch.View) {
	o.state = v.State
	if v.Generation == 0 {
		return
	}
	n := int(v.Snapshot.Bytes)
	r := o.w.envoy.reads[n-1]
	switch {
	case !r.told:
		o.w.fail("a dump of an Envoy without its configuration counts: services would be taken out")
	case n < o.believed:
		o.w.fail("an older dump replaces a newer one")
	}
	o.believed = n
}

// set is the listener set that counts.
func (o *oracle) set() *set { return o.w.envoy.reads[o.believed-1].set }

// known: the loop knows what is wanted.
func (o *oracle) known() bool {
	return o.believed > 0 && o.w.attribute != nil && !o.w.noUser && !o.w.brake.Awaited
}

// wanted says which sides have rules in a family.
func (o *oracle) wanted(f iptables.Family) (sides [sides]bool) {
	if !o.known() {
		return sides
	}
	s, a := o.set(), o.w.attribute
	in := s.families[index(f)]
	return [...]bool{
		in && s.has[outboundSide], in && s.has[inboundSide] && a.serving, in && s.has[dnsSide] && a.dns,
	}
}

// leads says to which ports the rules in a table lead; 0: to none.
func leads(t tables) (to [sides]uint16) {
	for side, chain := range [sides]string{
		"SERVICE_PROXY_REDIRECT", "SERVICE_PROXY_IN_REDIRECT", "SERVICE_PROXY_DNS",
	} {
		for _, rule := range t[chain] {
			if _, port, ok := strings.Cut(rule, "-j REDIRECT --to-ports "); ok {
				n, _ := strconv.ParseUint(port, 10, 16)
				to[side] = uint16(n)
			}
		}
	}
	return to
}

// before is called when a pass begins.
func (o *oracle) before() {
	o.marked = o.w.mark.set
	for i, f := range bothFamilies {
		e := &o.families[i]
		if !o.goesOn {
			o.was[i] = o.w.nat.chains(f)
			o.wrote[i], o.read[i] = o.w.nat.writes(f), o.w.nat.reads(f)
			o.looked[i], o.failed[i] = o.w.nat.looks(f), o.w.nat.failed(f)
		}
		if o.known() || o.w.noUser {
			e.kept = nil
		}
		intercepted := e.kept != nil || e.adopted && !e.blind && jumps(e.seen)
		var looked [sides]uint16
		switch {
		case o.known():
			for side, wanted := range o.wanted(f) {
				if wanted {
					looked[side] = portOf[side]
				}
			}
		case e.kept != nil:
			looked = leads(e.kept)
		case intercepted:
			looked = leads(e.seen)
		}
		for side, at := range looked {
			if o.w.brake.Off { // whoever listens
				e.ports[side] = port{denied: true}
				continue
			}
			if o.w.noUser {
				break // whose could they be?
			}
			owner, anybody := o.w.owner(f, side)
			if at != 0 && at != portOf[side] { // where nobody is
				owner, anybody = 0, false
			}
			strange := anybody && owner != proxyUID
			usual := !o.known() && !intercepted && side != dnsSide
			if at != 0 || usual && strange {
				denied := strange || o.state == "DRAINING"
				e.ports[side] = e.ports[side].seen(o.w.nat.now(), anybody, denied, o.w.policy)
			}
		}
		for side, there := range leads(e.kept) {
			if there != 0 && !e.ports[side].ready {
				e.kept = nil
			}
		}
	}
}

// seen is the port after one more look.
func (p port) seen(now time.Time, anybody, denied bool, policy reconcile.WhenEnvoyDown) port {
	switch {
	case denied:
		return port{denied: true}
	case anybody:
		return port{ready: true}
	case !p.ready:
		return p
	}
	if p.closed++; p.closed == 1 {
		p.since = now
	}
	if policy == reconcile.Bypass && p.closed >= bypassLooks && now.Sub(p.since) >= bypassAway {
		return port{denied: true}
	}
	return p
}

// after is called when a pass has ended. atOnce: it asks for another one at once.
func (o *oracle) after(atOnce bool) {
	o.goesOn = atOnce
	for i, f := range bothFamilies {
		o.family(i, f, atOnce)
	}
}

func (o *oracle) family(i int, f iptables.Family, atOnce bool) {
	w, e := o.w, &o.families[i]
	was, is := o.was[i], w.nat.chains(f)
	tried := w.nat.writes(f) - o.wrote[i]
	if tried > 0 {
		if diff := differ(e.foreign, othersOf(is)); diff != "" {
			w.fail("%v: rules of others were changed:\n%s", f, diff)
		}
	}
	if w.life.loop.paused {
		if tried > 0 {
			w.fail("%v: wrote while paused", f)
		}
		return
	}
	read := w.nat.reads(f) > o.read[i] && w.faults[i] != absent && w.faults[i] != hangs
	if read {
		e.untold, e.read, e.blind = 0, true, false
	}
	if w.nat.failed(f) > o.failed[i] {
		e.recovering, e.read = true, false
		e.blind = e.blind || w.faults[i] != refuses
	}
	if !e.adopted {
		if !read {
			return
		}
		e.adopted = true
		o.adopt(i, was)
		if jumps(is) != jumps(was) {
			w.fail("%v: the first look at the table changed the jumps", f)
		}
	}
	// One that was told reads, unless reads have had their share of time, or there is nothing left to
	// be read.
	told := e.unseen && e.untold == 0
	if e.unseen = e.unseen && !(told && (e.told || w.nat.looks(f) > o.looked[i])); !e.unseen {
		e.seen = is
	}
	e.told = told
	if atOnce {
		return // the gates look first
	}
	last, strict := e.judged, !e.damaged && !e.recovering && w.faults[i] == works
	if e.judged = o.judge(i, f); e.judged == last && e.wrong == "" && strict && tried == 0 {
		return
	}
	expected, first := o.expect(i, f, was, is)
	e.wrong = differ(expected, is)
	switch {
	case !strict:
	case e.wrong != "":
		w.fail("%v: after a pass the table is not as expected (- expected, + there):\n%s", f, e.wrong)
	case tried > 0 && differ(was, is) == "":
		w.fail("%v: wrote although nothing differed", f)
	}
	switch {
	case !o.known() && tried > 0:
		e.had = true // it took jumps out
	case !o.known() && !e.had && len(oursOf(is)) == 0:
		e.first = true
	case o.known() && (!e.unseen || tried > 0):
		e.had = e.had || jumps(is)
		switch {
		case jumps(is) && first:
			e.first = false
		case !jumps(expected) && len(oursOf(is)) == 0 && !e.blind:
			e.first = true
		}
	}
	if e.damaged || e.recovering {
		e.judged = judged{} // the next pass is another one
	}
	if e.wrong == "" && w.faults[i] == works {
		e.damaged, e.recovering = e.untold > 0, e.recovering && !e.read
	}
}

// judged is all that a judgement of a pass rests on: what was right is not looked at again.
type judged struct {
	changes   int // of the table, by anybody
	believed  int
	attribute *attr
	ready     [sides]bool
	settling  bool
	noUser    bool
	local     netip.Addr
}

func (o *oracle) judge(i int, f iptables.Family) judged {
	e := &o.families[i]
	j := judged{
		changes: o.w.nat.changes(f), believed: o.believed, attribute: o.w.attribute,
		settling: o.w.nat.now().Before(e.settling), noUser: o.w.noUser, local: o.w.local,
	}
	for side := range j.ready {
		j.ready[side] = e.ports[side].ready
	}
	return j
}

// adopt takes in what a run of the agent finds.
func (o *oracle) adopt(i int, t tables) {
	e, mine := &o.families[i], oursOf(t)
	marked := o.marked
	if i == 1 {
		marked = o.w.mark.set // by the other family in this pass, maybe
	}
	if jumps(t) && marked {
		for side, there := range leads(t) {
			e.ports[side].ready = e.ports[side].ready || there != 0 && !e.ports[side].denied
		}
		if inOrder(t) {
			e.kept = mine
		}
	}
	e.seen, e.unseen = t, false
	e.first, e.settling = !translates(mine), time.Time{}
	for _, rules := range mine {
		if slices.Contains(rules, settlingRow) {
			e.settling = o.w.nat.now().Add(firstInstall)
		}
	}
}

// translates says whether a rule of a table has a NAT target.
func translates(t tables) bool {
	for _, rules := range t {
		for _, rule := range rules {
			if strings.Contains(rule, "-j REDIRECT") {
				return true
			}
		}
	}
	return false
}

// inOrder says whether our jumps stand before all others' rules, each once.
func inOrder(t tables) bool {
	for name, rules := range t {
		if !builtin(name) {
			continue
		}
		behind := false
		for i, rule := range rules {
			if behind = behind || !jump(rule); jump(rule) && (behind || slices.Contains(rules[:i], rule)) {
				return false
			}
		}
	}
	return true
}

// expect is what a table must hold after a pass, and whether that is a first install.
func (o *oracle) expect(i int, f iptables.Family, was, is tables) (expected tables, first bool) {
	e := &o.families[i]
	if !o.known() {
		if e.kept != nil {
			return withOthers(e.kept, e.foreign), false
		}
		// What is there stays, and intercepts only where it leads to ports that were seen ready.
		for side, there := range leads(was) {
			if there != 0 && !e.ports[side].ready {
				return withOthers(chainsOf(was), e.foreign), false
			}
		}
		return was, false
	}
	sides, ready, now := o.wanted(f), e.judged.ready, o.w.nat.now()
	expected = o.rules(f, sides, ready, now.Before(e.settling))
	if first = e.first && jumps(expected) && !translates(oursOf(was)); first {
		e.settling = now.Add(firstInstall)
		expected = o.rules(f, sides, ready, true)
	}
	if !jumps(expected) && len(oursOf(is)) == 0 {
		return e.foreign, false // chains without a jump are of no use to anybody
	}
	return withOthers(expected, e.foreign), first
}

// rules are the rules that a set asks for.
func (o *oracle) rules(f iptables.Family, want, ready [sides]bool, settling bool) tables {
	t := tables{}
	if want == [sides]bool{} {
		return t
	}
	s, a := o.set(), o.w.attribute
	lead := slices.Index(want[:], true) // the side that most goes through
	in := ready[lead]
	// While the jumps are in, these wait for their own port.
	for _, side := range []int{inboundSide, dnsSide} {
		want[side] = want[side] && (ready[side] || !in)
	}
	add := func(chain string, rules ...string) { t[chain] = append(t[chain], rules...) }
	proxy := []string{
		"-m owner --uid-owner 999 -m comment --comment proxy-user -j RETURN",
		"-m owner --gid-owner 998 -m comment --comment proxy-group -j RETURN",
	}
	if want[outboundSide] || want[dnsSide] {
		if settling {
			add("SERVICE_PROXY_OUTPUT", settlingRow)
		}
		add("SERVICE_PROXY_OUTPUT", proxy...)
		if in {
			add("OUTPUT", "-p tcp -j SERVICE_PROXY_OUTPUT")
		}
	}
	if want[outboundSide] {
		never := [2][]string{
			{
				"127.0.0.0/8 loopback", "169.254.0.0/16 link-local", "169.254.169.254/32 metadata-server",
			},
			{"::1/128 loopback", "fe80::/10 link-local", "fd20:ce::254/128 metadata-server"},
		}[index(f)]
		if a.excludes {
			never = append(never, excluded[index(f)]+" excluded")
		}
		for _, n := range never {
			cidr, comment, _ := strings.Cut(n, " ")
			add("SERVICE_PROXY_OUTPUT", "-d "+cidr+" -m comment --comment "+comment+" -j RETURN")
		}
		add("SERVICE_PROXY_OUTPUT", "-j SERVICE_PROXY_SERVICE_CIDRS", "-j SERVICE_PROXY_SERVICE_PORTS")
		add("SERVICE_PROXY_SERVICE_CIDRS")
		for _, cidr := range s.cidrs[index(f)] {
			if !netip.MustParsePrefix(cidr).Contains(o.w.local) {
				add("SERVICE_PROXY_SERVICE_CIDRS", "-d "+cidr+" -j SERVICE_PROXY_REDIRECT")
			}
		}
		add("SERVICE_PROXY_SERVICE_PORTS")
		if s.port != 0 {
			port := strconv.Itoa(int(s.port))
			add("SERVICE_PROXY_SERVICE_PORTS", "-p tcp -m tcp --dport "+port+" -j SERVICE_PROXY_REDIRECT")
		}
		add("SERVICE_PROXY_REDIRECT", "-p tcp -j REDIRECT --to-ports 15001")
	}
	if want[dnsSide] {
		add("SERVICE_PROXY_DNS", append(proxy, "-p udp -j REDIRECT --to-ports 15053")...)
		if in {
			add("OUTPUT", "-p udp -m udp --dport 53 -j SERVICE_PROXY_DNS")
		}
	}
	if want[inboundSide] {
		if settling {
			add("SERVICE_PROXY_INBOUND", settlingRow)
		}
		add("SERVICE_PROXY_INBOUND",
			"-m addrtype ! --dst-type LOCAL -m comment --comment routed-through -j RETURN",
			"-p tcp -m tcp --dport 8080 -j SERVICE_PROXY_IN_REDIRECT")
		add("SERVICE_PROXY_IN_REDIRECT", "-p tcp -j REDIRECT --to-ports 15006")
		if in {
			add("PREROUTING", "-p tcp -j SERVICE_PROXY_INBOUND")
		}
	}
	return t
}

// withOthers is the whole table: our jumps come first in their chains.
func withOthers(mine, others tables) tables {
	t := maps.Clone(mine)
	for name, rules := range others {
		t[name] = slices.Concat(mine[name], rules)
	}
	return t
}

// differ says how two tables differ, "" if they do not.
func differ(want, have tables) string {
	if maps.EqualFunc(want, have, slices.Equal) {
		return ""
	}
	var b strings.Builder
	names := slices.Sorted(maps.Keys(want))
	for name := range have {
		if _, ok := want[name]; !ok {
			names = append(names, name)
		}
	}
	for _, name := range names {
		w, wanted := want[name]
		h, there := have[name]
		if wanted == there && slices.Equal(w, h) || builtin(name) && len(w)+len(h) == 0 {
			continue
		}
		fmt.Fprintf(&b, "%s (expected %v, there %v)\n", name, wanted, there)
		for _, rule := range w {
			fmt.Fprintf(&b, "  - %s\n", rule)
		}
		for _, rule := range h {
			fmt.Fprintf(&b, "  + %s\n", rule)
		}
	}
	return b.String()
}

// calm says why the agent is not at rest yet, "" if all is as expected.
func (o *oracle) calm() string {
	e := &o.w.envoy
	if (e.up && !e.hung) != (o.w.life.loop.envoy.Err == nil) {
		return fmt.Sprintf("Envoy is up %v, hangs %v, and the agent says %v",
			e.up, e.hung, o.w.life.loop.envoy.Err)
	}
	if e.up && !e.hung {
		if o.state != e.state() {
			return fmt.Sprintf("the state of Envoy is %s, known is %q", e.state(), o.state)
		}
		if e.told && (o.believed == 0 || e.reads[o.believed-1].of != e.fingerprint()) {
			return "the listeners of Envoy are not known"
		}
	}
	if o.w.life.loop.paused {
		return ""
	}
	for i, f := range bothFamilies {
		e := &o.families[i]
		switch {
		case o.w.faults[i] != works:
		case !e.adopted:
			return fmt.Sprintf("%v: the table was not read", f)
		case e.damaged, e.recovering:
			if e.wrong == "" {
				return fmt.Sprintf("%v: damaged", f)
			}
			return fmt.Sprintf("%v: the table is not as expected (- expected, + there):\n%s", f, e.wrong)
		}
	}
	return ""
}

// told checks what the agent says of itself once it is at rest.
func (o *oracle) told() {
	w, e := o.w, &o.w.envoy
	if w.faults != [2]fault{} {
		return
	}
	if !e.told && o.believed > 0 && e.reads[o.believed-1].of.Process == e.process {
		return // a restart that nobody can see
	}
	said, paused := w.life.status, w.life.loop.paused
	ready := !paused && e.up && !e.hung && e.told && e.state() == "LIVE" && o.known()
	foreign := false
	mode := "hold"
	for i, f := range bothFamilies {
		for side, wanted := range o.wanted(f) {
			ready = ready && (!wanted || w.accepts(f, side))
			foreign = foreign || wanted && w.foreign[i][side]
		}
		if jumps(w.nat.chains(f)) {
			mode = "intercepting"
		}
		if err := said.Families[i].Error; err != "" && !o.families[i].recovering && !paused {
			w.fail("%v: still says %s", f, err)
		}
	}
	if w.brake.Off { // nothing is asked of Envoy then
		ready, mode = true, strings.Replace(mode, "hold", "off", 1)
	}
	if paused {
		ready, mode = false, "paused"
	}
	// Which of both it is goes by the policy.
	if is := strings.Replace(said.Mode, "bypass", "hold", 1); is != mode {
		w.fail("the mode is %s, should be %s", is, mode)
	}
	if said.Ready != ready {
		w.fail("ready is %v (%s), should be %v", said.Ready, said.NotReady, ready)
	}
	if is := w.finding(symptom.ForeignOwner); is != foreign && o.known() {
		w.fail("finding a foreign owner is %v, should be %v", is, foreign)
	}
}
