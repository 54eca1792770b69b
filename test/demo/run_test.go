//go:build lab

package main

import (
	"bufio"
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// started is one demo under test.
type started struct {
	cmd *exec.Cmd
	pid int // 0: not started
	out *bytes.Buffer
	dir string // its TMPDIR, by which everything of it is known
}

func build(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "demo")
	if out, err := exec.Command("go", "build", "-o", path, ".").CombinedOutput(); err != nil {
		t.Fatalf("build the demo: %v\n%s", err, out)
	}
	return path
}

// start starts a demo in a process group of its own, as a shell does.
func start(t *testing.T, binary, agent, input string, args ...string) started {
	t.Helper()
	s := prepare(t, binary, agent, args...)
	s.cmd.Stdin = strings.NewReader(input)
	s.cmd.Stdout, s.cmd.Stderr = s.out, s.out
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s.pid = s.cmd.Process.Pid
	return s
}

// prepare is what start starts.
func prepare(t *testing.T, binary, agent string, args ...string) started {
	t.Helper()
	envoy, err := lab.FindEnvoy()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "demo-test-")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s := started{cmd: exec.Command(binary, args...), out: new(bytes.Buffer), dir: dir}
	s.cmd.Env = append(os.Environ(), "AGENT="+agent, "ENVOY="+envoy, "TMPDIR="+dir)
	return s
}

// wait waits for its end, and says with which exit code.
func (s started) wait(t *testing.T) int {
	t.Helper()
	err := s.cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return s.cmd.ProcessState.ExitCode()
}

// left is what is left of it: namespaces, files, processes.
func (s started) left() (left []string) {
	// the pattern is a good one
	namespaces, _ := filepath.Glob("/run/netns/spa-" + strconv.Itoa(s.pid) + "-*")
	files, _ := filepath.Glob(s.dir + "/*")
	left = append(namespaces, files...)
	processes, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range processes {
		env, _ := os.ReadFile(p + "/environ") // it may have ended meanwhile
		args, _ := os.ReadFile(p + "/cmdline")
		if bytes.Contains(append(env, args...), []byte(s.dir)) {
			left = append(left, p+" "+string(args))
		}
	}
	return left
}

