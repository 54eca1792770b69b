// Package agent is the domain: it decides what the kernel shall intercept and keeps it so.
//
//	envoywatch.View ──┐
//	                  ├─> Desired ─> Want ─> iptables.Ruleset ┐
//	attribute.Config ─┘    (pure)                             ├─> Diff ─> Plan ─> Apply
//	iptables.Read ──────────────────────────────────> have ───┘
//	Facts ─> symptom.Check ─> Status ─> guest attributes, metrics, sd_notify, socket
//	                       └> Events ─> log, serial, Cloud Logging
//
// One goroutine (loop) owns the kernel. What is slow or can hang (Envoy's admin interface, the
// metadata server, the kernel's notifications, every reporter) is a task beside it and meets it
// only by values. How one family's rules are kept is internal/reconcile's, and how Envoy is looked
// at internal/envoywatch's.
//
// It installs nothing (internal/bootstrap does), and stopping it leaves the rules in place.
package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/atomicfile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/cloudlog"
	"github.com/service-proxy-agent/service-proxy-agent/internal/conntrack"
	"github.com/service-proxy-agent/service-proxy-agent/internal/envoywatch"
	"github.com/service-proxy-agent/service-proxy-agent/internal/footprint"
	"github.com/service-proxy-agent/service-proxy-agent/internal/identity"
	"github.com/service-proxy-agent/service-proxy-agent/internal/mailbox"
	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/internal/reconcile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/report"
	"github.com/service-proxy-agent/service-proxy-agent/internal/server"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// Agent is the daemon: its settings, what its tasks work with, and the mailboxes between them. What
// the loop knows is the loop's own. Make one with New.
type Agent struct {
	settings Settings
	log      *zap.Logger
	started  time.Time
	kernel   *iptables.Kernel
	envoy    *envoyadmin.Client
	guest    *guestattr.Writer
	serial   *report.Serial
	cloud    *cloudlog.Writer
	metrics  *report.Metrics
	public   *server.Public // nil: --listen is empty
	scraped  *server.Public // of --metrics-listen; nil: public has /metrics

	attributes *mailbox.Box[attributeNews]
	brakes     *mailbox.Box[brake]
	others     *mailbox.Box[[]iptables.OtherChain]
	around     *surroundings
	reports    *mailbox.Box[status.Status]
	worked     *mailbox.Box[struct{}] // a pass that did more than look
	kept       *kept
	pause      chan chan struct{}
	answers
	answered atomic.Pointer[time.Time] // when the metadata server last did; nil: not yet
	self     self

	config *attribute.Config // of --config; nil: the metadata server tells
	// its unit is enabled: a VM without its result is not finished yet
	awaitBootstrap bool
	withoutTools   bool // iptables was not installed when the agent started
}

// answers are what statusNow puts together for whoever asks.
type answers struct {
	status      atomic.Pointer[status.Status] // nil: no pass yet
	intercepted atomic.Pointer[intercepted]   // its Services
	cost        atomic.Pointer[status.Cost]   // of the agent itself; nil: not known yet
}

// kept is what keepHistory keeps for the next start.
type kept struct {
	failures    *mailbox.Box[Failures]
	transitions *mailbox.Box[keptTransitions]
	attribute   *mailbox.Box[*keptAttribute]
	brake       *mailbox.Box[keptBrake]
	whose       whose
}

func newKept() *kept {
	return &kept{failures: mailbox.New[Failures](), transitions: mailbox.New[keptTransitions](),
		attribute: mailbox.New[*keptAttribute](), brake: mailbox.New[keptBrake]()}
}

