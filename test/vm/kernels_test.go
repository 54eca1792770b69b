//go:build vm

package vm

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/machine"
	"github.com/service-proxy-agent/service-proxy-agent/test/vm/seen"
)

// releases are the Debians whose kernels are booted: 5.10, 6.1, 6.12.
var releases = []string{"bullseye", "bookworm", "trixie"}

// slow is the limit of what is waited for. An emulated processor on a busy machine is fifty times
// as slow as one of its own, so that no figure here is a bound; those are held by test/e2e and
// test/box.
const slow = 10 * time.Minute

// TestKernels is the life of a VM on each kernel with each backend.
func TestKernels(t *testing.T) {
	for _, release := range releases {
		for _, backend := range lab.Backends {
			t.Run(release+"-"+string(backend), func(t *testing.T) {
				t.Parallel()
				life(t, release, backend)
			})
		}
	}
}

// TestArm64 is the first hour of a VM of the other architecture, of which a build says little.
func TestArm64(t *testing.T) {
	v, have := first(t, "bookworm", "arm64", lab.NFT)
	if machine := strings.TrimSpace(v.run("uname", "-m")); machine != "aarch64" {
		t.Errorf("it is %s", machine)
	}
	v.step(t, "drift", v.drift)
	v.step(t, "hot restart", v.hotRestart)
	v.eventually(slow, "doctor finds nothing, and has had the time to look at all", func() error {
		if out, code := v.exit("service-proxy-agent", "doctor"); code != 0 {
			return errors.New(out)
		}
		return nil
	})
	keep(t, have)
}

// first makes and boots a VM, installs the release there, and waits until all of the mesh works.
func first(t *testing.T, release, arch string, backend lab.Backend) (*VM, seen.Kernel) {
	t.Helper()
	v := newVM(t, release, arch)
	v.boot()
	v.prepare()
	v.choose(backend)
	v.install()
	if !strings.Contains(v.Serial(), "finished: Envoy ") {
		t.Errorf("serial port 1 does not tell the end of bootstrap:\n%s", v.Serial())
	}
	have := seen.Kernel{Release: release, Arch: arch, Backend: string(backend),
		Kernel:   majority.FindString(v.run("uname", "-r")),
		IPTables: strings.Fields(v.run("iptables", "--version"))[1],
		Systemd:  strings.Fields(v.run("systemctl", "--version"))[1]}
	t.Logf("%+v", have)
	return v, have
}

func life(t *testing.T, release string, backend lab.Backend) {
	v, have := first(t, release, runtime.GOARCH, backend)
	step := func(name string, do func()) {
		v.step(t, name, do)
		if *update {
			keep(t, have) // a later step may take the rest of the time
		}
	}
	step("drift", v.drift)
	step("hot restart", v.hotRestart)
	step("cut", v.cut)
	for _, module := range modules[backend] {
		step("without "+module, func() { have.Absent = append(have.Absent, v.absent(module)) })
	}
	step("without a folder", func() { have.Absent = append(have.Absent, v.folderGone()) })
	step("loading off", func() { have.Absent = append(have.Absent, v.loadingOff()) })
	if backend == lab.NFT { // it is the same on both
		step("conntrack", func() { have.Conntrack = v.conntrack() })
		step("clock", func() { have.Ahead, have.Behind = v.clock() })
	}
	keep(t, have)
}

// step is a part of its life: the next is lived, too, where one fails.
func (v *VM) step(t *testing.T, name string, do func()) {
	t.Run(name, func(t *testing.T) {
		whole := v.t
		v.t = t
		defer func() { v.t = whole }()
		start := time.Now()
		do()
		t.Logf("took %.0f s", time.Since(start).Seconds())
	})
}

// choose makes a backend that of the plain names, as the owner of a VM does.
func (v *VM) choose(backend lab.Backend) {
	v.t.Helper()
	for _, family := range []string{"iptables", "ip6tables"} {
		v.run("update-alternatives", "--set", family, "/usr/sbin/"+family+"-"+string(backend))
	}
}

// modules are what each backend needs, and what one might think that it does.
var modules = map[lab.Backend][]string{
	lab.NFT:    {"ip6table_nat", "nft_compat", "nft_chain_nat", "nf_nat", "xt_owner"},
	lab.Legacy: {"ip6table_nat", "iptable_nat", "nf_nat", "xt_owner"},
}

