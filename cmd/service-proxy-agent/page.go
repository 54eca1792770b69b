package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/agent"
	"github.com/service-proxy-agent/service-proxy-agent/internal/atomicfile"
	"github.com/service-proxy-agent/service-proxy-agent/internal/exitcode"
	"github.com/service-proxy-agent/service-proxy-agent/internal/page"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// writePage looks at the VM itself, as doctor does, and writes what it saw and what the daemon
// knows as one page.
func writePage(ctx context.Context, out io.Writer, file string,
	settings func() (agent.Settings, error)) error {
	if file == "" {
		return usage(errors.New("--html is empty; name a file, or - for stdout"))
	}
	s, err := settings()
	if err != nil {
		return err
	}
	content := pageContent(ctx, s)
	var html bytes.Buffer
	if err := page.Render(&html, content); err != nil {
		return err
	}
	if file == "-" {
		_, err = out.Write(html.Bytes())
	} else {
		err = replaceFile(file, html.Bytes())
		if err == nil {
			_, err = fmt.Fprintf(out, "%s: a page, to open in a browser\n", file)
		}
	}
	if err != nil {
		return unwritten(err)
	}
	return pageVerdict(content)
}

// pageVerdict is what a page says, as an exit code.
func pageVerdict(c page.Content) error {
	switch {
	case c.Status == nil:
		return &exitError{exitcode.NotKnown, fmt.Errorf("no answer from the agent: %s; the page has "+
			"what was seen without it", c.NoStatus)}
	case !c.Healthy():
		return &exitError{code: exitcode.No}
	}
	return nil
}

// replaceFile replaces a file, but nothing else: without /dev/null, or with a file in the place of
// the link /dev/stdout, the machine would be broken. The page is for its owner alone: who is shown
// it learns the names of all services.
func replaceFile(file string, html []byte) error {
	if info, err := os.Lstat(file); err == nil && !info.Mode().IsRegular() {
		return fmt.Errorf("%q is no regular file; name another, or - for stdout", file)
	}
	return atomicfile.Write(file, html, 0o600)
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
