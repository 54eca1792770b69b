// Package agent is the domain: it decides what the kernel shall intercept and keeps it so.
//
//	envoyadmin.Listeners -> View ┐
//	                             ├─> Desired -> Want -> iptables.Interception ─> Ruleset ┐
//	attribute.Parse ---> Config ─┘    (pure)                                             ├─> Diff ─> Plan ─> Apply
//	iptables.Read -----------------------------------------------------------------> have┘
//	Facts ─> symptom.Check ─> Status ─> guest attributes, serial, metrics, sd_notify, socket
//
// One goroutine (loop) owns the kernel; what is slow or can hang (Envoy's admin interface, the metadata server, the
// kernel's notifications, every reporter) runs beside it and meets it only by values. Policies are each in one place: Hold,
// keep and bypass in gate, back-off against somebody who undoes our rules in fight, both in policy.go.
//
// It installs nothing (internal/bootstrap does), and stopping it leaves the rules in place (design: "Stop").
package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/mailbox"
	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/internal/report"
	"github.com/service-proxy-agent/service-proxy-agent/internal/server"
	"github.com/service-proxy-agent/service-proxy-agent/internal/sockdiag"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// Agent is the daemon. Make one with New. The second part of the fields belongs to the loop alone.
type Agent struct {
	settings Settings
	log      *zap.Logger
	kernel   *iptables.Kernel
	envoy    *envoyadmin.Client
	guest    *guestattr.Writer
	serial   *report.Serial
	metrics  *report.Metrics
	public   *server.Public // nil: --listen is empty
	started  time.Time
	ownPorts []uint16

	views      *mailbox.Box[View]
	attributes *mailbox.Box[attributeNews]
	others     *mailbox.Box[[]iptables.OtherChain]
	reports    *mailbox.Box[status.Status]
	history    *mailbox.Box[Failures]
	keep       *mailbox.Box[*keptAttribute]
	events     <-chan iptables.Event
	pause      chan chan struct{}
	status     atomic.Pointer[status.Status]
	// awaitBootstrap: that unit is enabled, so a VM without its result is not finished yet.
	awaitBootstrap bool
	withoutTools   bool                             // iptables was not installed when the agent started
	account        atomic.Pointer[metadata.Account] // nil: not read yet
	proxyUID       atomic.Int64                     // for trust, which runs in the client's goroutine; -1: no such user

	view           View
	config         attribute.Config
	haveConfig     bool
	inForce        *goodAttribute // where config is from; nil: none yet, or --config
	attributeText  []byte         // of the last attribute that this run read; nil: none yet, or from --config
	requested      time.Time      // when bootstrap was last asked to run
	attributeErr   error
	sourceErr      error
	uid, gid       uint32
	userErr        error
	local          []netip.Addr
	want           Want
	wantStale      bool
	wantGeneration uint64 // of the View that want was made of
	wantSerial     uint64 // counts Wants
	families       []familyState
	otherChains    []iptables.OtherChain
	boot           progress.State
	bootRead       time.Time
	bootSaid       int // the last line of bootstrap's story that was told
	paused         bool
	marked         bool // an agent of this boot put jumps in (mark.go)
	failures       Failures
	happened       report.Pass // what happened in this pass
	passes, undone uint64
	lastBy         string
	lastByAt       time.Time

	saidMode     string
	saidReady    bool
	saidFindings map[string]bool
	saidUnknown  []string // sets of unknown keys
	saidNotify   bool     // of runReports
	dumps        int

	saidResolvers map[string]bool // users of --resolver-users that are not there
}

// New checks the settings and opens the kernel; nothing is changed there. Errors name the thing and the next step.
func New(ctx context.Context, s Settings, log *zap.Logger) (*Agent, error) {
	if err := s.Validate(); err != nil {
		return nil, err
	}
	a := &Agent{
		settings: s, log: log, started: time.Now(),
		views: mailbox.New[View](), attributes: mailbox.New[attributeNews](), others: mailbox.New[[]iptables.OtherChain](),
		reports: mailbox.New[status.Status](), history: mailbox.New[Failures](), keep: mailbox.New[*keptAttribute](), pause: make(chan chan struct{}), ownPorts: ownPorts(s),
		families: []familyState{{family: iptables.IPv4}, {family: iptables.IPv6}},
	}
	var err error
	if a.envoy, err = envoyadmin.New(s.EnvoyAdmin); err != nil {
		return nil, fmt.Errorf("%w: --envoy-admin: %w", ErrSettings, err)
	}
	a.envoy.Trust = a.trust
	a.config = attribute.Default() // what is not known yet is as usual
	if s.Config != "" {
		if a.config, err = readConfig(s.Config); err != nil {
			return nil, err
		}
		a.haveConfig = true
	}
	a.lookUpProxy()
	if unit, err := systemd.UnitState(ctx, systemd.BootstrapUnit); err == nil {
		a.awaitBootstrap = unit.Enabled
	}
	a.kernel, err = iptables.Open(ctx, iptables.Options{})
	switch {
	case errors.Is(err, iptables.ErrNoIPTables) && a.awaitBootstrap:
		// Bootstrap installs it; until then somebody must publish how that goes.
		log.Info("iptables is not installed yet, waiting for bootstrap")
		a.withoutTools = true
	case err != nil:
		return nil, nextStep(err)
	}
	a.failures = loadFailures(s.StateDir)
	a.marked = isMarked(server.Dir())
	a.guest = guestattr.New(guestattr.Options{Log: log, Budget: filepath.Join(server.Dir(), "guest-attributes.budget")})
	a.serial = report.NewSerial(s.SerialPort)
	a.metrics = report.NewMetrics(report.Sources{Version: s.Version, Commit: s.Commit, GuestAttributes: a.guest.State, Serial: a.serial.State})
	if s.Listen != "" {
		if a.public, err = server.NewPublic(s.Listen, a.healthz, a.readyz, a.metrics.Handler(), log); err != nil {
			return nil, fmt.Errorf("%w: --listen: %w", ErrSettings, err)
		}
	}
	return a, nil
}