// status is what the daemon knows.
func (v *VM) status() (s status.Status, err error) {
	out, err := v.try("service-proxy-agent", "status", "-o", "json")
	if json.Unmarshal([]byte(out), &s) != nil {
		return s, fmt.Errorf("%w: %s", err, out)
	}
	return s, nil
}

// drift takes rules away in each family, and waits until they are back.
func (v *VM) drift() {
	v.t.Helper()
	for _, command := range []string{
		"iptables -t nat -D OUTPUT 1", "ip6tables -t nat -D OUTPUT 1",
		"iptables -t nat -F SERVICE_PROXY_SERVICE_CIDRS", "ip6tables -t nat -F SERVICE_PROXY_INBOUND",
		"iptables -t nat -F; ip6tables -t nat -F",
	} {
		before, err := v.status()
		if err != nil {
			v.t.Fatal(err)
		}
		v.run("sh", "-c", command)
		took := v.eventually(slow, "it is repaired: "+command, func() error {
			now, err := v.status()
			if err != nil {
				return err
			}
			if now.Undone == before.Undone {
				return errors.New("no repair was counted")
			}
			if out, code := v.exit("service-proxy-agent", "diff"); code != 0 {
				return errors.New(out)
			}
			return errors.Join(v.outbound(vip), v.outbound(vip6))
		})
		v.t.Logf("repaired, looked at and used within %.1f s: %s", took.Seconds(), command)
	}
}

// hotRestart has the next Envoy take over from the one that runs, under the same supervisor: in the
// control group of a real unit Envoy warns of what it lacks there.
func (v *VM) hotRestart() {
	v.t.Helper()
	pid := func() string {
		return v.run("systemctl", "show", "--property=MainPID", "--value", "service-proxy-envoy")
	}
	before := pid()
	start := time.Now()
	v.run("systemctl", "reload", "service-proxy-envoy")
	v.t.Logf("a hot restart took %.0f s", time.Since(start).Seconds())
	if have := pid(); have != before {
		v.t.Errorf("the supervisor was pid %s, and is %s", before, have)
	}
	if out := v.run("journalctl", "--no-pager", "-u", "service-proxy-envoy"); !strings.Contains(out,
		"epoch 1 serves") {
		v.t.Errorf("no second epoch serves:\n%s", out)
	}
	v.working()
}

// cut resets the VM while services come and go and somebody takes rules away.
func (v *VM) cut() {
	v.t.Helper()
	v.write("/run/churn", `#!/bin/sh
while :; do
	iptables -w -t nat -D OUTPUT 1; ip6tables -w -t nat -F SERVICE_PROXY_OUTPUT; sleep 0.7
done
`, 0o755)
	v.run("systemd-run", "-q", "sh", "/run/churn") // some mount /run noexec
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for n := 0; ; n++ {
			select {
			case <-stop:
				v.push()
				return
			case <-time.After(300 * time.Millisecond):
				v.push(netip.AddrFrom4([4]byte{10, 78, byte(n), 1}))
			}
		}
	}()
	time.Sleep(7 * time.Second) // the changes' own time
	v.reset()
	close(stop)
	<-stopped
	took := v.eventually(slow, "both ways work again", v.both)
	v.t.Logf("after a hard reset in the middle of changes both ways work %.0f s after the boot",
		took.Seconds())
	v.working()
	for _, family := range []string{"iptables", "ip6tables"} {
		rules := v.run(family+"-save", "-t", "nat")
		if n := strings.Count(rules, "-A OUTPUT -p tcp -j SERVICE_PROXY_OUTPUT"); n != 1 ||
			strings.Contains(rules, "10.78.") {
			v.t.Errorf("%d jumps, or services that have gone:\n%s", n, rules)
		}
	}
	v.finished() // bootstrap looks at each boot whether all is there
	if out := v.run("systemctl", "list-units", "--no-legend", "--failed",
		"service-proxy-*"); out != "" {
		v.t.Errorf("failed units:\n%s", out)
	}
	// The files of the state are whole or not there, and no half of one lies about.
	if out := v.run("sh", "-c", `cd /var/lib/service-proxy-agent && ls -A && for f in *.json; do
		[ -s "$f" ] || echo "$f is empty"; done`); strings.Contains(out, "empty") ||
		strings.Contains(out, ".new") || strings.Contains(out, "tmp") {
		v.t.Errorf("the state folder has\n%s", out)
	}
}

