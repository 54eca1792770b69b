//go:build box

package box

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// checkQuiet: a first boot at which nothing is wrong says of nothing that it is, neither to those
// who look from outside nor on the VM. Envoy is not there from the start, and that is no failure.
func (v *VM) checkQuiet(t *testing.T) {
	t.Helper()
	if have := v.guest(guestattr.AgentLastFailure); have != "" {
		t.Errorf("agent-last-failure %q after a boot at which all went well", have)
	}
	for line := range strings.Lines(v.Serial()) {
		if strings.Contains(line, "service-proxy") && !strings.Contains(line, " INFO") {
			t.Errorf("on the serial port: %s", line)
		}
	}
	if serial := v.Serial(); strings.Contains(serial, "not running") {
		t.Errorf("the serial port says that Envoy is not running:\n%s", serial)
	}
	said := func(args ...string) string {
		return v.run("journalctl", append(args, "--no-pager", "-q", "-t", "service-proxy-agent")...)
	}
	if lines := said("-p", "warning"); lines != "" {
		t.Errorf("in the journal:\n%s", lines)
	}
	if lines := said("-o", "cat"); !strings.Contains(lines, "started") {
		t.Errorf("the journal has nothing of the agent:\n%s", lines)
	}
	v.run("service-proxy-agent", "status")
	v.run("service-proxy-agent", "diff")
	v.doctor(0)
	if out, code := v.asks("setpriv", "--reuid=nobody", "--clear-groups", "service-proxy-agent",
		"doctor"); code != 2 || !strings.Contains(out, "needs root") {
		t.Errorf("doctor as another user: exit code %d\n%s", code, out)
	}
}

// doctor has doctor find each of these, with the same exit code in both forms.
func (v *VM) doctor(code int, want ...symptom.ID) {
	v.t.Helper()
	text, inText := v.asks("service-proxy-agent", "doctor")
	report, inJSON := v.asks("service-proxy-agent", "doctor", "-o", "json")
	if inText != code || inJSON != code {
		v.t.Errorf("doctor: exit codes %d and %d, want %d:\n%s", inText, inJSON, code, text)
	}
	for _, id := range want {
		if !strings.Contains(text, " "+string(id)+": ") ||
			!strings.Contains(report, strconv.Quote(string(id))) {
			v.t.Errorf("doctor does not find %s:\n%s", id, text)
		}
	}
}

// asks runs a command of which the exit code is of interest.
func (v *VM) asks(name string, args ...string) (out string, code int) {
	v.t.Helper()
	out, err := v.try(name, args...)
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		v.t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	if exit != nil {
		code = exit.ExitCode()
	}
	return out, code
}

// written is what is in the box's writable layer and in /run: path to kind and time of change.
func (v *VM) written(t *testing.T) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(v.upper, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			if os.IsNotExist(err) { // gone meanwhile
				return nil
			}
			return err
		}
		info, err := entry.Info()
		if err != nil || entry.IsDir() {
			return nil // gone meanwhile, or a folder that is only there to hold the rest
		}
		all[strings.TrimPrefix(path, v.upper)] = info.ModTime().String()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(
		v.run("find", "/run", "-not", "-type", "d", "-printf", "%p %t\n")) {
		path, changed, _ := strings.Cut(strings.TrimSpace(line), " ")
		all[path] = changed
	}
	return all
}

