package chaos

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// The services that are there in every game, and that watchers call. Faults leave them alone, or
// have an excuse.
var (
	Web4 = netip.MustParseAddrPort("10.10.0.1:81") // HTTP
	Web6 = netip.MustParseAddrPort("[fd10::1]:81")
	DB4  = netip.MustParseAddrPort("10.10.0.2:9000") // TCP
	DB6  = netip.MustParseAddrPort("[fd10::2]:9000")
	// Served is the VM's serving port, as clients call it.
	Served4 = netip.AddrPortFrom(lab.VMAddr, mesh.AppPort)
	Served6 = netip.AddrPortFrom(lab.VMAddr6, mesh.AppPort)
	// Plain is no service: it is reached directly, or through Envoy under intercept-all-outbound.
	Plain4 = netip.MustParseAddrPort("10.77.0.1:9000")
	Plain6 = netip.MustParseAddrPort("[fd77::1]:9000")
)

// StrangerUID is the other user's of the VM, who is not trusted; AppUID is the applications'.
const (
	StrangerUID = 4711
	AppUID      = 1000
)

// World is a lab in a game: what is running, what is wanted now, and what was seen.
type World struct {
	*mesh.Mesh
	Setting Setting
	Agent   *mesh.Agent
	// Options of the game.
	Options Options
	// Started is when all was as wanted for the first time.
	Started time.Time

	log   func(format string, args ...any)
	watch watch

	mu           sync.Mutex
	observations []Observation
	spans        []*Span
	config       edits[controlplane.Config]
	attribute    edits[map[string]any]
	// A calm may last until then, since the agent backs off: what it does, and what it says.
	actsBy, tellsBy time.Time
	pid             int // of the agent; 0: it does not run, or shall not be looked at
	pushed          controlplane.Push

	running context.Context // ends with the game, and all that Go started with it
	end     context.CancelFunc
	tasks   sync.WaitGroup
	envoy   envoyUnit

	hearing  hearing
	disk     disk
	upgraded bool        // the agent is the other build
	started  time.Time   // of the agent's newest process
	unit     sync.Mutex  // held while the agent's unit starts it again
	otherIDs atomic.Bool // the VM was once taken for another one
	kernel   kernel
	answered map[uint16]bool // ports of answerAt; faults begin on one goroutine
}

// Options of a game that change nothing of what is played.
type Options struct {
	// Agent is the binary under test; "": the built one (mesh.Binary).
	Agent string
	// Upgrade is another build of it, which calls itself another version; "": there is none.
	Upgrade string
	// Race says that it was built with the race detector, which takes memory and time.
	Race bool
	// AgentLog, when not empty, is a file that the agent's log is written to when the game ends.
	AgentLog string
	Log      func(format string, args ...any)
	// More are faults beside Faults: a test's own.
	More []Fault
}

// edits are changes of a value that come and go in any order: the value is what the base becomes by
// those that stand, oldest first.
type edits[T any] struct {
	next int
	all  []edit[T]
}

type edit[T any] struct {
	id int
	do func(*T)
}

func (e *edits[T]) add(do func(*T)) (id int) {
	e.next++
	e.all = append(e.all, edit[T]{e.next, do})
	return e.next
}

func (e *edits[T]) remove(id int) {
	e.all = slices.DeleteFunc(e.all, func(x edit[T]) bool { return x.id == id })
}

func (e *edits[T]) apply(value T) T {
	for _, x := range e.all {
		x.do(&value)
	}
	return value
}

// Base is what the control plane says on a calm day.
func (s Setting) Base() controlplane.Config {
	c := controlplane.Config{
		IPv6:        controlplane.IPv6Additional,
		Passthrough: s.All,
		Services: []controlplane.Service{
			{Name: "web", Prefixes: controlplane.VIPs("10.10.0.1", "fd10::1"), Port: 81, HTTP: true,
				Endpoints: Endpoints()},
			{Name: "db", Prefixes: controlplane.VIPs("10.10.0.2", "fd10::2"), Port: 9000,
				Endpoints: Endpoints()},
		},
		Inbound: []controlplane.Inbound{{Addr: lab.VMAddr, Port: mesh.AppPort, HTTP: true},
			{Addr: lab.VMAddr6, Port: mesh.AppPort, HTTP: true}},
	}
	for i := range 10 {
		c.Services = append(c.Services, Extra(i))
	}
	if s.DNS {
		c.DNS = &controlplane.DNS{IPv6: true,
			Names: map[string][]netip.Addr{"web.example": {Web4.Addr()}}}
	}
	return c
}

// Extra is the i-th of the services that may come and go; the first ten are there at the start.
func Extra(i int) controlplane.Service {
	four := netip.AddrFrom4([4]byte{10, 20, byte(i >> 8), byte(i)})
	six := netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x20, 14: byte(i >> 8), 15: byte(i)})
	return controlplane.Service{Name: fmt.Sprintf("s%d", i), Port: 9000, Cluster: "shared",
		Prefixes: controlplane.VIPs(four.String(), six.String()), Endpoints: Endpoints()}
}

// Endpoints are where Envoy sends what it intercepted.
func Endpoints() []netip.AddrPort {
	return []netip.AddrPort{netip.AddrPortFrom(lab.EndpointAddr(1), mesh.EndpointPort)}
}

