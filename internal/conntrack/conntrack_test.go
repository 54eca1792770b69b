package conntrack

import (
	"net/netip"
	"testing"
)

func TestSetContains(t *testing.T) {
	s := newSet([]netip.Prefix{
		netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("192.0.2.7/32"), netip.MustParsePrefix("fd00::/64"),
	})
	for a, want := range map[string]bool{
		"10.0.0.0": true, "10.255.255.255": true, "11.0.0.0": false, "9.255.255.255": false, "192.0.2.7": true, "192.0.2.8": false, "fd00::1": true, "fd01::": false,
	} {
		if got := s.contains(netip.MustParseAddr(a)); got != want {
			t.Errorf("%s: got %v", a, got)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte{})
	for _, family := range families {
		for _, m := range recording(f, family.file) {
			f.Add(m.Data[nfgenmsgLen:])
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) { parse(data) })
}
