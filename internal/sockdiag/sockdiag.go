// Package sockdiag says who owns a TCP or UDP socket on this machine, asked of the kernel by
// netlink (sock_diag(7), the interface behind ss).
//
// Two decisions rest on it: rules may send traffic to an interception port only while the socket
// that would accept it belongs to the proxy's user, and an answer of Envoy's admin port counts only
// when that user (or root) gave it. Any local user can bind a port above 1023 while Envoy is down,
// so a port number alone proves nothing. See docs/design/facts.md#anybody-may-listen.
//
// The kernel is asked, not /proc: /proc/net/tcp costs a read of every socket, and the links in
// /proc/PID/fd of other users are hidden under ProtectProc=invisible. No capability is needed.
// Every call opens a netlink socket of its own in the network namespace of the calling thread and
// ends within a second. See docs/design/facts.md#systemd-hides-processes.
//
// It does not say which process holds a socket, and does not look at other namespaces or at ports
// handed over by systemd socket activation (those belong to root, who made them). A uid from a user
// namespace that is not an ancestor of ours reads as the overflow uid, 65534.
//
// Next in the flow: package agent, which asks here who listens on Envoy's ports.
package sockdiag

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// ErrNoListener says that no TCP socket listens where one was looked for.
var ErrNoListener = errors.New("no listening socket")

// ErrNoPeer says that the other end of a connection is not a live socket of this network namespace:
// it is remote, or already closed.
var ErrNoPeer = errors.New("the peer is no open socket of this network namespace")

// SeveralOwnersError says that sockets of more than one user listen on one address, so that no one
// can tell who gets the next connection.
type SeveralOwnersError struct {
	Addr netip.AddrPort
	UIDs []uint32 // ascending, at least two
}

func (e *SeveralOwnersError) Error() string {
	return fmt.Sprintf("sockets of several users %v listen on %v", e.UIDs, e.Addr)
}

// ForeignError says that a user who should not does own a socket.
type ForeignError struct {
	Addr netip.AddrPort // zero: it is a Unix socket
	UID  uint32
}

func (e *ForeignError) Error() string {
	if !e.Addr.IsValid() {
		return fmt.Sprintf("uid %d listens on the socket", e.UID)
	}
	return fmt.Sprintf("a socket of uid %d listens on %v", e.UID, e.Addr)
}

// Listener is one TCP socket in state LISTEN, or one UDP socket that takes datagrams from anybody.
type Listener struct {
	// an IPv4 address is never in its IPv4-mapped form; 0.0.0.0 and :: are the wildcards
	Addr   netip.AddrPort
	V6Only bool   // of an IPv6 socket: it takes no IPv4 connections
	Device uint32 // index of the interface it is bound to (SO_BINDTODEVICE); 0: any
	UID    uint32
}

// timeLimit bounds one question to the kernel. The dump of one port takes well under a millisecond;
// a second is for a machine out of breath.
const timeLimit = time.Second

// owner is the uid of the TCP listening socket that would accept a connection to addr. Sockets that
// share the address (SO_REUSEPORT) must all have one owner: else the error is a
// *[SeveralOwnersError].
func owner(c *netlink.Conn, addr netip.AddrPort) (uint32, error) {
	uids, err := owners(c, addr)
	if err != nil {
		return 0, err
	}
	if len(uids) > 1 {
		return 0, &SeveralOwnersError{Addr: addr, UIDs: uids}
	}
	return uids[0], nil
}

// OwnedBy is nil when every socket that could accept a connection to addr belongs to one of the
// uids. Otherwise the error is [ErrNoListener], a *[ForeignError] with a uid that is not among
// them, or that the kernel could not be asked.
//
// As in the kernel an exact address beats the wildcard, and a wildcard IPv6 socket
// takes IPv4 connections unless it is v6only. An unspecified address means loopback, as
// it does for connect(2).
//
//	err := sockdiag.OwnedBy(netip.MustParseAddrPort("127.0.0.1:15001"), 0, envoy)
func OwnedBy(addr netip.AddrPort, uids ...uint32) error {
	c, err := dial()
	if err != nil {
		return err
	}
	defer c.Close()
	have, err := owners(c, addr)
	if err != nil {
		return err
	}
	for _, uid := range have {
		if !slices.Contains(uids, uid) {
			return &ForeignError{Addr: addr, UID: uid}
		}
	}
	return nil
}

// Listeners are the TCP sockets that listen on port, of both families. None is not an error.
func Listeners(port uint16) ([]Listener, error) {
	return dialList(unix.IPPROTO_TCP, tcpListen, port)
}

// UDPListeners are the unconnected UDP sockets bound to port, of both families. None is not an
// error; a kernel without the module udp_diag is.
func UDPListeners(port uint16) ([]Listener, error) {
	return dialList(unix.IPPROTO_UDP, tcpClose, port)
}

func dialList(protocol, state uint8, port uint16) ([]Listener, error) {
	c, err := dial()
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return list(c, protocol, state, port)
}

