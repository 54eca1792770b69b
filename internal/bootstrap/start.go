package bootstrap

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/logs"
	"github.com/service-proxy-agent/service-proxy-agent/internal/untrusted"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// startEnvoy starts Envoy's unit, or restarts it, draining, when what it runs with has changed, and
// waits for its admin interface.
func (b *bootstrapper) startEnvoy(ctx context.Context) error {
	if err := b.enable(ctx, systemd.EnvoyUnit); err != nil {
		return err
	}
	before, err := systemd.UnitState(ctx, systemd.EnvoyUnit)
	if err != nil {
		return err
	}
	marker := b.path(restartFile)
	_, changed := os.Lstat(marker)
	verb := "start"
	if before.Active == "active" && changed == nil {
		verb = "restart"
		b.say("INFO", "restarting Envoy, draining its connections")
	}
	if before.Active != "active" || verb == "restart" {
		if err := b.systemctl(ctx, 2*time.Minute, verb, systemd.EnvoyUnit); err != nil {
			return &Failure{Err: err, Advice: "see journalctl -u " + systemd.EnvoyUnit}
		}
	}
	if err := b.waitForAdmin(ctx, 20*time.Second); err != nil {
		return &Failure{Err: err, Advice: "see " + logs.Dir + "/envoy.err.log"}
	}
	if err := os.Remove(marker); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return failed(StepStart, err, ofDisk)
	}
	return nil
}

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
				state.Active, state.Sub, state.ExitCode, state.Restarts, b.lastLogLine())
		}
	}
}

// lastLogLine is what may be told of the last line of Envoy's log.
func (b *bootstrapper) lastLogLine() string {
	f, err := untrusted.Open(b.path(logs.Dir + "/envoy.err.log"))
	if err != nil {
		return "(none)"
	}
	defer f.Close()
	end, err := envoyadmin.Tail(f, maxTail)
	if err != nil {
		return "(none)"
	}
	return fmt.Sprintf("%.300s", cmp.Or(lastLine(string(end)), "(none)"))
}
