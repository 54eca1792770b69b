package agent

import (
	"context"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/mailbox"
	"github.com/service-proxy-agent/service-proxy-agent/internal/report"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// metadataServer takes guest attributes over connections in memory, and notes when.
type metadataServer struct {
	conns chan net.Conn
	done  chan struct{}

	mu      sync.Mutex
	values  map[string]string
	queries []query
}

type query struct {
	at         time.Time
	write      bool
	key, value string
}

func newMetadataServer(t *testing.T) *metadataServer {
	s := &metadataServer{conns: make(chan net.Conn), done: make(chan struct{}),
		values: map[string]string{}}
	h := &http.Server{Handler: s}
	go func() { _ = h.Serve(s) }()
	t.Cleanup(func() { h.Close() })
	return s
}

func (s *metadataServer) Accept() (net.Conn, error) {
	select {
	case c := <-s.conns:
		return c, nil
	case <-s.done:
		return nil, net.ErrClosed
	}
}
func (s *metadataServer) Close() error   { close(s.done); return nil }
func (s *metadataServer) Addr() net.Addr { return &net.TCPAddr{} }

func (s *metadataServer) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	ours, theirs := net.Pipe()
	select {
	case s.conns <- theirs:
		return ours, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (s *metadataServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	key := r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:]
	s.mu.Lock()
	defer s.mu.Unlock()
	write := r.Method == http.MethodPut
	if write {
		s.values[key] = string(body)
	}
	s.queries = append(s.queries, query{time.Now(), write, key, s.values[key]})
	_, _ = io.WriteString(w, s.values[key])
}

func (s *metadataServer) get(key string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.values[key]
}

func (s *metadataServer) asked() []query {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.queries)
}

// anHour is a world whose agent publishes guest attributes, as the daemon does.
type anHour struct {
	*world
	server *metadataServer
	newest map[string]string    // by key
	ended  map[string]time.Time // when a value was last replaced by a newer one, by key and value
	events []time.Time          // of services
	passes int
	stop   func()
	blocks time.Duration // the next program that the loop runs
}

func newHour(t *testing.T, seed uint64, backend string) *anHour {
	table := newMemory(backend)
	h := &anHour{world: newWorld(seed, table, false), server: newMetadataServer(t),
		newest: map[string]string{}, ended: map[string]time.Time{}}
	before := table.machine.Before
	table.machine.Before = func(program string, args []string, stdin string) (string, int) {
		blocks := h.blocks
		h.blocks = 0
		time.Sleep(blocks)
		return before(program, args, stdin)
	}
	writer := guestattr.New(guestattr.Options{Host: "metadata", Dial: h.server.dial})
	reports := mailbox.New[status.Status]()
	ctx, stop := context.WithCancel(t.Context())
	var tasks sync.WaitGroup
	tasks.Go(func() { _ = writer.Run(ctx) })
	tasks.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case s := <-reports.Get():
				setAttributes(writer, s)
			}
		}
	})
	h.stop = func() { stop(); tasks.Wait() }
	told := &h.life.loop.told
	told.reporters.status = func(s status.Status) {
		h.passes++
		h.life.status = s
		head, _ := s.Line()
		h.publishes(guestattr.AgentStatus, head)
		h.publishes(guestattr.AgentLastFailure, guestattr.OneLine(s.LastFailure, guestattr.MaxValue))
		reports.Put(s)
	}
	told.reporters.events = func(e report.Event) {
		if strings.Contains(e.Message, "service") {
			h.events = append(h.events, time.Now())
		}
	}
	return h
}

func (h *anHour) publishes(key, value string) {
	if was := h.newest[key]; was != value {
		h.ended[key+was] = time.Now()
		h.newest[key] = value
	}
}

// late is for how long the server has not held the newest value.
func (h *anHour) late(key string) time.Duration {
	value := h.server.get(key)
	if at := strings.Index(value, " services="); key == guestattr.AgentStatus && at >= 0 {
		value = value[:at+len(" services=")]
	}
	ended, known := h.ended[key+value]
	switch {
	case value == h.newest[key]:
		return 0
	case !known:
		return 100 * time.Hour
	}
	return time.Since(ended)
}

