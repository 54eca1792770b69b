package conntrack

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
)

func TestSetContains(t *testing.T) {
	s := newSet([]netip.Prefix{
		netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("10.1.0.0/16"),
		netip.MustParsePrefix("192.0.2.7/32"), netip.MustParsePrefix("fd00::/64"),
	})
	for a, want := range map[string]bool{
		"10.0.0.0": true, "10.255.255.255": true, "11.0.0.0": false, "9.255.255.255": false, "192.0.2.7": true, "192.0.2.8": false, "fd00::1": true, "fd01::": false,
	} {
		if got := s.contains(netip.MustParseAddr(a)); got != want {
			t.Errorf("%s: got %v", a, got)
		}
	}
}

// TestSetContainsAtRandom: what a search one by one finds, the set has, however the prefixes are
// ordered, nested and repeated; so few addresses that most are near some prefix's edge.
func TestSetContainsAtRandom(t *testing.T) {
	seed := rand.Uint64()
	random := rand.New(rand.NewPCG(seed, 0))
	address := func() netip.Addr {
		low := byte(random.IntN(32))
		if random.IntN(2) == 0 {
			return netip.AddrFrom4([4]byte{10, 3: low})
		}
		return netip.AddrFrom16([16]byte{0: 0xfd, 15: low})
	}
	for range 2000 {
		var prefixes []netip.Prefix
		for range random.IntN(12) {
			a := address()
			prefixes = append(prefixes, netip.PrefixFrom(a, a.BitLen()-random.IntN(6)))
		}
		if random.IntN(8) == 0 {
			prefixes = append(prefixes, netip.Prefix{})
		}
		s := newSet(prefixes)
		for range 20 {
			a := address()
			want := slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return p.Contains(a) })
			if got := s.contains(a); got != want {
				t.Fatalf("seed %d: %v in the set of %v: %v, want %v; it is %v", seed, a, prefixes, got, want, s)
			}
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
