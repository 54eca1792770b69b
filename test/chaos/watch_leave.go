package chaos

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
)

const (
	// leaveLimit is for what the agent keeps a moment longer than its rules: a table of nft's that
	// holds conntrack for the streams that it had redirected.
	leaveLimit = 15 * time.Second
	// endLimit is for its end by SIGTERM.
	endLimit = 10 * time.Second
)

// picture is what a VM looks like where the agent was never there, to hold against after cleanup:
// things by what kind they are of, each in a line.
type picture map[string][]string

// picture looks.
func (w *World) picture(ctx context.Context) (p picture, err error) {
	p = picture{}
	var all []error
	for _, program := range []string{"iptables-nft-save", "ip6tables-nft-save", "iptables-legacy-save",
		"ip6tables-legacy-save"} {
		out, err := w.VM.Run(ctx, program)
		p[program] = tables(out)
		all = append(all, err)
	}
	out, err := w.VM.Run(ctx, "nft", "list", "tables")
	p["nft tables"] = nftTables(out)
	all = append(all, err)
	out, err = w.VM.Run(ctx, "ss", "-Hltune")
	p["listening sockets"] = sockets(out)
	all = append(all, err)
	p["processes"], err = w.processes()
	all = append(all, err)
	p["files"], err = w.files()
	return p, errors.Join(append(all, err)...)
}

// differs says what is there now and was not, and the other way round.
func (p picture) differs(now picture) (all []string) {
	for _, kind := range slices.Sorted(maps.Keys(now)) {
		for _, line := range now[kind] {
			if !slices.Contains(p[kind], line) {
				all = append(all, fmt.Sprintf("%s: %s is there", kind, line))
			}
		}
		for _, line := range p[kind] {
			if !slices.Contains(now[kind], line) {
				all = append(all, fmt.Sprintf("%s: %s is gone", kind, line))
			}
		}
	}
	return all
}

// tables is what iptables-save said, a table a line: without comments and counters, and without
// tables in which there is nothing: iptables makes those itself when it looks.
func tables(save string) (all []string) {
	var table []string
	holds := false
	for line := range strings.Lines(save) {
		line = strings.TrimSpace(line)
		switch {
		case line == "" || strings.HasPrefix(line, "#"):
		case line == "COMMIT":
			if holds {
				all = append(all, strings.Join(table, "\n"))
			}
			table, holds = nil, false
		default:
			if strings.HasPrefix(line, ":") {
				line, _, _ = strings.Cut(line, " [")
				holds = holds || !strings.HasSuffix(line, " ACCEPT")
			} else if strings.HasPrefix(line, "-A") {
				holds = true
			}
			table = append(table, line)
		}
	}
	slices.Sort(all)
	return all
}

// sockets are protocol, address and owner of those that listen, in what `ss -Hltune` said. Envoy's
// are left out: they come and go with its listeners.
func sockets(said string) (all []string) {
	envoys := fmt.Sprintf("uid:%d", lab.EnvoyUID)
	for line := range strings.Lines(said) {
		fields := strings.Fields(line)
		if len(fields) < 6 || slices.Contains(fields, envoys) {
			continue
		}
		owner := "uid:0"
		for _, f := range fields[6:] {
			if strings.HasPrefix(f, "uid:") {
				owner = f
			}
		}
		all = append(all, strings.Join([]string{fields[0], fields[4], owner}, " "))
	}
	slices.Sort(all)
	return all
}

// processes are the names of those in the VM, but for Envoy.
func (w *World) processes() (all []string, err error) {
	var ns string
	err = w.VM.Do(func() (err error) { ns, err = os.Readlink("/proc/thread-self/ns/net"); return err })
	if err != nil {
		return nil, err
	}
	dirs, err := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		in, err := os.Readlink(filepath.Join(dir, "ns", "net"))
		said, err2 := os.ReadFile(filepath.Join(dir, "status"))
		if err != nil || err2 != nil || in != ns || filepath.Base(dir) == strconv.Itoa(os.Getpid()) ||
			statusNumber(string(said), "Uid") == lab.EnvoyUID {
			continue
		}
		name, _, _ := strings.Cut(string(said), "\n")
		all = append(all, strings.TrimSpace(strings.TrimPrefix(name, "Name:")))
	}
	slices.Sort(all)
	return all, err
}

// others are files of Envoy's and of faults, such as a lock that these hold.
var others = regexp.MustCompile(`^(envoy|xtables\.lock$|hostile)`)

