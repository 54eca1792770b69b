package agent

import (
	"errors"
	"os/user"
	"strings"
	"testing"

	"github.com/service-proxy-agent/service-proxy-agent/internal/users"
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
		p := proxyIDs(test.name, users.IDs)
		switch {
		case test.err == "" && (p.Err != nil || p.UID != test.uid || p.GID != test.uid):
			t.Errorf("%q: %+v; want %d", test.name, p, test.uid)
		case test.err != "" && (p.Err == nil || !strings.Contains(p.Err.Error(), test.err)):
			t.Errorf("%q: %+v; want an error that says %q", test.name, p, test.err)
		}
	}
}

// TestConfigWithoutEnd: a file that has none is refused, and not read until memory ends.
func TestConfigWithoutEnd(t *testing.T) {
	if _, err := readConfig("/dev/zero"); !errors.Is(err, ErrSettings) {
		t.Errorf("/dev/zero: %v", err)
	}
}
