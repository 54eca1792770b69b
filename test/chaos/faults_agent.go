package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// agentStarts is how long a new process needs until it acts: with the race detector on a busy
// machine.
const agentStarts = 3 * time.Second

// agentFaults are the agent's own.
func agentFaults() []Fault {
	absent := func(name string, weight int, longest time.Duration,
		begin func(*World, *rand.Rand) (func() error, error)) Fault {
		return Fault{Name: name, Weight: weight, Group: "agent", Shortest: 10 * time.Millisecond,
			Longest: longest, Begin: begin, Hinders: true, Recovery: agentStarts}
	}
	rebooted := absent("agent-reboot", 2, 2*time.Second,
		func(w *World, _ *rand.Rand) (func() error, error) {
			if err := w.stopAgent(); err != nil {
				return nil, err
			}
			return w.StartAgent, w.Agent.Reboot()
		})
	rebooted.Excuses = []Excuse{{Kind: Escaped, After: time.Second, Envoy: true, Away: true}}
	return []Fault{
		absent("agent-kill", 4, 5*time.Second, func(w *World, _ *rand.Rand) (func() error, error) {
			w.killAgent()
			return w.StartAgent, nil
		}),
		{Name: "agent-kill-again", Weight: 2, Group: "agent", Shortest: 500 * time.Millisecond,
			Longest: 6 * time.Second, Begin: killAgain, Hinders: true, Recovery: agentStarts},
		absent("agent-term", 3, 5*time.Second, func(w *World, _ *rand.Rand) (func() error, error) {
			return w.StartAgent, w.stopAgent()
		}),
		{Name: "agent-stop", Weight: 3, Group: "agent", Shortest: 100 * time.Millisecond,
			Longest: 20 * time.Second, Begin: stopped, Hinders: true, Recovery: time.Second},
		// A processor of which little is left.
		{Name: "agent-starved", Weight: 2, Group: "agent", Shortest: time.Second,
			Longest: 8 * time.Second, Begin: starved, Hinders: true, Recovery: time.Second},
		absent("agent-upgrade", 2, 500*time.Millisecond, upgraded),
		{Name: "agent-settings", Weight: 2, Group: "agent", Shortest: 2 * time.Second,
			Longest: 10 * time.Second, Begin: otherSettings},
		// Rules that something has restored at boot wait for Envoy to accept: the run folder, which is a
		// tmpfs, is empty. Where Envoy is away just then, the jumps are out until it is there.
		rebooted,
		absent("agent-state-gone", 2, 2*time.Second,
			func(w *World, _ *rand.Rand) (func() error, error) {
				w.killAgent()
				return w.StartAgent, empty(w.ofAgent(w.Agent.StateDir()))
			}),
		absent("agent-state-garbage", 2, 2*time.Second,
			func(w *World, random *rand.Rand) (func() error, error) {
				w.killAgent()
				return w.StartAgent, spoil(w.ofAgent(w.Agent.StateDir()), random)
			}),
		// Until it is started again, and Envoy accepts, nothing is intercepted, as asked for. Where no
		// other rule needs connection tracking, the streams through Envoy end with ours.
		{Name: "agent-cleanup", Weight: 1, Group: "agent", Shortest: 100 * time.Millisecond,
			Longest: 4 * time.Second, Begin: cleanedUp, Hinders: true, Recovery: agentStarts,
			Excuses: []Excuse{{Kind: Escaped, After: 2 * time.Second, Envoy: true},
				{Kind: Cut, After: 2 * time.Second}}},
		// systemctl stop service-proxy-envoy: the jumps go out before it ends, so that nobody is refused.
		{Name: "envoy-planned-stop", Weight: 2, Group: "envoy", Also: "agent",
			Shortest: 4 * time.Second, Longest: 8 * time.Second, Begin: plannedStop,
			Excuses: []Excuse{{Kind: Cut}}, EnvoyAway: true, Heals: 3 * time.Second},
	}
}

// killAgent is kill -9.
func (w *World) killAgent() {
	w.EndAgent()
	w.Agent.Kill()
}

// restartAgent is the agent's unit (Restart=always), where nobody has ended that process.
func (w *World) restartAgent(pid int) error {
	w.unit.Lock()
	defer w.unit.Unlock()
	if running, ok := w.AgentPID(); !ok || running != pid || w.running.Err() != nil {
		return nil
	}
	return w.StartAgent()
}

