//go:build lab

package e2e

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/bundle"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// TestBundleScale: with 10,000 services, each with a cluster of its own, a bundle is whole, small
// and soon there, and its cost to Envoy's main thread is told. Here with a few hundred, but in
// `make soak`.
func TestBundleScale(t *testing.T) {
	beside(t)
	config := controlplane.Config{}
	n := soak(10_000, 300)
	for i := range n {
		s := service(i)
		s.HTTP = true
		config.Services = append(config.Services, s)
	}
	m, err := mesh.New(within(t, 5*time.Minute), mesh.Options{Backend: lab.NFT, Config: config})
	must(t, err)
	t.Cleanup(func() { _ = m.Close() })
	a := m.NewAgent()
	must(t, a.Start())
	must(t, a.WaitReady(within(t, 5*time.Minute)))
	thread := mainThread(m.Envoy.PID())
	path := filepath.Join(t.TempDir(), "b.tgz")
	busy, began := cpu(t, thread), time.Now()
	binary, err := mesh.Binary()
	must(t, err)
	cmd, out := alongside(t, m, a, 0, binary, "bundle", "-f", path)
	err = cmd.Wait()
	took, cost := time.Since(began), cpu(t, thread)-busy
	if err != nil || took > 33*time.Second {
		t.Fatalf("%v after %v: %s", err, took, out)
	}
	info, err := os.Stat(path)
	must(t, err)
	used, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage)
	if !ok {
		t.Fatal("no usage")
	}
	t.Logf("%d services: %d bytes in %v, %v of Envoy's main thread, %v of its own, %d MB of memory", n,
		info.Size(), took, cost, cmd.ProcessState.UserTime(), used.Maxrss>>10)
	if info.Size() > 20e6 {
		t.Errorf("%d bytes", info.Size())
	}
	files, manifest := unpacked(t, path)
	for _, f := range manifest.Files {
		if f.Cut != "" && (f.Name == "envoy/config_dump.json" || f.Name == bundle.LookFile) {
			t.Errorf("%s is cut: %s", f.Name, f.Cut)
		}
		if f.Bytes > 1e6 {
			t.Logf("%s: %d bytes", f.Name, f.Bytes)
		}
	}
	for _, name := range []string{"envoy/config_dump.json", "envoy/clusters.txt", "status.json", bundle.LookFile} {
		if _, there := files[name]; !there {
			t.Errorf("%s is missing: %v", name, named(manifest)[name])
		}
	}
}
