package systemd

import (
	"strings"
	"testing"
)

// What systemd 252 printed in a box right after `systemctl reload`, and 257 but for times and numbers,
// of units with these ExecReload=, the last but one past its TimeoutStartSec=: systemctl returns
// before that command has ended.
func TestParseReload(t *testing.T) {
	const sh = "ExecReload={ path=/bin/sh ; argv[]=/bin/sh -c exit 2 ; ignore_errors=no ; "
	for _, tt := range []struct {
		name, show string
		want       Reload
	}{
		{"none yet", sh + "start_time=[n/a] ; stop_time=[n/a] ; pid=0 ; code=(null) ; status=0/0 }\n" +
			"CanReload=yes\n", Reload{true, -1}},
		{"exit 2", sh + "start_time=[Sun 2026-11-29 16:26:59 UTC] ; " +
			"stop_time=[Sun 2026-11-29 16:26:59 UTC] ; pid=79 ; code=exited ; status=2 }\n" +
			"CanReload=yes\n", Reload{true, 2}},
		{"exit 0", "ExecReload={ path=/bin/true ; argv[]=/bin/true ; ignore_errors=no ; " +
			"start_time=[Sun 2026-11-29 16:26:59 UTC] ; stop_time=[Sun 2026-11-29 16:26:59 UTC] ; " +
			"pid=86 ; code=exited ; status=0 }\nCanReload=yes\n", Reload{true, 0}},
		{"too long", "ExecReload={ path=/bin/sleep ; argv[]=/bin/sleep 100 ; ignore_errors=no ; " +
			"start_time=[Sun 2026-11-29 16:26:59 UTC] ; stop_time=[n/a] ; pid=93 ; code=(null) ; " +
			"status=0/0 }\nCanReload=yes\n", Reload{true, -1}},
		{"no ExecReload=", "CanReload=no\n", Reload{false, -1}},
		{"no systemd", "", Reload{false, -1}},
	} {
		if have := ParseReload(tt.show); have != tt.want {
			t.Errorf("%s: %+v, want %+v", tt.name, have, tt.want)
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
