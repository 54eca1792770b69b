// Package route says which addresses this machine has no route to, asked of the kernel by netlink
// (rtnetlink(7), what `ip route get` asks).
//
// connect(2) looks a route up before any rule of iptables sees a packet: without one it fails, also
// where REDIRECT would have led the connection to this machine itself. The services' addresses of
// Traffic Director are often in no subnet, so that IPv6 ones have no route wherever the VM has no
// default route of IPv6. See docs/design/facts.md#no-route-no-rule.
//
// The answer is that for a program which has bound no address, device or mark; rules of policy
// routing by user are not followed. It changes nothing and needs no capability.
//
// Next in the flow: package agent, which asks here for the services' addresses.
package route

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"time"

	"github.com/mdlayher/socket"
	"golang.org/x/sys/unix"
)

const (
	// timeLimit bounds the questions of one look: 10,000 take some 30 ms.
	timeLimit = 2 * time.Second
	// batch is how many questions go in one system call. Their answers have to fit into the socket's
	// buffer (net.core.rmem_default, 208 kB): each takes at most a kilobyte of it.
	batch = 64

	// answerLen is room for an answer: a route with its attributes, some 150 bytes. What is longer is
	// cut off behind what is read.
	answerLen = 512
)

// Failure is that there is no route to an address.
type Failure struct {
	Addr netip.Addr
	Why  string // "network is unreachable", "a route of type blackhole"
}

// Missing asks for a route to each of the addresses, in both families, and returns those that have
// none, in their order. With an error come those that were found until then.
func Missing(ctx context.Context, addrs []netip.Addr) ([]Failure, error) {
	if len(addrs) == 0 {
		return nil, nil
	}
	// Not a netlink.Conn, which looks at the length of each answer before it takes it, and makes a
	// page of memory for it: twenty times as much as the look-up itself. What is written here without
	// an address goes to the kernel.
	conn, err := socket.Socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE, "rtnetlink", nil)
	if err != nil {
		return nil, fmt.Errorf("look up routes: %w", err)
	}
	defer conn.Close()
	deadline := time.Now().Add(timeLimit)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	if err := conn.SetDeadline(deadline); err != nil {
		return nil, fmt.Errorf("look up routes: %w", err)
	}
	return missing(conn, addrs)
}

// missing sends the questions, and takes one answer at a time.
func missing(kernel io.ReadWriter, addrs []netip.Addr) (failures []Failure, err error) {
	answer := make([]byte, answerLen)
	var questions []byte
	var sequence uint32
	for len(addrs) > 0 {
		asked := addrs[:min(batch, len(addrs))]
		questions = questions[:0]
		for i, addr := range asked {
			questions = appendQuestion(questions, sequence+uint32(i), addr)
		}
		if _, err := kernel.Write(questions); err != nil {
			return failures, fmt.Errorf("look up routes: %w", err)
		}
		// The kernel answers within sendmsg(2), in the order of the questions.
		for _, addr := range asked {
			n, err := kernel.Read(answer)
			if err != nil {
				return failures, fmt.Errorf("look up route to %v: %w", addr, err)
			}
			errno, err := readAnswer(answer[:n], sequence)
			if err != nil {
				return failures, fmt.Errorf("look up route to %v: %w", addr, err)
			}
			if why := word(errno); why != "" {
				failures = append(failures, Failure{addr, why})
			} else if errno != 0 {
				return failures, fmt.Errorf("look up route to %v: %w", addr, errno)
			}
			sequence++
		}
		addrs = addrs[len(asked):]
	}
	return failures, nil
}

// appendQuestion appends RTM_GETROUTE for one address.
func appendQuestion(b []byte, sequence uint32, addr netip.Addr) []byte {
	raw := addr.AsSlice()
	family := byte(unix.AF_INET)
	if addr.Is6() {
		family = unix.AF_INET6
	}
	order := binary.NativeEndian
	b = order.AppendUint32(b, uint32(unix.SizeofNlMsghdr+unix.SizeofRtMsg+unix.SizeofRtAttr+len(raw)))
	b = order.AppendUint16(b, unix.RTM_GETROUTE)
	b = order.AppendUint16(b, unix.NLM_F_REQUEST)
	b = order.AppendUint32(b, sequence)
	b = order.AppendUint32(b, 0)
	b = append(b, family, byte(addr.BitLen()), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
	b = order.AppendUint16(b, uint16(unix.SizeofRtAttr+len(raw)))
	b = order.AppendUint16(b, unix.RTA_DST)
	return append(b, raw...)
}

// readAnswer reads the answer to one question: 0 for a route, or the kernel's errno.
func readAnswer(b []byte, sequence uint32) (unix.Errno, error) {
	if len(b) < unix.SizeofNlMsghdr {
		return 0, fmt.Errorf("an answer of %d bytes", len(b))
	}
	if got := binary.NativeEndian.Uint32(b[8:]); got != sequence {
		return 0, errors.New("the answer is to another question")
	}
	switch kind := binary.NativeEndian.Uint16(b[4:]); {
	case kind == unix.RTM_NEWROUTE:
		return 0, nil
	case kind != unix.NLMSG_ERROR || len(b) < unix.SizeofNlMsghdr+4:
		return 0, fmt.Errorf("an answer of type %d and %d bytes", kind, len(b))
	}
	errno := -int32(binary.NativeEndian.Uint32(b[unix.SizeofNlMsghdr:]))
	if errno <= 0 {
		return 0, errors.New("an error without a number")
	}
	return unix.Errno(errno), nil
}

// word is why there is no route, "" for an errno that does not say so. The types of routes that let
// nothing through have one each (fib_props in net/ipv4/fib_semantics.c, ip6_rt_type_to_error in
// net/ipv6/route.c).
func word(errno unix.Errno) string {
	switch errno {
	case unix.ENETUNREACH:
		return "network is unreachable"
	case unix.EHOSTUNREACH:
		return "a route of type unreachable"
	case unix.EACCES:
		return "a route of type prohibit"
	case unix.EINVAL:
		return "a route of type blackhole"
	case unix.EOPNOTSUPP, unix.EAFNOSUPPORT:
		return "the kernel has no IPv6"
	}
	return ""
}
