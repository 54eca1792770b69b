package agent

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/envoywatch"
	"github.com/service-proxy-agent/service-proxy-agent/internal/identity"
	"github.com/service-proxy-agent/service-proxy-agent/internal/layout"
	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/internal/server"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// What a look asks, each with its own time limit. None of it changes anything.

// noConfig is the --config without an attribute.
const noConfig = "none"

func (l *looking) questions() []question {
	past := make(chan []envoyadmin.Logged, 1)
	return []question{
		l.askUsers(), l.askKernel(), l.askLog(past), l.askEnvoy(past), l.askMetadata(), l.askState(),
		l.askDaemon(), l.askUnits(), l.askNeighbour(),
	}
}

// askUsers asks who the proxy is, and where this VM is.
func (l *looking) askUsers() question {
	s := l.Seen.Settings
	return question{[]symptom.Source{symptom.FromUsers}, 2 * time.Second,
		func(context.Context) (func(*looking), error) {
			user := proxyIDs(s.ProxyUser, l.vm.userIDs)
			addrs, err := l.vm.addrs()
			if err == nil {
				addrs = readAddrs(addrs)
			}
			return func(l *looking) { l.Seen.User, l.Seen.Local = user, addrs }, err
		}}
}

// kernelSeen is what was read of the kernel's rules.
type kernelSeen struct {
	read     bool             // table nat of each family that can be used
	unusable [2]error         // why not
	noTools  error            // there is no iptables
	of       *iptables.Kernel // nil: not known
}

// none is why there is nothing to ask for more.
func (k kernelSeen) none() error {
	if k.noTools != nil {
		return k.noTools
	}
	return fmt.Errorf("find iptables: %w in time", iptables.ErrCouldNotLook)
}

// askKernel reads table nat of both families, and who else has nat chains.
func (l *looking) askKernel() question {
	return question{[]symptom.Source{symptom.FromKernel, symptom.FromOthers}, 6 * time.Second,
		func(ctx context.Context) (func(*looking), error) {
			var seen kernelSeen
			kernel, err := iptables.Open(ctx, iptables.Options{ReadOnly: true})
			if errors.Is(err, iptables.ErrNoIPTables) {
				seen.noTools = err
				return func(l *looking) {
					l.moved, l.kernel, l.HaveErr = true, seen, [2]error{err, err}
					l.unseen[symptom.FromOthers] = whyNot(err)
				}, nil
			}
			var have [2]iptables.Table
			var errs [2]error
			for i, state := range kernel.Families() {
				if errs[i] = state.Why; state.Why != nil {
					if !errors.Is(state.Why, iptables.ErrNotRoot) {
						seen.unusable[i] = state.Why
						continue
					}
				} else {
					have[i], errs[i] = kernel.Read(ctx, families[i])
				}
				if errs[i] != nil && !errors.Is(errs[i], iptables.ErrIncompatible) {
					err = errs[i]
				}
			}
			if seen.unusable[0] != nil && seen.unusable[1] != nil {
				err = nil // Open says so once more
			}
			seen.read, seen.of = err == nil, kernel
			hung := ctx.Err() != nil
			others, othersErr := otherChains(ctx, kernel)
			return func(l *looking) {
				l.moved = l.moved || !hung
				l.kernel, l.Have, l.HaveErr, l.Backend = seen, have, errs, kernel.Backend()
				l.Seen.Others = others
				delete(l.unseen, symptom.FromOthers)
				if othersErr != nil {
					l.unseen[symptom.FromOthers] = whyNot(othersErr)
				}
			}, err
		}}
}

// otherChains are the nat chains of others, in both backends: each backend is asked by a way of its
// own.
func otherChains(ctx context.Context, kernel *iptables.Kernel) ([]iptables.OtherChain, error) {
	others, err := kernel.Others(ctx)
	elsewhere, err2 := iptables.OtherBackend(ctx, kernel.Backend())
	for _, e := range elsewhere {
		for _, o := range e.Others {
			if !slices.Contains(others, o) {
				others = append(others, o)
			}
		}
	}
	return others, errors.Join(err, err2)
}

// askLog reads the end of Envoy's log, for askEnvoy, too.
func (l *looking) askLog(past chan<- []envoyadmin.Logged) question {
	path := l.Seen.Settings.EnvoyLog
	return question{[]symptom.Source{symptom.FromEnvoyLog}, 2 * time.Second,
		func(context.Context) (func(*looking), error) {
			if path == "" {
				past <- nil
				return nil, errors.New("--envoy-log is empty")
			}
			events, err := envoyadmin.Recent(path)
			past <- events
			if errors.Is(err, fs.ErrNotExist) {
				return nil, fmt.Errorf("there is no %s; name another by --envoy-log", path)
			}
			unreadable := ""
			if err != nil && !errors.Is(err, fs.ErrPermission) {
				unreadable = err.Error()
			}
			return func(l *looking) { l.logErr = unreadable }, err
		}}
}

