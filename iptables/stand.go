package iptables

import (
	"cmp"
	"errors"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/internal/xtables"
)

// How a legacy table is watched. Nothing tells of its changes, but the kernel answers in 2 µs how
// many rules there are and how large, and in 5 ms of 10,000 rules a hash of all (package xtables).
// Each read notes the hash of what it read; what differs from it later was not read yet, whoever
// wrote it. So our own writes need not be known by their pids, nor another program by its lock.
// See docs/design/facts.md#legacy-tells-nothing.
const (
	// infoEvery is how often the number and size of the rules are asked for: a drift that shows in
	// them waits this long.
	infoEvery = 100 * time.Millisecond
	// printEvery is how often all rules are, for what does not show there: a rule that was replaced
	// by one as large, two that changed places. Whoever takes the usual lock is seen at once.
	printEvery = 5 * time.Second
	// printShare is how many times what that took the next one waits: with 10,000 rules (5 ms of a
	// processor) 5 s are longer, with 32,000 it comes each 10 s. A hint may have hintShare: others
	// may look at their rules, which takes the lock as a write does, as often as they like.
	printShare = 600
	hintShare  = 10
	// trustPrint is for how long what was read is taken for what is there by its hash alone. It is
	// less than the time after which reconcile reads in any case: a table that was changed and
	// changed back within the milliseconds of one read is seen then.
	trustPrint = 4 * time.Minute
)

// asked is where it is asked how a table stands: *xtables.Socket.
type asked interface {
	Info(table string) (xtables.Info, error)
	Print(table string) (xtables.Print, error)
	Close() error
}

func openSocket(f Family) (asked, error) {
	if f == IPv6 {
		return xtables.Open(unix.AF_INET6)
	}
	return xtables.Open(unix.AF_INET)
}

// errUnasked: the table was not asked for yet.
var errUnasked = errors.New("not asked for yet")

// stand is how a legacy table stood when it was last read.
type stand struct {
	mu sync.Mutex
	// there: a command of ours has read the table, and so made it if it was not there. Before, to
	// ask would.
	there  bool
	socket asked // nil: it is not watched
	busy   int   // commands of ours that write it or read it now
	why    error // why the kernel did not say how it stands when it was last asked; nil: it did

	noHash error // why the kernel did not give all rules when it was last asked for them; nil: it did

	known bool // table is what was there under print, or came after it
	reading
	// was is the reading before it, until something is written: what a repair is to put back.
	was   reading
	reads int // so far, be they answered from here
}

// reading is what was read, and under which hash.
type reading struct {
	print xtables.Print
	table Table
	at    time.Time // zero: there is none
}

// stands says whether a table of this hash is what was read.
func (r reading) stands(now xtables.Print) bool {
	return !r.at.IsZero() && r.print == now && time.Since(r.at) < trustPrint
}

func (k *Kernel) stand(f Family) *stand {
	if f == IPv6 {
		return &k.stand6
	}
	return &k.stand4
}

// isThere notes that a command of ours has read the table.
func (s *stand) isThere() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.there = true
}

// writing keeps the watch from looking until what it returns is called: what it would find is ours,
// and read back when it is written.
func (s *stand) writing() (ended func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.busy++
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.busy--
	}
}

// written is called when a write has ended and was read back.
func (s *stand) written() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.was = reading{} // a megabyte of 10,000 rules
}

// read is what save comes to, or the same as the last time where the table stands as it did then,
// or as the time before: a repair has put it back.
//
// The hash is made before the save. Who writes in between, or later, is found by the next look,
// which then differs.
func (s *stand) read(save func() (Table, error)) (Table, error) {
	defer s.writing()()
	s.mu.Lock()
	socket, there := s.socket, s.there
	s.mu.Unlock()
	if socket == nil {
		table, err := save()
		if err == nil {
			s.isThere()
		}
		return table, err
	}
	var before xtables.Print
	err := errUnasked
	if there {
		before, err = socket.Print("nat")
	}
	s.mu.Lock()
	s.reads++
	if there {
		s.noHash = lasting(err)
	}
	if err == nil && s.was.stands(before) {
		s.known, s.reading, s.was = true, s.was, reading{}
	}
	if err == nil && s.known && s.stands(before) {
		defer s.mu.Unlock()
		return s.table, nil
	}
	if s.was = (reading{}); s.known {
		s.was = s.reading
	}
	s.known = false
	s.mu.Unlock()
	table, saveErr := save()
	if saveErr != nil {
		return table, saveErr
	}
	after, infoErr := socket.Info("nat")
	s.mu.Lock()
	defer s.mu.Unlock()
	s.there = true
	s.known = err == nil && infoErr == nil && after == before.Info
	s.reading = reading{before, table, time.Now()}
	return table, nil
}

