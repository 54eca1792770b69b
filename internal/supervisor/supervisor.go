// Package supervisor keeps Envoy running over its own hot restarts: it is the main process of
// Envoy's unit, and starts the next epoch of Envoy beside the one that serves, which hands its
// listening sockets over and drains. No connection is refused by it.
//
// [Machine] decides and is pure. [Run] hears of processes, signals and orders, and does what the
// Machine says. [Reload] is who orders. Nothing here knows what Envoy is configured with, nor when
// a reload is due: that is internal/bootstrap's.
//
// What Envoy does not do by itself, and is done here:
//
//   - An epoch that ends in its initialization leaves a mark in shared memory by which no other one
//     starts. It is taken back ([Clear]).
//   - It may have had the epoch that serves close its admin interface, for good. That one's program
//     and configuration, which are kept, are started as the next epoch then. See
//     docs/design/facts.md#envoy-hot-restart-takes-admin.
//   - An epoch that does not get live in time, stopped or without a control plane, is killed.
//   - An epoch that serves aborts when the one that drains has crashed. Somebody answers in its
//     place ([StandIn]).
//   - Whoever may send to an epoch's socket can end it, and names of the abstract name space have
//     no owner: the sockets are files in the unit's runtime folder.
package supervisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/internal/redaction"
)

// Options of a supervisor.
type Options struct {
	Dir  string   // for its sockets and files; of Envoy's user alone
	Argv []string // Envoy's program and arguments, without those about epochs
	// Start is how long an epoch after the first may take to be live; 0: DefaultStart.
	Start  time.Duration
	Log    *zap.Logger
	Notify func(states ...string) error // systemd, of STATUS=
}

const (
	// DefaultStart is longer than Envoy waits for its control plane when that does not answer.
	DefaultStart = 60 * time.Second
	stopLimit    = 5 * time.Second
	askLimit     = 15 * time.Second // of a question to Envoy's program
	checkLimit   = 45 * time.Second // of all of them and --mode validate
	// maxBase has ten times itself fit into 31 bits: past that the names of Envoy's sockets are others
	// than that of its shared memory.
	maxBase = 1<<31/10 - 2
	// envoyDrain is Envoy's own --parent-shutdown-time-s.
	envoyDrain = 900 * time.Second
)

// made is what an epoch was started with.
type made struct {
	program *os.File // stays when the file is replaced
	config  []byte   // of the file that -c names; nil without one
	skips   bool     // it knows --skip-hot-restart-parent-stats
}

// child is a process of Envoy.
type child struct {
	Start
	cmd    *exec.Cmd
	admin  string // the file with its admin interface's address
	made   made
	exited chan struct{}
}

type supervisor struct {
	o        Options
	machine  *Machine
	drain    time.Duration
	events   chan Event
	children map[int]*child
	bases    map[int]uint32 // by chain
	orders   orders
	skips    bool // of the program that was checked last
	patient  bool // there are listeners to lose
}

// Run runs Envoy until it has ended, and returns how. An error says that it could not begin.
func Run(o Options) (Status, error) {
	// Envoy asks the kernel for TERM when its parent dies, and means the thread that started it.
	runtime.LockOSThread()
	if o.Start == 0 {
		o.Start = DefaultStart
	}
	drain, err := seconds(o.Argv, "--parent-shutdown-time-s", envoyDrain)
	if err != nil {
		return Status{}, err
	}
	s := &supervisor{
		o: o, machine: NewMachine(Limits{Start: o.Start, Drain: drain, Stop: stopLimit}), drain: drain,
		events: make(chan Event), children: map[int]*child{},
		bases: map[int]uint32{}, orders: orders{open: map[int]net.Conn{}},
	}
	if err := alone(o.Dir); err != nil {
		return Status{}, err
	}
	s.sweep()
	l, err := listen(o.Dir)
	if err != nil {
		return Status{}, fmt.Errorf("listen for orders: %w", err)
	}
	defer l.Close()
	asked := make(chan net.Conn)
	go serve(l, func(conn net.Conn) { asked <- conn })
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGUSR1)
	return s.loop(signals, asked), nil
}

func (s *supervisor) loop(signals <-chan os.Signal, asked <-chan net.Conn) Status {
	next := Event(Begin{})
	for {
		for _, a := range s.machine.Step(time.Now(), next) {
			if end, is := a.(End); is {
				return end.Status
			}
			s.do(a)
		}
		var wake <-chan time.Time
		if at := s.machine.Wake(); !at.IsZero() {
			wake = time.After(time.Until(at))
		}
		select {
		case next = <-s.events:
			if e, is := next.(Exited); is {
				s.forget(e.N)
			}
		case conn := <-asked:
			next = Asked{s.orders.take(conn)}
		case sig := <-signals:
			next = Told{sig.(syscall.Signal)}
			if sig == syscall.SIGHUP {
				next = Asked{s.orders.take(nil)}
			}
		case <-wake:
			next = Tick{}
		}
	}
}

