package hostile

import (
	"net/netip"
	"strings"
	"testing"
)

// TestRows: what is to be found is found, and what the agent writes is let through.
func TestRows(t *testing.T) {
	own := []netip.Addr{netip.MustParseAddr("10.128.0.2"), netip.MustParseAddr("fd28::2")}
	const to = " -j SERVICE_PROXY_REDIRECT"
	good := []string{
		"-A SERVICE_PROXY_SERVICE_CIDRS -d 10.10.0.1/32 -p tcp" + to,
		"-A SERVICE_PROXY_SERVICE_CIDRS -d 10.0.0.0/8 -p tcp -j SERVICE_PROXY_B4_0A000000_8",
		"-A SERVICE_PROXY_SERVICE_PORTS -p tcp -m tcp --dport 80" + to,
		"-A SERVICE_PROXY_REDIRECT -p tcp -j REDIRECT --to-ports 15001",
		"-A SERVICE_PROXY_OUTPUT -d 127.0.0.0/8 -m comment --comment loopback -j RETURN",
		"-A SERVICE_PROXY_INBOUND -m addrtype ! --dst-type LOCAL -j RETURN",
		"-A KUBE_X -d 127.0.0.1/32 -j DNAT", "COMMIT",
	}
	if bad := Rows(strings.Join(good, "\n"), own); len(bad) != 0 {
		t.Errorf("good: %q", bad)
	}
	for _, row := range []string{
		"-A SERVICE_PROXY_SERVICE_CIDRS -d 10.128.0.2/32 -p tcp" + to,
		"-A SERVICE_PROXY_SERVICE_CIDRS -d 10.128.0.0/16 -p tcp" + to,
		"-A SERVICE_PROXY_SERVICE_CIDRS -d fd28::/64 -p tcp" + to,
		"-A SERVICE_PROXY_B4_0A000000_8 -d 127.3.0.0/16 -p tcp" + to,
		"-A SERVICE_PROXY_SERVICE_CIDRS -d 169.254.169.254/32 -p tcp" + to,
		"-A SERVICE_PROXY_SERVICE_CIDRS -d 169.0.0.0/8 -p tcp" + to,
		"-A SERVICE_PROXY_SERVICE_CIDRS -d fd20:ce::254 -p tcp" + to,
		"-A SERVICE_PROXY_SERVICE_CIDRS -d 224.0.0.1/32 -p tcp" + to,
		"-A SERVICE_PROXY_SERVICE_CIDRS -d 128.0.0.0/7 -p tcp" + to,
		"-A SERVICE_PROXY_SERVICE_CIDRS -d 2000::/15 -p tcp" + to,
		"-A SERVICE_PROXY_SERVICE_CIDRS ! -d 192.0.2.0/24 -p tcp" + to,
		"-A SERVICE_PROXY_SERVICE_CIDRS -p tcp" + to,
		"-A SERVICE_PROXY_SERVICE_PORTS -p tcp -m tcp --dport 22" + to,
		"-A SERVICE_PROXY_SERVICE_PORTS -p tcp -m tcp --dport 15020" + to,
		"-A SERVICE_PROXY_SERVICE_CIDRS -d 10.10.0.1/32 -p tcp -j ACCEPT",
		"-A SERVICE_PROXY_SERVICE_CIDRS -d 10.10.0.1/32 -p tcp -j REDIRECT --to-ports 22",
	} {
		if bad := Rows(row, own); len(bad) != 1 {
			t.Errorf("not found: %s", row)
		}
	}
}

// TestLine: what a terminal obeys is found, and what people write is let through.
func TestLine(t *testing.T) {
	for _, good := range []string{"", "a b", "é… 𝒳", `"\x1b"`} {
		if err := Line(good, 100); err != nil {
			t.Error(err)
		}
	}
	for _, bad := range []string{"a\nb", "\x1b[2J", "\u202E", "\u200b", "\u2028", "\xff", "\u009b",
		"\x00", strings.Repeat("x", 101)} {
		if Line(bad, 100) == nil {
			t.Errorf("not found: %q", bad)
		}
	}
}