// unload stops the agent, which takes the rules out, and unloads what they needed.
const unload = `systemctl stop service-proxy-interception
! command -v nft >/dev/null || nft flush ruleset
for again in 1 2 3 4; do
	for m in xt_owner xt_REDIRECT xt_addrtype xt_comment xt_tcpudp xt_multiport nft_compat \
		nft_chain_nat iptable_nat ip6table_nat nf_nat nf_conntrack_netlink; do
		modprobe -r $m 2>/dev/null || :
	done
done
`

const start = "systemctl start --no-block service-proxy-interception service-proxy-agent\n"

// absent has no way to load a module, says what is told, and lets it be loaded as is advised.
func (v *VM) absent(module string) seen.Absent {
	v.t.Helper()
	// Its file is moved away: modprobe finds no less in its lists, and fails at once. (An install line
	// in modprobe.d has two more programs run each time, and iptables asks for nft_compat dozens of
	// times.)
	file := strings.TrimSpace(v.run("modinfo", "-n", module))
	back := func() { _, _ = v.try("sh", "-c", "[ ! -e $0.away ] || mv $0.away $0", file) }
	defer back() // a failure ends here, too
	v.run("sh", "-c", unload+"mv "+file+" "+file+".away; "+
		"rm -f /run/loaded; grep ^"+module+"' ' /proc/modules >/run/loaded; "+start)
	if out := v.run("cat", "/run/loaded"); out != "" {
		v.t.Errorf("%s could not be unloaded: %s", module, out)
	}
	have := v.told(module)
	back()
	have.Mended = v.mend(have)
	return have
}

// told waits until the agent says what is wrong, or everything works all the same.
func (v *VM) told(what string) seen.Absent {
	v.t.Helper()
	have := seen.Absent{Module: what}
	took := v.eventually(slow, "without "+what+": something is said, or all works", func() error {
		s, err := v.status()
		if err != nil {
			return err
		}
		if s.Ready && v.both() == nil {
			return nil
		}
		if !slices.ContainsFunc(s.Findings, func(f symptom.Finding) bool {
			return f.ID == symptom.FamilyUnusable || f.ID == symptom.RuleRefused ||
				f.ID == symptom.CouldNotLook
		}) {
			return fmt.Errorf("findings: %v, %s", s.Findings, s.NotReady)
		}
		have := v.guest(guestattr.AgentLastFailure)
		if !strings.HasPrefix(have, s.LastFailure[:min(20, len(s.LastFailure))]) ||
			!lasting.MatchString(have) {
			return fmt.Errorf("agent-last-failure is %q", have)
		}
		return nil
	})
	// What comes within some seconds of the first word belongs to it.
	time.Sleep(10 * time.Second)
	s, err := v.status()
	if err != nil {
		v.t.Fatal(err)
	}
	have.Findings = said(s.Findings)
	if len(have.Findings) > 0 {
		have.LastFailure = lastFailure(v.guest(guestattr.AgentLastFailure))
	}
	have.IPv4 = errors.Join(v.outbound(vip), v.inbound(lab.VMAddr)) == nil
	have.IPv6 = errors.Join(v.outbound(vip6), v.inbound(lab.VMAddr6)) == nil
	out, code := v.exit("service-proxy-agent", "doctor")
	have.Doctor = code
	v.t.Logf("without %s, after %.0f s: IPv4 %v, IPv6 %v\n"+
		"agent-last-failure: %s\ndoctor (exit %d):\n%s", what, took.Seconds(), have.IPv4, have.IPv6, v.guest(guestattr.AgentLastFailure), code, out)
	return have
}

// mend does what is advised, and waits until all works.
func (v *VM) mend(have seen.Absent) (command string) {
	v.t.Helper()
	if len(have.Findings) == 0 {
		return ""
	}
	for _, f := range have.Findings {
		for _, c := range f.Commands {
			if strings.HasPrefix(c, "sudo modprobe ") {
				command = c
				if out, err := v.try("sh", "-c", c); err != nil {
					v.t.Errorf("the command that is advised: %s: %v %s", c, err, out)
				}
			}
		}
	}
	limit := 3 * time.Minute // 65 s, and an emulated machine's own
	for _, f := range have.Findings {
		if f.ID == string(symptom.RuleRefused) {
			limit = 8 * time.Minute // a rule that was refused is offered again after five
		}
	}
	v.t.Logf("%q, and all works after %.0f s", command,
		v.eventually(limit, "all works again", v.well).Seconds())
	return command
}

