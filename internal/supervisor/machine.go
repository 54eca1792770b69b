package supervisor

import (
	"cmp"
	"fmt"
	"slices"
	"syscall"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/exitcode"
)

// What the exit code of `envoy --reload` says.
const (
	Done        = exitcode.Yes      // the next epoch serves
	NotDone     = exitcode.No       // it does not, and the one before goes on
	NotPossible = exitcode.NotKnown // a hot restart cannot do it: Envoy is to be drained and restarted
)

// Answer to an order of a reload.
type Answer struct {
	Code int
	Text string // for people, one line
}

// Status is how a process of Envoy ended.
type Status struct {
	Code   int            // where it ended by itself
	Signal syscall.Signal // 0: it ended by itself
	Err    error          // it could not be started
}

func (s Status) String() string {
	switch {
	case s.Err != nil:
		return s.Err.Error()
	case s.Signal != 0:
		return fmt.Sprintf("ended by signal %d (%s)", int(s.Signal), s.Signal)
	}
	return fmt.Sprintf("ended with exit code %d", s.Code)
}

// What the Machine hears of.
type (
	// Begin is the supervisor's own start.
	Begin struct{}
	// Asked is an order of a reload. Each gets one Answer.
	Asked struct{ Order int }
	// Checked is what Check came to: nil says that the next epoch may be tried.
	Checked struct{ Refused *Answer }
	// Live says that a process serves, and has told the one before to drain.
	Live struct{ N int }
	// Exited says that a process has ended, or could not be started.
	Exited struct {
		N int
		Status
	}
	// Looked says what a look at a process's admin interface has seen.
	Looked struct {
		N     int
		Admin Admin
	}
	// Told is a signal to the supervisor.
	Told struct{ Signal syscall.Signal }
	// Tick says that the time of Wake has come.
	Tick struct{}
)

// Event is one of the above.
type Event any

// Admin is the state of an admin interface.
type Admin int

// An interface that takes a connection and does not answer may yet be closed: Envoy is stopped, or
// busy, and has not read what its child wanted.
const (
	AdminUnknown Admin = iota
	AdminAnswers
	AdminGone
)

// What the Machine wants done.
type (
	// Check whether the files that are there now make an Envoy that can take over.
	Check struct{}
	// Start a process. Epochs of one chain hand over to each other; epoch 0 begins a chain. Kept: with
	// the program and the configuration of the epoch that serves, whatever is on disk now.
	Start struct {
		N, Chain, Epoch int
		Kept            bool
	}
	// Send a signal to a process.
	Send struct {
		N      int
		Signal syscall.Signal
	}
	// Clear the mark that a process which ended in its initialization has left to its chain.
	Clear struct{ Chain int }
	// Look whether a process still answers on its admin interface.
	Look struct{ N int }
	// StandIn takes what is still sent to an epoch that is dead: by its child, which is answered, or
	// else by its parent.
	StandIn struct {
		Chain, Epoch int
		Parent       bool
	}
	// Reply to orders.
	Reply struct {
		Orders []int
		Answer
	}
	// Say something that whoever looks after the VM may want to know.
	Say struct{ Text string }
	// End the supervisor as this process ended.
	End struct{ Status }
)

// Action is one of the above.
type Action any

// Limits are how long things may take.
type Limits struct {
	// Start is how long an epoch may take to be live before it is given up for the one that serves.
	// The first one has no limit: it waits for its control plane as long as Envoy itself does. One by
	// which the one before gets its admin interface back has ten times as long: while it waits for its
	// control plane, there is one.
	Start time.Duration
	// Drain is Envoy's --parent-shutdown-time-s: an epoch has the one before end so long after it
	// was live itself.
	Drain time.Duration
	// Stop is how long a process may take from TERM to its end.
	Stop time.Duration
}

// retryFirst and retryLast bound the pause between two tries to give an epoch that serves its admin
// interface back.
const retryFirst, retryLast = time.Second, time.Minute

// answerAfter is how long whoever has ordered a reload waits for what follows from its failure.
const answerAfter = 5 * time.Second

