//go:build kernel

package sockdiag

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"syscall"
	"testing"

	"github.com/mdlayher/netlink"
	"github.com/mdlayher/netlink/nltest"
	"golang.org/x/sys/unix"
)

var update = flag.Bool("update", false, "record testdata anew, from this kernel")

// TestRecorded makes the sockets of testdata/recorded.json in a network namespace of its own and
// asks this kernel about them; with -update its answers are the recording.
func TestRecorded(t *testing.T) {
	if os.Getenv("SOCKDIAG_RECORD") == "" {
		args := []string{"-test.run=^TestRecorded$", "-test.count=1", "-test.timeout=1m"}
		if *update {
			args = append(args, "-update")
		}
		cmd := exec.Command(os.Args[0], args...)
		cmd.Env = append(os.Environ(), "SOCKDIAG_RECORD=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("in its namespace: %v\n%s", err, out)
		}
		return
	}
	if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	makeSockets(t)

	kernel, err := dial()
	if err != nil {
		t.Fatal(err)
	}
	defer kernel.Close()
	var all []exchange
	c := nltest.Dial(func(reqs []netlink.Message) ([]netlink.Message, error) {
		q := netlink.Message{
			Header: netlink.Header{Type: reqs[0].Header.Type, Flags: reqs[0].Header.Flags},
			Data:   reqs[0].Data}
		msgs, err := kernel.Execute(q)
		e := exchange{Question: slices.Clone(q.Data), Dump: q.Header.Flags&netlink.Dump == netlink.Dump}
		var errno unix.Errno
		if errors.As(err, &errno) {
			e.Errno = int(errno)
		} else if err != nil {
			return nil, err
		}
		for _, m := range msgs {
			e.Answers = append(e.Answers, m.Data)
		}
		if !slices.ContainsFunc(all, func(o exchange) bool {
			return bytes.Equal(o.Question, e.Question)
		}) {
			all = append(all, e)
		}
		return e.answer(reqs)
	})
	defer c.Close()
	askRecorded(t, c)
	if _, err := list(c, unix.IPPROTO_TCP, tcpListen, 15010); err != nil {
		t.Error(err)
	}
	if !*update || t.Failed() {
		return
	}
	b, err := json.MarshalIndent(all, "", "\t")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(recordedFile, append(b, '\n'), 0o644); err != nil {
		t.Fatal(err)
	}
}

// makeSockets makes what askRecorded expects. They last as long as the process.
func makeSockets(t *testing.T) {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	// A socket belongs to the fsuid of the thread that made or accepted it.
	as := func(uid int, do func()) {
		unix.SetfsuidRetUid(uid)
		defer unix.SetfsuidRetUid(0)
		do()
	}
	sockaddr := func(s string) unix.Sockaddr {
		a := netip.MustParseAddrPort(s)
		if a.Addr().Is4() {
			return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
		}
		return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
	}
	bound := func(kind int, addr string, options ...func(fd int) error) int {
		domain := unix.AF_INET6
		if netip.MustParseAddrPort(addr).Addr().Is4() {
			domain = unix.AF_INET
		}
		fd, err := unix.Socket(domain, kind, 0)
		must(err)
		must(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
		for _, o := range options {
			must(o(fd))
		}
		must(unix.Bind(fd, sockaddr(addr)))
		return fd
	}
	option := func(level, name, value int) func(int) error {
		return func(fd int) error { return unix.SetsockoptInt(fd, level, name, value) }
	}
	listening := func(uid int, addr string, options ...func(fd int) error) (fd int) {
		as(uid, func() {
			fd = bound(unix.SOCK_STREAM, addr, options...)
			must(unix.Listen(fd, 16))
		})
		return fd
	}
	connected := func(from, to string) int {
		fd := bound(unix.SOCK_STREAM, from)
		must(unix.Connect(fd, sockaddr(to)))
		return fd
	}
	accepted := func(listener int) (fd int) {
		as(foreign4711, func() {
			var err error
			fd, _, err = unix.Accept(listener)
			must(err)
		})
		return fd
	}
	v6only := option(unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
	dual := option(unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0)

	listening(proxy, "127.0.0.1:15001")
	listening(foreign4711, "127.0.0.2:15001")
	listening(proxy, "[::]:15001", v6only, func(fd int) error { return unix.BindToDevice(fd, "lo") })
	as(proxy, func() { bound(unix.SOCK_DGRAM, "127.0.0.1:15053") })
	as(foreign4711, func() { bound(unix.SOCK_DGRAM, "[::]:15053", v6only) })

	l := listening(proxy, "127.0.0.1:15010")
	connected("127.0.0.1:40001", "127.0.0.1:15010")
	accepted(l)
	c := connected("127.0.0.1:40003", "127.0.0.1:15010")
	accepted(l)
	must(unix.Close(c))
	c = connected("127.0.0.1:40005", "127.0.0.1:15010")
	must(unix.Close(accepted(l)))
	must(unix.Close(c))
	connected("127.0.0.1:40006", "127.0.0.1:15010")
	must(unix.Close(accepted(l)))
	connected("127.0.0.1:40002", "127.0.0.1:15010")
	must(unix.Close(connected("127.0.0.1:40004", "127.0.0.1:15010")))

	listening(proxy, "127.0.0.1:15011", option(unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, 30))
	connected("127.0.0.1:40018", "127.0.0.1:15011")
	l = listening(proxy, "[::]:15012", dual)
	connected("127.0.0.1:40001", "127.0.0.1:15012")
	accepted(l)
	connected("[::1]:40001", "[::1]:15012")
	accepted(l)
}
