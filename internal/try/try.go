// Package try makes one real connection, to see where the kernel leads it. It is the only place
// where the program makes traffic: one TCP handshake with an address that a person has named.
//
// The connection is made as a user, by whom the rules distinguish. Netfilter's owner match looks at
// the filesystem uid and gid with which its socket was made, and at nothing that comes later. So
// one thread takes on both for the call of socket(2) and ends then.
//
// What happened is read from the connection's own conntrack entry: who answers in it is where the
// first packet was led to. Neither end of the connection can tell: the client's own view of its
// peer is the address that it asked for, redirected or not.
//
// No byte is sent, and the connection is closed at once by FIN, as a TCP health check does it. What
// listens there sees a client that connects, says nothing and leaves: a service behind Envoy sees
// it only where Envoy proxies TCP, since then Envoy connects on before a byte has come. With a
// reset some servers would log an error.
//
// That it connects says that somebody accepts where it was led to. Behind a redirect this is Envoy,
// whether or not it reaches an endpoint.
//
// The package does not know what should have happened: [Compare] puts beside it what
// iptables.Table.Walk says.
package try

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/internal/conntrack"
)

// Limit bounds the wait for an answer to the connection. A second SYN leaves after one second, a
// third after three.
const Limit = 3 * time.Second

var (
	// ErrNotPermitted says that the caller may not make the connection as that user, or not read its
	// conntrack entry.
	ErrNotPermitted = errors.New("a real connection as a user needs root")
	// ErrInbound says that no connection from this machine can meet the rules for inbound ones.
	ErrInbound = errors.New("a connection from this machine never meets the rules for inbound ones: " +
		"table nat sees it in OUTPUT and not in PREROUTING; make one from another machine, e.g. with " +
		"`nc -vz ADDRESS PORT`, and look at its entry here with `conntrack -L -p tcp --dport PORT`")
	// ErrNoTarget says that nobody can connect to an address.
	ErrNoTarget = errors.New("no address and port to connect to")
)

// Ask is which connection to make: where to, and as whom.
type Ask struct {
	To       netip.AddrPort
	UID, GID uint32
}

// Led is where the kernel has led the first packet.
type Led uint8

const (
	Unseen    Led = iota // it could not be told: Outcome.Why
	Itself               // to the address that was asked for
	Here                 // to a port of this machine: Outcome.Port
	Elsewhere            // to another address
)

// Answer is what came back.
type Answer uint8

const (
	Connected   Answer = iota + 1
	Reset              // connected, and at once a reset came
	Refused            // a reset came
	Silent             // nothing came within the limit
	Unreachable        // no route, or an ICMP error said so
	Failed             // another error of connect(2)
)

func (a Answer) String() string {
	words := [...]string{"", "connected", "reset", "refused", "no answer", "unreachable", "failed"}
	if int(a) < len(words) {
		return words[a]
	}
	return "Answer(" + strconv.Itoa(int(a)) + ")"
}

// Outcome is what became of the connection.
type Outcome struct {
	Ask    Ask
	From   netip.AddrPort // its local address
	Answer Answer
	Err    error // of connect(2); nil: connected
	Took   time.Duration
	Led    Led
	// Where is the other end that the entry names; zero where there is none.
	Where netip.AddrPort
	local bool // Where is this machine's
	// Client is whom the other end takes it to come from: From, or what a rule or conntrack has
	// made of it, which gives another port where two redirected connections would look the same.
	Client netip.AddrPort
	State  string // the entry's state of TCP, e.g. "SYN_SENT"; "" where there is none
	Why    string // why Led is Unseen
}

// Port is the port of this machine that it was led to; 0: not to another one.
func (o Outcome) Port() uint16 {
	if o.Led != Here {
		return 0
	}
	return o.Where.Port()
}

// Connect makes the connection and reads its entry. It takes no longer than Limit and a second. An
// error says that no connection was made, or that its entry could not be read.
func Connect(ctx context.Context, ask Ask) (Outcome, error) {
	to := ask.To
	if !to.IsValid() || to.Port() == 0 || to.Addr().IsUnspecified() || to.Addr().IsMulticast() {
		return Outcome{}, fmt.Errorf("%w: %v", ErrNoTarget, to)
	}
	ask.To = netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
	// Everything is in the network namespace of one thread.
	type made struct {
		outcome Outcome
		err     error
	}
	result := make(chan made, 1)
	go func() {
		// Never unlocked: the thread, with its uid and without its groups, ends with this function.
		runtime.LockOSThread()
		o, err := connect(ctx, ask)
		result <- made{o, err}
	}()
	m := <-result
	return m.outcome, m.err
}

