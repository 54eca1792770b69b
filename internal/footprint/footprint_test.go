package footprint

import (
	"context"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"
)

// TestAfter: it is given back after each piece of work, never while there is some, never without,
// and not more often than each 30 seconds, whenever the work comes.
func TestAfter(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	random := rand.New(rand.NewPCG(seed, 0))
	t.Logf("seed %d", seed)
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var gave []time.Time
		work, ended := make(chan struct{}, 1), make(chan struct{})
		go func() {
			defer close(ended)
			After(ctx, work, func() { gave = append(gave, time.Now()) })
		}()
		time.Sleep(time.Hour)
		synctest.Wait()
		if len(gave) > 0 {
			t.Fatalf("gave back without work: %v", gave)
		}
		for range 1_000 {
			var last time.Time // of the work of this round
			for range 1 + random.IntN(20) {
				time.Sleep(time.Duration(random.IntN(2_900)) * time.Millisecond)
				select {
				case work <- struct{}{}:
				default:
				}
				last = time.Now()
			}
			time.Sleep(pause + calm)
			synctest.Wait()
			if n := len(gave); n == 0 || gave[n-1].Before(last) {
				t.Fatalf("nothing given back since %v", last)
			}
		}
		for i := 1; i < len(gave); i++ {
			if gave[i].Sub(gave[i-1]) < pause {
				t.Errorf("gave back at %v and %v", gave[i-1], gave[i])
			}
		}
		cancel()
		<-ended
	})
}
