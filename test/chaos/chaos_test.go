//go:build lab

package chaos

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
)

var (
	campaignFor = flag.Duration("chaos.for", 0,
		"play games with new seeds for so long; 0: one short game on each backend")
	campaignLabs = flag.Int("chaos.labs", 2, "how many games at once")
	campaignGame = flag.Duration("chaos.game", 90*time.Second, "how long a game is")
	campaignSeed = flag.Uint64("chaos.seed", 0, "the first game's seed; 0: another each time")
	campaignOnly = flag.String("chaos.only", "", "only faults whose names begin with one of these, by commas")
	sequenceFile = flag.String("chaos.sequence", "", "the file that TestSequence plays")
	agentBinary  = flag.String("chaos.agent", "", "the agent to test; empty: built with the race detector")
	settings     = flag.String("chaos.settings", "", "of all, bypass and dns those that short games have")
	withoutRace  = flag.Bool("chaos.norace", false, "the agent is built without the race detector")
	untilFailed  = flag.Bool("chaos.first", false, "the campaign ends with the first game that fails")
	agentLog     = flag.String("chaos.log", "", "the agent's log of the last game is written to this file")
	tellLive     = flag.Bool("chaos.live", false, "tell the game while it is played, on stderr")
	shrinkTries  = flag.Int("chaos.shrink", 12, "how many games to find a shorter sequence; 0: none")
)

// shortGame is how long a game of `make test` is.
const shortGame = 60 * time.Second

// TestChaos plays games and holds what was seen against what the design promises. By default it is
// one of each backend, with the same seeds each time; -chaos.for is the campaign.
func TestChaos(t *testing.T) {
	t.Parallel()
	opts := options(t)
	if *campaignFor == 0 {
		for i, backend := range lab.Backends {
			t.Run(string(backend), func(t *testing.T) {
				t.Parallel()
				seed := *campaignSeed
				if seed == 0 {
					seed = uint64(i + 1)
				}
				s := Setting{Backend: string(backend), Seed: seed, All: has("all"), Bypass: has("bypass"),
					DNS: has("dns")}
				playSeed(t, s, shortGame, opts, 0)
			})
		}
		return
	}
	campaign(t, opts)
}

// campaign plays games until its time is over.
func campaign(t *testing.T, opts Options) {
	seed := *campaignSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano() / 1e6 % 1e9)
	}
	end := time.Now().Add(*campaignFor)
	var mu sync.Mutex
	var games, events int
	var counts Counts
	var played, calm time.Duration
	next := func() uint64 { mu.Lock(); defer mu.Unlock(); defer func() { seed++ }(); return seed }
	var labs sync.WaitGroup
	for range *campaignLabs {
		labs.Go(func() {
			for time.Now().Before(end) && !(*untilFailed && t.Failed()) {
				s := settingOf(next())
				t.Run(fmt.Sprintf("%s-%d", s.Backend, s.Seed), func(t *testing.T) {
					r := playSeed(t, s, *campaignGame, opts, *shrinkTries)
					mu.Lock()
					defer mu.Unlock()
					games++
					events += r.Events
					counts.Add(r.Counts)
					played += r.Took
					calm = max(calm, r.Calm)
				})
			}
		})
	}
	labs.Wait()
	t.Logf("%d games, %v in all: %d events, %+v; the longest calm took %.2f s", games,
		played.Round(time.Second), events, counts, calm.Seconds())
}

func has(setting string) bool {
	return slices.Contains(strings.Split(*settings, ","), setting)
}

// settingOf draws the setting of a game.
func settingOf(seed uint64) Setting {
	random := rand.New(rand.NewPCG(seed, 1))
	return Setting{Seed: seed, Backend: string(lab.Backends[seed%2]), Bypass: random.IntN(4) == 0,
		All: random.IntN(4) == 0, DNS: random.IntN(3) == 0,
		Hot: random.IntN(3) == 0, Huge: random.IntN(12) == 0}
}

// only are the faults that -chaos.only leaves.
func only(all []Fault) (some []Fault) {
	if *campaignOnly == "" {
		return all
	}
	for _, f := range all {
		for name := range strings.SplitSeq(*campaignOnly, ",") {
			if strings.HasPrefix(f.Name, name) {
				some = append(some, f)
				break
			}
		}
	}
	return some
}

// playSeed plays the game of a seed.
func playSeed(t *testing.T, s Setting, length time.Duration, opts Options, tries int) Result {
	t.Helper()
	sequence := Generate(rand.New(rand.NewPCG(s.Seed, 0)), only(Faults(s)), length, 20*time.Second)
	return play(t, s, sequence, opts, tries)
}

