package controlplane

import (
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	resourcev3 "github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"google.golang.org/protobuf/proto"
)

// TestHostile: each kind is a configuration that can be sent: it compiles, packs, and its names are
// distinct; the same random numbers make the same one.
func TestHostile(t *testing.T) {
	opts := HostileOptions{Own: []netip.Addr{netip.MustParseAddr("10.128.0.2"),
		netip.MustParseAddr("fd28::2")}, Entries: 1000, LongName: 4096,
		Sane: Config{Services: []Service{{Name: "web", Prefixes: VIPs("10.10.0.1"), Port: 80}}}}
	for _, kind := range HostileKinds() {
		for seed := range uint64(20) {
			random := func() *rand.Rand { return rand.New(rand.NewPCG(seed, 0)) }
			s := New(Options{Listen: func() (net.Listener, error) {
				return net.Listen("tcp", "127.0.0.1:0")
			}})
			defer s.Close()
			c := Hostile(kind, random(), opts)
			if _, err := s.Set(c); err != nil {
				t.Errorf("%s, seed %d: %v", kind, seed, err)
				continue
			}
			again, err := Hostile(kind, random(), opts).resources()
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range again[resourcev3.ListenerType] {
				if _, err := proto.Marshal(r); err != nil {
					t.Errorf("%s, seed %d: %v", kind, seed, err)
				}
			}
			first, err := c.resources()
			if err != nil || !maps.EqualFunc(first, again, func(a, b []types.Resource) bool {
				return slices.EqualFunc(a, b, func(x, y types.Resource) bool { return proto.Equal(x, y) })
			}) {
				t.Errorf("%s, seed %d: not the same twice (%v)", kind, seed, err)
			}
		}
	}
	if len(opts.Sane.Services) != 1 {
		t.Error("the sane one was changed")
	}
}
