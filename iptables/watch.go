package iptables

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Event says that table nat may have changed. Events are hints: what is there is
// found out by reading.
type Event struct {
	Family Family // 0: either
	// Chains are those of ours and the built-in ones that were changed, sorted. Empty: any
	// may have been, read all.
	Chains []string
	// PID and Program are who did it, as the kernel tells on nft (Program has at most 15 bytes:
	// "iptables-restor"); 0 and "" on legacy. The pid is that of the machine's first pid namespace.
	PID     int
	Program string
	Own     bool // by a command of this Kernel
	Lost    bool // the kernel had more to say than we could take: read everything
	// At is when it came in: the receiver may have been busy since. Of merged ones, the first.
	At time.Time
}

// Watch sends an Event for each change of a chain of ours, of PREROUTING or OUTPUT in table nat,
// until ctx ends, and then closes the channel. On nft the kernel says so within milliseconds,
// whatever program did it, and changes of other tables and chains are left out here. On legacy it
// is asked (stand.go): an Event says that a family's table is not as it was last read, at once
// after a program let go of /run/xtables.lock, and from one that uses another lock within 0.1 s,
// or 5 s where the table is as large as before. What this Kernel wrote and read back is no event.
// See docs/design/facts.md#nft-tells-of-changes.
//
// Where the kernel may not be asked (Watched), an Event of legacy only means that a program opened
// and closed the lock, be it for looking: keep polling.
//
// The caller must keep receiving. What it is too slow for is merged into one Event with Lost set.
//
// Where no program has told its version yet, it is not known what to watch: it begins when one has,
// with an Event that is Lost. If it cannot begin then the channel is closed.
func (k *Kernel) Watch(ctx context.Context) (<-chan Event, error) {
	events := make(chan Event)
	if k.Backend() != "" {
		begin, err := k.beginWatch(ctx)
		if err != nil {
			return nil, err
		}
		go begin(newSender(ctx, events))
		return events, nil
	}
	go k.watchLater(ctx, events)
	return events, nil
}

// watchLater waits for a program that tells its version: the reads ask for it, too.
func (k *Kernel) watchLater(ctx context.Context, events chan<- Event) {
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for k.Backend() == "" {
		select {
		case <-ctx.Done():
			close(events)
			return
		case <-ticker.C:
		}
	}
	begin, err := k.beginWatch(ctx)
	if err != nil {
		close(events)
		return
	}
	s := newSender(ctx, events)
	s.put(Event{Lost: true}) // whatever was missed
	begin(s)
}

// beginWatch listens from when it returns, and what it returns sends what comes.
func (k *Kernel) beginWatch(ctx context.Context) (func(*sender), error) {
	nft, legacy := false, false
	k.mu.Lock()
	for _, t := range k.tools {
		nft = nft || t.backend == NFT
		legacy = legacy || t.backend == Legacy
	}
	k.mu.Unlock()
	if legacy && !nft {
		return k.startLegacy(ctx)
	}
	conn, err := k.dialWatch()
	if err != nil {
		return nil, err
	}
	k.listens(true)
	k.own.untold()
	return func(s *sender) {
		defer k.listens(false)
		k.watchNFT(ctx, conn, s)
	}, nil
}

// listens notes whether nft's notifications are listened to.
func (k *Kernel) listens(is bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.listening = is
}

// dialWatch joins the group before Watch returns, so that nothing between Watch and the caller's
// first read is missed.
func (k *Kernel) dialWatch() (*netlink.Conn, error) {
	conn, err := dialNetfilter()
	if err != nil {
		return nil, fmt.Errorf("watch nftables: %w", err)
	}
	// 10,000 rules in one transaction are 10,011 messages of 3 MB. Without CAP_NET_ADMIN it stays at
	// the system's limit, and large transactions end as Lost.
	if err := conn.SetReadBuffer(watchReceiveBytes); err != nil {
		conn.Close()
		return nil, fmt.Errorf("watch nftables: set receive buffer: %w", err)
	}
	if err := conn.JoinGroup(nfnlGroupNFTables); err != nil {
		conn.Close()
		return nil, fmt.Errorf("watch nftables: join group: %w", err)
	}
	return conn, nil
}

