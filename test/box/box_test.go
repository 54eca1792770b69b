//go:build box

package box

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/bootstrap"
)

// install runs gcloud's recipe as OS Config does, and says how long it took.
func (v *VM) install() time.Duration {
	v.t.Helper()
	start := time.Now()
	out, err := v.try("osconfig-recipe")
	if err != nil {
		v.t.Fatalf("the recipe failed: %v\n%s", err, out)
	}
	return time.Since(start)
}

// TestFirstBoot is the whole way: boot, gcloud's recipe, IN PROGRESS, FINISHED, a service from inside, a serving port from outside.
func TestFirstBoot(t *testing.T) {
	v := newVM(t, options{})
	v.boot()
	v.run("systemctl", "enable", "application.service")
	if have := v.guest(guestattr.BootstrapStatus); have != "" {
		t.Errorf("before: bootstrap-status %q", have)
	}
	start := time.Now()
	took := v.install()
	t.Logf("the recipe took %v", took)
	seen := false
	v.eventually(90*time.Second, "bootstrap-status FINISHED", func() error {
		switch status := v.guest(guestattr.BootstrapStatus); status {
		case bootstrap.InProgress:
			seen = true
			return fmt.Errorf("still %q", status)
		case bootstrap.Finished:
			return nil
		default:
			return fmt.Errorf("it is %q: %s", status, v.guest(guestattr.BootstrapLastFailure))
		}
	})
	t.Logf("FINISHED %v after the recipe started", time.Since(start))
	if !seen {
		t.Error("IN PROGRESS was never seen from outside")
	}
	v.eventually(20*time.Second, "the service answers through Envoy", v.checkVIP)
	for _, line := range strings.Split(v.Serial(), "\n") {
		t.Log("serial: ", line)
	}
}
