package chaos

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
)

// Bounds of the agent's process. The fault tests of package e2e hold it to closer ones, one fault
// at a time; these are what it may never reach.
const (
	mostResident     = 128 << 20 // bytes; at 10,000 services it reads dumps of 5 MB
	mostResidentRace = 512 << 20
	mostFiles        = 64
	mostThreads      = 32
	mostGoroutines   = 120
	mostChildren     = 12
	oldestChild      = 60 * time.Second // no program that it runs may take longer
	oldestZombie     = 5 * time.Second
	mostFolder       = 5 << 20
	// heartbeatLimit is of the status; the loop makes a pass each few seconds.
	heartbeatLimit = 15 * time.Second
	// guestHeartbeatLimit is of the guest attribute: one a minute, and retries within the budget.
	guestHeartbeatLimit = 150 * time.Second
	// guestBeat is what is silent then.
	guestBeat = "guest attribute"
)

// process watches the agent's.
type process struct {
	w      *World
	counts *counter
	socket *http.Client // of agent.sock
	public *http.Client // of :15020

	mu       sync.Mutex
	pid      int
	started  time.Time // when it was first seen
	beat     time.Time // the newest that its status told
	children map[int]child
	peaks    map[string]int
	logged   int // how far its log was read
}

// child is a program that the agent runs.
type child struct {
	seen   time.Time // first
	zombie time.Time // first; zero: it is none
}

func newProcess(w *World, counts *counter) *process {
	path := filepath.Join(w.Mesh.Dir, "agent", "run", "agent.sock")
	transport := &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		}}
	public := w.VM.HTTP()
	public.Timeout = 5 * time.Second
	return &process{w: w, counts: counts, public: public, peaks: map[string]int{},
		socket: &http.Client{Transport: transport, Timeout: 4 * time.Second}}
}

// run looks each second, until ctx ends.
func (p *process) run(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for i := 0; ; i++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		p.guestHeartbeat()
		pid, ok := p.w.AgentPID()
		if !ok {
			continue
		}
		p.look(ctx, pid, i%5 == 0)
	}
}

// look looks once at the process. What is seen of one that ends meanwhile is not told: its end is
// either a fault's, or observed itself.
func (p *process) look(ctx context.Context, pid int, thorough bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	began := time.Now()
	if p.pid != pid {
		p.w.watch.truth.forget()
		p.pid, p.started, p.beat, p.children = pid, began, began, map[int]child{}
	}
	var all []Observation
	add := func(kind Kind, what string, format string, args ...any) {
		all = append(all, Observation{Kind: kind, What: what, From: began, To: time.Now(),
			Text: fmt.Sprintf(format, args...)})
	}
	grew := func(what string, is, most int) {
		p.peaks[what] = max(p.peaks[what], is)
		if is > most {
			add(Grew, what, "%d, at most %d", is, most)
		}
	}
	proc := filepath.Join("/proc", strconv.Itoa(pid))
	if said, err := os.ReadFile(filepath.Join(proc, "status")); err == nil {
		most := mostResident
		if p.w.Options.Race {
			most = mostResidentRace
		}
		grew("resident", statusNumber(string(said), "VmRSS")*1024, most)
		grew("threads", statusNumber(string(said), "Threads"), mostThreads)
	}
	if files, err := os.ReadDir(filepath.Join(proc, "fd")); err == nil {
		grew("files", len(files), mostFiles)
	}
	all = append(all, p.lookAtChildren(proc)...)
	s, err := p.status(ctx) // one that gives no answer has no heartbeat
	if err == nil && s.Heartbeat.After(p.beat) {
		p.beat = s.Heartbeat
	}
	if now := time.Now(); now.Sub(p.beat) > heartbeatLimit {
		all = append(all, Observation{Kind: Silent, From: p.beat, To: now, Grace: heartbeatLimit,
			What: "status", Text: fmt.Sprintf("the heartbeat is %.1f s old (%v)",
				now.Sub(p.beat).Seconds(), err)})
	}
	if err == nil {
		asked := time.Now()
		if ready, _, err := p.ready(ctx); err == nil {
			all = append(all, p.w.watch.truth.look(s, ready, asked)...)
		}
	}
	if thorough {
		if err == nil {
			if n, err := p.goroutines(ctx); err == nil {
				grew("goroutines", n, mostGoroutines)
			}
		}
		for what, dir := range map[string]string{
			"run folder": p.w.Agent.RunDir(), "state folder": p.w.Agent.StateDir()} {
			grew(what, folderSize(p.w.ofAgent(dir)), mostFolder)
		}
		p.readLog()
	}
	p.counts.add(Counts{Looks: 1})
	if now, ok := p.w.AgentPID(); !ok || now != pid {
		return
	}
	for _, o := range all {
		p.w.Observe(o)
	}
}

// lookAtChildren notes the programs that the agent runs.
func (p *process) lookAtChildren(proc string) (all []Observation) {
	now := time.Now()
	lists, _ := filepath.Glob(filepath.Join(proc, "task", "*", "children"))
	var pids []string
	for _, path := range lists {
		text, err := os.ReadFile(path)
		if err == nil { // a thread may end
			pids = append(pids, strings.Fields(string(text))...)
		}
	}
	// One that is stopped ends no child and reaps none.
	told := func(what string, from time.Time, grace time.Duration, text string) {
		all = append(all,
			Observation{Kind: Grew, What: what, From: from, To: now, Grace: grace, Text: text})
	}
	if len(pids) > mostChildren {
		told("children", now, 0, fmt.Sprintf("%d, at most %d", len(pids), mostChildren))
	}
	seen := map[int]child{}
	for _, text := range pids {
		pid, err := strconv.Atoi(text)
		stat, err2 := os.ReadFile(filepath.Join("/proc", text, "stat"))
		if errors.Join(err, err2) != nil {
			continue
		}
		name, state := statName(string(stat))
		c, known := p.children[pid]
		if !known {
			c = child{seen: now}
		}
		switch {
		case state != "Z":
			c.zombie = time.Time{}
		case c.zombie.IsZero():
			c.zombie = now
		}
		seen[pid] = c
		if now.Sub(c.seen) > oldestChild {
			told("old child", c.seen, oldestChild, name)
		}
		if !c.zombie.IsZero() && now.Sub(c.zombie) > oldestZombie {
			told("zombie", c.zombie, oldestZombie, name)
		}
	}
	p.children = seen
	p.peaks["children"] = max(p.peaks["children"], len(pids))
	return all
}

