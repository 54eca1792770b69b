package conntrack

import (
	"net/netip"
	"testing"
)

// TestParseEntry: each recorded entry is read with both its tuples, its status and its state.
func TestParseEntry(t *testing.T) {
	for _, f := range families {
		found := 0
		for _, m := range recording(t, f.file) {
			e, err := parseEntry(m.Data[nfgenmsgLen:])
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range recorded {
				src := netip.AddrPortFrom(f.addr(1), r.srcPort)
				dst := netip.AddrPortFrom(f.addr(r.to), r.dstPort)
				if r.proto != e.Proto || src != e.Src || dst != e.Dst {
					continue
				}
				found++
				want := Entry{Proto: r.proto, Src: src, Dst: dst, ReplySrc: dst, ReplyDst: src,
					Status: e.Status, TCPState: r.state}
				if e != want || e.Status == 0 || e.Redirected() || e.Status&statusSeenReply != 0 {
					t.Errorf("%s: %s: %+v, want %+v", f.name, r.name, e, want)
				}
			}
		}
		if found != len(recorded) {
			t.Errorf("%s: %d entries read, want %d", f.name, found, len(recorded))
		}
	}
}

// TestParseEntryCut: whatever is cut off, what is read is part of the whole, or an error.
func TestParseEntryCut(t *testing.T) {
	for _, f := range families {
		for _, m := range recording(t, f.file) {
			whole, _ := parseEntry(m.Data[nfgenmsgLen:])
			failed := 0
			for n := range len(m.Data) - nfgenmsgLen {
				e, err := parseEntry(m.Data[nfgenmsgLen : nfgenmsgLen+n])
				if err != nil {
					failed++
					if e != (Entry{}) {
						t.Fatalf("%s: cut to %d bytes: %+v and %v", f.name, n, e, err)
					}
					continue
				}
				e.TCPState, e.Status = whole.TCPState, whole.Status
				if e != whole {
					t.Fatalf("%s: cut to %d bytes: %+v, whole %+v", f.name, n, e, whole)
				}
			}
			if failed == 0 {
				t.Errorf("%s: cut off anywhere it is no error", f.name)
			}
		}
	}
}

// TestTupleOfTwoFamilies: what cannot be one connection is not asked for.
func TestTupleOfTwoFamilies(t *testing.T) {
	v4, v6 := netip.MustParseAddrPort("10.0.0.1:1"), netip.MustParseAddrPort("[fd00::1]:1")
	for _, pair := range [][2]netip.AddrPort{{v4, v6}, {v6, v4}, {v4, {}}, {{}, {}}} {
		if b, err := tupleAttribute(6, pair[0], pair[1]); err == nil {
			t.Errorf("%v: %v", pair, b)
		}
	}
}

func FuzzParseEntry(f *testing.F) {
	f.Add([]byte{})
	for _, family := range families {
		for _, m := range recording(f, family.file) {
			f.Add(m.Data[nfgenmsgLen:])
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if e, err := parseEntry(data); err == nil && !e.Dst.Addr().IsValid() {
			t.Errorf("%+v without a destination", e)
		}
	})
}