// nextStep adds what to do to an error of the kernel's tools.
func nextStep(err error) error {
	switch {
	case errors.Is(err, iptables.ErrNoIPTables):
		return fmt.Errorf("%w; install the package iptables", err)
	case errors.Is(err, iptables.ErrNotRoot):
		return fmt.Errorf("%w; run as root, or with CAP_NET_ADMIN and CAP_NET_RAW", err)
	case errors.Is(err, iptables.ErrNoTable):
		return fmt.Errorf("%w; `modprobe iptable_nat`", err)
	}
	return err
}

// readConfig reads the attribute from --config.
func readConfig(path string) (attribute.Config, error) {
	if path == "none" {
		return attribute.Default(), nil
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return attribute.Config{}, fmt.Errorf("%w: --config: %w; name a file with the attribute's JSON, or none", ErrSettings, err)
	}
	c, err := attribute.Parse(text)
	if err != nil {
		return attribute.Config{}, fmt.Errorf("%w: --config %q: %w", ErrSettings, path, err)
	}
	return c, nil
}

// ownPorts are never intercepted as port rules: Envoy's admin and interception ports and the agent's own.
func ownPorts(s Settings) []uint16 {
	ports := []uint16{15000, 15001, 15006, 15020}
	for _, addr := range []string{s.EnvoyAdmin, s.Listen} {
		if _, p, err := net.SplitHostPort(addr); err == nil {
			if n, err := net.LookupPort("tcp", p); err == nil {
				ports = append(ports, uint16(n))
			}
		}
	}
	return sortedPorts(ports)
}

// trust lets the admin interface's answers count only when the proxy's user or root holds its socket: any local user can
// listen on the port while Envoy is down.
func (a *Agent) trust(c net.Conn) error {
	trusted := []uint32{0}
	if proxy := a.proxyUID.Load(); proxy > 0 {
		trusted = append(trusted, uint32(proxy))
	}
	if u, ok := c.(*net.UnixConn); ok {
		uid, err := listenerUID(u)
		if err != nil {
			return err
		}
		if !slices.Contains(trusted, uid) {
			return &sockdiag.ForeignError{UID: uid}
		}
		return nil
	}
	// Both: who answers on this connection, which may have been made before the listener changed hands, and who listens,
	// since a socket can be handed to another process.
	uid, err := sockdiag.PeerOwner(c)
	if err != nil {
		return err
	}
	if !slices.Contains(trusted, uid) {
		return &sockdiag.ForeignError{Addr: remoteAddr(c), UID: uid}
	}
	return sockdiag.OwnedBy(remoteAddr(c), trusted...)
}

// listenerUID is the uid of the process that called listen(2) on the other end's socket (SO_PEERCRED, unix(7)).
func listenerUID(c *net.UnixConn) (uid uint32, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	if e := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); e != nil {
		return 0, e
	}
	if err != nil {
		return 0, fmt.Errorf("ask for the owner of Envoy's admin socket: %w", err)
	}
	return cred.Uid, nil
}

func remoteAddr(c net.Conn) (a netip.AddrPort) {
	if t, ok := c.RemoteAddr().(*net.TCPAddr); ok {
		a = t.AddrPort()
	}
	return a
}

// lookUpProxy resolves --proxy-user, which bootstrap may create after the daemon was started.
func (a *Agent) lookUpProxy() {
	a.uid, a.gid, a.userErr = proxyIDs(a.settings.ProxyUser)
	if a.userErr != nil {
		a.proxyUID.Store(-1)
		return
	}
	a.proxyUID.Store(int64(a.uid))
}

