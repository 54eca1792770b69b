package bootstrap

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"syscall"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/layout"
	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// The steps, as State.Step and the failure lines name them.
const (
	StepInstall   = "install the agent" // Install's alone
	StepSystem    = "look at the system"
	StepAttribute = "read the attribute"
	StepVM        = "read the VM's metadata"
	StepUnits     = "install units and users"
	StepPackages  = "install packages"
	StepEnvoy     = "install Envoy"
	StepLogs      = "make the log files"
	StepConfigure = "configure Envoy"
	StepStart     = "start Envoy"
)

// steps are the way from a plain VM to a node of the mesh, in this order. Each looks first and
// changes what differs, so that every attempt goes through all of them.
//
// What fails is tried again from the first step: after 2, 4, 8 s and so on, within a minute at
// most. What fails for good, until somebody mends it, is tried again when the attribute changes,
// and within 5 minutes. The last column says what that is.
var steps = []step{
	// name, what it does, what its errors mean                what fails for good
	{StepSystem, (*attempt).checkSystem, ofOthers},         // the agent cannot be on it
	{StepAttribute, (*attempt).takeAttribute, ofAttribute}, // none, malformed, or Anthos'
	{StepVM, (*attempt).askVM, ofOthers},                   // –
	{StepUnits, (*attempt).installWantedUnits, ofDisk},     // –
	{StepPackages, (*attempt).installPackages, ofOthers},   // –
	{StepEnvoy, (*attempt).installWantedEnvoy, ofDisk},     // no source, or all of them refused
	{StepLogs, (*attempt).makeWantedLogs, ofDisk},          // –
	{StepConfigure, (*attempt).writeConfiguration, ofDisk}, // Envoy refuses it
	{StepStart, (*attempt).startEnvoy, ofOthers},           // –
}

type step struct {
	name  string
	do    func(*attempt, context.Context) error
	means meaning // of an error that does not say it itself, as a *Failure does
}

// attempt is one go through the steps.
type attempt struct {
	*bootstrapper
	attr metadata.Attribute // read just before
	node VM                 // by askVM
	// why it is not known whose the disk is, or why another VM's state could not be discarded
	unclaimed error
}

// attempt brings the VM to where the attribute wants it, or fails. A failure with which the VM goes
// on is returned when the steps after it are done.
func (b *bootstrapper) attempt(ctx context.Context, attr metadata.Attribute) *Failure {
	a := &attempt{bootstrapper: b, attr: attr}
	var later *Failure
	for _, s := range steps {
		b.begin(s.name)
		failure := failed(s.name, s.do(a, ctx), s.means)
		if failure != nil && !failure.goesOn {
			return failure
		}
		later = cmp.Or(failure, later)
	}
	return later
}

// takeAttribute also finds out whose the disk is, wherever the metadata server answers: a clone
// whose attribute cannot be used is no less of a clone.
func (a *attempt) takeAttribute(ctx context.Context) error {
	if !errors.As(a.attr.Err, new(*metadata.Error)) {
		a.unclaimed = a.claim(ctx)
	}
	return a.attr.Err
}

func (a *attempt) askVM(ctx context.Context) (err error) {
	if a.unclaimed != nil {
		return a.unclaimed
	}
	a.node, err = readVM(ctx) // the metadata server may not answer yet
	return err
}

// installWantedUnits has those of a package run, too, that an archive's installation starts: after
// `bootstrap --remove` nobody else does.
func (a *attempt) installWantedUnits(ctx context.Context) error {
	if err := a.installUnits(ctx); err != nil || !layout.Here.Packaged {
		return err
	}
	args := []string{"start", "--no-block"}
	for _, unit := range []string{systemd.BootstrapPath, systemd.ReadyPath, systemd.RotateTimer} {
		if !slices.Contains(a.masked, unit) && !slices.Contains(a.disabled, unit) {
			args = append(args, unit)
		}
	}
	if len(args) == 2 {
		return nil
	}
	if err := a.systemctl(ctx, time.Minute, args...); err != nil {
		return &Failure{Err: err} // no file's of ours
	}
	return nil
}

func (a *attempt) installWantedEnvoy(ctx context.Context) error {
	err := a.installEnvoy(ctx, a.attr.Config)
	if err == nil {
		a.label(ctx, EnvoyBinary)
	}
	return err
}

func (a *attempt) makeWantedLogs(ctx context.Context) error {
	return a.makeLogs(ctx, a.attr.Config)
}

func (a *attempt) writeConfiguration(ctx context.Context) error {
	return a.configureEnvoy(ctx, a.attr.Config, a.node)
}

// Failure is why a step did not succeed.
type Failure struct {
	Step string
	Err  error
	// Advice is what a person should do; "" where waiting is all.
	Advice string
	// Permanent: trying again is of no use until somebody mends the cause.
	Permanent bool

	goesOn bool // without this step: the VM has what the next ones need
}

func (f *Failure) Error() string {
	text := f.Step + ": " + f.Err.Error()
	if f.Advice != "" {
		text += "; " + f.Advice
	}
	return text
}

func (f *Failure) Unwrap() error { return f.Err }

// A meaning says of a step's error what a person should do, and whether trying again is of no use
// until that is done.
type meaning func(error) (advice string, permanent bool)

// failed is the failure of a step by this error, nil by none. A step that knows better than its
// meaning what to do returns a *Failure itself.
func failed(step string, err error, means meaning) *Failure {
	if err == nil {
		return nil
	}
	var f *Failure
	if !errors.As(err, &f) {
		f = &Failure{Err: err}
		f.Advice, f.Permanent = means(err)
	}
	f.Step = cmp.Or(f.Step, step)
	return f
}

// ofOthers: the error is not our own files', so that its errno says nothing about them.
func ofOthers(error) (advice string, permanent bool) { return "", false }

func ofAttribute(err error) (advice string, permanent bool) {
	var key *attribute.KeyError
	switch {
	case errors.As(err, &key):
		return "correct it in the VM's metadata", true
	case errors.Is(err, metadata.ErrNoAttribute), errors.Is(err, attribute.ErrAnthos):
		return "", true
	}
	return "", false
}

// ofDisk: the error may be our own files'.
func ofDisk(err error) (advice string, permanent bool) {
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return "make room on that disk", false
	case errors.Is(err, syscall.EROFS):
		return "make that folder writable, or use an image where it is", false
	case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
		return "run as root", false
	}
	return "", false
}
