package iptables

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// OtherChain is a chain of another program that may decide about a connection
// before or instead of ours.
type OtherChain struct {
	Backend  string // where it is: "nft" or "legacy"
	Family   string // "ip", "ip6" or "inet"
	Table    string
	Chain    string
	Hook     Hook
	Priority int32 // lower comes first; ours are at -100
	Rules    int   // on legacy; 0 on nft, where only the chains are listed
}

// String is e.g. "nft inet firewall nat-out hook output priority -110".
func (o OtherChain) String() string {
	hook := "output"
	if o.Hook == Prerouting {
		hook = "prerouting"
	}
	return fmt.Sprintf("%s %s %s %s hook %s priority %d", o.Backend, o.Family, o.Table, o.Chain,
		hook, o.Priority)
}

// ourPriority is that of iptables' nat chains at both hooks (NF_IP_PRI_NAT_DST). Whoever has a
// lower one is asked first; of two equal ones that which registered last is.
// See docs/design/facts.md#who-is-asked-first.
const ourPriority = -100

// Others lists the nat chains of others that may shadow ours: base chains of type nat at our hooks
// with a priority of -100 or less outside the table that iptables uses, and the nat table of the
// backend that is not used if it has rules of anybody else's. It is advice only: such chains are
// never touched. It does not need the nft program. What it found comes with an error too: one place
// that could not be looked into (ErrCouldNotLook) does not hide the others.
func (k *Kernel) Others(ctx context.Context) ([]OtherChain, error) {
	var others []OtherChain
	var errs []error
	chains, err := nftChains(nfprotoUnspec)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EOPNOTSUPP) &&
		!errors.Is(err, unix.EPROTONOSUPPORT) {
		errs = append(errs, err)
	}
	for _, c := range chains {
		hook, ok := map[uint32]Hook{nfInetPreRouting: Prerouting, nfInetLocalOut: Output}[c.hook]
		if c.kind != "nat" || !ok || c.priority > ourPriority {
			continue
		}
		family := map[byte]string{nfprotoInet: "inet", IPv4.nfproto(): "ip",
			IPv6.nfproto(): "ip6"}[c.family]
		if family == "" {
			continue
		}
		// iptables-nft's own: ours if that is the backend, and otherwise looked into below.
		if c.table == "nat" && family != "inet" && isJumpSite(c.name) {
			continue
		}
		others = append(others, OtherChain{Backend: NFT, Family: family, Table: c.table, Chain: c.name,
			Hook: hook, Priority: c.priority})
	}
	for _, f := range families {
		t, ok, err := k.otherBackend(ctx, f)
		if err != nil {
			errs = append(errs, err)
		}
		if !ok {
			continue
		}
		have, err := k.read(ctx, t)
		if err != nil {
			errs = append(errs, fmt.Errorf("look into the %s backend: %w", t.backend, err))
			continue
		}
		for builtin, hook := range map[string]Hook{builtinPrerouting: Prerouting, builtinOutput: Output} {
			n := 0
			for _, spec := range have.chains[builtin] {
				if !isOurs(target(spec)) {
					n++
				}
			}
			if n > 0 {
				family := "ip"
				if f == IPv6 {
					family = "ip6"
				}
				others = append(others, OtherChain{Backend: t.backend, Family: family, Table: "nat",
					Chain: builtin, Hook: hook, Priority: ourPriority, Rules: n})
			}
		}
	}
	return others, errors.Join(errs...)
}
