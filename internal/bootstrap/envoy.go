package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/layout"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
)

func envoyAdvice() string {
	advice := fmt.Sprintf("give primary-source=gs://BUCKET/OBJECT.tgz in --service-proxy, "+
		"or install Envoy %v or later as %s", envoyadmin.Advised, EnvoyBinary)
	if layout.Here.Packaged {
		advice = "install the package " + envoyPackage + ", " + advice
	}
	return advice
}

// installEnvoy sees to a good binary at EnvoyBinary. A working one stays, unless it is ours and
// from another source than primary-source: then it gives way to that, and to nothing else. Where
// none works the sources are tried in turn: primary-source, secondary-source, what came with the
// agent. Where it cannot be told whether it works nothing is replaced: it may run the traffic.
func (b *bootstrapper) installEnvoy(ctx context.Context, cfg attribute.Config) error {
	b.removeTemps()
	version, err := b.envoyVersion(ctx, EnvoyBinary)
	switch {
	case err == nil:
		b.state.EnvoyVersion = version
		if err := b.replaceTheirs(ctx, cfg); err != nil {
			return err
		}
		return b.changeEnvoy(ctx, cfg)
	case errors.Is(err, errBinary): // it may be the administrator's
		return b.firstEnvoy(ctx, cfg, fmt.Sprintf("%s: %v", EnvoyBinary, err))
	case errors.Is(err, fs.ErrNotExist):
		return b.firstEnvoy(ctx, cfg, "")
	}
	return &Failure{Err: fmt.Errorf("%s: %w", EnvoyBinary, err),
		Advice: "it stays as it is; if this lasts, mend it, or remove it and another is installed"}
}

// replaceTheirs replaces the Envoy of an agent from which ours takes over, where there is another
// to be had: as at a first boot. Theirs is kept, and stays where there is none, or none works.
func (b *bootstrapper) replaceTheirs(ctx context.Context, cfg attribute.Config) error {
	h, err := b.readHandover()
	if err != nil || !h.under(handoverWanted, handoverTaking) || b.state.PrimarySum != "" {
		return err
	}
	sources, err := b.sources(cfg)
	if err != nil || !slices.ContainsFunc(sources, envoySource.exists) {
		return err
	}
	file := keptFile{Path: EnvoyBinary, Replaced: true}
	if !h.kept(EnvoyBinary) {
		if err := b.keep(file); err != nil {
			return err
		}
		h.note(file)
		if err := b.writeHandover(h); err != nil {
			return err
		}
	}
	got, refused, err := b.trySources(ctx, sources...)
	if err != nil {
		return err
	}
	if got.version == "" {
		b.say("WARNING", fmt.Sprintf("Envoy %s of the other agent stays: %s", b.state.EnvoyVersion,
			refused))
		return nil
	}
	b.noteInstalled(got, " in place of the other agent's")
	return nil
}

// changeEnvoy replaces a working Envoy of ours by that of another primary-source, or of a package
// that was upgraded. The VM goes on with what it has where that cannot be had.
func (b *bootstrapper) changeEnvoy(ctx context.Context, cfg attribute.Config) error {
	wanted, err := b.wantedEnvoy(cfg)
	if err != nil {
		return err
	}
	stays, err := b.wasRolledBack(ctx, wanted)
	if err != nil {
		return err
	}
	if stays || !wanted.exists() || b.state.PrimarySum == "" || wanted.isOf(b.state) {
		return nil
	}
	if wanted.along() { // an archive's may be the same one
		same, err := sameFile(wanted.place, b.path(EnvoyBinary))
		if err != nil {
			return err
		}
		if same {
			b.state.EnvoySource, b.state.PrimarySum = wanted.shown, wanted.sum
			return nil
		}
	}
	if b.state.Attempt == 1 {
		b.say("INFO", "installing Envoy from "+wanted.name+"; the one here is from "+b.state.EnvoySource)
	}
	got, refused, err := b.trySources(ctx, wanted)
	switch {
	case err != nil && ctx.Err() == nil:
		failure := failed(StepEnvoy, err, ofDisk)
		failure.goesOn = true
		return failure
	case err != nil:
		return err
	case got.version != "":
		b.state.PreviousSource, b.state.PreviousSum = b.state.EnvoySource, b.state.PrimarySum
		b.noteInstalled(got, "")
		return nil
	case wanted.name == primarySource && (secondary(cfg).isOf(b.state) || cameAlong(b.state)):
		b.noteFallback(refused.String()) // as at the first boot
		return nil
	}
	return &Failure{Err: errors.New(refused.String()), Permanent: refused.forGood, goesOn: true,
		Advice: fmt.Sprintf("Envoy %s from %s goes on meanwhile; mend that source",
			b.state.EnvoyVersion, b.state.EnvoySource)}
}

