package hostile

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// owner is the uid of a file.
func owner(info fs.FileInfo) (uint32, bool) {
	s, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, false
	}
	return s.Uid, true
}

// intruder is the process of the user. It tells each thing that it managed, at once.
type intruder struct {
	plan
	r  *rand.Rand
	mu sync.Mutex
	to *json.Encoder
}

func intrude(in io.Reader, out io.Writer) int {
	u := &intruder{to: json.NewEncoder(out)}
	if err := json.NewDecoder(in).Decode(&u.plan); err != nil {
		fmt.Fprintln(os.Stderr, "read the plan:", err)
		return 1
	}
	if os.Getuid() != UID || os.Geteuid() != UID {
		fmt.Fprintln(os.Stderr, "not the user:", os.Getuid())
		return 1
	}
	if caps, err := os.ReadFile("/proc/self/status"); err != nil ||
		!bytes.Contains(caps, []byte("CapEff:\t0000000000000000")) {
		fmt.Fprintln(os.Stderr, "has capabilities")
		return 1
	}
	u.r = rand.New(rand.NewPCG(u.Seed, 1234))
	attempts := []func(){u.socket, u.abstract, u.admin, u.floods, u.garbage, u.files, u.folders,
		u.links, u.ports, u.signals, u.shared, u.xtablesLock, u.kernel}
	for {
		u.r.Shuffle(len(attempts), func(i, j int) { attempts[i], attempts[j] = attempts[j], attempts[i] })
		for _, try := range attempts {
			try()
			if time.Now().After(u.Until) {
				return 0
			}
		}
	}
}

func (u *intruder) managed(kind Kind, format string, args ...any) {
	u.mu.Lock()
	defer u.mu.Unlock()
	_ = u.to.Encode(Event{kind, fmt.Sprintf(format, args...), time.Now()})
}

// unless tells what has no error that it should have had.
func (u *intruder) unless(err error, kind Kind, format string, args ...any) {
	if err == nil {
		u.managed(kind, format, args...)
	}
}

// socket tries to ask the agent, and to have it pause.
func (u *intruder) socket() {
	path := filepath.Join(u.Folders[0], "agent.sock")
	for _, ask := range []string{"GET /status", "POST /pause", "GET /debug/pprof/heap"} {
		conn, err := net.DialTimeout("unix", path, time.Second)
		if err != nil {
			continue
		}
		conn.SetDeadline(time.Now().Add(2 * time.Second))
		fmt.Fprintf(conn, "%s HTTP/1.1\r\nHost: agent\r\nContent-Length: 0\r\n\r\n", ask)
		line, _ := bufio.NewReader(conn).ReadString('\n')
		conn.Close()
		if strings.Contains(line, " 2") {
			u.managed(AskedAgent, "%s: %s", ask, strings.TrimSpace(line))
		}
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err == nil {
		conn.Close()
		u.managed(AskedAgent, "a datagram socket at %s", path)
	}
}

// abstract tries each socket of the namespace that has no file, to which no mode gives rights.
func (u *intruder) abstract() {
	text, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		return
	}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) < 8 || !strings.HasPrefix(f[7], "@") {
			continue
		}
		for _, network := range []string{"unix", "unixgram", "unixpacket"} {
			conn, err := net.DialTimeout(network, f[7], time.Second)
			if err == nil {
				conn.Close()
				u.managed(Abstract, "%s %s", network, f[7])
			}
		}
	}
}

// admin asks Envoy, which listens on loopback for anybody. It does not tell it to end: what follows
// from that is Envoy being down.
func (u *intruder) admin() {
	client := http.Client{Timeout: 2 * time.Second}
	resp, err := client.Get("http://127.0.0.1:15000/server_info")
	if err == nil {
		resp.Body.Close()
		u.managed(AskedEnvoy, "/server_info: %s", resp.Status)
	}
}

const public = "127.0.0.1:15020"

// floods opens as many connections to the public port as it gets, and speaks slowly on them.
func (u *intruder) floods() {
	var all []net.Conn
	for range 300 {
		conn, err := net.DialTimeout("tcp", public, 200*time.Millisecond)
		if err != nil {
			break
		}
		all = append(all, conn)
	}
	for i := range 10 {
		for _, conn := range all {
			conn.SetDeadline(time.Now().Add(10 * time.Millisecond))
			io.WriteString(conn, "GET /metrics HTTP/1.1\r\nX-Slow: "[i:i+1])
		}
		time.Sleep(20 * time.Millisecond)
	}
	for _, conn := range all {
		conn.Close()
	}
}

