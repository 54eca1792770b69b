package agent

import (
	"os/user"
	"strings"
	"testing"
)

// TestProxyIDs: a name of /etc/passwd, or a uid that needs no entry there. Never root, by whatever
// name: its traffic is everybody's.
func TestProxyIDs(t *testing.T) {
	named, err := user.LookupId("1") // daemon or bin, with a group of the same number
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name string
		uid  uint32
		err  string
	}{
		{named.Username, 1, ""},
		{"1", 1, ""},
		{"2147480000", 2147480000, ""},
		{"root", 0, "it is root"},
		{"0", 0, "it is root"},
		{"00", 0, "it is root"},
		{"no-such-user", 0, `look up user "no-such-user"`},
		{"-1", 0, `look up user "-1"`},
		{"4294967296", 0, `look up user "4294967296"`},
	} {
		uid, gid, err := proxyIDs(test.name)
		switch {
		case test.err == "" && (err != nil || uid != test.uid || gid != test.uid):
			t.Errorf("%q: uid %d, gid %d, %v; want %d", test.name, uid, gid, err, test.uid)
		case test.err != "" && (err == nil || !strings.Contains(err.Error(), test.err)):
			t.Errorf("%q: uid %d, %v; want an error that says %q", test.name, uid, err, test.err)
		}
	}
}
