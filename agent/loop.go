package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/internal/report"
	"github.com/service-proxy-agent/service-proxy-agent/internal/server"
	"github.com/service-proxy-agent/service-proxy-agent/internal/sockdiag"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

const (
	// tick is the longest pause between two passes: it bounds how late a closed port, a foreign owner or a new
	// interface address is seen. An idle pass reads no rules and asks Envoy nothing.
	tick = time.Second
	// settle is how long connections that are older than the first NAT rule are let through unchanged (facts: conntrack
	// starts with the first NAT rule and takes them for new). Idle ones past it are reset when they speak again.
	settle = 5 * time.Minute
	// passLimit bounds what a pass may spend on a slow iptables or a held lock, each family its half and the second that a
	// command's end may take: well under WatchdogSec (30 s), which is for a loop that hangs.
	passLimit = 20 * time.Second
	// resync is how often the rules are read although nothing told of a change: a lost notification costs this long.
	resync = 5 * time.Minute
	// legacyPoll is the interval of looks where the kernel notifies nobody.
	legacyPoll = 1500 * time.Millisecond
	// readShare bounds the share of time that reads under a storm of other programs' changes take: after a read of
	// duration d the next waits readShare*d.
	readShare = 5
	// retryFirst, retryLast: after a failed write or read.
	retryFirst = time.Second
	retryLast  = 30 * time.Second
	// retryLeft is how often a rule that the kernel refused is offered again, and retryUnusable a family.
	retryLeft     = 5 * time.Minute
	retryUnusable = time.Minute
)

// loop is the one goroutine that owns the kernel. Everything it learns comes to it as values over channels.
func (a *Agent) loop(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case a.view = <-a.views.Get():
		case news := <-a.attributes.Get():
			a.takeAttribute(news)
		case e, ok := <-a.events:
			if !ok {
				a.events = nil // polling goes on (pollInterval)
				a.log.Warn("the kernel's notifications ended, polling")
			}
			a.takeEvent(e)
		case a.otherChains = <-a.others.Get():
		case done := <-a.pause:
			a.paused = true
			close(done)
		case <-timer.C:
		}
		wake := a.pass(ctx, time.Now())
		timer.Reset(max(0, min(wake, tick)))
	}
}

// pass brings the kernel to what Envoy and the attribute ask for and tells the world. It is the data flow of the design:
// observe, decide, apply, check, report. It returns how long the next pass may wait.
func (a *Agent) pass(ctx context.Context, now time.Time) (wake time.Duration) {
	began := time.Now()
	a.happened = report.Pass{Drift: map[string]int{}, Errors: map[string]int{}, Writes: map[string]report.Writes{}}
	facts := a.observe(now)
	want, known := a.desired()
	a.passGates(now, &facts, want, known)
	a.lookAtResolvers(&facts, want)
	wake = tick
	for i := range a.families {
		limited, cancel := context.WithTimeout(ctx, passLimit/time.Duration(len(a.families)))
		wake = min(wake, a.reconcile(limited, now, &a.families[i], want.Families[i], known))
		cancel()
		facts.Families = append(facts.Families, a.families[i].facts())
	}
	facts.Refused, facts.Uncovered, facts.ServerFirst = want.Refused, want.Uncovered, want.ServerFirst
	a.happened.Duration = time.Since(began)
	a.publish(now, symptom.Check(facts), known)
	return wake
}

