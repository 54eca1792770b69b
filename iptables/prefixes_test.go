package iptables

import (
	"math/rand/v2"
	"net/netip"
)

// randomPrefixes are n different single addresses from 10.0.0.0/8 or fd00::/32, the
// same for the same seed.
func randomPrefixes(f Family, n int, seed uint64) []netip.Prefix {
	r := rand.New(rand.NewPCG(seed, 0))
	seen := map[netip.Prefix]bool{}
	var prefixes []netip.Prefix
	for len(prefixes) < n {
		var a netip.Addr
		x := r.Uint64()
		if f == IPv4 {
			a = netip.AddrFrom4([4]byte{10, byte(x), byte(x >> 8), byte(x >> 16)})
		} else {
			a = netip.AddrFrom16([16]byte{0: 0xfd, 4: byte(x), 5: byte(x >> 8), 8: byte(x >> 16),
				14: byte(x >> 24), 15: byte(x >> 32)})
		}
		p := netip.PrefixFrom(a, a.BitLen())
		if !seen[p] {
			seen[p] = true
			prefixes = append(prefixes, p)
		}
	}
	return prefixes
}

// densePrefixes are n addresses in a row from 10.128.0.1 or fd00::1 that do not merge into a
// few: every other one.
func densePrefixes(f Family, n int) []netip.Prefix {
	a := netip.MustParseAddr("10.128.0.1")
	if f == IPv6 {
		a = netip.MustParseAddr("fd00::1")
	}
	var prefixes []netip.Prefix
	for range n {
		prefixes = append(prefixes, netip.PrefixFrom(a, a.BitLen()))
		a = a.Next().Next()
	}
	return prefixes
}
