//go:build kernel

package route

import "testing"

// TestNews: whatever takes a route away or brings one is told, and else nothing.
func TestNews(t *testing.T) {
	if !inNetns(t) {
		return
	}
	sh(t, `ip link set lo up; ip link add v0 type veth peer name v1; ip link set v0 up
		ip link set v1 up; ip address add 10.0.0.1/24 dev v0; ip address add fd00::1/64 dev v0 nodad
		sleep 2.5 # link-local addresses come, too`)
	news, err := Listen()
	if err != nil {
		t.Fatal(err)
	}
	defer news.Close()
	for _, change := range []string{
		"ip route add 10.1.0.0/16 via 10.0.0.2", "ip route del 10.1.0.0/16",
		"ip -6 route add fd01::/64 via fd00::2", "ip -6 route del fd01::/64",
		"ip rule add to 10.3.0.0/16 prohibit", "ip -6 rule add to fd03::/64 prohibit",
		"ip nexthop add id 1 via 10.0.0.2 dev v0", "ip route add 10.4.0.0/16 nhid 1",
		"ip nexthop del id 1", "ip address add 10.5.0.1/24 dev v0", "ip address del 10.5.0.1/24 dev v0",
		"ip -6 address add fd05::1/64 dev v0 nodad",
		// the other end is told a moment later, by the kernel's own worker
		"ip link set v1 down; until ip link show v0 | grep -q LOWERLAYERDOWN; do sleep 0.05; done; " +
			"sleep 0.5",
		"ip link set v0 down",
		// more than the socket holds
		"for n in $(seq 3000); do echo route add 10.6.$((n / 250)).$((n % 250)) dev lo; done | " +
			"ip -batch -",
	} {
		sh(t, change)
		if !news.Any() {
			t.Errorf("not told: %s", change)
		}
		sh(t, "ip route show table all; ip -6 rule show; ip route get 127.0.0.1")
		if news.Any() {
			t.Errorf("told, though nothing was changed after: %s", change)
		}
	}
}
