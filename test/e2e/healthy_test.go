//go:build lab

package e2e

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
	"github.com/service-proxy-agent/service-proxy-agent/test/platform"
	"github.com/service-proxy-agent/service-proxy-agent/test/schema"
)

// TestDoctorHealthy: on a VM on which nothing is wrong doctor finds nothing, whatever goes on
// there. As another user than root it does not know everything, and says so.
func TestDoctorHealthy(t *testing.T) {
	t.Parallel()
	random := seeded(t)
	m, err := mesh.New(within(t, 30*time.Second), mesh.Options{Config: services(), NoEnvoy: true})
	must(t, err)
	m.Envoy, err = m.StartEnvoy(lab.EnvoyOptions{ControlPlane: m.CPAddr, HotRestart: true})
	must(t, err)
	must(t, m.Envoy.WaitReady(within(t, 20*time.Second)))
	p := attend(t, &patient{Mesh: m, a: m.NewAgent()})
	tellsStatus(t, p.a)
	for _, state := range []struct {
		name   string
		goesOn func(t *testing.T) // until the end of the test
	}{
		{"idle", func(*testing.T) {}},
		{"load", func(t *testing.T) {
			steady := m.Steady(lab.SteadyOptions{From: m.VM, UID: 1000, PerSecond: 100, HTTP: true,
				To: []netip.AddrPort{web4, web6}})
			t.Cleanup(func() {
				if c := steady.Stop(); c.Bad() != 0 {
					t.Errorf("beside doctor: %v", c)
				}
			})
		}},
		{"changes", func(t *testing.T) {
			again(t, 300*time.Millisecond, func() {
				p.extras++
				_, err := m.CP.Set(services(both(p.extras)))
				if err != nil {
					t.Error(err)
				}
			})
		}},
		{"slow actors", func(t *testing.T) { slowActors(t, p, random) }},
		{"hot restart", func(t *testing.T) { must(t, m.Envoy.HotRestart()) }},
	} {
		t.Run(state.name, func(t *testing.T) {
			state.goesOn(t)
			for range soak(100, 3) {
				isHealthy(t, diagnose(t, p.a, 0), 0)
			}
			for range soak(100, 2) {
				d := diagnose(t, p.a, 1000)
				isHealthy(t, d, 2)
				if len(d.troubles(symptom.Unknown, symptom.Error)) == 0 {
					t.Errorf("another user than root knows everything:\n%s", d.text)
				}
			}
		})
	}
}

// tellsStatus checks what `status` says of a healthy VM: the JSON is in the form that its schema
// describes, and the text begins with the verdict.
func tellsStatus(t *testing.T, a *mesh.Agent) {
	t.Helper()
	s, err := a.Wait(within(t, 30*time.Second), "ready, with its stream and its cost",
		func(s status.Status) bool {
			return s.Ready && s.ControlPlane.Connected && s.Cost.Resident > 0
		})
	must(t, err)
	if len(s.Channels) != 3 || len(s.Families) != 2 || s.ControlPlane.Since.IsZero() {
		t.Errorf("%+v", s)
	}
	body, _, code, err := a.Run(within(t, 10*time.Second), "status", "-o", "json")
	must(t, err)
	schema.Valid(t, "status", []byte(body))
	text, _, textCode, err := a.Run(within(t, 10*time.Second), "status")
	must(t, err)
	want := fmt.Sprintf("Healthy: intercepting %d services", len(s.Services))
	if code != 0 || textCode != 0 || !strings.HasPrefix(text, want) {
		t.Errorf("exit codes %d and %d, want 0 and a text that begins with %q:\n%s", code, textCode, want, text)
	}
	t.Log(text)
}

// isHealthy checks that nothing was found that would make somebody act.
func isHealthy(t *testing.T, d diagnosis, code int) {
	t.Helper()
	if found := d.troubles(symptom.Found, symptom.Warning); len(found) > 0 || d.code != code {
		t.Errorf("exit code %d, want %d, found %q, unknown %q:\n%s", d.code, code, found,
			d.troubles(symptom.Unknown, symptom.Error), d.text)
	}
	if slices.ContainsFunc(d.Findings, func(f symptom.Finding) bool {
		return f.Severity >= symptom.Warning
	}) {
		t.Errorf("findings %+v", d.Findings)
	}
}

// slowActors has Envoy, the control plane and the metadata server stand still for a moment now and
// then, for less than anybody waits.
func slowActors(t *testing.T, p *patient, random *rand.Rand) {
	remove := p.Platform.Inject(platform.Fault{
		Delay: time.Duration(random.IntN(1000)) * time.Millisecond})
	t.Cleanup(remove)
	again(t, 100*time.Millisecond, func() {
		moment := time.Duration(random.IntN(300)) * time.Millisecond
		p.Envoy.Pause()
		p.CP.Pause()
		time.Sleep(moment)
		p.CP.Continue()
		p.Envoy.Continue()
	})
}

// TestDoctorHung: whatever stands still, doctor ends in time. When all does, it knows nothing, and
// says so by its exit code.
func TestDoctorHung(t *testing.T) {
	t.Parallel()
	p := healthyVM(t)
	metadataHangs := func() func() {
		return p.Platform.Inject(platform.Fault{Prefix: "/computeMetadata/", Hang: true})
	}
	envoyHangs := func() func() { p.Envoy.Pause(); return p.Envoy.Continue }
	agentHangs := func() func() { return stopped(t, p.a.PID()) }
	iptablesHangs := func() func() {
		before := p.a.Under
		p.a.Under = []string{"env", "PATH=" + hangingTools(t)}
		return func() { p.a.Under = before }
	}
	all := []func() func(){metadataHangs, envoyHangs, agentHangs, iptablesHangs}
	for _, test := range []struct {
		name  string
		hangs []func() func()
	}{
		{"metadata server", all[:1]}, {"Envoy", all[1:2]}, {"agent", all[2:3]},
		{"iptables", all[3:4]}, {"everything", all},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, hang := range test.hangs {
				defer hang()()
			}
			for range soak(20, 1) {
				d := diagnose(t, p.a, 0) // which holds it to its time
				t.Logf("%v: exit code %d", d.took.Round(time.Millisecond), d.code)
				if len(d.troubles(symptom.Unknown, symptom.Advice)) == 0 {
					t.Errorf("all is known:\n%s", d.text)
				}
				if len(test.hangs) == len(all) && d.code != 2 || d.code == 0 {
					t.Errorf("exit code %d:\n%s", d.code, d.text)
				}
			}
		})
	}
}

// hangingTools is a folder with an iptables and its companions that never end.
func hangingTools(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, family := range []string{"iptables", "ip6tables"} {
		for _, tool := range []string{"", "-save", "-restore"} {
			must(t, writeProgram(dir+"/"+family+tool, "#!/bin/sh\nexec sleep infinity\n"))
		}
	}
	return dir + ":" + systemPath
}
