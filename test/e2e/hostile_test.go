//go:build lab

package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/hostile"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// TestHostileControlPlane: whatever a control plane sends, the agent lives, no rule redirects what
// the design forbids, and what is told of it is a line that can be printed. The VM's connections to
// SSH and the metadata server stay direct. A sane configuration is in the rules five seconds after
// Envoy has it.
func TestHostileControlPlane(t *testing.T) {
	beside(t)
	for _, backend := range lab.Backends[:soak(len(lab.Backends), 1)] {
		t.Run(string(backend), func(t *testing.T) {
			random := seeded(t)
			v := newVictim(t, backend)
			kinds := controlplane.HostileKinds()
			random.Shuffle(len(kinds), func(i, j int) { kinds[i], kinds[j] = kinds[j], kinds[i] })
			for _, kind := range kinds {
				for range soak(3, 1) {
					if !t.Run(kind, func(t *testing.T) { v.under(t, kind, random) }) {
						break
					}
				}
			}
		})
	}
}

// victim is a VM whose control plane is hostile.
type victim struct {
	*mesh.Mesh
	a   *mesh.Agent
	pid int
	own []netip.Addr
}

func newVictim(t *testing.T, backend lab.Backend) *victim {
	m, a := start(t, mesh.Options{Backend: backend, Config: services()}, "--cloud-logging", "on")
	must(t, a.WaitReady(within(t, 20*time.Second)))
	for _, in := range []*lab.Namespace{m.VM, m.Service} {
		_, err := m.Echo(in, 22, lab.EchoOptions{})
		must(t, err)
	}
	through(t, m, web4)
	return &victim{m, a, a.PID(), []netip.Addr{lab.VMAddr, lab.VMAddr6}}
}

func (v *victim) under(t *testing.T, kind string, random *rand.Rand) {
	sane := services(service(random.IntN(10_000)))
	config := controlplane.Hostile(kind, random, controlplane.HostileOptions{Sane: sane, Own: v.own,
		Entries: soak(100_000, 3000), LongName: soak(1<<20, 1<<18)})
	before := v.CP.Refusals()
	push, err := v.CP.Set(config)
	must(t, err)
	// Until Envoy has taken it or not.
	eventually(t, 60*time.Second, "Envoy's answer", func() (bool, string) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		return v.CP.Refusals() > before || v.CP.WaitAccepted(ctx, push) == nil, ""
	})
	refused := v.CP.Refusals() - before
	for end := time.Now().Add(time.Duration(soak(20, 2)) * time.Second); time.Now().Before(end); {
		v.holds(t, kind)
		if t.Failed() {
			break
		}
		time.Sleep(300 * time.Millisecond)
	}
	v.shows(t)

	sane = services(service(20_000 + random.IntN(10_000))) // what nobody has been told of before
	push, err = v.CP.Set(sane)
	must(t, err)
	must(t, v.CP.WaitAccepted(within(t, 60*time.Second), push))
	// What Envoy still has to do it does on the thread that answers: once that is quick, it is over.
	began := time.Now()
	eventually(t, 60*time.Second, "Envoy has time", func() (bool, string) {
		asked := time.Now()
		resp, err := v.VM.HTTP().Get("http://" + lab.AdminAddr.String() + "/listeners")
		if err != nil {
			return false, err.Error()
		}
		resp.Body.Close()
		return time.Since(asked) < 100*time.Millisecond, "slow"
	})
	chewed := time.Since(began)
	began = time.Now()
	// Not by `status`, which is megabytes while 100,000 services are going.
	fresh := "-d " + sane.Services[len(sane.Services)-1].Prefixes[0].String() + " "
	limit := 5 * time.Second
	if kind == "many prefixes" && soak(1, 0) == 1 {
		// Ten times the services that the design is for: iptables-nft takes seconds to read one chain
		// of such a table, and all of it has to go.
		limit = time.Minute
	}
	eventually(t, limit, "the sane one", func() (bool, string) {
		code, body, err := v.a.Get("/healthz/ready")
		if err != nil || code != http.StatusOK {
			return false, fmt.Sprint(body, err)
		}
		out, err := v.Chains(t.Context(), "IPv4")
		return err == nil && strings.Contains(out, fresh), fmt.Sprintf("%.2000s %v", out, err)
	})
	took := time.Since(began)
	// The rules come before the words about them.
	s, err := v.a.Wait(within(t, limit), "the words", func(s status.Status) bool {
		return s.Mode == "intercepting" && len(s.Services) == len(sane.Services)
	})
	must(t, err)
	through(t, v.Mesh, web4)
	through(t, v.Mesh, web6)
	v.holds(t, "")
	t.Logf("Envoy refused %d; sane again %v after Envoy, which had worked %v; %d services",
		refused, took.Round(time.Millisecond), chewed.Round(time.Millisecond), len(s.Services))
}

