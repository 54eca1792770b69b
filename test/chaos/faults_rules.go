package chaos

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
)

// damage is an edit of table nat, in one transaction.
type damage struct {
	name string
	// costs is what is not so any more until it is repaired.
	costs []Kind
	// do makes the lines; none: there is nothing to damage just now.
	do func(random *rand.Rand, t nat) []string
	// mess is a rule of somebody else's that it leaves, as "CHAIN RULE": who made it takes it out.
	mess func(f Family) string
}

// What damage costs.
var (
	escapes = []Kind{Escaped}
	// A redirect that leads nowhere.
	refuses = []Kind{Refused}
	// An Envoy whose own connections are redirected, too, or what else is to go past it.
	loops    = []Kind{Refused, Trapped, Blocked}
	anything = []Kind{Escaped, Refused, Trapped, Blocked}
	// Their own server answers, on its own address.
	elsewhere = []Kind{Captured, Trapped}
	// With the last rule that wants them the kernel turns conntrack and NAT off: a redirected stream
	// that speaks then is reset, and a connection that was just being made may hang
	// (docs/coexistence.md). Everybody's rules go.
	flushes = []Kind{Escaped, Refused, Cut, Foreign}
)

// Rules that stand before ours until ours are put first again.
const (
	shadowAccept = "OUTPUT -p tcp -m tcp --dport 81 -j ACCEPT"
	shadowReturn = "OUTPUT -p tcp -m tcp --dport 9000 -j RETURN"
	shadowIn     = "PREROUTING -p tcp -m tcp --dport 8081 -j ACCEPT"
	harmless     = "OUTPUT -p udp -m udp --dport 9 -j ACCEPT"
)

func fixed(mess string) func(Family) string { return func(Family) string { return mess } }

// before inserts a rule, "CHAIN RULE", at the head of its chain.
func before(rule string) string {
	chain, rest, _ := strings.Cut(rule, " ")
	return "-I " + chain + " 1 " + rest
}

// shadowDNAT takes web's connections to a server that is none of the mesh's.
func shadowDNAT(f Family) string {
	if f == IPv6 {
		return "OUTPUT -d fd10::1/128 -p tcp -m tcp --dport 81 -j DNAT --to-destination [fd66::1]:81"
	}
	return "OUTPUT -d 10.10.0.1/32 -p tcp -m tcp --dport 81 -j DNAT --to-destination 10.66.0.1:81"
}

// proxyReturn is a rule that keeps Envoy's own connections from being redirected.
func proxyReturn(rule string) bool {
	return strings.Contains(rule, "--uid-owner") || strings.Contains(rule, "--gid-owner")
}