// New checks the settings and opens the kernel; nothing is changed there. Errors name the thing and
// the next step.
func New(ctx context.Context, s Settings, log *zap.Logger) (*Agent, error) {
	if err := s.Validate(); err != nil {
		return nil, err
	}
	a := &Agent{
		settings: s, log: log, started: time.Now(),
		attributes: mailbox.New[attributeNews](), brakes: mailbox.New[brake](),
		others: mailbox.New[[]iptables.OtherChain](), reports: mailbox.New[status.Status](),
		worked: mailbox.New[struct{}](), kept: newKept(), pause: make(chan chan struct{}),
	}
	a.self.killed = takeKilled(server.Dir(), a.started, log)
	var err error
	if a.envoy, err = envoyadmin.New(s.EnvoyAdmin); err != nil {
		return nil, fmt.Errorf("%w: --envoy-admin: %w", ErrSettings, err)
	}
	a.envoy.Trust = trust(s.ProxyUser, &a.self.adminOfRoot)
	if s.Config != "" {
		if a.config, err = readConfig(s.Config); err != nil {
			return nil, err
		}
	}
	if unit, err := systemd.UnitState(ctx, systemd.BootstrapUnit); err == nil {
		a.awaitBootstrap = unit.Enabled
	}
	a.kernel, err = iptables.Open(ctx, iptables.Options{})
	switch {
	case errors.Is(err, iptables.ErrNoIPTables) && a.awaitBootstrap:
		// Bootstrap installs it; until then somebody must publish how that goes.
		log.Info("iptables is not installed yet, waiting for bootstrap")
		a.withoutTools = true
	case errors.Is(err, iptables.ErrNoTable):
		// The kernel's modules are away, which may last. The loop tries each minute, and until then
		// somebody must tell of it.
		log.Warn("interception is not possible for now", zap.Error(err))
	case err != nil:
		// Nothing else that is known lasts, and systemd starts it again within two seconds: one without
		// a file descriptor left, for example, has not read what an earlier run kept either.
		return nil, nextStep(err)
	}
	a.around = newSurroundings(askKernel(a.kernel, iptables.ErrNoIPTables), log)
	a.guest = guestattr.New(guestattr.Options{
		Log: log, Budget: filepath.Join(server.Dir(), "guest-attributes.budget"),
	})
	a.serial = report.NewSerial(s.SerialPort)
	mode, err := s.cloudLogging()
	if err != nil {
		return nil, err
	}
	a.cloud = cloudlog.New(cloudlog.Options{Mode: mode, Log: log})
	a.metrics = report.NewMetrics(a.sources())
	return a, a.newServers()
}

// sources are what is told of the agent beside what a pass tells.
func (a *Agent) sources() report.Sources {
	return report.Sources{
		Version: a.settings.Version, Commit: a.settings.Commit,
		GuestAttributes: a.guest.State, Serial: a.serial.State, CloudLogging: a.cloud.State,
		Envoy: a.envoy.Asked, Metadata: a.metadataAnswered,
	}
}

// newServers makes those who answer the network.
func (a *Agent) newServers() (err error) {
	s, metrics := a.settings, a.metrics.Handler()
	if s.MetricsListen != "" {
		a.scraped, err = server.NewMetrics(s.MetricsListen, s.WebConfigFile, metrics, a.log)
		if err != nil {
			return fmt.Errorf("%w: --metrics-listen: %w", ErrSettings, err)
		}
		metrics = nil
	}
	if s.Listen != "" {
		a.public, err = server.NewPublic(s.Listen, a.healthz, a.readyz, metrics, a.log)
		if err != nil {
			return fmt.Errorf("%w: --listen: %w", ErrSettings, err)
		}
	}
	return nil
}

// nextStep adds what to do to an error of the kernel's tools.
func nextStep(err error) error {
	switch {
	case errors.Is(err, iptables.ErrNoIPTables):
		return fmt.Errorf("%w; install the package iptables", err)
	case errors.Is(err, iptables.ErrNotRoot):
		return fmt.Errorf("%w; run as root, or with CAP_NET_ADMIN and CAP_NET_RAW", err)
	}
	return err
}

// readConfig reads the attribute from --config.
func readConfig(path string) (*attribute.Config, error) {
	c := attribute.Default()
	if path == "none" {
		return &c, nil
	}
	text, err := readAtMost(path, attribute.MaxSize+1) // Parse refuses what is longer
	if err != nil {
		return nil, fmt.Errorf("%w: --config: %w; name a file with the attribute's JSON, or none",
			ErrSettings, err)
	}
	if c, err = attribute.Parse(text); err != nil {
		return nil, fmt.Errorf("%w: --config %q: %w", ErrSettings, path, err)
	}
	return &c, nil
}

