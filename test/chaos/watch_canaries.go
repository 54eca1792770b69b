package chaos

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
)

// Canaries are rules of somebody else, in every table and in a chain of their own, each with its
// counter. They are there before the agent, and their own traffic moves them: a rule that is
// written anew in the same words gives itself away by its counter.

// Where the canaries' traffic goes.
var (
	canary4 = netip.MustParseAddrPort("10.88.0.1:9000")
	canary6 = netip.MustParseAddrPort("[fd88::1]:9000")
)

const (
	canaryChain = "CHAOS_CANARY"
	canaryTable = "chaos_canary" // of nft's own
	// canaryMark is in the comment of each rule.
	canaryMark = "canary-"
	// lookLimit is how long one look at the kernel may take. While others change nft's rules all the
	// time a look may not come to its end: then there was none.
	lookLimit = 5 * time.Second
)

// canaries are those of a game.
type canaries struct {
	w      *World
	counts *counter
	wanted map[Family][]canary // by text
	nat    bool                // one of them has a NAT target, which starts conntrack

	mu   sync.Mutex
	last map[Family][]canary // as they were last seen
	at   time.Time
	// counted are those that ever were: some are new since a calm, and their traffic is to come.
	counted map[string]bool
}

// canary is one rule as it was seen.
type canary struct {
	table, text    string
	packets, bytes uint64
}

// of names it in messages.
func (c canary) of(f Family) string { return fmt.Sprintf("IPv%d %s: %s", f, c.table, c.text) }

// canaryRules is what an iptables-restore of one family takes. The jump into the own chain stands
// behind the agent's.
func canaryRules(f Family, nat bool) string {
	to, dnat, target := canary4.Addr().String()+"/32", "192.0.2.1/32", "192.0.2.2"
	if f == IPv6 {
		to, dnat, target = canary6.Addr().String()+"/128", "2001:db8::1/128", "2001:db8::2"
	}
	var b strings.Builder
	for _, table := range []string{"raw", "mangle", "nat", "filter"} {
		rule := func(chain, match, name, target string) {
			fmt.Fprintf(&b, "-A %s %s -m comment --comment %s%s%s\n", chain, match, canaryMark, name, target)
		}
		fmt.Fprintf(&b, "*%s\n:%s - [0:0]\n", table, canaryChain)
		rule("OUTPUT", "-d "+to+" -p tcp", "jump", " -j "+canaryChain)
		rule(canaryChain, "-p tcp", "own", "")
		rule("OUTPUT", "-d "+to+" -p tcp", "output", "")
		if table == "filter" {
			rule("INPUT", fmt.Sprintf("-p tcp -m tcp --dport %d", rawPort), "input", "")
		} else {
			rule("PREROUTING", fmt.Sprintf("-p tcp -m tcp --dport %d", rawPort), "prerouting", "")
		}
		if table == "nat" || table == "mangle" {
			rule("POSTROUTING", "-d "+to+" -p tcp", "postrouting", "")
		}
		if table == "nat" && nat {
			rule("OUTPUT", "-d "+dnat+" -p tcp", "dnat", " -j DNAT --to-destination "+target)
		}
		b.WriteString("COMMIT\n")
	}
	return b.String()
}

// nftCanary is a table of nft's own.
const nftCanary = `table inet ` + canaryTable + ` {
	chain out {
		type filter hook output priority 0; policy accept;
		ip daddr 10.88.0.1 tcp dport 9000 counter comment "canary-nft4"
		ip6 daddr fd88::1 tcp dport 9000 counter comment "canary-nft6"
	}
}
`

var (
	savedRule = regexp.MustCompile(`^\[(\d+):(\d+)\] (-A .*)$`)
	nftRule   = regexp.MustCompile(`^(.*) counter packets (\d+) bytes (\d+) (.*)$`)
)

// parseCanaries reads them out of what `iptables-save -c` said.
func parseCanaries(save string) (all []canary) {
	table := ""
	for line := range strings.Lines(save) {
		line = strings.TrimSpace(line)
		if name, ok := strings.CutPrefix(line, "*"); ok {
			table = name
		}
		if strings.HasPrefix(line, ":"+canaryChain+" ") {
			all = append(all, canary{table: table, text: ":" + canaryChain})
		}
		m := savedRule.FindStringSubmatch(line)
		if m != nil && strings.Contains(m[3], canaryMark) {
			all = append(all, canary{table, m[3], number(m[1]), number(m[2])})
		}
	}
	// In which order the tables stand says nothing: one that another made anew is the last.
	slices.SortStableFunc(all, func(a, b canary) int { return strings.Compare(a.table, b.table) })
	return all
}

