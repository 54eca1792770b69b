package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/service-proxy-agent/service-proxy-agent/agent"
	"github.com/service-proxy-agent/service-proxy-agent/internal/bootstrap"
	"github.com/service-proxy-agent/service-proxy-agent/internal/drain"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/internal/system"
	"github.com/service-proxy-agent/service-proxy-agent/internal/terminal"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// bootstrapCall is a call of the command: what its flags say.
type bootstrapCall struct {
	opts bootstrap.Options

	check, rollback, remove, takeOver, takeOverNow, prepare, units, adopt, rotate bool

	archive, level, output, own string
}

func bootstrapCommand() *cobra.Command {
	var b bootstrapCall
	cmd := &cobra.Command{
		Use:   "bootstrap",
		Short: "Install and configure Envoy and the units, publish the status, end",
		Long: "Reads the metadata attribute gce-service-proxy, installs what is missing, configures " +
			"Envoy and starts the units. It tells in the guest attribute bootstrap-status how far it is, " +
			"and tries again what may yet succeed, until it is done. The unit " +
			"service-proxy-bootstrap.service runs it at each boot, and when something is to be done " +
			"anew.\n\n" +
			"A release archive brings service-proxy-agent-bootstrap.sh, which installs this program and " +
			"its units in the first place.\n\n" +
			"Google's closed agent, which has the same unit's name, chains and ports, is left alone, and " +
			"what stands in the way of ours is said. --take-over, or a release archive that is installed " +
			"over it, has ours take its place: its agent is stopped and its unit moved aside once ours is " +
			"ready, its chains are adopted as they are, and its Envoy is drained and replaced. --remove " +
			"gives all of it back.\n\n" +
			"With --prepare-image it makes this VM's disk fit to be an image: all is installed and " +
			"enabled, and nothing is left that is of this VM. A VM that is made of the image finds its " +
			"own attribute at its first boot, and needs no network for the agent then. A disk that is " +
			"copied without it does, too: what is another VM's is discarded.\n\n" +
			"Its first step looks whether the agent can be on this system at all, as --check does, and " +
			"refuses in one line where it cannot.\n" +
			symptom.DocsURL + "systems.md has what was tried.\n\n" +
			"Exit code: 0 done, or with --check: works here; 1 not done, or does not work here, with the " +
			"reason; 64 wrong usage.",
		Example: "  sudo service-proxy-agent bootstrap\n" +
			"  service-proxy-agent bootstrap --check\n" +
			"  sudo service-proxy-agent bootstrap --prepare-image\n" +
			"  sudo service-proxy-agent bootstrap --rollback\n" +
			"  sudo service-proxy-agent bootstrap --take-over\n" +
			"  sudo service-proxy-agent bootstrap --remove",
		RunE: func(cmd *cobra.Command, _ []string) error { return b.run(cmd) },
	}
	flags := cmd.Flags()
	flags.StringVar(&b.opts.Config, "config", "",
		"`FILE` with the attribute's JSON instead of the metadata server; none: no attribute, defaults")
	flags.StringVar(&b.level, "log-level", "info",
		"least `LEVEL` that is logged: debug, info, warn or error")
	flags.BoolVar(&b.check, "check", false,
		"say whether the agent works on this system, property by property, and change nothing")
	flags.StringVarP(&b.output, "output", "o", "text", "`FORM` of --check's answer: text or json")
	flags.BoolVar(&b.rollback, "rollback", false,
		"undo the last upgrade, the agent's or Envoy's, until something newer comes")
	flags.BoolVar(&b.prepare, "prepare-image", false,
		"install and enable all, and take away what is of this VM, so that its disk can be an image")
	flags.BoolVar(&b.remove, "remove", false,
		"take everything of ours off this VM and say what was removed")
	flags.BoolVar(&b.takeOver, "take-over", false,
		"have ours take the place of Google's closed agent on this VM; --remove gives it back")
	// For the archive's script, the packages' scripts, --rollback, and the units of Envoy and of its
	// logs.
	flags.BoolVar(&b.adopt, "adopt", false, "take away what an archive has installed, for a package")
	flags.BoolVar(&b.opts.KeepState, "keep-state", false,
		"with --remove: leave what a package manager leaves until its purge")
	flags.StringVar(&b.archive, "archive", "", "lay down the unpacked release archive in `DIR`")
	flags.BoolVar(&b.units, "install-units", false, "install this binary's units")
	flags.StringVar(&b.own, "own", "",
		"say whether Envoy's configuration is this VM's, in this `BOOT`")
	flags.BoolVar(&b.rotate, "rotate-logs", false, "rotate Envoy's logs that have grown too big")
	flags.BoolVar(&b.takeOverNow, "take-over-now", false, "what a take-over runs in a unit of its own")
	for _, name := range []string{"archive", "install-units", "rotate-logs", "take-over-now", "own",
		"adopt", "keep-state"} {
		_ = flags.MarkHidden(name) // fails for a flag that does not exist only
	}
	cmd.MarkFlagsMutuallyExclusive("check", "rollback", "remove", "take-over", "take-over-now",
		"prepare-image", "archive", "install-units", "rotate-logs", "own", "adopt")
	return cmd
}

