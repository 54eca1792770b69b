// Package mesh puts a whole node together for the end-to-end tests, the benchmarks and the demo: a
// lab with a control plane, the platform emulator and a real Envoy in it, and the built
// service-proxy-agent as a process of its own.
//
// It decides nothing and checks nothing: tests change the control plane (CP), the platform or Envoy
// and look at what becomes of connections. Everything ends with the lab.
package mesh

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/cloudlog"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/platform"
)

// EndpointPort is where the endpoints of Services listen; AppPort is the serving port of the VM.
const (
	EndpointPort = 8080
	AppPort      = 8081
)

// Attribute is the gce-service-proxy attribute of a mesh's VM unless Options say otherwise.
const Attribute = `{"api-version":"0.2","proxy-spec":{"network":""},` +
	`"service":{"serving-ports":[8081]}}`

// Options of a mesh.
type Options struct {
	Backend   lab.Backend
	Config    controlplane.Config
	Attribute string // "": Attribute
	NoEnvoy   bool   // the test starts it
	// Project is that of the VM, whose metadata it shares with others; nil: one of its own.
	Project *platform.Project
	// NoOwnerMatch: the kernel refuses every rule with -m owner (lab.Options).
	NoOwnerMatch bool
	// OwnLock: the lab has an xtables lock of its own (lab.Options).
	OwnLock bool
	// Envoy has no RTDS layer, for which it would wait 15 s more without a control plane
	NoRuntime bool
}

// Mesh is one running node and what is around it.
type Mesh struct {
	*lab.Lab
	CP       *controlplane.Server
	CPAddr   netip.AddrPort
	Platform *platform.Emulator
	Envoy    *lab.Envoy
	App      *lab.Echo // behind the serving port
	Serial   *Serial   // port 1: what is written there is in Platform, where gcloud reads it
	ends     []func()
}

// New starts everything but the agent.
func New(ctx context.Context, opts Options) (m *Mesh, err error) {
	m = &Mesh{CPAddr: netip.AddrPortFrom(lab.ControlPlaneAddr, 443)}
	if m.Lab, err = lab.New(
		lab.Options{Backend: opts.Backend, NoOwnerMatch: opts.NoOwnerMatch,
			OwnLock: opts.OwnLock}); err != nil {
		return nil, err
	}
	defer func(m *Mesh) { // as it is now: a return of nil sets the result
		if err != nil {
			m.Close()
		}
	}(m)
	if opts.Attribute == "" {
		opts.Attribute = Attribute
	}
	m.Platform = platform.New(
		platform.VM{Attributes: map[string]string{"gce-service-proxy": opts.Attribute},
			Project: opts.Project})
	for _, port := range []uint16{80} {
		ln, err := m.Listen(m.Service, netip.AddrPortFrom(lab.MetadataAddr, port))
		if err != nil {
			return nil, err
		}
		m.Platform.Serve(ln, nil)
	}
	m.CP = controlplane.New(controlplane.Options{Listen: func() (net.Listener, error) {
		return m.Service.Listen("tcp", m.CPAddr.String())
	}})
	m.ends = append(m.ends, m.CP.Close)
	push, err := m.CP.Set(opts.Config)
	if err != nil {
		return nil, err
	}
	if err := m.CP.Start(); err != nil {
		return nil, err
	}
	for _, e := range []struct {
		in   *lab.Namespace
		port uint16
		opts lab.EchoOptions
	}{
		{m.Service, EndpointPort, lab.EchoOptions{Name: "endpoint"}},
		{m.VM, AppPort, lab.EchoOptions{Name: "app"}},
		// Where connections arrive that nobody redirected.
		{m.Service, 81, lab.EchoOptions{Name: "escaped"}},
		{m.Service, 9000, lab.EchoOptions{Name: "escaped"}},
	} {
		echo, err := m.Echo(e.in, e.port, e.opts)
		if err != nil {
			return nil, err
		}
		if e.in == m.VM {
			m.App = echo
		}
	}
	if m.Serial, err = openSerial(filepath.Join(m.Dir, "ttyS0"), m.Platform); err != nil {
		return nil, err
	}
	m.ends = append(m.ends, m.Serial.Close)
	if opts.NoEnvoy {
		return m, nil
	}
	if m.Envoy, err = m.StartEnvoy(
		lab.EnvoyOptions{ControlPlane: m.CPAddr, Runtime: !opts.NoRuntime}); err != nil {
		return nil, err
	}
	if err := m.Envoy.WaitReady(ctx); err != nil {
		return nil, err
	}
	return m, m.CP.WaitAccepted(ctx, push)
}

