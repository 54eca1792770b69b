package supervisor

import (
	"fmt"
	"math/rand/v2"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

var testLimits = Limits{Start: 60 * time.Second, Drain: 15 * time.Second, Stop: 5 * time.Second}

// story plays events, each with the actions that it has to bring.
func story(t *testing.T, steps ...any) {
	t.Helper()
	m := NewMachine(testLimits)
	now := time.Unix(0, 0)
	var got []Action
	for i, step := range steps {
		switch step := step.(type) {
		case time.Duration:
			now = now.Add(step)
		case []Action:
			for i, a := range got {
				if r, is := a.(Reply); is { // of which the code counts here
					r.Text = ""
					got[i] = r
				}
			}
			got = slices.DeleteFunc(got, func(a Action) bool { _, is := a.(Say); return is })
			if len(got)+len(step) > 0 && !reflect.DeepEqual(got, step) {
				t.Fatalf("step %d, after %#v:\n%#v\nwant\n%#v", i, steps[i-1], got, step)
			}
		default:
			got = m.Step(now, step)
		}
	}
}

type do = []Action

func reply(code int, orders ...int) Reply { return Reply{orders, Answer{Code: code}} }

func send(n int, s syscall.Signal) Send { return Send{n, s} }

// served is the start of each story: epoch 0 serves.
var served = []any{Begin{}, do{Start{N: 1, Chain: 1}}, Live{1}, do(nil)}

func after(before []any, more ...any) []any { return append(slices.Clone(before), more...) }

// handedOver: epoch 1 serves and epoch 0 drains.
var handedOver = after(served, Asked{7}, do{Check{}}, Checked{},
	do{Start{N: 2, Chain: 1, Epoch: 1}}, Live{2}, do{reply(Done, 7)})

func TestMachine(t *testing.T) {
	const term, kill = syscall.SIGTERM, syscall.SIGKILL
	exit := func(n, code int) Exited { return Exited{n, Status{Code: code}} }
	killed := func(n int) Exited { return Exited{n, Status{Signal: kill}} }
	failed := after(served, Asked{7}, Checked{}, exit(2, 1),
		do{Clear{1}, StandIn{1, 1, true}, Look{1}})
	recovering := after(failed, Looked{1, AdminGone}, do{Start{3, 1, 1, true}})
	for name, steps := range map[string][]any{
		"a reload": after(handedOver, exit(1, 0), do{StandIn{Chain: 1}}),
		"orders while one is under way are the next one's": after(served, Asked{7}, do{Check{}}, Asked{8},
			do(nil), Checked{}, Asked{9}, do(nil), Live{2}, do{reply(Done, 7)}, exit(1, 0),
			do{StandIn{Chain: 1}, Check{}}, Checked{}, do{Start{N: 3, Chain: 1, Epoch: 2}}, Live{3},
			do{reply(Done, 8, 9)}),
		"refused": after(served, Asked{7}, Checked{&Answer{NotPossible, "x"}},
			do{reply(NotPossible, 7)}),
		"not live yet": {Begin{}, Asked{7}, do{reply(NotPossible, 7)}},
		"the next one dies and has left the admin interface": after(failed, Looked{1, AdminAnswers},
			do{reply(NotDone, 7)}, Asked{8}, do{Check{}}),
		"the next one dies and has had it closed": after(recovering, Live{3}, do{reply(NotDone, 7)}),
		"the one that is to bring it back waits for its control plane": after(recovering, 5*time.Second,
			Tick{}, do{reply(NotDone, 7)}, 594*time.Second, Tick{}, do(nil), time.Second, Tick{},
			do{send(3, kill)}),
		"the one that is to bring it back dies, too": after(recovering, exit(3, 1),
			do{Clear{1}, StandIn{1, 1, true}, reply(NotDone, 7)}, 999*time.Millisecond, Tick{}, do(nil),
			time.Millisecond, Tick{}, do{Start{4, 1, 1, true}}, exit(4, 1),
			do{Clear{1}, StandIn{1, 1, true}}, time.Second, Tick{}, do(nil), time.Second, Tick{},
			do{Start{5, 1, 1, true}}, Live{5}, do(nil)),
		"and a new order does not wait for that": after(recovering, exit(3, 1), Asked{8}, do{Check{}},
			Checked{&Answer{NotDone, "x"}}, do{reply(NotDone, 8)}, time.Second, Tick{},
			do{Start{4, 1, 1, true}}),
		"the one before stands still": after(failed, Looked{1, AdminUnknown}, do{reply(NotDone, 7)},
			time.Second, Tick{}, do{Look{1}}, Looked{1, AdminUnknown}, do(nil), time.Second, Tick{},
			do{Look{1}}, Looked{1, AdminGone}, do{Start{3, 1, 1, true}}),
		"the next one never gets live": after(served, Asked{7}, Checked{}, time.Minute, Tick{},
			do{send(2, kill)}, killed(2), do{Clear{1}, StandIn{1, 1, true}, Look{1}}),
		"one that drains does not end": after(handedOver, 17*time.Second, Tick{}, do{send(1, term)},
			5*time.Second, Tick{}, do{send(1, kill)}, killed(1), do{StandIn{Chain: 1}}),
		"the one that serves dies alone": after(served, exit(1, 3), do{End{Status{Code: 3}}}),
		"while another one starts": after(served, Asked{7}, Checked{}, exit(1, 3), do{StandIn{Chain: 1}},
			killed(2), do{reply(NotDone, 7), End{Status{Code: 3}}}),
		"while another one is live that is not known to be": after(served, Asked{7}, Checked{},
			exit(1, 3), Live{2}, do{reply(Done, 7)}, exit(2, 4), do{End{Status{Code: 4}}}),
		"while another one drains": after(handedOver, killed(2), do{Start{N: 3, Chain: 2}}, Live{3},
			do(nil), 17*time.Second, Tick{}, do{send(1, term)}, exit(1, 0), do(nil), exit(3, 4),
			do{End{Status{Code: 4}}}),
		"and the new one does not start": after(handedOver, killed(2), exit(3, 5), do{send(1, term)},
			exit(1, 0), do{End{Status{Code: 5}}}),
		"stopped": after(handedOver, Asked{8}, Told{term}, do{reply(NotDone, 8), send(2, term)},
			Told{term}, do(nil), exit(2, 0), do{send(1, term)}, Asked{9}, do{reply(NotDone, 9)},
			exit(1, 9), do{End{}}),
		"stopped, and the parent ends first": after(handedOver, Told{term}, exit(1, 0),
			do{StandIn{Chain: 1}}, exit(2, 0), do{End{}}),
		"other signals are for all": after(handedOver, Told{syscall.SIGUSR1},
			do{send(1, syscall.SIGUSR1), send(2, syscall.SIGUSR1)}),
		"but one that starts would die of them, and gets them later": after(served, Asked{7}, Checked{},
			Told{syscall.SIGUSR1}, do{send(1, syscall.SIGUSR1)}, Live{2},
			do{reply(Done, 7), send(2, syscall.SIGUSR1)}),
		"it cannot be started": {Begin{}, Exited{1, Status{Err: os.ErrNotExist}},
			do{End{Status{Err: os.ErrNotExist}}}},
	} {
		t.Run(name, func(t *testing.T) { story(t, steps...) })
	}
}

// world is what Envoys do, as far as a supervisor can see it: what was seen of 1.40.0 is in
// test/e2e, where the same happens to real ones.
type world struct {
	t      *testing.T
	random *rand.Rand
	m      *Machine
	now    time.Time
	procs  map[int]*envoy
	marked map[int]bool // chains with the mark of an initialization
	taken  map[[2]int]bool
	queue  []Event // in any order, but of one process
	open   map[int]bool
	orders int
	ended  bool
	told   bool // TERM
	calm   bool // nobody dies by himself any more
	log    []string
}

type envoy struct {
	Start
	phase phase
	begun bool // it has set the mark
	admin bool
	hung  bool
	gone  bool
}

func (w *world) step(e Event) {
	w.log = append(w.log, fmt.Sprintf("%v %T%+v", w.now.Sub(time.Unix(0, 0)), e, e))
	for _, a := range w.m.Step(w.now, e) {
		w.log = append(w.log, fmt.Sprintf("    %T%+v", a, a))
		w.do(a)
	}
}

func (w *world) fail(format string, args ...any) {
	w.t.Helper()
	w.t.Fatalf(format+"\n%s", append(args, strings.Join(w.log[max(0, len(w.log)-60):], "\n"))...)
}

func (w *world) do(a Action) {
	switch a := a.(type) {
	case Start:
		for _, p := range w.procs {
			if !p.gone && p.phase == starting {
				w.fail("two start at a time")
			}
		}
		if a.Epoch > 0 && w.parent(a.Chain, a.Epoch) == nil && !w.expected(a.Chain, a.Epoch-1) {
			w.fail("epoch %d starts without a parent", a.Epoch)
		}
		w.procs[a.N] = &envoy{Start: a}
		delete(w.taken, [2]int{a.Chain, a.Epoch})
	case Send:
		p := w.procs[a.N]
		if p == nil || p.gone {
			return
		}
		known := !slices.Contains(w.queueOf(a.N), Event(Live{a.N}))
		if p.phase == live && known && !w.told && !w.m.ending {
			w.fail("the one that serves gets signal %d", a.Signal)
		}
		if a.Signal == syscall.SIGKILL || !p.hung {
			w.exit(p, Status{Signal: a.Signal})
		}
	case Clear:
		for _, p := range w.procs {
			if !p.gone && p.Chain == a.Chain && p.phase == starting && p.begun {
				w.fail("the mark of an epoch that initializes is taken back")
			}
		}
		delete(w.marked, a.Chain)
	case Look:
		if p := w.procs[a.N]; p != nil && !p.gone {
			admin := AdminGone
			switch {
			case p.hung:
				admin = AdminUnknown
			case p.admin:
				admin = AdminAnswers
			}
			w.queue = append(w.queue, Looked{a.N, admin})
		}
	case Check:
		var refused *Answer
		if w.random.IntN(5) == 0 {
			refused = &Answer{Code: 1 + w.random.IntN(2)}
		}
		w.queue = append(w.queue, Checked{refused})
	case StandIn:
		w.taken[[2]int{a.Chain, a.Epoch}] = !a.Parent
	case Reply:
		for _, o := range a.Orders {
			if !w.open[o] {
				w.fail("order %d is answered twice", o)
			}
			delete(w.open, o)
		}
	case End:
		for n, p := range w.procs {
			if !p.gone {
				w.fail("process %d is left behind", n)
			}
		}
		if len(w.open) > 0 {
			w.fail("without an answer: %v", w.open)
		}
		w.ended = true
	}
}

// parent is the epoch before, if it runs.
func (w *world) parent(chain, epoch int) *envoy {
	for _, p := range w.procs {
		if !p.gone && p.Chain == chain && p.Epoch == epoch-1 && p.phase != starting {
			return p
		}
	}
	return nil
}

// expected says that the end of an epoch is not told yet.
func (w *world) expected(chain, epoch int) bool {
	for _, p := range w.procs {
		if p.Chain == chain && p.Epoch == epoch && slices.ContainsFunc(w.queue, func(e Event) bool {
			x, is := e.(Exited)
			return is && x.N == p.N
		}) {
			return true
		}
	}
	return false
}

func (w *world) queueOf(n int) (of []Event) {
	for _, e := range w.queue {
		switch e := e.(type) {
		case Live:
			if e.N == n {
				of = append(of, e)
			}
		case Exited:
			if e.N == n {
				of = append(of, e)
			}
		}
	}
	return of
}

func (w *world) exit(p *envoy, s Status) {
	p.gone = true
	w.queue = append(w.queue, Exited{p.N, s})
}

// move is one thing that a process does.
func (w *world) move(p *envoy) {
	if p.gone || p.hung {
		return
	}
	parent := w.parent(p.Chain, p.Epoch)
	switch {
	case p.phase == starting && !p.begun:
		if w.marked[p.Chain] {
			w.exit(p, Status{Code: 1}) // "previous envoy process is still initializing"
			return
		}
		w.marked[p.Chain], p.begun = true, true
	case p.phase == starting && p.Epoch > 0 && parent == nil && w.expected(p.Chain, p.Epoch-1):
		return // it tries ten times
	case p.phase == starting && p.Epoch > 0 && parent == nil &&
		(!p.admin || !w.taken[[2]int{p.Chain, p.Epoch - 1}]):
		w.exit(p, Status{Signal: syscall.SIGABRT})
	case p.phase == starting && parent != nil && parent.hung:
		return // it waits for an answer
	case p.phase == starting && !p.admin:
		p.admin = true
		if parent != nil {
			parent.admin = false
		}
	case p.phase == starting:
		p.phase = live
		delete(w.marked, p.Chain)
		if parent != nil {
			parent.phase = draining
		}
		w.queue = append(w.queue, Live{p.N})
	case p.phase == live && p.Epoch > 0 && parent == nil && !w.taken[[2]int{p.Chain, p.Epoch - 1}] &&
		!w.expected(p.Chain, p.Epoch-1):
		w.fail("epoch %d asks a dead parent, and nobody answers", p.Epoch)
	}
}

// next does one thing of all that may come next.
func (w *world) next() {
	alive := []*envoy{}
	for _, n := range slices.Sorted(func(yield func(int) bool) {
		for n := range w.procs {
			if !yield(n) {
				return
			}
		}
	}) {
		if !w.procs[n].gone {
			alive = append(alive, w.procs[n])
		}
	}
	pick := func() *envoy {
		if len(alive) == 0 {
			return nil
		}
		return alive[w.random.IntN(len(alive))]
	}
	wake := w.m.Wake()
	switch k := w.random.IntN(100); {
	case k < 35 && len(w.queue) > 0: // what comes of different processes comes in any order
		i := w.random.IntN(len(w.queue))
		e := w.queue[i]
		if x, is := e.(Exited); is {
			if of := w.queueOf(x.N); of[0] != e {
				return
			}
		}
		w.queue = slices.Delete(w.queue, i, i+1)
		w.step(e)
	case k < 75:
		if p := pick(); p != nil {
			w.move(p)
		}
	case k < 85 && !wake.IsZero():
		if wake.After(w.now) {
			w.now = wake
		}
		w.step(Tick{})
	case w.calm:
	case k < 90:
		w.orders++
		w.open[w.orders] = true
		w.step(Asked{w.orders})
	case k < 94:
		if p := pick(); p != nil && (p.phase != live || w.random.IntN(20) == 0) {
			w.exit(p, Status{Code: 1})
		}
	case k < 98:
		if p := pick(); p != nil {
			p.hung = !p.hung
		}
	case k == 98 && w.random.IntN(10) == 0:
		w.told = true
		w.step(Told{syscall.SIGTERM})
	}
}

// settled says that nothing is left to happen.
func (w *world) settled() bool {
	running := 0
	for _, p := range w.procs {
		if !p.gone {
			running++
			if p.phase != live {
				return false
			}
		}
	}
	return running == 1 && len(w.queue) == 0 && w.m.Wake().IsZero()
}

// TestWalks: whatever comes in whatever order, no Envoy that serves is ended, none is left behind,
// each order has one answer, and once nothing bad happens any more one epoch serves, with an admin
// interface, and nothing waits.
func TestWalks(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("SEED"); s != "" {
		seed, _ = strconv.ParseUint(s, 10, 64)
	}
	t.Logf("SEED=%d", seed)
	count, ends := 1000, 0
	if os.Getenv("SOAK") != "" {
		count = 30_000
	}
	for walk := range count {
		w := &world{
			t: t, random: rand.New(rand.NewPCG(seed, uint64(walk))), m: NewMachine(testLimits),
			now: time.Unix(0, 0), procs: map[int]*envoy{}, marked: map[int]bool{},
			taken: map[[2]int]bool{}, open: map[int]bool{},
		}
		w.step(Begin{})
		for range 300 {
			if w.next(); w.ended {
				break
			}
		}
		w.calm = true
		for _, p := range w.procs {
			p.hung = false
		}
		for range 3000 {
			if w.ended || w.settled() {
				break
			}
			w.next()
		}
		if w.ended {
			ends++
			continue
		}
		running := 0
		for _, p := range w.procs {
			if p.gone {
				continue
			}
			if running++; p.phase != live || !p.admin {
				w.fail("walk %d: process %d is %v in the end, with an admin interface: %v", walk, p.N, p.phase,
					p.admin)
			}
		}
		if running != 1 || len(w.open) > 0 || w.m.attempt != none {
			w.fail("walk %d: %d run, these wait: %v, attempt %v", walk, running, w.open, w.m.attempt)
		}
	}
	if ends == 0 || ends == count {
		t.Errorf("%d of %d walks have ended", ends, count)
	}
	t.Logf("%d of %d walks have ended", ends, count)
}