// run does what the flags ask for, and else what the unit runs at each boot.
func (b *bootstrapCall) run(cmd *cobra.Command) error {
	log, err := logger(b.level)
	if err != nil {
		return usage(err)
	}
	b.opts.Log = log
	b.opts.LetOut, b.opts.Adopt = letOut, agent.Mark
	ctx := cmd.Context()
	say := func(lines []string, err error) error {
		for _, line := range lines {
			fmt.Fprintln(cmd.OutOrStdout(), line)
		}
		return err
	}
	rules := func(ctx context.Context) ([]string, error) {
		removed, err := clean(ctx)
		if errors.Is(err, iptables.ErrNoIPTables) {
			return removed, nil // where it never was, nothing of ours is
		}
		return removed, err
	}
	if b.opts.KeepState && !b.remove {
		return usage(errors.New("--keep-state goes with --remove"))
	}
	if b.output != "text" && b.output != "json" {
		return usage(fmt.Errorf("--output is %q; use text or json", b.output))
	}
	switch {
	case b.check:
		return sayReport(cmd.OutOrStdout(), bootstrap.Check(ctx, b.opts), b.output)
	case b.remove:
		return say(bootstrap.Remove(ctx, b.opts, rules))
	case b.takeOver:
		return say(bootstrap.TakeOver(ctx, b.opts))
	case b.takeOverNow:
		return bootstrap.TakeOverNow(ctx, b.opts)
	case b.prepare:
		return say(bootstrap.PrepareImage(ctx, b.opts, rules))
	case cmd.Flags().Changed("own"):
		return bootstrap.Own(ctx, b.opts, b.own)
	case b.rollback:
		return say(bootstrap.Rollback(ctx, b.opts))
	case b.adopt:
		return say(bootstrap.Adopt(b.opts))
	case b.units:
		return bootstrap.InstallUnits(ctx, b.opts)
	case b.rotate:
		return bootstrap.RotateLogs(b.opts)
	case b.archive != "":
		return bootstrap.Install(ctx, b.opts, b.archive)
	}
	err = bootstrap.Run(ctx, b.opts)
	if errors.Is(err, context.Canceled) {
		return nil // told to end: systemd shall not start it again
	}
	return err
}

// letOut has the rules that are in let a user's traffic out.
func letOut(ctx context.Context, uid uint32) ([]string, error) {
	kernel, err := iptables.Open(ctx, iptables.Options{})
	if errors.Is(err, iptables.ErrNoIPTables) {
		return nil, nil // and nobody made any
	}
	if err != nil {
		return nil, err
	}
	return kernel.LetOut(ctx, uid)
}

// sayReport writes what --check has found, and ends with its exit code.
func sayReport(w io.Writer, report system.Report, output string) (err error) {
	if output == "json" {
		var body []byte
		if body, err = report.JSON(); err == nil {
			_, err = w.Write(body)
		}
	} else {
		err = report.Text(w, terminal.For(w), terminal.Width(w))
	}
	if err = unwritten(err); err == nil && report.Exit != 0 {
		err = &exitError{code: report.Exit}
	}
	return err
}

func drainCommand() *cobra.Command {
	var admin string
	var limit time.Duration
	cmd := &cobra.Command{
		Use:   "drain",
		Short: "Send Envoy's clients away before it is stopped; what Envoy's unit runs",
		Long: "Has Envoy close its listeners and end its connections in good order, and waits until " +
			"they have ended. ExecStop= of service-proxy-envoy.service runs it, so that `systemctl stop` " +
			"cuts as few connections as possible. Envoy is not stopped by it, and nothing is done where " +
			"systemd has not set $MAINPID: Envoy has ended by itself then.\n\n" +
			"Exit code: 0 the connections have ended, or the time is over; 1 Envoy could not be asked; " +
			"64 wrong usage.",
		Example: "  service-proxy-agent drain --limit 30s",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if limit < 0 {
				return usage(fmt.Errorf("--limit is %s; use a time like 10s, or 0 not to wait", limit))
			}
			return drain.Run(cmd.Context(), admin, os.Getenv("MAINPID"), limit)
		},
	}
	cmd.Flags().StringVar(&admin, "envoy-admin", defaultAdmin,
		"`ADDRESS` of Envoy's admin interface, or unix:///path")
	cmd.Flags().DurationVar(&limit, "limit", drain.DefaultLimit,
		"wait for `TIME` at most for connections to end")
	return cmd
}