// stopAgent is SIGTERM. One that does not end by it in the time that its unit gives is a finding.
func (w *World) stopAgent() error {
	w.EndAgent()
	began := time.Now()
	ended := make(chan error, 1)
	go func() { _, err := w.Agent.Stop(); ended <- err }()
	var err error
	select {
	case err = <-ended:
	case <-time.After(20 * time.Second):
		w.Agent.Kill()
		err = errors.New("it does not end within 20 s")
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) && began.Sub(w.started) < agentStarts {
		// One that has not come to take signals yet ends by them, which systemd takes for as clean.
		if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signal() == syscall.SIGTERM {
			err = nil
		}
	}
	if err != nil && !w.endsAnew(lastLines(w.Agent.Log(), 5)) {
		w.Observe(Observation{Kind: Died, From: began, To: time.Now(), What: "agent",
			Text: "at SIGTERM: " + err.Error()})
	}
	return nil
}

// killAgain kills each new process within moments, at whatever it does then.
func killAgain(w *World, random *rand.Rand) (func() error, error) {
	w.killAgent()
	seed := random.Uint64()
	end := background(func(ctx context.Context) {
		random := rand.New(rand.NewPCG(seed, 0))
		for ctx.Err() == nil {
			if err := w.Agent.Start(); err != nil {
				w.broken(fmt.Errorf("start the agent: %w", err))
				return
			}
			sleep(ctx, time.Duration(random.Int64N(int64(900*time.Millisecond))))
			w.Agent.Kill()
		}
	})
	return func() error { return errors.Join(end(), w.StartAgent()) }, nil
}

func stopped(w *World, _ *rand.Rand) (func() error, error) {
	pid := w.Agent.PID()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		return nil, fmt.Errorf("stop the agent: %w", err)
	}
	return func() error { return syscall.Kill(pid, syscall.SIGCONT) }, nil
}

// starved lets it run for some milliseconds of each hundred.
func starved(w *World, random *rand.Rand) (func() error, error) {
	pid := w.Agent.PID()
	runs := time.Duration(3+random.IntN(20)) * time.Millisecond
	return background(func(ctx context.Context) {
		for ctx.Err() == nil {
			_ = syscall.Kill(pid, syscall.SIGSTOP) // one that has died is what watchers see
			sleep(ctx, 100*time.Millisecond-runs)
			_ = syscall.Kill(pid, syscall.SIGCONT)
			sleep(ctx, runs)
		}
	}), nil
}

// upgraded starts the other build. Half of the times the one before was of a version that left no
// mark that the rules are of this boot.
func upgraded(w *World, random *rand.Rand) (func() error, error) {
	if err := w.stopAgent(); err != nil {
		return nil, err
	}
	if err := w.install(!w.upgraded); err != nil {
		return nil, err
	}
	var err error
	if random.IntN(2) == 0 {
		err = os.Remove(filepath.Join(w.Agent.RunDir(), "intercepting"))
		if errors.Is(err, os.ErrNotExist) {
			err = nil // it never had the jumps in
		}
	}
	return w.StartAgent, err
}

// install has the agent's path lead to the one build or to the other, as an upgrade does: at once.
func (w *World) install(upgrade bool) (err error) {
	target := w.Options.Agent
	if target == "" {
		if target, err = mesh.Binary(); err != nil {
			return err
		}
	}
	if upgrade && w.Options.Upgrade != "" {
		target = w.Options.Upgrade
	}
	w.upgraded = upgrade
	w.Agent.Binary = filepath.Join(w.Dir, "service-proxy-agent")
	next := w.Agent.Binary + ".next"
	return errors.Join(os.Symlink(target, next), os.Rename(next, w.Agent.Binary))
}

// policy is the flag that every agent of a game has.
func (s Setting) policy() []string {
	if s.Bypass {
		return []string{"--when-envoy-down", "bypass"}
	}
	return []string{"--when-envoy-down", "keep"}
}

// innocent are settings that no connection depends on.
var innocent = [][]string{
	{"--envoy-share", "1"}, {"--envoy-share", "50"}, {"--log-level", "debug"},
	{"--log-level", "error"}, {"--listen", "127.0.0.1:15021"}, {"--listen", ""},
	{"--metrics-listen", "127.0.0.1:15022"}, {"--cloud-logging", "off"}, {"--cloud-logging", "on"},
	{"--resolver-users", "nobody"}, {"--serial-port", ""}, {"--envoy-log", ""},
	{"--intercept-interfaces", "docker0"},
}

