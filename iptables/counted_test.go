package iptables

import (
	"reflect"
	"slices"
	"testing"
)

func TestParseCounted(t *testing.T) {
	const save = `*filter
[9:9] -A OUTPUT -j ACCEPT
COMMIT
*nat
:OUTPUT ACCEPT [7:420]
:X - [0:0]
[3:180] -A OUTPUT -p tcp -j X
-A OUTPUT -m comment --comment "a] -A X [1:2] b" -j X
[0:0] -A X -j RETURN
[a:1] -A X -p udp
COMMIT
`
	table, counters, err := ParseCounted(IPv4, []byte(save))
	if err != nil {
		t.Fatal(err)
	}
	want := Counters{"OUTPUT": {{3, 180, true}, {}}, "X": {{0, 0, true}, {}}}
	if !reflect.DeepEqual(counters, want) {
		t.Errorf("%+v\nwant %+v", counters, want)
	}
	if got := table.Rules("OUTPUT"); len(got) != 2 || got[0] != "-p tcp -j X" {
		t.Errorf("the rules are %q", got)
	}
	steps := []Step{{Chain: "OUTPUT", Index: 1}, {Chain: "X", Index: 1}, {Chain: "X"}}
	got, err := counters.Of(steps)
	if err != nil || !slices.Equal(got, []Counter{{3, 180, true}, {0, 0, true}, {}}) {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := counters.Of([]Step{{Chain: "OUTPUT", Index: 2}}); err == nil {
		t.Error("no error for a counter that is not known")
	}
	again(t, table, counters)
}

func again(t *testing.T, table Table, counters Counters) {
	t.Helper()
	same, counted, err := ParseCounted(table.family, []byte(table.Save(counters)))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range slices.Concat(chainsOf(table), chainsOf(same)) {
		if same.Has(name) != table.Has(name) || !slices.Equal(same.chains[name], table.chains[name]) {
			t.Errorf("chain %q: %q was read back as %q", name, table.chains[name], same.chains[name])
		}
		for i := range table.chains[name] {
			if counted[name][i] != counters[name][i] {
				t.Errorf("chain %q: %+v was read back as %+v", name, counters[name][i], counted[name][i])
			}
		}
	}
}

func chainsOf(t Table) (names []string) {
	for name := range t.chains {
		names = append(names, name)
	}
	return names
}

// FuzzSave: a table that was read is written so that it is read again as it was.
func FuzzSave(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, save []byte) {
		if table, counters, err := ParseCounted(IPv6, save); err == nil {
			again(t, table, counters)
		}
	})
}
