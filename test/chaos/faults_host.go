package chaos

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
)

// disk is a mount namespace of the agent's own: its state folder is a small disk, and both folders
// can be made read-only without anyone else's noticing. The run folder stays where it is, since
// others call its socket.
type disk struct {
	holder *exec.Cmd
	leash  io.Closer // its stdin: the holder ends with it
	root   string    // of that namespace, as this process sees it
}

// diskSize is that of the state folder: what an agent keeps is far below 1 MB.
const diskSize = "4m"

// giveDisk makes it. It ends with the lab.
func (w *World) giveDisk() error {
	for _, dir := range []string{w.Agent.StateDir(), w.Agent.RunDir()} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	holder := w.VM.Command(context.Background(), "unshare", "-m", "sh", "-ec", `
		mount -t tmpfs -o size="$2" none "$1"
		echo
		read -r end`, "sh", w.Agent.StateDir(), diskSize)
	out, err := holder.StdoutPipe()
	if err != nil {
		return err
	}
	if w.disk.leash, err = holder.StdinPipe(); err != nil {
		return err
	}
	if err := lab.Start(holder); err != nil {
		return fmt.Errorf("make the agent's disk: %w", err)
	}
	if _, err := out.Read(make([]byte, 1)); err != nil {
		return errors.Join(errors.New("make the agent's disk: mount failed"), holder.Process.Kill(),
			holder.Wait())
	}
	pid := strconv.Itoa(holder.Process.Pid)
	w.disk.holder, w.disk.root = holder, filepath.Join("/proc", pid, "root")
	w.Agent.Under = []string{"nsenter", "--target", pid, "--mount", "--"}
	return nil
}

// Close ends the world.
func (w *World) Close() error {
	err := w.Mesh.Close()
	if w.disk.holder != nil {
		w.disk.holder.Process.Kill()
		w.disk.holder.Wait() // it was killed
	}
	return err
}

// ofAgent is a path of the agent's as this process reaches it.
func (w *World) ofAgent(path string) string { return filepath.Join(w.disk.root, path) }

// readOnly has the agent open nothing for writing in a folder of its own, until end: a read-only
// mount stands over it. What it has open stays so. It is made read-only elsewhere: where the agent
// opens files it would be busy as soon as one is open for writing.
func (w *World) readOnly(dir string) (end func() error, err error) {
	run := func(script string) error {
		argv := slices.Concat(w.Agent.Under, []string{"sh", "-ec", script, "sh", dir})
		if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("make %s read-only: %w: %s", dir, err, out)
		}
		return nil
	}
	return func() error { return run(`umount -l "$1"`) },
		run(`at=$(mktemp -d)
			mount --bind "$1" "$at"
			mount -o remount,bind,ro "$at"
			mount --bind "$at" "$1"
			umount "$at"
			rmdir "$at"`)
}

// hostFaults are the disk's, the serial port's and the log's, and those of others who burden the
// agent.
func hostFaults() []Fault {
	serial := func(name string, hurt func(*World, *rand.Rand) error) Fault {
		return Fault{Name: name, Weight: 1, Group: "serial", Shortest: 500 * time.Millisecond,
			Longest: 10 * time.Second, Begin: func(w *World, random *rand.Rand) (func() error, error) {
				return w.Serial.Mend, hurt(w, random)
			}}
	}
	return []Fault{
		{Name: "disk-full", Weight: 2, Group: "state-disk", Shortest: 500 * time.Millisecond,
			Longest: 15 * time.Second, Begin: fillDisk},
		{Name: "disk-readonly", Weight: 1, Group: "state-disk", Shortest: 500 * time.Millisecond,
			Longest: 15 * time.Second,
			Begin: func(w *World, _ *rand.Rand) (func() error, error) {
				return w.readOnly(w.Agent.StateDir())
			}},
		// By design an agent that cannot hold the lock of its folder does not start (two would undo each
		// other), and says so. One that is just starting may meet it.
		{Name: "run-readonly", Weight: 1, Group: "run-disk", Also: "agent",
			Shortest: 500 * time.Millisecond, Longest: 10 * time.Second,
			Begin: func(w *World, _ *rand.Rand) (func() error, error) {
				return w.readOnly(w.Agent.RunDir())
			}, Excuses: []Excuse{{Kind: Died, After: time.Second}}, Hinders: true,
			Recovery: agentStarts},

		serial("serial-hangs", func(w *World, _ *rand.Rand) error { return w.Serial.Hang() }),
		serial("serial-slow", func(w *World, random *rand.Rand) error {
			return w.Serial.Slow(10 + random.IntN(300))
		}),
		serial("serial-gone", func(w *World, _ *rand.Rand) error { return w.Serial.Refuse() }),

		{Name: "log-cut", Weight: 2, Begin: logOnce(cutLog)},
		{Name: "log-garbage", Weight: 2, Begin: logOnce(garbageLog)},
		{Name: "log-huge", Weight: 1, Begin: logOnce(hugeLog)},
		{Name: "log-times", Weight: 1, Begin: logOnce(oddTimes)},
		{Name: "log-renamed", Weight: 2, Group: "log", Shortest: 300 * time.Millisecond,
			Longest: 8 * time.Second, Begin: renameLog},
		// Nothing that Envoy could open, either: so none is started meanwhile.
		{Name: "log-odd", Weight: 1, Group: "envoy", Shortest: 300 * time.Millisecond,
			Longest: 6 * time.Second, Begin: oddLog},

		// Whoever has no descriptor left starts no iptables.
		// One that is just being started ends, and is started again.
		{Name: "fd-limit", Weight: 2, Group: "agent", Shortest: 500 * time.Millisecond,
			Longest: 10 * time.Second, Begin: fewDescriptors, Hinders: true, Recovery: 2 * time.Second,
			Excuses: []Excuse{{Kind: Died, Only: []string{"process"}, After: time.Second}}},
		{Name: "scrape-storm", Weight: 1, Shortest: time.Second, Longest: 6 * time.Second,
			Begin: scrapeStorm},
		{Name: "slow-clients", Weight: 1, Shortest: time.Second, Longest: 15 * time.Second,
			Begin: slowClients},
		{Name: "commands", Weight: 2, Shortest: 500 * time.Millisecond, Longest: 6 * time.Second,
			Begin: commands},
	}
}

