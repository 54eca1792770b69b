package conntrack

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"github.com/mdlayher/netlink/nltest"
	"golang.org/x/sys/unix"
)

// The recordings in testdata are what Linux 6.18 answered in a network namespace of its own to the
// question for its table of one family, message after message with their headers. TestRecordedTable
// (tag kernel) made them, and holds them against the kernel that it runs on.

// row is an entry of the recordings, in both families.
type row struct {
	name             string
	to               byte // the last number of its destination
	proto, state     uint8
	srcPort, dstPort uint16
	zone             uint16
}

const (
	// the last is any other protocol
	tcp, udp, icmpLike = unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_UDPLITE

	// enum tcp_conntrack, linux/netfilter/nf_conntrack_tcp.h
	synRecv, established, finWait, closeWait, lastAck, timeWait, closed = 2, 3, 4, 5, 6, 7, 8 + 1
)

var recorded = []row{
	{name: "SYN sent", to: 3, proto: tcp, state: tcpSynSent, srcPort: 40001, dstPort: 443},
	{name: "SYN sent by both", to: 3, proto: tcp, state: tcpSynSent2, srcPort: 40002, dstPort: 443},
	{name: "SYN sent in a zone", to: 3, proto: tcp, state: tcpSynSent, srcPort: 40003, dstPort: 443, zone: 7},
	{name: "SYN sent elsewhere", to: 4, proto: tcp, state: tcpSynSent, srcPort: 40004, dstPort: 443},
	{name: "SYN received", to: 3, proto: tcp, state: synRecv, srcPort: 40005, dstPort: 443},
	{name: "established", to: 3, proto: tcp, state: established, srcPort: 40006, dstPort: 443},
	{name: "FIN wait", to: 3, proto: tcp, state: finWait, srcPort: 40007, dstPort: 443},
	{name: "close wait", to: 3, proto: tcp, state: closeWait, srcPort: 40008, dstPort: 443},
	{name: "last ACK", to: 3, proto: tcp, state: lastAck, srcPort: 40009, dstPort: 443},
	{name: "time wait", to: 3, proto: tcp, state: timeWait, srcPort: 40010, dstPort: 443},
	{name: "DNS over TCP", to: 3, proto: tcp, state: established, srcPort: 40011, dstPort: 53},
	{name: "a question", to: 3, proto: udp, srcPort: 40012, dstPort: 53},
	{name: "a late answer", to: 3, proto: udp, srcPort: 53, dstPort: 40013},
	{name: "between two servers", to: 3, proto: udp, srcPort: 53, dstPort: 53},
	{name: "other UDP", to: 3, proto: udp, srcPort: 40014, dstPort: 443},
	{name: "UDP whose port has 53 in it", to: 3, proto: udp, srcPort: 40015, dstPort: 53 << 8},
	{name: "neither TCP nor UDP", to: 3, proto: icmpLike, srcPort: 53, dstPort: 53},
}

type family struct {
	name string
	af   byte
	file string
	addr func(n byte) netip.Addr
}

var families = []family{
	{"IPv4", unix.AF_INET, "testdata/ipv4.nl", func(n byte) netip.Addr { return netip.AddrFrom4([4]byte{10, 1, 2, n}) }},
	{"IPv6", unix.AF_INET6, "testdata/ipv6.nl", func(n byte) netip.Addr { return netip.AddrFrom16([16]byte{0: 0xfd, 1: 1, 15: n}) }},
}

// recording are the messages of a file.
func recording(t testing.TB, file string) (msgs []netlink.Message) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for len(b) >= 16 {
		n := binary.NativeEndian.Uint32(b)
		msgs = append(msgs, netlink.Message{
			Header: netlink.Header{
				Length: n,
				Type:   netlink.HeaderType(binary.NativeEndian.Uint16(b[4:])),
				Flags:  netlink.HeaderFlags(binary.NativeEndian.Uint16(b[6:])),
			},
			Data: b[16:n],
		})
		b = b[n:]
	}
	return msgs
}

// line is what is looked at of a message's entry, as text.
func line(t testing.TB, m netlink.Message) string {
	t.Helper()
	e, _, err := parse(m.Data[nfgenmsgLen:])
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("proto %d state %d from port %d to %v", e.proto, e.tcpState, e.srcPort, e.dst)
}

func (r row) line(f family) string {
	return fmt.Sprintf("proto %d state %d from port %d to %v", r.proto, r.state, r.srcPort,
		netip.AddrPortFrom(f.addr(r.to), r.dstPort))
}

// TestParse: each recorded entry is read as what it was made of.
func TestParse(t *testing.T) {
	for _, f := range families {
		var have, want []string
		for _, m := range recording(t, f.file) {
			have = append(have, line(t, m))
		}
		for _, r := range recorded {
			want = append(want, r.line(f))
		}
		slices.Sort(have)
		slices.Sort(want)
		if !slices.Equal(have, want) {
			t.Errorf("%s: have\n%s\nwant\n%s", f.name, strings.Join(have, "\n"), strings.Join(want, "\n"))
		}
	}
}

