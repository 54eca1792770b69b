//go:build lab

package curve

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// TestNaive: what the agent is held against does the job. After changes, with Envoy or the control
// plane stopped for a while at random moments, its rules are the services, and an Envoy that hangs
// or is gone takes none away.
func TestNaive(t *testing.T) {
	t.Parallel()
	for _, backend := range lab.Backends {
		t.Run(string(backend), func(t *testing.T) {
			t.Parallel()
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			random := rand.New(rand.NewPCG(seed, 0))
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			var services []controlplane.Service
			change := func() controlplane.Config {
				services = services[:0]
				for i := range 20 {
					if random.IntN(2) == 0 {
						services = append(services, service("s", 20, i))
					}
				}
				services = append(services, service("always", 40, 0))
				return controlplane.Config{Services: services}
			}
			m, err := mesh.New(ctx, mesh.Options{Backend: backend, Config: change()})
			must(t, err)
			defer func() { must(t, m.Close()) }()
			loop := startNaive(t, m)
			rules := func() string {
				out, err := m.VM.Run(ctx, "iptables", "-w", "-t", "nat", "-S", "NAIVE")
				if err != nil {
					return err.Error() // not begun yet
				}
				return out
			}
			complete := func() error {
				have := rules()
				for _, s := range services {
					if !strings.Contains(have, "-d "+s.Prefixes[0].String()+" ") {
						return fmt.Errorf("%v is not in\n%s", s.Prefixes[0], have)
					}
				}
				if n := strings.Count(have, "-A "); n != len(services) {
					return fmt.Errorf("%d rules for %d services:\n%s", n, len(services), have)
				}
				return nil
			}
			settle(t, complete)
			rounds := 2
			if os.Getenv("SOAK") != "" {
				rounds = 30
			}
			for range rounds {
				wait := time.Duration(random.IntN(600)) * time.Millisecond
				stop, goOn := m.Envoy.Pause, m.Envoy.Continue
				if random.IntN(2) == 0 {
					stop, goOn = m.CP.Pause, m.CP.Continue
				}
				_, err := m.CP.Set(change())
				must(t, err)
				time.Sleep(wait / 2)
				stop()
				time.Sleep(wait)
				goOn()
				settle(t, complete)
			}
			m.Envoy.Kill()
			time.Sleep(1500 * time.Millisecond)
			must(t, complete())
			endNaive(t, loop)
		})
	}
}

// settle waits until there is nothing to object to.
func settle(t testing.TB, objection func() error) {
	t.Helper()
	var err error
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if err = objection(); err == nil {
			return
		}
	}
	t.Fatal(err)
}

// startNaive starts the loop in "vm".
func startNaive(t testing.TB, m *mesh.Mesh) *exec.Cmd {
	t.Helper()
	script, err := filepath.Abs("../bench/naive.sh")
	must(t, err)
	loop := m.VM.Command(context.Background(), "sh", script, strconv.Itoa(lab.EnvoyUID))
	loop.Stderr = os.Stderr
	must(t, lab.Start(loop))
	t.Cleanup(func() { loop.Process.Kill() }) // where endNaive was not reached
	return loop
}

// endNaive ends the loop, which takes its files away, its rules not.
func endNaive(t testing.TB, loop *exec.Cmd) {
	t.Helper()
	must(t, loop.Process.Signal(syscall.SIGTERM))
	if err := loop.Wait(); err != nil {
		t.Error(err)
	}
}
