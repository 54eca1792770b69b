package agent

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/identity"
	"github.com/service-proxy-agent/service-proxy-agent/internal/reconcile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/server"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// Looked is one look at this VM without the daemon, by the same code: what Envoy, the kernel, the
// metadata server and files tell, what the kernel should have, and what it has.
type Looked struct {
	Seen Observation
	// Want is what Envoy and the attribute ask for. Known is false where that could not be told.
	Want  Want
	Known bool
	// Have is table nat by family, in the order of Want.Families, as far as HaveErr is nil.
	Have    [2]iptables.Table
	HaveErr [2]error
	Backend string         // of iptables: nft or legacy; "" not known
	Daemon  *status.Status // of the daemon's socket; nil: none answers
	// Shapes are what is let in of what is wanted, by family: by the daemon, or by what one that
	// starts now would do.
	Shapes [2]status.Shape
	Facts  symptom.Facts
	// recorded is what a look that is replayed answers by; nil: it is asked for on this machine.
	recorded *recorded
}

// lookLimit bounds a look as a whole. What has not answered by then is unknown.
const lookLimit = 9 * time.Second

// Look looks once. It changes nothing and it never fails: what could not be seen is in
// Facts.Unseen, with the reason.
func Look(ctx context.Context, s Settings) Looked { return lookAt(ctx, s, false) }

// LookAtRules is a Look for what the rules are made of, and for nothing that findings alone need:
// what stands around, and what is dear to Envoy.
func LookAtRules(ctx context.Context, s Settings) Looked { return lookAt(ctx, s, true) }

func lookAt(ctx context.Context, s Settings, brief bool) Looked {
	ctx, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	l := newLooking(s)
	l.brief = brief
	l.again = func(ctx context.Context) {
		l.askAll(ctx, l.askKernel(), l.askDaemon())
		l.Seen.Now = time.Now()
	}
	l.askAll(ctx, l.questions()...)
	l.conclude(ctx)
	return l.Looked
}

// looking is a look under way.
type looking struct {
	Looked
	vm     vm
	brief  bool // for the rules alone
	unseen map[symptom.Source]string
	// moved says that one of the sources that can hang has answered: where none does, it is this
	// machine that hangs, or the time was too short, and nothing is said against any of them.
	moved     bool
	kernel    kernelSeen
	installed bool   // something of the agent's is on this VM
	silent    string // why the daemon's socket gives no answer though it takes connections
	logErr    string // why Envoy's log cannot be read, for whoever
	hung      error  // the metadata server takes connections, and does not answer
	kept      *keptAttribute
	braked    *brake // by the metadata server; nil: it has not told
	keptBrake brake
	outcomes  []reconcile.Outcome
	// again asks the kernel and the daemon once more.
	again func(context.Context)
}

// newLooking is a look in which nothing has answered yet.
func newLooking(s Settings) *looking {
	l := &looking{
		Looked: Looked{Seen: Observation{Now: time.Now(), Settings: s}},
		vm:     thisVM(s.StateDir), unseen: map[symptom.Source]string{},
	}
	l.Seen.Attribute.Config = attribute.Default()
	l.Seen.User.Err = errNoAnswer // else it were root
	l.HaveErr = [2]error{errNoAnswer, errNoAnswer}
	return l
}

// conclude makes the facts of what the sources told.
func (l *looking) conclude(ctx context.Context) {
	l.takeAttribute()
	l.takeBrake()
	l.judgeSilence()
	if !l.ours() {
		l.leaveAlone()
	}
	var w wanted
	l.Want, l.Known = w.desired(l.Seen.Settings, l.Seen)
	l.lookAtPorts(ctx)
	if !l.brief {
		l.lookAround(ctx)
	}
	differ, undecided := l.differ(ctx)
	f := l.Seen.Facts(l.Want, l.outcomes)
	f.Differ = differ
	if undecided != "" {
		f.Undecided = map[symptom.ID]string{symptom.RulesDiffer: undecided}
	}
	f.NoTools, f.Envoy.LogErr = l.kernel.noTools, l.logErr
	f.Agent = l.agent(f.Agent)
	if l.Daemon != nil && f.Envoy.Err != nil && !l.Daemon.Envoy.Down.IsZero() {
		f.Envoy.Since = l.Daemon.Envoy.Down
	}
	f.Unseen = maps.Clone(l.unseen)
	l.Facts = f
}

