package reconcile

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// TestWalksBeside: however long walks through conntrack's table take, no pass waits for them, one
// goes on at a time, each prefix that came is looked for, and what was deleted is told once.
func TestWalksBeside(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	for i := range uint64(100) {
		synctest.Test(t, func(t *testing.T) {
			walksBeside(t, rand.New(rand.NewPCG(seed, 2*i)), rand.New(rand.NewPCG(seed, 2*i+1)))
		})
	}
}

func walksBeside(t *testing.T, passes, walking *rand.Rand) {
	var asked []netip.Prefix
	walks, deleted := 0, 0
	gone := errors.New("the kernel does not answer")
	p := newPaths(iptables.IPv4, Flows{
		HalfOpen: func(ctx context.Context, to []netip.Prefix) (int, error) {
			if walks++; walks > 1 {
				t.Error("two walks at once")
			}
			defer func() { walks-- }()
			asked = append(asked, to...)
			switch walking.IntN(4) {
			case 0:
				return 0, gone
			case 1: // it hangs
				<-ctx.Done()
				return 0, ctx.Err()
			}
			time.Sleep(time.Duration(walking.IntN(900)) * time.Millisecond)
			deleted += len(to)
			return len(to), nil
		},
	}, zap.NewNop())
	var services []netip.Prefix
	told := 0
	for i := range 40 {
		began := time.Now()
		// The context of a pass ends with it.
		ctx, cancel := context.WithCancel(t.Context())
		p.pass(ctx, began)
		if passes.IntN(2) == 0 {
			addr := netip.AddrFrom4([4]byte{10, 1, 0, byte(i)})
			services = append(services, netip.PrefixFrom(addr, 32))
			p.changed(ctx, began, redirected{services: slices.Clone(services)})
		}
		told += p.taken().HalfOpen
		cancel()
		if took := time.Since(began); took != 0 {
			t.Fatalf("a pass waited for %v", took)
		}
		time.Sleep(time.Duration(passes.IntN(300)) * time.Millisecond)
	}
	for range 3 { // what goes on, what waits for it, and what came of that
		time.Sleep(conntrackLimit)
		synctest.Wait()
		p.pass(t.Context(), time.Now())
		told += p.taken().HalfOpen
	}
	if !slices.Equal(asked, services) {
		t.Errorf("looked for %v, want %v", asked, services)
	}
	if told != deleted {
		t.Errorf("%d deleted, %d told", deleted, told)
	}
}
