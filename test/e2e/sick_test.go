//go:build lab

package e2e

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// sickness is a way for an admin interface to answer. The fake below stands before a real Envoy's
// and gives it for the dumps; nil: Envoy's own answer.
type sickness func(w http.ResponseWriter, r *http.Request, healthy []byte)

// fakeAdmin is where beforeAdmin answers.
const fakeAdmin = "127.0.0.1:15100"

// beforeAdmin puts a server before Envoy's admin interface, which is as sick as it is told to be.
func beforeAdmin(t *testing.T, m *mesh.Mesh) *atomic.Pointer[sickness] {
	t.Helper()
	var sick atomic.Pointer[sickness]
	envoy := m.VM.HTTP()
	fake, err := m.VM.ListenAs(lab.EnvoyUID, "tcp", fakeAdmin)
	must(t, err)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		resp, err := envoy.Get("http://" + lab.AdminAddr.String() + r.URL.String())
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		if s := sick.Load(); s != nil {
			(*s)(w, r, body)
			return
		}
		w.WriteHeader(resp.StatusCode)
		w.Write(body)
	})}
	go server.Serve(fake) // ends by Close
	t.Cleanup(func() { server.Close() })
	return &sick
}

// TestSickAdmin: whatever the admin interface answers, the rules stay, the heartbeat goes on, the
// failure is named, and it is over by itself.
func TestSickAdmin(t *testing.T) {
	t.Parallel()
	m, err := mesh.New(within(t, 30*time.Second), mesh.Options{Config: services()})
	must(t, err)
	defer func() { must(t, m.Close()) }()

	sick := beforeAdmin(t, m)
	a := m.NewAgent("--envoy-admin", fakeAdmin)
	defer func() {
		if t.Failed() {
			t.Log(a.Log())
		}
	}()
	must(t, a.Start())
	must(t, a.WaitReady(within(t, 20*time.Second)))
	through(t, m, web4)
	before := chains(t, m)

	tests := []struct {
		name string
		sick sickness
		says string // in agent-last-failure
		wait time.Duration
	}{
		{"empty", func(w http.ResponseWriter, r *http.Request, healthy []byte) {}, "empty", 10 * time.Second},
		{"garbage", func(w http.ResponseWriter, r *http.Request, healthy []byte) { io.WriteString(w, "\x00\xff garbage") }, "is not", 10 * time.Second},
		{"half a dump", func(w http.ResponseWriter, r *http.Request, healthy []byte) {
			w.Write(healthy[:len(healthy)/2])
		}, "", 10 * time.Second},
		{"500", func(w http.ResponseWriter, r *http.Request, healthy []byte) { http.Error(w, "no", 500) }, "status 500", 10 * time.Second},
		{"403", func(w http.ResponseWriter, r *http.Request, healthy []byte) { http.Error(w, "no", 403) }, "allow_paths", 10 * time.Second},
		{"hang", func(w http.ResponseWriter, r *http.Request, healthy []byte) { <-r.Context().Done() }, "in time", 30 * time.Second},
		{"endless body", func(w http.ResponseWriter, r *http.Request, healthy []byte) {
			io.WriteString(w, `{"configs":[`)
			row := strings.Repeat(`{"name":"x"},`, 1000)
			for r.Context().Err() == nil {
				if _, err := io.WriteString(w, row); err != nil {
					return
				}
			}
		}, "", 40 * time.Second},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			first, err := a.Status(t.Context())
			must(t, err)
			sick.Store(&test.sick)
			s, err := a.Wait(within(t, test.wait), "the failure", func(s status.Status) bool {
				return strings.HasPrefix(
					s.LastFailure, "Envoy's admin interface on 127.0.0.1:15100 gives no usable answer: ") &&
					strings.Contains(s.LastFailure, test.says) && strings.Contains(s.LastFailure, "(since ")
			})
			must(t, err)
			t.Log(s.LastFailure)
			if !s.Heartbeat.After(first.Heartbeat) {
				t.Error("the heartbeat stands still")
			}
			passes := s.Passes
			if _, err := a.Wait(within(t, 5*time.Second), "more passes", func(s status.Status) bool {
				return s.Passes > passes+2
			}); err != nil {
				t.Error(err)
			}
			if after := chains(t, m); after != before {
				t.Errorf("the rules changed:\n%s\nbefore:\n%s", after, before)
			}
			through(t, m, web4)
			if code, body, err := a.Get("/healthz"); code != http.StatusOK {
				t.Errorf("/healthz: %d %q %v: a new VM would not mend this", code, body, err)
			}
			sick.Store(nil)
			_, err = a.Wait(within(t, 40*time.Second), "recovery", func(s status.Status) bool {
				return s.Ready && strings.Contains(s.LastFailure, "(over; ")
			})
			must(t, err)
		})
	}
}

