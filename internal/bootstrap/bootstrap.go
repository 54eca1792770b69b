package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/internal/redaction"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// What is installed, and where.
const (
	AgentBinary = "/usr/local/bin/service-proxy-agent"
	EnvoyBinary = "/usr/local/bin/envoy"
	EnvoyConfig = "/etc/service-proxy-agent/envoy.json" // 0640 root:envoy
	EnvoyUser   = "envoy"
	AgentUser   = "service-proxy-agent"

	libDir      = "/usr/local/lib/service-proxy-agent"
	archiveDir  = libDir + "/archive"  // the Envoy that came with the agent, if one did
	previousDir = libDir + "/previous" // the binaries that the last upgrade has replaced, for Rollback

	rolledBackFile = libDir + "/rolled-back.json" // what Rollback has taken out

	lockFile    = "/run/service-proxy-bootstrap.lock"
	installLock = "/run/service-proxy-install.lock"
	budgetFile  = progress.RuntimeDir + "/guest-attributes.budget" // the daemon's: guestattr.Options.Budget
	restartFile = "/run/service-proxy-envoy-restart"               // Envoy has to be restarted; gone after a reboot, when it was anyway
)

// The steps, as State.Step and the failure lines name them.
const (
	StepInstall   = "install the agent"
	StepAttribute = "read the attribute"
	StepVM        = "read the VM's metadata"
	StepUnits     = "install units and users"
	StepPackages  = "install packages"
	StepEnvoy     = "install Envoy"
	StepLogs      = "make the log files"
	StepConfigure = "configure Envoy"
	StepStart     = "start Envoy"
)

// Options are how to run. The zero value is right on a VM.
type Options struct {
	Log *zap.Logger // nil: silent
	// Config is the attribute's JSON in a file instead of the metadata server's, or "none" for the defaults.
	Config string
	// Root is what all paths are beneath; "" for /.
	Root string

	// Tests replace how commands are run, and where objects are.
	command func(ctx context.Context, cmd *exec.Cmd) error
	storage string // Cloud Storage's host
}

// Failure is why a step did not succeed.
type Failure struct {
	Step string
	Err  error
	// Advice is what a person should do; "" where waiting is all.
	Advice string
	// Permanent: trying again is of no use until somebody mends the cause.
	Permanent bool
}

func (f *Failure) Error() string {
	text := f.Step + ": " + f.Err.Error()
	if f.Advice != "" {
		text += "; " + f.Advice
	}
	return text
}

func (f *Failure) Unwrap() error { return f.Err }

type bootstrapper struct {
	Options
	state progress.State
	pub   *publisher

	again  bool     // this VM was finished before: a look at it is told by what it changes, not step by step
	masked []string // units that enable found masked: they are not started either
}

func newBootstrapper(opts Options) *bootstrapper {
	if opts.Log == nil {
		opts.Log = zap.NewNop()
	}
	if opts.command == nil {
		opts.command = func(_ context.Context, cmd *exec.Cmd) error { return cmd.Run() }
	}
	if opts.storage == "" {
		opts.storage = cloudStorage
	}
	return &bootstrapper{Options: opts}
}

// path is name beneath the root.
func (b *bootstrapper) path(name string) string { return filepath.Join(b.Root, name) }

