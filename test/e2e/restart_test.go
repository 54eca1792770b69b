//go:build lab

package e2e

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// seeded is a random source whose seed is logged; SEED repeats a run.
func seeded(t *testing.T) *rand.Rand {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("SEED"); s != "" {
		var err error
		seed, err = strconv.ParseUint(s, 10, 64)
		must(t, err)
	}
	t.Logf("SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// TestLateControlPlane: Envoy restarts while its control plane stands still, which answers some
// time later, and in every second case just behind the agent's dump of an Envoy without
// listeners. Nothing that the new Envoy says before counts: the rules are not touched, and no
// connection goes to the raw address.
func TestLateControlPlane(t *testing.T) {
	t.Parallel()
	// Each round ends within five minutes: then the rows for older connections go, which is a
	// transaction of its own.
	for round := range soak(5, 1) {
		t.Run(fmt.Sprint("round ", round), func(t *testing.T) {
			onBoth(t, lateControlPlane)
		})
	}
}

func lateControlPlane(t *testing.T, backend lab.Backend) {
	random := seeded(t)
	m, a := start(t, mesh.Options{Backend: backend, Config: services(), NoRuntime: true})
	must(t, a.WaitReady(within(t, 20*time.Second)))
	through(t, m, web4)
	through(t, m, web6)
	before, applies := chains(t, m), applied(t, a)
	steady := m.Steady(lab.SteadyOptions{From: m.VM, UID: 1000, To: []netip.AddrPort{web4, web6},
		PerSecond: 100, HTTP: true})
	restarts := soak(40, 3)
	for i := range restarts {
		const dumpReads = "envoy_dump_reads_total"
		dumps, delay := metric(t, a, dumpReads), time.Duration(300+random.IntN(2700))*time.Millisecond
		m.CP.Pause()
		must(t, m.Envoy.Restart())
		if i%2 == 0 {
			eventually(t, 10*time.Second, "a dump of the new Envoy", func() (bool, string) {
				n := metric(t, a, dumpReads)
				return n > dumps, fmt.Sprint(n)
			})
			delay = time.Duration(random.IntN(100)) * time.Millisecond
		}
		time.Sleep(delay)
		m.CP.Continue()
		must(t, a.WaitReady(within(t, 60*time.Second)))
		through(t, m, web4)
		if n := applied(t, a); n != applies {
			t.Errorf("restart %d, control plane after %v: %d transactions were written, want none\n%s", i,
				delay, n-applies, chains(t, m))
			applies = n
		}
	}
	if after := chains(t, m); after != before {
		t.Errorf("the rules changed:\n%s\nbefore\n%s", after, before)
	}
	c := steady.Stop()
	t.Logf("%d restarts: %d connections, %d refused while Envoy was away", restarts, c.Tried, c.Failed)
	if c.Escaped != 0 || c.OK == 0 {
		t.Errorf("connections: %v", c)
	}
}

// TestStartWithoutEnvoy: the agent starts while Envoy is away and rules are in. Those of an agent
// of this boot stay, unless bypass asks for the contrary; those that something else restored at
// boot wait until Envoy accepts.
func TestStartWithoutEnvoy(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, backend lab.Backend) {
		m, a := start(t, mesh.Options{Backend: backend, Config: services(), NoRuntime: true},
			"--when-envoy-down", "bypass")
		must(t, a.WaitReady(within(t, 20*time.Second)))
		through(t, m, web4)
		through(t, m, web6)
		a.Kill()
		m.Envoy.Kill()
		must(t, a.Start())
		escapes(t, m, web4)
		escapes(t, m, web6)
		_, err := a.Wait(within(t, 5*time.Second), "mode bypass", func(s status.Status) bool {
			return s.Mode == "bypass"
		})
		must(t, err)
		must(t, m.Envoy.Start())
		must(t, a.WaitReady(within(t, 20*time.Second)))
		through(t, m, web4)
		through(t, m, web6)

		a.Kill()
		keeps := m.NewAgent("--when-envoy-down", "keep")
		before := chains(t, m)
		// An agent that meets rules which are not of this boot, and an Envoy that
		// accepts, takes nothing out.
		must(t, keeps.Reboot())
		steady := m.Steady(lab.SteadyOptions{From: m.VM, UID: 1000, To: []netip.AddrPort{web4, web6},
			PerSecond: 100, HTTP: true})
		must(t, keeps.Start())
		must(t, keeps.WaitReady(within(t, 20*time.Second)))
		if c := steady.Stop(); c.Bad() != 0 || c.OK == 0 {
			t.Errorf("connections over the start: %v", c)
		}
		if n := applied(t, keeps); n != 0 {
			t.Errorf("%d transactions were written, want none", n)
		}
		keeps.Kill()
		m.Envoy.Kill()
		must(t, keeps.Start()) // the rules are of this boot, and kept
		_, err = keeps.Wait(within(t, 10*time.Second), "the failure", func(s status.Status) bool {
			return strings.HasPrefix(s.LastFailure, "Envoy is not running") && s.Passes > 4
		})
		must(t, err)
		if after := chains(t, m); after != before {
			t.Errorf("the rules changed:\n%s\nbefore\n%s", after, before)
		}
		keeps.Kill()
		must(t, keeps.Reboot()) // and netfilter-persistent puts them back before Envoy is there
		must(t, keeps.Start())
		escapes(t, m, web4)
		escapes(t, m, web6)
		must(t, m.Envoy.Start())
		must(t, keeps.WaitReady(within(t, 20*time.Second)))
		through(t, m, web4)
		through(t, m, web6)
	})
}

