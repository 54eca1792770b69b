package agent

import (
	"context"
	"errors"

	"github.com/service-proxy-agent/service-proxy-agent/internal/bundle"
)

// Record writes down what was looked at, so that Replay of it answers elsewhere what this look
// answers here. It asks the kernel and Envoy for what a later question may need: counters, routes,
// endpoints, the ways to addresses. What it lacks is a gap.
func (l Looked) Record(context.Context) (data []byte, gaps []bundle.Gap, err error) {
	return nil, nil, errors.New("record a look: not yet")
}
