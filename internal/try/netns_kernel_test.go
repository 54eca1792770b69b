//go:build kernel

package try

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

var seedFlag = flag.Uint64("seed", 0, "replays the random tests of a run; 0: a new one")

const (
	netnsVariable = "TRY_TEST_NETNS"
	dialVariable  = "TRY_TEST_DIAL"
)

// TestMain also is the program that a test runs as another user: it connects, or says what Connect
// says to it.
func TestMain(m *testing.M) {
	flag.Parse()
	to := os.Getenv(dialVariable)
	if to == "" {
		os.Exit(m.Run())
	}
	if address, ok := strings.CutPrefix(to, "connect "); ok {
		uid, gid := uint32(os.Getuid()), uint32(os.Getgid())
		_, own := Connect(context.Background(), Ask{netip.MustParseAddrPort(address), uid, gid})
		_, another := Connect(context.Background(), Ask{netip.MustParseAddrPort(address), 0, 0})
		fmt.Printf("%v\n%v\n", own, another)
		return
	}
	if address, ok := strings.CutPrefix(to, "listen "); ok {
		listenAndStop(netip.MustParseAddrPort(address))
		return
	}
	if c, err := net.DialTimeout("tcp", to, 5*time.Second); err == nil {
		c.Close()
	}
}

// listenAndStop listens with room for one connection that nobody accepts, and stops.
func listenAndStop(at netip.AddrPort) {
	family := unix.AF_INET
	if at.Addr().Is6() {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM, 0)
	if err == nil {
		err = unix.Bind(fd, sockaddr(at))
	}
	if err == nil {
		err = unix.Listen(fd, 0)
	}
	fmt.Println(err)
	unix.Kill(os.Getpid(), unix.SIGSTOP)
}

// child is this test's binary as another program.
func child(task string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), dialVariable+"="+task)
	return cmd
}

// inNetns runs the calling (sub)test in a network namespace of its own, in a copy of the test
// binary. It needs root, and fails without.
func inNetns(t *testing.T) bool {
	t.Helper()
	if os.Getenv(netnsVariable) == t.Name() {
		sh(t, "ip link set lo up")
		return true
	}
	if os.Geteuid() != 0 {
		t.Fatal("needs root: it makes a network namespace")
	}
	limit := "2m"
	if soak() {
		limit = "1h"
	}
	var pattern []string
	for name := range strings.SplitSeq(t.Name(), "/") {
		pattern = append(pattern, "^"+name+"$")
	}
	cmd := exec.Command("/proc/self/exe", "-test.run="+strings.Join(pattern, "/"), "-test.count=1",
		"-test.timeout="+limit, "-test.v", "-seed", fmt.Sprint(*seedFlag))
	cmd.Env = append(os.Environ(), netnsVariable+"="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("in its namespace: %v\n%s", err, out)
	} else if testing.Verbose() {
		t.Logf("\n%s", out)
	}
	return false
}

// elsewhere says that this process is the copy for another (sub)test.
func elsewhere(t *testing.T) bool {
	in := os.Getenv(netnsVariable)
	return in != "" && in != t.Name() && !strings.HasPrefix(in, t.Name()+"/")
}

func soak() bool { return os.Getenv("SOAK") == "1" }

func newSeed(t *testing.T) uint64 {
	seed := *seedFlag
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("again: -seed %d", seed)
	return seed
}

func sh(t testing.TB, command string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, "sh", "-ec", command).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", command, err, out)
	}
}

func listen(t testing.TB, at string) *net.TCPListener {
	t.Helper()
	l, err := net.Listen("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l.(*net.TCPListener)
}

func connectAs(t testing.TB, to string, uid, gid uint32) Outcome {
	t.Helper()
	o, err := Connect(t.Context(), Ask{netip.MustParseAddrPort(to), uid, gid})
	if err != nil {
		t.Fatalf("connect to %s as %d, %d: %v", to, uid, gid, err)
	}
	return o
}

// program is the name of a family's program for a backend, e.g. "ip6tables-legacy-save".
func program(backend string, f iptables.Family, suffix string) string {
	name := "iptables-"
	if f == iptables.IPv6 {
		name = "ip6tables-"
	}
	return name + backend + suffix
}
