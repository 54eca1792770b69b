//go:build lab

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
	"github.com/service-proxy-agent/service-proxy-agent/test/platform"
)

// brakeWithin is the promise: within it of a change of the metadata every jump is out, or in again.
const brakeWithin = 5 * time.Second

// operator changes a project's metadata as gcloud compute project-info add-metadata and
// remove-metadata do: by the Compute API, from outside.
type operator struct{ base string }

func newOperator(t *testing.T, p *platform.Emulator) operator {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	p.Serve(ln, nil)
	return operator{"http://" + ln.Addr().String() + "/compute/v1/projects/my-project"}
}

// set sets the key; "" removes it. It returns when that was done.
func (o operator) set(t *testing.T, value string) time.Time {
	t.Helper()
	resp, err := http.Get(o.base)
	must(t, err)
	var project struct {
		CommonInstanceMetadata struct {
			Fingerprint string              `json:"fingerprint"`
			Items       []map[string]string `json:"items"`
		} `json:"commonInstanceMetadata"`
	}
	must(t, json.NewDecoder(resp.Body).Decode(&project))
	resp.Body.Close()
	all := project.CommonInstanceMetadata
	all.Items = slices.DeleteFunc(all.Items, func(item map[string]string) bool {
		return item["key"] == metadata.InterceptionKey
	})
	if value != "" {
		all.Items = append(all.Items, map[string]string{"key": metadata.InterceptionKey, "value": value})
	}
	body, err := json.Marshal(all)
	must(t, err)
	resp, err = http.Post(o.base+"/setCommonInstanceMetadata", "application/json",
		bytes.NewReader(body))
	must(t, err)
	answer, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("set %q: %s %s", value, resp.Status, answer)
	}
	return time.Now()
}

// jumpsOf are our jumps in both families.
func jumpsOf(t *testing.T, m *mesh.Mesh) (jumps []string) {
	t.Helper()
	for line := range strings.Lines(chains(t, m)) {
		if strings.HasPrefix(line, "-A OUTPUT") || strings.HasPrefix(line, "-A PREROUTING") {
			jumps = append(jumps, strings.TrimSpace(line))
		}
	}
	return jumps
}

// inbound are streams from the client to the VM's application.
func (s *streams) inbound(t *testing.T, m *mesh.Mesh, n int) {
	t.Helper()
	for range n {
		c, err := m.Client.Dial(t.Context(), netip.AddrPortFrom(lab.VMAddr, mesh.AppPort))
		must(t, err)
		t.Cleanup(func() { c.Close() })
		s.conns = append(s.conns, c)
	}
}

