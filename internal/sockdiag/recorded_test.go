package sockdiag

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"testing"

	"github.com/mdlayher/netlink"
	"github.com/mdlayher/netlink/nltest"
	"golang.org/x/sys/unix"
)

// What the kernel answers about sockets that one user cannot make, or not without waiting, is
// recorded in testdata/recorded.json: questions and answers of Linux 6.18 in a network namespace of
// its own. TestRecorded (tag kernel) makes these sockets, recorded the file, and asks the kernel it
// runs on the same as TestReplay asks the recording.

// exchange is one question to the kernel and its answer.
type exchange struct {
	Question []byte
	Dump     bool
	Errno    int      `json:",omitempty"`
	Answers  [][]byte `json:",omitempty"`
}

const recordedFile = "testdata/recorded.json"

// The users who made the recorded sockets.
const (
	proxy       = 107
	foreign4711 = 4711
)

func at(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// askRecorded holds a kernel, real or recorded, against what was made.
func askRecorded(t *testing.T, c *netlink.Conn) {
	t.Helper()
	for _, tt := range []struct {
		protocol, state uint8
		port            uint16
		want            []Listener
	}{
		{unix.IPPROTO_TCP, tcpListen, 15001, []Listener{
			{Addr: at("127.0.0.1:15001"), UID: proxy}, {Addr: at("127.0.0.2:15001"), UID: foreign4711},
			{Addr: at("[::]:15001"), UID: proxy, V6Only: true, Device: 1},
		}},
		{unix.IPPROTO_TCP, tcpListen, 15012, []Listener{{Addr: at("[::]:15012"), UID: proxy}}},
		{unix.IPPROTO_TCP, tcpListen, 15099, nil},
		{unix.IPPROTO_UDP, tcpClose, 15053, []Listener{{Addr: at("127.0.0.1:15053"), UID: proxy}, {Addr: at("[::]:15053"), UID: foreign4711, V6Only: true}}},
	} {
		have, err := list(c, tt.protocol, tt.state, tt.port)
		slices.SortFunc(have, func(a, b Listener) int { return a.Addr.Compare(b.Addr) })
		if err != nil || !slices.Equal(have, tt.want) {
			t.Errorf("protocol %d, port %d: %+v, %v\nwant %+v", tt.protocol, tt.port, have, err, tt.want)
		}
	}
	for _, tt := range []struct {
		name           string
		server, client string
		uid            uint32
		err            error
	}{
		{"accepted", "127.0.0.1:15010", "127.0.0.1:40001", foreign4711, nil},
		{"not accepted yet", "127.0.0.1:15010", "127.0.0.1:40002", proxy, nil},
		{"closed by the client", "127.0.0.1:15010", "127.0.0.1:40003", foreign4711, nil},
		{"closed by the client, not accepted", "127.0.0.1:15010", "127.0.0.1:40004", 0, ErrNoPeer},
		{"closed by both, the server first", "127.0.0.1:15010", "127.0.0.1:40005", 0, ErrNoPeer},
		{"closed by the server", "127.0.0.1:15010", "127.0.0.1:40006", 0, ErrNoPeer},
		{"no connection but a listener", "127.0.0.1:15010", "127.0.0.1:40007", 0, ErrNoPeer},
		{"waiting for data (TCP_DEFER_ACCEPT)", "127.0.0.1:15011", "127.0.0.1:40018", proxy, nil},
		{"IPv4 to a dual-stack listener", "127.0.0.1:15012", "127.0.0.1:40001", foreign4711, nil},
		{"IPv6", "[::1]:15012", "[::1]:40001", foreign4711, nil},
		{"IPv6 to the IPv4 connection's ports", "[::1]:15010", "[::1]:40001", 0, ErrNoPeer},
		{"nothing at all", "127.0.0.1:15099", "127.0.0.1:40001", 0, ErrNoPeer},
	} {
		uid, err := peerOwner(c, at(tt.client), at(tt.server))
		if uid != tt.uid || !errors.Is(err, tt.err) || tt.err == nil && err != nil {
			t.Errorf("%s: uid %d, %v; want %d, %v", tt.name, uid, err, tt.uid, tt.err)
		}
	}
	for _, tt := range []struct {
		addr string
		want string
	}{
		{"127.0.0.1:15001", "[107] <nil>"},
		{"127.0.0.2:15001", "[4711] <nil>"},
		{"[::1]:15001", "[107] <nil>"},
		{"127.0.0.3:15001", "[] look up owner of 127.0.0.3:15001: no listening socket"},
		{"127.0.0.3:15012", "[107] <nil>"},
	} {
		if uids, err := owners(c, at(tt.addr)); fmt.Sprint(uids, " ", err) != tt.want {
			t.Errorf("owners of %s: %v %v, want %s", tt.addr, uids, err, tt.want)
		}
	}
}

// readRecorded is a kernel that answers as recorded.
func readRecorded(t *testing.T) (all []exchange) {
	t.Helper()
	b, err := os.ReadFile(recordedFile)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &all); err != nil {
		t.Fatal(err)
	}
	return all
}

