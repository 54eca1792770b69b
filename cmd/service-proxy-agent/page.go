package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/service-proxy-agent/service-proxy-agent/agent"
	"github.com/service-proxy-agent/service-proxy-agent/internal/atomicfile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/page"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// htmlFlag gives `status` the flag --html. With it the command looks at the VM itself, as doctor
// does, and writes what it saw and what the daemon knows as one page.
func htmlFlag(c *cobra.Command, settings func() (agent.Settings, error)) {
	var file string
	c.Flags().StringVar(&file, "html", "",
		"write a page to look at in a browser to `FILE`; - is stdout")
	run := c.RunE
	c.RunE = func(cmd *cobra.Command, args []string) error {
		if !cmd.Flags().Changed("html") {
			return run(cmd, args)
		}
		if err := alone(cmd.Flags(), "html", "output", "history"); err != nil {
			return err
		}
		if file == "" {
			return usage(errors.New("--html is empty; name a file, or - for stdout"))
		}
		s, err := settings()
		if err != nil {
			return err
		}
		content := pageContent(cmd.Context(), s)
		var html bytes.Buffer
		if err := page.Render(&html, content); err != nil {
			return err
		}
		if file == "-" {
			_, err = cmd.OutOrStdout().Write(html.Bytes())
		} else {
			err = writePage(file, html.Bytes())
			if err == nil {
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: a page, to open in a browser\n", file)
			}
		}
		switch {
		case err != nil:
			return unwritten(err)
		case content.Status == nil:
			return &exitError{exitNoAnswer, fmt.Errorf("no answer from the agent: %s; the page has what "+
				"was seen without it", content.NoStatus)}
		}
		return verdict(*content.Status)
	}
}

// writePage replaces a file, but nothing else: without /dev/null, or with a file in the place of the
// link /dev/stdout, the machine would be broken. The page is for its owner alone: who is shown it
// learns the names of all services.
func writePage(file string, html []byte) error {
	if info, err := os.Lstat(file); err == nil && !info.Mode().IsRegular() {
		return fmt.Errorf("%q is no regular file; name another, or - for stdout", file)
	}
	return atomicfile.Write(file, html, 0o600)
}

// alone says that a way to show the status goes with none of the others.
func alone(flags *pflag.FlagSet, way string, others ...string) error {
	for _, other := range others {
		if flags.Changed(other) {
			return usage(fmt.Errorf("--%s is another way to show the status; leave it out with --%s",
				other, way))
		}
	}
	return nil
}

// pageContent looks at this VM, as doctor does, for a page.
func pageContent(ctx context.Context, s agent.Settings) page.Content {
	return contentOf(ctx, agent.Look(ctx, s))
}

// contentOf is what the page shows of a look.
func contentOf(ctx context.Context, looked agent.Looked) page.Content {
	host, _ := os.Hostname() // a page without one is as good
	c := page.Content{
		Time: looked.Seen.Now, Host: host, Commit: commit, Status: looked.Daemon, Seen: looked.Status(),
		Report: reportOf(looked, symptom.Error),
	}
	services := c.Seen.Services
	if c.Status != nil {
		services = c.Status.Services
	} else {
		c.NoStatus = cmp.Or(looked.Facts.Unseen[symptom.FromAgent], "it does not run")
	}
	ctx, cancel := context.WithTimeout(ctx, countLimit)
	defer cancel()
	counts, why := looked.ServiceCounts(ctx)
	if c.NoCounts = why; len(counts) > 0 {
		c.Counts = page.CountsOf(services, counts)
	}
	return c
}

// countLimit is how long the question for the services' counters may take, after the look.
const countLimit = 3 * time.Second
