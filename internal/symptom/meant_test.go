package symptom

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// TestBrakeThatCannotBe: interception is not said to be off while the jumps may be in.
func TestBrakeThatCannotBe(t *testing.T) {
	for _, test := range []struct {
		family Family
		off    bool
	}{
		{Family{Family: iptables.IPv4}, true},
		{Family{Family: iptables.IPv6, Unusable: errors.New("no table")}, true},
		{Family{Family: iptables.IPv4, Err: iptables.ErrLocked}, false},
		{Family{Family: iptables.IPv4, Fighting: true}, false},
	} {
		findings := brake(Facts{Brake: Brake{Off: true}, Families: []Family{test.family}})
		if slices.ContainsFunc(findings, func(f Finding) bool {
			return strings.HasPrefix(f.Text(), "Interception is off")
		}) != test.off {
			t.Errorf("%+v: %+v", test.family, findings)
		}
	}
}