// askEnvoy makes a View by one look.
func (l *looking) askEnvoy(past <-chan []envoyadmin.Logged) question {
	s, brief := l.Seen.Settings, l.brief
	return question{[]symptom.Source{symptom.FromEnvoy, symptom.FromClusters}, 7500 * time.Millisecond,
		func(ctx context.Context) (func(*looking), error) {
			client, err := envoyadmin.New(s.EnvoyAdmin)
			if err != nil {
				return nil, fmt.Errorf("%w: --envoy-admin: %w", ErrSettings, err)
			}
			defer client.Close()
			var byRoot atomic.Bool
			client.Trust = trust(s.ProxyUser, &byRoot)
			if proxyIDs(s.ProxyUser, l.vm.userIDs).Err != nil && !traces(s.StateDir) {
				// An Envoy that somebody set up by hand, as a user of his own. What it says is only told.
				client.Trust = func(net.Conn) error { return nil }
			}
			options := envoywatch.Options{
				Admin: client, LogPath: s.EnvoyLog, Unit: envoywatch.Unit, Probe: envoywatch.Probe,
				Foreign: answersAsEnvoy(s.EnvoyAdmin),
			}
			var events []envoyadmin.Logged
			select {
			case events = <-past:
			case <-time.After(time.Second):
			}
			var v envoywatch.Looked
			if brief {
				v.View, err = envoywatch.LookAtListeners(ctx, options)
			} else {
				v, err = envoywatch.Look(ctx, options, events)
			}
			return func(l *looking) {
				l.Seen.Envoy, l.Seen.AdminOfRoot = v.View, byRoot.Load()
				l.moved = l.moved || err == nil && !errors.Is(v.Err, envoyadmin.ErrTimeout)
				switch {
				case errors.Is(v.Err, envoyadmin.ErrRefused):
					l.unseen[symptom.FromEnvoy] = "it is not running"
				case v.Err != nil:
					l.unseen[symptom.FromEnvoy] = whyNot(v.Err)
				}
				if !v.Clusters {
					l.unseen[symptom.FromClusters] = "no usable answer"
				} else {
					delete(l.unseen, symptom.FromClusters)
				}
			}, err
		}}
}

// traces says whether something of the agent's is, or was, on this VM.
func traces(stateDir string) bool {
	for _, path := range []string{stateDir, server.Dir(),
		filepath.Join(layout.Archive.UnitDir, systemd.AgentUnit),
		filepath.Join(layout.Packages.UnitDir, systemd.AgentUnit)} {
		if _, err := os.Lstat(path); err == nil && path != "" {
			return true
		}
	}
	return false
}

// askMetadata asks for the attribute, and who the VM is.
func (l *looking) askMetadata() question {
	s := l.Seen.Settings
	return question{[]symptom.Source{symptom.FromMetadata}, 5 * time.Second,
		func(ctx context.Context) (func(*looking), error) {
			var brakes sync.WaitGroup // beside the rest: a server that fails is waited for once
			var braked brake
			var brakeErr error
			brakes.Go(func() { braked, brakeErr = readBrake(ctx, keptHere(s.StateDir)) })
			in := attributeInForce{Config: attribute.Default()}
			var err error
			if s.Config != "" {
				var c *attribute.Config
				if c, err = readConfig(s.Config); err != nil {
					return nil, err
				}
				in.Known, in.Config, in.Serial = true, *c, 1
			} else {
				in, err = readAttribute(ctx)
			}
			var hung error
			if err != nil && ctx.Err() != nil {
				hung, err, in.Source = errors.New("it gives no answer within seconds"), errNoAnswer, nil
			}
			var self Self
			if err == nil {
				self, err = readSelf(ctx)
			}
			brakes.Wait()
			if s.Config == "" {
				err = cmp.Or(err, brakeErr)
			}
			if s.Config != "" && isAway(err) {
				err = nil // a machine that has no metadata server, and says so
			}
			return func(l *looking) {
				l.moved = l.moved || hung == nil
				l.hung = hung
				l.Seen.Attribute = in
				l.Seen.Account, l.Seen.VM, l.Seen.Clock = self.Account, self.VM, self.Clock
				l.braked = &braked
			}, err
		}}
}

// keptHere is the brake that an earlier run kept, as far as it can be used: the metadata server may
// know better.
func keptHere(dir string) keptBrake {
	kept, _ := loadBrake(dir, identity.Here(""))
	return kept
}

// isAway says that there is nobody who would answer.
func isAway(err error) bool {
	var of *metadata.Error
	return errors.As(err, &of) && of.Code == 0
}