// damages are those of one transaction.
func damages() []damage {
	return []damage{
		{name: "jump-deleted", costs: escapes, do: func(random *rand.Rand, t nat) []string {
			return with(pick(random, t.jumps()), func(j string) []string { return []string{"-D " + j} })
		}},
		{name: "jump-doubled", do: func(random *rand.Rand, t nat) []string {
			return with(pick(random, t.jumps()), func(j string) []string { return []string{"-A " + j} })
		}},
		{name: "jump-last", do: func(random *rand.Rand, t nat) []string {
			// What stands before ours then is harmless, or another fault's own.
			return with(pick(random, t.jumps()), func(j string) []string {
				return []string{"-D " + j, "-A " + j}
			})
		}},
		{name: "jump-behind", do: insert, mess: fixed(harmless)},
		{name: "shadow-accept", costs: escapes, do: insert, mess: fixed(shadowAccept)},
		{name: "shadow-return", costs: escapes, do: insert, mess: fixed(shadowReturn)},
		{name: "shadow-inbound", costs: escapes, do: insert, mess: fixed(shadowIn)},
		{name: "shadow-dnat", costs: elsewhere, do: insert, mess: shadowDNAT},
		{name: "row-deleted", costs: anything, do: func(random *rand.Rand, t nat) []string {
			return with(pick(random, t.owned(1)), func(chain string) []string {
				return []string{"-D " + chain + " " + pick(random, t.rules[chain])}
			})
		}},
		{name: "row-doubled", do: func(random *rand.Rand, t nat) []string {
			return with(pick(random, t.owned(1)), func(chain string) []string {
				return []string{"-A " + chain + " " + pick(random, t.rules[chain])}
			})
		}},
		{name: "row-added", costs: escapes, do: func(random *rand.Rand, t nat) []string {
			return with(pick(random, t.owned(0)), func(chain string) []string {
				return []string{"-I " + chain + " 1 -p tcp -j " + pick(random, []string{"RETURN", "ACCEPT"})}
			})
		}},
		{name: "row-retargeted", costs: escapes, do: func(random *rand.Rand, t nat) []string {
			var rows []string
			for _, chain := range t.owned(1) {
				for i, rule := range t.rules[chain] {
					if match, _, ok := strings.Cut(" "+rule, " -j "+ownPrefix); ok {
						rows = append(rows, fmt.Sprintf("-R %s %d%s -j RETURN", chain, i+1, match))
					}
				}
			}
			return with(pick(random, rows), func(row string) []string { return []string{row} })
		}},
		{name: "rows-reordered", costs: anything, do: func(random *rand.Rand, t nat) []string {
			return with(pick(random, t.owned(2)), func(chain string) []string {
				first := t.rules[chain][0]
				return []string{"-D " + chain + " " + first, "-A " + chain + " " + first}
			})
		}},
		{name: "loop", costs: loops, do: func(_ *rand.Rand, t nat) (lines []string) {
			for _, chain := range t.owned(1) {
				for _, rule := range t.rules[chain] {
					if proxyReturn(rule) {
						lines = append(lines, "-D "+chain+" "+rule)
					}
				}
			}
			return lines
		}},
		{name: "port-changed", costs: refuses, do: func(random *rand.Rand, t nat) []string {
			var rows []string
			for _, chain := range t.owned(1) {
				if rule := t.rules[chain][0]; strings.Contains(rule, "-p tcp -j REDIRECT ") {
					rows = append(rows, "-R "+chain+" 1 -p tcp -j REDIRECT --to-ports 15009")
				}
			}
			return with(pick(random, rows), func(row string) []string { return []string{row} })
		}},
		{name: "chain-flushed", costs: anything, do: func(random *rand.Rand, t nat) []string {
			return with(pick(random, t.owned(1)), func(chain string) []string {
				return []string{":" + chain + " - [0:0]"}
			})
		}},
		{name: "chain-deleted", costs: anything, do: func(random *rand.Rand, t nat) []string {
			return with(pick(random, t.owned(0)), func(gone string) (lines []string) {
				for _, chain := range t.chains {
					for _, rule := range t.rules[chain] {
						if chain != gone && strings.HasSuffix(rule, "-j "+gone) {
							lines = append(lines, "-D "+chain+" "+rule)
						}
					}
				}
				return append(lines, "-F "+gone, "-X "+gone)
			})
		}},
		{name: "all-deleted", costs: anything, do: func(_ *rand.Rand, t nat) (lines []string) {
			for _, j := range t.jumps() {
				lines = append(lines, "-D "+j)
			}
			ours := t.owned(0)
			for _, chain := range ours {
				lines = append(lines, "-F "+chain)
			}
			for _, chain := range ours {
				lines = append(lines, "-X "+chain)
			}
			return lines
		}},
		{name: "another-jump", do: func(_ *rand.Rand, t nat) []string {
			if !slices.Contains(t.chains, "SERVICE_PROXY_OUTPUT") {
				return nil
			}
			return []string{"-A OUTPUT -j SERVICE_PROXY_OUTPUT"}
		}},
		{name: "left-chain", do: func(*rand.Rand, nat) []string {
			return []string{":SERVICE_PROXY_B4_0A200000_12 - [0:0]",
				"-A SERVICE_PROXY_B4_0A200000_12 -p tcp -j ACCEPT"}
		}},
		{name: "flushed", costs: flushes, do: func(_ *rand.Rand, t nat) (lines []string) {
			for _, chain := range t.chains {
				lines = append(lines, "-F "+chain)
			}
			return lines
		}},
	}
}

func with(s string, do func(string) []string) []string {
	if s == "" {
		return nil
	}
	return do(s)
}

// insert only leaves the mess.
func insert(*rand.Rand, nat) []string { return []string{} }

// lines are the transaction of a damage.
func (d damage) lines(random *rand.Rand, f Family, t nat) []string {
	lines := d.do(random, t)
	if d.mess != nil {
		lines = append(lines, before(d.mess(f)))
	}
	return lines
}

// doTo does it to a family.
func (w *World) doTo(d damage, random *rand.Rand, f Family) error {
	return w.edit("rules-"+d.name, f, 1, d.costs, func() error {
		t, err := w.nat(f)
		if err != nil {
			return err
		}
		lines := d.lines(random, f, t)
		if len(lines) == 0 {
			return nil
		}
		return w.restore(f, lines...)
	})
}

