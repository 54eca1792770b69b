package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
)

// kernelFaults are those of others who write rules, hold locks or ports, or change the network.
func kernelFaults(s Setting) []Fault {
	return slices.Concat(ruleFaults(s), neighbourFaults(), lockFaults(), portFaults(), networkFaults())
}

// kernel is what these faults remember of a game.
type kernel struct {
	mu      sync.Mutex
	edits   map[Family][]time.Time // newest last; what is older than editWindow is forgotten
	backOff map[Family]time.Time   // it may be on until then
	held    bool                   // a fault holds the lock
	saved   map[Family]nat
}

// Bounds of a repair (docs/design/policies.md#drift, docs/design/policies.md#back-off).
const (
	// On nft the kernel tells of a change at once; the rest is what a busy machine takes.
	repairNFT = time.Second
	// On legacy the size is looked at ten times a second, all that hides behind an equal size when the
	// lock was closed. Where that is not to be had rules are read each 1.5 s.
	repairLegacy = 4 * time.Second
	// Who locks another file than the agent does is noticed each 5 s, where the size is the same.
	repairUnlocked = 6500 * time.Millisecond
	// The longest delay of back-off, and one poll.
	repairBackOff = 7500 * time.Millisecond

	// Five repairs within 8 s begin the back-off; one may come a bound later than its edit.
	editWindow = 8*time.Second + repairLegacy
	editBurst  = 5
	// It is over 20 s after the last time that something was undone, which itself was put off.
	backOffOver = 20*time.Second + repairBackOff
)

// edit does what an edit of others' does to a family, or to Both, and notes what that may cost
// until it is repaired: kinds. repairs is how many repairs it may lead to, one for each
// transaction.
func (w *World) edit(name string, f Family, repairs int, kinds []Kind, do func() error) error {
	s := Span{Event: Event{Name: name}, Begin: time.Now()}
	err := do()
	s.End = time.Now()
	bound := w.edited(f, repairs, s.End)
	for _, kind := range kinds {
		e := Excuse{Kind: kind, Family: f, After: bound}
		if kind == Foreign { // at once; nobody repairs it, and it is seen once
			e.After, e.Only = 0, w.lose(f)
		}
		if kind == Refused && name == "rules-loop" && w.Setting.All {
			// Connections go round until Envoy has spent what both families share: 1024 of the cluster
			// behind the default chain (Envoy's circuit breaker).
			e.Family = Both
		}
		s.Excuses = append(s.Excuses, e)
	}
	// With the last rule that needs it the kernel lets go of conntrack, and of what NAT has done to
	// streams, unless the agent's Hold keeps that: one that has just started has none yet.
	// And an agent that is started anew before its repair adopts nothing that is not whole: it waits
	// for Envoy to know what is wanted.
	if slices.Contains(kinds, Escaped) {
		s.Excuses = append(s.Excuses,
			Excuse{Kind: Escaped, Family: f, After: bound, Envoy: true, Hindered: true},
			Excuse{Kind: Cut, Family: f, After: time.Second, Hindered: true})
	}
	w.Excuse(s)
	if err != nil {
		w.Log("    %s: not done: %v", name, err)
	} else {
		w.Log("    %s, family %d", name, f)
	}
	return nil
}

// lose are whose rules go with table nat of a family; none: everybody's, since all tables go.
func (w *World) lose(f Family) (some []string) {
	if f == Both {
		return nil
	}
	some = []string{"nat"} // the canaries'
	for _, n := range neighbours() {
		if n.table == "nat" {
			some = append(some, n.name)
		}
	}
	return some
}