// TestBadInput: one line that names the thing and the next step, an exit code that is
// not 0, nothing changed.
func TestBadInput(t *testing.T) {
	t.Parallel()
	m, err := mesh.New(within(t, 30*time.Second), mesh.Options{Config: services()})
	must(t, err)
	defer func() { must(t, m.Close()) }()
	a := m.NewAgent()
	bad := m.Dir + "/bad.json"
	must(t, writeFile(bad, `{"api-version":"0.2","proxy-spec":{"proxy-port":"x"}}`))
	empty := m.Dir + "/no-programs"
	must(t, mkdir(empty))
	tests := []struct {
		name string
		args []string
		env  string
		code int
		says []string
	}{
		{"unknown flag", []string{"run", "--no-such"}, "", 64, []string{"--no-such", "--help"}},
		{"unknown command", []string{"frobnicate"}, "", 64, []string{"frobnicate", "--help"}},
		{"an argument too many", []string{"status", "now"}, "", 64, []string{"now"}},
		{"unreadable --config", []string{"run", "--config", m.Dir + "/none.json"}, "", 64, []string{"none.json", "--config"}},
		{"malformed attribute", []string{"run", "--config", bad}, "", 64, []string{"bad.json", "proxy-port"}},
		{"bad policy", []string{"run", "--when-envoy-down", "panic"}, "", 64, []string{"panic", "keep or bypass"}},
		{"bad environment twin", []string{"run"}, "SERVICE_PROXY_AGENT_WHEN_ENVOY_DOWN=panic", 64, []string{"panic"}},
		{"bad admin address", []string{"run", "--envoy-admin", "15000"}, "", 64, []string{"--envoy-admin", "15000"}},
		{"bad listen address", []string{"run", "--listen", "x:y:z"}, "", 64, []string{"--listen"}},
		{"bad log level", []string{"run", "--log-level", "loud"}, "", 64, []string{"loud", "debug"}},
		{"status without an agent", []string{"status"}, "", 2, []string{"agent.sock"}},
	}
	before, err := m.VM.Run(t.Context(), "iptables-save")
	must(t, err)
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			var env []string
			if test.env != "" {
				env = append(env, test.env)
			}
			check(t, a, 0, env, test.args, test.code, test.says)
		})
	}
	t.Run("no iptables", func(t *testing.T) {
		// In a mount namespace of its own, in which the folders of the programs are empty.
		binary, err := mesh.Binary()
		must(t, err)
		out, err := m.VM.Command(within(t, 20*time.Second), "unshare", "-m", "sh", "-c",
			`mount --bind "$1" /usr/sbin && PATH=$1 && export PATH && shift && exec "$@"`, "sh", empty, binary, "run", "--config", "none").CombinedOutput()
		if err == nil || strings.Count(string(out), "\n") != 1 ||
			!strings.Contains(string(out), "install the package iptables") {
			t.Errorf("%v: %q", err, out)
		}
	})
	t.Run("not root", func(t *testing.T) {
		check(t, a, 1000, []string{"RUNTIME_DIRECTORY=" + m.Dir}, []string{
			"run", "--config", "none", "--proxy-user", fmt.Sprint(lab.EnvoyUID)}, 1, []string{"run as root"})
	})
	after, err := m.VM.Run(t.Context(), "iptables-save")
	must(t, err)
	if withoutComments(after) != withoutComments(before) {
		t.Errorf("the kernel was changed:\n%s", after)
	}
}

func check(t *testing.T, a *mesh.Agent, uid uint32, env, args []string, code int, says []string) {
	t.Helper()
	stdout, stderr, got, err := a.RunAs(within(t, 20*time.Second), uid, env, args...)
	must(t, err)
	if got != code {
		t.Errorf("exit code %d, want %d", got, code)
	}
	lines := strings.Split(strings.TrimSpace(stderr), "\n")
	if len(lines) != 1 || stdout != "" {
		t.Errorf("want one line on stderr, got %q and on stdout %q", stderr, stdout)
	}
	for _, s := range says {
		if !strings.Contains(stderr, s) {
			t.Errorf("%q does not say %q", stderr, s)
		}
	}
}