// readAtMost reads the beginning of a file, which may have no end, as /dev/zero.
func readAtMost(path string, size int64) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return io.ReadAll(io.LimitReader(file, size))
}

// Run runs until ctx ends, which is no error. The rules stay in place.
func (a *Agent) Run(ctx context.Context) error {
	socket, err := server.Socket(server.Dir())
	if err != nil {
		return err // a second agent on this VM must not fight the first
	}
	a.log.Info("started", zap.String("version", a.settings.Version),
		zap.String("backend", a.kernel.Backend()), zap.String("iptables", a.kernel.Version()),
		zap.String("envoy_admin", a.settings.EnvoyAdmin), zap.String("proxy_user", a.settings.ProxyUser))
	a.say(report.Event{Severity: report.Info, Message: a.startedText()})
	a.kept.whose.find(ctx, a.settings.StateDir, server.Dir(), identity.Here(""),
		metadata.ReadInstance, a.log)
	ctx, cancel := context.WithCancel(ctx) // what the tasks began ends with them
	defer cancel()
	err = runTasks(ctx, a.tasks(ctx, socket))
	a.log.Info("stopped; the rules stay in place")
	return err
}

// tasks are the goroutines of the daemon.
func (a *Agent) tasks(ctx context.Context, socket *server.Local) []task {
	envoy := a.newWatch(ctx)
	loop := a.newLoop(ctx, envoy.Views())
	tasks := []task{
		{"loop", loop.run},
		{"watch Envoy", envoy.Run},
		{"watch the brake", a.watchBrake},
		{"report", a.report},
		{"keep history", a.keepHistory},
		{"look around", a.around.run},
		{"give memory back", a.giveBack},
		{"guest attributes", a.guest.Run},
		{"serial port", a.serial.Run},
		{"Cloud Logging", a.cloud.Run},
		{"watch the cost", a.watchCost},
		{"look for another agent", a.watchNeighbour},
		{"socket", func(ctx context.Context) error {
			answers := server.Answers{Status: a.statusNow, Pause: a.pauseLoop}
			return socket.Serve(ctx, answers, a.log)
		}},
	}
	if a.withoutTools {
		tasks = append(tasks, task{"wait for iptables", a.awaitTools})
	} else {
		tasks = append(tasks, task{"watch other nat chains", a.watchOthers})
	}
	if a.public != nil {
		tasks = append(tasks, task{"listen", a.public.Run})
	}
	if a.scraped != nil {
		tasks = append(tasks, task{"listen for scrapes", a.scraped.Run})
	}
	if a.config == nil {
		tasks = append(tasks,
			task{"watch the attribute", a.watchAttribute}, task{"read the service account", a.readAccount},
			task{"read who the VM is", a.readVM}, task{"watch the clock", a.watchClock})
	}
	if a.config == nil || a.kept.whose.open() {
		tasks = append(tasks, task{"find out whose the state is", a.watchWhose})
	}
	return tasks
}

// newWatch makes the task that looks at Envoy.
func (a *Agent) newWatch(ctx context.Context) *envoywatch.Watch {
	o := envoywatch.Options{
		Admin: a.envoy, LogPath: a.settings.EnvoyLog, Log: a.log,
		Unit: envoywatch.Unit, Probe: envoywatch.Probe, Foreign: answersAsEnvoy(a.settings.EnvoyAdmin),
		Share: float64(a.settings.EnvoyShare) / 100,
	}
	if a.settings.EnvoyLog != "" {
		o.Logged = envoyadmin.FollowLog(ctx, a.settings.EnvoyLog)
	}
	return envoywatch.New(o)
}