func (s *supervisor) do(a Action) {
	switch a := a.(type) {
	case Start:
		if err := s.start(a); err != nil {
			go func() { s.events <- Exited{a.N, Status{Err: err}} }()
		}
	case Check:
		m := s.serving()
		go func() { s.events <- Checked{s.check(m)} }()
	case Look:
		if c := s.children[a.N]; c != nil {
			go func() { s.events <- Looked{a.N, look(c.admin)} }()
		}
	case Send:
		if c := s.children[a.N]; c != nil {
			_ = c.cmd.Process.Signal(a.Signal) // one that has just ended is told by its exit
		}
	case Clear:
		if err := regionOf(s.bases[a.Chain]).clear(); err != nil && !errors.Is(err, fs.ErrNotExist) {
			s.o.Log.Warn("a hot restart may be refused from now on", zap.Error(err))
		}
	case StandIn:
		// Beyond its time the child asks no more.
		limit := s.drain + time.Minute
		if err := standIn(s.prefix(), s.bases[a.Chain], a, limit); err != nil {
			s.o.Log.Warn("another epoch may end, too", zap.Error(err))
		}
	case Reply:
		s.o.Log.Info("reload", zap.Int("code", a.Code), zap.String("answer", a.Text))
		s.orders.reply(a)
	case Say:
		s.o.Log.Info(a.Text)
		if s.o.Notify != nil {
			_ = s.o.Notify("STATUS=" + a.Text) // for people only
		}
	}
}

func (s *supervisor) prefix() string { return filepath.Join(s.o.Dir, "hot") }

// parent is the process from which one that is to start takes over.
func (s *supervisor) parent(a Start) *child {
	for _, c := range s.children {
		if c.Chain == a.Chain && c.Epoch == a.Epoch-1 {
			return c
		}
	}
	return &child{} // it has just ended: the start fails
}

// serving is the newest child that had what is needed to be the parent of another one.
func (s *supervisor) serving() (newest *child) {
	for _, c := range s.children {
		if newest == nil || c.N > newest.N {
			newest = c
		}
	}
	return newest
}

// start starts a process and watches it.
func (s *supervisor) start(a Start) (err error) {
	m := made{skips: s.skips}
	config := ""
	if a.Kept {
		m = s.parent(a).made
		if m.config != nil {
			config = filepath.Join(s.o.Dir, "kept.json")
			if err := os.WriteFile(config, m.config, 0o600); err != nil {
				return fmt.Errorf("keep Envoy's configuration: %w", err)
			}
		}
	} else {
		if m.program, err = os.Open(s.o.Argv[0]); err != nil {
			return fmt.Errorf("start Envoy: %w", err)
		}
		if path := configOf(s.o.Argv); path != "" {
			if m.config, err = os.ReadFile(path); err != nil {
				m.program.Close()
				return fmt.Errorf("start Envoy: %w", err)
			}
		}
	}
	if s.bases[a.Chain] == 0 {
		// Nobody guesses it, who could have made a file of that name.
		s.bases[a.Chain] = 1 + rand.Uint32N(maxBase)
		s.note()
	}
	c := &child{Start: a, made: m, exited: make(chan struct{}),
		admin: filepath.Join(s.o.Dir, fmt.Sprintf("admin-%d", a.N))}
	program := s.o.Argv[0]
	if a.Kept {
		if program, err = s.again(m.program); err != nil {
			return fmt.Errorf("start Envoy: %w", err)
		}
	}
	c.cmd = exec.Command(program) //nolint:forbidigo // it ends when the Machine says so
	c.cmd.Args = append(withConfig(s.o.Argv, config), "--base-id", fmt.Sprint(s.bases[a.Chain]),
		"--restart-epoch", strconv.Itoa(a.Epoch), "--socket-path", s.prefix(),
		"--admin-address-path", c.admin)
	if a.Epoch > 0 && s.patient {
		c.cmd.Args = append(c.cmd.Args, patience(c.cmd.Args, m.config)...)
	}
	if a.Epoch > 0 && m.skips {
		// Else the one that serves waits for an answer of the one that drains each five seconds, for
		// ever when that hangs.
		c.cmd.Args = append(c.cmd.Args, "--skip-hot-restart-parent-stats")
	}
	c.cmd.Env = slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, "NOTIFY_SOCKET=") // it is not Envoy's to say how it is
	})
	c.cmd.Stdout, c.cmd.Stderr = os.Stdout, os.Stderr
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM} // until Envoy says so itself
	if err := c.cmd.Start(); err != nil {
		if !a.Kept {
			m.program.Close()
		}
		return fmt.Errorf("start Envoy: %w", err)
	}
	s.children[a.N] = c
	go s.wait(c)
	go s.watch(c, regionOf(s.bases[a.Chain]))
	return nil
}

