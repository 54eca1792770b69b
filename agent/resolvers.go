package agent

import (
	"cmp"
	"errors"
	"os/user"
	"slices"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// DefaultResolverUsers are whom the usual resolvers of a VM ask as. Most VMs have one of them, or
// none.
var DefaultResolverUsers = []string{"systemd-resolve", "dnsmasq", "unbound"}

// resolvers are the DNS resolvers of the VM itself, as far as they can be told by their users.
type resolvers struct {
	// UIDs are the users whose questions must leave the VM: a local resolver asks the real servers as
	// one of them.
	UIDs []uint32
	// Missing are the users that somebody named and that are not there. One may come later, with its
	// package.
	Missing []missingUser
	// Sockets are who takes DNS questions, lowest address first.
	Sockets []symptom.Port
}

type missingUser struct {
	Name string
	Err  error
}

// resolvers looks up the users of --resolver-users, and who listens on port 53. A kernel that
// cannot be asked tells nothing.
func (v vm) resolvers(users []string) (r resolvers) {
	for _, name := range users {
		uid, _, err := v.userIDs(name)
		switch {
		case err == nil:
			r.UIDs = append(r.UIDs, uid)
		case !slices.Contains(DefaultResolverUsers, name):
			r.Missing = append(r.Missing, missingUser{name, err})
		}
	}
	listeners, err := v.udp(dnsPortNumber)
	if err != nil {
		return r
	}
	for _, l := range listeners {
		r.Sockets = append(r.Sockets, symptom.Port{
			Purpose: "resolver", Addr: l.Addr, Owner: l.UID, OwnerName: v.userName(l.UID), Listening: true,
		})
	}
	slices.SortFunc(r.Sockets, func(a, b symptom.Port) int {
		return cmp.Or(a.Addr.Compare(b.Addr), cmp.Compare(a.Owner, b.Owner))
	})
	return r
}

// remembering is the look-up with what it told last, where it cannot look: that is not a word on
// whether there is such a user, and to let him out no longer would lead a resolver's own questions
// back to it.
func remembering(
	look func(name string) (uid, gid uint32, err error),
) func(name string) (uid, gid uint32, err error) {
	type ids struct{ uid, gid uint32 }
	last := map[string]ids{}
	return func(name string) (uid, gid uint32, err error) {
		uid, gid, err = look(name)
		if err == nil {
			last[name] = ids{uid, gid}
			return uid, gid, nil
		}
		if _, absent := errors.AsType[user.UnknownUserError](err); absent {
			delete(last, name)
		} else if told, ok := last[name]; ok {
			return told.uid, told.gid, nil
		}
		return uid, gid, err
	}
}

// dnsPortNumber is where resolvers listen.
const dnsPortNumber = 53