// newLoop makes the loop, with all that it is told and asks.
func (a *Agent) newLoop(ctx context.Context, views <-chan envoywatch.View) *loop {
	events, err := a.kernel.Watch(ctx)
	if err != nil {
		a.log.Warn("no notifications from the kernel, polling", zap.Error(err))
	}
	failures := loadFailures(a.settings.StateDir, a.kept.whose.vm)
	braked, _ := loadBrake(a.settings.StateDir, a.kept.whose.now()) // watchBrake tells of an error
	l := &loop{
		settings: a.settings, log: a.log, vm: a.thisVM(),
		inbox: inbox{
			views: views, attributes: a.attributes.Get(), brakes: a.brakes.Get(), others: a.others.Get(),
			around: a.around.found.Get(),
			pause:  a.pause, events: events,
		},
		attribute: attributeInForce{Config: attribute.Default()}, // what is not known yet is as usual
		stops:     stops{brake: braked.brake(a.config != nil)},
		bootstrap: bootstrapProgress{awaited: a.awaitBootstrap},
		beside: beside{
			asked:  func(about about) { a.around.asked.Put(about) },
			worked: func() { a.worked.Put(struct{}{}) },
			hold:   holding{log: a.log, make: func() (io.Closer, error) { return conntrack.NewHold() }},
		},
		mark: readMark(server.Dir(), a.log),
		told: told{
			reporters: a.reporters(), log: a.log, started: a.started,
			past:     a.history(),
			failures: failures, unasked: failures.Lasting, before: failures.Standing,
			unseen: failures.Warnings.whichOf(),
		},
	}
	if a.config != nil {
		l.attribute = attributeInForce{Known: true, Config: *a.config}
	}
	l.user = proxyIDs(a.settings.ProxyUser, l.vm.userIDs)
	kernel := markingKernel{a.kernel, l.mark}
	for _, family := range families {
		l.families = append(l.families, reconcile.New(family, kernel, reconcile.Flows{
			HalfOpen: conntrack.DeleteHalfOpen, UDP: conntrack.DeleteUDP, LateUDP: conntrack.DeleteLateUDP,
		}, a.log))
	}
	return l
}

// history is that of earlier runs on this VM, and that this one was started.
func (a *Agent) history() (h history) {
	var err error
	if h.lines, err = loadTransitions(a.settings.StateDir, a.kept.whose.vm); err != nil {
		a.log.Warn("the transitions of earlier runs are lost", zap.Error(err))
	}
	h.add(status.Transition{Kind: status.OfAgent, Severity: "info", Text: a.startedText()}, a.started)
	return h
}

// giveBack gives memory back after each want and write.
func (a *Agent) giveBack(ctx context.Context) error {
	footprint.After(ctx, a.worked.Get(), debug.FreeOSMemory)
	return nil
}

// startedText says that it was started, on each channel.
func (a *Agent) startedText() string {
	return "service-proxy-agent " + a.settings.Version + " started"
}

// thisVM asks the VM, and the daemon's tasks for what they know of it.
func (a *Agent) thisVM() vm {
	v := thisVM(a.settings.StateDir)
	v.userIDs = remembering(v.userIDs)
	v.self = func(now time.Time) Self {
		is := a.self.known(now)
		of := &a.kept.whose
		is.Owner, is.Discarded, is.Held = of.owner(), of.discarded, of.hold
		return is
	}
	v.progress = func() (progress.State, error) {
		return a.kept.whose.progress(a.settings.StateDir)
	}
	v.guestOff = func() bool { return !a.guest.State().Enabled }
	if a.public != nil {
		v.listenErr = a.public.Err
	}
	if a.scraped != nil {
		v.metricsErr = a.scraped.Err
	}
	v.backend = a.kernel.Backend
	v.request = func(reason string) error { return progress.Request(server.Dir(), reason) }
	return v
}

// say tells an event on each channel that tells a story; the log has it already.
func (a *Agent) say(e report.Event) {
	a.serial.Say(e.Severity, e.Message)
	a.cloud.Say(e)
}

func (a *Agent) reporters() reporters {
	return reporters{
		events:  a.say,
		metrics: a.metrics.Pass,
		status: func(s status.Status) {
			a.status.Store(&s)
			a.reports.Put(s)
		},
		intercepted: func(in intercepted) { a.intercepted.Store(&in) },
		history:     func(f Failures) { a.kept.failures.Put(f) },
		transitions: func(all []status.Transition) {
			a.kept.transitions.Put(keptTransitions{Owner: a.kept.whose.owner(), Transitions: all})
		},
		// service-proxy-ready.path starts the target then, which stays: the file is not taken away
		// again.
		ready: func() error {
			return atomicfile.Write(filepath.Join(server.Dir(), systemd.ReadyFile), nil, 0o644)
		},
	}
}