// folderGone is a kernel whose modules an upgrade has taken away.
func (v *VM) folderGone() seen.Absent {
	v.t.Helper()
	v.run("sh", "-c", unload+"mv /lib/modules /lib/modules.away; mkdir /lib/modules; "+start)
	back := func() {
		_, _ = v.try("sh", "-euc", "rmdir /lib/modules; mv /lib/modules.away /lib/modules")
	}
	defer back() // a failure ends here, too
	have := v.told("/lib/modules/RELEASE")
	back()
	v.mend(have)
	have.Mended = "its return; the next boot's, as a rule"
	return have
}

// loadingOff forbids to load modules until the next boot.
func (v *VM) loadingOff() seen.Absent {
	v.t.Helper()
	v.run("sh", "-c", unload+"echo 1 >/proc/sys/kernel/modules_disabled; "+start)
	have := v.told("kernel.modules_disabled=1")
	v.reset()
	v.eventually(slow, "all works after the boot", v.well)
	have.Mended = "reboot"
	return have
}

// clock steps the wall clock by hours.
func (v *VM) clock() (ahead, behind []seen.Finding) {
	v.t.Helper()
	step := func(by, word string) []seen.Finding {
		before := v.guest(guestattr.AgentHeartbeat)
		v.run("sh", "-euc", `date -s "@$(( $(date +%s) + $0 ))"`, by)
		var findings []symptom.Finding
		took := v.eventually(slow, "the clock is found wrong", func() error {
			s, err := v.status()
			findings = s.Findings
			if err == nil && !slices.ContainsFunc(findings, func(f symptom.Finding) bool {
				return f.ID == symptom.ClockWrong && strings.Contains(f.Cause, word)
			}) {
				err = fmt.Errorf("findings: %v", findings)
			}
			return err
		})
		beat := v.eventually(slow, "the heartbeat goes on", func() error {
			if have := v.guest(guestattr.AgentHeartbeat); have == before {
				return fmt.Errorf("it is still %s", have)
			}
			return nil
		})
		v.t.Logf("clock by %s s: found after %.0f s, a heartbeat after %.0f s more: %s (before: %s)", by,
			took.Seconds(), beat.Seconds(), v.guest(guestattr.AgentHeartbeat), before)
		v.drift1()
		if err := v.both(); err != nil {
			v.t.Errorf("clock by %s s: %v", by, err)
		}
		return said(slices.DeleteFunc(findings, func(f symptom.Finding) bool {
			return f.ID != symptom.ClockWrong
		}))
	}
	ahead = step("10800", "ahead of")
	behind = step("-21600", "behind")
	v.run("sh", "-euc", `date -s "@$(( $(date +%s) + 10800 ))"`)
	v.eventually(slow, "the clock is right again", v.well)
	if b := v.Platform.Budget(); !b.Kept() {
		v.t.Errorf("the budget of guest attributes: %+v", b)
	}
	return ahead, behind
}

// drift1 takes one rule away, which is put back.
func (v *VM) drift1() {
	v.t.Helper()
	v.run("sh", "-c", "iptables -t nat -D OUTPUT 1")
	v.eventually(slow, "it is repaired", func() error {
		if out, code := v.exit("service-proxy-agent", "diff"); code != 0 {
			return errors.New(out)
		}
		return nil
	})
}

// conntrack fills the table of connections by lowering its limit, and gives it back.
func (v *VM) conntrack() []seen.Finding {
	v.t.Helper()
	const limit = "/proc/sys/net/netfilter/nf_conntrack_max"
	was := strings.TrimSpace(v.run("cat", limit))
	v.run("sh", "-c", "echo 2 >"+limit)
	var found []symptom.Finding
	took := v.eventually(slow, "the full table is found", func() error {
		_ = v.outbound(vip) // which has no room
		s, err := v.status()
		if err != nil {
			return err
		}
		found = slices.DeleteFunc(s.Findings, func(f symptom.Finding) bool {
			return f.ID != symptom.ConntrackFull
		})
		if len(found) == 0 {
			return fmt.Errorf("findings: %v", s.Findings)
		}
		return nil
	})
	v.t.Logf("a full table of connections is found after %.0f s: %s", took.Seconds(), found[0].Text())
	v.eventually(slow, "serial port 1 tells it", func() error {
		if !strings.Contains(v.Serial(), "connection tracking table is full") {
			return errors.New("it does not")
		}
		return nil
	})
	v.run("sh", "-c", "echo "+was+" >"+limit)
	v.eventually(slow, "all works again", v.well)
	v.eventually(slow, "agent-last-failure tells that it is over", func() error {
		if have := v.guest(guestattr.AgentLastFailure); !strings.Contains(have, "(over; ") {
			return errors.New(have)
		}
		return nil
	})
	return counted(said(found))
}

