package agent

import (
	"cmp"
	"slices"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/internal/sockdiag"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// DefaultResolverUsers are whom the usual resolvers of a VM ask as. Most VMs have one of them, or none.
var DefaultResolverUsers = []string{"systemd-resolve", "dnsmasq", "unbound"}

// resolverUIDs are the users whose DNS questions must leave the VM: the local resolver asks the real
// servers as one of them. A user may come later, with its package; one that somebody named and that is
// not there is said once.
func (a *Agent) resolverUIDs() (uids []uint32) {
	for _, name := range a.settings.ResolverUsers {
		uid, _, err := userIDs(name)
		if err == nil {
			uids = append(uids, uid)
			continue
		}
		if slices.Contains(DefaultResolverUsers, name) || a.saidResolvers[name] {
			continue
		}
		if a.saidResolvers == nil {
			a.saidResolvers = map[string]bool{}
		}
		a.saidResolvers[name] = true
		a.log.Warn("a user of --resolver-users is not there", zap.Error(err))
	}
	return uids
}

// lookAtResolvers finds who takes DNS questions on this VM while they are led to Envoy, and takes in
// resolver users that came or went since the rules were made.
func (a *Agent) lookAtResolvers(f *symptom.Facts, want Want) {
	if want.Families[0].DNSPort == 0 && want.Families[1].DNSPort == 0 {
		return
	}
	f.ResolverUIDs = a.resolverUIDs()
	if !slices.Equal(f.ResolverUIDs, want.resolverUIDs()) {
		a.wantStale = true
	}
	f.Resolvers = resolvers(sockdiag.UDPListeners(dnsPortNumber))
}

// dnsPortNumber is where resolvers listen.
const dnsPortNumber = 53

// resolvers are the sockets as facts, lowest address first. A kernel that cannot be asked tells nothing.
func resolvers(listeners []sockdiag.Listener, err error) (ports []symptom.Port) {
	if err != nil {
		return nil
	}
	for _, l := range listeners {
		ports = append(ports, symptom.Port{Purpose: "resolver", Addr: l.Addr, Owner: l.UID, OwnerName: userName(l.UID), Listening: true})
	}
	slices.SortFunc(ports, func(a, b symptom.Port) int {
		return cmp.Or(a.Addr.Compare(b.Addr), cmp.Compare(a.Owner, b.Owner))
	})
	return ports
}
