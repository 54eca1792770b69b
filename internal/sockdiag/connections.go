package sockdiag

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Connection is a TCP connection in state ESTABLISHED, as its socket on this machine has it: Remote
// is what its program gave to connect(2), wherever a rule has led it to.
type Connection struct {
	Local, Remote netip.AddrPort // an IPv4 address is never in its IPv4-mapped form
	UID           uint32
}

// Connections are the connections of both families that pick wants. A socket that nobody has open
// (not yet accepted, or closed) is not asked about. The list is read as it comes: of a hundred
// thousand connections only those that are wanted are kept.
func Connections(ctx context.Context, pick func(Connection) bool) ([]Connection, error) {
	c, err := dial()
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if deadline, ok := ctx.Deadline(); ok && deadline.Before(time.Now().Add(timeLimit)) {
		if err := c.SetDeadline(deadline); err != nil {
			return nil, fmt.Errorf("list connections: %w", err)
		}
	}
	return connections(c, pick)
}

func connections(c *netlink.Conn, pick func(Connection) bool) (found []Connection, err error) {
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		q := request{protocol: unix.IPPROTO_TCP, family: family, states: 1 << tcpEstablished}
		if _, err := c.Send(netlink.Message{
			Header: netlink.Header{Type: sockDiagByFamily, Flags: netlink.Request | netlink.Dump},
			Data:   q.marshal(),
		}); err != nil {
			return nil, fmt.Errorf("list connections: %w", err)
		}
		for m, err := range c.ReceiveIter() {
			if errors.Is(err, unix.ENOENT) && family == unix.AF_INET6 {
				break // a kernel without IPv6
			}
			if err != nil {
				return nil, fmt.Errorf("list connections: %w", err)
			}
			if m.Header.Type != sockDiagByFamily {
				continue
			}
			s, err := unmarshal(m.Data)
			if err != nil {
				return nil, err
			}
			one := Connection{Local: s.local, Remote: s.remote, UID: s.uid}
			if s.state == tcpEstablished && s.inode != 0 && pick(one) {
				found = append(found, one)
			}
		}
	}
	return found, nil
}
