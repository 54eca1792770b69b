package envoywatch

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// way is our own way to control planes, by address.
type way struct {
	mu      sync.Mutex
	blocked map[string]error
	tried   []string
	hangs   chan bool // not nil: a try waits for it
}

func (p *way) try(ctx context.Context, t envoyadmin.Target) error {
	p.mu.Lock()
	p.tried = append(p.tried, t.Address)
	err, hangs := p.blocked[t.Address], p.hangs
	p.mu.Unlock()
	if hangs != nil {
		select {
		case <-hangs:
		case <-ctx.Done():
		}
	}
	return err
}

func (p *way) tries() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	tried := strings.Join(p.tried, " ")
	p.tried = nil
	return tried
}

// probing is a Watch whose Envoy's stream has just ended; the clock is that of the bubble.
func probing(t *testing.T, p *way) *test {
	e := running()
	e.targets = []envoyadmin.Target{{Address: "a:443"}, {Address: "b:443"}}
	w := watch(t, e, func(o *Options) { o.Probe = p.try })
	w.step()
	synctest.Wait()
	if tried := p.tries(); tried != "" {
		t.Errorf("tried %s while nothing is wrong", tried)
	}
	w.w.Note(envoyadmin.LogEvent{Kind: envoyadmin.StreamClosed, Code: 14, Count: 1})
	w.questions()
	return w
}

// TestProbe: our own way is tried at once when the stream ends, and then each 30 s; the bootstrap
// is asked for once. It is told while it matters.
func TestProbe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		blocked := errors.New("no route")
		p := &way{blocked: map[string]error{"b:443": blocked}}
		w := probing(t, p)
		w.step()
		synctest.Wait()
		w.wantQuestions("bootstrap")
		if tried := p.tries(); tried != "a:443 b:443" {
			t.Errorf("tried %q", tried)
		}
		if v, _ := w.step(); !errors.Is(v.Probe, blocked) {
			t.Errorf("it says %v", v.Probe)
		}
		p.blocked = map[string]error{"a:443": errors.New("refused")}
		v := w.after(30*time.Second - 1)
		synctest.Wait()
		if tried := p.tries(); tried != "" || !errors.Is(v.Probe, blocked) {
			t.Errorf("tried %q too soon; it says %v", tried, v.Probe)
		}
		w.questions()
		w.after(1)
		synctest.Wait()
		if tried := p.tries(); tried != "a:443" {
			t.Errorf("tried %q", tried)
		}
		if asked := w.questions(); strings.Contains(asked, "bootstrap") {
			t.Errorf("asked for its bootstrap again: %s", asked)
		}
		if v, _ := w.step(); v.Probe == nil || v.Probe.Error() != "refused" {
			t.Errorf("it says %v", v.Probe)
		}
		w.down = envoyadmin.ErrRefused // Envoy itself is gone
		if v := w.after(time.Second); v.Probe != nil {
			t.Errorf("it says %v of the way of an Envoy that does not run", v.Probe)
		}
		synctest.Wait()
		p.tries()
		w.down = nil
		w.w.Note(envoyadmin.LogEvent{Kind: envoyadmin.ListenerChanged, Count: 1})
		for range 60 {
			w.after(time.Second)
		}
		synctest.Wait()
		if tried := p.tries(); tried != "" {
			t.Errorf("tried %q while nothing is wrong", tried)
		}
	})
}

// TestProbeNotConfigured: an Envoy that never got its configuration has perhaps no way to it; so
// has one that is apart.
func TestProbeNotConfigured(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for name, change := range map[string]func(*envoy){
			"not configured": func(e *envoy) { e.dynamic, e.stats.Version = false, 0 },
			"apart":          func(e *envoy) { e.stats.Connected = false },
		} {
			p := &way{}
			e := running()
			change(e)
			w := watch(t, e, func(o *Options) { o.Probe = p.try })
			w.step()
			w.after(15 * time.Second)
			synctest.Wait()
			if tried := p.tries(); tried != "td:443" {
				t.Errorf("%s: tried %q", name, tried)
			}
		}
		e := running()
		e.down = envoyadmin.ErrNotJSON
		p := &way{}
		w := watch(t, e, func(o *Options) { o.Probe = p.try })
		w.step()
		synctest.Wait()
		if tried := p.tries(); tried != "" {
			t.Errorf("tried %q of an Envoy that was never met", tried)
		}
	})
}

// TestProbeWithoutBootstrap: it is asked for again with the next try.
func TestProbeWithoutBootstrap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &way{}
		w := probing(t, p)
		w.fails["bootstrap"] = envoyadmin.ErrTimeout
		w.step()
		synctest.Wait()
		if v, _ := w.step(); v.Probe != nil || v.Probed || v.Err != nil {
			t.Errorf("it says %v, tried %v, %v", v.Probe, v.Probed, v.Err)
		}
		if tried := p.tries(); tried != "" {
			t.Errorf("tried %q", tried)
		}
		clear(w.fails)
		w.after(30 * time.Second)
		synctest.Wait()
		if tried := p.tries(); tried != "a:443 b:443" {
			t.Errorf("tried %q", tried)
		}
		if v, _ := w.step(); v.Probe != nil || !v.Probed {
			t.Errorf("it says %v, tried %v", v.Probe, v.Probed)
		}
		w.w.Note(envoyadmin.LogEvent{Kind: envoyadmin.ListenerChanged, Count: 1})
		if v := w.after(time.Second); v.Probed {
			t.Error("it says that our way was tried while Envoy's stands")
		}
	})
}