// staticEnvoy is the whole configuration of an Envoy without a control plane, for VIP 10.10.0.2
// and its TCP port 9000.
var staticEnvoy = fmt.Sprintf(`{
"node": {"id": "static", "cluster": "static"},
"admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 15000}}},
"static_resources": {
 "clusters": [{"name": "db", "type": "STATIC", "connect_timeout": "2s", "load_assignment": {"cluster_name": "db", "endpoints": [{"lb_endpoints": [
  {"endpoint": {"address": {"socket_address": {"address": %q, "port_value": %d}}}}]}]}}],
 "listeners": [{"name": "outbound", "address": {"socket_address": {"address": "0.0.0.0", "port_value": 15001}},
  "listener_filters": [{"name": "envoy.filters.listener.original_dst",
   "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst"}}],
  "filter_chains": [{"filter_chain_match": {"prefix_ranges": [{"address_prefix": "10.10.0.2", "prefix_len": 32}], "destination_port": 9000},
   "filters": [{"name": "envoy.filters.network.tcp_proxy",
    "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy", "stat_prefix": "db", "cluster": "db"}}]}]}]}}`,
	lab.EndpointAddr(1), mesh.EndpointPort)

// TestStaticEnvoy: an Envoy that takes no listeners from a control plane is
// configured once it is live.
func TestStaticEnvoy(t *testing.T) {
	t.Parallel()
	m, a := start(t, mesh.Options{Backend: lab.NFT, NoEnvoy: true})
	envoy, err := m.StartEnvoy(lab.EnvoyOptions{Bootstrap: []byte(staticEnvoy)})
	must(t, err)
	must(t, a.WaitReady(within(t, 20*time.Second)))
	through(t, m, db4)
	before := chains(t, m)
	must(t, envoy.Restart())
	must(t, a.WaitReady(within(t, 20*time.Second)))
	through(t, m, db4)
	if after := chains(t, m); after != before {
		t.Errorf("the rules changed:\n%s\nbefore\n%s", after, before)
	}
}

