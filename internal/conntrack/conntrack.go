// Package conntrack deletes the few connection-tracking entries that keep new rules from taking
// effect, and tells what became of a connection.
//
// NAT is decided at the first packet of a connection and kept in its conntrack entry. A connection
// attempt that was on its way when a service's rules came stays on the old path until its entry
// goes, then the next retransmit takes the new one; and a resolver that always asks from one UDP
// port keeps its entry, and so its path, for ever. See docs/design/facts.md#first-packet-decides.
//
// It talks to the kernel by ctnetlink, so that the conntrack program need not be installed. It
// needs CAP_NET_ADMIN. It never touches an established connection. Package agent calls it after
// iptables.Kernel.Apply has put the new rules in, and the cleanup command after it has taken them
// out.
package conntrack

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// From linux/netfilter/nfnetlink_conntrack.h and nf_conntrack_tcp.h.
const (
	subsysCTNetlink = 1
	msgGet          = 1
	msgDelete       = 2

	ctaTupleOrig     = 1
	ctaProtoInfo     = 4
	ctaID            = 12
	ctaZone          = 18
	ctaTupleIP       = 1
	ctaTupleProto    = 2
	ctaIPv4Dst       = 2
	ctaIPv6Dst       = 4
	ctaProtoNum      = 1
	ctaProtoSrcPort  = 2
	ctaProtoDstPort  = 3
	ctaProtoInfoTCP  = 1
	ctaProtoTCPState = 1

	tcpSynSent  = 1
	tcpSynSent2 = 8 // simultaneous open

	nfgenmsgLen = 4
)

// entry is what is looked at of a conntrack entry: where its first packet came from and went.
type entry struct {
	srcPort  uint16
	dst      netip.AddrPort
	proto    uint8
	tcpState uint8
}

// DeleteHalfOpen deletes the entries of TCP connections to one of the prefixes that have not been
// answered yet, and returns how many. The clients notice nothing: their next SYN makes a new
// entry by the new rules. See docs/design/facts.md#half-open-keeps-its-path.
func DeleteHalfOpen(ctx context.Context, to []netip.Prefix) (int, error) {
	return deleteEntries(ctx, familiesOf(to), halfOpen(to))
}

// familiesOf are the families of which there is a prefix. The kernel goes through all of its hash
// table for each, which takes 15 ms where that has its usual 262,144 buckets, empty ones too.
// See docs/design/facts.md#conntrack-walk-takes-time.
func familiesOf(prefixes []netip.Prefix) (families []byte) {
	for _, family := range bothFamilies {
		if slices.ContainsFunc(prefixes, func(p netip.Prefix) bool {
			return p.IsValid() && p.Addr().Is4() == (family == unix.AF_INET)
		}) {
			families = append(families, family)
		}
	}
	return families
}

var bothFamilies = []byte{unix.AF_INET, unix.AF_INET6}

func halfOpen(to []netip.Prefix) func(entry) bool {
	// A few thousand added prefixes against a large table: look up by binary
	// search, in disjoint ranges.
	set := newSet(to)
	return func(e entry) bool {
		return e.proto == unix.IPPROTO_TCP && (e.tcpState == tcpSynSent || e.tcpState == tcpSynSent2) &&
			set.contains(e.dst.Addr())
	}
}

// DeleteUDP deletes the entries of UDP exchanges with the port, and returns how many.
func DeleteUDP(ctx context.Context, port uint16) (int, error) {
	return deleteEntries(ctx, bothFamilies, exchange(port))
}

func exchange(port uint16) func(entry) bool {
	return func(e entry) bool {
		return e.proto == unix.IPPROTO_UDP && (e.dst.Port() == port || e.srcPort == port)
	}
}

// DeleteLateUDP is to be called when no answer can be on its way any longer since DeleteUDP. An
// answer that came after its entry had gone made a new one, from the port, in which the next
// question is the reply and so keeps the old path. It leaves the entries of newer questions alone,
// whose answers would find no way back. See docs/design/facts.md#udp-keeps-its-path.
func DeleteLateUDP(ctx context.Context, port uint16) (int, error) {
	return deleteEntries(ctx, bothFamilies, lateAnswer(port))
}

func lateAnswer(port uint16) func(entry) bool {
	return func(e entry) bool { return e.proto == unix.IPPROTO_UDP && e.srcPort == port }
}

