//go:build lab

package lab_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/platform"
)

// TestMetadataServer has "vm" and "client" reach the emulator at the metadata server's own
// addresses, in two labs side by side.
func TestMetadataServer(t *testing.T) {
	for _, name := range []string{"first", "second"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := lab.T(t, lab.Options{})
			e := platform.New(platform.VM{Name: name})
			t.Cleanup(func() { must(t, e.Close()) })
			for _, addr := range []netip.Addr{lab.MetadataAddr, lab.MetadataAddr6} {
				ln, err := l.Listen(l.Service, netip.AddrPortFrom(addr, 80))
				must(t, err)
				e.Serve(ln, nil)
			}
			for _, ns := range []*lab.Namespace{l.VM, l.Client} {
				for _, host := range []string{"169.254.169.254", "[fd20:ce::254]"} {
					out, err := ns.Run(t.Context(), "curl", "-sSf", "-H", "Metadata-Flavor: Google",
						"http://"+host+"/computeMetadata/v1/instance/name")
					if err != nil || out != name {
						t.Errorf("%s in %s: %q, %v", host, ns.Name, out, err)
					}
				}
			}
		})
	}
}

// TestTenThousandServices shows that the control plane and Envoy carry the scale that later tests
// and benchmarks stand on.
func TestTenThousandServices(t *testing.T) {
	l := lab.T(t, lab.Options{})
	ctx := within(t, 5*time.Minute)
	cp, addr := startControlPlane(t, l, nil)
	var c controlplane.Config
	for i := range 10_000 {
		c.Services = append(c.Services, controlplane.Service{
			Name: fmt.Sprintf("s%d", i), Prefixes: []netip.Prefix{
				netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 20, byte(i >> 8), byte(i)}), 32)}, Port: 80,
			Cluster: "shared",
		})
	}
	began := time.Now()
	_, err := cp.Set(c)
	must(t, err)
	t.Logf("10,000 TCP services compiled in %s", time.Since(began).Round(time.Millisecond))
	began = time.Now()
	envoy, err := l.StartEnvoy(lab.EnvoyOptions{ControlPlane: addr})
	must(t, err)
	must(t, envoy.WaitReady(ctx))
	t.Logf("Envoy ready after %s", time.Since(began).Round(time.Millisecond))
	c.Services = append(c.Services, controlplane.Service{
		Name: "one more", Prefixes: controlplane.VIPs("10.30.0.1"), Port: 80, Cluster: "shared"})
	push, err := cp.Set(c)
	must(t, err)
	must(t, cp.WaitAccepted(ctx, push))
	t.Logf("one more accepted after %s", time.Since(push.At).Round(time.Millisecond))
	// By a program that is as patient as ctx: with other tests beside it Envoy has taken 10 s.
	dump, err := l.VM.Run(ctx, "curl", "-sSf",
		"http://"+lab.AdminAddr.String()+"/config_dump?resource=dynamic_listeners")
	must(t, err)
	if n := strings.Count(dump, `"prefix_ranges"`); n < 10_001 {
		t.Errorf("%d chains in the dump", n)
	}
}