// TestParseNames: an entry is named by its addresses and ports, its id and its zone, as
// the kernel wrote them.
func TestParseNames(t *testing.T) {
	for _, f := range families {
		for _, m := range recording(t, f.file) {
			e, name, err := parse(m.Data[nfgenmsgLen:])
			if err != nil {
				t.Fatal(err)
			}
			all, err := netlink.UnmarshalAttributes(m.Data[nfgenmsgLen:])
			if err != nil {
				t.Fatal(err)
			}
			got, err := netlink.UnmarshalAttributes(name)
			if err != nil {
				t.Fatal(err)
			}
			var want []netlink.Attribute
			zone := e.srcPort == 40003
			for _, a := range all {
				switch a.Type &^ unix.NLA_F_NESTED {
				case ctaTupleOrig, ctaID:
					want = append(want, a)
				case ctaZone:
					if !zone {
						t.Error("an entry that was made in no zone has one")
					}
					want = append(want, a)
				}
			}
			if n := 2 + map[bool]int{true: 1}[zone]; len(want) != n ||
				!slices.EqualFunc(got, want, func(a, b netlink.Attribute) bool {
					return a.Type == b.Type && bytes.Equal(a.Data, b.Data)
				}) {
				t.Errorf("%s: %s: named %v, want %v", f.name, line(t, m), got, want)
			}
		}
	}
}

// TestParseCut: an entry that is cut off is an error, or all of it is read but the state.
func TestParseCut(t *testing.T) {
	for _, f := range families {
		for _, m := range recording(t, f.file) {
			whole, _, _ := parse(m.Data[nfgenmsgLen:])
			failed := 0
			for n := range len(m.Data) - nfgenmsgLen {
				e, name, err := parse(m.Data[nfgenmsgLen : nfgenmsgLen+n])
				if err != nil {
					if failed++; name != nil || e != (entry{}) {
						t.Fatalf("%s: cut to %d bytes: %+v and %v", f.name, n, e, err)
					}
					continue
				}
				missing := whole
				missing.tcpState = 0 // which is no half-open connection's
				if e != whole && e != missing || len(name) == 0 {
					t.Fatalf("%s: cut to %d bytes: %+v, whole %+v", f.name, n, e, whole)
				}
			}
			if failed == 0 {
				t.Errorf("%s: cut off anywhere it is no error", f.name)
			}
		}
	}
}

// TestParseNameless: to delete by a name without a tuple empties the whole table
// (ctnetlink_del_conntrack), and by one without an id takes what has come in an entry's place. Such
// an entry is an error, and nothing is asked.
func TestParseNameless(t *testing.T) {
	for _, f := range families {
		for _, missing := range []uint16{ctaTupleOrig, ctaID} {
			k := newTable(t, f)
			k.msgs = k.msgs[:1]
			k.msgs[0].Data = without(t, k.msgs[0].Data, missing)
			if e, name, err := parse(k.msgs[0].Data[nfgenmsgLen:]); err == nil ||
				err.Error() != "read conntrack entry: it has no destination or no id" || name != nil ||
				e != (entry{}) {
				t.Errorf("%s: without attribute %d: %+v, %v, %v", f.name, missing, e, name, err)
			}
			if n, err := k.delete(t.Context(), func(entry) bool { return true }); n != 0 || err == nil ||
				k.asked != 0 {
				t.Errorf("%s: without attribute %d: %d, %v, %d deletions asked", f.name, missing, n,
					err, k.asked)
			}
		}
		m := recording(t, f.file)[0]
		all, err := netlink.UnmarshalAttributes(m.Data[nfgenmsgLen:])
		if err != nil {
			t.Fatal(err)
		}
		for i := range all {
			if all[i].Type&^unix.NLA_F_NESTED == ctaTupleOrig {
				all[i].Data = nil
			}
		}
		if e, name, err := parse(marshal(t, all)); err == nil || name != nil || e != (entry{}) {
			t.Errorf("%s: with an empty tuple: %+v, %v, %v", f.name, e, name, err)
		}
	}
}

// TestParseHarmed: what is wrong within an attribute of an entry is as much an error as what is
// wrong around it.
func TestParseHarmed(t *testing.T) {
	for _, f := range families {
		m := recording(t, f.file)[0]
		all, err := netlink.UnmarshalAttributes(m.Data[nfgenmsgLen:])
		if err != nil {
			t.Fatal(err)
		}
		for i := range all {
			if kind := all[i].Type &^ unix.NLA_F_NESTED; kind != ctaTupleOrig && kind != ctaProtoInfo {
				continue
			}
			whole := all[i].Data
			// The first attribute within is longer than all.
			all[i].Data = append(binary.NativeEndian.AppendUint16(nil, uint16(len(whole)+1)), whole[2:]...)
			if e, name, err := parse(marshal(t, all)); err == nil || name != nil || e != (entry{}) {
				t.Errorf("%s: harmed within attribute %d: %+v, %v, %v", f.name, all[i].Type, e, name, err)
			}
			all[i].Data = whole
		}
	}
}

