package bootstrap

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/identity"
	"github.com/service-proxy-agent/service-proxy-agent/internal/layout"
	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/internal/neighbour"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/internal/system"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// What is installed, and where, beside what internal/layout says.
const (
	EnvoyBinary = layout.Envoy
	EnvoyConfig = "/etc/service-proxy-agent/envoy.json" // 0640 root:envoy
	EnvoyUser   = "envoy"
	AgentUser   = "service-proxy-agent"

	archiveDir = layout.KeptDir + "/archive"
	// What the last upgrade has replaced, for Rollback, and what that has taken out.
	previousDir    = layout.KeptDir + "/previous"
	rolledBackFile = layout.KeptDir + "/rolled-back.json"

	lockFile    = "/run/service-proxy-bootstrap.lock"
	installLock = "/run/service-proxy-install.lock"
	requestFile = progress.RuntimeDir + "/" + progress.RequestFile
	// The daemon's, too: guestattr.Options.Budget.
	budgetFile = progress.RuntimeDir + "/guest-attributes.budget"
	// Envoy has to be restarted. It is gone after a reboot, when Envoy was restarted anyway.
	restartFile = "/run/service-proxy-envoy-restart"
	// What Envoy's unit was started with is another now, as its text says: the next Envoy cannot take
	// over from the one that runs.
	unitChangedFile = "/run/service-proxy-envoy-unit-changed"
)

// Options are how to run. The zero value is right on a VM.
type Options struct {
	Log *zap.Logger // nil: silent
	// Config is the attribute's JSON in a file instead of the metadata server's, or "none" for the
	// defaults.
	Config string
	// Root is what all paths are beneath; "" for /.
	Root string

	// KeepState has Remove leave what a package manager's remove leaves, for its purge: state,
	// configuration, logs and users, and which units are enabled.
	KeepState bool

	// LetOut has the rules that are in let a user's traffic out, and Adopt has the next daemon take
	// them for its own: what a take-over needs of those who know the rules. nil: nothing.
	LetOut func(ctx context.Context, uid uint32) (changed []string, err error)
	Adopt  func() error

	// Tests replace how commands are run, where objects are, and which processes there are.
	command   func(ctx context.Context, cmd *exec.Cmd) error
	storage   string // Cloud Storage's host
	processes func(ports []uint16, programs ...string) ([]neighbour.Process, error)
	// look sees how the machine is.
	look func(ctx context.Context) system.System
}

type bootstrapper struct {
	Options
	vm    identity.VM // its id is known once the disk is ours (claim)
	state progress.State
	pub   *publisher

	// again: this VM was finished before. A look at it is told by what it changes, not step by step.
	again bool
	// masked are units that enable found masked: they are not started either.
	masked []string
	// disabled are those of a package that enable found disabled, and left so.
	disabled []string
}

func newBootstrapper(opts Options) *bootstrapper {
	if opts.Log == nil {
		opts.Log = zap.NewNop()
	}
	if opts.command == nil {
		opts.command = func(_ context.Context, cmd *exec.Cmd) error { return cmd.Run() }
	}
	if opts.processes == nil {
		opts.processes = neighbour.Processes
		if opts.Root != "" {
			opts.processes = func([]uint16, ...string) ([]neighbour.Process, error) { return nil, nil }
		}
	}
	if opts.storage == "" {
		opts.storage = cloudStorage
	}
	b := &bootstrapper{Options: opts, vm: identity.Here(opts.Root)}
	if b.look == nil {
		b.look = func(ctx context.Context) system.System { return b.lookAt(ctx) }
	}
	return b
}

// path is name beneath the root.
func (b *bootstrapper) path(name string) string { return filepath.Join(b.Root, name) }

// Run brings the VM to where the attribute wants it, and tries until it has or ctx ends. It returns
// nil when all is done, and an error when ctx has ended or another run holds the lock. What fails
// is in the state and the log, not in the error.
func Run(ctx context.Context, opts Options) error {
	b := newBootstrapper(opts)
	unlock, err := b.lock()
	if err != nil {
		return err
	}
	defer unlock()
	b.readState()
	b.removeLeftovers()
	b.pub = newPublisher(ctx, b.Log)
	defer b.pub.end()
	b.again = b.state.Status == progress.Finished
	b.state.Attempt, b.state.Retry, b.state.Next, b.state.Permanent = 0, time.Time{}, "", false

	for {
		b.takeRequest()
		b.state.Attempt++
		attr := b.readAttribute(ctx)
		failure := b.attempt(ctx, attr)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if failure == nil {
			b.finish(attr)
			return nil
		}
		wait := backoff(b.state.Attempt, failure.Permanent)
		b.fail(failure, wait)
		b.waitForRetry(ctx, wait, attr)
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
}

// backoff is the pause after a failed attempt: 2, 4, 8 s and so on, at most a minute for what may
// pass, and five for what someone must mend (each attempt may download an archive). A change of the
// attribute wakes us anyway.
func backoff(attempt int, permanent bool) time.Duration {
	most := time.Minute
	if permanent {
		most = 5 * time.Minute
	}
	wait := most
	if attempt < 9 {
		wait = min(most, time.Second<<attempt)
	}
	return wait + rand.N(wait/10) // a fleet that was started at once does not come back at once
}

// waitForRetry returns when it is time, when the daemon asks, or when the attribute is another than
// the failed attempt saw.
func (b *bootstrapper) waitForRetry(
	ctx context.Context, wait time.Duration, tried metadata.Attribute,
) {
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	if b.Config == "" {
		go metadata.Watch(ctx, nil, func(a metadata.Attribute) {
			if string(a.Text) != string(tried.Text) || a.Err == nil && tried.Err != nil {
				cancel()
			}
		})
	}
	for ctx.Err() == nil {
		if _, err := os.Lstat(b.path(requestFile)); err == nil {
			return
		}
		if !sleep(ctx, time.Second) {
			return
		}
	}
}

func (b *bootstrapper) takeRequest() {
	request := b.path(requestFile)
	if _, err := os.Lstat(request); err != nil {
		return
	}
	b.Log.Info("taking up the agent's request")
	// RemoveAll: the daemon's user may have made a folder of it.
	if err := os.RemoveAll(request); err != nil {
		b.Log.Warn("cannot remove the request; it will start bootstrap again", zap.Error(err))
	}
}

func (b *bootstrapper) readAttribute(ctx context.Context) metadata.Attribute {
	switch b.Config {
	case "":
		return metadata.ReadAttribute(ctx)
	case "none":
		return metadata.Attribute{Config: attribute.Default()}
	}
	text, err := os.ReadFile(b.Config)
	if err != nil {
		return metadata.Attribute{Err: fmt.Errorf("read --config: %w", err)}
	}
	a := metadata.Attribute{Text: text}
	a.Config, a.Err = attribute.Parse(text)
	return a
}

// lock keeps a second run out until the first has ended. It does not wait: the first may be trying
// for days.
func (b *bootstrapper) lock() (unlock func(), err error) {
	const flags = os.O_RDWR | os.O_CREATE | unix.O_NOFOLLOW | unix.O_CLOEXEC
	f, err := os.OpenFile(b.path(lockFile), flags, 0o600)
	if err != nil {
		return nil, fmt.Errorf("take bootstrap's lock: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("take bootstrap's lock %q: another bootstrap is running; "+
			"see systemctl status %s", lockFile, systemd.BootstrapUnit)
	}
	return func() { f.Close() }, nil
}