// TestBrake: an operator turns interception off and on by the project's metadata. All jumps of
// both families and directions go and come, DNS too, new connections go the way that is asked
// for, and no stream is cut, whichever way it was opened. What a person and a machine are told of
// it is true, and a restart, a metadata server that fails, and others who put a jump in
// change nothing.
func TestBrake(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, backend lab.Backend) {
		random := seeded(t)
		config := services()
		config.Inbound[0].HTTP = false // for streams that speak lines
		names := map[string][]netip.Addr{"web.test": {web4.Addr()}}
		config.DNS = &controlplane.DNS{Names: names, IPv6: true}
		project := platform.NewProject()
		m, a := start(t, mesh.Options{Backend: backend, Config: config, NoRuntime: true, Project: project,
			Attribute: `{"api-version":"0.2","proxy-spec":{"network":""},` +
				`"service":{"serving-ports":[8081]},"traffic-interception":{"intercept-dns":true}}`})
		op := newOperator(t, m.Platform)
		must(t, a.WaitReady(within(t, 20*time.Second)))
		eventually(t, 10*time.Second, "all jumps", func() (bool, string) {
			all := jumpsOf(t, m)
			return len(all) == 5, strings.Join(all, "\n") // tcp, udp of each; inbound of IPv4
		})
		whole := chains(t, m)
		redirected, speaking := new(streams), new(streams)
		redirected.open(t, m, db4, soak(50, 10))
		speaking.open(t, m, db4, 10)
		redirected.inbound(t, m, soak(50, 5))
		alive := func(when string, all ...*streams) {
			t.Helper()
			for _, s := range all {
				if broken := s.speak(); len(broken) > 0 {
					t.Errorf("%s: %d of %d streams are cut: %v", when, len(broken), len(s.conns), broken[0])
				}
			}
		}
		alive("before", redirected)

		changed := op.set(t, "off")
		escapes(t, m, web4)
		escapes(t, m, web6)
		_, err := a.Wait(within(t, 5*time.Second), "off", func(s status.Status) bool {
			return s.Mode == "off"
		})
		must(t, err)
		t.Logf("off after %v", time.Since(changed))
		if time.Since(changed) > brakeWithin {
			tooDear(t, "off after %v", time.Since(changed))
		}
		if all := jumpsOf(t, m); len(all) > 0 {
			t.Errorf("jumps are in: %q", all)
		}
		without := func(text string) (rules []string) {
			for line := range strings.Lines(text) {
				if strings.HasPrefix(line, "-A SERVICE_PROXY_") && !strings.Contains(line, "settling") {
					rules = append(rules, strings.TrimSpace(line))
				}
			}
			return rules
		}
		if is, was := without(chains(t, m)), without(whole); !slices.Equal(is, was) {
			t.Errorf("the chains have changed:\n%s\nwant\n%s", strings.Join(is, "\n"),
				strings.Join(was, "\n"))
		}
		alive("off", redirected)
		direct := new(streams)
		direct.open(t, m, db4, soak(50, 10))
		direct.inbound(t, m, soak(50, 5))
		alive("off", direct)
		brakeIsTold(t, m, a, changed)

		// Restarts, each while the metadata server fails in another way; and somebody who puts the
		// jump in.
		since := func() time.Time {
			s, err := a.Wait(within(t, 10*time.Second), "off", func(s status.Status) bool {
				return s.Mode == "off" && s.Passes > 1
			})
			must(t, err)
			return s.Interception.Since
		}
		first := since()
		for i, fault := range []platform.Fault{{Hang: true},
			{Status: http.StatusServiceUnavailable}, {}} {
			time.Sleep(time.Duration(random.IntN(300)) * time.Millisecond)
			a.Kill()
			end := func() {}
			if fault.Hang || fault.Status != 0 {
				fault.Prefix = "/computeMetadata/v1/"
				end = m.Platform.Inject(fault)
			}
			must(t, a.Start())
			if again := since(); !again.Equal(first) {
				t.Errorf("restart %d: off since %v, was %v", i, again, first)
			}
			if all := jumpsOf(t, m); len(all) > 0 {
				t.Errorf("restart %d: jumps are in: %q", i, all)
			}
			end()
		}
		_, err = m.VM.Run(t.Context(), "iptables", "-w", "-t", "nat", "-I", "OUTPUT", "-p", "tcp", "-j",
			"SERVICE_PROXY_OUTPUT")
		must(t, err)
		eventually(t, 10*time.Second, "a jump of somebody else's out", func() (bool, string) {
			all := jumpsOf(t, m)
			return len(all) == 0, strings.Join(all, "\n")
		})
		alive("off, after restarts", redirected, direct)
		if backend == lab.NFT {
			_, err = m.VM.Run(t.Context(), "nft", "flush ruleset")
			must(t, err)
			// Who speaks before the kernel has told of it is cut, and without more all are.
			if broken := speaking.speak(); len(broken) == len(speaking.conns) {
				t.Errorf("at a flush with the brake on all %d streams are cut: %v", len(broken), broken[0])
			}
			eventually(t, 10*time.Second, "the chains again", func() (bool, string) {
				text := chains(t, m)
				return slices.Equal(without(text), without(whole)), text
			})
			alive("off, after a flush", redirected, direct)
		}

		// Nobody understands this: it is said, and nothing is changed.
		op.set(t, "of")
		s, err := a.Wait(within(t, 10*time.Second), "the warning", func(s status.Status) bool {
			return hasFinding(s, symptom.InterceptionKey)
		})
		must(t, err)
		if s.Mode != "off" || !s.Interception.Since.Equal(first) {
			t.Errorf("mode %s, %+v", s.Mode, s.Interception)
		}

		changed = op.set(t, "")
		through(t, m, web4)
		through(t, m, web6)
		must(t, a.WaitReady(within(t, 5*time.Second)))
		t.Logf("on after %v", time.Since(changed))
		eventually(t, 10*time.Second, "all jumps again", func() (bool, string) {
			return slices.Equal(jumpsIn(chains(t, m)), jumpsIn(whole)), chains(t, m)
		})
		alive("on", redirected, direct)
		s, err = a.Wait(within(t, 20*time.Second), "it is over", func(s status.Status) bool {
			return !hasFinding(s, symptom.InterceptionOff) && !hasFinding(s, symptom.InterceptionKey)
		})
		must(t, err)
		if s.Mode != "intercepting" || s.Interception.State != "on" || !s.Interception.Since.IsZero() {
			t.Errorf("mode %s, %+v", s.Mode, s.Interception)
		}

		// The fleet's policy wins over --when-envoy-down, here keep.
		op.set(t, "bypass-when-down")
		_, err = a.Wait(within(t, 10*time.Second), "bypass-when-down", func(s status.Status) bool {
			return s.Interception.WhenEnvoyDown == "bypass" && s.Interception.WhenEnvoyDownBy == "project"
		})
		must(t, err)
		m.Envoy.Kill()
		escapes(t, m, web4)
		must(t, m.Envoy.Start())
		through(t, m, web4)
		// And the attribute itself is no brake.
		m.Platform.DeleteAttribute("gce-service-proxy")
		_, err = a.Wait(within(t, 20*time.Second), "the missing attribute", func(s status.Status) bool {
			return hasFinding(s, symptom.AttributeBad)
		})
		must(t, err)
		through(t, m, web4)
	})
}

