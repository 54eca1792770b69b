package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/service-proxy-agent/service-proxy-agent/agent"
	"github.com/service-proxy-agent/service-proxy-agent/internal/doctor"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/internal/terminal"
)

func doctorCommand() *cobra.Command {
	var output, failOn string
	var ignore []string
	c := &cobra.Command{
		Use:   "doctor",
		Short: "What is wrong: every check on this VM, with the fix",
		Long: "Looks at Envoy, the kernel, the metadata server and files by itself, with and without a " +
			"daemon, and\nchanges nothing. It ends within ten seconds. What it may not see, or what does " +
			"not answer, is told\nas unknown.\n\n" +
			"Exit code, the same in every form of output: 0 nothing of the severity to fail on; 1 " +
			"something; 2\nnothing, but a check of that severity could not look (as another user than " +
			"root, say); 64 wrong\nusage.\n\n" +
			"With --from it says, on any machine, what it said on the VM when the bundle was made.\n\n" +
			symptom.DocsURL + "symptoms.md has every check.\n" +
			symptom.DocsURL + "doctor.schema.json is the form of -o json.",
		Example: "  sudo service-proxy-agent doctor\n" +
			"  sudo service-proxy-agent doctor --fail-on warning --ignore application-silent -o json\n" +
			"  service-proxy-agent doctor --from bundle.tgz",
	}
	look := fromFlag(c, agent.Look)
	f := c.Flags()
	f.StringVarP(&output, "output", "o", "text", "`FORM` of the answer: text or json")
	f.StringVar(&failOn, "fail-on", "error", "least `SEVERITY` to fail on: error, warning or advice")
	f.StringSliceVar(&ignore, "ignore", nil,
		"`IDS` of checks whose findings do not count, with commas between; may be given several times")
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		if output != "text" && output != "json" {
			return usage(fmt.Errorf("--output is %q; use text or json", output))
		}
		severity, err := doctor.ParseSeverity(failOn)
		if err != nil {
			return usage(fmt.Errorf("--fail-on: %w", err))
		}
		ignored, err := doctor.ParseIDs(ignore)
		if err != nil {
			return usage(fmt.Errorf("--ignore: %w", err))
		}
		looked, err := look(cmd.Context())
		if err != nil {
			return err
		}
		report := reportOf(looked, severity, ignored...)
		if output == "json" {
			var body []byte
			if body, err = report.JSON(); err == nil {
				_, err = cmd.OutOrStdout().Write(body)
			}
		} else {
			out := cmd.OutOrStdout()
			err = report.Text(out, terminal.For(out), terminal.Width(out))
		}
		err = unwritten(err)
		if err == nil && report.Exit != doctor.Fine {
			err = &exitError{code: report.Exit}
		}
		return err
	}
	return c
}

// reportOf is what doctor says of a look, wherever and whenever it was.
func reportOf(l agent.Looked, failOn symptom.Severity, ignored ...symptom.ID) doctor.Report {
	return doctor.New(symptom.Examine(l.Facts, ignored...), doctor.Options{
		Version: l.Seen.Settings.Version, Time: l.Seen.Now, FailOn: failOn, Ignored: ignored,
		Unseen: l.Facts.Unseen,
	})
}