// edited counts repairs and says how long the next may take.
func (w *World) edited(f Family, repairs int, now time.Time) (bound time.Duration) {
	k := &w.kernel
	k.mu.Lock()
	defer k.mu.Unlock()
	bound = repairNFT
	if w.Setting.Backend == string(lab.Legacy) {
		bound = repairLegacy
		if k.held {
			bound = repairUnlocked
		}
	}
	if k.edits == nil {
		k.edits, k.backOff = map[Family][]time.Time{}, map[Family]time.Time{}
	}
	longer := false
	for _, family := range []Family{IPv4, IPv6} {
		if !family.meets(f) {
			continue
		}
		for range repairs {
			k.edits[family] = append(k.edits[family], now)
		}
		k.edits[family] = slices.DeleteFunc(k.edits[family], func(t time.Time) bool {
			return now.Sub(t) > editWindow
		})
		// The repair that begins it is not delayed, and the next edit's is.
		if k.backOff[family].After(now) {
			longer = true
		}
		if len(k.edits[family]) >= editBurst || k.backOff[family].After(now) {
			k.backOff[family] = now.Add(backOffOver)
			w.BacksOff(now.Add(bound+repairBackOff), k.backOff[family])
		}
		longer = longer || repairs > 1 && len(k.edits[family]) >= editBurst
	}
	if longer {
		bound += repairBackOff
	}
	return bound
}

// commandLimit is for one command of a fault.
const commandLimit = 10 * time.Second

// run runs a command in the VM. While a fault holds the xtables lock it is one that locks another
// file: else it would wait for the very goroutine that is to let the lock go.
func (w *World) run(input, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), commandLimit)
	defer cancel()
	w.kernel.mu.Lock()
	held := w.kernel.held
	w.kernel.mu.Unlock()
	if held {
		another := filepath.Join(w.Dir, "another.lock")
		defer os.Remove(another)
		args = append([]string{"XTABLES_LOCKFILE=" + another, name}, args...)
		name = "env"
	}
	return w.VM.RunInput(ctx, input, name, args...)
}

func (f Family) program(suffix string) string {
	if f == IPv6 {
		return "ip6tables" + suffix
	}
	return "iptables" + suffix
}

// iptables runs the family's.
func (w *World) iptables(f Family, args ...string) error {
	_, err := w.run("", f.program(""), append([]string{"-w", "5"}, args...)...)
	return err
}

// restore writes lines of table nat in one transaction.
func (w *World) restore(f Family, lines ...string) error {
	return w.restoreTable(f, "nat", lines...)
}

func (w *World) restoreTable(f Family, table string, lines ...string) error {
	_, err := w.run(payload(table, lines), f.program("-restore"), "-w", "5", "--noflush")
	return err
}

func payload(table string, lines []string) string {
	return "*" + table + "\n" + strings.Join(lines, "\n") + "\nCOMMIT\n"
}

// nat is a table nat as iptables-save shows it.
type nat struct {
	chains []string // in its order
	policy map[string]string
	rules  map[string][]string // of a chain, without -A CHAIN
}

// nat reads the table of a family.
func (w *World) nat(f Family) (nat, error) { return w.table(f, "nat") }

func (w *World) table(f Family, table string) (t nat, err error) {
	out, err := w.run("", f.program("-save"), "-t", table)
	if err != nil {
		return t, err
	}
	return parseTable(out), nil
}

func parseTable(text string) nat {
	t := nat{policy: map[string]string{}, rules: map[string][]string{}}
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if chain, ok := strings.CutPrefix(line, ":"); ok {
			name, rest, _ := strings.Cut(chain, " ")
			t.chains = append(t.chains, name)
			t.policy[name], _, _ = strings.Cut(rest, " ")
		}
		if rule, ok := strings.CutPrefix(line, "-A "); ok {
			name, rest, _ := strings.Cut(rule, " ")
			t.rules[name] = append(t.rules[name], rest)
		}
	}
	return t
}

const ownPrefix = "SERVICE_PROXY_"

func owned(chain string) bool { return strings.HasPrefix(chain, ownPrefix) }