func jumpsIn(text string) (jumps []string) {
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "-A OUTPUT") || strings.HasPrefix(line, "-A PREROUTING") {
			jumps = append(jumps, strings.TrimSpace(line))
		}
	}
	return jumps
}

// brakeIsTold: on every channel it is said that interception is off, since when, and by whose
// metadata; and what waits for the mesh does not wait for the operator.
func brakeIsTold(t *testing.T, m *mesh.Mesh, a *mesh.Agent, changed time.Time) {
	t.Helper()
	s, err := a.Wait(within(t, 20*time.Second), "the warning", func(s status.Status) bool {
		return hasFinding(s, symptom.InterceptionOff) &&
			strings.HasPrefix(s.LastFailure, "Interception is off since ")
	})
	must(t, err)
	i := s.Interception
	if i.State != "off" || i.By != "project" || i.Since.Before(changed.Add(-2*time.Second)) ||
		!s.Ready || !s.Healthy() || i.WhenEnvoyDown != "keep" || i.WhenEnvoyDownBy != "setting" {
		t.Errorf("status: %+v, ready %v, findings %v", i, s.Ready, s.Findings)
	}
	since := i.Since.Format(time.RFC3339)
	said := "the project's metadata has service-proxy-agent-interception=off"
	if !strings.Contains(s.LastFailure, since) || !strings.Contains(s.LastFailure, said) ||
		!strings.Contains(s.LastFailure, "(warning; ") {
		t.Errorf("last failure: %s", s.LastFailure)
	}
	mode := "interception: off, by the project's metadata (service-proxy-agent-interception) " +
		"since " + since
	if !slices.ContainsFunc(s.History, func(one status.Transition) bool { return one.Text == mode }) {
		t.Errorf("history: %+v", s.History)
	}
	for what, text := range map[string]string{"serial": m.Platform.Serial(),
		"log": fmt.Sprint(m.Platform.LogEntries())} {
		if !strings.Contains(text, mode) || !strings.Contains(text, said) {
			t.Errorf("%s does not tell:\n%s", what, text)
		}
	}
	must(t, m.Platform.Wait(within(t, time.Minute), func() bool {
		g := m.Platform.GuestAttributes(guestattr.Namespace)
		return strings.HasPrefix(g["agent-status"], "v1 state=off ") &&
			strings.Contains(g["agent-last-failure"], said)
	}))
	_, metrics, err := a.Get("/metrics")
	must(t, err)
	for _, line := range []string{"service_proxy_agent_interception_off 1\n",
		"service_proxy_agent_mode{mode=\"off\"} 1\n", "service_proxy_agent_ready 1\n",
		"service_proxy_agent_finding{id=\"interception-off\",severity=\"warning\"} 1\n"} {
		if !strings.Contains(metrics, line) {
			t.Errorf("metrics have no %q", line)
		}
	}
	for _, path := range []string{"/healthz", "/healthz/ready"} {
		if code, body, err := a.Get(path); err != nil || code != http.StatusOK {
			t.Errorf("%s: %d %s %v", path, code, body, err)
		}
	}
	for _, c := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"status"}, 0, "Off: interception is off, as intended, by the project's metadata"},
		{[]string{"diff"}, 0, "interception is off by the metadata key service-proxy-agent-interception"},
		{[]string{"doctor"}, 0, "Interception is off since " + since},
		{[]string{"explain", web4.String()}, 1, "interception is off, as intended"},
		{[]string{"wait", "--timeout", "5s"}, 0, ""},
	} {
		out, stderr, code, err := a.RunAs(t.Context(), 0, a.Settings(), c.args...)
		if err != nil || code != c.code || !strings.Contains(out, c.says) {
			t.Errorf("%v: exit code %d %v, want %d and %q\n%s%s", c.args, code, err, c.code,
				c.says, out, stderr)
		}
	}
	// The same without the daemon.
	a.Kill()
	for _, c := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"diff"}, 0, "interception is off by the metadata key service-proxy-agent-interception"},
		{[]string{"doctor"}, 2, "Interception is off since " + since}, // no agent: not all can be seen
		{[]string{"explain", web4.String()}, 1, "interception is off, as intended"},
	} {
		out, stderr, code, err := a.RunAs(t.Context(), 0, a.Settings(), c.args...)
		if err != nil || code != c.code || !strings.Contains(out, c.says) {
			t.Errorf("%v without the daemon: exit code %d %v, want %d and %q\n%s%s", c.args, code, err,
				c.code, c.says, out, stderr)
		}
	}
	must(t, a.Start())
}

