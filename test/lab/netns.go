package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Errors that say why a machine has no lab. Test with errors.Is.
var (
	ErrNotRoot      = errors.New("the lab needs root (network namespaces, iptables): run it with sudo")
	ErrNoNamespaces = errors.New(
		"the lab needs network namespaces (kernel with CONFIG_NET_NS and veth, and a container that " +
			"may mount /run/netns)")
)

// MissingError says which program the lab lacks and what installs it.
type MissingError struct{ Program, Package string }

func (e *MissingError) Error() string {
	return fmt.Sprintf("find %q: not on PATH; install the package %s (apt-get install %s)", e.Program,
		e.Package, e.Package)
}

// programs are what the lab runs, and Debian's packages that hold them.
var programs = map[string]string{
	"ip": "iproute2", "nsenter": "util-linux", "unshare": "util-linux", "setpriv": "util-linux",
	"iptables-nft": "iptables", "iptables-legacy": "iptables",
}

// look finds what the lab needs, before anything is made.
func look() error {
	if os.Geteuid() != 0 {
		return ErrNotRoot
	}
	for program, pkg := range programs {
		if _, err := exec.LookPath(program); err != nil {
			return &MissingError{Program: program, Package: pkg}
		}
	}
	return nil
}

// Namespace is a network namespace of the lab. Its methods may be called from several goroutines.
type Namespace struct {
	Name string // as `ip netns exec NAME` takes it
	path string
	file *os.File
	env  func() []string
}

// Of is the network namespace that a process is in, such as a container's.
func (l *Lab) Of(name string, pid int) (*Namespace, error) {
	path := fmt.Sprintf("/proc/%d/ns/net", pid)
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open namespace of %q: %w", name, err)
	}
	l.atEnd(func() { file.Close() })
	return &Namespace{Name: name, path: path, file: file, env: l.Env}, nil
}

// Do runs f on a thread that is in the namespace: sockets made and files of /proc/sys/net
// opened in f are the namespace's. Goroutines that f starts are not in it. f must not block for
// long (it holds a thread).
func (n *Namespace) Do(f func() error) error { return n.doAs(0, f) }

// doAs is Do with the thread's file-system uid and gid changed: a socket belongs to the fsuid that
// made it, and that is what `-m owner` matches.
func (n *Namespace) doAs(uid uint32, f func() error) error {
	runtime.LockOSThread()
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("open own network namespace: %w", err)
	}
	defer home.Close()
	if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter namespace %q: %w", n.Name, err)
	}
	// A thread that cannot be brought home is left locked: it ends with its goroutine, so no
	// other ever runs on it.
	defer func() {
		if unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
	}()
	if uid != 0 {
		// setfsuid and setfsgid are per thread; they return the previous id and cannot be asked
		// for an error, so look.
		unix.SetfsgidRetGid(int(uid))
		unix.SetfsuidRetUid(int(uid))
		defer func() {
			unix.SetfsuidRetUid(0)
			unix.SetfsgidRetGid(0)
		}()
		if got, _ := unix.SetfsuidRetUid(-1); got != int(uid) {
			return fmt.Errorf("become uid %d: still %d", uid, got)
		}
	}
	return f()
}

// Listen opens a listening socket in the namespace; addr is a literal address and port.
func (n *Namespace) Listen(network, addr string) (net.Listener, error) {
	return n.ListenAs(0, network, addr)
}