func replay(t *testing.T, all []exchange) nltest.Func {
	return func(reqs []netlink.Message) ([]netlink.Message, error) {
		if len(reqs) != 1 {
			t.Fatalf("%d questions at once", len(reqs))
		}
		for _, e := range all {
			if bytes.Equal(e.Question, reqs[0].Data) && e.flags() == reqs[0].Header.Flags &&
				reqs[0].Header.Type == 20 {
				return e.answer(reqs)
			}
		}
		t.Fatalf("no recorded answer to %+v", reqs[0])
		return nil, nil
	}
}

func (e exchange) flags() netlink.HeaderFlags {
	if e.Dump {
		return netlink.Request | netlink.Dump
	}
	return netlink.Request
}

func (e exchange) answer(reqs []netlink.Message) (msgs []netlink.Message, err error) {
	if e.Errno != 0 {
		return nltest.Error(e.Errno, reqs)
	}
	for _, a := range e.Answers {
		msgs = append(msgs,
			netlink.Message{Header: netlink.Header{Type: sockDiagByFamily, Sequence: reqs[0].Header.Sequence,
				PID: reqs[0].Header.PID}, Data: a})
	}
	if e.Dump { // the last ends it
		return nltest.Multipart(
			append(msgs, netlink.Message{Header: netlink.Header{Type: netlink.Done, Flags: netlink.Multi},
				Data: make([]byte, 4)}))
	}
	return msgs, nil
}

func TestReplay(t *testing.T) {
	c := nltest.Dial(replay(t, readRecorded(t)))
	defer c.Close()
	askRecorded(t, c)
}

// script is a kernel that gives these answers, one after the other.
func script(t *testing.T, errs ...error) func(more ...[][]byte) *netlink.Conn {
	return func(more ...[][]byte) *netlink.Conn {
		n := 0
		c := nltest.Dial(func(reqs []netlink.Message) ([]netlink.Message, error) {
			defer func() { n++ }()
			if n < len(errs) && errs[n] != nil {
				return nil, errs[n]
			}
			if n >= len(more) {
				t.Fatalf("asked for a %d. answer", n+1)
			}
			return exchange{Dump: reqs[0].Header.Flags == netlink.Request|netlink.Dump,
				Answers: more[n]}.answer(reqs)
		})
		t.Cleanup(func() { c.Close() })
		return c
	}
}

// recordedAnswer is what the kernel answered to the question for a connection, or for
// the listeners of a port.
func recordedAnswer(t *testing.T, ask func(c *netlink.Conn)) (answers [][][]byte) {
	t.Helper()
	all := readRecorded(t)
	c := nltest.Dial(func(reqs []netlink.Message) ([]netlink.Message, error) {
		for _, e := range all {
			if bytes.Equal(e.Question, reqs[0].Data) {
				answers = append(answers, e.Answers)
				return e.answer(reqs)
			}
		}
		return nil, unix.ENOENT
	})
	defer c.Close()
	ask(c)
	return answers
}

// TestPeerOwnerWhileAccepted: between two questions the connection may be accepted, or its listener
// closed; then who listened is not who answers.
func TestPeerOwnerWhileAccepted(t *testing.T) {
	server, accepted, waiting := at("127.0.0.1:15010"), at("127.0.0.1:40001"), at("127.0.0.1:40002")
	// The answers for one port of the client serve as those for another: it is what
	// they are recorded under.
	first := recordedAnswer(t, func(c *netlink.Conn) { established(c, server, waiting) })[0]
	listeners := recordedAnswer(t, func(c *netlink.Conn) {
		list(c, unix.IPPROTO_TCP, tcpListen, server.Port())
	})
	later := slices.Clone(recordedAnswer(t, func(c *netlink.Conn) {
		established(c, server, accepted)
	})[0])
	later[0] = slices.Clone(later[0])
	copy(later[0][6:8], first[0][6:8]) // idiag_dport
	uid, err := peerOwner(script(t)(first, listeners[0], listeners[1], later), waiting, server)
	if uid != foreign4711 || err != nil {
		t.Errorf("accepted meanwhile: %d, %v; want the acceptor, %d", uid, err, foreign4711)
	}
	if uid, err := peerOwner(script(t, nil, nil, nil, unix.ENOENT)(first, listeners[0], listeners[1]),
		waiting, server); !errors.Is(err, ErrNoPeer) {
		t.Errorf("reset meanwhile: %d, %v", uid, err)
	}
	uid, err = peerOwner(script(t)(first, nil, nil), waiting, server)
	if !errors.Is(err, ErrNoListener) {
		t.Errorf("its listener closed meanwhile: %d, %v", uid, err)
	}
	// An established socket of another connection is none of ours.
	if s, err := established(script(t)(later), server, accepted); !errors.Is(err, ErrNoPeer) {
		t.Errorf("the answer for another client: %+v, %v", s, err)
	}
	s, err := established(script(t)(later), at("127.0.0.2:15010"), waiting)
	if !errors.Is(err, ErrNoPeer) {
		t.Errorf("the answer for another server: %+v, %v", s, err)
	}
}