// braked is one VM of a fleet.
type braked struct {
	*mesh.Mesh
	a       *mesh.Agent
	streams streams
}

// TestBrakeFleet: one change of the project's metadata turns interception off, and on again, on 20
// VMs (in make test on four), each with its own daemon, Envoy and metadata server. Agents are
// killed, stopped and held up in the middle. All are out, or in again, within five seconds of the
// change, or of their agent's start; none is left behind, and no stream is cut.
func TestBrakeFleet(t *testing.T) {
	beside(t)
	random := seeded(t)
	project := platform.NewProject()
	fleet := make([]*braked, soak(20, 4))
	var starts sync.WaitGroup
	errs := make([]error, len(fleet))
	for i := range fleet {
		starts.Go(func() {
			ctx := within(t, 2*time.Minute)
			m, err := mesh.New(ctx, mesh.Options{Backend: lab.Backends[i%2], Config: services(),
				NoRuntime: true, Project: project})
			if err != nil {
				errs[i] = err
				return
			}
			fleet[i] = &braked{Mesh: m, a: m.NewAgent()}
			if errs[i] = fleet[i].a.Start(); errs[i] == nil {
				errs[i] = fleet[i].a.WaitReady(ctx)
			}
		})
	}
	starts.Wait()
	t.Cleanup(func() {
		for i, vm := range fleet {
			if vm == nil {
				continue
			}
			if t.Failed() && os.Getenv("SOAK") == "" {
				t.Logf("VM %d:\n%s", i, vm.a.Log())
			}
			if err := vm.Close(); err != nil {
				t.Error(err)
			}
		}
	})
	for _, err := range errs {
		must(t, err)
	}
	op := newOperator(t, fleet[0].Platform)
	for _, vm := range fleet {
		through(t, vm.Mesh, web4)
		vm.streams.open(t, vm.Mesh, db4, 3)
	}
	for round := range soak(6, 2) {
		off := round%2 == 0
		value := map[bool]string{true: "off", false: ""}[off]
		// Every second one meets something at a random moment around the change.
		var trouble sync.WaitGroup
		ready := make([]time.Time, len(fleet)) // when its agent was there to act
		for i, vm := range fleet {
			what := random.IntN(6)
			before, long := time.Duration(random.IntN(2500))*time.Millisecond,
				time.Duration(200+random.IntN(2000))*time.Millisecond
			trouble.Go(func() {
				time.Sleep(before)
				switch what {
				case 0:
					vm.a.Kill()
					time.Sleep(long / 4)
					errs[i] = vm.a.Start()
				case 1:
					_, _ = vm.a.Stop()
					time.Sleep(long / 4)
					errs[i] = vm.a.Start()
				case 2:
					pid := vm.a.PID()
					errs[i] = syscall.Kill(pid, syscall.SIGSTOP)
					time.Sleep(long)
					_ = syscall.Kill(pid, syscall.SIGCONT)
				default:
					return
				}
				ready[i] = time.Now()
			})
		}
		time.Sleep(time.Second)
		changed := op.set(t, value)
		took := make([]time.Duration, len(fleet))
		var looks sync.WaitGroup
		for i, vm := range fleet {
			looks.Go(func() { took[i] = vm.follows(t.Context(), off, changed) })
		}
		looks.Wait()
		trouble.Wait()
		late := 0
		for i, vm := range fleet {
			must(t, errs[i])
			if took[i] == 0 {
				t.Errorf("round %d: VM %d is left behind: %q\n%s", round, i, jumpsOf(t, vm.Mesh), vm.a.Log())
				continue
			}
			if ready[i].After(changed) {
				took[i] -= min(took[i], ready[i].Sub(changed))
			}
			if took[i] > brakeWithin {
				late++
			}
		}
		slices.Sort(took)
		t.Logf("round %d, off %v: %d VMs, the median after %v, the last after %v", round, off, len(fleet),
			took[len(took)/2].Round(time.Millisecond), took[len(took)-1].Round(time.Millisecond))
		if late > 0 {
			tooDear(t, "round %d: %d of %d later than %v", round, late, len(fleet), brakeWithin)
		}
		// Whoever was restarted goes by it, too, and the status says so.
		for i, vm := range fleet {
			_, err := vm.a.Wait(within(t, 15*time.Second), "its word", func(s status.Status) bool {
				return (s.Mode == "off") == off && (s.Interception.State == "off") == off && s.Ready
			})
			if err != nil {
				t.Errorf("round %d: VM %d: %v", round, i, err)
			}
			if all := jumpsOf(t, vm.Mesh); (len(all) == 0) != off {
				t.Errorf("round %d: VM %d has jumps %q", round, i, all)
			}
			if broken := vm.streams.speak(); len(broken) > 0 {
				t.Errorf("round %d: VM %d: streams are cut: %v", round, i, broken)
			}
			vm.streams.open(t, vm.Mesh, db4, 1) // of this way, for the next round
		}
	}
}

// follows is how long after a change new connections of both families go the way that it asks for;
// 0: not at all.
func (vm *braked) follows(ctx context.Context, off bool, changed time.Time) time.Duration {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	left := []netip.AddrPort{web4, web6}
	for ctx.Err() == nil {
		one, cancel := context.WithTimeout(ctx, time.Second)
		r, err := lab.HTTPProbe(one, vm.VM, 1000, left[0])
		cancel()
		if err == nil && r.Escaped == off {
			if left = left[1:]; len(left) == 0 {
				return max(time.Since(changed), time.Millisecond)
			}
			continue
		}
		time.Sleep(20 * time.Millisecond)
	}
	return 0
}
