package conntrack

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// ErrNoEntry says that conntrack does not know a connection: it is older than the first rule that
// wants conntrack, or has ended, or was never tracked.
var ErrNoEntry = errors.New("no conntrack entry")

// From linux/netfilter/nfnetlink_conntrack.h and nf_conntrack_common.h.
const (
	ctaTupleReply = 2
	ctaStatus     = 3
	ctaIPv4Src    = 1
	ctaIPv6Src    = 3

	statusSeenReply = 1 << 1
	statusDstNAT    = 1 << 5
)

// findLimit bounds one question, which takes the kernel some microseconds. But a program that waits
// for a processor meanwhile, on a busy machine for more than a second, finds its time over.
const findLimit = 5 * time.Second

// Entry is a connection as conntrack has it.
type Entry struct {
	Proto uint8
	// Src and Dst are those of its first packet, as its program sent it.
	Src, Dst netip.AddrPort
	// ReplySrc is who answers: where a rule has led the first packet to, or Dst. ReplyDst is whom the
	// answer is for.
	ReplySrc, ReplyDst netip.AddrPort
	Status             uint32 // the bits IPS_… of linux/netfilter/nf_conntrack_common.h
	TCPState           uint8  // enum tcp_conntrack; 0: not told
}

// Redirected says whether a rule (REDIRECT, DNAT) has given its first packet another destination.
func (e Entry) Redirected() bool { return e.Status&statusDstNAT != 0 && e.ReplySrc != e.Dst }

// Find looks up the connection from src to dst, by the addresses that its program sees: src is the
// local address of the socket, dst what was given to connect(2). [ErrNoEntry] if there is none.
//
// The kernel finds an entry from both of its ends: an Entry whose Src is dst is of a connection
// that came from there. Only entries without a zone (target CT) are found. It needs CAP_NET_ADMIN.
func Find(ctx context.Context, proto uint8, src, dst netip.AddrPort) (Entry, error) {
	conn, err := dialLimited(ctx)
	if err != nil {
		return Entry{}, fmt.Errorf("find conntrack entry: %w", err)
	}
	defer conn.Close()
	return findOn(conn, proto, src, dst)
}

// dialLimited opens a socket whose questions end with ctx, and within the limit.
func dialLimited(ctx context.Context) (*netlink.Conn, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, err
	}
	deadline := time.Now().Add(findLimit)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	if err := conn.SetDeadline(deadline); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

func findOn(conn *netlink.Conn, proto uint8, src, dst netip.AddrPort) (Entry, error) {
	question, err := tupleAttribute(proto, src, dst)
	if err != nil {
		return Entry{}, fmt.Errorf("find conntrack entry: %w", err)
	}
	family := byte(unix.AF_INET)
	if dst.Addr().Is6() {
		family = unix.AF_INET6
	}
	if _, err := conn.Send(request(msgGet, family, netlink.Request, question)); err != nil {
		return Entry{}, fmt.Errorf("find conntrack entry: %w", err)
	}
	data, err := one(conn)
	if errors.Is(err, unix.ENOENT) {
		return Entry{}, fmt.Errorf("find conntrack entry of %v to %v: %w", src, dst, ErrNoEntry)
	}
	if err != nil {
		return Entry{}, fmt.Errorf("find conntrack entry: %w", err)
	}
	return parseEntry(data)
}

// one is the first message of an answer. ctnetlink marks a single entry as one of many
// (ctnetlink_fill_info) and sends no end after it, for which the library would wait: so the time of
// the connection is over once it is there.
func one(conn *netlink.Conn) (data []byte, err error) {
	for m, err := range conn.ReceiveIter() {
		if err != nil {
			return nil, err
		}
		if len(m.Data) < nfgenmsgLen {
			return nil, fmt.Errorf("read answer: %d bytes", len(m.Data))
		}
		data = m.Data[nfgenmsgLen:]
		if err := conn.SetReadDeadline(time.Unix(1, 0)); err != nil {
			return nil, err
		}
		break
	}
	return data, nil
}