// deleteEntries walks the tables of the families and deletes what matches. An entry that ends by
// itself in between is not counted and no error. One family's failure does not stop the other.
func deleteEntries(
	ctx context.Context, families []byte, match func(entry) bool,
) (int, error) {
	n := 0
	var errs []error
	for _, family := range families {
		deleted, err := deleteFamily(ctx, family, match)
		n += deleted
		if err != nil {
			errs = append(errs, fmt.Errorf("delete conntrack entries: %w", err))
		}
	}
	return n, errors.Join(errs...)
}

func deleteFamily(ctx context.Context, family byte, match func(entry) bool) (int, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(deadline); err != nil {
			return 0, err
		}
	}
	return deleteOn(ctx, conn, family, match)
}

func deleteOn(ctx context.Context, conn *netlink.Conn, family byte,
	match func(entry) bool) (int, error) {
	var found [][]byte // the attributes that name each entry
	_, err := conn.Send(request(msgGet, family, netlink.Request|netlink.Dump, nil))
	if err != nil {
		return 0, err
	}
	// One message at a time: a busy machine's table is hundreds of thousands of entries.
	for m, err := range conn.ReceiveIter() {
		if err != nil {
			return 0, err
		}
		if len(m.Data) < nfgenmsgLen {
			continue
		}
		e, name, err := parse(m.Data[nfgenmsgLen:])
		if err != nil {
			return 0, err
		}
		if match(e) {
			found = append(found, name)
		}
	}
	n := 0
	for _, name := range found {
		if ctx.Err() != nil {
			return n, ctx.Err()
		}
		_, err := conn.Execute(request(msgDelete, family, netlink.Request|netlink.Acknowledge, name))
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return n, err
		}
		n++
	}
	return n, nil
}

func request(kind, family byte, flags netlink.HeaderFlags, attributes []byte) netlink.Message {
	return netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(subsysCTNetlink<<8 | uint16(kind)), Flags: flags},
		Data:   append([]byte{family, 0, 0, 0}, attributes...),
	}
}

var errNameless = errors.New("read conntrack entry: it has no destination or no id")

// parse reads an entry. name holds the attributes by which the kernel finds exactly this
// entry again: its id, so that a new connection with the same addresses and ports is not
// deleted in its place.
func parse(data []byte) (e entry, name []byte, err error) {
	d, err := netlink.NewAttributeDecoder(data)
	if err != nil {
		return entry{}, nil, err
	}
	d.ByteOrder = binary.BigEndian
	named := netlink.NewAttributeEncoder()
	var src, dst netip.AddrPort
	hasID := false
	for d.Next() {
		switch d.Type() {
		case ctaTupleOrig:
			named.Bytes(ctaTupleOrig|unix.NLA_F_NESTED, d.Bytes())
			d.Nested(parseTuple(&e.proto, &src, &dst))
		case ctaProtoInfo:
			d.Nested(parseProtoInfo(&e.tcpState))
		case ctaID:
			named.Bytes(ctaID, d.Bytes())
			hasID = true
		case ctaZone:
			named.Bytes(ctaZone, d.Bytes())
		}
	}
	if err := d.Err(); err != nil {
		return entry{}, nil, err
	}
	// Every kernel sends both. To delete without a tuple is to empty the whole table, without an id
	// to take what came in the entry's place.
	if !dst.Addr().IsValid() || !hasID {
		return entry{}, nil, errNameless
	}
	e.srcPort, e.dst = src.Port(), dst
	name, err = named.Encode()
	return e, name, err
}

// set is a sorted list of prefixes none of which covers another.
type set []netip.Prefix

func newSet(prefixes []netip.Prefix) set {
	var sorted set
	for _, p := range prefixes {
		if p.IsValid() {
			sorted = append(sorted, p.Masked())
		}
	}
	slices.SortFunc(sorted, func(a, b netip.Prefix) int {
		if c := a.Addr().Compare(b.Addr()); c != 0 {
			return c
		}
		return a.Bits() - b.Bits()
	})
	out := sorted[:0]
	for _, p := range sorted {
		if len(out) == 0 || !out[len(out)-1].Contains(p.Addr()) {
			out = append(out, p)
		}
	}
	return out
}

func (s set) contains(a netip.Addr) bool {
	i, exact := slices.BinarySearchFunc(s, a, func(p netip.Prefix, a netip.Addr) int {
		return p.Addr().Compare(a)
	})
	return exact || i > 0 && s[i-1].Contains(a)
}
