package agent

import (
	"fmt"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/report"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
)

// eventBurst is how many lines are told at once. One counts no longer every lineEvery.
const eventBurst = 100

// ration bounds what is told outside the log, aside from services, which have their own bound: an
// Envoy that comes and goes each second, or a thousand listeners that it rejects, would fill the
// serial port and cost money in Cloud Logging. What is left out is in the log, and once a minute it
// is told how many lines that were and how the VM stands now.
type ration struct {
	paid  time.Time // when no line counts any longer
	left  int       // out since since
	since time.Time
}

// takes says whether one more line may be told.
func (r *ration) takes(now time.Time) bool {
	if r.paid.Sub(now) > (eventBurst-1)*lineEvery {
		if r.left++; r.left == 1 {
			r.since = now
		}
		return false
	}
	if r.paid.Before(now) {
		r.paid = now
	}
	r.paid = r.paid.Add(lineEvery)
	return true
}

// tellLeft tells what was left out, a minute after the first of it.
func (t *told) tellLeft(s status.Status, now time.Time) {
	r := &t.ration
	if r.left == 0 || now.Sub(r.since) < togetherEach {
		return
	}
	stands := "nothing fails"
	if f := t.failures.newest(); f.ID != "" {
		stands = f.Text
	}
	e := report.Event{Severity: report.Warning,
		Message: fmt.Sprintf("%d lines were left out here, the VM's log has them; now %s: %s", r.left,
			s.State(), stands)}
	t.inLog(e) // and not in the history: there they are
	t.events(e)
	r.left = 0
}