// fillDisk leaves no room in the state folder.
func fillDisk(w *World, random *rand.Rand) (func() error, error) {
	path := filepath.Join(w.ofAgent(w.Agent.StateDir()), "full")
	full, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	defer full.Close()
	for err == nil {
		_, err = full.Write(make([]byte, 64<<10))
	}
	if !errors.Is(err, unix.ENOSPC) {
		return nil, err
	}
	if random.IntN(2) == 0 { // a block is left: a write fails in its middle
		info, err := full.Stat()
		if err == nil {
			err = full.Truncate(info.Size() - 4096)
		}
		if err != nil {
			return nil, err
		}
	}
	return func() error {
		if err := os.Remove(path); !errors.Is(err, os.ErrNotExist) { // the folder was emptied
			return err
		}
		return nil
	}, nil
}

// logOnce does something to Envoy's log at once.
func logOnce(do func(path string, random *rand.Rand) error) func(
	*World, *rand.Rand) (func() error, error) {
	return func(w *World, random *rand.Rand) (func() error, error) {
		info, err := os.Lstat(w.Envoy.LogPath)
		if err != nil || !info.Mode().IsRegular() {
			return nil, nil // another fault has put something else there
		}
		return nil, do(w.Envoy.LogPath, random)
	}
}

// cutLog is copytruncate, or a truncation to the middle of a line.
func cutLog(path string, random *rand.Rand) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if random.IntN(2) == 0 {
		return os.Truncate(path, random.Int64N(info.Size()+1))
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	return errors.Join(os.WriteFile(path+".1", text, 0o644), os.Truncate(path, 0))
}

// appendLog writes as Envoy does, whose file is opened for appending.
func appendLog(path, text string) error {
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = io.WriteString(f, text)
	return errors.Join(err, f.Close())
}

func garbageLog(path string, random *rand.Rand) error {
	garbage := make([]byte, 1+random.IntN(100_000))
	for i := range garbage {
		garbage[i] = byte(random.Uint32())
	}
	return appendLog(path, string(garbage))
}

// hugeLog is more than anyone wants to read: lines without end, or a line without end.
func hugeLog(path string, random *rand.Rand) error {
	line := "[2026-01-01 00:00:00.000][1][info][upstream] lds: add/update listener 'x'\n"
	if random.IntN(2) == 0 {
		line = strings.Repeat("x", 100)
	}
	return appendLog(path, strings.Repeat(line, 200_000))
}

// oddTimes are lines of the past, the future and of no time, with failures in them that are over or
// never were.
func oddTimes(path string, random *rand.Rand) error {
	var b strings.Builder
	for range 200 {
		at := time.Now().Add(time.Duration(random.Int64N(int64(400*24*time.Hour))) - 200*24*time.Hour)
		stamp := at.UTC().Format("2006-01-02 15:04:05.000")
		if random.IntN(10) == 0 {
			stamp = "9999-99-99 99:99:99.999"
		}
		fmt.Fprintf(&b, "[%s][1][info][main] [source/server/server.cc:1] all dependencies initialized\n",
			stamp)
	}
	return appendLog(path, b.String())
}

// renameLog is a rotation as Envoy does not notice it: it writes on into the renamed file.
func renameLog(w *World, random *rand.Rand) (func() error, error) {
	path := w.Envoy.LogPath
	aside := path + ".aside"
	err := os.Rename(path, aside)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err == nil && random.IntN(2) == 0 {
		err = os.WriteFile(path, nil, 0o644)
	}
	return func() error {
		info, err := os.Stat(path)
		if err == nil && info.Size() > 0 { // an Envoy that was started since has it
			return os.Remove(aside)
		}
		return os.Rename(aside, path)
	}, err
}

