package iptables

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func serviceSet(f Family, services []netip.Prefix) Ruleset {
	return Interception{Family: f, Jumps: true, ProxyUID: 999, ProxyGID: 999, OutboundPort: 15001,
		Services: services}.Ruleset()
}

// redirects says whether a ruleset redirects an ordinary user's connection to the address.
func redirects(r Ruleset, a netip.Addr) bool {
	v := r.Walk(Packet{Hook: Output, Dst: netip.AddrPortFrom(a, 443), Proto: TCP, UID: 1000,
		GID: 1000, Syn: true})
	return v.Action == Redirect
}

// The order that the buckets are cut by; without it they have no end, so this comes first.
func TestCanonical(t *testing.T) {
	in := prefixes("10.0.0.7/24", "10.0.0.0/24", "10.0.0.0/16", "10.0.0.0/32", "9.0.0.0/8",
		"fd00::1/64", "::ffff:10.0.0.9/128", "fd00::/64")
	in = append(in, netip.Prefix{})
	for f, want := range map[Family]string{IPv4: "[9.0.0.0/8 10.0.0.0/16 10.0.0.0/24 10.0.0.0/32]",
		IPv6: "[fd00::/64]"} {
		if got := fmt.Sprint(canonical(f, in)); got != want {
			t.Errorf("%s: got %s, want %s", f, got, want)
		}
	}
}

// Whatever the buckets look like: exactly the listed addresses are redirected, never one more.
func TestBucketsCoverExactlyTheServices(t *testing.T) {
	for _, f := range families {
		for name, services := range map[string][]netip.Prefix{
			"256 random":     randomPrefixes(f, 256, 1),
			"257 random":     randomPrefixes(f, 257, 1),
			"10,000 random":  randomPrefixes(f, 10000, 2),
			"10,000 dense":   densePrefixes(f, 10000),
			"mixed lengths":  mixedPrefixes(f, 3000, 3),
			"nested":         nestedPrefixes(f),
			"both and wider": slices.Concat(randomPrefixes(f, 1000, 4), densePrefixes(f, 1000), mixedPrefixes(f, 1000, 5)),
		} {
			r := serviceSet(f, services)
			listed := map[netip.Prefix]bool{}
			for _, p := range services {
				listed[p] = true
			}
			contains := func(a netip.Addr) bool {
				for bits := range a.BitLen() + 1 {
					if p, _ := a.Prefix(bits); listed[p] {
						return true
					}
				}
				return false
			}
			random := rand.New(rand.NewPCG(9, 9))
			for range 80 {
				p := services[random.IntN(len(services))]
				for _, a := range []netip.Addr{p.Addr(), p.Addr().Prev(), p.Addr().Next(), last(p),
					last(p).Next()} {
					if a.IsValid() && redirects(r, a) != contains(a) {
						t.Fatalf("%s %s: %s: redirected %v, listed %v", f, name, a, !contains(a), contains(a))
					}
				}
			}
			for _, c := range r.chains {
				if name != "nested" && c.name != chainServiceCIDRs && len(c.rules) > nodeRows {
					t.Errorf("%s %s: %s has %d rows", f, name, c.name, len(c.rules))
				}
			}
		}
	}
}

// mixedPrefixes are n prefixes of 18 to 32 bits in 10.64.0.0/10, or of 50 to 64 in fd40::/32.
func mixedPrefixes(f Family, n int, seed uint64) []netip.Prefix {
	r := rand.New(rand.NewPCG(seed, 1))
	var out []netip.Prefix
	for range n {
		x := r.Uint32()
		if f == IPv4 {
			out = append(out,
				netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 64 | byte(x)&63, byte(x >> 8), byte(x >> 16)}),
					18+r.IntN(15)).Masked())
		} else {
			out = append(out,
				netip.PrefixFrom(
					netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x40, 4: byte(x), 5: byte(x >> 8), 6: byte(x >> 16),
						7: byte(x >> 24)}), 50+r.IntN(15)).Masked())
		}
	}
	return out
}

