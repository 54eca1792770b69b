//go:build box

package box

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
)

// A stand-in of Google's closed agent. Known of the real one, from Google's documents and a
// published dump of its rules: the unit's name, Envoy's path, admin port and interception port, the
// chains and the guest attributes. Not known, and made up here to be as unkind as may be: where its
// unit and program lie, as which user Envoy runs, that Envoy is its child, that it puts back within
// a second what others change, and that it takes its rules out when it ends, be it by TERM or by
// systemd's ExecStopPost=. Its Envoy is one with a configuration of its own, not Google's.
const (
	theirProgram = "/usr/lib/google-service-proxy/agent"
	theirUnit    = "/etc/systemd/system/service-proxy-agent.service"
	theirDropIn  = theirUnit + ".d/10-theirs.conf"
	theirLink    = "/etc/systemd/system/multi-user.target.wants/service-proxy-agent.service"
	theirUID     = 4242
	// theirEnvoyUnit is where Envoy has a unit of its own, in the second kind of stand-in.
	theirEnvoyUnit = "gce-envoy.service"

	theirService = `[Unit]
Description=Google Cloud Service Proxy Agent (a stand-in)
After=network-online.target
[Service]
Environment=LC_ALL=C
ExecStart=` + theirProgram + `
ExecStopPost=` + theirProgram + ` flush
Restart=always
[Install]
WantedBy=multi-user.target
`
	// theirEnvoyCommand is how their Envoy runs, in either kind of stand-in.
	theirEnvoyCommand = "setpriv --reuid 4242 --regid 4242 --clear-groups " +
		"/usr/local/bin/envoy -c /etc/gce-envoy.json --disable-hot-restart -l warn"

	theirEnvoyService = `[Unit]
Description=Envoy of the stand-in
[Service]
ExecStart=/usr/bin/` + theirEnvoyCommand + `
Restart=always
`
	// needs.service is an application that cannot do without that unit: a stop of it would stop this.
	needs = `[Unit]
After=service-proxy-agent.service
Requires=service-proxy-agent.service
[Service]
ExecStart=/usr/bin/sleep infinity
`
	// "$1" is flush, child (Envoy is started by it) or nothing.
	theirScript = `#!/bin/sh
attributes=http://metadata.google.internal/computeMetadata/v1/instance/guest-attributes
flush() {
	iptables -w 5 -t nat -D OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT
	for verb in -F -X; do
		for c in OUTPUT SERVICE_CIDRS SERVICE_PORTS REDIRECT; do
			iptables -w 5 -t nat $verb SERVICE_PROXY_$c
		done
	done
}
rules() {
	jump=
	iptables -w 5 -t nat -C OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT 2>/dev/null || jump="-A OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT"
	iptables-restore -w 5 --noflush <<END
*nat
:SERVICE_PROXY_OUTPUT - [0:0]
:SERVICE_PROXY_SERVICE_CIDRS - [0:0]
:SERVICE_PROXY_SERVICE_PORTS - [0:0]
:SERVICE_PROXY_REDIRECT - [0:0]
-A SERVICE_PROXY_OUTPUT -m owner --uid-owner 4242 -j RETURN
-A SERVICE_PROXY_OUTPUT -m owner --uid-owner 0 -j RETURN
-A SERVICE_PROXY_OUTPUT -d 127.0.0.1/32 -j RETURN
-A SERVICE_PROXY_OUTPUT -d 169.254.169.254/32 -j RETURN
-A SERVICE_PROXY_OUTPUT -j SERVICE_PROXY_SERVICE_CIDRS
-A SERVICE_PROXY_OUTPUT -j SERVICE_PROXY_SERVICE_PORTS
-A SERVICE_PROXY_SERVICE_CIDRS -d ` + "%s" + `/32 -j SERVICE_PROXY_REDIRECT
-A SERVICE_PROXY_REDIRECT -p tcp -j REDIRECT --to-ports 15001
$jump
COMMIT
END
}
[ "${1:-}" != flush ] || { flush; exit 0; }
trap 'flush; exit 0' TERM
%s
n=0
while :; do
	if ss -Hltn sport = :15001 | grep -q .; then
		iptables -w 5 -t nat -C SERVICE_PROXY_OUTPUT -m owner --uid-owner 4242 -j RETURN 2>/dev/null &&
			iptables -w 5 -t nat -C OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT 2>/dev/null || rules
	fi
	[ $((n %% 60)) != 0 ] || curl -s -m 2 -X PUT -H Metadata-Flavor:Google --data-binary "theirs $n" \
		$attributes/gce-service-proxy/agent-heartbeat
	n=$((n + 1))
	sleep 1 & wait $!
done
`
	// One more, which never comes to listen, is there as long as the agent: the next one of a loop
	// whose Envoy finds its ports in use is there for moments.
	theirChild = `cp -u /usr/bin/sleep /usr/lib/google-service-proxy/envoy
/usr/lib/google-service-proxy/envoy infinity &
while :; do
	` + theirEnvoyCommand + `
	sleep 0.2
done &`
)

