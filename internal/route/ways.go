package route

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"github.com/mdlayher/socket"
	"golang.org/x/sys/unix"
)

// Way is where the kernel takes a connection to an address.
type Way struct {
	Source netip.Addr // the address that it gives the connection; the zero Addr: not known
	Local  bool       // the address is one of this machine
	Err    error      // it has no way there
}

// To asks the kernel for the way to an address, by a UDP socket that sends nothing.
func To(ctx context.Context, to netip.AddrPort) (w Way) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "udp", to.String())
	switch {
	case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EHOSTUNREACH):
		var failed *net.OpError
		if errors.As(err, &failed) {
			err = failed.Err
		}
		return Way{Err: err}
	case err != nil:
		return Way{} // as for a broadcast address: it says nothing of the way
	}
	defer conn.Close()
	if from, ok := conn.LocalAddr().(*net.UDPAddr); ok {
		w.Source = from.AddrPort().Addr().Unmap()
	}
	// The source of what goes to an address of this machine is that address; but for 127.0.0.0/8,
	// whose route names one.
	w.Local = w.Source == to.Addr().WithZone("") || to.Addr().IsLoopback()
	return w
}

// Cell is a part of all addresses in which the way is the same: what the prefix holds, without what
// the prefixes of other cells hold of it.
type Cell struct {
	Prefix netip.Prefix `json:"prefix"`
	Source netip.Addr   `json:"source"`
	Self   bool         `json:"self"` // each address is its own source: of this machine
	Why    string       `json:"why"`  // why there is no way; "": there is
}

// Map is the ways to all addresses, to be asked later and elsewhere.
//
// The kernel's decision depends on which prefixes of its routes and rules (ip-rule(8)) hold the
// address. So all of these divide the addresses into cells, and one address of each is asked for,
// by To. Of several IPv6 addresses of this machine the kernel prefers the one that is most like the
// address asked for: there the source may be another one within a cell.
type Map []Cell

// maxCells bounds a Map. A machine with a full table of the Internet has none.
const maxCells = 10_000

// errPorts says that rules of policy routing look at more than addresses.
var errPorts = errors.New("a rule of policy routing looks at the protocol or a port")

// Ways asks for the ways to all addresses.
func Ways(ctx context.Context) (Map, error) {
	prefixes, err := divisions(ctx)
	if err != nil {
		return nil, fmt.Errorf("read the routing tables: %w", err)
	}
	if len(prefixes) > maxCells {
		return nil, fmt.Errorf("read the routing tables: they have more than %d routes", maxCells)
	}
	var m Map
	for i, prefix := range prefixes {
		addr, some := outside(prefix, prefixes[i+1:])
		if !some {
			continue
		}
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("ask for the way to each network: %w", err)
		}
		w := To(ctx, netip.AddrPortFrom(addr, 9))
		cell := Cell{Prefix: prefix, Source: w.Source, Self: w.Source == addr}
		if w.Err != nil {
			cell.Why = w.Err.Error()
		}
		m = append(m, cell)
	}
	return m, nil
}

// To is the way to an address; known is false where the Map has none.
func (m Map) To(addr netip.Addr) (w Way, known bool) {
	addr = addr.WithZone("")
	best := -1
	for i, cell := range m {
		if cell.Prefix.IsValid() && cell.Prefix.Contains(addr) &&
			(best < 0 || cell.Prefix.Bits() > m[best].Prefix.Bits()) {
			best = i
		}
	}
	if best < 0 {
		return Way{}, false
	}
	cell := m[best]
	if cell.Why != "" {
		return Way{Err: errors.New(cell.Why)}, true
	}
	w = Way{Source: cell.Source, Local: addr.IsLoopback()}
	if cell.Self {
		w.Source, w.Local = addr, true
	}
	return w, true
}

// outside is an address of a prefix that none of the narrower ones holds. They follow it, sorted.
func outside(prefix netip.Prefix, following []netip.Prefix) (addr netip.Addr, some bool) {
	addr = prefix.Addr()
	for _, narrower := range following {
		if !prefix.Overlaps(narrower) || addr.Less(narrower.Addr()) {
			break
		}
		if narrower.Contains(addr) {
			if addr = last(narrower).Next(); !prefix.Contains(addr) {
				return addr, false
			}
		}
	}
	return addr, true
}

// last is the last address of a prefix.
func last(p netip.Prefix) netip.Addr {
	raw := p.Addr().AsSlice()
	for bit := p.Bits(); bit < len(raw)*8; bit++ {
		raw[bit/8] |= 1 << (7 - bit%8)
	}
	addr, _ := netip.AddrFromSlice(raw) // it has the length of one
	return addr
}