// play plays a sequence. One that fails is played again with fewer events.
func play(t *testing.T, s Setting, sequence []Event, opts Options, tries int) Result {
	t.Helper()
	var story strings.Builder
	opts.Log = func(format string, args ...any) {
		fmt.Fprintf(&story, format+"\n", args...)
		if *tellLive {
			fmt.Fprintf(os.Stderr, s.Backend+" "+format+"\n", args...)
		}
	}
	r, err := Play(t.Context(), s, sequence, opts)
	t.Logf("%+v: %d events, %+v in %v; seen, excused or not: %v", s, r.Events, r.Counts,
		r.Took.Round(time.Second), r.Seen)
	if err == nil && len(r.Violations) == 0 {
		return r
	}
	t.Errorf("setting %+v: %v (again: make chaos FOR=1s LABS=1 SEED=%d)\n%s\n\nthe game:\n%s", s, err,
		s.Seed, strings.Join(Summary(r.Violations), "\n"), story.String())
	if err != nil || tries == 0 {
		return r
	}
	kind := r.Violations[0].Kind
	fails := func(some []Event) bool {
		quiet := opts
		quiet.Log = nil
		for range 2 { // once may be chance
			r, err := Play(t.Context(), s, some, quiet)
			if err != nil {
				return false
			}
			for _, v := range r.Violations {
				if v.Kind == kind {
					return true
				}
			}
		}
		return false
	}
	short := Shrink(sequence, tries, fails)
	header, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("the shortest that was seen to fail with %q, %d of %d events, as -chaos.sequence:\n# %s\n%s",
		kind, len(short), len(sequence), header, Format(short))
	return r
}

// TestSequence plays the sequences of testdata, each of which a game came down to that once failed,
// or shows a fault that faults.sh plants; or those of a file. The first line of a file is its
// setting, in JSON behind a #.
func TestSequence(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("testdata/*.events")
	if err != nil {
		t.Fatal(err)
	}
	if *sequenceFile != "" {
		files = []string{*sequenceFile}
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".events"), func(t *testing.T) {
			t.Parallel()
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var s Setting
			first, rest, _ := strings.Cut(string(text), "\n")
			if err := json.Unmarshal([]byte(strings.TrimPrefix(first, "#")), &s); err != nil {
				t.Fatalf("%s: the first line is no setting: %v", file, err)
			}
			sequence, err := Parse(rest)
			if err != nil {
				t.Fatal(err)
			}
			play(t, s, sequence, options(t), 0)
		})
	}
}

var built struct {
	once sync.Once
	dir  string
	err  error
}

// agentsUnderTest builds the agent, once a process, and a second one that calls itself another
// version. Of a binary that was given there is no other build.
func agentsUnderTest(t *testing.T) (agent, upgrade string) {
	t.Helper()
	if *agentBinary != "" {
		return *agentBinary, ""
	}
	built.once.Do(func() {
		if built.dir, built.err = os.MkdirTemp("", "spa-chaos-"); built.err != nil {
			return
		}
		built.err = os.Chmod(built.dir, 0o755) // other users of the VM run its commands, too
		for name, version := range map[string]string{"agent": "1.0.0", "upgrade": "2.0.0"} {
			args := []string{"build", "-ldflags", "-X main.version=" + version, "-o",
				filepath.Join(built.dir, name)}
			cgo := "CGO_ENABLED=0"
			if !*withoutRace {
				args, cgo = append(args, "-race"), "CGO_ENABLED=1"
			}
			cmd := exec.CommandContext(context.Background(), "go",
				append(args, "../../cmd/service-proxy-agent")...)
			cmd.Env = append(os.Environ(), cgo)
			if out, err := cmd.CombinedOutput(); err != nil {
				built.err = errors.Join(built.err, fmt.Errorf("build the agent: %w: %s", err, out))
			}
		}
	})
	if built.err != nil {
		t.Fatal(built.err)
	}
	return filepath.Join(built.dir, "agent"), filepath.Join(built.dir, "upgrade")
}

// options of the games of this process.
func options(t *testing.T) Options {
	t.Helper()
	agent, upgrade := agentsUnderTest(t)
	return Options{Agent: agent, Upgrade: upgrade, Race: !*withoutRace, AgentLog: *agentLog}
}

func TestMain(m *testing.M) {
	code := m.Run()
	if built.dir != "" {
		os.RemoveAll(built.dir)
	}
	os.Exit(code)
}
