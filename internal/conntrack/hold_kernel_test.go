//go:build kernel

package conntrack

import (
	"fmt"
	"io"
	"net"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"
)

// TestHoldKeepsRedirectedStreams: streams that were redirected live through a flush of all rules,
// by whichever program and backend, while a Hold is there; without one each is reset.
func TestHoldKeepsRedirectedStreams(t *testing.T) {
	if !inNetns(t) {
		return
	}
	sh(t, "ip link set lo up; ip address add 10.9.0.1/32 dev lo; "+
		"ip -6 address add fd09::1/128 dev lo nodad")
	l, err := net.Listen("tcp", ":15001")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { io.Copy(c, c); c.Close() }()
		}
	}()
	for _, test := range []struct{ iptables, vip, flush string }{
		{"iptables-nft", "10.9.0.1", "nft flush ruleset"},
		{"iptables-nft", "10.9.0.1", "iptables-nft -t nat -F"},
		{"ip6tables-nft", "fd09::1", "nft flush ruleset"},
		{"iptables-legacy", "10.9.0.1", "iptables-legacy -t nat -F"},
	} {
		for _, holds := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, %s, %v", test.iptables, test.flush, holds), func(t *testing.T) {
				if holds {
					hold, err := NewHold()
					if err != nil {
						t.Fatal(err)
					}
					defer func() {
						if err := hold.Close(); err != nil {
							t.Error(err)
						}
						if out, err := exec.Command("nft", "list", "tables").CombinedOutput(); err != nil ||
							strings.Contains(string(out), HoldTable) {
							t.Errorf("after Close: %v\n%s", err, out)
						}
					}()
				}
				sh(t, fmt.Sprintf("%s -t nat -A OUTPUT -d %s -p tcp -j REDIRECT --to-ports 15001",
					test.iptables, test.vip))
				var streams []net.Conn
				for range 20 {
					c, err := net.DialTimeout("tcp", net.JoinHostPort(test.vip, "80"), 5*time.Second)
					if err != nil {
						t.Fatal(err)
					}
					defer c.Close()
					streams = append(streams, c)
					if err := echoed(c); err != nil {
						t.Fatal(err)
					}
				}
				sh(t, test.flush)
				cut := 0
				for _, c := range streams {
					if echoed(c) != nil {
						cut++
					}
				}
				if want := map[bool]int{false: len(streams)}[holds]; cut != want {
					t.Errorf("%d of %d streams were cut, want %d", cut, len(streams), want)
				}
				sh(t, test.iptables+" -t nat -F; nft list ruleset >/dev/null")
			})
		}
	}
}

// TestHoldAsNFTPrintsIt: others see what it is, and cannot take it away.
func TestHoldAsNFTPrintsIt(t *testing.T) {
	if !inNetns(t) {
		return
	}
	hold, err := NewHold()
	if err != nil {
		t.Fatal(err)
	}
	defer hold.Close()
	out, err := exec.Command("nft", "list", "ruleset").Output()
	if err != nil {
		t.Fatal(err)
	}
	have := strings.Join(strings.Fields(string(out)), " ")
	_, have, _ = strings.Cut(have, "flags owner") // before it stands the test's name
	want := fmt.Sprintf(`comment %q chain nat { type nat hook input priority 1000; policy accept; } `+
		`chain conntrack { ct state established return } }`, holdComment)
	if strings.TrimSpace(have) != want {
		t.Errorf("nft prints\n%s\nwant … %s", out, want)
	}
	name := regexp.MustCompile(HoldTable + "[0-9a-f]{8}").FindString(string(out))
	deleting := exec.Command("nft", "delete", "table", "inet", name)
	if out, err := deleting.CombinedOutput(); err == nil ||
		!strings.Contains(string(out), "not permitted") {
		t.Errorf("another process deletes it: %v, %s", err, out)
	}
	// Who saves it can load it, be it while there is another one: what is made of it is gone with nft.
	load := func() {
		t.Helper()
		cmd := exec.Command("nft", "-f", "-")
		cmd.Stdin = strings.NewReader("flush ruleset\n" + string(out))
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("what was saved cannot be loaded: %v\n%s", err, out)
		}
	}
	defer func() {
		hold.Close()
		again, err := NewHold()
		if err != nil {
			t.Fatal(err)
		}
		load()
		again.Close()
		load()
		sh(t, "nft list tables | (! grep .)")
	}()
	for _, program := range []string{"iptables-nft-save", "ip6tables-nft-save"} {
		if out, err := exec.Command(program).CombinedOutput(); err != nil || len(out) != 0 {
			t.Errorf("%s: %v\n%s", program, err, out)
		}
	}
}

func echoed(c net.Conn) error {
	if err := c.SetDeadline(time.Now().Add(3 * time.Second)); err != nil {
		return err
	}
	if _, err := c.Write([]byte("x")); err != nil {
		return err
	}
	_, err := io.ReadFull(c, make([]byte, 1))
	return err
}
