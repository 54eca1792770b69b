//go:build lab

package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	goiptables "github.com/coreos/go-iptables/iptables"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// neighbour is another program on the VM, built as flannel and the CNI's portmap plugin are, on
// coreos/go-iptables: it has a jump at the head of OUTPUT and PREROUTING, rules in POSTROUTING, and
// chains of its own that come and go with pods. Its methods are called by one goroutine.
type neighbour struct {
	vm      *lab.Namespace
	ipt     *goiptables.IPTables
	family  string // of the test's messages
	subnet  string
	random  *rand.Rand
	pods    []string // chains that are there
	next    int
	inserts int    // of its jump
	packets uint64 // that its rule in POSTROUTING has counted
}

// The neighbour's chains, of the plugin's names.
const (
	hostPorts = "CNI-HOSTPORT-DNAT"
	flannel   = "FLANNEL-POSTRTG"
)

var (
	podJump  = []string{"-m", "addrtype", "--dst-type", "LOCAL", "-j", hostPorts}
	masqJump = []string{"-m", "comment", "--comment", "flanneld masq", "-j", flannel}
)

func newNeighbour(t *testing.T, m *mesh.Mesh, backend lab.Backend, family string,
	seed uint64) *neighbour {
	t.Helper()
	program, proto, subnet := "iptables-", goiptables.ProtocolIPv4, "10.244.0.0/16"
	if family == "IPv6" {
		program, proto, subnet = "ip6tables-", goiptables.ProtocolIPv6, "fd44::/64"
	}
	path, err := exec.LookPath(program + string(backend))
	must(t, err)
	n := &neighbour{vm: m.VM, family: family, subnet: subnet,
		random: rand.New(rand.NewPCG(seed, uint64(proto)))}
	must(t, n.do("find iptables", func() (err error) {
		n.ipt, err = goiptables.New(goiptables.IPFamily(proto), goiptables.Path(path))
		return err
	}))
	return n
}

// do runs f in the VM: what go-iptables starts there is in its network namespace.
func (n *neighbour) do(what string, f func() error) error {
	if err := n.vm.Do(f); err != nil {
		return fmt.Errorf("%s: %s: %w", n.family, what, err)
	}
	return nil
}

// sync is what such a program does each some 100 ms.
func (n *neighbour) sync() error {
	steps := []func() error{
		func() error { return n.ensure(flannel) },
		func() error {
			return n.ipt.AppendUnique("nat", flannel, "-s", n.subnet, "-d", n.subnet, "-j", "RETURN")
		},
		func() error { return n.ipt.AppendUnique("nat", "POSTROUTING", masqJump...) },
		func() error { return n.ensure(hostPorts) },
		n.insert("PREROUTING"),
		n.insert("OUTPUT"),
		n.pod,
	}
	for i, step := range steps {
		if err := n.do(fmt.Sprintf("sync, step %d", i+1), step); err != nil {
			return err
		}
		time.Sleep(time.Duration(n.random.IntN(15)) * time.Millisecond) // not in step with anything
	}
	return n.do("read", n.read)
}

// ensure makes a chain that is not there.
func (n *neighbour) ensure(chain string) error {
	there, err := n.ipt.ChainExists("nat", chain)
	if err == nil && !there {
		err = n.ipt.NewChain("nat", chain)
	}
	return err
}

// insert puts its jump first where it is missing.
func (n *neighbour) insert(builtin string) func() error {
	return func() error {
		there, err := n.ipt.Exists("nat", builtin, podJump...)
		if err == nil && !there {
			n.inserts++
		}
		return errors.Join(err, n.ipt.InsertUnique("nat", builtin, 1, podJump...))
	}
}

