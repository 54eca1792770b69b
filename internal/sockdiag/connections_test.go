package sockdiag

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"testing"

	"github.com/mdlayher/netlink"
	"github.com/mdlayher/netlink/nltest"
	"golang.org/x/sys/unix"
)

// inetDiagMsg is what the kernel answers about one socket (struct inet_diag_msg of
// linux/inet_diag.h), as far as it is read.
func inetDiagMsg(family, state uint8, local, remote string, uid, inode uint32) []byte {
	b := make([]byte, messageLen)
	b[0], b[1] = family, state
	l, r := netip.MustParseAddrPort(local), netip.MustParseAddrPort(remote)
	binary.BigEndian.PutUint16(b[4:], l.Port())
	binary.BigEndian.PutUint16(b[6:], r.Port())
	copy(b[8:24], l.Addr().AsSlice())
	copy(b[24:40], r.Addr().AsSlice())
	binary.NativeEndian.PutUint32(b[64:], uid)
	binary.NativeEndian.PutUint32(b[68:], inode)
	return b
}

func TestConnections(t *testing.T) {
	v4 := [][]byte{
		inetDiagMsg(unix.AF_INET, tcpEstablished, "10.0.0.9:40000", "10.1.2.3:443", 1000, 5),
		inetDiagMsg(unix.AF_INET, tcpEstablished, "10.0.0.9:40001", "10.1.2.4:443", 1000, 6),
		inetDiagMsg(unix.AF_INET, tcpEstablished, "10.0.0.9:40002", "10.1.2.3:443", 0, 0),
		inetDiagMsg(unix.AF_INET, tcpCloseWait, "10.0.0.9:40003", "10.1.2.3:443", 0, 7),
	}
	v6 := [][]byte{
		inetDiagMsg(unix.AF_INET6, tcpEstablished, "[::ffff:10.0.0.9]:40004", "[::ffff:10.1.2.3]:443", 1, 8),
		inetDiagMsg(unix.AF_INET6, tcpEstablished, "[fd00::9]:40005", "[fd01::3]:443", 2, 9),
	}
	addr := func(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }
	for _, test := range []struct {
		name  string
		fails map[uint8]error
		want  []Connection
		err   error
	}{
		{"both families", nil, []Connection{
			{addr("10.0.0.9:40000"), addr("10.1.2.3:443"), 1000},
			{addr("10.0.0.9:40004"), addr("10.1.2.3:443"), 1},
			{addr("[fd00::9]:40005"), addr("[fd01::3]:443"), 2},
		}, nil},
		{"no IPv6", map[uint8]error{unix.AF_INET6: unix.ENOENT},
			[]Connection{{addr("10.0.0.9:40000"), addr("10.1.2.3:443"), 1000}}, nil},
		{"no answer", map[uint8]error{unix.AF_INET: unix.ENOENT}, nil, unix.ENOENT},
		{"refused", map[uint8]error{unix.AF_INET6: unix.EPERM}, nil, unix.EPERM},
	} {
		c := nltest.Dial(func(reqs []netlink.Message) ([]netlink.Message, error) {
			if len(reqs) == 0 {
				return nil, errors.New("asked for more than there is")
			}
			q := reqs[0]
			family, states := q.Data[0], binary.NativeEndian.Uint32(q.Data[4:])
			if q.Header.Flags&netlink.Dump != netlink.Dump || states != 1<<tcpEstablished {
				t.Errorf("asked with flags %v for states %b", q.Header.Flags, states)
			}
			if err := test.fails[family]; err != nil {
				return nil, err
			}
			answer := exchange{Dump: true, Answers: v4}
			if family == unix.AF_INET6 {
				answer.Answers = v6
			}
			return answer.answer(reqs)
		})
		got, err := connections(c, func(one Connection) bool {
			return one.Remote == addr("10.1.2.3:443") || one.Remote.Addr().Is6()
		})
		if !slices.Equal(got, test.want) || !errors.Is(err, test.err) ||
			(err == nil) != (test.err == nil) {
			t.Errorf("%s: %v, %v; want %v, %v", test.name, got, err, test.want, test.err)
		}
	}
}