// readAttribute reads the metadata server's attribute. The error is that it did not tell.
func readAttribute(ctx context.Context) (attributeInForce, error) {
	look := metadata.ReadAttribute(ctx)
	in := attributeInForce{Config: attribute.Default(), Err: look.Err}
	if look.Err == nil {
		in.Known, in.Config, in.Serial, in.text = true, look.Config, 1, look.Text
		in.Good = &goodAttribute{Config: look.Config, Text: look.Text, Read: time.Now()}
		return in, nil
	}
	var source *metadata.Error
	if errors.As(look.Err, &source) {
		in.Err, in.Source = nil, look.Err
		return in, look.Err
	}
	return in, nil
}

// readSelf asks who the VM is. Not for its guest attributes: each question counts against what the
// agent may write.
func readSelf(ctx context.Context) (self Self, err error) {
	var vm metadata.VM
	var account metadata.Account
	var clockErr, accountErr error
	var asked sync.WaitGroup // all at once: a slow server is waited for once
	asked.Go(func() { vm, err = metadata.ReadVM(ctx) })
	asked.Go(func() { self.Clock, clockErr = metadata.Clock(ctx) })
	asked.Go(func() { account, accountErr = metadata.ReadAccount(ctx) })
	asked.Wait()
	if err != nil {
		return Self{}, err
	}
	self.VM = symptom.VM(vm)
	if accountErr == nil { // without it a next step lacks a name
		self.Account = &account
	}
	return self, clockErr
}

// askState reads what bootstrap and earlier runs of the daemon left.
func (l *looking) askState() question {
	dir := l.Seen.Settings.StateDir
	return question{[]symptom.Source{symptom.FromState}, 2 * time.Second,
		func(context.Context) (func(*looking), error) {
			state, err := l.vm.progress()
			braked := keptHere(dir).brake(true)
			kept, _ := loadKept(dir) // without it what is wanted may not be known
			there := traces(dir)
			killed, _ := killedAt(server.Dir(), time.Now())
			return func(l *looking) {
				l.Seen.Bootstrap, l.kept, l.Seen.Killed = state, kept, killed
				l.keptBrake = braked
				l.installed = l.installed || there
			}, err
		}}
}

const (
	// daemonAgain is how soon the daemon's socket is asked again, and daemonComes for how long, while
	// it is only just starting.
	daemonAgain = 100 * time.Millisecond
	daemonComes = 3 * time.Second
)

// askDaemon asks the daemon's socket. One that is being restarted, by an upgrade, say, is waited
// for.
func (l *looking) askDaemon() question {
	return question{[]symptom.Source{symptom.FromAgent}, 5500 * time.Millisecond,
		func(ctx context.Context) (func(*looking), error) {
			began := time.Now()
			for {
				s, err := daemonStatus(ctx)
				starts := err == nil && s.Mode == "starting" ||
					errors.Is(err, server.ErrNoAgent) && restarts(ctx)
				if starts && time.Since(began) < daemonComes && sleep(ctx, daemonAgain) {
					continue
				}
				silent := ""
				if errors.Is(err, server.ErrSilent) {
					silent = err.Error()
				}
				return func(l *looking) {
					l.Daemon, l.silent = s, silent
					l.moved = l.moved || err == nil
					l.installed = l.installed || err == nil || silent != ""
				}, err
			}
		}}
}

func daemonStatus(ctx context.Context) (*status.Status, error) {
	body, err := server.Dial(server.Dir()).Get(ctx, "/status")
	if err != nil {
		return nil, err
	}
	var s status.Status
	if err := json.Unmarshal(body, &s); err != nil {
		return nil, fmt.Errorf("read the agent's answer: %w", err)
	}
	return &s, nil
}

// restarts says whether systemd is about to start the daemon, or has just done so.
func restarts(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	unit, err := systemd.UnitState(ctx, systemd.AgentUnit)
	if err != nil {
		return false
	}
	if unit.Active == "active" || unit.Active == "activating" || unit.Active == "deactivating" ||
		unit.Active == "reloading" {
		return true
	}
	job, err := systemd.Job(ctx, systemd.AgentUnit)
	return err == nil && job != "" && job != "stop"
}

// askUnits asks systemd whether the agent is installed, and bootstrap to come. Without systemd
// there is nothing to say.
func (l *looking) askUnits() question {
	return question{nil, 3 * time.Second, func(ctx context.Context) (func(*looking), error) {
		_, err := systemd.UnitState(ctx, systemd.AgentUnit)
		installed := err == nil
		boot, err := systemd.UnitState(ctx, systemd.BootstrapUnit)
		return func(l *looking) {
			l.installed = l.installed || installed
			l.Seen.Awaited = err == nil && boot.Enabled
		}, nil
	}}
}