// lookEvery is the pause between two looks at an epoch that does not answer.
const lookEvery = time.Second

type phase int

const (
	starting phase = iota
	live
	draining
)

// process is an Envoy that runs.
type process struct {
	n, chain, epoch int
	phase           phase
	by              time.Time      // when it is helped on its way; zero: never
	sent            syscall.Signal // the last that was to end it; 0: none was
	later           syscall.Signal // for when it is live; 0: none
}

// attempt is how far a reload is.
type attempt int

const (
	none       attempt = iota
	checking           // whether it can be
	trying             // the next epoch starts
	looking            // it has failed: does the one before still have its admin interface?
	lookAgain          // that cannot be told yet
	recovering         // the one before starts again as the next epoch, since its admin is gone
	pausing            // that has failed, too, and is tried again
)

// Machine decides what a supervisor does. It has no clock and touches nothing.
type Machine struct {
	limits  Limits
	running []*process // oldest first
	n       int        // the last process's number
	chain   int        // the newest chain
	waiting []int      // orders that came while nothing could be done for them yet
	serving []int      // orders of the attempt
	attempt attempt
	why     string    // the attempt failed
	before  attempt   // this one: none, lookAgain or pausing
	tries   int       // to recover
	retry   time.Time // of a recovery, or a look; or when to answer although one goes on
	ending  bool      // told to stop, or nothing is left to go on with
	status  Status    // to end with
	decided bool      // status is that of an Envoy that served
}

// NewMachine returns one that has heard of nothing yet.
func NewMachine(l Limits) *Machine { return &Machine{limits: l} }

// Wake is when the Machine wants a Tick; zero: never.
func (m *Machine) Wake() (at time.Time) {
	sooner := func(t time.Time) {
		if !t.IsZero() && (at.IsZero() || t.Before(at)) {
			at = t
		}
	}
	for _, p := range m.running {
		sooner(p.by)
	}
	if m.attempt == pausing || m.attempt == lookAgain ||
		m.attempt == recovering && len(m.serving) > 0 {
		sooner(m.retry)
	}
	return at
}

// Step is what follows from an event.
func (m *Machine) Step(now time.Time, e Event) (do []Action) {
	switch e := e.(type) {
	case Begin:
		do = m.fresh()
	case Asked:
		if m.ending {
			return []Action{Reply{[]int{e.Order}, Answer{NotDone, "Envoy is being stopped"}}}
		}
		m.waiting = append(m.waiting, e.Order)
	case Checked:
		do = m.checked(now, e.Refused)
	case Live:
		do = m.isLive(now, e.N)
	case Exited:
		do = m.exited(now, e)
	case Looked:
		do = m.looked(now, e)
	case Told:
		do = m.told(now, e.Signal)
	case Tick:
		do = m.tick(now)
	}
	return append(do, m.begin()...)
}

func (m *Machine) find(n int) *process {
	for _, p := range m.running {
		if p.n == n {
			return p
		}
	}
	return nil
}

// in is the newest process of a phase.
func (m *Machine) in(ph phase) *process {
	for _, p := range slices.Backward(m.running) {
		if p.phase == ph {
			return p
		}
	}
	return nil
}

func (m *Machine) reply(code int, format string, args ...any) []Action {
	orders := m.serving
	m.serving = nil
	if len(orders) == 0 {
		return nil
	}
	return []Action{Reply{orders, Answer{code, fmt.Sprintf(format, args...)}}}
}

// begin takes the orders that wait, all at once, when nothing is under way. While an epoch drains
// none is: Envoy would have that one end at once, and its streams with it.
func (m *Machine) begin() []Action {
	idle := m.attempt == none || m.attempt == lookAgain || m.attempt == pausing
	if len(m.waiting) == 0 || !idle || m.ending || m.in(draining) != nil {
		return nil
	}
	m.serving, m.waiting = m.waiting, nil
	if m.in(live) == nil {
		return m.reply(NotPossible, "Envoy is not live yet: there is nothing that could hand over")
	}
	m.before, m.attempt = m.attempt, checking
	return []Action{Check{}}
}

