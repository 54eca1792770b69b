package chaos

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
)

// neighbour is a program that has rules of its own beside ours. Its rules take its own traffic and
// no other's, wherever they stand: so it costs nothing, and each lost rule of its is our doing.
type neighbour struct {
	name  string
	table string
	// chains of its own, with their rules.
	chains func(f Family) map[string][]string
	// jumps are its rules in built-in chains, as "CHAIN RULE". first: they come before what is there.
	jumps func(f Family) []string
	first bool
	// keeps: it writes its chains anew each second, and its jumps where they are missing.
	keeps bool
}

// own is a family's address of a neighbour: nobody calls it.
func own(f Family, n int) string {
	if f == IPv6 {
		return fmt.Sprintf("fd96::%x", n)
	}
	return fmt.Sprintf("10.96.0.%d", n)
}

func length(f Family) string {
	if f == IPv6 {
		return "/128"
	}
	return "/32"
}

func loopback(f Family) string {
	if f == IPv6 {
		return "::1/128"
	}
	return "127.0.0.0/8"
}

func dnat(f Family, n, port int) string {
	if f == IPv6 {
		return fmt.Sprintf("-j DNAT --to-destination [%s]:%d", own(f, n), port)
	}
	return fmt.Sprintf("-j DNAT --to-destination %s:%d", own(f, n), port)
}

func neighbours() []neighbour {
	return []neighbour{
		// What dockerd 20.10 writes.
		{name: "docker", table: "nat", chains: func(f Family) map[string][]string {
			return map[string][]string{"DOCKER": {
				"-i docker0 -j RETURN", "! -i docker0 -p tcp -m tcp --dport 8090 " + dnat(f, 20, 80),
			}}
		}, jumps: func(f Family) []string {
			return []string{
				"PREROUTING -m addrtype --dst-type LOCAL -j DOCKER",
				"OUTPUT ! -d " + loopback(f) + " -m addrtype --dst-type LOCAL -j DOCKER",
				"POSTROUTING -s " + own(f, 20) + length(f) + " ! -o docker0 -j MASQUERADE",
			}
		}},
		{name: "docker-filter", table: "filter", chains: func(f Family) map[string][]string {
			return map[string][]string{
				"DOCKER-USER": {"-j RETURN"}, "DOCKER-ISOLATION-STAGE-1": {"-j RETURN"},
				"DOCKER": {"-d " + own(f, 20) + length(f) + " ! -i docker0 -o docker0 -p tcp -m tcp " +
					"--dport 80 -j ACCEPT"},
			}
		}, jumps: func(Family) []string {
			return []string{"FORWARD -j DOCKER-USER", "FORWARD -j DOCKER-ISOLATION-STAGE-1",
				"FORWARD -o docker0 -j DOCKER"}
		}},
		// A program of the CNI, or a Docker that puts its jumps first.
		{name: "portmap", table: "nat", first: true, chains: func(f Family) map[string][]string {
			return map[string][]string{
				"CNI-HOSTPORT-DNAT": {"-p tcp -m tcp --dport 30080 -j CNI-DN-1"},
				"CNI-DN-1":          {"-p tcp -m tcp --dport 30080 " + dnat(f, 30, 80)},
			}
		}, jumps: func(Family) []string {
			return []string{"PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT",
				"OUTPUT -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT"}
		}},
		{name: "kube-proxy", table: "nat", first: true, keeps: true, chains: func(f Family,
		) map[string][]string {
			from := func(n int) string { return "-s " + own(f, n) + length(f) + " -j KUBE-MARK-MASQ" }
			return map[string][]string{
				"KUBE-MARK-MASQ": {"-j MARK --set-xmark 0x4000/0x4000"},
				"KUBE-SERVICES":  {"-d " + own(f, 10) + length(f) + " -p tcp -m tcp --dport 80 -j KUBE-SVC-A"},
				"KUBE-SVC-A": {"-m statistic --mode random --probability 0.50000000000 -j KUBE-SEP-A",
					"-j KUBE-SEP-B"},
				"KUBE-SEP-A": {from(11), "-p tcp " + dnat(f, 11, 8080)},
				"KUBE-SEP-B": {from(12), "-p tcp " + dnat(f, 12, 8080)},
				"KUBE-POSTROUTING": {"-m mark ! --mark 0x4000/0x4000 -j RETURN",
					"-j MARK --set-xmark 0x4000/0x0", "-j MASQUERADE"},
			}
		}, jumps: func(Family) []string {
			return []string{"PREROUTING -j KUBE-SERVICES", "OUTPUT -j KUBE-SERVICES",
				"POSTROUTING -j KUBE-POSTROUTING"}
		}},
		// Another mesh's, whose ports are its own.
		{name: "istio", table: "nat", chains: func(f Family) map[string][]string {
			return map[string][]string{
				"ISTIO_REDIRECT":    {"-p tcp -j REDIRECT --to-ports 25001"},
				"ISTIO_IN_REDIRECT": {"-p tcp -j REDIRECT --to-ports 25006"},
				"ISTIO_INBOUND":     {"-p tcp -m tcp --dport 8099 -j ISTIO_IN_REDIRECT"},
				"ISTIO_OUTPUT": {"-m owner --uid-owner 1337 -j RETURN", "-d " + loopback(f) + " -j RETURN",
					"-d " + own(f, 40) + length(f) + " -j ISTIO_REDIRECT"},
			}
		}, jumps: func(Family) []string {
			return []string{"PREROUTING -p tcp -j ISTIO_INBOUND", "OUTPUT -p tcp -j ISTIO_OUTPUT"}
		}},
		{name: "istio-first", table: "nat", first: true, chains: func(f Family) map[string][]string {
			return map[string][]string{
				"ISTIO_FIRST": {"-d " + own(f, 41) + length(f) + " -p tcp -j REDIRECT --to-ports 25001"},
			}
		}, jumps: func(Family) []string { return []string{"OUTPUT -p tcp -j ISTIO_FIRST"} }},
		{name: "fail2ban", table: "filter", first: true, chains: func(f Family) map[string][]string {
			return map[string][]string{
				"f2b-sshd": {"-s " + own(f, 66) + length(f) + " -j REJECT", "-j RETURN"},
				"f2b-web":  {"-s " + own(f, 67) + length(f) + " -j REJECT", "-j RETURN"},
			}
		}, jumps: func(Family) []string {
			return []string{"INPUT -p tcp -m multiport --dports 22 -j f2b-sshd",
				"INPUT -p tcp -m multiport --dports 8081,15006 -j f2b-web"}
		}},
		// ufw, with what our docs tell its users to let in; its restart flushes its own chains.
		{name: "ufw", table: "filter", keeps: true, chains: func(f Family) map[string][]string {
			prefix, related := "ufw-", "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"
			if f == IPv6 {
				prefix = "ufw6-"
			}
			return map[string][]string{
				prefix + "before-input": {"-i lo -j ACCEPT", related,
					"-m conntrack --ctstate INVALID -j DROP", "-j " + prefix + "user-input"},
				prefix + "before-output": {"-o lo -j ACCEPT", related},
				prefix + "user-input": {"-p tcp -m tcp --dport 8081 -j ACCEPT",
					"-p tcp -m tcp --dport 15006 -j ACCEPT"},
			}
		}, jumps: func(f Family) []string {
			if f == IPv6 {
				return []string{"INPUT -j ufw6-before-input", "OUTPUT -j ufw6-before-output"}
			}
			return []string{"INPUT -j ufw-before-input", "OUTPUT -j ufw-before-output"}
		}},
	}
}

