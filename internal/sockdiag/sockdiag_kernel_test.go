//go:build kernel

package sockdiag

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"syscall"
	"testing"
)

const foreignUID = 65533

// TestMain is also the foreign owner: a process of another user that listens, and accepts one
// connection per line on its stdin.
func TestMain(m *testing.M) {
	if os.Getenv("SOCKDIAG_FOREIGN") == "" {
		os.Exit(m.Run())
	}
	if err := foreignOwner(); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

func foreignOwner() error {
	if err := syscall.Setuid(foreignUID); err != nil {
		return err
	}
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println(l.Addr())
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		if lines.Text() == "accept and close" {
			c.Close()
		}
		fmt.Println("done")
	}
	return nil
}

func TestForeignOwner(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("needs root, to become another user")
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "SOCKDIAG_FOREIGN=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); cmd.Wait() })
	lines := bufio.NewScanner(out)
	if !lines.Scan() {
		t.Fatal("the foreign owner did not start")
	}
	addr, err := netip.ParseAddrPort(lines.Text())
	if err != nil {
		t.Fatalf("the foreign owner said %q", lines.Text())
	}
	tell := func(what string) {
		t.Helper()
		fmt.Fprintln(in, what)
		if !lines.Scan() {
			t.Fatal("the foreign owner died")
		}
	}

	if uid, err := ownerOf(addr); err != nil || uid != foreignUID {
		t.Errorf("ownerOf = %d, %v; want %d", uid, err, foreignUID)
	}
	var foreign *ForeignError
	if err := OwnedBy(addr, 0, 107); !errors.As(err, &foreign) || foreign.UID != foreignUID {
		t.Errorf("OwnedBy = %v; want a ForeignError with uid %d", err, foreignUID)
	}
	c := dialPort(t, "127.0.0.1", addr.Port())
	if uid, err := PeerOwner(c); err != nil || uid != foreignUID {
		t.Errorf("PeerOwner before accept = %d, %v; want %d", uid, err, foreignUID)
	}
	tell("accept")
	if uid, err := PeerOwner(c); err != nil || uid != foreignUID {
		t.Errorf("PeerOwner after accept = %d, %v; want %d", uid, err, foreignUID)
	}
	c = dialPort(t, "127.0.0.1", addr.Port())
	tell("accept and close")
	if uid, err := PeerOwner(c); !errors.Is(err, ErrNoPeer) {
		t.Errorf("PeerOwner after close = %d, %v; want ErrNoPeer: else a quick close passes for root",
			uid, err)
	}
}