// takeAttribute makes the attribute in force of what the metadata server told, and of what an
// earlier run of the daemon kept, as the daemon does.
func (l *looking) takeAttribute() {
	a := &l.Seen.Attribute
	if a.Known || a.Source == nil || l.kept == nil {
		return
	}
	if identity.Here("").Judge(l.kept.Owner).Believed() {
		if config, err := attribute.Parse([]byte(l.kept.Text)); err == nil {
			a.Known, a.Config, a.Serial = true, config, 1
			a.Good = &goodAttribute{Config: config, Text: []byte(l.kept.Text), Read: l.kept.Read, Kept: true}
		}
	}
}

// takeBrake makes the brake in force of the same.
func (l *looking) takeBrake() {
	l.Seen.Brake = l.keptBrake
	if l.braked != nil {
		l.Seen.Brake = *l.braked
	}
	if d := l.Daemon; d != nil && d.Interception.State == modeOff && l.Seen.Brake.Off {
		l.Seen.Brake.Since = d.Interception.Since // it has seen it come
	}
}

// judgeSilence says what it means that a source takes connections and does not answer.
func (l *looking) judgeSilence() {
	if !l.moved {
		if errors.Is(l.Seen.Envoy.Err, envoyadmin.ErrTimeout) {
			l.Seen.Envoy.Err = nil
			l.unseen[symptom.FromEnvoy] = errNoAnswer.Error()
		}
		l.silent = ""
		return
	}
	if l.hung != nil {
		l.Seen.Attribute.Source = l.hung
	}
}

// ours says whether something shows that this VM is the agent's.
func (l *looking) ours() bool {
	return l.installed || l.Seen.Attribute.Good != nil || l.Seen.Attribute.Err != nil &&
		!errors.Is(l.Seen.Attribute.Err, attribute.ErrMissing) || l.intercepted() ||
		l.Seen.Settings.Config != "" && l.Seen.Settings.Config != noConfig
}

// intercepted says whether rules of ours are there, whoever made them.
func (l *looking) intercepted() bool {
	for i := range l.Have {
		if l.HaveErr[i] == nil && !l.Have[i].Ours().Empty() {
			return true
		}
	}
	return false
}

// leaveAlone forgets what is no trouble on a VM that is not the agent's: one that was set up by
// hand, or a container beside an Envoy.
func (l *looking) leaveAlone() {
	a := &l.Seen.Attribute
	if a.Source != nil {
		l.unseen[symptom.FromMetadata] = whyNot(a.Source)
	}
	a.Source, a.Err = nil, nil
	switch _, unseen := l.unseen[symptom.FromUsers]; {
	case l.Seen.User.Err == nil || unseen:
	case a.Known: // whose the ports and the rules should be is not known then
		l.unseen[symptom.FromUsers] = whyNot(l.Seen.User.Err)
	default:
		l.Seen.User.Err = nil // nobody asks: there need not be one
	}
	if l.kernel.noTools != nil {
		l.unseen[symptom.FromKernel] = whyNot(l.kernel.noTools)
	}
	l.kernel = kernelSeen{}
	l.Seen.Others, l.Seen.Brake = nil, brake{}
}

// lookAtPorts asks who listens on the ports that matter, and what the rules shall be then.
func (l *looking) lookAtPorts(ctx context.Context) {
	now := *l // a question that hangs may still read it
	l.askAll(ctx, question{[]symptom.Source{symptom.FromSockets}, 2 * time.Second,
		func(context.Context) (func(*looking), error) {
			looks, resolvers, err := now.listeners()
			return func(l *looking) { l.judgePorts(looks, resolvers) }, err
		}})
	if l.outcomes == nil { // it did not answer
		l.judgePorts([2]reconcile.Looks{}, resolvers{})
	}
}

