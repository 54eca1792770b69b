//go:build kernel

package conntrack

import (
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// fill makes n entries of connections that the kernel does not throw out before their time.
func fill(t *testing.T, n int) {
	t.Helper()
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	const statusAssured, statusConfirmed = 1 << 2, 1 << 3
	var batch []netlink.Message
	for i := range n {
		src := netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
		dst := netip.AddrFrom4([4]byte{192, 0, 2, 1})
		e := netlink.NewAttributeEncoder()
		e.ByteOrder = binary.BigEndian
		for kind, tuple := range map[uint16][2]netip.Addr{
			ctaTupleOrig: {src, dst}, ctaTupleReply: {dst, src},
		} {
			e.Nested(kind, func(e *netlink.AttributeEncoder) error {
				e.Nested(ctaTupleIP, func(e *netlink.AttributeEncoder) error {
					e.Bytes(ctaIPv4Src, tuple[0].AsSlice())
					e.Bytes(ctaIPv4Dst, tuple[1].AsSlice())
					return nil
				})
				e.Nested(ctaTupleProto, func(e *netlink.AttributeEncoder) error {
					e.Uint8(ctaProtoNum, unix.IPPROTO_UDP)
					e.Uint16(ctaProtoSrcPort, 1000)
					e.Uint16(ctaProtoDstPort, 1000)
					return nil
				})
				return nil
			})
		}
		e.Uint32(ctaStatus, statusConfirmed|statusAssured|statusSeenReply)
		e.Uint32(7, 600) // CTA_TIMEOUT
		b, err := e.Encode()
		if err != nil {
			t.Fatal(err)
		}
		batch = append(batch, request(0, unix.AF_INET, netlink.Request|netlink.Create|netlink.Excl, b))
		if len(batch) == 200 || i == n-1 {
			if _, err := conn.SendMessages(batch); err != nil {
				t.Fatal(err)
			}
			batch = batch[:0]
		}
	}
}

// TestReadLoad: an ordinary user with CAP_NET_ADMIN, as the agent's unit runs it, reads how many
// entries there are. With SOAK=1 the table is full, and the packets that this costs are counted.
func TestReadLoad(t *testing.T) {
	if !inNetns(t) {
		return
	}
	if os.Geteuid() == 0 {
		sh(t, "ip link set lo up; iptables -t nat -A POSTROUTING -p tcp --dport 1 -j MASQUERADE")
		asOrdinaryUser(t)
		return
	}
	l, err := ReadLoad(t.Context())
	if err != nil || l.Count != 0 || l.Max == 0 || l.Full != 0 {
		t.Fatalf("an empty table: %+v, %v", l, err)
	}
	const some = 1000
	fill(t, some)
	if l, err = ReadLoad(t.Context()); err != nil || l.Count != some || l.Full != 0 {
		t.Errorf("some entries: %+v, %v", l, err)
	}
	if os.Getenv("SOAK") != "1" {
		return
	}
	fill(t, l.Max+some)
	c, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(netip.MustParseAddrPort("127.0.0.1:9")))
	if err != nil {
		t.Fatal(err)
	}
	const packets = 5
	for range packets {
		c.Write([]byte("x")) // its error is what is looked for
	}
	if l, err = ReadLoad(t.Context()); err != nil || l.Count != l.Max || l.Full != packets {
		t.Errorf("a full table: %+v, %v; want %d dropped", l, err, packets)
	}
}

// asOrdinaryUser runs the calling test once more, in the same network namespace, as a user with
// CAP_NET_ADMIN alone.
func asOrdinaryUser(t *testing.T) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.count=1",
		"-test.timeout=1m")
	cmd.Env = os.Environ()
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Credential:  &syscall.Credential{Uid: 65534, Gid: 65534},
		AmbientCaps: []uintptr{unix.CAP_NET_ADMIN},
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("as an ordinary user: %v\n%s", err, out)
	}
}