func list(c *netlink.Conn, protocol, state uint8, port uint16) ([]Listener, error) {
	var all []Listener
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		q := request{protocol: protocol, family: family, states: 1 << state, id: sockID{localPort: port}}
		socks, err := ask(c, q, netlink.Dump)
		if errors.Is(err, unix.ENOENT) && family == unix.AF_INET6 {
			continue // a kernel without IPv6
		}
		if err != nil {
			return nil, fmt.Errorf("list listening sockets on port %d: %w", port, err)
		}
		for _, s := range socks {
			// The kernel filters; checked because a wrong row here would be a wrong decision on trust.
			if s.state != state || s.local.Port() != port {
				continue
			}
			all = append(all, Listener{Addr: s.local, V6Only: s.v6only, Device: s.device, UID: s.uid})
		}
	}
	return all, nil
}

// PeerOwner says which uid owns the other end of a connection made to a listener of this machine.
//
// Until the other side has accepted the connection its socket belongs to nobody and reads as uid 0:
// then the owner of the listener it waits in answers, provided that it still waits there
// afterwards. Once closed the end belongs to nobody, and to be believed would need only a quick
// close: the error is [ErrNoPeer]. So ask while the answer is still to come, not after its end.
// See docs/design/facts.md#not-accepted-is-nobodys.
//
// c must be TCP; for a Unix socket ask PeerOfUnix.
func PeerOwner(c net.Conn) (uint32, error) {
	local, err := addrPort(c.LocalAddr())
	if err != nil {
		return 0, err
	}
	remote, err := addrPort(c.RemoteAddr())
	if err != nil {
		return 0, err
	}
	nl, err := dial()
	if err != nil {
		return 0, err
	}
	defer nl.Close()
	return peerOwner(nl, local, remote)
}

func peerOwner(nl *netlink.Conn, local, remote netip.AddrPort) (uint32, error) {
	s, err := established(nl, remote, local)
	if err != nil {
		return 0, err
	}
	if s.inode != 0 {
		return s.uid, nil
	}
	uid, err := owner(nl, remote)
	if err != nil {
		return 0, err
	}
	// A listener that is closed resets what waits in its queue. So if the connection still waits,
	// the listener just seen is the one it waits in; if it has been accepted meanwhile, the
	// acceptor's uid is known.
	s, err = established(nl, remote, local)
	if err != nil {
		return 0, err
	}
	if s.inode != 0 {
		return s.uid, nil
	}
	return uid, nil
}

// established is the open socket whose own address is local and whose peer is remote.
func established(c *netlink.Conn, local, remote netip.AddrPort) (socket, error) {
	family := uint8(unix.AF_INET6)
	if local.Addr().Is4() {
		family = unix.AF_INET // finds IPv6 sockets that serve IPv4, too
	}
	q := request{protocol: unix.IPPROTO_TCP, family: family, states: ^uint32(0), id: sockID{
		localPort: local.Port(), remotePort: remote.Port(),
		local: local.Addr(), remote: remote.Addr(),
	}}
	socks, err := ask(c, q, 0)
	if errors.Is(err, unix.ENOENT) {
		return socket{}, ErrNoPeer
	}
	if err != nil {
		return socket{}, fmt.Errorf("look up socket %v: %w", local, err)
	}
	for _, s := range socks {
		// The look-up falls back to the listener, and finds TIME_WAIT and SYN_RECV
		// entries, which read as uid 0.
		if s.local != local || s.remote != remote {
			continue
		}
		switch {
		case s.state == tcpEstablished, s.state == tcpCloseWait && s.inode != 0:
			return s, nil
		case s.state == tcpSynRecv:
			// Our end is connected already; theirs waits for the last ACK or for room in the queue.
			// Nobody has accepted it.
			s.inode = 0
			return s, nil
		}
	}
	return socket{}, ErrNoPeer
}

// owners are the distinct uids, ascending and never none, of the sockets that would accept
// a connection to addr.
func owners(c *netlink.Conn, addr netip.AddrPort) ([]uint32, error) {
	l, err := list(c, unix.IPPROTO_TCP, tcpListen, addr.Port())
	if err != nil {
		return nil, err
	}
	uids := Accepting(l, addr.Addr())
	if len(uids) == 0 {
		return nil, fmt.Errorf("look up owner of %v: %w", addr, ErrNoListener)
	}
	return uids, nil
}

// Accepting picks among listeners on one port those the kernel would choose from for a connection
// to addr (inet_lookup_listener: first by exact address, then the wildcards), and returns their
// uids, ascending and each once. Sockets bound to a device count as candidates, since it is not
// known where the connection will come in.
func Accepting(listeners []Listener, addr netip.Addr) []uint32 {
	addr = addr.Unmap().WithZone("")
	switch addr {
	case netip.IPv4Unspecified():
		addr = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	case netip.IPv6Unspecified():
		addr = netip.IPv6Loopback()
	}
	var exact, wild []uint32
	for _, l := range listeners {
		switch a := l.Addr.Addr(); {
		case a == addr:
			exact = append(exact, l.UID)
		case a.IsUnspecified() && (a.Is4() == addr.Is4() || a.Is6() && !l.V6Only):
			wild = append(wild, l.UID)
		}
	}
	uids := exact
	if len(uids) == 0 {
		uids = wild
	}
	slices.Sort(uids)
	return slices.Compact(uids)
}