func agentBinary(t *testing.T) string {
	t.Helper()
	path, err := mesh.Binary()
	if err != nil {
		t.Fatal(err)
	}
	if path, err = filepath.Abs(path); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestShow is one whole run with the prompt at its end.
func TestShow(t *testing.T) {
	t.Parallel()
	s := start(t, build(t), agentBinary(t),
		"add pay 10.10.0.3\nadd pay 10.10.0.4\nremove pay\nadd twin 10.10.0.1\nlist\nremove twin\nnonsense\nquit\n", "-keep")
	if code := s.wait(t); code != 0 {
		t.Fatalf("exit code %d:\n%s", code, s.out)
	}
	for _, want := range []string{"Every step held", "server: envoy",
		"from the push to the first redirected connection", "there is a service pay",
		"from the push to the first connection that is not redirected", `"nonsense" is no command`,
		"Envoy refuses the listeners", "twin         [10.10.0.1/32]  not taken by Envoy", "Taken down"} {
		if !strings.Contains(s.out.String(), want) {
			t.Errorf("the output lacks %q:\n%s", want, s.out)
		}
	}
	if strings.Contains(s.out.String(), "\x1b") {
		t.Error("colour without a terminal")
	}
	if left := s.left(); left != nil {
		t.Errorf("left: %q", left)
	}
}

// TestBackground is `make demo KEEP=1 &` in a shell with job control: asking the terminal for
// commands would stop the whole job.
func TestBackground(t *testing.T) {
	t.Parallel()
	s := prepare(t, build(t), agentBinary(t), "-keep")
	terminal, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer terminal.Close()
	if err := unix.IoctlSetPointerInt(int(terminal.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(terminal.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	inside, err := os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	shell := exec.Command(
		"sh", append([]string{"-c", `set -m; "$@" & wait $!`, "sh", s.cmd.Path}, s.cmd.Args[1:]...)...)
	shell.Env, shell.Stdin, shell.Stdout, shell.Stderr = s.cmd.Env, inside, inside, inside
	shell.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := shell.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { // the reaper does the rest, should the demo have stopped
		shell.Process.Kill()
		shell.Wait()
	}()
	inside.Close() // so that reading ends when the last of them has
	var out strings.Builder
	waits := regexp.MustCompile(`everything stays up until Ctrl-C \(or SIGTERM\s+to (\d+)\)`)
	signalled := false
	// the session's leader: everything in it gets SIGHUP
	giveUp := time.AfterFunc(2*time.Minute, func() { shell.Process.Kill() })
	defer giveUp.Stop()
	for lines := bufio.NewScanner(terminal); lines.Scan(); {
		out.WriteString(lines.Text() + "\n")
		if m := waits.FindStringSubmatch(out.String()); m != nil && !signalled {
			pid, _ := strconv.Atoi(m[1])
			s.pid, signalled = pid, true
			if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
		}
	}
	if !signalled || !strings.Contains(out.String(), "Taken down") {
		t.Errorf("in the background:\n%s", out.String())
	}
	if left := s.left(); signalled && left != nil {
		t.Errorf("left: %q", left)
	}
}

// TestShowFails has agents that do not do their work: the step that does not hold is named.
func TestShowFails(t *testing.T) {
	t.Parallel()
	binary, agent := build(t), agentBinary(t)
	for name, script := range map[string]string{
		"ends at once":  "exit 0",
		"does nothing":  `[ "$1" = run ] && exec sleep 1000`,
		"never healthy": `[ "$1" = status ] && { ` + agent + ` "$@"; exit 1; }; exec ` + agent + ` "$@"`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "agent")
			if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
				t.Fatal(err)
			}
			s := start(t, binary, path, "")
			if code := s.wait(t); code != 1 || !strings.Contains(s.out.String(), "does not hold") ||
				strings.Contains(s.out.String(), "Every step held") {
				t.Errorf("exit code %d:\n%s", code, s.out)
			}
			if left := s.left(); left != nil {
				t.Errorf("left: %q", left)
			}
		})
	}
}

// TestInterrupted ends demos at random moments, most of them in the first, busiest second.
func TestInterrupted(t *testing.T) {
	t.Parallel()
	binary, agent := build(t), agentBinary(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	runs := 8
	if os.Getenv("SOAK") == "1" {
		runs = 200
	}
	signals := []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGKILL}
	for i := range runs {
		after := time.Duration(r.Float64() * float64(
			[]time.Duration{300 * time.Millisecond, time.Second, 4 * time.Second}[i%3]))
		signal, whole := signals[r.IntN(len(signals))], r.IntN(2) == 0
		s := start(t, binary, agent, "", [][]string{nil, {"-keep"}}[r.IntN(2)]...)
		time.Sleep(after)
		to := s.cmd.Process.Pid
		if whole { // as ctrl-C on a terminal
			to = -to
		}
		if err := syscall.Kill(to, signal); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		code := s.wait(t)
		what := signal.String() + " after " + after.String()
		// -1: the signal itself ended it, before it had begun or because it can do nothing against it.
		if !slices.Contains([]int{-1, 128 + int(signal)}, code) {
			t.Errorf("%s: exit code %d:\n%s", what, code, s.out)
		}
		if took := time.Since(began); took > 20*time.Second {
			t.Errorf("%s: ended after %s", what, took)
		}
		left := s.left()
		for deadline := time.Now().Add(5 * time.Second); code == -1 && left != nil && time.Now().Before(
			deadline); left = s.left() {
			time.Sleep(20 * time.Millisecond) // the reaper's turn
		}
		if left != nil {
			t.Errorf("%s: exit code %d, left: %q\n%s", what, code, left, s.out)
		}
	}
}