// TestKernelCannotBeAsked: only a missing IPv6 is no error. These answers are not recorded but
// what netlink(7) says.
func TestKernelCannotBeAsked(t *testing.T) {
	listeners := recordedAnswer(t, func(c *netlink.Conn) {
		list(c, unix.IPPROTO_TCP, tcpListen, 15010)
	})
	for _, tt := range []struct {
		name string
		errs []error
		n    int
		want error
	}{
		{"without IPv6", []error{nil, unix.ENOENT}, len(listeners[0]), nil},
		{"without IPv4", []error{unix.ENOENT}, 0, unix.ENOENT},
		{"IPv4 refused", []error{unix.EPERM}, 0, unix.EPERM},
		{"IPv6 refused", []error{nil, unix.EPERM}, 0, unix.EPERM},
	} {
		have, err := list(script(t, tt.errs...)(listeners...), unix.IPPROTO_TCP, tcpListen, 15010)
		if len(have) != tt.n || !errors.Is(err, tt.want) || tt.want == nil && err != nil {
			t.Errorf("%s: %v, %v", tt.name, have, err)
		}
	}
	if _, err := established(script(t, unix.EPERM)(), at("127.0.0.1:1"),
		at("127.0.0.1:2")); !errors.Is(err, unix.EPERM) || errors.Is(err, ErrNoPeer) {
		t.Errorf("a connection that may not be looked up: %v", err)
	}
	if _, err := owner(script(t, unix.EPERM)(), at("127.0.0.1:1")); !errors.Is(err, unix.EPERM) ||
		errors.Is(err, ErrNoListener) {
		t.Errorf("an owner that may not be looked up: %v", err)
	}
}

// TestKernelAnswersAnother: rows of another port or state than were asked for decide nothing, and
// half a row is an error.
func TestKernelAnswersAnother(t *testing.T) {
	listeners := recordedAnswer(t, func(c *netlink.Conn) {
		list(c, unix.IPPROTO_TCP, tcpListen, 15010)
	})
	if len(listeners[0]) == 0 {
		t.Fatal("nothing listens on 15010 in the recording")
	}
	if have, err := list(script(t)(listeners...), unix.IPPROTO_TCP, tcpListen, 15011); len(have) > 0 ||
		err != nil {
		t.Errorf("of another port: %v, %v", have, err)
	}
	if have, err := list(script(t)(listeners...), unix.IPPROTO_TCP, tcpClose, 15010); len(have) > 0 ||
		err != nil {
		t.Errorf("in another state: %v, %v", have, err)
	}
	row := listeners[0][0]
	for n := range len(row) {
		have, err := list(script(t)([][]byte{row[:n]}, nil), unix.IPPROTO_TCP, tcpListen, 15010)
		if n < messageLen && err == nil || err != nil && len(have) > 0 {
			t.Fatalf("cut to %d of %d bytes: %v, %v", n, len(row), have, err)
		}
	}
	// shorter than its header; two bytes for one
	for _, bad := range [][]byte{{3, 0, 1, 0}, {6, 0, attrV6Only, 0, 1, 1}} {
		if have, err := list(script(t)([][]byte{append(slices.Clone(row[:messageLen]), bad...)}, nil),
			unix.IPPROTO_TCP, tcpListen, 15010); err == nil {
			t.Errorf("attribute %v: %v and no error", bad, have)
		}
	}
	if _, err := unmarshal(row[:messageLen]); err != nil {
		t.Errorf("a row without attributes: %v", err)
	}
}

// TestNoTimeLimit: nobody is asked without one.
func TestNoTimeLimit(t *testing.T) {
	closed := false
	if c, err := limited(netlink.NewConn(timeless{closed: &closed}, 0)); c != nil ||
		err == nil || !closed {
		t.Errorf("a socket that takes no time limit: %v, %v, closed: %v", c, err, closed)
	}
}

// timeless is a netlink socket without SetDeadline, which the kernel's have.
type timeless struct {
	netlink.Socket
	closed *bool
}

func (s timeless) Close() error {
	*s.closed = true
	return nil
}

// TestErrorsSay: what users read of it.
func TestErrorsSay(t *testing.T) {
	for want, err := range map[string]error{
		"no listening socket": ErrNoListener,
		"the peer is no open socket of this network namespace": ErrNoPeer,
		"a socket of uid 4711 listens on 127.0.0.1:1":          &ForeignError{at("127.0.0.1:1"), 4711},
		"sockets of several users [1 2] listen on 127.0.0.1:1": &SeveralOwnersError{at("127.0.0.1:1"), []uint32{1, 2}},
	} {
		if err.Error() != want {
			t.Errorf("%q, want %q", err, want)
		}
	}
}