// parseNFT reads them out of what `nft list table` said.
func parseNFT(list string) (all []canary) {
	for line := range strings.Lines(list) {
		if m := nftRule.FindStringSubmatch(strings.TrimSpace(line)); m != nil {
			all = append(all, canary{canaryTable, m[1] + " " + m[4], number(m[2]), number(m[3])})
		}
	}
	return all
}

func number(text string) uint64 {
	n, _ := strconv.ParseUint(text, 10, 64) // its pattern is of digits
	return n
}

// changed says what of the canaries is not as it was, by table; "" where all is. Of counters it
// wants that they do not go back.
func changed(before, now []canary) (table, what string) {
	same := func(a, b canary) bool { return a.table == b.table && a.text == b.text }
	for _, c := range before {
		i := slices.IndexFunc(now, func(n canary) bool { return same(c, n) })
		switch {
		case i < 0:
			return c.table, fmt.Sprintf("%q is gone", c.text)
		case now[i].packets < c.packets || now[i].bytes < c.bytes:
			return c.table, fmt.Sprintf("the counters of %q went from [%d:%d] to [%d:%d]", c.text, c.packets,
				c.bytes, now[i].packets, now[i].bytes)
		}
	}
	for i, n := range now {
		if i >= len(before) || !same(n, before[i]) {
			return n.table, fmt.Sprintf("%q is new, or stands elsewhere", n.text)
		}
	}
	return "", ""
}

// add puts them in, and notes what they look like.
func (c *canaries) add(ctx context.Context) error {
	for f, program := range restores {
		if _, err := c.w.VM.RunInput(ctx, canaryRules(f, c.nat), program, "--noflush", "-w"); err != nil {
			return fmt.Errorf("add rules of others: %w", err)
		}
	}
	if c.native() {
		if _, err := c.w.VM.RunInput(ctx, nftCanary, "nft", "-f", "-"); err != nil {
			return fmt.Errorf("add rules of others: %w", err)
		}
	}
	var err error
	c.wanted, _, err = c.read(ctx)
	c.last, c.at = c.wanted, time.Now()
	for f, all := range c.wanted {
		least := map[Family]int{IPv4: 19, IPv6: 19, Both: 2}[f]
		if len(all) < least {
			return fmt.Errorf("add rules of others: %d of them are seen, want %d: %+v", len(all), least, all)
		}
	}
	return err
}

var restores = map[Family]string{IPv4: "iptables-restore", IPv6: "ip6tables-restore"}

// native says whether there is a table of nft's own.
func (c *canaries) native() bool { return c.w.Setting.Backend == string(lab.NFT) }

// read looks at them; saves are what the kernel has in each family.
func (c *canaries) read(ctx context.Context) (all map[Family][]canary, saves map[Family]string,
	err error) {
	ctx, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	all, saves = map[Family][]canary{}, map[Family]string{}
	for f, program := range map[Family]string{IPv4: "iptables-save", IPv6: "ip6tables-save"} {
		if saves[f], err = c.w.VM.Run(ctx, program, "-c"); err != nil {
			return nil, nil, err
		}
		all[f] = parseCanaries(saves[f])
	}
	if c.native() {
		list, err := c.w.VM.Run(ctx, "nft", "list", "table", "inet", canaryTable)
		if err != nil && !strings.Contains(err.Error(), "No such file") {
			return nil, nil, err
		}
		all[Both] = parseNFT(list)
	}
	return all, saves, nil
}

// differ says whether any is another than it was.
func (c *canaries) differ(now map[Family][]canary) bool {
	for f, all := range now {
		if _, what := changed(c.last[f], all); what != "" {
			return true
		}
	}
	return false
}

