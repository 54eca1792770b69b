package iptables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The two backends of iptables.
const (
	NFT    = "nft"
	Legacy = "legacy"
)

const (
	// writeLimit ends a restore that hangs. It is longer than lockWait, so that a
	// held lock says so itself.
	writeLimit = 20 * time.Second
	readLimit  = 10 * time.Second
	// saveLimit is how long a whole save may take on nft before the chains are listed one by one:
	// iptables-nft starts over whenever anybody changes any nft table, and a save of 10,000 rules (40
	// ms) never ends under 30 changes a second. See docs/design/facts.md#nft-save-starts-over.
	saveLimit = time.Second
	// waitDelay is how long a killed command's pipes may stay open: a child of a wrapper script
	// inherits them. It comes on top of a caller's deadline, for each family.
	waitDelay = time.Second
	// lockWait is given to -w, in seconds: how long iptables waits for another one.
	lockWait = "5"
	// listLimit is up to how many chains are listed one by one (2.5 ms each) rather than by one save.
	listLimit = 8
)

// Options of Open.
type Options struct {
	// Backend picks the programs: "" is what `iptables` is on this machine, "nft" and "legacy" are
	// iptables-nft and iptables-legacy.
	Backend string
	// Path are folders to search for the programs, separated by colons. Empty: $PATH, then the sbin
	// folders, which an ordinary user's PATH may lack.
	Path string
	// Machine replaces this machine, in tests.
	Machine Machine
	// ReadOnly is for who must leave no trace: a legacy table that is not there is empty, and not
	// asked for, since the kernel makes it for whoever asks. Nothing may be applied.
	ReadOnly bool
}

// Kernel reads and writes the nat tables by running iptables. Its methods may be called by several
// goroutines, but two plans for the same family made from the same Table conflict: let one
// goroutine own the kernel state.
type Kernel struct {
	options Options
	machine machine
	tools   map[Family]tool
	own     ownPIDs

	mu       sync.Mutex
	unusable map[Family]error
	spent    map[Family]spent    // by iptables-restore, so far
	saves    map[string]lastSave // by the program that made it
	// listening: nft's notifications are listened to.
	listening bool

	stand4, stand6 stand // of legacy's tables
}

// spent is how long iptables-restore took, and how much of that it waited for the xtables lock.
type spent struct{ took, waited time.Duration }

// lastSave is the last save of a program. Where legacy is polled the same one is read each 1.5 s:
// to see that nothing has changed costs a tenth of parsing 10,000 rules, and no memory.
type lastSave struct {
	sum   uint64
	table Table
}

// machine is what a Kernel asks of the machine it runs on.
type machine struct {
	lookPath func(path, name string) (string, error)
	run      func(ctx context.Context, limit time.Duration, own *ownPIDs, stdin []byte,
		stdout *bytes.Buffer, name string, args ...string) error
	natChains func(Family) ([]string, error) // of iptables-nft
	hasLegacy func(Family) (bool, error)     // whether there is a legacy nat table, without making it
	hasFilter func(tool) (bool, error)       // whether there is a table filter, without making it
	// lockHolder is the pid of who holds the xtables lock, 0 for nobody. nil: it is not asked.
	lockHolder func() int
	// counted is how chains are listed with counters. nil: this machine does not count.
	counted func(tool) (func(chain string) ([]string, error), error)
	// asked is where it is asked how a legacy table stands. nil: it cannot be.
	asked func(Family) (asked, error)
	// firstPIDs: our pids are those that the kernel tells of.
	firstPIDs func() bool
	// noModules is why the kernel can load no module, or nil. nil: it is not asked.
	noModules func() error
}

var thisMachine = machine{lookPath, runInto, natChains, func(f Family) (bool, error) {
	return hasLegacyTable(f, "nat", os.ReadFile)
}, hasFilter, lockHolder, counted, openSocket, inFirstPIDNamespace, noModulesHere}

// tool are the programs of one family.
type tool struct {
	family                Family
	backend, version      string
	list, restore, saving string // paths
}

// FamilyState says whether a family can be used.
type FamilyState struct {
	Family Family
	Why    error // why not; nil if it can
}

var families = []Family{IPv4, IPv6}

