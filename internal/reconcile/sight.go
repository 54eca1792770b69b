package reconcile

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// manyTouched is from how many touched chains on all are read.
const manyTouched = 256

// sight is what was read of the kernel's table, and what may have changed since.
type sight struct {
	have    iptables.Table // as last read
	known   bool           // have is what was there then
	adopted bool           // the kernel was looked at once

	dirty   bool      // something says that it may differ from have
	touched []string  // the chains that were named since the last read
	all     bool      // any chain may have been touched
	by      string    // who the kernel says wrote last
	told    time.Time // when it first told of that since the last read; zero: it did not

	at     time.Time // of the last read of everything
	budget readBudget
}

// note takes in what the kernel told of somebody's write.
func (s *sight) note(e iptables.Event, now time.Time) {
	s.dirty = true
	if s.told.IsZero() {
		s.told = cmp.Or(e.At, now)
	}
	s.touched = append(s.touched, e.Chains...)
	if len(e.Chains) == 0 || e.Lost || len(s.touched) > manyTouched {
		s.touched, s.all = nil, true
	}
	if e.Program != "" {
		s.by = fmt.Sprintf("%s (pid %d)", e.Program, e.PID)
	}
}

// doubt makes the next pass read everything.
func (s *sight) doubt() { s.dirty, s.all = true, true }

// due is in how long everything is read though nothing told of a change; 0 or less: now.
func (s *sight) due(now time.Time, poll time.Duration) time.Duration {
	return s.at.Add(poll).Sub(now)
}

// read makes have what the kernel has. Where the kernel notifies of every change, only what was
// touched is read again, until it is time to read everything.
func (s *sight) read(ctx context.Context, k Kernel, f iptables.Family, p *pass) (err error) {
	touched := s.touched
	trusted := s.known && !s.all && p.poll == resync && s.due(p.now, p.poll) > 0
	s.dirty = false
	if trusted && len(touched) == 0 {
		return nil
	}
	s.touched, s.all = nil, false
	start := p.time()
	if trusted {
		slices.Sort(touched)
		s.have, err = k.ReadChains(ctx, s.have, slices.Compact(touched))
	} else {
		s.have, err = k.Read(ctx, f)
		s.at = p.now
	}
	s.budget.took(start, p.time().Sub(start))
	if s.known = err == nil; s.known {
		s.told = time.Time{}
	}
	return err
}
