package main

import (
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
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/internal/server"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
)

func statusCommand() *cobra.Command {
	var output string
	c := &cobra.Command{
		Use:   "status",
		Short: "How it is: what the daemon knows",
		Long: "Asks the daemon by its socket, which answers root only, and prints what it knows.\n\n" +
			"Exit code, the same in every form of output: 0 healthy; 1 not; 2 no answer; 64 wrong usage.",
		Example: "  sudo service-proxy-agent status\n" +
			"  sudo service-proxy-agent status -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "text" && output != "json" {
				return usage(fmt.Errorf("--output is %q; use text or json", output))
			}
			body, s, err := askStatus(cmd.Context())
			if err != nil {
				return &exitError{exitNoAnswer, fmt.Errorf("no answer from the agent: %w; "+
					"`systemctl status service-proxy-agent` tells whether it runs", err)}
			}
			if output == "json" {
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s\n", strings.TrimSpace(string(body)))
			} else {
				err = printStatus(cmd.OutOrStdout(), s)
			}
			if err == nil && !s.Healthy() {
				err = &exitError{code: exitNo}
			}
			return err
		},
	}
	c.Flags().StringVarP(&output, "output", "o", "text", "`FORM` of the answer: text or json")
	settings := lookFlags(c) // of --html and --serve: the daemon knows where to look
	htmlFlag(c, settings)
	serveFlag(c, settings)
	return c
}

// askStatus asks the daemon's socket; body is the answer as it came.
func askStatus(ctx context.Context) (body []byte, s status.Status, err error) {
	body, err = server.Dial(server.Dir()).Get(ctx, "/status")
	if err != nil {
		return nil, s, err
	}
	if err = json.Unmarshal(body, &s); err != nil {
		err = fmt.Errorf("read the agent's answer: %w", err)
	}
	return body, s, err
}

func printStatus(out io.Writer, s status.Status) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	row := func(name, format string, args ...any) {
		fmt.Fprintf(w, "%s\t%s\n", name, fmt.Sprintf(format, args...))
	}
	ready := "yes"
	if !s.Ready {
		ready = "no: " + s.NotReady
	}
	row("agent", "%s, %s, last pass %s ago", s.Version, s.Mode,
		time.Since(s.Heartbeat).Round(100*time.Millisecond))
	row("ready", "%s", ready)
	if s.Bootstrap.Status != "" {
		row("bootstrap", "%s %s", s.Bootstrap.Status, s.Bootstrap.Failure)
	}
	if at := s.Attribute; at != nil {
		by := ""
		if at.Kept {
			by = " by an earlier run, and kept"
		}
		row("attribute", "read at %s%s", at.Read.Format(time.RFC3339), by)
	}
	envoy := "no answer"
	if s.Envoy.State != "" {
		envoy = s.Envoy.State + " " + s.Envoy.Version
	}
	row("envoy", "%s at %s, %d listeners, %d rejected", envoy, s.Envoy.Admin, s.Envoy.Listeners,
		s.Envoy.Rejected)
	for _, f := range s.Families {
		state := "as wanted"
		switch {
		case !f.Usable:
			state = "off: " + f.Error
		case !f.Equal:
			state = "not as wanted"
			if f.Error != "" {
				state += ": " + f.Error
			}
		}
		jumps := "jumps in"
		if !f.Jumps {
			jumps = "jumps out"
		}
		row(f.Family, "%s (%s), %s, %d service prefixes, %d ports, %d rules, to ports %d out %d in",
			state, s.Backend, jumps, f.Services, f.ServicePorts, f.Rules, f.OutboundPort, f.InboundPort)
	}
	if n := len(s.Services); n > 0 {
		var names []string
		for _, service := range s.Services[:min(n, 10)] {
			names = append(names, service.Name)
		}
		row("services", "%d: %s", n, strings.Join(names, ", ")+map[bool]string{true: ", …"}[n > 10])
	}
	if s.LastDriftBy != "" {
		row("last drift", "%s by %s", s.LastDriftWhen.Format(time.RFC3339), s.LastDriftBy)
	}
	for _, f := range s.Findings {
		explained := ""
		if f.ExplainedBy != "" {
			explained = " (explained by " + string(f.ExplainedBy) + ")"
		}
		row(f.Severity.String(), "%s%s", f.Text(), explained)
	}
	if s.LastFailure != "" {
		row("last failure", "%s", s.LastFailure)
	}
	return w.Flush()
}

func waitCommand() *cobra.Command {
	var timeout time.Duration
	var listen string
	c := &cobra.Command{
		Use:   "wait",
		Short: "Wait until the mesh is ready, as a script or unit would",
		Long: "Asks the daemon's /healthz/ready four times a second until it says yes: Envoy is live, its " +
			"ports accept and the rules are in. Meanwhile it says on stderr what it waits for. Every user " +
			"may ask.\n\n" +
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
					return &exitError{exitNo, fmt.Errorf("not ready in time: %s", why)}
				case <-time.After(250 * time.Millisecond):
				}
			}
		},
	}
	c.Flags().DurationVar(&timeout, "timeout", 0, "how long to wait, e.g. 2m; 0: for ever")
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

// askSocket says of the socket's status what /healthz/ready does: one that is older than five
// minutes is a stuck loop's.
func askSocket(ctx context.Context) (ready bool, why string, err error) {
	_, s, err := askStatus(ctx)
	switch {
	case err != nil && errors.Is(unix.Access(filepath.Join(server.Dir(), "agent.sock"), unix.W_OK),
		fs.ErrPermission):
		return false, "", fmt.Errorf("--listen is empty, so that only the agent's socket can tell: %w; "+
			"or give the agent, and wait, a --listen", err)
	case err != nil:
		return false, err.Error(), nil
	case s.Ready && time.Since(s.Heartbeat) > 5*time.Minute:
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