// always are prefixes that the kernel treats in a way of their own without a route.
var always = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("0.0.0.0/32"),
	netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("224.0.0.0/4"),
	netip.MustParsePrefix("255.255.255.255/32"),
	netip.MustParsePrefix("::/0"), netip.MustParsePrefix("::/128"), netip.MustParsePrefix("::1/128"),
	netip.MustParsePrefix("fe80::/10"), netip.MustParsePrefix("ff00::/8"),
}

// divisions are the prefixes of all routes and rules of both families, sorted: each stands right
// before those within it.
func divisions(ctx context.Context) ([]netip.Prefix, error) {
	all := slices.Clone(always)
	for _, kind := range []uint16{unix.RTM_GETROUTE, unix.RTM_GETRULE} {
		for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
			some, err := dump(ctx, kind, family)
			if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
				continue // a kernel without IPv6
			}
			if err != nil {
				return nil, err
			}
			all = append(all, some...)
		}
	}
	slices.SortFunc(all, netip.Prefix.Compare)
	return slices.Compact(all), nil
}

// dump lists the destinations of the routes or rules of a family.
func dump(ctx context.Context, kind uint16, family byte) (all []netip.Prefix, err error) {
	conn, err := socket.Socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE, "rtnetlink", nil)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	deadline := time.Now().Add(timeLimit)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	if err := conn.SetDeadline(deadline); err != nil {
		return nil, err
	}
	order := binary.NativeEndian
	question := order.AppendUint32(nil, unix.SizeofNlMsghdr+unix.SizeofRtMsg)
	question = order.AppendUint16(question, kind)
	question = order.AppendUint16(question, unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	question = append(question, make([]byte, 8+unix.SizeofRtMsg)...)
	question[unix.SizeofNlMsghdr] = family
	if _, err := conn.Write(question); err != nil {
		return nil, err
	}
	answer := make([]byte, 64<<10) // the kernel makes them of 32 KiB at most
	for len(all) <= maxCells {
		n, err := conn.Read(answer)
		if err != nil {
			return nil, err
		}
		messages, err := syscall.ParseNetlinkMessage(answer[:n])
		if err != nil {
			return nil, err
		}
		for _, m := range messages {
			switch m.Header.Type {
			case unix.NLMSG_DONE:
				return all, nil
			case unix.NLMSG_ERROR:
				if len(m.Data) >= 4 && order.Uint32(m.Data) != 0 {
					return nil, unix.Errno(-int32(order.Uint32(m.Data)))
				}
				return nil, errors.New("the kernel answered with an error without a number")
			case unix.RTM_NEWROUTE, unix.RTM_NEWRULE:
				prefix, err := destination(m)
				if err != nil {
					return nil, err
				}
				all = append(all, prefix)
			}
		}
	}
	return all, nil
}

// destination is the prefix that a route or a rule is for. A struct fib_rule_hdr has the length of
// a struct rtmsg, and the same fields at its begin.
func destination(m syscall.NetlinkMessage) (netip.Prefix, error) {
	if len(m.Data) < unix.SizeofRtMsg {
		return netip.Prefix{}, fmt.Errorf("a message of %d bytes", len(m.Data))
	}
	family, bits := m.Data[0], int(m.Data[1])
	addr := netip.IPv4Unspecified()
	if family == unix.AF_INET6 {
		addr = netip.IPv6Unspecified()
	}
	for rest := m.Data[unix.SizeofRtMsg:]; len(rest) >= unix.SizeofRtAttr; {
		length := int(binary.NativeEndian.Uint16(rest))
		kind := binary.NativeEndian.Uint16(rest[2:])
		if length < unix.SizeofRtAttr || length > len(rest) {
			return netip.Prefix{}, errors.New("an attribute is longer than its message")
		}
		value := rest[unix.SizeofRtAttr:length]
		switch {
		case kind == unix.RTA_DST: // FRA_DST has the same number
			if a, ok := netip.AddrFromSlice(value); ok {
				addr = a
			}
		case m.Header.Type == unix.RTM_NEWRULE &&
			(kind == unix.FRA_IP_PROTO || kind == unix.FRA_SPORT_RANGE || kind == unix.FRA_DPORT_RANGE):
			return netip.Prefix{}, errPorts
		}
		rest = rest[min((length+3)&^3, len(rest)):]
	}
	prefix := netip.PrefixFrom(addr, bits).Masked()
	if !prefix.IsValid() {
		return prefix, fmt.Errorf("%v/%d is no prefix", addr, bits)
	}
	return prefix, nil
}
