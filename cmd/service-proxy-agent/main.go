// Command service-proxy-agent turns a Compute Engine VM into a mesh node. This package reads
// flags and environment, constructs the parts and runs them; every decision is made in
// package agent and below.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/service-proxy-agent/service-proxy-agent/agent"
	"github.com/service-proxy-agent/service-proxy-agent/internal/exitcode"
)

// exitError carries the exit code of a command; a nil err means that all was said on stdout.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return ""
	}
	return e.err.Error()
}
func (e *exitError) Unwrap() error { return e.err }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	code := execute(ctx, os.Args[1:])
	stop()
	os.Exit(code)
}

func execute(ctx context.Context, args []string) int {
	root := rootCommand()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	if text := err.Error(); text != "" {
		fmt.Fprintln(os.Stderr, "service-proxy-agent: "+text)
	}
	var exit *exitError
	switch {
	case errors.As(err, &exit):
		return exit.code
	case errors.Is(err, agent.ErrSettings):
		return exitcode.Usage
	}
	return exitcode.No
}

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "service-proxy-agent",
		Short: "Make this VM a node of a service mesh",
		Long: "Makes this VM a node of a service mesh: it keeps the kernel's interception rules equal " +
			"to what Envoy's live listeners need, watches Envoy's health, and tells the outside world how " +
			"the VM is doing.\n\n" +
			"The rules are iptables chains named SERVICE_PROXY_*, of table nat, for IPv4 and IPv6. Which " +
			"traffic they are for, the VM's metadata attribute gce-service-proxy says. The daemon is " +
			"`service-proxy-agent run`, and runs as the unit service-proxy-agent.service, which " +
			"`service-proxy-agent bootstrap` installs.\n\n" +
			"Exit code, of every command: " + exitCodes() + ".",
		Example: "  sudo service-proxy-agent status\n" +
			"  sudo service-proxy-agent doctor\n" +
			"  sudo service-proxy-agent help explain",
		ValidArgsFunction: cobra.NoFileCompletions,
		SilenceErrors:     true,
		SilenceUsage:      true,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usage(fmt.Errorf("unknown command %q; `service-proxy-agent --help` lists them", args[0]))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			cmd.SetOut(os.Stderr)
			_ = cmd.Help()
			return &exitError{code: exitcode.Usage}
		},
	}
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetHelpCommand(helpCommand(root))
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usage(fmt.Errorf("%w; `%s --help` lists the flags", err, cmd.CommandPath()))
	})
	root.AddCommand(runCommand(), statusCommand(), waitCommand(), cleanupCommand(), versionCommand(),
		bootstrapCommand(), envoyCommand(), drainCommand(), doctorCommand(), explainCommand(),
		diffCommand(), bundleCommand())
	for _, c := range root.Commands() {
		if c.Args == nil {
			c.Args = noArguments
		}
		withEnvironment(c)
	}
	withHelp(root)
	withCompletion(root)
	return root
}

// exitCodes are those of all commands, as [says] reads them.
func exitCodes() string {
	var all []string
	for _, e := range exitcode.Meanings {
		all = append(all, fmt.Sprintf("%d %s", e.Code, e.Meaning))
	}
	return strings.Join(all, "; ")
}

func noArguments(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usage(fmt.Errorf("%s takes no argument, got %q", cmd.CommandPath(), args[0]))
	}
	return nil
}

// helpCommand: cobra's own answers a word it does not know with the whole list and 0.
func helpCommand(root *cobra.Command) *cobra.Command {
	return &cobra.Command{
		Use:   "help [COMMAND]",
		Short: "What a command does, and its flags",
		Long: "Says what a command does, as COMMAND --help does.\n\n" +
			"Exit code: 0 said; 64 there is no such command.",
		Example: "  service-proxy-agent help doctor",
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) (
			all []cobra.Completion, _ cobra.ShellCompDirective,
		) {
			if len(args) == 0 {
				for _, c := range visible(root) {
					all = append(all, cobra.CompletionWithDesc(c.Name(), c.Short))
				}
			}
			return all, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(_ *cobra.Command, args []string) error {
			about, rest, err := root.Find(args)
			if err != nil || len(rest) > 0 {
				return usage(fmt.Errorf("no help about %q; `service-proxy-agent --help` lists the commands",
					strings.Join(args, " ")))
			}
			return about.Help()
		},
	}
}

func usage(err error) error { return &exitError{code: exitcode.Usage, err: err} }

// envName is the environment twin of a flag: --envoy-admin and SERVICE_PROXY_AGENT_ENVOY_ADMIN.
func envName(flag string) string {
	return "SERVICE_PROXY_AGENT_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// withEnvironment gives each flag of a command its environment twin; a flag wins. Commands that
// look at the VM take what is left from the daemon's file.
func withEnvironment(c *cobra.Command) {
	c.PreRunE = func(cmd *cobra.Command, _ []string) error {
		var first error
		given := given(cmd.Flags())
		cmd.Flags().VisitAll(func(f *pflag.Flag) {
			value, set := os.LookupEnv(envName(f.Name))
			if !set || f.Changed || f.Name == "help" || first != nil {
				return
			}
			if err := cmd.Flags().Set(f.Name, value); err != nil {
				first = usage(fmt.Errorf("%s=%q: %w", envName(f.Name), value, err))
			}
		})
		away := false
		if first == nil {
			away, first = elsewhere(cmd.Flags(), given)
		}
		if first == nil && !away {
			first = fromDaemonsFile(cmd.Flags())
		}
		if first == nil {
			// Cobra looks too, after this; its error would not be told from one of the command's.
			if err := cmd.ValidateFlagGroups(); err != nil {
				first = usage(err)
			}
		}
		return first
	}
}
