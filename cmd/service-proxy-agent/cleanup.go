package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/service-proxy-agent/service-proxy-agent/agent"
	"github.com/service-proxy-agent/service-proxy-agent/internal/conntrack"
	"github.com/service-proxy-agent/service-proxy-agent/internal/server"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

func cleanupCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "cleanup",
		Short: "Take our rules out of the kernel; a running daemon pauses until it is restarted",
		Long: "Takes every chain and rule of ours out of the kernel, of both families and both " +
			"iptables backends, and says what it removed. A running daemon writes no more until it is " +
			"restarted. Connections go on their way without Envoy then; streams that Envoy has go on " +
			"while another program's rules keep connection tracking on.\n\n" +
			"Exit code: 0 nothing of ours is left; 1 something may be, with the reason; 64 wrong usage.",
		Example: "  sudo service-proxy-agent cleanup",
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), 60*time.Second)
			defer cancel()
			// Without this a running daemon would put the rules back at once.
			_, pauseErr := server.Dial(server.Dir()).Post(ctx, "/pause")
			switch {
			case pauseErr == nil:
				fmt.Fprintln(cmd.OutOrStdout(), "the running agent is paused until it is restarted")
			case errors.Is(pauseErr, server.ErrNoAgent):
				pauseErr = nil
			}
			removed, err := clean(ctx)
			for _, r := range removed {
				fmt.Fprintln(cmd.OutOrStdout(), r)
			}
			if err != nil {
				return fmt.Errorf("cleanup: %w", err)
			}
			if len(removed) == 0 {
				fmt.Fprintln(cmd.OutOrStdout(), "nothing of ours was there")
			}
			if pauseErr != nil {
				return fmt.Errorf(
					"cleanup: the running agent could not be paused and may put the rules back: %w; stop it "+
						"with `systemctl stop service-proxy-agent`", pauseErr)
			}
			return nil
		},
	}
}

// clean takes everything of ours out of the kernel and says what it removed, a line each.
func clean(ctx context.Context) (removed []string, err error) {
	kernel, err := iptables.Open(ctx, iptables.Options{})
	if err != nil {
		return nil, err
	}
	removed, err = kernel.Cleanup(ctx)
	dns := false
	for i, r := range removed {
		dns = dns || strings.Contains(r, "SERVICE_PROXY_DNS")
		removed[i] = "removed " + r
	}
	if err == nil {
		if err := agent.Unmark(); err != nil { // the rules are out all the same, and that is what counts
			removed = append(removed, err.Error())
		}
	}
	if err == nil && dns {
		// Programs that always ask from one port would ask Envoy for ever.
		if _, err = conntrack.DeleteUDP(ctx, 53); err != nil {
			err = fmt.Errorf(
				"the rules are out, but DNS questions from a fixed port may still go to Envoy: %w", err)
		}
	}
	return removed, err
}
