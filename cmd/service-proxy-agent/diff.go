package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/service-proxy-agent/service-proxy-agent/agent"
	"github.com/service-proxy-agent/service-proxy-agent/internal/rulediff"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/internal/terminal"
)

func diffCommand() *cobra.Command {
	var output, other string
	c := &cobra.Command{
		Use:   "diff",
		Short: "Are the rules right: those that the kernel should have against those it has",
		Long: "Compares the rules that Envoy's listeners and the attribute ask for with those in the " +
			"kernel, in\niptables-save's form: - wanted and absent, + there and not wanted, ! another " +
			"program's that matters,\nwhich is never touched and is no difference. It changes nothing, " +
			"and needs no daemon. Where one runs\nand is about to write what differs, it looks again " +
			"before it says so.\n\n" +
			"With --config it says what another attribute would change on this VM: - would go, + would " +
			"come.\n\n" +
			"Exit code, the same in every form of output: 0 same; 1 differs; 2 could not look (as another " +
			"user than\nroot, say); 64 wrong usage, or a malformed file.\n\n" +
			symptom.DocsURL + "diff.schema.json is the form of -o json.",
		Example: "  sudo service-proxy-agent diff\n" +
			"  service-proxy-agent diff --config new.json",
	}
	settings := lookFlags(c)
	c.Flags().StringVarP(&output, "output", "o", "text", "`FORM` of the answer: text or json")
	config := c.Flags().Lookup("config")
	config.Usage = "`FILE` with another gce-service-proxy attribute's JSON: say what it would " +
		"change; none: defaults"
	// Cobra asks this before the environment is looked at, whose --config is the daemon's.
	c.Args = func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return usage(fmt.Errorf("%s takes no argument, got %q", cmd.CommandPath(), args[0]))
		}
		if !config.Changed {
			return nil
		}
		if other = config.Value.String(); other == "" {
			return usage(errors.New("--config is empty; name a file with an attribute's JSON, or none"))
		}
		config.Changed = false
		return config.Value.Set(config.DefValue)
	}
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		if output != "text" && output != "json" {
			return usage(fmt.Errorf("--output is %q; use text or json", output))
		}
		s, err := settings()
		if err != nil {
			return err
		}
		d, err := agent.Differ(cmd.Context(), s, other)
		if err != nil {
			return err
		}
		if output == "json" {
			err = d.JSON(cmd.OutOrStdout())
		} else {
			out := cmd.OutOrStdout()
			err = d.Text(out, terminal.For(out), terminal.Width(out))
		}
		err = unwritten(err)
		if err == nil && d.Exit != rulediff.Same {
			err = &exitError{code: d.Exit}
		}
		return err
	}
	return c
}
