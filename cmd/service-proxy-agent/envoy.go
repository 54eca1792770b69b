package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/service-proxy-agent/service-proxy-agent/internal/exitcode"
	"github.com/service-proxy-agent/service-proxy-agent/internal/supervisor"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

func envoyCommand() *cobra.Command {
	var o supervisor.Options
	var reload bool
	var limit time.Duration
	cmd := &cobra.Command{
		Use:   "envoy [--] ENVOY [ARGUMENT...]",
		Short: "Run Envoy and restart it hot; what Envoy's unit runs",
		Long: "Runs Envoy as its child, and starts the next epoch of it beside the one that serves " +
			"when that is asked for: by `systemctl reload service-proxy-envoy`, by --reload, or by " +
			"SIGHUP. The new one gets the listening sockets, so that no connection is refused, and the " +
			"old one drains and ends. Where the new one does not get live, the old one goes on.\n\n" +
			"Envoy's arguments are those of Envoy, without --base-id, --restart-epoch, --socket-path and " +
			"--admin-address-path. TERM and INT end all epochs, and this program ends as Envoy did.\n\n" +
			"Exit code, of --reload (else it is Envoy's): 0 the new epoch serves; 1 it does not, with the " +
			"reason, and the old one goes on; 2 not possible here, with the reason: restart Envoy, or " +
			"start it; 64 wrong usage.",
		Example: "  sudo service-proxy-agent envoy --reload",
		Args:    cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if reload {
				if len(args) > 0 {
					return usage(errors.New("--reload takes no argument: the supervisor that runs has them"))
				}
				return reloadEnvoy(cmd.Context(), o.Dir, limit, cmd)
			}
			if len(args) == 0 {
				return usage(errors.New("no Envoy named; `service-proxy-agent envoy --help` says more"))
			}
			o.Argv = args
			return superviseEnvoy(o)
		},
	}
	cmd.Flags().BoolVar(&reload, "reload", false,
		"ask the supervisor that runs for the next epoch, and wait until it serves")
	cmd.Flags().StringVar(&o.Dir, "dir", cmp.Or(os.Getenv("RUNTIME_DIRECTORY"), supervisor.DefaultDir),
		"`FOLDER` of the supervisor's sockets and files, which is of Envoy's user alone")
	cmd.Flags().DurationVar(&o.Start, "start-limit", supervisor.DefaultStart,
		"how long the next epoch may take, `TIME`, before the one that serves goes on without it")
	cmd.Flags().DurationVar(&limit, "timeout", 110*time.Second,
		"wait for `TIME` at most with --reload")
	return cmd
}

func reloadEnvoy(ctx context.Context, dir string, limit time.Duration, cmd *cobra.Command) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	answer, err := supervisor.Reload(ctx, dir)
	switch {
	case errors.Is(err, supervisor.ErrNoSupervisor):
		return &exitError{code: exitcode.NotKnown, err: err}
	case err != nil:
		return err
	case answer.Code != supervisor.Done:
		return &exitError{code: answer.Code, err: errors.New(answer.Text)}
	}
	fmt.Fprintln(cmd.OutOrStdout(), answer.Text)
	return nil
}

func superviseEnvoy(o supervisor.Options) error {
	var err error
	if o.Dir, err = filepath.Abs(o.Dir); err != nil {
		return err
	}
	if o.Log, err = supervisorLog(); err != nil {
		return err
	}
	o.Notify = systemd.Notify
	status, err := supervisor.Run(o)
	if err != nil {
		return err
	}
	return endAs(status)
}

// supervisorLog: stderr is Envoy's log, whose last line tells why Envoy has ended, so under systemd
// the supervisor writes to the journal instead.
func supervisorLog() (*zap.Logger, error) {
	if os.Getenv("INVOCATION_ID") != "" {
		journal, err := systemd.NewJournal(zapcore.InfoLevel, "service-proxy-agent", messageID)
		if err == nil {
			return zap.New(journal), nil
		}
	}
	return logger("info")
}

// endAs ends this process as Envoy has ended, so that systemd tells what it would of Envoy.
func endAs(s supervisor.Status) error {
	switch {
	case s.Err != nil:
		return s.Err
	case s.Signal == 0 && s.Code == 0:
		return nil
	case s.Signal == 0:
		return &exitError{code: s.Code}
	}
	switch s.Signal {
	case syscall.SIGKILL, syscall.SIGTERM, syscall.SIGINT:
		signal.Reset(s.Signal)
		_ = syscall.Kill(os.Getpid(), s.Signal)
		time.Sleep(time.Second)
	}
	// By the others Go's runtime would end in its own way.
	return &exitError{code: 128 + int(s.Signal)}
}