// TestEmptyEnvoyWithoutControlPlane: an Envoy that gave up waiting for its control plane is live
// and has no listeners. That counts for nothing, whatever its statistics say or leave out:
// connections are refused, and none goes around it.
func TestEmptyEnvoyWithoutControlPlane(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name    string
		options lab.EnvoyOptions
		restart func(e *lab.Envoy) error
	}{
		{"restarted", lab.EnvoyOptions{}, (*lab.Envoy).Restart},
		// An Envoy of one's own may have a stats_matcher.
		{"without LDS statistics", lab.EnvoyOptions{Args: []string{"--config-yaml",
			"stats_config: {stats_matcher: {exclusion_list: {patterns: [{prefix: listener_manager.lds.}]}}}"}}, (*lab.Envoy).Restart},
		// The new process begins with the counters that moved in the last seconds of the one before.
		{"hot restarted", lab.EnvoyOptions{HotRestart: true}, (*lab.Envoy).HotRestart},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			m, a := start(t, mesh.Options{Config: services(), NoEnvoy: true})
			test.options.ControlPlane, test.options.FetchTimeout = m.CPAddr, time.Second
			var err error
			m.Envoy, err = m.StartEnvoy(test.options)
			must(t, err)
			must(t, a.WaitReady(within(t, 20*time.Second)))
			_, err = m.CP.Set(services(service(1)))
			must(t, err)
			eventually(t, 5*time.Second, "the new service in the rules", func() (bool, string) {
				out := chains(t, m)
				return strings.Contains(out, "-d "+service(1).Prefixes[0].String()), out
			})
			before := chains(t, m)
			m.CP.Pause()
			must(t, test.restart(m.Envoy))
			eventually(t, 20*time.Second, "a live Envoy without listeners", func() (bool, string) {
				state, err := m.Envoy.Admin(t.Context(), "/ready")
				listeners, err2 := m.Envoy.Admin(t.Context(), "/listeners")
				return err == nil && err2 == nil && strings.TrimSpace(state) == "LIVE" && listeners == "",
					fmt.Sprint(state, listeners, err, err2)
			})
			s, err := a.Status(t.Context())
			must(t, err)
			// The connection to an Envoy that was hot restarted may be 30 s old before the agent dials anew.
			_, err = a.Wait(within(t, 50*time.Second), "more passes", func(n status.Status) bool {
				return n.Passes > s.Passes+4 && !n.Envoy.Configured
			})
			must(t, err)
			if after := chains(t, m); after != before {
				t.Errorf("the rules changed:\n%s\nbefore\n%s", after, before)
			}
			m.CP.Continue()
			must(t, a.WaitReady(within(t, 60*time.Second)))
			through(t, m, web4)
			_, err = m.CP.Set(controlplane.Config{}) // an empty set that the control plane did send
			must(t, err)
			if !strings.Contains(test.name, "without") {
				eventually(t, 20*time.Second, "rules gone with the services", func() (bool, string) {
					out := chains(t, m)
					return strings.TrimSpace(out) == "", out
				})
			}
		})
	}
}

// TestRestoredAfterStart: what restores rules at boot may come after the agent's start. They wait
// for Envoy all the same.
func TestRestoredAfterStart(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, backend lab.Backend) {
		m, a := start(t, mesh.Options{Backend: backend, Config: services(), NoRuntime: true})
		must(t, a.WaitReady(within(t, 20*time.Second)))
		through(t, m, web4)
		saved := map[string]string{}
		for _, program := range []string{"iptables", "ip6tables"} {
			text, err := m.VM.Run(t.Context(), program+"-save", "-t", "nat")
			must(t, err)
			saved[program] = text
		}
		a.Kill()
		m.Envoy.Kill()
		for program := range saved {
			_, err := m.VM.Run(t.Context(), "sh", "-c", program+" -w -t nat -F && "+program+" -w -t nat -X")
			must(t, err)
		}
		must(t, a.Reboot())
		must(t, a.Start())
		_, err := a.Wait(within(t, 10*time.Second), "some passes", func(s status.Status) bool {
			return s.Passes > 3
		})
		must(t, err)
		for program, text := range saved {
			_, err := m.VM.RunInput(t.Context(), text, program+"-restore")
			must(t, err)
		}
		escapes(t, m, web4)
		escapes(t, m, web6)
		must(t, m.Envoy.Start())
		must(t, a.WaitReady(within(t, 20*time.Second)))
		through(t, m, web4)
		through(t, m, web6)
	})
}