// holds is what must hold at any time.
func (v *victim) holds(t *testing.T, kind string) {
	t.Helper()
	if pid := v.a.PID(); pid != v.pid {
		t.Errorf("the agent is another process")
	}
	for _, program := range []string{"iptables-save", "ip6tables-save"} {
		save, err := v.VM.Run(within(t, 20*time.Second), program, "-t", "nat")
		must(t, err)
		wrong(t, hostile.Rows(save, v.own))
	}
	wrong(t, hostile.Told(v.Mesh, v.a))
	metadataAnswers(t, v.Mesh)
	// SSH: out, to another VM; in, from a client; and to oneself.
	out, in := netip.AddrPortFrom(other4.Addr(), 22), netip.AddrPortFrom(lab.VMAddr, 22)
	for _, c := range []struct {
		from *lab.Namespace
		to   netip.AddrPort
	}{
		{v.VM, out}, {v.Client, in}, {v.VM, in}, {v.VM, netip.MustParseAddrPort("127.0.0.1:22")},
		{v.Client, netip.AddrPortFrom(lab.VMAddr6, 22)},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		r, err := lab.Probe(ctx, c.from, 1000, c.to)
		cancel()
		if err != nil || !r.Escaped {
			t.Errorf("%s: SSH to %v from %s: %+v %v", kind, c.to, c.from.Name, r, err)
		}
	}
}

// shows is what people see who look.
func (v *victim) shows(t *testing.T) {
	t.Helper()
	ctx := within(t, 60*time.Second)
	for _, command := range [][]string{{"status"}, {"doctor"}, {"diff"}, {"explain", web4.String()},
		{"explain", "10.100.0.9:80"}} {
		wrong(t, hostile.Shown(ctx, v.a, command...))
	}
}

// wrong fails with the first of what is wrong.
func wrong(t *testing.T, bad []string) {
	t.Helper()
	if len(bad) > 0 {
		slices.Sort(bad)
		bad = slices.Compact(bad)
		t.Errorf("%d:\n%s", len(bad), strings.Join(bad[:min(len(bad), 5)], "\n"))
	}
}

// TestForgedLogLine: Envoy's log has the names of listeners as they are, line breaks too. A control
// plane that calls one so writes a line of its own there, as of a stream that ended. It could end
// its stream with these words as well. But the stream lives, and that is found out.
func TestForgedLogLine(t *testing.T) {
	beside(t)
	m, a := start(t, mesh.Options{Backend: lab.NFT, Config: services()})
	must(t, a.WaitReady(within(t, 20*time.Second)))
	forged := services()
	l := controlplane.RefusedListener("x'\n"+time.Now().UTC().Format("[2006-01-02 15:04:05.000]")+
		"[1][warning][config] [source/x.cc:1] StreamAggregatedResources gRPC config stream to "+
		"10.131.0.1:443 closed: 7, Permission denied FORGED", 16001, "/root/denied")
	forged.Listeners = append(forged.Listeners, l)
	_, err := m.CP.Set(forged)
	must(t, err)
	must(t, m.CP.WaitRejected(within(t, 20*time.Second), 1))
	_, err = m.CP.Set(services())
	must(t, err)
	began := time.Now()
	_, err = a.Wait(within(t, 2*time.Minute), "the truth", func(s status.Status) bool {
		return time.Since(began) > 2*time.Second && s.Healthy() && s.Ready
	})
	must(t, err)
	t.Logf("healthy after %v", time.Since(began))
	through(t, m, web4)
}
