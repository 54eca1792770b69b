package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/neighbour"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// neighbourEvery is how often the daemon looks for Google's closed agent: at some files, and only
// where one is there at more.
const neighbourEvery = 10 * time.Second

// closedAgent is what is told of Google's closed agent, of what was seen; nil: nothing. A unit file
// behind ours is never started and harms nobody.
func closedAgent(
	units []neighbour.Unit, all []neighbour.Process, unit systemd.State, writes string,
) *symptom.ClosedAgent {
	found := neighbour.Sort(all, units)
	c := &symptom.ClosedAgent{}
	for _, u := range units {
		if !u.First {
			continue
		}
		c.Unit, c.Binary = u.Path, u.Program
		ours := found.Ours || unit.MainPID == os.Getpid()
		running := unit.Active == "active" || unit.Active == "activating" || unit.Active == "reloading"
		switch {
		case running && !ours:
			c.Unit, c.Starts = u.Path+", "+unit.Active, true
		case unit.Enabled && running:
			c.Unit, c.Starts = u.Path+", in place of ours from the next start of that unit on", true
		case unit.Enabled:
			c.Unit, c.Starts = u.Path+", enabled", true
		}
		break
	}
	if len(found.Agents) > 0 {
		p := found.Agents[0]
		c.Process = fmt.Sprintf("%d %s", p.PID, p.Program)
	}
	if c.Unit == "" && c.Process == "" {
		return nil
	}
	c.Writes = writes
	return c
}

// watchNeighbour looks for Google's closed agent. It tells of it, and changes nothing: whose the VM
// is to be is for people to decide. Its processes are hidden from the daemon, which sees its unit
// file, and what others write into our guest attributes.
func (a *Agent) watchNeighbour(ctx context.Context) error {
	for wait := time.Second; sleep(ctx, wait); wait = neighbourEvery {
		units, err := neighbour.Units("")
		if err != nil {
			a.log.Debug("could not look for another agent", zap.Error(err))
		}
		var unit systemd.State
		if len(units) > 0 {
			// Without it the file alone is told.
			unit, _ = systemd.UnitState(ctx, systemd.AgentUnit)
		}
		a.self.closed.Store(closedAgent(units, nil, unit, a.guest.Others()))
	}
	return nil
}

// askNeighbour looks for Google's closed agent, and as root for its processes.
func (l *looking) askNeighbour() question {
	return question{[]symptom.Source{symptom.FromUnit, symptom.FromProcesses}, 3 * time.Second,
		func(ctx context.Context) (func(*looking), error) {
			units, err := neighbour.Units("")
			unit, _ := systemd.UnitState(ctx, systemd.AgentUnit) // there may be no systemd
			var all []neighbour.Process
			if os.Geteuid() == 0 {
				programs := make([]string, len(units))
				for i, u := range units {
					programs[i] = u.Program
				}
				var processesErr error
				all, processesErr = neighbour.Processes([]uint16{attribute.OutboundPort,
					attribute.EnvoyAdminPort}, programs...)
				err = errors.Join(err, processesErr)
			}
			closed := closedAgent(units, all, unit, "")
			return func(l *looking) {
				l.Seen.ClosedAgent = closed
				if os.Geteuid() != 0 {
					l.unseen[symptom.FromProcesses] = "only root sees the processes of others"
				}
			}, err
		}}
}
