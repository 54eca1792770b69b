package envoywatch

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
)

// envoy is an Envoy without an admin interface, with a clock of its own. What each answer is like
// is said at the type admin, which answers over HTTP.
type envoy struct {
	mu sync.Mutex // held while it makes an answer

	clock    time.Time
	process  uint64
	uptime   time.Duration
	epoch    int
	state    string
	sets     int // how often its listeners changed
	dynamic  bool
	udp      bool // its dynamic listener is one for UDP
	static   bool
	warming  bool
	rejected string
	stats    envoyadmin.ControlPlane
	lds      bool
	targets  []envoyadmin.Target
	clusters []envoyadmin.ClusterHealth
	panics   map[string]uint64

	down  error                    // what every question comes to
	fails map[string]error         // what a question comes to, by its name
	takes map[string]time.Duration // how long a question takes
	while map[string]func()        // what happens while it is answered, once
	asked []string
	news  []bool // of each dump, whether an update came before it
}

// running is an Envoy that serves one dynamic listener.
func running() *envoy {
	return &envoy{
		clock: time.Unix(1700000000, 0), process: 1, uptime: time.Hour, state: "LIVE", sets: 1,
		dynamic: true, lds: true,
		stats:   envoyadmin.ControlPlane{Streams: true, Connected: true, Version: 7},
		targets: []envoyadmin.Target{{Address: "td:443"}},
		fails:   map[string]error{}, takes: map[string]time.Duration{}, while: map[string]func(){},
	}
}

// restart makes it another process, which has heard nothing yet.
func (e *envoy) restart() {
	e.process++
	e.uptime, e.state, e.dynamic, e.warming = 0, "PRE_INITIALIZING", false, false
	e.stats = envoyadmin.ControlPlane{Streams: true}
	e.sets++
}

// serve is the first update from the control plane.
func (e *envoy) serve() {
	e.state, e.dynamic, e.stats.Version, e.stats.Connected = "LIVE", true, 7, true
	e.sets++
}

func (e *envoy) question(name string) error {
	e.asked = append(e.asked, name)
	e.clock = e.clock.Add(e.takes[name])
	if happens := e.while[name]; happens != nil {
		delete(e.while, name)
		e.mu.Unlock()
		happens()
		e.mu.Lock()
	}
	if e.down != nil {
		return fmt.Errorf("get %q: %w", name, e.down)
	}
	return e.fails[name]
}

func (e *envoy) fingerprint() envoyadmin.Fingerprint {
	f := envoyadmin.Fingerprint{Process: e.process, Listeners: e.sets, Rejected: len(e.rejected)}
	if e.warming {
		f.Warming = 1
	}
	return f
}

func (e *envoy) Fingerprint(context.Context, []string) (envoyadmin.Fingerprint, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.question("look"); err != nil {
		return envoyadmin.Fingerprint{}, err
	}
	return e.fingerprint(), nil
}

func (e *envoy) Listeners(context.Context) (envoyadmin.Snapshot, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.news = append(e.news, e.told())
	s := envoyadmin.Snapshot{
		Fingerprint: e.fingerprint(), Took: 2 * time.Millisecond,
		Bytes: int64(99 + len(e.news)), // which dump this is, from 100
	}
	if e.dynamic {
		s.Listeners = append(s.Listeners, envoyadmin.Listener{
			Name: fmt.Sprint("dynamic", e.sets), UDP: e.udp})
	}
	if e.static {
		s.Listeners = append(s.Listeners, envoyadmin.Listener{Name: "static", Static: true})
	}
	if e.warming {
		s.Warming = []envoyadmin.Warming{{Name: "w"}}
	}
	if e.rejected != "" {
		s.Rejected = []envoyadmin.Rejected{{Name: e.rejected}}
	}
	if err := e.question("dump"); err != nil { // what happens meanwhile is not in the answer
		return envoyadmin.Snapshot{}, err
	}
	return s, nil
}

func (e *envoy) Ready(context.Context) (string, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.question("ready"); err != nil {
		return "", err
	}
	return e.state, nil
}

func (e *envoy) ServerInfo(context.Context) (envoyadmin.ServerInfo, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.question("info"); err != nil {
		return envoyadmin.ServerInfo{}, err
	}
	return envoyadmin.ServerInfo{
		Version: envoyadmin.Version{Major: 1, Minor: 40}, Text: "x/1.40.0/Clean", State: e.state,
		Uptime: e.uptime, Epoch: e.epoch, Node: envoyadmin.Node{ID: "node"}, Asked: e.clock,
	}, nil
}

func (e *envoy) ControlPlane(context.Context) (envoyadmin.ControlPlane, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.question("stats"); err != nil {
		return envoyadmin.ControlPlane{}, err
	}
	return e.stats, nil
}

func (e *envoy) Bootstrap(context.Context) (*envoyadmin.Bootstrap, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.question("bootstrap"); err != nil {
		return nil, err
	}
	return &envoyadmin.Bootstrap{LDS: e.lds, Targets: e.targets}, nil
}

func (e *envoy) Clusters(context.Context) ([]envoyadmin.ClusterHealth, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.question("clusters"); err != nil {
		return nil, err
	}
	return slices.Clone(e.clusters), nil
}

func (e *envoy) Panics(context.Context) (map[string]uint64, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.question("panics"); err != nil {
		return nil, err
	}
	return maps.Clone(e.panics), nil
}

func (e *envoy) Redial() { e.set(func() { e.asked = append(e.asked, "redial") }) }

func (e *envoy) now() time.Time {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.clock
}

// set changes it while a Watch runs.
func (e *envoy) set(change func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	change()
}

// test is a Watch of an envoy and what it logs.
type test struct {
	*testing.T
	*envoy
	w    *Watch
	logs *observer.ObservedLogs
}

func watch(t *testing.T, e *envoy, change ...func(*Options)) *test {
	core, logs := observer.New(zap.DebugLevel)
	o := Options{Admin: e, Log: zap.New(core), Now: e.now}
	for _, c := range change {
		c(&o)
	}
	return &test{t, e, New(o), logs}
}

// step is a Step and the View that it puts.
func (t *test) step() (View, time.Duration) {
	t.Helper()
	wait := t.w.Step(t.Context())
	select {
	case v := <-t.w.Views():
		return v, wait
	default:
		t.Fatal("no View after a Step")
		return View{}, 0
	}
}

// after is a Step this much later.
func (t *test) after(d time.Duration) View {
	t.Helper()
	t.clock = t.clock.Add(d)
	v, _ := t.step()
	return v
}

// questions are those asked since the last time.
func (t *test) questions() string {
	asked := strings.Join(t.asked, " ")
	t.asked = nil
	return asked
}

func (t *test) wantQuestions(want string) {
	t.Helper()
	if got := t.questions(); got != want {
		t.Errorf("asked %q, want %q", got, want)
	}
}

// names are those of the listeners of the set that counts.
func names(v View) string {
	var all []string
	for _, l := range v.Snapshot.Listeners {
		all = append(all, l.Name)
	}
	return strings.Join(all, " ")
}
