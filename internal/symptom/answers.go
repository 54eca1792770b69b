package symptom

import (
	"fmt"
	"net/netip"
	"strings"
)

// What `explain` finds about one address. These are no Kinds: they depend on a question, so that no
// check looks for them.
const (
	ServiceNotConfigured ID = "service-not-configured" // row 12
	NoFilterChain        ID = "no-filter-chain"        // row 14
)

// NotConfigured says that none of Envoy's listeners has an address. It has been told of so many
// services, of which some are named.
func NotConfigured(to netip.AddrPort, services int, some []string) Finding {
	told := "It has been told of no service at all"
	if services > 0 {
		told = fmt.Sprintf("It has been told of %s", numberOf(services, "service"))
		if len(some) > 0 {
			told += ": " + strings.Join(some, ", ")
		}
		if len(some) > 0 && services > len(some) {
			told += fmt.Sprintf(" and %d more", services-len(some))
		}
	}
	return Finding{ID: ServiceNotConfigured, Row: 12, Severity: Error, Key: to.String(),
		Cause: fmt.Sprintf("Envoy has not been told of %s: none of its listeners has this address. %s",
			to, told),
		Next: fmt.Sprintf("look in the control plane whether a forwarding rule or route of this VM's "+
			"network or mesh has the address %s and port %d", to.Addr(), to.Port())}
}

// NoChain says that connections to an address are redirected to a listener of Envoy's, where no
// filter chain takes them. ports are those of this address that have one.
func NoChain(to netip.AddrPort, listener string, ports []uint16) Finding {
	cause := fmt.Sprintf("Envoy has no configuration for %s: connections to it are redirected to its "+
		"listener %q, where no filter chain takes them, so that Envoy closes them", to, listener)
	next := fmt.Sprintf("exclude it by exclude-outbound-ip-ranges=%s or "+
		"exclude-outbound-port-ranges=%d, or have the control plane configure it", to.Addr(), to.Port())
	if len(ports) > 0 {
		next = fmt.Sprintf("exclude the port by exclude-outbound-port-ranges=%d, or have the control "+
			"plane configure it", to.Port())
		var some []string
		for _, p := range ports[:min(len(ports), 5)] {
			some = append(some, fmt.Sprint(p))
		}
		if len(ports) > len(some) {
			some = append(some, "…")
		}
		cause += fmt.Sprintf(". Of this address it has port %s alone, but all TCP ports of a service's "+
			"address are redirected", strings.Join(some, ", "))
	}
	return Finding{ID: NoFilterChain, Row: 14, Severity: Error, Key: to.String(), Cause: cause,
		Next: next}
}

// numberOf is "1 service", "2 services".
func numberOf(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