// theirEnvoyConfig is a listener like Traffic Director's, without one.
const theirEnvoyConfig = `{"node": {"id": "theirs", "cluster": "cluster"},
"admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 15000}}},
"static_resources": {
 "listeners": [{"name": "TRAFFICDIRECTOR_INTERCEPTION_LISTENER", "traffic_direction": "OUTBOUND",
  "address": {"socket_address": {"address": "0.0.0.0", "port_value": 15001}},
  "listener_filters": [{"name": "envoy.filters.listener.original_dst", "typed_config":
   {"@type": "type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst"}}],
  "filter_chains": [{"filter_chain_match": {"prefix_ranges": [{"address_prefix": "%[1]s", "prefix_len": 32}], "destination_port": %[2]d},
   "filters": [{"name": "http", "typed_config": {
    "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
    "stat_prefix": "theirs", "http_filters": [{"name": "envoy.filters.http.router", "typed_config":
     {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}],
    "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"],
     "response_headers_to_add": [{"header": {"key": "%[3]s", "value": "web"}}, {"header": {"key": "x-theirs", "value": "yes"}}],
     "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "web"}}]}]}}}]}]}],
 "clusters": [{"name": "web", "type": "STATIC", "connect_timeout": "5s", "load_assignment": {"cluster_name": "web",
  "endpoints": [{"lb_endpoints": [{"endpoint": {"address": {"socket_address": {"address": "%[4]s", "port_value": %[5]d}}}}]}]}}]}}
`

// installTheirs puts the stand-in onto a root filesystem, enabled. own: Envoy has its own unit.
func installTheirs(t *testing.T, root string, own bool) {
	t.Helper()
	const packages = `apt-get -qq update && apt-get -qq -y install iptables ca-certificates >/dev/null`
	if out, err := exec.Command("chroot", root, "sh", "-c", packages).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	envoy, err := os.ReadFile(envoyBinary(t))
	if err != nil {
		t.Fatal(err)
	}
	child := theirChild
	if own {
		child = ""
	}
	link := filepath.Join(root, theirLink)
	files := map[string]string{
		theirProgram:                        fmt.Sprintf(theirScript, vip.Addr(), child),
		"/etc/systemd/system/needs.service": needs,
		theirUnit:                           theirService, theirDropIn: "[Service]\nNice=1\n",
		"/usr/local/bin/envoy": string(envoy),
		"/etc/gce-envoy.json": fmt.Sprintf(theirEnvoyConfig, vip.Addr(), vip.Port(),
			controlplane.ServedByHeader, lab.EndpointAddr(1), endpointPort),
	}
	if own {
		files["/lib/systemd/system/"+theirEnvoyUnit] = theirEnvoyService
		files["/etc/systemd/system/service-proxy-agent.service"] = strings.Replace(theirService,
			"[Service]", "Wants="+theirEnvoyUnit+"\nAfter="+theirEnvoyUnit+"\n[Service]", 1)
	}
	for name, text := range files {
		path := filepath.Join(root, name)
		mode := os.FileMode(0o644)
		if name == theirProgram || filepath.Base(name) == "envoy" {
			mode = 0o755
		}
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755),
			os.WriteFile(path, []byte(text), mode), os.Chmod(path, mode)); err != nil {
			t.Fatal(err)
		}
	}
	err = errors.Join(os.MkdirAll(filepath.Dir(link), 0o755), os.Symlink(theirUnit, link))
	if err != nil {
		t.Fatal(err)
	}
}