// mayWrite is the README's list, and what else changes while packages and users are
// added and systemd works.
var mayWrite = regexp.MustCompile(`^(` + strings.Join([]string{
	// "What it writes on your VM".
	`/var/lib/service-proxy-agent/.*`, `/run/service-proxy-agent/.*`, `/usr/local/bin/(service-proxy-agent|envoy)`,
	`/usr/local/lib/(service-proxy-agent|systemd/(system|catalog)|tmpfiles\.d|sysusers\.d)/.*`, `/etc/service-proxy-agent/.*`, `/var/log/envoy/.*`,
	`/usr/local/share/man/man8/service-proxy-agent[a-z-]*\.8`,
	`/usr/local/share/(bash-completion/completions|zsh/site-functions)/_?service-proxy-agent`,
	`/etc/fish/completions/service-proxy-agent\.fish`,
	`/etc/systemd/system/[a-z-]+\.target\.wants/service-proxy-[a-z]+\.(service|path|timer)`, `/run/xtables\.lock`, `/run/service-proxy-[a-z-]+(\.lock|/.*)?`,
	// The users.
	`/etc/\.?(passwd|shadow|group|gshadow)(-|\.lock|\.pwd\.lock)?`, `/etc/\.pwd\.lock`,
	// apt and dpkg, beside the files of the packages themselves; certificates are
	// made at installation.
	`/var/(lib|cache|log)/(apt|dpkg|debconf|ldconfig|alternatives)/.*`, `/var/log/(dpkg|alternatives|apt/.*)\.log`, `/etc/ld\.so\.cache`,
	`/etc/(alternatives|ssl/certs|ca-certificates)/.*`, `/etc/networks`,
	`/usr/sbin/(ip|ip6|arp|eb)tables(-save|-restore)?`, // alternatives
	`/etc/ca-certificates\.conf(\.new)?`, `/usr/share/(man|doc)/.*`,
	// systemd's own.
	`/run/(systemd|log|dbus|lock|udev)/.*`, `/run/utmp`, `/var/(log/journal|lib/systemd|tmp/systemd-private-[^/]*|log/wtmp|lib/private)/?.*`, `/tmp/systemd-private-.*`,
	// The box's: its tests enable the application, and gcloud's archive goes.
	`/etc/systemd/system/service-proxy-ready\.target\.wants/application\.service`, `/tmp/tmp\..*`,
}, "|") + `)$`)

// checkWritten: the installation has written the README's list and nothing else.
func (v *VM) checkWritten(t *testing.T, before map[string]string) {
	t.Helper()
	packaged := map[string]bool{}
	for line := range strings.Lines(
		v.run("sh", "-c",
			`for f in /var/local/repo/*.deb; do dpkg -L "$(dpkg-deb -f "$f" Package)" 2>/dev/null; done; true`)) {
		packaged[strings.TrimSpace(line)] = true
		packaged["/usr"+strings.TrimSpace(line)] = true // /sbin and /lib are links to below /usr
	}
	after := v.written(t)
	var extra []string
	for path, changed := range after {
		if before[path] != changed && !mayWrite.MatchString(path) && !packaged[path] {
			extra = append(extra, path)
		}
	}
	slices.Sort(extra)
	if len(extra) > 0 {
		t.Errorf("written, and not in the README's list:\n%s", strings.Join(extra, "\n"))
	}
	// The look itself works: it sees what must be there.
	for _, path := range []string{
		"/usr/local/bin/envoy", "/var/lib/service-proxy-agent/bootstrap.json", "/etc/service-proxy-agent/envoy.json", "/run/xtables.lock"} {
		if after[path] == "" || before[path] == after[path] {
			t.Errorf("%s was not written", path)
		}
	}
}

// checkUnits: the processes have the user and the capabilities that docs/units.md tells, systemd
// knows every line of the units, and each unit's exposure is what docs/security.md says.
func (v *VM) checkUnits(t *testing.T) {
	t.Helper()
	const netAdminNetRaw = "0000000000003000"
	for _, p := range []struct{ unit, user, caps string }{
		{"service-proxy-agent.service", "service-proxy-agent", netAdminNetRaw},
		{"service-proxy-envoy.service", "envoy", "0000000000000000"},
	} {
		status := v.run("cat", "/proc/"+v.property(p.unit, "MainPID")+"/status")
		uid := strings.TrimSpace(v.run("id", "-u", p.user))
		want := regexp.MustCompile(`(?s)\nUid:\t` + uid + `\t` + uid + `\t.*\nCapEff:\t` + p.caps +
			`\nCapBnd:\t` + p.caps + `\n.*\nNoNewPrivs:\t1\nSeccomp:\t2\n`)
		if !want.MatchString(status) {
			t.Errorf("%s: want %s, have\n%s", p.unit, want, status)
		}
	}
	for unit, most := range map[string]float64{"agent": 1.7, "envoy": 1.1, "bootstrap": 2.8,
		"interception": 1.7, "ready": 1.2, "rotate": 1.1} {
		out, err := v.try("systemd-analyze", "security", "--no-pager", "service-proxy-"+unit+".service")
		score := regexp.MustCompile(`exposure level for \S+: ([0-9.]+)`).FindStringSubmatch(out)
		if err != nil || score == nil {
			t.Errorf("systemd-analyze security %s: %v: %s", unit, err, out)
			continue
		}
		// Each systemd weighs a little differently.
		if have, err := strconv.ParseFloat(score[1], 64); err != nil || have > most+0.3 {
			t.Errorf("the exposure of %s is %s, want %.1f", unit, score[1], most)
		}
	}
	if out, err := v.try("sh", "-c",
		"systemd-analyze verify $(ls /usr/local/lib/systemd/system/service-proxy-* "+
			"/usr/lib/systemd/system/service-proxy-* 2>/dev/null) 2>&1 | grep /lib/systemd/system/service-proxy"); err == nil {
		t.Errorf("systemd-analyze verify:\n%s", out)
	}
	if next := v.property("service-proxy-rotate.timer", "NextElapseUSecMonotonic"); next == "" ||
		next == "infinity" {
		t.Errorf("the rotation's timer elapses next at %q", next)
	}
}