// pod has one come, change, or go.
func (n *neighbour) pod() error {
	dnat := func(chain string) []string {
		return []string{"-p", "tcp", "--dport", fmt.Sprint(30000 + n.random.IntN(1000)), "-j", "RETURN",
			"-m", "comment", "--comment", chain}
	}
	switch i := n.random.IntN(3); {
	case i == 0 || len(n.pods) == 0:
		n.next++
		chain := fmt.Sprintf("CNI-DN-%d", n.next)
		if err := n.ipt.ClearChain("nat", chain); err != nil {
			return err
		}
		n.pods = append(n.pods, chain)
		return errors.Join(n.ipt.AppendUnique("nat", chain, dnat(chain)...),
			n.ipt.AppendUnique("nat", hostPorts, "-p", "tcp", "-j", chain))
	case i == 1:
		chain := n.pods[n.random.IntN(len(n.pods))]
		return errors.Join(n.ipt.ClearChain("nat", chain),
			n.ipt.AppendUnique("nat", chain, dnat(chain)...))
	}
	chain := n.pods[0]
	n.pods = n.pods[1:]
	return errors.Join(n.ipt.DeleteIfExists("nat", hostPorts, "-p", "tcp", "-j", chain),
		n.ipt.ClearAndDeleteChain("nat", chain))
}

// read looks as such programs do, and holds what it reads against what it wrote.
func (n *neighbour) read() error {
	chains, err := n.ipt.ListChains("nat")
	if err != nil {
		return fmt.Errorf("ListChains: %w", err)
	}
	for _, chain := range slices.Concat([]string{hostPorts, flannel, "OUTPUT"}, n.pods) {
		if !slices.Contains(chains, chain) {
			return fmt.Errorf("ListChains: no %s in %q", chain, chains)
		}
	}
	for _, builtin := range []string{"OUTPUT", "PREROUTING"} {
		there, err := n.ipt.Exists("nat", builtin, podJump...)
		if err != nil || !there {
			return fmt.Errorf("Exists: its jump in %s: %v %w", builtin, there, err)
		}
		rules, err := n.ipt.List("nat", builtin)
		if err != nil {
			return fmt.Errorf("List: %w", err)
		}
		if linesWith(rules, "-j "+hostPorts) != 1 || !strings.HasPrefix(rules[0], "-P ") {
			return fmt.Errorf("List: %q", rules)
		}
	}
	rules, err := n.ipt.ListWithCounters("nat", "POSTROUTING")
	if err != nil {
		return fmt.Errorf("ListWithCounters: %w", err)
	}
	if linesWith(rules, "-j "+flannel) != 1 || linesWith(rules, " -c ") != len(rules) {
		return fmt.Errorf("ListWithCounters: %q", rules)
	}
	for _, rule := range rules {
		if _, counted, ok := strings.Cut(rule, "flanneld masq\" -c "); ok {
			var packets uint64
			if _, err := fmt.Sscan(counted, &packets); err != nil || packets < n.packets {
				return fmt.Errorf("ListWithCounters: %d packets, before %d: %w", packets, n.packets, err)
			}
			n.packets = packets
		}
	}
	rules, err = n.ipt.List("nat", hostPorts)
	if err != nil || len(rules) != len(n.pods)+1 {
		return fmt.Errorf("List: %q for %q: %w", rules, n.pods, err)
	}
	for i, chain := range n.pods {
		if rules[i+1] != fmt.Sprintf("-A %s -p tcp -j %s", hostPorts, chain) {
			return fmt.Errorf("List: rule %d is %q, its pod %q", i+1, rules[i+1], chain)
		}
	}
	return nil
}

// again has its jump in OUTPUT go and come, as a restart of it does.
func (n *neighbour) again() error {
	return n.do("restart", func() error {
		n.inserts++
		return errors.Join(n.ipt.DeleteIfExists("nat", "OUTPUT", podJump...),
			n.ipt.InsertUnique("nat", "OUTPUT", 1, podJump...))
	})
}

func linesWith(lines []string, part string) (n int) {
	for _, line := range lines {
		if strings.Contains(line, part) {
			n++
		}
	}
	return n
}

