// Package lab is a small network of namespaces on one machine, for tests and the demo: a "vm"
// in which Envoy and the agent run, a "client" that calls the VM's serving ports, and a
// "service" that is everything else (the internet, the services' endpoints, the metadata
// server, the control plane).
//
//	client ─ 10.129.0.3/24 ── 10.129.0.1 ─ service ─ 10.128.0.1 ── 10.128.0.2/24 ─ vm
//	         fd29::3/64           fd29::1            fd28::1         fd28::2/64
//
// "service" routes between the two, is their default gateway, and takes *every* other address as
// its own (a local default route): a connection to a VIP that nobody redirects arrives there, at a
// server that says which address it saw. That is how an escape is told from a connection that went
// through Envoy, whose endpoint is EndpointAddr. So no VIP needs a server of its own.
//
// What belongs to a lab ends with it: a helper process outside of this process's session holds the
// list, and takes the namespaces and the folder away when this process ends, however it ends
// (Close, panic, ctrl-C, kill -9). Nothing is ever made in the host's own namespace but the files
// in /run/netns. Labs of several processes stand side by side.
//
// The lab knows nothing of the agent, the control plane (test/controlplane) or the emulator
// (test/platform): it gives them sockets (Namespace.Listen) and starts the Envoy that talks
// to them (StartEnvoy).
package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// Addresses in every lab.
var (
	VMAddr       = netip.MustParseAddr("10.128.0.2") // the VM's own; its interface is eth0
	VMAddr6      = netip.MustParseAddr("fd28::2")
	ClientAddr   = netip.MustParseAddr("10.129.0.3")
	ClientAddr6  = netip.MustParseAddr("fd29::3")
	GatewayAddr  = netip.MustParseAddr("10.128.0.1") // "service", as the VM sees it
	GatewayAddr6 = netip.MustParseAddr("fd28::1")
	// MetadataAddr is where the metadata server listens (port 80), in "service".
	MetadataAddr  = netip.MustParseAddr("169.254.169.254")
	MetadataAddr6 = netip.MustParseAddr("fd20:ce::254")
	// ControlPlaneAddr is where the control plane listens, in "service"; other servers of the tests'
	// own take its port or neighbours.
	ControlPlaneAddr = netip.MustParseAddr("10.131.0.1")
)

// EndpointAddr is the n-th endpoint's address (n from 1 to 254), in "service".
func EndpointAddr(n byte) netip.Addr { return netip.AddrFrom4([4]byte{10, 130, 0, n}) }

// EndpointAddr6 is the n-th endpoint's IPv6 address.
func EndpointAddr6(n byte) netip.Addr {
	return netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x30, 15: n})
}

// Backend is which iptables the lab's commands find under the plain names.
type Backend string

const (
	NFT    Backend = "nft"
	Legacy Backend = "legacy"
)

// Backends lists both, for tests that run on each.
var Backends = []Backend{NFT, Legacy}

// Options of a lab.
type Options struct {
	Backend Backend // empty: nft
	// NoOwnerMatch makes "vm" the namespace of another user namespace. The kernel refuses every rule
	// with `-m owner` there, from whoever is not in that one, root included (owner_check in
	// net/netfilter/xt_owner.c), and takes all others.
	NoOwnerMatch bool
	// OwnLock has iptables-legacy of the lab's commands lock LockFile instead of the machine's
	// /run/xtables.lock, which other labs wait for as well.
	OwnLock bool
}

// Lab is one running lab.
type Lab struct {
	VM, Client, Service *Namespace
	// Dir is the lab's own folder, readable for every user; it goes away with the lab.
	Dir     string
	Backend Backend

	shims  string
	lock   string // "": the machine's
	reaper *exec.Cmd
	leash  io.Closer // the write end of the reaper's stdin: its closing is the order to clean up
	mu     sync.Mutex
	closed bool
	ends   []func()
}

var number atomic.Int64

// New makes a lab. Close it, or let T do both.
func New(opts Options) (l *Lab, err error) {
	if err := look(); err != nil {
		return nil, err
	}
	if opts.Backend == "" {
		opts.Backend = NFT
	}
	removeLeftovers()
	l = &Lab{Backend: opts.Backend}
	if l.Dir, err = os.MkdirTemp("", "spa-lab-"); err != nil {
		return nil, fmt.Errorf("make lab folder: %w", err)
	}
	if err := os.Chmod(l.Dir, 0o755); err != nil { // Envoy's user reads its configuration here
		return nil, fmt.Errorf("open lab folder: %w", err)
	}
	prefix := fmt.Sprintf("%s%d-%d-", namePrefix, os.Getpid(), number.Add(1))
	names := []string{prefix + "vm", prefix + "client", prefix + "service"}
	if err := l.leashReaper(names); err != nil {
		os.RemoveAll(l.Dir)
		return nil, err
	}
	defer func(l *Lab) { // as it is now: a return of nil sets the result
		if err != nil {
			l.Close()
		}
	}(l)
	if opts.OwnLock {
		l.lock = filepath.Join(l.Dir, "xtables.lock")
	}
	if err := l.makeShims(); err != nil {
		return nil, err
	}
	for i, p := range []**Namespace{&l.VM, &l.Client, &l.Service} {
		if *p, err = l.namespace(names[i], i == 0 && opts.NoOwnerMatch); err != nil {
			return nil, err
		}
	}
	if err := l.wire(); err != nil {
		return nil, err
	}
	return l, nil
}