// served says who answers for the service: the stand-in's Envoy, or ours.
func (v *VM) served(theirs bool) error {
	resp, err := v.lab.VM.HTTPAs(12345).Get("http://" + vip.String() + "/")
	if err != nil {
		return err
	}
	resp.Body.Close()
	if have := resp.Header.Get("x-theirs") == "yes"; have != theirs ||
		resp.Header.Get(controlplane.ServedByHeader) != "web" {
		return fmt.Errorf("served by %q, theirs: %v", resp.Header.Get(controlplane.ServedByHeader), have)
	}
	return nil
}

// kills kills -9 at random moments whichever unit of the take-over runs then, until that was done
// so often or it is ended.
func (v *VM) kills(r *rand.Rand, most int) (end func() (killed []string)) {
	ctx, cancel := context.WithCancel(context.Background())
	var killed []string
	var all sync.WaitGroup
	all.Go(func() {
		began := time.Now()
		for len(killed) < most {
			select {
			case <-time.After(time.Duration(r.IntN(200)) * time.Millisecond):
			case <-ctx.Done():
				return
			}
			unit := "service-proxy-take-over.service" // which is there for moments
			if r.IntN(6) == 0 {
				unit = "service-proxy-bootstrap.service"
			}
			if _, err := v.try("systemctl", "kill", "--kill-who=all", "-s", "KILL", unit); err == nil {
				killed = append(killed, fmt.Sprintf("%s after %.1f s", unit, time.Since(began).Seconds()))
			}
		}
	})
	return func() []string { cancel(); all.Wait(); return killed }
}

// handed ends a load during which one Envoy took the place of another: none went past Envoy, and
// what was refused or cut was so in the time without one. That has a limit where nobody was killed,
// which adds what systemd waits until it starts that again.
func (l *load) handed(t *testing.T, what string, kills int) {
	t.Helper()
	limit := 2 * time.Second
	if os.Getenv("SOAK") == "" {
		limit *= 5
	}
	total, failed, gap := l.stop()
	t.Logf("%s: of %d new connections %d escaped, %d were lost (%d refused, %d cut), "+
		"the longest time without one was %v", what, total, len(l.unexplained), failed,
		failed-l.cut-len(l.unexplained), l.cut, gap)
	if len(l.unexplained) > 0 {
		t.Errorf("%s: %d went another way or hung, first %s", what, len(l.unexplained), l.unexplained[0])
	}
	if kills == 0 && gap > limit {
		t.Errorf("%s: the gap for new connections was %v, want at most %v", what, gap, limit)
	}
	if total-failed < l.perSecond {
		t.Errorf("%s: only %d connections were made", what, total-failed)
	}
}

// theirsIsBack says whether the stand-in is as it was before.
func (v *VM) theirsIsBack(before map[string]string) error {
	if err := v.served(true); err != nil {
		return err
	}
	for name, want := range map[string]string{"FragmentPath": theirUnit, "ActiveState": "active",
		"UnitFileState": "enabled", "DropInPaths": theirDropIn, "Nice": "1"} {
		if have := v.property("service-proxy-agent.service", name); have != want {
			return fmt.Errorf("%s of its unit is %q, want %q", name, have, want)
		}
	}
	for name, want := range before {
		if have := v.sum(name); have != want {
			return fmt.Errorf("%s is %q, was %q", name, have, want)
		}
	}
	return nil
}

func (v *VM) sum(name string) string {
	out, err := v.try("sh", "-c", `[ -L "$0" ] && readlink "$0"; sha256sum <"$0"; stat -c %a "$0"`, name)
	if err != nil {
		return err.Error()
	}
	return out
}

