package iptables

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

func TestHolderIn(t *testing.T) {
	const locks = `1: POSIX  ADVISORY  WRITE 18503 00:1a:2642 0 EOF
2: FLOCK  ADVISORY  WRITE 18629 00:1a:2642 0 EOF
2: -> FLOCK  ADVISORY  WRITE 18700 00:1a:2642 0 EOF
3: FLOCK  ADVISORY  WRITE 7 fe:00:2642 0 EOF
4: FLOCK
`
	for _, tt := range []struct {
		file string
		want int
	}{
		{"00:1a:2642", 18629}, {"fe:00:2642", 7}, {"fe:00:264", 0}, {"", 0},
	} {
		if have := holderIn([]byte(locks), tt.file); have != tt.want {
			t.Errorf("%q: %d, want %d", tt.file, have, tt.want)
		}
	}
	if have := holderIn(nil, "00:1a:2642"); have != 0 {
		t.Errorf("no locks: %d", have)
	}
}

// TestWaiting: the time that another program held the lock counts, the time that ours held it does
// not.
func TestWaiting(t *testing.T) {
	const ours, others = 10, 20
	for _, tt := range []struct {
		name        string
		held        func(since time.Duration) int
		least, most time.Duration
	}{
		{"free", func(time.Duration) int { return 0 }, 0, 0},
		{"ours", func(time.Duration) int { return ours }, 0, 0},
		{"another's first", func(since time.Duration) int {
			if since < 300*time.Millisecond {
				return others
			}
			return ours
		}, 290 * time.Millisecond, 300 * time.Millisecond},
		// iptables before 1.8.8 sleeps for a second between its tries.
		{"another's twice", func(since time.Duration) int {
			if since < 100*time.Millisecond || since > 200*time.Millisecond && since < 400*time.Millisecond {
				return others
			}
			return 0
		}, 390 * time.Millisecond, 400 * time.Millisecond},
		{"another's all the time", func(time.Duration) int { return others },
			490 * time.Millisecond, 500 * time.Millisecond},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var own ownPIDs
				own.start(ours)
				began, broken := time.Now(), errors.New("broken")
				waited, err := waiting(func() int { return tt.held(time.Since(began)) }, &own, func() error {
					time.Sleep(500 * time.Millisecond)
					return broken
				})
				if waited < tt.least || waited > tt.most || !errors.Is(err, broken) {
					t.Errorf("%v, %v; want %v to %v", waited, err, tt.least, tt.most)
				}
			})
		})
	}
}