// nestedPrefixes make as many levels of nodes as a set can: 300 addresses beside one another, every
// second one, and one more for each level above them.
func nestedPrefixes(f Family) []netip.Prefix {
	base := netip.MustParseAddr("10.0.0.0")
	if f == IPv6 {
		base = netip.MustParseAddr("fd00::")
	}
	var out []netip.Prefix
	for bit := 8; bit < base.BitLen()-10; bit++ {
		a := base.AsSlice()
		a[bit/8] |= 1 << (7 - bit%8)
		addr, _ := netip.AddrFromSlice(a)
		out = append(out, netip.PrefixFrom(addr, addr.BitLen()))
	}
	for i := range 300 {
		a := base.AsSlice()
		a[len(a)-1], a[len(a)-2] = byte(2*i), byte(2*i>>8)
		addr, _ := netip.AddrFromSlice(a)
		out = append(out, netip.PrefixFrom(addr, addr.BitLen()))
	}
	return out
}

func last(p netip.Prefix) netip.Addr {
	a := p.Addr().AsSlice()
	for i := p.Bits(); i < len(a)*8; i++ {
		a[i/8] |= 1 << (7 - i%8)
	}
	addr, _ := netip.AddrFromSlice(a)
	return addr
}

func TestUpTo256ServicesStandAsTheyAre(t *testing.T) {
	// mergeable, and one within another
	services := prefixes("10.0.0.0/32", "10.0.0.1/32", "10.0.0.0/24")
	rules := serviceSet(IPv4, services).Rules(chainServiceCIDRs)
	want := []string{"-d 10.0.0.0/24 -j SERVICE_PROXY_REDIRECT",
		"-d 10.0.0.0/32 -j SERVICE_PROXY_REDIRECT", "-d 10.0.0.1/32 -j SERVICE_PROXY_REDIRECT"}
	if !slices.Equal(rules, want) {
		t.Errorf("got %q, want %q", rules, want)
	}
}

// At exactly 256 the rows stand as they were given, adjacent ones too; with one more they are
// merged, and where that leaves more than 256, cut into buckets.
func TestTheLastPlainRow(t *testing.T) {
	for _, f := range families {
		next := netip.MustParseAddr("10.0.0.0")
		if f == IPv6 {
			next = netip.MustParseAddr("fd00::")
		}
		var row, apart []netip.Prefix // one after the other, and every second one
		for range 257 {
			row = append(row, netip.PrefixFrom(next, next.BitLen()))
			next = next.Next()
		}
		for range 257 {
			apart = append(apart, netip.PrefixFrom(next, next.BitLen()))
			next = next.Next().Next()
		}
		for _, test := range []struct {
			name         string
			services     []netip.Prefix
			rows, chains int // rows of SERVICE_PROXY_SERVICE_CIDRS, buckets
		}{
			{"256 in a row", row[:256], 256, 0},
			{"257 in a row", row, 2, 0},
			{"256 apart", apart[:256], 256, 0},
			{"257 apart", apart, 2, 2},
			{"257 of which two merge", slices.Concat(apart[:255], row[:2]), 256, 0},
		} {
			r := serviceSet(f, test.services)
			chains := slices.DeleteFunc(r.Chains(), func(name string) bool {
				return !strings.HasPrefix(name, "SERVICE_PROXY_B")
			})
			if rows := len(r.Rules(chainServiceCIDRs)); rows != test.rows || len(chains) != test.chains {
				t.Errorf("%s %s: %d rows and %d buckets, want %d and %d", f, test.name, rows, len(chains),
					test.rows, test.chains)
			}
		}
	}
}

// What buckets are for: a packet meets few rows, a write few chains. The figures are those that
// nodeBits was chosen by; TestNestedBuckets shows that the kernel takes the deepest.
func TestBucketsAreFewAndShort(t *testing.T) {
	for _, f := range families {
		for _, test := range []struct {
			services          []netip.Prefix
			chains, rows, way int // at most: buckets, rows on the way of a packet, buckets on it
		}{
			{randomPrefixes(f, 300, 1), 2, 161, 1},
			{randomPrefixes(f, 10000, 1), 82, 195, 3},
			{nestedPrefixes(f), 38, 392, 10},
		} {
			r := serviceSet(f, test.services)
			var walk func(chain string) (rows, way int)
			walk = func(chain string) (rows, way int) {
				specs := r.Rules(chain)
				rows = len(specs)
				for n, spec := range specs {
					if to := target(spec); strings.HasPrefix(to, "SERVICE_PROXY_B") {
						inRows, inWay := walk(to)
						rows, way = max(rows, n+1+inRows), max(way, 1+inWay)
					}
				}
				return rows, way
			}
			rows, way := walk(chainServiceCIDRs)
			chains := len(r.Chains()) - len(serviceSet(f, nil).Chains())
			t.Logf("%s, %d services: %d buckets, %d rows and %d buckets on the way of a packet", f,
				len(test.services), chains, rows, way)
			if chains > test.chains || rows > test.rows || way > test.way {
				t.Errorf(
					"%s, %d services: %d buckets, %d rows and %d buckets on the way of a packet, want at most %d, %d and %d", f, len(test.services), chains, rows, way,
					test.chains, test.rows, test.way)
			}
		}
	}
}

