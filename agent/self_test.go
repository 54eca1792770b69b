package agent

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// TestSelf: what the tasks find out is there at the next pass, and a run that hung is told for some
// minutes.
func TestSelf(t *testing.T) {
	s := self{killed: testStart}
	if is := s.known(testStart.Add(killedFor)); is != (Self{}) {
		t.Errorf("it knows %+v", is)
	}
	s.account.Store(&metadata.Account{Email: "a@b"})
	s.vm.Store(&metadata.VM{Name: "web-1", NetworkProject: "456"})
	s.ahead.Store(int64(time.Minute))
	is := s.known(testStart.Add(killedFor - 1))
	if is.Account.Email != "a@b" || is.VM != (symptom.VM{Name: "web-1", NetworkProject: "456"}) ||
		is.Clock != time.Minute || is.Killed != testStart {
		t.Errorf("it knows %+v", is)
	}
}

func TestAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start, asked := time.Now(), 0
		err := again(t.Context(), func(context.Context) error {
			if asked++; asked < 10 {
				return errors.New("no answer")
			}
			return nil
		})
		// 1, 2, 4 … 32 s and a minute from then on
		if took := time.Since(start); err != nil || asked != 10 || took != 63*time.Second+3*time.Minute {
			t.Errorf("asked %d times in %v, %v", asked, took, err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		asked = 0
		err = again(ctx, func(context.Context) error {
			asked++
			cancel()
			return errors.New("no answer")
		})
		if err != nil || asked != 1 {
			t.Errorf("asked %d times, %v", asked, err)
		}
	})
}

// TestClockTold: a difference of a second does not change what is told.
func TestClockTold(t *testing.T) {
	var c clock
	for i, step := range []struct {
		ahead time.Duration
		known bool
		want  time.Duration
	}{
		{0, true, 0}, {37 * time.Second, true, 37 * time.Second},
		{38 * time.Second, true, 37 * time.Second}, {36 * time.Second, true, 37 * time.Second},
		{0, false, 37 * time.Second}, {39 * time.Second, true, 39 * time.Second},
		{0, false, 39 * time.Second}, {0, false, 0}, {2 * time.Second, true, 2 * time.Second},
		{3 * time.Second, true, 2 * time.Second}, {0, true, 0}, {-time.Hour, true, -time.Hour},
	} {
		if told := c.told(step.ahead, step.known); told != step.want {
			t.Errorf("step %d: %v, want %v", i, told, step.want)
		}
	}
}

// TestKilled: the mark of a run that hung is believed as long as it is new, by any later run, and
// then goes.
func TestKilled(t *testing.T) {
	dir := t.TempDir()
	mark := filepath.Join(dir, systemd.HungFile)
	core, logs := observer.New(zap.WarnLevel)
	take := func(now time.Time) time.Time { return takeKilled(dir, now, zap.New(core)) }
	if at := take(testStart); !at.IsZero() {
		t.Errorf("killed at %v without a mark", at)
	}
	if err := os.WriteFile(mark, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(mark, testStart, testStart); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if at := take(testStart.Add(killedFor - 1)); !at.Equal(testStart) {
			t.Errorf("killed at %v, want %v", at, testStart)
		}
	}
	if at, err := killedAt(dir, testStart.Add(-time.Second)); err != nil || !at.IsZero() {
		t.Errorf("killed at %v, which is to come, %v", at, err)
	}
	if at := take(testStart.Add(killedFor)); !at.IsZero() {
		t.Errorf("killed at %v, which is long ago", at)
	}
	if _, err := os.Lstat(mark); !os.IsNotExist(err) {
		t.Errorf("the old mark is still there: %v", err)
	}
	if logs.Len() != 0 {
		t.Errorf("said %v", logs.All())
	}
	// Something that cannot be taken away is said, and harms nothing.
	if err := os.MkdirAll(filepath.Join(mark, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	if at := take(testStart.Add(100 * 365 * 24 * time.Hour)); !at.IsZero() || logs.Len() != 1 {
		t.Errorf("killed at %v, said %v", at, logs.All())
	}
}
