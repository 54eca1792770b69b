//go:build kernel

package iptables

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// drift is one way in which others undo our rules: commands for iptables, or for nft where
// there is no such command.
type drift struct {
	name string
	kind DriftKind
	// do are arguments of iptables -t nat, one command a string.
	do []string
	// nftDo are arguments of nft; such a drift exists on that backend only.
	nftDo string
}

var drifts = []drift{
	{name: "rule removed", kind: RuleRemoved, do: []string{"-D SERVICE_PROXY_SERVICE_CIDRS 2"}},
	{name: "proxy's rule removed", kind: RuleRemoved, do: []string{"-D SERVICE_PROXY_OUTPUT 1"}},
	{name: "chain flushed", kind: ChainFlushed, do: []string{"-F SERVICE_PROXY_SERVICE_CIDRS"}},
	{name: "chain deleted", kind: ChainRemoved, do: []string{"-D SERVICE_PROXY_OUTPUT -j SERVICE_PROXY_SERVICE_PORTS", "-F SERVICE_PROXY_SERVICE_PORTS", "-X SERVICE_PROXY_SERVICE_PORTS"}},
	{name: "jump removed", kind: JumpRemoved, do: []string{"-D OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT"}},
	{name: "inbound jump removed", kind: JumpRemoved, do: []string{"-D PREROUTING -p tcp -j SERVICE_PROXY_INBOUND"}},
	{name: "jump doubled", kind: JumpDoubled, do: []string{"-A OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT"}},
	{name: "jump changed", kind: JumpChanged, do: []string{"-R OUTPUT 1 -j SERVICE_PROXY_OUTPUT"}},
	{name: "foreign rule in our chain", kind: ForeignRule, do: []string{"-I SERVICE_PROXY_OUTPUT 1 -p tcp -j ACCEPT"}},
	{name: "reordered", kind: Reordered, do: []string{"-D SERVICE_PROXY_SERVICE_CIDRS 1", "-A SERVICE_PROXY_SERVICE_CIDRS -d FIRST -j SERVICE_PROXY_REDIRECT"}},
	{name: "port changed", kind: RuleChanged, do: []string{"-R SERVICE_PROXY_REDIRECT 1 -p tcp -j REDIRECT --to-ports 15009"}},
	{name: "target changed", kind: RuleChanged, do: []string{"-R SERVICE_PROXY_SERVICE_CIDRS 1 -d FIRST -j RETURN"}},
	{name: "iptables -t nat -F", kind: TableFlushed, do: []string{"-F"}},
	{name: "nft flush ruleset", kind: TableFlushed, nftDo: "flush ruleset"},
	{name: "shadowed by ACCEPT", kind: Shadowed, do: []string{"-I OUTPUT 1 -p tcp -j ACCEPT"}},
	{name: "shadowed in another's chain", kind: Shadowed, do: []string{"-N CANARY", "-A CANARY -p tcp --dport 80 -j REDIRECT --to-ports 1", "-I OUTPUT 1 -j CANARY"}},
	{name: "shadowed inbound", kind: Shadowed, do: []string{"-I PREROUTING 1 -j ACCEPT"}},
	{name: "jump not first", kind: JumpMoved, do: []string{"-I OUTPUT 1 -p tcp -j MARK --set-mark 1"}},
}

// run does the damage, each command of which must succeed.
func (d drift) run(t testing.TB, backend string, f Family) {
	t.Helper()
	for _, c := range d.commands(backend, f) {
		sh(t, c[0], c[1:]...)
	}
}

// try does as much of the damage as there is something to damage.
func (d drift) try(backend string, f Family) {
	for _, c := range d.commands(backend, f) {
		exec.Command(c[0], c[1:]...).Run()
	}
}

func (d drift) commands(backend string, f Family) (commands [][]string) {
	first := "10.1.2.3/32"
	if f == IPv6 {
		first = "fd00::1/128"
	}
	for _, c := range d.do {
		args := strings.Fields(strings.ReplaceAll(c, "FIRST", first))
		commands = append(
			commands, append([]string{command(backend, f, ""), "-w", "5", "-t", "nat"}, args...))
	}
	if d.nftDo != "" {
		commands = append(commands, append([]string{"nft"}, strings.Fields(d.nftDo)...))
	}
	return commands
}