// observe gathers what a pass can learn at once; everything slow comes from other goroutines as values.
func (a *Agent) observe(now time.Time) symptom.Facts {
	if a.userErr != nil {
		a.lookUpProxy()
	}
	if addrs, err := localAddrs(); err == nil && !slices.Equal(addrs, a.local) {
		a.local, a.wantStale = addrs, true
	}
	a.readBootstrap(now)
	f := symptom.Facts{
		Now: now, ProxyUser: a.settings.ProxyUser, ProxyUID: a.uid, UserErr: a.userErr, Attribute: a.attributeErr, Advice: a.config.Warnings, Metadata: a.sourceErr, NoAttribute: !a.haveConfig,
		Envoy: a.view.facts(a.settings.EnvoyAdmin), Others: a.otherChains,
	}
	if account := a.account.Load(); account != nil {
		f.Account, f.Scopes = account.Email, account.Scopes
	}
	f.GuestOff = !a.guest.State().Enabled
	if a.public != nil {
		f.ListenErr = a.public.Err()
	}
	f.Bootstrapping = bootstrapping(a.boot, a.awaitBootstrap, a.view)
	if a.boot.Status == progress.Failed {
		f.Bootstrap = a.boot.FailureLine()
	}
	return f
}

// bootstrapping says whether Envoy is still to come. Not only until bootstrap says that it runs: what
// was asked before that tells nothing of the Envoy which it started.
func bootstrapping(boot progress.State, await bool, envoy View) bool {
	switch boot.Status {
	case progress.InProgress:
		return true
	case progress.Finished:
		return envoy.Err != nil && envoy.Asked.Before(boot.Time)
	case "":
		return await
	}
	return false
}

// desired is Desired of the newest inputs, computed only when one of them changed: at 10,000 services it is no matter
// for every tick. known is false until Envoy has told its listeners once: what stands in the kernel is then left alone.
func (a *Agent) desired() (want Want, known bool) {
	if a.view.Generation == 0 || a.userErr != nil || !a.haveConfig {
		return Want{}, false
	}
	if a.wantStale || a.wantGeneration != a.view.Generation {
		a.want = Desired(Inputs{
			Config: a.config, Listeners: a.view.Snapshot.Listeners, ProxyUID: a.uid, ProxyGID: a.gid, Local: a.local,
			Interfaces: a.settings.Interfaces, ResolverUIDs: a.resolverUIDs(), OwnPorts: a.ownPorts,
		})
		a.wantStale, a.wantGeneration = false, a.view.Generation
		a.wantSerial++
	}
	return a.want, true
}

// passGates looks at who listens on each interception port and moves the Hold policy on. Until Envoy has told its
// listeners that goes by where the rules of an earlier run lead, if they intercept; else only a foreign owner of a usual
// port counts.
func (a *Agent) passGates(now time.Time, f *symptom.Facts, want Want, known bool) {
	if a.userErr != nil {
		known = false
	}
	for i := range a.families {
		s := &a.families[i]
		in := !known && a.userErr == nil && s.haveKnown && s.have.Ours().Intercepting()
		switch {
		case known:
			s.outboundPort, s.inboundPort, s.dnsPort = want.Families[i].OutboundPort, want.Families[i].InboundPort, want.Families[i].DNSPort
		case in:
			s.outboundPort, s.inboundPort, s.dnsPort = s.have.Ours().Ports()
		case a.userErr == nil:
			s.outboundPort, s.inboundPort, s.dnsPort = a.config.ProxyPort, DefaultInboundPort, 0
		default:
			s.outboundPort, s.inboundPort, s.dnsPort = 0, 0, 0
		}
		pass := func(g gate, p symptom.Port) gate {
			foreign := p.Listening && p.Owner != a.uid
			if p.Addr.Port() == 0 || !known && !in && !foreign {
				return g
			}
			if known || foreign { // until then a closed port is what Envoy's state tells better
				f.Ports = append(f.Ports, p)
			}
			draining := a.view.State == "DRAINING" // until an Envoy answers otherwise, also when this one no longer answers
			return g.next(now, p, a.uid, draining, a.settings.WhenEnvoyDown)
		}
		s.outbound = pass(s.outbound, a.lookAtPort(s.family, outboundPort, s.outboundPort, sockdiag.Listeners))
		s.inbound = pass(s.inbound, a.lookAtPort(s.family, inboundPort, s.inboundPort, sockdiag.Listeners))
		dns := a.lookAtPort(s.family, dnsListener, s.dnsPort, sockdiag.UDPListeners)
		if dns.Err != nil { // a kernel without udp_diag: what Envoy says must do
			dns = symptom.Port{Family: s.family, Addr: dns.Addr, Listening: true, Owner: a.uid}
		}
		if want.Families[i].DNSOverTCP {
			if tcp := a.lookAtPort(s.family, dnsListener, s.dnsPort, sockdiag.Listeners); tcp.Listening && tcp.Owner != a.uid {
				dns = tcp
			}
		}
		s.dns = pass(s.dns, dns)
	}
	var foreign *sockdiag.ForeignError
	if errors.As(a.view.Err, &foreign) {
		f.Ports = append(f.Ports, symptom.Port{Purpose: "admin", Addr: foreign.Addr, Owner: foreign.UID, OwnerName: userName(foreign.UID), Listening: true})
	}
}