// TestAnHour is an hour of a control plane that changes its mind each second and an Envoy that
// comes and goes. The guest attributes keep to their budget, and to what is promised of them.
func TestAnHour(t *testing.T) {
	for seed, backend := range []string{iptables.NFT, iptables.Legacy}[:hourBackends] {
		t.Run(backend, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				h := newHour(t, uint64(seed), backend)
				defer h.stop()
				defer func() {
					if problem, failed := recover().(failure); failed {
						t.Errorf("%s\n%s", problem, strings.Join(h.log[max(0, len(h.log)-20):], "\n"))
					}
				}()
				h.play(t)
				h.stuck(t)
				h.budget(t)
			})
		})
	}
}

func (h *anHour) play(t *testing.T) {
	worst := map[string]time.Duration{}
	flap := 5 * time.Second
	for second := range 3600 {
		h.push(randomSet(h.Rand), h.IntN(2) == 0)
		if flap -= time.Second; flap <= 0 {
			if h.envoy.up {
				h.envoy.stop()
			} else {
				h.startEnvoy(true)
			}
			flap = h.upTo(20 * time.Second)
		}
		h.run(time.Second)
		synctest.Wait()
		beat, err := time.Parse(time.RFC3339, h.server.get(guestattr.AgentHeartbeat))
		if second < 60 {
			continue // the first values have yet to come
		}
		if err != nil {
			t.Fatal(err)
		}
		for key, late := range map[string]time.Duration{
			guestattr.AgentHeartbeat:   time.Since(beat),
			guestattr.AgentLastFailure: h.late(guestattr.AgentLastFailure),
			guestattr.AgentStatus:      h.late(guestattr.AgentStatus),
		} {
			worst[key] = max(worst[key], late)
		}
	}
	t.Logf("%d passes, %d queries, %d lines of services; the oldest: %v", h.passes,
		len(h.server.asked()), len(h.events), worst)
	for key, limit := range map[string]time.Duration{guestattr.AgentHeartbeat: 2 * time.Minute,
		guestattr.AgentLastFailure: time.Minute, guestattr.AgentStatus: time.Minute} {
		if worst[key] > limit {
			t.Errorf("%s was %v old, at most %v", key, worst[key], limit)
		}
	}
	if h.passes < 3600 {
		t.Errorf("%d passes in an hour", h.passes)
	}
	if most := peak(h.events); most > lineBurst+int(time.Minute/lineEvery)+3*maxNamed {
		t.Errorf("%d lines of services in a minute", most)
	}
	if n := len(h.events); n < 50 || n > 60*25 {
		t.Errorf("%d lines of services in an hour", n)
	}
}

// stuck has the loop hang in a pass, for ten minutes: the heartbeat tells by standing still a
// minute later at most, and goes on with the loop.
func (h *anHour) stuck(t *testing.T) {
	l, began := h.life.loop, time.Now()
	h.blocks = 10 * time.Minute
	l.takeEvent(iptables.Event{Lost: true}, true, began)
	l.pass(t.Context(), began) // looks at the kernel
	ended := time.Now()
	if ended.Sub(began) < 10*time.Minute {
		t.Fatalf("it hangs for %v", ended.Sub(began))
	}
	var last query
	for _, q := range h.server.asked() {
		if q.write && q.key == guestattr.AgentHeartbeat && q.at.Before(ended) {
			last = q
		}
	}
	beat, err := time.Parse(time.RFC3339, last.value)
	if err != nil || beat.After(began.Add(time.Second)) ||
		last.at.After(began.Add(time.Minute+time.Second)) {
		t.Errorf("the loop hangs from %v to %v: the heartbeat of %v was written at %v, %v", began, ended,
			beat, last.at, err)
	}
	for range 61 {
		l.pass(t.Context(), time.Now())
		time.Sleep(time.Second)
	}
	synctest.Wait()
	if beat, err := time.Parse(time.RFC3339, h.server.get(guestattr.AgentHeartbeat)); err != nil ||
		time.Since(beat) > time.Minute+time.Second {
		t.Errorf("it goes on, and the heartbeat is %v old, %v", time.Since(beat), err)
	}
}

// budget holds the queries against what is allowed: three at once, six in any minute.
func (h *anHour) budget(t *testing.T) {
	var at []time.Time
	for _, q := range h.server.asked() {
		at = append(at, q.at)
	}
	if most := peak(at); most > 6 {
		t.Errorf("%d queries in a minute", most)
	}
	if len(at) < 150 {
		t.Errorf("%d queries in an hour", len(at))
	}
}

// peak is the most of these times that lie within a minute.
func peak(at []time.Time) (most int) {
	first := 0
	for i := range at {
		for at[i].Sub(at[first]) >= time.Minute {
			first++
		}
		most = max(most, i-first+1)
	}
	return most
}
