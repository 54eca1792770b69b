package agent

import (
	"errors"
	"net"
	"net/netip"
	"os/user"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/internal/envoywatch"
	"github.com/service-proxy-agent/service-proxy-agent/internal/identity"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/internal/reconcile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/sockdiag"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/internal/users"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// vm is what can be asked of the VM at once. None of it waits for anybody else.
type vm struct {
	addrs      func() ([]netip.Addr, error) // of every interface but loopback
	userIDs    func(name string) (uid, gid uint32, err error)
	userName   func(uid uint32) string // "" where it has none
	tcp, udp   func(port uint16) ([]sockdiag.Listener, error)
	progress   func() (progress.State, error) // of bootstrap
	self       func(now time.Time) Self
	guestOff   func() bool               // guest attributes are disabled
	listenErr  func() error              // of --listen
	metricsErr func() error              // of --metrics-listen
	backend    func() string             // of iptables: nft or legacy
	request    func(reason string) error // asks for a run of bootstrap
}

// thisVM asks the VM that the program runs on. What only a daemon knows is the daemon's to add.
func thisVM(stateDir string) vm {
	of := &whose{vm: identity.Here("")}
	return vm{
		addrs: localAddrs, userIDs: users.IDs, userName: userName,
		tcp: sockdiag.Listeners, udp: sockdiag.UDPListeners,
		progress:   func() (progress.State, error) { return of.progress(stateDir) },
		self:       func(time.Time) Self { return Self{} },
		guestOff:   func() bool { return false },
		listenErr:  func() error { return nil },
		metricsErr: func() error { return nil },
		backend:    func() string { return "" },
		request:    func(string) error { return nil },
	}
}

// proxyUser is --proxy-user in numbers.
type proxyUser struct {
	UID, GID uint32
	Err      error // it is not there yet, or is root
}

// Observation is what a pass decides by: the VM as it is now, and the newest word of each task.
type Observation struct {
	Now       time.Time
	Settings  Settings
	User      proxyUser
	Local     []netip.Addr // of every interface but loopback, sorted; nil: not known
	Attribute attributeInForce
	Envoy     envoywatch.View
	Bootstrap progress.State
	Awaited   bool // bootstrap is to come on this VM
	Self
	Others    []iptables.OtherChain
	Around    symptom.Surroundings // as far as the kernel tells of them
	GuestOff  bool
	ListenErr error
	// MetricsErr is why /metrics is not served on --metrics-listen, or not by the newest web config.
	MetricsErr error
	Resolvers  resolvers // while intercept-dns asks for them
}

// observe gathers what can be learned at once. What takes its time comes from tasks as values.
func (l *loop) observe(now time.Time) Observation {
	if l.user.Err != nil { // bootstrap may create it after the daemon was started
		l.user = proxyIDs(l.settings.ProxyUser, l.vm.userIDs)
	}
	local := l.local.look(l.vm.addrs)
	l.bootstrap.read(now, l.vm.progress)
	seen := Observation{
		Now: now, Settings: l.settings, User: l.user, Local: local, Attribute: l.attribute,
		Envoy:     l.envoy,
		Bootstrap: l.bootstrap.state, Awaited: l.bootstrap.awaited, Self: l.vm.self(now),
		Others: l.beside.others, Around: l.beside.around, GuestOff: l.vm.guestOff(),
		ListenErr:  l.vm.listenErr(),
		MetricsErr: l.vm.metricsErr(),
	}
	seen.Brake = l.brake
	if l.attribute.Config.InterceptDNS {
		seen.Resolvers = l.vm.resolvers(l.settings.ResolverUsers)
	}
	return seen
}

// Facts is all that the findings of a pass are made of: what it saw, decided and did.
func (o Observation) Facts(want Want, outcomes []reconcile.Outcome) symptom.Facts {
	f := symptom.Facts{
		Envoy:         o.Envoy.Facts(o.Settings.EnvoyAdmin),
		EnvoyLog:      o.Settings.EnvoyLog,
		ProxyUser:     o.Settings.ProxyUser,
		ProxyUID:      o.User.UID,
		UserErr:       o.User.Err,
		Attribute:     o.Attribute.Err,
		Advice:        o.Attribute.Config.Warnings,
		Metadata:      o.Attribute.Source,
		Brake:         o.Brake.facts(),
		NoAttribute:   !o.Attribute.Known,
		GuestOff:      o.GuestOff,
		ListenErr:     o.ListenErr,
		MetricsErr:    o.MetricsErr,
		MetricsApart:  o.Settings.MetricsListen != "",
		Bootstrapping: bootstrapping(o.Bootstrap, o.Awaited, o.Envoy, o.Now),
		Refused:       want.Refused,
		Uncovered:     want.Uncovered,
		ServerFirst:   want.ServerFirst,
		Others:        o.Others,
		VM:            o.VM,
		Surroundings:  o.Around,
		Discarded:     o.otherVMs(),
	}
	f.Clock, f.Agent.Killed, f.Clusters = o.Clock, o.Killed, o.Envoy.Clusters
	f.ClosedAgent = o.ClosedAgent
	f.Envoy.Trying = whyComes(o.Envoy, o.Now)
	o.compareEnvoy(&f)
	if want.interceptsDNS() {
		f.Resolvers, f.ResolverUIDs = o.Resolvers.Sockets, o.Resolvers.UIDs
	}
	if o.Account != nil {
		f.Account, f.Scopes = o.Account.Email, o.Account.Scopes
	}
	if o.Bootstrap.Status == progress.Failed {
		f.Bootstrap = o.Bootstrap.FailureLine()
	}
	for _, outcome := range outcomes {
		f.Ports = append(f.Ports, outcome.Ports...)
		f.Families = append(f.Families, outcome.Facts)
	}
	var foreign *sockdiag.ForeignError
	if errors.As(o.Envoy.Err, &foreign) {
		f.Ports = append(f.Ports, symptom.Port{
			Purpose: "admin", Addr: foreign.Addr, Owner: foreign.UID, OwnerName: userName(foreign.UID),
			Listening: true,
		})
	}
	f.Processes, f.NoTools = o.otherEnvoys(f.Ports), noTools(f.Families)
	return f
}

// noTools is why no family can be used, where that is because there is no iptables.
func noTools(families []symptom.Family) (why error) {
	for _, f := range families {
		if !errors.Is(f.Unusable, iptables.ErrNoIPTables) {
			return nil
		}
		why = f.Unusable
	}
	return why
}

// otherEnvoys are the users other than the proxy's that hold a port of Envoy's, and as whom an
// Envoy runs: by its answer on the admin port, which counts where root holds that, or is only
// looked at.
func (o Observation) otherEnvoys(ports []symptom.Port) (uids []uint32) {
	var foreign *sockdiag.ForeignError
	var runs uint32
	switch {
	case o.Envoy.ForeignEnvoy && errors.As(o.Envoy.Err, &foreign):
		runs = foreign.UID
	case o.Envoy.Err == nil && o.Envoy.State != "" && o.AdminOfRoot:
	default:
		return nil
	}
	holds := func(p symptom.Port) bool { return p.Listening && p.Owner == runs }
	if o.User.Err == nil && runs != o.User.UID && slices.ContainsFunc(ports, holds) {
		uids = append(uids, runs)
	}
	return uids
}

const (
	// triesFor is for how long after the end of Envoy's stream our own way to the control plane may be
	// being tried: its limit, and what a busy machine adds.
	triesFor = 5 * time.Second
	// logsWithin is for how long after Envoy was seen to be without a stream its log may be about to
	// say why: codes that it hopes will pass it logs at its first try after they have lasted for 30 s,
	// and the next try is up to 30 s away. It was seen by two answers, 15 s apart.
	logsWithin = 45 * time.Second
)

// whyComes says whether the cause of a lost control plane is about to be known better than now.
func whyComes(v envoywatch.View, now time.Time) bool {
	switch {
	case v.Stream != nil:
		return !v.Probed && now.Sub(v.Stream.When).Abs() < triesFor
	case v.Apart:
		return v.Probe == nil && !v.Seen.IsZero() && now.Sub(v.Seen).Abs() < logsWithin
	}
	return false
}

// envoyWarm is how long after bootstrap has started Envoy a word on its missing configuration
// waits. A healthy Envoy has it within a second.
const envoyWarm = 5 * time.Second

// bootstrapping says whether Envoy is still to come. Not only until bootstrap says that it runs:
// what was asked before that tells nothing of the Envoy which it started, and that one has yet to
// get its configuration.
func bootstrapping(boot progress.State, awaited bool, envoy envoywatch.View, now time.Time) bool {
	switch boot.Status {
	case progress.InProgress:
		return true
	case progress.Finished:
		if envoy.Err != nil {
			return envoy.Asked.Before(boot.Time)
		}
		return !envoy.Configured && now.Sub(boot.Time).Abs() < envoyWarm
	case "":
		return awaited
	}
	return false
}

// What Envoy's ports are for, as findings say it.
const (
	outboundPort = "outbound interception"
	inboundPort  = "inbound interception"
	dnsListener  = "DNS"
)

// lookShared is for how long one answer on a port does for both families: for as long as the first
// one had nothing to do. After a write rules do not rest on a look from before it.
const lookShared = 20 * time.Millisecond

// sharing is the VM as one pass asks it: an answer on a port is of both families.
func (v vm) sharing() vm {
	v.tcp, v.udp = shared(v.tcp), shared(v.udp)
	return v
}

func shared(
	list func(uint16) ([]sockdiag.Listener, error),
) func(uint16) ([]sockdiag.Listener, error) {
	type answer struct {
		listeners []sockdiag.Listener
		err       error
		asked     time.Time
	}
	answers := map[uint16]answer{}
	return func(port uint16) ([]sockdiag.Listener, error) {
		a, ok := answers[port]
		if now := time.Now(); !ok || now.Sub(a.asked) > lookShared {
			a.asked = now
			a.listeners, a.err = list(port)
			answers[port] = a
		}
		return a.listeners, a.err
	}
}

// look asks the kernel who listens on the ports that matter.
func (v vm) look(family iptables.Family, ports reconcile.Ports, seen Observation) reconcile.Looks {
	looks := reconcile.Looks{
		Outbound: v.lookAt(family, outboundPort, ports.Outbound, v.tcp, seen),
		Inbound:  v.lookAt(family, inboundPort, ports.Inbound, v.tcp, seen),
		DNS:      v.lookAt(family, dnsListener, ports.DNS, v.udp, seen),
	}
	// The module udp_diag is missing, so that nobody will ever tell: what Envoy says must do. An
	// answer that did not come once is not that.
	if errors.Is(looks.DNS.Err, unix.ENOENT) {
		looks.DNS.Listening, looks.DNS.Owner, looks.DNS.Err = true, seen.User.UID, nil
	}
	if ports.DNSOverTCP {
		tcp := v.lookAt(family, dnsListener, ports.DNS, v.tcp, seen)
		foreign := tcp.Listening && tcp.Owner != seen.User.UID
		own := looks.DNS.Listening && looks.DNS.Owner == seen.User.UID
		if foreign || own && tcp.Err != nil { // what is known of UDP alone does not open it
			looks.DNS = tcp
		}
	}
	return looks
}

// lookAt asks who would get what REDIRECT sends to this port. On OUTPUT it leads to loopback, on
// PREROUTING (inbound, and outbound of containers) to an address of the interface that a packet
// came in by. A foreign owner on any of these counts, one on another address does not.
// See docs/design/facts.md#redirect-leads-to and docs/design/facts.md#anybody-may-listen.
func (v vm) lookAt(
	family iptables.Family, purpose string, port uint16,
	list func(uint16) ([]sockdiag.Listener, error), seen Observation,
) symptom.Port {
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
	if local := localOf(family, seen.Local); len(local) > 0 {
		switch {
		case purpose == inboundPort:
			at = local
		case purpose == outboundPort && len(seen.Settings.Interfaces) > 0:
			at = append(at, local...)
		}
	}
	for _, addr := range at {
		for _, uid := range sockdiag.Accepting(listeners, addr) {
			p.Listening, p.Owner = true, uid
			if uid != seen.User.UID {
				// Of several owners nobody can tell who gets the next connection: the foreign one counts.
				p.Addr, p.OwnerName = netip.AddrPortFrom(addr, port), v.userName(uid)
				return p
			}
		}
	}
	return p
}

// localOf are the addresses of one family, without link-local ones, to which
// REDIRECT does not lead.
func localOf(family iptables.Family, local []netip.Addr) (some []netip.Addr) {
	for _, addr := range local {
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