// Open finds the programs and tries each family once. It fails with ErrNoIPTables if there are
// none, and with the first family's error if neither is usable (the Kernel is returned all the
// same: Probe tries again); one that is not usable is otherwise only noted (Families) and can be
// tried again (Probe). A held lock and a look that did not end make nothing unusable: the next read
// or write meets them again, or does not.
func Open(ctx context.Context, options Options) (*Kernel, error) {
	m := thisMachine
	if options.Machine != nil {
		m = onMachine(options.Machine)
	}
	return openOn(ctx, m, options)
}

func openOn(ctx context.Context, m machine, options Options) (*Kernel, error) {
	k := &Kernel{options: options, machine: m, tools: map[Family]tool{}, unusable: map[Family]error{},
		spent: map[Family]spent{}, saves: map[string]lastSave{}}
	var first error
	usable := false
	for _, f := range families {
		err := k.Probe(ctx, f)
		usable = usable || err == nil || mayPass(err)
		if first == nil {
			first = err
		}
	}
	if !usable {
		return k, fmt.Errorf("open iptables: %w", first)
	}
	return k, nil
}

// Probe finds out anew whether the family is usable and returns why not. ErrLocked and
// ErrCouldNotLook are no answer: what was known of it (Families) stands.
func (k *Kernel) Probe(ctx context.Context, f Family) error {
	err := k.probe(ctx, f)
	if mayPass(err) {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.unusable[f] = err
	return err
}

// missing says whether the table is not there, where that makes a difference.
func (k *Kernel) missing(t tool) (bool, error) {
	if !k.options.ReadOnly {
		return false, nil
	}
	return k.wouldMake(t)
}

// wouldMake says whether to ask for the table would make it: a legacy one that is not there.
func (k *Kernel) wouldMake(t tool) (bool, error) {
	if t.backend != Legacy {
		return false, nil
	}
	has, err := k.machine.hasLegacy(t.family)
	return err == nil && !has, err
}

// mayPass says whether an error tells of the moment and not of the family.
func mayPass(err error) bool { return errors.Is(err, ErrLocked) || errors.Is(err, ErrCouldNotLook) }

func (k *Kernel) probe(ctx context.Context, f Family) error {
	err := k.tryTable(ctx, f)
	if why := k.noModules(); why != nil && errors.Is(err, ErrNoTable) {
		err = fmt.Errorf("%w; %w", err, why)
	}
	return err
}

// tryTable finds the family's programs and has them read its table.
func (k *Kernel) tryTable(ctx context.Context, f Family) error {
	t, err := k.find(ctx, k.options.Backend, f)
	if err != nil {
		return err
	}
	k.mu.Lock()
	k.tools[f] = t
	k.mu.Unlock()
	if missing, err := k.missing(t); err != nil || missing {
		return err
	}
	_, err = k.run(ctx, readLimit, nil, t.list, "-w", lockWait, "-t", "nat", "-S", builtinPrerouting)
	if err == nil && t.backend == Legacy {
		k.stand(f).isThere()
	}
	if errors.Is(err, ErrIncompatible) { // no reason not to write
		err = nil
	}
	return err
}

// noModules is an ErrNoModules where what the kernel lacks it will lack until the next boot.
func (k *Kernel) noModules() error {
	if k.machine.noModules == nil {
		return nil
	}
	return k.machine.noModules()
}

// Families says which families are usable.
func (k *Kernel) Families() []FamilyState {
	k.mu.Lock()
	defer k.mu.Unlock()
	var states []FamilyState
	for _, f := range families {
		states = append(states, FamilyState{Family: f, Why: k.unusable[f]})
	}
	return states
}

// Backend is "nft" or "legacy": that of IPv4, or of IPv6 where IPv4 has no iptables.
func (k *Kernel) Backend() string { return k.any().backend }

// Version is the version of iptables, e.g. "1.8.9".
func (k *Kernel) Version() string { return k.any().version }

func (k *Kernel) any() tool {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, f := range families {
		if t, ok := k.tools[f]; ok {
			return t
		}
	}
	return tool{}
}

// tool returns the programs of a usable family. Where they did not say their version in time yet,
// they are asked again.
func (k *Kernel) tool(ctx context.Context, f Family) (tool, error) {
	t, ok, unusable := k.known(f)
	if !ok && unusable == nil {
		err := k.Probe(ctx, f)
		if t, ok, unusable = k.known(f); !ok && unusable == nil {
			return tool{}, fmt.Errorf("find the %s programs: %w", f, err)
		}
	}
	if unusable != nil {
		return tool{}, fmt.Errorf("%s: %w: %w", f, ErrUnusable, unusable)
	}
	return t, nil
}

func (k *Kernel) known(f Family) (t tool, ok bool, unusable error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	t, ok = k.tools[f]
	return t, ok, k.unusable[f]
}

var versionText = regexp.MustCompile(`v(\d+\.\d+\.\d+)(?: \((nf_tables|legacy)\))?`)

// find looks up a family's three programs and asks their version.
func (k *Kernel) find(ctx context.Context, backend string, f Family) (tool, error) {
	name := "iptables"
	if f == IPv6 {
		name = "ip6tables"
	}
	switch backend {
	case "":
	case NFT, Legacy:
		name += "-" + backend
	default:
		return tool{}, fmt.Errorf("backend %q: want nft or legacy", backend)
	}
	t := tool{family: f}
	for _, program := range []struct {
		suffix string
		path   *string
	}{{"", &t.list}, {"-restore", &t.restore}, {"-save", &t.saving}} { // the first is told
		var err error
		if *program.path, err = k.machine.lookPath(k.options.Path, name+program.suffix); err != nil {
			return tool{}, fmt.Errorf("find %q: %w (package iptables of the distribution)",
				name+program.suffix, ErrNoIPTables)
		}
	}
	out, err := k.run(ctx, readLimit, nil, t.list, "--version")
	if err != nil {
		return tool{}, err
	}
	m := versionText.FindSubmatch(out)
	if m == nil {
		return tool{}, fmt.Errorf("%s --version: not understood: %q", t.list, bytes.TrimSpace(out))
	}
	t.version, t.backend = string(m[1]), Legacy // before 1.8 there was only one, and it did not say
	if string(m[2]) == "nf_tables" {
		t.backend = NFT
	}
	return t, nil
}

func lookPath(path, name string) (string, error) {
	if path == "" {
		path = os.Getenv("PATH") + ":/usr/local/sbin:/usr/sbin:/sbin"
	}
	for _, dir := range filepath.SplitList(path) {
		file := filepath.Join(dir, name)
		if found, err := exec.LookPath(file); err == nil && filepath.IsAbs(found) {
			return found, nil
		}
	}
	return "", exec.ErrNotFound
}

// Read reads a family's whole nat table. On nft, a save that does not end within a second is given
// up and our chains and the built-in ones are listed one by one, which ends under any storm.
// ErrCouldNotLook if that does not end either.
func (k *Kernel) Read(ctx context.Context, f Family) (Table, error) {
	t, err := k.tool(ctx, f)
	if err != nil {
		return Table{}, err
	}
	if missing, err := k.missing(t); err != nil || missing {
		return Table{family: f}, err
	}
	return k.read(ctx, t)
}

// read is save, or on legacy what the last one said where the kernel says that nothing has changed.
func (k *Kernel) read(ctx context.Context, t tool) (Table, error) {
	if t.backend != Legacy {
		return k.save(ctx, t)
	}
	return k.stand(t.family).read(func() (Table, error) { return k.save(ctx, t) })
}

func (k *Kernel) save(ctx context.Context, t tool) (Table, error) {
	limit := readLimit
	if t.backend == NFT {
		limit = saveLimit
	}
	save := saveBuffers.Get().(*bytes.Buffer)
	err := k.machine.run(ctx, limit, &k.own, nil, save, t.saving, "-t", "nat")
	if err == nil && !bytes.Contains(save.Bytes(), []byte("is incompatible")) {
		table, err := k.parse(t, save.Bytes())
		save.Reset()
		saveBuffers.Put(save)
		return table, err
	}
	if t.backend != NFT || err != nil && !errors.Is(err, ErrCouldNotLook) {
		return Table{}, fmt.Errorf("read %s table nat: %w", t.family, err)
	}
	// Either others write too fast for a save, or somebody has put a chain into table nat that
	// iptables cannot read: the chains that matter to us can still be listed.
	names, err := k.machine.natChains(t.family)
	if err != nil {
		return Table{}, fmt.Errorf("read %s table nat: %w", t.family, err)
	}
	wanted := []string{builtinPrerouting, builtinOutput}
	for _, name := range names {
		if isOurs(name) {
			wanted = append(wanted, name)
		}
	}
	return k.listChains(ctx, t, Table{family: t.family}, wanted, names)
}

// saveBuffers hold saves until they are parsed: of 10,000 rules a megabyte.
var saveBuffers = sync.Pool{New: func() any { return new(bytes.Buffer) }}

// parse is Parse, or what it said of the same save before.
func (k *Kernel) parse(t tool, save []byte) (Table, error) {
	sum := sumOf(save)
	k.mu.Lock()
	last, ok := k.saves[t.saving]
	k.mu.Unlock()
	if ok && last.sum == sum {
		return last.table, nil
	}
	table, err := Parse(t.family, save)
	if err == nil {
		k.mu.Lock()
		k.saves[t.saving] = lastSave{sum, table}
		k.mu.Unlock()
	}
	return table, err
}

var sumSeed = maphash.MakeSeed()

// sumOf sums up a save but for what changes by itself: comments, which hold the time, and
// the counters of chains.
func sumOf(save []byte) uint64 {
	var h maphash.Hash
	h.SetSeed(sumSeed)
	for line := range bytes.Lines(save) {
		switch line[0] {
		case '#':
			continue
		case ':':
			line, _, _ = bytes.Cut(line, []byte("["))
		}
		h.Write(line)
	}
	return h.Sum64()
}

// ReadChains reads only the given chains and returns have with them replaced. It is the cheap
// verification after an Event or a write; what it does not read stays as it was in have. On legacy,
// where reading any chain copies the whole table out of the kernel, it reads everything.
func (k *Kernel) ReadChains(ctx context.Context, have Table, chains []string) (Table, error) {
	t, err := k.tool(ctx, have.family)
	if err != nil {
		return Table{}, err
	}
	if t.backend != NFT || len(chains) > listLimit {
		return k.read(ctx, t)
	}
	names, err := k.machine.natChains(t.family)
	if err != nil {
		return Table{}, fmt.Errorf("read %s table nat: %w", t.family, err)
	}
	return k.listChains(ctx, t, have, chains, names)
}

// listChains lists chains one by one, and then those of others by which a packet may be taken
// before it comes to a jump of ours: what they hold tells whether that is shadowed. existing are
// the names of the chains that the kernel has: iptables-nft has the same message for a chain that
// is missing and for one that it cannot read. See docs/design/facts.md#iptables-cannot-read.
func (k *Kernel) listChains(ctx context.Context, t tool, have Table, chains,
	existing []string) (Table, error) {
	chains = slices.Clone(chains) // it grows below
	asked := len(chains)
	read := map[string][]string{}
	var gone []string
	for n := 0; n < len(chains); n++ {
		name := chains[n]
		if !slices.Contains(existing, name) {
			gone = append(gone, name)
			continue
		}
		listing, err := k.run(ctx, readLimit, nil, t.list, "-w", lockWait, "-t", "nat", "-S", name)
		if err != nil {
			if now, err := k.machine.natChains(t.family); err == nil && !slices.Contains(now, name) {
				gone = append(gone, name) // deleted since
				continue
			}
			return Table{}, fmt.Errorf("read %s chain %s: %w", t.family, name, err)
		}
		rules := parseListing(listing)[name]
		read[name] = rules
		for _, spec := range beforeJumps(name, rules) {
			// One that is left unread counts as shadowing, which errs on the safe side (Table.takes).
			to := target(spec)
			if len(chains) < asked+listLimit && slices.Contains(existing, to) && !isOurs(to) &&
				!slices.Contains(chains, to) {
				chains = append(chains, to)
			}
		}
	}
	return have.with(read, gone), nil
}

// beforeJumps are the rules of a chain that a packet may meet before the last jump to a chain of
// ours: all of them in a chain of somebody else's, none in one of ours.
func beforeJumps(chain string, rules []string) []string {
	switch {
	case isOurs(chain):
		return nil
	case !isJumpSite(chain):
		return rules
	}
	for n := len(rules) - 1; n >= 0; n-- {
		if isOurs(target(rules[n])) {
			return rules[:n]
		}
	}
	return rules
}

// Result is what came of an Apply.
type Result struct {
	Have Table // the table after it, as read back
	// Ruleset is what is installed: the plan's, or as much of it as the kernel takes.
	Ruleset Ruleset
	Left    []RefusedError // the rules that were left out, each with the kernel's words; Line is 0
	// Drift is what of Ruleset was not there when it was read back: somebody else wrote in between.
	Drift    []Drift
	Attempts int // restores of the rules, without those that asked which are refused

	// Told with an error, too: how long iptables-restore took, whatever it was run for, and how much
	// of that another program held the xtables lock (0 on nft, which has none).
	Took, Waited time.Duration
}

// manyChains is from how many new chains on legacy is given them in a restore of their own before
// the plan. libiptc finds a chain by an index that it makes only of the chains that were there when
// it started, and one by one among the others: with 270 new chains and 10,000 rules that is 45 of
// 60 ms. Empty chains that nothing leads to change nothing for any packet, and the plan itself
// stays one transaction. See docs/design/facts.md#legacy-new-chains-are-slow.
const manyChains = 40

// attempts is how often Apply makes its plan anew when the table changed between plan and restore.
const attempts = 3

// Apply runs the plan in one iptables-restore and reads back what it changed. A plan that was
// overtaken (a rule to be deleted is gone, a place to insert at is not there) is made anew from a
// fresh read. Of one that is refused for a rule's own sake as much is installed as the kernel
// takes, again in one transaction (see degrade): the Result says what, and what was left out.
// See docs/design/facts.md#restore-test-is-no-proof.
//
// No packet's way was changed if it returns an error, but for ErrCouldNotLook, which says that a
// write was begun and could not be verified: read, and see. Errors: *RefusedError, ErrLocked,
// ErrIncompatible, ErrNotRoot, ErrNoTable, ErrCouldNotLook, ErrUnusable, *CommandError.
func (k *Kernel) Apply(ctx context.Context, p Plan) (Result, error) {
	t, err := k.tool(ctx, p.family)
	if err != nil {
		return Result{}, err
	}
	defer k.stand(p.family).writing()()
	defer k.stand(p.family).written()
	before := k.spentOn(p.family)
	result, refused, err := k.apply(ctx, t, p)
	if refused {
		result, err = k.degrade(ctx, t, p.want, result.Attempts, err)
		if why := k.noModules(); why != nil {
			for i := range result.Left {
				result.Left[i].NoModules = why.Error()
			}
			if err != nil {
				err = fmt.Errorf("%w; %w", err, why)
			}
		}
	}
	now := k.spentOn(p.family)
	result.Took, result.Waited = now.took-before.took, now.waited-before.waited
	return result, err
}

func (k *Kernel) spentOn(f Family) spent {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.spent[f]
}

// apply installs the whole, or nothing. refused says that the error is a *RefusedError which may be
// for a rule's own sake.
func (k *Kernel) apply(ctx context.Context, t tool, p Plan) (r Result, refused bool, err error) {
	if p.Empty() {
		return Result{Have: p.have, Ruleset: p.want}, false, nil
	}
	if chains := p.newChains(); t.backend == Legacy && len(chains.lines) > manyChains {
		if err := k.restore(ctx, t, chains); err != nil {
			return Result{Attempts: 1}, false, fmt.Errorf("apply %s rules: %w", p.family, err)
		}
	}
	n := 1
	for {
		err := k.restore(ctx, t, p)
		if err == nil {
			break
		}
		failed := fmt.Errorf("apply %s rules: %w", p.family, err)
		var refusal *RefusedError
		if !errors.As(err, &refusal) {
			return Result{Attempts: n}, false, failed
		}
		if n == attempts || !mayBeOvertaken(refusal.Rule) {
			return Result{Attempts: n}, mayBeForItsOwnSake(refusal.Rule), failed
		}
		have, readErr := k.read(ctx, t)
		if readErr != nil {
			return Result{Attempts: n}, false, errors.Join(failed, readErr)
		}
		n, p = n+1, NewPlan(p.want, have)
		if p.Empty() {
			return Result{Have: have, Ruleset: p.want, Attempts: n}, false, nil
		}
	}
	r = Result{Attempts: n}
	r.Have, err = k.readBack(ctx, t, p)
	if err != nil {
		return r, false, fmt.Errorf("verify %s rules: %w: %w", p.family, ErrCouldNotLook, err)
	}
	r.Ruleset, r.Drift = p.want, Diff(p.want, r.Have)
	return r, false, nil
}

func (k *Kernel) readBack(ctx context.Context, t tool, p Plan) (Table, error) {
	if t.backend != NFT || len(p.touched) > listLimit {
		return k.read(ctx, t)
	}
	names, err := k.machine.natChains(t.family)
	if err != nil {
		return Table{}, err
	}
	return k.listChains(ctx, t, p.have, p.touched, names)
}

// mayBeOvertaken says whether a line depends on what others do to the table. COMMIT is what legacy
// names whatever it was; on nft a deletion that others hold up names itself.
func mayBeOvertaken(line string) bool {
	return strings.HasPrefix(line, "-D ") || strings.HasPrefix(line, "-I ") ||
		strings.HasPrefix(line, "-X ") || line == "COMMIT"
}

// mayBeForItsOwnSake says whether a line may have been refused for what is in it. A deletion
// cannot: it is of what the kernel has. COMMIT, on legacy, may be either: only asking tells.
func mayBeForItsOwnSake(line string) bool {
	return !strings.HasPrefix(line, "-D ") && !strings.HasPrefix(line, "-X ")
}

func (k *Kernel) restore(ctx context.Context, t tool, p Plan) error {
	write := func() error {
		done := k.own.writing(p.family)
		_, err := k.run(ctx, writeLimit, []byte(p.String()), t.restore, "--noflush", "-w", lockWait)
		done(err)
		return err
	}
	var waited time.Duration
	var err error
	began := time.Now()
	if t.backend == Legacy && k.machine.lockHolder != nil {
		waited, err = waiting(k.machine.lockHolder, &k.own, write)
	} else {
		err = write()
	}
	k.mu.Lock()
	so := k.spent[p.family]
	k.spent[p.family] = spent{so.took + time.Since(began), so.waited + waited}
	k.mu.Unlock()
	return refused(p, err)
}

// run runs one command within limit and remembers its pid, by which the kernel's
// notifications tell our writes.
func (k *Kernel) run(ctx context.Context, limit time.Duration, stdin []byte, name string,
	args ...string) ([]byte, error) {
	var stdout bytes.Buffer
	if err := k.machine.run(ctx, limit, &k.own, stdin, &stdout, name, args...); err != nil {
		return nil, err
	}
	return stdout.Bytes(), nil
}

// runInto writes what the command said to stdout, which is not to be used again after an error: a
// copy may still go on.
func runInto(ctx context.Context, limit time.Duration, own *ownPIDs, stdin []byte,
	stdout *bytes.Buffer, name string, args ...string) error {
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	cmd := exec.CommandContext(limited, name, args...)
	cmd.Env = []string{"LC_ALL=C", "PATH=" + os.Getenv("PATH")}
	for _, key := range []string{"XTABLES_LIBDIR", "XTABLES_LOCKFILE"} {
		if v, ok := os.LookupEnv(key); ok {
			cmd.Env = append(cmd.Env, key+"="+v)
		}
	}
	cmd.WaitDelay = waitDelay
	var stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = stdout, &stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return notStarted(name, err)
	}
	if err := cmd.Start(); err != nil {
		if errors.Is(err, exec.ErrNotFound) || errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("%w: %w", ErrNoIPTables, err)
		}
		if limited.Err() != nil { // the time was over before it began
			return fmt.Errorf("run %s: %w: %w", filepath.Base(name), ErrCouldNotLook, err)
		}
		return notStarted(name, err)
	}
	own.start(cmd.Process.Pid) // before it has read a line, so before it can have changed anything
	defer own.end(cmd.Process.Pid)
	_, _ = in.Write(stdin) // a command that ends early says so by its exit
	in.Close()
	err = cmd.Wait()
	command := strings.Join(append([]string{filepath.Base(name)}, args...), " ")
	switch {
	case err == nil:
		return nil
	case limited.Err() != nil:
		return fmt.Errorf("%s: %w: no end after %s: %w", command, ErrCouldNotLook, limit, limited.Err())
	case cmd.ProcessState.Success(): // exec.ErrWaitDelay: what it said was not read to its end
		return fmt.Errorf("%s: %w: %w", command, ErrCouldNotLook, err)
	case wasKilled(cmd.ProcessState):
		return fmt.Errorf("%s: %w: %w", command, ErrCouldNotLook, err)
	default:
		return classify(command, cmd.ProcessState.ExitCode(), stderr.String())
	}
}

