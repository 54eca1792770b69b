//go:build box

package box

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// entries are the journal's that match, as journalctl exports them.
func (v *VM) entries(match ...string) (all []map[string]any) {
	v.t.Helper()
	out := v.run("journalctl", append([]string{"--no-pager", "-q", "-o", "json"}, match...)...)
	for line := range strings.Lines(out) {
		var entry map[string]any
		if err := json.Unmarshal([]byte(line), &entry); err != nil {
			v.t.Fatalf("%v: %s", err, line)
		}
		all = append(all, entry)
	}
	return all
}

// waitEntry waits for one entry that matches, and returns it.
func (v *VM) waitEntry(match ...string) (entry map[string]any) {
	v.t.Helper()
	v.eventually(60*time.Second, "the journal has "+strings.Join(match, " "), func() error {
		all := v.entries(match...)
		if len(all) == 0 {
			return errors.New("it has none")
		}
		entry = all[0]
		return nil
	})
	return entry
}

// TestJournal: a failure is in the journal with its fields, journalctl -x says what it means, what
// its cause is and what to do next, and a journald that hangs holds up no pass.
func TestJournal(t *testing.T) {
	t.Parallel()
	for _, release := range releases() {
		t.Run(release, func(t *testing.T) {
			v := ready(t, options{release: release})
			v.checkProtected()
			v.checkBundle()
			v.checkCatalog()
			v.checkExplained()
			v.checkStuck()
			v.checkConsole()
			// Of all that our units have said by either way. (systemd's own lines about them are PID 1's.)
			for _, entry := range append(v.entries("_SYSTEMD_UNIT=service-proxy-agent.service"),
				v.entries("_SYSTEMD_UNIT=service-proxy-bootstrap.service")...) {
				if entry["SYSLOG_FACILITY"] != "1" {
					t.Errorf("rsyslog may write it to the console: %v", entry)
				}
			}
		})
	}
}

// checkCatalog: journald has the catalog, reads it without a complaint, and fills in what is as
// long as we let it be.
func (v *VM) checkCatalog() {
	v.t.Helper()
	list := v.run("journalctl", "--list-catalog")
	for _, k := range symptom.Kinds() {
		if want := k.ID.MessageID() + " service-proxy-agent: " + k.Title; !strings.Contains(list, want) {
			v.t.Errorf("the journal's catalog has no %q", want)
		}
	}
	if out := v.run("journalctl", "--update-catalog"); out != "" {
		v.t.Errorf("journalctl --update-catalog: %s", out)
	}
	const most = 4000 // systemd.Journal's
	cause := strings.Repeat("c", most)
	v.run("sh", "-c", fmt.Sprintf("printf 'MESSAGE_ID=%s\\nMESSAGE=long\\nSERVICE_PROXY_ID=test\\n"+
		"SERVICE_PROXY_CAUSE=%s\\nSERVICE_PROXY_NEXT=short\\n' | logger --journald",
		symptom.Bootstrap.MessageID(), cause))
	v.waitEntry("SERVICE_PROXY_ID=test")
	out := v.run("journalctl", "--no-pager", "-x", "SERVICE_PROXY_ID=test")
	if !strings.Contains(out, "Cause: "+cause+"\n") {
		v.t.Errorf("%d bytes of a cause are not filled in:\n%s", most, out)
	}
}

// checkExplained: Envoy is stopped, and comes back.
func (v *VM) checkExplained() {
	v.t.Helper()
	v.run("systemctl", "stop", "service-proxy-envoy.service")
	entry := v.waitEntry("MESSAGE_ID="+symptom.EnvoyDown.MessageID(), "SERVICE_PROXY_ID=envoy-down")
	for field, want := range map[string]string{
		"PRIORITY": "3", "SYSLOG_IDENTIFIER": "service-proxy-agent", "_TRANSPORT": "journal",
		"_SYSTEMD_UNIT":      "service-proxy-agent.service",
		"SERVICE_PROXY_NEXT": "see `systemctl status service-proxy-envoy` and /var/log/envoy/envoy.err.log",
		"MESSAGE":            fmt.Sprintf("%v; %v", entry["SERVICE_PROXY_CAUSE"], entry["SERVICE_PROXY_NEXT"]),
	} {
		if entry[field] != want {
			v.t.Errorf("%s is %v, want %q", field, entry[field], want)
		}
	}
	out := v.run("journalctl", "--no-pager", "-x", "-u", "service-proxy-agent")
	for _, want := range []string{
		fmt.Sprintf(": %s\n", entry["MESSAGE"]),
		"Subject: Envoy is not running\n",
		"Connections to services are",
		"docs/symptoms.md#envoy-down\n",
		fmt.Sprintf("Cause: %s\n", entry["SERVICE_PROXY_CAUSE"]),
		fmt.Sprintf("Next step: %s\n", entry["SERVICE_PROXY_NEXT"]),
	} {
		if !strings.Contains(out, want) {
			v.t.Errorf("journalctl -x does not show %q:\n%s", want, out)
		}
	}
	v.t.Logf("journalctl -x -u service-proxy-agent:\n%s", out)
	v.run("systemctl", "start", "service-proxy-envoy.service")
	v.waitEntry("MESSAGE_ID="+symptom.Over.MessageID(), "SERVICE_PROXY_ID=envoy-down")
	v.eventually(30*time.Second, "the service answers through Envoy", v.checkVIP)
}