// TestTakeOver installs a release archive over the stand-in, under load, and gives it back; then
// has it come over ours, which says so and fights nobody, and takes over by command.
func TestTakeOver(t *testing.T) {
	t.Parallel()
	kinds := map[string]bool{"its Envoy is its child": false}
	if os.Getenv("SOAK") != "" {
		kinds["its Envoy has a unit"] = true
	}
	for name, own := range kinds {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			v := newVM(t, options{prepare: func(root string) { installTheirs(t, root, own) }})
			v.takeOver(t)
		})
	}
}

func (v *VM) takeOver(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	v.boot()
	v.eventually(30*time.Second, "the stand-in serves", func() error { return v.served(true) })
	before := map[string]string{}
	for _, name := range []string{theirUnit, theirDropIn, theirLink, theirProgram,
		"/usr/local/bin/envoy"} {
		before[name] = v.sum(name)
	}

	// kill -9 of whoever takes over, and of whoever gives back. (comesOverOurs has the former, too.)
	rounds := [][2]int{{0, 3}}
	if os.Getenv("SOAK") != "" {
		rounds = [][2]int{{0, 0}, {3, 3}, {1, 1}, {2, 2}, {3, 3}, {4, 4}, {5, 5}, {6, 6}}
	}
	for _, kills := range rounds {
		what := fmt.Sprintf("take-over with %d kills", kills[0])
		v.run("systemctl", "start", "needs.service")
		needs := v.property("needs.service", "MainPID")
		jumps := v.watchJump()
		load := v.startLoad(200)
		ended := v.kills(r, kills[0])
		v.install()
		v.eventually(120*time.Second, "ours serves", func() error { return v.served(false) })
		t.Logf("killed: %q", ended())
		v.waitFinished(90 * time.Second)
		v.eventually(30*time.Second, "ours is ready", func() error {
			_, err := v.try("service-proxy-agent", "wait", "--timeout", "1s")
			return err
		})
		load.handed(t, what, kills[0])
		if out := jumps(); out != "" {
			t.Errorf("%s: the jump was taken out:\n%s", what, out)
		}
		v.checkTaken(t)
		if have := v.property("needs.service", "MainPID"); have != needs {
			t.Errorf("%s: an application that requires the unit had pid %s, and has %s", what, needs, have)
		}

		// And back.
		what = fmt.Sprintf("give-back with %d kills", kills[1])
		jumps, load = v.watchJump(), v.startLoad(200)
		for range kills[1] {
			after := time.Duration(100+r.IntN(3000)) * time.Millisecond
			out, err := v.try("timeout", "-s", "KILL", fmt.Sprintf("%.3f", after.Seconds()),
				"service-proxy-agent", "bootstrap", "--remove")
			t.Logf("--remove killed after %v: %v, it had said %d lines", after, err,
				strings.Count(out, "\n"))
		}
		if _, err := v.try("test", "-e", "/usr/local/bin/service-proxy-agent"); err == nil {
			t.Log(v.run("service-proxy-agent", "bootstrap", "--remove"))
		}
		v.eventually(30*time.Second, "the stand-in is back", func() error { return v.theirsIsBack(before) })
		load.handed(t, what, kills[1])
		if out := jumps(); out != "" {
			t.Errorf("%s: the jump was taken out:\n%s", what, out)
		}
		if left := v.run("sh", "-c", "find / -xdev \\( -name 'service-proxy-*' -o -name '*take-over*' \\) "+
			"-not -path '/proc/*' -not -path '/var/log/journal/*' -not -path '/etc/systemd/system/*service-proxy-agent.service*'"); left != "" {
			t.Errorf("left behind:\n%s", left)
		}
		v.platform.ResetBudget()
	}
	v.comesOverOurs(t, r, before)
}