// notStarted is the error of a program that could not be started. A machine that is out of memory,
// processes or files may have some the next time.
func notStarted(name string, err error) error {
	for _, passes := range []error{unix.EAGAIN, unix.ENOMEM, unix.EMFILE, unix.ENFILE} {
		if errors.Is(err, passes) {
			return fmt.Errorf("run %s: %w: %w", filepath.Base(name), ErrCouldNotLook, err)
		}
	}
	return fmt.Errorf("run %s: %w", filepath.Base(name), err)
}

// wasKilled says whether somebody else ended the program: the kernel that is out of memory, or who
// stops all of a unit. A program that ends by another signal has failed by itself.
func wasKilled(state *os.ProcessState) bool {
	status, ok := state.Sys().(syscall.WaitStatus)
	return ok && status.Signaled() && slices.Contains([]syscall.Signal{unix.SIGKILL, unix.SIGTERM},
		status.Signal())
}

// ownPIDs remembers the commands of ours that run, and those that ended not long ago.
type ownPIDs struct {
	mu    sync.Mutex
	ended map[int]time.Time // by pid; zero: it runs
	last  time.Time         // when the last one ended
	// unclaimed are each family's writes that no notification was taken for, the oldest first, by
	// when they ended; zero: one goes on.
	unclaimed map[Family][]*time.Time
}

