package systemd

import (
	"strings"
	"testing"
)

// The lines are of systemd 252 and 257, run.
func TestParseReload(t *testing.T) {
	const line = "ExecReload={ path=/usr/local/bin/service-proxy-agent ; " +
		"argv[]=/usr/local/bin/service-proxy-agent envoy --reload ; ignore_errors=no ; " +
		"start_time=[Sun 2026-11-29 15:40:00 UTC] ; stop_time=[Sun 2026-11-29 15:40:01 UTC] ; pid=77 ; "
	for _, tt := range []struct {
		show string
		want Reload
	}{
		{"CanReload=yes\n" + line + "code=exited ; status=2 }\n", Reload{true, 2}},
		{"CanReload=yes\n" + line + "code=exited ; status=0 }\n", Reload{true, 0}},
		{"CanReload=yes\n" + line + "code=killed ; status=15/TERM }\n", Reload{true, -1}},
		{"CanReload=yes\nExecReload={ path=/bin/x ; argv[]=/bin/x ; ignore_errors=no ; " +
			"start_time=[n/a] ; stop_time=[n/a] ; pid=0 ; code=(null) ; status=0/0 }\n", Reload{true, -1}},
		{"CanReload=no\n", Reload{false, -1}},
		{"", Reload{false, -1}},
	} {
		if have := ParseReload(tt.show); have != tt.want {
			t.Errorf("%q: %+v, want %+v", tt.show, have, tt.want)
		}
	}
}

func TestNeedsStart(t *testing.T) {
	text, err := embedded.ReadFile("units/" + EnvoyUnit)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, old, new string
		want           bool
	}{
		{"the same", "", "", false},
		{"a comment", "[Service]\n", "# says more\n[Service]\n", false},
		{"a setting of another section", "[Install]\n", "[Install]\nAlias=x\n", false},
		{"what stops it", "RestartSec=1\n", "RestartSec=5\n", false},
		{"its command", "ExecStart=", "ExecStart=/usr/bin/nice ", true},
		{"its sandbox", "PrivateUsers=yes\n", "", true},
		{"a setting more", "[Service]\n", "[Service]\nOOMScoreAdjust=5\n", true},
	} {
		if !strings.Contains(string(text), tt.old) {
			t.Fatalf("%s: the unit has no %q", tt.name, tt.old)
		}
		changed := strings.Replace(string(text), tt.old, tt.new, 1)
		if have := NeedsStart(changed, EnvoyUnit); have != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, have, tt.want)
		}
	}
}