func (k *Kernel) watchNFT(ctx context.Context, conn *netlink.Conn, s *sender) {
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	var batch batch
	for {
		messages, err := conn.Receive()
		switch {
		case ctx.Err() != nil:
			return
		case errors.Is(err, unix.ENOBUFS):
			batch.clear()
			s.put(Event{Lost: true})
			continue
		case err != nil:
			// Nothing else is expected here; whatever it is, the caller must not take silence
			// for "nothing changed".
			s.put(Event{Lost: true})
			select {
			case <-ctx.Done():
				return
			case <-time.After(time.Second):
			}
			continue
		}
		for _, m := range messages {
			if done := batch.add(m); done {
				for _, e := range batch.events() {
					s.put(k.whose(e))
				}
				batch.clear()
			}
		}
	}
}

// whose is the event with what is known of who did it. The kernel tells pids of the machine's
// first pid namespace: in another one (a container, a box) ours are not known by them. There
// each of our writes makes one write to its family by a program that we use ours, while it goes
// on and shortly after. Of two it cannot be told which was ours, so the second says that
// anything may have changed.
func (k *Kernel) whose(e Event) Event {
	switch {
	case k.machine.firstPIDs():
		e.Own = k.own.has(e.PID)
	case !k.restores(e.Program):
	case k.own.claim(e.Family):
		e.Own = true
	case k.own.active(claimFor):
		e.Chains, e.Lost = nil, true
	}
	return e
}

// claimFor is for how long after one of our writes the kernel's word of it may come, where it is
// not known by its pid.
const claimFor = time.Second

// restores says whether a program has the name of one that we write by.
func (k *Kernel) restores(program string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, t := range k.tools {
		name := filepath.Base(t.restore)
		if program == name[:min(len(name), commLength)] {
			return true
		}
	}
	return false
}

// commLength is how much of a program's name the kernel keeps.
const commLength = 15

var inFirstPIDNamespace = sync.OnceValue(func() bool {
	link, err := os.Readlink("/proc/self/ns/pid")
	return err != nil || link == "pid:[4026531836]" // PROC_PID_INIT_INO
})

// sender stands between the socket, which must be read without a pause, and the caller, who
// may be busy with a pass.
type sender struct {
	mu      sync.Mutex
	pending []Event
	more    chan struct{} // one slot: something is pending
}

// pendingEvents is how many events wait for the caller; past that they become one that says so.
const pendingEvents = 256

func newSender(ctx context.Context, events chan<- Event) *sender {
	s := &sender{more: make(chan struct{}, 1)}
	go s.run(ctx, events)
	return s
}

// put never blocks. An event like the last one waiting adds nothing to it: a program that changes
// the same chain a hundred times a second is one event a pass.
func (s *sender) put(e Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e.At = time.Now()
	switch n := len(s.pending); {
	case n > 0 && s.pending[n-1].same(e):
	case n >= pendingEvents:
		s.pending = append(s.pending[:0], Event{Lost: true, At: s.pending[0].At})
	default:
		s.pending = append(s.pending, e)
	}
	select {
	case s.more <- struct{}{}:
	default:
	}
}

func (s *sender) run(ctx context.Context, events chan<- Event) {
	defer close(events)
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.more:
		}
		for {
			s.mu.Lock()
			if len(s.pending) == 0 {
				s.mu.Unlock()
				break
			}
			e := s.pending[0]
			s.pending = slices.Delete(s.pending, 0, 1)
			s.mu.Unlock()
			select {
			case events <- e:
			case <-ctx.Done():
				return
			}
		}
	}
}

func (e Event) same(other Event) bool {
	return e.Family == other.Family && e.PID == other.PID && e.Program == other.Program &&
		e.Own == other.Own &&
		e.Lost == other.Lost && slices.Equal(e.Chains, other.Chains)
}

// batch collects the messages of one transaction, which the kernel ends by NEWGEN with the
// writer's pid and name.
type batch struct {
	chains  map[Family][]string
	whole   map[Family]bool
	pid     int
	program string
}

func (b *batch) clear() { *b = batch{} }