// Close ends everything, the agent before the folder that it writes to. An error may be what the
// agent did: it exceeded the budget of guest attributes.
func (m *Mesh) Close() error {
	for i := len(m.ends) - 1; i >= 0; i-- {
		m.ends[i]()
	}
	m.ends = nil
	var err error
	if m.Platform != nil {
		err = m.Platform.Close()
	}
	return errors.Join(err, m.Lab.Close())
}

// Agent is the built binary, running in "vm" as root.
type Agent struct {
	mesh *Mesh
	args []string
	own  int // how many of args the lab needs
	env  []string
	dir  string
	// Under is a command that starts the agent, and root's other commands, by exec(2): in a mount
	// namespace for one.
	Under []string
	// Binary is the program of the next start and of commands; "": the package's Binary.
	Binary string

	mu   sync.Mutex
	cmd  *exec.Cmd
	done chan struct{}
	err  error
	log  bytes.Buffer
}

// Binary is the agent under test: $AGENT, else build/service-proxy-agent under the module's root.
func Binary() (string, error) {
	if path := os.Getenv("AGENT"); path != "" {
		return path, nil
	}
	envoy, err := filepath.Abs(".")
	if err != nil {
		return "", err
	}
	for dir := envoy; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			path := filepath.Join(dir, "build", "service-proxy-agent")
			if _, err := os.Stat(path); err != nil {
				return "", fmt.Errorf("find the agent: no %s: run `make build`", path)
			}
			return path, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("find the agent: not under the module's folder: name it by $AGENT")
		}
	}
}

func (a *Agent) binary() (string, error) {
	if a.Binary != "" {
		return a.Binary, nil
	}
	return Binary()
}

// NewAgent prepares an agent with flags beside those that the lab needs. Start it.
func (m *Mesh) NewAgent(args ...string) *Agent {
	a := &Agent{mesh: m, dir: filepath.Join(m.Dir, "agent")}
	a.args = []string{"run", "--proxy-user", fmt.Sprint(lab.EnvoyUID), "--serial-port", m.Serial.Path}
	if m.Envoy != nil {
		a.args = append(a.args, "--envoy-log", m.Envoy.LogPath)
	}
	a.own = len(a.args)
	a.args = append(a.args, args...) // of two the later one counts
	// No name of Google's resolves here, and the emulator answers for all of its services. A sentence
	// is on one line, where tests look for it.
	a.env = append(m.Env(), "COLUMNS=10000", "RUNTIME_DIRECTORY="+filepath.Join(a.dir, "run"),
		"STATE_DIRECTORY="+filepath.Join(a.dir, "state"),
		cloudlog.EndpointEnv+"=http://"+lab.MetadataAddr.String())
	return a
}

// Setenv adds NAME=VALUE to the environment of the next start.
func (a *Agent) Setenv(kv string) { a.env = append(a.env, kv) }

// Environ is the environment of the agent, for other commands beside it.
func (a *Agent) Environ() []string { return slices.Clone(a.env) }

// Start starts the process; it does not wait for it to do anything.
func (a *Agent) Start() error {
	binary, err := a.binary()
	if err != nil {
		return err
	}
	for _, d := range []string{"run", "state"} {
		if err := os.MkdirAll(filepath.Join(a.dir, d), 0o755); err != nil {
			return err
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	argv := slices.Concat(a.Under, []string{binary}, a.args)
	a.cmd = a.mesh.VM.Command(context.Background(), argv[0], argv[1:]...)
	a.cmd.Env = a.env
	a.cmd.Stderr = lockedWriter{a}
	if err := lab.Start(a.cmd); err != nil {
		return err
	}
	done := make(chan struct{})
	a.done = done
	cmd := a.cmd
	go func() {
		err := cmd.Wait()
		a.mu.Lock()
		a.err = err
		a.mu.Unlock()
		close(done)
	}()
	a.mesh.ends = append(a.mesh.ends, a.Kill)
	return nil
}

// Reboot empties the runtime folder, as a tmpfs is after a reboot, but for the note of what guest
// attributes were spent: a real reboot takes longer than this one, which is within the same
// minute's budget. The agent must not run.
func (a *Agent) Reboot() error {
	dir := filepath.Join(a.dir, "run")
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		if e.Name() != "guest-attributes.budget" {
			err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	return err
}

type lockedWriter struct{ a *Agent }

func (w lockedWriter) Write(p []byte) (int, error) {
	w.a.mu.Lock()
	defer w.a.mu.Unlock()
	return w.a.log.Write(p)
}

// StateDir is where it keeps what it knows between starts.
func (a *Agent) StateDir() string { return filepath.Join(a.dir, "state") }

// RunDir is its runtime folder.
func (a *Agent) RunDir() string { return filepath.Join(a.dir, "run") }

// Ended waits for the end of the process.
func (a *Agent) Ended() { <-a.done }

// Done is closed at the end of the process that was started last; Err says then how it ended.
func (a *Agent) Done() <-chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.done
}

// Err is how the process ended that was the last to end.
func (a *Agent) Err() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.err
}

// PID of the process.
func (a *Agent) PID() int { return a.cmd.Process.Pid }

// Kill is kill -9.
func (a *Agent) Kill() {
	_ = a.cmd.Process.Kill() // it may have ended
	<-a.done
}

// Stop sends SIGTERM and says how long it took to end, and with which error.
func (a *Agent) Stop() (time.Duration, error) {
	start := time.Now()
	if err := a.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return 0, err
	}
	<-a.done
	return time.Since(start), a.err
}

