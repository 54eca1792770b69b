package footprint

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

func TestOfProgram(t *testing.T) {
	maps := `00400000-00c6d000 r-xp 00000000 fe:00 9983775    /usr/local/bin/service-proxy-agent
00c6d000-01630000 r--p 0086d000 fe:00 9983775    /usr/local/bin/service-proxy-agent
01630000-016ae000 rw-p 01230000 fe:00 9983775    /usr/local/bin/service-proxy-agent
016ae000-036f7000 rw-p 00000000 00:00 0
34729b400000-34729cc00000 rw-p 00000000 00:00 0  [heap]
7f3000000000-7f3000021000 r-xp 00000000 fe:00 12  /opt/usr/local/bin/service-proxy-agent
7f3000100000-7f3000121000 r-xp 00000000 fe:00 12  /usr/local/bin/service-proxy-agent-2
7f4000000000-7f4000021000 r-xp 00000000 00:00 0   [vdso]
nonsense r-xp 0 0 0 /usr/local/bin/service-proxy-agent
`
	want := []mapping{{0x400000, 0xc6d000}, {0xc6d000, 0x1630000}}
	if got := ofProgram([]byte(maps), "/usr/local/bin/service-proxy-agent"); !slices.Equal(got, want) {
		t.Errorf("%x", got)
	}
	// An upgrade replaces the file under a running program.
	maps = "00400000-00c6d000 r-xp 00000000 fe:00 1  /usr/bin/a program (deleted)\n"
	if got := ofProgram([]byte(maps), "/usr/bin/a program (deleted)"); len(got) != 1 {
		t.Errorf("%x", got)
	}
}

// TestGive: this program still runs after its pages were given back, in the middle of other work.
func TestGive(t *testing.T) {
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		for {
			select {
			case <-stop:
				return
			default:
				_, _ = os.ReadFile("/proc/self/status")
			}
		}
	}()
	for range 20 {
		if err := Give(); err != nil {
			t.Fatal(err)
		}
	}
}

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
		told := 0
		go func() {
			defer close(ended)
			r := Rest{Give: func() error { gave = append(gave, time.Now()); return errors.ErrUnsupported }}
			r.After(ctx, work, func(error) { told++ })
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
		if told != 1 {
			t.Errorf("told of an error %d times", told)
		}
		cancel()
		<-ended
	})
}
