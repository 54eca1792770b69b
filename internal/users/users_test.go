package users

import (
	"os/user"
	"testing"
)

func TestIDs(t *testing.T) {
	all := []user.User{
		{Username: "envoy", Uid: "107", Gid: "65534"}, // as `adduser --system` makes it
		{Username: "proxy", Uid: "13", Gid: "12"},     // whose group has another name
		{Username: "wrong", Uid: "x", Gid: "1"},
	}
	by := func(is func(user.User) bool) (*user.User, error) {
		for _, u := range all {
			if is(u) {
				return &u, nil
			}
		}
		return nil, user.UnknownUserError("")
	}
	l := lookups{
		func(name string) (*user.User, error) {
			return by(func(u user.User) bool { return u.Username == name })
		},
		func(id string) (*user.User, error) { return by(func(u user.User) bool { return u.Uid == id }) },
		func(name string) (*user.Group, error) {
			if name == "envoy" {
				return &user.Group{Gid: "110"}, nil
			}
			return nil, user.UnknownGroupError(name)
		},
	}
	for _, tt := range []struct {
		name     string
		uid, gid uint32
		fails    bool
	}{
		{name: "envoy", uid: 107, gid: 110},
		{name: "107", uid: 107, gid: 110},
		{name: "proxy", uid: 13, gid: 12},
		{name: "4294967295", uid: 4294967295, gid: 4294967295},
		{name: "4294967296", fails: true},
		{name: "nobody-here", fails: true},
		{name: "wrong", fails: true},
	} {
		uid, gid, err := l.ids(tt.name)
		if uid != tt.uid || gid != tt.gid || (err != nil) != tt.fails {
			t.Errorf("%s: %d, %d, %v, want %d, %d", tt.name, uid, gid, err, tt.uid, tt.gid)
		}
	}
	if uid, gid, err := IDs("root"); uid != 0 || gid != 0 || err != nil {
		t.Errorf("this machine's root: %d, %d, %v", uid, gid, err)
	}
}
