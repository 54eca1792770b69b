package iptables

import (
	"testing"
	"testing/synctest"
	"time"
)

// TestWhoseInAPIDNamespace: while a write of ours to one family goes on, another's restore of the
// other family is not taken for it, so that it is looked at whatever comes of ours.
func TestWhoseInAPIDNamespace(t *testing.T) {
	k := &Kernel{
		machine: machine{firstPIDs: func() bool { return false }},
		tools: map[Family]tool{
			IPv4: {restore: "/usr/sbin/iptables-restore"}, IPv6: {restore: "/usr/sbin/ip6tables-restore"},
		},
	}
	done := k.own.writing(IPv4)
	k.own.last = time.Now()
	if e := k.whose(Event{Family: IPv6, Program: "ip6tables-resto"}); e.Own || e.Family != IPv6 || !e.Lost {
		t.Errorf("another's: %+v", e)
	}
	if e := k.whose(Event{Family: IPv4, Program: "iptables-restor"}); !e.Own {
		t.Errorf("ours: %+v", e)
	}
	done(nil)
}

// TestUnclaimed: what nobody claims, as where pids tell whose a write was, is not kept for ever.
func TestUnclaimed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var own ownPIDs
		for range 1000 {
			own.writing(IPv4)(nil)
			time.Sleep(time.Second / 2)
		}
		if n := len(own.unclaimed[IPv4]); n > 3 {
			t.Errorf("%d writes are kept", n)
		}
	})
}