// oddLog has something else stand where the log was.
func oddLog(w *World, random *rand.Rand) (func() error, error) {
	path := w.Envoy.LogPath
	aside := path + ".odd"
	if err := os.Rename(path, aside); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil, nil
		}
		return nil, err
	}
	var err error
	switch random.IntN(5) {
	case 0:
		err = unix.Mkfifo(path, 0o644)
	case 1:
		err = os.Mkdir(path, 0o755)
	case 2:
		err = os.Symlink("/dev/zero", path)
	case 3:
		err = os.Symlink(path, path)
	case 4:
		err = unix.Mknod(path, unix.S_IFSOCK|0o644, 0)
	}
	return func() error { return errors.Join(os.Remove(path), os.Rename(aside, path)) }, err
}

// fewDescriptors lets the agent open few files, or none, beside those that it has.
func fewDescriptors(w *World, random *rand.Rand) (func() error, error) {
	pid := w.Agent.PID()
	open, err := os.ReadDir(filepath.Join("/proc", strconv.Itoa(pid), "fd"))
	if err != nil {
		return nil, nil // it has died, which watchers see
	}
	var was unix.Rlimit
	few := uint64(len(open) + random.IntN(12))
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &was); err != nil {
		return nil, err
	}
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: few, Max: was.Max},
		nil); err != nil {
		return nil, err
	}
	return func() error {
		err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &was, nil)
		if errors.Is(err, syscall.ESRCH) {
			return nil
		}
		return err
	}, nil
}

// scrapeStorm are clients that ask without a pause.
func scrapeStorm(w *World, _ *rand.Rand) (func() error, error) {
	return background(func(ctx context.Context) {
		var all sync.WaitGroup
		for i := range 6 {
			path := []string{"/metrics", "/healthz", "/healthz/ready"}[i%3]
			all.Go(func() {
				client := w.VM.HTTPAs(StrangerUID)
				client.Timeout = 5 * time.Second
				for ctx.Err() == nil {
					r, err := http.NewRequestWithContext(ctx, http.MethodGet, agentPage+path, nil)
					if err != nil {
						w.broken(err)
						return
					}
					if resp, err := client.Do(r); err == nil {
						io.Copy(io.Discard, resp.Body)
						resp.Body.Close()
					} else {
						sleep(ctx, 50*time.Millisecond) // nobody is there
					}
				}
			})
		}
		all.Wait()
	}), nil
}

const agentPage = "http://127.0.0.1:15020"

var httpAddr = netip.MustParseAddrPort("127.0.0.1:15020")

// slowClients hold connections on which they say next to nothing, or read nothing.
func slowClients(w *World, random *rand.Rand) (func() error, error) {
	n := 20 + random.IntN(200)
	return background(func(ctx context.Context) {
		var conns []net.Conn
		defer func() {
			for _, c := range conns {
				c.Close()
			}
		}()
		for i := range n {
			c, err := w.VM.DialAs(ctx, StrangerUID, httpAddr)
			if err != nil {
				continue
			}
			conns = append(conns, c)
			say := "GET /metrics HT"
			if i%2 == 0 {
				say = strings.Repeat("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", 20)
			}
			c.SetDeadline(time.Now().Add(time.Second))
			io.WriteString(c, say) // one that is refused is as good
		}
		for ctx.Err() == nil {
			for _, c := range conns {
				c.SetDeadline(time.Now().Add(10 * time.Millisecond))
				io.WriteString(c, "x")
			}
			sleep(ctx, time.Second)
		}
	}), nil
}

// commands are those that look, many at once.
func commands(w *World, random *rand.Rand) (func() error, error) {
	all := [][]string{{"status"}, {"status", "-o", "json"}, {"doctor"}, {"doctor", "-o", "json"},
		{"explain", Web4.String()}, {"explain", Plain6.String()}, {"diff"}, {"bundle", "-f", "-"},
		{"wait", "--timeout", "1s"}, {"version"}}
	seed := random.Uint64()
	return background(func(ctx context.Context) {
		var running sync.WaitGroup
		for i := range 4 {
			running.Go(func() {
				random := rand.New(rand.NewPCG(seed, uint64(i)))
				for ctx.Err() == nil {
					uid := uint32(0)
					if random.IntN(4) == 0 {
						uid = StrangerUID
					}
					w.command(ctx, uid, all[random.IntN(len(all))])
				}
			})
		}
		running.Wait()
	}), nil
}

// command runs one. What it says is not looked at, but that it ends as its help says.
func (w *World) command(ctx context.Context, uid uint32, args []string) {
	began := time.Now()
	_, stderr, code, err := w.Agent.RunAs(ctx, uid, w.Agent.Settings(), args...)
	if ctx.Err() != nil {
		return
	}
	said := bufio.NewScanner(strings.NewReader(stderr))
	for said.Scan() {
		line := said.Text()
		if strings.HasPrefix(line, "panic:") || strings.HasPrefix(line, "fatal error:") ||
			strings.Contains(line, "DATA RACE") {
			err = errors.New(stderr)
			break
		}
	}
	if err != nil || code < 0 || code > 2 {
		w.Observe(Observation{Kind: Died, From: began, To: time.Now(), What: strings.Join(args, " "),
			Text: fmt.Sprintf("uid %d: exit code %d: %v: %s", uid, code, err, stderr)})
	}
}
