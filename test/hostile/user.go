package hostile

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// UID is the local user without rights: no capability, no group, in the VM's network namespace.
const UID = 1234

// Kind is what somebody managed.
type Kind string

// Kinds of events. Those that Allowed says are what any process on a VM can do.
const (
	WroteAttribute Kind = "wrote a guest attribute" // by the metadata server
	Bound          Kind = "bound a free port"
	Caught         Kind = "caught a connection" // on a port that was bound
	AskedEnvoy     Kind = "asked Envoy's admin interface"

	AskedAgent  Kind = "was answered on the agent's socket"
	Abstract    Kind = "reached an abstract socket"
	Misbelieved Kind = "got garbage answered as a request"
	Read        Kind = "read a file that is root's alone"
	Changed     Kind = "changed a file or folder"
	Linked      Kind = "made a link to a file"
	Signalled   Kind = "signalled or looked into a process"
	Locked      Kind = "held the lock of iptables"
	Shared      Kind = "opened shared memory"
	Ruled       Kind = "changed or read rules of the kernel"
	Commanded   Kind = "had a command of ours do something"
)

// Event is one thing that was managed.
type Event struct {
	Kind Kind      `json:"kind"`
	What string    `json:"what"`
	At   time.Time `json:"at"`
}

func (e Event) String() string { return fmt.Sprintf("%s: %s", e.Kind, e.What) }

// Allowed says whether the design lets any local user do so: a guest attribute is written by
// whoever asks the metadata server, a free port is whoever's comes first (the agent's part is to
// take its jumps out within its second), and Envoy's admin interface stands on loopback.
func (e Event) Allowed() bool {
	return slices.Contains([]Kind{WroteAttribute, Bound, Caught, AskedEnvoy}, e.Kind)
}

// User is somebody with a login on the VM, who means ill.
type User struct {
	Mesh  *mesh.Mesh
	Agent *mesh.Agent
	// Ports that it takes where they are free. nil: Envoy's and the agent's.
	Ports []uint16
}

// plan is what its process is told.
type plan struct {
	Seed    uint64
	Until   time.Time
	Home    string   // its own folder
	Folders []string // ours: nothing may be made, moved or removed there
	Secret  []string // files of ours that it must not even read
	PIDs    []int
	Ports   []uint16
}

// Harass tries everything, in random order, again and again until ctx ends or a round is over, and
// says what it managed. It has the agent and Envoy as they are when it begins.
func (u User) Harass(ctx context.Context, r *rand.Rand) (events []Event, err error) {
	p := plan{Seed: r.Uint64(), Until: time.Now().Add(10 * time.Second), PIDs: []int{u.Agent.PID()},
		Ports: u.Ports}
	if end, ok := ctx.Deadline(); ok {
		p.Until = end
	}
	if p.Ports == nil {
		p.Ports = []uint16{15000, 15001, 15006, 15020, 15053}
	}
	if u.Mesh.Envoy != nil && u.Mesh.Envoy.PID() > 0 {
		p.PIDs = append(p.PIDs, u.Mesh.Envoy.PID())
	}
	if p.Home, err = os.MkdirTemp(u.Mesh.Dir, "user-"); err != nil {
		return nil, err
	}
	defer os.RemoveAll(p.Home)
	if err := errors.Join(os.Chmod(p.Home, 0o700), os.Chown(p.Home, UID, UID)); err != nil {
		return nil, err
	}
	p.Folders = []string{u.Agent.RunDir(), u.Agent.StateDir(), u.Mesh.Dir, u.Mesh.Lab.Shims()}
	p.Secret = secrets(u.Agent.RunDir(), u.Agent.StateDir())
	before := fingerprint(p.Folders[:2])

	events = append(events, u.attributes(r)...)
	commanded, err := u.commands(ctx)
	events = append(events, commanded...)
	did, err2 := u.process(ctx, p)
	events = append(events, did...)
	// What ours write changes; whose it is, what it is and its mode do not.
	for _, what := range fingerprint(p.Folders[:2]) {
		if !slices.Contains(before, what) && strings.Contains(what, " foreign ") {
			events = append(events, Event{Changed, what, time.Now()})
		}
	}
	return events, errors.Join(err, err2)
}

// garbage is what others may write under our keys.
var garbage = []string{"", "FINISHED", "v1 state=healthy finding=none", "\x00\x1b[2J", "\u202E",
	strings.Repeat("x", 100_000), "a\nb", `{"a":1}`, "2099-01-01T00:00:00Z"}

