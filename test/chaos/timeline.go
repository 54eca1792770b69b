package chaos

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// Kind is a promise that can be broken.
type Kind string

// The promises.
const (
	// Escaped: a connection to an intercepted address reached the address itself.
	Escaped Kind = "escaped"
	// Refused: a new connection to an intercepted address or a serving port got no answer.
	Refused Kind = "refused"
	// Cut: an established stream through Envoy ended.
	Cut Kind = "cut"
	// Severed: an established stream that has nothing to do with Envoy ended.
	Severed Kind = "severed"
	// Early: our jump was in, and Envoy had not accepted a connection since the boot.
	Early Kind = "early"
	// Trapped: a connection that is not to be intercepted went through Envoy: the proxy's own, root's,
	// one to what is no service.
	Trapped Kind = "trapped"
	// Blocked: a new connection that has nothing to do with Envoy got no answer.
	Blocked Kind = "blocked"
	// Hijacked: a connection to an address of the VM's own was redirected.
	Hijacked Kind = "hijacked"
	// Captured: a connection reached a stranger's socket on one of Envoy's ports.
	Captured Kind = "captured"
	// Foreign: a rule of somebody else is gone, changed, or its counters went back.
	Foreign Kind = "foreign"
	// Late: after a calm began not everything is as wanted in time.
	Late Kind = "late"
	// Lied: the agent's status says what is not so.
	Lied Kind = "lied"
	// Silent: no heartbeat.
	Silent Kind = "silent"
	// Grew: memory, file descriptors, goroutines or children beyond their bound.
	Grew Kind = "grew"
	// Died: the agent ended and nobody had ended it; or its race detector spoke.
	Died Kind = "died"
	// Spent: more guest-attribute queries than the budget.
	Spent Kind = "spent"
	// Left: something of ours is there after cleanup, or something of another's is not.
	Left Kind = "left"
	// Breached: a local user without rights got at something that is ours.
	Breached Kind = "breached"
	// Broken: the game itself could not go on; never excused.
	Broken Kind = "broken"
)

// Family is an IP family, or Both.
type Family int

// The families.
const (
	Both Family = 0
	IPv4 Family = 4
	IPv6 Family = 6
)

func (f Family) meets(other Family) bool { return f == Both || other == Both || f == other }

// Observation is something that is not as on a calm day. It may be excused.
type Observation struct {
	Kind   Kind
	Family Family
	// From and To are when it can have come about: of a connection, its start and its answer.
	From, To time.Time
	// Grace is how much time in which nothing hinders the agent has to lie between From and To: before
	// that it is none. 0: it is one at once.
	Grace time.Duration
	// To what: a VIP or the like, for messages and for Excuse.Only.
	What string
	Text string
}

func (o Observation) String() string { return fmt.Sprintf("%s %s: %s", o.Kind, o.What, o.Text) }

// Excuse is a promise that a fault suspends by design.
type Excuse struct {
	Kind   Kind
	Family Family // Both unless it concerns one
	// Only, where not empty, are the Whats that it concerns.
	Only []string
	// After is for how long after the fault's end it lasts. Only time counts in which nothing hinders
	// the agent: who is stopped repairs nothing.
	After time.Duration
	// Envoy: of that, only time counts in which Envoy has not been away either: who waits for Envoy
	// intercepts nothing.
	Envoy bool
	// Away: it counts only while Envoy is away.
	Away bool
	// Hindered: it counts only of a fault that came while something hindered the agent.
	Hindered bool
}

// Span is one fault as it was played.
type Span struct {
	Event
	Begin, End time.Time // End is zero while it lasts
	Excuses    []Excuse
	// Hinders: while it lasts, and Recovery after, the agent cannot repair.
	Hinders  bool
	Recovery time.Duration
	// EnvoyAway: while it lasts, and some seconds of Envoy's start after, Envoy serves nothing.
	EnvoyAway bool
}

// envoyStarts is what an Envoy takes from its start until it serves what the control plane sent, on
// a busy machine.
const envoyStarts = 3 * time.Second

// Violation is an observation that nothing excuses.
type Violation struct {
	Observation
	// Standing are the faults that were on then, for the one who reads it.
	Standing []string
}