func connect(ctx context.Context, ask Ask) (Outcome, error) {
	// Whether entries may be read is found out before there is any traffic.
	opened, err := conntrack.ListenOpened()
	if err != nil {
		return Outcome{}, notPermitted(err)
	}
	defer opened.Close()
	fd, err := socketAs(ask)
	if err != nil {
		return Outcome{}, err
	}
	o := Outcome{Ask: ask}
	begun := time.Now()
	err = unix.Connect(fd, sockaddr(ask.To))
	if name, err := unix.Getsockname(fd); err == nil {
		o.From = addrPort(name)
	}
	// From here on the runtime's poller has it.
	socket := os.NewFile(uintptr(fd), "connection to "+ask.To.String())
	defer socket.Close()
	if errors.Is(err, unix.EINPROGRESS) {
		err = answer(ctx, socket)
	}
	o.Took = time.Since(begun)
	o.Answer, o.Err = answerOf(err), err
	if o.Answer == 0 {
		return Outcome{}, fmt.Errorf("connect to %v: %w", ask.To, err)
	}
	return o, o.look(ctx, opened)
}

// socketAs makes a socket that belongs to the user of ask.
func socketAs(ask Ask) (fd int, err error) {
	family := unix.AF_INET
	if ask.To.Addr().Is6() {
		family = unix.AF_INET6
	}
	if err := become(ask); err != nil {
		return 0, err
	}
	fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("make a socket: %w", err)
	}
	// What follows is done as before.
	if err := errors.Join(unix.Setfsuid(unix.Geteuid()), unix.Setfsgid(unix.Getegid())); err != nil {
		unix.Close(fd)
		return 0, fmt.Errorf("be root again: %w", err)
	}
	return fd, nil
}

// become makes the calling thread one of the user. The other threads stay what they are, for which
// the system calls themselves are used.
func become(ask Ask) error {
	uid, gid := int(ask.UID), int(ask.GID)
	if uid == unix.Getuid() && gid == unix.Getgid() {
		return nil
	}
	// A rule with --suppl-groups would see those of the caller.
	if _, _, errno := syscall.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0); errno != 0 {
		return fmt.Errorf("%w: connect as uid %d, gid %d: %w", ErrNotPermitted, uid, gid, errno)
	}
	// The kernel says nothing of a user that it refuses. Asked for one that there cannot be it tells
	// who it is.
	const nobody = -1
	err := errors.Join(unix.Setfsgid(gid), unix.Setfsuid(uid))
	isGID, errGID := unix.SetfsgidRetGid(nobody)
	isUID, errUID := unix.SetfsuidRetUid(nobody)
	if err := errors.Join(err, errGID, errUID); err != nil {
		return fmt.Errorf("connect as uid %d, gid %d: %w", uid, gid, err)
	}
	if isUID != uid || isGID != gid {
		return fmt.Errorf("%w: connect as uid %d, gid %d: the kernel left it at %d, %d", ErrNotPermitted,
			uid, gid, isUID, isGID)
	}
	return nil
}

// errLimit is the word for a connection that nobody has answered.
var errLimit = errors.New("no answer within the limit")

// answer waits for the connection to be made or refused.
func answer(ctx context.Context, socket *os.File) error {
	ctx, cancel := context.WithTimeoutCause(ctx, Limit, errLimit)
	defer cancel()
	raw, err := socket.SyscallConn()
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() {
		socket.SetWriteDeadline(time.Unix(1, 0)) //nolint:errcheck // a socket has deadlines
	})()
	var result error
	if err := raw.Write(func(fd uintptr) bool {
		var done bool
		done, result = connected(int(fd))
		return done
	}); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return err
	}
	return result
}

// connected says whether the socket has come to an end of its connecting, and to which.
func connected(fd int) (done bool, err error) {
	code, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil {
		return true, err
	}
	if code != 0 {
		return true, unix.Errno(code)
	}
	if _, err := unix.Getpeername(fd); errors.Is(err, unix.ENOTCONN) {
		return false, nil // not yet
	} else if err != nil {
		return true, err
	}
	return true, nil
}

