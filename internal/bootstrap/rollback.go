package bootstrap

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/internal/atomicfile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/identity"
	"github.com/service-proxy-agent/service-proxy-agent/internal/layout"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// Rollback swaps agent or Envoy, whichever the last upgrade has replaced, with what was there
// before, has that run (an Envoy without a gap where that can be, else draining), and returns what
// it did, one line each. An Envoy that refuses the configuration stays away. What it has taken
// out is not installed again until another archive or primary-source comes. A second Rollback goes
// back.
func Rollback(ctx context.Context, opts Options) (done []string, err error) {
	b := newBootstrapper(opts)
	if b.Root == "" && os.Geteuid() != 0 {
		return nil, fmt.Errorf("roll back: %w; run as root", fs.ErrPermission)
	}
	unlock, err := b.lockInstall(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	var swap []string
	for _, installed := range b.upgraded() {
		if _, err := os.Stat(b.previous(installed)); err == nil {
			swap = append(swap, installed)
		}
	}
	if len(swap) == 0 {
		if layout.Here.Packaged {
			return nil, fmt.Errorf("roll back: no Envoy was upgraded here: %q is empty; the agent is the "+
				"package manager's to go back with", previousDir)
		}
		return nil, fmt.Errorf("roll back: nothing was upgraded here: %q is empty", previousDir)
	}
	if err := b.provePrevious(ctx, swap); err != nil {
		return nil, fmt.Errorf("roll back: %w", err)
	}
	// A bootstrap under way would write its own state over this one, or install what it is just
	// downloading.
	if err := b.systemctl(ctx, time.Minute, "stop", systemd.BootstrapUnit); err != nil {
		return nil, fmt.Errorf("roll back: %w", err)
	}
	state, noState := progress.Read(b.path(progress.StateDir))
	back, err := b.readRolledBack()
	if err != nil {
		return nil, fmt.Errorf("roll back: %w", err)
	}
	for _, installed := range swap {
		if err := b.bringBack(installed, &back, &state); err != nil {
			return done, fmt.Errorf("roll back %q: %w", installed, err)
		}
		done = append(done, "brought back the previous "+installed)
	}
	if noState == nil {
		noState = progress.Write(b.path(progress.StateDir), state)
	}
	if noState != nil {
		b.Log.Warn("the state does not know where this Envoy is from", zap.Error(noState))
	}
	for _, installed := range swap {
		lines, err := b.restart(ctx, installed)
		done = append(done, lines...)
		if err != nil {
			return done, fmt.Errorf("roll back: %w", err)
		}
	}
	// It looks whether all is as the attribute wants it for this version; where the administrator
	// lets it.
	out, _ := b.exec(ctx, time.Minute, "systemctl", "is-enabled", systemd.BootstrapUnit)
	if strings.HasPrefix(out, "masked") {
		return done, nil
	}
	if err := b.systemctl(ctx, time.Minute, "start", "--no-block", systemd.BootstrapUnit); err != nil {
		return done, fmt.Errorf("roll back: %w", err)
	}
	return done, nil
}

// bringBack swaps the binary with the one that the last upgrade has replaced, and books that.
func (b *bootstrapper) bringBack(installed string, back *rolledBack, state *progress.State) error {
	if installed == layout.Here.Agent {
		sum, err := fileSum(b.path(installed))
		if err != nil {
			return err
		}
		back.Agent = hex.EncodeToString(sum[:])
	} else {
		// A run that is cut short is made good by bootstrap.
		if err := b.markRestart(); err != nil {
			return err
		}
		back.EnvoySource = state.PrimarySum
		state.PreviousSource, state.EnvoySource = state.EnvoySource, state.PreviousSource
		state.PreviousSum, state.PrimarySum = state.PrimarySum, state.PreviousSum
	}
	// Before the swap: what is cut short between the two is done by the next Rollback.
	if err := b.writeRolledBack(*back); err != nil {
		return err
	}
	temp, err := b.temp(installed)
	if err != nil {
		return err
	}
	if err := linkOrCopy(b.previous(installed), temp); err != nil {
		return err
	}
	return b.replace(temp, installed)
}

// provePrevious says whether the Envoy that is to be brought back takes the configuration that is
// there, if there is one: the one that runs goes on else.
func (b *bootstrapper) provePrevious(ctx context.Context, swap []string) error {
	if !slices.Contains(swap, EnvoyBinary) {
		return nil
	}
	if _, err := os.Stat(b.path(EnvoyConfig)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	as, err := b.envoyCredential()
	if err != nil {
		return err
	}
	err = b.validate(ctx, as, b.previous(EnvoyBinary), b.path(EnvoyConfig))
	if err != nil {
		return fmt.Errorf("the previous %s refuses the configuration, so nothing was changed: %w",
			EnvoyBinary, err)
	}
	return nil
}

// restart has the unit of the binary run what was brought back, and says what it did. One that does
// not run is not started.
func (b *bootstrapper) restart(ctx context.Context, installed string) (lines []string, err error) {
	if installed == EnvoyBinary {
		out, err := b.exec(ctx, time.Minute, "systemctl", "is-active", systemd.EnvoyUnit)
		if err != nil && !mayReload(strings.TrimSpace(out)) {
			return nil, nil
		}
		started, err := b.renewEnvoy(ctx, func(text string) { lines = append(lines, text) })
		if err != nil {
			return lines, err
		}
		return lines, b.forgetRestart(started)
	}
	out, err := b.exec(ctx, time.Minute, b.path(layout.Here.Agent), "bootstrap", "--install-units")
	if err != nil {
		return nil, fmt.Errorf("install the previous units: %w", said(err, out))
	}
	if err := b.systemctl(ctx, time.Minute, "restart", systemd.AgentUnit); err != nil {
		return nil, err
	}
	return []string{"restarted " + systemd.AgentUnit}, nil
}

// rolledBack is what Rollback has taken out, and what is not installed again: a startup-script
// brings the same archive at every boot, and bootstrap looks at primary-source. It is not in the
// state, which may be lost.
type rolledBack struct {
	identity.Owner
	Agent       string `json:"agent,omitempty"`        // the binary's SHA-256
	EnvoySource string `json:"envoy_source,omitempty"` // State.PrimarySum
}

func (b *bootstrapper) readRolledBack() (back rolledBack, err error) {
	text, err := os.ReadFile(b.path(rolledBackFile))
	if errors.Is(err, fs.ErrNotExist) {
		return back, nil
	}
	if err == nil {
		err = json.Unmarshal(text, &back)
	}
	if err != nil {
		return rolledBack{}, fmt.Errorf("read what was rolled back: %w; remove %q", err, rolledBackFile)
	}
	if !b.vm.Judge(back.Owner).Believed() {
		return rolledBack{}, nil // of the VM that this one's disk is a copy of
	}
	return back, nil
}

func (b *bootstrapper) writeRolledBack(back rolledBack) error {
	back.Owner = b.vm.Owner
	text, err := json.Marshal(back)
	if err != nil {
		return err
	}
	return atomicfile.Write(b.path(rolledBackFile), append(text, '\n'), 0o644)
}

// wasRolledBack says that the Envoy of this source was taken out by Rollback. Once another source
// is wanted that is forgotten: to want this one again is a new wish.
func (b *bootstrapper) wasRolledBack(ctx context.Context, source envoySource) (bool, error) {
	back, err := b.readRolledBack()
	if err != nil || source.place == "" || back.EnvoySource == "" || back.EnvoySource == source.sum {
		return source.place != "" && back.EnvoySource == source.sum, err
	}
	unlock, err := b.lockInstall(ctx)
	if err != nil {
		return false, err
	}
	defer unlock()
	if back, err = b.readRolledBack(); err != nil {
		return false, err
	}
	back.EnvoySource = ""
	return false, b.writeRolledBack(back)
}
