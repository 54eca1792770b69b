//go:build lab

package e2e

import (
	"bufio"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// TestHotRestart: the Envoy of before answers on connections that it had until it ends, here after
// a minute, and takes no more listeners. What the control plane sends is in the rules long before.
func TestHotRestart(t *testing.T) {
	t.Parallel()
	m, err := mesh.New(within(t, 30*time.Second), mesh.Options{Config: services(), NoEnvoy: true})
	must(t, err)
	defer m.Close()
	m.Envoy, err = m.StartEnvoy(lab.EnvoyOptions{ControlPlane: m.CPAddr, HotRestart: true})
	must(t, err)
	must(t, m.Envoy.WaitReady(within(t, 10*time.Second)))
	a := m.NewAgent()
	must(t, a.Start())
	must(t, a.WaitReady(within(t, 20*time.Second)))
	through(t, m, web4)
	before := chains(t, m)

	must(t, m.Envoy.HotRestart())
	eventually(t, 20*time.Second, "the new Envoy has taken over", func() (bool, string) {
		log := m.Envoy.LogTail(20)
		return strings.Contains(log, "closing and draining listeners"), log // said by the old one
	})
	if now := chains(t, m); now != before {
		t.Errorf("the rules changed:\n%s\nbefore:\n%s", now, before)
	}
	push, err := m.CP.Set(services(service(1)))
	must(t, err)
	must(t, m.CP.WaitAccepted(within(t, 10*time.Second), push))
	eventually(t, 5*time.Second, "the new service in the rules", func() (bool, string) {
		out := chains(t, m)
		return strings.Contains(out, "-d "+service(1).Prefixes[0].String()), out + "\n" + a.Log()
	})
	t.Logf("%v after the control plane's answer", time.Since(push.At))
	through(t, m, web4)
}

// supervised is a mesh whose Envoy runs under our supervisor, as in its unit, with an agent beside
// it. An epoch that has handed over ends after drained.
func supervised(t *testing.T, drained time.Duration, args ...string) (*mesh.Mesh, *mesh.Agent) {
	t.Helper()
	m, err := mesh.New(within(t, 30*time.Second), mesh.Options{Config: services(), NoEnvoy: true})
	must(t, err)
	t.Cleanup(func() { must(t, m.Close()) })
	binary, err := mesh.Binary()
	must(t, err)
	seconds := fmt.Sprint(int(drained.Seconds()))
	program, err := lab.FindEnvoy()
	must(t, err)
	place(t, m, program)
	m.Envoy, err = m.StartEnvoy(lab.EnvoyOptions{
		Binary: envoyOf(m), ControlPlane: m.CPAddr, Supervisor: binary, SupervisorArgs: args,
		Args: []string{"--drain-time-s", fmt.Sprint(int(drained.Seconds()) / 2),
			"--parent-shutdown-time-s", seconds},
	})
	must(t, err)
	must(t, m.Envoy.WaitReady(within(t, 20*time.Second)))
	a := m.NewAgent()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("agent's log:\n%s\nEnvoy's:\n%s", a.Log(), envoySaid(m))
		}
	})
	must(t, a.Start())
	must(t, a.WaitReady(within(t, 20*time.Second)))
	through(t, m, web4)
	through(t, m, db4)
	return m, a
}

// envoyOf is the program of a supervised Envoy, which may be replaced.
func envoyOf(m *mesh.Mesh) string { return filepath.Join(m.Dir, "envoy") }

// place puts a program there as bootstrap does: by a rename.
func place(t *testing.T, m *mesh.Mesh, program string) {
	t.Helper()
	path := envoyOf(m)
	if os.Link(program, path+".new") != nil { // it is on another file system
		text, err := os.ReadFile(program)
		must(t, err)
		must(t, os.WriteFile(path+".new", text, 0o755))
	}
	must(t, os.Rename(path+".new", path))
}

// reload is a reload that has to succeed.
func reload(t *testing.T, m *mesh.Mesh) {
	t.Helper()
	began := time.Now()
	code, said, err := m.Envoy.Reload(within(t, 60*time.Second))
	must(t, err)
	if code != 0 {
		t.Fatalf("reload: exit code %d: %s\n%s", code, said, m.Envoy.LogTail(40))
	}
	t.Logf("reload: %s, after %v", said, time.Since(began).Round(time.Millisecond))
}

// talks are connections that go on until somebody ends them.
type talks struct {
	mu    sync.Mutex
	ended []time.Time
	alive int
}