// checkTaken checks that ours is in its place, and nothing of it runs.
func (v *VM) checkTaken(t *testing.T) {
	t.Helper()
	if have := v.property("service-proxy-agent.service",
		"FragmentPath"); have != "/usr/local/lib/systemd/system/service-proxy-agent.service" {
		t.Errorf("our unit is %s", have)
	}
	if have := v.property("service-proxy-agent.service", "DropInPaths"); have != "" {
		t.Errorf("our unit has drop-ins: %s", have)
	}
	if out, err := v.try("systemctl", "is-enabled", "service-proxy-agent.service",
		"service-proxy-envoy.service"); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	if out := v.run("sh", "-c", "ps -eo uid,args 2>/dev/null || for p in /proc/[0-9]*; do "+
		"stat -c %u $p; tr '\\0' ' ' <$p/cmdline; echo; done 2>/dev/null"); strings.Contains(out, theirProgram) ||
		strings.Contains(out, "gce-envoy.json") {
		t.Errorf("it still runs:\n%s", out)
	}
	v.eventually(10*time.Second, "the kernel has our rules", func() error {
		if out, err := v.try("service-proxy-agent", "diff"); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	if rules := v.run("iptables-save", "-t", "nat"); strings.Contains(rules, "uid-owner 4242") {
		t.Errorf("the rules are\n%s", rules)
	}
	if state := v.state(); state.Status != progress.Finished {
		t.Errorf("bootstrap: %+v", state)
	}
}

// comesOverOurs has the stand-in be installed over ours, as a recipe that somebody forgot would.
func (v *VM) comesOverOurs(t *testing.T, r *rand.Rand, before map[string]string) {
	ended := v.kills(r, 3)
	v.install()
	v.eventually(120*time.Second, "ours serves", func() error { return v.served(false) })
	t.Logf("killed: %q", ended())
	v.waitFinished(90 * time.Second)
	// Its unit first, without a daemon-reload: from that on systemd takes nothing that our daemon
	// tells it, and its watchdog would have theirs started instead within half a minute.
	v.run("sh", "-c",
		"cp -r /usr/local/lib/service-proxy-agent/take-over/files/etc/systemd/system/. /etc/systemd/system")
	said := len(v.Serial())
	out, err := v.try("service-proxy-agent", "bootstrap")
	if err != nil {
		t.Errorf("beside ours, which runs: %v\n%s", err, out)
	}
	// Ours goes on, and tells of it.
	v.eventually(40*time.Second, "it is told of", func() error {
		status, _ := v.asks("service-proxy-agent", "status")
		if !strings.Contains(status, "Google's own agent is on this VM, too") ||
			!strings.Contains(status, theirUnit) {
			return errors.New(status)
		}
		return nil
	})
	told := func() string { return v.Serial()[said:] }
	if os.Getenv("SOAK") != "" { // what it says at its start may have taken the attribute's minute
		told = func() string { return v.guest(guestattr.AgentLastFailure) }
	}
	v.eventually(90*time.Second, "it is told of outside", func() error {
		if have := told(); !strings.Contains(have, "--take-over") {
			return fmt.Errorf("it is %q", have)
		}
		return nil
	})
	if err := v.served(false); err != nil {
		t.Error(err)
	}
	v.run("systemctl", "daemon-reload")
	v.run("systemctl", "restart", "service-proxy-agent.service")
	v.eventually(20*time.Second, "it runs", func() error {
		if have := v.property("service-proxy-agent.service", "FragmentPath"); have != theirUnit {
			return fmt.Errorf("the unit is %s", have)
		}
		_, err := v.try("systemctl", "is-active", "service-proxy-agent.service")
		return err
	})
	if out, code := v.asks("service-proxy-agent", "doctor"); code != 1 ||
		!strings.Contains(out, "its process is ") {
		t.Errorf("doctor: exit code %d\n%s", code, out)
	}
	v.bootstrapAgain()
	v.waitFailure(60*time.Second, "another agent", theirUnit, "--take-over")
	out, code := v.asks("service-proxy-agent", "bootstrap", "--take-over")
	t.Log(out)
	if code != 0 || !strings.Contains(out, "moved aside "+theirUnit) {
		t.Errorf("exit code %d", code)
	}
	v.eventually(60*time.Second, "ours serves", func() error { return v.served(false) })
	v.waitFinished(60 * time.Second)
	v.checkTaken(t)
	if out, code := v.asks("service-proxy-agent", "bootstrap", "--take-over"); code != 0 ||
		!strings.Contains(out, "nothing to take over") {
		t.Errorf("again: exit code %d: %s", code, out)
	}
	v.run("service-proxy-agent", "bootstrap", "--remove")
	v.eventually(30*time.Second, "the stand-in is back", func() error { return v.theirsIsBack(before) })
}
