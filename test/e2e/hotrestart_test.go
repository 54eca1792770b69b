//go:build lab

package e2e

import (
	"strings"
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