// jumps are the rules of the built-in chains that lead to ours, as "CHAIN RULE".
func (t nat) jumps() (all []string) {
	for _, chain := range []string{"OUTPUT", "PREROUTING"} {
		for _, rule := range t.rules[chain] {
			if strings.Contains(rule, "-j "+ownPrefix) {
				all = append(all, chain+" "+rule)
			}
		}
	}
	return all
}

// owned are our chains that have at least so many rules.
func (t nat) owned(rules int) (all []string) {
	for _, chain := range t.chains {
		if owned(chain) && len(t.rules[chain]) >= rules {
			all = append(all, chain)
		}
	}
	return all
}

// families draws IPv4, IPv6, or both.
func families(random *rand.Rand) []Family {
	return [][]Family{{IPv4}, {IPv6}, {IPv4, IPv6}}[random.IntN(3)]
}

// pick draws one of some; the zero value where there is none.
func pick[T any](random *rand.Rand, some []T) (one T) {
	if len(some) == 0 {
		return one
	}
	return some[random.IntN(len(some))]
}

// forget deletes a rule that a fault made, where nobody has done so already.
func (w *World) forget(f Family, table, rule string) (err error) {
	args := func(do string) []string {
		return append([]string{"-t", table, do}, strings.Fields(rule)...)
	}
	for range 5 { // others write at the same time
		if err = w.iptables(f, args("-D")...); err == nil {
			return nil
		}
		if w.iptables(f, args("-C")...) != nil {
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return err
}

// lockFaults keep iptables from writing.
func lockFaults() []Fault {
	return []Fault{
		{
			Name: "lock-held", Weight: 2, Group: "lock", Shortest: 50 * time.Millisecond,
			Longest: 8 * time.Second,
			Begin:   func(w *World, _ *rand.Rand) (func() error, error) { return w.holdLock() },
			// The agent waits 5 s for the lock. What it could not write is tried again after one
			// second, then two.
			Hinders: true, Recovery: 4 * time.Second,
			Unless: func(s Setting) bool { return s.Backend != string(lab.Legacy) },
		},
		{
			// Others' transactions never keep ours from being made: no excuse.
			Name: "lock-storm", Weight: 2, Group: "lock", Shortest: time.Second,
			Longest: 8 * time.Second,
			Begin:   func(w *World, _ *rand.Rand) (func() error, error) { return w.storm() },
			Unless:  func(s Setting) bool { return s.Backend != string(lab.NFT) },
		},
	}
}

// holdLock holds the lock of the lab's iptables-legacy.
func (w *World) holdLock() (end func() error, err error) {
	file, err := os.OpenFile(w.LockFile(), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	until := time.Now().Add(6 * time.Second) // a waiting iptables has it for milliseconds
	for err = unix.EWOULDBLOCK; errors.Is(err, unix.EWOULDBLOCK) && time.Now().Before(until); {
		err = unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		time.Sleep(time.Millisecond)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("hold the xtables lock: %w", err), file.Close())
	}
	w.setHeld(true)
	return func() error { w.setHeld(false); return file.Close() }, nil
}

func (w *World) setHeld(held bool) {
	w.kernel.mu.Lock()
	defer w.kernel.mu.Unlock()
	w.kernel.held = held
}

// storm is a program that makes 30 transactions a second in a table of its own.
func (w *World) storm() (end func() error, err error) {
	nft := w.VM.Command(context.Background(), "nft", "-i")
	in, err := nft.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := lab.Start(nft); err != nil {
		return nil, err
	}
	stop := background(func(ctx context.Context) {
		fmt.Fprint(in, "add table ip storm\nadd chain ip storm c\n")
		for sleep(ctx, 66*time.Millisecond) {
			fmt.Fprint(in, "add rule ip storm c counter\nflush chain ip storm c\n")
		}
	})
	return func() error {
		stop()
		in.Close()
		_ = nft.Process.Kill() // it may have ended
		_ = nft.Wait()
		// Who flushed the ruleset took it out.
		_, _ = w.run("", "nft", "delete", "table", "ip", "storm")
		return nil
	}, nil
}