// look compares them with what they were, and observes what is another.
func (c *canaries) look(ctx context.Context) (saves map[Family]string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	began := time.Now()
	now, saves, err := c.read(ctx)
	if err != nil {
		return nil, err
	}
	if !c.native() && c.differ(now) {
		// iptables-legacy writes a table, and then adds the counters that it had: who reads in between
		// sees none (libiptc's TC_COMMIT).
		if !sleep(ctx, 100*time.Millisecond) {
			return nil, ctx.Err()
		}
		if now, saves, err = c.read(ctx); err != nil {
			return nil, err
		}
	}
	for f, all := range now {
		if table, what := changed(c.last[f], all); what != "" {
			c.w.Observe(Observation{Kind: Foreign, Family: f, From: c.at, To: time.Now(), What: table,
				Text: what})
		}
	}
	if c.counted == nil {
		c.counted = map[string]bool{}
	}
	for f, all := range now {
		for _, x := range all {
			c.counted[x.of(f)] = c.counted[x.of(f)] || x.packets > 0
		}
	}
	c.last, c.at = now, began
	c.counts.add(Counts{Looks: 1})
	return saves, nil
}

// again puts those back in that a fault has destroyed; that they are gone was observed.
func (c *canaries) again(ctx context.Context) error {
	if _, err := c.look(ctx); err != nil {
		return fmt.Errorf("look at others' rules: %w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for f, program := range restores {
		text := readd(c.wanted[f], c.last[f], canaryRules(f, c.nat))
		if text == "" {
			continue
		}
		if _, err := c.w.VM.RunInput(ctx, text, program, "--noflush", "-w"); err != nil {
			return fmt.Errorf("add others' rules again: %w", err)
		}
	}
	if c.native() && len(c.last[Both]) != len(c.wanted[Both]) {
		_, err := c.w.VM.RunInput(ctx, "table inet "+canaryTable+"\ndelete table inet "+canaryTable+"\n"+
			nftCanary, "nft", "-f", "-")
		if err != nil {
			return fmt.Errorf("add others' rules again: %w", err)
		}
	}
	now, _, err := c.read(ctx)
	if err != nil {
		return fmt.Errorf("look at others' rules: %w", err)
	}
	c.last, c.at = now, time.Now()
	return nil
}

// readd is a restore's input that leaves in each table what is wanted of the canaries and no more;
// "": it is so. all is the whole input.
func readd(wanted, have []canary, all string) string {
	var b strings.Builder
	of := func(some []canary, table string) (texts []string) {
		for _, c := range some {
			if c.table == table {
				texts = append(texts, c.text)
			}
		}
		return texts
	}
	for part := range strings.SplitAfterSeq(all, "COMMIT\n") {
		table, rest, ok := strings.Cut(strings.TrimPrefix(part, "*"), "\n")
		if !ok || slices.Equal(of(wanted, table), of(have, table)) {
			continue
		}
		fmt.Fprintf(&b, "*%s\n:%s - [0:0]\n", table, canaryChain)
		for _, text := range of(have, table) {
			if rule, ok := strings.CutPrefix(text, "-A "); ok && !strings.HasPrefix(rule, canaryChain+" ") {
				fmt.Fprintf(&b, "-D %s\n", rule)
			}
		}
		_, rules, _ := strings.Cut(rest, "\n") // without its own line of the chain
		b.WriteString(rules)
	}
	return b.String()
}

// moved says whether the traffic moved all the counters, or which not: a watcher that could see
// nothing has seen nothing.
func (c *canaries) moved() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var still []string
	for f, all := range c.last {
		for _, x := range all {
			if strings.HasPrefix(x.text, "-A ") && !c.counted[x.of(f)] && !strings.Contains(x.text, "dnat") {
				still = append(still, x.of(f))
			}
		}
	}
	if len(still) == 0 {
		return nil
	}
	slices.Sort(still)
	return errors.New("others' rules that counted nothing: " + strings.Join(still, "; "))
}

// run moves them and looks, until ctx ends.
func (c *canaries) run(ctx context.Context) {
	var pending sync.WaitGroup
	defer pending.Wait()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		for _, to := range []netip.AddrPort{canary4, canary6} {
			pending.Go(func() { c.w.call(ctx, call{from: c.w.VM, to: to, direct: true}, c.counts) })
		}
		if saves, err := c.look(ctx); err == nil { // a look that failed was none
			c.w.watch.truth.sawKernel(saves, time.Now())
		}
	}
}
