package envoyadmin

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

// TestDetectorReadyIsSlow: where each question waits for its answer, as of an Envoy that has little
// of a processor, whether it is ready takes more than the share by itself. Changes are seen all the
// same, hinted at or not.
func TestDetectorReadyIsSlow(t *testing.T) {
	for _, share := range []float64{0.01, 0.10, 0.50} {
		for _, hinted := range []bool{true, false} {
			t.Run(fmt.Sprint(share, hinted), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					d := &Detector{Share: share}
					slow := time.Duration(1.3 * share * float64(time.Second))
					w := &world{t: t, share: share, look: slow, dump: slow,
						state: Fingerprint{Process: 1}}
					second := func() {
						w.drive(d, time.Second, nil)
						asked := time.Now()
						time.Sleep(slow)
						d.Took(ReadyQuestion, asked, time.Now(), nil)
					}
					for range 30 * 60 { // what was saved is used up
						second()
					}
					for range 20 {
						w.longestAfter = 0
						w.change()
						if hinted {
							d.Hint(time.Now(), "")
						}
						for i := 0; w.longestAfter == 0; i++ {
							if second(); i > 300 {
								t.Fatalf("not seen after 5 minutes; %+v", d.Bucket(time.Now()))
							}
						}
					}
				})
			})
		}
	}
}

// TestDetectorOneSlowDump: one dump that waited for its answer, of an Envoy that was stopped or
// took a large update just then, is no reason to see the next changes minutes later.
func TestDetectorOneSlowDump(t *testing.T) {
	for _, stall := range []time.Duration{3 * time.Second, 10 * time.Second, 19 * time.Second} {
		t.Run(stall.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := &world{t: t, look: time.Millisecond, dump: 6 * time.Millisecond,
					state: Fingerprint{Process: 1}}
				d := new(Detector)
				w.drive(d, 10*time.Minute, nil)
				w.change()
				w.drive(d, time.Second, nil)
				w.change()
				w.dump = stall
				w.drive(d, 2*time.Second, nil)
				w.dump = 6 * time.Millisecond
				w.drive(d, 10*time.Second, nil)
				w.longestAfter = 0
				w.change()
				w.drive(d, 10*time.Minute, nil)
				t.Logf("seen after %v", w.longestAfter)
				if w.longestAfter == 0 || w.longestAfter > 10*time.Second {
					t.Errorf("after a stall of %v, seen %v late", stall, w.longestAfter)
				}
			})
		})
	}
}