// ourJumpFirst fails unless ours heads OUTPUT, and its is there once.
func (n *neighbour) ourJumpFirst() (first bool, rules []string, err error) {
	err = n.do("List", func() error {
		rules, err = n.ipt.List("nat", "OUTPUT")
		return err
	})
	first = len(rules) > 1 && rules[1] == "-A OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT" &&
		linesWith(rules, "-j "+hostPorts) == 1
	return first, rules, err
}

// TestNeighbour: beside a program that is built on coreos/go-iptables, in both families at once,
// while services change and the agent does not get to run now and then. Its jump goes to the head
// a few times, which is put right and is no fight; what it reads is always what it wrote; no
// connection of ours goes another way.
func TestNeighbour(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, backend lab.Backend) {
		m, a := start(t, mesh.Options{Backend: backend, Config: services()})
		must(t, a.WaitReady(within(t, 20*time.Second)))
		seed := uint64(time.Now().UnixNano())
		t.Logf("seed %d", seed)
		random := rand.New(rand.NewPCG(seed, 0))
		steady := m.Steady(lab.SteadyOptions{From: m.VM, UID: 1000,
			To: []netip.AddrPort{web4, web6}, PerSecond: 20, HTTP: true})
		lasts := time.Duration(soak(300, 4)) * time.Second
		ctx, stop := context.WithTimeout(t.Context(), lasts)
		defer stop()
		var neighbours []*neighbour
		var wg sync.WaitGroup
		for _, family := range []string{"IPv4", "IPv6"} {
			n := newNeighbour(t, m, backend, family, seed)
			neighbours = append(neighbours, n)
			wg.Go(func() {
				syncs, restarted := 0, time.Now()
				for ; ctx.Err() == nil; syncs++ {
					if err := n.sync(); err != nil {
						t.Error(err)
						return
					}
					// Fewer than five within eight seconds: those would be a fight.
					if time.Since(restarted) > 2500*time.Millisecond {
						if err := n.again(); err != nil {
							t.Error(err)
							return
						}
						restarted = time.Now()
					}
				}
				t.Logf("%s: %d syncs, %d inserts, %d packets", family, syncs, n.inserts, n.packets)
			})
		}
		for ctx.Err() == nil {
			var all []controlplane.Service
			for range random.IntN(20) {
				all = append(all, both(random.IntN(60)))
			}
			_, err := m.CP.Set(services(distinct(all)...))
			must(t, err)
			if random.IntN(4) == 0 {
				must(t, syscall.Kill(a.PID(), syscall.SIGSTOP))
				time.Sleep(time.Duration(random.IntN(200)) * time.Millisecond)
				must(t, syscall.Kill(a.PID(), syscall.SIGCONT))
			}
			time.Sleep(time.Duration(50+random.IntN(200)) * time.Millisecond)
		}
		wg.Wait()
		counts := steady.Stop()
		t.Logf("connections: %v", counts)
		if counts.Bad() != 0 || counts.OK < 10 {
			t.Errorf("connections: %v", counts)
		}
		inserts := 0
		for _, n := range neighbours {
			inserts += n.inserts
			eventually(t, 5*time.Second, n.family+": our jump first", func() (bool, string) {
				first, rules, err := n.ourJumpFirst()
				return first, fmt.Sprintf("%q %v", rules, err)
			})
			must(t, n.do("read at the end", n.read))
			if n.packets == 0 {
				t.Errorf("%s: its rule in POSTROUTING has counted nothing", n.family)
			}
		}
		eventually(t, 20*time.Second, "no difference", func() (bool, string) {
			text, code := diff(t, m, a, 0)
			return code == 0, text
		})
		s, err := a.Status(t.Context())
		must(t, err)
		if hasFinding(s, symptom.Fight) {
			t.Errorf("told as a fight: %+v", s.Findings)
		}
		if int(s.Undone) > inserts || s.Undone == 0 {
			t.Errorf("%d repairs after %d inserts", s.Undone, inserts)
		}
	})
}