func (m *Machine) checked(now time.Time, refused *Answer) []Action {
	if m.attempt != checking {
		return nil
	}
	if refused != nil {
		m.attempt = m.before
		return m.reply(refused.Code, "%s", refused.Text)
	}
	m.attempt = trying
	return m.start(now, false)
}

// fresh starts the first epoch of a new chain: it asks nothing of an epoch that still drains.
func (m *Machine) fresh() []Action {
	m.n++
	m.chain++
	m.running = append(m.running, &process{n: m.n, chain: m.chain})
	return []Action{Start{N: m.n, Chain: m.chain}}
}

// start starts the next epoch.
func (m *Machine) start(now time.Time, kept bool) []Action {
	parent, limit := m.in(live), m.limits.Start
	if kept {
		limit *= 10
	}
	m.n++
	m.running = append(m.running, &process{n: m.n, chain: parent.chain, epoch: parent.epoch + 1,
		by: now.Add(limit)})
	return []Action{Start{N: m.n, Chain: parent.chain, Epoch: parent.epoch + 1, Kept: kept}}
}

func (m *Machine) isLive(now time.Time, n int) (do []Action) {
	p := m.find(n)
	if p == nil || p.phase != starting {
		return nil
	}
	if old := m.in(live); old != nil {
		// Its child has it end. Two seconds more: then we do.
		old.phase, old.by = draining, now.Add(m.limits.Drain+2*time.Second)
	}
	p.phase, m.decided = live, false
	if p.sent == 0 {
		p.by = time.Time{}
	}
	switch m.attempt {
	case trying:
		do = append(m.reply(Done, "epoch %d of Envoy serves; epoch %d drains", p.epoch, p.epoch-1),
			Say{fmt.Sprintf("epoch %d serves, epoch %d drains", p.epoch, p.epoch-1)})
	case recovering:
		do = append(m.reply(NotDone, "%s; the Envoy of before goes on as epoch %d", m.why, p.epoch),
			Say{fmt.Sprintf("epoch %d serves with what was before", p.epoch)})
	default:
		do = []Action{Say{fmt.Sprintf("epoch %d serves", p.epoch)}}
	}
	if p.later != 0 {
		do = append(do, Send{n, p.later})
	}
	m.attempt, m.tries = none, 0
	return do
}

func (m *Machine) exited(now time.Time, e Exited) []Action {
	p := m.find(e.N)
	if p == nil {
		return nil
	}
	m.running = slices.DeleteFunc(m.running, func(o *process) bool { return o == p })
	if !m.decided && (p.phase != draining || len(m.running) == 0) {
		m.status, m.decided = e.Status, p.phase == live
	}
	if m.ending {
		return append(m.standIn(p), m.stop(now)...)
	}
	switch {
	case p.phase == draining:
		return m.standIn(p)
	case p.phase == live:
		return m.orphaned(now, p, e.Status)
	case m.in(live) != nil:
		return m.failed(now, p, e.Status)
	}
	// What was to serve does not start, and nothing serves. What still drains ends with it.
	m.decided = true
	return m.end(now, "Envoy "+e.String())
}

// standIn is for the child of a process that has ended.
func (m *Machine) standIn(p *process) []Action {
	for _, child := range m.running {
		if child.chain == p.chain && child.epoch == p.epoch+1 {
			return []Action{StandIn{Chain: p.chain, Epoch: p.epoch}}
		}
	}
	return nil
}

// orphaned: the epoch that served has ended by itself.
func (m *Machine) orphaned(now time.Time, p *process, s Status) (do []Action) {
	what := fmt.Sprintf("epoch %d of Envoy, which served, %v", p.epoch, s)
	if m.in(starting) != nil {
		// That may be live, and nobody have told it yet, or get there without its parent.
		m.attempt = trying // for what it was, there is no more use
		return append(m.standIn(p), Say{what})
	}
	if m.in(draining) == nil {
		m.decided = true
		return m.end(now, what)
	}
	// Streams live in an epoch that drains, which accepts no more: another one begins anew beside it.
	do = append(m.replyAll(what), Say{what + "; another one starts"})
	m.attempt, m.decided = none, false
	return append(do, m.fresh()...)
}

