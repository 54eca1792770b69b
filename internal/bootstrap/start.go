package bootstrap

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/authorities"
	"github.com/service-proxy-agent/service-proxy-agent/internal/logs"
	"github.com/service-proxy-agent/service-proxy-agent/internal/supervisor"
	"github.com/service-proxy-agent/service-proxy-agent/internal/untrusted"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// startEnvoy starts Envoy's unit, or has it run with what has changed, and waits for its admin
// interface. What is cut short the next run does once more: a hot restart too many does no harm.
func (b *bootstrapper) startEnvoy(ctx context.Context) error {
	h, err := b.readHandover()
	if err != nil {
		return err
	}
	if h.under(handoverWanted, handoverTaking) {
		if err := b.takeOver(ctx, h); err != nil {
			return err
		}
	}
	if err := b.enable(ctx, systemd.EnvoyUnit); err != nil {
		return err
	}
	before, err := systemd.UnitState(ctx, systemd.EnvoyUnit)
	if err != nil {
		return err
	}
	_, changed := os.Lstat(b.path(restartFile))
	started := false // anew, with all that its unit says
	switch {
	case !mayReload(before.Active):
		started, err = true, b.systemctl(ctx, 2*time.Minute, "start", systemd.EnvoyUnit)
	case changed == nil:
		if err := b.wouldBeConfigured(ctx); err != nil {
			return &Failure{Err: err, Advice: "see `service-proxy-agent doctor`"}
		}
		started, err = b.renewEnvoy(ctx, func(text string) { b.say("INFO", text) })
	}
	if err != nil {
		return failed(StepStart, err, ofUnit)
	}
	// Before it answers: an Envoy that takes longer to is not replaced by the next run for that.
	if err := b.forgetRestart(started); err != nil {
		return failed(StepStart, err, ofDisk)
	}
	if err := b.waitForAdmin(ctx, 20*time.Second); err != nil {
		return &Failure{Err: err, Advice: "see " + logs.Dir + "/envoy.err.log"}
	}
	return nil
}

// wouldBeConfigured: an Envoy that starts while nobody can reach the control plane serves nothing,
// once it has waited long enough, and yet takes over from the one that runs, which has all its
// services. That nobody can is that neither that one has a stream nor we a way of our own: a stream
// alone may be what the change is to mend. err is why it would not be.
func (b *bootstrapper) wouldBeConfigured(ctx context.Context) error {
	host, _, _ := net.SplitHostPort(trafficDirector)
	unreachable := envoyadmin.Probe(ctx, trafficDirector, envoyadmin.ProbeOptions{
		TLS: true, ServerName: host, RootCAFile: authorities.File(b.Root)})
	if unreachable == nil {
		return nil
	}
	client, err := envoyadmin.New(fmt.Sprintf("127.0.0.1:%d", attribute.EnvoyAdminPort))
	if err != nil {
		return err
	}
	defer client.Close()
	return loses(ctx, client, unreachable)
}

// loses is why the Envoy that runs is not to be replaced, with the control plane unreachable.
func loses(ctx context.Context, client *envoyadmin.Client, unreachable error) error {
	connected := 0
	for range connectedSamples {
		is, err := client.ControlPlane(ctx)
		switch {
		case errors.Is(err, envoyadmin.ErrRefused), errors.Is(err, envoyadmin.ErrEmpty),
			err == nil && !is.Streams:
			return nil // nobody is there, or one that has no such stream
		case err != nil:
			return fmt.Errorf("Envoy goes on as it was started, since it does not say what it would lose "+
				"(%w): the control plane cannot be reached: %w", err, unreachable)
		}
		if is.Connected {
			connected++
		}
		if !sleep(ctx, 300*time.Millisecond) {
			return ctx.Err()
		}
	}
	if connected == connectedSamples {
		return nil
	}
	return fmt.Errorf("Envoy goes on as it was started, since the next one would get no services: "+
		"the control plane cannot be reached: %w", unreachable)
}

// connectedSamples are how often Envoy is asked for its stream: it says that it has one at each
// attempt to make one.
const connectedSamples = 3

func ofUnit(error) (advice string, permanent bool) {
	return "see journalctl -u " + systemd.EnvoyUnit, false
}

// mayReload says whether a unit in this state has a main process that can be asked for another
// Envoy. A run that was cut short may have left it reloading.
func mayReload(active string) bool { return active == "active" || active == "reloading" }

