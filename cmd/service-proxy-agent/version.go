package main

import (
	"fmt"
	"runtime"

	"github.com/spf13/cobra"
)

// version and commit are stamped by the Makefile (-ldflags -X).
var (
	version = "dev"
	commit  = "unknown"
)

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "The version, commit, platform and Go release",
		Long: "Prints the version, commit, platform and Go release, in one line.\n\n" +
			"Exit code: 0 printed; 64 wrong usage.",
		Example: "  service-proxy-agent version",
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "service-proxy-agent %s (%s) %s/%s %s\n", version,
				commit, runtime.GOOS, runtime.GOARCH, runtime.Version())
			return err
		},
	}
}