// Run runs until ctx ends, which is no error. The rules stay in place.
func (a *Agent) Run(ctx context.Context) error {
	socket, err := server.Socket(server.Dir())
	if err != nil {
		return err // a second agent on this VM must not fight the first
	}
	g, ctx := errgroup.WithContext(ctx)
	if a.events, err = a.kernel.Watch(ctx); err != nil {
		a.log.Warn("no notifications from the kernel, polling", zap.Error(err))
	}
	watch := &envoyWatch{client: a.envoy, probes: make(chan probed), views: a.views, logPath: a.settings.EnvoyLog, log: a.log}
	if a.settings.EnvoyLog != "" {
		watch.logged = envoyadmin.FollowLog(ctx, a.settings.EnvoyLog)
	}
	a.log.Info("started", zap.String("version", a.settings.Version), zap.String("backend", a.kernel.Backend()), zap.String("iptables", a.kernel.Version()),
		zap.String("envoy_admin", a.settings.EnvoyAdmin), zap.String("proxy_user", a.settings.ProxyUser))
	a.serial.Say(report.Info, "service-proxy-agent "+a.settings.Version+" started")

	g.Go(func() error { return a.loop(ctx) })
	g.Go(func() error { return watch.run(ctx) })
	if a.withoutTools {
		g.Go(func() error { return a.awaitTools(ctx) })
	} else {
		g.Go(func() error { return a.watchOthers(ctx) })
	}
	g.Go(func() error { return a.runReports(ctx) })
	g.Go(func() error { return a.runHistory(ctx) })
	g.Go(func() error { return a.guest.Run(ctx) })
	g.Go(func() error { return a.serial.Run(ctx) })
	g.Go(func() error { return socket.Serve(ctx, server.Answers{Status: a.statusNow, Pause: a.pauseLoop}, a.log) })
	if a.public != nil {
		g.Go(func() error { return a.public.Run(ctx) })
	}
	if a.settings.Config == "" {
		g.Go(func() error { a.watchAttribute(ctx); return nil })
		g.Go(func() error { a.readAccount(ctx); return nil })
	}
	err = g.Wait()
	a.log.Info("stopped; the rules stay in place")
	return err
}

// readAccount asks once for the VM's service account, whose name belongs into the control plane's refusals.
func (a *Agent) readAccount(ctx context.Context) {
	for wait := time.Second; ; wait = min(2*wait, time.Minute) {
		if account, err := metadata.ReadAccount(ctx); err == nil {
			a.account.Store(&account)
			return
		}
		if !sleep(ctx, wait) {
			return
		}
	}
}

// othersEvery is how often other nat chains at our hooks, and a switch of iptables' backend, are looked for. The first time
// comes once the loop has installed its rules: those that an earlier run left in the other backend redirect until then.
const (
	othersFirst = 20 * time.Second
	othersEvery = 5 * time.Minute
)

// errSwitched ends the agent, which systemd starts again with the new backend. The rules in the old one stay until the
// new ones are in.
var errSwitched = errors.New("the iptables backend was switched")

// watchOthers looks for chains of others that may shadow ours, and removes what an earlier run left in the other backend.
func (a *Agent) watchOthers(ctx context.Context) error {
	for wait := othersFirst; sleep(ctx, wait); wait = othersEvery {
		// Another Kernel: this one is the loop's.
		backend := a.kernel.Backend() // "" until the programs have told their version
		if k, err := iptables.Open(ctx, iptables.Options{}); err == nil && backend != "" && k.Backend() != "" && k.Backend() != backend {
			return fmt.Errorf("%w from %s to %s: starting anew", errSwitched, backend, k.Backend())
		}
		if s := a.status.Load(); s == nil || !s.Ready {
			continue // the rules in the other backend may be the only ones that redirect
		}
		removed, err := a.kernel.CleanOtherBackend(ctx)
		if len(removed) > 0 {
			a.log.Info("rules of ours removed from the other iptables backend", zap.Strings("removed", removed))
		}
		if err != nil {
			a.log.Debug("could not look into the other iptables backend", zap.Error(err))
		}
		others, err := a.kernel.Others(ctx) // what could be seen, in any case
		if err != nil {
			a.log.Debug("could not look for other nat chains", zap.Error(err))
		}
		a.others.Put(others)
	}
	return nil
}

// errToolsCame ends an agent that was started before iptables was installed; systemd starts it again.
var errToolsCame = errors.New("iptables is installed now: starting anew")

func (a *Agent) awaitTools(ctx context.Context) error {
	for sleep(ctx, time.Second) {
		if a.kernel.Probe(ctx, iptables.IPv4) == nil || a.kernel.Probe(ctx, iptables.IPv6) == nil {
			return errToolsCame
		}
	}
	return nil
}

// pauseLoop makes the loop write no more until the agent is restarted (cleanup).
func (a *Agent) pauseLoop(ctx context.Context) error {
	done := make(chan struct{})
	select {
	case a.pause <- done:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case <-done:
		a.log.Warn("paused by cleanup until restarted")
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
