package agent

import (
	"slices"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
)

// maxSamples is how many minutes are known: the last hour.
const maxSamples = 60

// minutes puts what passes took and did together, a minute at a time. It is pure, and in memory
// only: a run begins anew. The minutes are the passes': one that hung for ten makes one long one.
type minutes struct {
	shown []status.Sample // those that ended, oldest first; nobody changes them
	began time.Time       // the one under way; zero: none yet
	now   status.Sample
}

// pass takes in a pass, after which the VM stands so, and returns the minutes that have ended.
func (m *minutes) pass(p passed, state string) []status.Sample {
	now := p.seen.Now
	if m.began.IsZero() {
		m.began = now
	}
	m.now.Passes++
	m.now.SlowestPass = max(m.now.SlowestPass, p.took.Seconds())
	m.now.SlowestChange = max(m.now.SlowestChange, p.redirect.Seconds())
	for _, o := range p.outcomes {
		switch {
		case len(o.Drift) > 0:
			m.now.Repairs++
		case o.Rows > 0:
			m.now.Changes++
		}
	}
	if now.Sub(m.began) >= time.Minute {
		m.now.Time, m.now.State = now.UTC().Truncate(time.Second), state
		m.shown = append(slices.Clone(m.shown[max(0, len(m.shown)+1-maxSamples):]), m.now)
		m.began, m.now = now, status.Sample{}
	}
	return m.shown
}
