package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"net/url"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/service-proxy-agent/service-proxy-agent/agent"
	"github.com/service-proxy-agent/service-proxy-agent/internal/exitcode"
	"github.com/service-proxy-agent/service-proxy-agent/internal/explain"
	"github.com/service-proxy-agent/service-proxy-agent/internal/page"
	"github.com/service-proxy-agent/service-proxy-agent/internal/pageserver"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/internal/terminal"
)

// defaultServe is a fixed port, so that one command can forward it and start this one.
const defaultServe = "127.0.0.1:15080"

// serveFlag gives `status` the flag --serve; it is "" without.
func serveFlag(c *cobra.Command) *string {
	f := c.Flags()
	address := f.String("serve", "",
		"show the page live to a browser, at `127.0.0.1:PORT` until Ctrl-C")
	f.Lookup("serve").NoOptDefVal = defaultServe
	// A flag whose value may be left out leaves what stands behind a space as an argument.
	c.Args = func(cmd *cobra.Command, args []string) error {
		if len(args) == 1 && f.Changed("serve") && *address == defaultServe {
			*address, args = args[0], nil
		}
		return noArguments(cmd, args)
	}
	return address
}

// serve shows the page live at a loopback address until ctx ends.
func serve(ctx context.Context, out io.Writer, address string,
	settings func() (agent.Settings, error)) error {
	at, err := pageserver.Address(address)
	if err != nil {
		return usage(fmt.Errorf("--serve: %w", err))
	}
	s, err := settings()
	if err != nil {
		return err
	}
	host, _ := os.Hostname() // a page without one is as good
	served, err := pageserver.Listen(ctx, "--serve", at, pageserver.Pages{
		Host: host,
		Look: func(ctx context.Context) page.Content { return pageContent(ctx, s) },
		Explain: func(ctx context.Context, form url.Values) string {
			return answerForm(ctx, s, form)
		},
	})
	if err != nil {
		return &exitError{code: exitcode.NotKnown, err: err}
	}
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "service-proxy-agent: only root sees the rules, their counters and what "+
			"the daemon knows; the page lacks them")
	}
	if _, err = io.WriteString(out, servedText(served.Link(), served.Addr(), host)); err != nil {
		return unwritten(err)
	}
	return served.Run(ctx)
}

// servedText is what the command prints: the link, and the way to it from afar. That is always
// said, since sudo takes away SSH_CONNECTION, by which one could tell.
func servedText(link string, at netip.AddrPort, host string) string {
	host, _, _ = strings.Cut(host, ".")
	if host = symptom.Printable(host, 63); host == "" {
		host = "VM"
	}
	return fmt.Sprintf("%s\n\nThe link works once, in one browser on this machine. From another one, "+
		"forward the port first:\n  gcloud compute ssh %s -- -N -L %d:%s\nCtrl-C ends it.\n", link, host,
		at.Port(), at)
}

// answerForm answers the page's form as `explain` would, without --try.
func answerForm(ctx context.Context, s agent.Settings, form url.Values) string {
	q, err := formQuestion(form)
	if err != nil {
		return wrong(err)
	}
	looked := agent.LookAtRules(ctx, s)
	if q.UID, q.GID, err = looked.Caller(form.Get("uid"), ""); err != nil {
		return wrong(err)
	}
	var text strings.Builder
	answer := looked.Explain(ctx, q)
	err = answer.WriteText(&text, terminal.Style(false), terminal.Width(&text))
	if err != nil {
		return wrong(err)
	}
	return text.String()
}

// formQuestion is what the form asks, by the rules of the command's flags.
func formQuestion(form url.Values) (q explain.Question, err error) {
	switch direction := form.Get("direction"); direction {
	case "", page.Outbound:
	case page.Inbound:
		q.Inbound = true
	default:
		return q, fmt.Errorf("the direction is %q; use outbound or inbound", direction)
	}
	if err = fitTogether(q, form.Get("uid") != ""); err != nil {
		return q, errors.New("leave the user empty for a connection that comes in")
	}
	q.To, err = explain.ParseAddress(form.Get("to"))
	return q, err
}

// wrong is an error as text for the page: it may have in it what was typed.
func wrong(err error) string { return symptom.Printable(err.Error(), 500) }