// TestProbeOfBefore: what a try of the Envoy before came to says nothing of the next, whose control
// planes may be others.
func TestProbeOfBefore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &way{hangs: make(chan bool)}
		p.blocked = map[string]error{"a:443": errors.New("no route")}
		w := probing(t, p)
		w.step()
		synctest.Wait()
		w.restart()
		w.targets = []envoyadmin.Target{{Address: "c:443"}}
		w.after(time.Second)
		close(p.hangs)
		synctest.Wait()
		if tried := p.tries(); tried != "a:443" {
			t.Errorf("tried %q", tried)
		}
		if v := w.after(time.Second); v.Probe != nil || v.Probed {
			t.Errorf("it says %v, tried %v", v.Probe, v.Probed)
		}
		synctest.Wait()
		if tried := p.tries(); tried != "c:443" {
			t.Errorf("then tried %q", tried)
		}
	})
}

// TestProbeOfNew: the way of a process that was just met is tried soon, though that of the one
// before was tried a moment ago; one that crashes all the time has it tried no more than each two
// seconds.
func TestProbeOfNew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &way{}
		w := probing(t, p)
		w.step()
		synctest.Wait()
		w.step() // takes the answer
		p.tries()
		w.targets = []envoyadmin.Target{{Address: "c:443"}}
		tries := 0
		for range 20 {
			w.restart()
			w.after(time.Second)
			synctest.Wait()
			tries += strings.Count(p.tries(), "c:443")
		}
		if tries < 5 || tries > 10 {
			t.Errorf("tried %d times in 20 s", tries)
		}
	})
}

// TestProbeLate: the stream stands again before the answer of a try came.
func TestProbeLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &way{hangs: make(chan bool)}
		p.blocked = map[string]error{"a:443": errors.New("no route")}
		w := probing(t, p)
		w.step()
		synctest.Wait()
		w.w.Note(envoyadmin.LogEvent{Kind: envoyadmin.ListenerChanged, Count: 1})
		close(p.hangs)
		synctest.Wait()
		w.w.takeProbe(<-w.w.probes)
		if v := <-w.w.Views(); v.Probe != nil {
			t.Errorf("it says %v", v.Probe)
		}
	})
}

// TestProbeEnd: a try that hangs does not outlive the Watch.
func TestProbeEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &way{hangs: make(chan bool)}
		w := probing(t, p)
		ctx, cancel := context.WithCancel(t.Context())
		for range 3 { // more than the channel holds
			w.w.probeAt = time.Time{}
			w.w.Step(ctx)
		}
		synctest.Wait()
		cancel() // and the bubble waits for its goroutines
	})
}

// TestProbeReal: nothing listens there.
func TestProbeReal(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := listener.Addr().String()
	if err := Probe(t.Context(), envoyadmin.Target{Address: addr}); err != nil {
		t.Errorf("it listens: %v", err)
	}
	go func() {
		if c, err := listener.Accept(); err == nil {
			c.Close()
		}
		if c, err := listener.Accept(); err == nil {
			c.Close()
		}
	}()
	err = Probe(t.Context(), envoyadmin.Target{Address: addr, TLS: true})
	if !errors.Is(err, envoyadmin.ErrTLS) {
		t.Errorf("no TLS there: %v", err)
	}
	listener.Close()
	err = Probe(t.Context(), envoyadmin.Target{Address: addr})
	if !errors.Is(err, envoyadmin.ErrConnect) {
		t.Errorf("it does not listen: %v", err)
	}
}

func TestUnitWords(t *testing.T) {
	for _, tt := range []struct {
		unit systemd.State
		want string
	}{
		{systemd.State{Active: "failed", Sub: "failed", ExitCode: 1}, "failed, exit code 1"},
		{systemd.State{Active: "activating", Sub: "auto-restart", ExitCode: -1, ExitSignal: 11,
			Restarts: 12}, "activating, auto-restart, ended by SIGSEGV, 12 restarts"},
		{systemd.State{Active: "inactive", Sub: "dead"}, "inactive, dead"},
		{systemd.State{Active: "active", Restarts: 1}, "active, 1 restarts"},
	} {
		if got := unitWords(tt.unit); got != tt.want {
			t.Errorf("%+v: %q, want %q", tt.unit, got, tt.want)
		}
	}
}

// TestForeign: whether it is an Envoy that answers for another user is asked each 5 s, and
// forgotten with that user.
func TestForeign(t *testing.T) {
	asked, is := 0, true
	e := running()
	foreign := fmt.Errorf("%w: bob's", envoyadmin.ErrUntrusted)
	w := watch(t, e, func(o *Options) {
		o.Foreign = func(_ context.Context, err error) bool {
			asked++
			return is && errors.Is(err, foreign)
		}
	})
	if v, _ := w.step(); v.ForeignEnvoy || asked != 0 {
		t.Errorf("asked %d times while nobody else holds the port", asked)
	}
	w.down = foreign
	if v := w.seconds(30); !v.ForeignEnvoy || asked < 4 || asked > 7 {
		t.Errorf("it says %v, asked %d times in half a minute", v.ForeignEnvoy, asked)
	}
	is = false
	if v := w.seconds(10); v.ForeignEnvoy {
		t.Error("it is an Envoy no more")
	}
	is = true
	w.seconds(10)
	w.down = envoyadmin.ErrRefused
	if v := w.seconds(10); v.ForeignEnvoy {
		t.Error("it is said of nobody")
	}
}
