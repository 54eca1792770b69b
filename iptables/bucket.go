package iptables

import (
	"crypto/sha256"
	"encoding/base32"
	"fmt"
	"net/netip"
	"slices"
)

// nodeRows is how many rows a chain may have before its addresses move into buckets, one for each
// value of the next bits, nodeBits at most. A new connection walks some 5 ns a rule, and a bucket
// of 256 is written anew in the time that the kernel takes for any deletion. Three bits and not
// eight: 300 random addresses are 2 chains and not 177. Each chain costs nft's iptables-restore
// 0.12 ms and legacy's 0.15 ms, so no more bits are taken than make all buckets of a node short
// enough: 10,000 random addresses are 82 chains where always three bits make 146 and always four
// make 272, whose first installs took 1.2 and 1.33 times the bare one. A packet meets at most 195
// rows for that and not 111 (0.4 µs more, a hundredth of a connect).
//
// nodeDepth bounds how deep nodes are nested: nft refuses more than 16 chains on the way of a
// packet (EMLINK), of which buckets share theirs with SERVICE_PROXY_OUTPUT,
// SERVICE_PROXY_SERVICE_CIDRS and SERVICE_PROXY_REDIRECT. 10,000 random addresses need 3 levels;
// only IPv6 sets made for it come near. The node at that depth keeps all its rows.
// See docs/design/facts.md#sixteen-chains and docs/design/facts.md#rule-costs-nanoseconds.
const (
	nodeRows  = 256
	nodeBits  = 3
	nodeDepth = 10
)

// addServices fills SERVICE_PROXY_SERVICE_CIDRS. Up to nodeRows prefixes stand there one a row as
// they were given; past that, adjacent ones are merged where the merged prefix holds not one
// address more, and what is still too long is cut into buckets. The outcome depends on the set of
// prefixes alone, never on what was there before.
func (b *builder) addServices(services []netip.Prefix) {
	set := canonical(b.family, services)
	if len(set) > nodeRows {
		set = aggregate(set)
	}
	b.addNode(chainServiceCIDRs, set, 0)
}

// addNode writes one node of the trie to chain. A node of more than nodeRows skips the bits that
// all of its prefixes share and then becomes one chain for each value of the next nodeBits. Bits
// are skipped in whole steps of nodeBits so that a node's name and content do not depend on its
// neighbours: an address elsewhere can put another level above a bucket, and the bucket stays as it
// is. How many of the nodeBits are taken depends on the node's own prefixes alone, too.
func (b *builder) addNode(chain string, set []netip.Prefix, depth int) {
	if len(set) <= nodeRows || depth == nodeDepth {
		for _, p := range set {
			b.add(chain, serviceRow(p))
		}
		return
	}
	bits := bucketBits(set)
	// Plain rows first: the prefixes that are too short for any bucket.
	var buckets []netip.Prefix
	for _, p := range set {
		if p.Bits() < bits {
			b.add(chain, serviceRow(p))
		} else {
			buckets = append(buckets, p)
		}
	}
	for len(buckets) > 0 {
		node := netip.PrefixFrom(buckets[0].Addr(), bits).Masked()
		n := 1
		for n < len(buckets) && node.Contains(buckets[n].Addr()) {
			n++
		}
		name := bucketName(node)
		b.add(chain, bucketRow(node, name))
		b.addNode(name, buckets[:n], depth+1)
		buckets = buckets[n:]
	}
}

// bucketBits is how long the prefixes of a node's buckets are: the shortest within the next step of
// nodeBits that leaves no bucket too long, else the whole step.
func bucketBits(set []netip.Prefix) int {
	common := commonBits(set)
	whole := common/nodeBits*nodeBits + nodeBits
	for bits := common + 1; bits < whole; bits++ {
		if longestBucket(set, bits) <= nodeRows {
			return bits
		}
	}
	return whole
}

// longestBucket is how many prefixes of the sorted set the fullest of the buckets has.
func longestBucket(set []netip.Prefix, bits int) int {
	var node netip.Prefix
	n, longest := 0, 0
	for _, p := range set {
		if p.Bits() < bits {
			continue
		}
		if !node.IsValid() || !node.Contains(p.Addr()) {
			node, n = netip.PrefixFrom(p.Addr(), bits).Masked(), 0
		}
		n++
		longest = max(longest, n)
	}
	return longest
}

func serviceRow(p netip.Prefix) string { return destination(p) + "-j " + chainRedirect }

func bucketRow(p netip.Prefix, bucket string) string {
	return destination(p) + "-m comment --comment bucket -j " + bucket
}

// commonBits is how many leading bits all prefixes of the sorted set share.
func commonBits(set []netip.Prefix) int {
	// Sorted by address: what the first and the last share, all share. The prefixes of a set this long
	// are disjoint (aggregate), so this is less than the length of an address and the trie ends.
	first, last := set[0].Addr().AsSlice(), set[len(set)-1].Addr().AsSlice()
	n := 0
	for bit(first, n) == bit(last, n) {
		n++
	}
	return n
}

func bit(a []byte, i int) byte { return a[i/8] >> (7 - i%8) & 1 }

// bucketName names the chain of a bucket within iptables' 28 characters: an IPv4 prefix
// in hexadecimal, an IPv6 prefix by a hash of 55 bits (its digits do not fit). Two
// prefixes of one hash would share a chain, which redirects exactly the same addresses:
// every row in it names its own. See docs/design/facts.md#chain-name-length.
func bucketName(p netip.Prefix) string {
	if p.Addr().Is4() {
		a := p.Addr().As4()
		return fmt.Sprintf("%s%02X%02X%02X%02X_%d", bucketPrefix4, a[0], a[1], a[2], a[3], p.Bits())
	}
	sum := sha256.Sum256([]byte(p.String()))
	return bucketPrefix6 + base32.StdEncoding.EncodeToString(sum[:])[:11]
}

const (
	bucketPrefix4 = "SERVICE_PROXY_B4_"
	bucketPrefix6 = "SERVICE_PROXY_B6_"
)

// canonical returns the prefixes of one family, masked, sorted by address and then by
// length, without doubles.
func canonical(family Family, prefixes []netip.Prefix) []netip.Prefix {
	set := make([]netip.Prefix, 0, len(prefixes))
	for _, p := range prefixes {
		if p.IsValid() && family.Of(p.Addr()) {
			set = append(set, p.Masked())
		}
	}
	slices.SortFunc(set, comparePrefix)
	return slices.Compact(set)
}

func comparePrefix(a, b netip.Prefix) int {
	if c := a.Addr().Compare(b.Addr()); c != 0 {
		return c
	}
	return a.Bits() - b.Bits()
}

// aggregate returns the shortest list of prefixes that covers exactly the
// addresses of the sorted set.
func aggregate(set []netip.Prefix) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range set {
		if n := len(out); n > 0 && out[n-1].Contains(p.Addr()) {
			continue // sorted by address, shorter first: whatever covers p stands before it
		}
		out = append(out, p)
		for len(out) > 1 { // of two, neither is "everywhere", which would cover the other
			a, b := out[len(out)-2], out[len(out)-1]
			parent := netip.PrefixFrom(a.Addr(), a.Bits()-1).Masked()
			if parent != netip.PrefixFrom(b.Addr(), b.Bits()-1).Masked() {
				break
			}
			out = append(out[:len(out)-2], parent)
		}
	}
	return out
}
