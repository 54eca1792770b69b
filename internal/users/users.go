// Package users resolves a user of this machine to its numbers. It knows nothing of Envoy.
package users

import (
	"fmt"
	"os/user"
	"strconv"
)

// IDs are the numbers of a user and of its group: rules with names would look them up in NSS in the
// middle of a change. A number as the name is that user's; one that stands for nobody is its own
// group.
//
// The group is the one of the same name where there is one, else the primary one. `adduser --system
// envoy` gives its user the primary group nogroup, which is many others', too; systemd-sysusers(8)
// then makes a group envoy and leaves the user as it is, and Group=envoy of a unit is that group.
func IDs(name string) (uid, gid uint32, err error) { return machine.ids(name) }

// lookups are the questions to /etc/passwd and /etc/group, or whatever NSS asks.
type lookups struct {
	user, number func(string) (*user.User, error)
	group        func(string) (*user.Group, error)
}

var machine = lookups{user.Lookup, user.LookupId, user.LookupGroup}

func (l lookups) ids(name string) (uid, gid uint32, err error) {
	u, err := l.user(name)
	if n, not := strconv.ParseUint(name, 10, 32); err != nil && not == nil {
		if u, err = l.number(name); err != nil {
			return uint32(n), uint32(n), nil
		}
	}
	if err != nil {
		return 0, 0, fmt.Errorf("look up user %q: %w", name, err)
	}
	group := u.Gid
	if g, err := l.group(u.Username); err == nil {
		group = g.Gid
	}
	n, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return 0, 0, fmt.Errorf("look up user %q: %w", name, err)
	}
	m, err := strconv.ParseUint(group, 10, 32)
	if err != nil {
		return 0, 0, fmt.Errorf("look up user %q: %w", name, err)
	}
	return uint32(n), uint32(m), nil
}