func marshal(t *testing.T, attributes []netlink.Attribute) []byte {
	t.Helper()
	b, err := netlink.MarshalAttributes(attributes)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// without is a message's data without an attribute.
func without(t *testing.T, data []byte, kind uint16) []byte {
	t.Helper()
	all, err := netlink.UnmarshalAttributes(data[nfgenmsgLen:])
	if err != nil {
		t.Fatal(err)
	}
	some := slices.DeleteFunc(slices.Clone(all), func(a netlink.Attribute) bool {
		return a.Type&^unix.NLA_F_NESTED == kind
	})
	if len(some) != len(all)-1 {
		t.Fatalf("%d of %d attributes are another than %d", len(some), len(all), kind)
	}
	return append(slices.Clone(data[:nfgenmsgLen]), marshal(t, some)...)
}

// table is a kernel that lists a recording and is asked to delete of it.
type table struct {
	t       *testing.T
	family  family
	msgs    []netlink.Message
	deleted []string
	asked   int             // deletions
	answer  func(n int) int // errno for the n-th deletion, 0: done
	dump    error
}

func (k *table) ask(reqs []netlink.Message) ([]netlink.Message, error) {
	if len(reqs) != 1 || len(reqs[0].Data) < nfgenmsgLen ||
		!bytes.Equal(reqs[0].Data[:nfgenmsgLen], []byte{k.family.af, 0, 0, 0}) {
		k.t.Fatalf("%s: asked %+v", k.family.name, reqs)
	}
	switch h := reqs[0].Header; h.Type {
	case 1<<8 | 1: // IPCTNL_MSG_CT_GET
		if h.Flags != netlink.Request|netlink.Dump {
			k.t.Errorf("%s: asked for the table with flags %v", k.family.name, h.Flags)
		}
		if k.dump != nil {
			return nil, k.dump
		}
		// the last ends it
		return nltest.Multipart(append(slices.Clone(k.msgs), netlink.Message{Data: make([]byte, 4)}))
	case 1<<8 | 2: // IPCTNL_MSG_CT_DELETE
		if h.Flags != netlink.Request|netlink.Acknowledge {
			k.t.Errorf("%s: deletion with flags %v", k.family.name, h.Flags)
		}
		k.asked++
		name := reqs[0].Data[nfgenmsgLen:]
		for _, m := range k.msgs {
			if len(m.Data) < nfgenmsgLen {
				continue
			}
			if _, n, _ := parse(m.Data[nfgenmsgLen:]); bytes.Equal(n, name) {
				k.deleted = append(k.deleted, line(k.t, m))
			}
		}
		errno := 0
		if k.answer != nil {
			errno = k.answer(len(k.deleted))
		}
		return nltest.Error(errno, reqs)
	}
	k.t.Fatalf("%s: asked %+v", k.family.name, reqs)
	return nil, nil
}

func newTable(t *testing.T, f family) *table {
	return &table{t: t, family: f, msgs: recording(t, f.file)}
}

// delete has the entries that match deleted.
func (k *table) delete(ctx context.Context, match func(entry) bool) (int, error) {
	conn := nltest.Dial(k.ask)
	defer conn.Close()
	return deleteOn(ctx, conn, k.family.af, match)
}

// TestDelete: of the recorded table exactly those entries are deleted that keep new rules from
// taking effect; established connections never.
func TestDelete(t *testing.T) {
	for _, f := range families {
		only := func(n byte) []netip.Prefix {
			return []netip.Prefix{netip.PrefixFrom(f.addr(n), f.addr(n).BitLen())}
		}
		for _, tt := range []struct {
			what  string
			match func(entry) bool
			names []string
		}{
			{"half-open to one service", halfOpen(only(3)), []string{"SYN sent", "SYN sent by both", "SYN sent in a zone"}},
			{"half-open to another", halfOpen(only(4)), []string{"SYN sent elsewhere"}},
			{"half-open to nobody", halfOpen(only(5)), nil},
			{"DNS", exchange(53), []string{"a question", "a late answer", "between two servers"}},
			{"late answers", lateAnswer(53), []string{"a late answer", "between two servers"}},
		} {
			k := newTable(t, f)
			n, err := k.delete(t.Context(), tt.match)
			var want []string
			for _, r := range recorded {
				if slices.Contains(tt.names, r.name) {
					want = append(want, r.line(f))
				}
			}
			slices.Sort(k.deleted)
			slices.Sort(want)
			if err != nil || n != len(want) || !slices.Equal(k.deleted, want) {
				t.Errorf("%s, %s: %d, %v: deleted\n%s\nwant\n%s", f.name, tt.what, n, err,
					strings.Join(k.deleted, "\n"), strings.Join(want, "\n"))
			}
		}
	}
}

// TestDeleteGone: what ended by itself is not counted and no error; anything else ends the walk.
func TestDeleteGone(t *testing.T) {
	all := func(entry) bool { return true }
	for _, tt := range []struct {
		name  string
		errno func(n int) int
		want  int
		err   error
	}{
		{"one ended by itself", func(n int) int { return map[int]int{2: int(unix.ENOENT)}[n] }, len(recorded) - 1, nil},
		{"the third is refused", func(n int) int { return map[int]int{3: int(unix.EPERM)}[n] }, 2, unix.EPERM},
	} {
		k := newTable(t, families[0])
		k.answer = tt.errno
		if n, err := k.delete(t.Context(), all); n != tt.want || !errors.Is(err, tt.err) ||
			tt.err == nil && err != nil {
			t.Errorf("%s: %d, %v; want %d, %v", tt.name, n, err, tt.want, tt.err)
		}
	}
	k := newTable(t, families[0])
	k.dump = unix.EPERM
	if n, err := k.delete(t.Context(), all); n != 0 || !errors.Is(err, unix.EPERM) {
		t.Errorf("a table that may not be read: %d, %v", n, err)
	}
	k = newTable(t, families[0])
	// no entry
	k.msgs = append(
		k.msgs[:1:1], netlink.Message{Header: k.msgs[0].Header, Data: []byte{unix.AF_INET, 0, 0}})
	if n, err := k.delete(t.Context(), all); n != 1 || err != nil {
		t.Errorf("a message that is too short: %d, %v", n, err)
	}
	k.msgs[1].Data = []byte{unix.AF_INET, 0, 0, 0} // nothing of an entry
	if n, err := k.delete(t.Context(), all); n != 0 || err == nil || len(k.deleted) != 1 {
		t.Errorf("an empty entry: %d, %v, deleted %v", n, err, k.deleted)
	}
	k.msgs[1].Data = []byte{unix.AF_INET, 0, 0, 0, 9, 0, 1, 0, 1}
	if n, err := k.delete(t.Context(), all); n != 0 || err == nil || len(k.deleted) != 1 { // none more
		t.Errorf("an entry that cannot be read: %d, %v, deleted %v", n, err, k.deleted)
	}
}

// TestDeleteEnds: with its context.
func TestDeleteEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	k := newTable(t, families[0])
	k.answer = func(n int) int {
		if n == 2 {
			cancel()
		}
		return 0
	}
	if n, err := k.delete(ctx, func(entry) bool { return true }); n != 2 ||
		!errors.Is(err, context.Canceled) {
		t.Errorf("%d, %v; want 2 and that it was canceled", n, err)
	}
	// Too late for a question to the kernel: an error of each family.
	late, cancel := context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
	defer cancel()
	n, err := deleteEntries(late, bothFamilies, func(entry) bool { return false })
	if n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) ||
		strings.Count(err.Error(), "delete conntrack entries: ") != len(families) {
		t.Errorf("past its time: %d, %v", n, err)
	}
}