func TestDriftIsFoundAndRepaired(t *testing.T) {
	eachBackend(t, func(t *testing.T, k *Kernel, f Family) {
		want := sample(f).Ruleset()
		apply(t, k, want)
		for _, d := range drifts {
			if d.nftDo != "" && k.Backend() != NFT {
				continue
			}
			// MARK is not valid in legacy's table nat.
			if d.kind == JumpMoved && k.Backend() == Legacy {
				d.do = []string{"-I OUTPUT 1 -p tcp -j LOG"}
			}
			d.run(t, k.Backend(), f)
			have := read(t, k, f)
			found := Diff(want, have)
			if !slices.ContainsFunc(found, func(x Drift) bool { return x.Kind == d.kind }) {
				t.Errorf("%s: found %v, want %v among them", d.name, found, d.kind)
			}
			result, err := k.Apply(t.Context(), NewPlan(want, have))
			if err != nil || len(result.Drift) > 0 {
				t.Fatalf("%s: repair: %v, still %v", d.name, err, result.Drift)
			}
			have = read(t, k, f)
			if left := Diff(want, have); len(left) > 0 {
				t.Fatalf("%s: after the repair: %v", d.name, left)
			}
			if !have.Ours().Equal(want) {
				t.Fatalf("%s: after the repair:\n%s", d.name, have.Ours())
			}
			if p := NewPlan(want, have); !p.Empty() {
				t.Fatalf("%s: a plan for equal rules:\n%s", d.name, p)
			}
		}
	})
}

// TestReadingSomeChainsSaysTheSame: what stands before our jumps is worded alike whether
// the whole table was read or only the chain that was touched, which is what follows
// every notification on nft.
func TestReadingSomeChainsSaysTheSame(t *testing.T) {
	eachBackend(t, func(t *testing.T, k *Kernel, f Family) {
		logs := []string{"-N LOGS", "-A LOGS -j LOG", "-N DEEPER", "-A DEEPER -j LOG",
			"-A LOGS -j DEEPER"}
		for _, test := range []struct {
			name string
			do   []string
			kind DriftKind
		}{
			{"a chain that only logs", append(logs, "-I OUTPUT 1 -j LOGS"), JumpMoved},
			{"the same behind our first jump", append(logs, "-I OUTPUT 2 -j LOGS"), JumpMoved},
			{"a chain behind it takes packets", append(logs, "-A DEEPER -p tcp --dport 80 -j ACCEPT", "-I OUTPUT 1 -j LOGS"), Shadowed},
			{"a chain that is not reached before our jumps", append(logs, "-A DEEPER -j ACCEPT", "-A OUTPUT -j LOGS"), 0},
		} {
			clear(t, k.Backend(), f)
			want := sample(f).Ruleset()
			apply(t, k, want)
			before := read(t, k, f)
			drift{do: test.do}.run(t, k.Backend(), f)
			some, err := k.ReadChains(t.Context(), before, []string{builtinOutput})
			if err != nil {
				t.Fatal(err)
			}
			whole, part := Diff(want, read(t, k, f)), Diff(want, some)
			if !slices.Equal(whole, part) {
				t.Errorf("%s: the whole table says %v, the chain %v", test.name, whole, part)
			}
			if test.kind == 0 && len(whole) > 0 ||
				test.kind != 0 && (len(whole) != 1 || whole[0].Kind != test.kind) {
				t.Errorf("%s: %v, want %v", test.name, whole, test.kind)
			}
		}
	})
}

func read(t testing.TB, k *Kernel, f Family) Table {
	t.Helper()
	have, err := k.Read(t.Context(), f)
	if err != nil {
		t.Fatal(err)
	}
	return have
}

// apply makes the kernel equal to want, and fails if it is not afterwards.
func apply(t testing.TB, k *Kernel, want Ruleset) Result {
	t.Helper()
	result, err := k.Apply(t.Context(), NewPlan(want, read(t, k, want.Family())))
	if err != nil {
		t.Fatal(err)
	}
	if len(result.Drift) > 0 {
		t.Fatalf("after apply: %v", result.Drift)
	}
	return result
}

// TestNestedBuckets: the kernel takes the deepest ruleset that a set of services can make. Without
// nodeDepth nft refuses the IPv6 one with "Too many links".
func TestNestedBuckets(t *testing.T) {
	eachBackend(t, func(t *testing.T, k *Kernel, f Family) {
		apply(t, k, serviceSet(f, nestedPrefixes(f)))
	})
}