// tupleAttribute is the question for one connection.
func tupleAttribute(proto uint8, src, dst netip.AddrPort) ([]byte, error) {
	if src.Addr().Is4() != dst.Addr().Is4() || !src.IsValid() || !dst.IsValid() {
		return nil, fmt.Errorf("%v and %v are not of one family", src, dst)
	}
	srcType, dstType := uint16(ctaIPv4Src), uint16(ctaIPv4Dst)
	if dst.Addr().Is6() {
		srcType, dstType = ctaIPv6Src, ctaIPv6Dst
	}
	e := netlink.NewAttributeEncoder()
	e.ByteOrder = binary.BigEndian
	e.Nested(ctaTupleOrig, func(e *netlink.AttributeEncoder) error {
		e.Nested(ctaTupleIP, func(e *netlink.AttributeEncoder) error {
			e.Bytes(srcType, src.Addr().AsSlice())
			e.Bytes(dstType, dst.Addr().AsSlice())
			return nil
		})
		e.Nested(ctaTupleProto, func(e *netlink.AttributeEncoder) error {
			e.Uint8(ctaProtoNum, proto)
			e.Uint16(ctaProtoSrcPort, src.Port())
			e.Uint16(ctaProtoDstPort, dst.Port())
			return nil
		})
		return nil
	})
	return e.Encode()
}

// parseEntry reads a whole entry, which parse does not for the sake of large tables.
func parseEntry(data []byte) (Entry, error) {
	var e Entry
	d, err := netlink.NewAttributeDecoder(data)
	if err != nil {
		return Entry{}, fmt.Errorf("read conntrack entry: %w", err)
	}
	d.ByteOrder = binary.BigEndian
	for d.Next() {
		switch d.Type() {
		case ctaTupleOrig:
			d.Nested(parseTuple(&e.Proto, &e.Src, &e.Dst))
		case ctaTupleReply:
			d.Nested(parseTuple(new(uint8), &e.ReplySrc, &e.ReplyDst))
		case ctaStatus:
			e.Status = d.Uint32()
		case ctaProtoInfo:
			d.Nested(parseProtoInfo(&e.TCPState))
		}
	}
	if err := d.Err(); err != nil {
		return Entry{}, fmt.Errorf("read conntrack entry: %w", err)
	}
	if !e.Dst.Addr().IsValid() || !e.ReplySrc.Addr().IsValid() {
		return Entry{}, errors.New("read conntrack entry: it has not both its tuples")
	}
	return e, nil
}

func parseTuple(proto *uint8, src, dst *netip.AddrPort) func(*netlink.AttributeDecoder) error {
	return func(tuple *netlink.AttributeDecoder) error {
		var from, to netip.Addr
		var fromPort, toPort uint16
		for tuple.Next() {
			switch tuple.Type() {
			case ctaTupleIP:
				tuple.Nested(func(ip *netlink.AttributeDecoder) error {
					for ip.Next() {
						switch ip.Type() {
						case ctaIPv4Src, ctaIPv6Src:
							from, _ = netip.AddrFromSlice(ip.Bytes())
						case ctaIPv4Dst, ctaIPv6Dst:
							to, _ = netip.AddrFromSlice(ip.Bytes())
						}
					}
					return nil
				})
			case ctaTupleProto:
				tuple.Nested(func(d *netlink.AttributeDecoder) error {
					for d.Next() {
						switch d.Type() {
						case ctaProtoNum:
							*proto = d.Uint8()
						case ctaProtoSrcPort:
							fromPort = d.Uint16()
						case ctaProtoDstPort:
							toPort = d.Uint16()
						}
					}
					return nil
				})
			}
		}
		*src, *dst = netip.AddrPortFrom(from, fromPort), netip.AddrPortFrom(to, toPort)
		return nil
	}
}

func parseProtoInfo(state *uint8) func(*netlink.AttributeDecoder) error {
	return func(info *netlink.AttributeDecoder) error {
		for info.Next() {
			if info.Type() == ctaProtoInfoTCP {
				info.Nested(func(tcp *netlink.AttributeDecoder) error {
					for tcp.Next() {
						if tcp.Type() == ctaProtoTCPState {
							*state = tcp.Uint8()
						}
					}
					return nil
				})
			}
		}
		return nil
	}
}
