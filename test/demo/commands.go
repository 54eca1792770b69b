package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
)

// place is where a command runs.
type place struct {
	prompt string
	in     *lab.Namespace
	env    []string // nil: this process's own, with the lab's iptables
}

func (d *demo) vm() place     { return place{prompt: "vm#", in: d.mesh.VM} }
func (d *demo) client() place { return place{prompt: "client$", in: d.mesh.Client} }

// path is a namespace's file, as nsenter takes it.
func path(ns *lab.Namespace) string { return "/run/netns/" + ns.Name }

// command is one command, shown as it would be typed at its place.
type command struct {
	name string
	cmd  *exec.Cmd
}

func (d *demo) command(ctx context.Context, at place, name string, args ...string) command {
	d.prompt(at.prompt, typed(append([]string{name}, args...)))
	return d.silent(ctx, at, name, args...)
}

// silent is a command that is not shown yet.
func (d *demo) silent(ctx context.Context, at place, name string, args ...string) command {
	cmd := at.in.Command(ctx, name, args...)
	if at.env != nil {
		cmd.Env = at.env
	}
	cmd.Env = withoutProxies(append(cmd.Env, "CURL_HOME="+d.mesh.Dir))
	// A group of its own, so that what is a script (gcloud) ends whole; and with it goes what
	// it would still write.
	cmd.SysProcAttr.Setpgid = true
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	return command{name, cmd}
}

// run runs it to its end. Nothing is shown. What it said on stderr comes after what it
// printed, if it failed.
func (c command) run() (code int, out string, err error) {
	var stdout, stderr strings.Builder
	c.cmd.Stdout, c.cmd.Stderr = &stdout, &stderr
	if err := lab.Start(c.cmd); err != nil {
		return 0, "", err
	}
	err = c.cmd.Wait()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0, stdout.String(), nil
	case errors.As(err, &exit) && exit.Exited():
		return exit.ExitCode(), stdout.String() + stderr.String(), nil
	}
	return 0, stdout.String() + stderr.String(), err
}

// pid of the command itself: nsenter became it.
func (c command) pid() int { return c.cmd.Process.Pid }

// curl asks url and shows the answer without the headers that say nothing here.
func (d *demo) curl(ctx context.Context, at place, url string) (code int, out string, err error) {
	// -g: the brackets of an IPv6 address are no pattern.
	code, out, err = d.command(ctx, at, "curl", "-gsSi", "--max-time", "5", url).run()
	var shown strings.Builder
	head := true
	for line := range strings.Lines(strings.ReplaceAll(out, "\r\n", "\n")) {
		name, _, header := strings.Cut(strings.TrimSpace(line), ": ")
		if line == "\n" {
			head = false
			continue
		}
		if head && header && !strings.HasPrefix(line, "curl:") && name != "server" &&
			name != "x-served-by" {
			continue
		}
		shown.WriteString(line)
	}
	d.output(shown.String())
	return code, out, err
}

// answers checks that url is answered by Envoy for a service, and that the endpoint behind it
// was reached at local.
func (d *demo) answers(ctx context.Context, at place, url, service, local string) error {
	code, out, err := d.curl(ctx, at, url)
	if err != nil {
		return err
	}
	text := strings.ReplaceAll(out, "\r\n", "\n")
	for _, want := range []string{"HTTP/1.1 200 OK\n", "\nserver: envoy\n", "\nx-served-by: " +
		service + "\n", " local=" + local + " "} {
		if code != 0 || !strings.Contains(text, want) {
			return fmt.Errorf("curl %s: exit code %d, and the answer lacks %q:\n%s", url, code,
				strings.TrimSpace(want), text)
		}
	}
	return nil
}

// chain shows one of the agent's chains and checks how many rows have each word.
func (d *demo) chain(ctx context.Context, name string, want map[string]int) error {
	code, out, err := d.command(ctx, d.vm(), "iptables", "-t", "nat", "-nL", name).run()
	d.output(out)
	if err != nil || code != 0 {
		return fmt.Errorf("list %s: exit code %d (%v)", name, code, err)
	}
	for word, n := range want {
		rows := 0
		for line := range strings.Lines(out) {
			for _, field := range strings.Fields(line) {
				if field == word {
					rows++
					break
				}
			}
		}
		if rows != n {
			return fmt.Errorf("%s has %d rows with %s, want %d", name, rows, word, n)
		}
	}
	return nil
}

// commandLine is a process's own.
func commandLine(pid int) string {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return err.Error()
	}
	argv := strings.Split(strings.TrimRight(string(raw), "\x00"), "\x00")
	argv[0] = filepath.Base(argv[0])
	return typed(argv)
}

// typed is a command line that a shell reads as argv.
func typed(argv []string) string {
	words := make([]string, len(argv))
	for i, w := range argv {
		if w == "" || strings.ContainsAny(w, " \t\n\"'\\$&;|<>()[]{}*?!~#`") {
			w = "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
		}
		words[i] = w
	}
	return strings.Join(words, " ")
}

// withoutProxies drops the variables by which curl would ask a proxy, which no namespace reaches.
func withoutProxies(env []string) (out []string) {
	for _, kv := range env {
		name, _, _ := strings.Cut(kv, "=")
		if n := strings.ToLower(name); n != "http_proxy" && n != "https_proxy" && n != "all_proxy" {
			out = append(out, kv)
		}
	}
	return out
}