// open opens n of them to a TCP service; each asks for a line five times a second.
func open(t *testing.T, m *mesh.Mesh, n int) *talks {
	t.Helper()
	s := &talks{alive: n}
	for range n {
		conn, err := m.VM.DialAs(within(t, 10*time.Second), 1000, db4)
		must(t, err)
		t.Cleanup(func() { conn.Close() })
		go func() {
			in := bufio.NewReader(conn)
			for {
				_, err := io.WriteString(conn, "hello\n")
				if err == nil {
					_, err = in.ReadString('\n')
				}
				if err != nil {
					s.mu.Lock()
					s.alive--
					s.ended = append(s.ended, time.Now())
					s.mu.Unlock()
					return
				}
				time.Sleep(200 * time.Millisecond)
			}
		}()
	}
	return s
}

// state is how many go on, and when the first of the others has ended.
func (s *talks) state() (alive int, first time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.ended) > 0 {
		first = s.ended[0]
	}
	return s.alive, first
}

// onlyEpoch waits until one Envoy runs.
func onlyEpoch(t *testing.T, m *mesh.Mesh, d time.Duration) {
	t.Helper()
	eventually(t, d, "one epoch", func() (bool, string) {
		all := m.Envoy.Epochs()
		return len(all) == 1, fmt.Sprint(all)
	})
}

// TestReloadUnderLoad: each reload of Envoy's unit under 200 new connections a second and 50 long
// streams. No connection is refused, the streams live until the end of the drain, and the rules are
// not touched.
func TestReloadUnderLoad(t *testing.T) {
	beside(t)
	drained := time.Duration(soak(15, 4)) * time.Second
	m, a := supervised(t, drained)
	before, applies := chains(t, m), applied(t, a)
	steady := m.Steady(lab.SteadyOptions{From: m.VM, UID: 1000,
		To: []netip.AddrPort{web4, web6, db4}, PerSecond: 200, HTTP: true})
	for range soak(10, 2) {
		long := open(t, m, 50)
		asked := time.Now()
		reload(t, m)
		served := time.Now()
		t.Logf("memory: %v", m.Envoy.Epochs())
		if n := len(m.Envoy.Epochs()); n != 2 {
			t.Errorf("%d epochs right after the reload", n)
		}
		onlyEpoch(t, m, drained+10*time.Second)
		var first time.Time
		eventually(t, 5*time.Second, "the streams have ended", func() (bool, string) {
			var alive int
			alive, first = long.state()
			return alive == 0, fmt.Sprint(alive, " go on")
		})
		t.Logf("the first of 50 streams has ended %v after the next epoch served",
			first.Sub(served).Round(10*time.Millisecond))
		// Envoy counts from when it was live, which was before the answer to the reload.
		if first.Before(asked.Add(drained)) {
			t.Errorf("a stream was cut %v after the reload, before the end of the drain", first.Sub(asked))
		}
	}
	c := steady.Stop()
	t.Log(c)
	if c.Bad() != 0 || c.OK < 200 {
		t.Errorf("connections: %v", c)
	}
	if now := chains(t, m); now != before {
		t.Errorf("the rules changed:\n%s\nbefore:\n%s", now, before)
	}
	if n := applied(t, a); n != applies {
		t.Errorf("%d transactions were written, want none", n-applies)
	}
	must(t, a.WaitReady(within(t, 20*time.Second)))
}