func (s Setting) attribute() map[string]any {
	interception := map[string]any{}
	if s.All {
		interception["intercept-all-outbound"] = true
	}
	if s.DNS {
		interception["intercept-dns"] = true
	}
	return map[string]any{
		"api-version":          "0.2",
		"proxy-spec":           map[string]any{"network": ""},
		"service":              map[string]any{"serving-ports": []int{mesh.AppPort}},
		"traffic-interception": interception,
	}
}

// EditConfig changes what the control plane sends; undo takes this change back, and leaves others'.
func (w *World) EditConfig(do func(*controlplane.Config)) (undo func() error, err error) {
	w.mu.Lock()
	id := w.config.add(do)
	w.mu.Unlock()
	if err := w.push(); err != nil {
		return nil, err
	}
	return func() error {
		w.mu.Lock()
		w.config.remove(id)
		w.mu.Unlock()
		return w.push()
	}, nil
}

func (w *World) push() error {
	w.mu.Lock()
	config := w.config.apply(w.Setting.Base())
	w.mu.Unlock()
	pushed, err := w.CP.Set(config)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.pushed = pushed
	return err
}

// EditAttribute changes the gce-service-proxy attribute as gcloud would.
func (w *World) EditAttribute(do func(map[string]any)) (undo func() error, err error) {
	w.mu.Lock()
	id := w.attribute.add(func(m *map[string]any) { do(*m) })
	w.mu.Unlock()
	if err := w.setAttribute(); err != nil {
		return nil, err
	}
	return func() error {
		w.mu.Lock()
		w.attribute.remove(id)
		w.mu.Unlock()
		return w.setAttribute()
	}, nil
}

// setAttribute writes the attribute as the edits have it; a malformed one is over then.
func (w *World) setAttribute() error {
	w.mu.Lock()
	value := w.attribute.apply(w.Setting.attribute())
	w.mu.Unlock()
	text, err := json.Marshal(value)
	if err != nil {
		return fmt.Errorf("write attribute: %w", err)
	}
	w.Platform.SetAttribute("gce-service-proxy", string(text))
	return nil
}

// Observe notes something that is not as on a calm day.
func (w *World) Observe(o Observation) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.observations) < 100_000 { // a broken game has them without end
		w.observations = append(w.observations, o)
	}
}

// BacksOff says that the design lets the agent take until acts for what a fault did, and until
// tells for what it says of it, which the faults together brought about, no one alone (as
// Fault.Heals does for one).
func (w *World) BacksOff(acts, tells time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.backsOff(acts, tells)
}

// mayAct says whether the agent may still be about something that was done to the rules.
func (w *World) mayAct(now time.Time) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return now.Before(w.actsBy)
}

func (w *World) backsOff(acts, tells time.Time) {
	if acts.After(w.actsBy) {
		w.actsBy = acts
	}
	if tells.After(w.tellsBy) {
		w.tellsBy = tells
	}
}

// Excuse notes an excuse that came about by what a fault did just now, beside its own ones, or that
// is of a part of it.
func (w *World) Excuse(s Span) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.spans = append(w.spans, &s)
}

// Go has f run beside the game. The game's end is that of its context, and is waited for.
func (w *World) Go(f func(ctx context.Context)) { w.tasks.Go(func() { f(w.running) }) }

// Log writes a line to the game's story.
func (w *World) Log(format string, args ...any) {
	w.log("%7.2f  "+format, append([]any{time.Since(w.Started).Seconds()}, args...)...)
}

// AgentPID is the process of the running agent; ok is false while a fault has it ended. Watchers
// look at it, and note nothing of one that is not to run.
func (w *World) AgentPID() (pid int, ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.pid, w.pid != 0
}

// EndAgent is to be called before a fault ends the agent: from now on its end is no death.
func (w *World) EndAgent() {
	w.unit.Lock()
	defer w.unit.Unlock()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.pid = 0
}

// StartAgent starts it, as it is configured now.
func (w *World) StartAgent() error {
	if err := w.Agent.Start(); err != nil {
		return err
	}
	w.mu.Lock()
	w.pid, w.started = w.Agent.PID(), time.Now()
	w.mu.Unlock()
	w.startsUnheard()
	w.expectEnd()
	return nil
}

// newWorld starts everything, and waits until it is ready.
func newWorld(ctx context.Context, s Setting, opts Options) (w *World, err error) {
	w = &World{Setting: s, Options: opts, log: opts.Log}
	if w.log == nil {
		w.log = func(string, ...any) {}
	}
	w.running, w.end = context.WithCancel(context.Background())
	text, err := json.Marshal(s.attribute())
	if err != nil {
		return nil, err
	}
	w.Mesh, err = mesh.New(ctx, mesh.Options{Backend: lab.Backend(s.Backend), Config: s.Base(),
		Attribute: string(text), NoEnvoy: true, OwnLock: true})
	if err != nil {
		return nil, err
	}
	defer func(w *World) {
		if err != nil {
			w.end()
			w.tasks.Wait()
			err = errors.Join(err, w.Close())
		}
	}(w)
	if err := w.push(); err != nil { // what was sent already
		return nil, err
	}
	if err := w.startEnvoy(ctx); err != nil {
		return nil, err
	}
	w.Agent = w.NewAgent(s.policy()...)
	if err := w.install(false); err != nil {
		return nil, err
	}
	w.Agent.Setenv("GORACE=halt_on_error=0 atexit_sleep_ms=0")
	return w, w.giveDisk()
}