// ruleFaults are edits of our rules.
func ruleFaults(s Setting) (all []Fault) {
	for _, d := range damages() {
		f := Fault{Name: "rules-" + d.name, Weight: 1}
		if d.mess != nil {
			f.Longest = 3 * time.Second
		}
		f.Begin = func(w *World, random *rand.Rand) (func() error, error) {
			some := families(random)
			for _, family := range some {
				if err := w.doTo(d, random, family); err != nil {
					return nil, err
				}
			}
			if d.mess == nil {
				return nil, nil
			}
			return func() error { return w.forgetAll(some, "nat", d.mess) }, nil
		}
		all = append(all, f)
	}
	nftOnly := func(s Setting) bool { return s.Backend != string(lab.NFT) }
	return append(all,
		Fault{Name: "rules-zeroed", Weight: 1, Begin: zeroed},
		Fault{Name: "rules-older", Weight: 2, Begin: restoreOlder},
		Fault{Name: "rules-ruleset-flushed", Weight: 1, Unless: nftOnly, Begin: native("flush ruleset")},
		Fault{Name: "rules-table-flushed", Weight: 1, Unless: nftOnly,
			Begin: native("flush table FAMILY nat")},
		Fault{Name: "rules-table-deleted", Weight: 1, Unless: nftOnly,
			Begin: native("delete table FAMILY nat")},
		Fault{Name: "rules-burst", Weight: 1, Begin: burst, Tells: backOffOver},
		Fault{Name: "rules-fight", Weight: 1, Group: "fight", Shortest: time.Second,
			Longest: 10 * time.Second, Begin: fight,
			// Its edits excuse what they cost; the finding stands until 20 s after the last.
			Tells: backOffOver},
		Fault{Name: "rules-in-step", Weight: 1, Begin: inStep},
		Fault{Name: "rules-other-backend", Weight: 1, Group: "other-backend",
			Shortest: 100 * time.Millisecond, Longest: 5 * time.Second, Begin: otherBackend(s)},
	)
}

// forgetAll takes the mess of a fault out.
func (w *World) forgetAll(some []Family, table string, mess func(Family) string) error {
	for _, f := range some {
		if err := w.forget(f, table, mess(f)); err != nil {
			return err
		}
	}
	return nil
}

// zeroed sets the counters back, others' as well. It changes no rule.
func zeroed(w *World, random *rand.Rand) (func() error, error) {
	for _, f := range families(random) {
		err := w.edit("iptables -Z", f, 0, []Kind{Foreign}, func() error {
			return w.iptables(f, "-t", "nat", "-Z")
		})
		if err != nil {
			return nil, err
		}
	}
	return nil, nil
}

// native is one command of nft's.
func native(command string) func(*World, *rand.Rand) (func() error, error) {
	return func(w *World, random *rand.Rand) (func() error, error) {
		do := func(f Family, command string) error {
			return w.edit("nft "+command, f, 1, flushes, func() error {
				_, err := w.run("", "nft", strings.Fields(command)...)
				return err
			})
		}
		if !strings.Contains(command, "FAMILY") {
			return nil, do(Both, command)
		}
		for _, f := range families(random) {
			name := "ip"
			if f == IPv6 {
				name = "ip6"
			}
			if err := do(f, strings.Replace(command, "FAMILY", name, 1)); err != nil {
				return nil, err
			}
		}
		return nil, nil
	}
}

