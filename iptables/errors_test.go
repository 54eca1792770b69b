package iptables

import (
	"errors"
	"testing"
)

// TestNoTable: what the programs say where the kernel's modules are away, as it was seen on Debian
// 12's and 13's own kernels (docs/kernels.md), and what is near it and another thing.
func TestNoTable(t *testing.T) {
	for says, want := range map[string]error{
		"iptables v1.8.9 (legacy): can't initialize iptables table `nat': Table does not exist " +
			"(do you need to insmod?)": ErrNoTable,
		"iptables: Failed to initialize nft: Protocol not supported":                                   ErrNoTable,
		"iptables v1.8.11 (nf_tables): Could not fetch rule set generation id: Invalid argument":       ErrNoTable,
		"iptables v1.8.9 (nf_tables): Could not fetch rule set generation id: Permission denied (you…": ErrNotRoot,
	} {
		if err := classify("iptables", 4, says); !errors.Is(err, want) {
			t.Errorf("%q: %v, want %v", says, err, want)
		}
	}
}
