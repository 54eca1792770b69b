package conntrack

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// From linux/netfilter/nfnetlink_conntrack.h and nfnetlink_compat.h.
const (
	msgNew     = 0
	groupOfNew = 1 // NFNLGRP_CONNTRACK_NEW
)

// backlogLimit bounds the reading of what has been told already.
const backlogLimit = 50 * time.Millisecond

// Opened keeps what the kernel tells of connections as conntrack takes them in. [Find] comes too
// late for one that is refused at once: a first answer that is a reset takes the entry away.
//
// The kernel tells it before connect(2) returns, since the first packet has left by then. It tells
// nothing where it was built without CONFIG_NF_CONNTRACK_EVENTS, or where the sysctl
// net.netfilter.nf_conntrack_events is 0.
type Opened struct{ conn *netlink.Conn }

// ListenOpened listens from now on. It needs CAP_NET_ADMIN.
func ListenOpened() (*Opened, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("listen for new conntrack entries: %w", err)
	}
	if err := conn.JoinGroup(groupOfNew); err != nil {
		conn.Close()
		return nil, fmt.Errorf("listen for new conntrack entries: %w", err)
	}
	return &Opened{conn}, nil
}

// Close ends it.
func (o *Opened) Close() error { return o.conn.Close() }

// Find stops listening and returns the entry of the first connection from src to dst as it was when
// it came; [ErrNoEntry] if none did.
func (o *Opened) Find(proto uint8, src, dst netip.AddrPort) (Entry, error) {
	if err := o.conn.LeaveGroup(groupOfNew); err != nil {
		return Entry{}, fmt.Errorf("read new conntrack entries: %w", err)
	}
	if err := o.conn.SetReadDeadline(time.Now().Add(backlogLimit)); err != nil {
		return Entry{}, fmt.Errorf("read new conntrack entries: %w", err)
	}
	for {
		told, err := o.conn.Receive()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return Entry{}, fmt.Errorf("find new conntrack entry of %v to %v: %w", src, dst, ErrNoEntry)
		}
		if errors.Is(err, unix.ENOBUFS) {
			continue // later ones have found no room; those that are there come next
		}
		if err != nil {
			return Entry{}, fmt.Errorf("read new conntrack entries: %w", err)
		}
		for _, m := range told {
			if e, ok := opened(m); ok && e.Proto == proto && e.Src == src && e.Dst == dst {
				return e, nil
			}
		}
	}
}

func opened(m netlink.Message) (Entry, bool) {
	if m.Header.Type != subsysCTNetlink<<8|msgNew || len(m.Data) < nfgenmsgLen {
		return Entry{}, false
	}
	e, err := parseEntry(m.Data[nfgenmsgLen:])
	return e, err == nil
}