// prepare makes the disk one of a Compute Engine image.
func (v *VM) prepare() {
	v.t.Helper()
	metadata := lab.MetadataAddr.String()
	v.write("/usr/bin/gsutil", machine.Gsutil, 0o755)
	v.write("/usr/bin/osconfig-recipe", machine.Recipe, 0o755)
	v.write("/usr/bin/sudo", "#!/bin/sh\nexec \"$@\"\n", 0o755)
	v.write("/etc/hosts",
		"127.0.0.1 localhost\n"+metadata+" metadata.google.internal metadata\n", 0o644)
	v.write("/etc/resolv.conf", "nameserver "+metadata+"\n", 0o644)
	// All that update-ca-certificates would do, which takes an emulated processor minutes.
	v.write("/usr/local/share/ca-certificates/test.crt", string(v.CA.PEM()), 0o644)
	v.run("sh", "-c",
		"cat /usr/local/share/ca-certificates/test.crt >>/etc/ssl/certs/ca-certificates.crt")
}

// install runs gcloud's recipe and waits until all of the mesh works.
func (v *VM) install() {
	t := v.t
	t.Helper()
	start := time.Now()
	v.run("osconfig-recipe")
	took := time.Since(start)
	v.finished()
	finished := time.Since(start)
	v.working()
	t.Logf("the recipe took %.0f s; FINISHED after %.0f s; both ways work after %.0f s",
		took.Seconds(), finished.Seconds(), time.Since(start).Seconds())
}

// finished waits until bootstrap-status, seen from outside, is FINISHED.
func (v *VM) finished() {
	v.t.Helper()
	v.eventually(slow, "bootstrap-status FINISHED", func() error {
		if have := v.guest(guestattr.BootstrapStatus); have != progress.Finished {
			return fmt.Errorf("it is %q, last failure %q", have, v.guest(guestattr.BootstrapLastFailure))
		}
		return nil
	})
}

// working waits until both ways work in both families, and the agent says so, too.
func (v *VM) working() {
	v.t.Helper()
	v.eventually(slow, "all works, and the agent says so", v.well)
}

// both says whether both ways go through Envoy in both families.
func (v *VM) both() error {
	return errors.Join(v.outbound(vip), v.outbound(vip6), v.inbound(lab.VMAddr),
		v.inbound(lab.VMAddr6))
}

// well is both, and that nothing is found wrong.
func (v *VM) well() error {
	out, code := v.exit("service-proxy-agent", "status")
	if code != 0 {
		return errors.New(out)
	}
	return v.both()
}

// outbound says whether the service's address answers through Envoy, from inside.
func (v *VM) outbound(to netip.AddrPort) error {
	out, err := v.try("setpriv", "--reuid=65534", "--clear-groups",
		"curl", "-gsS", "-m", "10", "-D", "-", "-o", "/dev/null", "http://"+to.String()+"/")
	if err != nil {
		return fmt.Errorf("%v: %w: %s", to, err, out)
	}
	if !strings.Contains(strings.ToLower(out), controlplane.ServedByHeader+": web") {
		return fmt.Errorf("%v: the answer did not come through Envoy:\n%s", to, out)
	}
	return nil
}

// inbound says whether the serving port answers through Envoy, from outside.
func (v *VM) inbound(addr netip.Addr) error {
	at := netip.AddrPortFrom(addr, servingPort).String()
	resp, err := v.lab.Client.HTTP().Get("http://" + at + "/")
	if err != nil {
		return err
	}
	resp.Body.Close()
	have := resp.Header.Get(controlplane.ServedByHeader)
	if want := fmt.Sprintf("inbound-%d", servingPort); !strings.HasPrefix(have, want) {
		return fmt.Errorf("%s: %s is %q, want %q…", at, controlplane.ServedByHeader, have, want)
	}
	return nil
}