// listeners asks who listens. The ports are those that a daemon would look at.
func (l *looking) listeners() (looks [2]reconcile.Looks, r resolvers, err error) {
	if l.Seen.Attribute.Config.InterceptDNS {
		r = l.vm.resolvers(l.Seen.Settings.ResolverUsers)
	}
	for i, family := range families {
		looks[i] = l.vm.look(family, l.ports(i), l.Seen)
		for _, p := range []symptom.Port{looks[i].Outbound, looks[i].Inbound, looks[i].DNS} {
			err = cmp.Or(err, p.Err)
		}
	}
	return looks, r, err
}

// ports are those of a family that its rules lead to, or shall.
func (l *looking) ports(i int) (p reconcile.Ports) {
	ours := l.Have[i].Ours()
	switch want := l.Want.Families[i]; {
	case l.Known:
		p = reconcile.Ports{Outbound: want.OutboundPort, Inbound: want.InboundPort, DNS: want.DNSPort,
			DNSOverTCP: want.DNSOverTCP}
	case l.HaveErr[i] == nil && ours.Intercepting():
		p.Outbound, p.Inbound, p.DNS = ours.Ports()
	case l.ours() && l.Seen.User.Err == nil:
		p = reconcile.Ports{Outbound: l.Seen.Attribute.Config.ProxyPort, Inbound: attribute.InboundPort}
	}
	return p
}

// judgePorts makes facts of who listens, by family.
func (l *looking) judgePorts(looks [2]reconcile.Looks, r resolvers) {
	l.Seen.Resolvers = r
	marked := readMark(server.Dir(), nil).set
	for i := range families {
		o := reconcile.Order{
			Want: l.Want.Families[i], Serial: 1, Known: l.Known, Ports: l.ports(i), Looks: looks[i],
			ProxyUID: l.Seen.User.UID, UserKnown: l.Seen.User.Err == nil,
			Draining: l.Seen.Envoy.State == "DRAINING", WhenDown: l.Seen.Brake.whenDown(l.Seen.Settings),
			Marked: marked, Off: l.Seen.Brake.Off,
		}
		l.Shapes[i] = reconcile.Fresh(l.Seen.Now, o, l.Have[i].Ours())
		if shape, told := l.daemonShape(i); told {
			l.Shapes[i] = shape // it has seen more than this look
		}
		out := reconcile.Outcome{Facts: l.family(i)}
		for _, p := range []symptom.Port{looks[i].Outbound, looks[i].Inbound, looks[i].DNS} {
			foreign := p.Listening && p.Owner != o.ProxyUID
			if p.Addr.Port() != 0 && p.Err == nil && (l.Known || foreign) {
				out.Ports = append(out.Ports, p)
			}
		}
		l.outcomes = append(l.outcomes, out)
	}
}

// aroundTime is how long the look at the surroundings may take.
const aroundTime = 3 * time.Second

// lookAround looks at what Envoy and the rules stand in.
func (l *looking) lookAround(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, aroundTime)
	defer cancel()
	var jumps [2]bool
	for i := range l.Have {
		jumps[i] = l.HaveErr[i] == nil && l.Have[i].Ours().Intercepting()
	}
	around, failed := lookAround(
		ctx, askKernel(l.kernel.of, l.kernel.none()), aboutOf(l.Want, 1, l.Seen, jumps))
	l.Seen.Around = around
	for source, err := range failed {
		l.unseen[source] = whyNot(err)
	}
}

// family are the facts of a family's rules, as far as one look tells them.
func (l *looking) family(i int) symptom.Family {
	f := symptom.Family{Family: families[i], Unusable: l.kernel.unusable[i]}
	if l.Daemon == nil && errors.Is(l.HaveErr[i], iptables.ErrIncompatible) {
		f.Err = l.HaveErr[i] // else the daemon says what became of its rules
	}
	if l.Known && l.kernel.read && l.HaveErr[i] == nil && f.Unusable == nil {
		for _, d := range iptables.Diff(l.Ruleset(i), l.Have[i]) {
			if d.Kind == iptables.Shadowed {
				f.Shadow = append(f.Shadow, d)
			}
		}
	}
	return f
}

