package iptables

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"
)

// TestAddAloneOvertaken: another program writes at the same moment, again and again. No rule is
// taken for refused because of that, not even where the probe's chain could not be made.
func TestAddAloneOvertaken(t *testing.T) {
	const (
		overtaken = "iptables: Resource temporarily unavailable."
		missing   = "iptables: No chain/target/match by that name."
	)
	for overtakings := range 3 * attempts {
		chain, left := false, overtakings
		run := func(_ context.Context, _ time.Duration, _ *ownPIDs, _ []byte, _ *bytes.Buffer,
			name string, args ...string) error {
			switch {
			case left > 0:
				left--
				return classify(name, 4, overtaken)
			case args[4] == "-N":
				chain = true
			case !chain:
				return classify(name, 1, missing)
			}
			return nil
		}
		k := &Kernel{machine: machine{run: run}}
		err := k.addAlone(t.Context(), tool{family: IPv4, list: "iptables-legacy"}, "-j RETURN")
		if enough := overtakings < attempts; enough && err != nil ||
			!enough && !errors.Is(err, ErrLocked) {
			t.Errorf("overtaken %d times: %v", overtakings, err)
		}
	}
}