// Judge says which observations no span excuses. now is the end of spans that still last.
func Judge(observations []Observation, spans []Span, now time.Time) (all []Violation) {
	hindered, away := hindrances(spans, now, false), hindrances(spans, now, true)
	for _, o := range observations {
		if o.Grace > 0 && after(o.From, o.Grace, hindered).After(o.To) ||
			excused(o, spans, hindered, away, now) {
			continue
		}
		v := Violation{Observation: o}
		for _, s := range spans {
			if !s.Begin.After(o.To) && !s.end(now).Add(time.Second).Before(o.From) {
				v.Standing = append(v.Standing, s.Name)
			}
		}
		all = append(all, v)
	}
	return all
}

func (s Span) end(now time.Time) time.Time {
	if s.End.IsZero() {
		return now
	}
	return s.End
}

func excused(o Observation, spans []Span, hindered, away []interval, now time.Time) bool {
	for _, s := range spans {
		for _, e := range s.Excuses {
			if e.Kind != o.Kind || !e.Family.meets(o.Family) ||
				len(e.Only) > 0 && !slices.Contains(e.Only, o.What) {
				continue
			}
			if o.To.Before(s.Begin) || e.Away && !slices.ContainsFunc(spans, func(x Span) bool {
				return x.EnvoyAway && !o.To.Before(x.Begin) &&
					!o.From.After(x.end(now).Add(envoyStarts+e.After))
			}) {
				continue
			}
			if e.Hindered && !slices.ContainsFunc(hindered, func(i interval) bool {
				return !s.Begin.After(i.to) && !s.end(now).Before(i.from)
			}) {
				continue
			}
			meanwhile := hindered
			if e.Envoy {
				meanwhile = away
			}
			if !o.From.After(after(s.end(now), e.After, meanwhile)) {
				return true
			}
		}
	}
	return false
}

type interval struct{ from, to time.Time }

// hindrances are the times in which the agent could do nothing, or Envoy was away, in order; none
// meets another.
func hindrances(spans []Span, now time.Time, envoy bool) (all []interval) {
	for _, s := range spans {
		if s.Hinders {
			all = append(all, interval{s.Begin, s.end(now).Add(s.Recovery)})
		}
		if s.EnvoyAway && envoy {
			all = append(all, interval{s.Begin, s.end(now).Add(envoyStarts)})
		}
	}
	slices.SortFunc(all, func(a, b interval) int { return a.from.Compare(b.from) })
	var merged []interval
	for _, i := range all {
		if n := len(merged); n > 0 && !i.from.After(merged[n-1].to) {
			merged[n-1].to = slices.MaxFunc([]time.Time{merged[n-1].to, i.to}, time.Time.Compare)
			continue
		}
		merged = append(merged, i)
	}
	return merged
}

// after is when, from t on, d of unhindered time has passed.
func after(t time.Time, d time.Duration, hindered []interval) time.Time {
	for _, i := range hindered {
		if i.to.Before(t) {
			continue
		}
		if free := i.from.Sub(t); free > 0 {
			if free >= d {
				return t.Add(d)
			}
			d -= free
		}
		t = i.to
	}
	return t.Add(d)
}

// Summary is one line for each kind, with its first violation.
func Summary(all []Violation) (lines []string) {
	byKind := map[Kind][]Violation{}
	for _, v := range all {
		byKind[v.Kind] = append(byKind[v.Kind], v)
	}
	for kind, some := range byKind {
		first := slices.MinFunc(some, func(a, b Violation) int { return a.From.Compare(b.From) })
		var whats []string
		last := first
		for _, v := range some {
			if last.To.Before(v.To) {
				last = v
			}
			whats = append(whats, v.What)
		}
		slices.Sort(whats)
		lines = append(lines, fmt.Sprintf(
			"%s %d times, until %s, of %v; first %s %s: %s (faults then: %v)",
			kind, len(some), last.To.Format("15:04:05.000"), slices.Compact(whats),
			first.From.Format("15:04:05.000"), first.What, first.Text, first.Standing))
	}
	slices.SortFunc(lines, cmp.Compare[string])
	return lines
}