// watched opens the socket, until the returned function is called.
func (s *stand) watched(open func() (asked, error)) (ended func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.why = errUnasked
	socket, err := open()
	if err != nil {
		s.why = err
		return func() {}
	}
	s.socket = socket
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.socket, s.known, s.why, s.noHash = nil, false, errUnasked, nil
		s.reading, s.was = reading{}, reading{}
		socket.Close()
	}
}

// Watched says whether Watch tells of every change of the family's table. Where it does not, read
// the table now and then. why is what the kernel said when it was asked on legacy; nil: it was not
// yet.
func (k *Kernel) Watched(f Family) (told bool, why error) {
	if t, ok, _ := k.known(f); !ok || t.backend != Legacy {
		k.mu.Lock()
		defer k.mu.Unlock()
		return ok && k.listening, nil
	}
	s := k.stand(f)
	s.mu.Lock()
	defer s.mu.Unlock()
	if errors.Is(s.why, errUnasked) || s.socket == nil && s.why == nil {
		return false, nil
	}
	return s.why == nil, s.why
}

// pace says when the hash of a table is due.
type pace struct {
	due, soonest time.Time // without a hint, and with one
	hinted       bool
}

func (p *pace) wants(now time.Time) bool {
	return !now.Before(p.due) || p.hinted && !now.Before(p.soonest)
}

// asked notes that it was asked for, and what of a processor that took.
func (p *pace) asked(now time.Time, took time.Duration) {
	*p = pace{due: now.Add(max(printEvery, printShare*took)), soonest: now.Add(hintShare * took)}
}

// look is a watch's look at one table.
type look struct {
	family Family
	stand  *stand
	pace   pace
	told   bool
	what   differs // what was told last
}

// differs is a look that found another table than was read.
type differs struct {
	reads int // that there had been
	print xtables.Print
}

// changed asks the kernel, and says whether there is something to tell: the table is not as it was
// last read, and that was not told yet.
func (l *look) changed(now time.Time) bool {
	s := l.stand
	s.mu.Lock()
	socket, may := s.socket, s.there && s.busy == 0
	read, known := differs{s.reads, s.print}, s.known
	s.mu.Unlock()
	if socket == nil || !may {
		return false // a hint stays
	}
	is := differs{reads: read.reads}
	var err, noHash error
	is.print.Info, err = socket.Info("nat")
	moved := !known || is.print.Info != read.print.Info
	if err == nil && !moved && l.pace.wants(now) {
		var took time.Duration
		took, err = cpuTime(func() (err error) {
			is.print, err = socket.Print("nat")
			return err
		})
		l.pace.asked(now, took)
		noHash = err
		moved = is.print != read.print
	}
	if errors.Is(err, xtables.ErrBusy) {
		return false // the next look sees what came of it
	}
	s.mu.Lock()
	// Without a hash nothing that was read is known again: a read asks for one anew.
	s.noHash = cmp.Or(noHash, s.noHash)
	err = cmp.Or(err, s.noHash)
	s.why = err
	s.mu.Unlock()
	news := err == nil && moved && (!l.told || l.what != is)
	l.told, l.what = err == nil && moved, is
	return news
}

// lasting is the error of a print, but that of a table that others change just then.
func lasting(err error) error {
	if errors.Is(err, xtables.ErrBusy) {
		return nil
	}
	return err
}

// cpuTime is what of a processor a call took: on a busy machine it may have waited for longer.
func cpuTime(call func() error) (time.Duration, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var before, after unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &before); err != nil {
		return 0, err
	}
	if err := call(); err != nil {
		return 0, err
	}
	err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &after)
	return time.Duration(after.Nano() - before.Nano()), err
}