// ownFor is how long the pid of a command that ended is ours: the kernel's notification of its last
// write has come by then, at 10,000 rules within 0.3 s. Not longer, since pids come round again:
// with the usual 32,768 of them, of 512 that were kept for ever each 64th write of others was taken
// for ours.
const ownFor = 10 * time.Second

func (o *ownPIDs) start(pid int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.ended == nil {
		o.ended = map[int]time.Time{}
	}
	maps.DeleteFunc(o.ended, func(_ int, at time.Time) bool { return over(at) })
	o.ended[pid] = time.Time{}
}

func (o *ownPIDs) end(pid int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.last = time.Now()
	o.ended[pid] = o.last
}

func (o *ownPIDs) has(pid int) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	at, ok := o.ended[pid]
	return ok && !over(at)
}

// writing notes that a write begins, and what it returns that it ended. One that failed has changed
// nothing that would be told.
func (o *ownPIDs) writing(f Family) (done func(error)) {
	o.mu.Lock()
	defer o.mu.Unlock()
	ended := new(time.Time)
	if o.unclaimed == nil {
		o.unclaimed = map[Family][]*time.Time{}
	}
	// where pids tell, or on legacy, nobody ever claims one
	o.unclaimed[f] = append(claimable(o.unclaimed[f]), ended)
	return func(err error) {
		o.mu.Lock()
		defer o.mu.Unlock()
		*ended = time.Now()
		if err != nil {
			o.unclaimed[f] = slices.DeleteFunc(o.unclaimed[f],
				func(one *time.Time) bool { return one == ended })
		}
	}
}

// claimable are those of the writes of which the kernel's word may still come.
func claimable(writes []*time.Time) []*time.Time {
	return slices.DeleteFunc(writes, func(ended *time.Time) bool {
		return !ended.IsZero() && time.Since(*ended) > claimFor
	})
}

// untold forgets the writes so far: nobody listened to what was told of them.
func (o *ownPIDs) untold() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.unclaimed = map[Family][]*time.Time{}
}

// claim takes a notification for that of a write to its family which none was taken for, if
// there is one.
func (o *ownPIDs) claim(f Family) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	writes := claimable(o.unclaimed[f])
	if len(writes) == 0 {
		return false
	}
	o.unclaimed[f] = writes[1:]
	return true
}

func over(ended time.Time) bool { return !ended.IsZero() && time.Since(ended) > ownFor }

// active says whether a command of ours runs or ended less than d ago.
func (o *ownPIDs) active(d time.Duration) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, at := range o.ended {
		if at.IsZero() {
			return true
		}
	}
	return time.Since(o.last) < d
}