// What Envoy's ports are for, as findings say it.
const (
	outboundPort = "outbound interception"
	inboundPort  = "inbound interception"
	dnsListener  = "DNS"
)

// lookAtPort asks the kernel who would get what REDIRECT sends to this port: on OUTPUT it leads to loopback, on PREROUTING
// (inbound, and outbound of containers) to an address of the interface that a packet came in by. A stranger on any of
// these counts, one on another address does not.
func (a *Agent) lookAtPort(family iptables.Family, purpose string, port uint16, list func(uint16) ([]sockdiag.Listener, error)) symptom.Port {
	loopback := netip.AddrFrom4([4]byte{127, 0, 0, 1})
	if family == iptables.IPv6 {
		loopback = netip.IPv6Loopback()
	}
	p := symptom.Port{Family: family, Purpose: purpose, Addr: netip.AddrPortFrom(loopback, port)}
	if port == 0 {
		return p
	}
	listeners, err := list(port)
	if err != nil {
		p.Err = err
		return p
	}
	at := []netip.Addr{loopback}
	if local := a.localOf(family); len(local) > 0 {
		switch {
		case purpose == inboundPort:
			at = local
		case purpose == outboundPort && len(a.settings.Interfaces) > 0:
			at = append(at, local...)
		}
	}
	for _, addr := range at {
		for _, uid := range sockdiag.Accepting(listeners, addr) {
			p.Listening, p.Owner = true, uid
			if uid != a.uid { // of several owners nobody can tell who gets the next connection: the stranger counts
				p.Addr, p.OwnerName = netip.AddrPortFrom(addr, port), userName(uid)
				return p
			}
		}
	}
	return p
}

// localOf are the interfaces' addresses of one family, without link-local ones, to which REDIRECT does not lead.
func (a *Agent) localOf(family iptables.Family) (some []netip.Addr) {
	for _, addr := range a.local {
		if family.Of(addr) && !addr.IsLinkLocalUnicast() {
			some = append(some, addr)
		}
	}
	return some
}

// userName is the name of a user in /etc/passwd, "" where it has none.
func userName(uid uint32) string {
	u, err := user.LookupId(strconv.FormatUint(uint64(uid), 10))
	if err != nil {
		return ""
	}
	return u.Username
}

// pollInterval is how often the rules are read though nothing told of a change.
func (a *Agent) pollInterval() time.Duration {
	if a.events == nil || a.kernel.Backend() == iptables.Legacy {
		return legacyPoll
	}
	return resync
}

// takeEvent notes which family's rules somebody else may have changed.
func (a *Agent) takeEvent(e iptables.Event) {
	if e.Own {
		return
	}
	for i := range a.families {
		s := &a.families[i]
		if e.Family != 0 && e.Family != s.family {
			continue
		}
		s.dirty = true
		s.touched = append(s.touched, e.Chains...)
		if len(e.Chains) == 0 || e.Lost || len(s.touched) > 256 {
			s.touched, s.touchedAll = nil, true
		}
		if e.Program != "" {
			s.by = fmt.Sprintf("%s (pid %d)", e.Program, e.PID)
			if s.driftBy == "" && time.Since(s.driftAt) < time.Second {
				// The drift was found by a pass that came before the kernel's word on it.
				s.driftBy, a.lastBy = s.by, s.by
			}
		}
	}
}

