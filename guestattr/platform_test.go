package guestattr_test

import (
	"context"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/test/platform"
)

// TestPlatform writes over real connections to the emulated metadata server, which checks form
// and budget by itself.
func TestPlatform(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	vm := platform.New(platform.VM{})
	vm.Serve(ln, nil)
	t.Cleanup(func() {
		if err := vm.Close(); err != nil {
			t.Error(err)
		}
	})
	t.Setenv("GCE_METADATA_HOST", ln.Addr().String())

	w := guestattr.New(guestattr.Options{})
	ctx, stop := context.WithTimeout(t.Context(), 10*time.Second)
	defer stop()
	ended := make(chan error, 1)
	go func() { ended <- w.Run(ctx) }()
	want := map[string]string{
		guestattr.BootstrapStatus: "FINISHED",
		guestattr.ProxyVersion:    "abc/1.40.0/Clean/RELEASE/BoringSSL",
		guestattr.AgentHeartbeat:  "2026-11-21T11:30:00Z",
	}
	for k, v := range want {
		w.Set(k, v)
	}
	if err := w.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, vm.GuestAttributes(guestattr.Namespace)); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
	if b := vm.Budget(); !b.Kept() || b.Queries != len(want) {
		t.Errorf("%+v; want %d queries within the budget", b, len(want))
	}

	// Switched off, the channel says so in the server's words. A minute later, as it were: this
	// Writer's bucket is full.
	vm.ResetBudget()
	vm.Update(func(v *platform.VM) { v.GuestAttributesDisabled = true })
	w2 := guestattr.New(guestattr.Options{})
	go w2.Run(ctx)
	w2.Set(guestattr.ProxyVersion, "1.41.0")
	if err := w2.Flush(ctx); err == nil ||
		!strings.Contains(err.Error(), "403 Guest attributes endpoint access is disabled.") {
		t.Errorf("Flush while disabled: %v", err)
	}
	if w2.State().Enabled {
		t.Error("State says enabled")
	}
	stop()
	if err := <-ended; err != nil {
		t.Errorf("Run: %v", err)
	}
}