// TestNothingToDelete: no prefixes, no question; not even one that fails.
func TestNothingToDelete(t *testing.T) {
	late, cancel := context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
	defer cancel()
	if n, err := DeleteHalfOpen(late, nil); n != 0 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	for name, delete := range map[string]func() (int, error){
		"half-open": func() (int, error) {
			return DeleteHalfOpen(late, []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")})
		},
		"DNS":      func() (int, error) { return DeleteUDP(late, 53) },
		"late DNS": func() (int, error) { return DeleteLateUDP(late, 53) },
	} {
		if n, err := delete(); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: %d, %v; want that the time is over", name, n, err)
		}
	}
}

// TestFamiliesOf: a family of which no prefix is asked for is not walked through.
func TestFamiliesOf(t *testing.T) {
	four, six := netip.MustParsePrefix("10.0.0.1/32"), netip.MustParsePrefix("fd00::1/128")
	for _, c := range []struct {
		of   []netip.Prefix
		want []byte
	}{
		{nil, nil},
		{[]netip.Prefix{{}}, nil},
		{[]netip.Prefix{four, four}, []byte{unix.AF_INET}},
		{[]netip.Prefix{six}, []byte{unix.AF_INET6}},
		{[]netip.Prefix{six, four}, bothFamilies},
	} {
		if got := familiesOf(c.of); !slices.Equal(got, c.want) {
			t.Errorf("%v: %v, want %v", c.of, got, c.want)
		}
	}
}