// attributes writes under the agent's keys, which any process on the VM can do.
func (u User) attributes(r *rand.Rand) (events []Event) {
	for _, key := range []string{"bootstrap-status", "agent-heartbeat", "agent-last-failure",
		"agent-status", "proxy-version", "hostile"} {
		if r.IntN(2) == 0 {
			continue
		}
		value := garbage[r.IntN(len(garbage))]
		// Beside the emulator's budget, which is to say how the agent keeps it.
		u.Mesh.Platform.SetGuestAttribute("gce-service-proxy", key, value)
		events = append(events, Event{WroteAttribute, fmt.Sprintf("%s = %.40q", key, value), time.Now()})
	}
	return events
}

// commands of ours, as any user can start them, must change nothing.
func (u User) commands(ctx context.Context) (events []Event, err error) {
	for _, args := range [][]string{{"cleanup"}, {"drain"}, {"bootstrap", "--remove"},
		{"status", "-o", "json"}, {"run", "--config", "none"}} {
		limited, cancel := context.WithTimeout(ctx, 10*time.Second)
		out, _, code, err := u.Agent.RunAs(limited, UID, nil, args...)
		cancel()
		if ctx.Err() != nil {
			return events, nil
		}
		if err != nil {
			return events, fmt.Errorf("run %v as the user: %w", args, err)
		}
		// drain ends with 0 where there is nothing to drain for this user.
		if code == 0 && args[0] != "drain" {
			events = append(events, Event{Commanded, fmt.Sprintf("%v: %.200q", args, out), time.Now()})
		}
	}
	return events, nil
}

// secrets are the files below our folders that others may not read: all but those that say nothing.
func secrets(folders ...string) (files []string) {
	for _, dir := range folders {
		found, _ := filepath.Glob(filepath.Join(dir, "*"))
		for _, path := range found {
			info, err := os.Lstat(path)
			if err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o004 == 0 {
				files = append(files, path)
			}
		}
	}
	return files
}

// fingerprint says of each thing below our folders whose it is.
func fingerprint(folders []string) (all []string) {
	for _, dir := range folders {
		found, _ := filepath.Glob(filepath.Join(dir, "*"))
		for _, path := range found {
			info, err := os.Lstat(path)
			if err != nil {
				continue // it was moved into its place
			}
			whose := "own"
			if uid, ok := owner(info); !ok || uid == UID {
				whose = "foreign"
			}
			all = append(all, fmt.Sprintf("%s %s %v", path, whose, info.Mode()))
		}
	}
	return all
}

// again is the variable by which this program, started anew, knows that it is the user.
const again = "SERVICE_PROXY_TEST_HOSTILE_USER"

func init() {
	if os.Getenv(again) != "" {
		os.Exit(intrude(os.Stdin, os.Stdout))
	}
}

// process runs the attempts in a process of the user's own: a thread that changed its uid would
// keep root's right to send signals.
func (u User) process(ctx context.Context, p plan) (events []Event, err error) {
	program, err := os.Executable()
	if err != nil {
		return nil, err
	}
	mine := filepath.Join(u.Mesh.Dir, "hostile-user")
	if _, err := os.Stat(mine); err != nil {
		if err := reachable(program, mine); err != nil {
			return nil, fmt.Errorf("make the hostile user's program: %w", err)
		}
	}
	text, err := json.Marshal(p)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithDeadline(ctx, p.Until.Add(30*time.Second))
	defer cancel()
	cmd := u.Mesh.VM.CommandAs(ctx, UID, mine)
	cmd.Dir, cmd.Env, cmd.Stdin = "/", append(os.Environ(), again+"=1"), bytes.NewReader(text)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err = lab.Start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil && ctx.Err() == nil {
		return nil, fmt.Errorf("run the hostile user: %w: %s", err, stderr.String())
	}
	for decode := json.NewDecoder(&stdout); ; {
		var e Event
		switch err := decode.Decode(&e); {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return events, nil
		case err != nil:
			return events, fmt.Errorf("read what the hostile user did: %w: %s", err, stderr.String())
		}
		events = append(events, e)
	}
}

// reachable puts a program where another user can start it: tests are built where only root enters.
func reachable(program, to string) error {
	from, err := os.Open(program)
	if err != nil {
		return err
	}
	defer from.Close()
	f, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, from)
	return errors.Join(err, f.Close())
}