// T makes a lab for a test and closes it at its end. Where there can be no lab, the test
// fails: it never skips.
func T(t testing.TB, opts Options) *Lab {
	t.Helper()
	l, err := New(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// namePrefix starts every namespace's name: spa-PID-N-ROLE.
const namePrefix = "spa-"

// reap waits for the end of its input, then removes the namespaces ($2...) and the folder ($1).
// Processes in a namespace are not its business: they have a parent-death signal.
const reap = `read -r _; dir=$1; shift
for n; do ip netns delete "$n" 2>/dev/null; done
rm -rf "$dir"; exit 0`

// leashReaper starts the process that cleans up. It has a session of its own, so that a ctrl-C on
// the terminal does not reach it.
func (l *Lab) leashReaper(names []string) error {
	l.reaper = exec.Command("sh", append([]string{"-c", reap, "lab-reaper", l.Dir}, names...)...)
	l.reaper.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	l.reaper.Dir = "/"
	leash, err := l.reaper.StdinPipe()
	if err != nil {
		return fmt.Errorf("start reaper: %w", err)
	}
	if err := l.reaper.Start(); err != nil {
		return fmt.Errorf("start reaper: %w", err)
	}
	l.leash = leash
	return nil
}

// Close ends every process and server of the lab and takes it away. Calling it again does nothing.
func (l *Lab) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	ends := l.ends
	l.mu.Unlock()
	for i := len(ends) - 1; i >= 0; i-- {
		ends[i]()
	}
	for _, n := range []*Namespace{l.VM, l.Client, l.Service} {
		if n != nil {
			n.file.Close()
		}
	}
	l.leash.Close()
	if err := l.reaper.Wait(); err != nil {
		return fmt.Errorf("clean up lab: %w", err)
	}
	return nil
}

// atEnd has f called by Close, last first; at once if the lab is closed.
func (l *Lab) atEnd(f func()) {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		f()
		return
	}
	l.ends = append(l.ends, f)
	l.mu.Unlock()
}

// removeLeftovers deletes namespaces of labs whose process is gone and whose reaper did not get its
// turn (a machine that lost power keeps none: /run is a tmpfs; this is for a killed reaper). What
// cannot be removed is another's, or is being removed: no error.
func removeLeftovers() {
	entries, err := os.ReadDir("/run/netns")
	if err != nil {
		return // no namespace was ever made
	}
	for _, e := range entries {
		rest, ours := strings.CutPrefix(e.Name(), namePrefix)
		pid, _, ok := strings.Cut(rest, "-")
		if n, err := strconv.Atoi(pid); !ours || !ok || err != nil || n <= 0 ||
			!errors.Is(syscall.Kill(n, 0), syscall.ESRCH) {
			continue
		}
		exec.Command("ip", "netns", "delete", e.Name()).Run()
	}
}

func (l *Lab) namespace(name string, others bool) (*Namespace, error) {
	add := []string{"ip", "netns", "add", name}
	if others {
		// attach gives a name to the network namespace of a process, which stays when that has ended.
		holder := exec.Command("unshare", "--user", "--net", "sh", "-c", "echo; exec sleep infinity")
		holder.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		out, err := holder.StdoutPipe()
		if err != nil {
			return nil, fmt.Errorf("make namespace %q: %w", name, err)
		}
		if err := Start(holder); err != nil {
			return nil, fmt.Errorf("make namespace %q: %w", name, err)
		}
		defer func() { holder.Process.Kill(); holder.Wait() }()
		if _, err := out.Read(make([]byte, 1)); err != nil {
			return nil, fmt.Errorf("make namespace %q: %w (no user namespaces?)", name, ErrNoNamespaces)
		}
		add = []string{"ip", "netns", "attach", name, strconv.Itoa(holder.Process.Pid)}
	}
	if out, err := exec.Command(add[0], add[1:]...).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("make namespace %q: %w: %s", name, ErrNoNamespaces,
			strings.TrimSpace(string(out)))
	}
	path := "/run/netns/" + name
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open namespace %q: %w", name, err)
	}
	return &Namespace{Name: name, path: path, file: file, env: l.Env}, nil
}