// statName is the name and the state in /proc/PID/stat: the name is in brackets, and may hold some.
func statName(stat string) (name, state string) {
	open, end := strings.IndexByte(stat, '('), strings.LastIndexByte(stat, ')')
	if open < 0 || end < open {
		return "", ""
	}
	fields := strings.Fields(stat[end+1:])
	if len(fields) == 0 {
		return "", ""
	}
	return stat[open+1 : end], fields[0]
}

// statusNumber is the number of a line of /proc/PID/status, 0 where there is none.
func statusNumber(said, key string) (n int) {
	for line := range strings.Lines(said) {
		if rest, ok := strings.CutPrefix(line, key+":"); ok {
			_, _ = fmt.Sscan(rest, &n)
		}
	}
	return n
}

// folderSize is what the files below a folder hold.
func folderSize(dir string) (n int) {
	_ = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil //nolint:nilerr // files come and go
		}
		if info, err := d.Info(); err == nil && info.Mode().IsRegular() {
			n += int(info.Size())
		}
		return nil
	})
	return n
}

// get asks a server of the agent's.
func get(ctx context.Context, client *http.Client, url string) (code int, body []byte, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	body, err = io.ReadAll(resp.Body)
	return resp.StatusCode, body, err
}

// status is what the agent says, by its socket.
func (p *process) status(ctx context.Context) (s status.Status, err error) {
	_, body, err := get(ctx, p.socket, "http://agent/status")
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal(body, &s)
}

// goroutines are how many there are, by the metrics.
func (p *process) goroutines(ctx context.Context) (n int, err error) {
	_, body, err := get(ctx, p.public, "http://127.0.0.1:15020/metrics")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(body)) {
		if rest, ok := strings.CutPrefix(line, "go_goroutines "); ok {
			return strconv.Atoi(strings.TrimSpace(rest))
		}
	}
	return 0, errors.New("no go_goroutines in the metrics")
}

// ready asks /healthz/ready.
func (p *process) ready(ctx context.Context) (code int, said string, err error) {
	code, body, err := get(ctx, p.public, "http://127.0.0.1:15020/healthz/ready")
	return code, strings.TrimSpace(string(body)), err
}

// guestHeartbeat looks at the one that the world outside sees.
func (p *process) guestHeartbeat() {
	text, ok := p.w.Platform.GuestAttributes("gce-service-proxy")["agent-heartbeat"]
	beat, err := time.Parse(time.RFC3339, text)
	if !ok || err != nil {
		return // nothing was written yet, or another wrote it
	}
	if now := time.Now(); now.Sub(beat) > guestHeartbeatLimit {
		p.w.Observe(Observation{Kind: Silent, From: beat, To: now, Grace: guestHeartbeatLimit,
			What: guestBeat, Text: "agent-heartbeat is " + text})
	}
}

// readLog looks whether the race detector spoke, or Go's runtime did.
func (p *process) readLog() {
	log := p.w.Agent.Log()
	fresh := log[min(p.logged, len(log)):]
	p.logged = len(log)
	for _, word := range []string{"WARNING: DATA RACE", "panic: ", "fatal error: "} {
		if i := strings.Index(fresh, word); i >= 0 {
			now := time.Now()
			p.w.Observe(Observation{Kind: Died, From: now, To: now, What: "log",
				Text: firstLines(fresh[i:], 60)})
		}
	}
}

func firstLines(text string, most int) string {
	lines := strings.SplitAfterN(text, "\n", most+1)
	return strings.Join(lines[:min(most, len(lines))], "")
}

// expectEnd observes the end of the process that runs now, if nobody has said before that he ends
// it; and starts the next one, as its unit does. It is called when that was started.
func (w *World) expectEnd() {
	pid, done := w.Agent.PID(), w.Agent.Done()
	go func() {
		<-done
		now := time.Now()
		running, ok := w.AgentPID()
		if !ok || running != pid {
			return
		}
		if log := lastLines(w.Agent.Log(), 12); !w.endsAnew(log) {
			w.Observe(Observation{Kind: Died, From: now, To: now, What: "process",
				Text: fmt.Sprintf("%v: %s", w.Agent.Err(), log)})
		}
		if err := w.restartAgent(pid); err != nil {
			w.broken(err)
		}
	}()
}

func lastLines(text string, most int) string {
	lines := strings.SplitAfter(text, "\n")
	return strings.Join(lines[max(len(lines)-most, 0):], "")
}

// spent observes a budget of guest attributes that was not kept. It is said once: the lab's end
// would fail the game for it.
func (w *World) spent() {
	if b := w.Platform.Budget(); !b.Kept() {
		now := time.Now()
		w.Observe(Observation{Kind: Spent, From: w.Started, To: now, Text: fmt.Sprintf("%+v", b)})
		w.Platform.ResetBudget()
	}
}
