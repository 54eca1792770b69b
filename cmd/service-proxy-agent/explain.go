package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/service-proxy-agent/service-proxy-agent/agent"
	"github.com/service-proxy-agent/service-proxy-agent/internal/exitcode"
	"github.com/service-proxy-agent/service-proxy-agent/internal/explain"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/internal/terminal"
	"github.com/service-proxy-agent/service-proxy-agent/internal/try"
)

func explainCommand() *cobra.Command {
	var output, uid, gid string
	var q explain.Question
	c := &cobra.Command{
		Use:   "explain ADDRESS:PORT",
		Short: "Where does a connection go: by which rule, and what does Envoy do with it",
		Long: "Says of one connection whether it goes to Envoy, and what decides that: the way through " +
			"the kernel's\nrules with their counters, Envoy's listener, filter chain, route, cluster and " +
			"endpoints. It changes\nnothing, and needs no daemon. Only --try makes traffic: one real " +
			"connection, on which no byte is sent.\n\n" +
			"Exit code, the same in every form of output: 0 intercepted; 1 not; 2 could not look (as " +
			"another user\nthan root, say), or rules and kernel differ (--try); 64 wrong usage.\n\n" +
			"With --from it answers, on any machine, by what a bundle has of the VM. That knows the users " +
			"by name whom\nrules are about; give any other by number.\n\n" +
			symptom.DocsURL + "explain.schema.json is the form of -o json.",
		Example: "  sudo service-proxy-agent explain 10.0.0.1:80\n" +
			"  service-proxy-agent explain 10.0.0.1:80 --from bundle.tgz\n" +
			"  sudo service-proxy-agent explain [fd00::1]:80 --uid www-data --try\n" +
			"  sudo service-proxy-agent explain 10.128.0.5:8080 --inbound",
		ValidArgsFunction: addresses,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usage(fmt.Errorf("%s takes one ADDRESS:PORT, got %q", cmd.CommandPath(), args))
			}
			return nil
		},
	}
	look := fromFlag(c, agent.LookAtRules)
	f := c.Flags()
	f.StringVarP(&output, "output", "o", "text", "`FORM` of the answer: text or json")
	f.StringVar(&uid, "uid", "",
		"`USER` who makes the connection, by name or number (default: an ordinary user)")
	f.StringVar(&gid, "gid", "", "their `GROUP`, by name or number (default: the user's)")
	f.BoolVar(&q.UDP, "udp", false, "a UDP packet, as a DNS question is")
	f.BoolVar(&q.Inbound, "inbound", false, "the connection comes in from elsewhere")
	f.StringVar(&q.In, "in-interface", "", "the `INTERFACE` it comes in by, such as docker0")
	f.BoolVar(&q.Try, "try", false,
		"make one real connection as that user, which needs root, and compare what becomes of it")
	c.RunE = func(cmd *cobra.Command, args []string) error {
		if output != "text" && output != "json" {
			return usage(fmt.Errorf("--output is %q; use text or json", output))
		}
		replayed := cmd.Flags().Changed(from)
		err := fitTogether(q, uid+gid != "")
		if err == nil && q.Try && replayed {
			err = errors.New("--try makes a connection on this machine; leave it out with --from")
		}
		if err != nil {
			return usage(err)
		}
		if q.To, err = explain.ParseAddress(args[0]); err != nil {
			return usage(err)
		}
		looked, err := look(cmd.Context())
		if err != nil {
			return err
		}
		if q.UID, q.GID, err = looked.Caller(uid, gid); err != nil {
			return err
		}
		if replayed {
			cmd.PrintErrf("by a look of %s\n", looked.Seen.Now.UTC().Format(time.RFC3339))
		}
		answer := looked.Explain(cmd.Context(), q)
		if output == "json" {
			err = explain.Print(answer, looked.Seen.Settings.Version, explainCode(answer)).
				JSON(cmd.OutOrStdout())
		} else {
			out := cmd.OutOrStdout()
			err = answer.WriteText(out, terminal.For(out), terminal.Width(out))
		}
		if err != nil {
			return unwritten(err)
		}
		if code := explainCode(answer); code != 0 {
			return &exitError{code: code}
		}
		return nil
	}
	return c
}

// fitTogether refuses flags of which one leaves the other without a meaning; hasUser says that who
// makes the connection is given.
func fitTogether(q explain.Question, hasUser bool) error {
	switch {
	case q.Inbound && hasUser:
		return errors.New("--uid and --gid are of who makes a connection here; " +
			"leave them out with --inbound")
	case !q.Inbound && q.In != "":
		return errors.New("--in-interface is for --inbound")
	case q.Try && q.Inbound:
		return fmt.Errorf("--try: %w", try.ErrInbound)
	case q.Try && q.UDP:
		return errors.New("--try makes a TCP connection; leave out --udp")
	}
	return nil
}

// explainCode is the exit code of an answer, in every form of output.
func explainCode(a explain.Answer) int {
	switch {
	case !a.Complete():
		return exitcode.NotKnown
	case a.Verdict == explain.Intercepted:
		return 0
	}
	return exitcode.No
}