// garbage sends what is no request, or one too large.
func (u *intruder) garbage() {
	random := make([]byte, 4096)
	for i := range random {
		random[i] = byte(u.r.Uint32())
	}
	for name, text := range map[string]string{
		"random bytes": string(random) + "\r\n\r\n",
		"a huge header": "GET /metrics HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", 4<<20) +
			"\r\n\r\n",
		"many headers": "GET /metrics HTTP/1.1\r\nHost: x\r\n" +
			strings.Repeat("X: y\r\n", 100_000) + "\r\n",
		"a path":     "GET /../../agent.sock HTTP/1.1\r\nHost: x\r\n\r\n",
		"the status": "GET /status HTTP/1.1\r\nHost: x\r\n\r\n",
		"pause":      "POST /pause HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
		"pprof":      "GET /debug/pprof/heap HTTP/1.1\r\nHost: x\r\n\r\n",
		"a tunnel":   "CONNECT 169.254.169.254:80 HTTP/1.1\r\nHost: 169.254.169.254:80\r\n\r\n",
		"a proxy's": "GET http://169.254.169.254/computeMetadata/v1/ HTTP/1.1\r\n" +
			"Host: 169.254.169.254\r\nMetadata-Flavor: Google\r\n\r\n",
		"two at once": "POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n" +
			"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /pause HTTP/1.1\r\n\r\n",
		"TLS": "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
	} {
		conn, err := net.DialTimeout("tcp", public, time.Second)
		if err != nil {
			continue // there are others of ours, or it is down
		}
		conn.SetDeadline(time.Now().Add(2 * time.Second))
		io.WriteString(conn, text)
		line, _ := bufio.NewReader(conn).ReadString('\n')
		conn.Close()
		if strings.HasPrefix(line, "HTTP/1.1 2") || strings.HasPrefix(line, "HTTP/1.0 2") {
			u.managed(Misbelieved, "%s: %s", name, strings.TrimSpace(line))
		}
	}
}

// files: what must not be read is not, and nothing is written, cut, given or replaced.
func (u *intruder) files() {
	for _, path := range u.Secret {
		text, err := os.ReadFile(path)
		u.unless(err, Read, "%s: %.40q", path, text)
	}
	for _, path := range u.all() {
		for name, flags := range map[string]int{"writing": os.O_WRONLY, "appending": os.O_WRONLY |
			os.O_APPEND, "both": os.O_RDWR} {
			f, err := os.OpenFile(path, flags|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
			if err == nil {
				f.Close()
				u.managed(Changed, "opened for %s: %s", name, path)
			}
		}
		u.unless(os.Truncate(path, 0), Changed, "cut %s", path)
		u.unless(os.Chmod(path, 0o777), Changed, "chmod %s", path)
		u.unless(os.Chown(path, UID, UID), Changed, "chown %s", path)
		u.unless(os.Chtimes(path, time.Unix(1, 0), time.Unix(1, 0)), Changed, "times of %s", path)
		u.unless(unix.Setxattr(path, "user.x", []byte("x"), 0), Changed, "attribute of %s", path)
		u.unless(os.Rename(path, filepath.Join(u.Home, "stolen")), Changed, "moved %s away", path)
		u.unless(os.Remove(path), Changed, "removed %s", path)
	}
}

// all is what stands in our folders.
func (u *intruder) all() (paths []string) {
	for _, dir := range u.Folders {
		entries, err := os.ReadDir(dir)
		if err != nil {
			continue // not even that
		}
		for _, e := range entries {
			if path := filepath.Join(dir, e.Name()); path != u.Home {
				paths = append(paths, path)
			}
		}
	}
	return paths
}

// names that ours make, or will: who has them first decides what is written where.
var planted = []string{"agent.sock", "agent.lock", "ready", "state.json", "status.json",
	"guest-attributes.budget", "history.json", "planted", ".planted-1"}

// folders: nothing is planted in one, however quickly.
func (u *intruder) folders() {
	prey := filepath.Join(u.Home, "prey")
	_ = os.WriteFile(prey, []byte("x"), 0o666)
	for range 20 {
		for _, dir := range u.Folders {
			path := filepath.Join(dir, planted[u.r.IntN(len(planted))])
			f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
			if err == nil {
				f.Close()
				u.managed(Changed, "made %s", path)
			}
			u.unless(os.Symlink("/etc/passwd", path), Changed, "a link at %s", path)
			u.unless(os.Link(prey, path), Changed, "a second name at %s", path)
			u.unless(unix.Mkfifo(path, 0o666), Changed, "a FIFO at %s", path)
			u.unless(os.Mkdir(path, 0o777), Changed, "a folder at %s", path)
			u.unless(os.Rename(prey, path), Changed, "moved to %s", path)
			ln, err := net.Listen("unix", path)
			if err == nil {
				ln.Close()
				u.managed(Changed, "a socket at %s", path)
			}
		}
	}
	for _, dir := range u.Folders {
		u.unless(os.Rename(dir, dir+"-away"), Changed, "moved %s away", dir)
		u.unless(os.Chmod(dir, 0o777), Changed, "chmod %s", dir)
		u.unless(unix.Mount(u.Home, dir, "", unix.MS_BIND, ""), Changed, "mounted over %s", dir)
	}
}

// links of files of ours in a folder of its own: a second name outlives what is removed
// (fs.protected_hardlinks).
func (u *intruder) links() {
	for i, path := range u.all() {
		to := filepath.Join(u.Home, fmt.Sprintf("link-%d", i))
		if err := os.Link(path, to); err == nil {
			u.managed(Linked, "%s", path)
			os.Remove(to)
		}
	}
}

// ports takes what is free, for a moment, and counts who comes.
func (u *intruder) ports() {
	for _, i := range u.r.Perm(len(u.Ports)) {
		for _, host := range []string{"127.0.0.1", "0.0.0.0", "::1", "::"} {
			at := netip.AddrPortFrom(netip.MustParseAddr(host), u.Ports[i])
			for _, option := range []int{0, unix.SO_REUSEADDR, unix.SO_REUSEPORT} {
				u.bind(at, option)
			}
		}
	}
}

func (u *intruder) bind(at netip.AddrPort, option int) {
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		if option != 0 {
			_ = c.Control(func(fd uintptr) {
				err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, option, 1)
			})
		}
		return err
	}}
	ln, err := config.Listen(context.Background(), "tcp", at.String())
	if err != nil {
		return
	}
	u.managed(Bound, "%v", at)
	hold := time.AfterFunc(time.Duration(u.r.IntN(1500))*time.Millisecond, func() { ln.Close() })
	defer hold.Stop()
	for {
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		u.managed(Caught, "at %v from %v", at, conn.RemoteAddr())
		conn.Close()
	}
}

