// Package systemd is all of the agent's talk with systemd: readiness and watchdog (sd_notify), the
// state of a unit, log lines for the journal, and the units and the journal's catalog, which ship
// inside the binary, with installing and removing them.
//
// It decides nothing about when: cmd/service-proxy-agent says READY=1 and takes the Journal where
// stderr leads there, agent.Observe asks for Envoy's unit, and internal/bootstrap installs, enables
// and restarts. The words of the catalog are made by internal/symptom's tests.
package systemd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// ErrNoUnit is returned for a unit that systemd does not know.
var ErrNoUnit = errors.New("no such unit")

// Notify sends states such as "READY=1" or "STATUS=…" to the service manager in one datagram.
// Without a manager (NOTIFY_SOCKET unset) it does nothing. A newline inside a state would be a
// state of its own, so it becomes a space.
func Notify(states ...string) error {
	lines := make([]string, len(states))
	for i, state := range states {
		lines[i] = strings.ReplaceAll(state, "\n", " ")
	}
	if _, err := daemon.SdNotify(false, strings.Join(lines, "\n")); err != nil {
		return fmt.Errorf("notify systemd: %w", err)
	}
	return nil
}

// State is what systemd knows of a unit, in systemd's own words.
type State struct {
	Load       string // loaded, not-found, masked…
	Active     string // active, activating, inactive, failed…
	Sub        string // running, auto-restart, dead…
	Result     string // success, exit-code, signal, watchdog, oom-kill…
	MainPID    int    // 0: no process
	ExitCode   int    // of the last main process that ended by itself; -1: none did
	ExitSignal int    // that ended the last main process; 0: none
	Restarts   int    // automatic ones since the unit was last started by hand
	Enabled    bool
	Since      time.Time // of the last change of Active; zero: never
}

// Job is what systemd is doing to a unit: "start", "stop", "restart" …, "" for nothing. While a
// unit is stopped to be started again it is "restart".
func Job(ctx context.Context, unit string) (string, error) {
	out, err := exec.CommandContext(ctx, "systemctl", "list-jobs", "--plain", "--no-legend", "--full",
		"--", unit).Output()
	if err != nil {
		return "", fmt.Errorf("ask systemd for jobs of %s: %w", unit, err)
	}
	// 1234 service-proxy-envoy.service restart running
	for line := range strings.Lines(string(out)) {
		if f := strings.Fields(line); len(f) >= 3 && f[1] == unit {
			return f[2], nil
		}
	}
	return "", nil
}

// UnitState asks systemd for a unit's state; any user may. It returns ErrNoUnit for an
// unknown one, and an error that holds systemctl's words where systemd does not answer (a
// container without it, say).
func UnitState(ctx context.Context, unit string) (State, error) {
	cmd := exec.CommandContext(ctx, "systemctl", "show", "--timestamp=unix",
		"--property=LoadState,ActiveState,SubState,Result,MainPID,ExecMainCode,ExecMainStatus,"+
			"NRestarts,UnitFileState,StateChangeTimestamp", "--", unit)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if err != nil {
		// --timestamp came with systemd 247 (Debian 11), unix with 251: without it the
		// time is simply not known.
		cmd = exec.CommandContext(ctx, "systemctl", append([]string{"show"}, cmd.Args[3:]...)...)
		stderr.Reset()
		cmd.Stderr = &stderr
		cmd.WaitDelay = time.Second
		if out, err = cmd.Output(); err != nil {
			return State{}, fmt.Errorf("show unit %q: %w: %s", unit, err, firstLine(stderr.String()))
		}
	}
	state := parseState(string(out))
	if state.Load == "not-found" {
		return state, fmt.Errorf("unit %q: %w", unit, ErrNoUnit)
	}
	return state, nil
}

// Values of siginfo's si_code, which ExecMainCode shows (waitid(2)).
const cldExited = 1

func parseState(show string) State {
	state := State{ExitCode: -1}
	var code, status int
	for line := range strings.Lines(show) {
		key, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "=")
		n, _ := strconv.Atoi(value)
		switch key {
		case "LoadState":
			state.Load = value
		case "ActiveState":
			state.Active = value
		case "SubState":
			state.Sub = value
		case "Result":
			state.Result = value
		case "MainPID":
			state.MainPID = n
		case "NRestarts":
			state.Restarts = n
		case "ExecMainCode":
			code = n
		case "ExecMainStatus":
			status = n
		case "UnitFileState":
			state.Enabled = value == "enabled" || value == "enabled-runtime"
		case "StateChangeTimestamp":
			if sec, err := strconv.ParseInt(strings.TrimPrefix(value, "@"), 10, 64); err == nil && sec > 0 {
				state.Since = time.Unix(sec, 0)
			} else if t, err := time.Parse("Mon 2006-01-02 15:04:05 MST", value); err == nil &&
				t.Location() == time.UTC {
				state.Since = t
			}
		}
	}
	switch {
	case code == cldExited:
		state.ExitCode = status
	case code != 0:
		state.ExitSignal = status
	}
	return state
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(s), "\n")
	return line
}