func (m *Machine) replyAll(why string) []Action {
	m.serving = append(m.serving, m.waiting...)
	m.waiting = nil
	return m.reply(NotDone, "%s", why)
}

// failed: the next epoch has ended before it was live.
func (m *Machine) failed(now time.Time, p *process, s Status) []Action {
	m.decided = false
	why := fmt.Sprintf("epoch %d of Envoy %v before it was live", p.epoch, s)
	if p.sent != 0 {
		why = fmt.Sprintf("epoch %d of Envoy was not live in time", p.epoch)
	}
	do := []Action{Clear{p.chain}, StandIn{p.chain, p.epoch, true}}
	if m.attempt == trying {
		m.attempt, m.why = looking, why
		return append(do, Say{why}, Look{m.in(live).n})
	}
	m.attempt = pausing
	m.retry = now.Add(min(retryFirst<<min(m.tries, 10), retryLast))
	m.tries++
	do = append(do, m.reply(NotDone, "%s; the one before serves without an admin interface, "+
		"which is tried again: %s", m.why, why)...)
	return append(do, Say{why + "; the one before serves without an admin interface"})
}

func (m *Machine) looked(now time.Time, e Looked) []Action {
	if p := m.in(live); m.attempt != looking || p == nil || p.n != e.N {
		return nil
	}
	switch e.Admin {
	case AdminAnswers:
		m.attempt = none
		return m.reply(NotDone, "%s; the one before goes on", m.why)
	case AdminUnknown:
		m.attempt, m.retry = lookAgain, now.Add(lookEvery)
		return m.reply(NotDone, "%s; the one before does not answer on its admin interface", m.why)
	}
	// The child has had it close its admin interface for good. Another child with what the one before
	// had takes over from it.
	m.attempt, m.retry = recovering, now.Add(answerAfter)
	return m.start(now, true)
}

func (m *Machine) told(now time.Time, sig syscall.Signal) (do []Action) {
	if sig == syscall.SIGTERM || sig == syscall.SIGINT {
		if m.ending {
			return nil
		}
		return m.end(now, "Envoy is being stopped")
	}
	for _, p := range m.running {
		if p.phase == starting { // it would die of what it has not yet learned to take
			p.later = sig
			continue
		}
		do = append(do, Send{p.n, sig})
	}
	return do
}

// end has everything end.
func (m *Machine) end(now time.Time, why string) []Action {
	m.ending, m.attempt = true, none
	return append(append(m.replyAll(why), Say{why}), m.stop(now)...)
}

// stop ends one process after the other, the newest first: each tells its parent to end, and one
// whose parent is dead tries that for ten seconds and aborts.
func (m *Machine) stop(now time.Time) []Action {
	if len(m.running) == 0 {
		return []Action{End{m.status}}
	}
	p := m.running[len(m.running)-1]
	if p.sent != 0 {
		return nil
	}
	return []Action{m.signal(now, p, syscall.SIGTERM)}
}

// signal ends a process; what does not end by it in time is killed.
func (m *Machine) signal(now time.Time, p *process, sig syscall.Signal) Action {
	p.sent, p.by = cmp.Or(p.sent, sig), now.Add(m.limits.Stop)
	return Send{p.n, sig}
}

func (m *Machine) tick(now time.Time) (do []Action) {
	for _, p := range m.running {
		if p.by.IsZero() || now.Before(p.by) {
			continue
		}
		sig := syscall.SIGKILL
		if p.phase == draining && p.sent == 0 {
			sig = syscall.SIGTERM
		}
		do = append(do, m.signal(now, p, sig))
	}
	switch {
	case now.Before(m.retry):
	case m.attempt == lookAgain:
		m.attempt = looking
		do = append(do, Look{m.in(live).n})
	case m.attempt == recovering:
		do = append(do, m.reply(NotDone, "%s; the one before serves, and starts again as the next "+
			"epoch, to have its admin interface back", m.why)...)
	case m.attempt == pausing:
		m.attempt = recovering
		do = append(do, m.start(now, true)...)
	}
	return do
}