// files are those outside of the agent's folders where it might have left one.
func (w *World) files() (all []string, err error) {
	own := filepath.Dir(w.Agent.RunDir())
	err = filepath.WalkDir(w.Mesh.Dir, func(path string, d fs.DirEntry, err error) error {
		switch {
		case path == own, filepath.Base(path) == "envoy-run": // of the supervisor and its epochs
			return fs.SkipDir
		case others.MatchString(filepath.Base(path)):
		case err == nil:
			all = append(all, path)
		case !errors.Is(err, fs.ErrNotExist):
			return err
		}
		return nil
	})
	for _, pattern := range []string{filepath.Join(os.TempDir(), "*service-proxy*"),
		"/run/service-proxy-agent*", "/var/lib/service-proxy-agent*", "/etc/service-proxy-agent*"} {
		some, _ := filepath.Glob(pattern)
		all = append(all, some...)
	}
	slices.Sort(all)
	return all, err
}

// iptablesTable is a table of nft that is iptables': what is in those is in what iptables-nft-save
// said, and an empty one is what iptables-nft leaves.
var iptablesTable = regexp.MustCompile(`^table ip6? (raw|mangle|nat|filter|security)$`)

// nftTables are those in what `nft list tables` said that are not iptables'.
func nftTables(said string) (all []string) {
	for line := range strings.Lines(said) {
		if line = strings.TrimSpace(line); !iptablesTable.MatchString(line) {
			all = append(all, line)
		}
	}
	slices.Sort(all)
	return all
}

// leave has the agent clean up, ends it, and looks what is left of it.
func (w *World) leave(ctx context.Context, before picture) {
	began := time.Now()
	left := func(format string, args ...any) {
		w.Observe(Observation{Kind: Left, From: began, To: time.Now(),
			Text: fmt.Sprintf(format, args...)})
	}
	if err := w.watch.canaries.moved(); err != nil {
		w.Observe(Observation{Kind: Broken, From: began, To: began, Text: err.Error()})
	}
	w.spent()
	stay, err := w.watch.streams.stay(ctx, w.watch.canaries.nat)
	if err != nil {
		w.Observe(Observation{Kind: Broken, From: began, To: time.Now(), Text: err.Error()})
	}
	defer stay.close()
	out, stderr, code, err := w.Agent.Run(ctx, "cleanup")
	if err != nil || code != 0 {
		left("cleanup: exit code %d, %v: %s%s", code, err, out, stderr)
	}
	for _, program := range []string{"iptables-save", "ip6tables-save"} {
		save, err := w.VM.Run(ctx, program)
		if err != nil || strings.Contains(save, "SERVICE_PROXY_") {
			left("right after cleanup %s has, %v:\n%s", program, err, save)
		}
	}
	if code, body, err := w.Agent.Get("/healthz/ready"); err != nil || code == http.StatusOK {
		w.Observe(Observation{Kind: Lied, From: began, To: time.Now(), What: "/healthz/ready",
			Text: fmt.Sprintf("after cleanup: %d %s %v", code, body, err)})
	}
	stay.speak("after cleanup")
	w.EndAgent()
	w.terminate()
	stay.speak("after the agent's end")
	w.watch.process.readLog()
	var differs []string
	for end := time.Now().Add(leaveLimit); ; time.Sleep(500 * time.Millisecond) {
		now, err := w.picture(ctx)
		if differs = before.differs(now); err != nil {
			differs = append(differs, err.Error())
		}
		if len(differs) == 0 || time.Now().After(end) {
			break
		}
	}
	if len(differs) > 0 {
		left("after cleanup and the agent's end:\n%s", strings.Join(differs, "\n"))
	}
	w.Log("the most of the agent: %v", w.watch.process.peaks)
}

// terminate ends the agent as systemd does.
func (w *World) terminate() {
	began := time.Now()
	died := func(err error) {
		w.Observe(Observation{Kind: Died, From: began, To: time.Now(), What: "SIGTERM",
			Text: err.Error()})
	}
	ended := make(chan error, 1)
	go func() { _, err := w.Agent.Stop(); ended <- err }()
	select {
	case err := <-ended:
		if err != nil {
			died(err)
		}
	case <-time.After(endLimit):
		died(fmt.Errorf("it did not end within %v", endLimit))
		w.Agent.Kill()
	}
}
