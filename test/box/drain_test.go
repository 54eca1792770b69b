//go:build box

package box

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestPlannedStop restarts Envoy while a connection goes on that nobody ends, and then stops it
// when it is idle, just after a hot restart: the Envoy before still answers whoever is connected to
// it. The restart keeps the jumps, so that new connections wait for Envoy's own start only, and the
// stop takes them out before nobody accepts any more.
func TestPlannedStop(t *testing.T) {
	t.Parallel()
	for _, release := range releases() {
		t.Run(release, func(t *testing.T) { plannedStop(t, release) })
	}
}

func plannedStop(t *testing.T, release string) {
	v := ready(t, options{release: release})
	held, err := v.lab.VM.DialAs(context.Background(), 12345, vip)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if _, err := io.WriteString(held, "GET / HTTP/1.1\r\nHost: held\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if resp, err := http.ReadResponse(bufio.NewReader(held), nil); err != nil ||
		resp.StatusCode != http.StatusOK {
		t.Fatal(resp, err)
	}

	jumps := v.watchJump()
	load := v.startLoad(100)
	time.Sleep(time.Second)
	start := time.Now()
	v.run("systemctl", "restart", "service-proxy-envoy.service")
	took := time.Since(start)
	v.eventually(30*time.Second, "the service answers through Envoy", v.checkVIP)
	load.outage(t, "a restart with one connection that went on")
	t.Logf("it took %.1f s", took.Seconds())
	if out := jumps(); out != "" {
		t.Errorf("the jump was taken out for a restart:\n%s", out)
	}
	if took < 5*time.Second {
		t.Errorf("the restart took %v: the old connection was not waited for", took)
	}

	held.Close()
	v.eventually(30*time.Second, "ready again", func() error {
		_, err := v.try("service-proxy-agent", "wait", "--timeout", "1s")
		return err
	})
	v.run("systemctl", "reload", "service-proxy-envoy.service")
	v.run("systemctl", "stop", "service-proxy-envoy.service")
	if rules := v.run("iptables-save", "-t", "nat"); strings.Contains(rules,
		"-A OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT") || !strings.Contains(rules, "SERVICE_PROXY_SERVICE_CIDRS") {
		t.Errorf("Envoy is stopped; want the chains without the jump, have\n%s", rules)
	}
	if left := v.run("sh", "-c",
		"ls -d /dev/shm/envoy_* /run/service-proxy-envoy 2>/dev/null || true"); left != "" {
		t.Errorf("Envoy is stopped and has left\n%s", left)
	}
	// Whoever fills the VM's shared memory does not keep Envoy from starting. (A small one, to be full
	// at once.)
	v.run("mount", "-o", "remount,size=8k", "/dev/shm")
	_, _ = v.try("su", "-s", "/bin/sh", "-c", "cat /dev/zero >/dev/shm/full", "nobody")
	if out, err := v.try("sh", "-c", "echo x >/dev/shm/more"); err == nil {
		t.Errorf("/dev/shm is not full: %s", out)
	}
	v.run("systemctl", "start", "service-proxy-envoy.service")
	v.eventually(30*time.Second, "the service answers through Envoy", v.checkVIP)
	v.checkKilled(t)
}

// checkKilled kills Envoy, and the supervisor while two epochs run: in each case systemd starts it
// anew and tells how it ended, and nothing of before is left.
func (v *VM) checkKilled(t *testing.T) {
	t.Helper()
	const unit = "service-proxy-envoy.service"
	processes := func() []string {
		return strings.Fields(v.run("sh", "-c", "cat /sys/fs/cgroup/system.slice/"+unit+
			"/cgroup.procs /sys/fs/cgroup/systemd/system.slice/"+unit+"/cgroup.procs 2>/dev/null || true"))
	}
	kill := map[string]func(){
		"Envoy": func() {
			main := v.envoyPID()
			for _, pid := range processes() {
				if pid != main {
					v.run("sh", "-c", "kill -9 "+pid)
				}
			}
		},
		"the supervisor in a drain": func() {
			v.run("systemctl", "reload", unit)
			if n := len(processes()); n != 3 {
				t.Errorf("%d processes after a reload, want the supervisor and two epochs", n)
			}
			if now := v.property(unit, "StatusText"); now != "epoch 1 serves, epoch 0 drains" {
				t.Errorf("`systemctl status` says %q", now)
			}
			v.run("systemctl", "kill", "--kill-who=main", "--signal=KILL", unit)
		},
	}
	for what, kill := range kill {
		before, restarts := v.envoyPID(), v.property(unit, "NRestarts")
		old := processes()
		kill()
		v.eventually(30*time.Second, "another one runs after the death of "+what, func() error {
			if pid := v.envoyPID(); pid == before || pid == "0" {
				return fmt.Errorf("pid %s", pid)
			}
			return v.checkVIP()
		})
		if now := v.property(unit, "NRestarts"); now == restarts {
			t.Errorf("%s: systemd counts %s restarts", what, now)
		}
		now := processes()
		for _, pid := range old {
			if slices.Contains(now, pid) {
				t.Errorf("%s: %s still runs, of %v", what, pid, old)
			}
		}
		memory := strings.Fields(v.run("sh", "-c", "ls /proc/"+v.envoyPID()+"/root/dev/shm/envoy_*"))
		if len(now) != 2 || len(memory) != 1 {
			t.Errorf("%s: processes %v, shared memory %v", what, now, memory)
		}
	}
	journal := v.run("journalctl", "--no-pager", "-o", "cat", "-u", unit)
	for _, words := range []string{"epoch 1 serves, epoch 0 drains", "ended by signal 9",
		"code=killed, status=9/KILL"} {
		if !strings.Contains(journal, words) {
			t.Errorf("the journal has no %q:\n%s", words, journal)
		}
	}
}