// wire lays the cables. Interfaces are made inside the namespaces, never in the host's.
func (l *Lab) wire() error {
	// nodad: an address is usable at once, not after a second of duplicate detection.
	batches := []struct {
		ns    *Namespace
		lines string
	}{
		{l.VM, `
link set lo up
link add eth0 type veth peer name vm netns ` + l.Service.Name + `
link set eth0 up
addr add 10.128.0.2/24 dev eth0
addr add fd28::2/64 dev eth0 nodad
`},
		{l.Client, `
link set lo up
link add eth0 type veth peer name client netns ` + l.Service.Name + `
link set eth0 up
addr add 10.129.0.3/24 dev eth0
addr add fd29::3/64 dev eth0 nodad
`},
		// The local default route stands in table main, where the connected routes are longer; in table
		// local it would take the answers too.
		{l.Service, `
link set lo up
link set vm up
link set client up
addr add 10.128.0.1/24 dev vm
addr add fd28::1/64 dev vm nodad
addr add 10.129.0.1/24 dev client
addr add fd29::1/64 dev client nodad
addr add 169.254.169.254/32 dev lo
addr add fd20:ce::254/128 dev lo nodad
addr add 10.131.0.1/32 dev lo
route add local 0.0.0.0/0 dev lo table main
route add local ::/0 dev lo table main
`},
		{l.VM, "route add default via 10.128.0.1\nroute add default via fd28::1\n"},
		{l.Client, "route add default via 10.129.0.1\nroute add default via fd29::1\n"},
	}
	for _, b := range batches {
		if _, err := b.ns.RunInput(context.Background(), b.lines, "ip", "-batch", "-"); err != nil {
			return fmt.Errorf("wire lab: %w", err)
		}
	}
	return l.Service.Do(func() error {
		for path, value := range map[string]string{
			"/proc/sys/net/ipv4/ip_forward":          "1",
			"/proc/sys/net/ipv6/conf/all/forwarding": "1",
		} {
			if err := os.WriteFile(path, []byte(value), 0); err != nil {
				return fmt.Errorf("wire lab: %w", err)
			}
		}
		return nil
	})
}

// makeShims makes the folder with iptables, iptables-save, … of the chosen backend
// under their plain names.
func (l *Lab) makeShims() error {
	l.shims = filepath.Join(l.Dir, "bin")
	if err := os.RemoveAll(l.shims); err != nil {
		return fmt.Errorf("make shims: %w", err)
	}
	if err := os.Mkdir(l.shims, 0o755); err != nil {
		return fmt.Errorf("make shims: %w", err)
	}
	for _, family := range []string{"iptables", "ip6tables"} {
		for _, tool := range []string{"", "-save", "-restore"} {
			real, err := exec.LookPath(family + "-" + string(l.Backend) + tool)
			if err != nil {
				return &MissingError{Program: family + "-" + string(l.Backend) + tool, Package: "iptables"}
			}
			// The multi-call binary goes by the name it was called by, and that is the plain one.
			if err := os.Symlink(real, filepath.Join(l.shims, family+tool)); err != nil {
				return fmt.Errorf("make shims: %w", err)
			}
		}
	}
	return nil
}

// SetBackend makes the plain names another backend's, as update-alternatives does.
func (l *Lab) SetBackend(b Backend) error {
	l.Backend = b
	return l.makeShims()
}

// Env is the environment of the lab's commands: this process's, with the backend's
// iptables first on PATH.
func (l *Lab) Env() []string {
	env := []string{"PATH=" + l.shims + ":" + os.Getenv("PATH")}
	if l.lock != "" {
		env = append(env, "XTABLES_LOCKFILE="+l.lock)
	}
	for _, kv := range os.Environ() {
		if !strings.HasPrefix(kv, "PATH=") {
			env = append(env, kv)
		}
	}
	return env
}

// LockFile is what iptables-legacy locks in a lab of OwnLock.
func (l *Lab) LockFile() string { return l.lock }

// Shims is the folder with the backend's iptables under their plain names, for a program that
// is started another way.
func (l *Lab) Shims() string { return l.shims }

// Listen opens a listening socket in a namespace and closes it with the lab.
func (l *Lab) Listen(n *Namespace, addr netip.AddrPort) (net.Listener, error) {
	ln, err := n.Listen("tcp", addr.String())
	if err != nil {
		return nil, err
	}
	l.atEnd(func() { ln.Close() })
	return ln, nil
}

// eventually calls f until it returns nil or ctx ends; then it returns f's last error.
func eventually(ctx context.Context, f func() error) error {
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}