// agent is the daemon as it looks from here.
func (l *looking) agent(a symptom.Agent) symptom.Agent {
	a.Now, a.Silent = l.Seen.Now, l.silent
	if s := l.Daemon; s != nil {
		a.Heartbeat = s.Heartbeat
		if l.follows() {
			a.Findings = s.Findings
		}
	}
	if l.Daemon == nil && l.silent == "" && !l.installed {
		delete(l.unseen, symptom.FromAgent) // with what is not there nothing can be wrong
	}
	return a
}

// follows says whether a daemon runs that keeps the rules as they should be.
func (l *looking) follows() bool {
	return l.Daemon != nil && l.Seen.Now.Sub(l.Daemon.Heartbeat) < stuck
}

// starts says whether a daemon runs that has not made its first pass, which may wait for a lock or
// a busy machine: it is as little stuck as one whose last pass was just now.
func (l *looking) starts() bool {
	return l.Daemon != nil && l.Daemon.Heartbeat.IsZero() &&
		l.Seen.Now.Sub(l.Daemon.Started) < stuck
}

const (
	// lookAgain is how soon the kernel is read again where it differs: an agent that restarts may be
	// about to put it right.
	lookAgain = 600 * time.Millisecond
	mostDrift = 100
)

// differ is what the kernel lacks, or has too much, where no agent runs to put it right: one that
// runs says itself what keeps it from that. undecided is why nobody can tell whether that is so.
func (l *looking) differ(ctx context.Context) (drift []iptables.Drift, undecided string) {
	if !l.Known || !l.ours() || l.Seen.Envoy.Err != nil {
		return nil, ""
	}
	for n := range 3 {
		if n > 0 {
			if !sleep(ctx, lookAgain) {
				return nil, "they were not as wanted, and there was no time to look again"
			}
			l.again(ctx)
		}
		_, unseen := l.unseen[symptom.FromKernel]
		if l.follows() || !l.kernel.read || unseen { // what was read before is old by now
			return nil, ""
		}
		drift = nil
		for i := range families {
			drift = append(drift, l.drift(i)...)
		}
		if len(drift) == 0 {
			return nil, ""
		}
	}
	if l.starts() {
		return nil, "they are not as wanted, and the agent, which puts them right, is only just starting"
	}
	return drift[:min(len(drift), mostDrift)], ""
}

// drift is how one family differs. Shadowed jumps have a finding of their own.
func (l *looking) drift(i int) (drift []iptables.Drift) {
	want, have := l.Ruleset(i), l.Have[i]
	if l.kernel.unusable[i] != nil || l.HaveErr[i] != nil ||
		len(iptables.Diff(want.WithoutComments(), have)) == 0 {
		return nil
	}
	for _, d := range iptables.Diff(want, have) {
		if d.Kind != iptables.Shadowed {
			drift = append(drift, d)
		}
	}
	return drift
}

// Ruleset is what the kernel should have of one family, in the order of Want.Families: what is
// wanted, without what is held back (Shapes).
func (l Looked) Ruleset(family int) iptables.Ruleset {
	if l.recorded != nil {
		return l.recorded.want(family) // as the agent that looked made it
	}
	ruleset := reconcile.Shaped(l.Want.Families[family], l.Shapes[family])
	if l.Daemon != nil && l.Daemon.Paused || // cleanup took all out
		// Chains without a jump are of no use, and need not be there.
		!ruleset.Intercepting() && l.HaveErr[family] == nil && l.Have[family].Ours().Empty() {
		return iptables.Interception{Family: families[family]}.Ruleset()
	}
	return ruleset
}

// daemonShape is what the daemon lets in of a family's rules, where it says so.
func (l Looked) daemonShape(i int) (shape status.Shape, told bool) {
	if f, ok := l.daemonFamily(i); ok && f.Shape != nil {
		return *f.Shape, true
	}
	return shape, false
}

// daemonFamily is what the daemon says of a family's rules.
func (l Looked) daemonFamily(i int) (status.Family, bool) {
	if l.Daemon != nil {
		for _, f := range l.Daemon.Families {
			if f.Family == families[i].String() {
				return f, true
			}
		}
	}
	return status.Family{}, false
}
