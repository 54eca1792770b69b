package agent

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/internal/identity"
	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// Self is what is known of the VM and of this program's runs on it, beside what a pass is about.
type Self struct {
	Account *metadata.Account // nil: not known yet
	VM      symptom.VM
	Clock   time.Duration // this VM's is ahead of the metadata server's; 0: right, or not known
	// ClockTold: the metadata server has told this run the time.
	ClockTold bool
	Killed    time.Time // when systemd's watchdog ended a run that hung; zero: not lately
	// AdminOfRoot: root holds the admin interface, whose answers count.
	AdminOfRoot bool
	// Owner is this VM, by whom what is kept is marked; Discarded what was found of another,
	// nil: nothing.
	Owner     identity.Owner
	Discarded *identity.Discarded
	Brake     brake
	// ClosedAgent is Google's own agent; nil: not seen.
	ClosedAgent *symptom.ClosedAgent
	Held        bool // whose the state is is not known, so that it is left alone
}

// self is Self as tasks find it out.
type self struct {
	account atomic.Pointer[metadata.Account]
	vm      atomic.Pointer[metadata.VM]
	ahead   atomic.Int64 // nanoseconds
	told    atomic.Bool  // ahead is of an answer, not of none so far
	killed  time.Time
	closed  atomic.Pointer[symptom.ClosedAgent]
	// of the last connection
	adminOfRoot atomic.Bool
}

func (s *self) known(now time.Time) Self {
	told := s.told.Load() // first: the answer is there then
	is := Self{Account: s.account.Load(), Clock: time.Duration(s.ahead.Load()), ClockTold: told,
		AdminOfRoot: s.adminOfRoot.Load(), ClosedAgent: s.closed.Load()}
	if vm := s.vm.Load(); vm != nil {
		is.VM = symptom.VM(*vm)
	}
	if now.Sub(s.killed) < killedFor {
		is.Killed = s.killed
	}
	return is
}

// again calls ask until it succeeds.
func again(ctx context.Context, ask func(context.Context) error) error {
	for wait := time.Second; ctx.Err() == nil && ask(ctx) != nil; wait = min(2*wait, time.Minute) {
		if !sleep(ctx, wait) {
			break
		}
	}
	return nil
}

// readAccount asks once for the VM's service account, whose name belongs into the control plane's
// refusals.
func (a *Agent) readAccount(ctx context.Context) error {
	return again(ctx, func(ctx context.Context) error {
		account, err := metadata.ReadAccount(ctx)
		if err == nil {
			a.self.account.Store(&account)
		}
		return err
	})
}

// readVM asks once who the VM is: its names belong into the commands that findings advise.
func (a *Agent) readVM(ctx context.Context) error {
	return again(ctx, func(ctx context.Context) error {
		vm, err := metadata.ReadVM(ctx)
		if err == nil {
			a.self.vm.Store(&vm)
		}
		return err
	})
}

// clockEvery is how often the metadata server is asked for the time. It is on the host: that costs
// nothing.
const clockEvery = 30 * time.Second

// watchClock holds this VM's clock against the metadata server's.
func (a *Agent) watchClock(ctx context.Context) error {
	var clock clock
	for {
		ahead, err := metadata.Clock(ctx)
		a.self.ahead.Store(int64(clock.told(ahead, err == nil)))
		if err == nil {
			a.self.told.Store(true)
		}
		if !sleep(ctx, clockEvery) {
			return nil
		}
	}
}

// clock is how far this VM's is ahead, as it is told.
type clock struct {
	ahead  time.Duration
	silent int // questions in a row that told nothing
}

// told takes an answer. A difference of a second between two is none of the clock's: what is told
// stays the same, so that a warning's text does. One question without an answer is no news.
func (c *clock) told(ahead time.Duration, known bool) time.Duration {
	if !known {
		if c.silent++; c.silent > 1 {
			c.ahead = 0
		}
		return c.ahead
	}
	c.silent = 0
	if ahead == 0 || (ahead-c.ahead).Abs() > time.Second {
		c.ahead = ahead
	}
	return c.ahead
}

// killedFor is for how long it is told that systemd's watchdog has ended a run.
const killedFor = 10 * time.Minute

// killedAt is when systemd's watchdog last ended a run that hung, zero where that is long ago: the
// agent's unit marks it by a file, whose time is all that counts.
func killedAt(dir string, now time.Time) (time.Time, error) {
	info, err := os.Lstat(filepath.Join(dir, systemd.HungFile))
	if errors.Is(err, fs.ErrNotExist) {
		return time.Time{}, nil
	}
	if err != nil {
		return time.Time{}, err
	}
	if at := info.ModTime(); now.Sub(at) < killedFor && !at.After(now) {
		return at.UTC().Truncate(time.Second), nil
	}
	return time.Time{}, nil
}

// takeKilled is killedAt of a run that starts. The mark stays for the next one as long as it is of
// interest.
func takeKilled(dir string, now time.Time, log *zap.Logger) time.Time {
	at, err := killedAt(dir, now)
	if err == nil && at.IsZero() {
		if err = os.Remove(filepath.Join(dir, systemd.HungFile)); errors.Is(err, fs.ErrNotExist) {
			return at
		}
	}
	if err != nil {
		log.Warn("whether an earlier run hung is not known", zap.Error(err))
	}
	return at
}
