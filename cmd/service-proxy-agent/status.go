package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/internal/exitcode"
	"github.com/service-proxy-agent/service-proxy-agent/internal/server"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/internal/terminal"
)

func statusCommand() *cobra.Command {
	var output, html string
	var watch, history bool
	c := &cobra.Command{
		Use:   "status",
		Short: "How it is: what the daemon knows",
		Long: "Asks the daemon by its socket, which answers root only, and prints what it knows: how " +
			"the VM stands and\nsince when, then its parts, what is wrong with what to do about it, and " +
			"the last ten transitions.\n\n" +
			"--watch looks each second until Ctrl-C. On a terminal it draws the text anew. Elsewhere it " +
			"prints the text,\nor with -o json a line of JSON, when something other than ages and counts " +
			"has changed. Where the\ndaemon goes away it says so, and goes on.\n\n" +
			"--html looks at the VM itself as well, as doctor does, and writes one page of both, also " +
			"where no daemon\nanswers. The file is for its owner alone; it needs nothing else, and asks " +
			"for nothing.\n\n" +
			"--serve shows that page live in a browser, until Ctrl-C. The link that it prints works once, " +
			"on this machine.\n\n" +
			"With --watch the exit code is that of the last look; with --html an error that it sees by " +
			"itself counts, too; with --serve it is 0 once that is ended, and 2 where it could not " +
			"listen. Whether the mesh is ready is another question, which `wait` asks.\n\n" +
			"Exit code, the same in every form of output: 0 no error stands; 1 one does, or the daemon is " +
			"stuck; 2 no answer; 64 wrong usage.\n\n" +
			symptom.DocsURL + "status.schema.json is the form of -o json.",
		Example: "  sudo service-proxy-agent status\n" +
			"  sudo service-proxy-agent status -o json\n" +
			"  sudo service-proxy-agent status --watch\n" +
			"  sudo service-proxy-agent status --html page.html\n" +
			"  sudo service-proxy-agent status --serve",
	}
	f := c.Flags()
	f.StringVarP(&output, "output", "o", "text", "`FORM` of the answer: text or json")
	f.BoolVar(&history, "history", false, "all transitions that are remembered, not the last ten")
	f.BoolVarP(&watch, "watch", "w", false, "look each second, until Ctrl-C")
	f.StringVar(&html, "html", "", "write a page to look at in a browser to `FILE`; - is stdout")
	address := serveFlag(c)
	settings := lookFlags(c) // of --html and --serve: the daemon knows where to look
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		ctx, out := cmd.Context(), cmd.OutOrStdout()
		switch {
		case *address != "":
			if err := alone(f, "serve", "html", "watch", "output", "history"); err != nil {
				return err
			}
			return serve(ctx, out, *address, settings)
		case f.Changed("html"):
			if err := alone(f, "html", "watch", "output", "history"); err != nil {
				return err
			}
			return writePage(ctx, out, html, settings)
		case output != "text" && output != "json":
			return usage(fmt.Errorf("--output is %q; use text or json", output))
		}
		tell := teller{out: out, json: output == "json", history: history}
		if watch {
			return newWatcher(tell, cmd.ErrOrStderr()).run(ctx)
		}
		return tellStatus(ctx, tell)
	}
	return c
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

// tellStatus asks once.
func tellStatus(ctx context.Context, tell teller) error {
	body, s, err := askStatus(ctx)
	if err != nil {
		return noAnswer(err)
	}
	if err := tell.status(body, s); err != nil {
		return unwritten(err)
	}
	return verdict(s)
}

// verdict is a status as an exit code.
func verdict(s status.Status) error {
	if s.Healthy() && !s.Stuck(time.Now()) {
		return nil
	}
	return &exitError{code: exitcode.No}
}

func noAnswer(err error) error {
	return &exitError{exitcode.NotKnown, fmt.Errorf("no answer from the agent: %w; "+
		"`systemctl status service-proxy-agent` tells whether it runs", err)}
}

// teller writes a status as somebody wants it.
type teller struct {
	out           io.Writer
	json, history bool
}

func (t teller) status(body []byte, s status.Status) error {
	if t.json {
		_, err := fmt.Fprintf(t.out, "%s\n", bytes.TrimSpace(body))
		return err
	}
	return s.Text(t.out, t.options(s))
}

func (t teller) options(s status.Status) status.TextOptions {
	o := status.TextOptions{Now: time.Now(), Width: terminal.Width(t.out), Style: terminal.For(t.out)}
	if t.history {
		o.History = len(s.History)
	}
	return o
}