func (s *familyState) facts() symptom.Family {
	f := symptom.Family{Family: s.family, Unusable: s.unusable, Err: s.err, Left: s.left, Drift: s.drift, By: s.driftBy, Fighting: s.fight.on(), Undone: s.fight.undone}
	for _, d := range s.drift {
		if d.Kind == iptables.Shadowed && !s.equal {
			f.Shadow = append(f.Shadow, d)
		}
	}
	return f
}

// localAddrs are the addresses of every interface but loopback.
func localAddrs() ([]netip.Addr, error) {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	var addrs []netip.Addr
	for _, a := range all {
		n, ok := a.(*net.IPNet)
		if !ok {
			continue
		}
		if addr, ok := netip.AddrFromSlice(n.IP); ok && !addr.Unmap().IsLoopback() {
			addrs = append(addrs, addr.Unmap())
		}
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	return slices.Compact(addrs), nil
}

// bootstrapEvery is how often bootstrap's state file is looked at.
const bootstrapEvery = time.Second

// readBootstrap takes in what bootstrap reached, and tells its story on the serial port: the daemon is the only publisher.
func (a *Agent) readBootstrap(now time.Time) {
	if now.Sub(a.bootRead) < bootstrapEvery {
		return
	}
	a.bootRead = now
	b, err := progress.Read(a.settings.StateDir)
	if err != nil {
		return // half of nothing: bootstrap writes it anew at its next step
	}
	a.boot = b
	a.requestBootstrap(now)
	for _, line := range b.Story {
		if line.Seq > a.bootSaid {
			a.bootSaid = line.Seq
			if line.Time.After(a.started.Add(-time.Hour)) {
				a.serial.Say(report.Severity(line.Severity), "bootstrap: "+line.Text)
			}
		}
	}
}

func (a *Agent) takeAttribute(n attributeNews) {
	a.attributeErr, a.sourceErr = n.Err, n.Source
	was, good := a.inForce, n.Good
	if good == was {
		return
	}
	a.inForce = good
	if good == nil { // it was another instance's
		a.config, a.haveConfig, a.wantStale = attribute.Default(), false, true
		return
	}
	if !good.Kept { // bootstrap reads for itself, and may have seen a newer one than an earlier run kept
		a.attributeText, a.requested = good.Text, time.Time{}
	}
	if was != nil && bytes.Equal(was.Text, good.Text) {
		return
	}
	a.config, a.haveConfig, a.wantStale = good.Config, true, true
	switch {
	case good.Kept:
		a.log.Info("the attribute that an earlier run kept is in force", zap.Time("read", good.Read))
	case was != nil:
		a.log.Info("attribute changed")
	}
	a.sayUnknown(good.Config.Unknown)
}

// sayUnknown logs the attribute's unknown keys, the same ones once.
func (a *Agent) sayUnknown(keys []string) {
	set := strings.Join(keys, " ")
	if set == "" || slices.Contains(a.saidUnknown, set) {
		return
	}
	a.saidUnknown = append(a.saidUnknown, set)
	a.log.Warn("unknown keys in the gce-service-proxy attribute are ignored", zap.Strings("keys", keys))
}

// requestEvery is how often bootstrap is asked for while it does not come.
const requestEvery = 30 * time.Second

// requestBootstrap has bootstrap run again, which only root may do, when it has finished for another attribute than the one in force: it
// looks first, and restarts Envoy only where Envoy must know.
func (a *Agent) requestBootstrap(now time.Time) {
	if a.attributeText == nil || !a.boot.Stale(a.attributeText) || now.Sub(a.requested) < requestEvery {
		return
	}
	a.requested = now
	if err := progress.Request(server.Dir(), "the attribute has changed"); err != nil {
		a.log.Warn("cannot ask for bootstrap", zap.Error(err))
	}
}