// Log is what it wrote to stderr.
func (a *Agent) Log() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.log.String()
}

// Run runs another command of the binary beside the agent, in "vm".
func (a *Agent) Run(
	ctx context.Context, args ...string) (stdout, stderr string, code int, err error) {
	return a.RunAs(ctx, 0, nil, args...)
}

// Settings are the flags that the agent was made with, as environment twins: other commands that
// look at this VM take them, too.
func (a *Agent) Settings() (env []string) {
	for i := 1; i+1 < len(a.args); i += 2 {
		name := strings.ToUpper(strings.ReplaceAll(strings.TrimPrefix(a.args[i], "--"), "-", "_"))
		env = append(env, "SERVICE_PROXY_AGENT_"+name+"="+a.args[i+1])
	}
	return env
}

// SetArgs changes the flags beside those that the lab needs, for the next start.
func (a *Agent) SetArgs(args ...string) {
	a.args = append(slices.Clip(a.args[:a.own]), args...)
}

// RunAs is Run as another user (0: root, then below what the agent is), with more in the
// environment.
func (a *Agent) RunAs(ctx context.Context, uid uint32, env []string,
	args ...string) (stdout, stderr string, code int, err error) {
	binary, err := a.binary()
	if err != nil {
		return "", "", 0, err
	}
	argv := slices.Concat(a.Under, []string{binary}, args)
	cmd := a.mesh.VM.Command(ctx, argv[0], argv[1:]...)
	if uid != 0 {
		cmd = a.mesh.VM.CommandAs(ctx, uid, binary, args...)
	}
	cmd.Env = append(slices.Clip(a.env), env...)
	var o, e strings.Builder
	cmd.Stdout, cmd.Stderr = &o, &e
	err = lab.Start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return o.String(), e.String(), exit.ExitCode(), nil
	}
	return o.String(), e.String(), 0, err
}

// Status asks the running agent.
func (a *Agent) Status(ctx context.Context) (s status.Status, err error) {
	out, stderr, _, err := a.Run(ctx, "status", "-o", "json")
	if err != nil {
		return s, err
	}
	if out == "" {
		return s, errors.New(strings.TrimSpace(stderr))
	}
	return s, json.Unmarshal([]byte(out), &s)
}

// Wait asks for the status until holds.
func (a *Agent) Wait(ctx context.Context, what string, holds func(status.Status) bool) (
	status.Status, error) {
	for {
		s, err := a.Status(ctx)
		if err == nil && holds(s) {
			return s, nil
		}
		select {
		case <-ctx.Done():
			text, _ := json.MarshalIndent(s, "", " ")
			return s, fmt.Errorf("wait for %s: last status %s (%v)\nagent's log:\n%s", what, text,
				err, a.Log())
		case <-a.done:
			return s, fmt.Errorf("wait for %s: the agent ended (%v):\n%s", what, a.err, a.Log())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// WaitReady waits until the agent says that the mesh is ready.
func (a *Agent) WaitReady(ctx context.Context) error {
	_, err := a.Wait(ctx, "ready", func(s status.Status) bool { return s.Ready })
	return err
}

// Get asks the agent's public address.
func (a *Agent) Get(path string) (code int, body string, err error) {
	client := a.mesh.VM.HTTP()
	client.Timeout = 5 * time.Second
	resp, err := client.Get("http://127.0.0.1:15020" + path)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

// Chains is what iptables shows of our chains in one family, in iptables-save's form.
func (m *Mesh) Chains(ctx context.Context, family string) (string, error) {
	program := map[string]string{"IPv4": "iptables-save", "IPv6": "ip6tables-save"}[family]
	out, err := m.VM.Run(ctx, program, "-t", "nat")
	var ours []string
	for line := range strings.Lines(out) {
		if strings.Contains(line, "SERVICE_PROXY_") {
			ours = append(ours, strings.TrimSpace(line))
		}
	}
	return strings.Join(ours, "\n"), err
}