// firstEnvoy installs Envoy where none works. broken says why the one that is there does not; ""
// without one.
func (b *bootstrapper) firstEnvoy(ctx context.Context, cfg attribute.Config, broken string) error {
	sources, err := b.sources(cfg)
	if err != nil {
		return err
	}
	got, refused, err := b.trySources(ctx, sources...)
	if err != nil {
		return err
	}
	inPlaceOf := ""
	if broken != "" {
		refused.texts = slices.Insert(refused.texts, 0, broken)
		inPlaceOf = " in place of " + broken
	}
	if got.version != "" {
		b.noteInstalled(got, inPlaceOf)
		if cfg.PrimarySource != "" && got.name != primarySource {
			b.noteFallback(refused.String())
		}
		return nil
	}
	if len(refused.texts) == 0 {
		return &Failure{Err: errors.New("there is no Envoy: none on this VM, no primary-source, " +
			"and none came with the agent"), Advice: envoyAdvice(), Permanent: true}
	}
	failure := &Failure{Err: errors.New(refused.String()), Permanent: refused.forGood}
	switch {
	case refused.last == nil:
		failure.Advice = envoyAdvice()
	case errors.Is(refused.last, syscall.ENOSPC):
		failure.Advice = "make room on that disk"
	default:
		failure.Advice = "mend that source, or " + envoyAdvice()
	}
	return failure
}

// noteInstalled books what is at EnvoyBinary now.
func (b *bootstrapper) noteInstalled(got installed, inPlaceOf string) {
	b.state.EnvoyVersion, b.state.EnvoySource, b.state.PrimarySum = got.version, got.shown, got.sum
	b.say("INFO", fmt.Sprintf("installed Envoy %s from %s%s", got.version, got.shown, inPlaceOf))
}

// envoySource is where an Envoy may come from.
type envoySource struct {
	name  string // in messages
	place string // the URL of an archive; of archiveSource the binary's path
	shown string // place, as it may be shown
	sum   string // what stands for it in the state
}

const (
	primarySource   = "primary-source"
	secondarySource = "secondary-source"
	archiveSource   = "the agent's archive" // the Envoy that came with the agent
	// the same, with a package of its own
	packageSource = "the package " + envoyPackage
	envoyPackage  = "service-proxy-agent-envoy"
)

// cameAlong says that the installed Envoy is one that came with the agent.
func cameAlong(s progress.State) bool {
	return s.EnvoySource == archiveSource || s.EnvoySource == packageSource
}

func urlSource(name, url string) envoySource {
	return envoySource{name, url, redact(url), progress.Sum(url)}
}

func primary(cfg attribute.Config) envoySource {
	return urlSource(primarySource, cfg.PrimarySource)
}

func secondary(cfg attribute.Config) envoySource {
	return urlSource(secondarySource, cfg.SecondarySource)
}

// along is the Envoy that came with the agent. A package's is upgraded by itself, so that its
// content tells one from the next; an archive's is only for where there is none yet.
func (b *bootstrapper) along() (envoySource, error) {
	s := envoySource{archiveSource, b.path(layout.Here.ArchivedEnvoy), archiveSource,
		progress.Sum(archiveSource)}
	if !layout.Here.Packaged {
		return s, nil
	}
	s.name, s.shown = packageSource, packageSource
	if !s.exists() {
		return s, nil
	}
	content, err := fileSum(s.place)
	s.sum = progress.Sum(fmt.Sprintf("%s %x", packageSource, content))
	return s, err
}

// wantedEnvoy is whose Envoy a working one gives way to; one that does not exist: nobody's.
func (b *bootstrapper) wantedEnvoy(cfg attribute.Config) (envoySource, error) {
	if cfg.PrimarySource == "" && layout.Here.Packaged && cameAlong(b.state) {
		return b.along()
	}
	return primary(cfg), nil
}

// sources are all, in the order in which they are tried.
func (b *bootstrapper) sources(cfg attribute.Config) ([]envoySource, error) {
	along, err := b.along()
	return []envoySource{primary(cfg), secondary(cfg), along}, err
}

