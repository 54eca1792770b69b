//go:build kernel

package sockdiag

import (
	"net"
	"net/netip"
	"os"
	"os/exec"
	"syscall"
	"testing"
)

// TestConnectionsOfThisMachine: each end of a connection is found by its own addresses, and one
// that is closed no longer.
func TestConnectionsOfThisMachine(t *testing.T) {
	if os.Getenv("SOCKDIAG_NETNS") == "" {
		cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.count=1")
		cmd.Env = append(os.Environ(), "SOCKDIAG_NETNS=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("in its namespace: %v\n%s", err, out)
		}
		return
	}
	if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, at := range []struct{ listen, dial string }{
		{"127.0.0.1:0", "127.0.0.1"}, {"[::1]:0", "::1"}, {"[::]:0", "127.0.0.1"},
	} {
		l, err := net.Listen("tcp", at.listen)
		if err != nil {
			t.Fatal(err)
		}
		port := netip.MustParseAddrPort(l.Addr().String()).Port()
		server := netip.AddrPortFrom(netip.MustParseAddr(at.dial), port)
		client, err := net.Dial("tcp", server.String())
		if err != nil {
			t.Fatal(err)
		}
		accepted, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		own := netip.MustParseAddrPort(client.LocalAddr().String())
		for _, end := range []Connection{
			{Local: own, Remote: server, UID: uint32(os.Getuid())},
			{Local: server, Remote: own, UID: uint32(os.Getuid())},
		} {
			got, err := Connections(t.Context(), func(c Connection) bool { return c.Remote == end.Remote })
			if err != nil || len(got) != 1 || got[0] != end {
				t.Errorf("%s: %v, %v; want %v", at.listen, got, err, end)
			}
		}
		client.Close()
		accepted.Close()
		l.Close()
		got, err := Connections(t.Context(), func(c Connection) bool { return true })
		if err != nil || len(got) != 0 {
			t.Errorf("%s: once closed: %v, %v", at.listen, got, err)
		}
	}
}
