package status

import (
	"slices"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// Steady is the Status without what changes while nothing happens: when the last pass was and how
// many there were, what the agent costs, what channels have written, when evidence was last seen.
// Two that are equal tell a person the same, their ages aside.
func (s Status) Steady() Status {
	s.Heartbeat, s.Passes, s.Cost, s.Samples = s.Started, 0, Cost{}, nil
	s.Channels = slices.Clone(s.Channels)
	for i, c := range s.Channels {
		s.Channels[i] = Channel{Name: c.Name, Enabled: c.Enabled, Up: c.Up, Error: c.Error}
	}
	s.Findings = slices.Clone(s.Findings)
	for i := range s.Findings {
		s.Findings[i].Evidence = []symptom.Evidence{}
	}
	return s
}