// ListenAs is Listen with a socket that belongs to uid: a foreign owner of a port.
func (n *Namespace) ListenAs(uid uint32, network, addr string) (ln net.Listener, err error) {
	if _, err := netip.ParseAddrPort(addr); err != nil {
		return nil, fmt.Errorf("listen in %q: %w", n.Name, err)
	}
	err = n.doAs(uid, func() error {
		ln, err = net.Listen(network, addr)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listen in %q: %w", n.Name, err)
	}
	return ln, nil
}

// ListenPacket opens a UDP socket in the namespace.
func (n *Namespace) ListenPacket(network, addr string) (conn net.PacketConn, err error) {
	err = n.Do(func() error {
		conn, err = net.ListenPacket(network, addr)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listen in %q: %w", n.Name, err)
	}
	return conn, nil
}

// Dial connects by TCP from the namespace, as root.
func (n *Namespace) Dial(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	return n.DialAs(ctx, 0, to)
}

// DialAs connects by TCP from the namespace with a socket that belongs to uid (and gid of the same
// number). The thread is held for the socket's making only, not for the connecting, so that
// hundreds of connections may hang at once.
func (n *Namespace) DialAs(ctx context.Context, uid uint32, to netip.AddrPort) (net.Conn, error) {
	fd := -1
	family, sa := unix.AF_INET6,
		unix.Sockaddr(&unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()})
	if to.Addr().Unmap().Is4() {
		family, sa = unix.AF_INET,
			&unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().Unmap().As4()}
	}
	err := n.doAs(uid, func() (err error) {
		fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("make socket in %q: %w", n.Name, err)
	}
	connecting := unix.Connect(fd, sa)
	file := os.NewFile(uintptr(fd), "tcp "+to.String()) // non-blocking: the runtime polls it
	defer file.Close()                                  // FileConn makes its own
	if connecting != nil && !errors.Is(connecting, unix.EINPROGRESS) {
		return nil, fmt.Errorf("connect to %s from %q: %w", to, n.Name, connecting)
	}
	if err := connected(ctx, file); err != nil {
		return nil, fmt.Errorf("connect to %s from %q: %w", to, n.Name, err)
	}
	conn, err := net.FileConn(file)
	if err != nil {
		return nil, fmt.Errorf("connect to %s from %q: %w", to, n.Name, err)
	}
	return conn, nil
}

// connected waits until file's connect has ended.
func connected(ctx context.Context, file *os.File) error {
	if deadline, ok := ctx.Deadline(); ok {
		if err := file.SetDeadline(deadline); err != nil {
			return err
		}
	}
	stop := context.AfterFunc(ctx, func() { file.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var result error
	err = raw.Write(func(fd uintptr) bool {
		code, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		if err == nil && code != 0 {
			err = syscall.Errno(code)
		}
		if err != nil {
			result = err
			return true
		}
		// No error yet is not yet connected: ask for the peer.
		if _, err = unix.Getpeername(int(fd)); errors.Is(err, unix.ENOTCONN) {
			return false
		}
		result = err
		return true
	})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return errors.Join(err, result)
}

// HTTP is a client that connects from the namespace, to literal addresses only,
// and keeps no connection.
func (n *Namespace) HTTP() *http.Client { return n.HTTPAs(0) }

// HTTPAs is HTTP with sockets that belong to uid.
func (n *Namespace) HTTPAs(uid uint32) *http.Client {
	return &http.Client{
		Timeout: 10 * time.Second,
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
				to, err := netip.ParseAddrPort(addr)
				if err != nil {
					return nil, fmt.Errorf("dial from %q: %w", n.Name, err)
				}
				return n.DialAs(ctx, uid, to)
			},
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// starts are commands to start on the one thread that lives as long as the process: the
// parent-death signal is sent when the *thread* dies that forked, and threads do die (a
// test that locks its goroutine to one and does not unlock, which is how kernel tests
// leave a namespace behind).
var starts = sync.OnceValue(func() chan<- func() {
	c := make(chan func())
	go func() {
		runtime.LockOSThread()
		for f := range c {
			f()
		}
	}()
	return c
})

// Start is cmd.Start on a thread that lives as long as this process, for a command of
// Command or CommandAs that runs longer than the caller's goroutine or beside goroutines
// that give up their threads.
func Start(cmd *exec.Cmd) error {
	err := make(chan error)
	starts() <- func() { err <- cmd.Start() }
	return <-err
}

// Command is a command in the namespace, as root, with the lab's backend first on PATH. It
// dies with this process.
func (n *Namespace) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	return n.command(ctx, append([]string{name}, args...))
}

// CommandAs is Command under another uid and gid, without other groups or capabilities.
func (n *Namespace) CommandAs(ctx context.Context, uid uint32, name string,
	args ...string) *exec.Cmd {
	id := strconv.FormatUint(uint64(uid), 10)
	// setpriv changes ids, which makes the kernel forget the parent-death signal:
	// it must be set again.
	return n.command(ctx,
		append([]string{"setpriv", "--reuid", id, "--regid", id, "--clear-groups", "--pdeathsig", "KILL",
			"--", name}, args...))
}

func (n *Namespace) command(ctx context.Context, argv []string) *exec.Cmd {
	// nsenter and setpriv exec: the pid is the command's own. /sys stays the host's;
	// /proc/net is the namespace's.
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--net=" + n.path, "--"}, argv...)...)
	cmd.Env = n.env()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = 2 * time.Second // a grandchild that holds the pipes must not hold us
	return cmd
}

// Run runs a command to its end and says what it printed; an error has its stderr.
func (n *Namespace) Run(ctx context.Context, name string, args ...string) (string, error) {
	return n.RunInput(ctx, "", name, args...)
}

// RunInput is Run with text on standard input.
func (n *Namespace) RunInput(ctx context.Context, input, name string,
	args ...string) (string, error) {
	cmd := n.Command(ctx, name, args...)
	cmd.Stdin = strings.NewReader(input)
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("run %s %s in %q: %w: %s", name, strings.Join(args, " "),
			n.Name, err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}