// Run brings the VM to where the attribute wants it, and tries until it has or ctx ends. It returns nil when all is done, and an error when ctx has ended
// or another run holds the lock. What fails is in the state and the log, not in the error.
func Run(ctx context.Context, opts Options) error {
	b := newBootstrapper(opts)
	unlock, err := b.lock()
	if err != nil {
		return err
	}
	defer unlock()
	state, err := progress.Read(b.path(progress.StateDir))
	if err != nil {
		b.Log.Warn("starting without history", zap.Error(err)) // losing it loses nothing but history
	}
	b.state = state
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

// backoff is the pause after a failed attempt: 2, 4, 8… s, at most a minute for what may pass, and five for what someone must mend (each
// attempt may download an archive). A change of the attribute wakes us anyway.
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

// waitForRetry returns when it is time, when the daemon asks, or when the attribute is another than the failed attempt saw.
func (b *bootstrapper) waitForRetry(ctx context.Context, wait time.Duration, tried metadata.Attribute) {
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	if b.Config == "" {
		go metadata.Watch(ctx, func(a metadata.Attribute) {
			if string(a.Text) != string(tried.Text) || a.Err == nil && tried.Err != nil {
				cancel()
			}
		})
	}
	for ctx.Err() == nil {
		if _, err := os.Lstat(b.path(filepath.Join(progress.RuntimeDir, progress.RequestFile))); err == nil {
			return
		}
		if !sleep(ctx, time.Second) {
			return
		}
	}
}

func (b *bootstrapper) takeRequest() {
	request := b.path(filepath.Join(progress.RuntimeDir, progress.RequestFile))
	if _, err := os.Lstat(request); err != nil {
		return
	}
	b.Log.Info("taking up the agent's request")
	if err := os.RemoveAll(request); err != nil { // all: the daemon's user may have made a folder of it
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

// attempt goes through the steps. Each looks first and changes what differs.
func (b *bootstrapper) attempt(ctx context.Context, attr metadata.Attribute) *Failure {
	b.begin(StepAttribute)
	if attr.Err != nil {
		return attributeFailure(attr.Err)
	}
	cfg := attr.Config

	b.begin(StepVM)
	vm, err := readVM(ctx)
	if err != nil {
		return &Failure{Step: StepVM, Err: err}
	}
	b.begin(StepUnits)
	if failure := b.installUnits(ctx); failure != nil {
		return failure
	}
	b.begin(StepPackages)
	if failure := b.installPackages(ctx); failure != nil {
		return failure
	}
	b.begin(StepEnvoy)
	wish, failure := b.installEnvoy(ctx, cfg)
	if failure != nil {
		return failure
	}
	b.begin(StepLogs)
	if failure := b.makeLogs(ctx, cfg); failure != nil {
		return failure
	}
	b.begin(StepConfigure)
	if failure := b.configureEnvoy(ctx, cfg, vm); failure != nil {
		return failure
	}
	b.begin(StepStart)
	if failure := b.startEnvoy(ctx); failure != nil {
		return failure
	}
	return wish
}

func attributeFailure(err error) *Failure {
	f := &Failure{Step: StepAttribute, Err: err}
	var keyErr *attribute.KeyError
	switch {
	case errors.As(err, &keyErr):
		f.Permanent, f.Advice = true, "correct it in the VM's metadata"
	case errors.Is(err, metadata.ErrNoAttribute), errors.Is(err, attribute.ErrAnthos):
		f.Permanent = true
	}
	return f
}

// diskFailure is a step's failure on our own files, with what to do.
func diskFailure(step string, err error) *Failure {
	f := &Failure{Step: step, Err: err}
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		f.Advice = "make room on that disk"
	case errors.Is(err, syscall.EROFS):
		f.Advice = "make that folder writable, or use an image where it is"
	case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
		f.Advice = "run as root"
	}
	return f
}

// begin, fail, finish and say are the only places where the state changes.
func (b *bootstrapper) begin(step string) {
	if b.state.Status != progress.Failed || b.state.Attempt == 1 { // FAILED stays while retries go through the steps
		b.state.Status = progress.InProgress
	}
	if b.state.Attempt == 1 && !b.again {
		b.say("INFO", step)
	}
	b.state.Step = step
	b.save()
}

func (b *bootstrapper) fail(f *Failure, wait time.Duration) {
	now := time.Now()
	text := progress.OneLine(f.Error())
	if text != b.state.Failure || b.state.Status != progress.Failed {
		b.say("ERROR", text)
	}
	b.state.Status, b.state.Step, b.state.Failure, b.state.FailureTime = progress.Failed, f.Step, text, now
	b.state.Permanent, b.state.Retry = f.Permanent, now.Add(wait)
	b.state.Next = "it is tried again by itself, at least each minute"
	if f.Permanent {
		b.state.Next = "it is tried again when the attribute changes, and at least every 5 minutes"
	}
	b.save()
	b.Log.Error("bootstrap failed", zap.String("step", f.Step), zap.Error(f), zap.Duration("retry", wait))
}

func (b *bootstrapper) finish(attr metadata.Attribute) {
	b.state.AttributeSum = progress.Sum(string(attr.Text))
	b.state.Status, b.state.Step, b.state.Next, b.state.Retry, b.state.Permanent = progress.Finished, "", "", time.Time{}, false
	b.say("INFO", "finished: Envoy "+b.state.EnvoyVersion+" runs")
	b.save()
}

// say adds a line to the story, and to our own log.
func (b *bootstrapper) say(severity, text string) {
	b.state.Tell(time.Now(), severity, text)
	if severity != "ERROR" { // fail logs it with its fields
		b.Log.Info("bootstrap", zap.String("what", text))
	}
}

// save writes the state down. A full disk must not stop bootstrap, which may be about to make room: then it is published alone.
func (b *bootstrapper) save() {
	b.state.Time = time.Now().UTC()
	err := os.MkdirAll(b.path(progress.StateDir), 0o700)
	if err == nil {
		err = progress.Write(b.path(progress.StateDir), b.state)
	}
	if b.pub != nil {
		b.pub.publish(b.state, err != nil)
	}
	if err != nil {
		b.Log.Warn("cannot write the state", zap.Error(err))
	}
}

// lock keeps a second run out until the first has ended. It does not wait: the first may be trying
// for days.
func (b *bootstrapper) lock() (unlock func(), err error) {
	f, err := os.OpenFile(b.path(lockFile), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("take bootstrap's lock: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("take bootstrap's lock %q: another bootstrap is running; see systemctl status %s", lockFile, systemd.BootstrapUnit)
	}
	return func() { f.Close() }, nil
}

// exec runs a command and returns what it printed. An error holds the last lines of that, where commands say what was wrong.
func (b *bootstrapper) exec(ctx context.Context, limit time.Duration, name string, args ...string) (string, error) {
	return b.execAs(ctx, limit, nil, name, args...)
}

func (b *bootstrapper) execAs(ctx context.Context, limit time.Duration, as *syscall.Credential, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	out := &tail{}
	cmd.Stdout, cmd.Stderr = out, out
	cmd.WaitDelay = 2 * time.Second
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: as}
	err := b.command(ctx, cmd)
	if ctx.Err() != nil && err != nil {
		err = fmt.Errorf("no end after %v", limit)
	}
	if err != nil {
		return out.String(), fmt.Errorf("run %s: %w", filepath.Base(name), err)
	}
	return out.String(), nil
}

// tail keeps the last bytes written.
type tail struct {
	buf []byte
	cut bool
}

const maxTail = 16 << 10

func (t *tail) Write(p []byte) (int, error) {
	t.buf = append(t.buf, p...)
	if len(t.buf) > maxTail {
		t.buf, t.cut = append(t.buf[:0], t.buf[len(t.buf)-maxTail:]...), true
	}
	return len(p), nil
}

// String is without a line whose beginning was not kept: it may be a quoted value's second half,
// which package redaction could not tell from other text.
func (t *tail) String() string {
	text := string(t.buf)
	if t.cut {
		_, text, _ = strings.Cut(text, "\n")
	}
	return text
}

// publisher writes the status itself where no daemon does.
type publisher struct {
	writer *guestattr.Writer
	cancel context.CancelFunc
	ended  chan struct{}
	ctx    context.Context
	log    *zap.Logger
}

func newPublisher(ctx context.Context, log *zap.Logger) *publisher {
	return &publisher{ctx: ctx, log: log}
}

// publish sets the guest attributes when the daemon is not there to do it, or cannot know (unread).
func (p *publisher) publish(state progress.State, unread bool) {
	if !unread && daemonRuns() {
		p.stop() // or what it has left to write would come after the daemon's
		return
	}
	if p.writer == nil {
		ctx, cancel := context.WithCancel(p.ctx)
		opts := guestattr.Options{Log: p.log}
		if haveRuntimeDir() {
			opts.Budget = budgetFile // the daemon may be about to write, or this be the next try
		}
		p.writer, p.cancel, p.ended = guestattr.New(opts), cancel, make(chan struct{})
		go func() {
			defer close(p.ended)
			p.writer.Run(ctx)
		}()
	}
	p.writer.Set(guestattr.BootstrapStatus, state.Status)
	if line := state.FailureLine(); line != "" {
		p.writer.Set(guestattr.BootstrapLastFailure, line)
	}
}

// haveRuntimeDir says whether the daemon's folder is there. Before its first start this makes it, where systemd gives it to
// the daemon's user then (RuntimeDirectory=, systemd.exec(5)); sd_booted(3) tells whether there is a systemd.
func haveRuntimeDir() bool {
	if _, err := os.Lstat(progress.RuntimeDir); err == nil {
		return true
	}
	_, err := os.Lstat("/run/systemd/system")
	return err == nil && os.Mkdir(progress.RuntimeDir, 0o755) == nil
}

// end waits for the last value to be written, which within the budget takes milliseconds and past it may take a token's 20 s.
func (p *publisher) end() {
	if p.writer == nil {
		return
	}
	ctx, stop := context.WithTimeout(p.ctx, 25*time.Second)
	defer stop()
	if err := p.writer.Flush(ctx); err != nil {
		p.log.Warn("the status is not published", zap.Error(err))
	}
	p.stop()
}

func (p *publisher) stop() {
	if p.writer != nil {
		p.cancel()
		<-p.ended
		p.writer = nil
	}
}

// daemonRuns asks the daemon's socket.
func daemonRuns() bool {
	conn, err := net.DialTimeout("unix", filepath.Join(progress.RuntimeDir, "agent.sock"), time.Second)
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// installUnits writes the units, makes the users and folders, and enables what starts at boot.
func (b *bootstrapper) installUnits(ctx context.Context) *Failure {
	changed, err := systemd.Install(b.Root + "/")
	if err != nil {
		return diskFailure(StepUnits, err)
	}
	if len(changed) > 0 {
		b.say("INFO", fmt.Sprintf("installed %d units and their files", len(changed)))
	}
	missing := b.missingUsers()
	if err := b.makeUsers(ctx); err != nil {
		return diskFailure(StepUnits, err)
	}
	if len(missing) > 0 {
		b.state.MadeUsers = missing
		b.say("INFO", "made users "+strings.Join(missing, ", "))
		b.save()
	}
	if out, err := b.exec(ctx, time.Minute, "systemd-tmpfiles", "--create", b.path(systemd.TmpfilesDir+"/service-proxy-agent.conf")); err != nil {
		return diskFailure(StepUnits, said(err, out))
	}
	if len(changed) > 0 {
		if out, err := b.exec(ctx, time.Minute, "systemctl", "daemon-reload"); err != nil {
			return &Failure{Step: StepUnits, Err: said(err, out)}
		}
	}
	return b.enable(ctx, systemd.AgentUnit, systemd.BootstrapUnit, systemd.BootstrapPath, systemd.ReadyPath, systemd.RotateTimer)
}

// enable enables the units that are not, but for those that the administrator has masked: in one call, as each has systemd read all its units again.
func (b *bootstrapper) enable(ctx context.Context, units ...string) *Failure {
	args := []string{"enable"}
	for _, unit := range units {
		out, err := b.exec(ctx, time.Minute, "systemctl", "is-enabled", unit) // its exit code says no more than its word
		switch strings.TrimSpace(out) {
		case "enabled":
		case "masked", "masked-runtime":
			b.masked = append(b.masked, unit)
			b.Log.Warn("leaving a masked unit alone", zap.String("unit", unit))
		case "":
			return &Failure{Step: StepUnits, Err: fmt.Errorf("ask whether %s is enabled: %w", unit, err)}
		default:
			args = append(args, unit)
		}
	}
	if len(args) == 1 {
		return nil
	}
	if out, err := b.exec(ctx, time.Minute, "systemctl", args...); err != nil {
		return &Failure{Step: StepUnits, Err: said(err, out)}
	}
	return nil
}

// missingUsers are those of ours that the VM does not have. Beneath another root there are none to ask.
func (b *bootstrapper) missingUsers() []string {
	var missing []string
	for _, name := range []string{AgentUser, EnvoyUser} {
		if _, _, err := lookup(name); b.Root == "" && err != nil {
			missing = append(missing, name)
		}
	}
	return missing
}

// makeUsers makes the users that are missing, by systemd-sysusers where it is there.
func (b *bootstrapper) makeUsers(ctx context.Context) error {
	if out, err := b.exec(ctx, time.Minute, "systemd-sysusers", b.path(systemd.SysusersDir+"/service-proxy-agent.conf")); err == nil {
		return nil
	} else if !errors.Is(err, exec.ErrNotFound) {
		return said(err, out)
	}
	for _, user := range []string{AgentUser, EnvoyUser} {
		if _, err := b.exec(ctx, time.Minute, "getent", "passwd", user); err == nil {
			continue
		}
		out, err := b.exec(ctx, time.Minute, "useradd", "--system", "--user-group", "--no-create-home", "--home-dir", "/nonexistent", "--shell", "/usr/sbin/nologin", user)
		if err != nil {
			return said(err, out)
		}
	}
	return nil
}

// said adds a command's own words, its last line, to its error.
func said(err error, out string) error {
	if last := lastLine(out); last != "" {
		return fmt.Errorf("%w: %s", err, last)
	}
	return err
}

// lastLine is what may be told of the last line that is not empty: Envoy quotes its configuration.
func lastLine(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return redaction.Text(lines[len(lines)-1])
}