// checkWatchdog: systemd ends an agent that hangs and starts another; its stack is in the journal,
// and the rules stay. (WatchdogSec is 30 in the unit; 2 here, to be short.)
func (v *VM) checkWatchdog(t *testing.T) {
	t.Helper()
	if have := v.property("service-proxy-agent.service", "WatchdogUSec"); have != "30s" {
		t.Errorf("WatchdogSec=%s, want 30s", have)
	}
	v.run("sh", "-c", `mkdir -p /run/systemd/system/service-proxy-agent.service.d
printf '[Service]\nWatchdogSec=2\n' >/run/systemd/system/service-proxy-agent.service.d/watchdog.conf
systemctl daemon-reload; systemctl restart service-proxy-agent.service`)
	pid := v.agentPID()
	jumps := v.watchJump()
	v.run("sh", "-c", "kill -STOP "+pid)
	v.eventually(30*time.Second, "another agent runs", func() error {
		if have := v.agentPID(); have == pid || have == "0" {
			return fmt.Errorf("pid %s", have)
		}
		if state := v.property("service-proxy-agent.service", "ActiveState"); state != "active" {
			return fmt.Errorf("it is %s", state)
		}
		return nil
	})
	if out := jumps(); out != "" {
		t.Errorf("the rules went:\n%s", out)
	}
	// By that the run which follows tells it.
	if owner := strings.TrimSpace(v.run("stat", "-c", "%U", "/run/service-proxy-agent/hung")); owner !=
		"service-proxy-agent" {
		t.Errorf("the mark of the run that hung is %q's", owner)
	}
	journal := v.run("journalctl", "--no-pager", "-o", "cat", "-u", "service-proxy-agent.service")
	for _, word := range []string{"Watchdog timeout", "SIGABRT: abort", "goroutine 1 "} {
		if !strings.Contains(journal, word) {
			t.Errorf("the journal has no %q", word)
		}
	}
	if err := v.checkVIP(); err != nil {
		t.Error(err)
	}
	v.eventually(10*time.Second, "the hang is told", func() error {
		out, _ := v.asks("service-proxy-agent", "status") // test/e2e looks at the attribute
		words := strings.Join(strings.Fields(out), " ")   // lines are broken
		if !strings.Contains(words, "hung and was restarted by systemd's watchdog") {
			return fmt.Errorf("status says\n%s", out)
		}
		return nil
	})
	v.doctor(0, symptom.AgentStuck)
}

// watchJump looks at the rules all the time until end is called, which returns the first ones that
// had no jump or no row for the service: "" if they always had.
func (v *VM) watchJump() (end func() string) {
	ctx, cancel := context.WithCancel(context.Background())
	bad := make(chan string, 1)
	go func() {
		looks := 0
		for {
			rules, err := v.lab.VM.Run(ctx, "iptables-save", "-t", "nat")
			if ctx.Err() != nil {
				break
			}
			looks++
			if err != nil || !strings.Contains(rules, "-A OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT") ||
				!strings.Contains(rules, "-d "+vip.Addr().String()+"/32") {
				bad <- fmt.Sprintf("look %d: %v\n%s", looks, err, rules)
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
		if looks == 0 {
			bad <- "nobody looked"
			return
		}
		bad <- ""
	}()
	return func() string { cancel(); return <-bad }
}