// add takes one message and says whether it ended the transaction.
func (b *batch) add(m netlink.Message) (done bool) {
	if uint16(m.Header.Type)>>8 != nfnlSubsysNFTables || len(m.Data) < nfgenmsgLen {
		return false
	}
	kind := byte(m.Header.Type)
	if kind == nftMsgNewGen {
		if attributes, err := nftAttributes(m); err == nil {
			for attributes.Next() {
				switch attributes.Type() {
				case nftaGenProcPID:
					b.pid = int(attributes.Uint32())
				case nftaGenProcName:
					b.program = attributes.String()
				}
			}
		}
		return true
	}
	var family Family
	switch m.Data[0] {
	case IPv4.nfproto():
		family = IPv4
	case IPv6.nfproto():
		family = IPv6
	default:
		return false
	}
	var tableAttribute, chainAttribute uint16
	switch kind {
	case nftMsgNewRule, nftMsgDelRule:
		tableAttribute, chainAttribute = nftaRuleTable, nftaRuleChain
	case nftMsgNewChain, nftMsgDelChain:
		tableAttribute, chainAttribute = nftaChainTable, nftaChainName
	case nftMsgNewTable, nftMsgDelTable:
		tableAttribute = nftaTableName
	default:
		return false
	}
	// The wanted attributes come first; the expressions behind them are not looked at.
	attributes, err := nftAttributes(m)
	if err != nil {
		return false
	}
	table, chain := "", ""
	for attributes.Next() {
		switch attributes.Type() {
		case tableAttribute:
			table = attributes.String()
		case chainAttribute:
			chain = attributes.String()
		}
		if table != "" && (chain != "" || chainAttribute == 0) {
			break
		}
	}
	if table != "nat" {
		return false
	}
	if chainAttribute == 0 {
		if b.whole == nil {
			b.whole = map[Family]bool{}
		}
		b.whole[family] = true
		return false
	}
	if !isOurs(chain) && !isJumpSite(chain) {
		return false
	}
	if b.chains == nil {
		b.chains = map[Family][]string{}
	}
	// a chain's rules come in a row
	if seen := b.chains[family]; len(seen) == 0 || seen[len(seen)-1] != chain {
		b.chains[family] = append(seen, chain)
	}
	return false
}

func (b *batch) events() []Event {
	var events []Event
	for _, f := range families {
		chains := b.chains[f]
		if b.whole[f] {
			chains = nil
		} else if len(chains) == 0 {
			continue
		}
		slices.Sort(chains)
		events = append(
			events, Event{Family: f, Chains: slices.Compact(chains), PID: b.pid, Program: b.program})
	}
	return events
}

// watchLock watches the lock file being closed. iptables-legacy has made it by
// now: Open has run one.
func watchLock() (*os.File, error) {
	path := lockPath()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("watch %q: %w", path, err)
	}
	if _, err := unix.InotifyAddWatch(
		fd, path, unix.IN_CLOSE_WRITE|unix.IN_CLOSE_NOWRITE); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("watch %q: %w", path, err)
	}
	return os.NewFile(uintptr(fd), "inotify"), nil
}

// startLegacy begins the watch of legacy's tables. The lock alone is enough, and so is the kernel's
// answer.
func (k *Kernel) startLegacy(ctx context.Context) (func(*sender), error) {
	pulse, err := newPulse(infoEvery)
	if err != nil {
		return nil, err
	}
	var looks []*look
	ends := []func(){pulse.close}
	answers := false
	for _, f := range families {
		l := &look{family: f, stand: k.stand(f)}
		ends = append(ends, l.stand.watched(func() (asked, error) {
			if k.machine.asked == nil {
				return nil, ErrCouldNotLook
			}
			return k.machine.asked(f)
		}))
		l.changed(time.Now()) // so that it is known whether it answers
		told, _ := k.Watched(f)
		answers = answers || told
		looks = append(looks, l)
	}
	end := func() {
		for _, end := range ends {
			end()
		}
	}
	hints := &hints{}
	file, err := watchLock()
	switch {
	case err == nil:
		go hints.read(ctx, file, pulse)
	case !answers:
		end()
		return nil, err
	}
	return func(s *sender) {
		defer end()
		defer context.AfterFunc(ctx, pulse.close)()
		k.watchLegacy(pulse, looks, hints, s)
	}, nil
}

// hints tell that the lock was closed: nobody who writes with it has it by then.
type hints struct{ came atomic.Bool }

func (h *hints) read(ctx context.Context, inotify *os.File, pulse *pulse) {
	defer inotify.Close()
	stop := context.AfterFunc(ctx, func() { _ = inotify.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	buffer := make([]byte, 4096)
	for {
		if _, err := inotify.Read(buffer); err != nil {
			return // the tables are asked all the same
		}
		h.came.Store(true)
		pulse.now()
	}
}

func (k *Kernel) watchLegacy(pulse *pulse, looks []*look, hints *hints, s *sender) {
	for pulse.wait() {
		hinted := hints.came.Swap(false)
		for _, l := range looks {
			l.pace.hinted = l.pace.hinted || hinted
			if l.changed(time.Now()) {
				s.put(Event{Family: l.family})
			}
			if _, why := k.Watched(l.family); hinted && why != nil {
				// The close of our own command comes while it runs or right after it.
				s.put(Event{Family: l.family, Own: k.own.active(50 * time.Millisecond)})
			}
		}
	}
}
