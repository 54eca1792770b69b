package agent

import (
	"context"
	"fmt"
	"os"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
)

// How often it is looked at what the agent costs, which takes some microseconds, and over how many
// looks: what is told is of the last minute.
const (
	costEvery = 10 * time.Second
	costLooks = 7
)

// spent is what was taken of the machine since the start.
type spent struct {
	at        time.Time
	questions [len(envoyadmin.Asked{}.Questions)]envoyadmin.Cost // by envoyadmin.Question
	cpu       time.Duration                                      // of processors
}

// envoy is what was taken of Envoy's main thread, at most: what came to no answer may have waited
// elsewhere.
func (s spent) envoy() (d time.Duration) {
	for _, q := range s.questions {
		d += q.Took - q.Lost
	}
	return d
}

// meter makes shares of what was spent. It is pure: the zero value has seen nothing.
type meter struct{ looks []spent }

// take takes a look, and returns what the last minute cost.
func (m *meter) take(now spent) (c status.Cost) {
	m.looks = append(m.looks, now)
	m.looks = m.looks[max(0, len(m.looks)-costLooks):]
	first := m.looks[0]
	for i, q := range now.questions {
		c.Questions = append(c.Questions, status.Question{
			Name: envoyadmin.Question(i).String(), Count: q.Count, Seconds: q.Took.Seconds(),
			Recent: (q.Took - first.questions[i].Took).Seconds(),
		})
	}
	over := now.at.Sub(first.at)
	if over <= 0 {
		return c
	}
	share := func(d time.Duration) float64 { return max(0, d.Seconds()/over.Seconds()) }
	c.Window = over.Round(time.Second).Seconds()
	// An answer is booked at its end, so that a long one may be more than a short window.
	c.EnvoyShare = min(1, share(now.envoy()-first.envoy()))
	c.CPUShare = share(now.cpu - first.cpu)
	return c
}

// watchCost looks what the agent takes of the machine.
func (a *Agent) watchCost(ctx context.Context) error {
	var m meter
	failed := false
	for {
		used, resident, err := readSpent(a.envoy.Asked())
		if err != nil && !failed {
			failed = true
			a.log.Warn("what the agent costs is not known", zap.Error(err))
		}
		if err == nil {
			cost := m.take(used)
			cost.Resident = resident
			a.cost.Store(&cost)
		}
		if !sleep(ctx, costEvery) {
			return nil
		}
	}
}

// readSpent asks the kernel what this process, and the programs that it ran to their end, have
// used.
func readSpent(asked envoyadmin.Asked) (s spent, resident uint64, err error) {
	s.at = time.Now()
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var u unix.Rusage
		if err := unix.Getrusage(who, &u); err != nil {
			return s, 0, fmt.Errorf("ask for the used time: %w", err)
		}
		s.cpu += time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	s.questions = asked.Questions
	text, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return s, 0, err
	}
	var pages uint64
	if _, err := fmt.Sscanf(string(text), "%d %d", new(uint64), &pages); err != nil {
		return s, 0, fmt.Errorf("read /proc/self/statm: %w", err)
	}
	return s, pages * uint64(os.Getpagesize()), nil
}