// checkStuck stops journald, with its socket full, and then Envoy: passes go on, the failure is
// told outside, and in the journal when journald is back.
func (v *VM) checkStuck() {
	v.t.Helper()
	pid := v.property("systemd-journald.service", "MainPID")
	v.run("sh", "-c", "kill -STOP "+pid)
	filled := v.fillJournal()
	passes := func() (s status.Status) {
		out, _ := v.try("service-proxy-agent", "status", "-o", "json") // exits with 1: unhealthy
		if err := json.Unmarshal([]byte(out), &s); err != nil {
			v.t.Fatalf("%v: %s", err, out)
		}
		return s
	}
	// The signal, as systemctl's jobs may wait for a journald that hangs.
	before := passes()
	v.run("sh", "-c", `printf '[Service]\nRestart=no\n' >/run/no-restart.conf
mkdir -p /run/systemd/system/service-proxy-envoy.service.d
mv /run/no-restart.conf /run/systemd/system/service-proxy-envoy.service.d/
systemctl daemon-reload; kill -KILL `+v.envoyPID())
	v.eventually(90*time.Second, "the failure is told outside", func() error {
		if have := v.guest(guestattr.AgentLastFailure); !strings.HasPrefix(have, "Envoy is not running") {
			return fmt.Errorf("agent-last-failure is %q", have)
		}
		return nil
	})
	told := passes()
	v.eventually(30*time.Second, "passes go on", func() error {
		if have := passes(); have.Passes <= told.Passes {
			return fmt.Errorf("%d, then %d, then %d", before.Passes, told.Passes, have.Passes)
		}
		return nil
	})
	v.run("sh", "-c", "kill -CONT "+pid)
	v.eventually(60*time.Second, "journald tells it, by stderr", func() error {
		for _, entry := range v.entries("_TRANSPORT=stdout", "_SYSTEMD_UNIT=service-proxy-agent.service",
			"PRIORITY=3") {
			if strings.Contains(fmt.Sprint(entry["MESSAGE"]), "Z Envoy is not running") {
				return nil
			}
		}
		return errors.New("it does not")
	})
	v.run("sh", "-c", "rm -r /run/systemd/system/service-proxy-envoy.service.d; "+
		"systemctl daemon-reload; systemctl start service-proxy-envoy.service")
	v.eventually(30*time.Second, "the service answers through Envoy", v.checkVIP)
	v.t.Logf("journald was stopped with %d entries in its socket; %d passes until the failure was told",
		filled, told.Passes-before.Passes)
}

// fillJournal sends to journald, which is stopped, until its socket takes no more, and says how
// many entries it took.
func (v *VM) fillJournal() (filled int) {
	v.t.Helper()
	to := &unix.SockaddrUnix{
		Name: fmt.Sprintf("/proc/%d/root/run/systemd/journal/socket", v.leader)}
	for {
		// What a sender may have under way is less than the socket takes.
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			v.t.Fatal(err)
		}
		defer unix.Close(fd)
		before := filled
		for err = nil; err == nil; filled++ {
			err = unix.Sendto(fd, []byte("MESSAGE=filler\n"), unix.MSG_DONTWAIT, to)
		}
		filled--
		if !errors.Is(err, unix.EAGAIN) {
			v.t.Fatalf("after %d entries: %v", filled, err)
		}
		if filled == before {
			return filled
		}
	}
}

// checkConsole: with rsyslog as Compute Engine's images have it, a failure is on serial port 1
// once. The rule is the one line of their /etc/rsyslog.d/90-google.conf; the console is the serial
// port.
func (v *VM) checkConsole() {
	v.t.Helper()
	// Debian 13's rsyslog.service sees no device.
	v.run("sh", "-c", `mkdir -p /etc/rsyslog.d /etc/systemd/system/rsyslog.service.d
printf '[Service]\nPrivateDevices=no\n' >/etc/systemd/system/rsyslog.service.d/console.conf
echo 'daemon,kern.* /dev/ttyS0' >/etc/rsyslog.d/90-google.conf
DEBIAN_FRONTEND=noninteractive apt-get -q -y --no-install-recommends install rsyslog`)
	v.run("logger", "-p", "daemon.info", "canary")
	v.eventually(30*time.Second, "rsyslog writes to the console", func() error {
		if !strings.Contains(v.Serial(), " canary") {
			return errors.New("it has not")
		}
		return nil
	})
	before := len(v.Serial())
	v.run("systemctl", "stop", "service-proxy-envoy.service")
	const failure = "Envoy is not running: nothing accepts"
	v.eventually(60*time.Second, "rsyslog has the failure", func() error {
		_, err := v.try("grep", failure, "/var/log/syslog")
		return err
	})
	v.eventually(30*time.Second, "the failure is on serial port 1", func() error {
		if !strings.Contains(v.Serial()[before:], failure) {
			return errors.New("it is not")
		}
		return nil
	})
	v.run("logger", "-p", "daemon.info", "second canary") // comes after all before it
	v.eventually(30*time.Second, "rsyslog has written all", func() error {
		if !strings.Contains(v.Serial()[before:], " second canary") {
			return errors.New("it has not")
		}
		return nil
	})
	if serial := v.Serial()[before:]; strings.Count(serial, failure) != 1 {
		v.t.Errorf("serial port 1 tells it %d times:\n%s", strings.Count(serial, failure), serial)
	}
}