// askStatus asks the daemon's socket; body is the answer as it came, but that of an agent from
// before its form had a name: that is put into this one.
func askStatus(ctx context.Context) (body []byte, s status.Status, err error) {
	body, err = server.Dial(server.Dir()).Get(ctx, "/status")
	if err != nil {
		return nil, s, err
	}
	if err = json.Unmarshal(body, &s); err != nil {
		return nil, s, fmt.Errorf("read the agent's answer: %w", err)
	}
	if s.Schema == "" {
		body, err = json.MarshalIndent(s, "", "  ")
	}
	return body, s, err
}

func waitCommand() *cobra.Command {
	var timeout time.Duration
	var listen string
	c := &cobra.Command{
		Use:   "wait",
		Short: "Wait until the mesh is ready, as a script or unit would",
		Long: "Asks the daemon's /healthz/ready four times a second until it says yes: Envoy is live, " +
			"its ports accept and the rules are in, or metadata has interception off and they are out. " +
			"Meanwhile it says on stderr what it waits for. Every " +
			"user may ask.\n\n" +
			"Exit code: 0 ready; 1 not in time; 64 wrong usage.",
		Example: "  service-proxy-agent wait --timeout 2m",
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			if timeout < 0 {
				return usage(fmt.Errorf("--timeout is %s; use a time like 2m, or 0 to wait for ever", timeout))
			}
			if timeout > 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, timeout)
				defer cancel()
			}
			ask, err := readiness(listen)
			if err != nil {
				return usage(err)
			}
			why := ""
			for {
				ready, text, err := ask(ctx)
				if ready || err != nil {
					return err
				}
				if ctx.Err() == nil && text != why {
					why = text
					fmt.Fprintln(os.Stderr, "service-proxy-agent: waiting: "+why)
				}
				select {
				case <-ctx.Done():
					return &exitError{exitcode.No, fmt.Errorf("not ready in time: %s", why)}
				case <-time.After(250 * time.Millisecond):
				}
			}
		},
	}
	c.Flags().DurationVar(&timeout, "timeout", 0, "`TIME` to wait, as in 2m; 0: for ever")
	c.Flags().StringVar(&listen, "listen", defaultListen,
		"the daemon's --listen `ADDRESS`; empty: ask its socket, which answers root only")
	return c
}

// readiness is how to ask a daemon with this --listen whether the mesh is ready, and if not, why.
// An error of the answer's says that to ask again is of no use.
func readiness(listen string) (ask func(context.Context) (ready bool, why string, err error),
	err error) {
	if listen == "" {
		return askSocket, nil
	}
	host, port, err := net.SplitHostPort(listen)
	if err != nil {
		return nil, fmt.Errorf(
			"--listen is %q; use host:port or :port, or nothing to ask the agent's socket", listen)
	}
	if host == "" || host == "0.0.0.0" || host == "::" {
		host = "127.0.0.1"
	}
	url := "http://" + net.JoinHostPort(host, port) + "/healthz/ready"
	return func(ctx context.Context) (bool, string, error) {
		ready, why := askReady(ctx, url)
		return ready, why, nil
	}, nil
}

// askSocket says of the socket's status what /healthz/ready does: that of a stuck loop counts for
// nothing.
func askSocket(ctx context.Context) (ready bool, why string, err error) {
	_, s, err := askStatus(ctx)
	switch {
	case err != nil && errors.Is(unix.Access(filepath.Join(server.Dir(), "agent.sock"), unix.W_OK),
		fs.ErrPermission):
		return false, "", fmt.Errorf("--listen is empty, so that only the agent's socket can tell: %w; "+
			"or give the agent, and wait, a --listen", err)
	case err != nil:
		return false, err.Error(), nil
	case s.Ready && s.Stuck(time.Now()):
		return false, "the loop is stuck since " + s.Heartbeat.Format(time.RFC3339), nil
	}
	return s.Ready, s.NotReady, nil
}

var readyClient = &http.Client{
	Timeout: 2 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}

func askReady(ctx context.Context, url string) (bool, string) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return false, err.Error()
	}
	resp, err := readyClient.Do(req)
	if err != nil {
		return false, "the agent does not answer on " + url
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(io.LimitReader(resp.Body, 4096)) // half a reason is as good
	return resp.StatusCode == http.StatusOK, strings.TrimSpace(string(body))
}