// forgetRestart notes that Envoy runs with all that changed; started: its unit was started anew.
func (b *bootstrapper) forgetRestart(started bool) error {
	names := []string{restartFile}
	if started {
		names = append(names, unitChangedFile)
	}
	var errs []error
	for _, name := range names {
		if err := os.Remove(b.path(name)); !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// renewEnvoy has the Envoy that runs replaced by one that runs with what has changed: without a gap
// where the next can take over from it, else by a restart that drains its connections. It tells
// which and why, before it does so.
func (b *bootstrapper) renewEnvoy(
	ctx context.Context, tell func(string),
) (started bool, err error) {
	why, err := b.keptFromReload()
	if err != nil {
		return false, err
	}
	if why == "" {
		tell("restarting Envoy without a gap (hot restart)")
		why, err = b.reloadEnvoy(ctx)
	}
	if why == "" || err != nil {
		return false, err
	}
	tell("restarting Envoy, draining its connections: " + why)
	return true, b.systemctl(ctx, 2*time.Minute, "restart", systemd.EnvoyUnit)
}

// keptFromReload is what has changed that only a start of Envoy's unit brings; "": nothing.
func (b *bootstrapper) keptFromReload() (why string, err error) {
	text, err := os.ReadFile(b.path(unitChangedFile))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return cmp.Or(lastLine(string(text)), "its unit is another now"), err
}

// reloadEnvoy has the next Envoy take over from the one that runs. why is why that cannot be, where
// it cannot; err, that it came to nothing, and the one that runs goes on.
func (b *bootstrapper) reloadEnvoy(ctx context.Context) (why string, err error) {
	err = b.systemctl(ctx, 3*time.Minute, "reload", systemd.EnvoyUnit)
	if err == nil || ctx.Err() != nil {
		return "", err
	}
	out, _ := b.exec(ctx, time.Minute, "systemctl", "show", "--property=CanReload,ExecReload",
		"--", systemd.EnvoyUnit)
	reload := systemd.ParseReload(out)
	switch {
	case !reload.Can:
		return "its unit cannot do better", nil
	case reload.Status == supervisor.NotPossible:
		return cmp.Or(b.lastLogLine(reloadSays), "the next Envoy cannot take over"), nil
	}
	if reload.Status >= 0 { // else it has said nothing, and what is in the log is of one before
		why = b.lastLogLine(reloadSays)
	}
	return "", fmt.Errorf("the next Envoy did not take over from the one that runs: %s",
		cmp.Or(why, err.Error()))
}

// reloadSays begins what `service-proxy-agent envoy --reload`, the reload of Envoy's unit, says: in
// Envoy's log, as all that the unit's programs do.
const reloadSays = "service-proxy-agent: "

// waitForAdmin waits until Envoy's admin port accepts: Envoy has read its configuration then. It
// need not have heard from the control plane: that is the agent's to watch.
func (b *bootstrapper) waitForAdmin(ctx context.Context, limit time.Duration) error {
	deadline := time.Now().Add(limit)
	for {
		conn, err := net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", attribute.EnvoyAdminPort),
			time.Second)
		if err == nil {
			conn.Close()
			return nil
		}
		if time.Now().After(deadline) || !sleep(ctx, 100*time.Millisecond) {
			state, stateErr := systemd.UnitState(ctx, systemd.EnvoyUnit)
			if stateErr != nil {
				return fmt.Errorf("Envoy does not answer on its admin port: %w", err)
			}
			return fmt.Errorf("Envoy does not answer on its admin port; its unit is %s (%s), "+
				"exit code %d, %d restarts; last line of its log: %s",
				state.Active, state.Sub, state.ExitCode, state.Restarts,
				cmp.Or(b.lastLogLine(""), "(none)"))
		}
	}
}

// lastLogLine is what may be told of the last line of Envoy's log that begins so, behind that; "":
// there is none.
func (b *bootstrapper) lastLogLine(begin string) string {
	f, err := untrusted.Open(b.path(logs.Dir + "/envoy.err.log"))
	if err != nil {
		return ""
	}
	defer f.Close()
	end, err := envoyadmin.Tail(f, maxTail)
	if err != nil {
		return ""
	}
	lines := strings.Split(strings.TrimSpace(string(end)), "\n")
	for _, line := range slices.Backward(lines) {
		if rest, ok := strings.CutPrefix(line, begin); ok {
			return fmt.Sprintf("%.300s", lastLine(rest))
		}
	}
	return ""
}