func addrPort(a net.Addr) (netip.AddrPort, error) {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}, fmt.Errorf("look up peer of %v: not a TCP connection", a)
	}
	ap := t.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port()), nil
}

// States of include/net/tcp_states.h.
const (
	tcpEstablished = 1
	// of a request socket, too, whose own state is TCP_NEW_SYN_RECV (tcp_req_diag_fill)
	tcpSynRecv   = 3
	tcpClose     = 7 // of UDP: not connected
	tcpCloseWait = 8
	tcpListen    = 10
)

const (
	sockDiagByFamily = 20 // SOCK_DIAG_BY_FAMILY, linux/sock_diag.h
	// INET_DIAG_SKV6ONLY, linux/inet_diag.h; sent for every listening IPv6 socket since Linux 4.9
	attrV6Only = 11
	requestLen = 56 // struct inet_diag_req_v2
	messageLen = 72 // struct inet_diag_msg
)

// sockID is struct inet_diag_sockid without interface and cookie.
type sockID struct {
	localPort, remotePort uint16
	local, remote         netip.Addr // zero: none
}

// request is struct inet_diag_req_v2.
type request struct {
	protocol, family uint8
	states           uint32 // bit set over the states; only dumps heed it
	id               sockID
}

func (r request) marshal() []byte {
	b := make([]byte, requestLen)
	b[0], b[1] = r.family, r.protocol
	binary.NativeEndian.PutUint32(b[4:], r.states)
	binary.BigEndian.PutUint16(b[8:], r.id.localPort)
	binary.BigEndian.PutUint16(b[10:], r.id.remotePort)
	copy(b[12:28], r.id.local.AsSlice())
	copy(b[28:44], r.id.remote.AsSlice())
	for i := 48; i < 56; i++ {
		b[i] = 0xff // INET_DIAG_NOCOOKIE
	}
	return b
}

// socket is what is of use in struct inet_diag_msg.
type socket struct {
	state         uint8
	local, remote netip.AddrPort
	device        uint32
	uid           uint32
	// 0: no process has it open (not yet accepted, or closed), and uid means nothing
	inode  uint32
	v6only bool
}

func unmarshal(b []byte) (socket, error) {
	if len(b) < messageLen {
		return socket{}, fmt.Errorf("read answer of sock_diag: %d bytes, want %d", len(b), messageLen)
	}
	addr := func(b []byte, family uint8) netip.Addr {
		if family == unix.AF_INET {
			return netip.AddrFrom4([4]byte(b[:4]))
		}
		return netip.AddrFrom16([16]byte(b[:16])).Unmap()
	}
	family := b[0]
	s := socket{
		state:  b[1],
		local:  netip.AddrPortFrom(addr(b[8:], family), binary.BigEndian.Uint16(b[4:])),
		remote: netip.AddrPortFrom(addr(b[24:], family), binary.BigEndian.Uint16(b[6:])),
		device: binary.NativeEndian.Uint32(b[40:]),
		uid:    binary.NativeEndian.Uint32(b[64:]),
		inode:  binary.NativeEndian.Uint32(b[68:]),
	}
	ad, err := netlink.NewAttributeDecoder(b[messageLen:])
	if err != nil {
		return socket{}, fmt.Errorf("read answer of sock_diag: %w", err)
	}
	for ad.Next() {
		if ad.Type() == attrV6Only {
			s.v6only = ad.Uint8() != 0
		}
	}
	if err := ad.Err(); err != nil {
		return socket{}, fmt.Errorf("read answer of sock_diag: %w", err)
	}
	return s, nil
}

func dial() (*netlink.Conn, error) {
	c, err := netlink.Dial(unix.NETLINK_SOCK_DIAG, nil)
	if err != nil {
		return nil, fmt.Errorf("open sock_diag: %w", err)
	}
	return limited(c)
}

// limited is c, whose questions end in time, or an error: one that might last for ever is closed.
func limited(c *netlink.Conn) (*netlink.Conn, error) {
	if err := c.SetDeadline(time.Now().Add(timeLimit)); err != nil {
		c.Close()
		return nil, fmt.Errorf("open sock_diag: %w", err)
	}
	return c, nil
}

// ask sends one request; flags netlink.Dump lists all matches, none looks up the one socket.
func ask(c *netlink.Conn, r request, flags netlink.HeaderFlags) ([]socket, error) {
	msgs, err := c.Execute(netlink.Message{
		Header: netlink.Header{Type: sockDiagByFamily, Flags: netlink.Request | flags},
		Data:   r.marshal(),
	})
	if err != nil {
		return nil, err
	}
	socks := make([]socket, 0, len(msgs))
	for _, m := range msgs {
		if m.Header.Type != sockDiagByFamily {
			continue
		}
		s, err := unmarshal(m.Data)
		if err != nil {
			return nil, err
		}
		socks = append(socks, s)
	}
	return socks, nil
}