// TestReloadWithFaults: somebody kills or stops what takes part in a reload, in a random order, and
// gives it configurations that are no good. As long as an epoch serves no connection is refused,
// and after each fault the next reload works, with an admin interface that the agent follows.
func TestReloadWithFaults(t *testing.T) {
	beside(t)
	random := seeded(t)
	m, a := supervised(t, 2*time.Second, "--start-limit", "3s")
	must(t, os.Link(envoyOf(m), filepath.Join(m.Dir, "real")))
	good, err := m.Envoy.Bootstrap()
	must(t, err)
	before, applies := chains(t, m), applied(t, a)
	newest := func(d time.Duration, epochs int) (e lab.Epoch) {
		t.Helper()
		eventually(t, d, fmt.Sprint(epochs, " epochs"), func() (bool, string) {
			all := m.Envoy.Epochs()
			if len(all) == epochs {
				e = all[len(all)-1]
			}
			return len(all) == epochs, fmt.Sprint(all)
		})
		return e
	}
	// meanwhile has f done while a reload is under way.
	meanwhile := func(f func()) (code int, said string) {
		done := make(chan error, 1)
		ctx := within(t, 60*time.Second)
		go func() {
			var err error
			code, said, err = m.Envoy.Reload(ctx)
			done <- err
		}()
		f()
		must(t, <-done)
		return code, said
	}
	kill := func() {
		time.Sleep(time.Duration(random.IntN(200)) * time.Millisecond)
		newest(5*time.Second, 2).Signal(syscall.SIGKILL)
	}
	refused := func(code int, said string) {
		t.Helper()
		t.Log(said)
		if code != 1 {
			t.Errorf("exit code %d: %s; want 1", code, said)
		}
	}
	faults := map[string]func(){
		"the next one dies while it waits for its control plane": func() {
			m.CP.Pause()
			refused(meanwhile(kill))
			m.CP.Continue()
		},
		"the next one never hears from its control plane": func() {
			m.CP.Pause()
			refused(meanwhile(func() {}))
			m.CP.Continue()
		},
		"the next one is stopped": func() {
			m.CP.Pause() // else it is too quick
			refused(meanwhile(func() {
				newest(5*time.Second, 2).Signal(syscall.SIGSTOP)
				m.CP.Continue()
			}))
		},
		"a configuration that is none": func() {
			must(t, m.Envoy.SetBootstrap([]byte(`{"nonsense":1}`)))
			refused(meanwhile(func() {}))
			must(t, m.Envoy.SetBootstrap(good))
		},
		"another program that dies once it has an admin interface": func() {
			program, err := lab.FindEnvoy()
			must(t, err)
			dies := filepath.Join(m.Dir, "dies")
			must(t, os.WriteFile(dies, []byte(fmt.Sprintf(`#!/bin/sh
case "$*" in *--hot-restart-version*|*--help*|*validate*) exec %[1]s "$@";; esac
for a; do [ "$last" = --admin-address-path ] && admin=$a; last=$a; done
%[1]s "$@" &
until [ -s "$admin" ]; do sleep 0.02; done
kill -9 $!
exit 3
`, filepath.Join(m.Dir, "real"))), 0o755))
			place(t, m, dies)
			must(t, os.Remove(dies))
			m.CP.Pause() // else it is too quick
			refused(meanwhile(func() {}))
			m.CP.Continue()
			place(t, m, program)
		},
		"the one that drains dies": func() {
			reload(t, m)
			time.Sleep(time.Duration(random.IntN(1000)) * time.Millisecond)
			m.Envoy.Epochs()[0].Signal(syscall.SIGKILL)
		},
		"the one that drains is stopped": func() {
			reload(t, m)
			m.Envoy.Epochs()[0].Signal(syscall.SIGSTOP)
		},
		"two at a time": func() {
			code, said := meanwhile(func() { reload(t, m) })
			if code != 0 {
				t.Errorf("exit code %d: %s", code, said)
			}
		},
		"the agent is killed in a reload": func() {
			if code, said := meanwhile(func() { a.Kill(); must(t, a.Start()) }); code != 0 {
				t.Errorf("exit code %d: %s", code, said)
			}
		},
	}
	names := slices.Sorted(maps.Keys(faults))
	steady := m.Steady(lab.SteadyOptions{From: m.VM, UID: 1000,
		To: []netip.AddrPort{web4, web6, db4}, PerSecond: 100, HTTP: true})
	for range soak(10, 1) {
		random.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
		for _, name := range names {
			t.Log(name)
			faults[name]()
			eventually(t, 30*time.Second, "one epoch that answers", func() (bool, string) {
				state, err := m.Envoy.Admin(t.Context(), "/ready")
				all := m.Envoy.Epochs()
				return err == nil && strings.TrimSpace(state) == "LIVE" && len(all) == 1,
					fmt.Sprint(state, err, all)
			})
			must(t, a.WaitReady(within(t, 20*time.Second)))
			if c := steady.Counts(); c.Bad() != 0 {
				t.Fatalf("connections: %v", c)
			}
		}
		reload(t, m)
		onlyEpoch(t, m, 10*time.Second)
	}
	c := steady.Stop()
	t.Log(c)
	if c.Bad() != 0 || c.OK < 100 {
		t.Errorf("connections: %v", c)
	}
	if now := chains(t, m); now != before {
		t.Errorf("the rules changed:\n%s\nbefore:\n%s", now, before)
	}
	if n := applied(t, a); n > applies {
		t.Errorf("%d transactions were written, want none", n-applies)
	}
}

// envoySaid is what Envoy's log says beside what it always says at a start.
func envoySaid(m *mesh.Mesh) string {
	var lines []string
	for line := range strings.Lines(m.Envoy.LogTail(3000)) {
		if !strings.Contains(line, "[source/server/server.cc:467]") &&
			!strings.Contains(line, "[source/server/server.cc:547]") {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines[max(0, len(lines)-200):], "")
}