// exists is false for a source that the attribute does not give, and for what did not come with the
// agent.
func (s envoySource) exists() bool {
	if !s.along() {
		return s.place != ""
	}
	_, err := os.Lstat(s.place)
	return err == nil
}

func (s envoySource) along() bool { return s.name == archiveSource || s.name == packageSource }

// isOf says that the installed Envoy is from this source.
func (s envoySource) isOf(state progress.State) bool {
	return s.place != "" && state.PrimarySum == s.sum && state.EnvoySource == s.shown
}

// refusals are why sources gave no Envoy.
type refusals struct {
	texts   []string
	forGood bool // all of them
	last    error
}

func (r refusals) String() string { return strings.Join(r.texts, "; ") }

// installed is an Envoy that a source has given.
type installed struct {
	envoySource
	version string // "": none has
}

// trySources installs the Envoy of the first source that has a good one. err is what is no source's
// fault: the disk's, or that ctx has ended.
func (b *bootstrapper) trySources(ctx context.Context, sources ...envoySource) (
	got installed, refused refusals, err error,
) {
	refused.forGood = true
	for _, source := range sources {
		if !source.exists() {
			continue
		}
		version, err := b.installEnvoyFrom(ctx, source)
		if err == nil {
			return installed{source, version}, refused, nil
		}
		if ctx.Err() != nil {
			return installed{}, refused, ctx.Err()
		}
		var download *downloadError
		isDownload := errors.As(err, &download)
		if !isDownload && !errors.Is(err, errArchive) && !errors.Is(err, errBinary) &&
			!errors.Is(err, errUntold) {
			return installed{}, refused, err
		}
		if isDownload && !download.permanent || errors.Is(err, errUntold) {
			refused.forGood = false
		}
		why := source.name + ": " + err.Error()
		refused.texts, refused.last = append(refused.texts, why), err
		if b.state.Attempt == 1 {
			b.say("WARNING", why)
		}
	}
	return installed{}, refused, nil
}

// noteFallback leaves a line for bootstrap-last-failure: a VM whose Envoy is not from
// primary-source shall be found.
func (b *bootstrapper) noteFallback(why string) {
	b.state.Failure = progress.OneLine(fmt.Sprintf("%s: %s; Envoy %s from %s is used instead, "+
		"and primary-source tried again at the next boot",
		StepEnvoy, why, b.state.EnvoyVersion, b.state.EnvoySource))
	b.state.FailureTime = time.Now()
}

// installEnvoyFrom puts one source's Envoy into place, the old one kept, or changes nothing.
func (b *bootstrapper) installEnvoyFrom(ctx context.Context, source envoySource) (
	version string, err error,
) {
	defer b.removeTemps()
	for _, dir := range []string{filepath.Dir(EnvoyBinary), layout.KeptDir} {
		if err := os.MkdirAll(b.path(dir), 0o755); err != nil {
			return "", err
		}
	}
	if source.along() {
		err = linkOrCopy(source.place, b.path(newEnvoyBinary))
	} else {
		b.say("INFO", "downloading Envoy from "+source.shown)
		err = b.downloadEnvoy(ctx, source.place)
	}
	if err != nil {
		return "", err
	}
	if err := checkBinary(b.path(newEnvoyBinary)); err != nil {
		return "", fmt.Errorf("%w: %w", errBinary, err)
	}
	version, err = b.envoyVersion(ctx, newEnvoyBinary)
	if err != nil {
		return "", err
	}
	unlock, err := b.lockInstall(ctx)
	if err != nil {
		return "", err
	}
	defer unlock()
	if err := b.markRestart(); err != nil {
		return "", err
	}
	return version, b.upgrade(b.path(newEnvoyBinary), EnvoyBinary)
}

// downloadEnvoy makes the binary in the archive at the URL the new Envoy, not yet in place.
func (b *bootstrapper) downloadEnvoy(ctx context.Context, url string) error {
	archive, err := create(b.path(newArchive), 0o600)
	if err != nil {
		return err
	}
	defer archive.Close()
	if err := b.download(ctx, url, archive); err != nil {
		var disk *fs.PathError
		if errors.As(err, &disk) && disk.Op == "write" {
			return disk // not the source's failure
		}
		return err
	}
	into, err := create(b.path(newEnvoyBinary), 0o755)
	if err != nil {
		return err
	}
	err = unpackEnvoy(archive, into)
	if err == nil {
		err = into.Sync()
	}
	return errors.Join(err, into.Close())
}