// neighbourFaults are programs with rules of their own that come and go.
func neighbourFaults() (all []Fault) {
	for _, n := range neighbours() {
		all = append(all, Fault{Name: "neighbour-" + n.name, Weight: 1, Group: "neighbour-" + n.name,
			Shortest: 200 * time.Millisecond, Longest: 8 * time.Second,
			Begin: func(w *World, random *rand.Rand) (func() error, error) { return n.comes(w, random) },
		})
	}
	return append(all, Fault{Name: "neighbour-firewalld", Weight: 2, Group: "neighbour-firewalld",
		Shortest: 200 * time.Millisecond, Longest: 6 * time.Second, Begin: firewalld})
}

// write are the lines that make its chains what they are to be.
func (n neighbour) write(f Family) (lines []string) {
	chains := n.chains(f)
	var rules []string
	for _, chain := range sorted(chains) {
		lines = append(lines, ":"+chain+" - [0:0]")
		for _, rule := range chains[chain] {
			rules = append(rules, "-A "+chain+" "+rule)
		}
	}
	return append(lines, rules...)
}

func sorted(chains map[string][]string) (names []string) {
	for name := range chains {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// sync is what such a program does again and again: its chains in one transaction, then each jump
// that is missing.
func (n neighbour) sync(w *World, f Family) error {
	if err := w.restoreTable(f, n.table, n.write(f)...); err != nil {
		return err
	}
	for _, jump := range n.jumps(f) {
		chain, rule, _ := strings.Cut(jump, " ")
		words := strings.Fields(rule)
		args := func(what string) []string {
			return append([]string{"-t", n.table, what, chain}, words...)
		}
		if w.iptables(f, args("-C")...) == nil {
			continue
		}
		if !n.first {
			if err := w.iptables(f, args("-A")...); err != nil {
				return err
			}
			continue
		}
		repairs := 0
		if n.table == "nat" && chain != "POSTROUTING" {
			repairs = 1 // our jump goes before it
		}
		_ = w.edit("neighbour-"+n.name+" jump", f, repairs, nil, func() error {
			return w.iptables(f, args("-I")...)
		})
	}
	return nil
}

// comes starts it. What it wrote must be there when it goes, unless others flushed.
func (n neighbour) comes(w *World, random *rand.Rand) (end func() error, err error) {
	some := families(random)
	for _, f := range some {
		if err := n.sync(w, f); err != nil {
			w.Log("    neighbour-%s: not all done: %v", n.name, err) // others flush at the same time
		}
	}
	since := time.Now()
	stop := func() error { return nil }
	if n.keeps {
		stop = background(func(ctx context.Context) {
			for sleep(ctx, time.Second) {
				for _, f := range some {
					_ = n.sync(w, f) // the next one does
				}
			}
		})
	}
	return func() error {
		stop()
		for _, f := range some {
			n.look(w, f, since)
			n.goes(w, f)
		}
		return nil
	}, nil
}

// look notes what of its is not there any more.
func (n neighbour) look(w *World, f Family, since time.Time) {
	t, err := w.table(f, n.table)
	if err != nil {
		w.Log("    neighbour-%s: cannot look: %v", n.name, err)
		return
	}
	o := Observation{Kind: Foreign, Family: f, From: since, To: time.Now(), What: n.name}
	for chain, rules := range n.chains(f) {
		if len(t.rules[chain]) != len(rules) {
			o.Text = fmt.Sprintf("chain %s has %q, not %q", chain, t.rules[chain], rules)
		}
	}
	for _, jump := range n.jumps(f) {
		chain, rule, _ := strings.Cut(jump, " ")
		if i := strings.LastIndex(rule, "-j "); !slices.ContainsFunc(t.rules[chain], func(r string) bool {
			return strings.Contains(r, rule[i:])
		}) {
			o.Text = fmt.Sprintf("no %q in %q", jump, t.rules[chain])
		}
	}
	if o.Text != "" {
		w.Observe(o)
	}
}

// goes takes out what is still there.
func (n neighbour) goes(w *World, f Family) {
	for _, jump := range n.jumps(f) {
		if err := w.forget(f, n.table, jump); err != nil {
			w.Log("    neighbour-%s: %v", n.name, err)
		}
	}
	var flush, remove []string
	names := sorted(n.chains(f))
	for _, chain := range names {
		flush = append(flush, ":"+chain+" - [0:0]") // makes it, where somebody deleted it
		remove = append(remove, "-X "+chain)
	}
	var err error
	for range 5 {
		if err = w.restoreTable(f, n.table, append(slices.Clone(flush), remove...)...); err == nil {
			return
		}
	}
	w.Log("    neighbour-%s: %v", n.name, err)
}

// firewalldTable is firewalld's, with a nat chain behind ours or before, for its own traffic.
func firewalldTable(priority int) string {
	return fmt.Sprintf(`table inet firewalld {
	chain mangle_PREROUTING {
		type filter hook prerouting priority -140; policy accept;
	}
	chain nat_PREROUTING {
		type nat hook prerouting priority %[1]d; policy accept;
	}
	chain nat_OUTPUT {
		type nat hook output priority %[1]d; policy accept;
		ip daddr 10.98.0.1 tcp dport 80 counter dnat ip to 10.98.0.2:80
		ip6 daddr fd98::1 tcp dport 80 counter dnat ip6 to [fd98::2]:80
	}
	chain filter_INPUT {
		type filter hook input priority 10; policy accept;
		ct state { established, related } accept
		ct status dnat accept
		iifname "lo" accept
	}
}
`, priority)
}

// firewalld starts, which empties table nat of iptables, reloads some times, which does not, and
// stops, which does.
func firewalld(w *World, random *rand.Rand) (func() error, error) {
	priority := pick(random, []int{-90, -100, -110})
	load := func(head string) error {
		_, err := w.run(head+firewalldTable(priority), "nft", "-f", "-")
		return err
	}
	flush := func() error {
		for _, f := range []Family{IPv4, IPv6} {
			err := w.edit("firewalld flushes nat", f, 1, flushes, func() error {
				return w.restore(f, "-F", "-X")
			})
			if err != nil {
				return err
			}
		}
		return nil
	}
	whole := random.IntN(3) == 0
	if whole {
		if err := flush(); err != nil {
			return nil, err
		}
	}
	if err := load(""); err != nil {
		return nil, err
	}
	stop := background(func(ctx context.Context) {
		for sleep(ctx, 700*time.Millisecond) {
			// The first line makes it where somebody flushed the ruleset.
			if err := load("table inet firewalld\ndelete table inet firewalld\n"); err != nil {
				w.Log("    neighbour-firewalld: reload: %v", err)
			}
		}
	})
	return func() error {
		stop()
		_, err := w.run("table inet firewalld\ndelete table inet firewalld\n", "nft", "-f", "-")
		if err == nil && whole && w.Setting.Backend == string(lab.NFT) {
			err = flush()
		}
		return err
	}, nil
}