// signals: no signal arrives, and nobody looks into a process or slows it.
func (u *intruder) signals() {
	for _, pid := range u.PIDs {
		for _, s := range []syscall.Signal{0, syscall.SIGSTOP, syscall.SIGTERM, syscall.SIGKILL,
			syscall.SIGUSR1, syscall.SIGHUP, syscall.SIGABRT} {
			if err := syscall.Kill(pid, s); err == nil {
				u.managed(Signalled, "%v to %d", s, pid)
			}
		}
		if fd, err := unix.PidfdOpen(pid, 0); err == nil { // which anybody may
			u.unless(unix.PidfdSendSignal(fd, unix.SIGSTOP, nil, 0), Signalled, "by pidfd %d", pid)
			if got, err := unix.PidfdGetfd(fd, 3, 0); err == nil {
				unix.Close(got)
				u.managed(Signalled, "took a descriptor of %d", pid)
			}
			unix.Close(fd)
		}
		u.unless(unix.PtraceSeize(pid), Signalled, "ptrace %d", pid)
		u.unless(unix.Setpriority(unix.PRIO_PROCESS, pid, 19), Signalled, "nice %d", pid)
		u.unless(unix.Prlimit(pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 1, Max: 1}, nil), Signalled,
			"limits of %d", pid)
		var one unix.CPUSet
		one.Set(0)
		u.unless(unix.SchedSetaffinity(pid, &one), Signalled, "processors of %d", pid)
		for _, name := range []string{"mem", "environ", "maps", "io", "stack", "fd/3"} {
			f, err := os.Open(fmt.Sprintf("/proc/%d/%s", pid, name))
			if err != nil {
				continue
			}
			_, err = f.Read(make([]byte, 16))
			f.Close()
			u.unless(err, Signalled, "/proc/%d/%s", pid, name)
		}
		u.unless(os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), []byte("1000"), 0), Signalled,
			"oom_score_adj of %d", pid)
	}
}

// shared: what Envoy has in /dev/shm is its user's. No name is taken there: the folder is the
// machine's.
func (u *intruder) shared() {
	found, _ := filepath.Glob("/dev/shm/envoy_*")
	for _, path := range found {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if errors.Is(err, fs.ErrPermission) {
			f, err = os.Open(path)
		}
		if err == nil {
			f.Close()
			u.managed(Shared, "%s", path)
		}
	}
}

// xtablesLock: who holds it stops every change of rules. It is given back at once, since it is the
// machine's.
func (u *intruder) xtablesLock() {
	const path = "/run/xtables.lock"
	for _, flags := range []int{os.O_RDONLY, os.O_RDWR} {
		f, err := os.OpenFile(path, flags, 0)
		if err != nil {
			continue
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB)
		f.Close()
		if err == nil || errors.Is(err, unix.EWOULDBLOCK) {
			u.managed(Locked, "%s", path)
		}
	}
}

// kernel: no rule is read or changed, no entry of conntrack, no interface.
func (u *intruder) kernel() {
	for _, argv := range [][]string{
		{"iptables", "-w", "-t", "nat", "-S"}, {"iptables", "-w", "-t", "nat", "-F"},
		{"ip6tables", "-w", "-t", "nat", "-F"}, {"nft", "flush", "ruleset"}, {"nft", "list", "ruleset"},
		{"ip", "addr", "add", "10.10.0.1/32", "dev", "lo"}, {"ip", "link", "set", "eth0", "down"},
		{"ip", "route", "add", "10.10.0.0/16", "dev", "lo"},
		{"sysctl", "-w", "net.ipv4.ip_forward=1"},
	} {
		program, err := exec.LookPath(argv[0])
		if err != nil {
			continue // not on this machine
		}
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		out, err := exec.CommandContext(ctx, program, argv[1:]...).CombinedOutput()
		cancel()
		// Some end with 0 and say that it is not permitted.
		if err == nil && !bytes.Contains(out, []byte("ermi")) {
			u.managed(Ruled, "%v: %.200q", argv, out)
		}
	}
}
