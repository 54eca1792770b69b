package page

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// Count is how many connections to an address of a service were led to Envoy.
type Count struct {
	Connections uint64
	// Shared says that other addresses are counted together with this one: the kernel counts by
	// rows, and a row holds for all ports of an address, or for several adjacent addresses.
	Shared bool
	Row    string // whose count it is
}

// CountsOf finds the counts of the services' addresses, by address. What no row holds is left out.
func CountsOf(services []status.Service, by []iptables.Counts) map[string]Count {
	counts := map[string]Count{}
	users := map[string]int{} // addresses, by the rows that count them
	for _, s := range services {
		for _, address := range s.Addresses {
			if _, again := counts[address]; again {
				continue
			}
			row, n, ok := countOf(address, by)
			if !ok {
				continue
			}
			counts[address] = Count{Connections: n, Row: row}
			users[row]++
		}
	}
	for address, c := range counts {
		c.Shared = users[c.Row] > 1
		counts[address] = c
	}
	return counts
}

// countOf is the count of an address in the form of status.Service, and which row has it.
func countOf(address string, by []iptables.Counts) (row string, n uint64, ok bool) {
	if port, any := strings.CutPrefix(address, "*:"); any {
		number, err := strconv.ParseUint(port, 10, 16)
		if err != nil {
			return "", 0, false
		}
		row = address
		for _, family := range by { // it has a row in each
			m, all, has := family.OfPort(uint16(number))
			if n, ok = n+m, ok || has; all {
				row = "everything"
			}
		}
		return row, n, ok
	}
	prefix, ok := prefixOf(address)
	if !ok {
		return "", 0, false
	}
	for _, family := range by {
		if !family.Family.Of(prefix.Addr()) {
			continue
		}
		if p, n, ok := family.Of(prefix); ok {
			return fmt.Sprint(family.Family, p), n, true
		}
	}
	return "", 0, false
}

// prefixOf reads "10.0.0.1:80", "10.0.0.1", "10.0.0.0/24:80", "[fd10::1]:80", "fd10::/64:80", ….
func prefixOf(address string) (netip.Prefix, bool) {
	if to, err := netip.ParseAddrPort(address); err == nil {
		return netip.PrefixFrom(to.Addr(), to.Addr().BitLen()), true
	}
	if to, err := netip.ParseAddr(address); err == nil {
		return netip.PrefixFrom(to, to.BitLen()), true
	}
	base, bits, ok := strings.Cut(address, "/")
	bits, _, _ = strings.Cut(bits, ":")
	prefix, err := netip.ParsePrefix(base + "/" + bits)
	return prefix, ok && err == nil
}