// again is a path of a program that may have been replaced: by a link, so that the process has
// its name.
func (s *supervisor) again(program *os.File) (string, error) {
	if program == nil {
		return "", errors.New("the one before has ended")
	}
	path := filepath.Join(s.o.Dir, "kept", filepath.Base(s.o.Argv[0]))
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return "", err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	return path, os.Symlink(fmt.Sprintf("/proc/self/fd/%d", program.Fd()), path)
}

func (s *supervisor) wait(c *child) {
	_ = c.cmd.Wait() // the state says all
	close(c.exited)
	ws, _ := c.cmd.ProcessState.Sys().(syscall.WaitStatus)
	status := Status{Code: ws.ExitStatus()}
	if ws.Signaled() {
		status = Status{Signal: ws.Signal()}
	}
	s.events <- Exited{c.N, status}
}

// watch tells when a process is live: it has an admin interface, which it opens while it is marked
// as initializing, and the mark is gone, which it takes back once it has told its parent to drain.
func (s *supervisor) watch(c *child, r region) {
	for began := time.Now(); ; {
		pause := 20 * time.Millisecond
		if time.Since(began) > 5*time.Second {
			pause = 100 * time.Millisecond
		}
		select {
		case <-c.exited:
			return
		case <-time.After(pause):
		}
		if _, err := os.Stat(c.admin); err != nil { // it is empty where there was no room
			continue
		}
		if init, err := r.initializes(); err != nil || init {
			continue
		}
		s.events <- Live{c.N}
		return
	}
}

// forget drops what belongs to a process that has ended.
func (s *supervisor) forget(n int) {
	c := s.children[n]
	if c == nil {
		return
	}
	delete(s.children, n)
	os.Remove(c.admin)
	used := map[*os.File]bool{}
	chain := false
	for _, o := range s.children {
		used[o.made.program] = true
		chain = chain || o.Chain == c.Chain
	}
	if !used[c.made.program] {
		c.made.program.Close()
	}
	if !chain {
		regionOf(s.bases[c.Chain]).remove()
	}
}

// check says why the files that are there now make no Envoy that can take over; nil: they do.
func (s *supervisor) check(serving *child) *Answer {
	ctx, cancel := context.WithTimeout(context.Background(), checkLimit)
	defer cancel()
	if serving == nil {
		return &Answer{NotPossible, "Envoy has just ended"}
	}
	runs, err := regionOf(s.bases[serving.Chain]).version()
	if err != nil {
		return &Answer{NotPossible, "Envoy cannot be restarted hot: " + err.Error()}
	}
	if err := s.room(); err != nil {
		return &Answer{NotDone, "there is no room for what the next Envoy writes: " + err.Error()}
	}
	program := s.o.Argv[0]
	is, err := ask(ctx, program, "--hot-restart-version")
	if err != nil {
		return &Answer{NotDone, "the next Envoy does not run: " + err.Error()}
	}
	if is = versionIn(is); is != runs {
		return &Answer{NotPossible, fmt.Sprintf("the next Envoy cannot take over from the one that "+
			"runs: its hot restart version is %s, and that of the one that runs %s", is, runs)}
	}
	s.patient = listens(serving.admin)
	help, err := ask(ctx, program, "--help")
	s.skips = err == nil && strings.Contains(help, "--skip-hot-restart-parent-stats")
	args := append(slices.Clone(s.o.Argv[1:]), "--mode", "validate")
	if out, err := run(ctx, program, args...); err != nil {
		return &Answer{NotDone, "the next Envoy does not take its configuration: " + reason(out, err)}
	}
	return nil
}

var dotted = regexp.MustCompile(`^\d+\.\d+$`)

// versionIn is the version in what `envoy --hot-restart-version` prints, else all of that. It comes
// on stderr, behind warnings: Envoy 1.40 in the unit of a VM with Debian 12 said first that a file
// of its control group was not accessible.
func versionIn(out string) string {
	for line := range strings.Lines(out) {
		if line = strings.TrimSpace(line); dotted.MatchString(line) {
			return line
		}
	}
	return strings.TrimSpace(out)
}

