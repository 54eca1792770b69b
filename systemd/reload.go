package systemd

import (
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/service-proxy-agent/service-proxy-agent/internal/layout"
)

// Reload is what systemd knows of a unit's reloads.
type Reload struct {
	Can    bool // it has an ExecReload=
	Status int  // the exit status of the last; -1: there was none, or it did not end by itself
}

// ParseReload reads what `systemctl show --property=CanReload,ExecReload` prints:
//
//	ExecReload={ path=/usr/local/bin/x ; argv[]=x --reload ; … ; code=exited ; status=2 }
//	CanReload=yes
func ParseReload(show string) Reload {
	r := Reload{Status: -1}
	for line := range strings.Lines(show) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		switch key {
		case "CanReload":
			r.Can = value == "yes"
		case "ExecReload":
			r.Status = exitStatus(value)
		}
	}
	return r
}

// exitStatus is that of a command as systemctl shows it; -1: it did not exit.
func exitStatus(command string) int {
	fields := map[string]string{}
	for field := range strings.SplitSeq(strings.Trim(command, "{}"), " ; ") {
		key, value, _ := strings.Cut(strings.TrimSpace(field), "=")
		fields[key] = value
	}
	text, _, _ := strings.Cut(fields["status"], "/") // a signal's name follows
	status, err := strconv.Atoi(strings.TrimSpace(text))
	if err != nil || fields["code"] != "exited" {
		return -1
	}
	return status
}

// live are the settings of a service that its running main process need not know.
var live = []string{"ExecReload", "ExecStop", "ExecStopPost", "TimeoutStartSec", "TimeoutStopSec",
	"Restart", "RestartSec"}

// NeedsStart says whether this text of one of our units differs from the one that Install writes in
// what only a start of the unit brings: its command, its sandbox, its user.
func NeedsStart(have, unit string) bool {
	text, err := embedded.ReadFile("units/" + unit)
	if err != nil {
		panic(err) // embedded at build time
	}
	return !maps.EqualFunc(service(have), service(layout.Here.Text(string(text))), slices.Equal)
}

// service are the settings of a unit's section [Service] that are not live, each with its values in
// their order.
func service(text string) map[string][]string {
	all := map[string][]string{}
	section := ""
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		key, value, isSetting := strings.Cut(line, "=")
		switch {
		case strings.HasPrefix(line, "#"), strings.HasPrefix(line, ";"):
		case strings.HasPrefix(line, "["):
			section = line
		case isSetting && section == "[Service]" && !slices.Contains(live, key):
			all[key] = append(all[key], value)
		}
	}
	return all
}
