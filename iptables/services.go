package iptables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
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

// ServiceCounts reads how often the rows for services were used, by one save of table nat.
func (k *Kernel) ServiceCounts(ctx context.Context, f Family) (Counts, error) {
	t, err := k.tool(ctx, f)
	if err != nil {
		return Counts{}, err
	}
	if missing, err := k.missing(t); err != nil || missing {
		return Counts{}, err
	}
	var save bytes.Buffer
	err = k.machine.run(ctx, readLimit, &k.own, nil, &save, t.saving, "-c", "-t", "nat")
	if err != nil {
		return Counts{}, fmt.Errorf("read the counters of %s table nat: %w", f, err)
	}
	counts, err := parseCounts(f, save.Bytes())
	if err != nil {
		return Counts{}, fmt.Errorf("read the counters of %s table nat: %w", f, err)
	}
	return counts, nil
}

// parseCounts reads a save with counters: [PACKETS:BYTES] before each rule.
func parseCounts(f Family, save []byte) (Counts, error) {
	c := Counts{Family: f, Prefixes: map[netip.Prefix]uint64{}, Ports: map[uint16]uint64{}}
	var uncounted error
	err := eachLine(save, "nat", func(line string) {
		if strings.HasPrefix(line, "-A ") {
			uncounted = errUncounted
		}
		counters, rule, ok := strings.Cut(strings.TrimPrefix(line, "["), "] -A ")
		packets, _, counted := strings.Cut(counters, ":")
		chain, spec, _ := strings.Cut(rule, " ")
		n, err := strconv.ParseUint(packets, 10, 64)
		if ok && counted && err == nil && isOurs(chain) && target(spec) == chainRedirect {
			c.add(chain, spec, n)
		}
	})
	if err == nil {
		err = uncounted
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