// restoreOlder puts our chains and jumps as they were the last time that this fault came, or as
// they are, if it never did: by a whole ruleset, or into what is there. Others' rules stay as
// they are, but for their counters.
func restoreOlder(w *World, random *rand.Rand) (func() error, error) {
	whole := random.IntN(2) == 0
	for _, f := range families(random) {
		costs := anything
		if whole { // every chain is another then, and whether NAT stays on in between is the kernel's
			costs = append(slices.Clone(flushes), Trapped, Blocked)
		}
		// Where none of ours was in, its redirects start conntrack, to which older connections look new.
		costs = append(slices.Clone(costs), Severed, Cut)
		err := w.edit("rules-older", f, 1, costs, func() error {
			now, err := w.nat(f)
			if err != nil {
				return err
			}
			older, ok := w.kernel.saved[f]
			if !ok {
				older = now
			}
			if w.kernel.saved == nil {
				w.kernel.saved = map[Family]nat{}
			}
			w.kernel.saved[f] = now
			if !whole {
				return w.restore(f, older.ours()...)
			}
			_, err = w.run(payload("nat", now.withOurs(older)), f.program("-restore"), "-w", "5")
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return nil, nil
}

// ours is what `iptables-restore --noflush` of a save makes of our chains: jumps come once more.
func (t nat) ours() (lines []string) {
	chains := t.owned(0)
	for _, chain := range chains {
		lines = append(lines, ":"+chain+" - [0:0]")
	}
	for _, chain := range chains {
		for _, rule := range t.rules[chain] {
			lines = append(lines, "-A "+chain+" "+rule)
		}
	}
	for _, j := range t.jumps() {
		lines = append(lines, "-A "+j)
	}
	return lines
}

// withOurs is a whole table: others' rules of t, and ours of older.
func (t nat) withOurs(older nat) (lines []string) {
	var rules []string
	for _, chain := range t.chains {
		if owned(chain) {
			continue
		}
		lines = append(lines, ":"+chain+" "+t.policy[chain]+" [0:0]")
		for _, j := range older.jumps() {
			if name, rule, _ := strings.Cut(j, " "); name == chain {
				rules = append(rules, "-A "+chain+" "+rule)
			}
		}
		for _, rule := range t.rules[chain] {
			if !strings.Contains(rule, "-j "+ownPrefix) {
				rules = append(rules, "-A "+chain+" "+rule)
			}
		}
	}
	for _, chain := range older.owned(0) {
		lines = append(lines, ":"+chain+" - [0:0]")
		for _, rule := range older.rules[chain] {
			rules = append(rules, "-A "+chain+" "+rule)
		}
	}
	return append(lines, rules...)
}

// simple are the damages that leave no mess, and no flush.
func simple() (some []damage) {
	for _, d := range damages() {
		if d.mess == nil && d.name != "flushed" {
			some = append(some, d)
		}
	}
	return some
}

// burst is up to eight edits in quick succession, of which five or more may be repaired one by one.
func burst(w *World, random *rand.Rand) (func() error, error) {
	f := pick(random, []Family{IPv4, IPv6})
	for range 3 + random.IntN(6) {
		if err := w.doTo(pick(random, simple()), random, f); err != nil {
			return nil, err
		}
		time.Sleep(time.Duration(random.IntN(60)) * time.Millisecond)
	}
	return nil, nil
}

// fight is another agent, which takes ours out whenever it sees them.
func fight(w *World, random *rand.Rand) (func() error, error) {
	f := pick(random, []Family{IPv4, IPv6})
	every := time.Duration(50+random.IntN(200)) * time.Millisecond
	return background(func(ctx context.Context) {
		for sleep(ctx, every) {
			t, err := w.nat(f)
			if err != nil || len(t.jumps()) == 0 {
				continue
			}
			_ = w.edit("rules-fight", f, editBurst, escapes, func() error {
				return w.restore(f, "-D "+t.jumps()[0])
			})
		}
	}), nil
}

// inStep edits while the agent writes: a service comes, and in the milliseconds in which it is put
// in others do what they do.
func inStep(w *World, random *rand.Rand) (func() error, error) {
	i := 100 + random.IntN(50)
	undo, err := w.EditConfig(func(c *controlplane.Config) {
		c.Services = append(c.Services, Extra(i))
	})
	if err != nil {
		return nil, err
	}
	f := pick(random, []Family{IPv4, IPv6})
	for range 1 + random.IntN(3) {
		if err := w.doTo(pick(random, simple()), random, f); err != nil {
			return undo, err
		}
		time.Sleep(time.Duration(random.IntN(15)) * time.Millisecond)
	}
	return undo, nil
}

// otherBackend has a rule of the other iptables, for traffic of nobody's. It is told of, no more:
// no excuse.
func otherBackend(s Setting) func(*World, *rand.Rand) (func() error, error) {
	other := lab.Legacy
	if s.Backend == string(lab.Legacy) {
		other = lab.NFT
	}
	return func(w *World, random *rand.Rand) (func() error, error) {
		var ends []func() error
		for _, f := range families(random) {
			program := f.program("-" + string(other))
			rule := []string{"OUTPUT", "-p", "udp", "--dport", "9", "-j", "ACCEPT"}
			do := func(what string) error {
				_, err := w.run("", program, append([]string{"-w", "5", "-t", "nat", what}, rule...)...)
				return err
			}
			if err := do("-A"); err != nil {
				return nil, err
			}
			ends = append(ends, func() error {
				if err := do("-D"); err != nil && do("-C") == nil {
					return err
				}
				if other == lab.Legacy {
					return nil // its tables stay as long as the network namespace does
				}
				family := map[Family]string{IPv4: "ip", IPv6: "ip6"}[f]
				_, err := w.run("", "nft", "delete", "table", family, "nat")
				return err
			})
		}
		return func() error {
			for _, end := range ends {
				if err := end(); err != nil {
					return err
				}
			}
			return nil
		}, nil
	}
}