// Plain rows come first: they are the wider ones, and no bucket's row stands before them.
func TestPlainRowsComeBeforeBuckets(t *testing.T) {
	rules := serviceSet(IPv4, slices.Concat(randomPrefixes(IPv4, 1000, 1),
		prefixes("10.0.0.0/9", "10.240.0.0/13", "64.0.0.0/2"))).Rules(chainServiceCIDRs)
	bucket := false
	for _, spec := range rules {
		isBucket := strings.Contains(spec, "--comment bucket")
		if bucket && !isBucket {
			t.Errorf("%q stands behind a bucket in %q", spec, rules)
		}
		bucket = bucket || isBucket
	}
	if !bucket || !slices.Contains(rules, "-d 64.0.0.0/2 -j SERVICE_PROXY_REDIRECT") {
		t.Errorf("rows %q", rules)
	}
}

// One address more touches one bucket, wherever it is, unless a node crosses 256.
func TestOneMoreAddressTouchesOneBucket(t *testing.T) {
	for _, f := range families {
		services := randomPrefixes(f, 10000, 1)
		before := serviceSet(f, services)
		random := rand.New(rand.NewPCG(4, 4))
		var most int
		for range 10 {
			p := randomPrefixes(f, 1, random.Uint64())[0]
			after := serviceSet(f, append(slices.Clone(services), p))
			table, _ := Parse(f, []byte(before.String()))
			most = max(most, len(NewPlan(after, table).lines))
		}
		// Most often a single insertion; a bucket is declared anew where two addresses merge.
		if most > nodeRows+1 {
			t.Errorf("%s: one address more is a plan of %d lines", f, most)
		}
	}
	// An address far away puts another level above the buckets and leaves them as they are.
	near := randomPrefixes(IPv4, 1000, 1)
	before, after := serviceSet(IPv4, near),
		serviceSet(IPv4, append(slices.Clone(near), netip.MustParsePrefix("192.168.0.1/32")))
	for _, c := range before.chains {
		if rules, ok := after.chain(c.name); c.name != chainServiceCIDRs &&
			(!ok || !slices.Equal(rules, c.rules)) {
			t.Errorf("a far address changed %s", c.name)
		}
	}
}

func TestAggregateIsExact(t *testing.T) {
	for _, test := range []struct{ in, want []string }{
		{[]string{"10.0.0.0/32", "10.0.0.1/32"}, []string{"10.0.0.0/31"}},
		{[]string{"10.0.0.1/32", "10.0.0.2/32"}, []string{"10.0.0.1/32", "10.0.0.2/32"}},
		{[]string{"10.0.0.0/32", "10.0.0.1/32", "10.0.0.2/31", "10.0.0.4/30"}, []string{"10.0.0.0/29"}},
		{[]string{"10.0.0.0/8", "10.1.0.0/16", "10.255.255.255/32"}, []string{"10.0.0.0/8"}},
		{[]string{"0.0.0.0/1", "128.0.0.0/1"}, []string{"0.0.0.0/0"}},
		{[]string{"0.0.0.0/0", "10.0.0.0/8"}, []string{"0.0.0.0/0"}},
		{[]string{"10.0.0.0/24", "10.0.1.0/25"}, []string{"10.0.0.0/24", "10.0.1.0/25"}},
		{[]string{"10.0.0.0/25", "10.0.1.0/24"}, []string{"10.0.0.0/25", "10.0.1.0/24"}},
		{[]string{"fd00::/128", "fd00::1/128"}, []string{"fd00::/127"}},
	} {
		f := IPv4
		if test.in[0] == "fd00::/128" {
			f = IPv6
		}
		if got := aggregate(canonical(f, prefixes(test.in...))); fmt.Sprint(got) != fmt.Sprint(
			test.want) {
			t.Errorf("%v: got %v, want %v", test.in, got, test.want)
		}
	}
}