// room says whether the folder takes the next epoch's address, and the configuration of the one
// that serves, had that to be brought back.
func (s *supervisor) room() error {
	path := filepath.Join(s.o.Dir, "room")
	err := os.WriteFile(path, make([]byte, 1<<16), 0o600)
	os.Remove(path)
	return err
}

func ask(ctx context.Context, program string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	return run(ctx, program, args...)
}

func run(ctx context.Context, program string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	return string(out), err
}

// critical begins the line in which Envoy says why it ends: time, process, level, component, place.
var critical = regexp.MustCompile(`(?m)^(\[[^\]\n]*\])+\[critical\](\[[^\]\n]*\] )+`)

// reason is what may be told of the output of an Envoy that has ended with err.
func reason(out string, err error) string {
	if at := critical.FindStringIndex(out); at != nil {
		out = out[at[1]:]
	} else {
		out = strings.TrimSpace(out)
		out = out[strings.LastIndexByte(out, '\n')+1:]
	}
	if out = redaction.Text(strings.TrimSpace(out)); out == "" {
		return err.Error()
	}
	return fmt.Sprintf("%.300s", out)
}

const basesName = "base-ids"

// note writes down the base ids, by which a next supervisor finds the shared memory of this one,
// had that been killed.
func (s *supervisor) note() {
	var text strings.Builder
	for _, base := range s.bases {
		fmt.Fprintln(&text, base)
	}
	path := filepath.Join(s.o.Dir, basesName)
	if err := os.WriteFile(path, []byte(text.String()), 0o600); err != nil {
		s.o.Log.Warn("shared memory may stay behind", zap.Error(err))
	}
}

// sweep removes what a supervisor that was killed has left.
func (s *supervisor) sweep() {
	f, err := os.Open(filepath.Join(s.o.Dir, basesName))
	if err == nil {
		defer f.Close()
		for {
			var base uint32
			if _, err := fmt.Fscanln(io.LimitReader(f, 1<<16), &base); err != nil {
				break
			}
			regionOf(base).remove()
		}
	}
	for _, pattern := range []string{"hot_*", "admin-*", "kept.json", "kept/*"} {
		left, _ := filepath.Glob(filepath.Join(s.o.Dir, pattern))
		for _, path := range left {
			os.Remove(path)
		}
	}
}

// patience are the arguments by which an epoch waits for its clusters and listeners as long as its
// control plane does not send them. By itself it takes over after 15 seconds without any, from an
// Envoy that has them. What does not come in time is ended by the Machine.
// See docs/design/facts.md#envoy-live-without-listeners.
func patience(argv []string, config []byte) []string {
	type source struct {
		Timeout string `json:"initial_fetch_timeout"`
	}
	var has struct {
		Dynamic struct {
			LDS json.RawMessage `json:"lds_config"`
			CDS json.RawMessage `json:"cds_config"`
		} `json:"dynamic_resources"`
	}
	// One in YAML, or with the other names of its fields, is not ours: it stays as it is.
	if err := json.Unmarshal(config, &has); err != nil || slices.Contains(argv, "--config-yaml") {
		return nil
	}
	dynamic := map[string]source{}
	if has.Dynamic.LDS != nil {
		dynamic["lds_config"] = source{"0s"}
	}
	if has.Dynamic.CDS != nil {
		dynamic["cds_config"] = source{"0s"}
	}
	if len(dynamic) == 0 {
		return nil
	}
	text, err := json.Marshal(map[string]any{"dynamic_resources": dynamic})
	if err != nil {
		return nil
	}
	return []string{"--config-yaml", string(text)}
}

// configOf is the configuration's file among Envoy's arguments; "": none.
func configOf(argv []string) string {
	if at := configAt(argv); at > 0 {
		return argv[at]
	}
	return ""
}

func configAt(argv []string) int {
	for i := 1; i < len(argv)-1; i++ {
		if argv[i] == "-c" || argv[i] == "--config-path" {
			return i + 1
		}
	}
	return 0
}

// withConfig is argv with another configuration; "": with its own.
func withConfig(argv []string, config string) []string {
	argv = slices.Clone(argv)
	if at := configAt(argv); at > 0 && config != "" {
		argv[at] = config
	}
	return argv
}

// seconds is the value of a flag among Envoy's arguments.
func seconds(argv []string, flag string, unset time.Duration) (time.Duration, error) {
	for i, arg := range argv {
		if arg == flag && i+1 < len(argv) {
			n, err := strconv.ParseUint(argv[i+1], 10, 31)
			if err != nil {
				return 0, fmt.Errorf("%s is %q; use a whole number of seconds", flag, argv[i+1])
			}
			return time.Duration(n) * time.Second, nil
		}
	}
	return unset, nil
}
