package iptables

import (
	"context"
	"errors"
	"net/netip"
	"strconv"
	"strings"
)

// Counts are how many connections each row for services has led to Envoy since it was last written,
// by what the row matches. The kernel counts the first packet of a connection: table nat sees no
// other. A row holds for all ports of its addresses, so that it counts them together.
type Counts struct {
	Family   Family
	Prefixes map[netip.Prefix]uint64
	Ports    map[uint16]uint64 // of services at any address
}

// errUncounted says that a save has no counters.
var errUncounted = errors.New("the rules were read without their counters")

// ServiceCounts reads how often the rows for services were used.
func (k *Kernel) ServiceCounts(ctx context.Context, f Family) (Counts, error) {
	t, counters, err := k.counted(ctx, f)
	if err != nil {
		return Counts{}, err
	}
	return countsOf(t, counters)
}

func countsOf(t Table, counters Counters) (Counts, error) {
	c := Counts{t.family, map[netip.Prefix]uint64{}, map[uint16]uint64{}}
	var err error
	for chain, rules := range t.chains {
		for i, rule := range rules {
			if !isOurs(chain) || target(rule) != chainRedirect {
				continue
			}
			if !counters[chain][i].Known {
				err = errUncounted
				continue
			}
			c.add(chain, rule, counters[chain][i].Packets)
		}
	}
	return c, err
}

// add takes a row that leads to Envoy. Those of SERVICE_PROXY_INBOUND lead elsewhere.
func (c Counts) add(chain, spec string, n uint64) {
	words := strings.Fields(spec)
	if chain == chainServicePorts {
		for i := range len(words) - 1 {
			if words[i] != "--dport" {
				continue
			}
			if port, err := strconv.ParseUint(words[i+1], 10, 16); err == nil {
				c.Ports[uint16(port)] += n
			}
		}
		return
	}
	to := everywhere
	if len(words) == 4 && words[0] == "-d" {
		var err error
		if to, err = netip.ParsePrefix(words[1]); err != nil {
			return
		}
	}
	if len(words) == 2 || to.IsValid() {
		c.Prefixes[to] += n
	}
}

// everywhere is the prefix of a row that names none, as with intercept-all-outbound.
var everywhere netip.Prefix

// Of is the row that takes connections to an address or a range of a service's, and its count. Of
// several that hold the address the widest stands first. Adjacent ones may have been merged.
func (c Counts) Of(p netip.Prefix) (row netip.Prefix, n uint64, ok bool) {
	if n, ok := c.Prefixes[everywhere]; ok {
		return everywhere, n, true
	}
	for bits := range p.Bits() + 1 {
		row := netip.PrefixFrom(p.Addr(), bits).Masked()
		if n, ok := c.Prefixes[row]; ok {
			return row, n, true
		}
	}
	return everywhere, 0, false
}

// OfPort is the same for a service at any address, by its port. all says that the row is that for
// everything, which stands before those for ports.
func (c Counts) OfPort(port uint16) (n uint64, all, ok bool) {
	if n, ok := c.Prefixes[everywhere]; ok {
		return n, true, true
	}
	n, ok = c.Ports[port]
	return n, false, ok
}
