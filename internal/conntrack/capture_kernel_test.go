//go:build kernel

package conntrack

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"net/netip"
	"os"
	"slices"
	"testing"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

var update = flag.Bool("update", false, "record testdata anew, from this kernel")

// TestRecordedTable: this kernel, given the entries of recorded, lists them as the recording in
// testdata does; with -update the recording is what it lists.
func TestRecordedTable(t *testing.T) {
	if *update {
		os.Setenv("CONNTRACK_UPDATE", "1")
	}
	if !inNetns(t) {
		return
	}
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for _, family := range families {
		for _, r := range recorded {
			if _, err := conn.Execute(
				request(0, family.af, netlink.Request|netlink.Acknowledge|netlink.Create|netlink.Excl,
					r.attributes(t, family.addr))); err != nil {
				t.Fatalf("make %+v: %v", r, err)
			}
		}
		msgs, err := conn.Execute(request(msgGet, family.af, netlink.Request|netlink.Dump, nil))
		if err != nil {
			t.Fatal(err)
		}
		var have, want []string
		var raw []byte
		for _, m := range msgs {
			// The header that the kernel sent, which Execute takes apart; sequence and port
			// number are of the asker.
			raw = binary.NativeEndian.AppendUint32(raw, uint32(16+len(m.Data)))
			raw = binary.NativeEndian.AppendUint16(raw, uint16(m.Header.Type))
			raw = binary.NativeEndian.AppendUint16(raw, uint16(m.Header.Flags))
			raw = append(raw, make([]byte, 8)...)
			raw = append(raw, m.Data...)
			have = append(have, line(t, m))
		}
		if os.Getenv("CONNTRACK_UPDATE") != "" {
			if err := os.WriteFile(family.file, raw, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		for _, m := range recording(t, family.file) {
			want = append(want, line(t, m))
		}
		slices.Sort(have)
		slices.Sort(want)
		if !slices.Equal(have, want) {
			t.Errorf("the kernel lists\n%v\nrecorded\n%v", have, want)
		}
	}
}

// attributes ask the kernel for an entry (linux/netfilter/nfnetlink_conntrack.h).
func (r row) attributes(t *testing.T, addr func(n byte) netip.Addr) []byte {
	t.Helper()
	const tupleReply, status, timeout, confirmed = 2, 3, 7, 1 << 3
	e := netlink.NewAttributeEncoder()
	e.ByteOrder = binary.BigEndian
	tuple := func(src, dst netip.Addr, srcPort, dstPort uint16) func(*netlink.AttributeEncoder) error {
		return func(e *netlink.AttributeEncoder) error {
			e.Nested(ctaTupleIP, func(e *netlink.AttributeEncoder) error {
				base := uint16(1)
				if src.Is6() {
					base = 3
				}
				e.Bytes(base, src.AsSlice())
				e.Bytes(base+1, dst.AsSlice())
				return nil
			})
			e.Nested(ctaTupleProto, func(e *netlink.AttributeEncoder) error {
				e.Uint8(ctaProtoNum, r.proto)
				e.Uint16(ctaProtoSrcPort, srcPort)
				e.Uint16(ctaProtoDstPort, dstPort)
				return nil
			})
			return nil
		}
	}
	client, server := addr(1), addr(r.to)
	e.Nested(ctaTupleOrig, tuple(client, server, r.srcPort, r.dstPort))
	e.Nested(tupleReply, tuple(server, client, r.dstPort, r.srcPort))
	e.Uint32(status, confirmed)
	e.Uint32(timeout, 600)
	if r.proto == unix.IPPROTO_TCP {
		e.Nested(ctaProtoInfo, func(e *netlink.AttributeEncoder) error {
			e.Nested(ctaProtoInfoTCP, func(e *netlink.AttributeEncoder) error {
				e.Uint8(ctaProtoTCPState, r.state)
				return nil
			})
			return nil
		})
	}
	if r.zone != 0 {
		e.Uint16(ctaZone, r.zone)
	}
	b, err := e.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestDeleteAsksByID: the kernel finds an entry by what parse names it with, and not one
// that took its place. (The id is made of its address in memory. Another is put between, which
// gets that place, mostly: where the kernel gave it to the second all the same it is tried again.)
func TestDeleteAsksByID(t *testing.T) {
	if !inNetns(t) {
		return
	}
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for _, family := range families {
		r := row{to: 3, proto: unix.IPPROTO_TCP, state: tcpSynSent, srcPort: 40000, dstPort: 443}
		between := r
		between.srcPort++
		make := func(r row) (name []byte) {
			if _, err := conn.Execute(
				request(0, family.af, netlink.Request|netlink.Acknowledge|netlink.Create|netlink.Excl,
					r.attributes(t, family.addr))); err != nil {
				t.Fatal(err)
			}
			msgs, err := conn.Execute(request(msgGet, family.af, netlink.Request|netlink.Dump, nil))
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range msgs {
				e, name, err := parse(m.Data[nfgenmsgLen:])
				if err != nil {
					t.Fatal(err)
				}
				if e.srcPort == r.srcPort {
					return name
				}
			}
			t.Fatalf("%+v is not among %d entries", r, len(msgs))
			return nil
		}
		remove := func(name []byte) error {
			_, err := conn.Execute(request(msgDelete, family.af, netlink.Request|netlink.Acknowledge, name))
			return err
		}
		var first, second []byte
		for range 20 {
			first = make(r)
			if err := remove(first); err != nil {
				t.Fatal(err)
			}
			make(between)
			between.srcPort++
			if second = make(r); !bytes.Equal(first, second) {
				break
			}
			if err := remove(second); err != nil {
				t.Fatal(err)
			}
		}
		if err := remove(first); !errors.Is(err, unix.ENOENT) {
			t.Errorf("deleting an entry that is gone: %v, want ENOENT though another has its addresses", err)
		}
		if err := remove(second); err != nil {
			t.Error(err)
		}
	}
}