// answerOf sorts the errors of connect(2); 0: no connection was tried.
func answerOf(err error) Answer {
	switch {
	case err == nil:
		return Connected
	case errors.Is(err, unix.ECONNRESET), errors.Is(err, unix.EPIPE):
		return Reset
	case errors.Is(err, unix.ECONNREFUSED):
		return Refused
	case errors.Is(err, errLimit), errors.Is(err, context.DeadlineExceeded),
		errors.Is(err, unix.ETIMEDOUT):
		return Silent
	case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EHOSTUNREACH):
		return Unreachable
	case errors.Is(err, context.Canceled):
		return 0
	}
	return Failed
}

// look reads the entry of the connection, and says by it where it was led to.
func (o *Outcome) look(ctx context.Context, opened *conntrack.Opened) error {
	to := netip.AddrPortFrom(o.Ask.To.Addr().WithZone(""), o.Ask.To.Port())
	from := netip.AddrPortFrom(o.From.Addr().WithZone(""), o.From.Port())
	// The caller's time may have run out with the connection's.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	entry, err := conntrack.Find(ctx, unix.IPPROTO_TCP, from, to)
	if errors.Is(err, conntrack.ErrNoEntry) {
		entry, err = opened.Find(unix.IPPROTO_TCP, from, to)
		entry.TCPState = 0 // of the first packet, and not of now
	}
	if errors.Is(err, conntrack.ErrNoEntry) || err == nil && entry.Src != from {
		o.withoutEntry()
		return nil
	}
	if err != nil {
		return notPermitted(err)
	}
	local, err := localTo(entry.ReplySrc.Addr())
	if err != nil {
		return err
	}
	o.fromEntry(entry, local)
	return nil
}

func (o *Outcome) fromEntry(e conntrack.Entry, local bool) {
	o.Where, o.Client, o.local, o.State = e.ReplySrc, e.ReplyDst, local, stateName(e.TCPState)
	switch {
	case !e.Redirected():
		o.Led = Itself
	case local:
		o.Led = Here
	default:
		o.Led = Elsewhere
	}
}

// withoutEntry says what it means that conntrack has no entry: it cannot give a connection another
// destination without one.
func (o *Outcome) withoutEntry() {
	if o.Answer == Connected || o.Answer == Reset {
		o.Led = Itself
		return
	}
	if n, err := readNumber("/proc/sys/net/netfilter/nf_conntrack_count"); err == nil && n == 0 {
		o.Led = Itself // conntrack is at rest: no rule that changes a destination is in
		return
	}
	o.Led = Unseen
	switch {
	case o.Answer == Unreachable:
		o.Why = "no packet left this machine"
	case o.Answer == Refused && eventsOff():
		o.Why = "its conntrack entry went with the refusal, and this kernel does not tell of new ones"
	default:
		o.Why = "it has no conntrack entry: a rule dropped or refused its first packet, or exempts it " +
			"from tracking"
	}
}

// eventsOff says whether this kernel tells nobody of new entries.
func eventsOff() bool {
	n, err := readNumber("/proc/sys/net/netfilter/nf_conntrack_events")
	return err != nil || n == 0
}

func readNumber(path string) (int, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(text)))
}

// localTo says whether an address is this machine's own.
func localTo(a netip.Addr) (bool, error) {
	if a.IsLoopback() {
		return true, nil
	}
	own, err := net.InterfaceAddrs()
	if err != nil {
		return false, fmt.Errorf("list addresses: %w", err)
	}
	for _, n := range own {
		if p, err := netip.ParsePrefix(n.String()); err == nil && p.Addr() == a {
			return true, nil
		}
	}
	return false, nil
}

// stateName is a state as conntrack(8) prints it (linux/netfilter/nf_conntrack_tcp.h).
func stateName(state uint8) string {
	names := [...]string{"", "SYN_SENT", "SYN_RECV", "ESTABLISHED", "FIN_WAIT", "CLOSE_WAIT",
		"LAST_ACK", "TIME_WAIT", "CLOSE", "SYN_SENT2"}
	if int(state) < len(names) {
		return names[state]
	}
	return strconv.Itoa(int(state))
}

func notPermitted(err error) error {
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		return fmt.Errorf("%w: %w", ErrNotPermitted, err)
	}
	return err
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	s := &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
	if zone := a.Addr().Zone(); zone != "" {
		if i, err := net.InterfaceByName(zone); err == nil {
			s.ZoneId = uint32(i.Index)
		} else if n, err := strconv.ParseUint(zone, 10, 32); err == nil {
			s.ZoneId = uint32(n)
		}
	}
	return s
}

func addrPort(s unix.Sockaddr) netip.AddrPort {
	switch s := s.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(s.Addr), uint16(s.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(s.Addr), uint16(s.Port))
	}
	return netip.AddrPort{}
}