// otherSettings restarts it with some of them, and then as it was. What hinders it are the two
// restarts: in between it does its work.
func otherSettings(w *World, random *rand.Rand) (func() error, error) {
	args := w.Setting.policy()
	for range 1 + random.IntN(3) {
		args = append(args, innocent[random.IntN(len(innocent))]...)
	}
	restart := func(args []string) error {
		began := time.Now()
		if err := w.stopAgent(); err != nil {
			return err
		}
		w.Agent.SetArgs(args...)
		err := w.StartAgent()
		w.Excuse(Span{Event: Event{Name: "agent-settings-away"}, Begin: began, End: time.Now(),
			Hinders: true, Recovery: agentStarts})
		return err
	}
	w.Log("    %q", args)
	return func() error { return restart(w.Setting.policy()) }, restart(args)
}

// empty removes what is in a folder.
func empty(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		err = errors.Join(err, writable(os.RemoveAll(filepath.Join(dir, e.Name()))))
	}
	return err
}

// writable leaves out the error of a folder that another fault has made read-only or filled.
func writable(err error) error {
	if errors.Is(err, unix.EROFS) || errors.Is(err, unix.ENOSPC) {
		return nil
	}
	return err
}

// spoil has each file of a folder be something else: what is left after a disk was full or a
// machine lost its power.
func spoil(dir string, random *rand.Rand) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		info, err := e.Info()
		if err != nil || !info.Mode().IsRegular() {
			continue
		}
		switch random.IntN(6) {
		case 0: // a half
			err = os.Truncate(path, info.Size()/2)
		case 1: // none
			err = os.Truncate(path, 0)
		case 2: // zeros
			err = os.WriteFile(path, make([]byte, info.Size()), 0o600)
		case 3:
			garbage := make([]byte, random.IntN(4096))
			for i := range garbage {
				garbage[i] = byte(random.Uint32())
			}
			err = os.WriteFile(path, garbage, 0o600)
		case 4:
			err = os.WriteFile(path, []byte(`{"keys":{"instance":null},"text":[],"since":-1}`), 0o600)
		case 5: // another kind of file
			if err = os.Remove(path); err == nil {
				err = os.Symlink("/proc/self/environ", path)
			}
		}
		if err := writable(err); err != nil {
			return fmt.Errorf("spoil %s: %w", path, err)
		}
	}
	return nil
}

func cleanedUp(w *World, _ *rand.Rand) (func() error, error) {
	clean := background(func(ctx context.Context) {
		_, _, _, _ = w.Agent.Run(ctx, "cleanup") // that it works is looked at when the game ends
	})
	return func() error {
		err := clean()
		return errors.Join(err, w.stopAgent(), w.StartAgent())
	}, nil
}

// plannedStop is what Envoy's unit does when it is stopped, without its systemd.
func plannedStop(w *World, _ *rand.Rand) (func() error, error) {
	out := w.openSpan(Span{Event: Event{Name: "envoy-planned-stop-out"}, EnvoyAway: true,
		Excuses: []Excuse{{Kind: Escaped, After: 5 * time.Second}}})
	stopping := func(n int) { w.mu.Lock(); w.envoy.stops += n; w.mu.Unlock() }
	stopping(1)
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		defer stopping(-1)
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		began := time.Now()
		_, stderr, code, err := w.Agent.RunAs(ctx, 0,
			[]string{fmt.Sprintf("MAINPID=%d", w.Envoy.PID())}, "drain", "--limit", "3s")
		// An Envoy that another fault has ended meanwhile cannot be asked, and drain says so.
		gone := strings.Contains(stderr, "nothing listens on the admin address")
		if err != nil || code != 0 && !gone {
			w.Observe(Observation{Kind: Died, From: began, To: time.Now(), What: "drain",
				Text: fmt.Sprintf("exit code %d: %v: %s", code, err, stderr)})
		}
		// Who is in Envoy when it ends is refused; and all, where others keep the jumps in until then.
		ends := w.openSpan(Span{Event: Event{Name: "envoy-planned-stop-end"},
			Excuses: []Excuse{{Kind: Refused}}})
		w.endEnvoy(false)
		w.mu.Lock()
		defer w.mu.Unlock()
		ends.End = time.Now()
	}()
	return func() error {
		<-stopped
		w.endWhenTaken(out)
		return w.runEnvoy()
	}, nil
}

// broken notes that the game itself cannot go on.
func (w *World) broken(err error) {
	w.Observe(Observation{Kind: Broken, From: time.Now(), To: time.Now(), Text: err.Error()})
}
