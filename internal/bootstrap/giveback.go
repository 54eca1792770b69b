package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/atomicfile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/layout"
	"github.com/service-proxy-agent/service-proxy-agent/internal/neighbour"
	"github.com/service-proxy-agent/service-proxy-agent/internal/sockdiag"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// rulesGuard is a drop-in of service-proxy-interception.service while the rules are given back with
// the agent that was here before: stopping the unit would take them out, and the VM's connections
// would go past its Envoy until it has made them anew.
const (
	rulesGuard     = runUnits + "/" + systemd.InterceptionUnit + ".d/50-give-back.conf"
	rulesGuardText = "# Written by service-proxy-agent bootstrap --remove.\n[Service]\nExecStop=\n"
)

// others says whether another agent, from which ours did not take over, has our agent's unit, and
// whether the chains of our names are its own: it runs, or nothing of ours is installed. over are
// our units that are there.
func (b *bootstrapper) others(h *handover, over []string) (unit, rules bool, err error) {
	if h != nil {
		return false, false, nil
	}
	t, err := b.neighbours()
	unit = slices.ContainsFunc(t.units, func(u neighbour.Unit) bool { return u.First })
	rules = len(over) == 0 && len(t.units) > 0 || unit && len(t.Agents) > 0 && !t.Ours
	return unit, rules, err
}

// giveBack has the agent that was here before take the place of ours again, its units as they were:
// the way of TakeOverNow back. The rules stay in until it makes its own.
func (r *removal) giveBack(ctx context.Context, h *handover, over []string) error {
	if h.under(handoverWanted) { // ours has not come to run, and nothing of theirs was stopped
		h.Active = false
		for _, unit := range over {
			if unit != systemd.AgentUnit {
				r.run(ctx, 2*time.Minute, "stop", unit)
			}
		}
		return r.restore(ctx, h)
	}
	if !h.under(handoverGiving) {
		h.Phase = handoverGiving
		if err := r.writeHandover(h); err != nil {
			return err
		}
	}
	units, err := neighbour.Units(r.Root)
	if err != nil {
		return err
	}
	// Of an earlier try the agent's unit may be theirs again.
	theirs := slices.ContainsFunc(units, func(u neighbour.Unit) bool { return u.First })
	for _, unit := range over {
		if unit != systemd.AgentUnit || !theirs {
			r.run(ctx, 2*time.Minute, "stop", unit)
		}
	}
	if len(r.errs) > 0 {
		return nil // said with the rest
	}
	if err := r.keepRules(ctx); err != nil {
		return err
	}
	if err := r.restore(ctx, h); err != nil {
		return err
	}
	return r.startTheirs(ctx, h)
}

// keepRules stops the unit that holds the rules without taking them out.
func (r *removal) keepRules(ctx context.Context) error {
	if len(r.present([]string{systemd.InterceptionUnit})) == 0 {
		return nil
	}
	guard := r.path(rulesGuard)
	err := os.MkdirAll(filepath.Dir(guard), 0o755)
	if err == nil {
		err = atomicfile.Write(guard, []byte(rulesGuardText), 0o644)
	}
	if err == nil {
		err = r.systemctl(ctx, time.Minute, "daemon-reload")
	}
	if err == nil {
		err = r.systemctl(ctx, time.Minute, "stop", systemd.InterceptionUnit)
	}
	if err != nil {
		return fmt.Errorf("keep the rules: %w", err)
	}
	r.done = append(r.done, "left the rules for the agent that was here before")
	if err := os.Remove(guard); err != nil {
		return err
	}
	_ = os.Remove(filepath.Dir(guard)) // stays where something else is in it
	return nil
}

// restore brings their files back, and takes away ours that would shadow them.
func (r *removal) restore(ctx context.Context, h *handover) error {
	// Our links go before theirs of the same names come. (Before ours took over there are theirs
	// alone, which `disable` would take for ours.)
	if !h.under(handoverWanted) {
		for _, unit := range r.present([]string{systemd.AgentUnit}) {
			r.run(ctx, time.Minute, "disable", unit)
		}
	}
	ours := []string{guardFile}
	if !layout.Here.Packaged { // a package's is the last that systemd reads: it shadows nothing
		ours = append(ours, filepath.Join(layout.Here.UnitDir, systemd.AgentUnit))
	}
	for _, name := range ours {
		if err := os.Remove(r.path(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	for _, unit := range h.Units {
		if err := r.systemctl(ctx, time.Minute, "unmask", unit.Name); err != nil {
			return err
		}
	}
	for _, file := range h.Kept {
		if file.Path == layout.Here.Agent {
			continue // ours is still needed, to drain Envoy
		}
		if err := r.bring(file); err != nil {
			return fmt.Errorf("bring back: %w", err)
		}
		r.done = append(r.done, "brought back "+file.Path)
	}
	return r.systemctl(ctx, time.Minute, "daemon-reload")
}

// startTheirs stops our Envoy, draining, and starts theirs and their agent.
func (r *removal) startTheirs(ctx context.Context, h *handover) error {
	if h.Envoy.Program != "" && r.LetOut != nil {
		if _, err := r.LetOut(ctx, h.Envoy.UID); err != nil {
			return err
		}
	}
	if len(r.present([]string{systemd.EnvoyUnit})) > 0 {
		if err := r.systemctl(ctx, time.Minute, "stop", systemd.EnvoyUnit); err != nil {
			return err
		}
		r.done = append(r.done, "systemctl stop "+systemd.EnvoyUnit)
	}
	began := time.Now()
	if h.kept(layout.Here.Agent) {
		if err := r.bring(keptFile{Path: layout.Here.Agent, Replaced: true}); err != nil {
			return fmt.Errorf("bring back: %w", err)
		}
		r.done = append(r.done, "brought back "+layout.Here.Agent)
	}
	var start []string
	for _, unit := range h.Units {
		if unit.Active {
			start = append(start, unit.Name)
		}
	}
	if h.Active {
		start = append(start, systemd.AgentUnit)
	}
	for _, unit := range start {
		r.run(ctx, 2*time.Minute, "start", unit)
	}
	for _, process := range h.Loose {
		r.done = append(r.done, "left "+process+
			" stopped, which belonged to no service: start it by hand")
	}
	if len(start) == 0 || h.Envoy.Program == "" {
		return nil
	}
	for {
		all, err := sockdiag.Listeners(attribute.OutboundPort)
		if err == nil && len(all) > 0 {
			r.done = append(r.done, fmt.Sprintf("its Envoy accepts, %v after ours was stopped",
				time.Since(began).Round(10*time.Millisecond)))
			return nil
		}
		if time.Since(began) > time.Minute || !sleep(ctx, 50*time.Millisecond) {
			return fmt.Errorf("its Envoy does not accept on port %d within a minute; "+
				"see systemctl status %s", attribute.OutboundPort, systemd.AgentUnit)
		}
	}
}
